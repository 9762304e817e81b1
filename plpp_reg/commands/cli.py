"""``plpp …``: arguments only, no logic."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from plpp_reg import __version__
from plpp_reg.errors import InputError, install, unknown

if TYPE_CHECKING:
    from plpp_reg.engine.run import RunArguments
    from plpp_reg.results.learned import Reader

# torch's threads (GNU OpenMP) wait for each other in a long busy loop: with small tensors, and another process on one of two
# cores, a step takes 60 times as long. A short loop costs nothing where the machine is quiet, and 2.5 times where it is not.
# It is read when torch is loaded, so it stands here, before anything loads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


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


def _parser() -> _Parser:
    parser = _Parser(prog="plpp", description="Prompt Learning with PerPlexity, for any CLIP prompt learner")
    parser.add_argument("--version", action="version", version=f"plpp-reg {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)

    train = commands.add_parser("train", help="train and test one prompt learner", allow_abbrev=False)
    cost = commands.add_parser(
        "estimate", help="what a run will cost, before it is started; no weights are downloaded", allow_abbrev=False
    )
    for command in (train, cost):
        command.add_argument("--trainer", default="", help="CoOp, CoOp_PLPP, ZeroshotCLIP, … or package.module:Class")
        command.add_argument("--root", default="", help="folder of the data sets")
        command.add_argument("--output-dir", default="", help="output folder (default: output/<data set>/<trainer>/seed<seed>)")
        command.add_argument("--seed", type=int, default=None, help="seed, 0 included (default 1; -1 draws one)")
        command.add_argument("--transforms", nargs="+", default=(), help="data augmentation by Dassl's names")
        command.add_argument("--config-file", default="", help="method configuration (YAML)")
        command.add_argument("--dataset-config-file", default="", help="data set's configuration (YAML; default: embedded)")
        command.add_argument(
            "--backbone", default="", help="embedded (default), ViT-B/16 and the like, open_clip:ARCH/WEIGHTS, a file"
        )
    train.add_argument("--resume", default="", metavar="DIR", help="run folder to go on from")
    train.add_argument("--eval-only", action="store_true", help="evaluate, never train")
    train.add_argument("--model-dir", default="", metavar="DIR", help="run folder whose prompts --eval-only loads")
    train.add_argument("--load-epoch", type=int, default=None, help="epoch to load (default: best on validation, else last)")
    train.add_argument("--no-train", action="store_true", help="build everything, train nothing")
    train.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="configuration keys, after the flags")

    cost.add_argument("--classes", type=int, default=None, metavar="N", help="so many classes, in place of a data set's")
    cost.add_argument("--json", action="store_true", help="print everything as JSON")
    cost.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="configuration keys, after the flags")

    demo = commands.add_parser("demo", help="methods with and without PLPP on the embedded default: one table, one picture")
    demo.add_argument("--methods", nargs="+", default=["CoOp"], help="prompt learners, or all (default: CoOp)")
    demo.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="seeds (default: 1 2 3)")
    demo.add_argument("--output-dir", default="output/demo", help="where runs, table and picture go")
    demo.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="configuration keys for every run")

    run = commands.add_parser("run", help="a protocol: every method, data set and seed of it; what is done is skipped")
    run.add_argument("protocol", help="few_shot, base_to_new, cross_dataset, domain_generalization, ablation, or a YAML file")
    run.add_argument("--methods", nargs="+", default=[], help="trainers: CoOp CoOp_PLPP …")
    run.add_argument("--datasets", nargs="+", default=[], help="data sets to train on: caltech101 dtd folder:PATH csv:PATH …")
    run.add_argument("--targets", nargs="+", default=[], help="other data sets to test on")
    run.add_argument("--seeds", nargs="+", type=int, default=[], help="seeds (default: 1 2 3)")
    run.add_argument("--shots", nargs="+", type=int, default=[], help="training images a class")
    run.add_argument("--recipe", default="", help="file of configs/trainers/<method>/, without .yaml")
    run.add_argument("--root", default="", help="folder of the data sets; without it and --backbone, the embedded default")
    run.add_argument("--backbone", default="", help="'embedded', a name of OpenAI's (ViT-B/16) or a file")
    run.add_argument("--output", default="output", metavar="DIR", help="where the runs go (default: output)")
    run.add_argument("--dry-run", action="store_true", help="print the plan, run nothing")
    run.add_argument("--workers", type=int, default=0, metavar="N", help="processes, a GPU each if any (default: this one)")
    run.add_argument("--threads", type=int, default=0, metavar="T", help="CPU threads of each run (default: torch's, divided)")
    run.add_argument("--executor", default="processes", help="processes (default), or ray: a Ray cluster")
    run.add_argument("--address", default="", help="of the Ray cluster (default: RAY_ADDRESS, or one that starts here)")
    run.add_argument("--set", dest="opts", nargs="+", default=[], metavar="KEY VALUE", help="configuration keys for every run")

    table = commands.add_parser("table", help="the tables of a folder of runs, beside published figures")
    table.add_argument("dir", metavar="DIR", help="what plpp run wrote")
    table.add_argument("--format", choices=("markdown", "csv", "latex"), default="markdown")
    table.add_argument("--output", default="", metavar="FILE", help="write it there (default: print it)")
    table.add_argument("--mean-h", action="store_true", help="beside H of the averages, the mean of H")
    table.add_argument("--no-published", action="store_true", help="without rows of published figures")
    table.set_defaults(opts=[])

    report = commands.add_parser(
        "report", help="one HTML page of a folder of runs: tables, figures, words, every configuration"
    )
    report.add_argument("dir", metavar="DIR", help="a folder of runs: what plpp run or plpp train wrote")
    report.add_argument("--output", default="", metavar="FILE", help="the page (default: DIR/report.html)")
    report.add_argument("--no-published", action="store_true", help="without rows of published figures")
    report.set_defaults(opts=[])

    data = commands.add_parser("data", help="the papers' data sets: what is there, what is missing; downloads")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=_Parser)
    look = actions.add_parser("check", help="what is there, what is missing, where to get it")
    look.add_argument("root", metavar="ROOT", help="folder of the data sets")
    look.add_argument("--datasets", nargs="+", default=[], help="these alone (also folder:PATH, csv:PATH)")
    look.add_argument("--every-image", action="store_true", help="decode every image, not one of each data set")
    get = actions.add_parser("get", help="download data sets, check them, unpack them where they belong")
    get.add_argument("names", nargs="+", metavar="NAME", help="caltech101 dtd … (not imagenet)")
    get.add_argument("--root", default="data", metavar="DATA", help="folder of the data sets (default: data)")
    get.add_argument("--source", default="hub", help="hub (default: with the papers' splits), or torchvision")
    data.set_defaults(opts=[])

    predict = commands.add_parser("predict", help="a trained prompt on your own images and class names")
    predict.add_argument("run", metavar="RUN", help="a run's folder")
    predict.add_argument("images", nargs="+", metavar="IMAGE", help="pictures, or folders of them")
    predict.add_argument("--classes", nargs="+", default=[], help="class names (default: those trained on)")
    predict.add_argument("--load-epoch", type=int, default=None, help="epoch to load (default: best on validation, else last)")
    predict.add_argument("--top", type=int, default=3, help="classes shown for each image (default: 3)")
    predict.add_argument("--json", action="store_true", help="all probabilities, as JSON")
    predict.set_defaults(opts=[])

    export = commands.add_parser("export", help="a trained prompt as one safetensors file for plain PyTorch")
    export.add_argument("run", metavar="RUN", help="a run's folder")
    export.add_argument("file", metavar="FILE", help="where it goes: prompt.safetensors")
    export.add_argument("--classes", nargs="+", default=[], help="class names (default: those trained on)")
    export.add_argument("--load-epoch", type=int, default=None, help="epoch to load (default: best on validation, else last)")
    export.set_defaults(opts=[])

    cache = commands.add_parser("cache", help="the kept image features: how many, how large, how old")
    cache.add_argument("--clear", action="store_true", help="remove them")
    cache.set_defaults(opts=[])

    doctor = commands.add_parser("doctor", help="what is installed, what will fail, and the command that mends it")
    doctor.add_argument("--folder", default=".", help="where the script stands that you run (default: here)")

    inspect = commands.add_parser("inspect", help="read the words out of learned prompts", allow_abbrev=False)
    inspect.add_argument(
        "source", metavar="RUN_OR_CHECKPOINT", help="a run's folder or a model.pth.tar-<n>, ours or upstream's"
    )
    inspect.add_argument("--backbone", default="", help="the CLIP it was trained on (a run of ours knows it)")
    inspect.add_argument("--load-epoch", type=int, default=None, help="epoch to read (default: the newest)")
    inspect.add_argument("--position", default="end", help="where the class name stands: end, middle, front (upstream's only)")
    inspect.add_argument("--init", default="", help="words that the context began with (upstream's only)")
    inspect.add_argument("--words", type=int, default=5, help="how many words to show (default: 5)")
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.add_argument("--out", default="", metavar="PNG", help="draw the perplexity over the epochs")
    for command in (predict, export, inspect):
        command.add_argument("--trainer", default="", help="of a run of a trainer of your own: package.module:Class, imported")
    for command in (doctor, inspect):
        command.set_defaults(opts=())
    return parser


def _run_arguments(args: argparse.Namespace) -> RunArguments:
    from plpp_reg.engine.run import RunArguments

    fields = {name: value for name, value in vars(args).items() if name in RunArguments._fields}
    return RunArguments(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})


def _train(args: argparse.Namespace) -> None:
    from plpp_reg.engine.run import run

    run(_run_arguments(args))


def _estimate(args: argparse.Namespace) -> None:
    from plpp_reg.estimate import estimate
    from plpp_reg.estimate import text as estimate_text

    cost = estimate.estimate(_run_arguments(args), args.classes)
    print(estimate_text.as_json(cost) if args.json else estimate_text.as_text(cost))


def _demo(args: argparse.Namespace) -> None:
    from plpp_reg.experiments.demo import demo

    demo(args.seeds, args.output_dir, args.opts, args.methods)


def _run(args: argparse.Namespace) -> int:
    from plpp_reg.experiments import executors as workers
    from plpp_reg.experiments import protocols, sweep

    runner = workers.choose(args.executor, args.workers, args.threads, args.address)
    fields = {name: getattr(args, name) for name in protocols.Choice._fields}
    jobs = protocols.plan(args.protocol, protocols.Choice(**fields), args.output)
    if args.dry_run:
        print("\n".join(sweep.planned(jobs)))
        return 0
    failed = sweep.sweep(jobs, lambda line: print(line, flush=True), runner)
    whole = f"All {len(jobs)} runs are" if len(jobs) > 1 else "The run is"
    print("\n".join(sweep.report(failed) or [f"{whole} there: plpp table {args.output}"]))
    return 1 if failed else 0


def _table(args: argparse.Namespace) -> None:
    from plpp_reg.results.tables import write_tables

    write_tables(args.dir, args.format, args.output, mean_h=args.mean_h, published=not args.no_published)


def _report(args: argparse.Namespace) -> None:
    from plpp_reg.results.report import write_report

    def reader() -> Reader:
        from plpp_reg.prompts.recorded import PromptReader

        return PromptReader()

    write_report(args.dir, args.output, published=not args.no_published, reader=reader)


def _data(args: argparse.Namespace) -> int:
    if args.action == "get":
        from plpp_reg.data.download import get

        return get(args.names, args.root, args.source)
    from plpp_reg.data.check import check

    return check(args.root, args.datasets, args.every_image)


def _predict(args: argparse.Namespace) -> None:
    from plpp_reg.prompts.predict import show

    show(args.run, args.images, args.classes, args.load_epoch, args.top, args.json, args.trainer)


def _export(args: argparse.Namespace) -> None:
    from plpp_reg.prompts.predict import show_export

    show_export(args.run, args.file, args.classes, args.load_epoch, args.trainer)


def _cache(args: argparse.Namespace) -> None:
    from plpp_reg.engine.features import show_store

    show_store(args.clear)


def _doctor(args: argparse.Namespace) -> int:
    from plpp_reg.commands.doctor import doctor, report

    findings = doctor(args.folder)
    print(report(findings))
    return 1 if any(f.fails for f in findings) else 0


def _inspect(args: argparse.Namespace) -> None:
    from pathlib import Path

    from plpp_reg.prompts import inspect as inspection

    found = inspection.inspect_prompts(
        args.source, args.backbone, args.load_epoch, args.position, args.init, args.words, args.trainer
    )
    print(inspection.as_json(found) if args.json else inspection.as_text(found))
    if args.out:
        inspection.draw(found, Path(args.out))
        print(f"Picture: {args.out}", file=sys.stderr)


def _keys_apart(argv: Sequence[str]) -> list[str]:
    """``--seeds 1 2 OPTIM.LR 0.1``: the first configuration key ends the values of a flag that takes several."""
    words = list(argv)
    if words[:1] in (["train"], ["estimate"], ["demo"]) and "--" not in words:
        for i, word in enumerate(words):
            if KEY.fullmatch(word):
                return [*words[:i], "--", *words[i:]]
    return words


def _parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments; a flag that the chosen command has not is refused with the nearest of those that it has."""
    parser = _parser()
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


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 the run itself failed, 2 what was asked for cannot be."""
    try:
        args = _parsed(sys.argv[1:] if argv is None else argv)
        if args.command is None:
            _parser().print_help()
            return 0
        commands = {"train": _train, "demo": _demo, "run": _run, "table": _table, "report": _report, "data": _data}
        commands |= {"predict": _predict, "export": _export, "cache": _cache}
        commands |= {"doctor": _doctor, "inspect": _inspect, "estimate": _estimate}
        return commands[args.command](args) or 0
    except InputError as e:
        print(f"plpp: {' '.join(str(e).split())}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as e:
        print(f"plpp: the package {e.name!r} is needed: {install('demo')}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # plpp … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to flush into the pipe
        return 141
    except KeyboardInterrupt:
        print("plpp: stopped; the same command goes on from what is there", file=sys.stderr)
        return 130
    except RuntimeError as e:
        from plpp_reg.engine.trainer import NonFiniteLoss

        if not isinstance(e, NonFiniteLoss):
            raise
        print(f"plpp: {e}", file=sys.stderr)
        return 1
    return 0
