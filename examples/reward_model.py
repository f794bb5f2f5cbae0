"""Stages 2 and 3 of RLHF: a reward model learns from ranked answers, and a policy learns from the reward model.

    python examples/reward_model.py --rankings FILE [--held-out FILE]     # .jsonl pairs or .tsv lists
    python examples/reward_model.py --resume runs/NAME                    # continue a run that was stopped

`minirlhf/text/preferences.py` describes the formats, and `weights/train/reviews_data.py` makes such files of published
reviews. The sentiment classifier judges the policy at the end: it has no part in the training of either model. A run
leaves config.json, metrics.jsonl, samples.jsonl, summary.json, before_after.md, checkpoints/, reward/ and policy/ under
--output.
"""

import argparse
import dataclasses

from minirlhf import GPT2, PPOConfig, PPOTrainer, RewardModel, SentimentReward, Tokenizer
from minirlhf.evaluation.evaluate import before_after_table, compare
from minirlhf.io.files import atomic_write, read_json, write_json
from minirlhf.runs.run import Run
from minirlhf.supervised.reward_modelling import RewardTrainingConfig, train_reward_model
from minirlhf.text.preferences import contradictions, read_rankings, split_rankings
from shared import POLICY, PROMPTS, REWARD, STARTER, command_line, new_folder, parse, run_script, say


def main() -> None:
    args = read_arguments()
    # 1. Rankings: which of several answers is better. Those that are held out show whether the model learns.
    train = read_rankings(args.rankings, args.encoding)
    if args.held_out:
        held_out = read_rankings(args.held_out, args.encoding)
    else:
        train, held_out = split_rankings(train, by="answers")
    train = train[: args.limit or None]

    # 2. The reward model is the language model itself, with a scalar head in place of the vocabulary; or a BERT.
    common = dict(device=args.device, seed=args.seed)
    reward = RewardModel.from_trunk(args.trunk or args.policy, **common)
    limits = dict(max_length=reward.max_length, tokens_per_batch=8 * reward.max_length)
    settings = RewardTrainingConfig(epochs=args.epochs, lr=args.lr, **limits, **common)
    judge = SentimentReward.from_pretrained(args.judge, device=args.device)
    if args.resume:
        run = Run.resume(args.resume)
    else:
        sizes = dict(steps=args.steps, batch_size=args.batch_size)
        config = PPOConfig.with_overrides(**STARTER, entropy_coef=0.01, **sizes, **common)
        policy, tokenizer = GPT2.from_pretrained(args.policy), Tokenizer.from_pretrained(args.policy)
        trainer = PPOTrainer(policy, args.policy, tokenizer, config)
        trainer.check_prompts(args.prompts)
        run = Run.start(args.output, trainer, {"arguments": vars(args), "ppo": dataclasses.asdict(config)})
    output, trainer = run.folder, run.trainer
    with run:
        if not (output / "reward" / "figures.json").exists():
            disputed = len(contradictions(train))
            say(f"{output}: {len(train)} rankings, {disputed} disputed, {len(held_out)} held out")
            on_epoch = lambda epoch, figures: say(f"after epoch {epoch} {figures}")  # noqa: E731
            history = train_reward_model(reward, train, settings, held_out, on_epoch=on_epoch)
            # 3. Rewards get mean 0 and standard deviation 1 on what the policy writes before it learns.
            reward.normalise(trainer.collect((args.prompts * 512)[:512], reward).texts)
            reward.save_pretrained(output / "reward")
            write_json(output / "reward" / "figures.json", {"held_out": [dataclasses.asdict(x) for x in history]})

        # 4. PPO against the learned reward, loaded as any project would load it.
        reward = RewardModel.from_pretrained(output / "reward", device=args.device)

        def on_step(rollout, stats) -> None:
            run.record(rollout, stats)
            learned, kl = stats["reward/mean"], stats["objective/kl"]
            say(f"step {trainer.iteration}: learned reward {learned:.2f}, KL {kl:.1f}")

        trainer.train(args.prompts, reward, on_step)
        trainer.policy.save_pretrained(output / "policy")
        trainer.tokenizer.save_pretrained(output / "policy")

        # 5. The judge that neither model saw, and the learned reward of the same samples.
        judged, samples = compare(trainer.policy, trainer.reference, trainer.tokenizer, args.prompts, judge)
        before, after = (reward([s.prompt + getattr(s, side) for s in samples]) for side in ("before", "after"))
        summary = {
            "judge": {"before": judged["reference/reward"], "after": judged["policy/reward"]},
            "learned_reward": {"before": before.mean().item(), "after": after.mean().item()},
            "distinct_2": {"before": judged["reference/distinct_2"], "after": judged["policy/distinct_2"]},
            "kl": {"before": 0.0, "after": judged["kl"]},
        }
        write_json(output / "summary.json", {**summary, **read_json(output / "reward" / "figures.json")})
        table = before_after_table(samples)
        atomic_write(output / "before_after.md", table.encode())
    say(table)
    for name, value in summary.items():
        say(f"{name:14} before {value['before']:6.3f}, after {value['after']:6.3f}")


def read_arguments() -> argparse.Namespace:
    parser = command_line(
        __doc__,
        rankings=(str, "rankings, .jsonl or .tsv"),
        held_out=(str, "other rankings, to measure on; if not given, a tenth of --rankings"),
        encoding=("utf-8", "of both files"),
        limit=(6000, "train on the first rankings only; 0: on all"),
        policy=(POLICY, "GPT-2 folder"),
        trunk=("", "GPT-2 or BERT folder that the reward model begins from; empty: that of --policy"),
        judge=(REWARD, "folder of a sentiment classifier"),
        epochs=(1, "of the reward model"),
        lr=(3e-4, "of the reward model"),
        steps=(2048, "samples of the PPO run"),
        batch_size=(128, "samples of a PPO step"),
        device=("auto", "auto, cpu or cuda"),
        seed=(0, "of everything"),
        prompts=(PROMPTS, "texts to continue"),
        output=(new_folder("reward-"), "folder of the run"),
        resume=(str, "continue the run in this folder, with its own settings"),
    )
    args = parse(parser)
    if args.rankings is None:
        parser.error("--rankings or --resume is needed")
    return args


if __name__ == "__main__":
    run_script(main)
