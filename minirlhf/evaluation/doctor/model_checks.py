"""Checks of the models and the reward as they were given; only `labels` may need samples.

A check takes the setup and returns a result. It raises `Skipped` where something that it needs is missing. It works
on copies, so that the caller's models stay as they are. Outputs are compared relative to the largest of them; NaN
anywhere gives NaN. Shapes: B batch, T tokens, V vocabulary, L labels.
"""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from minirlhf.evaluation.doctor.setup import FAIL, OK, Result, Setup, Skipped
from minirlhf.generation.generate import language_model
from minirlhf.models.bert import BertClassifier
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.rewards.base import call_reward
from minirlhf.rewards.sentiment import SentimentReward
from minirlhf.text.batching import left_pad, right_pad

SAME_OUTPUT = 1e-4  # closer outputs are equal; rounding in fp32 stays a hundred times below
FILLER = 1  # the token at padding positions, which must not matter


def labels(setup: Setup) -> Result:
    """Plain sentences, from a good one to a bad one, score lower and lower."""
    reward = setup.reward
    if reward is None:
        raise Skipped("no reward function was given")
    if isinstance(reward, SentimentReward):
        reward = copy.copy(reward)
        reward.model = copy.deepcopy(reward.model)
    canaries = setup.canaries or (reward.canaries if isinstance(reward, SentimentReward) else ())
    if not canaries:
        rollout = setup.experience()[1]
        scores = call_reward(reward, rollout.prompts, rollout.responses)
        found = f"{len(scores)} samples score from {scores.min():.3g} to {scores.max():.3g}"
        raise Skipped(f"{found}; which way is up was not tested: give canaries=(good text, bad text)")
    found_scores = call_reward(reward, [""] * len(canaries), canaries).tolist()
    detail = ", ".join(f"{text!r} scores {score:.3g}" for text, score in zip(canaries, found_scores, strict=True))
    if isinstance(reward, SentimentReward):
        detail += f", by {reward.meaning}"
    if all(better > worse for better, worse in itertools.pairwise(found_scores)):
        return Result(OK, detail)
    remedy = "swap the labels: id2label in the reward's config.json, positive_label=, or the sign of the reward"
    return Result(FAIL, detail, remedy)


def masks(setup: Setup) -> Result:
    """Padding on either side (of a classifier, on the right) changes no output."""
    errors = {
        f"{name}, {side} padding": error
        for name, model in setup.modules().items()
        for side, error in padding_errors(copy.deepcopy(model).eval()).items()
    }
    wrong = [f"{name}: {error:.2g}" for name, error in errors.items() if not error <= SAME_OUTPUT]
    if wrong:
        remedy = "attend by attention_mask, and number positions by its running sum, as Decoder.hidden_states does"
        return Result(FAIL, f"padding changes the outputs, relative to the largest: {'; '.join(wrong)}", remedy)
    return Result(OK, f"padded and alone differ by {max(errors.values()):.2g} of the largest output at most")


def dropout(setup: Setup) -> Result:
    """Two forward passes are equal in the modes in which the models were given."""
    wrong = []
    for name, model in setup.modules().items():
        model = copy.deepcopy(model)
        if isinstance(model, BertClassifier):
            model.eval()  # as SentimentReward does at each call
        error = repetition_error(model)
        if not error <= SAME_OUTPUT:
            wrong.append(f"{name}, in {'training' if model.training else 'eval'} mode: {error:.2g}")
    if not wrong:
        return Result(OK, "two forward passes of each model are equal")
    remedy = "call eval() on the model and all of its layers; build nn.Dropout in __init__, so that eval() turns it off"
    return Result(FAIL, f"two forward passes differ, relative to the largest output: {'; '.join(wrong)}", remedy)


@torch.no_grad()
def padding_errors(model: nn.Module) -> dict[str, float]:
    """Side of the padding -> the distance of the outputs of a padded batch from those of each row alone.

    A classifier is padded on the right only, as BERT is. model: in eval mode.
    """
    rows = _random_rows(model)
    alone = [_outputs(model, row.unsqueeze(0), None)[0] for row in rows]  # (T, V), or (L,) of a classifier
    errors = {}
    sides = {"right": right_pad} if isinstance(model, BertClassifier) else {"left": left_pad, "right": right_pad}
    for side, pad in sides.items():
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
    """The distance of the logits of random hidden states from their product with the head's weight.

    That is the token embedding, unless the config says that the head has a weight of its own.
    """
    decoder = language_model(model)
    head = decoder.embeddings[0] if decoder.config.tie_word_embeddings else decoder.lm_head
    weight: Tensor = getattr(head, "weight")[: decoder.vocab_size]  # noqa: B009  (for the type checker)
    hidden = torch.randn(3, decoder.width, generator=torch.Generator().manual_seed(0)).to(weight)
    return _difference(decoder.lm_logits(hidden), hidden @ weight.t())


def distance(model: nn.Module, other: nn.Module) -> float:
    """The largest difference between parameters of two models of one shape."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max((mine - theirs).abs().max().item() for mine, theirs in pairs)


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
