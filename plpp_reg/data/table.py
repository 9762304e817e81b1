"""What is known of each data set: where it lies, how it is laid out, its template, its size, where to get it.

Folder names, split files and class-name fixes are those of CoOp's DATASETS page and code, so that people's data folders work
as they are. Keys are upstream's ``DATASET.NAME``; the short name is that of the file in configs/datasets/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

FALLBACK_TEMPLATE = "a photo of a {}."


@dataclass(frozen=True)
class Layout:
    """A data set's folder below the root.

    ``images`` is what the split file's paths are relative to ("" for the folder itself). ``kind`` names the function of
    readers.py that reads the data set's own files, or that splits them where ``split`` is missing. ``needs`` are the files
    and folders without which it cannot.
    """

    folder: str
    images: str
    kind: str
    split: str = ""
    needs: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)  # folder -> class name
    ignored: tuple[str, ...] = ()
    source: str = ""
    split_source: str = ""


@dataclass(frozen=True)
class DatasetEntry:
    """A row of the table.

    ``reader`` is "module:function", called with the root folder and ``options``; ``short`` is the name that people type;
    ``paper`` is the name that tables print; ``sizes`` are the papers' counts of classes, training, validation and test images.
    """

    reader: str
    template: str = FALLBACK_TEMPLATE
    options: Mapping[str, object] = field(default_factory=dict)
    short: str = ""
    paper: str = ""
    sizes: tuple[int, int, int, int] | None = None

    @property
    def layout(self) -> Layout | None:
        return self.options.get("layout")


def _on_disk(
    short: str, paper: str, sizes: tuple[int, int, int, int], layout: Layout, template: str = FALLBACK_TEMPLATE
) -> DatasetEntry:
    return DatasetEntry("plpp_reg.data.readers:read", template, {"layout": layout}, short, paper, sizes)


def _emoji(short: str, **options: object) -> DatasetEntry:
    return DatasetEntry("plpp_reg.data.emoji:read_emoji", options=options, short=short, paper=short)


_DRIVE = "https://drive.google.com/file/d/"
_CLASSNAMES = "classnames.txt"

DATASETS: dict[str, DatasetEntry] = {
    "ImageNet": _on_disk(
        "imagenet",
        "ImageNet",
        (1000, 1281167, 0, 50000),
        Layout(
            "imagenet",
            "images",
            "imagenet",
            needs=("images/train", "images/val", _CLASSNAMES),
            source="https://image-net.org/index.php; classnames.txt: " + _DRIVE + "1-61f_ol79pViBFDG_IDlUQSwoLcn2XXF",
        ),
    ),
    "Caltech101": _on_disk(
        "caltech101",
        "Caltech101",
        (100, 4128, 1649, 2465),
        Layout(
            "caltech-101",
            "101_ObjectCategories",
            "class_folders",
            "split_zhou_Caltech101.json",
            ignored=("BACKGROUND_Google", "Faces_easy"),
            renamed={"airplanes": "airplane", "Faces": "face", "Leopards": "leopard", "Motorbikes": "motorbike"},
            source="http://www.vision.caltech.edu/Image_Datasets/Caltech101/101_ObjectCategories.tar.gz",
            split_source=_DRIVE + "1hyarUivQE36mY6jSomru6Fjd-JzwcCzN",
        ),
    ),
    "OxfordPets": _on_disk(
        "oxford_pets",
        "OxfordPets",
        (37, 2944, 736, 3669),
        Layout(
            "oxford_pets",
            "images",
            "pets",
            "split_zhou_OxfordPets.json",
            needs=("annotations/trainval.txt", "annotations/test.txt"),
            source="https://www.robots.ox.ac.uk/~vgg/data/pets/data/images.tar.gz and annotations.tar.gz beside it",
            split_source=_DRIVE + "1501r8Ber4nNKvmlFVQZ8SeUHTcdTTEqs",
        ),
        "a photo of a {}, a type of pet.",
    ),
    "StanfordCars": _on_disk(
        "stanford_cars",
        "StanfordCars",
        (196, 6509, 1635, 8041),
        Layout(
            "stanford_cars",
            "",
            "cars",
            "split_zhou_StanfordCars.json",
            needs=("devkit/cars_train_annos.mat", "devkit/cars_meta.mat", "cars_test_annos_withlabels.mat"),
            source="http://ai.stanford.edu/~jkrause/car196/cars_train.tgz, cars_test.tgz and "
            "cars_test_annos_withlabels.mat beside it; https://ai.stanford.edu/~jkrause/cars/car_devkit.tgz",
            split_source=_DRIVE + "1ObCFbaAgVu0I-k_Au-gIUcefirdAuizT",
        ),
    ),
    "OxfordFlowers": _on_disk(
        "oxford_flowers",
        "Flowers102",
        (102, 4093, 1633, 2463),
        Layout(
            "oxford_flowers",
            "jpg",
            "flowers",
            "split_zhou_OxfordFlowers.json",
            needs=("imagelabels.mat", "cat_to_name.json"),
            source="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/102flowers.tgz and imagelabels.mat beside it; "
            "cat_to_name.json: " + _DRIVE + "1AkcxCXeK_RCGCEC_GvmWxjcjaNhu-at0",
            split_source=_DRIVE + "1Pp0sRXzZFZq15zVOzKjKBu4A9i01nozT",
        ),
        "a photo of a {}, a type of flower.",
    ),
    "Food101": _on_disk(
        "food101",
        "Food101",
        (101, 50500, 20200, 30300),
        Layout(
            "food-101",
            "images",
            "class_folders",
            "split_zhou_Food101.json",
            source="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
            split_source=_DRIVE + "1QK0tGi096I0Ba6kggatX1ee6dJFIcEJl",
        ),
        "a photo of {}, a type of food.",
    ),
    "FGVCAircraft": _on_disk(
        "fgvc_aircraft",
        "FGVCAircraft",
        (100, 3334, 3333, 3333),
        Layout(
            "fgvc_aircraft",
            "images",
            "aircraft",
            needs=("variants.txt", "images_variant_train.txt", "images_variant_val.txt", "images_variant_test.txt"),
            source="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/archives/fgvc-aircraft-2013b.tar.gz (its folder data/)",
        ),
        "a photo of a {}, a type of aircraft.",
    ),
    "SUN397": _on_disk(
        "sun397",
        "SUN397",
        (397, 15880, 3970, 19850),
        Layout(
            "sun397",
            "SUN397",
            "sun",
            "split_zhou_SUN397.json",
            needs=("ClassName.txt", "Training_01.txt", "Testing_01.txt"),
            source="http://vision.princeton.edu/projects/2010/SUN/SUN397.tar.gz; "
            "https://vision.princeton.edu/projects/2010/SUN/download/Partitions.zip",
            split_source=_DRIVE + "1y2RD81BYuiyvebdN-JymPfyWYcd8_MUq",
        ),
    ),
    "DescribableTextures": _on_disk(
        "dtd",
        "DTD",
        (47, 2820, 1128, 1692),
        Layout(
            "dtd",
            "images",
            "class_folders",
            "split_zhou_DescribableTextures.json",
            source="https://www.robots.ox.ac.uk/~vgg/data/dtd/download/dtd-r1.0.1.tar.gz",
            split_source=_DRIVE + "1u3_QfB467jqHgNXC00UIzbLZRQCg2S7x",
        ),
        "{} texture.",
    ),
    "EuroSAT": _on_disk(
        "eurosat",
        "EuroSAT",
        (10, 13500, 5400, 8100),
        Layout(
            "eurosat",
            "2750",
            "class_folders",
            "split_zhou_EuroSAT.json",
            renamed={
                "AnnualCrop": "Annual Crop Land",
                "Forest": "Forest",
                "HerbaceousVegetation": "Herbaceous Vegetation Land",
                "Highway": "Highway or Road",
                "Industrial": "Industrial Buildings",
                "Pasture": "Pasture Land",
                "PermanentCrop": "Permanent Crop Land",
                "Residential": "Residential Buildings",
                "River": "River",
                "SeaLake": "Sea or Lake",
            },
            source="http://madm.dfki.de/files/sentinel/EuroSAT.zip",
            split_source=_DRIVE + "1Ip7yaCWFi0eaOFUGga0lUdVi_DDQth1o",
        ),
        "a centered satellite photo of {}.",
    ),
    "UCF101": _on_disk(
        "ucf101",
        "UCF101",
        (101, 7639, 1898, 3783),
        Layout(
            "ucf101",
            "UCF-101-midframes",
            "ucf",
            "split_zhou_UCF101.json",
            needs=("ucfTrainTestlist/classInd.txt", "ucfTrainTestlist/trainlist01.txt", "ucfTrainTestlist/testlist01.txt"),
            source=_DRIVE + "10Jqome3vtUA2keJkNanAiFpgbyC9Hc2O (UCF-101-midframes.zip)",
            split_source=_DRIVE + "1I0S0q91hJfsV9Gf4xDIjgDq4AqBNJb1y",
        ),
        "a photo of a person doing {}.",
    ),
    "ImageNetV2": _on_disk(
        "imagenetv2",
        "ImageNetV2",
        (1000, 0, 0, 10000),
        Layout(
            "imagenetv2",
            "imagenetv2-matched-frequency-format-val",
            "imagenet_numbered",
            needs=(_CLASSNAMES,),
            source="https://s3-us-west-2.amazonaws.com/imagenetv2public/imagenetv2-matched-frequency.tar.gz; "
            "classnames.txt: ImageNet's",
        ),
    ),
    "ImageNetSketch": _on_disk(
        "imagenet_sketch",
        "ImageNet-Sketch",
        (1000, 0, 0, 50889),
        Layout(
            "imagenet-sketch",
            "images",
            "imagenet_folders",
            needs=(_CLASSNAMES,),
            source="https://github.com/HaohanWang/ImageNet-Sketch; classnames.txt: ImageNet's",
        ),
    ),
    "ImageNetA": _on_disk(
        "imagenet_a",
        "ImageNet-A",
        (200, 0, 0, 7500),
        Layout(
            "imagenet-adversarial",
            "imagenet-a",
            "imagenet_folders",
            needs=(_CLASSNAMES,),
            source="https://github.com/hendrycks/natural-adv-examples; classnames.txt: ImageNet's",
        ),
    ),
    "ImageNetR": _on_disk(
        "imagenet_r",
        "ImageNet-R",
        (200, 0, 0, 30000),
        Layout(
            "imagenet-rendition",
            "imagenet-r",
            "imagenet_folders",
            needs=(_CLASSNAMES,),
            source="https://github.com/hendrycks/imagenet-r; classnames.txt: ImageNet's",
        ),
    ),
    "emoji": _emoji("emoji"),
    # Every other class of the embedded data set: a source and a target that are not the base and new halves.
    "emoji_even": _emoji("emoji_even", classes="even"),
    "emoji_odd": _emoji("emoji_odd", classes="odd"),
    # The embedded data set's domains: the same test pictures, changed.
    "emoji_grey": _emoji("emoji_grey", domain="grey"),
    "emoji_outline": _emoji("emoji_outline", domain="outline"),
    "emoji_blurred": _emoji("emoji_blurred", domain="blurred"),
    "emoji_rotated": _emoji("emoji_rotated", domain="rotated"),
}
