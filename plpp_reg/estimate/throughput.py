"""How fast this machine runs CLIP's blocks: real blocks with random weights, at a run's shapes, timed in a second or two.

A probe is the tower itself with few layers, over so much of the work that a forward pass takes :data:`PROBE` operations: the
same widths, heads and prefix, and as many rows together as there is room for. Its operations (operations.py) over
its seconds are a throughput, with everything in it that is not a matrix product.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.clip.load import freeze, openai_clip, set_precision
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.tree import build_tree
from plpp_reg.clip.vision import ImageTower
from plpp_reg.estimate.operations import Cost, image_cost, text_cost

PROBE = {"cpu": 1e10, "cuda": 1e12}  # operations of a probe's forward pass: a tenth of a second on two cores
LAYERS = 3  # of a probe; of the last one few rows are read, as in the run
REPEATS = 3


class Machine(NamedTuple):
    """What is timed: a device, the context under which it computes (autocast or nothing), a clock in seconds."""

    device: torch.device
    computing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    clock: Callable[[], float] = time.perf_counter

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock()

    def seconds(self, work: Callable[[], object]) -> float:
        """Of the fastest of a few times, after one to warm up: what else the machine does is not the run's."""
        work()
        times = []
        for _ in range(REPEATS):
            start = self.now()
            work()
            times.append(self.now() - start)
        return min(times)


class Throughput(NamedTuple):
    """Operations a second: forward in evaluation, forward that keeps what backward needs, backward. inf: not timed."""

    inference: float
    forward: float = float("inf")
    backward: float = float("inf")

    def seconds(self, cost: Cost, backwards: int) -> float:
        """Of a pass whose gradient is asked for ``backwards`` times.

        Raises:
            ValueError: there is a backward pass, and none was timed: over inf it would cost nothing.
        """
        if not backwards:
            return cost.forward / self.inference
        if math.isinf(self.forward) or math.isinf(self.backward):
            raise ValueError("expected a throughput of passes that learn, got one of inference alone")
        return cost.forward / self.forward + backwards * cost.backward / self.backward


def text_throughput(
    tower: TextTower, prompts: Sequence[Sequence[int]], n_ctx: int, machine: Machine, groups: int = 1, learns: bool = True
) -> Throughput:
    """Of a text tower of ``tower``'s sizes, whose tensors need no numbers.

    Args:
        tower: the sizes.
        prompts: symbols of each prompt, SOS to EOT; evenly spaced ones are run.
        n_ctx: context vectors a prompt.
        machine: what is timed.
        groups: number G of contexts at once.
        learns: whether forward and backward of a training step are timed as well.
    """
    width, heads = tower.ln_final.weight.shape[0], tower.resblocks[0].attn.num_heads
    layers = min(LAYERS, len(tower.resblocks))
    room = int(PROBE[machine.device.type] / (24 * width**2 * layers))  # rows
    whole = build_tree(prompts, n_ctx)
    own = whole.positions - whole.prefix_length
    together = min(own, tower.max_nodes(groups))
    groups = min(groups, max(1, room // together))
    step = -(-own // max(1, min(room // groups, together)))
    tree = build_tree(prompts[::step], n_ctx).to(machine.device)

    small = nn.Module()
    small.transformer = openai_clip().model.Transformer(width, layers, heads)
    small.token_embedding = nn.Embedding.from_pretrained(torch.zeros(tower.token_embedding.weight.shape))
    small.positional_embedding = nn.Parameter(torch.randn(tower.positional_embedding.shape))
    small.ln_final = nn.LayerNorm(width)
    small.text_projection = nn.Parameter(torch.randn(tower.text_projection.shape))
    probe = TextTower(set_precision(freeze(small), tower.dtype).to(machine.device), float("inf"))
    slots = 1 + max((-1 - symbol for prompt in prompts for symbol in prompt), default=-1)
    context = torch.randn(groups, max(slots, 0), width, device=machine.device, requires_grad=learns)
    cost = text_cost(probe, tree, groups, need_hidden=False)
    return _timed(lambda: probe(tree, context, need_hidden=False).features, cost, learns, machine)


def image_throughput(
    tower: ImageTower, machine: Machine, images: int = 1, prompts: int = 0, learns: bool = False
) -> Throughput:
    """Of an image tower of ``tower``'s sizes, whose tensors need no numbers.

    Args:
        tower: the sizes. A ResNet's probe has one block a stage.
        machine: what is timed.
        images: number B of images at once, of which as many are run as there is room for.
        prompts: visual prompts a layer.
        learns: whether forward and backward of a training step are timed as well; a ResNet has none.
    """
    visual, model = tower.visual, openai_clip().model
    out, side = visual.output_dim, visual.input_resolution
    small = nn.Module()
    if tower.is_transformer:
        heads, patch = visual.transformer.resblocks[0].attn.num_heads, visual.conv1.kernel_size[0]
        small.visual = model.VisionTransformer(side, patch, tower.width, min(LAYERS, tower.depth), heads, out)
    else:
        width = visual.layer1[0].conv1.out_channels
        small.visual = model.ModifiedResNet((1, 1, 1, 1), out, visual.attnpool.num_heads, side, width)
    probe = ImageTower(set_precision(freeze(small), tower.dtype).to(machine.device))
    room = PROBE[machine.device.type] / image_cost(probe, 1, prompts).forward
    images = max(1, min(images, int(room)))
    pixels = torch.randn(images, 3, side, side, device=machine.device)
    rows = torch.randn(prompts, tower.width, device=machine.device, requires_grad=learns) if prompts else None
    return _timed(lambda: probe(pixels, rows), image_cost(probe, images, prompts, learns), learns, machine)


def _timed(run: Callable[[], Tensor], cost: Cost, learns: bool, machine: Machine) -> Throughput:
    with machine.computing():
        with torch.no_grad():
            inference = cost.forward / machine.seconds(run)
        if not learns:
            return Throughput(inference)
        forward = machine.seconds(run)
        both = machine.seconds(lambda: run().sum().backward())
    # a backward pass that others disturbed less than its forward pass would have no time left
    return Throughput(inference, cost.forward / forward, cost.backward / max(both - forward, both / 10))
