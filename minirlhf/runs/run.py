"""The folder of a run: one owner, its log, its checkpoints, how it stops and how it goes on.

    RUN/config.json, metrics.jsonl, samples.jsonl    see `metrics.RunLog`
    RUN/checkpoints/step-000010/    the newest ones (see `training_state`), and the best
    RUN/checkpoints/best            a link to the one whose batch had the highest mean reward of all that were saved
    RUN/lock                        while a process works in the folder (see `locks`)

The order of writing is the promise. The lines of a step are on the disk before its checkpoint takes its name, and the
checkpoint says how long the files were then. So whenever a process is killed, the newest checkpoint and the files cut
back to these lengths are the run as it was after that step.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from minirlhf.io.files import PARTIAL, flush_folder, read_json, remove_partial, write_json
from minirlhf.runs.locks import FolderLock, LOCK_FILE
from minirlhf.io.files import read_jsonl
from minirlhf.rl.statistics import Stats
from minirlhf.runs.log import CONFIG_FILE, METRICS_FILE, RunLog, SAMPLES_FILE
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.heads import ActorCritic
from minirlhf.rl.rollout import Rollout
from minirlhf.runs.stopping import Stopped as Stopped
from minirlhf.runs.stopping import StopRequest
from minirlhf.rl.trainer import PPOTrainer
from minirlhf.runs.checkpoint import COUNTERS_FILE, DamagedCheckpoint, load_checkpoint, save_checkpoint

CHECKPOINTS, BEST = "checkpoints", "best"
SHOWN = 5  # samples that are logged at a save


class RunFailed(RuntimeError):
    """An error ended the run; its cause is the error. What was saved is intact, and `Run.resume` goes on from there.

    folder: of the run.
    """

    def __init__(self, folder: Path, message: str):
        super().__init__(message)
        self.folder = folder


class Run:
    """A run in a folder that no other process may use meanwhile; made by `start` or `resume`, used in a `with`.

        with Run.start("runs/mine", trainer, {"why": "a first try"}) as run:
            trainer.train(prompts, reward, run.record)

    Within the `with`, the first Ctrl-C or SIGTERM lets the step end, saves and raises `Stopped`; a second one ends the
    process at once. An error raises `RunFailed`; the last whole step is saved before, if it can be.

    trainer: the one whose run it is.
    """

    def __init__(self, folder: Path, trainer: PPOTrainer, log: RunLog, lock: FolderLock, keep_last: int):
        self.folder, self.trainer = folder, trainer
        self._log, self._lock, self._keep_last = log, lock, keep_last
        self._rewards = _rewards(folder / METRICS_FILE)
        self._recorded = self._saved = trainer.iteration  # steps whose lines are written; that are in a checkpoint
        self._saving = False
        self._stop = StopRequest()
        self._rotate()

    @classmethod
    def start(
        cls, folder: str | os.PathLike[str], trainer: PPOTrainer, config: Mapping[str, Any], keep_last: int = 2
    ) -> Run:
        """A new run, with a checkpoint of the trainer as it is.

        folder: made here. config: written to config.json when all else is there. keep_last: checkpoints to keep,
        besides the best.
        Raises FileExistsError for a folder that is not empty (a run is never overwritten), BlockingIOError if another
        process works in it, OSError if it cannot be written, ValueError for a bad keep_last.
        """
        _check_keep_last(keep_last)
        folder = Path(folder)
        taken = FileExistsError(f"{folder} exists and is not empty; choose another --output, or --resume it")
        if folder.exists() and not _is_unused(folder):
            FolderLock.check(folder)  # in use is the better word for what is wrong
            raise taken
        folder.mkdir(parents=True, exist_ok=True)
        flush_folder(folder.parent)
        lock = FolderLock(folder)
        try:
            if not _is_unused(folder):  # another process was quicker, and is done since
                raise taken
            remove_partial(folder, folder / CHECKPOINTS)
            nothing = {METRICS_FILE: 0, SAMPLES_FILE: 0}
            try:
                save_checkpoint(trainer, _checkpoint(folder, trainer.iteration), nothing)
                write_json(folder / CONFIG_FILE, config)
            except BaseException:
                shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
                raise
            return cls(folder, trainer, RunLog.resume(folder, nothing), lock, keep_last)
        except BaseException:
            lock.release()
            raise

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        ref_policy: ActorCritic | GPT2 | str | os.PathLike[str] | None = None,
        keep_last: int = 2,
        **overrides: Any,
    ) -> Run:
        """Go on with a run from its newest checkpoint; from the one before, with a warning, if that is damaged.

        ref_policy, overrides: as of `PPOTrainer.resume`. What is damaged is kept under another name.
        Raises FileNotFoundError if it is no run, BlockingIOError if another process works in it, ValueError if no
        checkpoint can be read, or as `PPOTrainer.resume`.
        """
        _check_keep_last(keep_last)
        folder = Path(folder)
        read_json(folder / CONFIG_FILE)
        lock = FolderLock(folder)
        try:
            remove_partial(folder, folder / CHECKPOINTS)
            damaged = []
            for step in sorted(_steps(folder), reverse=True):
                checkpoint = _checkpoint(folder, step)
                try:
                    trainer = load_checkpoint(checkpoint, ref_policy, **overrides)
                    break
                except DamagedCheckpoint as error:
                    warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=2)
                    damaged.append(checkpoint)
            else:
                raise ValueError(f"{folder} has no checkpoint that can be read")
            lengths = read_json(checkpoint / COUNTERS_FILE)["run"]
            if lengths is None:
                raise ValueError(f"{checkpoint} does not say how long the log was: no run saved it")
            _rewards(folder / METRICS_FILE, lengths[METRICS_FILE])  # what is wrong there is said before anything is cut
            log = RunLog.resume(folder, lengths)
            for path in damaged:
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
            return cls(folder, trainer, log, lock, keep_last)
        except BaseException:
            lock.release()
            raise

    def record(self, rollout: Rollout, stats: Stats) -> list[tuple[str, float]]:
        """Write down the step that the trainer has just done: the `on_step` of `PPOTrainer.train`.

        A line goes to metrics.jsonl. Every `save_freq` steps, and after the last, some samples go to samples.jsonl,
        and a checkpoint is saved.
        Returns these samples, texts with their scores; none after any other step.
        Raises Stopped, with the step saved, if the run was asked to stop; OSError if something cannot be written.
        """
        c, step = self.trainer.config, self.trainer.iteration
        if step != self._recorded + 1:
            raise ValueError(f"record must be called once after every step: after step {self._recorded} came {step}")
        due = step % c.save_freq == 0 or step == c.iterations
        shown: list[tuple[str, float]] = []
        self._log.metrics(step, stats)
        if due:
            texts, scores = rollout.texts, rollout.scores.tolist()
            rows = random.Random(f"{c.seed} {step - 1} shown").sample(range(len(texts)), min(SHOWN, len(texts)))
            shown = [(texts[i], scores[i]) for i in rows]
            self._log.samples(step, [text for text, _ in shown], [score for _, score in shown])
        self._rewards[step], self._recorded = _rating(stats["reward/mean"]), step
        if due or self._stop.made:
            self._save()
        if self._stop.made:
            raise Stopped(self.folder, f"step {step} of {c.iterations}")
        return shown

    def history(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return self._log.history()

    def __enter__(self) -> Run:
        self._stop.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, Stopped):
                failed = self._doing()
                whole = not self.trainer.interrupted and self.trainer.iteration == self._recorded
                if whole and self._recorded > self._saved and not self._saving:
                    with contextlib.suppress(Exception):  # the first error is the one to tell of
                        self._save()
                raise RunFailed(
                    self.folder,
                    f"{failed} failed: {type(error).__name__}: {error}; the run is saved up to step {self._saved}, in "
                    f"{_checkpoint(self.folder, self._saved)}",
                ) from error
        finally:
            self._stop.__exit__()
            self._lock.release()

    def _doing(self) -> str:
        done, steps = self._recorded, self.trainer.config.iterations
        if self._saving:
            return f"saving step {done} of {steps}"
        return f"step {done + 1} of {steps}" if done < steps else f"what comes after the last step, {steps},"

    def _save(self) -> None:
        self._saving = True
        lengths = self._log.flush()
        save_checkpoint(self.trainer, _checkpoint(self.folder, self._recorded), lengths)
        self._saved = self._recorded
        self._rotate()
        self._saving = False

    def _rotate(self) -> None:
        """Let `best` name the best checkpoint, and remove all but that and the newest ones."""
        steps = sorted(_steps(self.folder))
        kept = steps[-self._keep_last :]
        rated = [step for step in steps if step in self._rewards]  # the very first one has no reward yet
        if rated:
            kept.append(max(rated, key=lambda step: self._rewards[step]))
            _link(self.folder / CHECKPOINTS / BEST, _checkpoint(self.folder, kept[-1]).name)
        for step in set(steps) - set(kept):
            path = _checkpoint(self.folder, step)
            doomed = path.with_name(f".{path.name}{PARTIAL}")  # gone at one moment, though not its bytes
            path.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def _rewards(path: Path, length: int | None = None) -> dict[int, float]:
    """Mean reward of each step in metrics.jsonl, or its first bytes. Raises ValueError for any other line."""
    rewards = {}
    for number, line in enumerate(read_jsonl(path, length), 1):
        step, reward = line.get("step"), line.get("reward/mean", "missing")
        if type(step) is not int or not (reward is None or isinstance(reward, (int, float))):
            raise ValueError(f"{path}, line {number} has no step number or no reward/mean")
        rewards[step] = _rating(reward)
    return rewards


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"step-{step:06d}"


def _steps(folder: Path) -> list[int]:
    """The steps that a run has checkpoints of."""
    if not (folder / CHECKPOINTS).is_dir():
        return []
    names = [path.name for path in (folder / CHECKPOINTS).iterdir() if path.is_dir()]
    return [int(name.removeprefix("step-")) for name in names if re.fullmatch(r"step-\d{6,}", name)]


def _rating(reward: float | None) -> float:
    """A mean reward that can be compared: what is not finite, or null in the log, is the worst."""
    return reward if reward is not None and abs(reward) < math.inf else -math.inf


def _link(link: Path, target: str) -> None:
    """Make a symbolic link, or let it point elsewhere, at one moment."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    temporary = link.with_name(f".{link.name}{PARTIAL}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)
    flush_folder(link.parent)


def _is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or holds no more than a killed `Run.start` leaves: no config.json yet."""
    names = {path.name for path in folder.iterdir()}
    ours = {LOCK_FILE, CHECKPOINTS, *(name for name in names if name.startswith(".") and name.endswith(PARTIAL))}
    return not names or (LOCK_FILE in names and names <= ours)


def _check_keep_last(keep_last: int) -> None:
    if type(keep_last) is not int or keep_last < 1:
        raise ValueError(f"keep_last must be an integer of at least 1, got {keep_last!r}")
