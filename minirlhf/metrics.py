"""What a run leaves behind: statistics, metrics.jsonl, samples.jsonl, config.json, the curve.

A run folder is written by one `RunLog`. A line is in its file when the call returns, where a killed process leaves it,
and on the disk after `flush`, where a power failure does. `resume` cuts the files back to how long they were at a
checkpoint, so that no step is missing or counted twice.
"""

from __future__ import annotations

import io
import json
import math
import os
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from minirlhf import ppo
from minirlhf.files import atomic_write, flush_folder, read_json, write_json

if TYPE_CHECKING:
    from minirlhf.rollout import Rollout

Stats = dict[str, float]
TensorStats = dict[str, Tensor]

METRICS_FILE, SAMPLES_FILE, CONFIG_FILE = "metrics.jsonl", "samples.jsonl", "config.json"


def rollout_statistics(rollout: Rollout, scores: Tensor, rewards: Tensor, returns: Tensor) -> Stats:
    """Statistics of one batch of experience, before its update; the README has their glossary.

    scores: (B,), as they became rewards. rewards, returns: (B, R), as the trainer computed them. "A sequence" means
    the sum over its response tokens, averaged over the batch; "a token" the mean over all response tokens.
    """
    mask = rollout.response_mask

    def per_sequence(x: Tensor) -> Tensor:
        return torch.where(mask, x, 0.0).sum(-1).mean()

    return read_stats(
        [
            {
                "objective/kl": per_sequence(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k1")),
                "objective/kl_k2": per_sequence(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k2")),
                "objective/kl_k3": per_sequence(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3")),
                "objective/kl_exact": per_sequence(rollout.exact_kl),
                "objective/entropy": per_sequence(rollout.entropy),
                "objective/reward_with_kl": per_sequence(rewards),
                "reward/mean": rollout.scores.mean(),
                "reward/std": rollout.scores.std(correction=0),
                "reward/shaped": scores.mean(),
                "ppo/val/mean": ppo.masked_mean(rollout.values, mask),
                "ppo/val/var_explained": ppo.explained_variance(rollout.values, returns, mask),
                "ppo/returns/mean": ppo.masked_mean(returns, mask),
                "tokens/response": mask.sum(-1).double().mean(),
            }
        ]
    )[0]


def time_statistics(stats: Stats, seconds: Mapping[str, float], count: int) -> Stats:
    """Seconds of each phase of a step, and response tokens a second over all of them."""
    times = {f"time/{phase}": value for phase, value in seconds.items()}
    return times | {"time/tokens_per_second": stats["tokens/response"] * count / sum(seconds.values())}


def read_stats(stats: Sequence[TensorStats]) -> list[Stats]:
    """Statistics of several minibatches as numbers, read from the device in one transfer."""
    names = list(stats[0])
    rows = torch.stack([torch.stack([s[name].double() for name in names]) for s in stats]).tolist()
    return [dict(zip(names, row, strict=True)) for row in rows]


def mean_stats(stats: Sequence[Stats]) -> Stats:
    """The mean of each statistic over minibatches.

    A minibatch with a statistic that is not finite, whose optimizer step was skipped, is left out, unless all are so.
    """
    finite = [s for s in stats if all(map(math.isfinite, s.values()))] or stats
    return {name: sum(s[name] for s in finite) / len(finite) for name in finite[0]}


class RunLog:
    """The files of a run in a folder of its own.

    folder: made here; Raises FileExistsError if it exists and is not empty (a run is never overwritten), OSError if
    it cannot be made. config: written to config.json.
    """

    def __init__(self, folder: str | os.PathLike[str], config: Mapping[str, Any]):
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise FileExistsError(f"{self.folder} exists and is not empty; choose another --output, or --resume it")
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / CONFIG_FILE, config)

    @classmethod
    def resume(cls, folder: str | os.PathLike[str], lengths: Mapping[str, int]) -> RunLog:
        """Go on with a run: its files are cut back to these lengths, which `flush` gave; later lines are dropped.

        Raises FileNotFoundError if it is not a run folder, ValueError before anything is cut if lines are lost.
        """
        log = cls.__new__(cls)
        log.folder = Path(folder)
        read_json(log.folder / CONFIG_FILE)
        for name, length in lengths.items():
            if name not in (METRICS_FILE, SAMPLES_FILE) or type(length) is not int or length < 0:
                raise ValueError(f"{log.folder} has no log {name!r} that could be cut back to {length!r} bytes")
            there = log._length(name)
            if there < length:
                raise ValueError(f"{log.folder / name} lost lines: it has {there} bytes, {length} when it was saved")
        for name, length in lengths.items():
            if log._length(name) > length:
                os.truncate(log.folder / name, length)
        return log

    def metrics(self, step: int, stats: Mapping[str, float]) -> None:
        """Append the statistics of a step to metrics.jsonl; NaN and infinities, which JSON has not, become null."""
        finite = {name: value if math.isfinite(value) else None for name, value in stats.items()}
        self._append(METRICS_FILE, {"step": step, **finite})

    def samples(self, step: int, texts: Sequence[str], scores: Sequence[float | None]) -> None:
        """Append texts and their scores, None where there is none, to samples.jsonl."""
        self._append(SAMPLES_FILE, {"step": step, "samples": [list(pair) for pair in zip(texts, scores, strict=True)]})

    def history(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl."""
        return read_jsonl(self.folder / METRICS_FILE)

    def flush(self) -> dict[str, int]:
        """Put all lines on the disk. Returns the lengths of the files in bytes, for `resume`."""
        for name in (METRICS_FILE, SAMPLES_FILE):
            if (self.folder / name).exists():
                with open(self.folder / name, "ab") as file:
                    os.fsync(file.fileno())
        flush_folder(self.folder)
        return {name: self._length(name) for name in (METRICS_FILE, SAMPLES_FILE)}

    def _append(self, name: str, content: Mapping[str, Any]) -> None:
        line = json_line(content) + "\n"
        with open(self.folder / name, "ab") as file:
            file.write(line.encode("utf-8"))

    def _length(self, name: str) -> int:
        path = self.folder / name
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise ValueError(f"{path} is not a file")
        return path.stat().st_size if path.exists() else 0


def read_jsonl(path: str | os.PathLike[str], length: int | None = None) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; none if there is no file. A last line that a crash cut short is dropped.

    length: of the part to read, bytes; None: all of it.
    Raises ValueError with the line number for any other line that is not a JSON object.
    """
    path = Path(path)
    if not path.exists():
        return []
    if not path.is_file():  # a pipe would be waited for
        raise ValueError(f"{path} is not a file")
    whole = path.read_bytes()[:length].split(b"\n")[:-1]  # a whole line ends in a line feed
    content = []
    for number, line in enumerate(whole, 1):
        try:
            content.append(json.loads(line.decode("utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(content[-1], dict):
            raise ValueError(f"{path}, line {number} must hold a JSON object, but holds a {type(content[-1]).__name__}")
    return content


def plot_run(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], target: float | None = None) -> None:
    """Draw a run to a picture: reward with its spread, KL against its target, entropy, value loss, response length.

    history: lines of metrics.jsonl. target: the KL controller's, drawn as a line.
    Raises ImportError that names the extra if matplotlib is missing, ValueError for an empty history.
    """
    if not history:
        raise ValueError("history is empty: there is nothing to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install 'minirlhf[examples]'") from error
    steps = [line["step"] for line in history]

    def column(name: str) -> list[float]:
        return [math.nan if line[name] is None else line[name] for line in history]

    figure = Figure(figsize=(12, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplot_mosaic([["reward", "reward", "kl"], ["entropy", "value", "length"]])
    mean, std = column("reward/mean"), column("reward/std")
    axes["reward"].plot(steps, mean, color="tab:blue")
    axes["reward"].fill_between(
        steps, [m - s for m, s in zip(mean, std, strict=True)], [m + s for m, s in zip(mean, std, strict=True)],
        color="tab:blue", alpha=0.15,
    )  # fmt: skip
    axes["reward"].set(title="reward: mean of the batch, ± 1 standard deviation")
    axes["kl"].plot(steps, column("objective/kl"), color="tab:red", label="KL, nats a sequence")
    if target is not None:
        axes["kl"].axhline(target, color="gray", linestyle="--", label="target")
    axes["kl"].set(title="KL to the reference")
    axes["kl"].legend()
    for name, key, title in (
        ("entropy", "objective/entropy", "entropy, nats a sequence"),
        ("value", "ppo/loss/value", "value loss"),
        ("length", "tokens/response", "response length, tokens"),
    ):
        axes[name].plot(steps, column(key), color="tab:green")
        axes[name].set(title=title)
    for ax in axes.values():
        ax.set_xlabel("iteration")
        ax.grid(alpha=0.3)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100)
    atomic_write(path, picture.getvalue())


def distinct_n(texts: Iterable[str], n: int) -> float:
    """Distinct character n-grams over all character n-grams of the texts (Li et al. 2016); 0 if there are none."""
    grams = [text[i : i + n] for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def printable(text: str) -> str:
    """A text that cannot steer a terminal: control and formatting characters become their escapes."""
    return "".join(char.encode("unicode_escape").decode() if _steers(char) else char for char in text)


def json_line(content: Mapping[str, Any]) -> str:
    """One line of JSON, for every reader's idea of a line, that is safe to show in a terminal; without a line feed."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False)
    return "".join(json.dumps(char)[1:-1] if _steers(char) else char for char in text)


def _steers(char: str) -> bool:
    """Whether a character is for control or formatting, separates lines, or is half of one (a lone surrogate)."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")
