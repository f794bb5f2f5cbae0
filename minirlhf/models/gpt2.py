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
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from minirlhf.common import validation
from minirlhf.io.files import StrPath
from minirlhf.io.model_folder import CONFIG_FILE, check_published, published_config, read_folder, renamed
from minirlhf.models.decoder import BlockInputs, Decoder
from minirlhf.models.layers import ACTIVATIONS, Conv1D, attention, config_from_json, global_rng_kept, normal_init

# Variants of the computation that published configs can ask for and this model does not have.
FIXED_FIELDS = {
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "is_causal": (True,),
}
# Other families' names of these fields, which transformers reads in a GPT-2 config, too.
ALIASES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "hidden_size": "n_embd",
           "max_position_embeddings": "n_positions"}  # fmt: skip
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

    prefix, trunk = "transformer.", ("wte", "wpe", "h", "ln_f")
    config: GPT2Config

    def __init__(self, config: GPT2Config, seed: int = 0):
        super().__init__()
        self.config, self.vocab_size, self.n_positions = config, config.vocab_size, config.n_positions
        self.width, self.n_heads, self.kv_heads = config.n_embd, config.n_head, config.n_head
        self.head_size = config.n_embd // config.n_head
        self.block_width, self.pass_width = 16 * config.n_embd, 12 * config.n_embd
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

    @property
    def embeddings(self) -> list[nn.Embedding]:
        return [self.wte, self.wpe]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.h

    @property
    def final_norm(self) -> nn.Module:
        return self.ln_f

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See `Decoder.embed`."""
        return self.drop(self.wte(ids) + self.wpe(positions))

    @classmethod
    def read_published(cls, folder: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Decoder.read_published`.

        Where attention is scaled by the inverse of the layer's number, too, the query weights become smaller instead.
        """
        content, tensors = read_folder(folder)
        by_layer = content.get("scale_attn_by_inverse_layer_idx") is True
        if by_layer:
            content["scale_attn_by_inverse_layer_idx"] = False
        check_published(content, folder, model_type="gpt2", fixed=FIXED_FIELDS)
        for alias, name in ALIASES.items():
            if alias in content:
                value = content.pop(alias)
                if content.setdefault(name, value) != value:
                    both = f"{name}={content[name]!r:.80} and {alias}={value!r:.80}"
                    raise ValueError(f"{folder}: {CONFIG_FILE} has {both}: names of one field, which must be equal")
        named = renamed(tensors, own_name, folder)
        for name, tensor in named.items() if by_layer else ():
            layer = re.fullmatch(r"h\.([0-9]{1,9})\.attn\.c_attn\.(weight|bias)", name)
            if layer and tensor.ndim and tensor.is_floating_point():
                named[name] = tensor.float()
                named[name][..., : tensor.size(-1) // 3] *= 1 / (int(layer[1]) + 1)
        return content, named

    @classmethod
    def read_config(cls, content: Mapping[str, Any], stored: int) -> GPT2Config:
        """See `Decoder.read_config`."""
        return config_from_json(GPT2Config, content, "n_layer", stored // LAYER_TENSORS)

    def described(self, head: Literal["lm", "score"], dtype: torch.dtype) -> dict[str, Any]:
        """See `Decoder.described`."""
        content = {
            "architectures": ["GPT2LMHeadModel" if head == "lm" else "GPT2ForSequenceClassification"],
            "model_type": "gpt2",
            **dataclasses.asdict(self.config),
            "n_ctx": self.config.n_positions,  # what llama.cpp's converter reads
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        config = published_config(content, self.origin)
        if self.config.vocab_size <= TRANSFORMERS_EOS:  # no token of this vocabulary
            config = {"bos_token_id": None, "eos_token_id": None, **config}
        return config


def own_name(published: str) -> str | None:
    """A published tensor's name in the model's form; None for the causal masks that old versions stored."""
    if published.endswith((".attn.bias", ".attn.masked_bias")):
        return None
    return published.removeprefix("transformer.")
