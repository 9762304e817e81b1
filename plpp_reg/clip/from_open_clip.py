"""Models of open_clip, as OpenAI's architecture: one interface whatever the source."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from plpp_reg.clip.load import OPEN_CLIP, from_weights, openai_clip, read_state_dict
from plpp_reg.errors import InputError, install, unknown

USUAL_FILE, USUAL_SAFE_FILE = "open_clip_pytorch_model.bin", "open_clip_model.safetensors"  # of a repository of the Hub
TOLERANCE = 1e-3  # of the largest feature, in float32: two implementations of one model agree to about 1e-6


def load_open_clip(name: str) -> nn.Module:
    """``"open_clip:ViT-B-16/laion2b_s34b_b88k"`` (downloaded by open_clip) or ``"open_clip:ViT-B-16/FILE"``.

    Returns:
        ``clip.model.CLIP`` in float32 with the same weights, heads and activation; ``pixel_mean`` and ``pixel_std`` say how its
        images are normalised.

    Raises:
        InputError: open_clip is not installed, no such model or weights, or a model of another architecture.
    """
    open_clip, architecture, weights = named(name)
    local = Path(weights).is_file()
    try:
        # OpenAI's own weights want QuickGELU whatever the architecture's configuration says; open_clip only warns
        quick = False if local else bool((open_clip.get_pretrained_cfg(architecture, weights) or {}).get("quick_gelu"))
        with torch.random.fork_rng(devices=[]):  # it draws weights, which it loads others over
            source = open_clip.create_model(architecture, pretrained=None if local else weights, force_quick_gelu=quick)
        if local:
            state_dict = read_state_dict(Path(weights))
            source.load_state_dict({k.removeprefix("module."): v for k, v in state_dict.items()})
    except (OSError, RuntimeError) as e:
        raise InputError(f"backbone {name!r}: expected weights of {architecture} ({' '.join(str(e).split())[:200]})") from e
    return as_openai(source.float().eval(), name)


def named(name: str) -> tuple[ModuleType, str, str]:
    """The package open_clip, and which of its architectures and weights (a tag or a file) ``name`` names. Nothing is read.

    Raises:
        InputError: open_clip is not installed, no such model or weights.
    """
    try:
        import open_clip
    except ImportError as e:
        raise InputError(f"backbone {name!r}: expected the package open_clip: {install('open_clip')} ({e})") from e
    architecture, _, weights = name.removeprefix(OPEN_CLIP).partition("/")
    if architecture not in open_clip.list_models():
        raise unknown("open_clip model", architecture, open_clip.list_models())
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights not in tags and not Path(weights).is_file():
        raise unknown(f"weights of open_clip:{architecture} (a tag or a file)", weights, tags)
    return open_clip, architecture, weights


def open_clip_file(name: str) -> Path | None:
    """The file on this machine that :func:`load_open_clip` reads; None where it is not here. Nothing is downloaded.

    Raises:
        InputError: open_clip is not installed, no such model or weights.
    """
    open_clip, architecture, weights = named(name)
    if Path(weights).is_file():
        return Path(weights)
    entry = open_clip.get_pretrained_cfg(architecture, weights) or {}
    repository, _, file = str(entry.get("hf_hub") or "").rpartition("/")
    if not repository:
        path = Path("~/.cache/clip").expanduser() / str(entry.get("url", "")).rpartition("/")[2]
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    file = file or USUAL_FILE
    safe = USUAL_SAFE_FILE if file == USUAL_FILE else f"{file.rpartition('.')[0]}.safetensors"
    first = [safe] if file.endswith((".bin", ".pth")) else []  # as open_clip prefers it
    found = (try_to_load_from_cache(repository, each) for each in (*first, file))
    return next((Path(path) for path in found if isinstance(path, str)), None)


@torch.no_grad()
def as_openai(source: nn.Module, name: str = "open_clip model") -> nn.Module:
    """A model of open_clip rebuilt from openai-clip's modules; what it computes is compared with the source, once.

    Raises:
        InputError: it is not of that architecture (another text tower, pooling, ...).
    """
    try:
        model = from_weights(source.state_dict())
        for path, block in model.named_modules():
            if hasattr(block, "attn") and hasattr(block, "mlp"):
                _take_settings(block, source.get_submodule(path))
        if hasattr(model.visual, "attnpool"):
            model.visual.attnpool.num_heads = source.visual.attnpool.num_heads
        side = model.visual.input_resolution
        image = torch.linspace(-2, 2, 3 * side * side).sin().view(1, 3, side, side)
        text = openai_clip().tokenize(["a photo of a cat.", "tea"])
        pairs = [(model.encode_image(image), source.encode_image(image)), (model.encode_text(text), source.encode_text(text))]
        worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    except (KeyError, RuntimeError, AttributeError, ValueError, IndexError, ZeroDivisionError) as e:
        raise InputError(f"{name}: expected a model of OpenAI's architecture ({' '.join(str(e).split())[:200]})") from e
    if not worst < TOLERANCE:
        raise InputError(f"{name}: expected a model of OpenAI's architecture, got one whose features differ by {worst:.1g}")
    settings = getattr(source.visual, "preprocess_cfg", None) or {}
    model.pixel_mean, model.pixel_std = settings.get("mean"), settings.get("std")
    return model


def _take_settings(block: nn.Module, source: nn.Module) -> None:
    """What a transformer block's weights do not tell: the number of heads, and the activation."""
    heads = source.attn.num_heads
    block.attn.num_heads, block.attn.head_dim = heads, block.attn.embed_dim // heads
    if isinstance(source.mlp.gelu, nn.GELU):  # OpenAI's own weights want QuickGELU, as block has it
        block.mlp.gelu = nn.GELU()
