"""Data of one's own: one set of rules for folders, tables, split files, predict and data check."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps

from plpp_reg.clip.prompts import encode
from plpp_reg.commands import cli
from plpp_reg.data import DATASETS, Datum, load_dataset, template
from plpp_reg.data.augmentation import build_transform
from plpp_reg.data.loaders import ImageDataset, opener_of
from plpp_reg.data.names import alike, as_read, plain_name
from plpp_reg.data.parts import LEAST_TO_SPLIT, PART_NAMES, split_classes
from plpp_reg.data.remarks import as_here
from plpp_reg.engine.features import FrozenFeatures
from plpp_reg.engine.log import RunLog
from plpp_reg.errors import InputError
from plpp_reg.io.pictures import ENDINGS, TURNS, open_as_upstream, open_picture
from plpp_reg.prompts.predict import find_images
from plpp_reg.trainers.kgcoop import KgCoOp
from plpp_reg.trainers.prograd import ProGrad
from plpp_reg.trainers.zeroshot import ZeroshotCLIP, ZeroshotCLIP2

from helpers import engine as helpers


def noise(path: Path, seed: int, size: tuple[int, int] = (20, 16)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


def folder_of(root: Path, counts: dict[str, int], first: int = 0) -> str:
    """Different pictures, ``{"cat": 4, "train/dog": 2}``."""
    for k, (name, count) in enumerate(counts.items()):
        for i in range(count):
            noise(root / name / f"{i:02d}.png", first + 1000 * k + i)
    return f"folder:{root}"


def sizes(name: str) -> tuple[int, int, int]:
    data = load_dataset(name)
    return len(data.train), len(data.val), len(data.test)


def checked(name: str, capsys: pytest.CaptureFixture) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["data", "check", ".", "--datasets", name])
    return status, capsys.readouterr().out


# ---- pictures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_is_upright_as_pillow_turns_it_and_as_it_lies_upstream(tmp_path: Path, form: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.effect_noise((30, 20), 80).convert("RGB").save(path := tmp_path / "x", format=form, exif=exif)
    with Image.open(path) as file:
        lying = file.convert("RGB")
    with Image.open(path) as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    assert open_picture(path).tobytes() == upright.tobytes()
    assert open_as_upstream(path).tobytes() == lying.tobytes()
    if form != "TIFF":  # which Pillow turns by itself
        assert (upright.tobytes() == lying.tobytes()) == (orientation == 1)
    assert set(TURNS) == set(range(2, 9))


@pytest.mark.parametrize(
    ("values", "ending"),
    [
        (lambda g: g.astype(np.uint16) * 257, ".png"),
        (lambda g: g.astype(np.uint16) * 257, ".tif"),
        (lambda g: g.astype(np.int32) * 257, ".tif"),
        (lambda g: g.astype(np.int32), ".tif"),
        (lambda g: g.astype(np.float32) / 255, ".tif"),
        (lambda g: g.astype(np.float32), ".tif"),
    ],
)
def test_grey_values_of_any_scale_are_those_of_eight_bits(tmp_path: Path, values: Callable, ending: str) -> None:
    grey = np.random.default_rng(0).integers(0, 256, (12, 9)).astype(np.uint8)
    grey[0, :2] = 0, 255
    Image.fromarray(values(grey)).save(path := tmp_path / f"x{ending}")
    read = np.asarray(open_picture(path))
    assert (read == grey[..., None]).all()
    Image.fromarray(np.ones((3, 3), np.float32) * -1).save(path := tmp_path / "y.tif")
    for wrong in (-1.0, 256.0, np.nan, np.inf):
        Image.fromarray(np.full((3, 3), wrong, np.float32)).save(path)
        with pytest.raises(InputError, match=r"y\.tif: expected a readable picture with values of 0 to 1, or 0 to 255, got"):
            open_picture(path)


def test_what_is_no_plain_file_is_refused_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for name, kind in (("pipe.png", "a pipe"), ("folder.png", "a folder")):
        for opener in (open_picture, open_as_upstream):
            with pytest.raises(InputError, match=f"{name}: expected a readable picture, got {kind}"):
                opener(tmp_path / name)
    table = tmp_path / "t.csv"
    for name in ("pipe.png", "folder.png"):
        table.write_text(f"path,class\n{name},cat\n")
        status, out = checked(f"csv:{table}", capsys)
        assert status == 1 and "line 2: expected a picture's path" in out


def companions(place: Path) -> None:
    """What lies beside pictures and is none: of a Mac, of the system, of a user."""
    for name in ("._00.png", ".hidden.png", "Thumbs.db", "notes.txt"):
        (place / name).write_bytes(b"\0\5\x16\7no picture")
    for name in ("__MACOSX", "@eaDir", ".thumbnails"):
        (place / name).mkdir(exist_ok=True)
        (place / name / "00.png").write_bytes(b"no picture")
    os.mkfifo(place / "pipe.png")
    (place / "gone.png").symlink_to("nowhere.png")


def test_the_same_files_count_as_pictures_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = folder_of(tmp_path / "d", {"cat.png": 5, "red_fox": 6})
    for place in (tmp_path / "d", tmp_path / "d" / "cat.png", tmp_path / "d" / "red_fox"):
        companions(place)
    for ending in ENDINGS:
        noise(tmp_path / "d" / "red_fox" / "x.png", 5).rename(tmp_path / "d" / "red_fox" / f"x{ending.upper()}")
    data = load_dataset(name)
    assert data.classnames == ["cat.png", "red fox"]
    used = {d.impath for part in (data.train, data.val, data.test) for d in part}
    assert used == set(map(str, find_images([tmp_path / "d"]))) and len(used) == 11 + len(ENDINGS)
    status, out = checked(name, capsys)
    assert status == 0 and f"all {len(used)} images decode" in out
    assert "not used: 12 files (.png 6, .db 3, .txt 3)" in out


def test_ones_own_pictures_are_upright_in_training_too_and_the_papers_are_not(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    pixels = np.zeros((32, 32, 3), np.uint8)
    pixels[:16] = 255
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path, exif=exif)
    item = Datum(str(path), 0, "cat", "x.png")

    def top(name: str) -> float:
        cfg = helpers.make_cfg("DATASET.NAME", name)
        images = ImageDataset([item], build_transform(cfg, False), 1, opener=opener_of(cfg))
        return images.pixels(0, 0)[:, :16].float().mean().item()

    assert top(f"folder:{tmp_path}") == top("csv:t.csv") == 0
    assert all(top(name) == 255 for name in ("emoji", "Caltech101", "ImageNet", "tiny"))


def test_features_are_kept_by_how_pictures_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_dataset(folder_of(tmp_path, {"cat": 5, "dog": 5}))
    trainer = helpers.make_trainer(data)

    def key(name: str) -> str:
        cfg = helpers.make_cfg("DATASET.NAME", name)
        features = FrozenFeatures(trainer.method.frozen, cfg, data, "fp32", trainer.device, trainer.ranks)
        return json.dumps(features._described("test", 0), sort_keys=True)

    papers, own = key("Caltech101"), key("folder:x")
    assert papers != own == key("csv:y") and papers == key("emoji")
    monkeypatch.setattr("plpp_reg.engine.features.READING", 10**6)
    assert key("folder:x") != own and key("Caltech101") == papers


# ---- names -------------------------------------------------------------------------------------------------------------

LETTERS = st.text(st.sampled_from("aébßçıñ’'&-. _日本0"), min_size=1, max_size=12)
VARIANTS: list[Callable[[str], str]] = [
    str.upper,
    lambda s: unicodedata.normalize("NFD", s),
    lambda s: s.replace("'", "\u2019"),
    lambda s: s.replace("&", "&amp;"),
    lambda s: s.replace(" ", "_"),
    lambda s: f" {s}  ",
]


@given(LETTERS, st.sampled_from(VARIANTS))
def test_names_are_one_exactly_where_their_prompts_are(name: str, variant: Callable[[str], str]) -> None:
    other = variant(name)
    same = encode(name.replace("_", " ")) == encode(other.replace("_", " "))
    assert (as_read(name) == as_read(other)) == same == (alike([name, other]) is not None)
    assert as_read(plain_name(name)) == as_read(name)


ONE = [("café", "cafe\u0301"), ("d'or", "d\u2019or"), ("A&amp;B", "a&b"), ("Hot_Dog", "hot  dog"), ("c++", "c ++")]


def by_folder(root: Path, first: str, second: str, parts: tuple[str, str]) -> str:
    for part, name, seed in ((parts[0], first, 0), (parts[1], second, 100)):
        for other, shift in ((name, 0), ("tea", 50)):
            for i in range(3):
                noise(root / part / other / f"{part}{seed}{i}.png", seed + shift + i)
    return f"folder:{root}"


def by_table(root: Path, first: str, second: str, parts: tuple[str, str]) -> str:
    rows = [(part, name) for part, one in zip(parts, (first, second), strict=True) for name in (one, "tea")]
    lines = [f"{noise(root / f'{i}.png', i).name},{name},{part}" for i, (part, name) in enumerate(rows)]
    (root / "t.csv").write_text("\n".join(["path,class,split", *lines]), encoding="utf-8")
    return f"csv:{root}/t.csv"


@pytest.mark.parametrize("make", [by_folder, by_table])
@pytest.mark.parametrize(("first", "second"), ONE)
def test_what_clip_reads_as_one_is_one_class_of_several_parts_and_refused_in_one(
    tmp_path: Path, make: Callable, first: str, second: str
) -> None:
    data = load_dataset(make(tmp_path / "two", first, second, ("train", "test")))
    assert len(data.classnames) == 2 and plain_name(first) in data.classnames
    assert {d.classname for d in data.test} == set(data.classnames)
    if make is by_table and plain_name(first) == plain_name(second):
        return  # one name, written in two forms of Unicode
    with pytest.raises(InputError, match="classes of different names.*CLIP reads as one") as caught:
        load_dataset(make(tmp_path / "one", first, second, ("train", "train")))
    assert repr(plain_name(first) if make is by_table else first) in str(caught.value)


def split_file(root: Path, rows: list[list[object]], test: list[list[object]] = ()) -> str:
    folder = root / "dtd"
    (folder / "images").mkdir(parents=True, exist_ok=True)
    parts = {"train": rows, "val": [], "test": list(test)}
    (folder / "split_zhou_DescribableTextures.json").write_text(json.dumps(parts))
    return "DescribableTextures"


@pytest.mark.parametrize(("first", "second"), ONE)
def test_a_split_file_has_one_name_a_label_as_clip_reads_it(tmp_path: Path, first: str, second: str) -> None:
    name = split_file(tmp_path, [["a.jpg", 0, first], ["b.jpg", 1, second]])
    with pytest.raises(InputError, match="classes of different names, got .*CLIP reads as one"):
        load_dataset(name, tmp_path)
    with pytest.raises(InputError, match="got '_', of which CLIP reads nothing"):
        load_dataset(split_file(tmp_path, [["a.jpg", 0, "_"]]), tmp_path)


@pytest.mark.parametrize("name", ["_", " ", "&nbsp;"])
def test_a_class_without_a_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="CLIP reads nothing"):
        load_dataset(folder_of(tmp_path, {name: 5, "cat": 5}))


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
