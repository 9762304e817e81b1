"""The embedded backbone's weight file: how it is written, and how the written one is looked at."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from clip.simple_tokenizer import SimpleTokenizer
from embedded_data import HELD_OUT, PACKAGES, RESOLUTION, SIDE, on_white
from embedded_stage import BATCH, PROMPT, ROOT, Stage
from torch import nn
from torch.nn import functional as F


def spelling_neighbours(trained: list[int], count: int = 3) -> torch.Tensor:
    """For each other token of the OpenAI vocabulary, `count` rows of `trained` that are spelled most like it.

    Likeness is the cosine of counts of 2, 3 and 4 letters in a row, hashed into 1,024 places. Tokens that
    share nothing with any trained one (other scripts, signs) get arbitrary but fixed neighbours.
    """
    tokenizer = SimpleTokenizer()
    vocabulary = len(tokenizer.decoder)
    features = torch.zeros(vocabulary, 1024)
    for token in range(vocabulary):
        word = "^" + tokenizer.decoder[token].replace("</w>", "$")
        for size in (2, 3, 4):
            for i in range(len(word) - size + 1):
                features[token, zlib.crc32(word[i : i + size].encode()) % 1024] += size
    features = F.normalize(features, dim=1)
    candidates = torch.tensor(trained)
    special = torch.tensor([tokenizer.decoder[t].startswith("<|") for t in trained])
    other = torch.ones(vocabulary, dtype=torch.bool)
    other[candidates] = False
    g = torch.Generator().manual_seed(0)
    found = []
    for part in other.nonzero()[:, 0].split(4096):
        likeness = features[part] @ features[candidates].T
        likeness += 1e-3 * torch.rand(likeness.shape, generator=g)  # breaks ties
        found.append(likeness.masked_fill(special, -1).topk(count, dim=1).indices)
    return torch.cat(found).to(torch.int16)


def word_statistics(table: torch.Tensor, picked: torch.Tensor) -> dict[str, list[float]]:
    """5, 50, 95% points of what could single rows out: norm, nearest row's cosine, cosine to the mean."""
    unit = F.normalize(table.float(), dim=1)
    cosines = []
    for part in picked.split(1024):
        cosine = unit[part] @ unit.T
        cosine[torch.arange(len(part)), part] = -1
        cosines.append(cosine.max(1).values)
    values = {"norm": table[picked].float().norm(dim=1), "nearest": torch.cat(cosines)}
    values["to_mean"] = unit[picked] @ F.normalize(table.float().mean(0), dim=0)
    points = torch.tensor([0.05, 0.5, 0.95])
    return {name: [round(x, 3) for x in v.quantile(points).tolist()] for name, v in values.items()}


def export(stage: Stage, path: Path) -> None:
    """Write the safetensors file: all weights in float16, untrained word vectors as three neighbours each."""
    from safetensors.torch import save_file

    sys.path.insert(0, str(ROOT))
    from plpp_reg.clip import embedded

    state = {name: tensor.half().contiguous() for name, tensor in stage.model.state_dict().items()}
    rows, ids = state.pop("token_embedding.weight"), torch.tensor(stage.text.ids)
    neighbours = spelling_neighbours(stage.text.ids)
    other = torch.ones(len(rows) + len(neighbours), dtype=torch.bool)
    other[ids] = False
    tokens = other.nonzero()[:, 0]
    table = torch.empty(len(other), rows.shape[1], dtype=torch.float16)
    table[ids] = rows
    cosine = F.cosine_similarity(rows.float(), rows.float().mean(0, keepdim=True)).mean().item()
    sample = tokens[:: len(tokens) // 2000]
    low, high = 0.0, 4.0
    for _ in range(8):  # the spread at which filled rows have as near a nearest neighbour as trained ones
        spread = round((low + high) / 2, 3)
        lean = round(cosine / (1 - cosine**2) ** 0.5 * (1 + spread**2) ** 0.5, 3)
        filled = embedded.fill_untrained(rows.numpy(), tokens.numpy(), neighbours.numpy(), spread, lean)
        table[tokens] = torch.from_numpy(filled)
        if word_statistics(table, sample)["nearest"][1] > word_statistics(table, ids)["nearest"][1]:
            low = spread
        else:
            high = spread
    state["token_embedding.trained"] = rows.contiguous()
    state["token_embedding.trained_ids"] = ids.to(torch.int32)
    state["token_embedding.neighbours"] = neighbours
    metadata = {
        "format": embedded.FORMAT, "seed": stage.args.seed, "steps": stage.args.steps,
        "text_steps": stage.steps, "batch": BATCH,
        "steps_done": stage.step, "held_out": HELD_OUT, "resolution": RESOLUTION,
        "trained_tokens": len(ids),
        "sources": " ".join(f"{name}@{version}" for name, version in PACKAGES.items()),
        "fill_spread": spread, "fill_lean": lean,
    }  # fmt: skip
    partial = path.with_suffix(".part")
    save_file(state, partial, {name: str(value) for name, value in metadata.items()})
    partial.chmod(0o644)
    os.replace(partial, path)
    report = {
        "bytes": path.stat().st_size,
        "trained": word_statistics(table, ids),
        "filled": word_statistics(table, sample),
    }
    print(json.dumps(metadata | report), flush=True)


def exported_image_tower() -> nn.Module:
    """The image tower of the embedded file as it is, its float16 weights as float32."""
    sys.path.insert(0, str(ROOT))
    import clip

    from plpp_reg.clip.embedded import embedded_state_dict

    return clip.model.build_model(embedded_state_dict()).float().visual


def evaluate_openmoji() -> None:
    """Zero-shot accuracy of the exported file on OpenMoji: run once, after every choice has been made."""
    sys.path.insert(0, str(ROOT))
    import clip
    import resvg_py
    from build_emoji_table import openmoji_folder
    from PIL import Image

    from plpp_reg.clip.embedded import embedded_state_dict

    model = clip.model.build_model(embedded_state_dict()).float()
    with (ROOT / "plpp_reg/data/emoji.csv").open(encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    names = sorted({row["class"] for row in table})
    pictures = []
    for row in table:
        svg = str(openmoji_folder() / f"{row['code']}.svg")
        data = bytes(resvg_py.svg_to_bytes(svg_path=svg, width=SIDE, height=SIDE))
        pictures.append(np.asarray(Image.open(io.BytesIO(data)).convert("RGBA")).transpose(2, 0, 1))
    label = torch.tensor([names.index(row["class"]) for row in table])
    with torch.no_grad():
        parts = torch.from_numpy(np.stack(pictures)).split(256)
        images = torch.cat([model.encode_image(on_white(part)) for part in parts])
        texts = model.encode_text(clip.tokenize([PROMPT.format(name) for name in names]))
    guess = (F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T).argmax(1)
    right = (guess == label).float()
    by_class = {name: round(100 * right[label == k].mean().item(), 1) for k, name in enumerate(names)}
    result = {
        "openmoji_top1": round(100 * right.mean().item(), 2),
        "images": len(table),
        "classes": len(names),
    }
    result["openmoji_balanced"] = round(sum(by_class.values()) / len(by_class), 2)
    print(json.dumps(result | {"by_class": by_class}))
