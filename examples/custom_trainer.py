"""PLPP in a trainer of one's own: the lines marked PLPP are all that is added, the rest is a trainer that never heard of it.

The model is in the shape that prompt-learning code has: a prompt learner with ``ctx``, and a text encoder that is called with
prompt embeddings and holds ``ln_final``. It runs on the embedded CLIP and on noise in place of images: it shows the wiring.
"""

import clip
import torch
from torch import nn
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer, attach  # PLPP
from plpp_reg.clip.load import load_clip


class TextEncoder(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.transformer, self.ln_final = model.transformer, model.ln_final
        self.positional_embedding, self.text_projection = model.positional_embedding, model.text_projection

    def forward(self, prompts, tokenized):
        x = self.transformer((prompts + self.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
        return self.ln_final(x)[torch.arange(len(x)), tokenized.argmax(-1)] @ self.text_projection


class PromptedCLIP(nn.Module):
    def __init__(self, model, classnames, n_ctx=4):
        super().__init__()
        self.ctx = nn.Parameter(torch.randn(n_ctx, model.token_embedding.weight.shape[1]) * 0.02)
        self.tokenized = clip.tokenize([" ".join(["X"] * n_ctx) + f" {name}." for name in classnames])
        self.register_buffer("words", model.token_embedding(self.tokenized).detach(), persistent=False)
        self.visual, self.text_encoder, self.scale = model.visual, TextEncoder(model), model.logit_scale

    def forward(self, images):
        n, length = len(self.words), self.ctx.shape[0]
        prompts = torch.cat([self.words[:, :1], self.ctx.expand(n, -1, -1), self.words[:, 1 + length :]], 1)
        texts = F.normalize(self.text_encoder(prompts, self.tokenized), dim=-1)
        return self.scale.exp() * F.normalize(self.visual(images), dim=-1) @ texts.t()


class Trainer:
    def __init__(self, model, clip_model):
        self.model = model
        self.optimizer = torch.optim.SGD([model.ctx], lr=0.02, momentum=0.9)
        self.plpp = attach(model, PerplexityRegularizer(clip_model.token_embedding.weight))  # PLPP

    def step(self, images, labels):
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        log = {"loss": loss.item()}
        log |= {"plpp": self.plpp.last.total.item(), "perplexity": self.plpp.last.perplexity.item()}  # PLPP
        return log


if __name__ == "__main__":
    torch.manual_seed(1)
    clip_model = load_clip()
    trainer = Trainer(PromptedCLIP(clip_model, ["cat", "hot air balloon", "cup of tea", "zebra"]), clip_model)
    size = clip_model.visual.input_resolution
    for i in range(11):
        log = trainer.step(torch.randn(8, 3, size, size), torch.randint(4, (8,)))
        if i % 5 == 0:
            print(f"step {i}", *(f"{name} {value:.3f}" for name, value in log.items()))
