"""Run `positive_reviews.py` with several seeds: a table in Markdown, and a picture of the mean with its spread.

python examples/evidence/seed_table.py --seeds 0 1 2 3 4 --output runs/seeds [-- OPTIONS OF positive_reviews.py]
"""

import math
import statistics
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))

from minirlhf.common.printing import show  # noqa: E402
from minirlhf.io.files import read_json, read_jsonl  # noqa: E402
from shared import command_line, run_script  # noqa: E402

SCRIPT = EXAMPLES / "positive_reviews.py"


def main() -> None:
    parser = command_line(__doc__, seeds=([0, 1, 2, 3, 4], "a run each"), output=("runs/seeds", "folder of all runs"))
    parser.add_argument("options", nargs="*", help="passed on to positive_reviews.py, after --")
    args = parser.parse_args()
    rows, histories, output = [], [], Path(args.output)
    for seed in args.seeds:
        run, start = output / f"seed{seed}", time.perf_counter()
        command = [sys.executable, str(SCRIPT), "--seed", str(seed), "--output", str(run), *args.options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows.append(row(seed, time.perf_counter() - start, read_json(run / "summary.json")))
        histories.append(read_jsonl(run / "metrics.jsonl"))
        show(" ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()))
    table = markdown(rows)
    show(table)
    (output / "table.md").write_text(table, encoding="utf-8")
    draw(histories, output / "curves.png")


def row(seed: int, seconds: float, summary: dict[str, float]) -> dict[str, float]:
    return {
        "seed": seed,
        "reward before": summary["reference/reward"],
        "reward after": summary["policy/reward"],
        "KL, nats a sequence": summary["kl"],
        "KL that the optimum needs": summary.get("optimum/kl", math.nan),
        "efficiency": summary.get("optimum/efficiency", math.nan),
        "KL, full softmax": summary["kl_full_softmax"],
        "distinct-2 before": summary["reference/distinct_2"],
        "distinct-2 after": summary["policy/distinct_2"],
        "ratio of distinct-2": summary["policy/distinct_2"] / summary["reference/distinct_2"],
        "minutes": seconds / 60,
    }


def markdown(rows: list[dict[str, float]]) -> str:
    """One line a seed, then mean and standard deviation over the seeds."""
    names = list(rows[0])
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for r in rows:
        lines.append("| " + " | ".join(f"{r[n]:.3f}" if n != "seed" else str(r[n]) for n in names) + " |")
    if len(rows) > 1:
        for title, fold in (("mean", statistics.mean), ("std", statistics.stdev)):
            lines.append(f"| {title} | " + " | ".join(f"{fold([r[n] for r in rows]):.3f}" for n in names[1:]) + " |")
    return "\n".join(lines) + "\n"


def draw(histories: list[list[dict[str, float]]], path: Path) -> None:
    """Reward and KL over the iterations: the mean over the seeds, with a band from the least to the most."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    titles = {"reward/mean": "mean reward: P(positive)", "objective/kl": "KL to the reference, nats a sequence"}
    for ax, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        lines = list(zip(*([line[name] for line in history] for history in histories), strict=True))
        steps = range(1, len(lines) + 1)
        ax.plot(steps, [statistics.mean(values) for values in lines], label=f"mean of {len(histories)} seeds")
        ax.fill_between(steps, [min(v) for v in lines], [max(v) for v in lines], alpha=0.25, label="least to most")
        ax.set(title=title, xlabel="iteration")
        ax.grid(alpha=0.3)
    figure.axes[0].set(ylim=(0, 1))
    figure.axes[0].legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
