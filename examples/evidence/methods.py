"""Train every method on one task with the same budget of samples, and compare reward at equal exact KL.

    python examples/evidence/methods.py                                # hours on two CPU cores; docs/algorithms.md
    python examples/evidence/methods.py --methods ppo rloo --seeds 0 --kl-coefs 0.1 --iterations 20
    python examples/evidence/methods.py --methods trl --trl-python trl/bin/python        # TRL 0.11.4; see peer_trl.py

Each run is a method, a KL coefficient and a seed; DPO takes the coefficient as its beta, and methods whose gradient is
not on the scale of the reward take a multiple of it (SCALE). A finished run is a line in
runs.jsonl of the output folder, and a script that was stopped goes on with those that are missing. Fresh samples of
each policy are measured in the distribution that was sampled and in the full softmax, beside best-of-n and the
optimum's frontier. Leaves methods.md, methods.png and methods.json.
"""

import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from measure import DISTRIBUTIONS, Frontier, Ledger, Spread, Task, spread

try:
    from matplotlib.figure import Figure
except ImportError:
    sys.exit("the examples need matplotlib: pip install -e '.[examples]'")

from minirlhf import GPT2, NGramScorer, PPOConfig, PPOTrainer, Tokenizer
from minirlhf.common.printing import show
from minirlhf.evaluation.statistics import Estimate
from minirlhf.io.files import atomic_write, write_json
from minirlhf.rewards.scorers import load_scorer
from minirlhf.rl.presets import METHODS as PRESET_METHODS
from minirlhf.rl.presets import STARTER_RUN, starter_run
from shared import POLICY, PROMPTS, REWARD, SECOND_SCORER, command_line, run_script

BATCH = 128  # samples an iteration
PAIRS_OF = 4  # DPO: the best and the worst of so many responses to a prompt
ONLINE_BATCHES = 4  # online DPO: iterations whose samples make a round
# Divided by a group's standard deviation, or as mere preferences, rewards weigh more than they do elsewhere: with the
# same coefficient these methods end at 10 to 35 nats.
SCALE = {"grpo": 4, "dapo": 4, "gspo": 4, "dpo_offline": 20, "dpo_online": 20}
GOAL, GOAL_KL = 0.9, 3.0  # reward, and nats, whose time is asked

History = list[dict[str, float]]


def main() -> None:
    args = command_line(
        __doc__,
        methods=([*METHODS], "which; also trl"),
        seeds=([0, 1, 2], "of each method at each coefficient"),
        kl_coefs=([0.05, 0.15, 0.4], "strengths of the KL penalty"),
        iterations=(80, f"batches of {BATCH} samples"),
        samples=(1024, "of each evaluation, in each distribution"),
        reference_samples=(16384, "of the reference, for best-of-n and the optimum"),
        threads=(2, "of PyTorch"),
        policy=(POLICY, "GPT-2 folder"),
        reward=(REWARD, "folder of a classifier or of a reward model"),
        second_scorer=(SECOND_SCORER, "folder of character n-grams"),
        trl_python=("", "Python with TRL 0.11.4, for the method trl"),
        output=("runs/methods", "folder; a stopped script goes on there"),
    ).parse_args()
    if unknown := [name for name in args.methods if name not in (*METHODS, "trl")]:
        raise ValueError(f"--methods must be of {', '.join(METHODS)}, trl, got {', '.join(unknown)}")
    if "trl" in args.methods and not args.trl_python:
        raise ValueError("--methods trl needs --trl-python")
    METHODS["trl"] = functools.partial(by_trl, args)
    torch.set_num_threads(args.threads)
    reference, tokenizer = GPT2.from_pretrained(args.policy).eval(), Tokenizer.from_pretrained(args.policy)
    reward = load_scorer(args.reward, device="cpu")
    task = Task(args.policy, reference, tokenizer, PROMPTS, reward, NGramScorer.from_pretrained(args.second_scorer))
    output, fixed = Path(args.output), ("iterations", "samples", "reference_samples", "policy", "reward")
    ledger = Ledger(output, {name: getattr(args, name) for name in fixed})
    frontier = task.frontier(output / "reference.json", args.reference_samples)

    for seed in args.seeds:  # all methods with one seed, then the next: a stopped comparison is a smaller one
        for coef in args.kl_coefs:
            for name in args.methods:
                if not ledger.done(method=name, kl_coef=coef, seed=seed):
                    ledger.add(one_run(task, name, coef, seed, args))
                    show(line(ledger.runs[-1]))
            report(ledger.runs, frontier, args.iterations * BATCH, output)
    show((output / "methods.md").read_text(encoding="utf-8"))


def one_run(task: Task, name: str, coef: float, seed: int, args: Any) -> dict[str, Any]:
    watch = stopwatch()
    policy, history = METHODS[name](task, name, coef * SCALE.get(name, 1), seed, args.iterations)
    seconds = watch()
    found = task.measure(policy, args.samples, seed)
    return {"method": name, "kl_coef": coef, "seed": seed, **seconds, **found, "history": history}


# ---- training: each returns the policy, and reward, KL and time of its own samples ----------------------------------


def by_policy_gradient(task: Task, name: str, coef: float, seed: int, iterations: int) -> tuple[GPT2, History]:
    sizes = dict(batch_size=BATCH, steps=iterations * BATCH)
    own = dict(**sizes, init_kl_coef=coef, adaptive_kl=False, seed=seed, device="cpu")
    config = PPOConfig(**{**starter_run(name), **own})  # one budget for all: samples, optimizer steps, learning rates
    trainer = PPOTrainer(task.policy(), task.reference, task.tokenizer, config)
    watch, history = stopwatch(), []

    def on_step(rollout: Any, stats: dict[str, float]) -> None:
        history.append({"reward": stats["reward/mean"], "kl": stats["objective/kl_exact"], **watch()})

    trainer.train(task.prompts, task.reward, on_step)
    return trainer.policy.decoder, history


def by_dpo(task: Task, name: str, coef: float, seed: int, iterations: int) -> tuple[GPT2, History]:
    """Offline: pairs of the reference's samples. Online: in rounds, pairs of the policy's own."""
    from minirlhf import DPOTrainer
    from minirlhf.supervised.preference_pairs import TokenPair

    policy, generator, watch, history = task.policy(), torch.Generator().manual_seed(seed), stopwatch(), []
    rounds = 1 if name == "dpo_offline" else max(1, iterations // ONLINE_BATCHES)
    for _ in range(rounds):
        # In the full softmax, which is what DPO's log-probabilities are of.
        rollout = task.sample(policy, iterations * BATCH // rounds, 1.0, generator, PAIRS_OF)
        history.append(
            {"reward": float(rollout.scores.mean()), "kl": float(rollout.exact_kl.sum(-1).mean()), **watch()}
        )
        pairs, R = [], rollout.response_mask.size(1)
        for first in range(0, len(rollout), PAIRS_OF):
            scores = rollout.scores[first : first + PAIRS_OF]
            best, worst = (first + int(i) for i in (scores.argmax(), scores.argmin()))
            prompt = rollout.tokens[best, :-R][rollout.mask[best, :-R].bool()]
            answers = [rollout.tokens[i, -R:][rollout.response_mask[i]].tolist() for i in (best, worst)]
            if answers[0] != answers[1]:
                pairs.append(TokenPair(prompt.tolist(), *answers))
        budget = dict(lr=STARTER_RUN["lr"], epochs=STARTER_RUN["ppo_epochs"])
        batch_size = STARTER_RUN["minibatch_size"] // PAIRS_OF * 2
        trainer = DPOTrainer(
            policy, task.reference, task.tokenizer, beta=coef, batch_size=batch_size, seed=seed, **budget
        )
        trainer.train(pairs)
    return policy.eval(), history


def by_trl(args: Any, task: Task, name: str, coef: float, seed: int, iterations: int) -> tuple[GPT2, History]:
    """PPO of TRL with the settings of ours, in the environment where it is installed."""
    own = starter_run("ppo")
    settings = dict(kl_coef=coef, lr=own["lr"], epochs=own["ppo_epochs"], minibatch=own["minibatch_size"],
                    cliprange=own["cliprange"], iterations=iterations, seed=seed, threads=args.threads)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [args.trl_python, str(Path(__file__).with_name("peer_trl.py")), "--prompts", *task.prompts]
        folders = dict(policy=args.policy, reward=args.reward, output=folder)
        for option, value in {**settings, **folders}.items():
            command += [f"--{option.replace('_', '-')}", str(value)]
        own_modules = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        lines = subprocess.run(command, env=own_modules, stdout=subprocess.PIPE, text=True, check=True).stdout
        history = [json.loads(line) for line in lines.splitlines() if line.startswith("{")]
        return GPT2.from_pretrained(folder).eval(), history


METHODS: dict[str, Callable[[Task, str, float, int, int], tuple[GPT2, History]]] = {
    **dict.fromkeys(["ppo", *PRESET_METHODS], by_policy_gradient),
    **dict.fromkeys(["dpo_offline", "dpo_online"], by_dpo),
}


def stopwatch() -> Callable[[], dict[str, float]]:
    """Seconds by the clock and of all cores since now, those of processes that were started and have ended too."""

    def spent() -> dict[str, float]:
        return {"seconds": time.perf_counter(), "cpu_seconds": sum(os.times()[:4])}

    start = spent()
    return lambda: {name: now - start[name] for name, now in spent().items()}


# ---- what came out --------------------------------------------------------------------------------------------------


def reached(history: History, samples: int) -> dict[str, float] | None:
    """Samples and CPU seconds until the mean reward of three entries is GOAL, at a KL of at most GOAL_KL; None: never.

    samples: of the whole history, whose entries share them evenly.
    """
    for i in range(2, len(history)):
        last = history[i - 2 : i + 1]
        if sum(entry["reward"] for entry in last) / 3 >= GOAL and last[-1]["kl"] <= GOAL_KL:
            return {"samples": samples * (i + 1) / len(history), "cpu_seconds": last[-1]["cpu_seconds"]}
    return None


def summary(runs: list[dict[str, Any]], frontier: dict[str, Frontier], samples: int) -> dict[str, Any]:
    """By method: each coefficient's figures, areas under the frontier, samples and seconds to the goal, with spread."""
    limits = {name: min(GOAL_KL, optimum.kls[-1]) for name, optimum in frontier.items()}
    best = {name: optimum.share_of_best_of_n(limits[name]) for name, optimum in frontier.items()}
    found: dict[str, Any] = {"limits": limits, "best_of_n_area": best, "methods": {}}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method]
        points, seeds = {}, sorted({run["seed"] for run in own})
        for coef in sorted({run["kl_coef"] for run in own}):
            some = [run for run in own if run["kl_coef"] == coef]
            figures: dict[str, Spread | None] = {"cpu_seconds": spread([run["cpu_seconds"] for run in some])}
            goals = [reached(run["history"], samples) or {} for run in some]
            figures |= {f"{name}_to_goal": spread([g.get(name) for g in goals]) for name in ("samples", "cpu_seconds")}
            for name in DISTRIBUTIONS:
                for figure in ("reward", "kl", "second", "distinct_2"):
                    figures[f"{name}/{figure}"] = spread([run[name][figure] for run in some])
                least = [frontier[name].needed(run[name]["reward"]) for run in some]
                pairs = zip(least, (run[name]["kl"] for run in some), strict=True)
                figures[f"{name}/efficiency"] = spread([None if a is None else a / kl for a, kl in pairs])
            points[coef] = figures
        areas = {}
        for name in DISTRIBUTIONS:
            by_seed = [[run[name] for run in own if run["seed"] == seed] for seed in seeds]
            curves = [([x["kl"] for x in some], [x["reward"] for x in some]) for some in by_seed]
            areas[name] = spread([frontier[name].share(*curve, limits[name]) for curve in curves])
        found["methods"][method] = {"points": points, "area": areas}
    return found


def report(runs: list[dict[str, Any]], frontier: dict[str, Frontier], samples: int, output: Path) -> None:
    found = summary(runs, frontier, samples)
    atomic_write(output / "methods.md", markdown(found, frontier).encode())
    write_json(output / "methods.json", plain(found))
    draw(found, runs, frontier["sampled"], output / "methods.png")


def plain(x: Any) -> Any:
    """For JSON."""
    if isinstance(x, dict):
        return {str(name): plain(value) for name, value in x.items()}
    return dataclasses.asdict(x) if isinstance(x, (Spread, Estimate)) else x


def cell(x: Spread | None) -> str:
    return "–" if x is None else str(x)


def line(run: dict[str, Any]) -> str:
    x = run["sampled"]
    named = f"{run['method']}, coefficient {run['kl_coef']:g}, seed {run['seed']}"
    return f"{named}: reward {x['reward']:.3f}, KL {x['kl']:.2f}, {run['cpu_seconds']:.0f} CPU seconds"


def markdown(found: dict[str, Any], frontier: dict[str, Frontier]) -> str:
    limit = f"KL ≤ {found['limits']['sampled']:.2f}"
    text = [
        f"Mean ± standard deviation over seeds. Area: under reward over KL above the reference, {limit}, as a share of "
        "the optimum's; in brackets the 95% interval of the mean.", "",
        f"| method | area, sampled | area, full softmax | best: samples, and CPU seconds, to reward {GOAL:g} at "
        f"KL ≤ {GOAL_KL:g} |", "|---|---|---|---|",
    ]  # fmt: skip
    for method, x in found["methods"].items():
        areas = [
            f"{cell(a)}{' [{:.3f}, {:.3f}]'.format(*a.interval) if a.interval else ''}" for a in x["area"].values()
        ]
        goals = [p for p in x["points"].values() if p["cpu_seconds_to_goal"] is not None]
        first = min(goals, key=lambda p: p["cpu_seconds_to_goal"].mean, default=None)
        spent = "–" if first is None else f"{first['samples_to_goal']:.0f}; {first['cpu_seconds_to_goal']:.0f}"
        text.append(f"| {method} | {' | '.join(areas)} | {spent} |")
    text.append(f"| best-of-n | {' | '.join(map(str, found['best_of_n_area'].values()))} | |")
    heads = ("method", "coefficient", "seeds", "reward", "KL", "efficiency", "second scorer", "distinct-2",
             "reward, full softmax", "KL, full softmax", "efficiency, full softmax", "CPU seconds")  # fmt: skip
    text += ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for method, x in found["methods"].items():
        for coef, p in x["points"].items():
            names = [f"sampled/{figure}" for figure in ("reward", "kl", "efficiency", "second", "distinct_2")]
            names += [*(f"full/{figure}" for figure in ("reward", "kl", "efficiency")), "cpu_seconds"]
            cells = " | ".join(cell(p[name]) for name in names)
            text.append(f"| {method} | {coef * SCALE.get(method, 1):g} | {p['sampled/reward'].count} | {cells} |")
    for name, optimum in frontier.items():
        best = ", ".join(f"n = {n}: {reward:.3f} at {kl:.2f} nats" for n, kl, reward in optimum.best_of_n)
        ideal = ", ".join(
            f"{r:.3f} at {kl:.2f}" for kl, r in list(zip(optimum.kls, optimum.rewards, strict=True))[5::5]
        )
        text += ["", f"Best of n of the reference, {name} distribution: {best}. The optimum: {ideal}."]
    return "\n".join(text) + "\n"


def draw(found: dict[str, Any], runs: list[dict[str, Any]], optimum: Frontier, path: Path) -> None:
    """Left: reward over KL in the sampled distribution. Right: over CPU seconds, at the commonest coefficient."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(optimum.kls, optimum.rewards, color="black", label="optimum")
    _, kls, rewards = zip(*optimum.best_of_n, strict=True)
    left.plot(kls, rewards, color="gray", linestyle="--", marker=".", label="best-of-n")
    coef = statistics.mode(run["kl_coef"] for run in runs)
    for i, (method, x) in enumerate(found["methods"].items()):
        points = sorted(x["points"].values(), key=lambda p: p["sampled/kl"].mean)
        kl, reward = ([p[f"sampled/{figure}"] for p in points] for figure in ("kl", "reward"))
        bars = [[s.std or 0.0 for s in figures] for figures in (kl, reward)]
        means = [[s.mean for s in figures] for figures in (kl, reward)]
        look = dict(color=f"C{i}", linestyle="-" if i < 10 else ":", label=method)  # ten colours
        left.errorbar(*means, xerr=bars[0], yerr=bars[1], marker="o" if i < 10 else "s", capsize=2, **look)
        some = [run["history"] for run in runs if run["method"] == method and run["kl_coef"] == coef]
        if some and len(some[0]) > 1:
            right.plot(*(np.mean([[e[k] for e in h] for h in some], 0) for k in ("cpu_seconds", "reward")), **look)
    left.set(xlabel="exact KL to the reference, nats a sequence", ylabel="reward of fresh samples")
    right.set(xlabel="CPU seconds", ylabel="reward of the batch", title=f"coefficient {coef:g} times SCALE")
    right.axhline(GOAL, color="gray", linestyle=":")
    for ax in (left, right):
        ax.grid(alpha=0.3)
    left.legend(fontsize="small")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    run_script(main)
