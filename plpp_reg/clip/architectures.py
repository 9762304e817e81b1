"""The sizes of OpenAI's nine models, and a CLIP of any sizes: with random weights, or with none at all."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from plpp_reg.clip.load import EMBEDDED, OPEN_CLIP, freeze, load_clip, openai_clip
from plpp_reg.errors import InputError, unknown


class Architecture(NamedTuple):
    """The sizes of a CLIP, in the order of ``clip.model.CLIP``'s arguments.

    ``vision_layers`` is a number for a vision transformer, the blocks of the four stages for a ResNet, whose ``patch`` is None.
    """

    embed_dim: int
    resolution: int
    vision_layers: int | tuple[int, int, int, int]
    vision_width: int
    patch: int | None
    context_length: int
    vocabulary: int
    width: int
    heads: int
    layers: int


def _openai(embed_dim: int, resolution: int, vision_layers, vision_width: int, patch: int | None, width: int) -> Architecture:
    """What all nine have in common: 77 positions, 49,408 tokens, 12 text layers, heads that are 64 wide."""
    return Architecture(embed_dim, resolution, vision_layers, vision_width, patch, 77, 49408, width, width // 64, 12)


# Facts of the published weights; no other line of the package knows them.
OPENAI = {
    "RN50": _openai(1024, 224, (3, 4, 6, 3), 64, None, 512),
    "RN101": _openai(512, 224, (3, 4, 23, 3), 64, None, 512),
    "RN50x4": _openai(640, 288, (4, 6, 10, 6), 80, None, 640),
    "RN50x16": _openai(768, 384, (6, 8, 18, 8), 96, None, 768),
    "RN50x64": _openai(1024, 448, (3, 15, 36, 10), 128, None, 1024),
    "ViT-B/32": _openai(512, 224, 12, 768, 32, 512),
    "ViT-B/16": _openai(512, 224, 12, 768, 16, 512),
    "ViT-L/14": _openai(768, 224, 24, 1024, 14, 768),
    "ViT-L/14@336px": _openai(768, 336, 24, 1024, 14, 768),
}


def random_clip(sizes: Architecture) -> nn.Module:
    """A frozen float32 CLIP of these sizes with OpenAI's initial weights, drawn from torch's stream."""
    model = freeze(openai_clip().model.CLIP(*sizes).float())
    model.trained_token_ids = None  # as load_clip leaves it
    return model


def clip_without_weights(name: str) -> nn.Module:
    """A frozen CLIP on the device "meta": every tensor has its shape and type, none has memory. Nothing is downloaded.

    Args:
        name: as for :func:`plpp_reg.clip.load.load_clip`. OpenAI's names come from :data:`OPENAI`, open_clip's from the sizes
            that open_clip lists; the embedded model and files are read.

    Raises:
        InputError: no such backbone or weights, open_clip is not installed, or its list tells that the model is not of OpenAI's
            architecture.
    """
    if name in OPENAI:
        sizes = OPENAI[name]
    elif name.startswith(OPEN_CLIP) and not Path(name.removeprefix(OPEN_CLIP).partition("/")[2]).is_file():
        sizes = _open_clip_sizes(name)
    elif name == EMBEDDED or name.startswith(OPEN_CLIP) or Path(name).is_file():
        model = load_clip(name)
        return _stays(model.to("meta"))
    else:
        raise unknown("backbone (a model name or a file)", name, [EMBEDDED, *OPENAI])
    return without_weights(sizes)


def without_weights(sizes: Architecture) -> nn.Module:
    """:func:`clip_without_weights` of any sizes."""
    with torch.device("meta"):
        return _stays(random_clip(sizes))


def _stays(model: nn.Module) -> nn.Module:
    """A tensor without numbers cannot be copied to a device: whoever moves the model gets it as it is."""
    model.to = lambda *args, **kwargs: model
    return model


# All that open_clip says of a model of OpenAI's architecture; it says more of others (pooling, layer scale, a decoder).
OPEN_CLIP_SAYS = {
    "": {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"},
    "vision_cfg": {"image_size", "layers", "width", "head_width", "patch_size"},
    "text_cfg": {"context_length", "vocab_size", "width", "heads", "layers"},
}
CONTEXT_LENGTH = 77  # what openai-clip's tokenizer gives


def _open_clip_sizes(name: str) -> Architecture:
    """What open_clip's own list of models says of one."""
    from plpp_reg.clip.from_open_clip import named

    open_clip, architecture, _ = named(name)
    listed = open_clip.get_model_config(architecture)
    vision, text = listed["vision_cfg"], listed["text_cfg"]
    expected = f"backbone {name!r}: expected a model of OpenAI's architecture, got one with"
    for part, known in OPEN_CLIP_SAYS.items():
        if others := sorted((listed[part] if part else listed).keys() - known):
            raise InputError(f"{expected} {', '.join(map(repr, others))}")
    try:
        layers = vision["layers"]
        layers, patch = (layers, vision["patch_size"]) if isinstance(layers, int) else (tuple(layers), None)
        of_vision = (vision["image_size"], layers, vision["width"], patch)
        of_text = (text["context_length"], text["vocab_size"], text["width"], text["heads"], text["layers"])
    except KeyError as e:
        raise InputError(f"{expected}out {e.args[0]!r}") from e
    if text["context_length"] != CONTEXT_LENGTH:
        raise InputError(f"{expected} {text['context_length']} positions of text, not {CONTEXT_LENGTH}")
    return Architecture(listed["embed_dim"], *of_vision, *of_text)
