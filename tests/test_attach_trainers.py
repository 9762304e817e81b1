"""attach in several processes, and in other libraries' trainers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.multiprocessing
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

from plpp_reg import attach

from helpers.attach import assert_close, gradients, host_loss, make_host, make_regularizer, term
from mini_hosts import LossInTrainer, frozen


def _in_one_of_two(rank, file, host, regularizer, batch, out):
    """A step with DistributedDataParallel, and one with a prompt learner that fully_shard has sharded."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        sharded = copy.deepcopy(host)
        attach(host, regularizer)
        model = nn.parallel.DistributedDataParallel(host)
        images, labels = batch[0][rank : rank + 1], batch[1][rank : rank + 1]
        for _ in range(2):
            host.zero_grad()
            F.cross_entropy(model(images), labels).backward()
        fully_shard(sharded.prompt_learner, mesh=init_device_mesh("cpu", (2,)))
        attach(sharded, regularizer)
        F.cross_entropy(sharded(images), labels).backward()
        whole = sharded.prompt_learner.ctx.grad.full_tensor()
        if rank == 0:
            torch.save([gradients(host), {"prompt_learner.ctx": whole}], out)
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(clip_model, batch, tmp_path):
    regularizer = make_regularizer(clip_model)
    host, other = make_host(clip_model), make_host(clip_model)
    for model in (host, other):
        model.prompt_learner.meta_net.requires_grad_(False)  # unused
    context = torch.multiprocessing.get_context("fork")
    arguments = (str(tmp_path / "rendezvous"), host, regularizer, batch, str(tmp_path / "gradients"))
    processes = [context.Process(target=_in_one_of_two, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    halves = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(2)]
    (sum(host_loss(other, half) for half in halves) / 2 + term(other, regularizer, batch)).backward()
    for got in torch.load(tmp_path / "gradients"):
        assert_close(got, gradients(other))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(clip_model, batch, precision):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    regularizer = make_regularizer(clip_model)
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2, mixed_precision=precision)
    host, other = make_host(clip_model), make_host(clip_model)
    optimizer = torch.optim.SGD([host.prompt_learner.ctx], 1.0)
    model, optimizer = accelerator.prepare(host, optimizer)
    attach(model, regularizer, scaler=accelerator.scaler, loss_scale=1 / accelerator.gradient_accumulation_steps)
    start = host.prompt_learner.ctx.detach().clone()
    for i in range(2):
        part = (batch[0] + i, batch[1])
        with accelerator.accumulate(model):
            accelerator.backward(F.cross_entropy(model(part[0]), part[1]))
            optimizer.step()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            ((host_loss(other, part) + term(other, regularizer, part)) / 2).backward()
    wanted = other.prompt_learner.ctx.grad
    tolerance = 1e-6 if precision == "no" else 2e-2
    assert (start - host.prompt_learner.ctx - wanted).norm() <= tolerance * wanted.norm()


def test_hugging_faces_trainer(clip_model, batch, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class ForTrainer(LossInTrainer):
        def forward(self, images, labels):
            return {"loss": F.cross_entropy(super().forward(images), labels)}

    regularizer = make_regularizer(clip_model)
    host, other = frozen(ForTrainer(clip_model)).train(), make_host(clip_model)
    for model in (host, other):
        model.prompt_learner.meta_net.requires_grad_(False)
    rows = [{"images": image, "labels": label} for image, label in zip(*batch, strict=True)][:2]
    arguments = transformers.TrainingArguments(
        tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=2, max_steps=1, learning_rate=1.0, use_cpu=True,
        optim="sgd", max_grad_norm=0.0, report_to=[], save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    attach(host, regularizer, loss_scale=1 / arguments.gradient_accumulation_steps)
    start = host.prompt_learner.ctx.detach().clone()
    transformers.Trainer(host, arguments, train_dataset=rows).train()
    parts = [(row["images"][None], row["labels"][None]) for row in rows]
    (sum(host_loss(other, part) for part in parts) / 2 + term(other, regularizer, batch)).backward()
    wanted = other.prompt_learner.ctx.grad
    assert (start - host.prompt_learner.ctx - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_lightning(clip_model, batch, tmp_path, precision):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, host):
            super().__init__()
            self.host = host

        def training_step(self, part, index):
            return F.cross_entropy(self.host(part[0]), part[1])

        def configure_optimizers(self):
            return torch.optim.SGD([self.host.prompt_learner.ctx], 1.0)

    regularizer = make_regularizer(clip_model)
    host, other = make_host(clip_model), make_host(clip_model)
    k = 2
    attach(host, regularizer, loss_scale=1 / k)
    start = host.prompt_learner.ctx.detach().clone()
    trainer = lightning.Trainer(
        max_steps=1, accumulate_grad_batches=k, precision=precision, accelerator="cpu", logger=False, default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, barebones=False,
    )  # fmt: skip
    parts = [(batch[0][i : i + 1], batch[1][i : i + 1]) for i in range(k)]
    trainer.fit(Module(host).train(), torch.utils.data.DataLoader(parts, batch_size=None))
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        (sum(host_loss(other, part) for part in parts) / k + term(other, regularizer, batch)).backward()
    wanted = other.prompt_learner.ctx.grad
    tolerance = 1e-6 if precision == "64-true" else 2e-2
    assert (start - host.prompt_learner.ctx - wanted).norm() <= tolerance * wanted.norm()
