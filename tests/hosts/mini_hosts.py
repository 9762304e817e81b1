"""Miniature hosts, in the shapes of code that checkouts have: all 77 positions of every class through the stock modules.

Loss in the trainer (CoOp's way), loss in ``forward`` with one text pass an image (CoCoOp's), a tuple of seven with deep prompts
(PromptSRC's and MaPLe's). The token embedding is not kept, as in those checkouts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg.clip.load import openai_clip

NAMES = ["cat", "hot air balloon", "tea", "zebra crossing", "map"]


class TextEncoder(nn.Module):
    """Prompts (N, 77, D), tokenised (N, 77) -> features (N, E). ``deep``: rows for the layers after the first."""

    def __init__(self, clip_model: nn.Module) -> None:
        super().__init__()
        self.transformer = clip_model.transformer
        self.positional_embedding = clip_model.positional_embedding
        self.ln_final = clip_model.ln_final
        self.text_projection = clip_model.text_projection
        self.dtype = clip_model.dtype

    def forward(self, prompts: Tensor, tokenized_prompts: Tensor, deep: list[Tensor] | None = None) -> Tensor:
        x = (prompts + self.positional_embedding.type(self.dtype)).permute(1, 0, 2)
        for layer, block in enumerate(self.transformer.resblocks):
            if deep and 0 < layer <= len(deep):
                rows = deep[layer - 1].unsqueeze(1).expand(-1, x.shape[1], -1)
                x = torch.cat([x[:1], rows, x[1 + len(rows) :]])
            x = block(x)
        x = self.ln_final(x.permute(1, 0, 2)).type(self.dtype)
        return x[torch.arange(len(x)), tokenized_prompts.argmax(-1)] @ self.text_projection


class PromptLearner(nn.Module):
    """Context in front of ("end"), around ("middle") or behind ("front") the name; ``bias``: shifted by it, as by an image."""

    def __init__(
        self, clip_model: nn.Module, n_ctx: int = 4, position: str = "end", class_specific: bool = False, words: str = ""
    ) -> None:
        super().__init__()
        clip = openai_clip().clip
        width = clip_model.token_embedding.weight.shape[1]
        start = torch.randn(n_ctx, width, generator=torch.Generator().manual_seed(1)) * 0.5
        if words:
            start = clip_model.token_embedding(clip.tokenize(words))[0, 1 : 1 + n_ctx].detach()
        if class_specific:
            start = start.expand(len(NAMES), -1, -1)
            noise = torch.randn(start.shape, generator=torch.Generator().manual_seed(2))
            start = start if words else start + 0.3 * noise
        self.ctx = nn.Parameter(start.clone().type(clip_model.dtype))
        self.tokenized_prompts = clip.tokenize([" ".join(["X"] * n_ctx) + f" {name}." for name in NAMES])
        with torch.no_grad():
            embedding = clip_model.token_embedding(self.tokenized_prompts).type(clip_model.dtype)
        self.register_buffer("token_prefix", embedding[:, :1])
        self.register_buffer("token_suffix", embedding[:, 1 + n_ctx :])
        self.name_lens = [len(clip._tokenizer.encode(name)) for name in NAMES]
        self.class_token_position = position
        self.meta_net = nn.Linear(clip_model.visual.output_dim, width, bias=False, dtype=clip_model.dtype)
        nn.init.normal_(self.meta_net.weight, std=0.05, generator=torch.Generator().manual_seed(3))

    def forward(self, bias: Tensor | None = None) -> Tensor:
        ctx = self.ctx if bias is None else self.ctx + bias
        if ctx.dim() == 2:
            ctx = ctx.unsqueeze(0).expand(len(NAMES), -1, -1)
        half = {"end": ctx.shape[1], "middle": ctx.shape[1] // 2, "front": 0}[self.class_token_position]
        rows = []
        for c, length in enumerate(self.name_lens):
            name, rest = self.token_suffix[c, :length], self.token_suffix[c, length:]
            rows.append(torch.cat([self.token_prefix[c], ctx[c, :half], name, ctx[c, half:], rest]))
        return torch.stack(rows)


class Host(nn.Module):
    """What the three hosts share."""

    def __init__(self, clip_model: nn.Module, **learner: object) -> None:
        super().__init__()
        self.prompt_learner = PromptLearner(clip_model, **learner)
        self.tokenized_prompts = self.prompt_learner.tokenized_prompts
        self.image_encoder = clip_model.visual
        self.text_encoder = TextEncoder(clip_model)
        self.logit_scale = clip_model.logit_scale
        self.dtype = clip_model.dtype

    def encode_image(self, images: Tensor) -> Tensor:
        return F.normalize(self.image_encoder(images.type(self.dtype)), dim=-1)


class LossInTrainer(Host):
    """Returns logits."""

    def forward(self, images: Tensor) -> Tensor:
        images = self.encode_image(images)
        texts = F.normalize(self.text_encoder(self.prompt_learner(), self.tokenized_prompts), dim=-1)
        return self.logit_scale.exp() * images @ texts.t()


class LossInForward(Host):
    """One text pass an image; returns the loss while it trains."""

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        logits = []
        for image in self.encode_image(images):
            texts = self.text_encoder(self.prompt_learner(self.prompt_learner.meta_net(image)), self.tokenized_prompts)
            texts = texts / texts.norm(dim=-1, keepdim=True)
            logits.append(self.logit_scale.exp() * image @ texts.t())
        logits = torch.stack(logits)
        return F.cross_entropy(logits, labels) if self.prompt_learner.training else logits


class SevenReturned(Host):
    """Deep prompts, frozen features beside the learned ones, and seven things to make a loss of."""

    def __init__(self, clip_model: nn.Module, **learner: object) -> None:
        super().__init__(clip_model, **learner)
        layers = len(clip_model.transformer.resblocks)
        width = self.prompt_learner.ctx.shape[-1]
        generator = torch.Generator().manual_seed(4)
        deep = [torch.randn(self.prompt_learner.ctx.shape[-2], width, generator=generator) * 0.2 for _ in range(layers - 1)]
        self.prompt_learner.deep = nn.ParameterList(rows.type(clip_model.dtype) for rows in deep)
        with torch.no_grad():
            self.fixed = F.normalize(clip_model.encode_text(self.tokenized_prompts), dim=-1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        images = self.encode_image(images)
        deep = list(self.prompt_learner.deep)
        texts = self.text_encoder(self.prompt_learner(), self.tokenized_prompts, deep)
        texts = texts / texts.norm(dim=-1, keepdim=True)
        scale = self.logit_scale.exp()
        logits = scale * images @ texts.t()
        if not self.prompt_learner.training:
            return logits
        zero_shot = scale * images @ self.fixed.t()
        return F.cross_entropy(logits, labels), texts, self.fixed, images.detach(), images, zero_shot, logits


def frozen(host: Host) -> Host:
    """Only the prompt learner is trained, as hosts have it."""
    for name, parameter in host.named_parameters():
        parameter.requires_grad_("prompt_learner" in name)
    return host
