"""Trainers of a miniature checkout: what differs between them is where the loss is made and how it goes back."""

import sys
from pathlib import Path

import torch
from torch.nn import functional as F

from dassl.data import DATASET_REGISTRY, Datum
from dassl.engine import TRAINER_REGISTRY, TrainerX
from dassl.optim import build_lr_scheduler, build_optimizer

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
from helpers.clips import make_clip
from helpers.engine import read_tiny
from mini_hosts import LossInForward, LossInTrainer, SevenReturned, frozen


class Mini(TrainerX):
    host = LossInTrainer

    def build_data_loader(self):
        generator = torch.Generator().manual_seed(0)
        self.train_loader_x = [
            {"img": torch.randn(3, 3, 32, 32, generator=generator), "label": torch.tensor(labels)}
            for labels in ([0, 3, 1], [2, 4, 0])
        ]

    def build_model(self):
        clip_model = make_clip(width=64, layers=2)
        self.model = frozen(self.host(clip_model))
        self.optim = build_optimizer(self.model.prompt_learner, self.cfg.OPTIM)
        self.sched = build_lr_scheduler(self.optim, self.cfg.OPTIM)
        self.register_model("prompt_learner", self.model.prompt_learner, self.optim, self.sched)

    def update(self, loss):
        self.optim.zero_grad()
        loss.backward()
        self.optim.step()


@TRAINER_REGISTRY.register()
class MiniCoOp(Mini):
    """The loss in the trainer."""

    def forward_backward(self, batch):
        output = self.model(batch["img"])
        loss = F.cross_entropy(output, batch["label"])
        self.update(loss)
        return {"loss": loss.item()}


@TRAINER_REGISTRY.register()
class MiniCoCoOp(Mini):
    """The loss in ``forward``, one text pass an image."""

    host = LossInForward

    def forward_backward(self, batch):
        loss = self.model(batch["img"], batch["label"])
        self.update(loss)
        return {"loss": loss.item()}


@TRAINER_REGISTRY.register()
class MiniSRC(Mini):
    """A tuple of seven; returns nothing for the log."""

    host = SevenReturned

    def forward_backward(self, batch):
        loss, texts, fixed, _, _, _, logits = self.model(batch["img"], batch["label"])
        self.update(loss + 25 * F.l1_loss(texts, fixed))


@TRAINER_REGISTRY.register()
class MiniAmp(MiniCoOp):
    """Autocast and a gradient scaler under a name of its own."""

    def build_model(self):
        super().build_model()
        self.amp_scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def forward_backward(self, batch):
        with torch.autocast("cpu", dtype=torch.float16):
            loss = F.cross_entropy(self.model(batch["img"]), batch["label"])
        self.optim.zero_grad()
        self.amp_scaler.scale(loss).backward()
        self.amp_scaler.step(self.optim)
        self.amp_scaler.update()
        return {"loss": loss.item()}


@TRAINER_REGISTRY.register()
class MiniZeroShot(Mini):
    """Learns nothing."""

    def build_model(self):
        self.model = make_clip(width=64, layers=2)

    def train(self):
        print("nothing to train")

    def forward_backward(self, batch):
        raise NotImplementedError


@DATASET_REGISTRY.register()
class MiniData:
    """Pictures of helpers.engine.make_images below ROOT."""

    def __init__(self, cfg):
        parts = read_tiny(cfg.DATASET.ROOT)
        self.train_x, self.val, self.test = (
            [Datum(d.impath, d.label, d.classname) for d in part] for part in (parts.train, parts.val, parts.test)
        )
