"""What a pass through a tower costs: floating-point operations, and bytes that live; from shapes alone.

Letters beside those of DESIGN section 1 (``B`` images, ``C`` classes, ``D`` width): ``l`` layers, ``H`` heads, ``G`` contexts
at once (1, or B in CoCoOp), ``p`` positions of the shared prefix, ``N`` nodes of a chunk, ``n`` prompts of equal length ``L``,
``R`` rows that are read after the last layer, ``E`` the features' width, ``W`` the image tower's. A multiply-add is two
operations; sums, norms and activations are left out, as torch's FlopCounterMode has it: their time is in the measured
throughput.

Forward. A block's linear maps take ``24 D^2`` a row (queries 2, keys and values 4, output 2, MLP 16); attention of a row to
``s`` positions takes ``4 D s`` (scores and weighted sum). Of the last layer keys and values are needed of all rows, the rest
of R::

    prefix  G ((l - 1) (24 D^2 p + 4 D p^2)  +  4 D^2 p  +  20 D^2 R + 4 D R^2)
    chunk   G ((l - 1) (24 D^2 N + 4 D sum nL (p + L))  +  4 D^2 N  +  20 D^2 R + 4 D sum nr (p + L)  +  2 n D E)
    images  2 B patches 3 patch^2 W  +  the prefix's  +  2 B W E

the last with G = B, D = W, p = 1 + patches + prompts and R = 1, a row that sees all p.

Backward. The weights are frozen, so a linear map's costs what its forward does, and attention's twice its forward. Where
nothing learned stands in a chunk's first layer, its queries, keys and values have no gradient (``6 D^2`` a row less); a prefix
in which nothing learned stands has none at all. A chunk that is one of several runs forward once more. Of images without
visual prompts nothing runs backward.

Bytes. A full layer keeps ``14 D`` numbers a row for backward: ``10 D`` a node (both residual states, twice the MLP's ``4 D``),
``4 D`` a position of a path (queries twice, keys, values; of a chain and of images attention's output is the fourth), and in a
chunk the attention's weights, ``H (p + L)`` a row. What leaves the text tower, ``G (C E + R D)``, lives three times: a chunk's
part, in order, normalised. While a layer runs, in either direction, up to ``15 D`` numbers a row live beside all that: three of
the MLP's ``4 D`` and what the residual stream is at. Where nothing is kept for backward it is ``20 D``: the layer's queries,
keys, values, input and its norm, which else are among what is kept, live until the layer is through.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from plpp_reg.clip.text import TextTower
from plpp_reg.clip.tree import Chunk, PromptTree
from plpp_reg.clip.vision import ImageTower

KEPT_NODE, KEPT_PATH = 10, 4  # widths a row and layer; tests/test_operations.py compares them with what autograd keeps
WORKING = 15  # widths a row while a layer runs, over what is kept
WORKING_ALONE = 20  # the same where nothing is kept


class Cost(NamedTuple):
    """Operations of the forward pass and of one backward pass; bytes kept in between, more while a layer runs, and more in
    backward, where a chunk is made again."""

    forward: float = 0.0
    backward: float = 0.0
    kept: float = 0.0
    working: float = 0.0
    again: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """One after the other: what is kept adds up, what lives for a moment does not."""
        operations = self.forward + other.forward, self.backward + other.backward
        return Cost(*operations, self.kept + other.kept, max(self.working, other.working), max(self.again, other.again))


def most_kept(passes: Sequence[Cost]) -> float:
    """Bytes that passes one after the other hold at most: all of them when the last is through, or, on the way back, the first
    few and a chunk of the last of those again."""
    held = [0.0, *itertools.accumulate(cost.kept for cost in passes)]
    return max([held[-1], *(so_far + cost.again for so_far, cost in zip(held[1:], passes, strict=True))])


def text_cost(tower: TextTower, tree: PromptTree, groups: int = 1, need_hidden: bool = True, learns: bool = True) -> Cost:
    """A pass of :class:`plpp_reg.clip.text.TextTower` over ``tree``; the formulae stand above.

    Args:
        tower: the tower; its tensors need no numbers.
        tree: the prompts, on any device.
        groups: number G of contexts at once.
        need_hidden: whether the states that precede context vectors are read.
        learns: whether something is kept for a backward pass.
    """
    prefix = _chain(tower, tree.prefix_length, tree.prefix_reads if need_hidden else 0, groups)
    if not len(tree.prefix.context_node):  # frozen words alone
        prefix = prefix._replace(backward=0.0, kept=0.0)
    chunks = [_chunk(tower, chunk, tree, groups, need_hidden) for chunk in tree.chunks]
    suffixes = Cost(*(sum(values) for values in zip(*chunks, strict=True)))
    several = len(chunks) > 1
    kept, again = (0.0, max(c.kept for c in chunks)) if several else (suffixes.kept, 0.0)
    states = tree.before.numel() * tower.ln_final.weight.shape[0] if need_hidden else 0
    leaves = 3 * _bytes(tower.dtype) * groups * (len(tree.order) * tower.text_projection.shape[1] + states)
    cost = Cost(
        prefix.forward + suffixes.forward,
        prefix.backward + suffixes.backward + (suffixes.forward if several else 0),
        prefix.kept + kept + leaves,
        max(prefix.working, *(c.working for c in chunks)),
        again,
    )
    return cost if learns else _alone(cost)


def image_cost(tower: ImageTower, images: int, prompts: int = 0, learns: bool = False) -> Cost:
    """A pass of :class:`plpp_reg.clip.vision.ImageTower` over B images with ``prompts`` visual prompts a layer.

    A vision transformer by the formula above. A ResNet has one shape a layer: torch counts its convolutions, on tensors
    without numbers, and its largest layer's input and output, three times each, are what lives.
    """
    if not tower.is_transformer:
        forward, largest = _resnet(tower.visual)
        return Cost(images * forward, 0.0, 0.0, 3 * images * largest)
    visual = tower.visual
    width, positions = tower.width, len(visual.positional_embedding)
    patch = visual.conv1.weight[0].numel()
    out = visual.proj.shape[1] if visual.proj is not None else 0
    chain = _layers(width, tower.depth, visual.transformer.resblocks[0].attn.num_heads, positions + prompts, 1, images)
    ends = 2 * images * width * ((positions - 1) * patch + out)
    size = _bytes(tower.dtype)
    cost = Cost(chain.forward + ends, chain.backward + 2 * images * width * out, size * chain.kept, size * chain.working)
    return cost if learns else _alone(cost)


def _alone(cost: Cost) -> Cost:
    """Of a pass without a backward pass."""
    return Cost(cost.forward, working=cost.working * WORKING_ALONE / WORKING)


def _bytes(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits // 8


def _chain(tower: TextTower, length: int, reads: int, groups: int) -> Cost:
    heads = tower.resblocks[0].attn.num_heads
    cost = _layers(tower.ln_final.weight.shape[0], len(tower.resblocks), heads, length, reads, groups)
    size = _bytes(tower.dtype)
    return cost._replace(kept=size * cost.kept, working=size * cost.working)


def _layers(width: int, layers: int, heads: int, length: int, reads: int, groups: int) -> Cost:
    """A sequence of ``length`` positions, ``reads`` of which leave the last layer; ``kept`` and ``working`` in numbers."""
    rows, read = groups * length, groups * reads
    linear = (layers - 1) * 24 * width**2 * rows + 4 * width**2 * rows + 20 * width**2 * read
    seen = length if reads == 1 else reads  # a causal chain's first rows see themselves alone
    attention = 4 * width * ((layers - 1) * rows * length + read * seen)
    kept = (layers - 1) * ((KEPT_NODE + KEPT_PATH) * width + heads) * rows + 4 * width * rows + 12 * width * read
    return Cost(linear + attention, linear + 2 * attention, kept, WORKING * width * rows)


def _chunk(tower: TextTower, chunk: Chunk, tree: PromptTree, groups: int, need_hidden: bool) -> Cost:
    width, layers = tower.ln_final.weight.shape[0], len(tower.resblocks)
    heads, out = tower.resblocks[0].attn.num_heads, tower.text_projection.shape[1]
    nodes, p = len(chunk.nodes.token), tree.prefix_length
    states = need_hidden and not tree.before_in_prefix
    prompts = reads = visited = seen = seen_last = 0
    for group in chunk.groups:
        n, length = group.path.shape
        r = len(group.read) if states else 1
        prompts, reads, visited = prompts + n, reads + n * r, visited + n * length
        seen, seen_last = seen + n * length * (p + length), seen_last + n * r * (p + length)
    linear = (layers - 1) * 24 * width**2 * nodes + 4 * width**2 * nodes + 20 * width**2 * reads
    attention = 4 * width * ((layers - 1) * seen + seen_last)
    head = 2 * prompts * width * out
    frozen = 0 if len(chunk.nodes.context_node) else 6 * width**2 * nodes
    kept = (layers - 1) * (width * (KEPT_NODE * nodes + KEPT_PATH * visited) + heads * seen)
    kept += 4 * width * nodes + 12 * width * reads
    size = groups * _bytes(tower.dtype)
    return Cost(
        groups * (linear + attention + head),
        groups * (linear + 2 * attention + head - frozen),
        size * kept,
        size * WORKING * width * nodes,
    )


def _resnet(visual: nn.Module) -> tuple[int, float]:
    """Operations an image, and the bytes of the largest input and output of a layer."""
    sizes = []
    hooks = [
        module.register_forward_hook(lambda _, given, got: sizes.append(given[0].nbytes + got.nbytes))
        for module in visual.modules()
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.AvgPool2d))
    ]
    side, weight = visual.input_resolution, visual.conv1.weight
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as count:
            visual(torch.empty(1, 3, side, side, dtype=weight.dtype, device=weight.device))
    finally:
        for hook in hooks:
            hook.remove()
    return count.get_total_flops(), max(sizes)
