"""You are the human in reinforcement learning from human feedback: rank or score what a policy writes, by single keys.

    python examples/human_feedback.py                        # rank 3 samples a prompt; --scores: 1 to 5 for each
    python examples/reward_model.py --rankings runs/feedback.jsonl      # a reward model learns from the rankings
    python examples/human_feedback.py --train runs/mine      # your scores are the reward of PPO, 4 samples a step
    python examples/human_feedback.py --train runs/mine      # the same once more: go on where you stopped

Keys: numbers, best first (or scores), u undo, s skip, q quit. Every answer is on the disk before the next question.
"""

import argparse
import sys
from pathlib import Path

import torch

from minirlhf import GPT2, PPOConfig, PPOTrainer, SamplingConfig, Tokenizer
from minirlhf.rewards.human import FeedbackFile, FeedbackSession, HumanReward, draw_answers
from minirlhf.rewards.keyboard import Keyboard
from minirlhf.runs.run import Run
from minirlhf.text.text_files import numbered_lines

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPTS = ["酒店", "周围", "位置", "前台"]  # hotel, surroundings, location, front desk


def main() -> None:
    args = read_arguments()
    if len(args.prompts) == 1 and Path(args.prompts[0]).is_file():
        args.prompts = [line for _, line in numbered_lines(args.prompts[0], args.encoding)]
    if args.train:
        train(args)
    else:
        collect(args)


def write(text: str) -> None:
    print(text, end="", flush=True)


def collect(args: argparse.Namespace) -> None:
    """Ask for rankings or scores of the policy's samples: the data of a reward model."""
    model, tokenizer = GPT2.from_pretrained(args.policy), Tokenizer.from_pretrained(args.policy)
    sampling = SamplingConfig(top_p=args.top_p)

    def question_of(number: int):
        generator = torch.Generator().manual_seed(1000 * args.seed + number)  # a round has the same samples each time
        prompt = args.prompts[number % len(args.prompts)]
        return draw_answers(model, tokenizer, prompt, args.samples, args.gen_len, sampling, generator)

    if not 2 <= args.samples <= 4 or args.rounds < 1:
        raise ValueError(f"--samples must be 2 to 4 and --rounds at least 1, got {args.samples} and {args.rounds}")
    room = model.config.n_positions - args.gen_len
    for prompt in args.prompts:  # a bad prompt is better known now
        if len(tokenizer.encode_prompt(prompt)) > room:
            raise ValueError(f"prompt {prompt[:20]!r}... leaves no room for --gen-len {args.gen_len}")
    with FeedbackFile(args.output) as file, Keyboard() as keyboard:
        session = FeedbackSession(file, question_of, keyboard.read, write, args.scores)
        done = session.run(args.rounds)
        total = len(file.records)
    print(f"{session.answered} answered, {session.skipped} skipped; {args.output} has {total} in all")
    print("more --rounds ask for more" if done else "the same command goes on from here")
    if total:
        print(f"stage 2 reads them: python examples/reward_model.py --rankings {args.output}")


def train(args: argparse.Namespace) -> None:
    """PPO with the person's score as the reward: a few samples a step, saved after each."""
    few = args.batch_size
    settings = dict(steps=args.rounds * few, batch_size=few, minibatch_size=few, forward_batch_size=few, save_freq=1,
                    gen_len=args.gen_len, top_p=args.top_p, lr=args.lr, seed=args.seed)  # fmt: skip
    if (Path(args.train) / "config.json").exists():
        run = Run.resume(args.train, **settings)
    else:
        policy, tokenizer = GPT2.from_pretrained(args.policy), Tokenizer.from_pretrained(args.policy)
        trainer = PPOTrainer(policy, args.policy, tokenizer, PPOConfig(**settings))
        trainer.check_prompts(args.prompts)
        run = Run.start(args.train, trainer, {"arguments": vars(args)})
    with run, FeedbackFile(run.folder / "scores.jsonl") as file, Keyboard() as keyboard:
        trainer = run.trainer

        def on_step(rollout, stats) -> None:
            run.record(rollout, stats)
            reward, kl = stats["reward/mean"], stats["objective/kl"]
            print(f"step {trainer.iteration} of {trainer.config.iterations}: mean reward {reward:.2f}, KL {kl:.2f}")

        trainer.train(args.prompts, HumanReward(file, keyboard.read, write), on_step)
        trainer.policy.save_pretrained(run.folder / "policy")
        trainer.tokenizer.save_pretrained(run.folder / "policy")
    print(f"saved in {run.folder / 'policy'}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(WEIGHTS / "gpt2-chinese-reviews-small"), help="GPT-2 folder")
    parser.add_argument(
        "--prompts", nargs="+", default=PROMPTS, help="texts to continue, or one file with a text a line"
    )
    parser.add_argument("--encoding", default="utf-8", help="of the file of prompts")
    parser.add_argument("--samples", type=int, default=3, help="answers a prompt, 2 to 4 (%(default)s)")
    parser.add_argument("--scores", action="store_true", help="ask for scores from 1 to 5, not for a ranking")
    parser.add_argument("--rounds", type=int, default=20, help="questions in all, or steps of PPO (%(default)s)")
    parser.add_argument("--gen-len", type=int, default=24, help="tokens of a sample (%(default)s)")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs/feedback.jsonl", help="file of the answers (%(default)s)")
    parser.add_argument("--train", metavar="RUN", help="folder of a PPO run whose reward you are")
    parser.add_argument("--batch-size", type=int, default=4, help="samples a step of PPO (%(default)s)")
    parser.add_argument("--lr", type=float, default=2e-4)
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line, no traceback
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("\nstopped; what you answered is saved, and the same command goes on from there")
