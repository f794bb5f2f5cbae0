"""A trainer's whole state to a folder and back, so that a run goes on bit for bit where it stopped.

    config.json, model.safetensors, value_head.safetensors, vocab.txt    the policy, a model folder like any other
    training.safetensors    optimizer moments, states of the random generators
    training.json           counters, KL coefficient, running moments, loss scale, config, which reference it was
    manifest.json           SHA-256 of every other file

`checkpoint_folder` writes it as one and checks it. The reference, which never changes, is not in it: its hash and its
source are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from minirlhf.runs.checkpoint_folder import COUNTERS_FILE as COUNTERS_FILE
from minirlhf.runs.checkpoint_folder import MANIFEST_FILE as MANIFEST_FILE
from minirlhf.runs.checkpoint_folder import STATE_TENSORS, read_checkpoint, write_checkpoint
from minirlhf.runs.checkpoint_folder import DamagedCheckpoint as DamagedCheckpoint
from minirlhf.io.files import naming
from minirlhf.runs.log import METRICS_FILE, SAMPLES_FILE
from minirlhf.io.model_card import Origin
from minirlhf.models.heads import ActorCritic
from minirlhf.rl.config import PPOConfig

if TYPE_CHECKING:
    from minirlhf.rl.trainer import PPOTrainer

FORMAT = 1
# Settings that may change between two parts of a run: they say how long and how it runs, not what is computed.
FREE_FIELDS = {"steps", "save_freq", "forward_batch_size", "device", "reward_timeout", "max_bad_steps",
               "checkpoint_activations", "compile", "cuda_graphs"}  # fmt: skip


@dataclass(frozen=True)
class TrainingState:
    """What `save` wrote besides the policy and the tokenizer, read and checked.

    folder: of the checkpoint. tensors: optimizer moments and generator states. counters: the content of training.json.
    """

    folder: Path
    tensors: Mapping[str, Tensor]
    counters: Mapping[str, Any]

    @property
    def reference_source(self) -> str | None:
        """The folder that the reference was loaded from, if the trainer was given one."""
        return self.counters["reference"]["source"]

    def config(self, **overrides: Any) -> PPOConfig:
        """The settings of the run. Raises ValueError for an override that would change what is computed."""
        saved = {name: math.inf if value == "inf" else value for name, value in self.counters["config"].items()}
        with naming(self.folder / COUNTERS_FILE):
            base = PPOConfig.with_overrides(None, **saved)
        # There the cut into forward passes is part of the loss.
        free = FREE_FIELDS - ({"forward_batch_size"} if base.loss_averaging == "micro_batches" else set())
        if overrides.get("precision") == "auto":  # what it was resolved to stays
            del overrides["precision"]
        config = PPOConfig.with_overrides(base, **overrides)
        for name in overrides.keys() - free:
            if getattr(config, name) != getattr(base, name):
                raise ValueError(
                    f"PPOConfig.{name} was {getattr(base, name)!r} in {self.folder} and cannot become "
                    f"{getattr(config, name)!r}; a resumed run may change {', '.join(sorted(free))}"
                )
        return config

    def policy(self) -> ActorCritic:
        """The policy with its value head; what was frozen is frozen again."""
        policy = ActorCritic.from_pretrained(self.folder)
        origin = self.counters["origin"]
        policy.gpt2.origin = None if origin is None else Origin(**origin)  # of the run, not this folder
        frozen = set(self.counters["frozen"])
        for name, parameter in policy.named_parameters():
            parameter.requires_grad_(name not in frozen)
        if not any(parameter.requires_grad for parameter in policy.parameters()):
            raise ValueError(f"{self.folder / COUNTERS_FILE} leaves nothing to train: every parameter is frozen")
        return policy

    def restore(self, trainer: PPOTrainer) -> None:
        """Bring a new trainer of this policy, config and reference to where the saved one was.

        Raises ValueError for another reference, a device whose generators work differently, or tensors that do not fit.
        """
        c = self.counters
        if trainer.reference_hash != c["reference"]["sha256"]:
            raise ValueError(
                f"{self.folder} belongs to a run with another reference: its tensors had the SHA-256 "
                f"{c['reference']['sha256'][:12]}..., those given have {trainer.reference_hash[:12]}..."
            )
        for name, generator in trainer.generators.items():
            try:
                generator.set_state(self._tensor(f"generator.{name}"))
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"{self.folder} was saved on another kind of device than {trainer.device}, whose random generators "
                    f"go on differently: {error}"
                ) from error
        for name, parameter in _trained(trainer).items():
            if f"optimizer.step.{name}" in self.tensors:  # not for a parameter that has had no gradient yet
                shapes = {"step": (), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
                moments = {key: self._tensor(f"optimizer.{key}.{name}", shape) for key, shape in shapes.items()}
                trainer.optimizer.state[parameter] = {k: v.to(parameter.device).clone() for k, v in moments.items()}
        if trainer.precision.scaler.is_enabled():
            trainer.precision.scaler.load_state_dict(c["scaler"])
        trainer.iteration, trainer.optimizer_steps = c["iteration"], c["optimizer_steps"]
        trainer.bad_steps, trainer.kl_controller.coef = c["bad_steps"], c["kl_coef"]
        if trainer.config.forward_batch_size == c["config"]["forward_batch_size"]:
            trainer.micro_batch_size = c["micro_batch_size"]
        vars(trainer.score_moments).update(c["score_moments"])

    def _tensor(self, name: str, shape: tuple[int, ...] | None = None) -> Tensor:
        """A tensor of training.safetensors; with a shape, an fp32 one. Raises ValueError if it is not so."""
        tensor = self.tensors.get(name)
        if tensor is None or (shape is not None and (tensor.shape, tensor.dtype) != (shape, torch.float32)):
            found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
            wanted = "" if shape is None else f", where the policy needs {tuple(shape)} in fp32"
            raise ValueError(f"{self.folder / STATE_TENSORS}: {name} {found}{wanted}")
        return tensor


def save(trainer: PPOTrainer, folder: str | os.PathLike[str], log: Mapping[str, int] | None = None) -> None:
    """Write everything that the next step depends on.

    log: how long the files of the run's log were, as `RunLog.flush` says; kept in training.json.
    Raises RuntimeError for a trainer that stopped within a step, or whose shared reference was changed, ValueError
    for weights that are not fp32, FileExistsError for a folder that holds something else, OSError if it cannot be
    written.
    """
    if trainer.within_step:
        raise RuntimeError(
            f"the trainer stopped within step {trainer.iteration + 1}, so it is in the state of no step; "
            "go back to its last checkpoint"
        )
    if trainer.config.reference == "shared" and module_hash(trainer.reference) != trainer.reference_hash:
        raise RuntimeError("the reference is not what it was: layers that it shares with the policy were changed")
    if any(p.dtype != torch.float32 for p in trainer.policy.parameters()):
        raise ValueError("a checkpoint holds fp32 weights, but the policy has others")
    tensors = {f"generator.{name}": generator.get_state() for name, generator in trainer.generators.items()}
    for name, parameter in _trained(trainer).items():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    counters = {
        "format": FORMAT,
        "iteration": trainer.iteration,
        "optimizer_steps": trainer.optimizer_steps,
        "bad_steps": trainer.bad_steps,
        "micro_batch_size": trainer.micro_batch_size,
        "kl_coef": trainer.kl_controller.coef,
        "score_moments": vars(trainer.score_moments),
        "scaler": trainer.precision.scaler.state_dict(),
        "origin": None if trainer.policy.gpt2.origin is None else dataclasses.asdict(trainer.policy.gpt2.origin),
        "frozen": [name for name, p in trainer.policy.named_parameters() if not p.requires_grad],
        "reference": {"sha256": trainer.reference_hash, "source": trainer.reference_source},
        "config": {  # JSON has no infinity
            name: "inf" if value == math.inf else value for name, value in dataclasses.asdict(trainer.config).items()
        },
        "log": log,
    }

    def write_model(staged: Path) -> None:
        trainer.policy.save_pretrained(staged)
        trainer.tokenizer.save_pretrained(staged)

    write_checkpoint(folder, tensors, counters, write_model)


def read(folder: str | os.PathLike[str]) -> TrainingState:
    """Read a checkpoint, every byte of it checked.

    Raises FileNotFoundError if there is no such folder, DamagedCheckpoint, a ValueError, if it is not as it was
    written, ValueError if another version of this library wrote it.
    """
    tensors, counters = read_checkpoint(folder, FORMAT)
    for name, fits in COUNTERS.items():
        if name not in counters or not fits(counters[name]):
            found = repr(counters.get(name, "nothing"))[:100]
            raise ValueError(f"{Path(folder) / COUNTERS_FILE} holds no valid {name}: {found}")
    return TrainingState(Path(folder), tensors, counters)


def module_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_amount(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def _is_record(value: Any, **fits: Callable[[Any], bool]) -> bool:
    """Whether it is an object of these fields, whose values fit."""
    return isinstance(value, dict) and value.keys() == fits.keys() and all(fit(value[k]) for k, fit in fits.items())


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


# What `save` writes into training.json: a check sum says that nothing was changed since, not that we wrote it.
COUNTERS: dict[str, Callable[[Any], bool]] = {
    "iteration": _is_count,
    "optimizer_steps": _is_count,
    "bad_steps": _is_count,
    "micro_batch_size": lambda value: _is_count(value) and value > 0,
    "kl_coef": _is_amount,
    "score_moments": lambda value: _is_record(value, count=_is_count, mean=_is_number, squares=_is_amount),
    "scaler": lambda value: value == {} or _is_record(
        value, scale=_is_amount, growth_factor=_is_amount, backoff_factor=_is_amount, growth_interval=_is_count,
        _growth_tracker=_is_count,
    ),
    "origin": lambda value: value is None or _is_record(value, name=_is_text, config=_is_object),
    "frozen": lambda value: isinstance(value, list) and all(map(_is_text, value)),
    "reference": lambda value: _is_record(
        value, sha256=_is_text, source=lambda source: source is None or _is_text(source)
    ),
    "config": lambda value: isinstance(value, dict) and value.keys() <= {f.name for f in dataclasses.fields(PPOConfig)},
    "log": lambda value: value is None or _is_record(value, **{METRICS_FILE: _is_count, SAMPLES_FILE: _is_count}),
}  # fmt: skip


def _trained(trainer: PPOTrainer) -> dict[str, Any]:
    return {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad}
