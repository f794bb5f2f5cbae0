"""The state of a training between two steps, apart from the weights, which are saved as a model folder.

A trainer's `state_dict()` returns a `State` and its `load_state_dict` takes one; `runs` writes it to disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from minirlhf.common.validation import is_finite
from minirlhf.device.parts import as_part, full

Check = Callable[[Any], bool]


class State(TypedDict):
    """tensors: optimizer moments and states of random generators. counters: JSON values, which may include infinity."""

    tensors: dict[str, Tensor]
    counters: dict[str, Any]


def moments(optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """Adam's state as `optimizer.KEY.PARAMETER`; a parameter that has had no gradient yet has none."""
    return {
        f"optimizer.{key}.{name}": value
        for name, parameter in named
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_moments(
    optimizer: torch.optim.Optimizer, named: Iterable[tuple[str, nn.Parameter]], tensors: Mapping[str, Tensor]
) -> None:
    """Give an Adam optimizer the state that `moments` returned. Raises ValueError for another shape or dtype."""
    for name, parameter in [pair for pair in named if f"optimizer.step.{pair[0]}" in tensors]:
        shapes = {"step": torch.Size(()), "exp_avg": parameter.shape, "exp_avg_sq": parameter.shape}
        loaded = {}
        for key, shape in shapes.items():
            tensor = tensors.get(f"optimizer.{key}.{name}")
            if tensor is None or (tensor.shape, tensor.dtype) != (shape, torch.float32):
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)} and dtype {tensor.dtype}"
                raise ValueError(f"optimizer.{key}.{name} {found}, where the model needs {tuple(shape)} in fp32")
            loaded[key] = (tensor if key == "step" else as_part(tensor, parameter)).to(parameter.device).clone()
        optimizer.state[parameter] = loaded


def load_generator(generator: torch.Generator, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Set a generator to the state saved as `name`. Raises ValueError if it is missing or of another kind of device."""
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    try:
        generator.set_state(tensors[name])
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{name} was saved on another kind of device than {generator.device}: {error}") from error


def frozen(model: nn.Module) -> list[str]:
    """Names of the parameters that are not trained."""
    return [name for name, parameter in model.named_parameters() if not parameter.requires_grad]


def require_fp32(model: nn.Module) -> None:
    """Raise ValueError for weights that a checkpoint, which holds fp32, would round; beside adapters, none is saved."""
    named = list(model.named_parameters())
    adapted = any(name.endswith(".lora_A") for name, _ in named)
    if any(p.dtype != torch.float32 for _, p in named if p.requires_grad or not adapted):
        raise ValueError("a checkpoint holds fp32 weights, but the model has others; call float() on it first")


def check_counters(counters: Mapping[str, Any], checks: Mapping[str, Check]) -> None:
    """Raise ValueError with name and value for a counter that is missing or fails its check."""
    for name, fits in checks.items():
        if name not in counters or not fits(counters[name]):
            found = repr(counters.get(name, "nothing"))[:100]
            raise ValueError(f"the saved state holds no valid {name}: {found}")


def is_count(value: Any) -> bool:
    """An integer in [0, 2**63)."""
    return type(value) is int and 0 <= value < 2**63


def is_amount(value: Any) -> bool:
    """A finite number of at least 0."""
    return is_finite(value) and value >= 0


def is_text(value: Any) -> bool:
    """A string."""
    return isinstance(value, str)


def is_record(value: Any, **checks: Check) -> bool:
    """An object with exactly these fields, whose values pass their checks."""
    return isinstance(value, dict) and value.keys() == checks.keys() and all(c(value[k]) for k, c in checks.items())


def is_scaler(value: Any) -> bool:
    """The state of a GradScaler; empty for one that is off."""
    return value == {} or is_record(
        value, scale=is_amount, growth_factor=is_amount, backoff_factor=is_amount, growth_interval=is_count,
        _growth_tracker=is_count,
    )  # fmt: skip


def module_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of a module's tensors, in the order of their names.

    Of a sharded module all processes must call it.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        own: Tensor = full(tensor.detach())
        digest.update(own.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_same_reference(began: str, given: str) -> None:
    """Raise ValueError unless the reference given has the `module_hash` of the one that the run began with."""
    if given != began:
        found = f"its tensors had the SHA-256 {began[:12]}..., those given have {given[:12]}..."
        raise ValueError(f"the run began with another reference: {found}")
