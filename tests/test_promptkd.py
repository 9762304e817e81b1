"""PromptKD against a slow, literal reference; its batch norm's statistics; upstream's files; what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from plpp_reg.commands import cli
from plpp_reg.data import DATASETS, DataSplit
from plpp_reg.engine import checkpoint, registry
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.evaluation import Classifier
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.engine.trainer import NonFiniteLoss, Trainer
from plpp_reg.errors import InputError
from plpp_reg.trainers.promptkd import PromptKD

from helpers import distilling as ds
from helpers import engine as helpers
from helpers import literal_methods as lm
from helpers import methods as mh

T, WEIGHT, DEPTH = 2.0, 300.0, 3
SETTINGS = (
    *("TRAINER.PROMPTKD.N_CTX_VISION", 4, "TRAINER.PROMPTKD.PROMPT_DEPTH_VISION", DEPTH),
    *("TRAINER.PROMPTKD.KD_WEIGHT", WEIGHT, "TRAINER.PROMPTKD.TEMPERATURE", T),
)
P = "VPT_image_trans.conv1."
PROMPTS = ["image_encoder.VPT", *(f"image_encoder.transformer.resblocks.{i}.VPT_shallow" for i in range(1, DEPTH))]
SHAPES = {
    **dict.fromkeys(PROMPTS, (4, mh.VISION_WIDTH)),
    P + "0.weight": (ds.TEACHER_WIDTH, mh.EMBED, 1, 1),
    P + "0.bias": (ds.TEACHER_WIDTH,),
    **{P + f"1.{name}": (ds.TEACHER_WIDTH,) for name in ("weight", "bias", "running_mean", "running_var")},
    P + "3.weight": (ds.TEACHER_WIDTH, ds.TEACHER_WIDTH, 1, 1),
    P + "3.bias": (ds.TEACHER_WIDTH,),
}
DEAD = P + "0.bias"  # batch norm takes the mean away: its gradient is rounding


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DATASETS, "tiny", mh.ENTRY)


def build(*opts: object, **more) -> Trainer:
    return ds.build(PromptKD, *SETTINGS, *opts, **more)


class Literal:
    """PromptKD as its code computes it, in float64, image by image; ``p`` under upstream's names, running statistics too."""

    def __init__(self, trainer: Trainer) -> None:
        state = trainer.method.saved.state_dict()
        trained = mh.leaves(trainer)
        self.p = {name: value.double().clone().requires_grad_(name in trained) for name, value in state.items()}
        self.W, self.scale = trainer.teacher.class_features.double(), ds.TEACHER_SCALE
        self.model = mh.exact_clip()

    def features(self, images: Tensor, training: bool) -> Tensor:
        p = self.p
        f = lm.image_tower(self.model, images.double(), lm.visual_prompts(p, DEPTH))
        x = torch.stack([p[P + "0.weight"][:, :, 0, 0] @ row + p[P + "0.bias"] for row in f])
        mean, var = p[P + "1.running_mean"], p[P + "1.running_var"]
        if training:
            n, mean = len(x), sum(x) / len(x)
            var = sum((row - mean) ** 2 for row in x) / n
            with torch.no_grad():  # a tenth of the batch's own, of the variance its unbiased estimate
                for name, new in (("running_mean", mean), ("running_var", var * n / (n - 1))):
                    p[P + "1." + name] = 0.9 * p[P + "1." + name] + 0.1 * new
        x = (x - mean) / (var + 1e-5).sqrt() * p[P + "1.weight"] + p[P + "1.bias"]
        return lm.unit(torch.stack([p[P + "3.weight"][:, :, 0, 0] @ row.clamp(min=0) + p[P + "3.bias"] for row in x]))

    def logits(self, images: Tensor, training: bool = False) -> Tensor:
        return self.model.logit_scale.exp() * self.features(images, training) @ self.W.T

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        student = self.logits(batch["img"], training=True)
        teacher = self.scale * batch["teacher_features"].double() @ self.W.T
        total = 0.0
        for s, t in zip(student, teacher, strict=True):
            log_s, log_t = (s / T).log_softmax(0), (t / T).log_softmax(0)
            total = total + sum(log_t[c].exp() * (log_t[c] - log_s[c]) for c in range(len(s)))
        return WEIGHT * T * T * total / student.numel()


def test_three_steps_are_upstreams_losses_gradients_parameters_and_statistics() -> None:
    trainer = build("OPTIM.WARMUP_EPOCH", -1, "OPTIM.LR", 0.01)
    literal, sgd = Literal(trainer), trainer.cfg.OPTIM
    leaves = {name: value for name, value in literal.p.items() if value.requires_grad}
    optimizer = torch.optim.SGD(leaves.values(), lr=sgd.LR, momentum=sgd.MOMENTUM, weight_decay=sgd.WEIGHT_DECAY)
    for batch in ds.batches(3):
        loss = literal.loss(batch)
        optimizer.zero_grad()
        loss.backward()
        values = trainer.step(batch)
        assert set(values) == {"loss", "kd"} and values["kd"] == pytest.approx(loss.item(), rel=1e-4)
        for name, parameter in mh.leaves(trainer).items():
            if name != DEAD:
                assert mh.difference(parameter.grad, leaves[name].grad) < 1e-4, name
        optimizer.step()
        for name, value in trainer.method.saved.state_dict().items():
            assert name == DEAD or mh.difference(value, literal.p[name].detach()) < 1e-4, name
    for name in ("running_mean", "running_var"):  # they have gone somewhere
        value = trainer.method.saved.state_dict()[P + f"1.{name}"]
        assert (value - float(name == "running_var")).abs().max() > 0.01


def test_a_prediction_goes_by_running_statistics_and_moves_nothing() -> None:
    trainer, (first, batch) = build(), ds.batches(2)
    trainer.step(first)
    before = {name: value.clone() for name, value in trainer.method.saved.state_dict().items()}
    literal = Literal(trainer)
    with torch.no_grad():
        logits = helpers.logits_of(trainer, batch)
        one = helpers.logits_of(trainer, {"img": batch["img"][:1]})  # of a single image too
        assert mh.difference(logits, literal.logits(batch["img"])) < 1e-5
        torch.testing.assert_close(one, logits[:1], rtol=1e-4, atol=1e-4)
        assert mh.difference(logits, literal.logits(batch["img"], training=True)) > 1e-3
    helpers.assert_same(dict(trainer.method.saved.state_dict()), before)


def test_what_is_trained_and_saved_has_upstreams_names_and_shapes() -> None:
    trainer = build()
    state = {name: value.clone() for name, value in trainer.method.saved.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in state.items()} == SHAPES
    assert all(value.dtype == torch.float32 for value in state.values())
    frozen = {name: value.clone() for name, value in trainer.clip_model.state_dict().items()}
    trainer.step(ds.batches(1)[0])
    after = mh.leaves(trainer)
    assert set(after) == {name for name in SHAPES if "running" not in name}
    for name, value in after.items():
        assert name == DEAD or (value.grad.abs().max() > 0 and not value.equal(state[name])), name
    helpers.assert_same(dict(trainer.clip_model.state_dict()), frozen)


def test_the_projector_starts_as_torchs_convolutions_do_and_prompts_as_visual_prompts() -> None:
    cfg = helpers.make_cfg("USE_CUDA", False, "TRAINER.PROMPTKD.PREC", "fp32", *SETTINGS)
    teacher = ds.teacher_of(cfg, mh.NAMES)
    data = mh.no_images(mh.NAMES)
    state = Trainer(PromptKD, cfg, data=data, clip_model=mh.clip_of(), log=helpers.RunLog(quiet=True), teacher=teacher)
    state = state.method.saved.state_dict()
    for layer, inputs in (("0", mh.EMBED), ("3", ds.TEACHER_WIDTH)):
        for name in ("weight", "bias"):
            largest = state[f"{P}{layer}.{name}"].abs().max()
            assert 0.8 * inputs**-0.5 < largest <= inputs**-0.5
    assert state[P + "1.weight"].eq(1).all() and state[P + "1.bias"].eq(0).all()
    assert all(state[name].std().item() == pytest.approx(0.02, rel=0.2) for name in PROMPTS)


def upstreams_file(trainer: Trainer) -> dict[str, Tensor]:
    """What upstream's checkpoint of such a student holds: the whole frozen image tower and batch norm's count as well."""
    generator = torch.Generator().manual_seed(5)
    learned = {
        name: torch.rand(value.shape, generator=generator) + 0.1 for name, value in trainer.method.saved.state_dict().items()
    }
    frozen = {f"image_encoder.{name}": value for name, value in trainer.clip_model.visual.state_dict().items()}
    count = {P + "1.num_batches_tracked": torch.tensor(640)}
    return {**frozen, **learned, **count, "logit_scale": torch.tensor(4.6)}


def test_upstreams_students_load_by_their_names(tmp_path) -> None:
    trainer = build()
    state = upstreams_file(trainer)
    torch.save({"state_dict": state, "epoch": 20}, tmp_path / "student.pth.tar")
    trainer.saving.load_weights(tmp_path / "student.pth.tar")
    loaded = trainer.method.saved.state_dict()
    assert set(loaded) == set(SHAPES)
    for name, value in loaded.items():
        assert value.equal(state[name]), name


def test_a_students_file_of_another_teachers_width_is_refused_with_both_shapes(tmp_path) -> None:
    torch.save({"state_dict": upstreams_file(build(width=48)), "epoch": 20}, tmp_path / "student.pth.tar")
    with pytest.raises(InputError, match=r"expected VPT_image_trans\.conv1\.\S+ of shape \(80,.*got \(48,"):
        build().saving.load_weights(tmp_path / "student.pth.tar")


def test_a_file_without_running_statistics_is_refused(tmp_path) -> None:
    trainer = build()
    state = {name: value for name, value in upstreams_file(trainer).items() if "running_var" not in name}
    torch.save({"state_dict": state, "epoch": 20}, tmp_path / "student.pth.tar")
    with pytest.raises(InputError, match="running_var"):
        trainer.saving.load_weights(tmp_path / "student.pth.tar")


# ---- whole runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory):
    return helpers.make_images(tmp_path_factory.mktemp("images"))


def trained(folder, images, *opts: object, epochs: int = 3) -> Trainer:
    """On the tiny data set's pictures, from a teacher of templates on the same backbone."""
    named = ("DATASET.ROOT", str(images), "OPTIM.MAX_EPOCH", epochs, "TEACHER.TRAINER", "ZeroshotCLIP2")
    cfg = helpers.make_cfg("USE_CUDA", False, "TRAINER.PROMPTKD.PREC", "fp32", *named, *SETTINGS, *opts)
    cfg.TRAINER.NAME, cfg.MODEL.BACKBONE.NAME = "PromptKD", "the student's"
    data = helpers.read_tiny(images)
    trainer = Trainer(PromptKD, cfg, data=data, clip_model=mh.clip_of(), log=helpers.RunLog(quiet=True))
    trainer.saving.output_dir = folder
    return trainer


def test_a_resumed_run_ends_as_one_that_was_never_interrupted_running_statistics_too(tmp_path, images) -> None:
    whole = trained(tmp_path / "whole", images)
    whole.train(tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(trainer: Trainer) -> None:
        if trainer.state.epoch == 3:
            raise Killed

    with pytest.raises(Killed):
        trained(tmp_path / "halved", images).train(tmp_path / "halved", after_epoch=kill)
    resumed = trained(tmp_path / "halved", images)
    assert resumed.saving.resume(tmp_path / "halved") and resumed.state.epoch == 2
    resumed.train(tmp_path / "halved")
    contents = [checkpoint.load(tmp_path / name / "VLPromptLearner" / "model.pth.tar-3") for name in ("whole", "halved")]
    for content in contents:
        content["plpp_reg"].pop("seconds")
    helpers.assert_same(*contents)
    assert contents[0]["state_dict"][P + "1.running_mean"].abs().max() > 0.001
    assert [row["kd"] for row in whole.state.history] == [row["kd"] for row in resumed.state.history]
    evaluated = trained(tmp_path / "new", images)
    evaluated.saving.load_model(tmp_path / "whole")
    with torch.no_grad():
        for batch in whole.batches("test"):
            assert Classifier(whole.method)(batch).equal(Classifier(evaluated.method)(batch))


def test_labels_reach_nothing_and_all_images_and_classes_are_seen(tmp_path, images) -> None:
    trainer = trained(tmp_path, images)
    trainer.cfg.DATALOADER.TRAIN_X.BATCH_SIZE = 5
    seen = list(trainer.batches("train"))
    assert all(set(batch) == {"img", "index", "teacher_features"} for batch in seen)
    assert sorted(i for batch in seen for i in batch["index"].tolist()) == list(range(25))
    assert len(trainer.method.classnames) == 5
    other = helpers.read_tiny(images)
    relabelled = DataSplit([d._replace(label=(d.label + 1) % 5) for d in other.train], other.val, other.test, other.classnames)
    same = Trainer(PromptKD, trainer.cfg, data=relabelled, clip_model=mh.clip_of(), log=helpers.RunLog(quiet=True))
    assert [trainer.step(batch) for batch in seen] == [same.step(batch) for batch in same.batches("train")]


def test_half_the_teachers_classes_are_half_of_its_features(tmp_path, images) -> None:
    """As upstream slices them: what a base or a new test compares with is what was trained on, of its classes."""
    trainer = trained(tmp_path, images)
    data = helpers.read_tiny(images)
    part = DataSplit(data.train, data.val, data.test, data.classnames[3:])
    new = Trainer(PromptKD, trainer.cfg, data=part, clip_model=mh.clip_of(), log=helpers.RunLog(quiet=True))
    with torch.no_grad():
        ours, whole = new.method.encode_classes().features, trainer.method.encode_classes().features
    torch.testing.assert_close(ours, whole[3:], rtol=1e-4, atol=1e-5)


def test_a_teachers_logits_are_float32_under_autocast_too() -> None:
    teacher, features = build().teacher, ds.unit(6, ds.TEACHER_WIDTH, seed=2)
    want = ds.TEACHER_SCALE * features @ teacher.class_features.T
    with torch.autocast("cpu", torch.bfloat16):
        assert teacher.logits(features).equal(want)


# ---- without prompts, without projector ----------------------------------------------------------------------------------


def test_without_prompts_the_frozen_towers_features_are_kept_and_no_pixels_asked_for() -> None:
    trainer = build("TRAINER.PROMPTKD.N_CTX_VISION", 0)
    inputs = trainer.method.inputs
    assert not inputs.pixels and set(inputs.of("train")) == {"features", "teacher_features"}
    assert set(inputs.of("test")) == {"features"}
    assert {name.partition(".")[0] for name in mh.leaves(trainer)} == {"VPT_image_trans"}
    batch = ds.batches(1)[0]
    batch["features"] = ds.unit(6, mh.EMBED, seed=3)
    assert trainer.step(batch)["kd"] > 0


def test_without_projector_the_features_are_the_prompted_towers() -> None:
    trainer = build("TRAINER.PROMPTKD.PROJECTOR", False, width=mh.EMBED)
    assert set(mh.leaves(trainer)) == set(PROMPTS)
    (batch,) = ds.batches(1, width=mh.EMBED)
    prompts = [value.double() for value in mh.leaves(trainer).values()]
    want = lm.unit(lm.image_tower(mh.exact_clip(), batch["img"].double(), prompts))
    with torch.no_grad():
        assert mh.difference(trainer.method.image_features(batch), want) < 1e-5
    assert trainer.step(batch)["kd"] > 0


@pytest.mark.parametrize("precision", ["bf16", "amp"])
def test_half_precision_is_near_float32_and_what_is_trained_stays_float32(precision: str) -> None:
    def made(asked: str) -> Trainer:
        return build("TRAINER.PROMPTKD.PREC", asked, "OPTIM.LR", 0.002, clip_model=mh.clip_of(asked))

    ds.assert_half_precision_is_near_float32(made, ds.batches(3), precision)


# ---- refusals ------------------------------------------------------------------------------------------------------------


def test_a_batch_of_one_is_refused() -> None:
    with pytest.raises(InputError, match=r"^DATALOADER\.TRAIN_X\.BATCH_SIZE: expected at least 2, .*batch norm.* got 1$"):
        build("DATALOADER.TRAIN_X.BATCH_SIZE", 1)
    build("DATALOADER.TRAIN_X.BATCH_SIZE", 1, "TRAINER.PROMPTKD.PROJECTOR", False, width=mh.EMBED)


def test_a_single_training_image_is_refused() -> None:
    data = mh.no_images(mh.NAMES)
    one = DataSplit(data.train[:1], data.val, data.test, data.classnames)
    with pytest.raises(InputError, match=r"expected at least 2 images for training, .*got 1$"):
        build(data=one)


def test_one_class_is_refused() -> None:
    with pytest.raises(InputError, match=r"^PromptKD: expected at least 2 classes, .*got 1$"):
        build(names=["cat"])


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plpp_reg.engine.method.current", lambda: Ranks(0, 2))
    with pytest.raises(InputError, match=r"^PromptKD: expected one process, .*batch norm.*got 2"):
        build()


def test_a_resnet_student_is_refused_unless_it_has_no_prompts() -> None:
    with pytest.raises(InputError, match=r"^visual prompts: expected a backbone with a vision transformer .*got a ResNet$"):
        build(clip_model=mh.clip_of(resnet=True))
    build("TRAINER.PROMPTKD.N_CTX_VISION", 0, clip_model=mh.clip_of(resnet=True))


def test_features_of_different_widths_need_a_projector() -> None:
    with pytest.raises(InputError, match=r"PROJECTOR: expected True between features 96 and 80 wide, got False$"):
        build("TRAINER.PROMPTKD.PROJECTOR", False)


def test_a_weight_without_bounds_stops_with_the_losss_name() -> None:
    trainer = build("TRAINER.PROMPTKD.KD_WEIGHT", 1e39)
    with pytest.raises(NonFiniteLoss, match=r"^loss 'kd' is inf in epoch 1, batch 1"):
        trainer.step(ds.batches(1)[0])


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(InputError, match=r"expected visual prompts .* or PROJECTOR, got neither$"):
        build("TRAINER.PROMPTKD.PROJECTOR", False, "TRAINER.PROMPTKD.N_CTX_VISION", 0, width=mh.EMBED)


@pytest.mark.parametrize(
    ("key", "bad"), [("TEMPERATURE", 0.0), ("KD_WEIGHT", -1.0), ("PROMPT_DEPTH_VISION", mh.VISION_LAYERS + 1)]
)
def test_settings_out_of_their_range_are_refused(key: str, bad: float) -> None:
    with pytest.raises(InputError, match=rf"{key}: expected "):
        build(f"TRAINER.PROMPTKD.{key}", bad)


def test_plpp_is_its_teachers(capsys: pytest.CaptureFixture) -> None:
    for arguments in (
        RunArguments(trainer="PromptKD_PLPP"),
        RunArguments(trainer="PromptKD", opts=("TRAINER.PLPP.ENABLED", "True")),
    ):
        with pytest.raises(InputError, match="^PromptKD_PLPP: .* PLPP trains its teacher, so use PromptKD with TEACHER"):
            resolve(arguments)
    assert cli.main(["train", "--trainer", "PromptKD_PLPP"]) == 2
    assert "PLPP trains its teacher" in capsys.readouterr().err
    assert "PromptKD_PLPP" not in registry.trainer_names() and "PromptKD" in registry.trainer_names()
