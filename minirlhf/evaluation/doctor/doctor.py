"""The doctor: checks of a run before it starts."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch

from minirlhf.common.printing import show
from minirlhf.common.text import printable
from minirlhf.device.placement import resolve_device
from minirlhf.evaluation.doctor import model_checks, run_checks
from minirlhf.evaluation.doctor.memory import available_memory
from minirlhf.evaluation.doctor.setup import FAIL, OK, SKIP, Model, Result, Setup, Skipped
from minirlhf.generation.generate import language_model
from minirlhf.io.files import StrPath
from minirlhf.models.heads import ActorCritic
from minirlhf.models.loading import load_decoder
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.scorers import load_scorer
from minirlhf.rl.config import PPOConfig
from minirlhf.text.tokenizer import Tokenizer

# Name, why it matters, and the check, in the order in which they are made.
CHECKS: tuple[tuple[str, str, Callable[[Setup], Result]], ...] = (
    ("rollout", "without one vocabulary and samples there is nothing to train on", run_checks.rollout),
    ("reference", "the KL penalty holds the policy near the reference from the first step on", run_checks.reference),
    ("ratio", "PPO clips any ratio away from 1 as if the policy had moved", run_checks.ratio),
    ("labels", "with swapped labels PPO does its work well, in the wrong direction", model_checks.labels),
    ("forecast", "beta and target decide how far any policy may go: hours cannot buy more", run_checks.forecast),
    ("masks", "where padding is seen, what a text is worth depends on its batch", model_checks.masks),
    ("dropout", "with dropout the policy that is scored is not the one that sampled", model_checks.dropout),
    ("weights", "the reference must stay as it is, and no checkpoint keeps an untied head", run_checks.weights),
    ("memory", "an out-of-memory error ends a run, often hours in, at its longest batch", run_checks.memory),
    ("precision", "rounding as large as the clip range is trained on as if it were progress", run_checks.precision),
)


@dataclass(frozen=True)
class Finding:
    """What one check of the doctor found.

    status: "ok", "warn" (it may be meant so), "fail" (do not start) or "skip" (it could not be checked; the detail says
    why). detail: what was found, with figures. why: why the check matters. remedy: what to do, "" if nothing is wrong.
    """

    name: str
    status: str
    detail: str
    why: str
    remedy: str = ""

    def __str__(self) -> str:
        lines = [f"{self.status:5} {self.name:18} {self.detail}"]
        if self.status not in (OK, SKIP):
            lines += [f"{'':25}why:  {self.why}", f"{'':25}fix:  {self.remedy}"]
        return "\n".join(printable(line) for line in lines)


def doctor(
    policy: Model | StrPath,
    reference: Model | StrPath | None = None,
    tokenizer: Tokenizer | StrPath | None = None,
    reward: RewardFunction | StrPath | None = None,
    config: PPOConfig | None = None,
    prompts: Sequence[str] | None = None,
    *,
    positive_label: str | None = None,
    canaries: tuple[str, str] | None = None,
    file: TextIO | None = None,
    **overrides: Any,
) -> list[Finding]:
    """Examine a PPO run before it starts; print a line a check, and return the findings.

    policy, reference, tokenizer, reward: as for PPOTrainer and its `train`, or the folders to load them from.
        reference, tokenizer: None: from the policy's folder; a policy with LoRA is its own reference without a folder.
        reward: None: its checks are skipped.
    positive_label: of a reward that is given as the folder of a classifier, as SentimentReward takes it.
    config: a PPOConfig; **overrides replace its fields by name. prompts: the pool of the run; None: words of the
        vocabulary.
    canaries: a good and a bad text for the reward; None: of a SentimentReward its own, if it reads their language.
    file: where to print; None: standard output.

    Each of CHECKS is made, unless it needs what a failed one provides; the docstring of its function has its limits.

    It works on copies: two of each model, and the gradients and optimizer state of one. Models, their modes and
    devices, PyTorch's random state and files are afterwards as before; a reward of one's own is called as it is.
    Raises ValueError for a bad setting, a reference or tokenizer that is neither given nor in a folder, and a folder
    that cannot be read (or OSError).
    """
    config = PPOConfig.with_overrides(config, **overrides)
    device = resolve_device(config.device)
    folder = policy if isinstance(policy, (str, os.PathLike)) else None
    if isinstance(policy, torch.nn.Module):
        lora = config.lora or language_model(policy).lora
        if tokenizer is None or (reference is None and not dataclasses.replace(config, lora=lora).adapters_off):
            raise ValueError(
                "reference and tokenizer must be given with a policy that is not a folder; reference=None is its own "
                "base only with lora and reference='adapters off'"
            )
    findings = []
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" else ()
    with torch.random.fork_rng(gpus), torch.enable_grad():  # dropout draws from the global generator
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # reversed labels have a check of their own
            setup = Setup(
                policy=_loaded(policy, ActorCritic.from_pretrained),
                reference=_loaded(reference or folder, load_decoder),
                tokenizer=_loaded(tokenizer or folder, Tokenizer.from_pretrained),
                reward=_loaded(reward, lambda path: load_scorer(path, config.device, positive_label)),
                config=config,
                prompts=prompts,
                canaries=canaries,
                available=available_memory(device),
            )
        for name, why, check in CHECKS:
            found = _result(check, setup)
            findings.append(Finding(name, found.status, found.detail, why, found.remedy))
            show(findings[-1], file)
    return findings


def _loaded(given: Any, loader: Callable[[StrPath], Any]) -> Any:
    return loader(given) if isinstance(given, (str, os.PathLike)) else given


def _result(check: Callable[[Setup], Result], setup: Setup) -> Result:
    try:
        return check(setup)
    except Skipped as reason:
        return Result(SKIP, str(reason))
    except Exception as error:  # models and rewards are the caller's: any error of theirs is a finding
        return Result(FAIL, f"{type(error).__name__}: {error}", "repair what the message names")
