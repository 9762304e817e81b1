"""Slow, literal transcriptions of the sources, sharing no code with the package: what the fast code must equal.

The loss follows the equations at the top of plpp_reg/loss/functional.py, one word at a time. The tower follows CoOp's
``PromptLearner`` and ``TextEncoder``: all positions of every class (OpenAI's models have 77) through the stock modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from plpp_reg.clip.load import openai_clip


class Loss(NamedTuple):
    total: Tensor
    perplexity_loss: Tensor
    inverse_loss: Tensor
    perplexity: Tensor


def plpp(
    context: Tensor,
    hidden: Tensor,
    E: Tensor,
    *,
    weight: float,
    inverse_weight: float,
    top_k: int,
    temperature: float,
    label: str,
    normalize_over: str,
    detach_label: bool,
) -> Loss:
    """context, hidden (1 or P, M, D), E (V, D). Loops over P, M and V; plain exp and log: give it float64."""
    direct, inverse, nll = [], [], []
    for prompt in range(max(len(context), len(hidden))):
        for m in range(context.shape[1]):
            v = context[prompt if len(context) > 1 else 0, m]
            h = hidden[prompt if len(hidden) > 1 else 0, m]
            cosines = [(word * v).sum() / ((word * word).sum().sqrt() * (v * v).sum().sqrt()) for word in E]
            ids = torch.stack(cosines).argsort(descending=True).tolist()[: 1 if label == "hard" else top_k]
            label_parts = [(cosines[i] / temperature).exp() for i in ids]
            scores = [(word * h).sum().exp() for word in E]
            normaliser = sum(scores) if normalize_over == "vocabulary" else sum(scores[i] for i in ids)
            q = [part / sum(label_parts) for part in label_parts]
            p = [scores[i] / normaliser for i in ids]
            q_label = [x.detach() for x in q] if detach_label else q
            p_label = [x.detach() for x in p] if detach_label else p
            direct.append(-sum(a * b.log() for a, b in zip(q_label, p, strict=True)))
            inverse.append(-sum(a * b.log() for a, b in zip(p_label, q, strict=True)))
            nll.append(-(scores[ids[0]] / sum(scores)).log().detach())
    l_ppl, l_inv = (sum(x) / len(x) for x in (direct, inverse))
    return Loss(weight * l_ppl + inverse_weight * l_inv, l_ppl, l_inv, (sum(nll) / len(nll)).exp())


class Prompts(NamedTuple):
    embeddings: Tensor  # (C, T, D) of all T positions, before these are added
    eot: Tensor  # (C,)
    context_at: Tensor  # (C, M)


def coop_prompts(model: nn.Module, classnames: Sequence[str], ctx: Tensor, position: str = "end") -> Prompts:
    """CoOp's ``PromptLearner.forward``: ctx (M, D) or (C, M, D)."""
    clip = openai_clip()
    n_ctx = ctx.shape[-2]
    names = [name.replace("_", " ") for name in classnames]
    name_lens = [len(clip.clip._tokenizer.encode(name)) for name in names]
    positions = len(model.positional_embedding)
    tokenized = torch.cat([clip.tokenize(" ".join(["X"] * n_ctx) + " " + name + ".", positions) for name in names])
    table = model.token_embedding(tokenized)
    if ctx.dim() == 2:
        ctx = ctx.unsqueeze(0).expand(len(names), -1, -1)
    ctx = ctx.to(table.dtype)
    embeddings, context_at = [], []
    for c, length in enumerate(name_lens):
        order = _order(n_ctx, length, position, positions)
        # the row that stands at each position: a context vector, or a row of the tokenised placeholder prompt
        rows = [ctx[c, i] if kind == "ctx" else table[c, i] for kind, i in order]
        embeddings.append(torch.stack(rows))
        context_at.append([t for t, (kind, _) in enumerate(order) if kind == "ctx"])
    return Prompts(torch.stack(embeddings), tokenized.argmax(-1), torch.tensor(context_at))


def _order(n_ctx: int, name_len: int, position: str, positions: int) -> list[tuple[str, int]]:
    """CoOp's three concatenations, of all positions: ("ctx", m) or ("token", position in the placeholder prompt)."""
    prefix = [("token", 0)]
    ctx = [("ctx", m) for m in range(n_ctx)]
    suffix = [("token", t) for t in range(1 + n_ctx, positions)]
    if position == "end":
        return prefix + ctx + suffix
    name, rest = suffix[:name_len], suffix[name_len:]
    if position == "middle":
        half = n_ctx // 2
        return prefix + ctx[:half] + name + ctx[half:] + rest
    return prefix + name + ctx + rest


def text_tower(
    model: nn.Module, prompts: Prompts, deep: Sequence[Tensor] = (), states: str = "preceding"
) -> tuple[Tensor, Tensor]:
    """CoOp's ``TextEncoder.forward``, with MaPLe's replacement of context rows at layers 1, 2, ...

    deep: (M, D) or (C, M, D) a layer. Returns features (C, embed_dim) and the states that precede the context, or those at
    the context itself ("own"), (C, M, D).
    """
    dtype = model.transformer.resblocks[0].attn.in_proj_weight.dtype
    x = prompts.embeddings.to(dtype) + model.positional_embedding.to(dtype)
    x = x.permute(1, 0, 2)  # NLD -> LND
    for layer, block in enumerate(model.transformer.resblocks):
        if 0 < layer <= len(deep):
            rows = deep[layer - 1]
            x = x.clone()
            for c, places in enumerate(prompts.context_at.tolist()):
                for m, t in enumerate(places):
                    x[t, c] = (rows if rows.dim() == 2 else rows[c])[m].to(dtype)
        x = block(x)
    x = model.ln_final(x.permute(1, 0, 2)).to(dtype)
    every = torch.arange(len(x))
    features = x[every, prompts.eot] @ model.text_projection
    return features, x[every[:, None], prompts.context_at - {"preceding": 1, "own": 0}[states]]


def double(model: nn.Module) -> nn.Module:
    """float64 throughout: OpenAI's LayerNorm casts to float32 and fails on float64 weights, so it becomes torch's own."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.__class__ = nn.LayerNorm
    return model.double()
