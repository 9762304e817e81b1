"""Data of one's own: parts, what is not used, few pictures, templates."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from plpp_reg.commands import cli
from plpp_reg.data import DATASETS, load_dataset, template
from plpp_reg.data.parts import LEAST_TO_SPLIT, PART_NAMES, split_classes
from plpp_reg.data.remarks import as_here
from plpp_reg.engine.log import RunLog
from plpp_reg.errors import InputError
from plpp_reg.trainers.kgcoop import KgCoOp
from plpp_reg.trainers.prograd import ProGrad
from plpp_reg.trainers.zeroshot import ZeroshotCLIP, ZeroshotCLIP2

from helpers import engine as helpers
from helpers.own import checked, folder_of, noise, sizes, split_file

# ---- folders -----------------------------------------------------------------------------------------------------------

SPELLINGS = st.fixed_dictionaries(
    {
        part: st.sampled_from([n for name in names for n in (name, name.title(), name.upper())])
        for part, names in PART_NAMES.items()
    }
)


@given(spelled=SPELLINGS, there=st.sets(st.sampled_from(list(PART_NAMES)), min_size=1))
def test_parts_are_found_by_any_of_their_names(tmp_path_factory, spelled: dict[str, str], there: set[str]) -> None:
    root = tmp_path_factory.mktemp("parts")
    for seed, part in enumerate(sorted(there)):
        folder_of(root / spelled[part], {"cat": 2, "dog": 1}, first=10_000 * seed)
    assert sizes(f"folder:{root}") == tuple(3 * (part in there) for part in PART_NAMES)
    assert load_dataset(f"folder:{root}").classnames == ["cat", "dog"]


def test_a_class_may_be_called_train_and_two_folders_of_one_part_are_refused(tmp_path: Path) -> None:
    data = load_dataset(folder_of(tmp_path / "vehicles", {"train": 5, "bus": 5}))
    assert data.classnames == ["bus", "train"]
    with pytest.raises(InputError, match="one folder for val, got two: 'val' and 'valid'"):
        load_dataset(folder_of(tmp_path / "two", {"train/cat": 1, "val/cat": 1, "valid/cat": 1}))
    with pytest.raises(InputError, match="one folder a class in .*got pictures alone"):
        load_dataset(folder_of(tmp_path / "flat", {"train": 3, "test": 3}))
    with pytest.raises(InputError, match="in test too, got another: 'zebra'"):
        load_dataset(folder_of(tmp_path / "more", {"train/cat": 1, "test/zebra": 1}))


def test_what_is_there_and_not_used_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = folder_of(tmp_path, {"train/cat": 2, "train/dog": 2, "test/cat": 2, "extra/cat": 2, "train/cat/more": 1})
    noise(tmp_path / "test" / "unlabelled.png", 77)
    (tmp_path / "train" / "dog" / "x.HEIC").write_bytes(b"x")
    out = checked(name, capsys)[1]
    for said in (
        "not used: 2 folders ('extra', 'train/cat/more')",
        "not used: 1 picture ('test/unlabelled.png') in no class's folder",
        "not used: 1 file (.heic 1)",
        "no pictures for test: 1 class ('dog')",
    ):
        assert said in out
    assert cli.main(["train", "--output-dir", str(tmp_path / "o"), "DATASET.NAME", name, "OPTIM.MAX_EPOCH", "1"]) == 2
    assert "not used: 2 folders" not in capsys.readouterr().err  # NUM_SHOTS 16 of 2 is the line


@pytest.mark.parametrize("kind", ["csv", "split"])
def test_pictures_in_two_places_and_backslashes_are_said(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture) -> None:
    folder_of(tmp_path / "dtd" / "images", {"p": 8})
    images = tmp_path / "dtd" / "images"
    rows = [
        ("p\\00.png", "cat", "train"),
        ("p\\01.png", "dog", "train"),
        ("p/02.png", "cat", "test"),
        ("p/03.png", "dog", "test"),
    ]
    rows += [("p/00.png", "dog", "train"), ("p/01.png", "dog", "test"), ("./p/03.png", "dog", "test")]
    if kind == "csv":
        lines = "\n".join(f"{path};{name};{part}" for path, name, part in rows)
        (images / "t.csv").write_text(f"path;class;split\n{lines}\n")
        name, root = f"csv:{images}/t.csv", tmp_path
    else:
        listed = {part: [[p, int(c == "dog"), c] for p, c, s in rows if s == part] for part in ("train", "test")}
        name, root = split_file(tmp_path, listed["train"], listed["test"]), tmp_path
    data = load_dataset(name, root)
    assert all(os.path.isfile(d.impath) and "\\" not in d.name for d in (*data.train, *data.test))
    capsys.readouterr()
    cli.main(["data", "check", str(root), "--datasets", name])
    for text in (capsys.readouterr().out, "\n".join(data.remarks)):
        assert "backslashes read as slashes: 2 paths" in text and "p/00.png: cat, dog" in text
        assert "both for train and for test: 1 picture ('p/01.png')" in text and "twice in one class: 1 picture" in text
    (tmp_path / "a\\b.png").write_bytes(b"x")  # a name that a file has stays as it is
    assert as_here("a\\b.png", tmp_path) == "a\\b.png" and as_here("a\\c.png", tmp_path) == "a/c.png"


def test_copies_are_found_by_their_content(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = folder_of(tmp_path, {"train/cat": 2, "train/dog": 2, "test/cat": 2, "test/dog": 2})
    (tmp_path / "test" / "dog" / "copy.png").write_bytes((tmp_path / "train" / "cat" / "00.png").read_bytes())
    out = checked(name, capsys)[1]
    assert "in two classes: 1 picture ('train/cat/00.png = test/dog/copy.png: cat, dog')" in out
    assert "both for train and for test: 1 picture" in out and "nearly of one colour" not in out
    Image.new("L", (8, 8), 200).save(tmp_path / "test" / "dog" / "blank.png")
    assert "nearly of one colour: 1 picture ('test/dog/blank.png')" in checked(name, capsys)[1]


# ---- few pictures ------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6))
def test_every_class_is_split_or_trained_on(counts: list[int]) -> None:
    classes = {f"c{i}": [f"{i}/{k}" for k in range(n)] for i, n in enumerate(counts)}
    if max(counts) < LEAST_TO_SPLIT:
        with pytest.raises(InputError, match=f"got at most {max(counts)} "):
            split_classes(classes, "x")
        return
    made = split_classes(classes, "x")
    assert sorted(row.name for part in made.parts for row in part) == sorted(n for names in classes.values() for n in names)
    for label, n in enumerate(counts):
        of_each = [sum(row.label == label for row in part) for part in made.parts]
        assert (min(of_each) >= 1) if n >= LEAST_TO_SPLIT else of_each == [n, 0, 0]
    few = [n for n in counts if n < LEAST_TO_SPLIT]
    assert [f"{len(few)} class" in line for line in made.remarks] == [True] * bool(few)


def test_shots_that_are_not_there_are_told_with_the_way_out_and_data_check_tells_it_before(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    name = folder_of(tmp_path / "d", {"cat": 20, "dog": 10, "owl": 8})
    with pytest.raises(InputError) as caught:
        load_dataset(name, shots=16)
    for said in (
        "of class 'owl' for 16 shots",
        "got 4, and fewer than 16 of 2 more",
        "8 of that class were found, 4 to train, 2",
    ):
        assert said in str(caught.value)
    assert "32 a class give 16 shots" in str(caught.value) and "DATASET.NUM_SHOTS 4 is the most" in str(caught.value)
    assert str(caught.value).endswith("-1 takes all")
    assert load_dataset(name, shots=4).train and load_dataset(name, shots=16, trains=False).test
    assert "class for training, 'owl', has 4: DATASET.NUM_SHOTS 4 at most, or -1" in checked(name, capsys)[1]


def test_testing_needs_neither_shots_nor_training_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    fast = ["OPTIM.MAX_EPOCH", "1", "DATALOADER.NUM_WORKERS", "0", "DATASET.NUM_SHOTS"]
    trained = folder_of(tmp_path / "d", {"cat": 8, "dog": 8})
    run, keys = str(tmp_path / "run"), ["DATASET.NAME", trained, *fast, "2"]
    assert cli.main(["train", "--trainer", "CoOp", "--output-dir", run, *keys]) == 0
    alone = folder_of(tmp_path / "mine", {"test/owl": 3, "test/bee": 4})
    for trainer, more in (("CoOp", ["--model-dir", run]), ("ZeroshotCLIP", [])):
        argv = ["train", "--trainer", trainer, "--eval-only", *more, "--output-dir", str(tmp_path / f"ev{trainer}")]
        assert cli.main([*argv, "DATASET.NAME", alone, *fast, "16"]) == 0
    capsys.readouterr()
    argv = ["train", "--trainer", "CoOp", "--output-dir", str(tmp_path / "no"), "DATASET.NAME", alone, *fast, "1"]
    assert cli.main(argv) == 2
    assert "expected images in its train part, it has none, but 0 / 0 / 7" in capsys.readouterr().err
    assert "for testing alone" in checked(alone, capsys)[1]


@pytest.mark.parametrize(
    ("words", "status", "said"), [(8, 0, ""), (65, 0, "room for 9 context vectors"), (80, 1, "at most 77")]
)
def test_data_check_sees_prompts_that_are_too_long(tmp_path: Path, words: int, status: int, said: str, capsys) -> None:
    name = folder_of(tmp_path, {"_".join(["ox"] * words): 5, "cat": 5})
    assert checked(name, capsys)[0] == status
    assert said in checked(name, capsys)[1] and ("class name" in checked(name, capsys)[1]) == bool(said)


# ---- the hand-written template -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [ZeroshotCLIP, ZeroshotCLIP2, KgCoOp, ProGrad])
def test_ones_own_template_is_taken_by_every_method_that_has_one(tmp_path: Path, cls: type) -> None:
    data = load_dataset(folder_of(tmp_path, {"cat": 5, "dog": 5}))

    def features(*opts: str):
        method = helpers.make_trainer(data, "DATASET.NAME", f"folder:{tmp_path}", *opts, cls=cls).method
        return method.hand_crafted if hasattr(method, "hand_crafted") else method.encode_classes().features

    usual, own = features(), features("DATASET.TEMPLATE", "an x-ray of a {}, from above.")
    assert not usual.allclose(own, atol=1e-4)
    assert usual.allclose(features("DATASET.TEMPLATE", template("folder:x")))
    assert template("emoji", "a {} of mine") == "a {} of mine" and template("emoji") == DATASETS["emoji"].template


@pytest.mark.parametrize("text", ["a photo", "a {} and a {}"])
def test_a_template_without_one_place_for_the_name_is_refused(tmp_path: Path, text: str, capsys) -> None:
    keys = ["DATASET.TEMPLATE", text]
    assert cli.main(["train", "--trainer", "ZeroshotCLIP", "--output-dir", str(tmp_path / "o"), *keys]) == 2
    assert "DATASET.TEMPLATE: expected a text with one {} in it" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_log_in_a_terminal_shows_how_far_features_and_epochs_are(tmp_path: Path) -> None:
    data, shown = load_dataset(folder_of(tmp_path, {"cat": 8, "dog": 8})), []

    class Watched(RunLog):
        def progress(self, items, what: str, initial: int = 0, total: int | None = None):
            shown.append((what, total))
            return super().progress(items, what, initial, total)

    trainer = helpers.make_trainer(data, "OPTIM.MAX_EPOCH", 1)
    trainer.log = Watched(quiet=True)
    trainer.train()
    assert {what for what, _ in shown} == {"epochs", "epoch 1", "features of train"}
    assert all(total and total >= 1 for _, total in shown)
