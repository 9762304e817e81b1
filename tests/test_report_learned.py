"""What a report says of real runs: learned words, curves, the whole page; nothing of a folder is run or fetched for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from plpp_reg.clip import load
from plpp_reg.clip.load import load_clip
from plpp_reg.clip.prompts import PromptLearner
from plpp_reg.clip.vocabulary import candidate_ids, nearest_words
from plpp_reg.commands.cli import main
from plpp_reg.errors import InputError
from plpp_reg.prompts import recorded
from plpp_reg.results.learned import Learned, no_reader
from plpp_reg.results.tables import records

from helpers.report_page import report_of


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """CoOp with and without PLPP on the embedded default, and a run outside of any protocol."""
    folder = tmp_path_factory.mktemp("trained")
    short = ["OPTIM.MAX_EPOCH", "2", "TEST.SPLIT", "val"]
    command = ["run", "base_to_new", "--methods", "CoOp", "CoOp_PLPP", "--seeds", "3", "--shots", "1"]
    assert main([*command, "--output", str(folder), "--set", *short]) == 0
    own = ["--output-dir", str(folder / "own"), "DATASET.NUM_SHOTS", "1", "TRAINER.COOP.CSC", "True", *short]
    assert main(["train", "--trainer", "CoOp", *own]) == 0
    return folder


def run_of(folder: Path, method: str) -> Path:
    return next(path.parent for path in folder.rglob("result.json") if path.parent.parent.name == method)


def as_of_the_first_version(folder: Path) -> None:
    """Runs of version 0.1 recorded neither the figures of each epoch nor words."""
    for path in folder.rglob("result.json"):
        result = json.loads(path.read_text())
        del result["history"], result["learned"]
        path.write_text(json.dumps(result))


def test_a_record_says_what_the_checkpoint_does(trained: Path) -> None:
    reader = recorded.PromptReader()
    for found in records.find_runs(trained):
        told = Learned(no_reader)
        read, said = reader.read(found.place), told.prompts(found)
        assert told.history(found) == reader.history(found.place)
        assert said.of_class == read.of_class
        assert said.perplexity == pytest.approx(read.perplexity, rel=1e-4)
        for ours, theirs in ((said.before, read.before), (said.after, read.after)):
            assert [[word for word, _ in row] for row in ours] == [[word for word, _ in row] for row in theirs]
            assert [[c for _, c in row] for row in ours] == [pytest.approx([c for _, c in row], abs=1e-5) for row in theirs]


def test_tables_and_reports_of_finished_runs_load_no_torch(trained: Path, tmp_path: Path) -> None:
    code = "import sys; from plpp_reg.commands.cli import main; folder, page = sys.argv[1:]; "
    code += "status = main(['table', folder]), main(['report', folder, '--output', page]); "
    code += "print(status, sorted({n.partition('.')[0] for n in sys.modules} & {'torch', 'torchvision'}), file=sys.stderr)"
    command = [sys.executable, "-c", code, str(trained), str(tmp_path / "page.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.split("\n")[-2] == "(0, 0) []", done.stderr
    assert ": perplexity " in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("value", [{}, {"before": 1}, {"before": {"perplexity": "x"}}, [1]])
@pytest.mark.usefixtures("undrawn")
def test_a_record_that_is_something_else_loses_its_words_alone(trained: Path, tmp_path: Path, value: object) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    path = run_of(folder, "CoOp_PLPP") / "result.json"
    result = json.loads(path.read_text())
    result["learned"] = result["history"] = value
    path.write_text(json.dumps(result))
    page = report_of(folder)
    assert "CoOp_PLPP, seed 3: not read. its result.json: expected the words of its prompts" in page.text
    assert any(text.startswith("CoOp, seed 3: perplexity") for _, text in page.of("summary"))


def test_words_before_and_after_are_those_of_the_run(trained: Path) -> None:
    place = run_of(trained, "CoOp_PLPP")
    model = load_clip()
    torch.manual_seed(3)
    first = PromptLearner(model, ["anything"], 16).ctx
    last = torch.load(place / "prompt_learner" / "model.pth.tar-2", weights_only=True)["state_dict"]["ctx"]
    torch.manual_seed(11)
    expected = torch.rand(1)
    torch.manual_seed(11)
    prompts = recorded.PromptReader().read(place)
    assert torch.equal(torch.rand(1), expected)  # the caller's random stream is as it was
    for found, context in ((prompts.before, first), (prompts.after, last)):
        wanted = nearest_words(context, model.token_embedding.weight, 3, candidate_ids(model))
        assert [[w.word for w in row] for row in found] == [[w.word for w in row] for row in wanted]
    assert prompts.before != prompts.after and prompts.of_class == ""
    logged = recorded.PromptReader().history(place)[0]["perplexity"]  # of the first epoch's only batch, before its step
    assert prompts.perplexity[0] == pytest.approx(logged, rel=1e-4) and prompts.perplexity[1] < logged


@pytest.mark.parametrize("old", [False, True])
def test_the_page_of_real_runs(trained: Path, tmp_path: Path, old: bool, request: pytest.FixtureRequest) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    if old:
        as_of_the_first_version(folder)
        request.getfixturevalue("undrawn")
    page = report_of(folder)
    words = [text for _, text in page.of("summary") if ": perplexity " in text]
    assert [text.split(":")[0] for text in words] == ["CoOp, seed 3", "CoOp_PLPP, seed 3", "CoOp, seed 1"]
    assert "The context of the class " in page.text and "Runs of plpp train (embedded)" in page.text
    titles = " ".join(text for _, text in page.of("figcaption"))
    for name in ("perplexity of the context", "sum of ce + ppl + inverse_ppl", "loss ce", "loss ppl", "loss inverse_ppl"):
        assert name in titles
    environment = next(text for attributes, text in page.of("section") if attributes.get("aria-labelledby") == "environment")
    assert "3 runs" in environment and torch.__version__.split("+")[0] in environment
    configs = [text for _, text in page.of("pre", class_="config")]
    assert len(configs) == 3 and all("TRAINER.NAME" in text for text in configs)


@pytest.mark.usefixtures("undrawn")
def test_a_broken_checkpoint_loses_its_curves_alone(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(trained, folder)
    as_of_the_first_version(folder)
    place = run_of(folder, "CoOp_PLPP") / "prompt_learner" / "model.pth.tar-2"
    place.write_bytes(place.read_bytes()[:1000])
    page = report_of(folder)
    assert "CoOp_PLPP, seed 3: checkpoint" in page.text and "CoOp_PLPP, seed 3: not read. checkpoint" in page.text
    assert any(text.startswith("CoOp, seed 3: perplexity") for _, text in page.of("summary"))


@pytest.mark.usefixtures("undrawn")
def test_nothing_of_a_folder_is_run_and_nothing_downloaded(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_trainer.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    for change, words in (
        (("CoOp_PLPP", "evil_trainer:Trainer"), "a trainer of one's own"),
        (("NAME: embedded", "NAME: ViT-B/16"), "its weights are not on this machine"),
    ):
        folder = tmp_path / words[-7:]
        shutil.copytree(run_of(trained, "CoOp_PLPP"), folder)
        as_of_the_first_version(folder)
        path = folder / "config.yaml"
        assert change[0] in path.read_text()
        path.write_text(path.read_text().replace(*change))
        monkeypatch.setattr(recorded, "openai_clip_folder", lambda: tmp_path / "no cache")
        monkeypatch.setattr(load, "_download", lambda name: pytest.fail("downloads"))
        with pytest.raises(InputError, match=words):
            recorded.PromptReader().read(folder)
        assert words in report_of(folder).text
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["{}", "open_clip:ViT-B-16/{}"])
@pytest.mark.usefixtures("undrawn")
def test_a_report_loads_no_torchscript(trained: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code could be run, and a report needs weights alone."""
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "m.pt")
    folder = tmp_path / "runs"
    shutil.copytree(run_of(trained, "CoOp_PLPP"), folder)
    as_of_the_first_version(folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("NAME: embedded", f"NAME: '{name.format(tmp_path / 'm.pt')}'"))
    monkeypatch.setattr(load, "load_clip", lambda name: pytest.fail("loads it"))
    page = report_of(folder)
    assert "not read. backbone" in page.text and "got a TorchScript archive" in page.text


def test_a_file_named_as_one_of_openais_models_is_not_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "RN50").write_bytes(b"")  # the loader would go by the name, and download
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(recorded, "openai_clip_folder", lambda: tmp_path / "no cache")
    with pytest.raises(InputError, match="not on this machine"):
        recorded.without_download("RN50")
