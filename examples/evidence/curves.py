"""The curves of small runs, of one that goes well and of three that do not: the pictures of docs/curves.md.

python examples/evidence/curves.py collapse --output docs/curves_collapse.png      # or healthy, hacked, leash
"""

import sys
from pathlib import Path
from typing import Any

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES))

from minirlhf import PPOConfig, PPOTrainer, SentimentReward, Tokenizer, load_decoder  # noqa: E402
from minirlhf.common.printing import show  # noqa: E402
from minirlhf.evaluation.plots import plot_run  # noqa: E402
from minirlhf.rewards.base import RewardFunction  # noqa: E402
from minirlhf.rewards.scorers import load_scorer  # noqa: E402
from minirlhf.rl.presets import DEFAULT_METHOD, starter_run  # noqa: E402
from shared import POLICY, PROMPTS, REWARD, SECOND_SCORER, command_line, run_script  # noqa: E402

# What each run changes in the settings of the default run.
CASES: dict[str, dict[str, Any]] = {
    "healthy": {},
    "collapse": dict(init_kl_coef=0.0, lr=1e-3, lr_schedule="constant"),  # no leash, and steps eight times as large
    "hacked": dict(init_kl_coef=0.02),  # a reward that counts a word, and hardly a leash
    # Scores from 0 to 10 beside a penalty that is made for scores from 0 to 1, and large steps; no token is cut off
    "leash": dict(score_scale=10.0, lr=1e-3, lr_schedule="constant", top_p=1.0),
}


def main() -> None:
    parser = command_line(
        __doc__,
        policy=(POLICY, "GPT-2 folder"),
        reward=(REWARD, "BERT folder"),
        second_scorer=(SECOND_SCORER, "folder of a judge that the policy is not trained on"),
        iterations=(24, "steps"),
        batch_size=(64, "samples of a step"),
        output=("runs/curves.png", "the picture"),
    )
    parser.add_argument("case", choices=CASES)
    args = parser.parse_args()
    settings = {**starter_run(DEFAULT_METHOD), "batch_size": args.batch_size}
    settings["steps"] = args.iterations * args.batch_size
    config = PPOConfig(**{**settings, **CASES[args.case]})
    tokenizer = Tokenizer.from_pretrained(args.policy)
    trainer = PPOTrainer(load_decoder(args.policy), args.policy, tokenizer, config)
    sentiment = SentimentReward.from_pretrained(args.reward)
    if args.case == "hacked":
        reward = beside(lambda texts: [float(text.count("早餐")) for text in texts], sentiment)  # breakfast
    else:
        reward = beside(sentiment, load_scorer(args.second_scorer))

    def print_samples(rollout, stats) -> None:
        if trainer.iteration in (1, config.iterations):
            for i in range(0, len(rollout), config.group_size):
                show(f"step {trainer.iteration}: {rollout.scores[i]:.2f}  {rollout.texts[i]}")

    history = trainer.train(PROMPTS, reward, print_samples)
    figure = plot_run(history, target=config.target)
    axes = figure.axes[0]
    steps, second = zip(*((line["step"], line["reward/second"]) for line in history), strict=True)
    axes.plot(steps, second, color="tab:orange", label="of another judge")
    axes.legend()
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=80)
    show(f"drawn in {args.output}")


def beside(reward: RewardFunction, second: RewardFunction) -> RewardFunction:
    """A reward that reports the mean of another judge, on which the policy is not trained, as reward/second."""

    def both(texts: list[str]) -> tuple[Any, dict[str, float]]:
        return reward(texts), {"second": sum(map(float, second(texts))) / len(texts)}

    return both


if __name__ == "__main__":
    run_script(main)
