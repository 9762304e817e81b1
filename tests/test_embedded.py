"""The embedded backbone's weight file, and the class table of the emoji data set."""

from __future__ import annotations

import csv
import random
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from plpp_reg.clip import embedded
from plpp_reg.clip.load import openai_clip
from plpp_reg.clip.prompts import encode
from plpp_reg.errors import InputError

TABLE = Path(embedded.__file__).parents[1] / "data" / "emoji.csv"
VOCABULARY, CONTEXT = 49408, 77
# float16 bits of the first row below, as first computed: another platform has to give the same.
FIRST_BITS = [-17924, 12637, -19647, 11430]


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    return embedded.embedded_state_dict()


@pytest.fixture(scope="module")
def table(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return state["token_embedding.weight"].float()


@pytest.fixture(scope="module")
def emoji() -> list[dict[str, str]]:
    with TABLE.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def sample_of(ids: torch.Tensor) -> torch.Tensor:
    return ids[:: len(ids) // 1000]


def largest_cosine(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    unit = F.normalize(table, dim=1)
    cosine = unit[rows] @ unit.T
    cosine[torch.arange(len(rows)), rows] = -1
    return cosine.max(1).values


def untrained_ids() -> torch.Tensor:
    other = torch.ones(VOCABULARY, dtype=torch.bool)
    other[embedded.trained_token_ids()] = False
    return other.nonzero()[:, 0]


def test_state_dict_builds_an_openai_clip(state: dict[str, torch.Tensor]) -> None:
    model = openai_clip().model.build_model(dict(state)).float()
    width = state["token_embedding.weight"].shape[1]
    assert model.vocab_size == VOCABULARY and model.context_length == CONTEXT
    assert state["positional_embedding"].shape == (CONTEXT, width)
    side = model.visual.input_resolution
    tokens = torch.zeros(2, CONTEXT, dtype=torch.long)
    tokens[:, 0], tokens[:, 1], tokens[0, 2], tokens[1, 2] = VOCABULARY - 2, 320, 1929, 2368
    tokens[:, 3] = VOCABULARY - 1
    with torch.no_grad():
        images, texts = model.encode_image(torch.randn(2, 3, side, side)), model.encode_text(tokens)
    assert images.shape == texts.shape == (2, state["text_projection"].shape[1])
    assert images.isfinite().all() and texts.isfinite().all() and not texts[0].equal(texts[1])


def test_every_word_vector_is_finite_and_not_zero(table: torch.Tensor) -> None:
    assert table.shape[0] == VOCABULARY
    assert table.isfinite().all()
    assert table.norm(dim=1).min() > 0
    assert len(table.unique(dim=0)) == VOCABULARY


def test_trained_ids_are_sorted_and_unique() -> None:
    ids = embedded.trained_token_ids()
    assert ids.dtype == torch.int64
    assert (ids.diff() > 0).all()
    assert 0 <= ids[0] and ids[-1] == VOCABULARY - 1
    assert str(len(ids)) == embedded.embedded_metadata()["trained_tokens"]


def test_untrained_rows_have_trained_norms(table: torch.Tensor) -> None:
    trained, other = table[embedded.trained_token_ids()].norm(dim=1), table[untrained_ids()].norm(dim=1)
    assert other.min() > 0.999 * trained.min() and other.max() < 1.001 * trained.max()
    assert other.median() == pytest.approx(trained.median().item(), rel=0.05)


def test_untrained_rows_are_not_singled_out_by_their_neighbours(table: torch.Tensor) -> None:
    trained = largest_cosine(table, sample_of(embedded.trained_token_ids()))
    other = largest_cosine(table, sample_of(untrained_ids()))
    assert other.median() == pytest.approx(trained.median().item(), abs=0.05)
    assert other.max() < 0.999


def test_untrained_rows_lean_to_the_mean_like_trained_ones(table: torch.Tensor) -> None:
    towards = F.normalize(table, dim=1) @ F.normalize(table[embedded.trained_token_ids()].mean(0), dim=0)
    trained, other = towards[embedded.trained_token_ids()], towards[untrained_ids()]
    assert other.mean() == pytest.approx(trained.mean().item(), abs=0.15)


@pytest.mark.parametrize("remembered", [True, False])
def test_two_loads_are_equal_and_share_nothing(state: dict[str, torch.Tensor], remembered: bool) -> None:
    if not remembered:
        embedded._word_vectors.cache_clear()
    again = embedded.embedded_state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
    again["token_embedding.weight"].zero_()
    assert state["token_embedding.weight"].any() and embedded.embedded_state_dict()["token_embedding.weight"].any()


def test_fill_is_the_same_in_parts_and_keeps_its_first_bits() -> None:
    rows = ((torch.arange(24) * 7 % 23 - 11) / 16).half().reshape(6, 4).numpy()
    tokens = torch.arange(100, 108).numpy()
    neighbours = torch.tensor([[0, 1, 2], [3, 4, 5]] * 4, dtype=torch.int16).numpy()
    whole = embedded.fill_untrained(rows, tokens, neighbours, spread=0.5, lean=0.25)
    half = embedded.fill_untrained(rows, tokens[4:], neighbours[4:], spread=0.5, lean=0.25)
    assert (whole[4:] == half).all()
    assert whole.view("int16")[0].tolist() == FIRST_BITS


def test_the_file_is_small() -> None:
    assert embedded.FILE.stat().st_size <= 12_000_000


def test_a_missing_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(embedded, "FILE", tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"none\.safetensors"):
        embedded.embedded_state_dict()


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "FORMAT", "0")
    with pytest.raises(InputError, match="format '1'"):
        embedded.trained_token_ids()


def test_emoji_table_is_sorted_and_unique(emoji: list[dict[str, str]]) -> None:
    assert list(emoji[0]) == ["code", "class", "group"]
    codes = [row["code"] for row in emoji]
    assert codes == sorted(set(codes))
    assert all(row["class"] and row["group"] for row in emoji)


def test_emoji_table_has_no_skin_tones(emoji: list[dict[str, str]]) -> None:
    tones = {f"1F3F{last}" for last in "BCDEF"}
    assert not [row["code"] for row in emoji if tones & set(row["code"].split("-"))]


def test_a_group_has_one_class(emoji: list[dict[str, str]]) -> None:
    classes = defaultdict(set)
    for row in emoji:
        classes[row["group"]].add(row["class"])
    assert not {group: names for group, names in classes.items() if len(names) > 1}


def test_gender_variants_share_a_group(emoji: list[dict[str, str]]) -> None:
    group = {row["code"]: row["group"] for row in emoji}
    assert len({group[code] for code in ("1F468-200D-1F33E", "1F469-200D-1F33E", "1F9D1-200D-1F33E")}) == 1
    assert group["1F9DC-200D-2640-FE0F"] == group["1F9DC-200D-2642-FE0F"] == group["1F9DC"]
    assert group["2640"] != group["2642"]


def test_every_class_can_fill_the_split(emoji: list[dict[str, str]]) -> None:
    """Train 16, validation 4 and test 8 images, whichever way the groups, kept whole, are dealt."""
    sizes = defaultdict(lambda: defaultdict(int))
    for row in emoji:
        sizes[row["class"]][row["group"]] += 1
    assert 24 <= len(sizes) <= 34
    rng = random.Random(1)
    for name, groups in sizes.items():
        for _ in range(20):
            dealt, wanted = [0, 0, 0], [8, 4, 16]
            for size in rng.sample(list(groups.values()), len(groups)):
                dealt[next((i for i in range(3) if dealt[i] < wanted[i]), 2)] += size
            assert all(have >= want for have, want in zip(dealt, wanted, strict=True)), (name, dealt)


def test_class_names_are_made_of_trained_tokens(emoji: list[dict[str, str]]) -> None:
    trained = set(embedded.trained_token_ids().tolist())
    for name in {row["class"] for row in emoji}:
        assert set(encode(f"a photo of a {name}.")) <= trained, name
