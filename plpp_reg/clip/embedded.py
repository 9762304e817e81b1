"""The embedded default backbone: a tiny CLIP in OpenAI's architecture, beside this file (docs/embedded.md).

Most of CLIP's 49,408 word vectors never occurred in its training captions. The file holds the trained rows,
and for each of the others three trained tokens of similar spelling. `embedded_state_dict` builds the missing
rows from these, in integers and single IEEE operations, so that every platform gets the same bits.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from plpp_reg.errors import InputError
from plpp_reg.io.mixing import STEP, mixed

if TYPE_CHECKING:
    import numpy as np

FILE = Path(__file__).with_name("embedded.safetensors")
FORMAT = "1"
_ONE = 1 << 20  # fixed point: sums of squares of a row stay exact in 64-bit integers and in float64


def embedded_state_dict(file: Path | None = None) -> dict[str, torch.Tensor]:
    """The embedded model's whole state dict, as `clip.model.build_model` takes it, in float16 on the CPU.

    Args:
        file: another weight file of the same format, as `tools/train_embedded.py --out` writes it; None: the package's.

    Raises:
        InputError: the weight file is not beside this module, or of another format version; no package `safetensors`.
    """
    file = file or FILE
    tensors, _ = _read(file)
    stat = file.stat()
    towers = {name: tensor for name, tensor in tensors.items() if not name.startswith("token_embedding.")}
    return {**towers, "token_embedding.weight": _word_vectors(file.resolve(), stat.st_mtime_ns, stat.st_size).clone()}


@functools.lru_cache(maxsize=1)  # it is most of a loading, and some programs load many times
def _word_vectors(file: Path, _changed: int, _size: int) -> torch.Tensor:
    """The whole vocabulary's, of the file as it is."""
    names = [f"token_embedding.{name}" for name in ("trained", "trained_ids", "neighbours")]
    tensors, metadata = _read(file, *names)
    rows, ids, neighbours = (tensors[name] for name in names)
    ids = ids.long()
    other = torch.ones(len(rows) + len(neighbours), dtype=torch.bool)
    other[ids] = False
    table = torch.empty(len(other), rows.shape[1], dtype=torch.float16)
    table[ids] = rows
    tokens = other.nonzero()[:, 0]
    spread, lean = float(metadata["fill_spread"]), float(metadata["fill_lean"])
    filled = fill_untrained(rows.numpy(), tokens.numpy(), neighbours.numpy(), spread, lean)
    table[tokens] = torch.from_numpy(filled)
    return table


def trained_token_ids(file: Path | None = None) -> torch.Tensor:
    """The ids of the word vectors that training reached: sorted, int64; `file` as above."""
    tensors, _ = _read(file or FILE, "token_embedding.trained_ids")
    return tensors["token_embedding.trained_ids"].long()


def embedded_metadata() -> dict[str, str]:
    """What the weight file's header says of its making: seed, steps, held-out vendor, sources and so on."""
    return _read(FILE, "logit_scale")[1]


def fill_untrained(rows: np.ndarray, tokens: np.ndarray, neighbours: np.ndarray, spread: float, lean: float) -> np.ndarray:
    """Word vectors for tokens that training never reached, made to look like the trained ones.

    Args:
        rows: (N, D) float16, the trained rows.
        tokens: (U,) the vocabulary ids to fill.
        neighbours: (U, K) for each of them, indices into `rows`.
        spread: length of the token's own pseudo-random direction; that of the neighbours' mean is 1.
        lean: length of the trained rows' common direction in the sum, which trained rows have too.

    Returns:
        (U, D) float16. Each row's norm is that of a trained row picked by the token's id.
    """
    import numpy as np

    fixed = np.rint(rows.astype(np.float64) * _ONE).astype(np.int64)
    norms = np.sqrt(np.sort((fixed * fixed).sum(1)).astype(np.float64)) / _ONE
    centre = fixed.sum(0) // len(fixed)
    fixed -= centre
    common = centre / np.sqrt(np.float64((centre * centre).sum()))
    out = np.empty((len(tokens), rows.shape[1]), dtype=np.float16)
    dims = np.arange(rows.shape[1], dtype=np.uint64)
    for start in range(0, len(tokens), 4096):
        part = slice(start, start + 4096)
        token = tokens[part].astype(np.uint64)
        bits = _hash((token << np.uint64(16))[:, None] + dims)
        # The sum of four 16-bit draws: near enough to a normal variable, and an integer.
        noise = sum(((bits >> np.uint64(s)) & np.uint64(0xFFFF)).astype(np.int64) for s in (0, 16, 32, 48))
        noise -= 2 * 0xFFFF
        mean = sum(fixed[neighbours[part, k]] for k in range(neighbours.shape[1]))
        direction = _unit(mean) + spread * _unit(noise) + lean * common
        direction = np.rint(direction * _ONE).astype(np.int64)
        picked = norms[(_hash(token ^ np.uint64(0x5DEECE66D)) % np.uint64(len(norms))).astype(np.int64)]
        out[part] = (_unit(direction) * picked[:, None]).astype(np.float16)
    return out


def _unit(x: np.ndarray) -> np.ndarray:
    """Integer rows at length 1. The sum of squares is exact, so its order does not matter."""
    import numpy as np

    return x / np.sqrt((x * x).sum(1).astype(np.float64))[:, None]


def _hash(x: np.ndarray) -> np.ndarray:
    """splitmix64 of each element, modulo 2^64."""
    import numpy as np

    return mixed(x + np.uint64(STEP))


def _read(path: Path, *names: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The named tensors of the weight file (all, if none is named) and its metadata."""
    try:
        from safetensors import safe_open
    except ModuleNotFoundError as error:
        raise InputError("the embedded backbone is read with the package safetensors: pip install safetensors") from error
    if not path.is_file():
        raise InputError(f"the embedded backbone's weights are missing: {path}")
    file: Any
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            found = metadata.get("format")
            raise InputError(f"{path.name} has format {found!r}, this version reads {FORMAT!r}")
        return {name: file.get_tensor(name) for name in names or file.keys()}, metadata
