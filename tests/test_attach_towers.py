"""attach on text towers of other shapes: called inline, whole CLIPs, open_clip's, Hugging Face's."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from plpp_reg import PerplexityRegularizer, attach
from plpp_reg.attachment import attached
from plpp_reg.errors import InputError

from helpers.attach import assert_close, gradients, make_regularizer
from helpers.inline import WIDTH, HuggingFace, Inline, M, N, OpenAI, OpenAILayers, OpenCLIP, words_of


def open_clip_model(custom: bool, **text: object) -> nn.Module:
    open_clip = pytest.importorskip("open_clip")
    kind = open_clip.model.CustomTextCLIP if custom else open_clip.model.CLIP
    vision = {"image_size": 32, "patch_size": 16, "width": 64, "layers": 1, "head_width": 32}
    text = {"context_length": 16, "vocab_size": 300, "width": WIDTH, "heads": 2, "layers": 2, **text}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind(embed_dim=32, vision_cfg=vision, text_cfg=text).double().eval()


def hugging_face_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    text = {"vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 16}
    config = transformers.CLIPConfig(text_config=text | {"max_position_embeddings": 16}, vision_config=vision)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.CLIPModel(config).double().eval()


def host_of(kind: str, clip_model: nn.Module, **more: object) -> tuple[Inline, Tensor]:
    """A host and its embedding."""
    if kind.startswith("openai"):
        weight = clip_model.token_embedding.weight
        return (OpenAILayers if kind == "openai-layers" else OpenAI)(clip_model, words_of(weight), **more), weight
    if kind.startswith("open_clip"):
        model = open_clip_model(kind == "open_clip-custom")
        weight = getattr(model, "text", model).token_embedding.weight
        return OpenCLIP(model, words_of(weight, 16), **more), weight
    model = hugging_face_model()
    weight = model.text_model.embeddings.token_embedding.weight
    return HuggingFace(model, words_of(weight, 16), **more), weight


KINDS = ["openai", "openai-layers", "open_clip", "open_clip-custom", "hugging-face"]


@pytest.mark.parametrize("more", [{}, {"after": 2, "shift": True}, {"leaf": "soft_prompt"}], ids=["end", "shifted", "named"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_tower_that_is_called_inline(clip_model, kind, more):
    host, weight = host_of(kind, clip_model, **more)
    regularizer = PerplexityRegularizer(weight, weight=0.7, inverse_weight=0.4)
    other = copy.deepcopy(host)
    handle = attach(host.train(), regularizer)
    host().backward()
    other.with_term(regularizer).backward()
    assert handle.ever_joined
    assert_close(gradients(host), gradients(other), 1e-9)  # positions are taken off again


@pytest.mark.parametrize("how", ["token_embedding", "parameter of a module"])
def test_hugging_faces_own_forward_pass(clip_model, how):
    """Soft prompts that a hook puts where a placeholder's embedding was, and the model is called with ids."""
    model = hugging_face_model().requires_grad_(False)
    text, ids = model.text_model, torch.randint(3, 290, (N, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 0], ids[:, -1] = 298, 299
    text.eos_token_id = 299
    table = text.embeddings.token_embedding
    soft = nn.Embedding(M, WIDTH).double() if how == "parameter of a module" else None
    model.soft = soft if soft is not None else nn.Parameter(torch.randn(M, WIDTH, dtype=torch.float64))

    def with_context(module, args, output):
        v = model.soft if soft is None else model.soft(torch.arange(M))
        return torch.cat([output[:, :1], v.expand(N, -1, -1), output[:, 1 + M :]], 1)

    table.register_forward_hook(with_context)
    regularizer = PerplexityRegularizer(table.weight)
    attach(model.train(), regularizer)
    text(input_ids=ids).pooler_output.sin().sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen = []
    for handle in attached(model):
        handle.remove()
    for module in (table, text.final_layer_norm):
        module.register_forward_hook(lambda m, a, out: seen.append(out))
    loss = text(input_ids=ids).pooler_output.sin().sum()
    prompts, hidden = seen
    (loss + regularizer(prompts[0, 1 : 1 + M], hidden[0, :M])).backward()
    assert_close(got, {n: p.grad for n, p in model.named_parameters() if p.grad is not None})


def test_a_text_encoder_that_is_called_with_prompts_and_positions(clip_model, batch):
    """The model adds them, as it holds them; the text encoder does not know of any."""

    class Tower(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer, self.ln_final = clip_model.transformer, clip_model.ln_final

        def forward(self, x):
            return self.ln_final(self.transformer(x.permute(1, 0, 2)).permute(1, 0, 2))

    class Host(OpenAI):
        def __init__(self):
            super().__init__(clip_model, words_of(clip_model.token_embedding.weight), after=2)
            del self.clip
            self.positional_embedding, self.text_encoder = clip_model.positional_embedding, Tower()

        def tower(self, prompts):
            return self.text_encoder(prompts + self.positional_embedding)

    regularizer = make_regularizer(clip_model)
    host, other = Host().train(), Host().train()
    handle = attach(host, regularizer)
    host().backward()
    handle.remove()
    other.with_term(regularizer).backward()
    assert_close(gradients(host), gradients(other), 1e-9)


def test_a_bidirectional_tower_is_refused(clip_model):
    model = open_clip_model(True, no_causal_mask=True)
    host = OpenCLIP(model, words_of(model.text.token_embedding.weight, 16)).train()
    regularizer = PerplexityRegularizer(model.text.token_embedding.weight)
    with pytest.raises(InputError, match="^states: expected a causal text tower for 'preceding', got TextTransformer, whose"):
        attach(host, regularizer)
    handle = attach(host, regularizer, states="own")
    host().backward()
    other = OpenCLIP(model, words_of(model.text.token_embedding.weight, 16))
    other.with_term(regularizer, own=True, each=True).backward()
    assert handle.ever_joined
    assert_close(gradients(host), gradients(other), 1e-9)


class ClassAware(OpenAI):
    """Mixes something of each class into the context's states in front of a deeper layer, as TCP does."""

    def tower(self, prompts):
        mix = torch.randn(len(prompts), M, WIDTH, dtype=prompts.dtype, generator=torch.Generator().manual_seed(0))
        x = (prompts + self.clip.positional_embedding[: prompts.shape[1]]).permute(1, 0, 2)
        for layer, block in enumerate(self.clip.transformer.resblocks):
            if layer == 1:
                x = torch.cat([x[:1], (x[1 : 1 + M] + mix.transpose(0, 1)) / 2, x[1 + M :]])
            x = block(x)
        return self.clip.ln_final(x.permute(1, 0, 2))


@pytest.mark.parametrize("own", [False, True])
def test_prompts_that_begin_alike_count_each_where_their_states_differ(clip_model, own):
    host, other = (ClassAware(clip_model, words_of(clip_model.token_embedding.weight)).train() for _ in range(2))
    regularizer = make_regularizer(clip_model)
    handle = attach(host, regularizer, states="own" if own else "preceding")
    host().backward()
    other.with_term(regularizer, own, each=True).backward()
    assert handle.rows == len(host.prompts()) * M > M
    assert_close(gradients(host), gradients(other), 1e-9)


def test_siglip_says_why_not():
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": WIDTH, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.SiglipTextConfig(**small, vocab_size=300, max_position_embeddings=16)
    model = transformers.SiglipTextModel(config)
    model.soft = nn.Parameter(torch.zeros(M, WIDTH))
    regularizer = PerplexityRegularizer(torch.randn(300, WIDTH))
    with pytest.raises(InputError, match="^states: expected a causal text tower for 'preceding', got SiglipText.*own"):
        attach(model, regularizer, context="soft")


class Unknown(nn.Module):
    """A tower of somebody's own, with a last norm of another name."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 2, 64, 0.0, batch_first=True)]).double()
            self.norm_out = nn.LayerNorm(WIDTH).double()
            self.ctx = nn.Parameter(torch.randn(M, WIDTH).double())
            self.table = nn.Embedding(300, WIDTH).double()
        self.causal = causal
        for m in (self.layers, self.norm_out, self.table):
            m.requires_grad_(False)

    def prompts(self):
        ids = torch.arange(6 * N).view(N, 6)
        words = self.table(torch.cat([torch.zeros(N, 1, dtype=torch.long), ids], 1))
        return torch.cat([words[:, :1], self.ctx.expand(N, -1, -1), words[:, 1:]], 1)

    def states(self, x):
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x) if self.causal else None
        for layer in self.layers:
            x = layer(x, src_mask=mask)
        return self.norm_out(x)

    def forward(self):
        return self.states(self.prompts())[:, -1].sin().sum()


@pytest.mark.parametrize("causal", [True, False])
def test_a_tower_of_ones_own_by_its_last_norm(causal):
    host = Unknown(causal).train()
    regularizer = PerplexityRegularizer(host.table.weight)
    with pytest.raises(InputError, match="found none: give it as text_encoder=, or the norm as final_norm="):
        attach(host, regularizer)
    attach(host, regularizer, final_norm="norm_out")
    if not causal:
        with pytest.raises(InputError, match="'preceding', got Unknown, whose states have seen the vectors"):
            host()
        return
    host().backward()
    other = Unknown(causal).train()
    prompts = other.prompts()
    hidden = other.states(prompts)
    (hidden[:, -1].sin().sum() + regularizer(prompts[0, 1 : 1 + M], hidden[0, :M])).backward()
    assert_close(gradients(host), gradients(other))


def test_as_many_prompts_as_positions(clip_model):
    """Which of two equal sizes is which is read off the tensors."""
    weight = clip_model.token_embedding.weight
    host, other = (OpenAI(clip_model, words_of(weight, 77, 77), after=1).train() for _ in range(2))
    regularizer = make_regularizer(clip_model)
    attach(host, regularizer)
    host().backward()
    other.with_term(regularizer).backward()
    assert_close(gradients(host), gradients(other), 1e-9)
