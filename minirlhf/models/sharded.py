"""Models of which each process holds a part, by torch's `fully_shard` (FSDP2; Zhao et al. 2023).

Each parameter is cut into one part a process, and so are its gradient and Adam's moments. A forward or backward pass
gathers one block at a time, so all processes must run equally many. Sampling would gather all of them for every token:
sampling, scoring and measuring get a whole copy, which is dropped afterwards.

Left out: a pass that is repeated in smaller parts after it ran out of memory, as the other processes wait inside it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from minirlhf.common.validation import require, require_one_of
from minirlhf.device.parts import full
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import SIXTEEN_BITS
from minirlhf.device.processes import processes

Module = TypeVar("Module", bound=nn.Module)


def require_shardable(config: Any) -> None:
    """Raise ValueError for a bad `sharding` of any stage, or settings that cannot be combined with it."""
    if config.sharding is not None:
        require_one_of(config, "sharding", ("full",))
        sharded = "with sharding='full'"
        fits = config.precision in ("fp32", "tf32", "bf16")
        require(config, "precision", fits, f"'fp32', 'tf32' or 'bf16' {sharded}")
        require(config, "lora", getattr(config, "lora", None) is None, f"None {sharded}: adapters need no sharding")


def is_to_be_sharded(config: Any) -> bool:
    """Whether a stage cuts its models: with `sharding="full"`, unless one process, alone, would have the only part."""
    return config.sharding == "full" and processes().on


def initial_device(config: Any) -> torch.device:
    """Where the models of a stage begin: on its device, or the CPU, from which each process takes its part."""
    device = resolve_device(config.device)
    return torch.device("cpu") if is_to_be_sharded(config) else device


def shard(model: nn.Module, device: torch.device, precision: str, entry: str = "hidden_states") -> None:
    """Cut a model into one part a process, in place, and move this process's part to its device.

    Its parameters become DTensors, and gradients are sums over the processes. Its blocks are those of a ModuleList.
    precision: of the passes; if it has 16 bits, weights are gathered in 16, and gradients summed in 32.
    entry: the method that runs a pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    weightless = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    skeleton = copy.deepcopy(model, weightless | _tokenizers(model))
    blocks = [block for module in model.modules() if isinstance(module, nn.ModuleList) for block in module]
    mesh, bits = init_device_mesh(device.type, (processes().size,)), SIXTEEN_BITS.get(precision)
    mixed = MixedPrecisionPolicy(bits, None if bits is None else torch.float32, cast_forward_inputs=False)
    for module in (*blocks, model):
        part = fully_shard(module, mesh=mesh, mp_policy=mixed)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    register_fsdp_forward_method(model, entry)
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # which is not changed in place
    vars(model)["skeleton"] = skeleton  # the model without weights; not a submodule


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds a part of a model."""
    return "skeleton" in vars(model)


def gathered(model: Module, dtype: torch.dtype | None = None, device: Any = None) -> Module:
    """A whole, frozen copy of a sharded model; any other model as it is. All processes must call it.

    dtype, device: of the copy; None: those of the model.
    """
    if not is_sharded(model):
        return model
    sharded: Any = model
    sharded.reshard()  # after a pass without gradient its root is whole
    whole: Module = copy.deepcopy(sharded.skeleton, _tokenizers(sharded.skeleton))
    vars(whole).update({name: x for name, x in vars(model).items() if isinstance(x, float)})  # a reward's mean and std
    parts = ((name, p.detach()) for name, p in model.named_parameters())
    whole.load_state_dict({n: full(p.to(dtype or p.dtype)).to(device or p.device) for n, p in parts}, assign=True)
    return whole.eval().requires_grad_(False)


def exported(model: Module) -> Module:
    """`gathered` for a file: on the CPU of the first process; the others get a model without weights."""
    return gathered(model, device="cpu" if processes().first else "meta")


def _tokenizers(model: nn.Module) -> dict[int, Any]:
    """The tokenizers of a model by their id, for a deep copy that shares them."""
    found = [vars(module).get("tokenizer") for module in model.modules()]
    return {id(tokenizer): tokenizer for tokenizer in found if tokenizer is not None}
