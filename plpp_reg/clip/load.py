"""One loader: a name, a path or the embedded default -> a frozen CLIP in openai-clip's architecture."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import urllib.error
import warnings
from importlib import metadata
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from plpp_reg.errors import InputError, install, line_of, unknown
from plpp_reg.io.folders import openai_clip_folder
from plpp_reg.io.safe_reading import is_torchscript, read_tensors, read_torchscript

EMBEDDED = "embedded"
OPEN_CLIP = "open_clip:"  # what the names of open_clip's models begin with
PRECISIONS = {"fp32": torch.float32, "amp": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@functools.cache
def openai_clip() -> ModuleType:
    """The package openai-clip, imported when it is needed; not a fork of it that a checkout has under the same name."""
    try:
        with warnings.catch_warnings():  # its import of pkg_resources warns of setuptools 81
            warnings.filterwarnings("ignore", message=".*pkg_resources.*")
            hidden = _hidden_openai_clip()
            if hidden is not None:
                return _import_as("plpp_reg_openai_clip", hidden)
            import clip
    except ImportError as e:
        raise InputError(f"the package openai-clip, with setuptools below 81, is needed: {install('train')} ({e})") from e
    return clip


def _hidden_openai_clip() -> Path | None:
    """Where openai-clip is, if ``import clip`` means something else: checkouts of CoOp's kind have a package ``clip``."""
    try:
        installed = Path(str(metadata.distribution("openai-clip").locate_file("clip/__init__.py")))
    except metadata.PackageNotFoundError:
        return None
    spec = importlib.util.find_spec("clip")
    first = spec.origin if spec is not None else None
    return installed if installed.is_file() and first and not installed.samefile(first) else None


def _import_as(name: str, place: Path) -> ModuleType:
    """A package by its ``__init__.py``, under another name."""
    spec = importlib.util.spec_from_file_location(name, place, submodule_search_locations=[str(place.parent)])
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def load_clip(name: str = EMBEDDED, precision: str = "fp32", device: torch.device | str = "cpu") -> nn.Module:
    """A CLIP model, frozen: no parameter requires a gradient, eval mode, weights in ``precision``.

    Args:
        name: "embedded" (the small model that the package carries), one of OpenAI's names ("ViT-B/16", "RN50", ...), the path
            of a JIT archive, a state_dict (``torch.save`` or safetensors) with OpenAI's keys, or a model of open_clip's
            ("open_clip:ViT-B-16/laion2b_s34b_b88k", "open_clip:ViT-B-16/FILE").
        precision: "fp32", "amp" (fp32 weights), "bf16" or "fp16"; LayerNorm and embeddings stay float32, as OpenAI has it.
        device: where the model goes.

    Returns:
        ``clip.model.CLIP``. ``trained_token_ids`` on it holds the ids of the token rows that mean something, or None for all.
        Torch's random stream on the CPU stays as it was.

    Raises:
        InputError: no such name or file, no network, a file that is not a CLIP, a wrong checksum.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    trained = None
    if name.startswith(OPEN_CLIP):
        from plpp_reg.clip.from_open_clip import load_open_clip

        model = load_open_clip(name)
    elif name == EMBEDDED:
        from plpp_reg.clip.embedded import embedded_state_dict, trained_token_ids

        model, trained = _build(embedded_state_dict(), name), trained_token_ids()
    elif name in openai_clip().clip._MODELS:
        model = _build(read_state_dict(_download(name)), name)
    elif Path(name).is_file():
        model = _build(read_state_dict(Path(name)), name)
    else:
        raise unknown("backbone (a model name or a file)", name, [EMBEDDED, *openai_clip().clip._MODELS])
    model = set_precision(model, PRECISIONS[precision]).to(device)
    model.trained_token_ids = trained
    return freeze(model)


def weights_file(name: str) -> Path | None:
    """The file that :func:`load_clip` reads for a backbone; None where it is not here."""
    if name == EMBEDDED:
        from plpp_reg.clip.embedded import FILE

        return FILE
    if name.startswith(OPEN_CLIP):
        from plpp_reg.clip.from_open_clip import open_clip_file

        return open_clip_file(name)
    elif url := openai_clip().clip._MODELS.get(name):
        path = openai_clip_folder() / url.rsplit("/", 1)[1]
    else:
        path = Path(name)
    return path if path.is_file() else None


def _build(state_dict: dict[str, torch.Tensor], name: str) -> nn.Module:
    """``clip.model.CLIP`` in float32 from weights with OpenAI's keys."""
    try:
        return from_weights(state_dict)
    except (KeyError, RuntimeError, AssertionError, IndexError, ZeroDivisionError, ValueError) as e:
        if line_of(e) is not None and not isinstance(e, InputError):  # no memory
            raise
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"backbone {name!r}: expected weights of OpenAI's CLIP, got something else ({first})") from e


def from_weights(state_dict: dict[str, torch.Tensor]) -> nn.Module:
    """openai-clip's ``build_model``, which takes its sizes from the weights, in float32 and not rounded to float16 on the way.

    No initial weights are drawn: it costs more than all else, and torch's random stream stays as it is.
    """
    build, shapes = openai_clip().model.build_model, {name: weight.to("meta") for name, weight in state_dict.items()}
    with torch.device("meta"):
        model = build(shapes).float()  # it takes three scalars out of what it is given
    model.to_empty(device="cpu")
    for buffer in model.buffers():
        buffer.zero_()  # a file may be without the counts of a ResNet's batch norms
    model.load_state_dict({name: state_dict[name] for name in shapes})
    mask = model.build_attention_mask()  # neither a parameter nor a buffer
    for block in model.transformer.resblocks:
        block.attn_mask = mask
    return model


def freeze(model: nn.Module) -> nn.Module:
    """No gradients, eval mode (batch statistics of a ResNet stay as they are)."""
    return model.requires_grad_(False).eval()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Computing in the tensors' own dtypes, whatever stands around it; on "meta", where nothing is computed, nothing."""
    return contextlib.nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def set_precision(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast what OpenAI casts to fp16 (convolutions, linear maps, attention, projections) to ``dtype``; the rest stays."""
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.MultiheadAttention)):
            module.to(dtype)
        for name in ("text_projection", "proj"):
            value = getattr(module, name, None)
            if isinstance(value, nn.Parameter):
                value.data = value.data.to(dtype)
    return model


def _download(name: str) -> Path:
    """The weights' file, downloaded once and its SHA-256 checked each time, by openai-clip."""
    from filelock import FileLock

    clip = openai_clip().clip
    url = clip._MODELS[name]
    target = openai_clip_folder() / url.rsplit("/", 1)[1]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):  # openai-clip writes to the final name: one process at a time
            return Path(clip._download(url, str(openai_clip_folder())))
    except (urllib.error.URLError, OSError, RuntimeError) as e:
        raise InputError(
            f"backbone {name!r}: expected its weights at {target} (SHA-256 {url.split('/')[-2]}) and could not download them "
            f"({e}); put the file there, or name a local file, or 'embedded'"
        ) from e


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Tensors by name from a JIT archive, a ``torch.save`` file (weights only: nothing in it is run) or safetensors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded = load_file(path)
        elif is_torchscript(path):
            loaded = read_torchscript(path)
        else:
            loaded = read_tensors(path)
    except Exception as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise InputError(f"{path}: expected CLIP weights (JIT archive, state_dict or safetensors), refused ({first})") from e
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in loaded.items()):
        raise InputError(f"{path}: expected tensors by name, got {type(loaded).__name__}")
    for name, tensor in loaded.items():
        if tensor.is_complex():
            raise InputError(f"{path}: expected real numbers, {name!r} holds {tensor.dtype}")
    return loaded
