"""Checks of the models and the reward as they were given; only `labels` may need samples.

A check takes the setup and returns a result; it raises `Skipped` where something that it needs is missing. It works
on copies, so that the caller's models stay as they are.
"""

from __future__ import annotations

import copy
import itertools

from minirlhf.evaluation.doctor.probes import SAME_OUTPUT, embedding_rows, padding_errors, repetition_error
from minirlhf.evaluation.doctor.setup import FAIL, OK, Result, Setup, Skipped, needed
from minirlhf.models.bert import BertClassifier
from minirlhf.models.heads import language_model
from minirlhf.rewards.base import call_reward
from minirlhf.rewards.sentiment import SentimentReward


def vocabulary(setup: Setup) -> Result:
    """Tokenizer, configs and embeddings of policy and reference have one size."""
    sizes = {"tokenizer": len(needed(setup.tokenizer, "the tokenizer"))}
    for name, model in zip(("policy", "reference"), map(language_model, setup.models()), strict=True):
        sizes |= {f"{name} logits": model.vocab_size, f"{name} embedding": embedding_rows(model)}
    remedy = "take vocab.txt and model from one folder, or resize the embedding and its config together"
    setup.vocabulary, result = _one_size(sizes, remedy)
    return result


def reward_vocabulary(setup: Setup) -> Result:
    """Tokenizer, config and embedding of a SentimentReward have one size."""
    reward = setup.reward
    if not isinstance(reward, SentimentReward):
        raise Skipped("there is no SentimentReward, so no vocabulary to look at")
    embedding = reward.model.bert.embeddings.word_embeddings.num_embeddings
    sizes = {"tokenizer": len(reward.tokenizer), "config": reward.model.config.vocab_size, "embedding": embedding}
    remedy = "give the reward model the vocab.txt of its own folder, not that of the policy"
    setup.reward_vocabulary, result = _one_size(sizes, remedy)
    return result


def labels(setup: Setup) -> Result:
    """Plain sentences, from a good one to a bad one, score lower and lower."""
    reward = setup.copied_reward()
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
    remedy = "swap the labels: id2label in the reward's config.json, positive_label=, or the sign of the reward"
    falls = all(better > worse for better, worse in itertools.pairwise(found_scores))
    return Result(OK, detail) if falls else Result(FAIL, detail, remedy)


def masks(setup: Setup) -> Result:
    """Padding on either side (of a classifier, on the right) changes no output."""
    errors = {
        f"{name}, {side} padding": error
        for name, model in setup.modules().items()
        for side, error in padding_errors(copy.deepcopy(model).eval()).items()
    }
    wrong = [f"{name}: {error:.2g}" for name, error in errors.items() if not error <= SAME_OUTPUT]
    if wrong:
        remedy = "attend by attention_mask, and number positions by its running sum, as GPT2.hidden_states does"
        return Result(FAIL, f"padding changes the outputs, relative to the largest: {'; '.join(wrong)}", remedy)
    return Result(OK, f"padded and alone differ by {max(errors.values()):.2g} of the largest output at most")


def dropout(setup: Setup) -> Result:
    """Two forward passes are equal in the modes in which the models were given."""
    wrong, in_eval_mode = [], False
    for name, model in setup.modules().items():
        model = copy.deepcopy(model)
        if isinstance(model, BertClassifier):
            model.eval()  # as SentimentReward does at each call
        error = repetition_error(model)
        if not error <= SAME_OUTPUT:
            stays = not repetition_error(model.eval()) <= SAME_OUTPUT
            wrong.append(f"{name}, {'also in eval mode' if stays else 'in training mode'}: {error:.2g}")
            in_eval_mode |= stays
    if not wrong:
        return Result(OK, "two forward passes of each model are equal")
    remedy = "call eval() on the model before rollouts and scoring"
    if in_eval_mode:
        remedy += "; build nn.Dropout in __init__, not in forward, so that eval() turns it off"
    return Result(FAIL, f"two forward passes differ, relative to the largest output: {'; '.join(wrong)}", remedy)


def _one_size(sizes: dict[str, int], remedy: str) -> tuple[int | None, Result]:
    """The size that all have, None if they differ, and the result."""
    size = sizes["tokenizer"]
    if set(sizes.values()) == {size}:
        return size, Result(OK, f"{size} tokens in {', '.join(sizes)}")
    found = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return None, Result(FAIL, f"tokens differ: {found}", remedy)
