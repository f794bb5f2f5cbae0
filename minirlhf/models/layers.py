"""What the GPT-2 and BERT modules share: activation functions, and configs read from published JSON."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Config = TypeVar("Config")


def gelu_new(x: Tensor) -> Tensor:
    """GELU with the tanh approximation, as GPT-2 uses it (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "relu": F.relu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out), as the published GPT-2 checkpoints do."""

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.t(), self.bias)


def config_from_json(kind: type[Config], content: Mapping[str, Any]) -> Config:
    """Build a config dataclass from a published `config.json`; keys that the library has no use for are ignored."""
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in content.items() if name in names})


def global_rng_kept() -> contextlib.AbstractContextManager[Any]:
    """Within it layers may be built: PyTorch's own initial weights move the global random state, which is put back."""
    return torch.random.fork_rng(devices=[])


def normal_init(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw every weight matrix from N(0, std), zero the biases and set LayerNorms to identity, in module order.

    A generator of our own is used instead of the global one.
    """
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding, Conv1D)):
            nn.init.normal_(child.weight, 0.0, std, generator=generator)
            if not isinstance(child, nn.Embedding) and child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
