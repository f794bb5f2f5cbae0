"""A checkpoint: a model folder like any other, with the state of its training beside the model. No pickle.

    config.json, model.safetensors, ...    model and tokenizer, as the trainer's `save_pretrained` writes them
    training.safetensors    tensors of the trainer's `state_dict`: optimizer moments, random generators
    training.json           its counters and config, the kind of training, and the run's own record
    manifest.json           SHA-256 of every other file

The folder is replaced as one: a checkpoint is complete or it does not exist, and a file that changed afterwards is
noticed. A reference model or training data, which never change, are not in it: their hash is.
"""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import nn

from minirlhf.io.files import naming, read_json, replaced_folder, sha256, write_json
from minirlhf.io.model_card import Origin
from minirlhf.io.model_folder import read_tensors, write_tensors
from minirlhf.io.training_state import (
    Check,
    State,
    check_counters,
    is_amount,
    is_count,
    is_record,
    is_scaler,
    is_text,
)
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.models.loading import load_decoder
from minirlhf.rewards.reward_model import RewardModel
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.trainer import PPOTrainer
from minirlhf.supervised.reward_modelling import RewardModelTrainer, RewardTrainingConfig
from minirlhf.supervised.sft import SFTConfig, SFTTrainer
from minirlhf.text.tokenizer import Tokenizer

FORMAT = 2
STATE_TENSORS, COUNTERS_FILE, MANIFEST_FILE = "training.safetensors", "training.json", "manifest.json"
# Settings that may change between two parts of a run: they say how long and how it runs, not what is computed.
FREE_FIELDS: dict[str, set[str]] = {
    "ppo": {"steps", "save_freq", "forward_batch_size", "device", "reward_timeout", "max_bad_steps",
            "checkpoint_activations", "compile", "cuda_graphs"},
    "sft": {"save_freq", "device"},
    "reward_model": {"save_freq", "device"},
}  # fmt: skip


class DamagedCheckpoint(ValueError):
    """A checkpoint that changed since it was written, or a folder that is no checkpoint."""


class Trainable(Protocol):
    """What a trainer offers, so that a `Run` can save it and go on with it.

    kind: "ppo", "sft" or "reward_model". interrupted: True inside a step, where the state is inconsistent.
    """

    kind: ClassVar[str]
    interrupted: bool

    @property
    def config(self) -> Any:
        """A dataclass with `save_freq`: steps between two checkpoints."""

    @property
    def steps_done(self) -> int: ...

    @property
    def steps_total(self) -> int: ...

    def state_dict(self) -> State: ...

    def load_state_dict(self, state: State) -> None: ...

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write model and tokenizer."""


def save_checkpoint(trainer: Trainable, folder: str | os.PathLike[str], run: Mapping[str, Any] | None = None) -> None:
    """Write everything that the trainer's next step depends on, in place of an older checkpoint if there is one.

    run: what `Run` keeps with it, in training.json.
    Raises FileExistsError for a symbolic link or a folder that holds something else, OSError if it cannot be written,
    and as the trainer's `state_dict`.
    """
    folder = Path(folder)
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a symbolic link, and checkpoints are not written through links")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file():
        raise FileExistsError(f"{folder} is not empty, and no checkpoint; choose another folder")
    state = trainer.state_dict()
    # JSON has no infinity.
    config = {name: "inf" if x == math.inf else x for name, x in state["counters"]["config"].items()}
    counters = {"format": FORMAT, "kind": trainer.kind, **state["counters"], "config": config, "run": run}
    with replaced_folder(folder) as staged:
        # Before the model, whose index then says that this file is not part of it.
        write_tensors(staged / STATE_TENSORS, state["tensors"])
        write_json(staged / COUNTERS_FILE, counters)
        trainer.save_pretrained(staged)
        sums = {name: sha256(staged / name) for name in _file_names(staged) if name != MANIFEST_FILE}
        write_json(staged / MANIFEST_FILE, {"sha256": sums})


def read_checkpoint(folder: str | os.PathLike[str]) -> State:
    """Tensors and counters of a checkpoint, after a check of every byte in it, the model's files included.

    Raises FileNotFoundError if there is no such folder, DamagedCheckpoint, a ValueError, if it is not as it was
    written, ValueError if another version of this library wrote it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint {folder} does not exist")
    try:
        sums = dict(read_json(folder / MANIFEST_FILE)["sha256"])
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise DamagedCheckpoint(f"{folder} is damaged, or no checkpoint: {error}") from error
    there = _file_names(folder)
    for name, expected in sums.items():
        if name not in there:  # nor is a name followed that leads out of the folder
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is missing")
        if sha256(folder / name) != expected:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is not as it was written")
    if not sums.keys() >= {STATE_TENSORS, COUNTERS_FILE}:
        raise DamagedCheckpoint(f"{folder} is damaged: {MANIFEST_FILE} does not list {COUNTERS_FILE}")
    counters = read_json(folder / COUNTERS_FILE)
    found = counters.get("format")
    if found in (1, "sft-1"):
        raise ValueError(
            f"{folder} has the checkpoint format {found}: minirlhf 0.1.0 can resume it, this version cannot"
        )
    if found != FORMAT:
        raise ValueError(f"{folder} has the checkpoint format {found!r:.20}, this version reads {FORMAT}")
    with naming(folder / COUNTERS_FILE):
        check_counters(counters, READ_FIRST)
    counters["config"] = {name: math.inf if x == "inf" else x for name, x in counters["config"].items()}
    return {"tensors": read_tensors(folder / STATE_TENSORS), "counters": counters}


def load_checkpoint(
    folder: str | os.PathLike[str],
    ref_policy: ActorCritic | Decoder | str | os.PathLike[str] | None = None,
    data: Sequence[Any] | None = None,
    **overrides: Any,
) -> Any:
    """The trainer that `save_checkpoint` wrote; on the CPU it goes on bit for bit as if it had not been interrupted.

    ref_policy: for PPO, the reference or its folder; None: the folder that it was loaded from at first.
    data: for supervised training, the demonstrations or rankings that it began with.
    overrides: of `save_freq`, `device` and other fields that do not change what is computed (`FREE_FIELDS`).
    Raises FileNotFoundError for a missing folder, ValueError for a damaged checkpoint, another reference or other data
    than the run began with, or an override that is not allowed.
    """
    folder = Path(folder)
    state = read_checkpoint(folder)
    kind, counters = state["counters"]["kind"], state["counters"]
    checks = COUNTERS | (PPO_COUNTERS if kind == "ppo" else SUPERVISED_COUNTERS)
    with naming(folder / COUNTERS_FILE):
        check_counters(counters, checks)
    if kind == "ppo":
        return _load_ppo(folder, state, ref_policy, overrides)
    if data is None:
        raise ValueError(f"{folder} is a checkpoint of kind {kind!r}; pass the demonstrations or rankings as data")
    config = _config(folder, SFTConfig if kind == "sft" else RewardTrainingConfig, counters, overrides)
    trainer: SFTTrainer | RewardModelTrainer
    with naming(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the beginning of the run warned about its data
        if isinstance(config, SFTConfig):
            model = load_decoder(folder)
            model.origin = _origin(counters)
            _freeze(folder, model, counters)
            trainer = SFTTrainer(model, Tokenizer.from_pretrained(folder), data, config)
        else:
            reward = RewardModel.from_pretrained(folder, device=config.device)
            reward.network.origin = _origin(counters)
            _freeze(folder, reward, counters)
            trainer = RewardModelTrainer(reward, data, config)
        trainer.load_state_dict(state)
    return trainer


def _load_ppo(folder: Path, state: State, ref_policy: Any, overrides: dict[str, Any]) -> PPOTrainer:
    counters = state["counters"]
    if overrides.get("precision") == "auto":  # what it was resolved to stays
        del overrides["precision"]
    config = _config(folder, PPOConfig, counters, overrides)
    policy = ActorCritic.from_pretrained(folder)
    policy.decoder.origin = _origin(counters)
    _freeze(folder, policy, counters)
    source = counters["reference"]["source"] if ref_policy is None else ref_policy
    if source is None:
        raise ValueError(f"{folder} was saved with a reference that came from no folder; pass it as ref_policy")
    try:
        with naming(folder):
            trainer = PPOTrainer(policy, source, Tokenizer.from_pretrained(folder), config)
            trainer.load_state_dict(state)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; it is the reference of {folder}: pass ref_policy") from error
    return trainer


# What training.json must hold.
READ_FIRST: dict[str, Check] = {
    "kind": lambda value: isinstance(value, str) and value in FREE_FIELDS,
    "config": lambda value: isinstance(value, dict),
}
COUNTERS: dict[str, Check] = {
    "scaler": is_scaler,
    "frozen": lambda value: isinstance(value, list) and all(map(is_text, value)),
    "origin": lambda value: value is None or is_record(value, name=is_text, config=lambda x: isinstance(x, dict)),
}
PPO_COUNTERS: dict[str, Check] = {
    "iteration": is_count,
    "optimizer_steps": is_count,
    "bad_steps": is_count,
    "micro_batch_size": lambda value: is_count(value) and value > 0,
    "kl_coef": is_amount,
    "reference": lambda value: is_record(value, sha256=is_text, source=lambda x: x is None or is_text(x)),
}
SUPERVISED_COUNTERS: dict[str, Check] = {
    "steps": is_count,
    "data": lambda value: is_record(value, sha256=is_text, count=is_count),
}


def _config(folder: Path, kind: type[Any], counters: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The settings of a run with some replaced. Raises ValueError for one that a resumed run may not change."""
    saved = dict(counters["config"])
    if isinstance(saved.get("betas"), list):  # JSON has no tuples
        saved["betas"] = tuple(saved["betas"])
    with naming(f"{folder / COUNTERS_FILE}, config"):
        base = _made(kind, {}, saved)
    free = FREE_FIELDS[counters["kind"]]
    if (
        getattr(base, "loss_averaging", None) == "micro_batches"
    ):  # there the cut into forward passes is part of the loss
        free = free - {"forward_batch_size"}
    config = _made(kind, {**saved}, overrides)
    for field in dataclasses.fields(base):
        old, new = getattr(base, field.name), getattr(config, field.name)
        if old != new and field.name not in free:
            raise ValueError(
                f"{kind.__name__}.{field.name} was {old!r} in {folder} and cannot become {new!r}; a resumed run may "
                f"change {', '.join(sorted(free))}"
            )
    return config


def _made(kind: type[Any], base: dict[str, Any], fields: Mapping[str, Any]) -> Any:
    """A config of these fields. Raises ValueError for an unknown name."""
    if kind is PPOConfig and "base" not in fields:  # an argument of `with_overrides`, and no field
        return PPOConfig.with_overrides(PPOConfig(**base), **fields)  # with its help for misspelt names
    known = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in known:
            raise ValueError(f"{kind.__name__} has no field {name!r}; it has {', '.join(known)}")
    return kind(**{**base, **fields})


def _freeze(folder: Path, model: nn.Module, counters: Mapping[str, Any]) -> None:
    """Freeze what was frozen. Raises ValueError if nothing is left to train."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in counters["frozen"])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{folder / COUNTERS_FILE} leaves nothing to train: every parameter is frozen")


def _origin(counters: Mapping[str, Any]) -> Origin | None:
    """Where the run's model came from first: not this checkpoint."""
    return None if counters["origin"] is None else Origin(**counters["origin"])


def _file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
