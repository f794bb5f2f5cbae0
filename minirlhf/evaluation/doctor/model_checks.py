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
from minirlhf.rewards.base import RewardFunction, call_reward
from minirlhf.rewards.sentiment import SentimentReward


def vocabulary(setup: Setup) -> Result:
    """Tokenizer, configs and embeddings have one size."""
    sizes = {"tokenizer": len(needed(setup.tokenizer, "the tokenizer"))}
    for name, model in zip(("policy", "reference"), map(language_model, setup.models()), strict=True):
        sizes |= {f"{name} logits": model.vocab_size, f"{name} embedding": embedding_rows(model)}
    if len(set(sizes.values())) > 1:
        remedy = "take vocab.txt and model from one folder, or resize the embedding and its config together"
        return Result(FAIL, f"tokens differ: {_sizes(sizes)}", remedy)
    setup.vocabulary = sizes["tokenizer"]
    return Result(OK, f"{setup.vocabulary} tokens in {', '.join(sizes)}")


def reward_vocabulary(setup: Setup) -> Result:
    """The reward model's own tokenizer, config and embedding have one size."""
    reward = setup.reward
    if not isinstance(reward, SentimentReward):
        raise Skipped("there is no SentimentReward, so no vocabulary to look at")
    embedding = reward.model.bert.embeddings.word_embeddings.num_embeddings
    sizes = {"tokenizer": len(reward.tokenizer), "config": reward.model.config.vocab_size, "embedding": embedding}
    if len(set(sizes.values())) > 1:
        remedy = "give the reward model the vocab.txt of its own folder, not that of the policy"
        return Result(FAIL, f"tokens differ: {_sizes(sizes)}", remedy)
    setup.reward_vocabulary = sizes["tokenizer"]
    return Result(OK, f"{setup.reward_vocabulary} tokens in {', '.join(sizes)}")


def labels(setup: Setup) -> Result:
    """Plain sentences, from a good one to a bad one, score lower and lower."""
    reward: RewardFunction = setup.copied_reward()
    sentiment = reward if isinstance(reward, SentimentReward) else None
    canaries = setup.canaries or (sentiment.canaries if sentiment else ())
    if not canaries:
        rollout = setup.experience()[1]
        scores = call_reward(reward, rollout.prompts, rollout.responses)
        found = f"{len(scores)} samples score from {scores.min():.3g} to {scores.max():.3g}"
        raise Skipped(f"{found}; which way is up was not tested: give canaries=(good text, bad text)")
    found_scores = call_reward(reward, [""] * len(canaries), canaries).tolist()
    detail = ", ".join(f"{text!r} scores {score:.3g}" for text, score in zip(canaries, found_scores, strict=True))
    if sentiment:
        detail += f", by {sentiment.meaning}"
    remedy = "swap the labels: id2label in the reward's config.json, positive_label=, or the sign of the reward"
    falls = all(better > worse for better, worse in itertools.pairwise(found_scores))
    return Result(OK, detail) if falls else Result(FAIL, detail, remedy)


def masks(setup: Setup) -> Result:
    """A padded batch gives what each row gives alone."""
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


def _sizes(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
