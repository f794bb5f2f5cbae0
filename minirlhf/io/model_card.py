"""The origin of a model and its card: metadata of the saved weights, and a short `README.md`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.common.printing import markdown, markdown_table
from minirlhf.io.files import StrPath, atomic_write
from minirlhf.version import __version__

OURS = "<!-- Written by minirlhf and replaced by its next save. Without this line it is yours, and stays as it is. -->"

DECODER = ("text-generation", "AutoModelForCausalLM")
CLASSIFIER = ("text-classification", "AutoModelForSequenceClassification")
# Our class -> what it is, the task in the hub's terms, the class of transformers that reads the same folder.
CLASSES = {
    "GPT2": ("A GPT-2 language model", *DECODER),
    "Llama": ("A language model of the Llama family", *DECODER),
    "ActorCritic": ("A language model with the value head of PPO, in a file that only minirlhf reads", *DECODER),
    "RewardModel": ("A reward model with a scalar head", *CLASSIFIER),
    "BertClassifier": ("A BERT text classifier", *CLASSIFIER),
}

CARD = f"""---
library_name: transformers
pipeline_tag: {{task}}
tags:
- minirlhf
{{base}}---
{OURS}

{{what}}, saved by minirlhf {__version__}.

```python
from minirlhf import {{ours}}

model = {{ours}}.from_pretrained("this/folder")
```

It is in the Hugging Face layout: `transformers.{{theirs}}` reads it, too.
"""


@dataclass(frozen=True)
class Origin:
    """Where a model was loaded from.

    name: a name on the hub, or the last part of a local folder's path (the whole path would reveal private names).
    config: its `config.json`, as read.
    """

    name: str
    config: Mapping[str, Any]

    @classmethod
    def of(cls, source: StrPath, config: Mapping[str, Any]) -> Origin:
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
        base = {"base_model": self.origin.name} if self.origin else {}
        training = {"training": json.dumps({**self.summary})} if self.summary else {}
        return {"library": f"minirlhf {__version__}", **base, **training}

    def text(self) -> str:
        """The card in Markdown, with the front matter that the hub reads."""
        what, task, transformers_class = CLASSES[self.model_class]
        base = self.origin.name if self.origin else ""
        what += f", made from {markdown(base)}" if base else ""
        base = f"base_model: {json.dumps(base)}\n" if "/" in base else ""
        text = CARD.format(task=task, base=base, what=what, ours=self.model_class, theirs=transformers_class)
        if self.summary:
            rows = [(str(name), _shown(value)) for name, value in self.summary.items()]
            text += "\n## Training\n\n" + markdown_table(("", ""), rows)
        return text


def write_card(folder: Path, card: ModelCard) -> None:
    """Write `README.md` into a folder, unless the folder has one that is not ours."""
    path = folder / "README.md"
    if not path.exists() or OURS.encode() in path.read_bytes():
        atomic_write(path, card.text().encode("utf-8"))


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
