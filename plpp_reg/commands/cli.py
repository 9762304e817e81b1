"""``plpp …``: which command, its arguments, what it raises as one line and an exit status."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import NoReturn

from plpp_reg import __version__
from plpp_reg.errors import InputError, install, line_of, unknown
from plpp_reg.io.signals import Stopped, stopped_as_by_ctrl_c
from plpp_reg.io.terminal import discard_output, print_all_letters

# torch's threads (GNU OpenMP) wait for each other in a long busy loop: with small tensors, and another process on one of two
# cores, a step takes 60 times as long. A short loop costs nothing where the machine is quiet, and 2.5 times where it is not.
# It is read when torch is loaded, so it stands here, before anything loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


COMMANDS = {  # each is a file of this folder
    "train": "train and test one prompt learner",
    "estimate": "what a run will cost, before it is started; no weights are downloaded",
    "demo": "methods with and without PLPP on the embedded default: one table, one picture",
    "tune": "PLPP's weight and k for your own data and backbone, against stopping early",
    "run": "a protocol: every method, data set and seed of it; what is done is skipped",
    "table": "the tables of a folder of runs, beside published figures",
    "report": "one HTML page of a folder of runs: tables, figures, words, every configuration",
    "data": "your own pictures and the papers' data sets: what is there, what is wrong or missing; downloads",
    "predict": "a trained prompt on your own pictures, also around other class names",
    "export": "a trained prompt as one file: ONNX with the image tower, or safetensors for plain PyTorch",
    "cache": "the kept image features: how many, how large, how old",
    "doctor": "what is installed, what will fail, and the command that mends it",
    "inspect": "read the words out of learned prompts",
}
TAKE_KEYS = (["train"], ["estimate"], ["demo"], ["tune"])  # configuration keys after the flags
KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|USE_CUDA|OUTPUT_DIR|RESUME|VERSION")


class _Parser(argparse.ArgumentParser):
    """One line on a bad flag, with the nearest one, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        flag = message.removeprefix("unrecognized arguments: ").split()[0]
        if flag != message.split()[0] and flag.startswith("--"):
            raise unknown("flag", flag, self.flags())
        raise InputError(f"{message} (see {self.prog} --help)")

    def flags(self) -> list[str]:
        """The long flags of this command, not of those below it."""
        return [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]

    def chosen(self, args: argparse.Namespace) -> _Parser:
        """The command that ``args`` name, and of ``plpp data`` its action."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and getattr(args, action.dest) is not None:
                return action.choices[getattr(args, action.dest)].chosen(args)
        return self


def _parser(chosen: str = "") -> _Parser:
    """Every command by its name; the arguments of the ``chosen`` one alone, since only its file is read."""
    parser = _Parser(prog="plpp", description="Prompt Learning with PerPlexity, for any CLIP prompt learner")
    parser.add_argument("--version", action="version", version=f"plpp-reg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what)
        command.set_defaults(opts=())
        if name == chosen:
            _file_of(name).arguments(command)
    return parser


def _file_of(command: str) -> ModuleType:
    return importlib.import_module(f"plpp_reg.commands.{command}")


def _keys_apart(argv: Sequence[str]) -> list[str]:
    """``--seeds 1 2 OPTIM.LR 0.1``: the first configuration key ends the values of a flag that takes several."""
    words = list(argv)
    if words[:1] in TAKE_KEYS and "--" not in words:
        for i, word in enumerate(words):
            if KEY.fullmatch(word):
                return [*words[:i], "--", *words[i:]]
    return words


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; a flag that the chosen command has not is refused with the nearest of those that it has."""
    name = next((word for word in argv if not word.startswith("-")), "")
    if name and name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    parser = _parser(name)
    args, left = parser.parse_known_args(_keys_apart(argv))
    command = parser.chosen(args)
    if left:
        command.error(f"unrecognized arguments: {' '.join(left)}")
    args.opts = [word for i, word in enumerate(getattr(args, "opts", [])) if i or word != "--"]
    for word in args.opts[::2]:
        if word in command.flags():
            raise InputError(f"flag {word!r}: expected before the KEY VALUE pairs, got it among them")
        if word.startswith("-"):
            raise unknown("flag", word, command.flags())
    return args


def _quiet_about_files(error: threading.ExceptHookArgs) -> None:
    """An OSError of a thread, tensorboard's on a full disk, comes again where its work is used: there it is told."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run itself failed, 2 what was asked for cannot be, 128 and its number by a signal."""
    print_all_letters()
    warnings.filterwarnings("ignore", module="PIL")  # of a damaged picture: it can be read, or one line says why not
    threading.excepthook = _quiet_about_files
    try:
        with stopped_as_by_ctrl_c():
            status = _command(sys.argv[1:] if argv is None else argv)
            if sys.stdout is not None:
                sys.stdout.flush()  # here, where a full disk is one line
        return status
    except ModuleNotFoundError as e:
        return _ended(f"the package {e.name!r} is needed: {install('demo')}", 2)
    except BrokenPipeError:  # plpp … | head
        discard_output()  # nothing is left to flush into the pipe
        return 141
    except KeyboardInterrupt as e:
        by = f" by {e}" if isinstance(e, Stopped) else ""
        number = e.number if isinstance(e, Stopped) else signal.SIGINT
        return _ended(f"stopped{by}; the same command goes on from what is there", 128 + number)
    except Exception as e:
        if (line := line_of(e)) is not None:
            return _ended(line, 2)
        if not isinstance(e, RuntimeError):
            raise
        from plpp_reg.engine.trainer import NonFiniteLoss

        if not isinstance(e, NonFiniteLoss):
            raise
        return _ended(str(e), 1)


def _command(argv: Sequence[str]) -> int:
    args = _parsed(argv)
    if args.command is None:
        _parser().print_help()
        return 0
    return _file_of(args.command).main(args) or 0


def _ended(line: str, status: int) -> int:
    """Say why, and nothing else: what is left of the output may be what could not be written."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError):
        discard_output()
    print(f"plpp: {line}", file=sys.stderr)
    return status
