"""Stages 2 and 3 of RLHF: a reward model learns from ranked answers, and a policy learns from the reward model.

    python examples/reward_model.py --rankings FILE [--held-out FILE]     # .jsonl pairs or .tsv lists
    python examples/reward_model.py --resume runs/NAME/STAGE              # continue a run that was stopped

`minirlhf/text/preferences.py` describes the formats, and `weights/train/reviews_data.py` makes such files of published
reviews. The sentiment classifier judges the policy at the end: it has no part in the training of either model. Under
--output each stage is a run, stage2/ and stage3/, and there are the models, reward/ and policy/, summary.json and
before_after.md.
"""

import argparse
from pathlib import Path

from minirlhf import PPOConfig, PPOTrainer, RewardModel, SentimentReward, Tokenizer, load_decoder
from minirlhf.common.printing import show
from minirlhf.device.launch import restarted
from minirlhf.device.processes import agreed
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.findings import before_after_table
from minirlhf.io.files import atomic_write, write_json
from minirlhf.runs.run import Run
from minirlhf.supervised.reward_modelling import RewardModelTrainer, RewardTrainingConfig, evaluate_rankings
from minirlhf.text.language import LANGUAGE_WORD, is_foreign, warn_of_language
from minirlhf.text.preferences import Ranking, read_rankings, split_rankings
from shared import LOGGERS, POLICY, PROMPTS, REWARD, STARTER, WEIGHTS, command_line, new_folder, parse, run_script


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
    common, output = dict(device=args.device, seed=args.seed), Path(args.output)
    check_language(args, train)
    judge = None if args.judge == "none" else SentimentReward.from_pretrained(args.judge, device=args.device)
    trainer = ppo_trainer(args)
    with agreed("the output folder"):  # all processes have looked before the first one writes
        if not args.resume and not restarted() and output.exists() and any(output.iterdir()):
            raise FileExistsError(
                f"{output} exists and is not empty; choose another --output, or --resume a stage of it"
            )
    if (output / "stage2" / "config.json").exists():
        run = Run.resume(output / "stage2", data=train)
    else:
        reward = RewardModel.from_trunk(args.trunk or args.policy, **common)
        limits = dict(max_length=reward.max_length, tokens_per_batch=8 * reward.max_length)
        settings = RewardTrainingConfig(epochs=args.epochs, lr=args.lr, **limits, **common)
        of_reward = RewardModelTrainer(reward, train, settings)
        run = Run.start(output / "stage2", of_reward, {"arguments": vars(args)}, loggers=args.loggers)
    show(f"{output}: {len(train)} rankings, {len(held_out)} held out")
    with run:
        history = train_reward_model(run, held_out)
        reward = run.trainer.model
        # 3. Rewards get mean 0 and standard deviation 1 on what the policy writes before it learns.
        if not trainer.processes.broadcast("the reward", (output / "reward").exists()):
            reward.normalise(trainer.collect((args.prompts * 512)[:512], lambda texts: [0.0] * len(texts)).texts)
            with agreed("the reward"):
                if trainer.processes.first:
                    reward.save_pretrained(output / "reward")

    # 4. PPO against the learned reward, loaded as any project would load it.
    reward = RewardModel.from_pretrained(output / "reward", device=args.device)
    if (output / "stage3" / "config.json").exists():
        run = Run.resume(output / "stage3")
    else:
        run = Run.start(output / "stage3", trainer, {"arguments": vars(args)}, loggers=args.loggers)
    trainer = run.trainer

    def on_step(rollout, stats) -> None:
        run.record(rollout, stats)
        show(f"step {trainer.iteration}: learned reward {stats['reward/mean']:.2f}, KL {stats['objective/kl']:.1f}")

    with run:
        trainer.train(args.prompts, reward, on_step)
        trainer.save_pretrained(output / "policy")

        # 5. The judge that neither model saw, if there is one, and the learned reward of the same samples.
        models, settings = (trainer.policy, trainer.reference, trainer.tokenizer), EvaluationConfig(max_n=16)
        found = evaluate(*models, args.prompts, judge or reward, config=settings).given
        judged, samples = found.summary(), found.pairs
        before, after = (reward([s.prompt + getattr(s, side) for s in samples]) for side in ("before", "after"))
        summary = (
            {}
            if judge is None
            else {
                "judge": {"before": judged["reference/reward"], "after": judged["policy/reward"]},
            }
        )
        summary |= {
            "learned_reward": {"before": before.mean().item(), "after": after.mean().item()},
            "distinct_2": {"before": judged["reference/distinct_2"], "after": judged["policy/distinct_2"]},
            "kl": {"before": 0.0, "after": judged["kl"]},
        }
        reliability = evaluate_rankings(reward, held_out).reliability
        if not trainer.processes.first:
            return
        write_json(output / "summary.json", {**summary, "held_out": history, "reliability": reliability})
        table = before_after_table(samples)
        atomic_write(output / "before_after.md", table.encode())
    show(table)
    for name, value in summary.items():
        show(f"{name:14} before {value['before']:6.3f}, after {value['after']:6.3f}")


def check_language(args: argparse.Namespace, rankings: list[Ranking]) -> None:
    """Raise ValueError before the Chinese classifier would judge other texts, whose figures would mean nothing."""
    texts = [text for ranking in rankings for text in ranking.texts] + args.prompts
    if WEIGHTS.descends(args.judge) and is_foreign(texts):
        raise ValueError(f"{LANGUAGE_WORD}: --judge FOLDER, or --judge none to train without a judge")
    warn_of_language(texts, args.policy, args.trunk, args.judge)


def train_reward_model(run: Run[RewardModelTrainer], held_out: list[Ranking]) -> list[dict[str, float]]:
    """Train to the end; return the figures on held-out rankings, before the first epoch and after each."""
    trainer, names = run.trainer, ("accuracy", "loss", "calibration_error")

    def measure(epoch: int) -> dict[str, float]:
        figures = evaluate_rankings(trainer.model, held_out)
        show(f"after epoch {epoch} {figures}")
        return {f"held_out/{name}": getattr(figures, name) for name in names}

    def on_step(batch, stats) -> None:
        epoch = round(stats["reward_model/progress"] * trainer.config.epochs, 6)
        run.record(batch, {**stats, **(measure(int(epoch)) if epoch.is_integer() else {})})

    if trainer.steps_done == 0:
        run.log(measure(0))
    trainer.train(on_step)
    measured = [line for line in run.history() if "held_out/loss" in line]
    return [{name: line[f"held_out/{name}"] for name in names} for line in measured]


def ppo_trainer(args: argparse.Namespace) -> PPOTrainer:
    config = PPOConfig.with_overrides(**STARTER, entropy_coef=0.01, steps=args.steps, batch_size=args.batch_size,
                                      device=args.device, seed=args.seed)  # fmt: skip
    policy, tokenizer = load_decoder(args.policy), Tokenizer.from_pretrained(args.policy)
    trainer = PPOTrainer(policy, args.policy, tokenizer, config)
    trainer.check_prompts(args.prompts)
    return trainer


def read_arguments() -> argparse.Namespace:
    parser = command_line(
        __doc__,
        rankings=(str, "rankings, .jsonl or .tsv"),
        held_out=(str, "other rankings, to measure on; if not given, a tenth of --rankings"),
        encoding=("utf-8", "of both files"),
        limit=(6000, "train on the first rankings only; 0: on all"),
        policy=(POLICY, "GPT-2 folder"),
        trunk=("", "GPT-2 or BERT folder that the reward model begins from; empty: that of --policy"),
        judge=(REWARD, "folder of a sentiment classifier of the texts' language; none: go without"),
        epochs=(1, "of the reward model"),
        lr=(3e-4, "of the reward model"),
        steps=(2048, "samples of the PPO run"),
        batch_size=(128, "samples of a PPO step"),
        device=("auto", "auto, cpu or cuda"),
        seed=(0, "of everything"),
        prompts=(PROMPTS, "texts to continue"),
        output=(new_folder("reward-"), "folder of the run"),
        loggers=LOGGERS,
        resume=(str, "continue the run in this folder, stage2/ or stage3/ of --output, with its own settings"),
    )
    args = parse(parser)
    if args.rankings is None:
        parser.error("--rankings or --resume is needed")
    return args


if __name__ == "__main__":
    run_script(main)
