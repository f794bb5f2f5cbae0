"""Llama from scratch, and its relatives Qwen2, Qwen3 and Mistral: token ids to hidden states to logits.

The architecture is Touvron et al. 2023, "LLaMA": RMSNorm before attention and MLP (Zhang & Sennrich 2019), rotary
position embeddings (see `rope`), SwiGLU (Shazeer 2020), and grouped-query attention (Ainslie et al. 2023). Qwen2 has a
bias on queries, keys and values besides, Qwen3 an RMSNorm of each query and key. Parameter names are those of the
published checkpoints without `model.` (`layers.0.self_attn.q_proj`, ...).

Shapes: B batch, T tokens of this call, S tokens in the cache and this call together, N packed tokens, C width, nh
heads, hs head size, V vocabulary.

Left out: sliding windows, mixtures of experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.common import validation
from minirlhf.io.files import StrPath
from minirlhf.io.model_folder import CONFIG_FILE, check_published, published_config, read_folder, renamed
from minirlhf.models.decoder import BlockInputs, Decoder
from minirlhf.models.layers import ACTIVATIONS, attention, config_from_json, global_rng_kept, normal_init
from minirlhf.models.rope import RopeConfig, Rotary, frequencies, rotary, rotate

FAMILIES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}  # model_type -> class prefix
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "max_position_embeddings")  # fmt: skip
# Fields that mean something for some families only.
OF_FAMILIES = {"attention_bias": ("llama", "qwen3"), "mlp_bias": ("llama",)}
LAYER_TENSORS = 9  # of one block without biases


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of a published `config.json` that decide the computation. Raises ValueError for a bad one."""

    model_type: str = "llama"  # a name in FAMILIES
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008  # width of the MLP
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None  # None: num_attention_heads
    head_dim: int | None = None  # None: hidden_size / num_attention_heads
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False  # False: the LM head has a weight of its own
    attention_bias: bool = False  # of all four projections; Qwen2 has one of three in any case
    mlp_bias: bool = False
    attention_dropout: float = 0.0
    rope_parameters: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        validation.require_one_of(self, "model_type", FAMILIES)
        validation.require_positive_ints(self, *SIZES)
        validation.require_bools(self, "tie_word_embeddings", "attention_bias", "mlp_bias")
        for name, families in OF_FAMILIES.items():
            fine = self.model_type in families or not getattr(self, name)
            validation.require(self, name, fine, f"False unless model_type is {' or '.join(families)}")
        validation.require_rates(self, "attention_dropout")
        validation.require_fraction(self, "rms_norm_eps")
        validation.require_above(self, 0, "initializer_range")
        validation.require_one_of(self, "hidden_act", ACTIVATIONS)
        heads = self.num_attention_heads
        if self.num_key_value_heads is not None:
            validation.require_positive_ints(self, "num_key_value_heads")
            divides = heads % self.num_key_value_heads == 0
            validation.require(self, "num_key_value_heads", divides, f"a divisor of num_attention_heads={heads}")
        if self.head_dim is None:
            whole = self.hidden_size % heads == 0
            validation.require(self, "hidden_size", whole, f"a multiple of num_attention_heads={heads}")
        else:
            validation.require_positive_ints(self, "head_dim")
        validation.require(self, "head_dim", self.head_size % 2 == 0, "even, since pairs of features are turned")
        validation.require(self, "rope_parameters", isinstance(self.rope_parameters, RopeConfig), "a RopeConfig")

    @property
    def kv_heads(self) -> int:
        """Heads with keys and values of their own."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def head_size(self) -> int:
        """Features of a head."""
        return self.head_dim or self.hidden_size // self.num_attention_heads


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 in between, also for fp64, as in transformers."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, hs = config.hidden_size, config.head_size
        bias = config.attention_bias or config.model_type == "qwen2"
        self.head_size, self.dropout = hs, config.attention_dropout
        self.q_proj = nn.Linear(C, config.num_attention_heads * hs, bias)
        self.k_proj = nn.Linear(C, config.kv_heads * hs, bias)
        self.v_proj = nn.Linear(C, config.kv_heads * hs, bias)
        self.o_proj = nn.Linear(config.num_attention_heads * hs, C, config.attention_bias)
        normed = config.model_type == "qwen3"
        self.q_norm, self.k_norm = (RMSNorm(hs, config.rms_norm_eps) if normed else None for _ in "qk")

    def forward(self, x: Tensor, inputs: BlockInputs, layer: int) -> Tensor:
        packing, heads = inputs.packing, (-1, self.head_size)
        # (B, T, heads, hs), or (N, heads, hs)
        q, k, v = (part(x).unflatten(-1, heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if packing is not None:
            q, k, v = (packing.unpack(part.flatten(-2)).unflatten(-1, heads) for part in (q, k, v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, nh, T, hs), of k and v fewer heads
        assert inputs.rotary is not None
        q, k = (rotate(part, inputs.rotary).to(v.dtype) for part in (q, k))  # a norm's weight may be of another type
        if inputs.cache is not None:
            k, v = inputs.cache.extend(layer, k, v)  # (B, kv heads, S, hs)
        # After others in a cache it is one token, which may see all. (No sizes: to the compiler they are symbols.)
        causal = inputs.allowed is None and (inputs.cache is None or inputs.cache.length == 0)
        y = attention(q, k, v, inputs.allowed, self.dropout if self.training else 0.0, is_causal=causal)
        y = y.transpose(1, 2).flatten(2)  # (B, T, nh * hs)
        return self.o_proj(y if packing is None else packing.pack(y))


class MLP(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        C, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(C, inner, config.mlp_bias)
        self.up_proj = nn.Linear(C, inner, config.mlp_bias)
        self.down_proj = nn.Linear(inner, C, config.mlp_bias)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, inputs: BlockInputs, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), inputs, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(Decoder):
    """Llama, Qwen2, Qwen3 or Mistral with an LM head: `model(ids, attention_mask=None) -> logits (B, T, V)`.

    seed: of the generator that draws the initial weights.
    """

    prefix, trunk = "model.", ("embed_tokens", "layers", "norm")
    config: LlamaConfig

    def __init__(self, config: LlamaConfig, seed: int = 0):
        super().__init__()
        self.config, self.vocab_size, self.n_positions = config, config.vocab_size, config.max_position_embeddings
        self.width = C = config.hidden_size
        self.n_heads, self.kv_heads, self.head_size = config.num_attention_heads, config.kv_heads, config.head_size
        q, kv, inner = self.n_heads * self.head_size, self.kv_heads * self.head_size, config.intermediate_size
        norms = 3 * (q + kv) if config.model_type == "qwen3" else 0
        self.block_width, self.pass_width = 6 * C + 3 * q + 2 * kv + norms + 4 * inner, 3 * C + max(5 * q, 3 * inner)
        with global_rng_kept():
            self.embed_tokens = nn.Embedding(config.vocab_size, C)
            self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
            self.norm = RMSNorm(C, config.rms_norm_eps)
            self.lm_head = None if config.tie_word_embeddings else nn.Linear(C, config.vocab_size, bias=False)
        normal_init(self, config.initializer_range, torch.Generator().manual_seed(seed))
        # No buffer: it stays in fp32 when the model is cast.
        self._frequencies, self._rotary_scale = frequencies(config.rope_parameters, self.head_size, self.n_positions)

    @property
    def embeddings(self) -> list[nn.Embedding]:
        return [self.embed_tokens]

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.norm

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """See `Decoder.embed`."""
        return self.embed_tokens(ids)

    def rotary(self, positions: Tensor) -> Rotary:
        """See `Decoder.rotary`."""
        if self._frequencies.device != positions.device:  # once: a CUDA graph cannot copy from the CPU
            self._frequencies = self._frequencies.to(positions.device)
        return rotary(positions, self._frequencies, self._rotary_scale)

    @classmethod
    def read_published(cls, folder: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """See `Decoder.read_published`."""
        content, tensors = read_folder(folder)
        check_published(content, folder, model_type=tuple(FAMILIES), fixed={"is_causal": (True,)})
        family = content.setdefault("model_type", "llama")
        if missing := [name for name in SIZES if name not in content]:
            raise ValueError(f"{folder}: {CONFIG_FILE} lacks {', '.join(missing)}")
        kinds = kinds if isinstance(kinds := content.get("layer_types"), list) else [kinds]
        windowed = content.get("use_sliding_window") or "sliding_attention" in kinds
        # Absent, the window of a Mistral is one of 4096 tokens; Qwen's counts only where it is switched on.
        if windowed or (family == "mistral" and content.get("sliding_window", 4096) is not None):
            problem = f"{folder}: {CONFIG_FILE} has sliding_window={content.get('sliding_window', 4096)!r:.40}"
            raise ValueError(f"{problem}, which is not supported; for texts no longer than it, set it to null, "
                             "use_sliding_window to false, and max_position_embeddings to its value")  # fmt: skip
        if other := [kind for kind in kinds if kind not in (None, "full_attention")]:
            raise ValueError(f"{folder}: {CONFIG_FILE} has {other[0]!r:.80} in layer_types, not only full_attention")
        return content, renamed(tensors, lambda n: None if n.endswith("rotary_emb.inv_freq") else n, folder)

    @classmethod
    def read_config(cls, content: Mapping[str, Any], stored: int) -> LlamaConfig:
        """See `Decoder.read_config`."""
        other = {name for name, families in OF_FAMILIES.items() if content["model_type"] not in families}
        known = {name: value for name, value in content.items() if name not in other}
        known["rope_parameters"] = RopeConfig.from_json(content)
        return config_from_json(LlamaConfig, known, "num_hidden_layers", stored // LAYER_TENSORS)

    def described(self, head: Literal["lm", "score"], dtype: torch.dtype) -> dict[str, Any]:
        """See `Decoder.described`."""
        c, rope = self.config, self.config.rope_parameters.to_json()
        # Absent, the number of heads with keys is another one to transformers for some families, and Qwen3's size 128.
        sizes = {"num_key_value_heads": c.kv_heads, "head_dim": c.head_size if c.model_type == "qwen3" else c.head_dim}
        fields = {**dataclasses.asdict(c), **sizes}.items()
        of_head = {"lm": "ForCausalLM", "score": "ForSequenceClassification"}[head]
        content = {
            "architectures": [FAMILIES[c.model_type] + of_head],
            **{n: x for n, x in fields if x is not None and c.model_type in OF_FAMILIES.get(n, FAMILIES)},
            "rope_parameters": rope,
            "rope_theta": c.rope_parameters.rope_theta,  # with the next one, for readers of before transformers 5
            "rope_scaling": None if c.rope_parameters.rope_type == "default" else rope,
            "dtype": str(dtype).removeprefix("torch."),
        }
        if c.model_type == "mistral":
            content["sliding_window"] = None
        # Or transformers takes its default, which may be any token of this vocabulary.
        return {"bos_token_id": None, "eos_token_id": None, **published_config(content, self.origin)}
