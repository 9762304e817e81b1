"""What can be opened as a picture, and how: one list, one opener, one message."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from plpp_reg.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Pillow's formats, each with the endings that its files have. A file is read as one of these, whatever it is called: some of
# the other formats hand their files to another program (EPS to Ghostscript).
FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),  # .mpo: several JPEGs in a file, of which the first is read
    "PNG": (".png", ".apng"),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")
READING = 2  # of one's own pictures: raise it when a pixel that open_picture gives changes, for features are kept by it
BRANDS = {  # of a file that begins as a film does
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1"): "a HEIC, which is to be saved as JPEG first",
    (b"avif", b"avis"): "an AVIF, which is to be saved as JPEG first",
}
BEGINNINGS = {
    "TIFF": (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"),
    "JPEG": (b"\xff\xd8\xff",),
    "PNG": (b"\x89PNG",),
    "GIF": (b"GIF8",),
}
ORIENTATION = 0x0112  # EXIF's tag, and how a picture is turned by its value; Pillow's own way also writes the EXIF anew
TURNS = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is none of the user's own making: hidden, a Mac's companion ``._x.png``, the system's."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def is_picture(path: Path) -> bool:
    """Whether a file of a folder counts as a picture, by its name."""
    return path.suffix.lower() in ENDINGS and not is_hidden(path.name) and path.is_file()


class Below(NamedTuple):
    """The files in a folder and in those below it, sorted: pictures, and what else is not hidden; links to folders."""

    pictures: list[Path]
    others: list[Path]
    links: list[Path]


def files_below(folder: Path) -> Below:
    """What is hidden is passed over; links to folders are not followed.

    Raises:
        OSError: a folder cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    found = Below([], [], [])
    for place, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found.links.extend(path for name in folders if (path := Path(place, name)).is_symlink())
        for path in (Path(place, name) for name in files if not is_hidden(name)):
            (found.pictures if is_picture(path) else found.others).append(path)
    return Below(*map(sorted, found))


def picture_stat(path: str | Path) -> os.stat_result:
    """Of a plain file: from a pipe nothing would ever come.

    Raises:
        InputError: there is none.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError) as e:
        raise InputError(f"image {path}: expected a readable picture, got {e}") from e
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise InputError(f"image {path}: expected a readable picture, got {kind}")
    return found


def open_picture(path: str | Path) -> Image.Image:
    """One's own picture as a person sees it: decoded, upright, in three channels of 8 bits; of several frames the first.

    It is turned as its EXIF orientation says, and what is transparent is white. Whole numbers of 16 bits are divided by 257,
    fractions of 0 to 1 multiplied by 255; a float picture with values up to 255, and a TIFF of 32-bit whole numbers up to 255,
    is taken as it is.

    Raises:
        InputError: it cannot be read as one of :data:`FORMATS`, or holds other numbers; the message names the file.
    """
    return _opened(path, _as_seen)


def open_as_upstream(path: str | Path) -> Image.Image:
    """A picture of a paper's data set, as Dassl and CoOp read it: neither turned nor scaled.

    Raises:
        InputError: it cannot be read as one of :data:`FORMATS`; the message names the file.
    """
    return _opened(path, lambda file: file.convert("RGB"))


def _opened(path: str | Path, read: Callable[[Image.Image], Image.Image]) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    picture_stat(path)
    try:
        with Image.open(path, formats=tuple(FORMATS)) as file:
            return read(file)
    except UnidentifiedImageError as e:
        kinds = ", ".join(FORMATS)
        raise InputError(f"image {path}: expected a readable picture ({kinds}), got {_kind_of(path)}") from e
    except InputError as e:
        raise InputError(f"image {path}: {e}") from e
    except Exception as e:  # what Pillow raises on a damaged file depends on the format: SyntaxError, struct.error, ...
        raise InputError(f"image {path}: expected a readable picture, got {e or type(e).__name__}") from e


def _kind_of(path: str | Path) -> str:
    """What a file is that Pillow does not know, by its first bytes."""
    with open(path, "rb") as file:
        head = file.read(16)
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp":  # ISO 14496-12: the brand follows
        return next((what for brands, what in BRANDS.items() if head[8:12] in brands), "a film or another such file")
    kinds = [form for form, beginnings in BEGINNINGS.items() if head.startswith(beginnings)]
    return f"a {kinds[0]} that Pillow cannot read" if kinds else "something else"


def _as_seen(file: Image.Image) -> Image.Image:
    from PIL import Image

    file.load()  # Pillow turns a TIFF here, which has no orientation any more then
    if file.mode.startswith(("I", "F")):
        image = _eight_bits(file).convert("RGB")
    elif file.has_transparency_data:
        image = file.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    else:
        image = file.convert("RGB")
    turn = None
    with contextlib.suppress(Exception):  # EXIF that cannot be read says nothing
        turn = TURNS.get(file.getexif().get(ORIENTATION))
    return image if turn is None else image.transpose(Image.Transpose[turn])


def _eight_bits(file: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits as 0 to 255.

    Raises:
        InputError: they are on none of the scales that pictures have.
    """
    import numpy as np
    from PIL import Image

    values = np.asarray(file).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    scale, most = 1 / 257, 2**16 - 1
    if file.mode == "F":
        scale, most = (255.0, 1) if high <= 1 else (1.0, 255)
    elif file.mode == "I" and file.format == "TIFF" and high <= 255:
        scale, most = 1.0, 255
    if not 0 <= low <= high <= most:  # nan is neither
        wanted = "0 to 1, or 0 to 255" if file.mode == "F" else f"0 to {most}"
        got = f"{low:g} to {high:g}" if np.isfinite(values).all() else "some that are no numbers"
        raise InputError(f"expected a readable picture with values of {wanted}, got {got}")
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))
