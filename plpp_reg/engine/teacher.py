"""A teacher: any method of ours with its weights, from which others learn without labels. What it says is computed once.

Its class features are encoded when its weights are in, and kept (:class:`plpp_reg.io.store.TensorStore`); its image features,
not its logits, come as any frozen encoder's do (plpp_reg/engine/features.py). Both are kept by what they depend on, which is
known without loading it: once a store has them, the teacher is not loaded at all.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from plpp_reg.clip.load import OPEN_CLIP, load_clip, weights_file, without_autocast
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.data import Datum, template
from plpp_reg.data.contents import contents_sha256
from plpp_reg.data.templates import SEVEN, SIXTY
from plpp_reg.engine import checkpoint, config
from plpp_reg.engine.backbone import check_input, computing
from plpp_reg.engine.distributed import Ranks
from plpp_reg.engine.features import arithmetic, feature_store
from plpp_reg.engine.frozen import FrozenEncoder, code_sha256, normalize, tensors_sha256, weights_sha256
from plpp_reg.engine.method import Backbone, Method
from plpp_reg.engine.named_teacher import Named, method_name, of_run, of_trainer, settings_of_effect
from plpp_reg.engine.taught import Known, apart_from_data, known_of, label_of
from plpp_reg.errors import InputError

VERSION = 1  # of the class features: raise it when the text tower changes by a bit
OWN_INPUT = ("SIZE", "PIXEL_MEAN", "PIXEL_STD")


class Loaded(NamedTuple):
    """A teacher with its weights."""

    method: Method
    encoder: FrozenEncoder
    input: dict[str, Any]  # keys of INPUT as its images have them


class Spoken(NamedTuple):
    """What is kept of a teacher."""

    class_features: Tensor  # (C, E_t) normalised, float32
    scale: Tensor  # of its cosines: exp(logit_scale)
    encoder: dict[str, Any]  # as its image encoder describes itself
    input: dict[str, Any]  # keys of INPUT as its images have them


class Teacher:
    """The teacher that ``cfg.TEACHER`` names, around the class names of a student. Nothing is read before it is asked for.

    Args:
        cfg: the student's configuration.
        classnames: C names.
        precision, device: the student's, in which the teacher computes too.
        clip_model: the student's CLIP, which serves a teacher on the same backbone.
        say: where a line for the log goes.
        known: what a checkpoint keeps of it; of those classes it is then not asked.
    """

    def __init__(
        self,
        cfg: CfgNode,
        classnames: Sequence[str],
        precision: str = "fp32",
        device: torch.device | str = "cpu",
        clip_model: nn.Module | None = None,
        say: Callable[[str], object] = lambda line: None,
        known: Known | None = None,
    ) -> None:
        self.cfg, self.classnames, self.say = cfg, list(classnames), say
        self.known = known.of(self.classnames) if known is not None else None
        self.precision, self.device, self.student = precision, torch.device(device), clip_model
        self.encoder = TeacherEncoder(self)

    # ---- what a student reads ------------------------------------------------------------------------------------

    @functools.cached_property
    def class_features(self) -> Tensor:
        """(C, E_t), normalised, float32, on the device; encoded after the teacher's weights were loaded."""
        return (self.known or self.spoken).class_features.to(self.device)

    @functools.cached_property
    def scale(self) -> Tensor:
        """The teacher's own factor of cosines, a scalar on the device."""
        return (self.known or self.spoken).scale.to(self.device)

    def logits(self, features: Tensor, scale: Tensor | None = None) -> Tensor:
        """Its features of images, (B, E_t) normalised -> (B, C): cosines times its own scale, or another's."""
        with without_autocast(features.device):
            return (self.scale if scale is None else scale) * features @ self.class_features.t()

    def heard(self) -> Known:
        """What a student's checkpoint keeps of it."""
        return Known(self.classnames, self.class_features.cpu(), self.scale.cpu())

    # ---- what is known of it without loading it ------------------------------------------------------------------

    @functools.cached_property
    def named(self) -> Named:
        """
        Raises:
            InputError: TEACHER names none, or one that cannot teach.
        """
        node, streams = self.cfg.TEACHER, checkpoint.random_streams()
        try:
            named = of_run(node) if node.RUN else of_trainer(node, self.cfg)
        finally:
            checkpoint.restore_random_streams(streams)
        cfg = named.cfg
        cfg.DATASET, cfg.MODEL.TEXT_MEMORY_MIB = self.cfg.DATASET.clone(), self.cfg.MODEL.TEXT_MEMORY_MIB
        cfg.TRAINER.PLPP.ENABLED = False  # of no effect on what it says
        return named

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What a record says of it, which is the method, backbone, settings, weights by their hash, and the classes that it was
        trained on (None: its file does not say). Where its files lie is not among it."""
        named = self.named
        return {
            "trainer": method_name(named.cfg),
            "backbone": named.cfg.MODEL.BACKBONE.NAME,
            "settings": named.settings,
            "sha256": named.learned_sha256,
            "classnames": named.trained_on,
        }

    @property
    def label(self) -> str:
        """:attr:`identity` in a few words, and its hash, as in ``PromptSRC on ViT-L/14 (0123456789ab)``."""
        return label_of(self.identity)

    def check_same(self, taught_by: object) -> None:
        """Whether it is the teacher that a student learned from whose predictions ask it.

        Args:
            taught_by: :attr:`identity` as the student's checkpoint has it; None: it does not say.

        Raises:
            InputError: it is another one, or has other weights now.
        """
        if self.known is not None or not isinstance(taught_by, dict):
            return
        before, now = (apart_from_data(who, self.named.cls.Config) for who in (taught_by, self.identity))
        if before != now:
            changed = ", ".join(key for key in now if before.get(key) != now[key])
            raise InputError(
                f"TEACHER: expected the one that this student learned from, {label_of(taught_by)}, of which it knows other "
                f"classes than these, got {self.label} (another {changed})"
            )

    def check_unseen(self, new: Sequence[str], every: Sequence[str]) -> None:
        """Whether classes that a protocol measures as new are new to the teacher.

        Args:
            new: their names.
            every: the names of all classes of that data set.

        Raises:
            InputError: it was trained on some of them.
        """
        trained_on = self.named.trained_on
        if trained_on is None:
            self.say(
                "TEACHER.WEIGHTS: unknown classes: the file does not say on which it was trained, new ones may be among them"
            )
        elif seen := [name for name in new if name in set(trained_on)]:
            if set(trained_on) <= set(every):
                raise InputError(
                    f"TEACHER: expected one that was trained on the base classes alone, got one that has seen {len(seen)} of "
                    f"{len(new)} new ones ({seen[0]!r}, …)"
                )
            self.say(
                f"TEACHER: it was trained on other data, among whose classes are {len(seen)} of {len(new)} new ones "
                f"({seen[0]!r}, …)"
            )

    # ---- what it says, kept --------------------------------------------------------------------------------------

    @functools.cached_property
    def spoken(self) -> Spoken:
        """What is kept of it, or else, loaded, it says."""
        store = feature_store(self.cfg.FEATURES.MAX_GIB)
        what = self._described()
        if what is not None and (found := store.find(what)) is not None:
            about = json.loads(bytes(found["about"].tolist()))
            return Spoken(found["class_features"], found["scale"], about["encoder"], _as_input(about["input"]))
        spoken = self._ask()
        about = json.dumps({"encoder": spoken.encoder, "input": spoken.input}).encode()
        tensors = {"about": torch.frombuffer(bytearray(about), dtype=torch.uint8)}
        if (what := self._described()) is not None:  # once more: its backbone may have been downloaded meanwhile
            store.keep(what, {**tensors, "class_features": spoken.class_features, "scale": spoken.scale})
        return spoken

    def _described(self) -> dict[str, Any] | None:
        """Everything that a bit of what is kept depends on; None where that is not known without loading it."""
        named = self.named
        backbone = self._backbone_described(named.cfg.MODEL.BACKBONE.NAME)
        if backbone is None:
            return None
        return {
            "what": "class features of a teacher",
            "version": VERSION,
            "method": f"{named.cls.__module__}.{named.cls.__qualname__}",
            "code": [*code_sha256(named.cls, Method), *code_sha256(MethodEncoder, FrozenEncoder)],
            "settings": named.settings,
            "templates": [template(named.cfg.DATASET.NAME, named.cfg.DATASET.TEMPLATE), *SEVEN, *SIXTY],
            "learned": named.learned_sha256,
            "backbone": backbone,
            "classnames": self.classnames,
            "text_memory_mib": named.cfg.MODEL.TEXT_MEMORY_MIB,
            "input": {key: list(named.cfg.INPUT[key]) for key in OWN_INPUT},
            **arithmetic(self.precision, self.device),
        }

    def _backbone_described(self, name: str) -> dict[str, str] | None:
        if self._is_the_students(name):
            return {"weights": weights_sha256(self.student)}
        if (file := weights_file(name)) is None:
            return None
        described = {"name": name, "file": contents_sha256([Datum(str(file), 0, "", "weights")])}
        # which also says how a model of its names is built
        return {**described, "open_clip": metadata.version("open_clip_torch")} if name.startswith(OPEN_CLIP) else described

    def _is_the_students(self, name: str) -> bool:
        return self.student is not None and name == self.cfg.MODEL.BACKBONE.NAME

    @torch.no_grad()
    def _ask(self) -> Spoken:
        method, encoder, own_input = self.loaded
        with computing(self.device, self.precision):
            class_features = method.encode_classes().features.float().cpu()
        if not class_features.isfinite().all():
            raise InputError(f"TEACHER: expected finite class features, {self.label} gave others")
        scale = method.clip.model.logit_scale.detach().float().exp().cpu()
        return Spoken(class_features, scale, encoder.described(), own_input)

    # ---- the teacher itself --------------------------------------------------------------------------------------

    @functools.cached_property
    def loaded(self) -> Loaded:
        """Ready, for the student's class names; the random streams are left as they are.

        The image encoder is the frozen tower of its backbone where the method learned nothing of it: its features are then
        shared with every run on that backbone.

        Raises:
            InputError: its weights or its images do not fit its backbone, or belong to other classes.
        """
        named, streams = self.named, checkpoint.random_streams()
        cls, weights, trained_on = named.cls, named.weights, named.trained_on
        cfg = named.cfg.clone()
        try:
            model = self._backbone(cfg)
            towers = Backbone(model, TextTower(model, cfg.MODEL.TEXT_MEMORY_MIB), ImageTower(model))
            content = checkpoint.load(weights) if weights is not None else {}
            own = None
            if cls.distils:
                at = self.precision, self.device, model, self.say
                own = Teacher(cfg, self.classnames, *at, known=known_of(content) if cls.predicts_by_teacher else None)
                if cls.predicts_by_teacher:
                    own.check_same((content.get("plpp_reg") or {}).get("teacher"))
            method = cls(named.config, towers, self.classnames, teacher=own)
            method.ranks = Ranks()  # each process has all of it
            if weights is not None:
                if trained_on not in (None, self.classnames) and (reason := method.bound_to_classes):
                    raise InputError(f"TEACHER: {reason}")
                checkpoint.load_weights(method.saved, content["state_dict"], weights, method.not_loaded, method.optional)
        finally:
            checkpoint.restore_random_streams(streams)
        self.say(f"Teacher: {self.label}")
        method.requires_grad_(False).eval()
        encoder = MethodEncoder(method) if method.not_exported else method.frozen
        return Loaded(method, encoder, {key: cfg.INPUT[key] for key in OWN_INPUT})

    def _backbone(self, cfg: CfgNode) -> nn.Module:
        """The CLIP that ``cfg`` names; where a method was named, ``cfg``'s images become as that one has them."""
        name = cfg.MODEL.BACKBONE.NAME
        if self._is_the_students(name):
            model = self.student
        else:
            self.say(f"Loading the teacher's CLIP (backbone: {name}, {self.precision} on {self.device})")
            model = load_clip(name, self.precision, self.device)
        if not self.cfg.TEACHER.RUN:  # a run says how its images were; of a method it is its backbone that does
            own = {"INPUT.SIZE": (model.visual.input_resolution,) * 2}
            own |= {f"INPUT.{key.upper()}": list(getattr(model, key, None) or ()) for key in ("pixel_mean", "pixel_std")}
            for key, value in own.items():
                if value and key not in self.cfg.TEACHER.OPTS[::2]:
                    config.set_value(cfg, key, value)
        check_input(cfg, model)
        return model


class TeacherEncoder(FrozenEncoder):
    """A teacher's image encoder, loaded when the first image is to be encoded and not before."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    @property
    def tower(self) -> ImageTower:
        return self.teacher.loaded.encoder.tower

    @property
    def width(self) -> int:
        return self.teacher.class_features.shape[1]

    @property
    def input(self) -> Mapping[str, Any]:
        return self.teacher.spoken.input

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E_t), normalised."""
        return self.teacher.loaded.encoder.encode(images)

    @property
    def key(self) -> dict[str, Any]:
        return self.described()

    def described(self) -> dict[str, Any]:
        """As the encoder describes itself whose features these are."""
        return self.teacher.spoken.encoder


class MethodEncoder(FrozenEncoder):
    """The image features of a method that learned something of them, prompts of the image tower, say."""

    def __init__(self, method: Method) -> None:
        super().__init__(method.clip.image)
        self.method = method

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, E_t), normalised."""
        return normalize(self.method.image_features({"img": images}))

    @property
    def key(self) -> dict[str, Any]:
        method = self.method
        return {
            **super().key,
            "method": f"{type(method).__module__}.{type(method).__qualname__}",
            "method_code": code_sha256(type(method), Method),
            "settings": settings_of_effect(method.config),
            "learned": tensors_sha256(method.saved.state_dict()),
        }


def _as_input(kept: Mapping[str, Any]) -> dict[str, Any]:
    return {**kept, "SIZE": tuple(kept["SIZE"])}
