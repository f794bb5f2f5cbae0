"""When a proxy of the reward is optimised, where does the true reward peak? (Gao, Schulman & Hilton 2022)

    python examples/evidence/overoptimisation.py                       # hours on two CPU cores; docs/algorithms.md
    python examples/evidence/overoptimisation.py --pairs 60 250 --trained 60 --seeds 0 --methods rloo --kl-coefs 0

Gold is the logit of the shipped classifier. A proxy is a reward model trained on N pairs of samples that gold has
labelled. Best-of-n, and policies trained until a KL of --until, are chosen by the proxy and scored by gold. A finished
run is a line in runs.jsonl, and a script that was stopped goes on with those that are missing. Both laws of the paper
are fitted, with d = sqrt(KL): d (a - b d) for best-of-n, d (a - b log d) for policies. Leaves overoptimisation.md,
overoptimisation.png and overoptimisation.json.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measure import Ledger, Spread, Task, spread

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("the examples need matplotlib: pip install -e '.[examples]'")

from minirlhf import GPT2, NGramScorer, PPOConfig, PPOTrainer, RewardModel, SentimentReward, Tokenizer
from minirlhf.common.printing import show
from minirlhf.evaluation.best_of import best_of_n_kl, expected_best_of_n
from minirlhf.io.files import atomic_write, read_json, write_json
from minirlhf.rl.presets import METHODS, PRESETS
from minirlhf.supervised.reward_modelling import RewardModelTrainer, RewardTrainingConfig, evaluate_rankings
from minirlhf.text.preferences import Ranking
from shared import POLICY, PROMPTS, REWARD, SECOND_SCORER, STARTER, command_line, run_script

HELD_OUT = 200  # pairs on which the accuracy of a proxy is measured
NS = [2**k for k in range(8)]
COMMON: dict[str, Any] = dict(**STARTER, batch_size=128, ppo_epochs=4, adaptive_kl=False, top_p=1.0, device="cpu")

Curve = list[dict[str, float]]  # KL, proxy and gold


def main() -> None:
    args = command_line(
        __doc__,
        pairs=([60, 250, 1000, 4000], "gold-labelled pairs of each proxy"),
        seeds=([0, 1, 2], "of each proxy and its policies"),
        trained=([60, 1000], "of these numbers of pairs, those whose proxies policies are trained on"),
        methods=(["ppo", "rloo"], "which optimise the proxy"),
        kl_coefs=([0.0, 0.1], "of the KL penalty, with the proxy at variance 1"),
        until=(15.0, "nats of KL at which a policy has gone far enough"),
        iterations=(60, "batches of 128 samples, at most"),
        candidates=(512, "samples of each prompt, for best-of-n"),
        threads=(2, "of PyTorch"),
        policy=(POLICY, "GPT-2 folder"),
        reward=(REWARD, "BERT folder"),
        second_scorer=(SECOND_SCORER, "folder of character n-grams"),
        output=("runs/overoptimisation", "folder; a stopped script goes on there"),
    ).parse_args()
    if unknown := [name for name in args.methods if name not in ("ppo", *METHODS)]:
        raise ValueError(f"--methods must be of ppo, {', '.join(METHODS)}, got {', '.join(unknown)}")
    if extra := sorted(set(args.trained) - set(args.pairs)):
        raise ValueError(f"--trained must be of --pairs, got {', '.join(map(str, extra))}")
    torch.set_num_threads(args.threads)
    sentiment = SentimentReward.from_pretrained(args.reward, device="cpu", precision="fp32")

    def gold(texts: Sequence[str]) -> torch.Tensor:
        p = sentiment(list(texts)).double().clamp(1e-6, 1 - 1e-6)
        return torch.log(p / (1 - p)).float()

    reference, tokenizer = GPT2.from_pretrained(args.policy).eval(), Tokenizer.from_pretrained(args.policy)
    task = Task(args.policy, reference, tokenizer, PROMPTS, gold, NGramScorer.from_pretrained(args.second_scorer))
    output, fixed = Path(args.output), ("until", "iterations", "candidates", "policy", "reward")
    ledger = Ledger(output, {name: getattr(args, name) for name in fixed} | {"most_pairs": max(args.pairs)})
    pool = samples(task, output / "pairs.json", 2 * (max(args.pairs) + HELD_OUT), seed=5)
    fresh = samples(task, output / "candidates.json", len(PROMPTS) * args.candidates, seed=77)

    for seed in args.seeds:
        for count in args.pairs:
            key = {"pairs": count, "seed": seed}
            proxy, accuracy = trained_proxy(args.policy, pool, count, seed, output / f"proxy-{count}-{seed}")
            if not ledger.done(method="best-of-n", **key):
                ledger.add({"method": "best-of-n", "accuracy": accuracy, **key, "curve": best_of_n(proxy, fresh)})
            for name in args.methods if count in args.trained else ():
                for coef in args.kl_coefs:
                    if not ledger.done(method=name, kl_coef=coef, **key):
                        curve = optimised(task, proxy, name, coef, seed, args)
                        ledger.add({"method": name, "kl_coef": coef, **key, "curve": curve})
                        last = ", ".join(f"{figure} {value:.2f}" for figure, value in curve[-1].items())
                        show(f"{name}, {count} pairs, coefficient {coef:g}, seed {seed}: {last}")
            report(ledger.runs, output)
    show((output / "overoptimisation.md").read_text(encoding="utf-8"))


def samples(task: Task, path: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Samples of the reference with gold scores, the prompts in turn; kept in `path`."""
    if not path.exists():
        generator, found = torch.Generator().manual_seed(seed), []
        while len(found) < count:
            rollout = task.sample(task.reference, min(512, count - len(found)), 1.0, generator)
            rows = zip(rollout.prompts, rollout.responses, rollout.scores.tolist(), strict=True)
            found += [{"prompt": p, "response": r, "gold": s} for p, r, s in rows]
        write_json(path, {"samples": found})
    return read_json(path)["samples"]


def trained_proxy(
    folder: str, pool: list[dict[str, Any]], count: int, seed: int, path: Path
) -> tuple[RewardModel, float]:
    """A reward model of `count` pairs, with variance 1 over the pool, and its accuracy on others; kept in `path`."""
    width, pairs = len(PROMPTS), []
    for i in range(0, len(pool) - 2 * width + 1, 2 * width):
        for a, b in zip(pool[i : i + width], pool[i + width : i + 2 * width], strict=True):  # of one prompt
            better, worse = (a, b) if a["gold"] > b["gold"] else (b, a)
            if better["response"].strip() and worse["response"].strip() and a["response"] != b["response"]:
                pairs.append(Ranking(a["prompt"], (better["response"], worse["response"])))
    held_out, pairs = pairs[-HELD_OUT:], pairs[:-HELD_OUT]
    if path.exists():
        model = RewardModel.from_pretrained(path, device="cpu")
    else:
        model = RewardModel.from_trunk(folder, seed=seed, device="cpu")
        chosen = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))[:count].tolist()
        sizes = dict(epochs=4 if count < 200 else 2, lr=2e-4, device="cpu", tokens_per_batch=1024, seed=seed,
                     max_length=model.max_length)  # fmt: skip
        RewardModelTrainer(model, [pairs[i] for i in chosen], RewardTrainingConfig(**sizes)).train()
        model.normalise([row["prompt"] + row["response"] for row in pool[:512]])
        model.save_pretrained(path)
    return model, evaluate_rankings(model, held_out).accuracy


def best_of_n(proxy: RewardModel, fresh: list[dict[str, Any]]) -> Curve:
    """By the proxy, of the reference."""
    width = len(PROMPTS)
    scores = proxy([row["prompt"] + row["response"] for row in fresh]).double().view(-1, width).T.numpy()
    gold = np.array([row["gold"] for row in fresh]).reshape(-1, width).T
    curve = []
    for n in (n for n in NS if n <= scores.shape[1]):
        chosen = {"proxy": expected_best_of_n(scores, n), "gold": expected_best_of_n(scores, n, gold)}
        curve.append({"kl": best_of_n_kl(n), **{name: float(x.mean()) for name, x in chosen.items()}})
    return curve


def optimised(task: Task, proxy: RewardModel, name: str, coef: float, seed: int, args: Any) -> Curve:
    """KL, proxy and gold of the samples of each iteration, until the KL is large or the iterations are over."""
    settings = {**PRESETS.get(name, {}), **COMMON, "init_kl_coef": coef, "seed": seed}
    config = PPOConfig(**settings, steps=args.iterations * COMMON["batch_size"])
    trainer, curve = PPOTrainer(task.policy(), task.reference, task.tokenizer, config), []
    generator, count = torch.Generator().manual_seed(seed), config.batch_size // config.group_size
    while trainer.iteration < args.iterations and (not curve or curve[-1]["kl"] < args.until):
        drawn = torch.randint(len(task.prompts), (count,), generator=generator).tolist()
        rollout = trainer.collect([task.prompts[i] for i in drawn], proxy)
        figures = {"kl": rollout.exact_kl.sum(-1).mean(), "proxy": rollout.scores.mean()}
        figures["gold"] = torch.as_tensor(task.reward(rollout.texts)).mean()
        curve.append({figure: max(0.0, float(x)) if figure == "kl" else float(x) for figure, x in figures.items()})
        trainer.step(rollout)
    return curve


def fitted(curve: Curve, logarithm: bool) -> dict[str, float] | None:
    """a, b and R2 of the law in d = sqrt(KL), of the gain over the reference's gold, and the KL where it peaks."""
    d = np.sqrt([point["kl"] for point in curve])
    gain = np.array([point["gold"] for point in curve]) - curve[0]["gold"]
    d, gain = d[d > 1e-3], gain[d > 1e-3]
    if len(d) < 3:
        return None
    columns = np.stack([d, -d * np.log(d) if logarithm else -(d**2)], 1)
    (a, b), *_ = np.linalg.lstsq(columns, gain, rcond=None)
    total = float(((gain - gain.mean()) ** 2).sum())
    found = {"a": float(a), "b": float(b), "R2": 1 - float(((columns @ (a, b) - gain) ** 2).sum()) / total}
    if b > 0:
        found["peak_kl"] = float(min(math.exp(min(a / b - 1, 5)) if logarithm else max(a, 0) / (2 * b), 150) ** 2)
    return found


def summary(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each method, number of pairs and coefficient: fits, and where gold was largest, with their spread."""
    rows = []
    for key in dict.fromkeys((run["method"], run["pairs"], run.get("kl_coef")) for run in runs):
        some = [run for run in runs if (run["method"], run["pairs"], run.get("kl_coef")) == key]
        fits = [fitted(run["curve"], run["method"] != "best-of-n") or {} for run in some]
        row: dict[str, Any] = dict(zip(("method", "pairs", "kl_coef"), key, strict=True))
        row |= {name: spread([fit.get(name) for fit in fits]) for name in ("a", "b", "R2", "peak_kl")}
        best = [max(run["curve"], key=lambda point: point["gold"]) for run in some]
        last = [run["curve"][-1] for run in some]
        row |= {"best_gold": spread([point["gold"] for point in best]), "at_kl": spread([p["kl"] for p in best])}
        row |= {f"last_{name}": spread([point[name] for point in last]) for name in ("kl", "gold", "proxy")}
        row["accuracy"] = spread([run.get("accuracy") for run in some])
        rows.append(row)
    return rows


def report(runs: list[dict[str, Any]], output: Path) -> None:
    rows = summary(runs)
    names = [name for name in rows[0] if name not in ("method", "pairs", "kl_coef")]
    text = ["Mean ± standard deviation over seeds. peak_kl: of the fit; best_gold, at_kl: of the curve itself. Gold "
            "turns over where last_gold is below best_gold.", "",
            f"| method | pairs | coefficient | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]  # fmt: skip
    for row in rows:
        cells = [str(row[name]) if row[name] is not None else "–" for name in names]
        coef = "–" if row["kl_coef"] is None else f"{row['kl_coef']:g}"
        text.append(f"| {row['method']} | {row['pairs']} | {coef} | {' | '.join(cells)} |")
    atomic_write(output / "overoptimisation.md", ("\n".join(text) + "\n").encode())
    plain = [{name: dataclasses.asdict(x) if isinstance(x, Spread) else x for name, x in row.items()} for row in rows]
    write_json(output / "overoptimisation.json", {"rows": plain})
    draw(runs, output / "overoptimisation.png")


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """A panel a method and coefficient: gold, and dashed the proxy, over sqrt(KL); a colour a number of pairs."""
    kinds = list(dict.fromkeys((run["method"], run.get("kl_coef")) for run in runs))
    figure = Figure(figsize=(5 * len(kinds), 4), layout="constrained")
    sizes = sorted({run["pairs"] for run in runs})
    for ax, (method, coef) in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        for run in (run for run in runs if (run["method"], run.get("kl_coef")) == (method, coef)):
            d, colour = [math.sqrt(point["kl"]) for point in run["curve"]], f"C{sizes.index(run['pairs'])}"
            label = f"{run['pairs']} pairs" if run["seed"] == runs[0]["seed"] else None
            ax.plot(d, [point["gold"] for point in run["curve"]], color=colour, label=label)
            ax.plot(d, [point["proxy"] for point in run["curve"]], color=colour, linestyle=":", alpha=0.6)
        ax.set(title=method if coef is None else f"{method}, coefficient {coef:g}", xlabel="sqrt(KL)")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("gold; dotted: proxy")
    figure.axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
