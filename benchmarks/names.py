"""Class names as data sets have them: CIFAR-100's (short), and names like Stanford Cars' (long, alike beginnings)."""

from __future__ import annotations

import random

SHORT = """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox
girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain mouse
mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon
ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table
tank telephone television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm""".split()

MAKES = {
    "Acura": "TL TSX Integra ZDX",
    "Audi": "A5 S4 TT V8 R8",
    "BMW": "X5 X3 M3 M5 Z4",
    "Bentley": "Arnage Mulsanne Continental",
    "Chevrolet": "Impala Malibu Camaro Cobalt Corvette",
    "Dodge": "Caliber Durango Charger Challenger",
    "Ferrari": "California 458",
    "Ford": "Fiesta Mustang Edge Ranger",
    "Honda": "Odyssey Accord",
    "Hyundai": "Elantra Genesis Tucson Sonata Veloster",
    "Jeep": "Compass Patriot Wrangler Liberty",
    "Toyota": "Camry Corolla Sequoia",
    "Volkswagen": "Beetle Golf",
}
BODIES = ("Sedan", "SUV", "Coupe", "Convertible", "Hatchback", "Extended Cab", "Minivan", "Wagon")


def short_names(n: int) -> list[str]:
    """CIFAR-100's; beyond 100 of them, two together."""
    names = [name.replace("_", " ") for name in SHORT]
    return (names + [f"{a} {b}" for a in names for b in names])[:n]


def car_names(n: int) -> list[str]:
    """ "2012 BMW X5 SUV": most of one year, as in Stanford Cars, where 2012 is more than half; all different."""
    rng = random.Random(0)
    names: list[str] = []
    while len(names) < n:
        year = rng.choice([2012] * 6 + [2011, 2010, 2009, 2008, 2007])
        make = rng.choice(list(MAKES))
        name = f"{year} {make} {rng.choice(MAKES[make].split())} {rng.choice(BODIES)}"
        if name not in names:
            names.append(name)
    return names
