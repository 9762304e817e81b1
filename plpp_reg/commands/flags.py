"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from plpp_reg.errors import InputError
from plpp_reg.io.paths import usable_path

if TYPE_CHECKING:
    from plpp_reg.engine.run import RunArguments


def path(text: str) -> str:
    """The type of an argument that is a path; argparse puts the argument's name before the message."""
    try:
        return usable_path(text)
    except InputError as e:
        raise argparse.ArgumentTypeError(str(e)) from e


def arguments(parser: argparse.ArgumentParser) -> None:
    """Of a run, by Dassl's own names."""
    parser.allow_abbrev = False
    parser.add_argument("--trainer", default="", help="CoOp, CoOp_PLPP, ZeroshotCLIP, … or package.module:Class")
    parser.add_argument("--root", type=path, default="", help="folder of the data sets")
    parser.add_argument(
        "--output-dir", type=path, default="", help="output folder (default: output/<data set>/<trainer>/seed<seed>)"
    )
    parser.add_argument("--seed", type=int, default=None, help="seed, 0 included (default 1; -1 draws one)")
    parser.add_argument("--transforms", nargs="+", default=(), help="data augmentation by Dassl's names")
    parser.add_argument("--config-file", type=path, default="", help="method configuration (YAML)")
    parser.add_argument(
        "--dataset-config-file", type=path, default="", help="data set's configuration (YAML; default: embedded)"
    )
    parser.add_argument(
        "--backbone", type=path, default="", help="embedded (default), ViT-B/16 and the like, open_clip:ARCH/WEIGHTS, a file"
    )


def keys(parser: argparse.ArgumentParser, where: str = "configuration keys, after the flags") -> None:
    """``KEY VALUE`` pairs at the end of the line."""
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help=where)


def learned(parser: argparse.ArgumentParser) -> None:
    """What was learned: which run, which of its checkpoints, around which class names."""
    parser.add_argument(
        "run", type=path, metavar="RUN", help="a run's folder, of a training or a test, or a checkpoint, ours or upstream's"
    )
    parser.add_argument("--classes", nargs="+", default=[], help="class names (default: those trained on)")
    parser.add_argument("--load-epoch", type=int, default=None, help="epoch to load (default: best on validation, else last)")
    parser.add_argument("--backbone", type=path, default="", help="the CLIP it was trained on (a run of ours knows it)")
    parser.add_argument("--position", default="end", help="where the class name stands: end, middle, front (upstream's only)")
    own_trainer(parser)


def learned_from(args: argparse.Namespace) -> dict[str, Any]:
    """What :func:`learned` added, as :func:`plpp_reg.prompts.loading.load_run` takes it."""
    return {
        "folder": args.run,
        "classes": args.classes,
        "epoch": args.load_epoch,
        "trainer": args.trainer,
        "backbone": args.backbone,
        "position": args.position,
    }


def own_trainer(parser: argparse.ArgumentParser) -> None:
    """What a run's folder may not name, since importing it runs it."""
    parser.add_argument("--trainer", default="", help="of a run of a trainer of your own: package.module:Class, imported")


def run_arguments(args: argparse.Namespace) -> RunArguments:
    """What :func:`arguments` added, as a run takes it."""
    from plpp_reg.engine.run import RunArguments

    fields = {name: value for name, value in vars(args).items() if name in RunArguments._fields}
    return RunArguments(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
