"""``plpp run``: a protocol."""

from __future__ import annotations

import argparse

from plpp_reg.commands import flags
from plpp_reg.io.terminal import say


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "protocol",
        type=flags.path,
        help="few_shot, base_to_new, cross_dataset, domain_generalization, ablation, or a YAML file",
    )
    add("--methods", nargs="+", default=[], help="trainers: CoOp CoOp_PLPP …")
    add("--datasets", nargs="+", default=[], help="data sets to train on: caltech101 dtd folder:PATH csv:PATH …")
    add("--targets", nargs="+", default=[], help="other data sets to test on")
    add("--seeds", nargs="+", type=int, default=[], help="seeds (default: 1 2 3)")
    add("--shots", nargs="+", type=int, default=[], help="training images a class")
    add("--teachers", nargs="+", default=[], help="trainers whose runs teach the methods that distil: PromptSRC …")
    add("--recipe", default="", help="file of configs/trainers/<method>/, without .yaml")
    add("--root", type=flags.path, default="", help="folder of the data sets; without it and --backbone, the embedded default")
    add("--backbone", type=flags.path, default="", help="'embedded', a name of OpenAI's (ViT-B/16) or a file")
    add("--output", type=flags.path, default="output", metavar="DIR", help="where the runs go (default: output)")
    add("--dry-run", action="store_true", help="print the plan, run nothing")
    add("--workers", type=int, default=0, metavar="N", help="processes, a GPU each if any (default: this one)")
    add("--threads", type=int, default=0, metavar="T", help="CPU threads of each run (default: torch's, divided)")
    add("--executor", default="processes", help="processes (default), or ray: a Ray cluster")
    add("--address", default="", help="of the Ray cluster (default: RAY_ADDRESS, or one that starts here)")
    add("--set", dest="opts", nargs="+", default=[], metavar="KEY VALUE", help="configuration keys for every run")


def main(args: argparse.Namespace) -> int:
    from plpp_reg.experiments import executors, jobs, sweep

    runner = executors.choose(args.executor, args.workers, args.threads, args.address)
    fields = {name: getattr(args, name) for name in jobs.Choice._fields}
    planned = jobs.plan(args.protocol, jobs.Choice(**fields), args.output)
    if args.dry_run:
        print("\n".join(sweep.planned(planned)))
        return 0
    failed = sweep.sweep(planned, say, runner, at_once=args.workers)
    whole = f"All {len(planned)} runs are" if len(planned) > 1 else "The run is"
    print("\n".join(sweep.report(failed) or [f"{whole} there: plpp table {args.output}"]))
    return 1 if failed else 0
