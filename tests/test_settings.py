"""Runs of different settings are never averaged in silence: rows of their own, pairs of like with like, notes for the rest."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from plpp_reg.engine import config
from plpp_reg.engine.registry import config_nodes
from plpp_reg.engine.run import RunArguments, resolve
from plpp_reg.results import tables
from plpp_reg.results.tables.notes import unnamed
from plpp_reg.results.tables.settings import OF_THE_RUN, Made, Name, differing, pair, relevant, tell_apart

from helpers.records import record
from helpers.report_page import report_of

LR, WEIGHT = "OPTIM.LR", "TRAINER.PLPP.WEIGHT"


def lines(folder: Path, **options: object) -> list[str]:
    return tables.tables_text(folder, "markdown", published=False, **options).splitlines()


def sweep(place: Path, method: str, seeds: dict[int, tuple[float, float]], dataset: str = "dtd", **settings: object) -> None:
    for seed, (base, new) in seeds.items():
        record(place, method, seed, {"base": base, "new": new}, dataset, config={"SEED": seed, LR: 0.002, **settings})


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Seeds 1 and 2 of CoOp_PLPP on DTD with one weight, seed 3, in the same tree, with another; EuroSAT all with the first."""
    plain = {1: (80.0, 50.0), 2: (82.0, 52.0), 3: (84.0, 54.0)}
    for dataset in ("dtd", "eurosat"):
        sweep(tmp_path, "CoOp", plain, dataset, **{WEIGHT: 0.3, "TRAINER.PLPP.ENABLED": False})
    on = {"TRAINER.PLPP.ENABLED": True}
    sweep(tmp_path, "CoOp_PLPP", {1: (81.0, 54.0), 2: (83.0, 58.0)}, **on, **{WEIGHT: 0.3})
    sweep(tmp_path, "CoOp_PLPP", {3: (60.0, 30.0)}, **on, **{WEIGHT: 1.0})
    sweep(tmp_path, "CoOp_PLPP", {s: (b + 2, n) for s, (b, n) in plain.items()}, "eurosat", **on, **{WEIGHT: 0.3})
    return tmp_path


GOLDEN = """\
| DTD | CoOp | 82.00 ± 2.00 | 52.00 ± 2.00 | 63.64 ± 2.10 | 3 |  |
| DTD | CoOp_PLPP | 82.00 ± 1.41 | 56.00 ± 2.83 | 66.55 ± 2.46 | 2 |  |
| DTD | CoOp_PLPP (WEIGHT=1.0) | 60.00 | 30.00 | 40.00 | 1 |  |
| DTD | CoOp_PLPP - CoOp | +1.00 ± 0.00 | +5.00 ± 12.71 | +3.95 ± 8.77 | 2 |  |
| DTD | CoOp_PLPP (WEIGHT=1.0) - CoOp | -24.00 | -24.00 | -25.74 | 1 |  |
| EuroSAT | CoOp | 82.00 ± 2.00 | 52.00 ± 2.00 | 63.64 ± 2.10 | 3 |  |
| EuroSAT | CoOp_PLPP | 84.00 ± 2.00 | 52.00 ± 2.00 | 64.24 ± 2.11 | 3 |  |
| EuroSAT | CoOp_PLPP - CoOp | +2.00 ± 0.00 | +0.00 ± 0.00 | +0.59 ± 0.03 | 3 |  |
| Average of 2 | CoOp | 82.00 ± 2.00 | 52.00 ± 2.00 | 63.64 ± 2.10 | 3 |  |
| Average of 2 | CoOp_PLPP | 82.50 ± 1.41 | 53.50 ± 2.12 | 64.91 ± 2.00 | 2 |  |
| Average of 2 | CoOp_PLPP - CoOp | +1.50 ± 0.00 | +2.50 ± 6.35 | +2.31 ± 4.60 | 2 |  |
"""


def test_golden_table_of_runs_that_were_made_with_different_weights(mixed: Path) -> None:
    found = lines(mixed)
    assert "\n".join(found[4 : 4 + len(GOLDEN.splitlines())]) + "\n" == GOLDEN
    assert [line for line in found if line.startswith("- ")] == [
        "- CoOp_PLPP has TRAINER.PLPP.WEIGHT=0.3 where its row does not name another.",
        "- CoOp_PLPP (WEIGHT=1.0) is not in Average of 2: it lacks EuroSAT.",
    ]


def test_the_same_in_csv_latex_and_the_report(mixed: Path) -> None:
    text = tables.tables_text(mixed, "csv")
    assert "DTD,CoOp_PLPP (WEIGHT=1.0),measured,base,60.0,,1," in text
    assert r"DTD & CoOp\_PLPP (WEIGHT=1.0) & 60.00 & 30.00 & 40.00 & 1 \\" in tables.tables_text(mixed, "latex")
    page = report_of(mixed)
    rows = [text for _, text in page.of("tr", class_="measured")]
    assert any(row.startswith("CoOp_PLPP (WEIGHT=1.0)60.00") for row in rows)
    assert not any(row.startswith("CoOp_PLPP7") for row in rows)  # 74.67 were the mean of all three
    without = page.text[page.text.index("No curves of:") :]
    assert "CoOp_PLPP (WEIGHT=1.0), seed 3" in without and "CoOp_PLPP, seed 1" in without


def test_published_rows_stand_beside_rows_of_any_settings(mixed: Path) -> None:
    assert "| DTD | CoOp (published) |" in tables.tables_text(mixed, "markdown")


def test_runs_in_different_folders_pair_by_their_own_learning_rate(tmp_path: Path) -> None:
    for lr, gain in ((0.002, 1.0), (0.01, 5.0)):
        place = tmp_path / str(lr)
        sweep(place, "CoOp", {1: (70.0, 50.0), 2: (72.0, 50.0)}, **{LR: lr})
        sweep(place, "CoOp_PLPP", {1: (70.0 + gain, 50.0), 2: (72.0 + gain, 50.0)}, **{LR: lr})
    found = lines(tmp_path)
    assert any(line.startswith("| DTD | CoOp_PLPP - CoOp | +1.00 ± 0.00 |") for line in found)
    assert any(line.startswith("| DTD | CoOp_PLPP (LR=0.01) - CoOp (LR=0.01) | +5.00 ± 0.00 |") for line in found)
    assert sum(" - CoOp" in line for line in found) == 2


def test_a_single_treated_row_finds_the_plain_one_of_its_settings(tmp_path: Path) -> None:
    sweep(tmp_path / "a", "CoOp", {1: (70.0, 50.0)}, **{LR: 0.002})
    sweep(tmp_path / "b", "CoOp", {1: (60.0, 50.0)}, **{LR: 0.01})
    sweep(tmp_path / "b", "CoOp_PLPP", {1: (61.0, 50.0)}, **{LR: 0.01, WEIGHT: 0.3})
    (row,) = [line for line in lines(tmp_path) if " - CoOp" in line]
    assert row.startswith("| DTD | CoOp_PLPP - CoOp (LR=0.01) | +1.00 | +0.00 |")


def test_no_difference_without_a_plain_run_of_the_same_settings(tmp_path: Path) -> None:
    for dataset in ("dtd", "eurosat"):
        sweep(tmp_path, "CoOp", {1: (70.0, 50.0)}, dataset, **{LR: 0.002})
        sweep(tmp_path, "CoOp_PLPP", {1: (61.0, 50.0)}, dataset, **{LR: 0.01, WEIGHT: 0.3})
    found = lines(tmp_path)
    assert not any(line.startswith("|") and " - CoOp" in line for line in found)
    assert "- CoOp_PLPP (DTD, EuroSAT) has no difference from CoOp: OPTIM.LR=0.01, there 0.002." in found
    assert ",note,,,,,CoOp_PLPP (DTD" in tables.tables_text(tmp_path, "csv").replace('"', "")
    assert "% CoOp_PLPP (DTD, EuroSAT) has no difference" in tables.tables_text(tmp_path, "latex")
    assert any("has no difference from CoOp" in text for _, text in report_of(tmp_path).of("ul", class_="notes"))


def test_an_average_is_compared_at_its_own_number_of_shots(tmp_path: Path) -> None:
    for dataset in ("dtd", "eurosat"):
        for shots in (4, 16):
            for method, lr in (("CoOp", 0.002), ("CoOp_PLPP", 0.002 if shots == 16 else 0.01)):
                accuracies = {"base": 60.0 + shots, "new": 50.0}
                record(tmp_path, method, 1, accuracies, dataset, shots=shots, config={LR: lr})
    found = [line for line in lines(tmp_path) if line.startswith("| Average") and " - CoOp" in line]
    assert [line.split(" | ")[0] for line in found] == ["| Average of 2, 16 shots"]


def test_a_recipe_that_differs_between_data_sets_is_averaged_and_noted(tmp_path: Path) -> None:
    for dataset, epochs in (("imagenet", 50), ("dtd", 200), ("eurosat", 200)):
        for method in ("CoOp", "CoOp_PLPP"):
            sweep(tmp_path, method, {1: (70.0, 50.0)}, dataset, **{"OPTIM.MAX_EPOCH": epochs})
    found = lines(tmp_path)
    assert any(line.startswith("| Average of 3 | CoOp_PLPP | 70.00 |") for line in found)
    (note,) = [line for line in found if line.startswith("- ")]
    assert note == (
        "- Not the same for all of CoOp, CoOp_PLPP: OPTIM.MAX_EPOCH 50 (ImageNet), 200 (DTD, EuroSAT)."
    )  # fmt: skip


def test_a_hand_that_changed_one_data_set_is_noted_beside_the_average(tmp_path: Path) -> None:
    for i, dataset in enumerate(("caltech101", "dtd", "eurosat", "ucf101", "food101")):
        sweep(tmp_path, "CoOp_PLPP", {1: (70.0, 50.0)}, dataset, **{WEIGHT: 1.0 if i == 1 else 0.3})
    (note,) = [line for line in lines(tmp_path) if line.startswith("- ")]
    wanted = "TRAINER.PLPP.WEIGHT 0.3 (Caltech101, Food101, EuroSAT and 1 more), 1.0 (DTD)."
    assert note == f"- Not the same for all of CoOp_PLPP: {wanted}"


def test_numbers_of_shots_keep_their_recipes_and_split_by_seed_alone(tmp_path: Path) -> None:
    epochs = {1: 50, 4: 100}
    for shots, count in epochs.items():
        for seed in (1, 2, 3):
            made = {"OPTIM.MAX_EPOCH": 10 if (shots, seed) == (4, 2) else count}
            accuracy = {"accuracy": 50.0 + seed}
            record(tmp_path, "CoOp", seed, accuracy, protocol="few_shot", shots=shots, config=made)
    found = lines(tmp_path)
    assert "| DTD | CoOp (MAX_EPOCH=10) |  | 52.00 | 1 |  |" in found
    assert "| DTD | CoOp | 52.00 ± 1.00 | 52.00 ± 1.41 | 2-3 |  |" in found
    assert "- Not the same for all of CoOp: OPTIM.MAX_EPOCH 50 (1 shot), 100 (4 shots)." in found


def test_zero_shot_is_one_row_whatever_training_was_set_and_at_every_number_of_shots(tmp_path: Path) -> None:
    for shots, epochs in ((1, 50), (4, 100)):  # of two sweeps: the first of each runs it
        made = {"OPTIM.MAX_EPOCH": epochs, "INPUT.SIZE": [224, 224]}
        record(tmp_path, "ZeroshotCLIP", 1, {"accuracy": 40.0}, protocol="few_shot", shots=shots, config=made)
    assert "| DTD | ZeroshotCLIP | 40.00 | 40.00 | 1 |  |" in lines(tmp_path)
    record(tmp_path, "ZeroshotCLIP", 2, {"accuracy": 44.0}, protocol="few_shot", shots=4, config={**made, "OPTIM.LR": 1.0})
    assert "| DTD | ZeroshotCLIP | 42.00 ± 2.83 | 42.00 ± 2.83 | 2 |  |" in lines(tmp_path)
    record(tmp_path / "b", "ZeroshotCLIP", 2, {"accuracy": 60.0}, protocol="few_shot", config={"INPUT.SIZE": [336, 336]})
    record(tmp_path / "b", "ZeroshotCLIP", 3, {"accuracy": 40.0}, protocol="few_shot", config={"INPUT.SIZE": [224, 224]})
    assert "| DTD | ZeroshotCLIP (SIZE=[336, 336]) | 60.00 | 60.00 | 60.00 | 1 |  |" in lines(tmp_path)


def test_one_seed_in_two_folders_is_counted_once_and_named_where_it_matters(tmp_path: Path) -> None:
    for place, base in (("a", 70.0), ("b", 70.0), ("c", 71.0)):
        sweep(tmp_path / place, "CoOp", {1: (base, 50.0)})
    found = lines(tmp_path)
    assert any(line.startswith("| DTD | CoOp | 71.00 | 50.00 |") and line.endswith("| 1 |  |") for line in found)
    (note,) = [line for line in found if line.startswith("- ")]
    assert note.startswith("- CoOp (DTD, 16 shots, seed 1) is there 3 times, with other figures: ")
    counts, others = note.split(" counts, ")
    assert f"{tmp_path}/c/" in counts and f"{tmp_path}/a/" in others and f"{tmp_path}/b/" in others
    assert f"{tmp_path}/b/" not in counts


def test_zero_shot_figures_that_differ_between_shots_are_named_or_rows_of_their_own(tmp_path: Path) -> None:
    for place, shots, accuracy in (("a", 1, 40.0), ("b", 4, 41.0), ("c", 1, 42.0)):
        record(tmp_path / place, "ZeroshotCLIP", 1, {"accuracy": accuracy}, protocol="few_shot", shots=shots)
    found = lines(tmp_path)
    assert "| DTD | ZeroshotCLIP | 42.00 | 42.00 | 1 |  |" in found
    (note,) = [line for line in found if line.startswith("- ")]
    assert note.startswith("- ZeroshotCLIP (DTD, seed 1) is there 3 times, with other figures: ")
    assert f"{tmp_path}/c/" in note.partition(" counts")[0]
    large = {"INPUT.SIZE": [336, 336]}
    record(tmp_path / "d", "ZeroshotCLIP", 1, {"accuracy": 60.0}, protocol="few_shot", shots=16, config=large)
    assert "| DTD | ZeroshotCLIP (SIZE=[336, 336]) | 60.00 | 60.00 | 60.00 | 1 |  |" in lines(tmp_path)


def test_every_key_that_a_result_depends_on_tells_rows_apart() -> None:
    """Of a whole configuration: each key by itself, with PLPP, without, and of what learns nothing."""
    whole = config.flat(resolve(RunArguments(trainer="CoOp_PLPP"))[0])
    others = ("TEACHER.", *(f"TRAINER.{node}." for node in config_nodes() if node != "COOP"))
    assert len(others) > 5
    for key, value in whole.items():
        other = {**whole, key: "something else"}
        for method, learns, idle in (
            ("CoOp_PLPP", True, others),
            ("CoOp", True, ("TRAINER.PLPP.", *others)),
            ("ZeroshotCLIP", False, ("TEACHER.", "TRAINER.", "OPTIM.", "TRAIN.", "LOSS.", "DATALOADER.")),
        ):
            runs = [Made("t", Name(method), "c", relevant(c, method, learns)) for c in (whole, other, {**whole, key: value})]
            labels = [label for label, _ in tell_apart(runs)]
            assert labels[0] == labels[2]
            assert (labels[0] != labels[1]) == (key not in OF_THE_RUN and not key.startswith(idle)), (key, method)
    zero_shot, trained, again = (
        relevant(whole, "CoOp_KDPL", True, {"trainer": trainer, "backbone": "RN50", "sha256": digest})
        for trainer, digest in (("ZeroshotCLIP", ""), ("CoOp", "0a"), ("CoOp", "1b"))
    )
    assert zero_shot != trained == again  # each seed's teacher has its own weights
    assert {"SEED", "OUTPUT_DIR", "DATASET.NAME", "DATASET.NUM_SHOTS"} <= OF_THE_RUN
    assert {"MODEL.TEXT_MEMORY_MIB", "TRAINER.PLPP.MEMORY_MIB"} <= OF_THE_RUN and LR not in OF_THE_RUN


def test_keys_of_one_last_name_are_written_whole_and_what_is_not_set_is_said() -> None:
    each = [{"A.LR": 1, "B.LR": 1}, {"A.LR": 2, "B.LR": "x\ny"}, {"A.LR": 2}]
    labels = [str(label) for label, _ in tell_apart([Made("t", Name("CoOp", "V=1"), "c", settings) for settings in each])]
    assert labels == ["CoOp V=1", r"CoOp V=1 (A.LR=2, B.LR='x\ny')", "CoOp V=1 (A.LR=2, B.LR=not set)"]
    assert differing(each) == ["A.LR", "B.LR"] and differing(each[:1]) == []


def test_runs_of_other_tables_methods_or_cells_need_no_telling_apart() -> None:
    made = [Made(t, Name(m), c, {LR: i}) for i, (t, m, c) in enumerate([("t", "CoOp", 1), ("u", "CoOp", 1), ("t", "MaPLe", 1)])]
    made.append(Made("t", Name("CoOp"), 2, {LR: 9}))
    assert [str(label) for label, _ in tell_apart(made)] == ["CoOp", "CoOp", "MaPLe", "CoOp"]


def test_a_row_is_named_by_as_many_parts_of_a_key_as_no_other_key_has() -> None:
    nodes = {"TRAINER.MINE.N_CTX": 4, "TRAINER.COCOOP.N_CTX": 4, "OPTIM.LR": 1, "OPTIM.WARMUP_LR": 1}

    def labels(method: str, **changed: object) -> list[str]:
        each = [nodes, nodes, {**nodes, **{key.replace("__", "."): value for key, value in changed.items()}}]
        return [str(label) for label, _ in tell_apart([Made("t", Name(method), "c", relevant(c, method)) for c in each])]

    assert labels("my.own:Mine", TRAINER__COCOOP__N_CTX=16)[2] == "my.own:Mine (COCOOP.N_CTX=16)"  # which it reads is not known
    assert labels("my.own:Mine", OPTIM__LR=2)[2] == "my.own:Mine (LR=2)"
    assert labels("CoOp", TRAINER__COCOOP__N_CTX=16) == ["CoOp"] * 3  # is no key of CoOp's
    assert labels("CoCoOp_PLPP", TRAINER__COCOOP__N_CTX=16)[2] == "CoCoOp_PLPP (N_CTX=16)"
    assert relevant({"TRAINER.COOP.PREC": "fp16", "TRAINER.MAPLE.PREC": "fp16"}, "KgCoOp") == {"TRAINER.COOP.PREC": "fp16"}


def test_the_usual_settings_of_a_cell_have_the_plain_name_ties_included() -> None:
    def labels(*values: tuple[str, int]) -> list[str]:
        return [str(label) for label, _ in tell_apart([Made("t", Name("CoOp"), cell, {LR: value}) for cell, value in values])]

    assert labels(("a", 2), ("a", 1), ("a", 2)) == ["CoOp", "CoOp (LR=1)", "CoOp"]  # the most runs of the cell
    assert labels(("a", 1), ("a", 2), ("b", 2)) == ["CoOp (LR=1)", "CoOp", "CoOp"]  # as many: the most of all cells
    assert labels(("a", 2), ("a", 1)) == ["CoOp (LR=2)", "CoOp"]  # as many there too: in order, whichever is read first


def test_a_stray_run_takes_no_average_away(tmp_path: Path) -> None:
    for dataset, epochs in (("imagenet", 50), ("dtd", 100), ("eurosat", 100)):
        for method in ("CoOp", "CoOp_PLPP"):
            sweep(tmp_path, method, {1: (70.0, 50.0), 2: (72.0, 50.0)}, dataset, **{"OPTIM.MAX_EPOCH": epochs})
    before = lines(tmp_path)
    sweep(tmp_path / "stray", "CoOp", {2: (10.0, 10.0)}, **{"OPTIM.MAX_EPOCH": 10})
    found = lines(tmp_path)
    assert [line for line in before if line.startswith("|")] == [
        line for line in found if line.startswith("|") and "MAX_EPOCH" not in line
    ]
    assert any(line.startswith("| Average of 3 | CoOp_PLPP - CoOp |") for line in found)
    assert "| DTD | CoOp (MAX_EPOCH=10) | 10.00 | 10.00 | 10.00 | 1 |  |" in found
    assert "- CoOp (MAX_EPOCH=10) is not in Average of 3: it lacks ImageNet, EuroSAT." in found


def test_rows_are_compared_cell_by_cell_with_every_plain_row_of_their_settings() -> None:
    coop, slow, fast, ours = Name("CoOp"), Name("CoOp", "", "LR=1"), Name("CoOp", "", "LR=2"), Name("CoOp_PLPP")
    kinds = {coop: {1: {LR: 1}, 2: {LR: 2}}, ours: {1: {LR: 1, WEIGHT: 9}, 2: {LR: 2}}, Name("KgCoOp_PLPP"): {1: {}}}
    assert pair(kinds) == ({(ours, coop): [1, 2]}, {})
    kinds[ours] = {1: {LR: 1}, 2: {LR: 3}}
    apart = {(ours, "CoOp: OPTIM.LR=3, there 2"): [2]}
    assert pair(kinds) == ({(ours, coop): [1]}, apart)
    kinds = {slow: {1: {LR: 1}}, fast: {4: {LR: 2}}, ours: {1: {LR: 1}, 4: {LR: 2}}}
    assert pair(kinds) == ({(ours, slow): [1], (ours, fast): [4]}, {})
    assert pair({coop: {1: {}}, ours: {2: {}}}) == ({}, {})  # nowhere both


def test_a_row_over_shots_is_compared_where_its_settings_are_there_and_the_rest_is_noted(tmp_path: Path) -> None:
    for dataset in ("dtd", "eurosat"):
        for shots, method, lr in ((16, "CoOp", 1), (4, "CoOp", 1), (16, "CoOp_PLPP", 1), (4, "CoOp_PLPP", 2), (1, "CoOp", 1)):
            record(tmp_path, method, 1, {"accuracy": 50.0 + lr}, dataset, protocol="few_shot", shots=shots, config={LR: lr})
    found = lines(tmp_path)
    assert "| DTD | CoOp_PLPP - CoOp |  |  | +0.00 | 1 |  |" in found
    assert "| Average of 2 | CoOp_PLPP - CoOp |  |  | +0.00 | 1 |  |" in found
    assert "- CoOp_PLPP (DTD 4 shots, EuroSAT 4 shots) has no difference from CoOp: OPTIM.LR=2, there 1." in found
    note = "OPTIM.LR 2 (DTD 4 shots, EuroSAT 4 shots), 1 (DTD 16 shots, EuroSAT 16 shots)."
    assert f"- Not the same for all of CoOp_PLPP: {note}" in found  # in the order of the numbers, not of the folders


def test_an_average_without_one_plain_row_of_its_settings_is_noted(tmp_path: Path) -> None:
    for dataset, ours in (("dtd", 1), ("eurosat", 2)):
        sweep(tmp_path / "a", "CoOp", {1: (70.0, 50.0), 2: (70.0, 50.0)}, dataset, **{LR: 1})
        sweep(tmp_path / "b", "CoOp", {1: (70.0, 50.0)}, dataset, **{LR: 2})
        sweep(tmp_path, "CoOp_PLPP", {1: (71.0, 50.0)}, dataset, **{LR: ours})
    found = lines(tmp_path)
    assert [line.split(" | ")[1] for line in found if " - CoOp" in line] == ["CoOp_PLPP - CoOp", "CoOp_PLPP - CoOp (LR=2)"]
    note = "- CoOp_PLPP has no difference in Average of 2: no row of CoOp has its settings on all of them."
    assert note in found


def test_no_note_tells_of_a_plain_row_that_is_not_there() -> None:
    row = Name("CoOp", settings="LR=0.01")  # the plain one's record lacks the tests of this table
    assert unnamed({row: {("dtd", 16): {LR: 0.01}}}, [SimpleNamespace(method=Name("CoOp"), row=row)]) == []
