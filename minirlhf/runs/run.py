"""The folder of a run: one owner, its log, its checkpoints, how it stops and how it goes on.

    RUN/config.json                    what the caller wants to remember
    RUN/metrics.jsonl, samples.jsonl   see `log`
    RUN/loggers.json, tensorboard/     see `loggers`
    RUN/checkpoints/step-000010/       the two newest (see `checkpoint`), and the best
    RUN/checkpoints/best               for PPO, a link to the one whose batch had the highest mean reward of all saved
    RUN/lock                           while a process works in the folder (see `locks`)

Of several processes the first one has the lock and writes, and all see the folder.

The lines of a step are on the disk before its checkpoint takes its name, and the checkpoint records what the log was
then. So whenever a process is killed, the newest checkpoint and the log cut back to that record are the run as it was
after that step. The checkpoint also holds the mean rewards of all steps, so a damaged log changes no decision.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import shutil
import signal
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Generic, TypeVar

from minirlhf.device.launch import restarted
from minirlhf.device.processes import agreed, processes
from minirlhf.io.files import PARTIAL, flush_folder, free_path, read_json, read_jsonl, remove_partial, write_json
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.models.sharded import is_sharded
from minirlhf.rl.rollout import Rollout
from minirlhf.runs.checkpoint import (
    COUNTERS_FILE,
    DamagedCheckpoint,
    Trainable,
    load_checkpoint,
    parameter_hash,
    restore_checkpoint,
    save_checkpoint,
    trained,
)
from minirlhf.runs.locks import LOCK_FILE, FolderLock
from minirlhf.runs.log import CONFIG_FILE, METRICS_FILE, RunLog, finite
from minirlhf.runs.loggers import LOGGERS_FILE, Loggers, check_loggers, choose_loggers

CHECKPOINTS, BEST = "checkpoints", "best"
KEPT = 2  # newest checkpoints that stay, besides the best
SIGNALS = (signal.SIGINT, signal.SIGTERM)  # ask a run to stop
TAKEN = "{} exists and is not empty; choose another folder, or resume the run in it"
LINKED = "{} is a symbolic link, and checkpoints are not written through links: put the folder itself in its place"
SHOWN = 5  # samples of a rollout that are logged at a save
Trainer = TypeVar("Trainer", bound=Trainable)


class Stopped(Exception):
    """The run in `folder` was asked to stop, and is saved. done: how far it got."""

    def __init__(self, folder: Path, done: str):
        super().__init__(f"stopped after {done}, which is saved")
        self.folder = folder


class RunFailed(RuntimeError):
    """An error, its cause, ended the run in `folder`. What was saved is intact: `Run.resume` goes on from there."""

    def __init__(self, folder: Path, message: str):
        super().__init__(message)
        self.folder = folder


class Run(Generic[Trainer]):
    """A run of PPO, SFT, reward-model training or DPO in a folder that no other process may use meanwhile.

        with Run.start("runs/mine", trainer, {"why": "a first try"}) as run:
            trainer.train(prompts, reward, run.record)      # PPO
            trainer.train(run.record)                       # SFT, reward model
            trainer.train(pairs, run.record)                # DPO

    `start` or `resume` makes it. Inside the `with`, the first Ctrl-C or SIGTERM lets the step end, saves and raises
    `Stopped`; a second one ends the process at once. An error raises `RunFailed`, after the last complete step was
    saved if possible.
    """

    def __init__(
        self,
        folder: Path,
        trainer: Trainer,
        log: RunLog | None,
        lock: FolderLock | None,
        rewards: dict[int, float | None],
        keep_last: int,
    ):
        self.folder, self.trainer, self._log, self._lock, self._keep_last = folder, trainer, log, lock, keep_last
        self._loggers = None if log is None else Loggers(folder, trainer.steps_done, read_json(folder / CONFIG_FILE))
        self._rewards = rewards  # mean reward of each step; None: not finite
        self._recorded = self._saved = trainer.steps_done  # steps whose lines are written; that are in a checkpoint
        self._saving = False
        self._stop = _StopRequest()
        self._processes = processes()
        with agreed("the checkpoints"):
            self._rotate()

    @classmethod
    def start(
        cls,
        folder: str | os.PathLike[str],
        trainer: Trainer,
        config: Mapping[str, Any],
        keep_last: int = KEPT,
        loggers: Sequence[str] = ("jsonl",),
    ) -> Run[Trainer]:
        """A new run, with a checkpoint of the trainer as it is.

        folder: made here. config: written to config.json when all else is there. keep_last: newest checkpoints that
            stay, besides the best. loggers: "jsonl", "tensorboard", "wandb", "swanlab", "trackio" (see `loggers`).
        If torchrun started the processes again after one died, goes on with the run in the folder instead: the trainer
        gets weights and state of the newest checkpoint.
        Raises ValueError or ImportError for a logger that is unknown or not installed, FileExistsError for a folder
        that is not empty (a run is never overwritten), BlockingIOError if another process works in it, OSError if it
        cannot be written, and as the trainer's `state_dict`.
        """
        _check_keep_last(keep_last)
        check_loggers(loggers)
        trainer.state_dict()  # what cannot be saved is refused before anything is written
        group, lock, log = processes(), None, None
        folder = group.broadcast("folder", Path(folder))
        if group.broadcast("whether to go on", restarted() and (folder / CONFIG_FILE).is_file()):

            def restored(checkpoint: Path) -> Trainer:
                restore_checkpoint(trainer, checkpoint)
                return trainer

            return cls._go_on(folder, restored, keep_last)
        with contextlib.ExitStack() as undo:
            with agreed("the folder of the run"):
                if group.first:
                    cls.check_new(folder)
                    folder.mkdir(parents=True, exist_ok=True)
                    flush_folder(folder.parent)
                    lock = FolderLock(folder)
                    undo.callback(lock.release)
                    if not _is_unused(folder):  # another process was quicker, and has ended since
                        raise FileExistsError(TAKEN.format(folder))
                    remove_partial(folder, folder / CHECKPOINTS)
            _check_shared(folder)
            with agreed("the first checkpoint"):
                record = None
                if group.first:
                    log = RunLog(folder)
                    undo.callback(shutil.rmtree, folder / CHECKPOINTS, ignore_errors=True)
                    record = {"log": log.flush(), "rewards": {}}
                if group.first or is_sharded(trained(trainer)):
                    save_checkpoint(trainer, _checkpoint(folder, trainer.steps_done), record)
                if group.first:
                    undo.callback((folder / LOGGERS_FILE).unlink, missing_ok=True)
                    choose_loggers(folder, loggers)
                    write_json(folder / CONFIG_FILE, config)
            undo.pop_all()
        return cls(folder, trainer, log, lock, {}, keep_last)

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        ref_policy: ActorCritic | Decoder | str | os.PathLike[str] | None = None,
        *,
        data: Sequence[Any] | None = None,
        keep_last: int = KEPT,
        loggers: Sequence[str] | None = None,
        **overrides: Any,
    ) -> Run[Any]:
        """Go on with a run from its newest checkpoint; from the one before, with a warning, if that is damaged.

        ref_policy, data, overrides: as in `load_checkpoint`. loggers: None: those that it had, and the same curves.
        A damaged checkpoint, or one of another step than its name says, is kept under another name; a damaged log is
        named in a warning and repaired as far as possible (see `RunLog.resume`).
        Raises FileNotFoundError if it is no run, BlockingIOError if another process works in it, OSError if a file to
        be written, or the newest checkpoint, is a symbolic link, ValueError if no checkpoint can be read, or as
        `load_checkpoint`.
        """
        _check_keep_last(keep_last)
        check_loggers(loggers or ())
        folder = processes().broadcast("folder", Path(folder))
        return cls._go_on(folder, lambda path: load_checkpoint(path, ref_policy, data, **overrides), keep_last, loggers)

    @classmethod
    def _go_on(
        cls, folder: Path, load: Callable[[Path], Any], keep_last: int, loggers: Sequence[str] | None = None
    ) -> Run[Any]:
        """The run in a folder with the trainer that `load` makes of its newest checkpoint."""
        group, log, damaged = processes(), None, []
        with contextlib.ExitStack() as undo:
            with agreed("the folder of the run"):
                read_json(folder / CONFIG_FILE)
                if (folder / "checkpoint").is_dir():
                    raise ValueError(
                        f"{folder} is a run of supervised fine-tuning by minirlhf 0.1.0, which can resume it"
                    )
                if (folder / CHECKPOINTS).is_symlink():
                    raise OSError(LINKED.format(folder / CHECKPOINTS))
                lock = FolderLock(folder) if group.first else None
                if lock is not None:
                    undo.callback(lock.release)
                    remove_partial(folder, folder / CHECKPOINTS)
            _check_shared(folder)
            for step in reversed(group.broadcast("checkpoints", _steps(folder, linked=True))):
                checkpoint = _checkpoint(folder, step)
                try:
                    with agreed("a checkpoint"):
                        if checkpoint.is_symlink() and not checkpoint.is_dir():
                            raise OSError(LINKED.format(checkpoint))
                        trainer = load(checkpoint)
                        record = read_json(checkpoint / COUNTERS_FILE).get("run")
                        if record is None:
                            raise ValueError(f"{checkpoint} was saved by no run: it does not say what the log was")
                        if trainer.steps_done != step:  # someone copied or renamed it
                            raise DamagedCheckpoint(f"{checkpoint} is a checkpoint of step {trainer.steps_done}")
                        if checkpoint.is_symlink():  # to go back would drop the steps that it holds
                            raise OSError(LINKED.format(checkpoint))
                    break
                except DamagedCheckpoint as error:
                    warnings.warn(f"{error}; going back to the checkpoint before it", stacklevel=3)
                    damaged.append(checkpoint)
            else:
                raise ValueError(f"{folder} has no checkpoint that can be read")
            rewards = {int(number): reward for number, reward in record["rewards"].items()}
            with agreed("the log"):
                if group.first:
                    log = RunLog.resume(folder, record["log"], step, rewards)
                    for path in damaged:
                        if not path.is_symlink():
                            path.rename(free_path(path.with_name(f"{path.name}.damaged")))
                    if loggers is not None:
                        choose_loggers(folder, loggers)
            run = cls(folder, trainer, log, lock, rewards, keep_last)
            undo.pop_all()
        return run

    @staticmethod
    def check_new(folder: str | os.PathLike[str]) -> None:
        """Raise what `start` raises for a folder that holds something, before anything else is done."""
        folder = Path(folder)
        if folder.exists() and not _is_unused(folder):
            FolderLock.check(folder)  # "in use" says better what is wrong
            raise FileExistsError(TAKEN.format(folder))

    @property
    def due(self) -> bool:
        """Whether `record` will save the step just done: every `save_freq` steps, and the last."""
        step = self.trainer.steps_done
        return step % self.trainer.config.save_freq == 0 or step == self.trainer.steps_total

    def record(
        self, batch: object, stats: Mapping[str, float], texts: Sequence[str] = ()
    ) -> list[tuple[str, float | None]]:
        """Write down the step that the trainer has just done: the `on_step` of every trainer's `train`.

        batch: of the step; of a Rollout, some samples go to samples.jsonl whenever a checkpoint is due.
        stats: a line of metrics.jsonl. texts: more samples, without scores.
        Returns the samples that were logged, texts with their scores.
        Raises Stopped, with the step saved, if the run was asked to stop; OSError if something cannot be written.
        """
        step, total = self.trainer.steps_done, self.trainer.steps_total
        if step != self._recorded + 1:
            raise ValueError(f"record must be called once after every step: after step {self._recorded} came {step}")
        shown: list[tuple[str, float | None]] = []
        if self.due and isinstance(batch, Rollout):
            scored = list(zip(batch.texts, batch.scores.tolist(), strict=True))
            generator = random.Random(f"{self.trainer.config.seed} {step - 1} shown")
            shown += generator.sample(scored, min(SHOWN, len(scored)))
        shown += [(text, None) for text in texts]
        self.log(stats, shown)
        self._recorded = step
        if "reward/mean" in stats:
            self._rewards[step] = finite(stats["reward/mean"])
        stop = any(self._processes.gather("whether to stop", self._stop.made))
        if self.due or stop:
            self._save()
        if stop:
            raise Stopped(self.folder, f"step {step} of {total}")
        return shown

    def log(self, stats: Mapping[str, float], samples: Sequence[tuple[str, float | None]] = ()) -> None:
        """Append statistics and samples of the present step to the log, such as figures measured before the first."""
        with agreed("the log"):
            for log in (self._log, self._loggers):  # none but in the first process
                if log is not None:
                    log.metrics(self.trainer.steps_done, stats)
                    if samples:
                        log.samples(self.trainer.steps_done, samples)

    def history(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return read_jsonl(self.folder / METRICS_FILE)

    def __enter__(self) -> Run[Trainer]:
        self._stop.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if isinstance(error, Exception) and not isinstance(error, Stopped):
                done, steps = self._recorded, self.trainer.steps_total
                failed = f"step {done + 1} of {steps}" if done < steps else f"what comes after the last step, {steps},"
                if steps == 0:  # DPO has had no pairs yet
                    failed = "what comes before the first step"
                if self._saving:
                    failed = f"saving step {done} of {steps}"
                elif (
                    not self.trainer.interrupted
                    and self.trainer.steps_done == done > self._saved
                    and not is_sharded(trained(self.trainer))  # whose checkpoint needs all processes
                ):
                    with contextlib.suppress(Exception):  # the first error is the one to report
                        self._write()  # without the other processes, which may have ended
                raise RunFailed(
                    self.folder,
                    f"{failed} failed: {type(error).__name__}: {error}; the run is saved up to step {self._saved}, in "
                    f"{_checkpoint(self.folder, self._saved)}",
                ) from error
            if error is None and self.trainer.steps_done == self._recorded > self._saved:  # the training ended early
                self._save()
        finally:
            self._stop.__exit__()
            if self._loggers is not None:
                self._loggers.close()
            if self._lock is not None:
                self._lock.release()

    def _save(self) -> None:
        self._saving = True
        if self._processes.on:
            self._processes.same("the weights at a save", parameter_hash(self.trainer))
        with agreed("saving"):
            self._write()
        self._saving = False

    def _write(self) -> None:
        record = None
        if self._log is not None:
            record = {"log": self._log.flush(), "rewards": {str(step): x for step, x in self._rewards.items()}}
        if record is not None or is_sharded(trained(self.trainer)):
            save_checkpoint(self.trainer, _checkpoint(self.folder, self._recorded), record)
        self._saved = self._recorded
        self._rotate()

    def _rotate(self) -> None:
        """Let `best` name the best checkpoint, and remove all but that and the newest ones."""
        if not self._processes.first:
            return
        steps = _steps(self.folder)
        kept = steps[-self._keep_last :]
        rated = {step: self._rewards[step] for step in steps if step in self._rewards}  # the first one has no reward
        if rated:
            best = max(rated, key=lambda step: -math.inf if (reward := rated[step]) is None else reward)
            kept.append(best)
            _link(self.folder / CHECKPOINTS / BEST, _checkpoint(self.folder, best).name)
        for step in set(steps) - set(kept):
            path = _checkpoint(self.folder, step)
            doomed = path.with_name(f".{path.name}{PARTIAL}")
            path.rename(doomed)  # its name goes at one moment, though not its bytes
            shutil.rmtree(doomed, ignore_errors=True)


def _check_shared(folder: Path) -> None:
    """Raise ValueError unless all processes see the lock that the first one has made in the folder."""
    with agreed("the folder of the run"):
        if not (folder / LOCK_FILE).exists():
            raise ValueError(f"{folder} of the first process is not seen here: all processes must share it")


def _check_keep_last(keep_last: int) -> None:
    if type(keep_last) is not int or keep_last < 1:
        raise ValueError(f"keep_last must be an integer of at least 1, got {keep_last!r}")


class _StopRequest:
    """Inside this context the first Ctrl-C or SIGTERM only sets `made`; a second one has its usual effect.

    Has no effect outside the main thread, where Python cannot set handlers.
    """

    def __init__(self) -> None:
        self.made = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if signal.getsignal(number) is not signal.SIG_IGN:  # an ignored signal, as under nohup, stays ignored
                    self._handlers[number] = signal.signal(number, self._make)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)

    def _make(self, number: int, frame: FrameType | None) -> None:
        self.made = True
        for each in self._handlers:
            signal.signal(each, signal.SIG_DFL)
        name = signal.Signals(number).name
        # Not print, which the signal may have interrupted.
        os.write(2, f"\n{name}: finishing the step, then saving; once more ends it at once\n".encode())


def _checkpoint(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"step-{step:06d}"


def newest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run that no other process is writing, to be read without going on with it.

    Raises BlockingIOError if another process works in the folder, FileNotFoundError if it is no run.
    """
    FolderLock.check(folder)
    steps = _steps(folder)
    if not steps:
        raise FileNotFoundError(f"{folder} is no run: it has no {CHECKPOINTS}/step-...")
    return _checkpoint(folder, steps[-1])


def _steps(folder: Path, linked: bool = False) -> list[int]:
    """The steps that a run has checkpoints of, in order. linked: also those where a symbolic link stands."""
    paths = (folder / CHECKPOINTS).glob("step-*")
    found = [path for path in paths if (linked if path.is_symlink() else path.is_dir())]
    names = [path.name for path in found if re.fullmatch("step-([0-9]{6}|[1-9][0-9]{6,17})", path.name)]
    return sorted(int(name.removeprefix("step-")) for name in names)


def _link(link: Path, target: str) -> None:
    """Make a symbolic link, or let it point elsewhere, at one moment."""
    if link.is_symlink() and os.readlink(link) == target:
        return
    if link.is_dir() and not link.is_symlink():  # a tool that follows links copied the run
        aside = free_path(link.with_name(f"{link.name}.copy"))
        warnings.warn(f"{link} is a folder and no link; it is kept as {aside.name}", stacklevel=2)
        link.rename(aside)
    temporary = link.with_name(f".{link.name}{PARTIAL}")
    temporary.unlink(missing_ok=True)
    try:
        temporary.symlink_to(target)
    except OSError as error:
        if os.name != "nt":
            raise
        warnings.warn(f"{link} cannot be made, as Windows allows links to developers only: {error}", stacklevel=2)
        return
    os.replace(temporary, link)
    flush_folder(link.parent)


def _is_unused(folder: Path) -> bool:
    """Whether a folder is empty, or holds no more than a killed `Run.start` leaves: no config.json yet."""
    if not folder.is_dir() or (folder / CHECKPOINTS).is_symlink():
        return False
    names = {path.name for path in folder.iterdir()}
    ours = {
        LOCK_FILE,
        CHECKPOINTS,
        LOGGERS_FILE,
        *(name for name in names if name.startswith(".") and name.endswith(PARTIAL)),
    }
    return not names or (LOCK_FILE in names and names <= ours)
