"""Other places for a run's curves and samples: TensorBoard, and services with the interface of Weights & Biases.

metrics.jsonl is the truth (see `log`); it is always written, and a logger that fails is dropped with one warning. A
logger is a class with the methods of `Logger` and a line in LOGGERS. All of a run's loggers know it by one id, which
is kept in the run's folder, so a resumed run goes on with the same curves. Steps that a resumed run repeats are removed
from TensorBoard, as from metrics.jsonl; the services get them twice, on the CPU with the same values.
"""

from __future__ import annotations

import importlib
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from minirlhf.common.printing import markdown_table
from minirlhf.common.suggestions import suggest
from minirlhf.io.files import read_json, write_json

LOGGERS_FILE, TENSORBOARD = "loggers.json", "tensorboard"  # in the folder of the run
Samples = Sequence[tuple[str, float | None]]  # texts with their scores


class Logger(Protocol):
    """What a logger must have."""

    def __init__(self, folder: Path, id: str, step: int, config: Mapping[str, Any]) -> None:
        """Open the curves of a run, new ones if the last step that stands is 0."""

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        """Log the statistics of a step."""

    def samples(self, step: int, samples: Samples) -> None:
        """Log samples of a step."""

    def close(self) -> None:
        """Send what is left, and end."""


class TensorBoard:
    """Event files in the run's folder: `tensorboard --logdir RUN`."""

    def __init__(self, folder: Path, id: str, step: int, config: Mapping[str, Any]):
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        for name, value in stats.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def samples(self, step: int, samples: Samples) -> None:
        self.writer.add_text("samples", _table(samples), step)

    def close(self) -> None:
        self.writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline needs no network."""

    def __init__(self, folder: Path, id: str, step: int, config: Mapping[str, Any]):
        import wandb

        named = dict(project="minirlhf", name=folder.name, dir=str(folder), config=dict(config))
        self.wandb, self.run = wandb, wandb.init(id=id, resume="allow", **named)
        self.run.define_metric("*", step_metric="step")  # its own count of steps only goes up

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        self.run.log({"step": step, **stats})

    def samples(self, step: int, samples: Samples) -> None:
        self.run.log({"step": step, "samples": self.wandb.Table(["text", "score"], list(map(list, samples)))})

    def close(self) -> None:
        self.run.finish()


class SwanLab:
    """SwanLab; SWANLAB_MODE=offline needs no network."""

    def __init__(self, folder: Path, id: str, step: int, config: Mapping[str, Any]):
        import swanlab

        named = dict(project="minirlhf", name=folder.name, log_dir=str(folder / "swanlab"), config=dict(config))
        self.text, self.run = swanlab.Text, swanlab.init(id=id, resume="allow", **named)

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        self.run.log(dict(stats), step)

    def samples(self, step: int, samples: Samples) -> None:
        self.run.log({"samples": [self.text(text, caption=f"{score}") for text, score in samples]}, step)

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio, on this machine: `trackio show`."""

    def __init__(self, folder: Path, id: str, step: int, config: Mapping[str, Any]):
        import trackio

        name = f"{folder.name}-{id[:8]}"  # its id of a run
        self.markdown = trackio.Markdown
        self.run = trackio.init(project="minirlhf", name=name, resume="allow", config=dict(config), embed=False)

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        self.run.log(dict(stats), step)

    def samples(self, step: int, samples: Samples) -> None:
        self.run.log({"samples": self.markdown(_table(samples))}, step)

    def close(self) -> None:
        self.run.finish()


LOGGERS: dict[str, type[Logger]] = {"tensorboard": TensorBoard, "wandb": WandB, "swanlab": SwanLab, "trackio": Trackio}


class Loggers:
    """The loggers of the run in a folder, as `choose_loggers` left them there; one that raises is dropped.

    step: the last one that stands. config: of the run.
    """

    def __init__(self, folder: Path, step: int, config: Mapping[str, Any]):
        path = folder / LOGGERS_FILE
        known: Any = read_json(path) if path.is_file() else {"loggers": [], "id": ""}
        self._open: dict[str, Logger] = {}
        for name in known["loggers"]:
            try:
                self._open[name] = LOGGERS[name](folder, known["id"], step, config)
            except Exception as error:
                self._drop(name, error)

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        """Log the statistics of a step everywhere; its number is no statistic, though `train` has it among them."""
        own = {name: value for name, value in stats.items() if name != "step"}
        self._each(lambda logger: logger.metrics(step, own))

    def samples(self, step: int, samples: Samples) -> None:
        """Log samples everywhere."""
        self._each(lambda logger: logger.samples(step, samples))

    def close(self) -> None:
        """Close all."""
        self._each(lambda logger: logger.close())
        self._open = {}

    def _each(self, work: Callable[[Logger], None]) -> None:
        for name, logger in list(self._open.items()):
            try:
                work(logger)
            except Exception as error:  # of a service or its client, which must not end a training
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._open.pop(name, None)
        said = f"{type(error).__name__}: {error}"
        warnings.warn(f"the logger {name} gave up ({said:.300}); metrics.jsonl goes on, and has it all", stacklevel=5)


def choose_loggers(folder: Path, names: Sequence[str]) -> None:
    """Keep the names of a run's loggers, and its id for them, in its folder: `LOGGERS_FILE`, if there are any."""
    path, others = folder / LOGGERS_FILE, [name for name in dict.fromkeys(names) if name != "jsonl"]
    if others or path.is_file():
        # Letters and digits in a number that all of them take.
        id = read_json(path)["id"] if path.is_file() else secrets.token_hex(11)[:21]
        write_json(path, {"loggers": others, "id": id})


def check_loggers(names: Sequence[str]) -> None:
    """Raise ValueError for an unknown logger, ImportError that names the extra for one that is not installed."""
    if isinstance(names, str):
        raise ValueError(f"loggers must be a list of names, got {names!r}: give [{names!r}]")
    for name in names:
        if name == "jsonl":
            continue
        if name not in LOGGERS:
            raise ValueError(f"there is no logger {name!r}: {suggest(name, ['jsonl', *LOGGERS], {})}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(
                f"the logger {name} needs its package: pip install {name} (minirlhf's extra {name})"
            ) from error


def _table(samples: Samples) -> str:
    return markdown_table(["text", "score"], [(text, "" if x is None else f"{x:.3f}") for text, x in samples])
