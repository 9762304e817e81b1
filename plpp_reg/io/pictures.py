"""What can be opened as a picture, and how: one list, one opener, one message."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from plpp_reg.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

# Pillow's formats, each with the endings that its files have. A file is read as one of these, whatever it is called: some of
# the other formats hand their files to another program (EPS to Ghostscript).
FORMATS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm"),
}
ENDINGS = tuple(ending for endings in FORMATS.values() for ending in endings)


def is_picture(path: Path) -> bool:
    """Whether a file of a folder counts as a picture, by its name."""
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".") and path.is_file()


def open_picture(path: str | Path) -> Image.Image:
    """A picture, decoded, in three channels; of several frames the first.

    Raises:
        InputError: it cannot be read as one of :data:`FORMATS`; the message names the file.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=tuple(FORMATS)) as file:
            return file.convert("RGB")
    except UnidentifiedImageError as e:
        kinds = ", ".join(FORMATS)
        raise InputError(f"image {path}: expected a readable picture ({kinds}), got something else") from e
    except Exception as e:  # what Pillow raises on a damaged file depends on the format: SyntaxError, struct.error, ...
        raise InputError(f"image {path}: expected a readable picture, got {e or type(e).__name__}") from e
