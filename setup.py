"""The metadata of the package. The version is in minirlhf/version.py; settings of tools are in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
(VERSION,) = re.findall(
    r'^__version__ = "(.+)"$', (ROOT / "minirlhf/version.py").read_text(encoding="utf-8"), re.MULTILINE
)

EXAMPLES = ["matplotlib>=3.8", "tqdm>=4.60"]
JUDGE = ["openai>=1.60"]
CHAT = ["jinja2>=3.1.6"]  # older ones have known ways out of the sandbox
YAML = ["pyyaml>=6"]
WEB = ["gradio>=6.7"]  # 6.7: functions of the server for HTML components
STARTER = ["minirlhf-starter>=1"]  # made from weights/, which is too large for this package
TENSORBOARD = ["tensorboard>=2.15"]
NOTEBOOK = ["nbclient>=0.10", "ipykernel>=6.29"]  # to run examples/positive_reviews.ipynb in a test
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.5", "mkdocstrings[python]>=1.0", "latex2mathml>=3.77"]
TESTS = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.6", "hypothesis>=6", "transformers>=4.45",
         "scikit-learn>=1.4", "peft>=0.13", *TENSORBOARD]  # fmt: skip

setup(
    name="minirlhf",
    version=VERSION,
    description="PPO-RLHF for language models in plain PyTorch, written to be read and used",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="the minirlhf authors",
    license="MIT",
    classifiers=[
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["minirlhf", "minirlhf.*"]),
    package_data={"minirlhf": ["py.typed"]},
    entry_points={"console_scripts": ["minirlhf=minirlhf.__main__:main"]},
    python_requires=">=3.10",
    install_requires=["torch>=2.4", "numpy>=1.24", "tokenizers>=0.20", "safetensors>=0.4"],
    extras_require={
        "examples": EXAMPLES,
        "judge": JUDGE,
        "tensorboard": TENSORBOARD,
        "wandb": ["wandb>=0.19"],
        "swanlab": ["swanlab>=0.8"],
        "trackio": ["trackio>=0.15"],
        "chat": CHAT,
        "yaml": YAML,
        "starter": STARTER,
        "web": WEB,
        "docs": DOCS,
        "dev": [*EXAMPLES, *JUDGE, *CHAT, *YAML, *NOTEBOOK, *TESTS, "ruff", "mypy"],
    },
)
