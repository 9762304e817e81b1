"""Malformed inputs by kind: each is drawn by a seed, with the command that meets it."""

from __future__ import annotations

import argparse
import functools
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from plpp_reg.commands import cli
from plpp_reg.engine import config

import spoil
import world

# Commands that are good as they stand, and write below "out" alone.
GOOD: dict[str, tuple[str, ...]] = {
    "train": (*world.TRAIN, "--output-dir", "out", "--no-train"),
    "estimate": ("estimate", *world.TRAIN[1:]),
    "demo": ("demo", "--output-dir", "out/demo", "--seeds", "1"),
    "run": (*world.RUN, "--output", "out", "--dry-run"),
    "table": ("table", "sweep"),
    "report": ("report", "sweep", "--output", "out/report.html"),
    "data check": ("data", "check", "papers", "--datasets", "eurosat"),
    "data get": ("data", "get", "eurosat", "--root", "out"),
    "predict": ("predict", "run", "data/tea/0.png"),
    "export": ("export", "run", "out/prompt.safetensors"),
    "cache": ("cache",),
    "doctor": ("doctor",),
    "inspect": ("inspect", "run"),
}
WRITTEN = ("output_dir", "output", "file", "out", "OUTPUT_DIR")  # arguments where something is written


class Case(NamedTuple):
    """One input: files by their place, and the command that meets them."""

    files: dict[str, bytes]
    argv: Sequence[str]
    copies: Sequence[tuple[str, str]] = ()  # folders of the world, and where copies of them go before the files
    output: str = "out"  # what a success may write
    failing: bool = False  # whether status 1 is right too
    starts: bool = False  # whether the command starts programs of its own
    begun: bool = False  # whether it may have begun to write before it can know: what is below its output is not compared
    fetched: str = ""  # the file that a download brings


Maker = Callable[[random.Random, Path], Case]


def recipes(draw: random.Random, root: Path) -> Case:
    flag, text = draw.choice((("--config-file", world.RECIPE), ("--dataset-config-file", "DATASET:\n  NAME: folder:data\n")))
    content = spoil.spoilt_yaml(text, draw, str(root / "victim" / "owned"))
    command = draw.choice((GOOD["train"], GOOD["train"][:-1], GOOD["estimate"]))
    return Case({"in/same.yaml": content}, [*command, flag, "in/same.yaml"])


def runs_configurations(draw: random.Random, root: Path) -> Case:
    content = spoil.spoilt_yaml(Path("run/config.yaml").read_text(), draw, str(root / "victim" / "owned"))
    argv = draw.choice(
        (
            ("predict", "in/run", "data/tea/0.png"),
            ("export", "in/run", "out/p.safetensors"),
            ("inspect", "in/run"),
            ("table", "in"),
            ("report", "in", "--output", "out/r.html"),
            (*world.TRAIN, "--output-dir", "in/run"),
            (*world.TRAIN, "--output-dir", "out", "--resume", "in/run"),
        )
    )
    output = "in/run" if "--output-dir in/run" in " ".join(argv) else "out"
    return Case({"in/run/config.yaml": content}, argv, [("run", "in/run")], output)


def protocols(draw: random.Random, root: Path) -> Case:
    content = spoil.spoilt_yaml(world.PROTOCOL, draw, str(root / "victim" / "owned"))
    more = ["--dry-run"] if draw.random() < 0.8 else []
    return Case({"in/same.yaml": content}, ["run", "in/same.yaml", *world.RUN[2:], "--output", "out", *more], failing=True)


def splits(draw: random.Random, root: Path) -> Case:
    place = "papers/eurosat/split_zhou_EuroSAT.json"
    content = spoil.spoilt_json(Path(place).read_text(), draw)
    keys = ["DATASET.NAME", "EuroSAT", "DATASET.ROOT", "in/papers"]
    argv = draw.choice((["data", "check", "in/papers", "--datasets", "eurosat"], [*GOOD["train"], *keys]))
    return Case({f"in/{place}": content}, argv, [("papers", "in/papers")], failing=True)


def tables_of_pictures(draw: random.Random, root: Path) -> Case:
    lines = Path("table.csv").read_text().splitlines()
    way = draw.random()
    if way < 0.5:
        at = draw.randrange(len(lines))
        cells = lines[at].split(",")
        cells[draw.randrange(len(cells))] = draw.choice(
            (
                "",
                "x",
                "label",
                "../victim/mine",
                "/etc/passwd",
                '"',
                "\0",
                "a" * 300,
                "~nouser",
                "train",
                "val",
                "1e999",
                "9" * 5000,
                "cat",
                "Cat",
            )
        )
        lines[at] = ",".join(cells)
        content = "\n".join(lines).encode()
    elif way < 0.6:
        content = (
            "path,class,label\n" + "\n".join(f"{x.rsplit(',', 1)[0]},{draw.choice('1290x')}" for x in lines[1:])
        ).encode()
    else:
        content = spoil.spoilt_bytes("\n".join(lines).encode(), draw)
    argv = draw.choice((["data", "check", ".", "--datasets", "csv:in/t.csv"], [*GOOD["train"], "DATASET.NAME", "csv:in/t.csv"]))
    return Case({"in/t.csv": content}, argv, [("data", "in/data")], failing=True)


@functools.cache
def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    picture = Image.effect_noise((24, 20), 60).convert("RGB")
    picture.save(buffer, format=form)
    return buffer.getvalue()


FORMS = (
    "JPEG",
    "PNG",
    "WEBP",
    "BMP",
    "GIF",
    "TIFF",
    "PPM",
    "ICO",
    "DDS",
    "SGI",
    "IM",
    "JPEG2000",
    "AVIF",
    "TGA",
    "PCX",
    "EPS",
    "PDF",
)
PICTURES = (
    b"\x89PNG\r\n\x1a\n\0\0\0\0IHDR\xa8\xa1\xdeZ" + b"\0" * 40,  # an IHDR of length 0
    b"P6 99999999 99999999 255\n",
    b"P6 30000 5000 255\n" + b"\0" * 99,
    b"P6 0 0 255\n",
    b"P6 -4 4 255\n" + b"\0" * 48,
    b"P6 4 4 99999999\n" + b"\0" * 48,
    b"P6 " + b"9" * 5000 + b" 4 255\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\nshowpage\n%%EOF\n",
    b"GIF89a\0\0\0\0\0\0\0;",
    b"BM" + b"\xff" * 60,
    b"II*\0\x08\0\0\0\xff\xff" + b"\1" * 60,
    b"II*\0\xff\xff\xff\xff",
    b"RIFF\xff\xff\xff\xffWEBPVP8X" + b"\xff" * 30,
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
)  # fmt: skip


def pictures(draw: random.Random, root: Path) -> Case:
    try:
        content = draw.choice(PICTURES) if draw.random() < 0.15 else spoil.spoilt_bytes(encoded(draw.choice(FORMS)), draw)
    except (OSError, KeyError, ValueError):  # a format that this Pillow does not write
        content = draw.choice(PICTURES)
    name = f"0{draw.choice(('.png', '.jpg', '.tif', '.ppm', '.gif'))}"
    which = f"in/data/tea/{name}"
    argv = draw.choice(
        (
            ("predict", "run", which),
            ("predict", "run", "in/data/tea", "--json"),
            ("data", "check", ".", "--datasets", "folder:in/data"),
            (*GOOD["train"][:-1], "DATASET.NAME", "folder:in/data"),
        )
    )
    return Case({which: content}, argv, [("data", "in/data")], failing=argv[0] in ("data", "predict"), begun=argv[0] == "train")


def checkpoints(draw: random.Random, root: Path) -> Case:
    place = next(iter(sorted(Path("run/prompt_learner").glob("model.pth.tar-*"))))
    content = torch.load(place, weights_only=True)
    spoilt = spoil.spoilt_checkpoint(content, draw, str(root / "victim" / "owned"))
    argv = draw.choice(
        (
            (*world.TRAIN, "--output-dir", "in/run"),
            (*world.TRAIN, "--output-dir", "out", "--resume", "in/run", "OPTIM.MAX_EPOCH", "2"),
            (*world.TRAIN, "--output-dir", "out", "--eval-only", "--model-dir", "in/run"),
            (*GOOD["train"], "MODEL.INIT_WEIGHTS", f"in/{place}"),
            ("predict", "in/run", "data/tea/0.png"),
            ("export", "in/run", "out/p.safetensors"),
            ("inspect", "in/run"),
            ("inspect", f"in/{place}", "--backbone", "tiny.pt"),
            ("report", "in", "--output", "out/r.html"),
        )
    )
    return Case(
        {f"in/{place}": spoilt}, argv, [("run", "in/run")], "in/run" if "--output-dir in/run" in " ".join(argv) else "out"
    )


def pointers(draw: random.Random, root: Path) -> Case:
    names = (
        "",
        "\n",
        "../config.yaml",
        "/etc/passwd",
        "model.pth.tar-77",
        "model.pth.tar-" + "9" * 5000,
        "x" * 5000,
        "\0",
        "日本語",
        "..",
    )
    content = draw.choice(names).encode() if draw.random() < 0.6 else spoil.spoilt_bytes(b"model.pth.tar-1\n", draw)
    argv = draw.choice(
        (("predict", "in/run", "data/tea/0.png"), ("inspect", "in/run"), (*world.TRAIN, "--output-dir", "in/run"))
    )
    return Case(
        {"in/run/prompt_learner/checkpoint": content}, argv, [("run", "in/run")], "in/run" if argv[0] == "train" else "out"
    )


def backbones(draw: random.Random, root: Path) -> Case:
    weights = torch.load("tiny.pt", weights_only=True)
    if draw.random() < 0.3:
        content, name = spoil.spoilt_bytes(safetensors_bytes(weights), draw), "in/b.safetensors"
        if draw.random() < 0.4:
            header = json.dumps(
                spoil.spoilt_value({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, draw)
            ).encode()
            content = len(header).to_bytes(8, "little") + header + b"\0" * 8
    else:
        content, name = spoil.spoilt_checkpoint(weights, draw, str(root / "victim" / "owned")), "in/b.pt"
    argv = draw.choice(
        ([*GOOD["train"], "--backbone", name], ["inspect", "run", "--backbone", name], [*GOOD["estimate"], "--backbone", name])
    )
    return Case({name: content}, argv)


def records(draw: random.Random, root: Path) -> Case:
    """One broken file among those of a sweep."""
    run = sorted(Path("sweep").rglob("result.json"))[0].parent
    name = draw.choice(
        ("result.json", "result.json", "result.json", "job.json", "few_shot.json", "failed.json", "config.yaml", "log.txt")
    )
    file = Path(run, name)
    if name == "config.yaml":
        content = spoil.spoilt_yaml(file.read_text(), draw, str(root / "victim" / "owned"))
    elif name == "log.txt":
        content = spoil.spoilt_bytes(file.read_bytes(), draw)
    else:
        content = spoil.spoilt_json(file.read_text() if file.is_file() else '{"error": "x", "log": ["a"]}', draw)
    argv = draw.choice(
        (
            ("table", "in/sweep"),
            ("table", "in/sweep", "--format", "csv"),
            ("report", "in/sweep", "--output", "out/r.html"),
            (*world.RUN, "--output", "in/sweep", "--dry-run"),
            (*world.RUN, "--output", "in/sweep"),
        )
    )
    return Case({f"in/{file}": content}, argv, [("sweep", "in/sweep")], "in/sweep" if argv[0] == "run" else "out", failing=True)


def archives(draw: random.Random, root: Path) -> Case:
    name, content = spoil.archive(draw, root / "victim")
    # what was fetched stays below .plpp-get, for the next try
    return Case({f"in/{name}": content}, GOOD["data get"], fetched=f"in/{name}", failing=True, begun=True)


@functools.cache
def arguments() -> list[tuple[str, str, str]]:
    """(command, flag or "" of a positional argument, where it is kept) of every argument of every command."""
    found = []
    for command in GOOD:
        parser = cli._parser(command.split()[0]).chosen(argparse.Namespace(command=command.split()[0], action=None))
        if " " in command:
            parser = parser.chosen(argparse.Namespace(action=command.split()[1]))
        found += [
            (command, (a.option_strings or [""])[-1], a.dest) for a in parser._actions if a.dest not in ("help", "action")
        ]
    return found


PATHS = (
    "a" * 300,
    "/a" * 5000,
    "~nouser/x",
    "x\udcff",
    "x\0y",
    "loop/x",
    ".",
    "recipe.yaml",
    "recipe.yaml/x",
    "/dev/null",
    "/proc/nowhere/x",
)


def values_of_arguments(draw: random.Random, root: Path) -> Case:
    command, flag, name = draw.choice(arguments())
    value = draw.choice((*PATHS, *map(str, spoil.VALUES)))
    if (name in WRITTEN or (command, name) == ("data get", "root")) and value != "x\udcff":
        value = f"out/{value}" if "out/" not in value else value
        value = value.replace("..", "x")
    if value.startswith("victim_module") and name in ("trainer", "methods"):
        value = "absent_module:Zen"  # a flag may import
    argv = list(GOOD[command])
    if name == "opts":
        keys = sorted(config.flat(config.get_cfg_default()))
        argv += ["--set"] * (command == "run") + [draw.choice((draw.choice(keys), value)), draw.choice(("1", value))]
        argv = argv if not {"OUTPUT_DIR"} & set(argv) else list(GOOD[command])
    elif flag:
        argv += [flag, value] if draw.random() < 0.9 else [f"{flag}={value}"]
    else:
        argv[argv.index("data") + 1 if command.startswith("data") else 1] = value
    return Case({}, argv, failing=command.startswith(("data", "doctor", "run")), starts=command == "doctor")


def values_of_keys(draw: random.Random, root: Path) -> Case:
    keys = sorted(config.flat(config.get_cfg_default()))
    key = draw.choice(keys)
    value = str(draw.choice(spoil.VALUES)) if draw.random() < 0.9 else draw.choice(PATHS)
    if key == "OUTPUT_DIR":
        value = f"out/{value.replace('..', 'x')}"
    elif key == "OPTIM.MAX_EPOCH" and value.isdigit():
        value = value[:2]
    command = draw.choice((GOOD["train"], GOOD["train"], GOOD["train"][:-1], GOOD["estimate"]))
    argv = list(command)
    if draw.random() < 0.3:
        argv[argv.index("CoOp")] = "CoOp_PLPP"
    return Case({}, [*argv, key, value])


KINDS: dict[str, tuple[Maker, int]] = {  # and how many of a hundred
    "recipes": (recipes, 8),
    "configurations of runs": (runs_configurations, 7),
    "protocols": (protocols, 10),
    "split files": (splits, 7),
    "tables of pictures": (tables_of_pictures, 6),
    "pictures": (pictures, 12),
    "checkpoints": (checkpoints, 9),
    "pointers to checkpoints": (pointers, 2),
    "backbones": (backbones, 4),
    "records of runs": (records, 8),
    "archives": (archives, 5),
    "arguments": (values_of_arguments, 13),
    "keys": (values_of_keys, 9),
}
