"""A checkpoint: a model folder like any other, with the state of its training beside the model. No pickle.

    config.json, model.safetensors, ...    model and tokenizer, as `save_pretrained` writes them; with LoRA only the
                                           adapters, as `save_adapter` writes them
    training.safetensors, training.json    the trainer's `state_dict`, and the run's own record
    parts/                                 of a sharded model, Adam's moments, a file a process
    manifest.json                          SHA-256 of every other file

The folder is replaced as one, so a checkpoint is complete or absent. Of the reference model, the base of adapters, and
the training data, which never change, it holds only the hash.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from minirlhf.common.field_names import FIELD_NAMES
from minirlhf.common.suggestions import require_fields
from minirlhf.device.parts import as_part, is_part, load_parts, save_parts
from minirlhf.device.processes import agreed, processes
from minirlhf.io.files import StrPath, naming, read_json, replaced_folder, sha256, write_json
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
    module_hash,
)
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic, language_model
from minirlhf.models.loading import load_decoder
from minirlhf.models.lora import adapters_off
from minirlhf.models.sharded import is_sharded
from minirlhf.rewards.reward_model import RewardModel
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.trainer import PPOTrainer
from minirlhf.runs.log import is_marks, is_rewards
from minirlhf.supervised.dpo import DPOTrainer
from minirlhf.supervised.dpo_config import DPOConfig
from minirlhf.supervised.reward_modelling import RewardModelTrainer, RewardTrainingConfig
from minirlhf.supervised.sft import SFTConfig, SFTTrainer
from minirlhf.text.tokenizer import Tokenizer

FORMAT = 2
STATE_TENSORS, COUNTERS_FILE, MANIFEST_FILE = "training.safetensors", "training.json", "manifest.json"
PARTS = "parts"
# Settings that may change between two parts of a run: they say how long and how it runs, not what is computed.
FREE_FIELDS: dict[str, set[str]] = {
    "ppo": {"steps", "save_freq", "forward_batch_size", "device", "reward_timeout",
            "reward_workers", "max_bad_steps", "checkpoint_activations", "compile", "cuda_graphs", "sharding"},
    "sft": {"save_freq", "device", "sharding"}, "reward_model": {"save_freq", "device", "sharding"},
    "dpo": {"save_freq", "device", "sharding", "reference_cache"},
}  # fmt: skip


class DamagedCheckpoint(ValueError):
    """The checkpoint changed since it was written, or the folder is no checkpoint."""


class Trainable(Protocol):
    """What a trainer offers, so that a `Run` can save it and go on with it.

    kind: "ppo", "sft", "reward_model" or "dpo". interrupted: True inside a step, where the state is inconsistent.
    config: a dataclass with `save_freq`, the steps between two checkpoints.
    """

    kind: ClassVar[str]
    interrupted: bool

    @property
    def config(self) -> Any: ...
    @property
    def steps_done(self) -> int: ...
    @property
    def steps_total(self) -> int: ...
    def state_dict(self) -> State: ...
    def load_state_dict(self, state: State) -> None: ...
    def save_pretrained(self, folder: StrPath) -> None: ...


def save_checkpoint(trainer: Trainable, folder: StrPath, run: Mapping[str, Any] | None = None) -> None:
    """Write everything that the trainer's next step depends on, in place of an older checkpoint if there is one.

    run: what `Run` keeps with it, in training.json. Of several processes one calls it; all, if the model is sharded.
    Raises FileExistsError for a symbolic link or a folder that holds something else, OSError if it cannot be written,
    and as `state_dict`.
    """
    folder, group = Path(folder), processes()
    if folder.is_symlink():
        raise FileExistsError(f"{folder} is a symbolic link, and checkpoints are not written through links")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file():
        raise FileExistsError(f"{folder} is not empty, and no checkpoint; choose another folder")
    state = trainer.state_dict()
    parts = {name: x for name, x in state["tensors"].items() if is_part(x)}
    # JSON has no infinity.
    config = {name: "inf" if x == math.inf else x for name, x in state["counters"]["config"].items()}
    counters = {"format": FORMAT, "kind": trainer.kind, **state["counters"], "config": config, "run": run}
    together = is_sharded(trained(trainer))
    first = group.first or not together
    with replaced_folder(folder) if first else contextlib.nullcontext(folder) as staged:
        if first:
            shutil.rmtree(staged / PARTS, ignore_errors=True)  # by another number of processes
        if together:
            staged = group.broadcast("the folder of the checkpoint", staged)
        if parts:
            save_parts(staged / PARTS, parts)
        with agreed("the state") if together else contextlib.nullcontext():
            if first:  # before the model, whose index then says that this file is not part of it
                write_tensors(staged / STATE_TENSORS, {n: x for n, x in state["tensors"].items() if n not in parts})
                write_json(staged / COUNTERS_FILE, counters)
        _save_model(trainer, staged)
        if first:
            sums = {name: sha256(staged / name) for name in _file_names(staged) if name != MANIFEST_FILE}
            write_json(staged / MANIFEST_FILE, {"sha256": sums})


def _save_model(trainer: Any, folder: Path) -> None:
    """The model as it is trained: merged adapters could not be told from their base again."""
    model = trained(trainer)
    if isinstance(model, (ActorCritic, Decoder)) and language_model(model).lora is not None:
        model.save_adapter(folder)
        trainer.tokenizer.save_pretrained(folder)
    else:
        trainer.save_pretrained(folder)


def read_checkpoint(folder: StrPath) -> State:
    """Tensors and counters of a checkpoint, after a check of every byte in it, the model's files included.

    Raises FileNotFoundError if there is no such folder, DamagedCheckpoint if it is not as it was written, ValueError if
    another version of this library wrote it.
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
        if name not in there:  # also of a name that leads out of the folder
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is missing")
        if sha256(folder / name) != expected:
            raise DamagedCheckpoint(f"{folder} is damaged: {name} is not as it was written")
    if not sums.keys() >= {STATE_TENSORS, COUNTERS_FILE}:
        raise DamagedCheckpoint(f"{folder} is damaged: {MANIFEST_FILE} does not list {COUNTERS_FILE}")
    counters = read_json(folder / COUNTERS_FILE)
    if (found := counters.get("format")) != FORMAT:
        raise ValueError(
            f"{folder} has the checkpoint format {found!r:.20}, this version reads {FORMAT} (minirlhf 0.1.0 can resume "
            "1 and 'sft-1')"
        )
    with naming(folder / COUNTERS_FILE):
        check_counters(counters, {"kind": lambda value: isinstance(value, str) and value in FREE_FIELDS})
        check_counters(counters, COUNTERS | (PPO_COUNTERS if counters["kind"] == "ppo" else SUPERVISED_COUNTERS))
        check_counters(counters, REFERENCE if counters["kind"] in WITH_REFERENCE else {})
    counters["config"] = {name: math.inf if x == "inf" else x for name, x in counters["config"].items()}
    return {"tensors": read_tensors(folder / STATE_TENSORS), "counters": counters}


# What training.json must hold.
COUNTERS: dict[str, Check] = {
    "config": lambda value: isinstance(value, dict),
    "run": lambda value: value is None or is_record(value, log=is_marks, rewards=is_rewards),
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
}
SUPERVISED_COUNTERS: dict[str, Check] = {
    "steps": is_count,
    "data": lambda value: is_record(value, sha256=is_text, count=is_count),
}
WITH_REFERENCE = ("ppo", "dpo")
REFERENCE: dict[str, Check] = {
    "reference": lambda value: is_record(value, sha256=is_text, source=lambda x: x is None or is_text(x)),
}


def load_checkpoint(
    folder: StrPath,
    ref_policy: ActorCritic | Decoder | StrPath | None = None,
    data: Sequence[Any] | None = None,
    **overrides: Any,
) -> Any:
    """The trainer that `save_checkpoint` wrote; on the CPU it goes on bit for bit as if it had not been interrupted.

    ref_policy: for PPO and DPO, the reference or its folder; None: the folder that it was loaded from at first. It is
        also the base of adapters, in SFT as well, unless a run of PPO has a reference of its own.
    data: for SFT and reward models, the demonstrations or rankings that it began with. DPO gets its pairs in `train`.
    overrides: of `save_freq`, `device` and other fields that do not change what is computed (`FREE_FIELDS`).
    Raises FileNotFoundError for a missing folder, ValueError for a damaged checkpoint, another reference or other data
    than the run began with, or an override that is not allowed.
    """
    folder = Path(folder)
    state = read_checkpoint(folder)
    kind, counters = state["counters"]["kind"], state["counters"]
    if kind in WITH_REFERENCE:
        return _load_with_reference(folder, state, ref_policy, overrides)
    if data is None:
        raise ValueError(f"{folder} is a checkpoint of kind {kind!r}; pass the demonstrations or rankings as data")
    config = _config(folder, SFTConfig if kind == "sft" else RewardTrainingConfig, counters, overrides)
    trainer: SFTTrainer | RewardModelTrainer
    with naming(folder), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the beginning of the run warned about its data
        if isinstance(config, SFTConfig):
            model = load_decoder(folder, None if config.lora is None else _base(ref_policy))
            _restore(folder, model, model, counters)
            trainer = SFTTrainer(model, Tokenizer.from_pretrained(folder), data, config)
        else:
            reward = RewardModel.from_pretrained(folder, device="cpu")
            _restore(folder, reward, reward.network, counters)
            trainer = RewardModelTrainer(reward, data, config)
        _load_state(trainer, folder, state)
    return trainer


def restore_checkpoint(trainer: Trainable, folder: str | os.PathLike[str]) -> None:
    """Put weights and state of a checkpoint into the trainer that it was saved of, made anew as at first.

    Raises as `load_checkpoint`, and ValueError for a trainer of another kind.
    """
    folder, state = Path(folder), read_checkpoint(folder)
    if trainer.kind != (kind := state["counters"]["kind"]):
        raise ValueError(f"{folder} is a checkpoint of kind {kind!r}, the trainer is of kind {trainer.kind!r}")
    network: Any = trained(trainer)
    if isinstance(network, ActorCritic) and network.value_head is None:  # `from_pretrained` would make a new head
        network = network.decoder
    if isinstance(network, (ActorCritic, Decoder)) and language_model(network).lora is not None:
        load: Any = ActorCritic.from_pretrained if isinstance(network, ActorCritic) else load_decoder
        saved = load(folder, base=_base(network))
    else:
        saved = type(network).from_pretrained(folder)
    with torch.no_grad():
        for p, value in zip(network.parameters(), saved.parameters(), strict=True):
            p.copy_(as_part(value, p))
    with naming(folder):
        _load_state(trainer, folder, state)


def parameter_hash(trainer: Trainable) -> str:
    """The SHA-256 of the trained weights."""
    return module_hash(trained(trainer))


def trained(trainer: Any) -> nn.Module:
    """The module that a trainer trains."""
    module: nn.Module = trainer.policy if trainer.kind == "ppo" else trainer.model
    return module


def _load_with_reference(folder: Path, state: State, ref_policy: Any, overrides: dict[str, Any]) -> Any:
    if overrides.get("precision") == "auto":  # what it was resolved to stays
        del overrides["precision"]
    counters, is_ppo = state["counters"], state["counters"]["kind"] == "ppo"
    config: Any = _config(folder, PPOConfig if is_ppo else DPOConfig, counters, overrides)
    source = counters["reference"]["source"] if ref_policy is None else ref_policy
    if source is None and counters["reference"]["sha256"]:  # else DPO had no reference
        raise ValueError(f"{folder} was saved with a reference that came from no folder; pass it as ref_policy")
    try:
        base = _base(source) if config.adapters_off else None
        policy: Any = ActorCritic.from_pretrained(folder, base=base) if is_ppo else load_decoder(folder, base)
        _restore(folder, policy, language_model(policy), counters)
        source = None if config.adapters_off else source
        with naming(folder):
            kind: Any = PPOTrainer if is_ppo else DPOTrainer
            trainer = kind(policy, source, Tokenizer.from_pretrained(folder), config)
            _load_state(trainer, folder, state)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; it is the reference of {folder}: pass ref_policy") from error
    return trainer


def _load_state(trainer: Trainable, folder: Path, state: State) -> None:
    """Give a trainer its state, with the parts that only it knows how to cut."""
    tensors = state["tensors"]
    if (folder / PARTS).is_dir():
        named = [(name, p) for name, p in trained(trainer).named_parameters() if f"optimizer.step.{name}" in tensors]
        like = {f"optimizer.{key}.{name}": p for name, p in named for key in ("exp_avg", "exp_avg_sq")}
        tensors.update(load_parts(folder / PARTS, like))
    trainer.load_state_dict(state)


def _base(model: Any) -> Any:
    """A base for adapters; of a model in memory, the one of the caller stays as it is."""
    return adapters_off(language_model(model)) if isinstance(model, (ActorCritic, Decoder)) else model


def _config(folder: Path, kind: type[Any], counters: Mapping[str, Any], overrides: Mapping[str, Any]) -> Any:
    """The settings of a run with some replaced. Raises ValueError for one that a resumed run may not change."""
    saved = dict(counters["config"])
    if isinstance(saved.get("betas"), list):  # JSON has no tuples
        saved["betas"] = tuple(saved["betas"])
    with naming(f"{folder / COUNTERS_FILE}, config"):
        base = _made(kind, saved)
    free = FREE_FIELDS[counters["kind"]]
    if saved.get("loss_averaging") == "micro_batches":  # there the cut into forward passes is part of the loss
        free = free - {"forward_batch_size"}
    config = _made(kind, {**saved, **overrides})
    for name, old in vars(base).items():
        if old != (new := getattr(config, name)) and name not in free:
            raise ValueError(
                f"{kind.__name__}.{name} was {old!r} in {folder} and cannot become {new!r}; a resumed run may "
                f"change {', '.join(sorted(free))}"
            )
    return config


def _made(kind: type[Any], fields: Mapping[str, Any]) -> Any:
    """A config of these fields. Raises ValueError for an unknown name."""
    require_fields(kind, fields, FIELD_NAMES if kind is PPOConfig else {})  # the table is of PPO
    return kind(**fields)


def _restore(folder: Path, model: nn.Module, network: Any, counters: Mapping[str, Any]) -> None:
    """Freeze what was frozen, and let the network's origin be what the run's model came from, not this checkpoint.

    Raises ValueError if nothing is left to train.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in counters["frozen"])
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{folder / COUNTERS_FILE} leaves nothing to train: every parameter is frozen")
    network.origin = None if counters["origin"] is None else Origin(**counters["origin"])


def _file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
