"""The doctor: checks of a run before it starts."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import numpy as np
import torch

from minirlhf.common.printing import show
from minirlhf.common.text import printable
from minirlhf.device.placement import resolve_device
from minirlhf.evaluation.doctor import model_checks, run_checks
from minirlhf.evaluation.doctor.memory import available_memory
from minirlhf.evaluation.doctor.setup import FAIL, OK, SKIP, Model, Result, Setup, Skipped
from minirlhf.models.heads import ActorCritic
from minirlhf.models.loading import load_decoder
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.scorers import load_scorer
from minirlhf.rl.config import PPOConfig
from minirlhf.text.tokenizer import Tokenizer

Folder = str | os.PathLike[str]

# Name, why it matters, and the check, in the order in which they are made.
CHECKS: tuple[tuple[str, str, Callable[[Setup], Result]], ...] = (
    ("vocabulary", "in another vocabulary an id is another word, or out of range", model_checks.vocabulary),
    ("reward vocabulary", "a model that reads other words rewards nothing", model_checks.reward_vocabulary),
    ("rollout", "without samples there is nothing to train on, and little to check below", run_checks.rollout),
    ("device", "what was never tested on a device may differ there", run_checks.device),
    ("reference", "the KL penalty holds the policy near the reference from the first step on", run_checks.reference),
    ("ratio", "PPO clips any ratio away from 1 as if the policy had moved", run_checks.ratio),
    ("labels", "with swapped labels PPO does its work well, in the wrong direction", model_checks.labels),
    ("masks", "where padding is seen, what a text is worth depends on its batch", model_checks.masks),
    ("dropout", "with dropout the policy that is scored is not the one that sampled", model_checks.dropout),
    ("weights", "a reference that moves is no leash, and no checkpoint keeps an untied head", run_checks.weights),
    ("memory", "an out-of-memory error ends a run, often hours in, at its longest batch", run_checks.memory),
    ("precision", "rounding as large as the clip range is trained on as if it were progress", run_checks.precision),
    ("optimum", "no policy can have more reward at this KL, however long the run", run_checks.forecast),
)


@dataclass(frozen=True)
class Finding:
    """What one check of the doctor found.

    name: of the check. status: "ok", "warn" (it may be meant so), "fail" (do not start) or "skip" (it could not be
    checked; the detail says why). detail: what was found, with figures. why: why the check matters. remedy: what to
    do, "" where nothing is wrong.
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
    policy: Model | Folder,
    reference: Model | Folder | None = None,
    tokenizer: Tokenizer | Folder | None = None,
    reward: RewardFunction | Folder | None = None,
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
        reference, tokenizer: None: from the policy's folder. reward: None: its checks are skipped.
    positive_label: of a reward that is given as the folder of a classifier, as SentimentReward takes it.
    config: a PPOConfig; **overrides replace its fields by name. prompts: the pool of the run; None: words of the
        vocabulary, which do for every check but the optimum.
    canaries: a good and a bad text for the reward; None: of a SentimentReward its own, if it reads their language.
    file: where to print; None: standard output.

    Each of CHECKS is made, in their order, even if one before it failed, unless it needs what that one provides; the
    docstring of its function has its limits. First comes "folders": what was given as a folder loads.

    It works on copies: two of each model, and the gradients and optimizer state of one. Models, their modes and
    devices, random states and files are afterwards as before; a reward function of one's own is called as it is.
    Raises ValueError for a bad setting, or a reference or tokenizer that is neither given nor in a folder.
    """
    config = PPOConfig.with_overrides(config, **overrides)
    device = resolve_device(config.device)
    folder = policy if isinstance(policy, (str, os.PathLike)) else None
    if folder is None and (reference is None or tokenizer is None):
        raise ValueError("reference and tokenizer must be given with a policy that is not a folder")
    findings = []

    def report(name: str, why: str, check: Callable[[], Result]) -> None:
        found = _result(check)
        findings.append(Finding(name, found.status, found.detail, why, found.remedy))
        show(findings[-1], file)

    with _random_states_kept(device), torch.enable_grad():
        files = _Files()
        setup = Setup(
            policy=files.load("policy", policy, ActorCritic.from_pretrained),
            reference=files.load("reference", reference or folder, load_decoder),
            tokenizer=files.load("tokenizer", tokenizer or folder, Tokenizer.from_pretrained),
            reward=files.load("reward", reward, lambda path: load_scorer(path, config.device, positive_label)),
            config=config,
            prompts=prompts,
            canaries=canaries,
            available=available_memory(device),
        )
        report("folders", "a model that cannot be read cannot be trained", files.result)
        for name, why, check in CHECKS:
            report(name, why, lambda check=check: check(setup))  # type: ignore[misc]
    return findings


class _Files:
    """Loads what was given as a folder, and keeps what went wrong."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.problems: list[str] = []

    def load(self, name: str, given: Any, loader: Callable[[Folder], Any]) -> Any:
        if not isinstance(given, (str, os.PathLike)):
            return given
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # reversed labels have a check of their own
                model = loader(given)
        except (OSError, ValueError) as error:
            self.problems.append(f"{name}: {error}")
            return None
        self.loaded.append(name)
        return model

    def result(self) -> Result:
        if self.problems:
            return Result(FAIL, "; ".join(self.problems), "repair the file that the message names, or give another")
        if not self.loaded:
            raise Skipped("everything was given as an object")
        return Result(OK, f"{', '.join(self.loaded)} loaded")


def _result(check: Callable[[], Result]) -> Result:
    try:
        return check()
    except Skipped as reason:
        return Result(SKIP, str(reason))
    except Exception as error:  # models and rewards are the caller's: any error of theirs is a finding
        return Result(FAIL, f"{type(error).__name__}: {error}", "repair what the message names")


@contextlib.contextmanager
def _random_states_kept(device: torch.device) -> Iterator[None]:
    """Restores every global random generator at the end."""
    gpus = range(torch.cuda.device_count()) if device.type == "cuda" or torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
