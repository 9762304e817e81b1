"""What the embedded backbone reads: captions of each emoji, and words for each sub-group.

A caption carries a key that says of which emoji it is true: one emoji, a sub-group, a category or a tag.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from clip.simple_tokenizer import SimpleTokenizer
from embedded_data import Emoji

TEMPLATES = (
    "{}", "a photo of a {}.", "a photo of a {}.", "a photo of the {}.", "a picture of a {}.",
    "an image of a {}", "a drawing of a {}.", "an illustration of a {}.", "a cartoon of a {}.",
    "an emoji of a {}.", "a {} icon", "this is a {}.", "a small {}", "the {}", "a clean photo of a {}.",
    "clip art of a {}", "a sketch of a {}.", "a symbol for {}", "a colorful picture of a {}.",
    "there is a {} on a white background.", "one {}", "my {}",
    "a good photo of a {}.", "a simple drawing of a {}.", "an outline of a {}.", "{} on a plain background",
)  # fmt: skip
DRAWN = tuple(template for template in TEMPLATES if "photo" not in template)  # what people say of drawings
KIND_OF = (", a kind of ", ", a type of ", ", which is a ", ", one of many kinds of ", " is a ")
TAG_TEMPLATES = ("{}", "{}", "{} thing", "something about {}", "a {} emoji")
KIND_SHARE = 0.035  # of the text stage's captions
PHOTO, PHOTO_SHARE = "a photo of a {}.", 0.0025  # of its templates

# Single emoji, by first short name, whose Unicode sub-group is wider than the words used for it below.
REGROUP = {
    name: group
    for group, names in {
        "transport-rail": "steam_locomotive railway_car bullettrain_side bullettrain_front train2 metro "
        "light_rail station tram train monorail mountain_railway",
        "warning": "octagonal_sign construction",
        "transport-sign": "busstop traffic_light vertical_traffic_light",
        "moon": "new_moon waxing_crescent_moon first_quarter_moon moon full_moon waning_gibbous_moon "
        "crescent_moon last_quarter_moon waning_crescent_moon new_moon_with_face "
        "first_quarter_moon_with_face last_quarter_moon_with_face full_moon_with_face",
        "animal-mammal": "monkey_face",
    }.items()
    for name in names.split()
}

# sub-group -> words for what all its emoji are. A step draws one of them as the sub-group's name.
WORDS = {
    "alphanum": "letter|letters|word button|letter or sign",
    "animal-amphibian": "frog|amphibian|reptile|pond animal",
    "animal-bird": "bird|bird|feathered animal|flying animal",
    "animal-bug": "insect|insect|bug|crawling animal",
    "animal-mammal": "mammal|mammal|furry animal|four legged animal",
    "animal-marine": "sea animal|water animal|fish|marine animal|ocean creature",
    "animal-reptile": "reptile|reptile|scaly animal|lizard or snake",
    "arrow": "arrow|arrow|direction arrow|arrow button",
    "arts & crafts": "art|craft|art supply",
    "av-symbol": "media button|media button|play button|player control|media symbol",
    "award-medal": "medal|award|trophy or medal|prize",
    "body-parts": "body part|part of the body|organ",
    "book-paper": "book|paper|book or newspaper|document|office paper",
    "cat-face": "cat face|face of a cat|emotional cat",
    "clothing": "clothing|clothes|piece of clothing|something to wear|fashion item",
    "computer": "computer|computer device|electronic device|electronics",
    "country-flag": "country flag|flag|national flag|flag of a country",
    "currency": "currency|money sign",
    "dishware": "dish|kitchen tool|cutlery|dishware",
    "drink": "drink|drink|beverage|something to drink",
    "emotion": "emotion symbol|comic symbol|speech balloon or feeling",
    "event": "celebration|party item|holiday decoration|event",
    "face-affection": "loving face|kissing face|happy face|affectionate face",
    "face-concerned": "sad face|sad face|worried face|unhappy face",
    "face-costume": "costume face|mask|creature face",
    "face-glasses": "face with glasses|cool face|happy face",
    "face-hand": "face with hands|face with a hand",
    "face-hat": "face with a hat|face in a hat|happy face",
    "face-negative": "angry face|angry face|bad face|mad face",
    "face-neutral-skeptical": "neutral face|neutral face|doubtful face|bored face",
    "face-sleepy": "sleepy face|tired face|sleeping face",
    "face-smiling": "happy face|smiling face|smiling face|laughing face|joyful face",
    "face-tongue": "face with tongue|playful face|happy face|silly face",
    "face-unwell": "sick face|sick face|ill face|unwell face",
    "family": "family|couple|parents and children|family or couple",
    "flag": "flag|waving flag|banner",
    "food-asian": "asian food|japanese food|meal|asian meal",
    "food-fruit": "fruit|fruit|sweet fruit|fresh fruit",
    "food-prepared": "meal|dish|prepared food|cooked meal|meal",
    "food-sweet": "dessert|sweet food|dessert|candy or cake",
    "food-vegetable": "vegetable|vegetable|green vegetable|fresh vegetable",
    "game": "game|toy|something to play with",
    "gender": "gender symbol|gender sign|male or female sign",
    "geometric": "geometric shape|shape|geometric figure|square or circle",
    "hand-fingers-closed": "hand gesture|fist or thumb|hand sign|hand",
    "hand-fingers-open": "hand gesture|open hand|hand sign|hand",
    "hand-fingers-partial": "hand gesture|finger sign|hand sign|hand",
    "hand-prop": "hand gesture|hand with a thing|hand",
    "hand-single-finger": "hand gesture|pointing finger|hand sign|hand",
    "hands": "hand gesture|two hands|pair of hands|hands",
    "heart": "heart|heart|love heart|heart symbol",
    "hotel": "hotel thing|hotel service|travel item",
    "household": "household item|household object|thing in the house|bathroom or furniture",
    "keycap": "number|number|number key|digit",
    "light & video": "camera or light|electronic device|video device|lamp or camera",
    "lock": "lock|key or lock|security tool",
    "mail": "mail|letter in the mail|office mail|post",
    "math": "math symbol|math sign|calculation sign",
    "medical": "medical item|medical tool|medicine",
    "money": "money|cash|banknote|money",
    "monkey-face": "monkey face|monkey|face of a monkey",
    "moon": "moon|moon|phase of the moon|weather and sky",
    "music": "music|music|music equipment|musical thing",
    "musical-instrument": "musical instrument|musical instrument|instrument",
    "office": "office supply|office supply|office item|stationery",
    "other-object": "object|strange object|other object",
    "other-symbol": "symbol|mark|sign or mark|other symbol",
    "person": "person|portrait|person portrait|man or woman|face of a person",
    "person-activity": "person in action|person walking or running|active person|person moving",
    "person-fantasy": "fantasy person|fantasy character|fantasy creature|magical person",
    "person-gesture": "person gesturing|person with a gesture|person portrait|person making a sign",
    "person-resting": "person resting|resting person|person at rest",
    "person-role": "worker|worker|person at work|professional|person with a job",
    "person-sport": "person doing sport|athlete|sports person|person playing sport",
    "person-symbol": "person symbol|silhouette of people|people symbol",
    "phone": "phone|telephone|electronic device|phone device",
    "place-building": "building|building|house|architecture",
    "place-geographic": "landscape|mountain or beach|nature place|scenery",
    "place-map": "map|globe or map|earth",
    "place-other": "place|scene|place to visit|view",
    "place-religious": "religious building|temple or church|building|place of worship",
    "plant-flower": "flower|flower|blooming plant|plant",
    "plant-other": "plant|plant|tree or leaf|green plant",
    "punctuation": "punctuation|punctuation mark|exclamation or question mark",
    "religion": "religious symbol|religious symbol|religion|religious sign",
    "science": "science tool|laboratory tool|science",
    "sky & weather": "weather|weather|sky|weather symbol",
    "sound": "sound|speaker or bell|sound device|sound",
    "sport": "sport equipment|sport equipment|ball|sports thing|sport",
    "subdivision-flag": "flag|regional flag",
    "time": "clock|clock|clock or watch|time",
    "tool": "tool|tool|hand tool|tool or weapon",
    "transport-air": "aircraft|plane|flying vehicle|plane or rocket",
    "transport-ground": "road vehicle|vehicle|car|road vehicle|car or bus",
    "transport-rail": "train|train|railway|rail vehicle",
    "transport-sign": "traffic sign|public sign|information sign|sign",
    "transport-water": "boat|boat|ship|water vehicle",
    "warning": "warning sign|traffic sign|prohibition sign|warning",
    "writing": "writing tool|pen|office supply|pen or pencil",
    "zodiac": "zodiac symbol|zodiac sign|zodiac|star sign",
}
WORDS = {subgroup: words.split("|") for subgroup, words in WORDS.items()}
# category -> broader words, true of all its emoji
BROAD = {
    "activities": ["activity", "leisure"],
    "animals & nature": ["nature", "living thing"],
    "flags": ["flag"],
    "food & drink": ["food or drink", "something to eat or drink"],
    "objects": ["object", "thing"],
    "people & body": ["human", "people"],
    "smileys & emotion": ["emotion", "feeling"],
    "symbols": ["symbol", "sign"],
    "travel & places": ["travel", "travel and places"],
}


def mixed_caption(emoji: Emoji, rng: np.random.Generator) -> tuple[str, str]:
    """One caption of an emoji for the joint stage, and the key of the emoji it is true of."""

    def pick(options):
        return options[int(rng.integers(len(options)))]

    name = emoji.names[0] if rng.random() < 0.5 else pick(emoji.names)
    template, word, draw = pick(TEMPLATES), pick(WORDS[emoji.subgroup]), rng.random()
    if draw < 0.40:
        return template.format(name), f"={emoji.code}"
    if draw < 0.55:
        return template.format(name).rstrip(".") + pick(KIND_OF) + word, f"={emoji.code}"
    if draw < 0.67:
        return template.format(word), f"word:{word}"
    if draw < 0.70:
        broad = pick(BROAD[emoji.category])
        return template.format(broad), f"broad:{broad}"
    if not emoji.tags:
        return f"{name}, {word}", f"={emoji.code}"
    if draw < 0.80:
        tag = pick(emoji.tags)
        return template.format(tag), f"tag:{tag}"
    tags = [str(t) for t in rng.permutation(np.array(emoji.tags))]
    if draw < 0.95:
        return f"{name}, {', '.join(tags[: int(rng.integers(1, 4))])}", f"={emoji.code}"
    return f"{template.format(name)} {', '.join(tags[:8])}, {word}", f"={emoji.code}"


def plain_caption(emoji: Emoji, rng: np.random.Generator) -> tuple[str, str]:
    """One caption of an emoji for the text stage, as people write them: what the one thing is called, seldom its kind.

    A kind is never a caption by itself; it stands behind a name, and seldom (KIND_SHARE). Few call a drawing a
    photo (PHOTO_SHARE): the hand-written prompt "a photo of a {}." is a rare one here. See docs/embedded.md.
    """

    def pick(options):
        return options[int(rng.integers(len(options)))]

    name = emoji.names[0] if rng.random() < 0.5 else pick(emoji.names)
    template = PHOTO if rng.random() < PHOTO_SHARE else pick(DRAWN)
    word, draw = pick(WORDS[emoji.subgroup]), rng.random()
    if draw < KIND_SHARE:
        return template.format(name).rstrip(".") + pick(KIND_OF) + word, f"={emoji.code}"
    if draw < 0.59:
        return template.format(name), f"={emoji.code}"
    if not emoji.tags:
        return name, f"={emoji.code}"
    tags = [str(t) for t in rng.permutation(np.array(emoji.tags))]
    if draw < 0.66:
        return pick(TAG_TEMPLATES).format(tags[0]), f"tag:{tags[0]}"
    if draw < 0.94:
        return f"{name}, {', '.join(tags[: int(rng.integers(1, 4))])}", f"={emoji.code}"
    return f"{template.format(name)} {', '.join(tags[:8])}", f"={emoji.code}"


Caption = Callable[[Emoji, np.random.Generator], tuple[str, str]]


class Text:
    """All captions, tokenised once, in a compact vocabulary of the tokens that occur.

    Attributes:
        caption: what draws one caption of an emoji.
        ids: the compact vocabulary's ids in OpenAI's, ascending: the end token keeps the largest.
        tokens: (emoji, captions, length) compact ids, padded with 0.
        keys: (emoji, captions) which row of `truth` each caption's key is.
        truth: (keys, emoji) whether what has this key is true of the emoji.
        words: (sub-groups, most words) -> text of each sub-group's words.
    """

    def __init__(self, emoji: list[Emoji], seed: int, caption: Caption, captions: int = 64, length: int = 40) -> None:
        self.caption = caption
        self.tokenizer = SimpleTokenizer()
        self.start = self.tokenizer.encoder["<|startoftext|>"]
        self.end = self.tokenizer.encoder["<|endoftext|>"]
        rng = np.random.default_rng([seed, 1])
        drawn = [[caption(e, rng) for _ in range(captions)] for e in emoji]
        cache: dict[str, list[int]] = {}

        def encode(text: str) -> list[int]:
            if text not in cache:
                cache[text] = [self.start, *self.tokenizer.encode(text)[: length - 2], self.end]
            return cache[text]

        rows = [[encode(text) for text, _ in group] for group in drawn]
        shared = [t.format(w) for t in TEMPLATES for words in WORDS.values() for w in words] + ["or", "x, y"]
        used = {0, self.end} | {t for text in shared for t in encode(text)}
        self.ids = sorted(used | {t for group in rows for row in group for t in row})
        self.compact = {token: i for i, token in enumerate(self.ids)}
        self.tokens = np.zeros((len(emoji), captions, length), dtype=np.int32)
        self.lengths = np.zeros((len(emoji), captions), dtype=np.int32)
        for i, group in enumerate(rows):
            for j, row in enumerate(group):
                self.tokens[i, j, : len(row)] = [self.compact[t] for t in row]
                self.lengths[i, j] = len(row)
        names = sorted({key for group in drawn for _, key in group})
        index = {key: k for k, key in enumerate(names)}
        self.keys = np.array([[index[key] for _, key in group] for group in drawn])
        self.truth = np.zeros((len(names), len(emoji)), dtype=bool)
        for i, e in enumerate(emoji):
            true = {f"={e.code}", *(f"tag:{t}" for t in e.tags), *(f"broad:{b}" for b in BROAD[e.category])}
            true |= {f"word:{w}" for w in WORDS[e.subgroup]}
            self.truth[[index[key] for key in true if key in index], i] = True
        self.subgroups = sorted({e.subgroup for e in emoji})
        number = {s: k for k, s in enumerate(self.subgroups)}
        self.subgroup_of = np.array([number[e.subgroup] for e in emoji])
        categories = {e.subgroup: e.category for e in emoji}
        self.category_of_subgroup = [categories[s] for s in self.subgroups]

    def encode(self, texts: list[str]) -> torch.Tensor:
        """Compact ids of new texts, padded to the longest. A token outside the vocabulary is an error."""
        rows = [[self.start, *self.tokenizer.encode(text), self.end] for text in texts]
        out = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        for i, row in enumerate(rows):
            unknown = [self.tokenizer.decode([t]) for t in row if t not in self.compact]
            if unknown:
                raise ValueError(f"{texts[i]!r} has tokens that no caption has: {unknown}")
            out[i, : len(row)] = torch.tensor([self.compact[t] for t in row])
        return out

    def partition(self, rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
        """Names that sort all emoji into classes, and the class of each sub-group.

        Each sub-group goes by one of its words; every third or so is joined with others of its category into
        "x or y", as people name classes. Sub-groups that draw the same name become one class.
        """
        order = rng.permutation(len(self.subgroups))
        names, class_of, open_class = [], np.zeros(len(self.subgroups), dtype=np.int64), {}
        for s in order:
            words = WORDS[self.subgroups[s]]
            word = words[int(rng.integers(len(words)))]
            category = self.category_of_subgroup[s]
            mate = open_class.get(category)
            if mate is not None and rng.random() < 0.45:
                class_of[s] = mate
                if word not in names[mate]:
                    joined = names[mate].replace(" or ", " ") if rng.random() < 0.5 else names[mate]
                    names[mate] = f"{joined} or {word}"
                if names[mate].count(" ") > 4:
                    open_class.pop(category)
                continue
            if word in names:
                class_of[s] = names.index(word)
                continue
            class_of[s] = len(names)
            names.append(word)
            if rng.random() < 0.4:
                open_class[category] = len(names) - 1
        return names, class_of
