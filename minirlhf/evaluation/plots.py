"""Pictures: the curves of a run, and reward over KL."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minirlhf.evaluation.optimum import OptimumPoint
from minirlhf.evaluation.statistics import Estimate
from minirlhf.io.files import atomic_write


@dataclass(frozen=True)
class FrontierPoint:
    """A label, the KL to the reference in nats a sequence, and the mean of a score with its confidence interval."""

    label: str
    kl: float
    score: Estimate


def plot_run(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    target: float | None = None,
    frontier: Sequence[OptimumPoint] = (),
) -> None:
    """Write `draw_run` to a file."""
    atomic_write(path, draw_run(history, target, frontier))


def draw_run(
    history: Sequence[Mapping[str, Any]], target: float | None = None, frontier: Sequence[OptimumPoint] = ()
) -> bytes:
    """Draw a run as a PNG: reward with its spread, KL against its target, entropy, value loss, response length.

    Without a value head, the norm of the gradient stands in the place of the value loss.

    history: lines of metrics.jsonl; a column that is missing or null is left out. target: of the KL controller.
    frontier: points of `Optimum.curve`; adds the KL that the optimum needs for each reward.
    Raises ImportError that names the extra if matplotlib is missing, ValueError for an empty history.
    """
    if not history:
        raise ValueError("history is empty: there is nothing to draw")
    figure = _figure(12, 7)
    steps = [line["step"] for line in history]

    def column(name: str) -> np.ndarray:
        return np.array([math.nan if line.get(name) is None else line[name] for line in history], dtype=float)

    axes = figure.subplot_mosaic([["reward", "reward", "kl"], ["entropy", "value", "length"]])
    mean, std = column("reward/mean"), column("reward/std")
    axes["reward"].plot(steps, mean, color="tab:blue")
    axes["reward"].fill_between(steps, mean - std, mean + std, color="tab:blue", alpha=0.15)
    axes["reward"].set(title="reward: mean of the batch, ± 1 standard deviation")
    axes["kl"].plot(steps, column("objective/kl"), color="tab:red", label="spent")
    if frontier:
        rewards, kls = ([getattr(p, name).mean for p in frontier] for name in ("reward", "kl"))
        needed = np.where(mean <= rewards[-1], np.interp(mean, rewards, kls), math.nan)  # no point beyond the last
        axes["kl"].plot(steps, needed, color="tab:green", label="needed by the optimum for this reward")
    if target is not None:
        axes["kl"].axhline(target, color="gray", linestyle="--", label="target")
    axes["kl"].set(title="KL to the reference, nats a sequence")
    axes["kl"].legend()
    for name, key, title in (
        ("entropy", "objective/entropy", "entropy, nats a sequence"),
        ("value", "ppo/loss/value", "value loss")
        if "ppo/loss/value" in history[-1]
        else ("value", "ppo/grad_norm", "gradient norm"),
        ("length", "tokens/response", "response length, tokens"),
    ):
        axes[name].plot(steps, column(key), color="tab:green")
        axes[name].set(title=title)
    for ax in axes.values():
        ax.set_xlabel("iteration")
        ax.grid(alpha=0.3)
    return _png(figure, 100)


def draw_frontier(
    best_of_n: Sequence[FrontierPoint],
    policies: Sequence[FrontierPoint],
    score: str = "reward",
    optimum: Sequence[OptimumPoint] = (),
    distribution: str = "",
) -> bytes:
    """Draw scores over KL as a PNG: best-of-n as a line, policies as points, with their confidence intervals.

    After Gao et al. 2022, figure 1. score: the title of the axis. optimum: points of `Optimum.curve`, drawn as the
    upper line with its interval. distribution: in which the KL is, for the other axis.
    Raises ImportError that names the extra if matplotlib is missing, ValueError for no best-of-n points.
    """
    if not best_of_n:
        raise ValueError("best_of_n is empty: there is no frontier to draw")
    figure = _figure(6, 4)
    ax = figure.subplots()
    furthest = max(point.kl for point in (*best_of_n, *policies)) or 1.0
    if optimum:
        kls = [point.kl.mean for point in optimum]
        ax.plot(kls, [point.reward.mean for point in optimum], color="tab:green", label="optimum")
        bounds = [[getattr(point.reward, end) for point in optimum] for end in ("low", "high")]
        ax.fill_between(kls, *bounds, color="tab:green", alpha=0.2)
    for points, color, line, name in (
        (best_of_n, "tab:gray", "-", "best-of-n of the reference"),
        (policies, "tab:blue", "none", "policy"),
    ):
        points = sorted(points, key=lambda point: point.kl)
        mean = [point.score.mean for point in points]
        sides = [[max(0.0, x.score.mean - x.score.low), max(0.0, x.score.high - x.score.mean)] for x in points]
        bars = np.array(sides).reshape(-1, 2).T
        kls = [point.kl for point in points]
        ax.errorbar(kls, mean, bars, color=color, linestyle=line, marker="o", capsize=3, label=name)
        for point in points:  # parse_math: a label is a text, never a formula
            where = (point.kl, point.score.mean)
            ax.annotate(point.label, where, (6, -12), textcoords="offset points", color=color, parse_math=False)
    ax.set(xlim=(-0.03 * furthest, 1.2 * furthest))  # room for labels
    ax.set_xlabel(f"KL to the reference, nats a sequence\n{distribution}", parse_math=False)
    ax.set_ylabel(score, parse_math=False)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    return _png(figure, 120)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'minirlhf[examples]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any, dpi: int) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi)
    return picture.getvalue()
