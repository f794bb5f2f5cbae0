"""A trainer's state to one safetensors file and back, so that a run can go on where it stopped.

One file, written atomically: a checkpoint is whole or it is not there. No pickle.
"""

from __future__ import annotations

import dataclasses
import json
import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

from minirlhf import ppo
from minirlhf.checkpoints import check_tensors, read_metadata, read_tensors, write_tensors

if TYPE_CHECKING:
    from minirlhf.trainer import PPOTrainer

FREE_FIELDS = {"steps", "save_freq", "forward_batch_size", "device"}  # may change between two parts of a run


def save(trainer: PPOTrainer, path: str | os.PathLike[str]) -> None:
    """Write everything that the next step depends on, but the reference, which never changes."""
    tensors: dict[str, Tensor] = {f"policy.{name}": t for name, t in trainer.policy.state_dict().items()}
    for name, parameter in _trained(trainer).items():
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = value
    for name, generator in trainer.generators.items():
        tensors[f"generator.{name}"] = generator.get_state()
    counters = {
        "iteration": trainer.iteration,
        "optimizer_steps": trainer.optimizer_steps,
        "kl_coef": trainer.kl_controller.coef,
        "score_moments": vars(trainer.score_moments),
        "scaler": trainer.precision.scaler.state_dict(),
        "config": dataclasses.asdict(trainer.config),
    }
    write_tensors(path, tensors, {"trainer": json.dumps(counters)})


def load(trainer: PPOTrainer, path: str | os.PathLike[str]) -> None:
    """Restore what `save` wrote. Raises FileNotFoundError, or ValueError for a damaged or foreign file."""
    tensors, metadata = read_tensors(path), read_metadata(path)
    if "trainer" not in metadata:
        raise ValueError(f"{path} is not a trainer checkpoint: its metadata has no 'trainer' entry")
    try:
        counters = json.loads(metadata["trainer"])
        _check_config(counters["config"], dataclasses.asdict(trainer.config), path)
        fresh = vars(ppo.RunningMoments())
        moments = {name: type(value)(counters["score_moments"][name]) for name, value in fresh.items()}
        iteration, optimizer_steps = int(counters["iteration"]), int(counters["optimizer_steps"])
        kl_coef, scaler = float(counters["kl_coef"]), dict(counters["scaler"])
        random_states = {name: tensors[f"generator.{name}"] for name in trainer.generators}
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__} {error}") from error
    weights = {name.removeprefix("policy."): t for name, t in tensors.items() if name.startswith("policy.")}
    check_tensors(weights, {name: t.shape for name, t in trainer.policy.state_dict().items()}, path)

    # Everything was read and checked: only now does the trainer change.
    trainer.policy.load_state_dict(weights)
    trainer.optimizer.state.clear()
    for name, parameter in _trained(trainer).items():
        keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
        if keys:
            state = {key: tensors[f"optimizer.{key}.{name}"].to(parameter.device) for key in keys}
            trainer.optimizer.state[parameter] = state
    for name, generator in trainer.generators.items():
        generator.set_state(random_states[name])
    trainer.precision.scaler.load_state_dict(scaler)
    trainer.iteration, trainer.optimizer_steps = iteration, optimizer_steps
    trainer.kl_controller.coef = kl_coef
    vars(trainer.score_moments).update(moments)


def _trained(trainer: PPOTrainer) -> dict[str, Any]:
    return {name: p for name, p in trainer.policy.named_parameters() if p.requires_grad}


def _check_config(saved: dict[str, Any], own: dict[str, Any], path: str | os.PathLike[str]) -> None:
    differing = [name for name in own if name not in FREE_FIELDS and saved.get(name) != own[name]]
    if differing:
        changed = [f"{name}: {saved.get(name)!r} then, {own[name]!r} now" for name in differing]
        raise ValueError(f"{path} was written under other settings: {'; '.join(changed)}")
