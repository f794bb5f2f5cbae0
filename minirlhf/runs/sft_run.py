"""The folder of a supervised run: one owner, its log, its checkpoint, how it stops and how it goes on.

    RUN/config.json, metrics.jsonl, samples.jsonl    see `metrics.RunLog`
    RUN/checkpoint/    the newest one, a model folder like any other (see `checkpoint_folder`)
    RUN/lock           while a process works in the folder (see `locks`)

A line of metrics.jsonl has `sft/loss`, the mean negative log-likelihood of the step's tokens in nats, `sft/progress`,
the share of the run that is done, and what was measured. The lines of a step are on the disk before its checkpoint
takes its place, and the checkpoint says how long the files were then: a run that was killed at any moment goes on from
its checkpoint as if it had not been.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from minirlhf.runs.checkpoint_folder import COUNTERS_FILE
from minirlhf.text.demonstrations import Demonstration
from minirlhf.io.files import PARTIAL, flush_folder, read_json, remove_partial, write_json
from minirlhf.runs.locks import FolderLock, LOCK_FILE
from minirlhf.runs.log import CONFIG_FILE, METRICS_FILE, RunLog, SAMPLES_FILE
from minirlhf.supervised.sft import SFTTrainer
from minirlhf.runs.stopping import StopRequest, Stopped

CHECKPOINT = "checkpoint"
Measure = Callable[[], tuple[Mapping[str, float], Sequence[str]]]


class SFTRun:
    """A supervised run in a folder that no other process may use; made by `start` or `resume`, used in a `with`.

    Within the `with`, the first Ctrl-C or SIGTERM lets the step end, saves and raises `Stopped`; a second one ends the
    process at once.

    trainer: the one whose run it is.
    """

    def __init__(self, folder: Path, trainer: SFTTrainer, log: RunLog, lock: FolderLock):
        self.folder, self.trainer = folder, trainer
        self._log, self._lock, self._stop = log, lock, StopRequest()

    @classmethod
    def start(cls, folder: str | os.PathLike[str], trainer: SFTTrainer, config: Mapping[str, Any]) -> SFTRun:
        """A new run, with a checkpoint of the trainer as it is.

        folder: made here. config: written to config.json when all else is there.
        Raises FileExistsError for a folder that is not empty (a run is never overwritten), BlockingIOError if another
        process works in it, OSError if it cannot be written.
        """
        folder = Path(folder)
        if folder.exists() and not _is_unused(folder):
            FolderLock.check(folder)  # in use is the better word for what is wrong
            raise FileExistsError(f"{folder} exists and is not empty; choose another --output, or --resume it")
        folder.mkdir(parents=True, exist_ok=True)
        flush_folder(folder.parent)
        lock = FolderLock(folder)
        try:
            remove_partial(folder)
            nothing = {METRICS_FILE: 0, SAMPLES_FILE: 0}
            trainer.save_checkpoint(folder / CHECKPOINT, nothing)
            write_json(folder / CONFIG_FILE, config)
            return cls(folder, trainer, RunLog.resume(folder, nothing), lock)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(
        cls, folder: str | os.PathLike[str], demonstrations: Sequence[Demonstration | str], device: str | None = None
    ) -> SFTRun:
        """Go on with a run from its checkpoint; arguments as of `SFTTrainer.resume`.

        Raises FileNotFoundError if it is no run, BlockingIOError if another process works in it, ValueError as
        `SFTTrainer.resume`.
        """
        folder = Path(folder)
        read_json(folder / CONFIG_FILE)
        lock = FolderLock(folder)
        try:
            remove_partial(folder)
            trainer = SFTTrainer.resume(folder / CHECKPOINT, demonstrations, device)
            lengths = read_json(folder / CHECKPOINT / COUNTERS_FILE)["log"]
            return cls(folder, trainer, RunLog.resume(folder, lengths), lock)
        except BaseException:
            lock.release()
            raise

    def train(
        self,
        measure: Measure | None = None,
        on_step: Callable[[float, float], None] | None = None,
        on_measure: Callable[[Mapping[str, float], Sequence[str]], None] | None = None,
    ) -> None:
        """Train to the end. A line a step goes to metrics.jsonl; every `save_freq` steps a checkpoint is saved.

        measure: gives figures, for metrics.jsonl, and samples, for samples.jsonl: before the first step, and before
            each checkpoint. Of randomness it may use generators of its own only.
        on_step: called after every optimizer step with the progress in (0, 1] and the loss.
        on_measure: called with what was measured.
        Raises Stopped, with the step saved, if the run was asked to stop; as `SFTTrainer.train`; OSError.
        """
        trainer = self.trainer

        def write_down(stats: Mapping[str, float], due: bool) -> None:
            figures, samples = measure() if due and measure is not None else ({}, [])
            if stats or figures:
                self._log.metrics(trainer.steps, {**stats, **figures})
            if samples:
                self._log.samples(trainer.steps, samples, [None] * len(samples))
            if due and measure is not None and on_measure is not None:
                on_measure(figures, samples)

        def stepped(progress: float, loss: float) -> None:
            due = trainer.steps % trainer.config.save_freq == 0 or progress >= 1
            write_down({"sft/progress": progress, "sft/loss": loss}, due)
            if due or self._stop.made:
                trainer.save_checkpoint(self.folder / CHECKPOINT, self._log.flush())
            if on_step is not None:
                on_step(progress, loss)
            if self._stop.made:
                raise Stopped(self.folder, f"step {trainer.steps}, {progress:.0%} of the run")

        if trainer.steps == 0:
            write_down({}, True)
        trainer.train(stepped)

    def history(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._log.history()

    def __enter__(self) -> SFTRun:
        self._stop.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.__exit__()
        self._lock.release()


def _is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or holds no more than a killed `SFTRun.start` leaves: no config.json yet."""
    names = {path.name for path in folder.iterdir()}
    ours = {LOCK_FILE, CHECKPOINT, *(name for name in names if name.startswith(".") and name.endswith(PARTIAL))}
    return not names or (LOCK_FILE in names and names <= ours)
