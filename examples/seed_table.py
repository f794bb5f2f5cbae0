"""Run `positive_reviews.py` with several seeds and tabulate what came out: a table in Markdown, and the curves.

python examples/seed_table.py --seeds 0 1 2 3 4 --output runs/seeds [-- OPTIONS OF positive_reviews.py]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

from matplotlib.figure import Figure

from minirlhf.io.files import read_jsonl

SCRIPT = Path(__file__).with_name("positive_reviews.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("options", nargs="*", help="passed on to positive_reviews.py, after --")
    args = parser.parse_args()
    rows, histories = [], []
    for seed in args.seeds:
        run = args.output / f"seed{seed}"
        start = time.perf_counter()
        command = [sys.executable, str(SCRIPT), "--seed", str(seed), "--output", str(run), *args.options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        rows.append(row(seed, seconds, json.loads((run / "summary.json").read_text(encoding="utf-8"))))
        histories.append(read_jsonl(run / "metrics.jsonl"))
        print(" ".join(f"{name} {value:.3f}" for name, value in rows[-1].items()), flush=True)
    table = markdown(rows)
    print(table)
    (args.output / "table.md").write_text(table, encoding="utf-8")
    draw(histories, args.seeds, args.output / "curves.png")


def row(seed: int, seconds: float, summary: dict[str, float]) -> dict[str, float]:
    return {
        "seed": seed,
        "reward before": summary["reference/reward"],
        "reward after": summary["policy/reward"],
        "KL, nats a sequence": summary["kl"],
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


def draw(histories: list[list[dict[str, float]]], seeds: list[int], path: Path) -> None:
    """Reward and KL of every seed over the iterations."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    reward, kl = figure.subplots(1, 2)
    for seed, history in zip(seeds, histories, strict=True):
        steps = [line["step"] for line in history]
        reward.plot(steps, [line["reward/mean"] for line in history], label=f"seed {seed}", linewidth=1)
        kl.plot(steps, [line["objective/kl"] for line in history], linewidth=1)
    reward.set(title="mean reward: P(positive)", xlabel="iteration", ylim=(0, 1))
    kl.set(title="KL to the reference, nats a sequence", xlabel="iteration")
    for ax in (reward, kl):
        ax.grid(alpha=0.3)
    reward.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
