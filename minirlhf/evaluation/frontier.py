"""The reward-KL frontier as a picture: what was reached, over what it cost."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minirlhf.evaluation.statistics import Estimate


@dataclass(frozen=True)
class FrontierPoint:
    """A label, the KL to the reference in nats a sequence, and the mean of a score with its confidence interval."""

    label: str
    kl: float
    score: Estimate


def draw_frontier(
    best_of_n: Sequence[FrontierPoint], policies: Sequence[FrontierPoint], score: str = "reward"
) -> bytes:
    """Draw scores over KL as a PNG: best-of-n as a line, policies as points, with their confidence intervals.

    After Gao et al. 2022, figure 1. score: what the axis says.
    Raises ImportError that names the extra if matplotlib is missing, ValueError for no best-of-n points.
    """
    if not best_of_n:
        raise ValueError("best_of_n is empty: there is no frontier to draw")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'minirlhf[examples]'") from error
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for points, color, line, name in (
        (best_of_n, "tab:gray", "-", "best-of-n of the reference"),
        (policies, "tab:blue", "none", "policy"),
    ):
        if not points:
            continue
        ordered = sorted(points, key=lambda point: point.kl)
        mean = [point.score.mean for point in ordered]
        below = [max(0.0, point.score.mean - point.score.low) for point in ordered]
        above = [max(0.0, point.score.high - point.score.mean) for point in ordered]
        ax.errorbar(
            [point.kl for point in ordered], mean, [below, above], color=color, linestyle=line, marker="o", capsize=3,
            label=name,
        )  # fmt: skip
        for point in ordered:
            # parse_math: a label is a text, never a formula.
            ax.annotate(
                point.label, (point.kl, point.score.mean), (6, -12), textcoords="offset points", color=color,
                parse_math=False,
            )  # fmt: skip
    furthest = max(point.kl for point in (*best_of_n, *policies)) or 1.0
    ax.set(xlabel="KL to the reference, nats a sequence", xlim=(-0.03 * furthest, 1.2 * furthest))  # room for labels
    ax.set_ylabel(score, parse_math=False)
    ax.grid(alpha=0.3)
    ax.legend(loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    return picture.getvalue()
