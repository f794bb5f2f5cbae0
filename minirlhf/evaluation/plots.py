"""Pictures of a run."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from minirlhf.io.files import atomic_write

if TYPE_CHECKING:
    pass


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
