"""Whatever the files hold that name a data set's pictures, they are read as a whole data set or refused in one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from plpp_reg.data import DATASETS, DataSplit, load_dataset, matlab
from plpp_reg.data.readers import as_data, read_own_files, read_split, split_data
from plpp_reg.errors import InputError

from helpers.miniature import PICTURE, make

LISTS = {
    "OxfordPets": ("annotations/trainval.txt", "annotations/test.txt"),
    "StanfordCars": ("devkit/cars_meta.mat", "devkit/cars_train_annos.mat", "cars_test_annos_withlabels.mat"),
    "OxfordFlowers": ("imagelabels.mat", "cat_to_name.json"),
    "FGVCAircraft": ("variants.txt", "images_variant_train.txt", "images_variant_test.txt"),
    "SUN397": ("ClassName.txt", "Training_01.txt", "Testing_01.txt"),
    "UCF101": ("ucfTrainTestlist/classInd.txt", "ucfTrainTestlist/trainlist01.txt", "ucfTrainTestlist/testlist01.txt"),
    "ImageNet": ("classnames.txt",),
    "ImageNetR": ("classnames.txt",),
}
# What may stand in the place of a few bytes: of another kind, out of range, of the format's own signs.
PIECES = [b"", b"\n", b"\r\n", b" ", b"/", b",", b"\0", b"-1", b"0", b"9" * 30, b"\xff\xfe", b"[", b"{}", b"null", b"\xc3"]
PIECE = st.sampled_from(PIECES) | st.binary(max_size=12)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 24), PIECE), max_size=4)  # where, how many bytes go, what comes
WORDS = st.sampled_from(["a.jpg", "cat", "0", "_", ""]) | st.text(max_size=4)
PARTS = st.sampled_from(["train", "val", "test", "1"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(PARTS, inner, max_size=4),
    max_leaves=12,
)
ROWS = st.lists(st.tuples(st.sampled_from(["a.jpg", "b/c.jpg"]), st.sampled_from([0, 1, 2, "1", True]), st.text(max_size=3)))


def edited(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, piece in edits:
        at = round(where * len(content))
        content = content[:at] + piece + content[at + gone :]
    return content


def cut(content: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    """Cut short, or something else altogether: inside a .mat file, scipy trusts what it reads."""
    if len(edits) > 2:
        return b"".join(piece * gone for _, gone, piece in edits)
    return content[: round(edits[0][0] * len(content))] if edits else content


@contextlib.contextmanager
def in_this_process() -> Iterator[None]:
    """A .mat file is read without a process a time, which is what thirty examples would wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matlab, "read", lambda files: [matlab.plain(str(path), key) for path, key in files])
        yield


def assert_whole(data: DataSplit) -> None:
    """Every label is a class's, and every class's name is the one that its images have."""
    for part in (data.train, data.val, data.test):
        assert all(data.classnames[datum.label] == datum.classname for datum in part)
    assert {datum.label for part in (data.train, data.val, data.test) for datum in part} <= set(range(len(data.classnames)))


def assert_a_line(error: InputError) -> None:
    assert "expected" in str(error) and "\n" not in str(error)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("papers")
    for name in LISTS:
        make(root, name)
    return root


@pytest.mark.parametrize(("name", "file"), [(name, file) for name, files in LISTS.items() for file in files])
@settings(max_examples=30, suppress_health_check=list(HealthCheck))
@given(edits=EDITS)
def test_any_list_of_the_papers_data_is_read_or_refused(name: str, file: str, root: Path, edits: list) -> None:
    layout = DATASETS[name].layout
    path = root / layout.folder / file
    whole = path.read_bytes()
    path.write_bytes(edited(whole, edits) if path.suffix != ".mat" else cut(whole, edits))
    try:
        with in_this_process():
            assert_whole(as_data(root / layout.folder / layout.images, *read_own_files(root / layout.folder, layout)))
    except InputError as e:
        assert_a_line(e)
    finally:
        path.write_bytes(whole)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(content=VALUES | st.fixed_dictionaries({part: ROWS for part in ("train", "val", "test")}))
@example(content={"train": [("a.jpg", 0, "cat")], "val": [], "test": [("b/c.jpg", 0, "cat")]})
def test_any_split_file_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: object) -> None:
    path = tmp_path_factory.mktemp("split") / "split.json"
    path.write_text(json.dumps(content))
    try:
        read_split(path)
        assert_whole(split_data(path.parent, path))
    except InputError as e:
        assert_a_line(e)


CELLS = ["0.jpg", "1.jpg", "gone.jpg", "cat", "dog", "train", "Valid", "test", "3", "x", "", '"', "_", "\0", "日"]
LINES = st.lists(st.lists(st.sampled_from(CELLS), max_size=5).map(",".join), max_size=8)


@settings(max_examples=80, suppress_health_check=list(HealthCheck))
@given(columns=st.permutations(["path", "class", "label", "split"]), used=st.integers(0, 4), lines=LINES, edits=EDITS)
@example(["path", "class", "split", "label"], 3, ["0.jpg,cat,train", "1.jpg,dog,train", "0.jpg,cat,test"], [])
def test_any_table_is_read_or_refused(tmp_path_factory, columns: list[str], used: int, lines: list[str], edits: list) -> None:
    folder = tmp_path_factory.mktemp("table")
    for name in ("0.jpg", "1.jpg"):
        (folder / name).write_bytes(PICTURE)
    text = "\n".join([",".join(columns[:used]), *lines])
    (folder / "t.csv").write_bytes(edited(text.encode(), edits))
    try:
        assert_whole(load_dataset(f"csv:{folder / 't.csv'}"))
    except InputError as e:
        assert_a_line(e)


def test_a_mat_file_is_read_to_plain_values(root: Path) -> None:
    folder = root / DATASETS["StanfordCars"].layout.folder
    files = [(folder / "devkit" / "cars_meta.mat", "class_names"), (folder / "devkit" / "cars_train_annos.mat", "annotations")]
    assert matlab.read(files) == [matlab.plain(str(path), key) for path, key in files]
    (names,), (cars,) = matlab.read(files)
    assert all(isinstance(name, str) for (name,) in names) and len(names) > 1
    assert isinstance(cars[0]["fname"][0], str) and isinstance(cars[0]["class"][0][0], int)


def test_a_mat_file_that_ends_its_reader_is_refused(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A file on which scipy crashes is a matter of scipy's version; a reader that is ended stands for all of them."""
    program = tmp_path / "crash.py"
    program.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(matlab, "__file__", str(program))
    layout = DATASETS["OxfordFlowers"].layout
    with pytest.raises(InputError, match="imagelabels.mat: scipy ended with SIGSEGV while it read, so a file may be damaged"):
        read_own_files(root / layout.folder, layout)


def test_a_reader_that_cannot_start_is_no_file_s_fault(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "reader.py").write_text("raise ModuleNotFoundError('No module named scipy')")
    monkeypatch.setattr(matlab, "__file__", str(tmp_path / "reader.py"))
    layout = DATASETS["OxfordFlowers"].layout
    with pytest.raises(InputError, match="ended with status 1: ModuleNotFoundError: No module named scipy") as caught:
        read_own_files(root / layout.folder, layout)
    assert "as it is published" not in str(caught.value)


def test_of_a_damaged_mat_file_scipy_s_word_is_said(root: Path, tmp_path: Path) -> None:
    (tmp_path / "x.mat").write_bytes(b"MATLAB 5.0" + bytes(300))
    with pytest.raises(ValueError, match="^x.mat: ValueError: Unknown mat file type") as caught:
        matlab.read([(tmp_path / "x.mat", "labels")])
    assert "\n" not in str(caught.value)
