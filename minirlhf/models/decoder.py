"""What the rest of the library asks of a decoder: a causal language model from token ids to logits.

A second architecture is one file with a subclass of `Decoder`, and one line in `loading.DECODERS`.

Shapes: B batch, T tokens of this call, S tokens in the cache and this call together, C width, V vocabulary.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minirlhf.generation.generate import TextGenerator
from minirlhf.io.files import StrPath, naming
from minirlhf.io.model_card import ModelCard, Origin
from minirlhf.io.model_folder import cast, write_folder
from minirlhf.models.adapter_folder import write_adapter
from minirlhf.models.cache import KVCache, StaticKVCache
from minirlhf.models.layers import check_vocabulary, fill, shapes_only
from minirlhf.models.lora import merged
from minirlhf.models.lora_config import LoRAConfig
from minirlhf.models.masks import causal_mask, segment_mask, segment_positions, token_positions
from minirlhf.models.packing import Packing
from minirlhf.models.rope import Rotary

if TYPE_CHECKING:
    from typing_extensions import Self


class BlockInputs(NamedTuple):
    """Inputs shared by every block of one forward pass.

    allowed: bool (B or 1, 1, T, S), which keys each token may attend to; None: all that are not after it.
    cache: to read from and to extend. packing: of the tokens that go through; None: they are (B, T, C).
    rotary: of all tokens, packed or not; None: the model has no rotary embedding.
    """

    allowed: Tensor | None
    cache: KVCache | None = None
    packing: Packing | None = None
    rotary: Rotary | None = None


class Decoder(TextGenerator, nn.Module):
    """A causal language model: `model(ids, attention_mask=None) -> logits (B, T, V)`."""

    origin: Origin | None = None  # what it was loaded from
    source: str | None = None  # the folder or name that it was loaded from, as long as it is not trained
    lora: LoRAConfig | None = None  # of its adapters, see `lora.add_lora`
    base_hash = ""  # SHA-256 of its tensors before it had adapters, and were perhaps rounded
    # Keep no activations but those between blocks; the backward pass recomputes the rest (Chen et al. 2016).
    checkpoint_activations = False

    # ---- what an architecture must provide --------------------------------------------------------------------------

    config: Any  # a dataclass with `vocab_size`, the rows of the embedding, and `tie_word_embeddings`
    vocab_size: int  # V, tokens that have a logit
    n_positions: int  # most tokens of one sequence
    width: int  # C
    n_heads: int  # attention heads of a block
    kv_heads: int  # of these, the ones with keys and values of their own
    head_size: int
    # Numbers a token, for the memory formula: what the backward pass of a block needs, but for attention's weights, and
    # what is alive at once in a pass without one.
    block_width: int
    pass_width: int
    lm_head: nn.Linear | None  # None: the embedding is the head
    prefix: str  # of published names, which `lm_head` does not have
    trunk: tuple[str, ...]  # what every head stands on: the modules' names, the token embedding first

    @property
    @abstractmethod
    def embeddings(self) -> list[nn.Embedding]:
        """The modules that make the first block's input of token ids, that of the tokens first."""

    @property
    @abstractmethod
    def blocks(self) -> nn.ModuleList:
        """The blocks, lowest first: `block(x, inputs: BlockInputs, layer: int)`, x (B, T, C), or (N, C) if packed."""

    @property
    @abstractmethod
    def final_norm(self) -> nn.Module:
        """The normalisation of the last block's output."""

    @abstractmethod
    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        """The first block's input (B, T, C) of ids (B, T) at positions (T,) or (B, T)."""

    def rotary(self, positions: Tensor) -> Rotary | None:
        """Cosines and sines for rotary embeddings at positions (T,) or (B, T); None for a model without."""
        return None

    @classmethod
    @abstractmethod
    def read_published(cls, folder: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """A folder's `config.json`, and all its tensors by their names here; raises as `from_pretrained`."""

    @classmethod
    @abstractmethod
    def read_config(cls, content: Mapping[str, Any], stored: int) -> Any:
        """The `config` of a published `config.json`, for a file of `stored` tensors; see `config_from_json`."""

    @abstractmethod
    def described(self, head: Literal["lm", "score"], dtype: torch.dtype) -> dict[str, Any]:
        """The content of `config.json` for a model with this head, with what a loaded one said besides."""

    # ---- what follows from it ---------------------------------------------------------------------------------------

    @property
    def language_model(self) -> Decoder:
        """Itself."""
        return self

    def loaded_from(self, folder: StrPath, config: Mapping[str, Any]) -> None:
        """Remember the folder and the content of its `config.json`."""
        self.folder, self.source, self.origin = folder, os.fspath(folder), Origin.of(folder, config)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """Logits (B, T, V) of the next token after each position; arguments as in `hidden_states`."""
        return self.lm_logits(self.hidden_states(ids, attention_mask, cache))

    def hidden_states(
        self,
        ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: KVCache | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """Hidden states (B, T, C) after the final normalisation.

        ids: (B, T) int64, the new tokens.
        attention_mask: (B, S), 1 at real tokens and 0 at padding, for the tokens in the cache and the new ones.
            Padding may stand on either side; positions count real tokens only; states at padding have no meaning.
            None: no padding.
        cache: a KVCache to read from and to extend by the new tokens.
        segments: (B, T) int64, which of several sequences packed into its row a token belongs to. Tokens attend to
            their own segment only, and each segment has positions from 0. None: a row is one sequence.
        Raises ValueError for ids or a mask of the wrong shape, or a sequence of more than `n_positions` real tokens.
        """
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ValueError(f"ids must be a tensor (B, T), got {ids!r:.60}")
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
        inputs = BlockInputs(allowed, cache, packing, self.rotary(positions))
        x = self.embed(ids, positions)  # (B, T, C)
        x = x if packing is None else packing.pack(x)  # (N, C)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, inputs, layer, use_reentrant=False)
            elif cache is None:
                x = block(x, inputs, layer)
            else:  # not what `torch.compile` made of it: see `compile_blocks`
                x = block.forward(x, inputs, layer)
        if cache is not None:
            cache.advance(T)
        x = self.final_norm(x)
        return x if packing is None else packing.unpack(x)  # (B, T, C)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., C)."""
        weight: Tensor = (self.embeddings[0] if self.lm_head is None else self.lm_head).weight  # (V, C), tied or not
        return F.linear(hidden, weight if self.vocab_size == len(weight) else weight[: self.vocab_size])

    def fit_vocabulary(self, n_tokens: int, name: str = "model") -> None:
        """Give logits only to the tokenizer's `n_tokens` tokens, not to rows that pad the embedding.

        Raises ValueError, with the name of the model, if the embedding has fewer rows, or too many for padding.
        """
        check_vocabulary(self.config.vocab_size, n_tokens, name)
        self.vocab_size = n_tokens

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty KVCache for `max_length` tokens a row, in the model's compute type."""
        weight: Tensor = self.embeddings[0].weight
        device = weight.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        sizes = (len(self.blocks), batch_size, self.kv_heads, max_length, self.head_size)
        return KVCache(*sizes, like=weight.new_empty(0, dtype=dtype))

    @classmethod
    def from_pretrained(cls, folder: StrPath) -> Self:
        """Load a folder in the published layout, in fp32 and in eval mode.

        Names may have the prefixes of training wrappers and `prefix` or not; `lm_head.weight` may be stored, tied or
        untied. Causal masks and a value head are dropped.
        Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one, naming file and tensor.
        """
        return cls.with_value_head(folder)[0]

    @classmethod
    def with_value_head(cls, folder: StrPath) -> tuple[Self, dict[str, Tensor]]:
        """The model of `from_pretrained`, and the tensors of TRL's value head, `v_head.*`, if the folder has one."""
        content, named = cls.read_published(folder)
        head = {n.removeprefix("v_head."): named.pop(n) for n in list(named) if n.startswith("v_head.")}
        return cls.from_tensors(folder, content, named), head

    @classmethod
    def from_trunk(cls, folder: StrPath) -> Self:
        """Load the transformer of any folder of this family, without its heads; raises as `from_pretrained`."""
        content, named = cls.read_published(folder)
        trunk = {name: tensor for name, tensor in named.items() if name.split(".")[0] in cls.trunk}
        return cls.from_tensors(folder, {**content, "tie_word_embeddings": True}, trunk)

    @classmethod
    def from_tensors(cls, folder: StrPath, content: Mapping[str, Any], named: dict[str, Tensor]) -> Self:
        """The model of what `read_published` gave for a folder; raises as `from_pretrained`."""
        with naming(folder), shapes_only():
            model = cls(cls.read_config(content, len(named)))
        head = named.pop("lm_head.weight", None) if model.config.tie_word_embeddings else None
        if head is not None:
            named.setdefault(f"{cls.trunk[0]}.weight", head)
        fill(model, named, folder)
        if head is not None and not torch.equal(model.embeddings[0].weight, head.float()):
            problem = f"lm_head.weight differs from {cls.trunk[0]}.weight, but tie_word_embeddings is not false"
            raise ValueError(f"{folder}: {problem}")
        model.loaded_from(folder, content)
        return model.eval()

    def published(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The content of `config.json`, with what a loaded one said besides, and the tensors by their published names.

        Raises ValueError if a weight is not finite in `dtype`.
        """
        names = {name: name if name.startswith("lm_head.") else self.prefix + name for name in self.state_dict()}
        tensors = {names[name]: tensor for name, tensor in self.state_dict().items()}
        return self.described("lm", dtype), cast(tensors, dtype)

    def save_pretrained(
        self, folder: StrPath, dtype: torch.dtype = torch.float32, summary: Mapping[str, Any] | None = None
    ) -> None:
        """Write `config.json`, `model.safetensors` and `README.md` in the published layout, all at one moment.

        Adapters are merged into the weights: what is written is a plain model.
        dtype: the type the weights are stored in. summary: of the training, names to JSON values.
        Raises OSError if it cannot, ValueError before writing if a weight is not finite in `dtype`.
        """
        config, tensors = merged(self).published(dtype)
        write_folder(folder, config, tensors, ModelCard(type(self).__name__, self.origin, summary))

    def save_adapter(self, folder: StrPath) -> None:
        """Write the adapters in peft's layout, `adapter_config.json` and `adapter_model.safetensors`, without the base.

        Raises ValueError for a decoder without adapters, OSError if it cannot.
        """
        write_adapter(self, folder)


def compile_blocks(*models: Decoder) -> None:
    """Let `torch.compile` compile the blocks of these models, in place, for passes over whole sequences.

    All layers share one small program with symbolic sizes, as micro-batches differ in theirs. With a key/value cache
    the blocks run as they are: a cache is one token longer each time.
    """
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=True)


def share_frozen_parameters(model: Decoder, reference: Decoder) -> None:
    """Let a reference use the memory of the model's frozen parameters.

    Raises ValueError, before anything is shared, if nothing is frozen, or a frozen parameter differs.
    """
    others = dict(reference.named_parameters())
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    if not frozen:
        raise ValueError("the reference can share only frozen parameters, but the model trains all of its parameters")
    for name, p in frozen.items():
        if name not in others or not torch.equal(p, others[name]):
            raise ValueError(f"{name} is frozen, but differs from the reference's: they cannot share it")
    for name, p in frozen.items():
        others[name].data = p.data
