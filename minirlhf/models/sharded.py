"""Models of which each process holds a part, by torch's `fully_shard` (FSDP2; Zhao et al. 2023).

Each parameter is cut into one part a process, and so are its gradient and Adam's moments. A forward or backward pass
gathers one block at a time. Sampling would gather all of them for every token, so sampling and scoring get a whole copy
once an iteration, in 16 bits if the precision has 16, which is dropped when the batch is there.

Left out: a pass that is repeated in smaller parts after it ran out of memory, as the other processes wait inside it.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, TypeVar

import torch
from torch import nn

from minirlhf.device.parts import full
from minirlhf.device.precision import SIXTEEN_BITS
from minirlhf.device.processes import processes
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic

Module = TypeVar("Module", bound=nn.Module)


def shard(model: ActorCritic | Decoder, device: torch.device, precision: str) -> None:
    """Cut a model into one part a process, in place, and move this process's part to its device.

    Its parameters become DTensors; `hidden_states` is the way into a pass, and gradients are sums over the processes.
    precision: of the passes; if it has 16 bits, weights are gathered in 16, and gradients summed in 32.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    skeleton = copy.deepcopy(model, {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()})
    mesh, bits = init_device_mesh(device.type, (processes().size,)), SIXTEEN_BITS.get(precision)
    mixed = MixedPrecisionPolicy(bits, None if bits is None else torch.float32, cast_forward_inputs=False)
    for module in (*model.language_model.blocks, model):
        part = fully_shard(module, mesh=mesh, mp_policy=mixed)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no other
    register_fsdp_forward_method(model, "hidden_states")
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
    tokenizer = sharded.language_model.tokenizer
    whole: Module = copy.deepcopy(sharded.skeleton, {id(tokenizer): tokenizer})
    parts = ((name, p.detach()) for name, p in model.named_parameters())
    whole.load_state_dict({n: full(p.to(dtype or p.dtype)).to(device or p.device) for n, p in parts}, assign=True)
    return whole.eval().requires_grad_(False)


def exported(model: Module) -> Module:
    """`gathered` for a file: on the CPU of the first process; the others get a model without weights."""
    return gathered(model, device="cpu" if processes().first else "meta")
