"""Paths as users name them."""

from __future__ import annotations

import os

from plpp_reg.errors import InputError

SHOWN = 160  # characters of a path that a message shows


def is_utf8(name: str) -> bool:
    """Whether a file's name can be written into files, which are UTF-8: out of an old archive it may be other bytes."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def usable_path(text: str) -> str:
    """A path with ``~`` as the home folder. Whether anything is there is not asked, only whether anything can be.

    Raises:
        InputError: a user that is not there, a name that is too long, not UTF-8 or has a NUL in it, a loop of links, a folder
            that may not be entered.
    """
    path = os.path.expanduser(text)
    shown = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]}…{text[-SHOWN // 2 :]}"
    if path.startswith("~") and not os.path.lexists(path):
        raise InputError(f"expected a path, got {shown!r}: no such user")
    try:
        path.encode()  # names go into files that are UTF-8
        os.stat(path)
    except UnicodeEncodeError as e:
        raise InputError(f"expected a path in UTF-8, got {shown!r}") from e
    except (FileNotFoundError, NotADirectoryError):  # it may be made; or who wants it says what is missing
        pass
    except (OSError, ValueError) as e:
        raise InputError(f"expected a path that can be used, got {shown!r}: {getattr(e, 'strerror', None) or e}") from e
    return path
