"""BERT classifier from scratch: token ids to class logits, labels bound by name.

The architecture is Devlin et al. 2018, "BERT": word, position and segment embeddings, an encoder that normalises
after attention and MLP, a tanh pooler over [CLS], a linear classification head. Parameter names are those of the
published checkpoints (`bert.encoder.layer.0.attention.self.query`, ...). `uer/roberta-base-finetuned-jd-binary-chinese`
is such a model in spite of its name.

Shapes: B batch, T tokens, C width, nh heads, hs = C / nh head size, L labels.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minirlhf.common import validation
from minirlhf.common.text import printable
from minirlhf.io.files import StrPath, naming
from minirlhf.io.model_card import ModelCard, Origin
from minirlhf.io.model_folder import (
    cast,
    check_published,
    check_tensors,
    published_config,
    read_folder,
    renamed,
    write_folder,
)
from minirlhf.models.layers import (
    ACTIVATIONS,
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
FIXED_FIELDS = {"position_embedding_type": ("absolute",), "is_decoder": (False,)}
LAYER_TENSORS = 16  # of one layer
LABELS = ("negative (stars 1, 2 and 3)", "positive (stars 4 and 5)")  # of uer's published classifier


@dataclass(frozen=True)
class BertConfig:
    """The fields of a published BERT `config.json` that decide the computation. Raises ValueError for a bad one."""

    vocab_size: int = 21128
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    id2label: Mapping[int, str] = field(default_factory=lambda: dict(enumerate(LABELS)))

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_size", "intermediate_size")
        validation.require_positive_ints(self, *sizes, "num_hidden_layers", "num_attention_heads")
        validation.require_rates(self, "hidden_dropout_prob", "attention_probs_dropout_prob")
        validation.require_fraction(self, "layer_norm_eps")
        validation.require_above(self, 0, "initializer_range")
        validation.require_one_of(self, "hidden_act", ACTIVATIONS)
        heads = self.num_attention_heads
        whole = self.hidden_size % heads == 0
        validation.require(self, "hidden_size", whole, f"a multiple of num_attention_heads={heads}")
        object.__setattr__(self, "id2label", _checked_labels(self.id2label))

    @property
    def labels(self) -> list[str]:
        """Label names in the order of the logits."""
        return [self.id2label[i] for i in range(len(self.id2label))]


class BertEmbeddings(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, ids: Tensor) -> Tensor:
        positions = self.position_embeddings.weight[: ids.size(1)]  # (T, C)
        first_segment = self.token_type_embeddings.weight[0]  # (C,): a single text is all of segment 0
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + positions + first_segment))


class BertSelfAttention(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        self.n_head = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout_p = config.attention_probs_dropout_prob

    def forward(self, x: Tensor, allowed: Tensor | None, packing: Packing | None) -> Tensor:
        def heads(of_tokens: Tensor) -> Tensor:  # (B, nh, T, hs)
            whole = of_tokens if packing is None else packing.unpack(of_tokens)
            return whole.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

        dropout = self.dropout_p if self.training else 0.0
        y = attention(heads(self.query(x)), heads(self.key(x)), heads(self.value(x)), allowed, dropout)
        y = y.transpose(1, 2).flatten(2)  # (B, T, C)
        return y if packing is None else packing.pack(y)


class ResidualOutput(nn.Module):
    """Linear, dropout, then LayerNorm of the sum with the layer's input: the post-norm residual."""

    def __init__(self, n_in: int, config: BertConfig):
        super().__init__()
        self.dense = nn.Linear(n_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class BertLayer(nn.Module):
    def __init__(self, config: BertConfig):
        super().__init__()
        # The nesting spells the published names: attention.self.query, attention.output.dense, intermediate.dense.
        self.attention = nn.ModuleDict(
            {"self": BertSelfAttention(config), "output": ResidualOutput(config.hidden_size, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.intermediate_size)})
        self.output = ResidualOutput(config.intermediate_size, config)
        self.activation = ACTIVATIONS[config.hidden_act]

    def forward(self, x: Tensor, allowed: Tensor | None, packing: Packing | None = None) -> Tensor:
        x = self.attention["output"](self.attention["self"](x, allowed, packing), x)
        return self.output(self.activation(self.intermediate["dense"](x)), x)


class BertModel(nn.Module):
    """The encoder and the pooler."""

    def __init__(self, config: BertConfig):
        super().__init__()
        self.embeddings = BertEmbeddings(config)
        layers = nn.ModuleList(BertLayer(config) for _ in range(config.num_hidden_layers))
        self.encoder = nn.ModuleDict({"layer": layers})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embeddings(ids)
        # Padded queries attend and are never read.
        allowed = None if attention_mask is None else attention_mask.bool()[:, None, None, :]  # (B, 1, 1, T)
        # Rows that read both ways share nothing, but layers that work on single tokens can skip padding.
        packing = None if attention_mask is None else Packing.of(ids, attention_mask, share=False)
        x = x if packing is None else packing.pack(x)  # (N, C)
        for layer in self.encoder["layer"].children():
            x = layer(x, allowed, packing)
        return x if packing is None else packing.unpack(x)


class BertClassifier(nn.Module):
    """BERT with a classification head: `model(ids, attention_mask=None) -> logits (B, L)`.

    config: its `id2label` names the labels. seed: of the generator that draws the initial weights.
    """

    origin: Origin | None = None  # what it was loaded from

    def __init__(self, config: BertConfig, seed: int = 0):
        super().__init__()
        self.config = config
        with global_rng_kept():
            self.bert = BertModel(config)
            self.dropout = nn.Dropout(config.hidden_dropout_prob)
            self.classifier = nn.Linear(config.hidden_size, len(config.id2label))
        normal_init(self, config.initializer_range, torch.Generator().manual_seed(seed))

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Class logits (B, L).

        ids: (B, T) int64, [CLS] first, padded on the right; attention_mask: (B, T), 1 at real tokens, None: no padding.
        Raises ValueError for texts longer than `max_position_embeddings`.
        """
        return self.classify(self.hidden_states(ids, attention_mask))

    def hidden_states(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Hidden states (B, T, C) of the last layer; arguments and errors as in `forward`."""
        length, limit = ids.size(1), self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"a sequence of {length} tokens is longer than the model's {limit} positions")
        if attention_mask is not None and attention_mask.shape != ids.shape:
            raise ValueError(f"attention_mask has shape {tuple(attention_mask.shape)}, expected {tuple(ids.shape)}")
        return self.bert(ids, attention_mask)

    def classify(self, hidden: Tensor) -> Tensor:
        """Class logits (B, L) of hidden states (B, T, C), from the pooled state of [CLS]."""
        pooled = torch.tanh(self.bert.pooler["dense"](hidden[:, 0]))  # (B, C)
        return self.classifier(self.dropout(pooled))

    def fit_vocabulary(self, n_tokens: int) -> None:
        """Raise ValueError unless a tokenizer of `n_tokens` tokens fits (see `check_vocabulary`)."""
        check_vocabulary(self.config.vocab_size, n_tokens)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Vocabulary logits (..., V) of hidden states (..., C) by the word embedding, for masked-token training."""
        return F.linear(hidden, self.bert.embeddings.word_embeddings.weight)

    @classmethod
    def from_pretrained(cls, folder: StrPath) -> BertClassifier:
        """Load a folder in the published layout, in fp32 and in eval mode.

        Names may have the prefixes of training wrappers and `bert.` or not; LayerNorm's parameters are weight and bias
        or gamma and beta. The heads of the pretraining tasks, `cls.`, are dropped.
        Raises FileNotFoundError for a missing folder or file, ValueError for a damaged one, naming file and tensor, or
        one without a classification head.
        """
        content, named = _read_published(folder)
        if "classifier.weight" not in named:
            others = ", ".join(name for name in named if re.search(r"classifier\.(.+\.)?weight$", name))
            why = f"; one of another name is not read: {others[:200]}" if others else ": not yet trained to classify"
            raise ValueError(f"{folder} holds no classification head (classifier.weight){printable(why)}")
        if content.get("id2label") is None:  # no names, so none are invented
            count, said = sum(named["classifier.weight"].shape[:1]), content.get("num_labels")
            if said not in (None, count):
                raise ValueError(f"{folder}: config.json has num_labels={said!r:.80}, but {count} are stored")
            content["id2label"] = {i: f"LABEL_{i}" for i in range(count)}
        with naming(folder), shapes_only():
            model = cls(_config(content, len(named)))
        fill(model, named, folder)
        model.origin = Origin.of(folder, content)
        return model.eval()

    @classmethod
    def from_trunk(cls, folder: StrPath, id2label: Mapping[int, str], seed: int = 0) -> BertClassifier:
        """The encoder of any BERT folder with a new classification head, in eval mode.

        id2label: the labels of the new head. seed: of the generator that draws the head, and a pooler if the folder
            has none. Raises as `from_pretrained`, but needs no classification head.
        """
        content, named = _read_published(folder)
        trunk = {name: tensor for name, tensor in named.items() if name.startswith("bert.")}
        with naming(folder), shapes_only():
            model = cls(_config({**content, "id2label": id2label}, len(named)))
        new = [part for part in ("bert.pooler.dense", "classifier") if not any(name.startswith(part) for name in trunk)]
        shapes = {name: p.shape for name, p in model.state_dict().items()}
        check_tensors(trunk, {name: shapes[name] for name in shapes if not name.startswith(tuple(new))}, folder)
        generator, std = torch.Generator().manual_seed(seed), model.config.initializer_range
        for part in new:
            weight, bias = f"{part}.weight", f"{part}.bias"
            trunk[weight] = torch.empty(shapes[weight]).normal_(0.0, std, generator=generator)
            trunk[bias] = torch.zeros(shapes[bias])
        fill(model, trunk, folder)
        of_head = ("id2label", "label2id", "problem_type")
        model.origin = Origin.of(folder, {name: value for name, value in content.items() if name not in of_head})
        return model.eval()

    def save_pretrained(
        self, folder: StrPath, dtype: torch.dtype = torch.float32, summary: Mapping[str, Any] | None = None
    ) -> None:
        """Write a folder in the published layout; arguments and errors as of `Decoder.save_pretrained`."""
        write_folder(folder, *self.published(dtype), ModelCard("BertClassifier", self.origin, summary))

    def published(self, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """`config.json` and tensors in the published layout, as of `Decoder.published`."""
        content = {
            "architectures": ["BertForSequenceClassification"],
            "model_type": "bert",
            **dataclasses.asdict(self.config),
            "label2id": {label: i for i, label in enumerate(self.config.labels)},
            "torch_dtype": str(dtype).removeprefix("torch."),
        }
        return published_config(content, self.origin), cast(self.state_dict(), dtype)


def _read_published(folder: StrPath) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A BERT folder's `config.json`, and all its tensors by their names here; raises as `from_pretrained`."""
    content, tensors = read_folder(folder)
    remedy = "; a classifier of another library may be a reward as a function of texts (docs/from_trl.md)"
    check_published(content, folder, model_type="bert", fixed=FIXED_FIELDS, remedy=remedy)
    return content, renamed(tensors, _own_name, folder)


def _config(content: Mapping[str, Any], stored: int) -> BertConfig:
    return config_from_json(BertConfig, content, "num_hidden_layers", stored // LAYER_TENSORS)


def _own_name(published: str) -> str | None:
    if published.endswith("position_ids") or published.startswith("cls."):
        return None
    return f"bert.{published}" if published.startswith(("embeddings.", "encoder.", "pooler.")) else published


def _checked_labels(id2label: Any) -> dict[int, str]:
    """id2label with int keys 0 .. L-1 (JSON has them as text)."""
    try:
        labels = {int(i): str(label) for i, label in id2label.items() if isinstance(label, (str, int, float))}
    except (AttributeError, TypeError, ValueError):
        labels = {}
    if not labels or sorted(labels) != list(range(len(id2label))) or len(set(labels.values())) != len(labels):
        allowed = "map 0, 1, ... without gaps to distinct names"
        raise ValueError(f"BertConfig.id2label must {allowed}, got {id2label!r:.200}")
    return labels
