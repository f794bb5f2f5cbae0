"""Pictures: the curves of a run with its samples, reward over KL, and the tokens of a sample by their advantages."""

from __future__ import annotations

import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minirlhf.common.printing import display_width
from minirlhf.common.text import printable
from minirlhf.evaluation.optimum import OptimumPoint
from minirlhf.evaluation.statistics import Estimate
from minirlhf.io.files import atomic_write

SAMPLES, WIDTH = 3, 90  # of a step, and characters of one, under the curves
COLUMNS = 72  # of a row of tokens, in characters
CHINESE_FONTS = r"CJK|Han Sans|Han Serif|WenQuanYi|YaHei|PingFang|Heiti|SimHei|SimSun|Songti|Kaiti|Arial Unicode"
NO_FONT = "matplotlib finds no font for all characters (Noto Sans CJK has the Chinese ones)"


@dataclass(frozen=True)
class FrontierPoint:
    """A label, the KL to the reference in nats a sequence, and the mean of a score with its confidence interval."""

    label: str
    kl: float
    score: Estimate


def plot_run(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str] | None = None,
    target: float | None = None,
    frontier: Sequence[OptimumPoint] = (),
    samples: Sequence[Mapping[str, Any]] = (),
) -> Any:
    """Draw a run: reward with its spread, KL against its target, entropy, value loss, response length, samples.

    history: what `train` returned, or lines of metrics.jsonl; a column that is missing or null is left out. Without a
        value head, the norm of the gradient stands in the place of the value loss.
    path: of a PNG to write; None: only the figure is made, which a notebook shows.
    target: of the KL controller. frontier: points of `Optimum.curve`; adds the KL that the optimum needs for each
        reward. samples: lines of samples.jsonl, of which the first and the last ones are shown under the curves.
    Returns the matplotlib Figure. Raises ImportError that names the extra if matplotlib is missing, ValueError for an
    empty history.
    """
    if not history:
        raise ValueError("history is empty: there is nothing to draw")
    steps = [line["step"] for line in history]

    def column(name: str) -> np.ndarray:
        return np.array([math.nan if line.get(name) is None else line[name] for line in history], dtype=float)

    mean, std, kl, length = map(column, ("reward/mean", "reward/std", "objective/kl", "tokens/response"))
    varied = bool(np.ptp(length[~np.isnan(length)]) > 0) if not np.isnan(length).all() else False
    shown = _samples(samples)
    last = ["entropy", "entropy", "value", "value", "length", "length"] if varied else ["entropy"] * 3 + ["value"] * 3
    rows = [["reward"] * 4 + ["kl"] * 2, last, *[["samples"] * 6] * bool(shown)]
    figure = _figure(12, 7 + 0.26 * len(shown))
    axes = figure.subplot_mosaic(rows, height_ratios=[1, 1, 0.08 * len(shown)][: len(rows)])
    low, high = _spread(mean, std)
    axes["reward"].plot(steps, mean, color="tab:blue")
    axes["reward"].fill_between(steps, low, high, color="tab:blue", alpha=0.15)
    axes["reward"].set(title="reward: mean of the batch, ± 1 standard deviation")
    axes["kl"].plot(steps, kl, color="tab:red", label="spent")
    title = "KL to the reference, nats a sequence"
    if frontier:
        rewards, kls = ([getattr(p, name).mean for p in frontier] for name in ("reward", "kl"))
        needed = np.where(mean <= rewards[-1], np.interp(mean, rewards, kls), math.nan)  # no point beyond the last
        axes["kl"].plot(steps, needed, color="tab:green", label="needed by the optimum for this reward")
    if target is not None and target <= 1.5 * np.nanmax(kl, initial=0.0):
        axes["kl"].axhline(target, color="gray", linestyle="--", label="target")
    elif target is not None:  # on one axis with it the curve would be flat
        title += f"\n(target {target:g}: beyond the axis)"
    axes["kl"].set(title=title)
    axes["kl"].legend()
    entropy = "entropy, nats a sequence"
    if not varied and not np.isnan(length).all():
        entropy += f" of {np.nanmax(length):g} tokens"
    value = ("value", "ppo/loss/value", "value loss")
    if "ppo/loss/value" not in history[-1]:
        value = ("value", "ppo/grad_norm", "gradient norm")
    curves = [("entropy", "objective/entropy", entropy), value]
    for name, key, title in [*curves, *[("length", "tokens/response", "response length, tokens")] * varied]:
        axes[name].plot(steps, column(key), color="tab:green")
        axes[name].set(title=title)
    for name, ax in axes.items():
        if name != "samples":
            ax.set_xlabel("iteration")
            ax.grid(alpha=0.3)
    if shown:
        axes["samples"].axis("off")
        text, families = readable("\n".join(shown), "the samples are in samples.jsonl")
        axes["samples"].text(0, 1, text, va="top", family=families, parse_math=False, linespacing=1.5)
    if path is not None:
        atomic_write(path, figure._repr_png_())
    return figure


def _spread(mean: np.ndarray, std: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The band around the means; within [0, 1] where all batches may be of numbers in it, as probabilities are.

    Numbers in [0, 1] have a variance of mean (1 - mean) at most (Bhatia and Davis 2000).
    """
    known = ~np.isnan(mean) & ~np.isnan(std)
    if ((mean >= 0) & (mean <= 1) & (std**2 <= mean * (1 - mean) + 1e-9))[known].all():
        return np.clip(mean - std, 0, 1), np.clip(mean + std, 0, 1)
    return mean - std, mean + std


def _samples(lines: Sequence[Mapping[str, Any]]) -> list[str]:
    """Samples of the first and of the last step that has any, a line each."""
    chosen = [lines[0], lines[-1]] if len(lines) > 1 else list(lines)
    found = []
    for line in chosen:
        for text, score in line["samples"][:SAMPLES]:
            said = printable(text.replace("\n", " "))
            rated = "" if score is None else f" {score:.2f}"
            found.append(f"step {line['step']}:{rated}  {said[:WIDTH]}{'...' * (len(said) > WIDTH)}")
    return found


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


def draw_tokens(tokens: Sequence[Mapping[str, Any]], title: str) -> Any:
    """Draw tokens coloured by their advantage, with a frame around those that clipping holds; returns the Figure.

    tokens: of an Explanation. Raises ImportError that names the extra if matplotlib is missing.
    """
    texts = [printable(token["token"]) for token in tokens]
    _, families = readable("".join(texts), "")
    if families is None:  # no font: their numbers in the table
        texts, title = [str(i + 1) for i in range(len(tokens))], f"{title}\n{NO_FONT}; tokens are numbered"
    most = max(abs(token["advantage"]) for token in tokens) or 1.0
    places, x, y = [], 0, 0
    for text in texts:
        width = display_width(text) + 1
        if x and x + width > COLUMNS:
            x, y = 0, y + 1
        places.append((x, y, width))
        x += width
    figure = _figure(11, 1.6 + 0.5 * (y + 1))
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle

    ax, colors = figure.subplots(), ScalarMappable(Normalize(-most, most), "PuOr_r")
    for text, token, (left, row, width) in zip(texts, tokens, places, strict=True):
        color, held = colors.to_rgba(token["advantage"]), token["clipped"]
        width_of_line, layer = (2.5, 2) if held else (1.0, 1)
        frame: dict[str, Any] = dict(edgecolor="black" if held else "white", linewidth=width_of_line, zorder=layer)
        ax.add_patch(Rectangle((left, row), width, 0.8, facecolor=color, **frame))
        dark = sum(color[:3]) < 1.5
        ax.text(left + width / 2, row + 0.4, text, ha="center", va="center", family=families, parse_math=False,
                color="white" if dark else "black", zorder=3)  # fmt: skip
    ax.set(xlim=(-0.5, COLUMNS + 0.5), ylim=(y + 1, -0.2))
    ax.axis("off")
    shown, families = readable(title, "")
    ax.set_title(shown, family=families, parse_math=False, loc="left", fontsize=10)
    figure.colorbar(colors, ax=ax, orientation="horizontal", fraction=0.08, aspect=60,
                    label="advantage; black frame: clipping holds the token")  # fmt: skip
    return figure


def readable(text: str, instead: str) -> tuple[str, list[str] | None]:
    """A text and the font families in which matplotlib can draw all of it.

    If no installed font has a character, e.g. a Chinese one, the text is replaced by a remark, and the families are
    None.
    """
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    def lacks(path: str) -> set[int]:
        return {ord(char) for char in text if char != "\n"} - FT2Font(path).get_charmap().keys()

    default = "DejaVu Sans"  # comes with matplotlib
    missing = lacks(font_manager.findfont(default))
    if not missing:
        return text, [default]
    for font in font_manager.fontManager.ttflist:
        if re.search(CHINESE_FONTS, font.name, re.IGNORECASE) and not missing & lacks(font.fname):
            return text, [default, font.name]
    return f"{NO_FONT}; {instead}", None


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install matplotlib (minirlhf's extra examples)") from error

    class Picture(Figure):
        def _repr_png_(self) -> bytes:  # a notebook shows it
            return _png(self, 100)

    figure = Picture(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Any, dpi: int) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=dpi)
    return picture.getvalue()
