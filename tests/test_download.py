"""``plpp data get`` against a server of this machine that cuts the line, lies, or has more than the disk holds."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import shutil
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from plpp_reg.commands.cli import main
from plpp_reg.data import DATASETS, download, load_dataset, short_name
from plpp_reg.data.download import HUB, REPOSITORY, TORCHVISION, Remote, fetch
from plpp_reg.data.readers import read_own_files, split_text
from plpp_reg.errors import InputError

from helpers.hostile_archives import EVIL
from helpers.miniature import make
from helpers.server import Server, tarred


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.serve_forever, args=(0.01,))
    thread.start()
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "HF_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setattr(download, "PAUSE", 0.0)
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def hub_archive(place: Path, name: str) -> bytes:
    """A data set in miniature as the Hub's archive holds it: its folder, with the split file."""
    folder, layout = make(place / "made", name), DATASETS[name].layout
    if layout.split:
        (folder / layout.split).write_text(split_text(read_own_files(folder, layout)))
    return zipped(place / "made", "")


def zipped(folder: Path, below: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"{below}{path.relative_to(folder)}")
    return buffer.getvalue()


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- whole data sets ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in HUB if n != "ImageNetV2"])  # 1500 files, and laid out as the others
def test_from_the_hub_into_coops_layout(name: str, server: Server, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    server.put_on_hub(HUB[name], hub_archive(tmp_path, name))
    root = tmp_path / "root"
    assert main(["data", "get", short_name(name), "--root", str(root)]) == 0
    out = capsys.readouterr().out
    assert f"{short_name(name):16s} different" in out and "decodes" in out and "would be made" not in out
    folder = DATASETS[name].layout.folder
    assert tree(root / folder) == tree(tmp_path / "made" / folder) and len(tree(root / folder)) > 5
    assert [p.name for p in (root).iterdir() if p.name != download.PLACE] == [folder]
    assert not list((root / download.PLACE).iterdir())


def published(place: Path, name: str) -> dict[str, bytes]:
    """A data set in miniature as its publisher packs it, by file name."""
    folder = make(place / "made", name)
    if name == "Caltech101":
        inner = tarred(**{"101_ObjectCategories": folder / "101_ObjectCategories"})
        (place / "outer").mkdir()
        (place / "outer" / "101_ObjectCategories.tar.gz").write_bytes(inner)
        return {"caltech-101.zip": zipped(place / "outer", "caltech-101/")}
    if name == "OxfordPets":
        return {f"{part}.tar.gz": tarred(**{part: folder / part}) for part in ("images", "annotations")}
    if name == "OxfordFlowers":
        labels = (folder / "imagelabels.mat").read_bytes()
        return {"102flowers.tgz": tarred(jpg=folder / "jpg"), "imagelabels.mat": labels}
    if name == "FGVCAircraft":
        return {"fgvc-aircraft-2013b.tar.gz": tarred(**{"fgvc-aircraft-2013b/data": folder})}
    if name == "SUN397":
        return {"SUN397.tar.gz": tarred(SUN397=folder / "SUN397")}
    if name == "EuroSAT":
        return {"EuroSAT.zip": zipped(folder / "2750", "2750/")}
    packed = {"Food101": ("food-101.tar.gz", "food-101"), "DescribableTextures": ("dtd-r1.0.1.tar.gz", "dtd")}
    file, below = packed[name]
    return {file: tarred(**{below: folder})}


LACKING = {"OxfordFlowers": "cat_to_name.json", "SUN397": "ClassName.txt"}  # of no file that torchvision knows


@pytest.mark.parametrize("name", TORCHVISION)
def test_from_the_publishers(name: str, server: Server, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    files = published(tmp_path, name)
    assert [url.rpartition("/")[2] for url, _ in TORCHVISION[name]] == list(files)
    server.files = {f"/{file}": content for file, content in files.items()}
    here = tuple((f"{server.url}/{file}", hashlib.md5(content).hexdigest()) for file, content in files.items())
    monkeypatch.setitem(TORCHVISION, name, here)
    root, layout = tmp_path / "root", DATASETS[name].layout
    status = main(["data", "get", short_name(name), "--root", str(root), "--source", "torchvision"])
    out = capsys.readouterr().out
    assert status == (1 if name in LACKING else 0)
    assert LACKING.get(name, "decodes") in out
    assert (root / layout.folder / layout.images).is_dir()
    images = tree(tmp_path / "made" / layout.folder / layout.images)
    assert tree(root / layout.folder / layout.images) == images and images


def test_addresses_and_checksums_are_torchvisions() -> None:
    from torchvision import datasets as tv

    assert TORCHVISION["DescribableTextures"] == ((tv.DTD._URL, tv.DTD._MD5),)
    assert TORCHVISION["Food101"] == ((tv.Food101._URL, tv.Food101._MD5),)
    assert TORCHVISION["SUN397"] == ((tv.SUN397._DATASET_URL, tv.SUN397._DATASET_MD5),)
    assert [url for url, _ in TORCHVISION["FGVCAircraft"]] == [tv.FGVCAircraft._URL]
    assert TORCHVISION["OxfordPets"] == tv.OxfordIIITPet._RESOURCES
    names = tv.Flowers102._file_dict
    expected = [(tv.Flowers102._download_url_prefix + names[k][0], names[k][1]) for k in ("image", "label")]
    assert list(TORCHVISION["OxfordFlowers"]) == expected
    for name, module in (("Caltech101", "caltech"), ("EuroSAT", "eurosat")):  # there the address stands in the code
        text = (Path(tv.__file__).parent / f"{module}.py").read_text()
        assert all(url in text and md5 in text for url, md5 in TORCHVISION[name])


def test_what_is_there_is_not_got_again(server: Server, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    server.put_on_hub("fgvc_aircraft.zip", hub_archive(tmp_path, "FGVCAircraft"))
    argv = ["data", "get", "fgvc_aircraft", "--root", str(tmp_path / "root")]
    assert main(argv) == 0
    assert main(argv) == 2  # not the papers' numbers, so not what was asked for
    assert "move it away, it is not overwritten" in capsys.readouterr().err
    data = load_dataset("FGVCAircraft", tmp_path / "root")
    sizes = (len(data.classnames), len(data.train), len(data.val), len(data.test))
    monkeypatch.setitem(DATASETS, "FGVCAircraft", dataclasses.replace(DATASETS["FGVCAircraft"], sizes=sizes))
    asked = len(server.ranges)
    assert main(argv) == 0 and "fgvc_aircraft    ready" in capsys.readouterr().out
    assert len(server.ranges) == asked


# ---- the line ----------------------------------------------------------------------------------------------------------

CONTENT = bytes(range(256)) * 4000


def remote(server: Server, **changes: object) -> Remote:
    server.files["/a.bin"] = CONTENT
    known = Remote(f"{server.url}/a.bin", "a.bin", len(CONTENT), "sha256", hashlib.sha256(CONTENT).hexdigest())
    return known._replace(**changes)


def test_a_cut_line_is_gone_on_from(server: Server, tmp_path: Path) -> None:
    server.cuts = [300_000, 0, 500_000]
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=300000-", "bytes=800000-"]
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_line_that_stays_cut_leaves_its_part_for_the_next_time(server: Server, tmp_path: Path) -> None:
    server.cuts = [1000] + [0] * download.TRIES
    with pytest.raises(InputError, match="the line broke at .* the same command goes on from there"):
        fetch(remote(server), tmp_path)
    (part,) = tmp_path.iterdir()
    assert part.name.endswith(".part") and part.read_bytes() == CONTENT[:1000]
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    assert server.ranges[-1] == "bytes=1000-"


def test_tries_are_counted_from_the_last_byte_that_came(server: Server, tmp_path: Path) -> None:
    server.cuts = [100] * 3 * download.TRIES
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT


def test_a_server_without_ranges_or_sizes_begins_again(server: Server, tmp_path: Path) -> None:
    server.knows_ranges, server.cuts = False, [300_000]
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT
    (tmp_path / "a.bin").unlink()
    server.knows_sizes = False
    file = remote(server, size=None)
    (tmp_path / f"a.bin.{file.digest[:12]}.part").write_bytes(b"of an earlier time")
    assert fetch(file, tmp_path).read_bytes() == CONTENT


def test_a_server_that_is_busy_is_asked_again_and_one_that_refuses_is_not(server: Server, tmp_path: Path) -> None:
    server.statuses = [503, 429]
    assert fetch(remote(server), tmp_path).read_bytes() == CONTENT and server.statuses == []
    (tmp_path / "a.bin").unlink()
    server.statuses = [403, 403]
    with pytest.raises(InputError, match="expected this file, got HTTP Error 403"):
        fetch(remote(server), tmp_path)
    assert server.statuses == [403]


def test_wrong_bytes_are_refused_and_removed(server: Server, tmp_path: Path) -> None:
    file = remote(server)
    server.files["/a.bin"] = CONTENT[:-1] + b"?"
    with pytest.raises(InputError, match=f"expected sha256 {file.digest}, got"):
        fetch(file, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_was_cut_on_the_hub_and_again_is_whole_in_the_end(server: Server, tmp_path: Path) -> None:
    server.put_on_hub("eurosat.zip", hub_archive(tmp_path, "EuroSAT"))
    server.cuts = [2000] + [0] * download.TRIES
    argv, root = ["data", "get", "eurosat", "--root", str(tmp_path / "root")], tmp_path / "root"
    assert main(argv) == 2
    assert [p.name for p in root.iterdir()] == [download.PLACE]  # nothing under its final name
    assert main(argv) == 0 and server.ranges[-1] == "bytes=2000-"
    assert tree(root / "eurosat") == tree(tmp_path / "made" / "eurosat")


# ---- what cannot be ----------------------------------------------------------------------------------------------------


def refused(capsys: pytest.CaptureFixture, *argv: str) -> str:
    assert main(["data", "get", *argv]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


def test_a_disk_that_is_too_small(server: Server, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    content = hub_archive(tmp_path, "EuroSAT")
    server.put_on_hub("eurosat.zip", content)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(2.0 * len(content))))
    line = refused(capsys, "eurosat", "--root", str(tmp_path / "root"))
    assert "GiB free for" in line and server.ranges == []  # not a byte was asked for
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(2.2 * len(content))))
    assert main(["data", "get", "eurosat", "--root", str(tmp_path / "root")]) == 0


def test_an_archive_that_unpacks_to_more_than_the_disk_has(server: Server, tmp_path: Path, capsys, monkeypatch) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("eurosat/2750/Forest/a.jpg", bytes(10_000_000))
    server.put_on_hub("eurosat.zip", buffer.getvalue())
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=5_000_000))
    assert "what eurosat.zip holds" in refused(capsys, "eurosat", "--root", str(tmp_path))
    assert not list(tmp_path.rglob("a.jpg")) and not (tmp_path / "eurosat").exists()


def test_every_source_has_a_checksum() -> None:
    assert all(len(md5) == 32 and int(md5, 16) for files in TORCHVISION.values() for _, md5 in files)


@pytest.mark.parametrize("evil", EVIL)
def test_a_hostile_archive(evil: str, server: Server, tmp_path: Path, monkeypatch, capsys) -> None:
    content, reason = EVIL[evil](tmp_path / "victim")
    name = "dtd.zip" if content.startswith(b"PK") else "dtd.tar.gz"
    server.files[f"/{name}"] = content
    monkeypatch.setitem(TORCHVISION, "DescribableTextures", ((f"{server.url}/{name}", hashlib.md5(content).hexdigest()),))
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_text("mine")
    root = tmp_path / "a" / "b"
    line = refused(capsys, "dtd", "--root", str(root), "--source", "torchvision")
    assert reason in line
    assert tree(tmp_path / "victim") == {"mine": b"mine"}
    below = [p.relative_to(root / download.PLACE / "dtd-torchvision") for p in root.rglob("*") if p.is_file()]
    assert {str(p) for p in below} <= {name, ".lock"}  # what was fetched stays, nothing of what was unpacked does


def test_what_a_killed_process_left_of_a_data_set_that_is_there_goes(
    server: Server, tmp_path: Path, monkeypatch, capsys
) -> None:
    server.put_on_hub("eurosat.zip", hub_archive(tmp_path, "EuroSAT"))
    root = tmp_path / "root"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "unlink", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt()))  # once all is in its place
        download.get(["eurosat"], root)
    left = root / download.PLACE / "eurosat-hub"
    assert (root / "eurosat" / "2750").is_dir() and (left / "eurosat.zip").is_file()
    (root / download.PLACE / "eurosat-torchvision").mkdir()  # and of the other source
    sizes = load_dataset("EuroSAT", root)
    sizes = (len(sizes.classnames), len(sizes.train), len(sizes.val), len(sizes.test))
    monkeypatch.setitem(DATASETS, "EuroSAT", dataclasses.replace(DATASETS["EuroSAT"], sizes=sizes))
    assert main(["data", "get", "eurosat", "--root", str(root)]) == 0
    assert not list((root / download.PLACE).iterdir())


def test_another_archive_than_the_data_sets(server: Server, tmp_path: Path, capsys) -> None:
    server.put_on_hub("eurosat.zip", hub_archive(tmp_path, "DescribableTextures"))
    assert "expected an archive that holds 2750, got one of dtd" in refused(capsys, "eurosat", "--root", str(tmp_path / "r"))
    assert [p.name for p in (tmp_path / "r").iterdir()] == [download.PLACE]


def test_what_is_got_by_hand_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    root = ["--root", str(tmp_path / "r")]
    assert "imagenet is to be got by hand: https://image-net.org" in refused(capsys, "imagenet", *root)
    assert "ucf101 is to be got by hand; --source hub has it" in refused(capsys, "ucf101", "--source", "torchvision", *root)
    assert "it is embedded" in refused(capsys, "emoji", *root)
    assert "it is your own" in refused(capsys, f"folder:{tmp_path}", *root)
    assert "unknown data set 'dtt': did you mean 'dtd'?" in refused(capsys, "dtt", *root)
    assert "unknown source 'hubb': did you mean 'hub'?" in refused(capsys, "dtd", "--source", "hubb", *root)
    assert not (tmp_path / "r").exists()


def test_every_data_set_of_the_table_is_on_the_hub_or_by_hand() -> None:
    assert {name for name, entry in DATASETS.items() if entry.layout} == {*HUB, "ImageNet"}
    assert set(TORCHVISION) < set(HUB)


def test_no_hub_and_no_library(server: Server, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    root = ["--root", str(tmp_path / "r")]
    assert "expected an answer of the Hugging Face Hub, got" in refused(capsys, "dtd", *root)
    server.files[f"/{REPOSITORY}/resolve/main/dtd.zip"] = b"without a checksum"
    assert "expected the file's SHA-256, got None" in refused(capsys, "dtd", *root)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert 'pip install -e ".[data]" (in the clone of plpp-reg)' in refused(capsys, "dtd", *root)
    assert not (tmp_path / "r").exists()  # what is refused changes nothing
