"""Hosts that call their text tower inline, of each library's shape."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from plpp_reg import PerplexityRegularizer

N, M, WIDTH = 5, 4, 64


class Inline(nn.Module):
    """Holds a whole CLIP and calls its text tower itself; names of N classes stand before, behind or around the context.

    ``tower``: prompts (N, T, D) -> states (N, T, D); ``shift``: a meta-net's, so that the vectors go in shifted.
    """

    def __init__(self, clip: nn.Module, words: Tensor, after: int = 0, shift: bool = False, leaf: str = "ctx") -> None:
        super().__init__()
        self.clip, self.after, self.leaf = clip, after, leaf
        start = torch.randn(M, words.shape[2], generator=torch.Generator().manual_seed(1), dtype=words.dtype) * 0.5
        clip.requires_grad_(False)
        setattr(self, leaf, nn.Parameter(start))
        self.bias = nn.Parameter(torch.full((words.shape[2],), 0.1, dtype=words.dtype)) if shift else None
        self.register_buffer("words", words)

    def prompts(self) -> Tensor:
        v = getattr(self, self.leaf)
        v = (v if self.bias is None else v + self.bias).expand(len(self.words), -1, -1)
        at = 1 + self.after
        return torch.cat([self.words[:, :at], v, self.words[:, at + M :]], 1)

    def tower(self, prompts: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self) -> Tensor:
        return self.tower(self.prompts())[:, -1].sin().sum()

    def with_term(self, regularizer: PerplexityRegularizer, own: bool = False, each: bool = False) -> Tensor:
        """The loss and the term, added. ``each``: prompts of one context have states of their own."""
        prompts = self.prompts()
        hidden = self.tower(prompts)
        at = 1 + self.after
        count = len(prompts) if each or self.after else 1
        h = hidden[:count, at : at + M] if own else hidden[:count, at - 1 : at + M - 1]
        return hidden[:, -1].sin().sum() + regularizer(prompts[:count, at : at + M], h)


class OpenAI(Inline):
    def tower(self, prompts):
        x = prompts + self.clip.positional_embedding[: prompts.shape[1]]
        x = self.clip.transformer(x.permute(1, 0, 2)).permute(1, 0, 2)
        return self.clip.ln_final(x)


class OpenAILayers(Inline):
    def tower(self, prompts):
        x = (prompts + self.clip.positional_embedding).permute(1, 0, 2)
        for block in self.clip.transformer.resblocks:
            x = block(x)
        return self.clip.ln_final(x.permute(1, 0, 2))


class OpenCLIP(Inline):
    def tower(self, prompts):
        text = getattr(self.clip, "text", self.clip)
        x = text.transformer(prompts + text.positional_embedding, attn_mask=text.attn_mask)
        return text.ln_final(x)


class HuggingFace(Inline):
    def tower(self, prompts):
        text = self.clip.text_model
        x = text.embeddings(inputs_embeds=prompts)
        return text.final_layer_norm(text.encoder(inputs_embeds=x, attention_mask=None, is_causal=True).last_hidden_state)


def words_of(embedding: Tensor, length: int = 77, n: int = N) -> Tensor:
    """(N, T, D): one start token, then names that differ."""
    ids = torch.randint(1, len(embedding) - 1, (n, length), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = len(embedding) - 2
    return embedding.detach()[ids]
