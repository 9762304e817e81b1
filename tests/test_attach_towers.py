"""attach on text towers of other shapes: called inline, whole CLIPs, open_clip's, Hugging Face's; and what cannot work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plpp_reg import PerplexityRegularizer, attach
from plpp_reg.attachment import attached
from plpp_reg.errors import InputError
from plpp_reg.loss import functional as PF
from plpp_reg.loss.nearest import NearestWords

from counting import Waits
from helpers.attach import assert_close, gradients, host_loss, make_host, make_regularizer

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


# ---- where it cannot work, it says so --------------------------------------------------------------------------------


class Functional(OpenAI):
    """The last norm's weights are used, the module is never called."""

    def tower(self, prompts):
        x = self.clip.transformer((prompts + self.clip.positional_embedding).permute(1, 0, 2)).permute(1, 0, 2)
        return F.layer_norm(x, (WIDTH,), self.clip.ln_final.weight, self.clip.ln_final.bias)


def test_a_term_that_never_joins_stops_the_first_backward_pass(clip_model):
    host = Functional(clip_model, words_of(clip_model.token_embedding.weight)).train()
    attach(host, make_regularizer(clip_model))
    loss = host()
    with pytest.raises(InputError, match="^model: a gradient reached ctx that the term did not join: .*got no such text pass"):
        loss.backward()


def test_a_loss_beside_the_text_features_stops_the_optimizer(clip_model):
    host = OpenAI(clip_model, words_of(clip_model.token_embedding.weight)).train()
    attach(host, make_regularizer(clip_model))
    optimizer = torch.optim.SGD([host.ctx], 0.1)
    host().backward()
    host.ctx.square().sum().backward()  # beside a loss that has the term it is no matter
    optimizer.step()
    before = host.ctx.detach().clone()
    host().detach()
    host.ctx.square().sum().backward()
    with pytest.raises(InputError, match="got such text passes that it did not come from"):
        optimizer.step()
    assert torch.equal(host.ctx, before)
    elsewhere = nn.Parameter(torch.ones(1, requires_grad=True))
    elsewhere.sum().backward()
    torch.optim.SGD([elsewhere], 0.1).step()


def test_training_in_evaluation_mode_stops_the_optimizer(clip_model):
    """Hugging Face's from_pretrained gives a model in evaluation mode."""
    host = OpenAI(clip_model, words_of(clip_model.token_embedding.weight)).eval()
    handle = attach(host, make_regularizer(clip_model))
    optimizer = torch.optim.SGD([host.ctx], 0.1)
    host().backward()
    with pytest.raises(InputError, match="^prompt_learner: expected OpenAI in training mode where ctx is trained, got eval"):
        optimizer.step()
    host.train()
    host().backward()
    optimizer.step()
    host.eval()
    handle.remove()
    host().backward()
    optimizer.step()


def test_a_second_call_of_the_last_norm_is_refused(clip_model):
    class Intermediates(OpenAILayers):
        def tower(self, prompts):
            x, states = (prompts + self.clip.positional_embedding).permute(1, 0, 2), []
            for block in self.clip.transformer.resblocks:
                x = block(x)
                states.append(self.clip.ln_final(x.permute(1, 0, 2)))
            return states[-1]

    host = Intermediates(clip_model, words_of(clip_model.token_embedding.weight)).train()
    attach(host, make_regularizer(clip_model))
    with pytest.raises(InputError, match="^final_norm: expected one call for each pass through the tower"):
        host()


def test_a_model_that_was_compiled_before(clip_model):
    """What was compiled knows of no hooks: it is made anew."""
    host, other = (OpenAI(clip_model, words_of(clip_model.token_embedding.weight)).train() for _ in range(2))
    regularizer = make_regularizer(clip_model)
    compiled = torch.compile(host, backend="aot_eager")
    compiled().backward()
    host.zero_grad()
    attach(compiled, regularizer)
    compiled().backward()
    other.with_term(regularizer).backward()
    assert_close(gradients(host), gradients(other), 1e-9)


# ---- a GPU is not waited for -----------------------------------------------------------------------------------------


class Anew(NearestWords):
    """An accelerator's way."""

    def __call__(self, *arguments):
        return PF.search_all(*arguments)


@pytest.mark.parametrize("position", ["end", "front"])
def test_a_text_pass_waits_for_the_device_once(clip_model, batch, position):
    host = make_host(clip_model, position=position)
    counts = []
    for plain in (True, False):
        if not plain:
            regularizer = make_regularizer(clip_model)
            regularizer.nearest = Anew()
            attach(host, regularizer)
        host_loss(host, batch).backward()
        with Waits() as waits:
            host_loss(host, batch).backward()
        counts.append(waits.by_name)
    assert counts[1] - counts[0] == {"tolist": 1}, counts
