"""Features of the frozen image tower, once for each image that is ever seen.

What an image looks like in an epoch is a function of (seed, epoch, index), so the frozen tower's feature of it is one too: it
is computed ahead for a whole epoch, and kept (:class:`plpp_reg.io.store.TensorStore`) for the next method or prompt.
A feature's last bits depend on where in which batch its image stands. So images are encoded in canonical batches
(:func:`canonical_batches`), which their number alone decides: kept or not, cold or warm, by however many processes and threads,
the features are the same to the bit. While one batch is encoded, DATALOADER.NUM_WORKERS threads, at least one, read and augment
the next.
"""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import PIL
import torch
from torch import Tensor
from torch.nn import functional as F

from plpp_reg.data.augmentation import build_transform
from plpp_reg.data.contents import files_sha256, forget_contents
from plpp_reg.data.loaders import DECODED_BYTES, ImageDataset, image_seed_of, read_ahead, view_of
from plpp_reg.io.files import clear_left_behind
from plpp_reg.io.folders import cache_folder
from plpp_reg.io.store import Entry, TensorStore

if TYPE_CHECKING:
    from plpp_reg.engine.trainer import PromptTrainer

BATCH = 64  # images of a canonical batch at most
CPU_FIELDS = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part", "CPU variant")
VERSION = 3  # of what is computed: raise it when the image tower or the transforms change by a bit


def canonical_batches(images: int) -> list[range]:
    """Which of so many images are encoded together: by index, :data:`BATCH` of them, and what is left as one smaller batch."""
    return [range(i, min(i + BATCH, images)) for i in range(0, images, BATCH)]


def feature_store(max_gib: float) -> TensorStore:
    return TensorStore(cache_folder() / "features", max_gib)


def show_store(clear: bool = False) -> None:
    """``plpp cache``: what is kept, and remove it if asked to."""
    store = feature_store(1)
    entries, halves = store.entries(), store.halves()
    print(f"{store.folder}: {len(entries)} file{'s' * (len(entries) != 1)}, {_mib(entries)}")
    if halves:
        print(f"half-written, by runs at work or killed ones: {len(halves)}, {_mib(halves)}")
    if entries:
        days = [f"{(time.time() - entry.used) / 86400:.1f}" for entry in (entries[0], entries[-1])]
        print(f"last used {days[0]} (the oldest) to {days[1]} days ago; FEATURES.MAX_GIB bounds them, --clear removes them")
    if clear:
        print(f"removed {store.clear()}")
        forget_contents()
        for folder in (store.folder.parent, *filter(Path.is_dir, store.folder.parent.glob("*"))):
            clear_left_behind(folder)  # half-drawn pictures of the embedded data set


def _mib(entries: Sequence[Entry]) -> str:
    return f"{sum(entry.size for entry in entries) / 2**20:.1f} MiB"


class FrozenFeatures:
    """The normalised features (N, embed_dim), float32 on the CPU, of a trainer's images."""

    def __init__(self, trainer: PromptTrainer) -> None:
        self.trainer = trainer
        self.store = feature_store(trainer.cfg.FEATURES.MAX_GIB)
        self._last: tuple[tuple[str, int], Tensor] | None = None
        self._images: dict[str, ImageDataset] = {}  # by split

    def of(self, split: str, epoch: int = 0) -> Tensor:
        """Of every image of "train", as augmented in ``epoch``, of "val" or of "test"."""
        key = (split, view_of(epoch, self.trainer.cfg.INPUT.VIEWS) if split == "train" else 0)
        if self._last is None or self._last[0] != key:
            what, ranks = self._described(*key), self.trainer.ranks
            found = self.store.find(what)
            if not ranks.all_agree(found is not None):
                found = {"features": self._compute(*key)}
                if ranks.first:
                    self.store.keep(what, found)
            self._last = key, found["features"]
        return self._last[1]

    def _compute(self, split: str, view: int) -> Tensor:
        t, images = self.trainer, self._images_of(split)
        batches = canonical_batches(len(images))
        keys = [[(view, i) for i in batch] for batch in t.ranks.share(batches)]
        parts = [torch.empty(0, BATCH, t.clip_model.text_projection.shape[1])]
        with t.computing():
            for batch in read_ahead(images, keys, max(1, t.cfg.DATALOADER.NUM_WORKERS)):
                features = t.encode_frozen(batch.to(t.device)).cpu()
                parts.append(F.pad(features, (0, 0, 0, BATCH - len(features))).unsqueeze(0))  # ranks exchange equal shares
        rows = t.ranks.gather_rows(torch.cat(parts), len(batches))
        return rows.flatten(0, 1)[: len(images)].contiguous()

    def _images_of(self, split: str) -> ImageDataset:
        if split not in self._images:
            cfg = self.trainer.cfg
            transform, items = build_transform(cfg, split == "train"), getattr(self.trainer.data, split)
            self._images[split] = ImageDataset(items, transform, image_seed_of(cfg), DECODED_BYTES)
        return self._images[split]

    def _described(self, split: str, view: int) -> dict[str, Any]:
        """Everything that a bit of the features depends on.

        Read anew for each epoch, not once a run: a picture or a tensor that changes in between gives other features, and those
        must not be kept under the name of the old ones. It costs some microseconds an image.
        """
        t, cfg, train = self.trainer, self.trainer.cfg, split == "train"
        return {
            "what": "normalised features of CLIP's image tower",
            "version": VERSION,
            "weights": weights_sha256(t.clip_model.visual),
            "precision": t.precision,
            "device": _device_name(t.device),
            "matmul": [torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32],
            "libraries": [torch.__version__, metadata.version("torchvision"), PIL.__version__],
            "threads": torch.get_num_threads(),
            "input": {n: list(v) if isinstance(v, tuple) else v for n, v in sorted(cfg.INPUT.items()) if n != "VIEWS"},
            "train": train,
            "seed": image_seed_of(cfg) if train else None,
            "epoch": view,
            "files": files_sha256(getattr(t.data, split)),
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


def weights_sha256(module: torch.nn.Module) -> str:
    """Hash of a module's tensors and of what they do not tell (activations, heads); made again when a tensor has changed."""
    tensors = [(t.data_ptr(), 0 if t.is_inference() else t._version, t.dtype) for t in module.state_dict().values()]
    seen = (tensors, repr(module), [m.num_heads for m in module.modules() if hasattr(m, "num_heads")])
    if module.__dict__.get("_plpp_sha256", (None,))[0] != seen:
        digest = hashlib.sha256(str(seen[1:]).encode())
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        module.__dict__["_plpp_sha256"] = (seen, digest.hexdigest())
    return module.__dict__["_plpp_sha256"][1]
