"""Parts that GPT-2 and BERT share: activations, attention, initial weights, and loading of configs and weights."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minirlhf.common.validation import require
from minirlhf.io.model_folder import check_tensors

Config = TypeVar("Config")
MOST_PADDING = 1024  # rows by which an embedding may exceed the vocabulary
SHORT_SEQUENCE = 128  # keys up to which the plain formula of attention is faster on a CPU


def gelu_new(x: Tensor) -> Tensor:
    """GELU with the tanh approximation, as GPT-2 uses it (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def quick_gelu(x: Tensor) -> Tensor:
    """GELU approximated by a sigmoid, x sigmoid(1.702 x) (Hendrycks & Gimpel 2016)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_python": F.gelu,
    "gelu_new": gelu_new,
    "gelu_fast": gelu_new,
    "gelu_pytorch_tanh": gelu_new,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


class Conv1D(nn.Module):
    """A linear layer that stores its weight as (in, out), as the published GPT-2 checkpoints do."""

    transposed = True

    def __init__(self, n_in: int, n_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_in, n_out))
        self.bias = nn.Parameter(torch.zeros(n_out))

    def forward(self, x: Tensor) -> Tensor:
        # Of the weight itself, not of its transpose: autocast keeps its 16-bit copies of parameters, but not of views.
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def features(layer: Any) -> tuple[int, int]:
    """Features that a linear layer takes, and those that it gives."""
    rows, columns = layer.weight.shape
    return (rows, columns) if getattr(layer, "transposed", False) else (columns, rows)


class Widened(torch.autograd.Function):
    """x W^T + b with W (out, in) widened to the type of x while it is needed, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient @ ctx.saved_tensors[0].to(gradient.dtype), None, None


def attention(
    q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """softmax(q k^T / sqrt(hs)) v (Vaswani et al. 2017, equation 1), (B, nh, T, hs).

    q: (B, nh, T, hs); k, v: (B, nh, S, hs), or with fewer heads, each for nh / heads queries that are side by side
        (grouped-query attention, Ainslie et al. 2023).
    allowed: bool, broadcast to (B, nh, T, S), True where a query may attend; or is_causal for the lower triangle.
    For short sequences and single queries on a CPU the formula itself is up to five times as quick as PyTorch's fused
    kernel, which does the rest. (In 16 bits the formula rounds scores before the softmax, the kernel after it.)
    """
    groups, T = q.size(1) // k.size(1), q.size(2)
    if groups > 1 and T == 1:  # queries of one group are rows of one product, so that no keys are copied
        return attention(q.unflatten(1, (-1, groups)).squeeze(3), k, v, allowed, dropout_p).flatten(1, 2).unsqueeze(2)
    short = k.size(2) <= SHORT_SEQUENCE or T == 1
    if not short or q.device.type != "cpu" or dropout_p > 0:
        if groups > 1:
            k, v = (x.repeat_interleave(groups, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, allowed, dropout_p, is_causal)
    if is_causal:
        allowed = torch.ones(T, k.size(2), dtype=torch.bool).tril()[None, None]
    q = q / math.sqrt(q.size(-1))
    if groups > 1:  # the queries of a group one after the other: (B, nh / groups, groups * T, hs)
        q, allowed = q.unflatten(1, (-1, groups)).flatten(2, 3), None if allowed is None else allowed.unsqueeze(2)
    # (B, nh, T, S). One query becomes the column of a product, so that no keys are copied to be transposed.
    scores = q @ k.mT if q.size(2) > 1 else (k @ q.mT).mT
    if groups > 1:
        scores = scores.unflatten(2, (groups, T))
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    weights = scores.softmax(-1).to(v.dtype)
    if groups > 1:
        return (weights.flatten(2, 3) @ v).unflatten(2, (groups, T)).flatten(1, 2)
    return weights @ v


def check_vocabulary(rows: int, n_tokens: int, name: str = "model") -> None:
    """Raise ValueError unless an embedding has a row for every token, and otherwise only rows that pad it."""
    if not 0 <= rows - n_tokens < MOST_PADDING:
        raise ValueError(f"the vocabulary has {n_tokens} tokens, but the {name} was made for {rows}")


def config_from_json(kind: type[Config], content: Mapping[str, Any], layers: str, most: int) -> Config:
    """Build a config dataclass from a published `config.json`; keys that are not its fields are ignored.

    Raises ValueError for a bad field, or if the field `layers` is above `most`, the layers that are stored: even an
    empty layer costs memory.
    """
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    config = kind(**{name: value for name, value in content.items() if name in names})
    require(config, layers, getattr(config, layers) <= most, f"at most {most}, the layers that are stored")
    return config


def global_rng_kept() -> contextlib.AbstractContextManager[Any]:
    """Restore the global random state at the end: PyTorch draws initial weights of new layers from it."""
    return torch.random.fork_rng(devices=[])


class _WithoutDraws(TorchFunctionMode):
    """Skip the functions that draw initial weights. On the meta device they would load the compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
            return None
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Build models without memory or random numbers; `fill` gives them weights.

    Raises ValueError for a shape that no tensor can have.
    """
    try:
        with torch.device("meta"), _WithoutDraws():
            yield
    except (RuntimeError, TypeError) as error:  # more elements or bytes than 64 bits count
        raise ValueError(f"the config asks for a tensor beyond all sizes: {str(error).splitlines()[0]}") from error


def fill(model: nn.Module, tensors: Mapping[str, Tensor], origin: str | os.PathLike[str]) -> None:
    """Give a model that was built under `shapes_only` its weights, copied to fp32 on the CPU.

    Raises ValueError as `check_tensors`, before it allocates memory.
    """
    check_tensors(tensors, {name: p.shape for name, p in model.state_dict().items()}, origin)
    own = {name: tensor.to(torch.float32, copy=True) for name, tensor in tensors.items()}
    model.load_state_dict(own, assign=True)


def normal_init(module: nn.Module, std: float, generator: torch.Generator) -> None:
    """Draw every weight matrix from N(0, std), zero the biases and set LayerNorms to identity, in module order."""
    for child in module.modules():
        if isinstance(child, (nn.Linear, nn.Embedding, Conv1D)):
            nn.init.normal_(child.weight, 0.0, std, generator=generator)
            if not isinstance(child, nn.Embedding) and child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.LayerNorm):
            nn.init.ones_(child.weight)
            nn.init.zeros_(child.bias)
