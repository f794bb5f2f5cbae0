"""The origin of a model and its card: metadata of the saved weights, and a short `README.md`.

The texts of a training summary come from the caller. The card escapes them, so that no character can end a table cell,
open a tag or start a link.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.io.files import atomic_write
from minirlhf.version import __version__

CARD_FILE = "README.md"
OURS = "<!-- Written by minirlhf and replaced by its next save. Without this line it is yours, and stays as it is. -->"

# Our class -> what it is, the task in the hub's terms, the class of transformers that reads the same folder.
CLASSES = {
    "GPT2": ("A GPT-2 language model", "text-generation", "AutoModelForCausalLM"),
    "ActorCritic": (
        "A GPT-2 language model with the value head of PPO, which stands in a file of its own and which only "
        "minirlhf reads",
        "text-generation",
        "AutoModelForCausalLM",
    ),
    "RewardModel": ("A reward model with a scalar head", "text-classification", "AutoModelForSequenceClassification"),
    "BertClassifier": ("A BERT text classifier", "text-classification", "AutoModelForSequenceClassification"),
}


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from.

    name: a name on the hub, or the last part of a local folder's path (the whole path would reveal private names).
    config: its `config.json`, as read.
    """

    name: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, source: str | os.PathLike[str], config: Mapping[str, Any]) -> Origin:
        """source: what was handed to `from_pretrained`."""
        name = os.path.basename(os.path.abspath(source)) if os.path.isdir(source) else os.fspath(source)
        return cls(name, dict(config))


@dataclass(frozen=True)
class ModelCard:
    """The description of a model that is saved.

    model_class: the class of minirlhf that loads it, one of CLASSES.
    origin: what the model was loaded from before its training, None if unknown.
    summary: of the training, JSON values by name.
    Raises ValueError for any other summary.
    """

    model_class: str
    origin: Origin | None = None
    summary: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            json.dumps({**(self.summary or {})})
        except (TypeError, ValueError) as error:
            raise ValueError(f"summary must map names to JSON values, got {self.summary!r}: {error}") from error

    def metadata(self) -> dict[str, str]:
        """Texts by name, for the header of a safetensors file."""
        content = {"library": f"minirlhf {__version__}"}
        if self.origin:
            content["base_model"] = self.origin.name
        if self.summary:
            content["training"] = json.dumps({**self.summary})
        return content

    def text(self) -> str:
        """The card in Markdown, with the front matter that the hub reads."""
        what, task, transformers_class = CLASSES[self.model_class]
        base_model = self.origin.name if self.origin else ""
        made_from = f", made from {escape(base_model)}" if base_model else ""
        lines = [
            "---",
            "library_name: transformers",
            f"pipeline_tag: {task}",
            "tags:",
            "- minirlhf",
            *([f"base_model: {json.dumps(base_model)}"] if "/" in base_model else []),
            "---",
            OURS,
            "",
            f"{what}{made_from}, saved by minirlhf {__version__}.",
            "",
            "```python",
            f"from minirlhf import {self.model_class}",
            "",
            f'model = {self.model_class}.from_pretrained("this/folder")',
            "```",
            "",
            "It is in the Hugging Face layout, so that other tools read it too:",
            "",
            "```python",
            f"from transformers import {transformers_class}",
            "",
            f'model = {transformers_class}.from_pretrained("this/folder")',
            "```",
        ]
        if self.summary:
            rows = [f"| {escape(str(name))} | {escape(_shown(value))} |" for name, value in self.summary.items()]
            lines += ["", "## Training", "", "| | |", "|---|---|", *rows]
        return "\n".join(lines) + "\n"


def write_card(folder: Path, card: ModelCard) -> None:
    """Write `README.md` into a folder, unless the folder has one that is not ours."""
    path = folder / CARD_FILE
    if path.exists() and OURS.encode() not in path.read_bytes():
        return
    atomic_write(path, card.text().encode("utf-8"))


def escape(text: str) -> str:
    """A text as one line of Markdown that readers show literally, also in a table cell.

    Characters of Markdown's own become entities, which are always text (CommonMark, section 2.5). Line ends, control
    and direction characters become spaces.
    """
    line = "".join(char if char.isprintable() else " " for char in text)
    return re.sub(r"[&<>|`*\[\]\\~$!]", lambda found: f"&#{ord(found[0])};", line)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
