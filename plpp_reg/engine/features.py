"""Features of the frozen image tower, once for each image that is ever seen.

What an image looks like in an epoch is a function of (seed, epoch, index), so the frozen tower's feature of it is one too: it
is computed ahead for a whole epoch, and kept (:class:`plpp_reg.io.store.TensorStore`) for the next method or prompt.
A feature's last bits depend on where in which batch its image stands. So images are encoded in canonical batches
(:func:`canonical_batches`), which their number alone decides: kept or not, cold or warm, by however many processes and threads,
the features are the same to the bit. While one batch is encoded, DATALOADER.NUM_WORKERS threads, at least one, read and augment
the next.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import PIL
import torch
from torch import Tensor
from torch.nn import functional as F
from yacs.config import CfgNode

from plpp_reg.data import DataSplit
from plpp_reg.data.augmentation import build_transform
from plpp_reg.data.contents import files_sha256, forget_contents
from plpp_reg.data.loaders import DECODED_BYTES, ImageDataset, image_seed_of, opener_of, read_ahead, view_of
from plpp_reg.engine.backbone import computing
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.frozen import FrozenEncoder
from plpp_reg.io.files import clear_left_behind
from plpp_reg.io.folders import cache_folder
from plpp_reg.io.pictures import READING, open_picture
from plpp_reg.io.store import TensorStore

BATCH = 64  # images of a canonical batch at most
CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part", "CPU variant")
VERSION = 3  # of what is computed: raise it when the image tower or the transforms change by a bit


def canonical_batches(images: int) -> list[range]:
    """Which of so many images are encoded together: by index, :data:`BATCH` of them, and what is left as one smaller batch."""
    return [range(i, min(i + BATCH, images)) for i in range(0, images, BATCH)]


def feature_store(max_gib: float) -> TensorStore:
    return TensorStore(cache_folder() / "features", max_gib)


def clear_cache() -> int:
    """Remove the kept features, hashes and what killed processes left half-written; how many files of features there were."""
    store = feature_store(1)
    removed = store.clear()
    forget_contents()
    for folder in (store.folder.parent, *filter(Path.is_dir, store.folder.parent.glob("*"))):
        clear_left_behind(folder)  # half-drawn pictures of the embedded data set
    return removed


class FrozenFeatures:
    """The features (N, width), float32 on the CPU, of an encoder's images.

    Args:
        encoder: what computes them, and says what they depend on.
        cfg: how images are augmented, and how much may be kept.
        data: the images.
        precision, device: in which ``encoder`` computes, and where; :attr:`key <plpp_reg.engine.frozen.FrozenEncoder.key>`
            has the rest.
        ranks: among which the images are shared out.
        progress: shows a bar over batches, as :meth:`plpp_reg.engine.log.RunLog.progress`.
        phase: whose seconds they are, as :meth:`plpp_reg.engine.state.RunState.phase`.
    """

    def __init__(
        self,
        encoder: FrozenEncoder,
        cfg: CfgNode,
        data: DataSplit,
        precision: str,
        device: torch.device,
        ranks: Ranks,
        progress: Callable[..., Iterable[Any]] = lambda items, *_, **__: items,
        phase: Callable[[str], contextlib.AbstractContextManager[None]] = lambda name: contextlib.nullcontext(),
    ) -> None:
        self.encoder, self._cfg, self.data = encoder, cfg, data
        self.precision, self.device, self.ranks = precision, device, ranks
        self._progress, self._phase = progress, phase
        self.store = feature_store(cfg.FEATURES.MAX_GIB)
        self._last: tuple[tuple[str, int], Tensor] | None = None
        self._images: dict[str, ImageDataset] = {}  # by split

    @functools.cached_property
    def cfg(self) -> CfgNode:
        """With the encoder's own keys of INPUT."""
        cfg = self._cfg.clone()
        cfg.INPUT.update(self.encoder.input)
        return cfg

    def of(self, split: str, epoch: int = 0) -> Tensor:
        """Of every image of "train", as augmented in ``epoch``, of "val" or of "test"."""
        key = (split, view_of(epoch, self.cfg.INPUT.VIEWS) if split == "train" else 0)
        if self._last is None or self._last[0] != key:
            with self._phase("image features"):
                self._last = key, self._found_or_computed(*key)
        return self._last[1]

    def _found_or_computed(self, split: str, view: int) -> Tensor:
        what, ranks = self._described(split, view), self.ranks
        found = self.store.find(what)
        if not ranks.all_agree(found is not None):
            found = {"features": self._compute(split, view)}
            if ranks.first:
                self.store.keep(what, found)
        return found["features"]

    def _compute(self, split: str, view: int) -> Tensor:
        images = self._images_of(split)
        batches = canonical_batches(len(images))
        keys = [[(view, i) for i in batch] for batch in self.ranks.share(batches)]
        parts = [torch.empty(0, BATCH, self.encoder.width)]
        with computing(self.device, self.precision):
            ahead = read_ahead(images, keys, max(1, self.cfg.DATALOADER.NUM_WORKERS))
            for batch in self._progress(ahead, f"features of {split}", total=len(keys)):
                features = self.encoder.encode(batch.to(self.device)).cpu()
                parts.append(F.pad(features, (0, 0, 0, BATCH - len(features))).unsqueeze(0))  # ranks exchange equal shares
        rows = self.ranks.gather_rows(torch.cat(parts), len(batches))
        return rows.flatten(0, 1)[: len(images)].contiguous()

    def _images_of(self, split: str) -> ImageDataset:
        if split not in self._images:
            transform, items = build_transform(self.cfg, split == "train"), getattr(self.data, split)
            seed, opener = image_seed_of(self.cfg), opener_of(self.cfg)
            self._images[split] = ImageDataset(items, transform, seed, DECODED_BYTES, opener)
        return self._images[split]

    def _described(self, split: str, view: int) -> dict[str, Any]:
        """Everything that a bit of the features depends on.

        Read anew for each epoch, not once a run: a picture or a tensor that changes in between gives other features, and those
        must not be kept under the name of the old ones. It costs some microseconds an image.
        """
        cfg, train = self.cfg, split == "train"
        reading = {"reading": READING} if opener_of(cfg) is open_picture else {}
        return {
            "what": "normalised features of CLIP's image tower",
            "version": VERSION,
            **self.encoder.described(),
            **arithmetic(self.precision, self.device),
            "input": {n: list(v) if isinstance(v, tuple) else v for n, v in sorted(cfg.INPUT.items()) if n != "VIEWS"},
            "train": train,
            "seed": image_seed_of(cfg) if train else None,
            "epoch": view,
            "files": files_sha256(getattr(self.data, split)),
            **reading,
        }


def arithmetic(precision: str, device: torch.device) -> dict[str, Any]:
    """What the last bits of anything depend on that is computed here, beside what goes in."""
    return {
        "precision": precision,
        "device": _device_name(device),
        "matmul": [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32],
        "libraries": [torch.__version__, metadata.version("torchvision"), PIL.__version__],
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    """The GPU's, or the CPU's instruction set and model, by which torch and its libraries choose kernels."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.backends.cpu.get_cpu_capability()}, {_processor()}"


@functools.cache
def _processor() -> str:
    """The CPU's make and model, as far as the system says."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split("\n\n")[0]
    except OSError:  # not Linux, where platform's answer is often empty
        return platform.processor()
    fields = dict(line.partition(":")[::2] for line in first.splitlines())
    return " ".join(value.strip() for name, value in fields.items() if name.strip() in CPU_FIELDS)
