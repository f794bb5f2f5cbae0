"""Tune a GPT-2 by PPO so that its continuations of short prompts read as positive hotel reviews.

    python examples/positive_reviews.py                       # the starter weights, minutes on two CPU cores
    python examples/positive_reviews.py --recipe original --policy GPT2_FOLDER --reward BERT_FOLDER
    python examples/positive_reviews.py --resume runs/NAME    # go on where a run was stopped

Every run leaves metrics.jsonl, samples.jsonl, config.json, reward_curve.png, before_after.md, summary.json and the
folders policy/ and reference/ under --output.
"""

import argparse
import dataclasses
import os
import random
import sys
import time
from pathlib import Path

try:
    import matplotlib  # noqa: F401  (the curve at the end needs it: better to know now)
    from tqdm import tqdm
except ImportError:
    sys.exit("the examples need tqdm and matplotlib: pip install -e '.[examples]'")

from minirlhf import GPT2, PPOConfig, PPOTrainer, SentimentReward, Tokenizer
from minirlhf.checkpoints import read_json, write_json
from minirlhf.evaluation import before_after_table, compare
from minirlhf.metrics import RunLog, plot_run, printable

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPTS = ["酒店", "周围", "位置", "前台"]  # hotel, surroundings, location, front desk
# For the starter weights, a GPT-2 25 times smaller than the original: larger steps, and a bonus that keeps it varied.
STARTER = dict(steps=5120, lr=2e-4, minibatch_size=32, forward_batch_size=32, entropy_coef=0.01)


def main() -> None:
    args, config = read_settings()
    tokenizer = Tokenizer.from_pretrained(args.policy)
    policy, reference = GPT2.from_pretrained(args.policy), GPT2.from_pretrained(args.policy)
    reward = SentimentReward.from_pretrained(args.reward, device=config.device)
    trainer = PPOTrainer(policy, reference, tokenizer, config)
    trainer.check_prompts(args.prompts)

    output = Path(args.resume or args.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}")
    if args.resume:
        trainer.load_checkpoint(output / "checkpoint.safetensors")
        log = RunLog.resume(output, trainer.iteration)
    else:
        log = RunLog(output, {"arguments": vars(args), "ppo": dataclasses.asdict(config)})

    bar = tqdm(range(trainer.iteration, config.iterations), initial=trainer.iteration, total=config.iterations)
    for iteration in bar:
        # 1. Draw prompts from the pool. The draw depends on seed and iteration alone, so a resumed run repeats it.
        prompts = random.Random(f"{config.seed} {iteration}").choices(args.prompts, k=config.batch_size)
        # 2. Sample a continuation of each, and score the whole text: reward = P(positive).
        rollout = trainer.collect(prompts, reward)
        # 3. PPO: several epochs over the batch, held near the frozen reference by the KL penalty.
        stats = trainer.step(rollout)
        # 4. Say how it goes.
        log.metrics(iteration + 1, stats)
        bar.set_postfix_str(f"reward {stats['reward/mean']:.3f}, KL {stats['objective/kl']:.1f}")
        if (iteration + 1) % config.save_freq == 0 or iteration + 1 == config.iterations:
            shown = random.Random(f"{config.seed} {iteration} shown").sample(range(len(rollout)), min(5, len(rollout)))
            texts, scores = [rollout.texts[i] for i in shown], [rollout.scores[i].item() for i in shown]
            log.samples(iteration + 1, texts, scores)
            bar.write(f"step {iteration + 1}: mean reward {stats['reward/mean']:.3f}")
            for text, score in zip(texts, scores, strict=True):
                bar.write(f"    {score:.2f}  {printable(text)}")
            trainer.save_checkpoint(output / "checkpoint.safetensors")

    plot_run(log.history(), output / "reward_curve.png", config.target)
    trainer.policy.save_pretrained(output / "policy")
    reference.save_pretrained(output / "reference")
    for folder in ("policy", "reference"):
        tokenizer.save_pretrained(output / folder)
    sampling = config.gen_len, config.sampling
    summary, pairs = compare(trainer.policy, reference, tokenizer, args.prompts, reward, *sampling, seed=config.seed)
    write_json(output / "summary.json", summary)
    (output / "before_after.md").write_text(before_after_table(pairs, rows=12), encoding="utf-8")
    print(before_after_table(pairs, rows=12))
    print("\n".join(f"{name:28} {value:.3f}" for name, value in summary.items()))
    print(f"saved in {output}")


def read_settings() -> tuple[argparse.Namespace, PPOConfig]:
    """The command line; for a resumed run, the arguments that it was started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(WEIGHTS / "gpt2-chinese-reviews-small"), help="GPT-2 folder")
    parser.add_argument("--reward", default=str(WEIGHTS / "bert-chinese-reviews-sentiment-small"), help="BERT folder")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="texts, or one file with a text a line")
    parser.add_argument("--recipe", choices=["starter", "original"], default="starter")
    for name, kind in (("steps", int), ("batch-size", int), ("gen-len", int), ("lr", float), ("top-p", float),
                       ("seed", int), ("save-freq", int), ("device", str), ("precision", str),
                       ("value-head", str)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, help=f"PPOConfig.{name.replace('-', '_')}")
    parser.add_argument("--output", help="folder of the run, default runs/<time>")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder, with its own settings")
    args = parser.parse_args()
    if args.resume:
        given = [n for n, value in vars(args).items() if n != "resume" and value != parser.get_default(n)]
        started = read_json(Path(args.resume) / "config.json").get("arguments")
        if given or not isinstance(started, dict):
            raise ValueError(
                f"a resumed run keeps its settings, so drop {given}" if given else "no run to resume there"
            )
        args = argparse.Namespace(**{**started, "resume": args.resume})
    else:
        args.prompts = read_prompts(args.prompts)
    fields = {field.name for field in dataclasses.fields(PPOConfig)}
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    if args.recipe == "original":
        return args, PPOConfig.preset("original", **given)
    return args, PPOConfig.with_overrides(**{**STARTER, **given})


def read_prompts(prompts: list[str]) -> list[str]:
    """The pool: the lines of a file if the only prompt names one, else the prompts themselves."""
    if len(prompts) == 1 and os.path.isfile(prompts[0]):
        return [line for line in Path(prompts[0]).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if len(prompts) == 1 and prompts[0].endswith(".txt"):
        raise FileNotFoundError(f"prompts file {prompts[0]} does not exist")
    return prompts


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line, no traceback
        sys.exit(f"error: {error}")
