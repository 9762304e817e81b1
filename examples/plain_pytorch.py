"""CoOp with PLPP in plain PyTorch, without Dassl and without an engine: half a minute on two CPU cores, no download."""

import torch
from PIL import Image
from torch.nn.functional import cross_entropy, normalize
from torchvision import transforms as T

from plpp_reg import PerplexityRegularizer
from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vocabulary import candidate_ids, nearest_words
from plpp_reg.data import load_dataset

torch.manual_seed(1)
model, data = load_clip(), load_dataset("emoji", shots=16)  # the embedded default; "ViT-B/16" is a name too
mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
transform = T.Compose([T.Resize(model.visual.input_resolution), T.ToTensor(), T.Normalize(mean, std)])
with torch.no_grad():
    images = torch.stack([transform(Image.open(item.impath).convert("RGB")) for item in data.train])
    images = normalize(model.encode_image(images), dim=-1)
labels = torch.tensor([item.label for item in data.train])

prompts, tower = PromptLearner(model, data.classnames, n_ctx=4), TextTower(model)
words = candidate_ids(model)  # the rows of the embedding that are words; None: all
regularizer = PerplexityRegularizer(model.token_embedding.weight, candidates=words)
optimizer = torch.optim.SGD([prompts.ctx], lr=0.02, momentum=0.9)
for step in range(101):
    batch = torch.randint(len(labels), (32,))
    text = prompts(tower)  # class features, and the states that precede the context vectors
    logits = model.logit_scale.exp() * images[batch] @ normalize(text.features, dim=-1).T
    parts = regularizer.components(prompts.ctx, text.hidden)
    loss = cross_entropy(logits, labels[batch]) + parts.total
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step} loss {loss:.3f} perplexity {parts.perplexity:.1f}")
print("learned:", *(near[0].word for near in nearest_words(prompts.ctx, model.token_embedding.weight, 1, words)))
