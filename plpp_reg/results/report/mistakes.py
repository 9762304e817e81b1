"""Wrong test images on the page: small, embedded, bounded in number and bytes."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from plpp_reg.errors import InputError
from plpp_reg.io.pictures import open_picture
from plpp_reg.results.evaluation import Mistake

SIDE = 112  # pixels of the longer side
A_TEST = 12  # pictures shown of one test
MOST_BYTES = 2 * 2**20  # of all pictures of a page
LARGEST_FILE = 64 * 2**20


class Shown(NamedTuple):
    """A wrong image; ``picture``: a data URI, empty where it is not shown, and ``why``."""

    mistake: Mistake
    picture: str
    why: str = ""


class Gallery:
    """Makes the pictures of a page, as long as there is room for them.

    A record may be anybody's: of the file that it names nothing is shown unless its content is what was tested, by its hash.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self.left = most_bytes
        self._made: dict[str, str] = {}

    def show(self, mistakes: Sequence[Mistake]) -> list[Shown]:
        """The first of a record's mistakes."""
        return [self._shown(mistake) for mistake in mistakes[:A_TEST]]

    def _shown(self, mistake: Mistake) -> Shown:
        if mistake.sha256 in self._made:
            return Shown(mistake, self._made[mistake.sha256])
        try:
            picture = thumbnail(Path(mistake.path), mistake.sha256)
        except InputError as e:
            return Shown(mistake, "", str(e))
        if len(picture) > self.left:
            return Shown(mistake, "", "the page has no room for more pictures")
        self.left -= len(picture)
        self._made[mistake.sha256] = picture
        return Shown(mistake, picture)


def thumbnail(path: Path, sha256: str) -> str:
    """A data URI of a small JPEG.

    Raises:
        InputError: the file is not here, or holds something else than was tested.
    """
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            raise InputError("its file is not on this machine")
        if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
            raise InputError("its file is another one by now")
    except (OSError, ValueError) as e:
        raise e if isinstance(e, InputError) else InputError("its file cannot be read") from e
    picture = open_picture(path)
    picture.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
