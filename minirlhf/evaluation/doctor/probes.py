"""What a single model does under padding, when it is run twice, and in its LM head: plain measurements.

Outputs are compared relative to the largest of them; NaN anywhere gives NaN. Shapes: B batch, T tokens, V vocabulary,
L labels.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from minirlhf.models.bert import BertClassifier
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic, language_model
from minirlhf.text.batching import left_pad, right_pad

SAME_OUTPUT = 1e-4  # closer outputs are equal; rounding in fp32 stays a hundred times below
FILLER = 1  # the token at padding positions, which must not matter


@torch.no_grad()
def padding_errors(model: nn.Module) -> dict[str, float]:
    """Side of the padding -> the distance of the outputs of a padded batch from those of each row alone.

    A classifier is padded on the right only, as BERT is. model: in eval mode.
    """
    rows = _random_rows(model)
    alone = [_outputs(model, row.unsqueeze(0), None)[0] for row in rows]  # (T, V), or (L,) of a classifier
    errors = {}
    for side, pad in (("right", right_pad),) if isinstance(model, BertClassifier) else _SIDES:
        ids, mask = (x.to(rows[0].device) for x in pad(rows, FILLER))
        padded = _outputs(model, ids, mask)
        real = padded if padded.ndim == 2 else padded[mask.bool()]
        errors[side] = _difference(real, torch.stack(alone) if padded.ndim == 2 else torch.cat(alone))
    return errors


@torch.no_grad()
def repetition_error(model: nn.Module) -> float:
    """The distance of the outputs of two forward passes over the same batch, in the mode that the model is in."""
    rows = _random_rows(model)
    ids, mask = (x.to(rows[0].device) for x in right_pad(rows, FILLER))
    return _difference(_outputs(model, ids, mask), _outputs(model, ids, mask))


@torch.no_grad()
def untied_error(model: ActorCritic | Decoder) -> float:
    """The distance of the logits of random hidden states from their product with the token embedding."""
    decoder = language_model(model)
    weight: Tensor = getattr(decoder.embeddings[0], "weight")[: decoder.vocab_size]  # noqa: B009  (for the type checker)
    hidden = torch.randn(3, decoder.width, generator=torch.Generator().manual_seed(0)).to(weight)
    return _difference(decoder.lm_logits(hidden), hidden @ weight.t())


def embedding_rows(model: Decoder) -> int:
    """Rows of the token embedding."""
    return int(getattr(model.embeddings[0], "weight").size(0))  # noqa: B009


def shared_parameters(model: nn.Module, other: nn.Module) -> list[str]:
    """Names of a model's parameters that lie in the same memory as parameters of another one, views included."""
    theirs = {p.untyped_storage().data_ptr() for p in other.parameters()}
    return [name for name, p in model.named_parameters() if p.untyped_storage().data_ptr() in theirs]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers."""
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


_SIDES = (("left", left_pad), ("right", right_pad))


def _random_rows(model: nn.Module) -> list[Tensor]:
    """Three rows of random tokens, of different lengths, on the model's device."""
    if isinstance(model, BertClassifier):
        count, limit = model.bert.embeddings.word_embeddings.num_embeddings, model.config.max_position_embeddings
    else:
        assert isinstance(model, (ActorCritic, Decoder))
        decoder = language_model(model)
        count, limit = decoder.vocab_size, decoder.n_positions
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(count, (min(n, limit),), generator=generator) for n in (5, 2, 9)]
    return [row.to(next(model.parameters()).device) for row in rows]


def _outputs(model: nn.Module, ids: Tensor, mask: Tensor | None) -> Tensor:
    """Logits (B, T, V), the values as one more column; or class logits (B, L)."""
    outputs = model(ids, mask)
    return outputs if isinstance(outputs, Tensor) else torch.cat([outputs[0], outputs[1].unsqueeze(-1)], -1)


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
