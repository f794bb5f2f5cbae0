"""What the scripts of this folder share: samples, exact KL, spread over seeds, and runs that are done once."""

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # examples/, for `shared`

from minirlhf import GPT2, ActorCritic, Models, NGramScorer, PPOConfig, Tokenizer, collect_rollout
from minirlhf.evaluation.best_of import best_of_n_kl, expected_best_of_n
from minirlhf.evaluation.optimum import Optimum
from minirlhf.evaluation.statistics import Bootstrap, Estimate
from minirlhf.io.files import atomic_write, read_json, read_jsonl, write_json
from minirlhf.rewards.base import RewardFunction, call_reward
from minirlhf.rl.rollout import Rollout
from minirlhf.text.statistics import distinct_n

DISTRIBUTIONS = {"sampled": 0.95, "full": 1.0}  # name: top-p
RESAMPLES = 200
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}  # by seeds


@dataclass(frozen=True)
class Task:
    """Prompts, a reward, and the model that everything starts from and is compared with."""

    folder: str
    reference: GPT2
    tokenizer: Tokenizer
    prompts: list[str]
    reward: RewardFunction
    second: NGramScorer

    def policy(self) -> GPT2:
        """A new copy of the reference."""
        return GPT2.from_pretrained(self.folder)

    def sample(
        self, policy: GPT2, count: int, top_p: float, generator: torch.Generator, group_size: int = 1
    ) -> Rollout:
        """`count` samples of the prompts in turn, `group_size` of each, with scores and KL."""
        models = Models(ActorCritic(policy, None).eval(), self.reference, self.tokenizer)
        prompts = [self.prompts[i % len(self.prompts)] for i in range(-(-count // group_size))]
        sizes = PPOConfig(top_p=top_p, group_size=group_size, batch_size=group_size, minibatch_size=group_size)
        return collect_rollout(models, prompts, self.reward, sizes, generator)

    def frontier(self, path: Path, samples: int) -> "dict[str, Frontier]":
        """Best-of-n and the optimum in each distribution, from samples of the reference, which are kept in `path`."""
        if not path.exists():
            found: dict[str, dict[str, list[float]]] = {}
            for name, top_p in DISTRIBUTIONS.items():
                generator = torch.Generator().manual_seed(12345)
                found[name] = {prompt: [] for prompt in self.prompts}
                for _ in range(-(-samples // 512)):
                    rollout = self.sample(self.reference, min(512, samples), top_p, generator)
                    for prompt, score in zip(rollout.prompts, rollout.scores.tolist(), strict=True):
                        found[name][prompt].append(score)
            write_json(path, found)
        return {name: Frontier.of(scores) for name, scores in read_json(path).items()}

    def measure(self, policy: GPT2, samples: int, seed: int) -> dict[str, dict[str, float]]:
        """Reward, exact KL, a second scorer and distinct-2 of fresh samples, by distribution."""
        found = {}
        for name, top_p in DISTRIBUTIONS.items():
            rollout = self.sample(policy, samples, top_p, torch.Generator().manual_seed(777 + seed))
            kl = rollout.exact_kl.sum(-1)
            second = call_reward(self.second, [""] * samples, rollout.texts)
            figures = {"reward": rollout.scores.mean(), "kl": kl.mean(), "kl_se": kl.std() / math.sqrt(samples),
                       "second": second.mean(), "distinct_2": torch.tensor(distinct_n(rollout.texts, 2))}  # fmt: skip
            found[name] = {key: float(value) for key, value in figures.items()}
        return found


@dataclass(frozen=True)
class Frontier:
    """Reward over KL in nats of the optimum, from the reference on, and n, KL and reward of best-of-n.

    resampled: (RESAMPLES, one each n), the rewards of best-of-n by bootstrap over the reference's samples.
    """

    kls: list[float]
    rewards: list[float]
    best_of_n: list[tuple[int, float, float]]
    resampled: list[list[float]]

    @classmethod
    def of(cls, scores: dict[str, list[float]]) -> "Frontier":
        """From the scores of the reference's samples of each prompt."""
        points = Optimum(scores, bootstrap=Bootstrap(2)).curve(40)  # the spread that counts is that over seeds
        ns = [2**k for k in range(8) if 2**k <= min(map(len, scores.values())) // 4]

        def rewards(rows: list[np.ndarray]) -> list[float]:
            return [float(np.mean([expected_best_of_n(row, n).mean() for row in rows])) for n in ns]

        rows, generator = [np.array([x]) for x in scores.values()], np.random.default_rng(0)
        resampled = [rewards([generator.choice(row, row.shape[1], axis=1) for row in rows]) for _ in range(RESAMPLES)]
        best = [(n, best_of_n_kl(n), reward) for n, reward in zip(ns, rewards(rows), strict=True)]
        return cls([p.kl.mean for p in points], [p.reward.mean for p in points], best, resampled)

    def needed(self, reward: float) -> float | None:
        """The least KL for this reward; None beyond what the samples can tell."""
        return float(np.interp(reward, self.rewards, self.kls)) if reward <= self.rewards[-1] else None

    def share(self, kls: Sequence[float], rewards: Sequence[float], limit: float) -> float:
        """The area under a curve, up to a KL, over that under the optimum's; both above the reference's reward."""
        start = self.rewards[0]
        return area(kls, rewards, start, limit) / area(self.kls, self.rewards, start, limit)

    def share_of_best_of_n(self, limit: float) -> Estimate:
        """The same of best-of-n, with its 95% interval; the optimum's area is taken as known."""
        _, kls, rewards = zip(*self.best_of_n, strict=True)
        replicates = np.array([self.share(kls, some, limit) for some in self.resampled])
        return Bootstrap(RESAMPLES).interval(self.share(kls, rewards, limit), replicates)


class Ledger:
    """Finished runs, a line each, in a folder whose settings do not change: a stopped script goes on where it was.

    Raises ValueError if the folder was begun with other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, config = folder / "runs.jsonl", folder / "settings.json"
        if not config.exists():
            write_json(config, settings)
        if (begun := read_json(config)) != json.loads(json.dumps(settings)):
            changed = [name for name in settings if begun.get(name) != settings[name]]
            raise ValueError(f"{folder} was begun with other settings ({', '.join(changed)}): choose another --output")
        self.runs: list[dict[str, Any]] = read_jsonl(self.path) if self.path.exists() else []

    def done(self, **key: Any) -> bool:
        """Whether a run with these entries is there."""
        return any(all(run.get(name) == value for name, value in key.items()) for run in self.runs)

    def add(self, run: dict[str, Any]) -> None:
        """Append a run; the file is replaced at one moment, so that a killed script leaves whole lines."""
        self.runs.append(run)
        atomic_write(self.path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in self.runs).encode())


@dataclass(frozen=True)
class Spread:
    """A figure over seeds: mean, standard deviation (None for one seed), and Student's 95% interval of the mean."""

    mean: float
    std: float | None
    interval: tuple[float, float] | None
    count: int

    def __str__(self) -> str:
        return format(self)

    def __format__(self, spec: str) -> str:
        spec = spec or ".3f"
        return format(self.mean, spec) + ("" if self.std is None else f" ± {format(self.std, spec)}")


def spread(values: Sequence[float | None]) -> Spread | None:
    """Over the seeds that have a figure; None if none has."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    mean, n = statistics.mean(known), len(known)
    if n == 1:
        return Spread(mean, None, None, 1)
    std = statistics.stdev(known)
    half = T_95.get(n, 1.96) * std / math.sqrt(n)
    return Spread(mean, std, (mean - half, mean + half), n)


def area(kls: Sequence[float], rewards: Sequence[float], start: float, limit: float) -> float:
    """Area between a curve of reward over KL, from (0, start) to KL = limit, and the reference's reward.

    Between points it is linear; beyond the last it stays as it is, as a policy may stop there.
    """
    points = sorted(zip(kls, rewards, strict=True))
    grid = np.linspace(0, limit, 201)
    above = np.interp(grid, [0.0, *(kl for kl, _ in points)], [start, *(r for _, r in points)]) - start
    return float(np.sum((above[1:] + above[:-1]) / 2) * (grid[1] - grid[0]))
