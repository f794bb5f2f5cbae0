"""What `python -m minirlhf evaluate` was asked for, found on the disk; and where its answer goes."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minirlhf.evaluation.comparison import Evaluation
from minirlhf.evaluation.report import report
from minirlhf.io.files import atomic_write, read_json, read_jsonl, write_json
from minirlhf.runs.log import CONFIG_FILE, METRICS_FILE
from minirlhf.text.text_files import numbered_lines

PROMPTS = ("酒店", "周围", "位置", "前台")  # those of examples/positive_reviews.py
HELD_OUT_PROMPTS = ("早餐", "服务员", "交通", "隔音")
EVALUATION_FILE, REPORT_FILE = "evaluation.json", "report.html"


@dataclass(frozen=True)
class EvaluationRequest:
    """Folders of the models, prompts, and what else is known of the run.

    history, target: of a run, its metrics and KL target; empty and None without one.
    output: the folder for the answer; None: it is printed only.
    """

    policy: str
    reference: str
    prompts: list[str]
    held_out: list[str] | None
    title: str
    history: list[dict[str, Any]]
    target: float | None
    output: Path | None

    @classmethod
    def of(
        cls,
        run: str | None,
        policy: str | None,
        reference: str | None,
        prompts: Sequence[str] | None,
        held_out_prompts: Sequence[str] | None,
        encoding: str,
        output: str | None,
    ) -> EvaluationRequest:
        """From the command line's options; nothing is written.

        prompts: None: those of the run, else PROMPTS with HELD_OUT_PROMPTS. A list of one file is the texts in it.
        Raises ValueError for neither a run nor both folders, or a file that does not fit its encoding,
        FileNotFoundError for a folder that is no run, FileExistsError for an output that is there, ImportError if it
        could not be drawn.
        """
        started = read_json(Path(run) / CONFIG_FILE) if run is not None else {}
        if run is not None:
            policy, reference = policy or str(Path(run) / "policy"), reference or str(Path(run) / "reference")
        if policy is None or reference is None:
            raise ValueError("give --run, or --policy and --reference")
        settings = _object(started, "ppo")
        if prompts is None:
            prompts = _prompts_of(started)
        if prompts is None:
            prompts, held_out_prompts = PROMPTS, held_out_prompts or HELD_OUT_PROMPTS
        return cls(
            policy, reference, _pool(prompts, encoding),
            None if held_out_prompts is None else _pool(held_out_prompts, encoding),
            f"Evaluation of {Path(run).resolve().name if run else Path(policy).resolve().name}",
            read_jsonl(Path(run) / METRICS_FILE) if run is not None else [],
            settings.get("target") if settings.get("adaptive_kl") else None,
            None if output is None else _free(Path(output)),
        )  # fmt: skip

    def write(self, evaluation: Evaluation, about: Mapping[str, Any]) -> None:
        """Leave evaluation.json and report.html in the output folder, if there is one."""
        if self.output is None:
            return
        page = report(evaluation, self.title, about, self.history, self.target)
        self.output.mkdir(parents=True, exist_ok=True)
        write_json(self.output / EVALUATION_FILE, {**about, **evaluation.as_dict()})
        atomic_write(self.output / REPORT_FILE, page.encode("utf-8"))


def _prompts_of(started: Mapping[str, Any]) -> list[str] | None:
    """The pool of a run by an example that has one."""
    prompts = _object(started, "arguments").get("prompts")
    fine = isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts)
    return list(prompts) if isinstance(prompts, list) and fine else None


def _object(content: Mapping[str, Any], key: str) -> dict[str, Any]:
    """The JSON object under a key; empty if there is none."""
    return content[key] if isinstance(content.get(key), dict) else {}


def _pool(prompts: Sequence[str], encoding: str) -> list[str]:
    if len(prompts) == 1 and os.path.isfile(prompts[0]):
        lines = [line for _, line in numbered_lines(prompts[0], encoding)]
        if not lines:
            raise ValueError(f"{prompts[0]} holds no prompts")
        return lines
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        raise FileNotFoundError(f"prompts file {prompts[0]} does not exist")
    return list(prompts)


def _free(output: Path) -> Path:
    """The output folder. Raises before any work if it cannot be one, or holds another answer already."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("the report needs matplotlib: pip install 'minirlhf[examples]'")
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output} is a file, not a folder")
    for name in (EVALUATION_FILE, REPORT_FILE):
        if (output / name).exists():
            raise FileExistsError(f"{output / name} exists; choose another --output")
    return output
