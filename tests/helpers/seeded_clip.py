"""Seeded tiny CLIPs in OpenAI's state-dict layout, the same on every machine: numpy's legacy RandomState, a seed a tensor name.

Our own code, no upstream's. A test builds the same weights with `state_dict(STUDENT)` and reads what upstream made of them.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch

VOCABULARY, CONTEXT = 49408, 77
# heads are width / 64 in OpenAI's layout, so widths are multiples of 64
STUDENT = dict(tag="student", side=32, patch=8, vision_width=64, vision_layers=3, text_width=64, text_layers=3, embed=64)
TEACHER = dict(tag="teacher", side=32, patch=8, vision_width=128, vision_layers=4, text_width=128, text_layers=4, embed=96)
CLASSES = ["face", "leopard", "hot air balloon", "sea_horse", "umbrella", "wild_cat", "airplane"]  # 7: 4 base, 3 new


def normal(name: str, *shape: int, std: float = 1.0) -> torch.Tensor:
    seed = zlib.crc32(name.encode()) & 0x7FFFFFFF
    return torch.from_numpy((np.random.RandomState(seed).standard_normal(shape) * std).astype(np.float32))


def _block(sd: dict, tag: str, prefix: str, width: int, layers: int) -> None:
    for i in range(layers):
        p = f"{prefix}.resblocks.{i}"
        for name, shape, std in (
            ("attn.in_proj_weight", (3 * width, width), width**-0.5),
            ("attn.in_proj_bias", (3 * width,), 0.02),
            ("attn.out_proj.weight", (width, width), 0.5 * width**-0.5),
            ("attn.out_proj.bias", (width,), 0.02),
            ("mlp.c_fc.weight", (4 * width, width), width**-0.5),
            ("mlp.c_fc.bias", (4 * width,), 0.02),
            ("mlp.c_proj.weight", (width, 4 * width), 0.5 * (4 * width) ** -0.5),
            ("mlp.c_proj.bias", (width,), 0.02),
        ):
            sd[f"{p}.{name}"] = normal(f"{tag}.{p}.{name}", *shape, std=std)
        for ln in ("ln_1", "ln_2"):
            sd[f"{p}.{ln}.weight"] = 1 + normal(f"{tag}.{p}.{ln}.weight", width, std=0.05)
            sd[f"{p}.{ln}.bias"] = normal(f"{tag}.{p}.{ln}.bias", width, std=0.02)


def state_dict(tag, side, patch, vision_width, vision_layers, text_width, text_layers, embed) -> dict[str, torch.Tensor]:
    sd: dict[str, torch.Tensor] = {}
    v, t = vision_width, text_width

    def put(name: str, *shape: int, std: float) -> None:
        sd[name] = normal(f"{tag}.{name}", *shape, std=std)

    put("visual.conv1.weight", v, 3, patch, patch, std=(3 * patch * patch) ** -0.5)
    put("visual.class_embedding", v, std=v**-0.5)
    put("visual.positional_embedding", (side // patch) ** 2 + 1, v, std=v**-0.5)
    put("visual.proj", v, embed, std=v**-0.5)
    put("text_projection", t, embed, std=t**-0.5)
    put("token_embedding.weight", VOCABULARY, t, std=0.05)
    put("positional_embedding", CONTEXT, t, std=0.02)
    for ln, width in (("visual.ln_pre", v), ("visual.ln_post", v), ("ln_final", t)):
        sd[f"{ln}.weight"] = 1 + normal(f"{tag}.{ln}.weight", width, std=0.05)
        put(f"{ln}.bias", width, std=0.02)
    _block(sd, tag, "visual.transformer", v, vision_layers)
    _block(sd, tag, "transformer", t, text_layers)
    sd["logit_scale"] = torch.tensor(3.2)  # e^3.2 = 24.5: predictions that are neither flat nor one-hot
    return sd


def images(batch: int, side: int = 32, name: str = "images") -> torch.Tensor:
    return normal(f"{name}.{batch}", batch, 3, side, side)


def teacher_prompts(count: int = 4, cfg: dict = TEACHER) -> dict[str, torch.Tensor]:
    """What a PromptSRC run on the teacher would have learned, under upstream's names (depth 9 there: every layer here)."""
    out = {"prompt_learner.ctx": normal("teacher.ctx", count, cfg["text_width"], std=0.05)}
    out["image_encoder.VPT"] = normal("teacher.VPT", count, cfg["vision_width"], std=0.2)
    for i in range(1, cfg["vision_layers"]):
        n = f"image_encoder.transformer.resblocks.{i}.VPT_shallow"
        out[n] = normal(f"teacher.{n}", count, cfg["vision_width"], std=0.2)
    for i in range(1, cfg["text_layers"]):
        n = f"text_encoder.transformer.resblocks.{i}.VPT_shallow"
        out[n] = normal(f"teacher.{n}", count, cfg["text_width"], std=0.2)
    return out


def student_prompts(count: int = 4, depth: int = 2, cfg: dict = STUDENT) -> dict[str, torch.Tensor]:
    out = {"image_encoder.VPT": normal("student.VPT", count, cfg["vision_width"], std=0.2)}
    for i in range(1, depth):
        n = f"image_encoder.transformer.resblocks.{i}.VPT_shallow"
        out[n] = normal(f"student.{n}", count, cfg["vision_width"], std=0.2)
    return out


def projector(inputs: int, outputs: int) -> dict[str, torch.Tensor]:
    """The student's projector under upstream's names: two 1x1 convolutions and a batch norm between them."""
    p = "VPT_image_trans.conv1."
    return {
        p + "0.weight": normal("proj.0.weight", outputs, inputs, 1, 1, std=inputs**-0.5),
        p + "0.bias": normal("proj.0.bias", outputs, std=0.02),
        p + "1.weight": 1 + normal("proj.1.weight", outputs, std=0.1),
        p + "1.bias": normal("proj.1.bias", outputs, std=0.1),
        p + "3.weight": normal("proj.3.weight", outputs, outputs, 1, 1, std=outputs**-0.5),
        p + "3.bias": normal("proj.3.bias", outputs, std=0.02),
    }
