"""open_clip's models through the one loader; random weights, reduced depth, no download."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from plpp_reg.clip.from_open_clip import as_openai
from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import PromptLearner, encode_texts
from plpp_reg.clip.text import TextTower
from plpp_reg.clip.vision import ImageTower
from plpp_reg.errors import InputError

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}  # 32 wide heads, not OpenAI's 64
VIT = {"layers": 2, "width": 160, "head_width": 40, "patch_size": 8, "image_size": 32}
RESNET = {"layers": [1, 1, 1, 1], "width": 8, "head_width": 8, "image_size": 32}
FAMILIES = {
    "vit": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT},
    "vit-quickgelu": {"embed_dim": 32, "vision_cfg": VIT, "text_cfg": TEXT, "quick_gelu": True},
    "resnet": {"embed_dim": 32, "vision_cfg": RESNET, "text_cfg": TEXT},
}


def source(family: str, **changes) -> torch.nn.Module:
    import open_clip  # takes as long as many tests: not while they are collected

    torch.manual_seed(0)
    config = {**FAMILIES[family], **changes}
    model = open_clip.model.CLIP(**config).eval()
    with torch.no_grad():  # closed branches and zero biases would hide a mix-up
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_our_towers_compute_what_open_clip_computes(family):
    import open_clip

    theirs = source(family)
    ours = as_openai(theirs)
    images, texts = torch.randn(3, 3, 32, 32), ["a photo of a cat", "tea", "zebra crossing, red"]
    with torch.no_grad():
        torch.testing.assert_close(ImageTower(ours)(images), theirs.encode_image(images), rtol=1e-4, atol=1e-5)
        expected = theirs.encode_text(open_clip.get_tokenizer("ViT-B-32")(texts))
        torch.testing.assert_close(encode_texts(TextTower(ours), texts), expected, rtol=1e-4, atol=1e-5)


def test_heads_and_activation_are_taken_from_the_source_not_from_the_width():
    gelu, quick = as_openai(source("vit")), as_openai(source("vit-quickgelu"))
    assert [b.attn.num_heads for b in gelu.visual.transformer.resblocks] == [4, 4]  # OpenAI's rule would give 2
    assert isinstance(gelu.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
    assert not isinstance(quick.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_cfg": {**TEXT, "no_causal_mask": True}},
        {"text_cfg": {**TEXT, "pool_type": "first"}},
        {"vision_cfg": {**VIT, "pool_type": "avg"}},
        {"vision_cfg": {**VIT, "no_ln_pre": True}},
        {"text_cfg": {**TEXT, "ls_init_value": 0.1}},
    ],
    ids=["not causal", "text pooling", "image pooling", "no ln_pre", "layer scale"],
)
def test_another_architecture_is_refused(changes):
    with pytest.raises(InputError, match="expected a model of OpenAI's architecture"):
        as_openai(source("vit", **changes))


@pytest.fixture
def tiny_architecture(tmp_path: Path):
    import open_clip

    config = tmp_path / "plpp-tiny.json"
    config.write_text(json.dumps(FAMILIES["vit"]))
    open_clip.add_model_config(config)
    yield "plpp-tiny"
    open_clip.factory._MODEL_CONFIGS.pop("plpp-tiny")


@pytest.mark.parametrize("form", ["plain", "training"])
def test_a_local_checkpoint(tiny_architecture: str, tmp_path: Path, form: str):
    theirs = source("vit")
    state_dict = theirs.state_dict()
    if form == "training":  # as open_clip's own training saves it
        state_dict = {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in state_dict.items()}}
    torch.save(state_dict, tmp_path / "weights.pt")
    stream = torch.get_rng_state()
    model = load_clip(f"open_clip:{tiny_architecture}/{tmp_path / 'weights.pt'}")
    assert torch.get_rng_state().equal(stream)  # open_clip draws weights before it loads these
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_image(images), theirs.encode_image(images), rtol=1e-4, atol=1e-5)
    learner, tower = PromptLearner(model, ["cat", "dog"], n_ctx=2), TextTower(model)
    learner(tower).features.sum().backward()
    assert learner.ctx.grad.abs().sum() > 0


def test_bad_names_name_the_nearest(tiny_architecture: str, tmp_path: Path):
    with pytest.raises(InputError, match="nearest.*ViT-B-16|ViT-B-16.*nearest|did you mean.*ViT-B-16"):
        load_clip("open_clip:ViT-B_16/openai")
    with pytest.raises(InputError, match="laion2b_s34b_b88k"):
        load_clip("open_clip:ViT-B-16/laion2b_s34b_b88")
    (tmp_path / "other.pt").write_bytes(b"not weights")
    with pytest.raises(InputError, match="expected CLIP weights"):
        load_clip(f"open_clip:{tiny_architecture}/{tmp_path / 'other.pt'}")
    torch.save({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(InputError, match="expected weights of plpp-tiny"):
        load_clip(f"open_clip:{tiny_architecture}/{tmp_path / 'other.pt'}")
