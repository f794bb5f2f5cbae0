"""GPT-2 from scratch: token ids to hidden states to logits, with an optional key/value cache.

The architecture is Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": token and position
embeddings, blocks that normalise before attention and MLP, a final LayerNorm, an LM head tied to the token
embedding. Parameter names are those of the published checkpoints (`wte`, `h.0.attn.c_attn`, ...).

Shapes: B batch, T tokens of this call, S tokens in the cache and this call together, C width, nh heads, hs = C / nh
head size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minirlhf.common import validation
from minirlhf.io.files import naming
from minirlhf.io.model_card import Origin
from minirlhf.io.model_folder import cast, check_published, published_config, read_folder, renamed
from minirlhf.models.cache import KVCache, StaticKVCache
from minirlhf.models.decoder import Decoder
from minirlhf.models.layers import (
    ACTIVATIONS,
    Conv1D,
    attention,
    check_vocabulary,
    config_from_json,
    fill,
    global_rng_kept,
    normal_init,
    shapes_only,
)
from minirlhf.models.packing import Packing

# Variants of the computation that published configs can ask for and this model does not have.
FIXED_FIELDS = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
TRUNK = ("wte", "wpe", "h", "ln_f")  # what every head stands on
LAYER_TENSORS = 12  # of one block
TRANSFORMERS_EOS = 50256  # the token that transformers' GPT-2 config ends texts with unless told otherwise


@dataclass(frozen=True)
class GPT2Config:
    """The fields of a published GPT-2 `config.json` that decide the computation. Raises ValueError for a bad one."""

    vocab_size: int = 21128
    n_positions: int = 1024
    n_embd: int = 768
    n_layer: int = 12
    n_head: int = 12
    n_inner: int | None = None  # width of the MLP; None: 4 * n_embd
    activation_function: str = "gelu_new"
    resid_pdrop: float = 0.1
    embd_pdrop: float = 0.1
    attn_pdrop: float = 0.1
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True  # False: the LM head has a weight of its own

    def __post_init__(self) -> None:
        validation.require_positive_ints(self, "vocab_size", "n_positions", "n_embd", "n_layer", "n_head")
        validation.require_rates(self, "resid_pdrop", "embd_pdrop", "attn_pdrop")
        validation.require_fraction(self, "layer_norm_epsilon")
        validation.require_above(self, 0, "initializer_range")
        validation.require_bools(self, "tie_word_embeddings")
        validation.require_one_of(self, "activation_function", ACTIVATIONS)
        if self.n_inner is not None:
            validation.require_positive_ints(self, "n_inner")
        validation.require(self, "n_embd", self.n_embd % self.n_head == 0, f"a multiple of n_head={self.n_head}")


class BlockInputs(NamedTuple):
    """Inputs shared by every block of one forward pass.

    allowed: bool (B or 1, 1, T, S), which keys each token may attend to; None: all that are not after it.
    cache: to read from and to extend. packing: of the tokens that go through; None: they are (B, T, C).
    """

    allowed: Tensor | None
    cache: KVCache | None = None
    packing: Packing | None = None


class Attention(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.n_head = config.n_head
        self.c_attn = Conv1D(config.n_embd, 3 * config.n_embd)
        self.c_proj = Conv1D(config.n_embd, config.n_embd)
        self.attn_pdrop = config.attn_pdrop
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor, inputs: BlockInputs, layer: int) -> Tensor:
        packing = inputs.packing
        qkv = self.c_attn(x) if packing is None else packing.unpack(self.c_attn(x))
        B, T, C = qkv.size(0), qkv.size(1), x.size(-1)
        q, k, v = qkv.view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4)  # (B, nh, T, hs)
        if inputs.cache is not None:
            k, v = inputs.cache.extend(layer, k, v)  # (B, nh, S, hs)
        dropout = self.attn_pdrop if self.training else 0.0
        # After others in a cache it is one token, which may see all. (No sizes: to the compiler they are symbols.)
        causal = inputs.allowed is None and (inputs.cache is None or inputs.cache.length == 0)
        y = attention(q, k, v, inputs.allowed, dropout, is_causal=causal)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y if packing is None else packing.pack(y)))


class MLP(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        n_inner = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(config.n_embd, n_inner)
        self.c_proj = Conv1D(n_inner, config.n_embd)
        self.activation = ACTIVATIONS[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.activation(self.c_fc(x))))


class Block(nn.Module):
    def __init__(self, config: GPT2Config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, inputs: BlockInputs, layer: int) -> Tensor:
        x = x + self.attn(self.ln_1(x), inputs, layer)
        return x + self.mlp(self.ln_2(x))


class GPT2(Decoder):
    """GPT-2 with an LM head: `model(ids, attention_mask=None) -> logits (B, T, V)`.

    seed: of the generator that draws the initial weights.
    """

    prefix = "transformer."

    def __init__(self, config: GPT2Config, seed: int = 0):
        super().__init__()
        self.config, self.vocab_size, self.n_positions = config, config.vocab_size, config.n_positions
        self.width, self.n_heads = config.n_embd, config.n_head
        with global_rng_kept():
            self.wte = nn.Embedding(config.vocab_size, config.n_embd)
            self.wpe = nn.Embedding(config.n_positions, config.n_embd)
            self.drop = nn.Dropout(config.embd_pdrop)
            self.h = nn.ModuleList(Block(config) for _ in range(config.n_layer))
            self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
            tied = config.tie_word_embeddings
            self.lm_head = None if tied else nn.Linear(config.n_embd, config.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        normal_init(self, config.initializer_range, generator)
        residual = config.initializer_range / math.sqrt(2 * config.n_layer)  # scaled by depth: section 2.3 of the paper
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, 0.0, residual, generator=generator)

    def fit_vocabulary(self, n_tokens: int, name: str = "model") -> None:
        """See `Decoder.fit_vocabulary`."""
        check_vocabulary(self.config.vocab_size, n_tokens, name)
        self.vocab_size = n_tokens

    @property
    def embeddings(self) -> list[nn.Module]:
        return [self.wte, self.wpe]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    def hidden_states(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """See `Decoder.hidden_states`."""
        T, past = ids.size(1), 0 if cache is None else cache.length
        shape = (len(ids), past + T)
        if attention_mask is not None and attention_mask.shape != shape:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {shape}")
        packing, allowed = None, None  # type: Packing | None, Tensor | None
        if isinstance(cache, StaticKVCache):
            positions, allowed = cache.positions, cache.allowed
        elif segments is not None:
            positions, allowed = segment_positions(segments), segment_mask(segments)
        else:
            positions = token_positions(attention_mask, past, past + T, ids.device)
            allowed = causal_mask(attention_mask, past, T, ids.device)
            # Rows in a cache have different pasts, and dropout makes equal rows differ: only then nothing is shared.
            alike = past == 0 and not any(module.training for module in self.modules())
            packing = Packing.of(ids, None if attention_mask is None else attention_mask[:, past:], share=alike)
        if past + T > self.n_positions and (longest := int(positions.max()) + 1) > self.n_positions:
            raise ValueError(f"a sequence of {longest} tokens is longer than the model's {self.n_positions} positions")
        inputs = BlockInputs(allowed, cache, packing)
        x = self.drop(self.wte(ids) + self.wpe(positions))  # (B, T, C)
        x = x if packing is None else packing.pack(x)  # (N, C)
        for layer, block in enumerate(self.h):
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, inputs, layer, use_reentrant=False)
            elif cache is None:
                x = block(x, inputs, layer)
            else:  # not what `torch.compile` made of it: see `compile_blocks`
                x = block.forward(x, inputs, layer)
        if cache is not None:
            cache.advance(T)
        x = self.ln_f(x)
        return x if packing is None else packing.unpack(x)  # (B, T, C)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """See `Decoder.lm_logits`."""
        weight = self.wte.weight if self.lm_head is None else self.lm_head.weight  # (V, C), tied or not
        return F.linear(hidden, weight if self.vocab_size == len(weight) else weight[: self.vocab_size])

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """See `Decoder.new_cache`."""
        weight, c = self.wte.weight, self.config
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        sizes = (c.n_layer, batch_size, c.n_head, max_length, c.n_embd // c.n_head)
        return KVCache(*sizes, like=weight.new_empty(0, dtype=dtype))

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> GPT2:
        """Load a folder in the published layout, in fp32 and in eval mode.

        Names may have the prefixes of training wrappers and `transformer.` or not; `lm_head.weight` may be stored,
        tied or untied. Causal masks and a value head are dropped.
        Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one, naming file and tensor.
        """
        return cls.with_value_head(folder)[0]

    @classmethod
    def with_value_head(cls, folder: str | os.PathLike[str]) -> tuple[GPT2, dict[str, Tensor]]:
        """The model of `from_pretrained`, and the tensors of TRL's value head, `v_head.*`, if the folder has one."""
        content, named = read_published(folder)
        head = {n.removeprefix("v_head."): named.pop(n) for n in list(named) if n.startswith("v_head.")}
        return cls._from_tensors(folder, content, named), head

    @classmethod
    def from_trunk(cls, folder: str | os.PathLike[str]) -> GPT2:
        """Load the transformer of any GPT-2 folder, without its heads; raises as `from_pretrained`."""
        content, named = read_published(folder)
        trunk = {name: tensor for name, tensor in named.items() if name.split(".")[0] in TRUNK}
        return cls._from_tensors(folder, {**content, "tie_word_embeddings": True}, trunk)

    @classmethod
    def _from_tensors(
        cls, folder: str | os.PathLike[str], content: Mapping[str, Any], named: dict[str, Tensor]
    ) -> GPT2:
        with naming(folder), shapes_only():
            model = cls(read_config(content, len(named)))
        head = named.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
        if head is not None:
            named.setdefault("wte.weight", head)
        fill(model, named, folder)
        if head is not None and not torch.equal(model.wte.weight, head.float()):
            raise ValueError(f"{folder}: lm_head.weight differs from wte.weight, but tie_word_embeddings is not false")
        model.origin, model.source = Origin.of(folder, content), os.fspath(folder)
        return model.eval()

    def published(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Decoder.published`."""
        content = {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": "gpt2",
            **dataclasses.asdict(self.config),
            "n_ctx": self.config.n_positions,  # what llama.cpp's converter reads
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        tensors = {n if n.startswith("lm_head.") else f"transformer.{n}": t for n, t in self.state_dict().items()}
        config = published_config(content, self.origin)
        if self.config.vocab_size <= TRANSFORMERS_EOS:  # no token of this vocabulary
            config = {"bos_token_id": None, "eos_token_id": None, **config}
        return config, cast(tensors, dtype)


def read_published(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A GPT-2 folder's `config.json`, and all its tensors by their names here; raises as `GPT2.from_pretrained`.

    Where attention is scaled by the inverse of the layer's number, too, the query weights become smaller instead.
    """
    content, tensors = read_folder(folder)
    by_layer = content.get("scale_attn_by_inverse_layer_idx") is True
    if by_layer:
        content["scale_attn_by_inverse_layer_idx"] = False
    check_published(content, folder, model_type="gpt2", fixed=FIXED_FIELDS)
    named = renamed(tensors, own_name, folder)
    for name, tensor in named.items() if by_layer else ():
        layer = re.fullmatch(r"h\.([0-9]{1,9})\.attn\.c_attn\.(weight|bias)", name)
        if layer and tensor.ndim and tensor.is_floating_point():
            named[name] = tensor.float()
            named[name][..., : tensor.size(-1) // 3] *= 1 / (int(layer[1]) + 1)
    return content, named


def read_config(content: Mapping[str, Any], stored: int) -> GPT2Config:
    """The GPT2Config of a published `config.json`, for a file of `stored` tensors; see `config_from_json`."""
    return config_from_json(GPT2Config, content, "n_layer", stored // LAYER_TENSORS)


def own_name(published: str) -> str | None:
    """A published tensor's name in the model's form; None for the causal masks that old versions stored."""
    if published.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return published.removeprefix("transformer.")


def token_positions(attention_mask: Tensor | None, past: int, total: int, device: torch.device) -> Tensor:
    """Positions (B, T) or (T,) of the new tokens: real tokens are numbered 0, 1, 2, ... in every row."""
    if attention_mask is None:
        return torch.arange(past, total, device=device)
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, past:]


def causal_mask(attention_mask: Tensor | None, past: int, new: int, device: torch.device) -> Tensor | None:
    """Bool (B or 1, 1, T, S), which keys each new token may attend to; None stands for all that are not after it."""
    if attention_mask is None and (past == 0 or new == 1):
        return None
    causal = torch.ones(new, past + new, dtype=torch.bool, device=device).tril(past)[None, None]  # (1, 1, T, S)
    if attention_mask is None:
        return causal
    # A padding token may attend to itself: a softmax over nothing would be NaN.
    itself = torch.ones_like(causal).triu(past)  # with `causal`: the diagonal
    return causal & (attention_mask.bool()[:, None, None, :] | itself)


def segment_positions(segments: Tensor) -> Tensor:
    """Positions (B, T) that begin at 0 in every segment of contiguous equal numbers in segments (B, T)."""
    places = torch.arange(segments.size(1), device=segments.device).expand_as(segments)
    begins = F.pad(segments[:, 1:] != segments[:, :-1], (1, 0), value=True)
    return places - torch.where(begins, places, 0).cummax(-1).values


def segment_mask(segments: Tensor) -> Tensor:
    """Bool (B, 1, T, T), causal and block-diagonal (Krell et al. 2021, "Efficient Sequence Packing")."""
    T = segments.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=segments.device).tril()
    return (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
