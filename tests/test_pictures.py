"""One opener: what counts as a picture, what a damaged or disguised file is told, and that no other program is started."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from PIL import Image

from plpp_reg.data.check import check
from plpp_reg.data.loaders import Pictures
from plpp_reg.errors import InputError
from plpp_reg.io.pictures import ENDINGS, FORMATS, is_picture, open_as_upstream, open_picture
from plpp_reg.prompts.predict import find_images

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n0 0 20 20 rectfill\nshowpage\n%%EOF\n"


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_read_whatever_its_file_is_called(tmp_path: Path, form: str) -> None:
    picture = Image.new("RGB", (5, 4), (200, 30, 60))
    for ending in (*FORMATS[form], ".jpg"):
        path = tmp_path / f"x{ending}"
        picture.save(path, format=form)
        read = open_picture(path)
        assert (read.size, read.mode) == ((5, 4), "RGB") and is_picture(path)
        assert all(abs(a - b) < 12 for a, b in zip(read.getpixel((2, 2)), (200, 30, 60), strict=True))


def test_the_endings_are_those_that_pillow_gives_the_formats() -> None:
    Image.init()
    for form, endings in FORMATS.items():
        formats = {"MPO": "JPEG"}  # which Pillow opens as a JPEG
        assert all(formats.get(f := Image.registered_extensions()[ending], f) == form for ending in endings)
    assert len(set(ENDINGS)) == len(ENDINGS)


def test_an_eps_that_is_called_a_jpg_starts_no_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = tmp_path / "started"
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("gs", "gswin64c", "gswin32c"):
        (programs / name).write_text(f"#!/bin/sh\necho 10.0\ntouch {started}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # look again
    path = tmp_path / "x.jpg"
    path.write_bytes(EPS)
    with pytest.raises(Exception):  # noqa: B017  (whatever Pillow makes of the false one)
        Image.open(path).load()
    assert started.exists()  # so the file is one that would
    started.unlink()
    for opener in (open_picture, Pictures().open):
        with pytest.raises(InputError, match=r"image .*x\.jpg: expected a readable picture \(JPEG, PNG"):
            opener(str(path))
    assert not started.exists()


@pytest.mark.parametrize("form", FORMATS)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, form: str) -> None:
    """Cut short anywhere, or with wrong bytes: a picture or an InputError, never another exception."""
    path = tmp_path / "x.img"
    picture = Image.effect_noise((16, 16), 60).convert("RGB")
    picture.save(path, format=form)
    whole, chance, refused = path.read_bytes(), random.Random(7), 0
    for turn in range(150):
        content = bytearray(whole)
        for _ in range(turn % 4 * 2):
            content[chance.randrange(len(content))] = chance.randrange(256)
        path.write_bytes(content[: chance.randrange(1, len(content))] if turn % 2 else content)
        try:
            open_picture(path)
        except InputError as e:
            assert str(e).startswith(f"image {path}: expected a readable picture")
            refused += 1
    assert refused > 10


def test_data_sets_and_predictions_take_the_same_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for part in ("train", "test"):
        for classname in ("cat", "dog"):
            (tmp_path / part / classname).mkdir(parents=True)
            for ending in ENDINGS:
                form = next(form for form, endings in FORMATS.items() if ending in endings)
                Image.new("RGB", (4, 4)).save(tmp_path / part / classname / f"a{ending}", format=form)
            (tmp_path / part / classname / "notes.txt").write_text("no picture")
            (tmp_path / part / classname / ".hidden.png").write_bytes(b"")
    assert len(find_images([tmp_path]).paths) == 4 * len(ENDINGS)
    assert check(tmp_path, [f"folder:{tmp_path}"]) == 0
    assert f"all {4 * len(ENDINGS)} images decode" in capsys.readouterr().out


# Formats that are not on the list, and of the list's own a picture that Pillow answers with a ValueError.
OTHERS = ("ICO", "DDS", "SGI", "IM", "JPEG2000", "AVIF", "TGA", "PCX", "EPS", "PDF")
NO_HEADER = b"\x89PNG\r\n\x1a\n\0\0\0\0IHDR\xa8\xa1\xdeZ" + b"\0" * 40  # an IHDR of length 0


@pytest.mark.parametrize("form", OTHERS)
def test_a_format_that_is_not_on_the_list_is_refused_whatever_its_file_is_called(tmp_path: Path, form: str) -> None:
    Image.init()
    if form not in Image.SAVE:
        pytest.skip(f"this Pillow does not write {form}")
    path = tmp_path / "x.jpg"
    Image.new("RGB", (16, 16), (200, 30, 60)).save(path, format=form)
    said = "an AVIF, which is to be saved as JPEG" if form == "AVIF" else "something else"
    with pytest.raises(InputError, match=rf"x\.jpg: expected a readable picture \(JPEG, PNG.*, got {said}"):
        open_picture(path)
    with pytest.raises(InputError, match=f"got {said}"):  # cut short too
        path.write_bytes(path.read_bytes()[:200])
        open_picture(path)


@pytest.mark.parametrize(
    "content", [NO_HEADER, b"P6 -4 4 255\n", b"P6 99999999 99999999 255\n", b"P6 " + b"9" * 5000 + b" 4 255\n"]
)
def test_what_pillow_answers_with_any_error_is_a_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"image .*x\.png: expected a readable picture") as caught:
        open_picture(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "an empty file"),
        (b"\0\0\0\x24ftypheic\0\0\0\0mif1heic", "a HEIC, which is to be saved as JPEG first"),  # a telephone's IMG_0001.HEIC
        (b"\0\0\0\x24ftypmp42\0\0\0\0", "a film or another such file"),
        (b"II*\0" + b"\0" * 40, "a TIFF that Pillow cannot read"),
        (b"GIF89a", "a GIF that Pillow cannot read"),
        (b"{}", "something else"),
    ],
)
def test_what_a_file_is_instead_of_a_picture_is_said(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "x.jpg").write_bytes(content)
    for opener in (open_picture, open_as_upstream):
        with pytest.raises(InputError, match=rf"x\.jpg: expected a readable picture \(JPEG, .*\), got {said}$"):
            opener(tmp_path / "x.jpg")


def test_of_several_pictures_in_a_file_the_first_is_read(tmp_path: Path) -> None:
    first, second = Image.new("RGB", (16, 16), (200, 30, 60)), Image.new("RGB", (16, 16), (10, 200, 20))
    forms = {"x.mpo": "MPO", "x.jpg": "MPO", "x.gif": "GIF", "x.apng": "PNG", "x.tif": "TIFF", "x.webp": "WEBP"}
    for name, form in forms.items():
        first.copy().save(tmp_path / name, format=form, save_all=True, append_images=[second.copy()])
        assert is_picture(tmp_path / name)
        assert all(abs(a - b) < 12 for a, b in zip(open_picture(tmp_path / name).getpixel((8, 8)), (200, 30, 60), strict=True))


def transparent(mode: str) -> Image.Image:
    """Its left half opaque and dark red, its right half transparent, above black or green that nobody sees."""
    image = Image.new("RGBA", (8, 4), (0, 255, 0, 0))
    image.paste((120, 0, 0, 255), (0, 0, 4, 4))
    if mode in ("RGBA", "LA"):
        return image.convert(mode)
    grey_or_colour = image.convert({"P": "RGB", "RGB": "RGB", "L": "L"}[mode])
    return grey_or_colour.convert("P", palette=Image.Palette.ADAPTIVE, colors=2) if mode == "P" else grey_or_colour


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB", "L"])
@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "TIFF"])
def test_what_is_transparent_is_white_as_a_person_sees_it(tmp_path: Path, form: str, mode: str) -> None:
    image, options = transparent(mode), {}
    if mode in ("P", "RGB", "L"):  # one colour that counts as transparent
        if form in ("WEBP", "TIFF") or (form == "GIF" and mode != "P"):
            pytest.skip("no such file")
        options = {"transparency": image.getpixel((6, 2))}
    if mode == "LA" and form in ("WEBP", "GIF"):
        pytest.skip("no such file")
    image.save(tmp_path / "x", format=form, **({"lossless": True, "exact": True} if form == "WEBP" else {}), **options)
    seen = open_picture(tmp_path / "x")
    assert seen.getpixel((6, 2)) == (255, 255, 255)
    left = seen.getpixel((2, 2))
    assert max(left) < 130 and left != (255, 255, 255)
    with Image.open(tmp_path / "x") as file:
        assert open_as_upstream(tmp_path / "x").tobytes() == file.convert("RGB").tobytes()


def test_what_is_half_transparent_is_half_white(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4), (0, 0, 0, 51)).save(tmp_path / "x.png")
    assert open_picture(tmp_path / "x.png").getpixel((1, 1)) == (204, 204, 204)
