"""Features of the frozen image tower: computed once, the same bits however they come."""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plpp_reg.clip.vision import ImageTower
from plpp_reg.commands import cli
from plpp_reg.data import DataSplit
from plpp_reg.data.contents import files_sha256
from plpp_reg.engine import features
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.frozen import FrozenEncoder, normalize, weights_sha256
from plpp_reg.engine.method import Classes, Inputs, Method
from plpp_reg.engine.trainer import Trainer
from plpp_reg.trainers.cocoop import CoCoOp
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.ivlp import IVLP
from plpp_reg.trainers.promptsrc import PromptSRC

from helpers import engine as helpers
from helpers.engine import Doubled
from helpers.resume import Killed


@pytest.fixture
def data(tmp_path: Path) -> DataSplit:
    return helpers.read_tiny(helpers.make_images(tmp_path / "images"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PLPP_REG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "features"


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many images each pass of the image tower had."""
    original, sizes = ImageTower.forward, []

    def forward(self, images, *args):
        sizes.append(len(images))
        return original(self, images, *args)

    monkeypatch.setattr(ImageTower, "forward", forward)
    return sizes


def trained(data: DataSplit, *opts: object, cls: type[Method] = CoOp) -> tuple[dict, dict]:
    trainer = helpers.make_trainer(data, *opts, cls=cls)
    trainer.train()
    return dict(trainer.method.saved.state_dict()), {"history": trainer.state.history, **trainer.test()}


def test_off_cold_and_warm_are_the_same_bits(data: DataSplit, encoded: list[int], own_cache: Path) -> None:
    off = trained(data)
    assert not own_cache.exists()
    on = ("FEATURES.MAX_GIB", 1.0)
    before = len(encoded)
    cold = trained(data, *on)
    assert len(encoded) == 2 * before  # as often as without
    warm = trained(data, *on)
    assert len(encoded) == 2 * before  # not once more
    helpers.assert_same(off, cold)
    helpers.assert_same(off, warm)


def test_another_method_weight_or_prompt_seed_on_the_same_images_encodes_nothing(data: DataSplit, encoded: list[int]) -> None:
    same = ("FEATURES.MAX_GIB", 1.0, "DATASET.SEED", 7)
    trained(data, *same)
    encoded.clear()
    trained(data, *same, "TRAINER.PLPP.ENABLED", True, "TRAINER.PLPP.WEIGHT", 2.0)
    trained(data, *same, "SEED", 5)
    trained(data, *same, "TRAINER.COCOOP.N_CTX", 2, cls=CoCoOp)
    assert encoded == []


def overriding(hook: str) -> type[CoOp]:
    """CoOp with one of a method's documented hooks replaced, so that something else is trained or predicted."""

    class Changed(CoOp):
        not_exported = "class_features: another method's"

    def build(self) -> None:
        CoOp.build(self)
        self.prompt_learner.ctx.data.mul_(3)

    def frozen(self) -> FrozenEncoder:
        return Doubled(self.clip.image)

    def split(self, data: DataSplit) -> DataSplit:
        return dataclasses.replace(data, train=data.train[::-1], test=data.test[1:])

    def end_epoch(self, epoch: int) -> None:
        self.prompt_learner.ctx.data.add_(0.01 * epoch)

    def encode_classes(self, image_features=None, with_states=False) -> Classes:
        classes = CoOp.encode_classes(self, image_features, with_states)
        return classes._replace(features=normalize(classes.features + 0.1))

    hooks = {
        "build": build,
        "inputs": property(lambda self: Inputs(features={"features": frozen(self)})),
        "split": split,
        "end_epoch": end_epoch,
        "encode_classes": encode_classes,
        "losses": lambda self, batch, classes: {"ce": 2 * CoOp.losses(self, batch, classes)["ce"]},
        "fit": lambda self, logits, batch: {"ce": self.cross_entropy(logits / 2, batch["label"])},
        "logits": lambda self, batch, classes: CoOp.logits(self, batch, classes) * 0.5,
        "image_features": lambda self, batch: normalize(self.frozen_features(batch).roll(1, 1)),
        "gradients": lambda self, rest, apart: [3 * gradient for gradient in rest],
    }
    setattr(Changed, hook, hooks[hook])
    return Changed


HOOKS = ["build", "inputs", "split", "end_epoch", "encode_classes", "losses", "fit", "logits", "image_features", "gradients"]


@pytest.mark.parametrize("hook", HOOKS)
def test_a_method_with_a_hook_of_its_own_is_served_its_own_features(data: DataSplit, hook: str) -> None:
    """From a store that another method has filled, it is what it is without one."""
    other = trained(data, "FEATURES.MAX_GIB", 1.0)
    off, on, again = (trained(data, "FEATURES.MAX_GIB", gib, cls=overriding(hook)) for gib in (0.0, 1.0, 1.0))
    helpers.assert_same(off, on)
    helpers.assert_same(off, again)
    assert not torch.equal(on[0]["ctx"], other[0]["ctx"])


@pytest.mark.parametrize(
    "changed",
    [
        ("SEED", 5),
        ("INPUT.RRCROP_SCALE", (0.5, 1.0)),
        ("INPUT.TRANSFORMS", ("random_flip", "normalize")),
        ("INPUT.PIXEL_MEAN", [0.4, 0.4, 0.4]),
    ],
    ids=lambda changed: changed[0],
)
def test_what_changes_a_feature_is_another_one(data: DataSplit, encoded: list[int], changed: tuple) -> None:
    on = ("FEATURES.MAX_GIB", 1.0)
    first, second = (helpers.make_trainer(data, *on, *c).frozen_features["features"] for c in ((), changed))
    assert not torch.equal(first.of("train", 1), second.of("train", 1))
    assert len(encoded) == 2


def test_other_weights_are_another_model(data: DataSplit) -> None:
    on = ("FEATURES.MAX_GIB", 1.0)
    one, two = (
        helpers.make_trainer(data, *on, clip_model=helpers.tiny_clip(seed)).frozen_features["features"].of("test")
        for seed in (0, 1)
    )
    assert not torch.equal(one, two)


def test_another_make_of_cpu_is_another_device(data: DataSplit, encoded: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines may share a home folder; with one instruction set, but other caches, their last bits may differ."""
    on = ("FEATURES.MAX_GIB", 1.0)
    helpers.make_trainer(data, *on).frozen_features["features"].of("test")
    helpers.make_trainer(data, *on).frozen_features["features"].of("test")
    assert len(encoded) == 1
    monkeypatch.setattr(features, "_processor", lambda: "another")
    helpers.make_trainer(data, *on).frozen_features["features"].of("test")
    assert len(encoded) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/cpuinfo")
def test_the_cpu_has_a_name() -> None:
    assert len(features._processor()) > 3


def test_a_picture_that_was_changed_is_encoded_again(data: DataSplit, encoded: list[int]) -> None:
    on = ("FEATURES.MAX_GIB", 1.0)
    before = helpers.make_trainer(data, *on).frozen_features["features"].of("test")
    first, other = data.test[0].impath, data.test[-1].impath
    Path(first).write_bytes(Path(other).read_bytes())
    os.utime(first, (1, 1))
    after = helpers.make_trainer(data, *on).frozen_features["features"].of("test")
    assert not torch.equal(before[0], after[0]) and torch.equal(before[1:], after[1:])


def test_a_feature_does_not_depend_on_its_neighbours(data: DataSplit, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of images that is cut short has the same features as far as its full batches go, and nearly so after them."""
    monkeypatch.setattr(features, "BATCH", 4)
    whole = helpers.make_trainer(data).frozen_features["features"].of("train", 3)
    some = dataclasses.replace(data, train=data.train[:6])
    part = helpers.make_trainer(some).frozen_features["features"].of("train", 3)
    assert torch.equal(part[:4], whole[:4])
    torch.testing.assert_close(part[4:], whole[4:6], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("count", "sizes"), [(0, []), (1, [1]), (10, [10]), (64, [64]), (65, [64, 1]), (200, [64, 64, 64, 8])])
def test_few_images_are_no_more_work_than_they_are(count: int, sizes: list[int]) -> None:
    batches = features.canonical_batches(count)
    assert [len(batch) for batch in batches] == sizes
    assert [i for batch in batches for i in batch] == list(range(count))


@pytest.mark.parametrize("count", [1, 3, 10])
def test_a_small_set_has_the_same_bits_off_cold_warm_and_with_any_number_of_workers(
    data: DataSplit, encoded: list[int], count: int
) -> None:
    small = dataclasses.replace(data, train=data.train[:count])
    ways = [("FEATURES.MAX_GIB", 0.0)] + [("FEATURES.MAX_GIB", 1.0)] * 2
    ways += [("FEATURES.MAX_GIB", 0.0, "DATALOADER.NUM_WORKERS", n) for n in (1, 2)]
    found = [helpers.make_trainer(small, *opts).frozen_features["features"].of("train", 1) for opts in ways]
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert encoded == [count] * 4  # not of the warm one


@pytest.mark.parametrize(("count", "size"), [(25, 2), (25, 3), (10, 2), (3, 2)])
def test_processes_share_canonical_batches_and_get_the_bits_of_one(
    data: DataSplit, monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    """Also where the last batch is a small one, and where there are fewer batches than processes."""
    monkeypatch.setattr(features, "BATCH", 4)
    some = dataclasses.replace(data, train=data.train[:count])
    alone = helpers.make_trainer(some).frozen_features["features"].of("train", 1)
    batches = -(-count // 4)
    whole, shares = torch.full((batches, 4, alone.shape[1]), torch.nan), []
    monkeypatch.setattr(Ranks, "all_agree", lambda ranks, this: this)
    monkeypatch.setattr(Ranks, "gather_rows", lambda ranks, share, total: shares.append((share, total)) or whole)
    for rank in range(size):
        trainer = helpers.make_trainer(some)
        trainer.ranks = Ranks(rank, size)
        trainer.frozen_features["features"].of("train", 1)
        share, total = shares[rank]
        assert total == batches
        whole[rank::size] = share  # as the processes exchange them
    assert torch.equal(whole.flatten(0, 1)[:count], alone)


def test_a_fill_that_was_killed_leaves_whole_views_alone(
    data: DataSplit, encoded: list[int], own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "BATCH", 4)
    on = ("FEATURES.MAX_GIB", 1.0, "INPUT.VIEWS", 2)
    expected = [helpers.make_trainer(data).frozen_features["features"].of("train", view) for view in range(2)]
    killed = helpers.make_trainer(data, *on)
    killed.frozen_features["features"].of("train", 0)
    original, left = ImageTower.forward, iter(range(3))

    def dying(self: ImageTower, images: torch.Tensor) -> torch.Tensor:
        if next(left, None) is None:
            raise Killed
        return original(self, images)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(ImageTower, "forward", dying)
        killed.frozen_features["features"].of("train", 1)
    assert len(list(own_cache.iterdir())) == 1
    encoded.clear()
    after = helpers.make_trainer(data, *on).frozen_features["features"]
    assert torch.equal(after.of("train", 0), expected[0]) and encoded == []
    assert torch.equal(after.of("train", 1), expected[1]) and sum(encoded) == len(data.train)


def test_epochs_differ_and_evaluation_does_not(data: DataSplit) -> None:
    frozen = helpers.make_trainer(data).frozen_features["features"]
    assert not torch.equal(frozen.of("train", 0), frozen.of("train", 1))
    assert torch.equal(frozen.of("test", 0), frozen.of("test", 1))


def test_with_views_the_tower_runs_once_a_view_and_other_runs_find_them(data: DataSplit, encoded: list[int]) -> None:
    on = ("FEATURES.MAX_GIB", 1.0)
    first, second, third = map(views_of(helpers.make_trainer(data, *on, "INPUT.VIEWS", 2)), range(3))
    assert torch.equal(first, third) and not torch.equal(first, second) and len(encoded) == 2
    assert torch.equal(views_of(helpers.make_trainer(data, *on))(1), second) and len(encoded) == 2  # an epoch's own is the same


def views_of(trainer: Trainer) -> Callable[[int], torch.Tensor]:
    return functools.partial(trainer.frozen_features["features"].of, "train")


def test_features_are_those_of_the_tower(data: DataSplit) -> None:
    trainer = helpers.make_trainer(data)
    for batch in trainer.batches("train"):
        assert "img" not in batch
        direct = trainer.method.frozen.encode(torch.stack([image(trainer, i) for i in batch["index"].tolist()]))
        torch.testing.assert_close(batch["features"], direct, rtol=0, atol=1e-6)


def image(trainer: Trainer, index: int) -> torch.Tensor:
    from plpp_reg.data.augmentation import build_transform
    from plpp_reg.data.loaders import ImageDataset

    images = ImageDataset(trainer.data.train, build_transform(trainer.cfg, True), trainer.cfg.SEED)
    return images[trainer.state.epoch, index]["img"]


@pytest.mark.parametrize(("cls", "names"), [(IVLP, {"img"}), (PromptSRC, {"img", "features"}), (CoOp, {"features"})])
def test_a_batch_holds_what_its_method_sees(data: DataSplit, cls: type[Method], names: set[str]) -> None:
    node = cls.Config.node
    depths = ("TRAINER.IVLP.PROMPT_DEPTH_VISION", 1, "TRAINER.PROMPTSRC.PROMPT_DEPTH_VISION", 1)
    depths += ("TRAINER.IVLP.PROMPT_DEPTH_TEXT", 2, "TRAINER.PROMPTSRC.PROMPT_DEPTH_TEXT", 2)
    trainer = helpers.make_trainer(data, f"TRAINER.{node}.PREC", "fp32", *depths, cls=cls)
    batch = next(iter(trainer.batches("train")))
    assert batch.keys() == names | {"label", "index"}
    if "features" in names and "img" in names:  # the frozen tower's, of the very same crops
        torch.testing.assert_close(batch["features"], trainer.method.frozen.encode(batch["img"]), rtol=0, atol=1e-6)


def test_a_model_is_more_than_its_tensors() -> None:
    one, two, three = (helpers.tiny_clip().visual for _ in range(3))
    assert weights_sha256(one) == weights_sha256(two)
    two.transformer.resblocks[0].mlp.gelu = torch.nn.GELU()
    three.transformer.resblocks[0].attn.num_heads = 2
    three.proj.mul_(1)  # whoever changes a tensor in place is seen, whatever it was before
    assert len({weights_sha256(m) for m in (one, two, three)}) == 3
    before = weights_sha256(one)
    one.proj.mul_(2)
    assert weights_sha256(one) != before


def test_pictures_of_one_name_in_two_folders_are_two(tmp_path: Path) -> None:
    from plpp_reg.data import Datum

    found = []
    for folder in ("a", "b"):
        path = tmp_path / folder / "0.png"
        path.parent.mkdir()
        path.write_bytes(folder.encode())
        os.utime(path, (1, 1))
        found.append(files_sha256([Datum(str(path), 0, "cat", "0.png")]))
    assert found[0] != found[1]


def test_the_command_shows_what_is_kept_and_clears_it(data: DataSplit, own_cache: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"{own_cache}: 0 files, 0.0 MiB\n"
    trained(data, "FEATURES.MAX_GIB", 1.0)
    kept = sorted(own_cache.iterdir())
    capsys.readouterr()
    (own_cache / ".a.safetensors.1-2.tmp").write_bytes(bytes(2**20))
    (own_cache.parent / "openmoji").mkdir()
    (own_cache.parent / "openmoji" / ".1F600.png.tmp").write_bytes(b"half")
    assert cli.main(["cache"]) == 0
    first, half, last = capsys.readouterr().out.splitlines()
    assert first == f"{own_cache}: {len(kept)} files, {sum(p.stat().st_size for p in kept) / 2**20:.1f} MiB"
    assert half.endswith("1, 1.0 MiB") and "last used 0.0 (the oldest) to 0.0 days ago" in last
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"removed {len(kept)}" and list(own_cache.iterdir()) == []
    assert list((own_cache.parent / "openmoji").iterdir()) == []
