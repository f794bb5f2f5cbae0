"""Stages 2 and 3 of RLHF: a reward model learns from ranked answers, and a policy learns from the reward model.

    python examples/reward_model.py --data FOLDER       # pairs made from labelled reviews, see reviews_data.py
    python examples/reward_model.py --rankings FILE     # your own: .jsonl pairs or .tsv lists, see preferences.py

The sentiment classifier judges the policy at the end: it has no part in the training of either model. A run leaves
config.json, metrics.jsonl, summary.json, before_after.md, reward/ and policy/ under --output.
"""

import argparse
import dataclasses
import random
import sys
import time
from pathlib import Path

from minirlhf import GPT2, PPOConfig, PPOTrainer, RewardModel, SentimentReward, Tokenizer
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.findings import before_after_table
from minirlhf.io.files import atomic_write, write_json
from minirlhf.runs.log import RunLog
from minirlhf.supervised.reward_modelling import RewardTrainingConfig, train_reward_model
from minirlhf.text.preferences import Ranking, contradictions, read_rankings, split_rankings
from reviews_data import Review, load_reviews, opening, split_reviews

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPTS = ["酒店", "周围", "位置", "前台"]  # hotel, surroundings, location, front desk
PPO = dict(lr=2e-4, minibatch_size=32, forward_batch_size=32, entropy_coef=0.01)  # as in positive_reviews.py


def main() -> None:
    args = read_arguments()
    # 1. Rankings: which of two answers is the better one. A tenth is held out.
    if args.data:
        train, held_out = (make_pairs(reviews, args.seed) for reviews in split_reviews(load_reviews(args.data)))
    else:
        train, held_out = split_rankings(read_rankings(args.rankings, args.encoding), by="answers")
    train = train[: args.limit or None]

    # 2. The reward model is the language model itself, with a scalar in the place of its vocabulary; or a BERT.
    common = dict(device=args.device, seed=args.seed)
    reward = RewardModel.from_trunk(args.trunk or args.policy, **common)
    limits = dict(max_length=reward.max_length, tokens_per_batch=8 * reward.max_length)
    settings = RewardTrainingConfig(epochs=args.epochs, lr=args.lr, **limits, **common)
    config = PPOConfig.with_overrides(**PPO, steps=args.steps, batch_size=args.batch_size, **common)
    policy, reference = GPT2.from_pretrained(args.policy), GPT2.from_pretrained(args.policy)
    trainer = PPOTrainer(policy, reference, Tokenizer.from_pretrained(args.policy), config)
    trainer.check_prompts(args.prompts)
    judge = SentimentReward.from_pretrained(args.judge, device=args.device)
    log = RunLog(args.output, {"arguments": {name: str(value) for name, value in vars(args).items()}})
    print(f"{args.output}: {len(train)} rankings, {len(contradictions(train))} disputed, {len(held_out)} held out")
    history = train_reward_model(reward, train, settings, held_out, on_epoch=lambda *seen: print("after epoch", *seen))

    # 3. Rewards get mean 0 and standard deviation 1 on what the policy writes before it learns.
    reward.normalise(trainer.collect((args.prompts * 512)[:512], reward).texts)
    reward.save_pretrained(args.output / "reward")

    # 4. PPO against the learned reward, loaded as any project would load it.
    reward = RewardModel.from_pretrained(args.output / "reward", device=args.device)

    def on_step(rollout, stats) -> None:
        log.metrics(trainer.iteration, stats)
        print(f"step {trainer.iteration}: learned reward {stats['reward/mean']:.2f}, KL {stats['objective/kl']:.1f}")

    trainer.train(args.prompts, reward, on_step)
    trainer.policy.save_pretrained(args.output / "policy")
    trainer.tokenizer.save_pretrained(args.output / "policy")

    # 5. The judge that neither model saw, and the learned reward of the same samples.
    settings = EvaluationConfig(max_n=16)
    found = evaluate(trainer.policy, reference, trainer.tokenizer, args.prompts, judge, config=settings).given
    judged, samples = found.summary(), found.pairs
    before, after = (reward([s.prompt + getattr(s, side) for s in samples]) for side in ("before", "after"))
    summary = {
        "judge": {"before": judged["reference/reward"], "after": judged["policy/reward"]},
        "learned_reward": {"before": before.mean().item(), "after": after.mean().item()},
        "distinct_2": {"before": judged["reference/distinct_2"], "after": judged["policy/distinct_2"]},
        "kl": {"before": 0.0, "after": judged["kl"]},
    }
    write_json(args.output / "summary.json", {**summary, "held_out": [dataclasses.asdict(x) for x in history]})
    atomic_write(args.output / "before_after.md", before_after_table(samples).encode())
    print(before_after_table(samples))
    for name, value in summary.items():
        print(f"{name:14} before {value['before']:6.3f}, after {value['after']:6.3f}")


def make_pairs(reviews: list[Review], seed: int) -> list[Ranking]:
    """The opening of a positive review before that of a negative one about the same kind of goods."""
    openings: dict[str, tuple[list[str], list[str]]] = {}
    for review in reviews:
        openings.setdefault(review.category, ([], []))[review.label].append(opening(review.text).strip())
    rng, found = random.Random(seed), []
    for negative, positive in openings.values():
        rng.shuffle(positive)
        found += [Ranking("", pair) for pair in zip(positive, negative, strict=False) if pair[0] != pair[1]]
    return rng.sample(found, len(found))


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="folder with the two published CSV files")
    source.add_argument("--rankings", type=Path, help="your own rankings, .jsonl or .tsv")
    for name, default, meaning in (
        ("encoding", "utf-8", "of --rankings"), ("limit", 6000, "train on the first rankings only, 0: on all"),
        ("policy", str(WEIGHTS / "gpt2-chinese-reviews-small"), "GPT-2 folder"),
        ("trunk", "", "GPT-2 or BERT folder that the reward model begins from, empty: that of --policy"),
        ("judge", str(WEIGHTS / "bert-chinese-reviews-sentiment-small"), "folder of a sentiment classifier"),
        ("epochs", 1, "of the reward model"), ("lr", 3e-4, "of the reward model"),
        ("steps", 2048, "samples of the PPO run"), ("batch-size", 128, "samples of a PPO step"),
        ("device", "auto", "auto, cpu or cuda"), ("seed", 0, "of everything"),
        ("output", Path(f"runs/reward-{time.strftime('%Y%m%d-%H%M%S')}"), "folder of the run"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{meaning} (%(default)s)")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="texts to continue")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line, no traceback
        sys.exit(f"error: {error}")
