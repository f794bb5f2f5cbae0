"""Supervised fine-tuning (stage 1 of InstructGPT, Ouyang et al. 2022): next-token training on demonstrations.

A demonstration is a text, or a prompt with a response, of which the loss is on the response only. The same code trains
a GPT-2 from random weights, as for the starter weights that ship.

Left out: several GPUs, and texts longer than the context cut into windows (they are cut at the end, with a warning).
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.validation import require, require_bools, require_positive_ints
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import PRECISION_SETTINGS
from minirlhf.device.precision_choice import choose_precision
from minirlhf.device.random import eval_mode
from minirlhf.io.model_card import Origin
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.probes import language_model_probe
from minirlhf.runs.checkpoint_folder import read_checkpoint, write_checkpoint
from minirlhf.supervised.fit_state import FitState
from minirlhf.supervised.loop import FitConfig, fit
from minirlhf.text.batching import bucketed_batches, length_sorted_batches, packed_rows, right_pad
from minirlhf.text.demonstrations import Demonstration
from minirlhf.text.tokenizer import Tokenizer

FORMAT = "sft-1"  # of the checkpoints
Row = Sequence[int]  # the sequences, by number, that stand in one row of a batch
MicroBatch = Sequence[Row]


@dataclass(frozen=True)
class SFTConfig(FitConfig):
    """Settings of supervised fine-tuning. Raises ValueError for a bad one.

    An optimizer step sees about `tokens_per_batch` * `accumulation` tokens; the loss is the mean over those predicted.
    """

    PRECISIONS: ClassVar[tuple[str, ...]] = PRECISION_SETTINGS

    precision: str = "auto"  # fp32, tf32 (on a GPU), bf16 or fp16, over fp32 weights; auto: see `precision_choice`
    max_length: int = 128  # tokens a text, [CLS] and [SEP] included; longer texts are cut
    tokens_per_batch: int = 4096  # of one forward pass, padding included
    accumulation: int = 1  # forward passes an optimizer step
    save_freq: int = 100  # optimizer steps from one checkpoint of an `SFTRun` to the next
    packing: bool = False  # several texts a row of max_length tokens, none of which sees another; or one, padded

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "max_length", type(self.max_length) is int and self.max_length >= 2, "an integer of at least 2")
        fits = type(self.tokens_per_batch) is int and self.tokens_per_batch >= self.max_length
        require(self, "tokens_per_batch", fits, f"an integer of at least max_length={self.max_length}")
        require_positive_ints(self, "accumulation", "save_freq")
        require_bools(self, "packing")


@dataclass(frozen=True)
class LMSequence:
    """Token ids to learn from. first: index of the first token that is predicted, at least 1, below len(ids)."""

    ids: list[int]
    first: int = 1


class SFTTrainer:
    """Fine-tuning of a GPT-2 in place, which can be saved between any two steps and resumed.

    demonstrations: texts, or Demonstrations.
    Warns with a count of texts that are cut, or are left out, as no token of their response fits into `max_length`.
    Raises ValueError for no demonstrations, none with anything to predict, a tokenizer that does not fit the model,
    or a `max_length` beyond the model's positions.
    """

    def __init__(
        self,
        model: GPT2,
        tokenizer: Tokenizer,
        demonstrations: Sequence[Demonstration | str],
        config: SFTConfig | None = None,
    ):
        self.config = config or SFTConfig()
        _check_length(model, self.config.max_length)
        model.fit_vocabulary(len(tokenizer))
        encoded = encode_demonstrations(tokenizer, demonstrations)
        self.sequences = cut(encoded, self.config.max_length)
        _warn_of_losses(encoded, self.sequences, self.config.max_length)
        if not self.sequences:
            raise ValueError(f"no response has a token within max_length={self.config.max_length}: nothing to learn")
        self.model = model.to(resolve_device(self.config.device))
        self.precision_choice = choose_precision(self.config.precision, model, language_model_probe(model))
        self.config = dataclasses.replace(self.config, precision=self.precision_choice.name)  # so checkpoints have it
        self.tokenizer = tokenizer
        self.steps = 0  # optimizer steps done
        self.state = FitState()
        self._generator = torch.Generator().manual_seed(self.config.seed)  # of the batches
        self._epoch_start = self._generator.get_state()

    def train(self, on_step: Callable[[float, float], None] | None = None) -> None:
        """Train to the end of the last epoch; the model is left in eval mode.

        The loss is the mean negative log-likelihood in nats of all tokens of a text but the first, or of all tokens of
        a response, the end included where the text was not cut.
        on_step: called after every optimizer step with the progress in (0, 1] and the loss. What it raises ends the
            training between two steps.
        Raises FloatingPointError at a loss or gradient that is not finite.
        """

        def stepped(progress: float, loss: float) -> None:
            self.steps += 1
            if on_step is not None:
                on_step(progress, loss)

        fit(self.model, self._batches, self._loss, self.config, stepped, self._shares, self.state)

    def _batches(self, epoch: int) -> list[list[MicroBatch]]:
        """The micro-batches of each optimizer step of an epoch."""
        c, lengths = self.config, [len(s.ids) for s in self.sequences]
        self._epoch_start = self._generator.get_state()
        micro_batches: list[list[Row]]
        if c.packing:
            rows = packed_rows(lengths, c.max_length, self._generator)
            size = c.tokens_per_batch // c.max_length
            micro_batches = [list(rows[i : i + size]) for i in range(0, len(rows), size)]
        else:
            batches = bucketed_batches(lengths, c.tokens_per_batch, self._generator)
            micro_batches = [[[i] for i in batch] for batch in batches]
        return [list(micro_batches[i : i + c.accumulation]) for i in range(0, len(micro_batches), c.accumulation)]

    def _shares(self, batch: Sequence[MicroBatch]) -> list[tuple[list[MicroBatch], float]]:
        """The micro-batches of a step, with their shares of all tokens that are predicted in it."""
        counts = [sum(len(self.sequences[i].ids) - self.sequences[i].first for row in micro for i in row)
                  for micro in batch]  # fmt: skip
        return [([micro], count / sum(counts)) for micro, count in zip(batch, counts, strict=True)]

    def _loss(self, batch: Sequence[MicroBatch]) -> Tensor:
        """The mean negative log-likelihood over the tokens of a batch that are predicted."""
        rows = [[self.sequences[i] for i in row] for micro in batch for row in micro]
        width = self.config.max_length if self.config.packing else None
        nll, count = token_nll(self.model, rows, self.tokenizer.pad_id, width)
        return nll.sum() / count

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, folder: str | os.PathLike[str], log: Mapping[str, int] | None = None) -> None:
        """Write everything that the next step depends on into a folder, which is replaced as one; between two steps.

        The folder is also a model folder. The demonstrations, which never change, are not in it: their hash is.
        log: how long the files of a run's log are, as `RunLog.flush` says.
        Raises FileExistsError for a folder that holds something else, OSError if it cannot be written.
        """
        tensors = {**self.state.tensors(), "generator.batches": self._epoch_start}
        counters = {
            "format": FORMAT,
            "steps": self.steps,
            **self.state.counters(),
            "data": {"sha256": _hash(self.sequences), "sequences": len(self.sequences)},
            "config": dataclasses.asdict(self.config),
            "origin": None if self.model.origin is None else dataclasses.asdict(self.model.origin),
            "log": log,
        }

        def write_model(staged: Path) -> None:
            self.model.save_pretrained(staged)
            self.tokenizer.save_pretrained(staged)

        write_checkpoint(folder, tensors, counters, write_model)

    @classmethod
    def resume(
        cls, folder: str | os.PathLike[str], demonstrations: Sequence[Demonstration | str], device: str | None = None
    ) -> SFTTrainer:
        """The trainer that `save_checkpoint` wrote: on the CPU it goes on bit for bit as if it had not been stopped.

        demonstrations: the same ones in the same order. device: another one than the run began on.
        Raises FileNotFoundError for a missing folder, ValueError for a damaged checkpoint or other demonstrations.
        """
        tensors, counters = read_checkpoint(folder, FORMAT)
        model, tokenizer = GPT2.from_pretrained(folder), Tokenizer.from_pretrained(folder)
        try:  # a check sum says that nothing was changed since, not that we wrote it
            settings = {**counters["config"], "betas": tuple(counters["config"]["betas"])}
            config = SFTConfig(**{**settings, **({} if device is None else {"device": device})})
            origin, data, steps = counters["origin"], counters["data"], int(counters["steps"])
            model.origin = None if origin is None else Origin(**origin)  # of the run, not this folder
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what is cut was said at the beginning
                trainer = cls(model, tokenizer, demonstrations, config)
            if _hash(trainer.sequences) != data["sha256"]:
                raise ValueError(
                    f"it was trained on other demonstrations: on {data['sequences']} of them, {len(trainer.sequences)} "
                    "are given, and they are not the same tokens in the same order"
                )
            trainer.state.load(tensors, counters)
            trainer._generator.set_state(tensors["generator.batches"])
        except (KeyError, TypeError, RuntimeError, ValueError) as error:
            raise ValueError(f"{folder} cannot be resumed: {error}") from error
        trainer.steps, trainer._epoch_start = steps, tensors["generator.batches"]
        return trainer


# ---- sequences -------------------------------------------------------------------------------------------------------


def encode_demonstrations(tokenizer: Tokenizer, demonstrations: Sequence[Demonstration | str]) -> list[LMSequence]:
    """Token ids of texts with their end, [CLS] ... [SEP], or ... <|endoftext|>, whole.

    Prompt and response are encoded apart, as they are when the response is sampled: no token spans both.
    Raises ValueError for none, and for an empty text.
    """
    if isinstance(demonstrations, str) or len(demonstrations) == 0:
        raise ValueError("texts must be a list with at least one text: there is nothing to learn from")
    pairs = [(d.prompt, d.response) if isinstance(d, Demonstration) else ("", d) for d in demonstrations]
    responses = tokenizer.encode_documents([response for _, response in pairs])
    prompts = iter(tokenizer.encode_documents([prompt for prompt, _ in pairs if prompt]))
    opening = len(tokenizer.model.opening)
    found = []
    for (prompt, _), response in zip(pairs, responses, strict=True):
        before = next(prompts)[:-1] if prompt else response[:opening]
        found.append(LMSequence([*before, *response[opening:]], max(len(before), 1)))
    return found


def cut(sequences: Sequence[LMSequence], max_length: int) -> list[LMSequence]:
    """Sequences cut to `max_length` tokens (a text that is cut has no [SEP]: it does not end there).

    Those are left out that have nothing to predict within it.
    """
    return [LMSequence(s.ids[:max_length], s.first) for s in sequences if s.first < min(len(s.ids), max_length)]


# ---- likelihood ------------------------------------------------------------------------------------------------------


def token_nll(
    model: GPT2, rows: Sequence[Sequence[LMSequence]], pad_id: int, width: int | None = None
) -> tuple[Tensor, int]:
    """Negative log-likelihoods (N,) in nats, fp32, of all tokens that are predicted, row after row, and their number.

    rows: the sequences that stand one after the other in each row; none attends to another, and each has positions
        from 0, so that it has the same likelihoods as in a row of its own.
    width: tokens a row is padded to; None: as many as the longest has.
    """
    device = model.device
    ids, mask = right_pad([[token for s in row for token in s.ids] for row in rows], pad_id)
    if width is not None and ids.size(1) < width:
        ids, mask = (F.pad(x, (0, width - ids.size(1)), value=v) for x, v in ((ids, pad_id), (mask, 0)))
    predicted = torch.zeros_like(mask, dtype=torch.bool)
    for n, row in enumerate(rows):
        start = 0
        for s in row:
            predicted[n, start + s.first : start + len(s.ids)] = True
            start += len(s.ids)
    ids, predicted = ids.to(device), predicted[:, 1:].to(device)
    if all(len(row) == 1 for row in rows):
        hidden = model.hidden_states(ids)  # right padding: causal attention never reads it
    else:
        segments = _segments([[len(s.ids) for s in row] for row in rows], ids.size(1))
        hidden = model.hidden_states(ids, segments=segments.to(device))
    logits = model.lm_logits(hidden[:, :-1][predicted]).float()  # (N, V)
    return F.cross_entropy(logits, ids[:, 1:][predicted], reduction="none"), int(predicted.sum())


def _segments(lengths: Sequence[Sequence[int]], width: int) -> Tensor:
    """Which sequence of its row each token belongs to, (B, width) int64; the padding of a row is one more sequence."""
    rows = [torch.tensor([*row, width - sum(row)]) for row in lengths]
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), row) for row in rows])


@torch.no_grad()
def perplexity(
    model: GPT2,
    tokenizer: Tokenizer,
    texts: Sequence[Demonstration | str],
    max_length: int = 128,
    batch_size: int = 64,
) -> dict[str, float]:
    """Perplexity of texts, or of responses after their prompts, each cut to `max_length` tokens in all.

    Returns {"token": ..., "character": ...}: exp of the total negative log-likelihood over the number of predicted
    tokens, and over the number of characters they spell (an end of text counts as one, white space as none).
    Raises ValueError for no texts, or none with anything to predict within `max_length`.
    """
    if max_length < 2 or batch_size < 1:
        raise ValueError(f"max_length must be at least 2 and batch_size at least 1, got {max_length} and {batch_size}")
    sequences = cut(encode_demonstrations(tokenizer, texts), max_length)
    if not sequences:
        raise ValueError(f"no response has a token within max_length={max_length}: there is nothing to measure")
    total, tokens = 0.0, 0
    with eval_mode(model):
        for batch in length_sorted_batches([len(s.ids) for s in sequences], batch_size):
            nll, count = token_nll(model, [[sequences[i]] for i in batch], tokenizer.pad_id)
            total, tokens = total + nll.double().sum().item(), tokens + count
    characters = sum(tokenizer.width(i) for s in sequences for i in s.ids[s.first :])
    return {"token": math.exp(total / tokens), "character": math.exp(total / characters)}


def _check_length(model: GPT2, max_length: int) -> None:
    if max_length > model.config.n_positions:
        raise ValueError(f"max_length={max_length} exceeds the model's {model.config.n_positions} positions")


def _warn_of_losses(encoded: Sequence[LMSequence], kept: Sequence[LMSequence], max_length: int) -> None:
    """Warn the caller of the constructor of what `cut` has lost."""
    longer = sum(len(s.ids) > max_length for s in encoded)
    if longer:
        lost = len(encoded) - len(kept)
        also = f"; {lost} of them have no response left and are left out" if lost else ""
        warnings.warn(
            f"{longer} of {len(encoded)} texts have more than max_length={max_length} tokens and are cut at the end"
            + also,
            stacklevel=3,
        )


def _hash(sequences: Sequence[LMSequence]) -> str:
    """SHA-256 over all token ids, their order and their borders."""
    digest = hashlib.sha256()
    for s in sequences:
        digest.update(f"{s.first} {s.ids}\n".encode())
    return digest.hexdigest()
