"""How good the prompts are: every figure of a record against a library's or by hand, zero-shot beside it, and the table."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from plpp_reg.commands.cli import main
from plpp_reg.data import DATASETS, DatasetEntry, loaders
from plpp_reg.data.contents import content_sha256
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.evaluation import Classification
from plpp_reg.engine.run import RunArguments, run
from plpp_reg.errors import InputError
from plpp_reg.results import confusion, evaluation
from plpp_reg.results.record import read_result

from helpers import engine as helpers
from helpers.cli import line, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(DATASETS, "tiny", DatasetEntry("helpers.engine:read_tiny"))
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))


def predictions(seed: int, classes: int, images: int = 311) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(max(1, classes - 1), (images,), generator=generator)  # the last class does not occur
    logits = 3 * torch.randn(images, classes, generator=generator)
    logits[torch.arange(images // 2), label[: images // 2]] += 4
    return logits, label


def collected(logits: torch.Tensor, label: torch.Tensor, order: torch.Tensor) -> Classification:
    found = Classification(logits.shape[1])
    for part in order.split(10):
        found.process(logits[part], label[part], part)
    return found


@pytest.mark.parametrize(("seed", "classes"), [(0, 2), (1, 5), (2, 40)])
def test_figures_are_the_libraries(seed: int, classes: int) -> None:
    from sklearn.metrics import confusion_matrix, precision_recall_fscore_support
    from torchmetrics.functional.classification import multiclass_calibration_error

    logits, label = predictions(seed, classes)
    found = collected(logits, label, torch.randperm(len(label)))
    guess, all_labels = logits.argmax(1), range(classes)
    theirs = precision_recall_fscore_support(label, guess, labels=all_labels, zero_division=0)
    for name, values in zip(("precision", "recall", "f1"), theirs, strict=False):
        assert found.per_class()[name] == pytest.approx(100 * values)
    assert found.per_class()["support"] == theirs[3].tolist()
    matrix = confusion_matrix(label, guess, labels=all_labels)
    assert found.confusion.tolist() == matrix.tolist()
    off = [(i, j, matrix[i, j]) for i, j in zip(*matrix.nonzero(), strict=True) if i != j]
    assert [tuple(each) for each in found.confusions()] == off
    expected = multiclass_calibration_error(logits.softmax(1), label, classes, 15)
    assert found.evaluate()["calibration_error"] == pytest.approx(100 * expected.item(), rel=1e-5)


def test_mistakes_are_the_surest_first_with_both_probabilities() -> None:
    logits, label = predictions(3, 6)
    found = collected(logits, label, torch.randperm(len(label)))
    shares = logits.softmax(1)
    wrong = [i for i in range(len(label)) if logits[i].argmax() != label[i]]
    wrong.sort(key=lambda i: -shares[i].max().item())
    for (index, truth, guess, sure, own), i in zip(found.mistakes(7), wrong[:7], strict=True):
        assert (index, truth, guess) == (i, label[i], logits[i].argmax())
        assert (sure, own) == pytest.approx((shares[i].max().item(), shares[i, label[i]].item()), rel=1e-5)


def test_ranks_share_the_images_and_the_figures_are_those_of_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, label = predictions(4, 5)
    order = torch.arange(len(label))
    parts = [collected(logits, label, order[rank::3]) for rank in range(3)]
    tables = [part.table for part in parts]
    whole = torch.zeros(5, len(label), dtype=torch.double)
    for table in tables:
        whole[:, table[0].long()] = table
    totals = iter((torch.tensor(len(label)), whole))
    monkeypatch.setattr(Ranks, "total", lambda self, counts: next(totals))
    parts[1].gather(Ranks(1, 3))
    assert torch.equal(parts[1].table, collected(logits, label, order).table)


@pytest.mark.parametrize(("hits", "images"), [(0, 3), (3, 3), (7, 10), (700, 1000)])
def test_the_interval_of_an_accuracy_is_wilsons(hits: int, images: int) -> None:
    theirs = stats.binomtest(hits, images).proportion_ci(0.95, method="wilson")
    assert evaluation.wilson(hits, images) == pytest.approx([100 * theirs.low, 100 * theirs.high], abs=1e-9)


def test_the_paired_interval_is_that_of_a_mean_with_half_an_image_more_of_each_kind() -> None:
    found = evaluation.paired_over_images(12, 5, 100)
    difference = np.repeat([1.0, -1.0, 0.0], [25, 11, 168])  # (12.5, 5.5, 84) images, each twice
    half = 100 * evaluation.Z * difference.std() / np.sqrt(102)
    assert found["mean"] == 7
    assert found["interval"] == pytest.approx([100 * difference.mean() - half, 100 * difference.mean() + half])


def test_few_images_do_not_tell_a_prompt_from_zero_shot() -> None:
    """No interval is a point, and none leaves the range that a difference has."""
    for images in (1, 2, 3, 10):
        low, high = evaluation.paired_over_images(0, 0, images)["interval"]
        assert low == -high < -10
        assert evaluation.paired_over_images(images, 0, images)["interval"][1] == 100
        assert evaluation.paired_over_images(0, images, images)["interval"][0] == -100
    assert evaluation.paired_over_images(2, 0, 2)["interval"][0] < 0 < evaluation.paired_over_images(8, 0, 8)["interval"][0]


# ---- a run's record ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["CoOp_PLPP", "VPT"])
@pytest.mark.parametrize("kept", [0.0, 1.0])
def test_zero_shot_beside_a_run_is_the_zero_shot_run(
    world: Path, tmp_path: Path, trainer: str, kept: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VPT's own batches have no features of the frozen tower; where features are kept, nothing is read a second time for it."""
    opened: list[str] = []
    original = loaders.open_as_upstream
    monkeypatch.setattr(loaders, "open_as_upstream", lambda path: opened.append(str(path)) or original(path))
    more = ["FEATURES.MAX_GIB", str(kept)]
    assert main(line(world, tmp_path / "zero", *more, trainer="ZeroshotCLIP")) == 0
    zero = read_result(tmp_path / "zero")
    assert zero["evaluation"]["zero_shot"] is None and evaluation.read(zero).difference is None
    opened.clear()
    assert main(line(world, tmp_path / "own", *more, trainer=trainer)) == 0
    ours = read_result(tmp_path / "own")
    told = ours["evaluation"]["zero_shot"]
    assert told["metrics"] == pytest.approx(zero["metrics"]) and told["interval"] == zero["evaluation"]["interval"]
    assert ours["evaluation"]["difference"]["mean"] == pytest.approx(ours["metrics"]["accuracy"] - zero["metrics"]["accuracy"])
    tested = [path for path in opened if "/test/" in path]
    reads = {("CoOp_PLPP", 0.0): 1, ("CoOp_PLPP", 1.0): 0, ("VPT", 0.0): 2, ("VPT", 1.0): 1}
    assert len(tested) == 15 * reads[trainer, kept]


def test_a_record_names_its_mistakes_and_its_classes(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(line(world, tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    result = read_result(tmp_path / "out")
    found = evaluation.read(result)
    assert found.classes == helpers.CLASSNAMES and found.images == 15 and sum(found.per_class["support"]) == 15
    wrong = round(15 * result["metrics"]["error"] / 100)
    assert len(found.mistakes) == wrong == sum(count for *_, count in found.confusion)
    for mistake, told in zip(found.mistakes, result["evaluation"]["mistakes"], strict=True):
        assert mistake.predicted != mistake.truth and mistake.probability >= mistake.probability_of_truth
        assert content_sha256(told["path"]) == mistake.sha256 and told["path"].endswith(mistake.image)
    last = printed.splitlines()[-4:]
    assert last[0].startswith("test, 15 pictures") and last[0].endswith("calibration error")
    assert last[1].startswith('zero-shot, "a photo of a {}."') and last[2].startswith("CoOp  ")
    accuracy = result["metrics"]["accuracy"]
    assert f"{accuracy:.1f} ({found.interval[0]:.1f} to {found.interval[1]:.1f})" in last[2] and "zero-shot" in last[3]
    assert result["phases"].keys() == {"set-up", "hashes of pictures", "image features", "training", "testing"}


@pytest.mark.parametrize(
    "change",
    [
        {"classes": 3},
        {"per_class": {}},
        {"confusion": [[0, 99, 1]]},
        {"mistakes": [{"image": 1}]},
        {"images": "many"},
        {"interval": [1.0]},
        {"zero_shot": {"templates": [], "metrics": {}, "interval": [0, 1]}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_is_no_evaluation_is_refused_in_words(world: Path, change: dict) -> None:
    result = json.loads((world / "done" / "result.json").read_text())
    assert evaluation.read(result) is not None and evaluation.read({**result, "evaluation": None}) is None
    result["evaluation"] |= change
    with pytest.raises(InputError, match="expected how good its prompts are"):
        evaluation.read(result)


def test_validation_accuracy_of_each_epoch_is_in_the_history(world: Path, tmp_path: Path) -> None:
    args = RunArguments(**{**vars_of(world, tmp_path), "opts": ("TEST.FINAL_MODEL", "best_val")})
    result, trainer = run(args, helpers.RunLog(quiet=True))
    each = [epoch["val_accuracy"] for epoch in result["history"]]
    assert len(each) == 2 and max(each) == trainer.state.best_val


def vars_of(world: Path, out: Path) -> dict:
    places = {"root": world / "data", "config_file": world / "recipe.yaml", "backbone": world / "tiny.pt"}
    return {"trainer": "CoOp", "output_dir": str(out / "out"), **{name: str(path) for name, path in places.items()}}


def test_more_epochs_than_a_run_was_begun_with_are_told_the_way(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for flags in (
        ["--resume", str(world / "done"), "--output-dir", str(tmp_path / "new")],
        ["--output-dir", str(world / "done")],
    ):
        assert main(line(world, None, *flags, "OPTIM.MAX_EPOCH", "3")) == 2
        said = capsys.readouterr().err
        weights = world / "done" / "prompt_learner" / "model.pth.tar-2"
        assert f"MODEL.INIT_WEIGHTS {weights}" in said and said.count("\n") == 1
    assert main(line(world, tmp_path / "new", "OPTIM.MAX_EPOCH", "3", "MODEL.INIT_WEIGHTS", str(weights))) == 0
    assert main(line(world, world / "done", "OPTIM.MAX_EPOCH", "1")) == 2
    assert "INIT_WEIGHTS" not in capsys.readouterr().err


def test_a_confusion_matrix_of_many_classes_takes_a_look_at_each_count_once() -> None:
    """Its picture took the cube of their number: minutes for ImageNet's thousand."""

    class Row(list):
        looked = 0

        def __iter__(self):
            Row.looked += 1
            return super().__iter__()

    classes = confusion.COUNTED + 1
    rows = [Row(int(i == j) for j in range(classes)) for i in range(classes)]
    Row.looked = 0
    assert confusion.picture(rows, [f"c{i}" for i in range(classes)], "many").startswith(b"\x89PNG")
    assert Row.looked <= 2 * classes
