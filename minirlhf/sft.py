"""Supervised fine-tuning (stage 1 of InstructGPT, Ouyang et al. 2022): next-token training on texts.

The same code trains a GPT-2 from random weights, as for the starter weights that ship.

Left out: prompt/response pairs with the loss on the response only, packing, gradient accumulation, resuming.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.batching import bucketed_batches, length_sorted_batches, right_pad
from minirlhf.models.gpt2 import GPT2
from minirlhf.optimization import FitConfig, eval_mode, fit, resolve_device
from minirlhf.tokenizer import Tokenizer
from minirlhf.validation import require


@dataclass(frozen=True)
class SFTConfig(FitConfig):
    """Settings of supervised fine-tuning. Raises ValueError for a bad one."""

    max_length: int = 128  # tokens a text, [CLS] and [SEP] included; longer texts are cut
    tokens_per_batch: int = 4096  # padding included

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "max_length", type(self.max_length) is int and self.max_length >= 2, "an integer of at least 2")
        fits = type(self.tokens_per_batch) is int and self.tokens_per_batch >= self.max_length
        require(self, "tokens_per_batch", fits, f"an integer of at least max_length={self.max_length}")


def train_sft(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    config: SFTConfig | None = None,
    on_step: Callable[[float, float], None] | None = None,
) -> None:
    """Train a GPT-2 in place to continue such texts; it is left in eval mode.

    Each text becomes [CLS] ... [SEP], or ... <|endoftext|>; the loss is the mean negative log-likelihood in nats of
    every token but the first, the end included where the text was not cut.
    on_step: called after every optimizer step with the progress in (0, 1] and the loss.
    Raises ValueError for no texts, or a `max_length` beyond the model's positions.
    """
    config = config or SFTConfig()
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError("texts must be a list with at least one text: there is nothing to train on")
    if config.max_length > model.config.n_positions:
        raise ValueError(f"max_length={config.max_length} exceeds the model's {model.config.n_positions} positions")
    model.to(resolve_device(config.device))
    sequences = encode_for_lm(tokenizer, texts, config.max_length)
    generator = torch.Generator().manual_seed(config.seed)

    def epoch_batches(epoch: int) -> list[list[int]]:
        return bucketed_batches([len(s) for s in sequences], config.tokens_per_batch, generator)

    def loss_of(batch: list[int]) -> Tensor:
        nll, count = token_nll(model, [sequences[i] for i in batch], tokenizer.pad_id)
        return nll.sum() / count

    fit(model, epoch_batches, loss_of, config, on_step)


def encode_for_lm(tokenizer: Tokenizer, texts: Sequence[str], max_length: int) -> list[list[int]]:
    """Each text with its end, cut to `max_length` tokens (a cut text has no [SEP]: it does not end there)."""
    return [ids[:max_length] for ids in tokenizer.encode_documents(texts)]


def token_nll(model: GPT2, sequences: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, int]:
    """Negative log-likelihoods (N,) in nats, fp32, of all tokens but each sequence's first, and their number N."""
    ids, mask = right_pad(sequences, pad_id)
    device = model.wte.weight.device
    ids, mask = ids.to(device), mask.to(device)
    hidden = model.hidden_states(ids)[:, :-1]  # right padding: causal attention never reads it
    predicted = mask[:, 1:].bool()
    logits = model.lm_logits(hidden[predicted]).float()  # (N, V)
    return F.cross_entropy(logits, ids[:, 1:][predicted], reduction="none"), int(predicted.sum())


@torch.no_grad()
def perplexity(
    model: GPT2, tokenizer: Tokenizer, texts: Sequence[str], max_length: int = 128, batch_size: int = 64
) -> dict[str, float]:
    """Perplexity of texts, each cut to `max_length` tokens.

    Returns {"token": ..., "character": ...}: exp of the total negative log-likelihood over the number of predicted
    tokens, and over the number of characters they spell (an end of text counts as one, white space as none).
    Raises ValueError for no texts.
    """
    if isinstance(texts, str) or len(texts) == 0:
        raise ValueError("texts must be a list with at least one text")
    if max_length < 2 or batch_size < 1:
        raise ValueError(f"max_length must be at least 2 and batch_size at least 1, got {max_length} and {batch_size}")
    sequences = encode_for_lm(tokenizer, texts, max_length)
    total, tokens = 0.0, 0
    with eval_mode(model):
        for batch in length_sorted_batches([len(s) for s in sequences], batch_size):
            nll, count = token_nll(model, [sequences[i] for i in batch], tokenizer.pad_id)
            total, tokens = total + nll.double().sum().item(), tokens + count
    characters = sum(tokenizer.width(i) for sequence in sequences for i in sequence[1:])
    return {"token": math.exp(total / tokens), "character": math.exp(total / characters)}
