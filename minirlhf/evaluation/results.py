"""What a run of PPO leaves at its end: models, a summary, samples before and after, and its curves."""

from __future__ import annotations

import importlib.util
import shlex
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from minirlhf.common.printing import show
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.findings import before_after_table
from minirlhf.evaluation.optimum import price_of_kl
from minirlhf.evaluation.plots import plot_run
from minirlhf.io.files import atomic_write, read_jsonl, write_json
from minirlhf.models.sharded import exported
from minirlhf.rewards.base import RewardFunction
from minirlhf.rl.trainer import PPOTrainer
from minirlhf.runs.log import SAMPLES_FILE
from minirlhf.runs.run import Run

POLICY, REFERENCE, SUMMARY_FILE = "policy", "reference", "summary.json"


def save_results(
    run: Run[PPOTrainer], pool: Sequence[str], reward: RewardFunction | None, algorithm: str | None = None
) -> str:
    """Compare policy and reference, and write the results into the run's folder. Returns what is worth reading.

    Leaves policy/ and reference/, and unless `reward` is None, which saves its cost, summary.json, before_after.md and
    reward_curve.png; the picture only where matplotlib is installed.
    pool: the prompts of the run. algorithm: its name, for the model card; None: as the config says.
    """
    trainer, config, output = run.trainer, run.trainer.config, run.folder
    name = algorithm or ("ppo" if config.advantages == "gae" else config.advantages)
    summary: dict[str, Any] = {"algorithm": name.upper(), "episodes": config.steps}
    saved = shlex.quote(str(output / POLICY))
    program = "minirlhf" if shutil.which("minirlhf") else f"{shlex.quote(sys.executable)} -m minirlhf"
    sample = f"{program} generate --model {saved} --prompt TEXT --gen-len {config.gen_len}"
    told = [f"saved in {output}; to sample from it: {sample}"]
    if reward is not None:
        settings = EvaluationConfig(
            gen_len=config.gen_len, sampling=config.sampling, eos_token_id=config.eos_token_id, best_of=(16,), max_n=16,
            kl_coef=price_of_kl(trainer.kl_controller.coef, vars(config)), seed=config.seed,
        )  # fmt: skip
        if trainer.processes.first:
            show(f"comparing policy and reference on {settings.samples} samples of each")
        whole = trainer.models.whole()
        found = evaluate(whole.policy, whole.reference, trainer.tokenizer, pool, reward, config=settings).given
    policy, reference = exported(trainer.policy), exported(trainer.reference)
    if not trainer.processes.first:
        return ""
    if reward is not None:
        figures = {**found.summary(), "optimum": found.optimum}
        summary |= figures
        if importlib.util.find_spec("matplotlib") is None:
            told.insert(0, "no picture of the curves: pip install matplotlib (minirlhf's extra examples)")
        else:
            target = config.target if config.adaptive_kl else None
            samples = read_jsonl(output / SAMPLES_FILE)
            plot_run(run.history(), output / "reward_curve.png", target, found.frontier, samples)
        write_json(output / SUMMARY_FILE, figures)
        table = before_after_table(found.pairs)
        atomic_write(output / "before_after.md", table.encode())
        lines = [f"{name:28} {value:.3f}" for name, value in found.summary().items()]
        told = [table, *lines, str(found.optimum), *told]
    policy.save_pretrained(output / POLICY, summary=summary)
    reference.save_pretrained(output / REFERENCE)
    for name in (POLICY, REFERENCE):
        trainer.tokenizer.save_pretrained(output / name)
    return "\n".join(told)
