"""Ways to spoil what a file holds: its bytes, its values, its tensors. Each draws from a ``random.Random`` alone."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

DEEP = 100_000  # brackets, one in the other
# In the place of a value; some of another type, some of the right one out of its range, some that lead elsewhere.
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, -32, 3, 1.5, 10**400, -(10**30), 2**63, 1e308, float("inf"), float("-inf"), float("nan"),
    "", " ", "x", "x" * 5000, "日本語", "\0", "a\nb", "\x1b[31m", "..", "../..", "/", "/etc/passwd", "~nouser/x",
    "{x}", "%s", "{}", "{[]: 1}", "9" * 5000, "1e999", "-0", "True", "none", "os:path", "victim_module:Zen",
    "folder:absent", "csv:/etc/passwd", "tiny.pt",
    [], [5], [None], [[]], ["x", "x"], [1, "x"], ["../../x"],
    {}, {"x": 1}, {"x": {"y": [None]}}, {"": ""}, {"DATASET.NAME": "x"},
)  # fmt: skip


class Executed:
    """Unpickled, it writes a file."""

    def __init__(self, trap: str) -> None:
        self.trap = trap

    def __reduce__(self) -> tuple[Any, ...]:
        return subprocess.call, (["touch", self.trap],)


def spoilt_bytes(content: bytes, draw: random.Random) -> bytes:
    """Cut, changed, doubled, of another kind."""
    at = draw.randrange(len(content) + 1)
    ways: list[Callable[[], bytes]] = [
        lambda: b"",
        lambda: content[:at],
        lambda: content[at:],
        lambda: content[: at // 8],
        lambda: content[:-1],
        lambda: content + content,
        lambda: content[:at] + bytes([draw.randrange(256) for _ in range(9)]) + content[at:],
        lambda: content[:at] + bytes([draw.randrange(256) for _ in range(9)]) + content[at + 9 :],
        lambda: content[:at] + b"\0" * 40 + content[at + 40 :],
        lambda: draw.randbytes(200),
        lambda: b"\0" * 4096,
        lambda: b"\xff\xfe" + content,
        lambda: b"\xef\xbb\xbf" + content,
        lambda: b"<html>404</html>",
        lambda: b"\x80\x04N.",
        lambda: b"PK\x03\x04" + content,
        lambda: b"\x89PNG\r\n\x1a\n" + content,
        lambda: b"[" * DEEP,
        lambda: b"9" * 5000,
        lambda: content.replace(b"\n", b"\r"),
        lambda: content.decode("latin-1").encode("utf-16"),
    ]
    return draw.choice(ways)()


def spoilt_value(content: Any, draw: random.Random) -> Any:
    """A copy of a nest of dicts and lists with one to three values or keys changed."""
    changed = json.loads(json.dumps(content))
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        places = list(_places(changed))
        if not places:
            return _value(draw)
        node, key = draw.choice(places)
        way = draw.random()
        if way < 0.75:
            node[key] = _value(draw)
        elif way < 0.85:
            del node[key]
        elif isinstance(node, dict):
            node[draw.choice(("x", "", "__class__", "_BASE_", "DATASET", "NAME"))] = _value(draw)
        else:
            node.append(_value(draw))
    return changed


def _value(draw: random.Random) -> Any:
    """One that nothing else holds: it may be spoilt in its turn."""
    return copy.deepcopy(draw.choice(VALUES))


def _places(node: Any) -> Any:
    for key, value in list(node.items()) if isinstance(node, dict) else list(enumerate(node)):
        yield node, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


def spoilt_yaml(text: str, draw: random.Random, trap: str) -> bytes:
    way = draw.random()
    if way < 0.7:
        return yaml.safe_dump(spoilt_value(yaml.safe_load(text), draw), sort_keys=False, allow_unicode=True).encode()
    if way < 0.9:
        return spoilt_bytes(text.encode(), draw)
    hostile = (
        f"!!python/object/apply:subprocess.call [[touch, {trap}]]",
        f"!!python/object/new:os.system ['touch {trap}']",
        "a: &a [*a, *a]",
        "a: &a\n  b: *a\n",
        "a: &a [x,x,x,x]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nd: [*c,*c,*c,*c]\n",
        "OPTIM: {LR: " + "[" * 3000 + "]" * 3000 + "}",
        "SEED: " + "9" * 5000,
        "SEED: 0o7\n? - a\n: b\n",
        "TRAINER:\n  NAME: victim_module:Zen\n",
        "_BASE_: same.yaml\n",
        "_BASE_: /etc/passwd\n",
        "_BASE_: [1]\n",
        "SEED: 2001-01-01\n",
        "SEED: 1:30:00\n",
        "OPTIM:\n  LR: 0.1\nOPTIM:\n  LR: 0.2\n",
        "<<: {OPTIM: {LR: 0.1}}\n",
    )
    return draw.choice(hostile).encode()


def spoilt_json(text: str, draw: random.Random) -> bytes:
    way = draw.random()
    if way < 0.75:
        return json.dumps(spoilt_value(json.loads(text), draw)).encode()
    if way < 0.85:
        nested = (
            "[" * DEEP + "]" * DEEP,
            '{"a":' * DEEP + "1" + "}" * DEEP,
            "9" * 5000,
            "NaN",
            '{"a": 1, "a": 2}',
            '"\\ud800"',
        )
        return draw.choice(nested).encode()
    return spoilt_bytes(text.encode(), draw)


def spoilt_tensor(tensor: torch.Tensor, draw: random.Random) -> Any:
    ways: list[Callable[[], Any]] = [
        lambda: tensor * float("nan"),
        lambda: tensor * float("inf"),
        lambda: tensor.reshape(-1),
        lambda: tensor[:0],
        lambda: torch.cat([tensor, tensor]),
        lambda: tensor.double(),
        lambda: tensor.bool(),
        lambda: tensor.int(),
        lambda: torch.complex(tensor.float(), tensor.float()),
        lambda: tensor.float().to_sparse(),
        lambda: torch.empty(tensor.shape, device="meta"),
        lambda: torch.quantize_per_tensor(tensor.float(), 0.1, 0, torch.qint8),
        lambda: tensor.float()[:1].expand(10**6, *tensor.shape[1:]) if tensor.dim() else tensor,
        lambda: tensor.tolist(),
        lambda: tensor.to(torch.float8_e5m2),
        lambda: torch.nn.Parameter(tensor.float()),
        lambda: None,
        lambda: "text",
    ]
    return draw.choice(ways)()


def spoilt_checkpoint(content: dict[str, Any], draw: random.Random, trap: str) -> bytes:
    """What ``torch.save`` would write of a checkpoint, or of weights, with something wrong in it."""
    changed = dict(content)
    node = changed
    if isinstance(changed.get("state_dict"), dict) and draw.random() < 0.6:
        node = changed["state_dict"] = dict(changed["state_dict"])
    elif isinstance(changed.get("plpp_reg"), dict) and draw.random() < 0.6:
        node = changed["plpp_reg"] = dict(changed["plpp_reg"])
    key = draw.choice(sorted(node))
    way = draw.random()
    buffer = io.BytesIO()
    if way < 0.55:
        value = node[key]
        node[key] = spoilt_tensor(value, draw) if isinstance(value, torch.Tensor) else _value(draw)
    elif way < 0.65:
        node[draw.choice((7, None, "x", (1, 2), "module.x", ""))] = torch.ones(3)
    elif way < 0.72:
        del node[key]
    elif way < 0.78:
        node[key] = Executed(trap)
    elif way < 0.82:
        return pickle.dumps(Executed(trap), protocol=draw.choice((0, 2, 4)))
    elif way < 0.86:
        torch.save(draw.choice((None, 3, "text", [1], {"state_dict": 3}, torch.ones(2), {})), buffer)
        return buffer.getvalue()
    elif way < 0.9:
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
        return buffer.getvalue()
    torch.save(changed, buffer, _use_new_zipfile_serialization=draw.random() < 0.85)
    return spoilt_bytes(buffer.getvalue(), draw) if way > 0.9 else buffer.getvalue()


def archive(draw: random.Random, victim: Path) -> tuple[str, bytes]:
    """An archive that wants out of its folder, or is none; its name."""
    buffer = io.BytesIO()
    names = ("../" * 8 + f"{victim}/owned", f"{victim}/owned", "a/../../../owned", "C:\\owned", "a" * 300, "", ".", "..")
    names += ("a/b", "a//b", "./a", "a\0b", "日本語", "a\n")
    if draw.random() < 0.5:
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            for _ in range(draw.randint(1, 4)):
                info = tarfile.TarInfo(draw.choice(names))
                kinds = (b"0", b"0", b"0", b"1", b"2", b"3", b"4", b"5", b"6", b"7", b"S", b"Z")
                info.type = draw.choice(kinds)
                info.linkname = draw.choice((str(victim), "..", "a/b", "owned"))
                info.size = 5 if info.type == b"0" else 0
                info.mode = draw.choice((0o644, 0o4777, 0))
                tar.addfile(info, io.BytesIO(b"owned"))
        name = "x.tar.gz"
    else:
        with zipfile.ZipFile(buffer, "w") as zipped:
            for _ in range(draw.randint(1, 4)):
                info = zipfile.ZipInfo(draw.choice(names) or "x")
                info.external_attr = draw.choice((0, 0o120777 << 16, 0o100644 << 16, 0o020666 << 16, 0o040755 << 16))
                info.compress_type = draw.choice(
                    (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2)
                )
                zipped.writestr(info, os.fspath(victim))
        name = "x.zip"
    content = buffer.getvalue()
    return name, spoilt_bytes(content, draw) if draw.random() < 0.5 else content
