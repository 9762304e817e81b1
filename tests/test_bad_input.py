"""Bad input to the command line is one line that names the nearest choice, status 2, and no folder."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from plpp_reg.commands import cli
from plpp_reg.engine import config
from plpp_reg.errors import InputError

from helpers.cli import line, refused

pytestmark = pytest.mark.usefixtures("in_tmp_path")


# Flags, as they follow a good command line, and what the message has to name.
BAD_FLAGS = [
    (["--trainer", "Coop"], "'CoOp'"),
    (["--trainer", "CoOp_PLP"], "'CoOp_PLPP'"),
    (["--trainer", "zeroshotclip"], "'ZeroshotCLIP'"),
    (["--trainer", "ZeroshotCLIP_PLPP"], "use ZeroshotCLIP"),
    (["--trainer", "nosuchmodule:Trainer"], "package.module:Class"),
    (["--trainer", "json:Nope"], "package.module:Class"),
    (["--trainer", "os:path"], "os:path"),  # not a class
    (["--trainer", "json:JSONDecoder"], "json:JSONDecoder"),  # not a trainer
    (["--trainer", ":CoOp"], ":CoOp"),
    (["--trainer", ".coop:CoOp"], ".coop:CoOp"),
    (["--seed", "one"], "'one'"),
    (["--seed", "1.5"], "'1.5'"),
    (["--seed"], "--seed"),
    (["--seed", str(2**70)], "SEED"),
    (["--sed", "3"], "'--seed'"),
    (["--output_dir", "x"], "'--output-dir'"),
    (["--eval"], "'--eval-only'"),
    (["-x"], "-x"),
    (["--backbone", "ViT-B16"], "'ViT-B/16'"),
    (["--backbone", "embeded"], "'embedded'"),
    (["--backbone", "."], "backbone"),
    (["--config-file", "absent.yaml"], "absent.yaml"),
    (["--config-file", "."], "config file '.'"),
    (["--dataset-config-file", "absent.yaml"], "absent.yaml"),
    (["--load-epoch", "last"], "'last'"),
    (["--resume", "absent"], "absent"),
    (["--transforms", "random_flp"], "'random_flip'"),
    (["--output-dir", "/proc/nowhere/run"], "/proc/nowhere/run"),
    (["--eval-only", "--model-dir", "absent"], "absent"),
    (["--eval-only", "--model-dir", "."], "prompt_learner"),
    (["--eval-only", "--load-epoch", "2"], "--model-dir"),  # of which run?
    (["--model-dir", "absent"], "--eval-only"),  # else it would train and nobody would see it
    (["OPTIM.LR"], "'OPTIM.LR'"),
    (["OPTIM.LR", "0.1", "OPTIM.GAMMA"], "'OPTIM.GAMMA'"),
    (["OPTIM.LR", "0.1", "--seed", "3"], "before the KEY VALUE pairs"),
    (["OPTIM.LR", "0.1", "--sed", "3"], "'--seed'"),
    (["OPTIM.LR=0.1"], "OPTIM.LR=0.1"),
]


@pytest.mark.parametrize(("more", "names"), BAD_FLAGS, ids=lambda v: " ".join(v) if isinstance(v, list) else None)
def test_bad_flags(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], names: str) -> None:
    refused(line(world, "out", *more), capsys, tmp_path, names)


BAD_VALUES = [
    ("OPTIM.LRR", "1", "'OPTIM.LR'"),
    ("TRAINER.PLPP.TOPK", "3", "'TRAINER.PLPP.TOP_K'"),
    ("LR", "1", "OPTIM.LR"),
    ("OPTIM", "1", "OPTIM"),
    ("optim.lr", "1", "'OPTIM.LR'"),
    ("OPTIM.LR.X", "1", "'OPTIM.LR'"),
    ("OPTIM.LR", "fast", "a number"),
    ("OPTIM.LR", "", "a number"),
    ("OPTIM.LR", "-1", "> 0"),
    ("OPTIM.LR", "0", "> 0"),
    ("OPTIM.LR", "1e999", "OPTIM.LR"),
    ("OPTIM.LR", "{[]: 1}", "a number"),
    ("OPTIM.MAX_EPOCH", "0", ">= 1"),
    ("OPTIM.MAX_EPOCH", "2.0", "an integer"),
    ("OPTIM.MAX_EPOCH", "True", "an integer"),
    ("OPTIM.NAME", "sdg", "'sgd'"),
    ("OPTIM.LR_SCHEDULER", "cos", "'cosine'"),
    ("OPTIM.WARMUP_TYPE", "const", "'constant'"),
    ("OPTIM.MOMENTUM", "-1", "MOMENTUM"),
    ("OPTIM.WEIGHT_DECAY", "-1", "WEIGHT_DECAY"),
    ("OPTIM.WARMUP_CONS_LR", "-1", "WARMUP_CONS_LR"),
    ("DATALOADER.TRAIN_X.BATCH_SIZE", "0", "BATCH_SIZE"),
    ("DATALOADER.TEST.BATCH_SIZE", "0", "BATCH_SIZE"),
    ("DATALOADER.NUM_WORKERS", "-1", "NUM_WORKERS"),
    ("DATALOADER.NUM_WORKERS", "100000000", "NUM_WORKERS"),
    ("DATASET.NAME", "tinny", "'tiny'"),
    ("DATASET.SUBSAMPLE_CLASSES", "bases", "'base'"),
    ("DATASET.NUM_SHOTS", "many", "an integer"),
    ("INPUT.SIZE", "32", "a list"),
    ("INPUT.SIZE", "(48, 48)", "(32, 32)"),
    ("INPUT.SIZE", "(32,)", "(32, 32)"),
    ("INPUT.INTERPOLATION", "cubic", "'bicubic'"),
    ("INPUT.TRANSFORMS", "random_flip", "a list"),
    ("INPUT.TRANSFORMS", "['random_flp']", "'random_flip'"),
    ("INPUT.TRANSFORMS", "[1]", "INPUT.TRANSFORMS"),
    ("INPUT.TRANSFORMS", "['random_flip']", "'normalize'"),
    ("DATALOADER.TRAIN_X.SAMPLER", "RandomClassSampler", "RandomSampler"),
    ("INPUT.PIXEL_MEAN", "['a', 'b', 'c']", "PIXEL_MEAN"),
    ("INPUT.PIXEL_MEAN", "[0.5, 0.5]", "PIXEL_MEAN"),
    ("INPUT.PIXEL_STD", "[0, 0, 0]", "PIXEL_STD"),
    ("INPUT.RRCROP_SCALE", "(0.5,)", "RRCROP_SCALE"),
    ("INPUT.RRCROP_SCALE", "(2, 1)", "RRCROP_SCALE"),
    ("TRAINER.COOP.N_CTX", "0", ">= 1"),
    ("TRAINER.COOP.N_CTX", "80", "at most 77 tokens"),
    ("TRAINER.COOP.N_CTX", "10000000000", "77"),  # before it takes all memory
    ("TRAINER.COOP.CTX_INIT", "a " * 90, "at most 77 tokens"),
    ("TRAINER.COOP.CSC", "yes", "True or False"),
    ("TRAINER.COOP.CSC", "1", "True or False"),
    ("TRAINER.COOP.CLASS_TOKEN_POSITION", "ned", "'end'"),
    ("TRAINER.COOP.PREC", "fp8", "fp32"),
    ("TRAINER.PLPP.ENABLED", "1", "True or False"),
    ("TRAINER.PLPP.TOP_K", "0", "top_k"),
    ("TRAINER.PLPP.TOP_K", "50000", "49408"),
    ("TRAINER.PLPP.TEMPERATURE", "0", "temperature"),
    ("TRAINER.PLPP.WEIGHT", "-0.1", "weight"),
    ("TRAINER.PLPP.LABEL", "sof", "'soft'"),
    ("TRAINER.PLPP.NORMALIZE_OVER", "top", "'topk'"),
    ("TEST.SPLIT", "tets", "'test'"),
    ("TEST.FINAL_MODEL", "best", "'best_val'"),
    ("TRAIN.PRINT_FREQ", "0", ">= 1"),
    ("MODEL.INIT_WEIGHTS", "absent.pth", "absent.pth"),
    ("MODEL.BACKBONE.NAME", "ViT-B16", "'ViT-B/16'"),
    ("SEED", "x", "an integer"),
    ("USE_CUDA", "1", "True or False"),
]


@pytest.mark.parametrize(("key", "value", "names"), BAD_VALUES, ids=lambda v: v[:40])
def test_bad_keys_and_values(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, key: str, value: str, names: str
) -> None:
    argv = line(world, "out", key, value, trainer="CoOp_PLPP")
    if key == "MODEL.BACKBONE.NAME":
        argv[argv.index("--backbone") + 1] = ""
    refused(argv, capsys, tmp_path, names)


# Values that are only read together with another.
@pytest.mark.parametrize(
    ("opts", "names"),
    [
        (["OPTIM.SGD_NESTEROV", "True", "OPTIM.MOMENTUM", "0"], "NESTEROV"),
        (["OPTIM.NAME", "adam", "OPTIM.ADAM_BETA1", "2"], "ADAM_BETA1"),
        (["OPTIM.LR_SCHEDULER", "single_step", "OPTIM.STEPSIZE", "()"], "STEPSIZE"),
        (["OPTIM.LR_SCHEDULER", "multi_step", "OPTIM.STEPSIZE", "('a',)"], "STEPSIZE"),
        (["INPUT.TRANSFORMS", "['colorjitter', 'normalize']", "INPUT.COLORJITTER_H", "9"], "COLORJITTER"),
        (["TRAINER.PLPP.LABEL", "hard", "TRAINER.PLPP.NORMALIZE_OVER", "topk"], "normalize_over"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_values_that_do_not_go_together(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, opts: list[str], names: str
) -> None:
    refused(line(world, "out", *opts, trainer="CoOp_PLPP"), capsys, tmp_path, names)


BAD_FILES = [
    ("OPTIM:\n  LRR: 1\n", "'OPTIM.LR'"),
    ("OPTIM:\n  LR: fast\n", "a number"),
    ("OPTIM:\n  LR:\n", "got None"),
    ("OPTIM: 3\n", "OPTIM"),
    ("OPTIM: {}\n", "OPTIM"),
    ("- 1\n- 2\n", "keys and values"),
    ("just words\n", "keys and values"),
    ("a: [1\n", "expected YAML"),
    ("a:\tb\n  c: d\n", "expected YAML"),
    ("1: 2\n", "'1'"),
    ("? [1, 2]\n: 3\n", "expected YAML"),
    ("!!python/object/apply:os.mkdir ['owned']\n", "expected YAML"),
    ("a: &a\n  b: *a\n", "bad.yaml"),  # refers to itself
    (b"\xff\xfe\x00\x80", "bad.yaml"),
    (b"\x00\x01\x02", "bad.yaml"),
]


@pytest.mark.parametrize(("content", "names"), BAD_FILES, ids=lambda v: repr(v)[:40])
@pytest.mark.parametrize("flag", ["--config-file", "--dataset-config-file"])
def test_bad_configuration_files(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, flag: str, content: str | bytes, names: str
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    error = refused(line(world, "out", flag, str(path)), capsys, tmp_path, names)
    assert str(path) in error


@pytest.mark.parametrize("content", [b"", b"words", b"PK\x03\x04", b"\x80\x04."], ids=repr)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_backbone_file_that_is_none(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"bad{suffix}"
    path.write_bytes(content)
    refused(line(world, "out", "--backbone", str(path)), capsys, tmp_path, str(path))


def test_an_output_folder_that_is_a_file(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "taken").write_text("mine")
    for out in ("taken", "taken/below"):
        refused(line(world, out), capsys, tmp_path, out)
    assert (tmp_path / "taken").read_text() == "mine"


def test_load_epoch_that_is_not_there_names_the_nearest(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = line(world, "out", "--eval-only", "--model-dir", str(world / "done"), "--load-epoch", "50")
    refused(argv, capsys, tmp_path, "nearest there is 2")


def test_prompts_of_another_shape_or_for_a_method_without_prompts(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    done = ["--eval-only", "--model-dir", str(world / "done")]
    refused(line(world, "out", *done, "TRAINER.COOP.N_CTX", "5"), capsys, tmp_path, "(5, 64)")
    refused(line(world, "out", *done, trainer="ZeroshotCLIP"), capsys, tmp_path, "ZeroshotCLIP")


@pytest.mark.parametrize(("argv", "names"), [(["trian"], "train"), (["--version", "--sed"], ""), (["--sed", "3"], "plpp")])
def test_bad_commands(tmp_path: Path, capsys: pytest.CaptureFixture, argv: list[str], names: str) -> None:
    if argv[0] == "--version":
        with pytest.raises(SystemExit) as stop:
            cli.main(argv)
        assert stop.value.code == 0 and metadata.version("plpp-reg") in capsys.readouterr().out
    else:
        refused(argv, capsys, tmp_path, names)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(config.flat(config.get_cfg_default()))),
    st.text(max_size=12)
    | st.sampled_from(
        ["{[]: 1}", "None", "1e999", "-0", "()", "[[]]", "'", "1j", "b'x'", "{1}", "...", "1_0", "0x1", "\x00", "9" * 5000]
    ),
)
def test_any_text_for_any_key_is_taken_or_refused(key: str, text: str) -> None:
    cfg = config.get_cfg_default()
    before = config.flat(cfg)[key]
    try:
        config.set_value(cfg, key, text)
    except InputError as e:
        assert key in str(e) and config.flat(cfg)[key] == before
    else:
        assert type(config.flat(cfg)[key]) is type(before)
        yaml.safe_load(config.to_yaml(cfg))
