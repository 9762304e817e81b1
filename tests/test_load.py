"""load_clip: names, files of every kind, files that must be refused, precision, frozen."""

from __future__ import annotations

import copy
import pickle
import urllib.error
import urllib.request
import warnings
import zipfile

import pytest
import torch
from torch import nn

from plpp_reg.clip.load import EMBEDDED, PRECISIONS, from_weights, load_clip, openai_clip, set_precision
from plpp_reg.errors import InputError


@pytest.fixture(scope="module")
def small(make_clip):
    """A CLIP whose weights are fp16 numbers, as OpenAI's files are: nothing is lost on the way through a file."""
    model = make_clip(width=64, layers=1, vision_layers=1)
    return set_precision(set_precision(model, torch.float16), torch.float32)


def probe(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    image = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
    with torch.no_grad():
        return model.encode_image(image), model.encode_text(openai_clip().tokenize(["a cat", "two tigers"]))


def write_torch(model, path):
    torch.save(model.state_dict(), path)


def write_nested(model, path):
    torch.save({"epoch": 3, "state_dict": model.state_dict()}, path)


def write_legacy(model, path):
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)


def write_safetensors(model, path):
    from safetensors.torch import save_file

    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)


def write_jit(model, path):
    """As OpenAI's archives: half precision, traced encode_image and encode_text, and three scalars beside the weights."""
    model = copy.deepcopy(model)
    for name, value in {"input_resolution": 32, "context_length": 77, "vocab_size": 49408}.items():
        if hasattr(model, name):
            delattr(model, name)
        model.register_buffer(name, torch.tensor(value))
    inputs = {"encode_image": torch.zeros(1, 3, 32, 32), "encode_text": openai_clip().tokenize(["a cat"])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tracer's, and torch's about TorchScript
        torch.jit.trace_module(model, inputs, check_trace=False).save(str(path))


FORMATS = {
    "state_dict": (write_torch, "model.pt"),
    "nested": (write_nested, "model.pth.tar-3"),
    "legacy pickle": (write_legacy, "model.pth"),
    "safetensors": (write_safetensors, "model.safetensors"),
    "jit": (write_jit, "ViT.pt"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_model(kind, small, tmp_path):
    write, name = FORMATS[kind]
    write(small, tmp_path / name)
    model = load_clip(str(tmp_path / name))
    assert all(a.equal(b) for a, b in zip(probe(model), probe(small), strict=True))
    assert model.trained_token_ids is None


@pytest.mark.parametrize("which", ["tiny_vit", "tiny_resnet"])
def test_float32_weights_come_back_to_the_bit(which, request, tmp_path):
    # openai-clip's build_model rounds to fp16; a file with more than fp16 in it must not lose that
    model = request.getfixturevalue(which)
    write_torch(model, tmp_path / "m.pt")
    loaded = load_clip(str(tmp_path / "m.pt")).state_dict()
    changed = [k for k, v in model.state_dict().items() if not loaded[k].equal(v)]
    assert changed == []


@pytest.mark.parametrize("which", ["tiny_vit", "tiny_resnet", "tiny_resnet without counts"])
def test_a_model_is_openai_clips_own_and_nothing_is_drawn(which, request):
    weights = request.getfixturevalue(which.split()[0]).state_dict()
    if "without" in which:  # torch takes a file of before batch norms counted
        weights = {name: weight for name, weight in weights.items() if not name.endswith("num_batches_tracked")}
    theirs = openai_clip().model.build_model(dict(weights)).float()
    theirs.load_state_dict(weights)
    stream = torch.get_rng_state()
    ours = from_weights(weights)
    assert torch.get_rng_state().equal(stream)
    for (name, a), (other, b) in zip(ours.named_modules(), theirs.named_modules(), strict=True):
        assert (name, type(a), a.training) == (other, type(b), b.training)
        held = [{**vars(module), **module._parameters, **module._buffers} for module in (a, b)]
        for key, value in held[1].items():
            if isinstance(value, torch.Tensor):  # the mask of the attention too, which is no buffer
                assert held[0][key].equal(value) and held[0][key].dtype == value.dtype and type(held[0][key]) is type(value)
            elif isinstance(value, (bool, int, float, str, tuple)):
                assert held[0][key] == value
    assert all(p.data_ptr() != weights[name].data_ptr() for name, p in ours.named_parameters())  # nothing is shared


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.999])
@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_cut_short_is_refused_by_name(kind, part, small, tmp_path):
    write, name = FORMATS[kind]
    path = tmp_path / name
    write(small, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    with pytest.raises(InputError) as raised:
        load_clip(str(path))
    assert str(path) in str(raised.value) and "expected CLIP weights" in str(raised.value)
    assert "\n" not in str(raised.value)


class Trap:
    """Unpickling it writes a file."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return exec, (f"open({str(self.target)!r}, 'w').close()",)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:Detected pickle protocol")
@pytest.mark.parametrize("how", ["torch.save", "legacy", "pickle", "nested", "zip with constants.pkl"])
def test_a_malicious_file_is_refused_and_never_executed(how, tmp_path):
    target, path = tmp_path / "executed", tmp_path / "model.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps({"weight": Trap(target)}))
    elif how == "zip with constants.pkl":  # looks like a JIT archive
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("data.pkl", "constants.pkl"):
                archive.writestr(f"model/{name}", pickle.dumps(Trap(target)))
            archive.writestr("model/version", "3\n")
    else:
        content = {"state_dict": {"weight": Trap(target)}} if how == "nested" else Trap(target)
        torch.save(content, path, _use_new_zipfile_serialization=how != "legacy")
    with pytest.raises(InputError, match="expected CLIP weights"):
        load_clip(str(path))
    assert not target.exists()
    if how == "pickle":  # the trap works: this is what would have happened
        pickle.loads(path.read_bytes())
        assert target.exists()


class RunsWhenLoaded(torch.nn.Module):
    """TorchScript runs one method of a module while it loads it."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.target = target
        self.made = torch.zeros(16)

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.target, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.target, self.training = state
        self.made = torch.from_file(self.target, shared=True, size=16)  # makes the file

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


def test_a_jit_archive_that_runs_code_when_it_is_loaded_is_refused(tmp_path):
    target, path = tmp_path / "executed", tmp_path / "m.pt"
    torch.jit.script(RunsWhenLoaded(str(target))).save(str(path))
    with pytest.raises(InputError, match="runs code when it is loaded"):
        load_clip(str(path))
    assert not target.exists()
    torch.jit.load(str(path))  # the trap works
    assert target.exists()


def rewritten(source, path, names):
    """An archive's records again, each under the names that ``names`` gives for its own."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for record in old.infolist():
            for name in names(record.filename):
                new.writestr(name, old.read(record))


def test_torch_finds_code_whatever_the_case_of_its_name_and_so_does_the_refusal(tmp_path):
    target, path = tmp_path / "executed", tmp_path / "m.pt"
    torch.jit.script(RunsWhenLoaded(str(target))).save(str(tmp_path / "plain.pt"))
    rewritten(tmp_path / "plain.pt", path, lambda name: [name.replace(".py", ".PY") if name.endswith(".py") else name])
    with pytest.raises(InputError, match="runs code when it is loaded"):
        load_clip(str(path))
    assert not target.exists()
    torch.jit.load(str(path))  # the trap works
    assert target.exists()


def test_code_that_python_does_not_see_in_an_archive_is_refused(tmp_path):
    """Of two archives in one file Python reads the last, torch the place that the last one's end names: here the first."""
    target, path = tmp_path / "executed", tmp_path / "m.pt"
    torch.jit.script(RunsWhenLoaded(str(target))).save(str(tmp_path / "saved.pt"))
    rewritten(tmp_path / "saved.pt", tmp_path / "trap.pt", lambda name: [name])
    trap = (tmp_path / "trap.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "trap.pt") as old, zipfile.ZipFile(tmp_path / "harmless.pt", "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, old.read(record).replace(b"__setstate__", b"__set_state_"))
    path.write_bytes(trap + (tmp_path / "harmless.pt").read_bytes())
    with zipfile.ZipFile(path) as archive:
        assert not any(b"__setstate__" in archive.read(name) for name in archive.namelist())
    with pytest.raises(InputError, match="runs code when it is loaded"):
        load_clip(str(path))
    assert not target.exists()
    torch.jit.load(str(path))  # the trap works
    assert target.exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*", "ignore:Duplicate name")
@pytest.mark.parametrize("suffix", [".py", ".PY"])
def test_an_archive_with_two_records_of_one_name_is_refused(suffix, small, tmp_path):
    write_jit(small, tmp_path / "plain.pt")
    rewritten(tmp_path / "plain.pt", tmp_path / "m.pt", lambda n: [n, n[:-3] + suffix] if n.endswith(".py") else [n])
    with pytest.raises(InputError, match="two records of one name"):
        load_clip(str(tmp_path / "m.pt"))


@pytest.mark.parametrize("write", [lambda m, p: torch.save(m.state_dict(), p), lambda m, p: write_jit(m, p)], ids=["pt", "jit"])
def test_one_changed_bit_is_refused(write, small, tmp_path):
    path = tmp_path / "m.pt"
    write(small, path)
    content = bytearray(path.read_bytes())
    at = content.find(small.ln_final.weight.detach().numpy().tobytes())
    assert at > 0
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        load_clip(str(path))


def without(state, *keys):
    return {k: v for k, v in state.items() if k not in keys}


NOT_CLIP = {
    "other keys": lambda s: {"weight": torch.zeros(2, 2)},
    "a prompt file": lambda s: {"state_dict": {"ctx": torch.zeros(4, 64)}, "epoch": 50},
    "empty": lambda s: {},
    "a list": lambda s: [torch.zeros(2)],
    "a tensor": lambda s: torch.zeros(2),
    "numbers": lambda s: {"weight": 3},
    "numbered": lambda s: {0: torch.zeros(2)},
    "a tensor missing": lambda s: without(s, "ln_final.bias"),
    "the table missing": lambda s: without(s, "token_embedding.weight"),
    "one tensor more": lambda s: {**s, "surplus": torch.zeros(1)},
    "wrong shape": lambda s: {**s, "ln_final.bias": torch.zeros(3)},
    "projection of one dimension": lambda s: {**s, "text_projection": torch.zeros(3)},
    "scalar table": lambda s: {**s, "positional_embedding": torch.zeros(())},
    "complex numbers": lambda s: {**s, "ln_final.bias": s["ln_final.bias"].to(torch.complex64)},
    "width below a head": lambda s: {**s, "ln_final.weight": torch.zeros(32)},
}


@pytest.mark.parametrize("what", NOT_CLIP)
def test_a_file_that_is_not_a_clip_is_refused(what, small, tmp_path):
    path = tmp_path / "other.pt"
    torch.save(NOT_CLIP[what](small.state_dict()), path)
    with pytest.raises(InputError, match="expected") as raised:
        load_clip(str(path))
    assert str(path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_resnet_of_no_square_grid_is_refused(tiny_resnet, tmp_path):
    # build_model says so with a bare ``assert``, whose message is empty
    grid = {"visual.attnpool.positional_embedding": torch.zeros(4, 256)}
    torch.save({**tiny_resnet.state_dict(), **grid}, tmp_path / "m.pt")
    with pytest.raises(InputError, match=r"m\.pt.*expected weights of OpenAI's CLIP"):
        load_clip(str(tmp_path / "m.pt"))


@pytest.mark.parametrize(
    ("name", "nearest"), [("ViT-B-16", "ViT-B/16"), ("vit-l/14", "ViT-L/14"), ("rn50", "RN50"), ("embeded", EMBEDDED)]
)
def test_an_unknown_name_gets_the_nearest(name, nearest):
    with pytest.raises(InputError, match=rf"unknown backbone .*{name}.*did you mean '{nearest}'"):
        load_clip(name)


def test_a_folder_or_a_missing_file_is_no_backbone(tmp_path):
    for path in (tmp_path, tmp_path / "none.pt"):
        with pytest.raises(InputError, match="unknown backbone"):
            load_clip(str(path))


def test_an_unknown_precision_gets_the_nearest():
    with pytest.raises(InputError, match="unknown precision 'fp61'.*did you mean 'fp16'"):
        load_clip(EMBEDDED, "fp61")


SHA = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"


@pytest.mark.parametrize(
    "error", [urllib.error.URLError("no route"), TimeoutError("no route"), RuntimeError("no route")], ids=type
)
def test_without_a_network_the_message_says_which_file_to_put_where(error, monkeypatch, tmp_path):
    def refuse(*_):
        raise error

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    monkeypatch.setattr(openai_clip().clip, "_download", refuse)
    with pytest.raises(InputError) as raised:
        load_clip("ViT-B/32")
    for part in ("ViT-B/32", str(tmp_path / ".cache" / "clip" / "ViT-B-32.pt"), SHA, "no route", EMBEDDED):
        assert part in str(raised.value)


@pytest.mark.filterwarnings("ignore:.*SHA256.*")
def test_a_tampered_download_is_refused(monkeypatch, tmp_path, small):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # Windows
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    folder = tmp_path / ".cache" / "clip"
    folder.mkdir(parents=True)
    write_torch(small, folder / "ViT-B-32.pt")  # a CLIP, but not the one that the name promises
    with pytest.raises(InputError, match=SHA):
        load_clip("ViT-B/32")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("which", ["tiny_vit", "tiny_resnet"])
def test_frozen_and_cast_as_openai_casts(which, precision, request, tmp_path):
    original = request.getfixturevalue(which)
    write_torch(original, tmp_path / "m.pt")
    model = load_clip(str(tmp_path / "m.pt"), precision)
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(m.training for m in model.modules())
    dtype = PRECISIONS[precision]
    cast = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)
    stay = (nn.LayerNorm, nn.BatchNorm2d, nn.Embedding)
    for module in model.modules():
        if isinstance(module, (*cast, *stay)):
            want = dtype if isinstance(module, cast) else torch.float32
            assert {t.dtype for t in module.state_dict().values() if t.is_floating_point()} == {want}, type(module)
    assert model.text_projection.dtype == dtype and model.dtype == dtype
    assert model.positional_embedding.dtype == model.logit_scale.dtype == torch.float32
    if precision != "fp16":  # on a CPU some of fp16's kernels are missing
        for got, want in zip(probe(model), probe(original), strict=True):
            assert got.dtype == dtype
            torch.testing.assert_close(
                got.float(), want, rtol=0, atol=(2e-2 if precision == "bf16" else 2e-3) * want.abs().max().item()
            )


def test_the_embedded_default():
    model = load_clip()
    assert model.trained_token_ids.dtype == torch.int64 and len(model.trained_token_ids) > 100
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    texts = model.encode_text(openai_clip().tokenize(["a red heart", "a black cat"]))
    assert texts.isfinite().all() and not texts.requires_grad
