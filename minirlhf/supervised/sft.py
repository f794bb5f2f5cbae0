"""Supervised fine-tuning (stage 1 of InstructGPT, Ouyang et al. 2022): next-token training on demonstrations.

A demonstration is a text, a prompt with a response, or a chat; the loss is on the response only, or on the turns of
the assistant. The same code trains a GPT-2 from random weights, as for the starter weights that ship.

Left out: windows over texts longer than the context (they are cut, with a warning).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.validation import require_bools, require_config, require_positive_ints
from minirlhf.device.precision import PRECISION_SETTINGS, full_precision
from minirlhf.device.precision_choice import choose_precision
from minirlhf.device.processes import processes
from minirlhf.device.random import eval_mode
from minirlhf.generation.generate import language_model
from minirlhf.models.decoder import Decoder
from minirlhf.models.lora import add_lora
from minirlhf.models.lora_config import LoRAConfig
from minirlhf.models.probes import language_model_probe
from minirlhf.models.sharded import gathered, initial_device
from minirlhf.supervised.loop import FitConfig, SupervisedTrainer, check_positions
from minirlhf.text.batching import bucketed_batches, length_sorted_batches, packed_rows, right_pad
from minirlhf.text.demonstrations import Conversation, Demonstration
from minirlhf.text.text_files import listed
from minirlhf.text.tokenizer import Tokenizer, require_tokenizer

Row = Sequence[int]  # the sequences, by number, that stand in one row of a batch
MicroBatch = Sequence[Row]
EXAMPLE = 'give a list of texts or Demonstrations, or read_demonstrations("texts.jsonl")'


@dataclass(frozen=True)
class SFTConfig(FitConfig):
    """Settings of supervised fine-tuning. Raises ValueError with the field, the value and what is allowed.

    An optimizer step sees about `tokens_per_batch` * `accumulation` tokens; the loss is the mean over those predicted.
    """

    PRECISIONS: ClassVar[tuple[str, ...]] = PRECISION_SETTINGS

    precision: str = "auto"  # fp32, tf32 (on a GPU), bf16 or fp16, over fp32 weights; auto: see `precision_choice`
    accumulation: int = 1  # forward passes an optimizer step
    packing: bool = False  # several sequences a row, none of which attends to another; rows have max_length tokens
    lora: LoRAConfig | None = None  # adapters that are trained in the place of the weights

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive_ints(self, "accumulation")
        require_bools(self, "packing")
        object.__setattr__(self, "lora", LoRAConfig.of(self.lora))


@dataclass(frozen=True)
class LMSequence:
    """Token ids to learn from.

    first: index of the first token that is predicted, at least 1, below len(ids). others: ranges (start, end) of
    tokens behind it that are read only, such as the turns of a chat's user.
    """

    ids: list[int]
    first: int = 1
    others: tuple[tuple[int, int], ...] = ()

    @property
    def predicted(self) -> list[int]:
        """The indices of the tokens that are predicted."""
        every = list(range(self.first, len(self.ids)))
        return every if not self.others else [i for i in every if not any(a <= i < b for a, b in self.others)]


class SFTTrainer(SupervisedTrainer[Sequence[MicroBatch]]):
    """Fine-tuning of a decoder in place; `runs.Run` saves it and goes on with it.

    demonstrations: texts, Demonstrations or Conversations. The loss is the mean negative log-likelihood in nats of all
        tokens of a text but the first, or of all tokens of a response or of the assistant's turns, the end included
        where the text was not cut.
    Warns with a count of texts that are cut, or are left out because no token of their response fits into `max_length`.
    Raises ValueError for no demonstrations, none with anything to predict, a tokenizer that does not fit the model, or
    a text of more tokens than the model has positions.
    """

    kind = "sft"
    model: Decoder
    config: SFTConfig

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, demonstrations: Sequence[Demonstration | Conversation | str],
        config: SFTConfig | None = None,
    ):  # fmt: skip
        config = require_config(config, SFTConfig)
        require_tokenizer(tokenizer)
        model = language_model(model)
        model.fit_vocabulary(len(tokenizer))
        encoded = encode_demonstrations(tokenizer, demonstrations)
        self.sequences = cut(encoded, config.max_length)
        if longer := sum(len(s.ids) > config.max_length for s in encoded):
            lost = len(encoded) - len(self.sequences)
            also = f"; {lost} of them have no response left and are left out" if lost else ""
            told = f"texts have more than max_length={config.max_length} tokens and are cut at the end"
            warnings.warn(f"{longer} of {len(encoded)} {told}{also}", stacklevel=2)
        if not self.sequences:
            raise ValueError(f"no response has a token within max_length={config.max_length}: nothing to learn")
        check_positions(max(len(s.ids) for s in self.sequences), model.n_positions, config.max_length)
        config = dataclasses.replace(config, lora=add_lora(model, config.lora, config.seed))
        model.to(initial_device(config))
        self.tokenizer = tokenizer
        self.width = min(config.max_length, model.n_positions)  # of a packed row
        choice = choose_precision(config.precision, model, language_model_probe(model))
        self.precision_choice = processes().broadcast("precision", choice)
        config = dataclasses.replace(config, precision=self.precision_choice.name)  # so checkpoints have it
        data = [f"{s.first} {s.ids} {s.others or ''}".rstrip() for s in self.sequences]
        super().__init__(model, config, self._epochs(config), data, model.origin)

    def _epochs(self, config: SFTConfig) -> list[list[Sequence[MicroBatch]]]:
        """The micro-batches of each optimizer step of each epoch."""
        generator, lengths = torch.Generator().manual_seed(config.seed), [len(s.ids) for s in self.sequences]
        epochs: list[list[Sequence[MicroBatch]]] = []
        for _ in range(config.epochs):
            if config.packing:
                rows = packed_rows(lengths, self.width, generator)
                size = config.tokens_per_batch // self.width
                micro_batches: list[MicroBatch] = [rows[i : i + size] for i in range(0, len(rows), size)]
            else:
                batches = bucketed_batches(lengths, config.tokens_per_batch, generator)
                micro_batches = [[[i] for i in batch] for batch in batches]
            steps = range(0, len(micro_batches), config.accumulation)
            epochs.append([micro_batches[i : i + config.accumulation] for i in steps])
        return epochs

    def parts(self, batch: Sequence[MicroBatch]) -> list[tuple[Sequence[MicroBatch], float]]:
        """This process's rows of each micro-batch, with their share of all tokens that the step predicts."""
        parts = []
        for micro in batch:
            [(rows, factor)] = self.processes.deal(len(micro))
            mine = [micro[i] for i in rows]
            parts.append(([mine], factor * self._predicted(mine)))
        total = sum(map(self._predicted, batch))
        return [(part, count / total) for part, count in parts]

    def _predicted(self, micro: MicroBatch) -> int:
        """The tokens of a micro-batch that are predicted."""
        return sum(len(self.sequences[i].predicted) for row in micro for i in row)

    def loss(self, batch: Sequence[MicroBatch]) -> Tensor:
        """The mean negative log-likelihood over the tokens of a batch that are predicted, nats."""
        rows = [[self.sequences[i] for i in row] for micro in batch for row in micro]
        nll, count = token_nll(self.model, rows, self.tokenizer.pad_id, self.width if self.config.packing else None)
        return nll.sum() / count


def encode_demonstrations(
    tokenizer: Tokenizer, demonstrations: Sequence[Demonstration | Conversation | str]
) -> list[LMSequence]:
    """Token ids of whole texts with their end, [CLS] ... [SEP] or ... <|endoftext|>, and of chats by their template.

    Prompt and response are encoded separately, as they are when the response is sampled: no token spans both.
    Raises ValueError for no demonstrations, for an empty text, and as `Tokenizer.chat_turns`.
    """
    demonstrations = listed(demonstrations, "texts", EXAMPLE, "text")
    if not demonstrations:
        raise ValueError("texts must be a list with at least one text: there is nothing to learn from")
    chats = {i: _encoded_chat(tokenizer, d) for i, d in enumerate(demonstrations) if isinstance(d, Conversation)}
    plain = iter(_encoded_texts(tokenizer, [d for d in demonstrations if not isinstance(d, Conversation)]))
    return [chats[i] if i in chats else next(plain) for i in range(len(demonstrations))]


def _encoded_chat(tokenizer: Tokenizer, chat: Conversation) -> LMSequence:
    ids: list[int] = []
    others = []
    for piece, by_assistant in tokenizer.chat_turns(chat.messages):
        if not by_assistant:
            others.append((len(ids), len(ids) + len(piece)))
        ids += piece
    first = others.pop(0)[1] if others and others[0][0] == 0 else 1
    return LMSequence(ids, max(first, 1), tuple(others))


def _encoded_texts(tokenizer: Tokenizer, texts: Sequence[Demonstration | str]) -> list[LMSequence]:
    if not texts:
        return []
    pairs = [(d.prompt, d.response) if isinstance(d, Demonstration) else ("", d) for d in texts]
    responses = tokenizer.encode_documents([response for _, response in pairs])
    prompts = iter(tokenizer.encode_documents([prompt for prompt, _ in pairs if prompt]))
    opening = len(tokenizer.model.opening)
    found = []
    for (prompt, _), response in zip(pairs, responses, strict=True):
        before = next(prompts)[:-1] if prompt else response[:opening]
        found.append(LMSequence([*before, *response[opening:]], max(len(before), 1)))
    return found


def cut(sequences: Sequence[LMSequence], max_length: int) -> list[LMSequence]:
    """Sequences cut to `max_length` tokens; those with nothing to predict are left out.

    A text that is cut has no end token: it does not end there.
    """
    shorter = [dataclasses.replace(s, ids=s.ids[:max_length]) for s in sequences]
    return [s for s in shorter if s.predicted]


def token_nll(
    model: Decoder, rows: Sequence[Sequence[LMSequence]], pad_id: int, width: int | None = None
) -> tuple[Tensor, int]:
    """Negative log-likelihoods (N,) in nats of all tokens that are predicted, row after row, and their number.

    In fp32; in fp64 for a model in fp64.

    rows: the sequences that stand one after the other in each row; none attends to another, and each has positions
        from 0, so that it has the same likelihoods as in a row of its own.
    width: tokens a row is padded to; None: as many as the longest has.
    """
    ids = right_pad([[token for s in row for token in s.ids] for row in rows], pad_id)[0]
    ids = F.pad(ids, (0, max(0, (width or 0) - ids.size(1))), value=pad_id)
    predicted = torch.zeros_like(ids, dtype=torch.bool)
    segments = torch.full_like(ids, -1)  # which sequence of its row a token belongs to; padding: one more
    for n, row in enumerate(rows):
        start = 0
        for number, s in enumerate(row):
            predicted[n, [start + i for i in s.predicted]] = True
            segments[n, start : start + len(s.ids)] = number
            start += len(s.ids)
    ids, predicted = ids.to(model.device), predicted[:, 1:].to(model.device)
    packed = any(len(row) > 1 for row in rows)  # else causal attention never reads the padding on the right
    hidden = model.hidden_states(ids, segments=segments.to(model.device) if packed else None)
    logits = full_precision(model.lm_logits(hidden[:, :-1][predicted]))  # (N, V)
    return F.cross_entropy(logits, ids[:, 1:][predicted], reduction="none"), int(predicted.sum())


@torch.no_grad()
def perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Sequence[Demonstration | Conversation | str],
    max_length: int = 128,
    batch_size: int = 64,
) -> dict[str, float]:
    """Perplexity of texts, or of responses after their prompts, each cut to `max_length` tokens in all.

    Of several processes each measures some of the batches, so all must call this.
    Returns {"token": ..., "character": ...}: exp of the total negative log-likelihood over the number of predicted
    tokens, and over the number of characters they spell (an end of text counts as one, white space as none).
    Raises ValueError for no texts, or none with anything to predict within `max_length`.
    """
    if max_length < 2 or batch_size < 1:
        raise ValueError(f"max_length must be at least 2 and batch_size at least 1, got {max_length} and {batch_size}")
    sequences = cut(encode_demonstrations(tokenizer, texts), max_length)
    if not sequences:
        raise ValueError(f"no response has a token within max_length={max_length}: there is nothing to measure")

    model = gathered(model)

    def measured(batch: Sequence[int]) -> tuple[float, int]:
        nll, count = token_nll(model, [[sequences[i]] for i in batch], tokenizer.pad_id)
        return nll.double().sum().item(), count

    with eval_mode(model):
        batches = list(length_sorted_batches([len(s.ids) for s in sequences], batch_size))
        found = processes().spread("perplexity", measured, batches)
    total, tokens = sum(nll for nll, _ in found), sum(count for _, count in found)
    characters = sum(tokenizer.width(s.ids[i]) for s in sequences for i in s.predicted)
    return {"token": math.exp(total / tokens), "character": math.exp(total / characters)}
