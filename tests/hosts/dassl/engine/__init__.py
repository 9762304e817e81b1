import os

import torch

from dassl.utils import Registry, load_checkpoint, save_checkpoint

TRAINER_REGISTRY = Registry("TRAINER")


def build_trainer(cfg):
    names = TRAINER_REGISTRY.registered_names()
    if cfg.TRAINER.NAME not in names:
        raise ValueError(f"The requested {cfg.TRAINER.NAME} does not belong to {names}")
    return TRAINER_REGISTRY.get(cfg.TRAINER.NAME)(cfg)


class TrainerX:
    def __init__(self, cfg):
        self.cfg, self.epoch, self.scalars = cfg, 0, []
        self._models, self._optims, self._scheds = {}, {}, {}
        self.build_data_loader()
        self.build_model()

    def register_model(self, name, model, optim, sched):
        self._models[name], self._optims[name], self._scheds[name] = model, optim, sched

    def set_model_mode(self, mode):
        for model in self._models.values():
            model.train(mode == "train")

    def write_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def train(self):
        start = self.resume() if self.cfg.RESUME else 0
        for epoch in range(start, self.cfg.OPTIM.MAX_EPOCH):
            self.epoch = epoch
            self.set_model_mode("train")
            self.num_batches = len(self.train_loader_x)
            for batch_idx, batch in enumerate(self.train_loader_x):
                self.batch_idx = batch_idx
                summary = self.forward_backward(batch)
                for name, value in (summary or {}).items():
                    self.write_scalar(f"train/{name}", value, self.epoch * self.num_batches + self.batch_idx)
            figures = " ".join(f"{name} {value:.4f}" for name, value in (summary or {}).items())
            lr = next(iter(self._optims.values())).param_groups[0]["lr"]
            print(f"epoch {self.epoch + 1} {figures} lr {lr:.6e}")
            for sched in self._scheds.values():
                sched.step()
            self.save()
        self.test()

    @torch.no_grad()
    def test(self):
        self.set_model_mode("eval")
        logits = torch.cat([self.model(batch["img"]) for batch in self.train_loader_x])
        print(f"test: mean logit {logits.mean():.6f}")

    def save(self):
        for name, model in self._models.items():
            state = {"state_dict": model.state_dict(), "epoch": self.epoch + 1}
            state |= {"optimizer": self._optims[name].state_dict(), "scheduler": self._scheds[name].state_dict()}
            save_checkpoint(state, os.path.join(self.cfg.OUTPUT_DIR, name))

    def resume(self):
        for name, model in self._models.items():
            folder = os.path.join(self.cfg.RESUME, name)
            with open(os.path.join(folder, "checkpoint")) as file:
                content = load_checkpoint(os.path.join(folder, file.read().strip()))
            model.load_state_dict(content["state_dict"])
            self._optims[name].load_state_dict(content["optimizer"])
            self._scheds[name].load_state_dict(content["scheduler"])
        return content["epoch"]
