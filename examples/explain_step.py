"""One PPO step on real samples, token by token: what each token was worth, and what the step did about it.

python examples/explain_step.py [--policy FOLDER --reward FOLDER --prompt 酒店 --seed 0]
"""

import argparse
from pathlib import Path

from minirlhf import GPT2, PPOTrainer, SentimentReward, Tokenizer, explain

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(WEIGHTS / "gpt2-chinese-reviews-small"))
    parser.add_argument("--reward", default=str(WEIGHTS / "bert-chinese-reviews-sentiment-small"))
    parser.add_argument("--prompt", default="酒店")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    policy, reference = GPT2.from_pretrained(args.policy), GPT2.from_pretrained(args.policy)
    tokenizer, reward = Tokenizer.from_pretrained(args.policy), SentimentReward.from_pretrained(args.reward)
    trainer = PPOTrainer(
        policy, reference, tokenizer, lr=args.lr, seed=args.seed, batch_size=args.batch_size, steps=2 * args.batch_size
    )
    # After the first step the policy has left the reference, so that the second has a KL to show.
    trainer.step(trainer.collect([args.prompt] * args.batch_size, reward))
    rollout = trainer.collect([args.prompt] * args.batch_size, reward)
    print(f"mean score of the batch {rollout.scores.mean():.4f}, KL coefficient {trainer.kl_controller.coef:.4f}")
    trainer.step(rollout)
    for row in (int(rollout.scores.argmax()), int(rollout.scores.argmin())):
        print()
        explain(trainer, rollout, row)


if __name__ == "__main__":
    main()
