"""Probes of a model's log-probabilities, for the choice of a precision (see `device.precision_choice`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minirlhf.device.precision import full_precision
from minirlhf.models.bert import BertClassifier
from minirlhf.models.decoder import Decoder

ROWS, TOKENS = 4, 16  # of the batch that the choice looks at


def language_model_probe(model: Decoder, temperature: float = 1.0) -> Callable[[], Tensor]:
    """A probe of 64 log-probabilities: of a token drawn from the model after each token of 4 random rows.

    temperature: what logits are divided by.
    """
    drawn: list[Tensor] = []

    def probe() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(model.vocab_size, (ROWS, min(TOKENS, model.n_positions)), generator=generator)
        hidden = model.hidden_states(ids.to(model.device)).flatten(0, 1)
        logprobs = (full_precision(model.lm_logits(hidden)) / temperature).log_softmax(-1)  # (64, V)
        if not drawn:  # in fp32: the token where the sum of probabilities passes a uniform number
            uniform = torch.rand(len(logprobs), 1, generator=generator).to(logprobs)
            drawn.append((logprobs.exp().cumsum(-1) < uniform).sum(-1, keepdim=True).clamp_max(model.vocab_size - 1))
        return logprobs.gather(-1, drawn[0])

    return probe


def classifier_probe(model: BertClassifier) -> Callable[[], Tensor]:
    """A probe of the log-probabilities (4, L) of a classifier's labels for 4 random rows."""
    generator, c = torch.Generator().manual_seed(0), model.config
    ids = torch.randint(c.vocab_size, (ROWS, min(TOKENS, c.max_position_embeddings)), generator=generator)
    return lambda: full_precision(model(ids.to(next(model.parameters()).device))).log_softmax(-1)
