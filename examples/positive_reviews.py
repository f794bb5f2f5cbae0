"""Tune a GPT-2 by PPO so that its continuations of short prompts read as positive hotel reviews.

    python examples/positive_reviews.py                       # the starter weights, minutes on two CPU cores
    python examples/positive_reviews.py --recipe original --policy GPT2_FOLDER --reward BERT_FOLDER
    python examples/positive_reviews.py --resume runs/NAME    # go on where a run was stopped

Every run leaves metrics.jsonl, samples.jsonl, config.json, reward_curve.png, before_after.md, summary.json and the
folders checkpoints/, policy/ and reference/ under --output. It may be killed at any moment, and resumed.
"""

import argparse
import dataclasses
import os
import random
import shlex
import sys
import time
from pathlib import Path

try:
    import matplotlib  # noqa: F401  (for the curve at the end: better to know now)
    from tqdm import tqdm
except ImportError:
    sys.exit("the examples need tqdm and matplotlib: pip install -e '.[examples]'")

from minirlhf import GPT2, PPOConfig, PPOTrainer, SentimentReward, Tokenizer
from minirlhf.common.printing import show
from minirlhf.common.text import printable
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.findings import before_after_table
from minirlhf.evaluation.plots import plot_run
from minirlhf.io.files import atomic_write, read_json, write_json
from minirlhf.runs.run import Run, RunFailed, Stopped

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPTS = ["酒店", "周围", "位置", "前台"]  # hotel, surroundings, location, front desk
# For the starter weights, a GPT-2 25 times smaller than the original: larger steps, and a bonus that keeps it varied.
STARTER = dict(steps=5120, lr=2e-4, init_kl_coef=0.15, minibatch_size=32, forward_batch_size=32, entropy_coef=0.016)


def main() -> None:
    args, config = read_settings()
    reward = SentimentReward.from_pretrained(args.reward, device=config.device, precision=config.precision)
    if args.resume:
        run = Run.resume(args.resume)
    else:
        policy, tokenizer = GPT2.from_pretrained(args.policy), Tokenizer.from_pretrained(args.policy)
        trainer = PPOTrainer(policy, args.policy, tokenizer, config)  # the reference: the policy as it is in its folder
        trainer.check_prompts(args.prompts)
        output = args.output or f"runs/{time.strftime('%Y%m%d-%H%M%S')}"
        run = Run.start(output, trainer, {"arguments": vars(args), "ppo": dataclasses.asdict(config)})
    with run:  # the folder is ours alone, and Ctrl-C lets a step end
        trainer, config = run.trainer, run.trainer.config
        print(trainer.precision_choice)
        bar = tqdm(range(trainer.iteration, config.iterations), initial=trainer.iteration, total=config.iterations)
        for iteration in bar:
            # 1. Draw prompts from the pool. The draw depends on seed and iteration alone, so a resumed run repeats it.
            prompts = random.Random(f"{config.seed} {iteration}").choices(args.prompts, k=config.batch_size)
            # 2. Sample a continuation of each, and score the whole text: reward = P(positive).
            rollout = trainer.collect(prompts, reward)
            # 3. PPO: several epochs over the batch, held near the frozen reference by the KL penalty.
            stats = trainer.step(rollout)
            # 4. Write it down, now and then with a checkpoint and samples to look at.
            samples = run.record(rollout, stats)
            bar.set_postfix_str(f"reward {stats['reward/mean']:.3f}, KL {stats['objective/kl']:.1f}")
            if samples:
                bar.write(f"step {iteration + 1}: mean reward {stats['reward/mean']:.3f}")
                bar.write("\n".join(f"    {score:.2f}  {printable(text)}" for text, score in samples))
        report(run, args.prompts, reward)


def report(run: Run, pool: list[str], reward: SentimentReward) -> None:
    trainer, config, output = run.trainer, run.trainer.config, run.folder
    settings = EvaluationConfig(
        gen_len=config.gen_len, sampling=config.sampling, eos_token_id=config.eos_token_id, best_of=(16,), max_n=16,
        kl_coef=trainer.kl_controller.coef, seed=config.seed,
    )  # fmt: skip
    found = evaluate(trainer.policy, trainer.reference, trainer.tokenizer, pool, reward, config=settings).given
    summary, table = {**found.summary(), "optimum": found.optimum}, before_after_table(found.pairs, rows=12)
    plot_run(run.history(), output / "reward_curve.png", config.target, found.frontier)
    card = {"algorithm": "PPO", "episodes": config.steps, **summary}
    trainer.policy.save_pretrained(output / "policy", summary=card)
    trainer.reference.save_pretrained(output / "reference")
    for name in ("policy", "reference"):
        trainer.tokenizer.save_pretrained(output / name)
    write_json(output / "summary.json", summary)
    atomic_write(output / "before_after.md", table.encode())
    show(table)
    show("\n".join(f"{name:28} {value:.3f}" for name, value in found.summary().items()))
    show(f"{found.optimum}\nsaved in {output}")


def read_settings() -> tuple[argparse.Namespace, PPOConfig]:
    """The command line; for a resumed run, the arguments that it was started with."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(WEIGHTS / "gpt2-chinese-reviews-small"), help="GPT-2 folder")
    parser.add_argument("--reward", default=str(WEIGHTS / "bert-chinese-reviews-sentiment-small"), help="BERT folder")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="texts, or one file with a text a line")
    parser.add_argument("--recipe", choices=["starter", "original"], default="starter")
    fields = dict(steps=int, batch_size=int, gen_len=int, lr=float, top_p=float, seed=int, save_freq=int, device=str,
                  precision=str, value_head=str)  # fmt: skip
    for name, kind in fields.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"PPOConfig.{name}")
    parser.add_argument("--output", help="folder of the run, default runs/<time>")
    parser.add_argument("--resume", metavar="RUN", help="continue the run in this folder, with its own settings")
    args = parser.parse_args()
    if args.resume:
        if not (started := read_json(Path(args.resume) / "config.json").get("arguments")):
            raise ValueError(f"{args.resume} is no run of this script")
        if given := [n for n, value in vars(args).items() if n != "resume" and value != parser.get_default(n)]:
            raise ValueError(f"a resumed run keeps its settings, so drop {given}")
        args = argparse.Namespace(**{**started, "resume": args.resume})
    else:
        args.prompts = read_prompts(args.prompts)
    given = {name: value for name, value in vars(args).items() if name in fields and value is not None}
    original = args.recipe == "original"
    return args, PPOConfig.preset("original", **given) if original else PPOConfig(**{**STARTER, **given})


def read_prompts(prompts: list[str]) -> list[str]:
    """The pool: the lines of a file if the only prompt names one, else the prompts themselves."""
    if len(prompts) > 1 or not (os.path.isfile(prompts[0]) or prompts[0].endswith(".txt")):
        return prompts
    return [line for line in Path(prompts[0]).read_text(encoding="utf-8-sig").splitlines() if line.strip()]


if __name__ == "__main__":
    try:
        main()
    except (Stopped, RunFailed) as end:  # by Ctrl-C or SIGTERM; by a full disk, or whatever else happened
        told = f"{end}; to go on: python {shlex.join([sys.argv[0], '--resume', str(end.folder)])}"
        print(told) if isinstance(end, Stopped) else sys.exit(f"error: {told}")
    except (ValueError, OSError) as error:  # bad input: one line, no traceback
        sys.exit(f"error: {error}")
