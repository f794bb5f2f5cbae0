"""Sweep the KL coefficient of PPO, and draw what it buys against best-of-n: the reward-KL frontier (Gao et al. 2022).

    python examples/frontier.py                                   # minutes on two CPU cores
    python examples/frontier.py --kl-coefs 0.05 0.2 --steps 5120 --output runs/frontier

Each coefficient is a short PPO run of its own from the same weights, with the coefficient held fixed, and is then
evaluated on fresh samples: reward, KL, and a second scorer that no run has seen. Best-of-n of the untuned model needs
no training; what it reaches at the same KL is in the table. Leaves frontier.png, second_scorer.png and frontier.md.
"""

import argparse
import sys
from pathlib import Path

try:
    import matplotlib  # noqa: F401  (for the pictures at the end: fail now, not then)
except ImportError:
    sys.exit("the examples need matplotlib: pip install -e '.[examples]'")

from minirlhf import NGramScorer, PPOConfig, PPOTrainer, SamplingConfig, SentimentReward, Tokenizer, load_decoder
from minirlhf.common.printing import show
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.findings import Comparison
from minirlhf.evaluation.plots import FrontierPoint, draw_frontier
from minirlhf.io.files import atomic_write
from shared import POLICY, PROMPTS, REWARD, SECOND_SCORER, STARTER, command_line, new_folder, run_script


def main() -> None:
    args = command_line(
        __doc__,
        kl_coefs=([0.05, 0.1, 0.2, 0.4], "coefficients, a run each"),
        steps=(1280, "samples of each run"),
        entropy_coef=(0.0, "PPOConfig.entropy_coef"),
        samples=(256, "of each evaluation"),
        top_p=(1.0, "at 1 there is one KL, and the comparison is exact"),
        seed=(0, "of everything"),
        policy=(POLICY, "GPT-2 folder"),
        reward=(REWARD, "BERT folder"),
        second_scorer=(SECOND_SCORER, "folder of character n-grams"),
        output=(new_folder("frontier-"), "a new folder"),
    ).parse_args()
    reward = SentimentReward.from_pretrained(args.reward)
    second = NGramScorer.from_pretrained(args.second_scorer)
    tokenizer = Tokenizer.from_pretrained(args.policy)
    reference = load_decoder(args.policy)
    configs = {coefficient: ppo_config(args, coefficient) for coefficient in sorted(set(args.kl_coefs))}
    sampling = SamplingConfig(top_p=args.top_p)
    settings = EvaluationConfig(args.samples, sampling=sampling, best_of_prompts=max(1, args.samples // 8))
    output = Path(args.output)
    output.mkdir(parents=True, exist_ok=False)  # a sweep is never overwritten

    # 1. A PPO run for each coefficient, then its evaluation. The same seed everywhere: the runs differ in nothing else.
    found: dict[float, Comparison] = {}
    for coefficient, config in configs.items():
        trainer = PPOTrainer(load_decoder(args.policy), reference, tokenizer, config)
        trainer.train(PROMPTS, reward)
        evaluation = evaluate(
            trainer.policy, trainer.reference, tokenizer, PROMPTS, reward, second_scorer=second, config=settings
        )
        found[coefficient] = evaluation.given
        show(f"coefficient {coefficient:g}: reward {evaluation.given.policy.reward}, KL {evaluation.given.kl:.2f}")
        for symptom in evaluation.symptoms:
            show(f"  ! {symptom}")

    # 2. One table, and a picture for each scorer.
    table = markdown(found)
    atomic_write(output / "frontier.md", table.encode())
    for name, file in (("reward", "frontier.png"), ("second", "second_scorer.png")):
        first = next(iter(found.values()))  # best-of-n is the reference's: any run's will do
        curve = [FrontierPoint("n = 1", 0.0, getattr(first.reference, name))]
        curve += [FrontierPoint(f"{point.n:g}", point.kl, getattr(point, name)) for point in first.best_of_n]
        policies = [FrontierPoint(f"β = {c:g}", x.kl, getattr(x.policy, name)) for c, x in found.items()]
        score = {"reward": "reward", "second": "second scorer"}[name]
        optimum = first.frontier if name == "reward" else ()  # the best that any policy can do
        atomic_write(output / file, draw_frontier(curve, policies, score, optimum))
    show(f"{table}saved in {output}")


def ppo_config(args: argparse.Namespace, coefficient: float) -> PPOConfig:
    """As positive_reviews.py, with a fixed KL coefficient and no entropy bonus, which would cost KL."""
    return PPOConfig(**STARTER, steps=args.steps, entropy_coef=args.entropy_coef, adaptive_kl=False,
                     init_kl_coef=coefficient, top_p=args.top_p, seed=args.seed)  # fmt: skip


def markdown(found: dict[float, Comparison]) -> str:
    """A row for each coefficient, then best-of-n."""
    first = next(iter(found.values()))
    lines = ["| | KL, nats a sequence | reward | second scorer | best-of-n at equal KL: reward | distinct-2 |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for coefficient, x in found.items():
        equal = "beyond" if x.equal_kl is None else f"n = {x.equal_kl.n:.1f}: {x.equal_kl.reward}"
        lines.append(
            f"| PPO, β = {coefficient:g} | {x.kl:.2f} | {x.policy.reward} | {x.policy.second} | {equal} "
            f"| {x.policy.distinct_2:.3f} |"
        )
    before = first.reference
    lines.append(f"| reference | 0 | {before.reward} | {before.second} | | {before.distinct_2:.3f} |")
    used = [f"- β = {coefficient:g}: {x.in_use}" for coefficient, x in found.items()]
    lines += [f"| best of {p.n:g} | {p.kl:.2f} | {p.reward} | {p.second} | | |" for p in first.best_of_n]
    return "\n".join([*lines, "", *used]) + "\n"


if __name__ == "__main__":
    run_script(main)
