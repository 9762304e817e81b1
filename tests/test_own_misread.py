"""Data of one's own that could be misread: names that say nothing, one class alone, tables of spreadsheets, names of files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from plpp_reg.commands import cli
from plpp_reg.data import load_dataset
from plpp_reg.errors import InputError

from helpers.own import checked, folder_of, noise, split_file


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0", "1"], "class names are numbers ('0'), which CLIP reads too"),
        (["n01440764", "n02084071"], "class names are numbers ('n01440764')"),
        (["001.Cardinal", "002.Kiwi"], "class names begin with a number ('001.Cardinal')"),
        (["n02085620-Chihuahua", "n02085782-Spaniel"], "class names begin with a number"),
        (["3d_printer", "7up"], ""),
        (["0", "cat"], ""),
    ],
)
def test_names_that_are_numbers_are_said(tmp_path: Path, names: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    folder = folder_of(tmp_path / "d", dict.fromkeys(names, 4))
    lines = [f"d/{name}/{i:02d}.png,{name}" for name in names for i in range(4)]
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *lines]))
    for name in (folder, f"csv:{tmp_path}/t.csv"):
        status, out = checked(name, capsys)
        assert status == 0 and (said in out if said else "number" not in out)
        assert any(said in remark for remark in load_dataset(name).remarks) == bool(said)


@pytest.mark.parametrize("subsample", ["all", "base", "new"])
def test_one_class_alone_is_refused(tmp_path: Path, subsample: str, capsys: pytest.CaptureFixture) -> None:
    """Every picture would be called right."""
    name = folder_of(tmp_path, {"cat": 5} if subsample == "all" else {"cat": 5, "dog": 5})
    half = "" if subsample == "all" else f" in its {subsample} half"
    with pytest.raises(InputError, match=f"expected two classes or more to tell apart{half}, got '(cat|dog)' alone"):
        load_dataset(name, subsample=subsample)
    status, out = checked(name, capsys)
    assert (status == 1 and "got 'cat' alone" in out) == (subsample == "all")


def test_names_of_files_that_are_not_utf8_are_refused_with_the_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Out of an archive of another system: they could not be written into a run's files."""
    for k, wrong in enumerate((b"cat/Caf\xe9.png", b"Caf\xe9/00.png")):
        name = folder_of(tmp_path / str(k), {"cat": 4, "dog": 4})
        path = os.path.join(os.fsencode(tmp_path / str(k)), wrong)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(os.fsdecode(path)).write_bytes((tmp_path / str(k) / "cat" / "00.png").read_bytes())
        status, out = checked(name, capsys)
        assert status == 1 and "expected names of files in UTF-8, got 'Caf\\udce9" in out
        with pytest.raises(InputError, match="expected names of files in UTF-8"):
            load_dataset(name)
    with pytest.raises(InputError, match=r"expected lists train, val and test of \[path, label, class name\]"):
        load_dataset(split_file(tmp_path, [["\ud800.jpg", 0, "cat"]]), tmp_path)


def test_a_folder_or_table_without_its_kind_is_told_how_it_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    folder_of(Path("pets"), {"cat": 4, "dog": 4})
    Path("t.csv").write_text("path,class\npets/cat/00.png,cat\n")
    for name, meant in (("pets", "folder:pets"), ("t.csv", "csv:t.csv"), ("petz", "folder:PATH")):
        for argv in (["data", "check", ".", "--datasets", name], ["train", "--output-dir", "o", "DATASET.NAME", name]):
            assert cli.main(argv) == 2
            assert ("did you mean" in (said := capsys.readouterr().err)) and (meant in said) == (name != "petz")
    assert cli.main(["data", "check", "folder:pets"]) == 2
    assert "plpp data check . --datasets folder:pets" in capsys.readouterr().err


# ---- tables ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "path,class\n0.png,dog, small\n",
            "line 2: expected 2 cells, as the first line has, got 3; a name with ',' in",
        ),
        ("path;class;split\n0.png;cat;train;x\n", "expected 3 cells, as the first line has, got 4; a name with ';'"),
        ("path,Class,class \n0.png,a,b\n", "expected each column once, got 'class' 2 times"),
        (
            "0.png,cat\n1.png,dog\n",
            "first line that names the columns path and class .or label., got '0.png', 'cat'",
        ),
        ("", "expected a first line that names the columns .*, got none"),
        ("path,class\n,\n \t,\n", "expected a line an image below the header, got none"),
        ("path,class\n0.png\n", "line 2: expected a class name, got 'none'"),
    ],
)
def test_a_table_that_could_be_misread_is_refused(tmp_path: Path, text: str, said: str) -> None:
    for i in range(2):
        noise(tmp_path / f"{i}.png", i)
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(InputError, match=said):
        load_dataset(f"csv:{tmp_path}/t.csv")


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_as_a_spreadsheet_writes_it(tmp_path: Path, delimiter: str) -> None:
    """With a mark in front, CRLF, quoted cells, lines and cells that are empty."""
    rows = [["Path", "Class", "Split", ""]]
    rows += [[f"{i}.png", ("dog, small", "a; b\tc")[i % 2], ("train", "Test")[i // 4], ""] for i in range(8)]
    for i in range(8):
        noise(tmp_path / f"{i}.png", i)
    lines = [delimiter.join(f'"{cell}"' for cell in row) for row in rows]
    (tmp_path / "t.csv").write_bytes("\r\n".join([*lines, "", 3 * delimiter, ""]).encode("utf-8-sig"))
    data = load_dataset(f"csv:{tmp_path}/t.csv")
    assert data.classnames == ["a; b\tc", "dog, small"] and (len(data.train), len(data.test)) == (4, 4)
    (tmp_path / "t.csv").write_bytes("path,class\n0.png,B\xe4r\n".encode("cp1252"))
    with pytest.raises(InputError, match="expected a CSV file in UTF-8 .a spreadsheet's 'CSV UTF-8'., got"):
        load_dataset(f"csv:{tmp_path}/t.csv")


def test_a_split_file_with_a_mark_in_front_is_read(tmp_path: Path) -> None:
    name = split_file(tmp_path, [["a.jpg", 0, "cat"], ["b.jpg", 1, "dog"]])
    path = tmp_path / "dtd" / "split_zhou_DescribableTextures.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert load_dataset(name, tmp_path).classnames == ["cat", "dog"]
