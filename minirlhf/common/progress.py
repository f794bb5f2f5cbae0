"""What follows each step of a training: the caller's functions, the best model so far, and a bar."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

OnStep = Callable[[Any, Any], object]  # gets a step's batch and statistics; True ends the training
BEST_FILE = "best.json"  # in the folder of the best model: its step and reward
SHOWN = {"reward/mean": "reward", "objective/kl": "KL"}  # what the bar says; of other trainings the loss


def functions_of(on_step: Any, name: str = "on_step") -> list[OnStep]:
    """The functions of an argument that may be one, several or None. Raises ValueError for what is no function."""
    found: list[Any] = list(on_step) if isinstance(on_step, (list, tuple)) else [on_step] if on_step else []
    for function in found:
        if not callable(function):
            raise ValueError(f"{name} must be a function, got {function!r}")
    return found


class AfterSteps:
    """A function to call after each step with its batch and statistics; it returns whether the training ends.

    trainer: has `steps_done`, `steps_total` and `processes`, of which the first one shows the bar and writes, and all
        end together; for `save_best` a method `save_pretrained(folder)`.
    on_step: a function or several, each called with batch and statistics; the training ends if one returns True.
    progress: show a bar with reward, KL (or the loss) and the time left, if tqdm is installed.
    evaluate_every: steps between two that are `evaluation_due`. save_best: a folder for the model whose reward was the
        highest, by the evaluations if there are any, else of the batch, with its step in `best.json`; a resumed
        training replaces only what is worse.
    stop_when: called with the statistics; a true value ends the training.
    """

    def __init__(
        self,
        trainer: Any,
        on_step: OnStep | Sequence[OnStep] | None = None,
        progress: bool = True,
        save_best: str | os.PathLike[str] | None = None,
        evaluate_every: int | None = None,
        stop_when: Callable[[Any], object] | None = None,
    ):
        functions = functions_of(on_step)
        functions_of([stop_when or print], "stop_when")
        if evaluate_every is not None and (type(evaluate_every) is not int or evaluate_every < 1):
            raise ValueError(f"evaluate_every must be an integer of at least 1 or None, got {evaluate_every!r}")
        self.evaluate_every = evaluate_every
        self.trainer, self.functions, self.stop_when = trainer, functions, stop_when
        self.best_by = "evaluation/reward" if evaluate_every else "reward/mean"
        self.folder, self.best = None if save_best is None else Path(save_best), -math.inf
        if self.folder is not None and trainer.steps_done > 0 and (self.folder / BEST_FILE).is_file():
            self.best = json.loads((self.folder / BEST_FILE).read_text(encoding="utf-8"))["reward"]
        self.bar: Any = None
        if progress and trainer.processes.first:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self.bar = tqdm(initial=trainer.steps_done, total=trainer.steps_total, unit="step", dynamic_ncols=True)

    def __enter__(self) -> AfterSteps:
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    @property
    def evaluation_due(self) -> bool:
        """Whether the step just done is followed by an evaluation."""
        return self.evaluate_every is not None and self.trainer.steps_done % self.evaluate_every == 0

    def __call__(self, batch: object, stats: Mapping[str, float]) -> bool:
        """Whether the training ends."""
        if self.bar is not None:
            told = [f"{name} {stats[key]:.3f}" for key, name in SHOWN.items() if key in stats]
            told = told or [f"loss {value:.3f}" for key, value in stats.items() if key.endswith("/loss")]
            self.bar.set_postfix_str(", ".join(told), refresh=False)
            self.bar.update()
        scores: Any = getattr(batch, "scores", ())
        if self.trainer.steps_done == 1 and len(scores) > 1 and bool((scores == scores[0]).all()):
            same = f"all scores of the first batch are {scores[0]:g}"
            warnings.warn(f"{same}: such a batch teaches nothing; does the reward see the responses?", stacklevel=3)
        value = stats.get(self.best_by, -math.inf)
        if self.folder is not None and value > self.best:
            self.best = value
            self.trainer.save_pretrained(self.folder)
            content = {"step": self.trainer.steps_done, "reward": value}
            if self.trainer.processes.first:
                (self.folder / BEST_FILE).write_text(json.dumps(content), encoding="utf-8")
        ended = [function(batch, stats) is True for function in self.functions]  # each of them, whatever others say
        ends = any(ended) or (self.stop_when is not None and bool(self.stop_when(stats)))
        return any(self.trainer.processes.gather("whether the training ends", ends))
