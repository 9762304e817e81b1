"""A protocol's runs: what it and a command line say, expanded into jobs, each a command with a folder of its own."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from yacs.config import CfgNode

from plpp_reg.clip.load import EMBEDDED
from plpp_reg.data import full_name, short_name
from plpp_reg.engine import config, registry
from plpp_reg.engine.arguments import RunArguments, further_config, resolve, shipped_config
from plpp_reg.errors import InputError
from plpp_reg.experiments.protocols import TARGET, Protocol, as_folder, load_protocol, short
from plpp_reg.loss import SUFFIX
from plpp_reg.results.job import run_label
from plpp_reg.results.record import NOT_IN_THE_RESULT

DECIDED = {  # keys that say which run it is, and what says so
    "SEED": "--seeds",
    "OUTPUT_DIR": "--output",
    "RESUME": "what is in its folder",
    "TRAINER.NAME": "--methods",
    "MODEL.BACKBONE.NAME": "--backbone",
    "DATASET.NAME": "--datasets",
    "DATASET.ROOT": "--root",
    "DATASET.NUM_SHOTS": "--shots",
    "DATASET.SUBSAMPLE_CLASSES": "the protocol",
}
SET_BY_PROTOCOLS = ("DATASET.NUM_SHOTS", "DATASET.SUBSAMPLE_CLASSES")  # of one's own too


class Choice(NamedTuple):
    """What a command line changes of a protocol; empty: as the protocol has it."""

    methods: Sequence[str] = ()
    datasets: Sequence[str] = ()
    targets: Sequence[str] = ()
    seeds: Sequence[int] = ()
    shots: Sequence[int] = ()
    recipe: str = ""
    backbone: str = ""
    root: str = ""
    opts: Sequence[str] = ()
    teachers: Sequence[str] = ()  # methods


class Job(NamedTuple):
    """One run: a pure function of these fields, in its own folder. ``note`` is what a table needs to know of it; ``teacher`` is
    the folder of the run that it learns from."""

    output: Path
    folder: Path
    arguments: RunArguments
    tests: dict[str, tuple[str, ...]]
    note: dict[str, Any]
    teacher: Path | None = None

    @property
    def label(self) -> str:
        return run_label(self.note)


def refuse_decided(keys: Iterable[str], decided: Mapping[str, str], where: str) -> None:
    """Raise InputError on a configuration key that would make every run another than its folder says."""
    for key in keys:
        if key in decided:
            raise InputError(f"{where}: expected no {key}, which is each run's own: {decided[key]} decides it")


def _keys_set(protocol: Protocol) -> Iterator[str]:
    settings = [protocol.set, *(rule.get("set", {}) for rule in protocol.where), protocol.vary, *protocol.variants.values()]
    return itertools.chain.from_iterable(settings)


def choose(name: str, choice: Choice) -> Protocol:
    """A protocol as a command line has it. Without data folder and backbone it is its embedded form."""
    embedded = not choice.root and choice.backbone in ("", EMBEDDED)
    protocol = load_protocol(name, embedded)
    refuse_decided(choice.opts[::2], DECIDED, "--set")
    decided = {key: by for key, by in DECIDED.items() if key not in SET_BY_PROTOCOLS}
    refuse_decided(_keys_set(protocol), decided, f"protocol {name!r}")
    chosen = {key: tuple(getattr(choice, key)) for key in ("methods", "datasets", "targets", "seeds", "shots")}
    changed: dict[str, Any] = {key: value for key, value in chosen.items() if value}
    if choice.recipe:
        changed["recipe"] = (choice.recipe,)
        changed["where"] = [{k: v for k, v in rule.items() if k != "recipe"} for rule in protocol.where]
    if choice.backbone:
        changed["backbone"] = choice.backbone
    if not choice.methods:
        for method in protocol.methods:
            registry.find_named_by_file(str(method), f"protocol {name!r}", "--methods")
    protocol = dataclasses.replace(protocol, **changed)
    for key in ("methods", "datasets", "targets", "seeds", "shots"):
        values = [full_name(v) if key in ("datasets", "targets") else v for v in getattr(protocol, key)]
        if len(set(values)) != len(values):
            raise InputError(f"--{key}: expected each once, got {' '.join(map(str, values))}")
    for key, least in (("seeds", 0), ("shots", 1)):
        wrong = [v for v in getattr(protocol, key) if not least <= v < 2**32]
        if wrong:
            raise InputError(f"--{key}: expected integers >= {least} of 32 bits, got {short(wrong[0])}")
    return protocol


def plan(name: str, choice: Choice, output: str | Path) -> list[Job]:
    """Every run of a protocol, in order: data sets, shots, methods, variants, seeds.

    Raises:
        InputError: a method, data set, recipe or key that is not there. Nothing is read of the data and nothing is written.
    """
    protocol = choose(name, choice)
    output = Path(output)
    jobs: dict[Path, Job] = {}
    for dataset in map(full_name, protocol.datasets):
        for shots in protocol.shots:
            for method in protocol.methods:
                if not learns(method) and shots != protocol.shots[0]:
                    continue  # it is the same whatever the shots
                where = (dataset, shots, method)
                for variant, settings in _variants(protocol, method).items():
                    for name, teachers, named in _teachers(protocol, choice, output, where, variant):
                        own = [
                            job
                            for target in _trained_on(protocol, *where)
                            for job in _over_seeds(
                                protocol, choice, output, *where, name, {**settings, **named}, teachers, target
                            )
                        ]
                        for job in (*teachers, *own):
                            if jobs.setdefault(job.folder, job) != job:
                                raise InputError(
                                    "expected data sets, methods and variants whose folders differ: two have one name"
                                )
    return list(jobs.values())


def _trained_on(protocol: Protocol, dataset: str, shots: int, method: str) -> list[str]:
    """The targets that a method has a student each of; "" alone: it is trained on the data set."""
    each = protocol.each
    for rule in protocol.where:
        if _applies(rule, method, dataset, shots):
            each = rule.get("each", each)
    if each != TARGET or not registry.find_trainer(method)[0].distils:
        return [""]
    return [target for target in map(full_name, protocol.targets) if target != dataset]


def _teachers(
    protocol: Protocol, choice: Choice, output: Path, where: tuple[str, int, str], variant: str
) -> Iterator[tuple[str, list[Job], dict[str, object]]]:
    """Of one method: the variant's name, its teacher's runs, and the settings that name a teacher which has none, teacher by
    teacher; of several those after the first are variants."""
    dataset, shots, method = where
    chosen: Mapping[str, Any] = protocol.teacher
    for rule in protocol.where:
        if _applies(rule, method, dataset, shots):
            chosen = rule.get("teacher", chosen)
    named = chosen.get("method", ())
    named = (named,) if isinstance(named, str) else tuple(named)
    methods = tuple(choice.teachers) or named
    if not methods or not registry.find_trainer(method)[0].distils:
        yield variant, [], {}
        return
    backbone = chosen.get("backbone") or protocol.backbone
    changed: dict[str, Any] = {"backbone": backbone}
    if "recipe" in chosen:
        changed["recipe"] = chosen["recipe"]
        changed["where"] = [{key: value for key, value in rule.items() if key != "recipe"} for rule in protocol.where]
    for i, teacher in enumerate(methods):
        of_its_own = chosen.get("set", {}) if teacher.removesuffix(SUFFIX) in named else {}
        own = dataclasses.replace(protocol, **changed, set={**protocol.set, **of_its_own})
        name = " ".join(filter(None, (variant, f"teacher={teacher}" if i else "")))
        if not learns(teacher):
            on = {"TEACHER.BACKBONE": chosen["backbone"]} if chosen.get("backbone") else {}  # or as the recipe has it
            yield name, [], {"TEACHER.TRAINER": teacher, **on}
            continue
        runs = _over_seeds(own, choice, output, dataset, shots, teacher, "", {})
        if backbone != protocol.backbone:  # not among the method's own runs
            runs = [_moved(job, f"{job.folder.parent.name}-{as_folder(backbone)}") for job in runs]
        yield name, runs, {}


def _moved(job: Job, name: str) -> Job:
    """The same run in another folder than its method's."""
    folder = job.folder.parent.with_name(name) / job.folder.name
    return job._replace(folder=folder, arguments=job.arguments._replace(output_dir=str(folder)))


def _variants(protocol: Protocol, method: str) -> dict[str, Mapping[str, object]]:
    """Name -> settings; the first, "", is the method as its recipe has it."""
    found: dict[str, Mapping[str, object]] = {"": {}}
    if method.endswith(SUFFIX):
        defaults = config.flat(config.get_cfg_default(registry.find_trainer(method)[0]))
        for key, values in protocol.vary.items():
            for value in values:
                if value != defaults.get(key):
                    found[f"{key.rpartition('.')[2]}={value}"] = {key: value}
        found.update(protocol.variants)
    return found


def _applies(rule: Mapping[str, Any], method: str, dataset: str, shots: int) -> bool:
    plain = method.removesuffix(SUFFIX)
    return (
        plain in [m.removesuffix(SUFFIX) for m in rule.get("methods", [plain])]
        and dataset in map(full_name, rule.get("datasets", [dataset]))
        and shots in rule.get("shots", [shots])
    )


def _over_seeds(
    protocol: Protocol,
    choice: Choice,
    output: Path,
    dataset: str,
    shots: int,
    method: str,
    variant: str,
    settings: Mapping[str, object],
    teachers: Sequence[Job] = (),
    target: str = "",
) -> list[Job]:
    """A run a seed; ``target``: which it is trained and tested on, in place of the data set."""
    source, dataset = dataset, target or dataset
    rules = [rule for rule in protocol.where if _applies(rule, method, dataset, shots)]
    recipe: Sequence[str] = protocol.recipe
    changes: dict[str, object] = {"DATASET.NAME": dataset, "DATASET.NUM_SHOTS": shots, **protocol.set}
    own_test, further = protocol.test, protocol.tests
    for rule in rules:
        recipe = rule.get("recipe", recipe)
        changes.update(rule.get("set", {}))
        own_test, further = rule.get("test", own_test), rule.get("tests", further)
    changes.update(settings)
    opts = (*_pairs(changes), *choice.opts)
    tests = {name: _pairs(test) for name, test in further.items()}
    for other in map(full_name, () if target else protocol.targets):
        if other != dataset:
            # All its images: a target is not sampled, and may have fewer than the shots.
            tests[short_name(other)] = _pairs({"DATASET.NAME": other, "DATASET.NUM_SHOTS": -1})
    arguments = RunArguments(
        trainer=method,
        root=choice.root,
        config_file=str(_recipe_file(recipe, method, dataset, shots)),
        backbone=protocol.backbone or EMBEDDED,
        opts=opts,
    )
    cfg, _ = resolve(arguments)
    for test in tests.values():
        further_config(cfg, test)
    note = {
        "name": protocol.name,
        "table": protocol.table,
        "dataset": short_name(source),
        "shots": shots,
        "method": cfg.TRAINER.NAME,
        "variant": variant,
        "backbone": cfg.MODEL.BACKBONE.NAME,
        "learns": learns(method),
        "test": short_name(target) if target else own_test,
        "tests": {name: dict(zip(test[::2], test[1::2], strict=True)) for name, test in tests.items()},
    }
    if target:
        note["target"] = short_name(target)
    if teachers:
        note["teacher"] = f"{teachers[0].note['method']} on {teachers[0].note['backbone']}"
    trained_on = f"{note['dataset']}_to_{note['target']}" if target else note["dataset"]
    inner = [trained_on, f"shots{shots}", cfg.TRAINER.NAME.replace(":", "."), *([as_folder(variant)] if variant else [])]
    jobs = []
    for i, seed in enumerate(protocol.seeds if note["learns"] else protocol.seeds[:1]):
        folder = output.joinpath(protocol.name, *inner, f"seed{seed}")
        seeded = _with_seed(cfg, seed)
        teacher = teachers[i % len(teachers)] if teachers else None
        noted = {**note, "seed": seed, "key": _key(seeded, tests, teacher.note["key"] if teacher else "")}
        run = arguments._replace(seed=seed, output_dir=str(folder))
        if teacher:
            run = run._replace(opts=(*run.opts, "TEACHER.RUN", str(teacher.folder.absolute())))
        jobs.append(Job(output, folder, run, tests, noted, teacher.folder if teacher else None))
    return jobs


def learns(method: str) -> bool:
    """Whether a method trains anything: what does not is the same for every seed and any number of shots."""
    return registry.find_trainer(method)[0].learns


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    changed = config.copied(cfg)
    changed.SEED = seed
    return changed


def _key(cfg: CfgNode, tests: Mapping[str, Sequence[str]], teacher: str = "") -> str:
    """What a result depends on, in short: two runs of one key differ in nothing but machine and data folder.

    ``teacher``: the key of the run that it learns from.
    """
    settings = {k: v for k, v in config.flat(cfg).items() if k not in NOT_IN_THE_RESULT}
    parts = [settings, tests, *([teacher] if teacher else [])]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _pairs(settings: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(text for key, value in settings.items() for text in (key, str(value)))


def _recipe_file(names: Sequence[str], method: str, dataset: str, shots: int) -> Path:
    plain = method.removesuffix(SUFFIX)
    registry.find_trainer(method)
    place = shipped_config("trainers", plain)
    tried = [name.format(dataset=short_name(dataset), shots=shots) for name in names]
    for name in tried:
        if (place / f"{name}.yaml").is_file():
            return place / f"{name}.yaml"
    if len(tried) == 1 and Path(tried[0]).is_file():
        return Path(tried[0])
    there = ", ".join(sorted(path.stem for path in place.glob("*.yaml"))) or "none"
    wanted = " or ".join(map(repr, tried))
    raise InputError(
        f"{method}: expected a recipe {wanted} in configs/trainers/{plain} (there: {there}); name one with --recipe"
    )
