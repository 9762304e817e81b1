"""plpp inspect: what it says of a context equals what a literal tower and a sort say; ours, upstream's, bad files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from plpp_reg.clip import reading, vocabulary
from plpp_reg.clip.prompts import encode
from plpp_reg.clip.reading import SAMPLE
from plpp_reg.commands.cli import main
from plpp_reg.engine.log import RunLog
from plpp_reg.engine.trainer import Trainer
from plpp_reg.errors import InputError
from plpp_reg.loss import functional as PF
from plpp_reg.prompts.inspect import as_json, as_text, inspect_prompts
from plpp_reg.trainers.coop import CoOp
from plpp_reg.trainers.maple import MaPLe

from helpers import engine as engine_helpers
from helpers.engine import CLASSNAMES, make_cfg, make_images, read_tiny, tiny_clip, write_backbone
from helpers.literal import coop_prompts, text_tower

M, D = 3, engine_helpers.WIDTH


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return str(write_backbone(tmp_path_factory.mktemp("clip") / "clip.pt"))


@pytest.fixture(scope="module")
def model():
    return tiny_clip()


def context(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.1


def upstream(folder: Path, state: dict[str, torch.Tensor], epoch: int = 2, name: str = "prompt_learner") -> Path:
    """A checkpoint as Dassl writes it: the warm-up's successor and its optimizer are in it as objects."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9)
    successor = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5.0)
    folder = folder / name
    folder.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": state, "epoch": epoch, "optimizer": optimizer.state_dict(), "val_result": None}
    torch.save({**content, "scheduler": {"successor": successor, "last_epoch": 1}}, folder / f"model.pth.tar-{epoch}")
    (folder / "checkpoint").write_text(f"model.pth.tar-{epoch}\n")
    return folder.parent


def suffix(model, names=CLASSNAMES, dtype=torch.float32) -> torch.Tensor:
    """token_suffix as upstream saves it, for M context vectors."""
    prompts = coop_prompts(model, names, torch.zeros(M, D)).embeddings
    return prompts[:, 1 + M :].to(dtype)


def by_hand(model, v: torch.Tensor, position: str = "end", deep=()) -> tuple[list[float], list[list[float]]]:
    """Perplexity of each vector, and all cosines sorted; every class a prompt, (C, M) rows flattened."""
    prompts = coop_prompts(model, CLASSNAMES, v, position)
    _, hidden = text_tower(model, prompts, deep)
    E = model.token_embedding.weight
    rows = v.expand(len(CLASSNAMES), -1, -1).flatten(0, 1)
    cosines = torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(E, dim=-1).T
    probability = (hidden.flatten(0, 1) @ E.T).softmax(-1)
    perplexity = [1 / float(p[c.argmax()]) for p, c in zip(probability, cosines, strict=True)]
    return perplexity, [sorted(c.tolist(), reverse=True)[:4] for c in cosines]


def assert_reads(reading, perplexity, cosines, rows):
    assert [v.perplexity for v in reading.vectors] == pytest.approx([perplexity[r] for r in rows], rel=1e-3)
    for vector, row in zip(reading.vectors, rows, strict=True):
        assert [w.cosine for w in vector.nearest] == pytest.approx(cosines[row], abs=1e-5)
        assert all(a >= b for (_, a), (_, b) in zip(vector.expected, vector.expected[1:], strict=False))
    mean = sum(math.log(perplexity[r]) for r in rows) / len(rows)
    assert reading.perplexity == pytest.approx(math.exp(mean), rel=1e-3)


# ---- upstream's ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["CoOp", "CoCoOp", "KgCoOp", "class-specific", "module."])
def test_an_upstream_prompt_learner(tmp_path, backbone, model, method):
    v = context(len(CLASSNAMES), M, D) if method == "class-specific" else context(M, D)
    extra = {
        "CoCoOp": {"meta_net.linear1.weight": torch.zeros(2, 32)},
        "KgCoOp": {"bias_vectors": torch.zeros(1, 512), "meta_net.linear1.weight": torch.zeros(2, 2)},
    }.get(method, {})
    prefix = "module." if method == "module." else ""
    run = upstream(tmp_path, {f"{prefix}ctx": v, "token_prefix": torch.zeros(5, 1, D), **extra})
    found = inspect_prompts(run, backbone, k=4)
    rows = range(len(CLASSNAMES) * M) if method == "class-specific" else range(M)
    assert_reads(found.after, *by_hand(model, v), rows)
    assert (found.epoch, found.before, found.epochs) == (2, None, {2: found.after.perplexity})


@pytest.mark.parametrize("position", ["middle", "front"])
def test_the_name_before_the_context_is_read_from_the_file(tmp_path, backbone, model, position):
    v = context(M, D)
    run = upstream(tmp_path, {"ctx": v, "token_suffix": suffix(model)})
    found = inspect_prompts(run, backbone, position=position, k=4)
    perplexity, cosines = by_hand(model, v, position)
    assert_reads(found.after, perplexity, cosines, range(len(CLASSNAMES) * M))
    assert len(set(perplexity)) > M  # the name matters


@pytest.mark.parametrize("method", ["MaPLe", "PromptSRC"])
def test_deep_prompts_take_part(tmp_path, backbone, model, method):
    v, deep = context(M, D), context(M, D, seed=6)
    name = "prompt_learner.compound_prompts_text.0" if method == "MaPLe" else "text_encoder.transformer.resblocks.1.VPT_shallow"
    state = {"prompt_learner.ctx": v, name: deep, "image_encoder.VPT": torch.zeros(2, 64), "logit_scale": torch.zeros(())}
    found = inspect_prompts(upstream(tmp_path, state, name=method), backbone, k=4)
    perplexity, cosines = by_hand(model, v, deep=[deep])
    assert_reads(found.after, perplexity, cosines, range(M))
    assert perplexity[1] != pytest.approx(by_hand(model, v)[0][1], rel=1e-3)


def test_words_themselves_and_the_words_that_it_began_with(tmp_path, backbone, model):
    """A context of words: each is its own nearest word, at cosine 1, nearer than any word to another."""
    ids = encode("a photo of")
    run = upstream(tmp_path, {"ctx": model.token_embedding.weight[ids].half()})
    found = inspect_prompts(run, backbone, init="a_photo_of a")  # of longer words the first count, as in MaPLe
    assert [v.nearest[0].word for v in found.after.vectors] == ["a", "photo", "of"]
    assert all(v.nearest[0].cosine == pytest.approx(1, abs=1e-3) and v.nearer_than == 1.0 for v in found.after.vectors)
    assert found.before.perplexity == pytest.approx(found.after.perplexity, rel=1e-3)
    text = as_text(found)
    assert "of the state before each vector" in " ".join(text.split()) and json.loads(as_json(found))["states"] == "preceding"
    assert "v_2  photo 1.00" in text and "Before training: perplexity" in text


def test_vectors_meet_the_vocabulary_within_a_bound(tmp_path, backbone, model, monkeypatch):
    v = context(len(CLASSNAMES), M, D)
    run = upstream(tmp_path, {"ctx": v})
    whole = inspect_prompts(run, backbone, k=4)
    most, seen = 2, []
    for module in (vocabulary, reading):
        monkeypatch.setattr(module, "MAX_BYTES", most * len(model.token_embedding.weight) * 4 + 100)
    parts = PF.parts

    def watched(rows: int, *bounds: int) -> Iterator[slice]:
        for part in parts(rows, *bounds):
            seen.append(len(range(rows)[part]))
            yield part

    monkeypatch.setattr(PF, "parts", watched)
    found = inspect_prompts(run, backbone, k=4)
    assert max(seen) == most and sum(seen) == SAMPLE + 2 * len(CLASSNAMES) * M
    assert_reads(found.after, *by_hand(model, v), range(len(CLASSNAMES) * M))
    assert [[w.word for w in a.nearest] for a in found.after.vectors] == [
        [w.word for w in b.nearest] for b in whole.after.vectors
    ]


def test_how_far_words_lie_from_each_other(tmp_path, backbone, model):
    found = inspect_prompts(upstream(tmp_path, {"ctx": context(M, D)}), backbone)
    E = torch.nn.functional.normalize(model.token_embedding.weight, dim=-1)
    at = torch.linspace(0, len(E) - 1, SAMPLE).long()
    similarity = E[at] @ E.T
    similarity[torch.arange(len(at)), at] = -1
    nearest = similarity.amax(1)
    assert found.typical.cosines == pytest.approx([nearest.quantile(q).item() for q in (0.05, 0.5, 0.95)], abs=1e-4)
    share = (nearest < found.after.vectors[0].nearest[0].cosine).float().mean().item()
    assert found.after.vectors[0].nearer_than == pytest.approx(share)


def test_every_checkpoint_of_a_run(tmp_path, backbone, model):
    contexts = {epoch: context(M, D, seed=epoch) for epoch in (2, 10)}
    for epoch, v in contexts.items():
        upstream(tmp_path, {"ctx": v}, epoch)
    for source, epoch, shown in [
        (tmp_path, None, 10),
        (tmp_path, 2, 2),
        (tmp_path / "prompt_learner", None, 10),
        (tmp_path / "prompt_learner" / "model.pth.tar-2", None, 2),
    ]:
        found = inspect_prompts(source, backbone, epoch, k=4)
        perplexity, cosines = by_hand(model, contexts[shown])
        assert_reads(found.after, perplexity, cosines, range(M))
        assert found.epoch == shown and set(found.epochs) == {2, 10}
        assert found.epochs[shown] == found.after.perplexity != found.epochs[12 - shown]


# ---- ours ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def our_run(tmp_path_factory, backbone):
    """Two epochs of CoOp_PLPP, and of MaPLe; the contexts before and after each, as the trainers had them."""
    folder = tmp_path_factory.mktemp("ours")
    data = read_tiny(make_images(folder / "data"))
    runs = {}
    for name, cls, keys in (
        ("coop", CoOp, ()),
        ("maple", MaPLe, ("TRAINER.MAPLE.PREC", "fp32", "TRAINER.MAPLE.PROMPT_DEPTH", 1)),
        ("own", CoOp, ("TRAINER.PLPP.STATES", "own")),
    ):
        cfg = make_cfg("TRAINER.PLPP.ENABLED", True, "MODEL.BACKBONE.NAME", backbone, "TRAIN.CHECKPOINT_FREQ", 1, *keys)
        cfg.TRAINER.NAME = f"{cls.__name__}_PLPP"
        trainer = Trainer(cls, cfg, data=data, clip_model=tiny_clip(), log=RunLog(quiet=True))
        before = trainer.measure_prompts().perplexity.item(), trainer.method.contexts()[0].context.detach().clone()
        from plpp_reg.engine.config import to_yaml

        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text(to_yaml(cfg))
        trainer.train(folder / name)
        runs[name] = folder / name, before, trainer
    return runs


@pytest.mark.parametrize("name", ["coop", "maple", "own"])
def test_our_run_before_and_after(our_run, name):
    folder, (perplexity, start), trainer = our_run[name]
    found = inspect_prompts(folder)
    assert found.before.perplexity == pytest.approx(perplexity, rel=1e-4)
    assert [v.norm for v in found.before.vectors] == pytest.approx(start.norm(dim=-1).tolist())
    assert found.after.perplexity == pytest.approx(trainer.measure_prompts().perplexity.item(), rel=1e-4)
    assert set(found.epochs) == {0, 1, 2} and found.epochs[2] == found.after.perplexity
    assert found.logged == {i: e["perplexity"] for i, e in enumerate(trainer.state.history, 1)}
    assert (found.trainer, found.epoch) == (trainer.cfg.TRAINER.NAME, 2)
    assert found.states == trainer.cfg.TRAINER.PLPP.STATES == ("own" if name == "own" else "preceding")
    assert ("of the state at each vector itself" in " ".join(as_text(found).split())) == (name == "own")


def test_the_command_line(our_run, tmp_path, capsys):
    folder, *_ = our_run["coop"]
    assert main(["inspect", str(folder), "--words", "2"]) == 0
    text = capsys.readouterr().out
    assert "Before training: perplexity" in text and "Perplexity by epoch: 0: " in text and text.count("v_3") == 2
    picture = tmp_path / "p.png"
    assert main(["inspect", str(folder / "prompt_learner" / "model.pth.tar-1"), "--json", "--out", str(picture)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["epoch"] == 1 and found["epochs"].keys() == {"0", "1", "2"}
    assert len(found["after"]["vectors"]) == M and len(found["after"]["vectors"][0]["nearest"]) == 5
    assert found["after"]["vectors"][0]["expected"][0].keys() == {"word", "probability"}
    assert picture.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert json.loads(as_json(inspect_prompts(folder)))["before"]["perplexity"] > 1


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_one_line_and_status_2(tmp_path, backbone, model, capsys):
    run = str(upstream(tmp_path / "run", {"ctx": context(M, D), "token_suffix": torch.randn(2, 70, D)}))
    other = str(upstream(tmp_path / "other", {"weight": context(M, D)}))
    gap = str(upstream(tmp_path / "gap", {"ctx": context(M, D), "prompt_learner.compound_prompts_text.1": context(M, D)}))
    (tmp_path / "cut").mkdir()
    cut = tmp_path / "cut" / "model.pth.tar-1"
    cut.write_bytes((Path(run) / "prompt_learner" / "model.pth.tar-2").read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    for words, message in [
        ([str(tmp_path / "nothing")], "expected a run's folder or a checkpoint, there is nothing"),
        ([str(tmp_path / "empty")], "looked for model.pth.tar-<epoch> in it and in its folders, found none"),
        ([run], "--backbone: expected the CLIP that these prompts, of width 64, were trained on, give it"),
        ([run, "--backbone", "embeded"], "did you mean 'embedded'"),
        ([run, "--backbone", "embedded"], "got embedded, of width 128"),
        ([run, "--backbone", backbone, "--load-epoch", "3"], "unknown epoch '3'"),
        ([run, "--backbone", backbone, "--position", "back"], "unknown --position 'back'"),
        ([run, "--backbone", backbone, "--position", "front"], "expected the CLIP whose word vectors are in"),
        ([run, "--backbone", backbone, "--words", "0"], "--words: expected an integer >= 1, got 0"),
        ([run, "--backbone", backbone, "--init", "a photo"], "--init: expected words of 3 tokens or more, got 'a photo', 2"),
        ([other, "--backbone", backbone], "expected context vectors (ctx or prompt_learner.ctx), got ['weight']"),
        ([gap, "--backbone", backbone], "expected prompts for layers 1, 2, …, got them for [2]"),
        ([str(cut), "--backbone", backbone], "refused"),
    ]:
        assert main(["inspect", *words]) == 2, words
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err


def test_a_checkpoint_that_would_run_code_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save({"state_dict": {"ctx": context(M, D)}, "epoch": 1, "scheduler": Evil()}, tmp_path / "model.pth.tar-1")
    with pytest.raises(InputError, match="refused"):
        inspect_prompts(tmp_path / "model.pth.tar-1")
    assert not (tmp_path / "ran").exists()
