"""The state of a PPOTrainer between two steps, which `runs` writes to disk; of the reference its hash and source."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from minirlhf.io.training_state import (
    State,
    frozen,
    load_generator,
    load_moments,
    module_hash,
    moments,
    require_fp32,
    require_same_reference,
)

if TYPE_CHECKING:
    from minirlhf.rl.trainer import PPOTrainer


def trainer_state(trainer: PPOTrainer) -> State:
    """Everything besides the weights that the next step depends on.

    Raises RuntimeError after an error inside a step, or if a shared reference was changed; ValueError for weights that
    are not fp32.
    """
    if trainer.interrupted:
        where = f"the trainer stopped within step {trainer.iteration + 1}"
        raise RuntimeError(f"{where}, so its state is inconsistent; go back to its last checkpoint")
    shared = trainer.config.reference == "shared" or trainer.config.adapters_off
    if shared and module_hash(trainer.reference) != trainer.reference_hash:
        raise RuntimeError("the reference is not what it was: layers that it shares with the policy were changed")
    require_fp32(trainer.policy)
    tensors = {f"generator.{name}": generator.get_state() for name, generator in trainer.generators.items()}
    tensors |= moments(trainer.optimizer, trainer.policy.named_parameters())
    origin = trainer.policy.decoder.origin
    counters = {
        "iteration": trainer.iteration,
        "optimizer_steps": trainer.optimizer_steps,
        "bad_steps": trainer.bad_steps,
        "micro_batch_size": trainer.micro_batch_size,
        "kl_coef": trainer.kl_controller.coef,
        "scaler": trainer.precision.scaler.state_dict(),
        "matmul": trainer.precision.matmul,
        "reference": {"sha256": trainer.reference_hash, "source": trainer.reference_source},
        "frozen": frozen(trainer.policy),
        "origin": None if origin is None else dataclasses.asdict(origin),
        "config": dataclasses.asdict(trainer.config),
    }
    return {"tensors": tensors, "counters": counters}


def load_trainer_state(trainer: PPOTrainer, state: State) -> None:
    """Go on where `trainer_state` was called, on the CPU bit for bit, with the policy of that moment.

    Raises ValueError for another reference, a device whose random generators differ, or a state that does not fit;
    the trainer must not be used then.
    """
    tensors, c = state["tensors"], state["counters"]
    require_same_reference(c["reference"]["sha256"], trainer.reference_hash)
    for name, generator in trainer.generators.items():
        load_generator(generator, f"generator.{name}", tensors)
    load_moments(trainer.optimizer, trainer.policy.named_parameters(), tensors)
    if trainer.precision.scaler.is_enabled():
        trainer.precision.scaler.load_state_dict(c["scaler"])
    trainer.precision.matmul = c["matmul"]
    trainer.iteration, trainer.optimizer_steps = c["iteration"], c["optimizer_steps"]
    trainer.bad_steps, trainer.kl_controller.coef = c["bad_steps"], c["kl_coef"]
    if trainer.config.forward_batch_size == c["config"].get("forward_batch_size"):
        trainer.micro_batch_size = c["micro_batch_size"]
