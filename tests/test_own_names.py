"""Class names of one's own are compared as CLIP reads them, in folders, tables and split files."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plpp_reg.clip.prompts import encode
from plpp_reg.data import load_dataset
from plpp_reg.data.names import alike, as_read, plain_name
from plpp_reg.errors import InputError

from helpers.own import folder_of, noise, split_file

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
