"""A trained prompt as one file that needs nothing of this package: safetensors, or ONNX with the image tower in it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plpp_reg.data.augmentation import build_transform
from plpp_reg.engine.method import Classes, Method
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError, install
from plpp_reg.io.files import write_atomically, write_tensors

FORMATS = {"safetensors": ".safetensors", "onnx": ".onnx"}  # of a run's own files none ends so
TOLERANCE = 1e-4  # of the ONNX file's probabilities, beside torch's
CHECKED_BATCHES = (1, 3)  # random images at once


def format_of(path: str | Path, name: str = "") -> str:
    """ "safetensors" or "onnx": what a file's ending says, and ``name`` where it is given.

    Raises:
        InputError: another ending, or they disagree; a folder.
    """
    if name and name not in FORMATS:
        raise InputError(f"--format: expected one of {', '.join(FORMATS)}, got {name!r}")
    endings = {FORMATS[name]: name} if name else {ending: form for form, ending in FORMATS.items()}
    path = Path(path)
    if path.suffix not in endings or path.is_dir():
        raise InputError(f"file {str(path)!r}: expected the name of a file that ends in {' or '.join(endings)}")
    return endings[path.suffix]


def export(trainer: Trainer, path: str | Path) -> str:
    """Write everything that is needed of a trained prompt into one file, in the format that its ending says.

    safetensors: ``class_features`` (C, embed_dim), normalised, ``logit_scale`` (the factor of cosines), and what was learned
    under its checkpoint's names. onnx: :func:`export_onnx`. Metadata of both (JSON): ``classnames``, ``backbone``, ``trainer``,
    ``input`` (size, interpolation, mean and standard deviation of its images), and ``left_out``: why there are no
    ``class_features``, where their cosines with the frozen tower's features would not be what the method computes.

    Returns:
        ``left_out``, empty if nothing is.

    Raises:
        InputError: another ending, a place that cannot be written to, or a method that has no such file.
    """
    path = Path(path)
    if format_of(path) == "onnx":
        export_onnx(trainer, path)
        return ""
    tensors: dict[str, Tensor] = dict(trainer.method.saved.state_dict())
    tensors["logit_scale"] = trainer.clip_model.logit_scale.exp().float()
    left_out = trainer.method.not_exported
    if trainer.method.predicts_by_teacher:  # what its learned image tower's features are compared with
        tensors["teacher_class_features"] = trainer.teacher.class_features.cpu()
    if not left_out:
        with torch.no_grad(), trainer.computing():
            tensors["class_features"] = trainer.method.encode_classes().features.float()
    try:
        write_tensors(path, tensors, {**described(trainer), "left_out": json.dumps(left_out)})
    except OSError as e:
        raise _no_place(path, e) from e
    return left_out


def described(trainer: Trainer) -> dict[str, str]:
    """What a file says of itself: JSON by name."""
    cfg = trainer.cfg
    values: dict[str, Any] = {
        "classnames": [name.replace("_", " ") for name in trainer.data.classnames],
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "trainer": cfg.TRAINER.NAME,
        "input": {
            "size": list(cfg.INPUT.SIZE),
            "interpolation": cfg.INPUT.INTERPOLATION,
            "mean": list(cfg.INPUT.PIXEL_MEAN),
            "std": list(cfg.INPUT.PIXEL_STD),
        },
    }
    return {name: json.dumps(value) for name, value in values.items()}


def _no_place(path: Path, error: OSError) -> InputError:
    return InputError(f"file {str(path)!r}: expected a place to write to, got {error}")


# ---- ONNX --------------------------------------------------------------------------------------------------------------


class Whole(nn.Module):
    """Pixels to probabilities: the image tower as the method prompts it, and the class features, which are constants here."""

    def __init__(self, method: Method, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.method, self.towers = method, method.clip.model.visual
        with torch.no_grad():
            self.register_buffer("class_features", method.encode_classes().features.float())
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B, C)."""
        batch = {"img": (pixels.float() / 255 - self.mean) / self.std}
        return self.method.logits(batch, Classes(self.class_features)).float().softmax(-1)


def export_onnx(trainer: Trainer, path: Path) -> None:
    """One ONNX graph, ``pixels`` (B, 3, H, W) uint8 -> ``probabilities`` (B, C) float32, for any number B of images.

    The images have their size already; scaling and normalising are in the graph, and so is an image tower that the method
    prompts. The file is compared with torch on random images by onnxruntime before it gets its name.

    Raises:
        InputError: each image has class features of its own; a package or a place is missing; another result than torch's.
    """
    method, size = trainer.method, tuple(trainer.cfg.INPUT.SIZE)
    if method.classes_depend_on_image:
        raise InputError(
            f"--format onnx: {trainer.cfg.TRAINER.NAME} runs the text tower on every class name again for each image, so there "
            "are no class features to export: plpp predict classifies with it"
        )
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  (torch's exporter needs it)
    except ImportError as e:
        raise InputError(f"--format onnx: the package {e.name!r} is needed: {install('onnx')}") from e
    if trainer.device.type != "cpu" or trainer.precision != "fp32":
        got = f"{trainer.precision} on {trainer.device}"
        raise InputError(f'--format onnx: expected a run loaded with device "cpu" and precision "fp32", got {got}')
    transform = build_transform(trainer.cfg, train=False)
    whole = Whole(method, transform.mean, transform.std).eval()
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randint(256, (n, 3, *size), dtype=torch.uint8, generator=generator) for n in CHECKED_BATCHES]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own parts
        program = torch.onnx.export(
            whole,
            (pictures[-1],),
            dynamo=True,
            input_names=["pixels"],
            output_names=["probabilities"],
            dynamic_shapes=({0: torch.export.Dim("images", min=1)},),
            verbose=False,
        )
        wanted = [whole(images) for images in pictures]
    model = program.model_proto
    onnx.helper.set_model_props(model, described(trainer))
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    for images, expected in zip(pictures, wanted, strict=True):
        got = torch.from_numpy(session.run(None, {"pixels": images.numpy()})[0])
        if not (difference := (got - expected).abs().max().item()) <= TOLERANCE:
            raise InputError(
                f"--format onnx: expected torch's probabilities within {TOLERANCE}, got them {difference:.1e} apart"
            )
    try:
        write_atomically(path, lambda place: place.write_bytes(content))
    except OSError as e:
        raise _no_place(path, e) from e
