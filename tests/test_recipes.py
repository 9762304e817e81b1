"""The recipes under configs/trainers: each is loaded, and its figures are those that its method's authors published."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from plpp_reg.commands import cli
from plpp_reg.engine import config, registry
from plpp_reg.engine.arguments import RunArguments, resolve, shipped_config
from plpp_reg.errors import InputError
from plpp_reg.experiments.jobs import Choice, plan
from plpp_reg.experiments.protocols import protocol_names
from plpp_reg.loss import SUFFIX
from plpp_reg.trainers import TRAINERS

FOLDER = Path(str(shipped_config("trainers")))
RECIPES = sorted(p.relative_to(FOLDER).as_posix() for p in FOLDER.glob("*/*.yaml") if p.parent.name != "common")
WORDS = "a photo of a"
USES = ("base2new", "cross_dataset", "few_shot_16")


def of(recipe: str, *opts: str) -> dict[str, object]:
    """The whole configuration of a run with a recipe, flat."""
    backbone = "" if recipe.endswith("embedded.yaml") else "ViT-B/16"
    arguments = RunArguments(
        trainer=recipe.split("/")[0], config_file=str(FOLDER / recipe), backbone=backbone, opts=opts, dataset_config_file=""
    )
    return config.flat(resolve(arguments)[0])


def coop(epochs: int, n_ctx: int = 16, init: str = "", batch: int = 32, **more: object) -> dict[str, object]:
    return {
        "OPTIM.MAX_EPOCH": epochs,
        "OPTIM.LR": 0.002,
        "DATALOADER.TRAIN_X.BATCH_SIZE": batch,
        "TRAINER.COOP.N_CTX": n_ctx,
        "TRAINER.COOP.CTX_INIT": init,
        "TRAINER.COOP.CSC": False,
        "TRAINER.COOP.CLASS_TOKEN_POSITION": "end",
        "TRAINER.COOP.PREC": "fp16",
        **more,
    }


def deep(method: str, epochs: int, lr: float, depth: int, **more: object) -> dict[str, object]:
    node = f"TRAINER.{method.upper()}"
    keys = {
        "OPTIM.MAX_EPOCH": epochs,
        "OPTIM.LR": lr,
        "DATALOADER.TRAIN_X.BATCH_SIZE": 4,
        f"{node}.CTX_INIT": WORDS,
        f"{node}.PREC": "fp16",
    }
    if method == "MaPLe":
        keys |= {f"{node}.N_CTX": 2, f"{node}.PROMPT_DEPTH": depth}
    elif method == "VPT":
        keys |= {f"{node}.N_CTX_VISION": 8, f"{node}.PROMPT_DEPTH_VISION": depth}
    else:
        keys |= {f"{node}.N_CTX_VISION": 4, f"{node}.N_CTX_TEXT": 4}
        keys |= {f"{node}.PROMPT_DEPTH_VISION": depth, f"{node}.PROMPT_DEPTH_TEXT": depth}
    return keys | {f"{node}.{key}": value for key, value in more.items()}


def src(epochs: int, depth: int, mean: float, std: float) -> dict[str, object]:
    weights = {"TEXT_LOSS_WEIGHT": 25.0, "IMAGE_LOSS_WEIGHT": 10.0}
    return deep("PromptSRC", epochs, 0.0025, depth, GPA_MEAN=mean, GPA_STD=std, **weights)


def promptkd(weight: float, depth: int, **more: object) -> dict[str, object]:
    keys = {"KD_WEIGHT": weight, "TEMPERATURE": 1.0, "N_CTX_VISION": 4, "PROMPT_DEPTH_VISION": depth, "PROJECTOR": True}
    training = {"OPTIM.MAX_EPOCH": 20, "OPTIM.LR": 0.005, "DATALOADER.TRAIN_X.BATCH_SIZE": 8, "DATASET.NUM_SHOTS": -1}
    return {**training, **{f"TRAINER.PROMPTKD.{key}": value for key, value in {**keys, "PREC": "fp16"}.items()}, **more}


FDBPL = {
    "OPTIM.MAX_EPOCH": 50,
    "OPTIM.LR": 0.002,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 32,
    "INPUT.RRCROP_SCALE": [0.08, 0.936],
    "TEACHER.TRAINER": "ZeroshotCLIP",
    "TEACHER.BACKBONE": "open_clip:ViT-H-14-quickgelu/dfn5b",
    "TRAINER.FDBPL.CTX_INIT": WORDS,
    "TRAINER.FDBPL.NEGATIVE_INIT": "a photo of no",
    "TRAINER.FDBPL.COSINE_WEIGHT": 0.001,
    "TRAINER.FDBPL.CASCADE": "none",
    "TRAINER.FDBPL.PREC": "fp16",
}


def kdpl(own: dict[str, object], **more: object) -> dict[str, object]:
    """The recipe of its method, a zero-shot teacher, and all classes compared."""
    teacher = {"TEACHER.TRAINER": "ZeroshotCLIP", "TEACHER.BACKBONE": "open_clip:ViT-H-14-quickgelu/dfn5b"}
    return {**own, **teacher, "TEACHER.RUN": "", "TRAINER.KDPL.K_MAX": 0, **more}


COCOOP = {
    "OPTIM.MAX_EPOCH": 10,
    "OPTIM.LR": 0.002,
    "DATALOADER.TRAIN_X.BATCH_SIZE": 1,
    "TRAINER.COCOOP.N_CTX": 4,
    "TRAINER.COCOOP.CTX_INIT": WORDS,
    "TRAINER.COCOOP.PREC": "fp16",
}
# As the papers and their code have them, and the tables of MaPLe's and PromptSRC's pages; written out here once more.
PUBLISHED = {
    "CoOp/few_shot_1.yaml": coop(50),
    "CoOp/few_shot_2.yaml": coop(100),
    "CoOp/few_shot_4.yaml": coop(100),
    "CoOp/few_shot_8.yaml": coop(200),
    "CoOp/few_shot_16.yaml": coop(200),
    "CoOp/few_shot_imagenet.yaml": coop(50),
    "CoOp/cross_dataset.yaml": coop(50, 4, WORDS),
    "CoOp/base2new.yaml": coop(200, 4, WORDS),
    "CoOp/base2new_imagenet.yaml": coop(50, 4, WORDS),
    "CoCoOp/base2new.yaml": COCOOP,
    "CoCoOp/cross_dataset.yaml": COCOOP,
    "CoCoOp/few_shot_16.yaml": COCOOP,
    "KgCoOp/few_shot_16.yaml": coop(100, 4, WORDS, **{"TRAINER.COOP.W": 8.0}),
    "KgCoOp/cross_dataset.yaml": coop(100, 4, WORDS, **{"TRAINER.COOP.W": 8.0}),
    "KgCoOp/base2new.yaml": coop(100, 4, WORDS, batch=128, **{"TRAINER.COOP.W": 8.0}),
    "ProGrad/base2new.yaml": coop(100, **{"LOSS.T": 1.0, "LOSS.LAMBDA": 1.0}),
    "ProGrad/base2new_imagenet.yaml": coop(50, **{"LOSS.T": 1.0, "LOSS.LAMBDA": 1.0}),
    "ProGrad/few_shot_1.yaml": coop(50),
    "ProGrad/few_shot_2.yaml": coop(100),
    "ProGrad/few_shot_4.yaml": coop(100),
    "ProGrad/few_shot_8.yaml": coop(200),
    "ProGrad/few_shot_16.yaml": coop(200, **{"LOSS.T": 1.0, "LOSS.LAMBDA": 1.0}),
    "ProGrad/few_shot_16_lambda.yaml": coop(200, **{"LOSS.LAMBDA": 0.8}),
    "ProGrad/few_shot_imagenet.yaml": coop(50),
    "ProGrad/cross_dataset.yaml": coop(50, **{"LOSS.LAMBDA": 1.0}),
    "MaPLe/few_shot_16.yaml": deep("MaPLe", 5, 0.0035, 9),
    "MaPLe/base2new.yaml": deep("MaPLe", 5, 0.0035, 9),
    "MaPLe/cross_dataset.yaml": deep("MaPLe", 2, 0.0026, 3),
    "IVLP/base2new.yaml": deep("IVLP", 20, 0.0025, 9),
    "IVLP/few_shot_16.yaml": deep("IVLP", 20, 0.0025, 9),
    "IVLP/cross_dataset.yaml": deep("IVLP", 5, 0.0035, 12, N_CTX_VISION=2, N_CTX_TEXT=2),
    "VPT/few_shot_16.yaml": deep("VPT", 5, 0.0025, 12),
    "VPT/cross_dataset.yaml": deep("VPT", 5, 0.0025, 12),
    "VPT/base2new.yaml": deep("VPT", 5, 0.0025, 12),
    "PromptSRC/base2new.yaml": src(20, 9, 15.0, 1.0),
    "PromptSRC/cross_dataset.yaml": src(20, 3, 6.0, 10.0),
    "PromptSRC/few_shot_16.yaml": src(50, 9, 30.0, 30.0),
    "PromptSRC/few_shot_16_fine_grained.yaml": src(50, 9, 45.0, 5.0),
    "PromptKD/base2new.yaml": promptkd(1000.0, 9),
    "PromptKD/base2new_fine_grained.yaml": promptkd(200.0, 9),
    "PromptKD/cross_dataset.yaml": promptkd(1000.0, 3),
    "PromptKD/few_shot_16.yaml": promptkd(1000.0, 9, **{"DATASET.NUM_SHOTS": 16}),
    "FDBPL/few_shot_16.yaml": FDBPL,
    "FDBPL/base2new.yaml": FDBPL,
    "FDBPL/cross_dataset.yaml": FDBPL,
    **{f"CoOp_KDPL/{use}.yaml": kdpl(coop(50, 4, WORDS)) for use in USES},
    **{f"KgCoOp_KDPL/{use}.yaml": kdpl(coop(100, 4, WORDS, batch=128), **{"TRAINER.COOP.W": 8.0}) for use in USES},
    **{f"MaPLe_KDPL/{use}.yaml": kdpl(deep("MaPLe", 5, 0.0035, 9)) for use in USES},
    **{f"VPT_KDPL/{use}.yaml": kdpl(deep("VPT", 5, 0.0025, 12)) for use in USES},
    "PromptSRC_KDPL/base2new.yaml": kdpl(src(20, 9, 15.0, 1.0)),
    "PromptSRC_KDPL/few_shot_16.yaml": kdpl(src(20, 9, 15.0, 1.0)),
    "PromptSRC_KDPL/cross_dataset.yaml": kdpl(src(20, 3, 6.0, 10.0)),
    "ZeroshotCLIP/few_shot_16.yaml": {},
    "ZeroshotCLIP2/few_shot_16.yaml": {},
    "ZeroshotCLIP/base2new.yaml": {},
    "ZeroshotCLIP2/base2new.yaml": {},
    "ZeroshotCLIP/cross_dataset.yaml": {},
    "ZeroshotCLIP2/cross_dataset.yaml": {},
}
# What all of them share: optimizer, schedule, crops, seeds, and CoOp's normalisation.
SHARED = {
    "OPTIM.NAME": "sgd",
    "OPTIM.MOMENTUM": 0.9,
    "OPTIM.WEIGHT_DECAY": 5e-4,
    "OPTIM.LR_SCHEDULER": "cosine",
    "OPTIM.WARMUP_EPOCH": 1,
    "OPTIM.WARMUP_TYPE": "constant",
    "OPTIM.WARMUP_CONS_LR": 1e-5,
    "INPUT.INTERPOLATION": "bicubic",
    "INPUT.TRANSFORMS": ["random_resized_crop", "random_flip", "normalize"],
    "INPUT.RRCROP_SCALE": [0.08, 1.0],
    "INPUT.PIXEL_MEAN": [0.48145466, 0.4578275, 0.40821073],
    "INPUT.PIXEL_STD": [0.26862954, 0.26130258, 0.27577711],
    "DATASET.NUM_SHOTS": 16,
    "DATALOADER.TEST.BATCH_SIZE": 100,
    "TEST.FINAL_MODEL": "last_step",
    "TRAINER.PLPP.ENABLED": False,
}


def test_every_recipe_is_in_the_table_and_every_method_has_one() -> None:
    embedded = [r for r in RECIPES if r.endswith("embedded.yaml")]
    assert set(RECIPES) == set(PUBLISHED) | set(embedded)
    assert {r.split("/")[0] for r in embedded} == {r.split("/")[0] for r in PUBLISHED} == set(TRAINERS)
    assert {p.name for p in FOLDER.iterdir() if p.is_dir()} == {*TRAINERS, "common"}


@pytest.mark.parametrize("recipe", PUBLISHED)
def test_a_recipes_figures_are_the_published_ones(recipe: str) -> None:
    cfg = of(recipe)
    want = {**SHARED, "INPUT.SIZE": [224, 224], **PUBLISHED[recipe]}
    assert {key: cfg[key] for key in want} == want
    assert cfg["TRAINER.NAME"] == recipe.split("/")[0] and cfg["MODEL.BACKBONE.NAME"] == "ViT-B/16"


@pytest.mark.parametrize("name", TRAINERS)
def test_the_embedded_recipe_is_that_of_the_embedded_model(name: str) -> None:
    cfg = of(f"{name}/embedded.yaml")
    own = {"PromptKD": {"DATASET.NUM_SHOTS": -1}, "FDBPL": {"INPUT.RRCROP_SCALE": [0.08, 0.936]}}.get(name, {})
    want = {**SHARED, **own, "INPUT.SIZE": [48, 48], "MODEL.BACKBONE.NAME": "embedded", "DATALOADER.NUM_WORKERS": 0}
    assert {key: cfg[key] for key in want} == want
    plain = name.removesuffix("_KDPL")
    node = {"CoOp": "COOP", "KgCoOp": "COOP", "ProGrad": "COOP"}.get(plain, plain.upper())
    assert cfg.get(f"TRAINER.{node}.PREC", "fp32") == "fp32"
    assert all(cfg[key] <= 4 for key in cfg if key.startswith(f"TRAINER.{node}.PROMPT_DEPTH"))  # four layers of text
    if plain == "PromptSRC":  # of five epochs, the average leans on the last but one
        assert (cfg["TRAINER.PROMPTSRC.GPA_MEAN"], cfg["OPTIM.MAX_EPOCH"]) == (4.0, 5)


@pytest.mark.parametrize("name", TRAINERS)
def test_without_a_config_file_the_method_has_its_own(name: str) -> None:
    embedded, openai = (config.flat(resolve(RunArguments(trainer=name, backbone=b))[0]) for b in ("", "RN50"))
    assert embedded == of(f"{name}/embedded.yaml")
    assert openai == {**of(f"{name}/few_shot_16.yaml"), "MODEL.BACKBONE.NAME": "RN50"}


def test_a_copied_configuration_is_the_same_and_shares_nothing() -> None:
    cfg, _ = resolve(RunArguments(trainer="MaPLe_PLPP", backbone="ViT-B/16"))
    before, copied = cfg.clone(), config.copied(cfg)
    assert copied == cfg and config.to_yaml(copied) == config.to_yaml(cfg)
    copied.INPUT.PIXEL_MEAN[0] = copied.OPTIM.LR = copied.TRAINER.PLPP.WEIGHT = 9.0
    assert cfg == before != copied


def test_a_recipe_takes_the_flag_and_options_over_its_own_figures() -> None:
    for recipe in RECIPES:
        assert of(recipe, "OPTIM.MAX_EPOCH", "7")["OPTIM.MAX_EPOCH"] == 7
        name = recipe.split("/")[0]
        if name in ("VPT", "VPT_KDPL", "PromptKD", "ZeroshotCLIP", "ZeroshotCLIP2"):
            continue
        plain, with_plpp = (
            config.flat(resolve(RunArguments(trainer=trainer, config_file=str(FOLDER / recipe)))[0])
            for trainer in (name, f"{name}_PLPP")
        )
        assert {key for key in plain if plain[key] != with_plpp[key]} == {"TRAINER.PLPP.ENABLED", "TRAINER.NAME"}, recipe


def test_a_recipe_says_all_in_which_it_differs_from_its_base() -> None:
    for recipe in [*RECIPES, "common/clip.yaml", "common/embedded.yaml"]:
        own = yaml.safe_load((FOLDER / recipe).read_text(encoding="utf-8"))
        base = own.pop("_BASE_", None)
        assert (base is None) == (recipe == "common/clip.yaml")
        if base is not None:
            before, after = config.get_cfg_default(), config.get_cfg_default()
            config.merge_file(before, (FOLDER / recipe).parent / base)
            config.merge_file(after, FOLDER / recipe)
            changed = {key for key, value in config.flat(after).items() if config.flat(before)[key] != value}
            assert dict(config._flat(own)).keys() >= changed, recipe


@pytest.mark.parametrize("protocol", protocol_names())
@pytest.mark.parametrize("name", registry.trainer_names())
def test_every_protocol_has_a_recipe_for_every_method(protocol: str, name: str, tmp_path: Path) -> None:
    """Each method by each protocol, on the papers' data sets and on the embedded one, from its own folder of recipes."""
    for root, datasets in (("DATA", ["imagenet", "dtd"]), ("", [])):
        jobs = plan(protocol, Choice(methods=[name], datasets=datasets, seeds=[1], root=root), tmp_path)
        teachers = {job.teacher for job in jobs}
        jobs = [job for job in jobs if job.folder not in teachers]
        assert {job.note["method"] for job in jobs} == {name}
        assert {Path(job.arguments.config_file).parent.name for job in jobs} == {name.removesuffix(SUFFIX)}
        assert {Path(job.arguments.config_file).stem == "embedded" for job in jobs} == {root == ""}


def test_all_methods_at_once_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--datasets", "imagenet", "--seeds", "1", "--dry-run", "--root", str(tmp_path / "no data")]
    for protocol in protocol_names():
        argv = ["run", protocol, "--methods", *registry.trainer_names(), *few, "--output", str(tmp_path / "out")]
        assert cli.main(argv) == 0
        said = capsys.readouterr().out.splitlines()
        assert len(said) > len(registry.trainer_names()) and all(": to run, in " in line for line in said[:-1])


def recipes_of(method: str, dataset: str) -> dict[int, str]:
    jobs = plan("few_shot", Choice(methods=[method], datasets=[dataset], seeds=[1], root="DATA"), "out")
    return {job.note["shots"]: Path(job.arguments.config_file).stem for job in jobs}


def test_prograds_weaker_lambda_is_of_its_data_sets_and_shots() -> None:
    usual = {shots: f"few_shot_{shots}" for shots in (1, 2, 4, 8, 16)}
    assert recipes_of("ProGrad", "food101") == usual
    for dataset in ("oxford_flowers", "dtd", "eurosat"):
        assert recipes_of("ProGrad_PLPP", dataset) == {**usual, 8: "few_shot_16_lambda", 16: "few_shot_16_lambda"}
    assert set(recipes_of("ProGrad", "imagenet").values()) == {"few_shot_imagenet"}


@pytest.mark.parametrize("name", ["MaPLe", "IVLP", "VPT", "FDBPL"])
def test_where_no_recipe_is_published_few_shot_is_as_base_to_new(name: str) -> None:
    assert of(f"{name}/few_shot_16.yaml") == of(f"{name}/base2new.yaml")


# ---- _BASE_ --------------------------------------------------------------------------------------------------------------


def write(path: Path, content: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content))
    return path


def merged(path: Path) -> dict[str, object]:
    cfg = config.get_cfg_default()
    config.merge_file(cfg, path)
    return config.flat(cfg)


def test_a_base_is_relative_to_its_file_nested_and_overridden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a" / "deepest.yaml", {"OPTIM": {"LR": 0.1, "MAX_EPOCH": 1, "MOMENTUM": 0.1}})
    write(tmp_path / "a" / "middle.yaml", {"_BASE_": "deepest.yaml", "OPTIM": {"MAX_EPOCH": 2, "MOMENTUM": 0.2}})
    top = write(tmp_path / "b" / "c" / "top.yaml", {"OPTIM": {"MOMENTUM": 0.3}, "_BASE_": "../../a/middle.yaml"})
    write(tmp_path / "deepest.yaml", {"OPTIM": {"LR": 9.0}})  # not this one, from whatever folder it is run
    for folder in (tmp_path, tmp_path / "b"):
        monkeypatch.chdir(folder)
        cfg = merged(top.relative_to(folder))
        assert (cfg["OPTIM.LR"], cfg["OPTIM.MAX_EPOCH"], cfg["OPTIM.MOMENTUM"]) == (0.1, 2, 0.3)
    absolute = write(tmp_path / "absolute.yaml", {"_BASE_": str(tmp_path / "a" / "middle.yaml")})
    assert merged(absolute)["OPTIM.MAX_EPOCH"] == 2


def test_two_files_may_share_a_base(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {"OPTIM": {"LR": 0.1, "MAX_EPOCH": 3}})
    for name in ("one", "two"):
        write(tmp_path / f"{name}.yaml", {"_BASE_": "base.yaml", "OPTIM": {"NAME": "sgd"}})
    cfg = config.get_cfg_default()
    config.merge_file(cfg, tmp_path / "one.yaml")
    config.merge_file(cfg, tmp_path / "two.yaml")  # once more is no cycle
    assert cfg.OPTIM.LR == 0.1


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_cycle_is_refused_in_one_line(tmp_path: Path, length: int) -> None:
    for i in range(length):  # each in a folder of its own, so that the names differ from where they are read
        write(tmp_path / str(i) / "r.yaml", {"_BASE_": f"../{(i + 1) % length}/r.yaml"})
    with pytest.raises(InputError, match=r"_BASE_: expected another file's name, got '\.\./") as raised:
        merged(tmp_path / "0" / "r.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("base", ["gone.yaml", "", ".", 3, ["common.yaml"], True])
def test_a_base_that_is_no_file_is_refused_in_one_line(tmp_path: Path, base: object, capsys: pytest.CaptureFixture) -> None:
    path = write(tmp_path / "r.yaml", {"_BASE_": base, "OPTIM": {"LR": 0.1}})
    with pytest.raises(InputError, match="config file") as raised:
        merged(path)
    assert "\n" not in str(raised.value) and str(tmp_path) in str(raised.value)
    assert cli.main(["train", "--trainer", "CoOp", "--config-file", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_fault_in_a_base_names_the_base(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", {"OPTIM": {"LEARNING_RATE": 0.1}})
    top = write(tmp_path / "top.yaml", {"_BASE_": "base.yaml"})
    with pytest.raises(InputError, match=r"base\.yaml.*unknown configuration key 'OPTIM\.LEARNING_RATE'"):
        merged(top)
