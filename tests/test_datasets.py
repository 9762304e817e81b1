"""The papers' data sets in miniature against what upstream's readers made of the same folders; data of one's own."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from plpp_reg.commands.cli import main
from plpp_reg.data import DATASETS, full_name, load_dataset, paper_name, short_name, template
from plpp_reg.data.loaders import load_data
from plpp_reg.data.readers import SPLIT_SEED
from plpp_reg.engine import config
from plpp_reg.engine.arguments import shipped_config
from plpp_reg.errors import InputError

from helpers.miniature import MAKERS, PICTURE, digest_all, make

# Written by tools/compare_upstream.py from upstream's own code, with folders listed in sorted order.
FACTS = json.loads((Path(__file__).parent / "upstream_facts.json").read_text())
WITH_SPLIT = [name for name in MAKERS if DATASETS[name].layout.split]


@pytest.fixture(scope="module")
def minis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    for name in MAKERS:
        make(root, name)
    return root


@pytest.fixture
def sorted_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path=".": sorted(listdir(path)))


def lists(name: str, root: Path, shots: int = -1, seed: int = 1, half: str = "all") -> dict[str, list]:
    data = load_dataset(name, root, shots, seed, half)
    parts = {p: [(d.name, d.label, d.classname) for d in getattr(data, p)] for p in ("train", "val", "test")}
    return {**parts, "classnames": data.classnames}


def test_the_facts_are_of_every_data_set() -> None:
    assert FACTS.keys() == MAKERS.keys() == {name for name, entry in DATASETS.items() if entry.layout}


@pytest.mark.filterwarnings("ignore:split_zhou")
@pytest.mark.parametrize("name", list(MAKERS))
def test_lists_picks_and_halves_are_upstreams(name: str, minis: Path, sorted_listing: None) -> None:
    settings = [key.split() for key in FACTS[name] if key != "split file"]
    assert len(settings) == (1 if name.startswith("ImageNet") and name != "ImageNet" else 78)
    for shots, seed, half in settings:
        found = digest_all(lists(name, minis, int(shots), int(seed), half))
        assert found == FACTS[name][f"{shots} {seed} {half}"], (shots, seed, half)


@pytest.mark.parametrize("name", WITH_SPLIT)
def test_a_split_that_is_made_is_upstreams_to_the_byte_and_kept(name: str, tmp_path: Path, sorted_listing: None) -> None:
    import hashlib

    split = make(tmp_path, name) / DATASETS[name].layout.split
    assert SPLIT_SEED == 1
    with pytest.warns(UserWarning, match="is not the papers' split"):
        made = lists(name, tmp_path)
    assert hashlib.sha256(split.read_bytes()).hexdigest()[:16] == FACTS[name]["split file"]
    # Kept: the second reading is the file's, whatever the folders say by then.
    shutil.rmtree(split.parent / (DATASETS[name].layout.images or "devkit"))
    (split.parent / DATASETS[name].layout.images).mkdir(exist_ok=True)
    assert lists(name, tmp_path) == made


def test_a_split_file_is_read_as_it_is(minis: Path, tmp_path: Path) -> None:
    (tmp_path / "dtd" / "images").mkdir(parents=True)
    rows = {
        "train": [["b/2.jpg", 1, "bee"], ["a/1.jpg", "0", "ay"]],
        "val": [["a/3.jpg", 0, "ay"]],
        "test": [["b/4.jpg", 1, "bee"]],
    }
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text(json.dumps(rows))
    data = load_dataset("DescribableTextures", tmp_path)
    assert [(d.name, d.label, d.classname) for d in data.train] == [("b/2.jpg", 1, "bee"), ("a/1.jpg", 0, "ay")]
    assert data.classnames == ["ay", "bee"]
    assert data.test[0].impath == str(tmp_path / "dtd" / "images" / "b/4.jpg")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON, got"),
        ("[" * 100_000, "expected JSON, got RecursionError"),
        ("[]", "expected lists train, val and test"),
        ('{"train": [["a", 0, "x"]], "val": null, "test": []}', "expected lists train, val and test"),
        ('{"train": [["a", 1e999, "x"]], "val": [], "test": []}', "expected lists train, val and test"),
        ('{"train": [["a", 1.5, "x"]], "val": [], "test": []}', "expected lists train, val and test"),
        ('{"train": [["a", true, "x"]], "val": [], "test": []}', "expected lists train, val and test"),
        ('{"train": [["a", "-1", "x"]], "val": [], "test": []}', "expected lists train, val and test"),
        ('{"train": [[3, 0, "x"]], "val": [], "test": []}', "expected lists train, val and test"),
        ('{"train": [["a", 0, null]], "val": [], "test": []}', "expected lists train, val and test"),
        ('{"train": [["a", 0, "x"], ["b", 0, "y"]], "val": [], "test": []}', "expected one name of label 0, got 'x' and 'y'"),
        ('{"train": [["a", 0, "x"]], "val": [], "test": [["b", 1, "x"]]}', "expected one label of 'x', got 0 and 1"),
        ('{"train": []}', "expected lists train, val and test"),
        ('{"train": [["a", 0]], "val": [], "test": []}', "expected lists train, val and test"),
        ('{"train": [["a", 1, "x"]], "val": [], "test": []}', "none of label 0"),
        ('{"train": [["a", 0, "x"]], "val": [], "test": [["b", 1, "y"]]}', "class 'y', got none, but some for test"),
    ],
)
def test_a_bad_split_file_is_refused(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "dtd" / "images").mkdir(parents=True)
    (tmp_path / "dtd" / "split_zhou_DescribableTextures.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load_dataset("DescribableTextures", tmp_path)


def test_a_missing_data_set_says_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"eurosat/2750.*get them: plpp data get, or http://madm.dfki.de"):
        load_dataset("EuroSAT", tmp_path)
    make(tmp_path, "SUN397")
    (tmp_path / "sun397" / "Testing_01.txt").unlink()
    with pytest.raises(InputError, match=r"Testing_01.txt.*split_zhou_SUN397.json: https://drive"):
        load_dataset("SUN397", tmp_path)
    (tmp_path / "sun397" / "Testing_01.txt").write_text("/z/zoo/1.jpg\n")
    with pytest.raises(InputError, match=r"as it is published.*z/zoo"):
        load_dataset("SUN397", tmp_path)


def test_imagenet_has_no_validation_images_and_its_variants_nothing_to_train_on(minis: Path) -> None:
    assert not load_dataset("ImageNet", minis).val
    data = load_dataset("ImageNetA", minis, shots=16, subsample="new")
    assert not data.train and data.classnames == ["toilet tissue"] and data.test


def test_the_embedded_data_sets_halves_and_domains() -> None:
    whole, even, odd = (load_dataset(name) for name in ("emoji", "emoji_even", "emoji_odd"))
    assert even.classnames == whole.classnames[::2] and odd.classnames == whole.classnames[1::2]
    assert len(even.test) + len(odd.test) == len(whole.test)
    assert {d.classname for d in odd.train} == set(odd.classnames) and max(d.label for d in odd.test) == len(odd.classnames) - 1
    pictures = set()
    for domain in ("grey", "outline", "blurred", "rotated"):
        data = load_dataset(f"emoji_{domain}")
        assert [d.name for d in data.test] == [d.name for d in whole.test] and data.classnames == whole.classnames
        assert not data.train and not data.val
        with Image.open(data.test[0].impath) as changed, Image.open(whole.test[0].impath) as clean:
            assert changed.size == clean.size and changed.mode == "RGB"
            pictures |= {changed.tobytes(), clean.tobytes()}
    assert len(pictures) == 5


def test_names_of_a_data_set() -> None:
    for name in ("dtd", "DTD", "DescribableTextures", "describabletextures"):
        assert full_name(name) == "DescribableTextures"
    assert (short_name("OxfordFlowers"), paper_name("OxfordFlowers")) == ("oxford_flowers", "Flowers102")
    assert full_name("flowers102") == "OxfordFlowers" and full_name("folder:x/pets") == "folder:x/pets"
    assert short_name("folder:x/DTD") == "own_DTD"  # or published figures would stand beside it
    assert short_name("folder:x/my.pets/") == "my.pets" and short_name("csv:x/table.csv") == "table"
    with pytest.raises(InputError, match="unknown data set 'caltech': did you mean 'caltech101'"):
        full_name("caltech")
    assert template("DescribableTextures") == "{} texture." and template("folder:x") == "a photo of a {}."


def test_every_data_set_has_a_configuration_file() -> None:
    for name, entry in DATASETS.items():
        if entry.short:
            cfg = config.get_cfg_default()
            config.merge_file(cfg, shipped_config("datasets", f"{entry.short}.yaml"))
            assert cfg.DATASET.NAME == name


def test_sizes_are_those_that_the_literature_counts() -> None:
    path = Path(__file__).parent.parent / "plpp_reg" / "results" / "published" / "promptkd_teacher.csv"
    with path.open() as file:
        rows = {row["dataset"]: row for row in csv.DictReader(file)}
    sizes = {entry.paper: entry.sizes for entry in DATASETS.values() if entry.layout}
    assert len(rows) == 11
    for paper, row in rows.items():
        _, train, _, test = sizes[paper]
        assert train == int(row["n_unlabelled_train"]), paper
        assert test == int(row["n_test_base"]) + int(row["n_test_new"]), paper


def test_the_kept_list_is_what_its_hash_says(minis: Path) -> None:
    import hashlib

    data = load_dataset("FGVCAircraft", minis, 2, 1)
    kept = json.loads(data.sampled_json())
    assert kept["train"] == [[d.name, d.label, d.classname] for d in data.train]
    assert kept["val"] == [[d.name, d.label, d.classname] for d in data.val] and len(kept["val"]) == 2 * 5
    assert not any(os.path.isabs(name) for name, _, _ in kept["train"])
    assert data.sampled_sha256() == hashlib.sha256(data.sampled_json().encode()).hexdigest()
    assert data.sampled_sha256() != load_dataset("FGVCAircraft", minis, 2, 2).sampled_sha256()


def test_the_data_sets_own_seed_picks_the_images(minis: Path) -> None:
    cfg = config.get_cfg_default()
    cfg.SEED, cfg.DATASET.NAME, cfg.DATASET.ROOT, cfg.DATASET.NUM_SHOTS = 1, "FGVCAircraft", str(minis), 2
    assert load_data(cfg) == load_dataset("FGVCAircraft", minis, 2, 1)
    cfg.DATASET.SEED = 2
    assert load_data(cfg) == load_dataset("FGVCAircraft", minis, 2, 2) != load_dataset("FGVCAircraft", minis, 2, 1)


# ---- data of one's own -------------------------------------------------------------------------------------------------


def picture(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PICTURE)
    return path


def folder_of(tmp_path: Path, counts: dict[str, int]) -> str:
    for name, count in counts.items():
        for i in range(count):
            picture(tmp_path / name / f"{i:02d}.jpg")
    return f"folder:{tmp_path}"


def test_a_folder_of_class_folders_is_split(tmp_path: Path) -> None:
    name = folder_of(tmp_path, {"hot_dog": 10, "apple pie": 20})
    (tmp_path / "hot_dog" / "notes.txt").write_text("no picture")
    picture(tmp_path / "hot_dog" / ".hidden.jpg")
    data = load_dataset(name)
    assert data.classnames == ["apple pie", "hot dog"]
    assert [len(p) for p in (data.train, data.val, data.test)] == [15, 6, 9]
    assert len({d.name for p in (data.train, data.val, data.test) for d in p}) == 30
    assert load_dataset(name).sha256() == data.sha256()
    assert {p.name for p in tmp_path.iterdir()} == {"hot_dog", "apple pie"}  # nothing written beside one's own
    few = load_dataset(name, shots=5, seed=1)
    assert len(few.train) == 10 and len(few.val) == 6


def test_a_folder_with_train_and_test_is_read_as_it_is(tmp_path: Path) -> None:
    name = folder_of(tmp_path, {"train/b_c": 2, "train/a": 3, "test/b_c": 1, "test/a": 1})
    data = load_dataset(name)
    assert data.classnames == ["a", "b c"] and not data.val
    assert [(d.name, d.label) for d in data.train][-1] == ("train/b_c/01.jpg", 1)
    assert Path(data.test[0].impath).is_file()
    folder_of(tmp_path, {"test/zebra": 1})
    with pytest.raises(InputError, match="in test too, got another: 'zebra'"):
        load_dataset(name)


def test_own_folders_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected a folder with one folder a class"):
        load_dataset(f"folder:{tmp_path / 'none'}")
    with pytest.raises(InputError, match="expected one folder a class in"):
        load_dataset(f"folder:{tmp_path}")
    name = folder_of(tmp_path / "x", {"hot_dog": 9, "Hot dog": 9})
    with pytest.raises(InputError, match="classes of different names, got 'Hot dog' and 'hot_dog'"):
        load_dataset(name)
    name = folder_of(tmp_path / "z", {"cat": 3, "dog": 2})
    with pytest.raises(InputError, match="expected 4 pictures of a class or more.*got at most 3 .*'cat'"):
        load_dataset(name)
    (tmp_path / "z" / "empty").mkdir()
    with pytest.raises(InputError, match="pictures in .*empty.*got none"):
        load_dataset(name)


def test_too_few_images_for_the_shots_name_the_class(tmp_path: Path) -> None:
    name = folder_of(tmp_path, {"cat": 40, "hot_dog": 10})
    with pytest.raises(InputError, match="at least 16 training images of class 'hot dog' .* got 5"):
        load_dataset(name, shots=16)
    assert load_dataset(name, shots=5).train


def test_a_run_on_ones_own_data_says_what_is_wrong_with_it(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    argv = ["train", "--output-dir", str(tmp_path / "out"), "DATASET.NUM_SHOTS", "2", "OPTIM.MAX_EPOCH", "1", "DATASET.NAME"]
    long = "_".join(["ox"] * 80)
    assert main([*argv, folder_of(tmp_path / "long", {long: 10, "cat": 10})]) == 2
    assert f"{long.replace('_', ' ')!r}: expected at most 77 tokens" in capsys.readouterr().err
    name = folder_of(tmp_path / "broken", {"dog": 10, "cat": 10})
    for path in (tmp_path / "broken" / "dog").iterdir():
        path.write_bytes(PICTURE[:150])
    assert main([*argv, name]) == 2
    err = capsys.readouterr().err
    assert "image " in err and f"dog{os.sep}" in err.replace("/", os.sep) and "expected a readable picture" in err


def table(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n")
    return f"csv:{path}"


def test_a_csv_file_with_a_split(tmp_path: Path) -> None:
    for i in range(4):
        picture(tmp_path / "i" / f"{i}.jpg")
    outside = picture(tmp_path / "elsewhere" / "5.jpg")
    lines = ["i/0.jpg,zebra,train", "i/1.jpg,black_cat,TRAIN", "i/2.jpg,zebra,val", f"{outside},black_cat,test"]
    data = load_dataset(table(tmp_path / "t.csv", "path,class,split", *lines))
    assert data.classnames == ["black cat", "zebra"]
    assert [(d.name, d.label) for d in data.train] == [("i/0.jpg", 1), ("i/1.jpg", 0)]
    assert data.test[0].impath == str(outside) and Path(data.train[0].impath).is_file()


def test_a_csv_files_numbers_order_the_classes(tmp_path: Path) -> None:
    picture(tmp_path / "0.jpg")
    rows = ["0.jpg,7,ant,train", "0.jpg,3,bee,train", "0.jpg,7,ant,test"]
    data = load_dataset(table(tmp_path / "t.csv", "path,label,classname,split", *rows))
    assert data.classnames == ["bee", "ant"]
    alone = load_dataset(table(tmp_path / "u.csv", "path,label,split", "0.jpg,x,train", "0.jpg,b,train", "0.jpg,x,test"))
    assert alone.classnames == ["b", "x"]


def test_a_csv_file_without_split_is_split(tmp_path: Path) -> None:
    rows = [f"{picture(tmp_path / f'{c}{i}.jpg').name},{c}" for i in range(10) for c in ("b", "a")]
    data = load_dataset(table(tmp_path / "t.csv", "Path,Class", *rows))
    assert [len(p) for p in (data.train, data.val, data.test)] == [10, 4, 6] and data.classnames == ["a", "b"]
    assert load_dataset(table(tmp_path / "v.csv", "path,class", *reversed(rows))).sha256() == data.sha256()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["path,class"], "a line an image below the header"),
        (["file,class", "0.jpg,a"], "the columns path and class .* got 'file', 'class'"),
        (["path,class", "1.jpg,a"], "line 2: expected a picture's path, got '1.jpg'"),
        (["path,class", "0.jpg,"], "line 2: expected a class name"),
        (["path,class,split", "0.jpg,a,train", "0.jpg,a,tset"], "line 3: expected split train, val or test, got 'tset'"),
        (
            ["path,class,split", "0.jpg,a,train", "0.jpg,A,train"],
            "line 3: expected classes of different names",
        ),
        (["path,label,class", "0.jpg,x,a"], "line 2: expected an integer label"),
        (["path,label,class", "0.jpg,1,a", "0.jpg,2,a"], "line 3: expected label 1 of 'a'"),
        (["path,label,class", "0.jpg,1,a", "0.jpg,1,b"], "two classes with one"),
        (["path,class,split", "0.jpg,a,train", "0.jpg,b,test"], "training images of class 'b'"),
        (["path,class", "0.jpg,a"], "expected 4 pictures of a class or more"),
        (["path,class", "0.jpg,__"], "line 2: expected a class name"),
        (["path,class,split", "0.jpg,d\u2019or,train", "0.jpg,d'or,train"], "which CLIP reads as one"),
    ],
)
def test_own_tables_that_cannot_be_used(lines: list[str], message: str, tmp_path: Path) -> None:
    picture(tmp_path / "0.jpg")
    with pytest.raises(InputError, match=message):
        load_dataset(table(tmp_path / "t.csv", *lines))


# ---- data check --------------------------------------------------------------------------------------------------------


def test_check_says_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    make(tmp_path, "EuroSAT")
    make(tmp_path, "FGVCAircraft")
    (tmp_path / "fgvc_aircraft" / "images" / "1007.jpg").unlink()
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", "check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written
    assert "13,500 / 5,400 / 8,100 images: figures are not comparable" in out and "no split_zhou_EuroSAT.json" in out
    assert "1 of " in out and "are not there, first" in out and "1007.jpg" in out
    assert "no folder" in out and "https://image-net.org" in out
    assert "1 different, 13 missing, 1 wrong" in out
    assert main(["data", "check", str(tmp_path), "--datasets", "eurosat"]) == 0
    assert main(["data", "check", str(tmp_path), "--datasets", "dtd"]) == 1


def test_check_opens_pictures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    name = folder_of(tmp_path, {"train/a": 2, "train/b": 2, "test/a": 1, "test/b": 1})
    assert main(["data", "check", str(tmp_path), "--datasets", name]) == 0
    assert "all 6 images decode" in capsys.readouterr().out
    (tmp_path / "train" / "a" / "01.jpg").write_bytes(PICTURE[:150])
    assert main(["data", "check", str(tmp_path), "--datasets", name]) == 1
    assert f"image {tmp_path}/train/a/01.jpg: expected a readable picture" in capsys.readouterr().out.replace(os.sep, "/")
    assert main(["data", "check", str(tmp_path / "none")]) == 2


def test_check_finds_the_papers_data_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    import dataclasses

    make(tmp_path, "FGVCAircraft")
    data = load_dataset("FGVCAircraft", tmp_path)
    sizes = (len(data.classnames), len(data.train), len(data.val), len(data.test))
    monkeypatch.setitem(DATASETS, "FGVCAircraft", dataclasses.replace(DATASETS["FGVCAircraft"], sizes=sizes))
    assert main(["data", "check", str(tmp_path), "--datasets", "fgvc_aircraft"]) == 0
    assert "fgvc_aircraft    ready" in capsys.readouterr().out
