"""Class names as CLIP reads them: what its tokenizer gives the same tokens is one name."""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Sequence

from plpp_reg.errors import InputError

NUMBER = re.compile(r"(n\d{8}|\d+)(?!\w)")  # what folders are numbered with: ImageNet's n01440764, 001. and the like


def plain_name(text: str) -> str:
    """A class's name as it was written, ``_`` read as a space; letters in Unicode's composed form, which Macs do not write.

    >>> plain_name(" red_panda ")
    'red panda'
    """
    return unicodedata.normalize("NFC", text.replace("_", " ").strip())


@functools.cache
def as_read(name: str) -> tuple[int, ...]:
    """The tokens that CLIP's text tower gets of a name. Neither case nor ``_`` for a space, Unicode's form, the kind of an
    apostrophe or HTML's entities make a difference there.

    >>> as_read("Crème_brûlée") == as_read("cre\u0300me bru\u0302le\u0301e") == as_read("CR&Egrave;ME BRÛLÉE")
    True
    """
    from plpp_reg.clip.prompts import encode  # late: it needs torch

    return tuple(encode(name.replace("_", " ")))


def alike(names: Iterable[str]) -> tuple[str, str] | None:
    """Two of these names that CLIP reads as one; None where it tells all of them apart."""
    seen: dict[tuple[int, ...], str] = {}
    for name in names:
        if (key := as_read(name)) in seen:
            return seen[key], name
        seen[key] = name
    return None


def check_names(names: Sequence[str], where: str) -> None:
    """Whether CLIP can tell these classes apart.

    Raises:
        InputError: a name of which it reads nothing, or two that it reads as one; the message has both.
    """
    for name in names:
        if not as_read(name):
            raise InputError(f"{where}: expected names, got {name!r}, of which CLIP reads nothing")
    if pair := alike(names):
        raise InputError(f"{where}: expected different names, got {both(*pair)}")


def both(first: str, second: str) -> str:
    """Two names that are read as one, as a message shows them."""
    same = unicodedata.normalize("NFC", first) == unicodedata.normalize("NFC", second) and first != second
    forms = " (the same letters in two forms of Unicode)" if same else ""
    return f"{first!r} and {second!r}{forms}, which CLIP reads as one"


def numbered(names: Sequence[str]) -> list[str]:
    """What is said of classes whose names all begin with a number, or are one: it is a part of their prompts.

    >>> numbered(["001.cardinal", "002.kiwi"])
    ["class names begin with a number ('001.cardinal'), which CLIP reads too: a table (csv:) gives classes other names"]
    """
    if not names or not all(NUMBER.match(name) for name in names):
        return []
    what = "are numbers" if all(NUMBER.fullmatch(name) for name in names) else "begin with a number"
    return [f"class names {what} ({names[0]!r}), which CLIP reads too: a table (csv:) gives classes other names"]
