"""Tune a GPT-2 by PPO so that its continuations of short prompts read as positive hotel reviews.

    python examples/positive_reviews.py                       # the starter weights, minutes on two CPU cores
    python examples/positive_reviews.py --algorithm rloo      # or another of docs/algorithms.md
    python examples/positive_reviews.py --recipe original --policy GPT2_FOLDER --reward BERT_FOLDER
    python examples/positive_reviews.py --resume runs/NAME    # continue a run that was stopped
    torchrun --nproc-per-node 8 examples/positive_reviews.py  # or several GPUs, or processes: docs/processes.md

Every run leaves metrics.jsonl, samples.jsonl, config.json, reward_curve.png, before_after.md, summary.json and the
folders checkpoints/, policy/ and reference/ under --output. It may be killed at any moment, and resumed.
"""

import argparse
import dataclasses
import random
import sys

try:
    import matplotlib  # noqa: F401  (for the curve at the end: fail now, not then)
    from tqdm import tqdm
except ImportError:
    sys.exit("the examples need tqdm and matplotlib: pip install -e '.[examples]'")

from minirlhf import PPOConfig, PPOTrainer, SentimentReward, Tokenizer, load_decoder
from minirlhf.common.printing import show
from minirlhf.common.text import printable
from minirlhf.evaluation.results import save_results
from minirlhf.rl.presets import DEFAULT_METHOD, METHODS, starter_run
from minirlhf.runs.run import Run
from shared import LOGGERS, POLICY, PROMPTS, REWARD, command_line, new_folder, parse, prompt_pool, run_script

FIELDS = dict(steps=int, batch_size=int, group_size=int, gen_len=int, lr=float, top_p=float, seed=int, save_freq=int,
              device=str, precision=str, value_head=str)  # fmt: skip


def main() -> None:
    args, config = read_settings()
    reward = SentimentReward.from_pretrained(args.reward, device=config.device, precision=config.precision)
    if args.resume:
        run = Run.resume(args.resume)
    else:
        policy, tokenizer = load_decoder(args.policy), Tokenizer.from_pretrained(args.policy)
        trainer = PPOTrainer(policy, args.policy, tokenizer, config)  # the reference: the policy as it is in its folder
        trainer.check_prompts(args.prompts)  # before the folder is made
        run = Run.start(
            args.output, trainer, {"arguments": vars(args), "ppo": dataclasses.asdict(config)}, loggers=args.loggers
        )
    with run:  # no other process uses the folder, and Ctrl-C lets a step end
        trainer, config = run.trainer, run.trainer.config
        pool = trainer.check_prompts(args.prompts)
        show(f"advantages: {config.advantages}; {trainer.precision_choice}")
        show(f"reward: {reward.meaning}")
        bar = tqdm(range(trainer.iteration, config.iterations), initial=trainer.iteration, total=config.iterations)
        for iteration in bar:
            # 1. Draw prompts from the pool. The draw depends on seed and iteration alone, so a resumed run repeats it.
            count = config.batch_size // config.group_size
            prompts = random.Random(f"{config.seed} {iteration}").choices(pool, k=count)
            # 2. Sample a continuation of each, and score the whole text: reward = P(positive).
            rollout = trainer.collect(prompts, reward)
            # 3. PPO, or another method: several epochs over the batch, held near the reference by the KL penalty.
            stats = trainer.step(rollout)
            # 4. Log the step; every `save_freq` steps save a checkpoint and show samples.
            samples = run.record(rollout, stats)
            bar.set_postfix_str(f"reward {stats['reward/mean']:.3f}, KL {stats['objective/kl']:.1f}")
            if samples:
                bar.write(f"step {iteration + 1}: mean reward {stats['reward/mean']:.3f}")
                bar.write("\n".join(f"    {score:.2f}  {printable(text)}" for text, score in samples))
        # 5. Compare policy and reference, and leave models, summary, samples and curves in the folder.
        show(save_results(run, pool, reward, config.advantages))


def read_settings() -> tuple[argparse.Namespace, PPOConfig]:
    parser = command_line(
        __doc__,
        policy=(POLICY, "folder of a decoder: GPT-2, Llama, Qwen"),
        reward=(REWARD, "BERT folder"),
        prompts=(PROMPTS, "texts, or one file, .txt or .jsonl"),
        **{name: (kind, f"PPOConfig.{name}") for name, kind in FIELDS.items()},
        output=(new_folder(), "folder of the run"),
        loggers=LOGGERS,
        resume=(str, "continue the run in this folder, with its own settings"),
    )
    parser.add_argument("--recipe", choices=["starter", "original"], default="starter")
    parser.add_argument("--algorithm", choices=["ppo", *METHODS], help="default: rloo_to_go; see docs/algorithms.md")
    args = parse(parser)
    if not args.resume:
        args.prompts = prompt_pool(args.prompts, args.policy, args.reward)
    given = {name: value for name, value in vars(args).items() if name in FIELDS and value is not None}
    if args.recipe == "original":
        if args.algorithm not in (None, "ppo"):
            raise ValueError(f"the original recipe is PPO; drop --recipe or --algorithm {args.algorithm}")
        return args, PPOConfig.preset("original", **given)
    method = args.algorithm or DEFAULT_METHOD
    return args, PPOConfig(**{**starter_run(method), **given})


if __name__ == "__main__":
    run_script(main)
