"""Sampling against upstream CoOp's rule, the embedded data set's split, and batches that are a function of (seed, epoch)."""

from __future__ import annotations

import math
import os
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plpp_reg.data import DataSplit, Datum, emoji, load_dataset
from plpp_reg.data.loaders import EpochBatches, build_loader
from plpp_reg.data.sampling import sample_few_shot, subsample_classes
from plpp_reg.errors import InputError

from helpers import engine as helpers
from helpers import processes


def make_split(labels: list[int], val_labels: list[int] | None = None) -> DataSplit:
    """Items in the given order of labels: upstream's rule depends on that order."""

    def items(part: str, order: list[int]) -> list[Datum]:
        return [Datum(f"/x/{part}/{i}.png", y, f"class {y}", f"{part}/{i}.png") for i, y in enumerate(order)]

    classnames = [f"class {y}" for y in range(max(labels) + 1)]
    return DataSplit(items("train", labels), items("val", val_labels or labels), items("test", labels), classnames)


def upstream_few_shot(data: DataSplit, shots: int, seed: int) -> tuple[list[Datum], list[Datum]]:
    """CoOp's ``generate_fewshot_dataset`` word for word, after ``set_random_seed``; the global stream, as upstream has it."""

    def split_dataset_by_label(data_source):
        output = defaultdict(list)
        for item in data_source:
            output[item.label].append(item)
        return output

    def generate_fewshot_dataset(data_source, num_shots):
        if num_shots < 1:
            return list(data_source)
        tracker = split_dataset_by_label(data_source)
        dataset = []
        for _, items in tracker.items():
            sampled_items = random.sample(items, num_shots) if len(items) >= num_shots else items
            dataset.extend(sampled_items)
        return dataset

    random.seed(seed)
    train = generate_fewshot_dataset(data.train, shots)
    return train, generate_fewshot_dataset(data.val, min(shots, 4))


SHUFFLED = [y for y in (4, 0, 2, 1, 3, 2, 4, 0) for _ in range(5)]  # first appearance is not label order; 5 or 10 a class


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 12345])
@pytest.mark.parametrize("shots", [-1, 0, 1, 2, 4, 6, 8, 16])
def test_few_shot_files_are_upstreams(seed: int, shots: int) -> None:
    data = make_split(SHUFFLED, val_labels=[3, 1, 0, 2, 4] * 7)
    ours = sample_few_shot(data, shots, seed)
    train, val = upstream_few_shot(data, shots, seed)
    assert list(ours.train) == train  # the order too: it decides which image is in which batch
    assert list(ours.val) == val
    assert ours.test == data.test


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 2**31 - 1))
def test_few_shot_files_are_upstreams_for_any_order(labels: list[int], shots: int, seed: int) -> None:
    data = make_split(labels)
    ours = sample_few_shot(data, shots, seed)
    assert (list(ours.train), list(ours.val)) == upstream_few_shot(data, shots, seed)


def test_sampling_leaves_the_global_stream_alone_and_does_not_read_it() -> None:
    data = make_split(SHUFFLED)
    random.seed(99)
    before = random.getstate()
    first = sample_few_shot(data, 2, 1)
    assert random.getstate() == before
    random.seed(7)
    assert sample_few_shot(data, 2, 1) == first
    assert sample_few_shot(data, 2, 2) != first


@pytest.mark.parametrize(("n", "base", "new"), [(2, 1, 1), (3, 2, 1), (5, 3, 2), (8, 4, 4), (101, 51, 50)])
def test_base_gets_the_odd_class_and_new_is_relabelled_from_zero(n: int, base: int, new: int) -> None:
    order = list(range(n))
    random.Random(0).shuffle(order)  # halves go by sorted label, not by first appearance
    data = make_split(order * 2)
    halves = {name: subsample_classes(data, name) for name in ("base", "new")}
    assert halves["base"].classnames == [f"class {y}" for y in range(base)]
    assert halves["new"].classnames == [f"class {y}" for y in range(base, n)]
    assert len(halves["new"].classnames) == new and base == math.ceil(n / 2)
    for name, half in halves.items():
        shift = 0 if name == "base" else base
        for part in ("train", "val", "test"):
            kept = [d for d in getattr(data, part) if (d.label < base) == (name == "base")]
            assert [(d.name, d.label + shift) for d in getattr(half, part)] == [(d.name, d.label) for d in kept]
    assert subsample_classes(data, "all") is data


def test_new_half_of_one_class_is_refused() -> None:
    with pytest.raises(InputError, match="'new' of 1 class"):
        subsample_classes(make_split([0, 0]), "new")


def test_hash_changes_with_any_file_and_not_with_the_machine() -> None:
    data = make_split(SHUFFLED)
    original = data.sha256()
    moved = replace(data, train=[d._replace(impath="/elsewhere" + d.impath) for d in data.train])
    assert moved.sha256() == original
    seen = {original}
    for part in ("train", "val", "test"):
        items = list(getattr(data, part))
        for i in (0, len(items) // 2, len(items) - 1):
            for change in ({"name": "other.png"}, {"label": 99}, {"classname": "other"}):
                seen.add(replace(data, **{part: [*items[:i], items[i]._replace(**change), *items[i + 1 :]]}).sha256())
        seen.add(replace(data, **{part: items[1:]}).sha256())
        seen.add(replace(data, **{part: items[::-1]}).sha256())  # order decides batches
    seen.add(replace(data, val=data.test, test=data.val).sha256())
    assert len(seen) == 1 + 3 * (9 + 2) + 1


# ---- the embedded data set ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji_split() -> DataSplit:
    return load_dataset("emoji")


def test_emoji_groups_never_straddle_the_split(emoji_split: DataSplit) -> None:
    group_of = {f"{code}.png": (classname, group) for code, classname, group in emoji.table()}
    parts = defaultdict(set)
    for part in ("train", "val", "test"):
        for datum in getattr(emoji_split, part):
            assert group_of[datum.name][0] == datum.classname == emoji_split.classnames[datum.label]
            parts[group_of[datum.name]].add(part)
    assert [g for g, where in parts.items() if len(where) > 1] == []
    names = [d.name for part in ("train", "val", "test") for d in getattr(emoji_split, part)]
    assert sorted(names) == sorted(group_of)  # each picture once, none left out


def test_every_emoji_class_has_16_4_8_images(emoji_split: DataSplit) -> None:
    for part, least in (("train", 16), ("val", 4), ("test", 8)):
        counts = torch.bincount(torch.tensor([d.label for d in getattr(emoji_split, part)]))
        assert len(counts) == len(emoji_split.classnames) and counts.min() >= least, part


def test_the_emoji_split_depends_on_no_seed(emoji_split: DataSplit) -> None:
    random.seed(5)
    again = load_dataset("emoji", root="/not/used")
    assert again.sha256() == emoji_split.sha256()
    one, two = (load_dataset("emoji", shots=16, seed=s) for s in (1, 2))
    assert one.test == two.test == emoji_split.test  # the few-shot seed never touches what is reported
    assert one.train != two.train
    assert len(one.train) == 16 * len(one.classnames) and len(one.val) == 4 * len(one.classnames)


def test_split_groups_holds_its_minima_and_keeps_groups_whole_at_the_smallest_size() -> None:
    # 28 images is the least that gives 16 + 4 + 8; single-image groups, then pairs.
    for size in (1, 2):
        groups = {f"g{i}": [f"g{i}-{k}" for k in range(size)] for i in range(28 // size)}
        parts = emoji.split_groups(groups, random.Random(1))
        assert {part: len(codes) for part, codes in parts.items()} == {"train": 16, "val": 4, "test": 8}
        assert all(len({p for p, codes in parts.items() if set(codes) & set(g)}) == 1 for g in groups.values())


CODES = [code for code, _, _ in emoji.table()[:12]]


def drawn(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_are_the_same_however_many_threads_draw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for threads in (1, 2, 5):
        monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / str(threads)))
        monkeypatch.setattr(emoji, "THREADS", threads)
        found.append(drawn(emoji.rasterise(CODES)))
    assert sorted(found[0]) == sorted(f"{code}.png" for code in CODES)
    assert found[0] == found[1] == found[2]


def test_pictures_whose_drawing_was_killed_are_whole_or_drawn_again(tmp_path: Path) -> None:
    """A process that is killed at its fifth file, half of it written: the next one draws what is missing, over it."""
    code = """
import os, signal, sys
from pathlib import Path
from plpp_reg.data import emoji
from PIL import Image
save, count = Image.Image.save, iter(range(9))
def dying(self, path, **kwargs):
    save(self, path, **kwargs)
    if next(count) == 4:
        os.truncate(path, 100)
        os.kill(os.getpid(), signal.SIGTERM if os.name == "nt" else signal.SIGKILL)
Image.Image.save = dying
emoji.THREADS = 1
emoji.rasterise(sys.argv[1:])
"""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with mock.patch.dict(os.environ, PLPP_REG_CACHE=str(whole)):
        expected = drawn(emoji.rasterise(CODES))
    with mock.patch.dict(os.environ, PLPP_REG_CACHE=str(cut)):
        processes.run(code, *CODES)
        (folder,) = cut.iterdir()
        (half,) = folder.glob(".*.tmp")
        assert len(list(folder.glob("*.png"))) == 4
        assert half.stat().st_size == 100
        assert drawn(emoji.rasterise(CODES)) == expected


# ---- batches -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> DataSplit:
    return helpers.read_tiny(helpers.make_images(tmp_path_factory.mktemp("tiny")))


ALL_RANDOM = ["random_resized_crop", "random_flip", "colorjitter", "randomgrayscale", "normalize"]


def batches(data: DataSplit, workers: int, epochs: range = range(3), seed: int = 1, names=ALL_RANDOM) -> list[list[dict]]:
    cfg = helpers.make_cfg("DATALOADER.NUM_WORKERS", workers, "SEED", seed, "INPUT.TRANSFORMS", names)
    loader = build_loader(cfg, data.train, train=True)
    found = []
    for epoch in epochs:
        loader.batch_sampler.epoch = epoch
        found.append(list(loader))
    return found


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_are_the_same_bits_for_any_number_of_workers(tiny: DataSplit, workers: int) -> None:
    torch.manual_seed(1)
    here = batches(tiny, 0)
    torch.manual_seed(2)  # and whatever the run's own stream holds
    helpers.assert_same(batches(tiny, workers), here)


def test_an_epoch_is_the_same_whether_or_not_others_came_before(tiny: DataSplit) -> None:
    # What exact resume rests on.
    helpers.assert_same(batches(tiny, 0, range(2, 3))[0], batches(tiny, 0)[2])


def test_epochs_seeds_and_images_differ(tiny: DataSplit) -> None:
    first, second, third = (
        {int(i): b["img"][k] for b in epoch for k, i in enumerate(b["index"])} for epoch in batches(tiny, 0)
    )
    other = {int(i): b["img"][k] for b in batches(tiny, 0, range(1), seed=2)[0] for k, i in enumerate(b["index"])}
    for a, b in ((first, second), (second, third), (first, other)):
        shared = a.keys() & b.keys()
        assert len(shared) > 5
        assert not any(torch.equal(a[i], b[i]) for i in shared)
    same = Datum(tiny.train[0].impath, 0, "cat", "one.png")  # one picture at two indices is augmented in two ways
    cfg = helpers.make_cfg("INPUT.TRANSFORMS", ALL_RANDOM, "DATALOADER.TRAIN_X.BATCH_SIZE", 2)
    images = next(iter(build_loader(cfg, [same, same], train=True)))["img"]
    assert not torch.equal(images[0], images[1])


def test_loading_touches_no_random_stream(tiny: DataSplit) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batches(tiny, 0)
    batches(tiny, 1, range(1))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert random.getstate() == before[2]


def test_order_is_a_permutation_by_seed_and_epoch() -> None:
    def order(seed: int, epoch: int, train: bool = True) -> list[int]:
        sampler = EpochBatches(40, 8, seed, train)
        sampler.epoch = epoch
        keys = [key for batch in sampler for key in batch]
        assert {e for e, _ in keys} == {epoch}
        return [i for _, i in keys]

    seen = {tuple(order(seed, epoch)) for seed in (0, 1, 2, -1, 2**40) for epoch in range(4)}
    assert len(seen) == 20
    assert all(sorted(o) == list(range(40)) for o in seen)
    assert order(1, 1) == order(1, 1)
    assert order(1, 3, train=False) == list(range(40))


def test_with_views_an_epoch_sees_one_of_so_many_augmentations_in_an_order_of_its_own(tiny: DataSplit) -> None:
    loader = build_loader(helpers.make_cfg("INPUT.TRANSFORMS", ALL_RANDOM, "INPUT.VIEWS", 2), tiny.train, train=True)

    def seen(epoch: int) -> dict[int, torch.Tensor]:
        loader.batch_sampler.epoch = epoch
        return {int(i): image for batch in loader for i, image in zip(batch["index"], batch["img"], strict=True)}

    first, second, third = map(seen, range(3))
    both = first.keys() & second.keys() & third.keys()
    assert both and all(torch.equal(first[i], third[i]) and not torch.equal(first[i], second[i]) for i in both)
    assert list(first) != list(third)


# Dassl: drop_last = is_train and len(data_source) >= batch_size
@pytest.mark.parametrize(
    ("size", "batch_size", "train", "sizes"),
    [
        (25, 6, True, [6, 6, 6, 6]),
        (24, 6, True, [6, 6, 6, 6]),
        (6, 6, True, [6]),
        (5, 6, True, [5]),  # no full batch: the only one is kept
        (25, 6, False, [6, 6, 6, 6, 1]),
        (5, 6, False, [5]),
    ],
)
def test_last_batch_is_dropped_as_in_dassl(size: int, batch_size: int, train: bool, sizes: list[int]) -> None:
    sampler = EpochBatches(size, batch_size, 1, train)
    assert [len(batch) for batch in sampler] == sizes
    assert len(sampler) == len(sizes)


def test_evaluation_is_resize_and_centre_crop_in_file_order(tiny: DataSplit) -> None:
    from PIL import Image
    from torchvision.transforms import functional as TF

    cfg = helpers.make_cfg("INPUT.TRANSFORMS", ALL_RANDOM)
    loader = build_loader(cfg, tiny.test, train=False)
    images = torch.cat([batch["img"] for batch in loader])
    assert torch.cat([batch["label"] for batch in loader]).tolist() == [d.label for d in tiny.test]
    for k in (0, 7):
        picture = Image.open(tiny.test[k].impath).convert("RGB")  # 43 x 37: the shorter side becomes 32
        resized = TF.resize(picture, 32, interpolation=TF.InterpolationMode.BICUBIC)
        expected = TF.normalize(TF.to_tensor(TF.center_crop(resized, 32)), cfg.INPUT.PIXEL_MEAN, cfg.INPUT.PIXEL_STD)
        assert torch.equal(images[k], expected)


def test_transforms_apply_in_dassls_order_whatever_the_order_of_names(tiny: DataSplit) -> None:
    here = batches(tiny, 0, range(1))
    helpers.assert_same(batches(tiny, 0, range(1), names=ALL_RANDOM[::-1]), here)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK"])
def test_pictures_of_any_mode_become_three_channels(tmp_path: Path, mode: str) -> None:
    from PIL import Image

    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new(mode, (50, 40)).save(path)
    cfg = helpers.make_cfg("DATALOADER.TRAIN_X.BATCH_SIZE", 1)
    assert next(iter(build_loader(cfg, [Datum(str(path), 0, "cat", "a")], True)))["img"].shape == (1, 3, 32, 32)


@pytest.mark.parametrize("content", [None, b"", b"not a picture", "cut"])
def test_an_unreadable_picture_is_named(tmp_path: Path, tiny: DataSplit, content: bytes | str | None) -> None:
    path = tmp_path / "bad.png"
    if content == "cut":
        content = Path(tiny.train[0].impath).read_bytes()[:900]
    if content is not None:
        path.write_bytes(content)
    cfg = helpers.make_cfg("DATALOADER.TRAIN_X.BATCH_SIZE", 1)
    with pytest.raises(InputError, match=f"image {path}: expected a readable picture"):
        list(build_loader(cfg, [Datum(str(path), 0, "cat", "bad.png")], True))
