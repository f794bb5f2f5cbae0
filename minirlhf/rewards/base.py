"""Rewards: any callable that scores texts, and the sentiment classifier of the original recipe.

Judges behind an API are in `chat_judge`, rewards made of rewards in `composed_rewards`, learned ones in
`models.reward`.
"""

from __future__ import annotations

import inspect
import os
import threading
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, Protocol, TypedDict

import torch
from torch import Tensor, nn

from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import Precision
from minirlhf.device.precision_choice import choose_precision
from minirlhf.io.files import naming
from minirlhf.models.bert import BertClassifier
from minirlhf.models.probes import classifier_probe
from minirlhf.rewards.classifier import predict
from minirlhf.rewards.judge import ChatJudge as ChatJudge
from minirlhf.rewards.judge import ChatJudgeConfig as ChatJudgeConfig
from minirlhf.text.tokenizer import Tokenizer

CANARIES = ("房间干净，服务很好，非常满意，推荐", "房间很脏，服务太差，非常失望，差评")  # positive, negative


class TextReward(Protocol):
    """Scores whole texts (prompt and response): (B,) texts to (B,) finite floats, higher is better."""

    def __call__(self, texts: list[str], /) -> Any: ...


class PromptResponseReward(Protocol):
    """Scores responses in the light of their prompts: two lists of B texts to (B,) finite floats."""

    def __call__(self, prompts: list[str], responses: list[str], /) -> Any: ...


class TokenReward(Protocol):
    """Scores each token: prompts, responses, and these cut into tokens, to B lists of finite floats, one a token.

    tokens: what each token adds to its response, so that `"".join(tokens[i]) == responses[i]`; "" for one that adds
        nothing, such as the one that ends a text. The third parameter is told by its name.
    """

    def __call__(self, prompts: list[str], responses: list[str], tokens: list[list[str]], /) -> Any: ...


RewardFunction = TextReward | PromptResponseReward | TokenReward | Callable[..., Any]


class Classification(TypedDict):
    """The most probable label of a text, and its probability."""

    label: str
    score: float


def call_reward(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    tokens: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """Score a batch of B prompts and responses.

    A reward function whose third positional parameter is named `tokens` gets (prompts, responses, tokens), and may
    return a list of scores for each response, one a token, whose sum is the score. One with two required positional
    parameters gets (prompts, responses); any other gets the list of prompt + response.
    tokens: the responses cut into tokens, as `Tokenizer.decode_pieces` does; None: their characters stand for them.
    Returns the scores, (B,) fp64 on the CPU.
    Raises ValueError if it returns anything but B finite numbers, or lists of one a token.
    """
    scores = reward_by_token(reward, prompts, responses, tokens)
    return scores if scores.ndim == 1 else checked_scores(scores.sum(-1), len(prompts))


def reward_by_token(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    tokens: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """`call_reward` before the sum: (B, R) with R the most tokens if the reward scores tokens, 0 behind the last one.

    (B,) if it scores whole responses. Raises as `call_reward`.
    """
    names, required = _positional(reward)
    if names[2:3] == ["tokens"]:
        cut = [list(row) for row in tokens] if tokens is not None else [list(r) or [""] for r in responses]
        lengths = [len(row) for row in cut]
        return checked_token_scores(reward(list(prompts), list(responses), cut), lengths)  # type: ignore[call-arg]
    if required == 2:
        scores = reward(list(prompts), list(responses))  # type: ignore[call-arg]
    else:
        scores = reward([p + r for p, r in zip(prompts, responses, strict=True)])  # type: ignore[call-arg]
    return checked_scores(scores, len(prompts))


def within(seconds: float | None, function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, or TimeoutError if it takes longer than so many seconds; None: any time.

    Python cannot stop a function that hangs. It is left behind in a daemon thread, which ends with the process at the
    latest, and what it returns is thrown away.
    """
    if seconds is None:
        return function(*arguments)
    outcome: Future[Tensor] = Future()

    def work() -> None:
        try:
            outcome.set_result(function(*arguments))
        except BaseException as error:  # raised again where the caller is
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="reward function", daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    if not outcome.done():
        raise TimeoutError(f"the reward function took longer than reward_timeout={seconds:g} seconds")
    return outcome.result()


def checked_scores(scores: Any, count: int) -> Tensor:
    """Scores as a tensor (count,), fp64, on the CPU. Raises ValueError if they are not `count` finite numbers."""
    if isinstance(scores, (list, tuple)):  # numbers, or tensors of one element
        scores = [score.item() if isinstance(score, Tensor) and score.numel() == 1 else score for score in scores]
    try:
        tensor = torch.as_tensor(scores).detach()
        if tensor.is_complex() or tensor.layout != torch.strided:  # else the imaginary part is dropped in silence
            raise TypeError(f"they have dtype {tensor.dtype} and layout {tensor.layout}")
        tensor = tensor.to("cpu", torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"scores must be {count} numbers, got {type(scores).__name__}: {error}") from error
    if tensor.shape != (count,):
        raise ValueError(f"scores must be {count} numbers, one a text, got shape {tuple(tensor.shape)}")
    bad = (~torch.isfinite(tensor.float())).nonzero().flatten().tolist()  # also what fp32 cannot hold
    if bad:
        first = tensor[bad[0]].item()
        raise ValueError(f"scores must be finite, got {first} for text {bad[0]} ({len(bad)} bad in all)")
    return tensor


def checked_token_scores(scores: Any, lengths: Sequence[int]) -> Tensor:
    """Lists of scores as a tensor (B, R), fp64, on the CPU; plain scores as `checked_scores` has them, (B,).

    scores: B lists of as many numbers as `lengths` says, or an array (B, R) with R the most; padding is not read.
    Raises ValueError for anything else, naming the response.
    """
    padded = getattr(scores, "ndim", 0) == 2
    if not padded and not (isinstance(scores, (list, tuple)) and any(map(_is_row, scores))):
        return checked_scores(scores, len(lengths))
    if len(scores) != len(lengths):
        raise ValueError(f"token scores must be {len(lengths)} lists, one a response, got {len(scores)}")
    table = torch.zeros(len(lengths), max(lengths, default=0), dtype=torch.float64)
    if padded and scores.shape != table.shape:
        raise ValueError(f"token scores must be of shape {tuple(table.shape)}, got {tuple(scores.shape)}")
    for i, (row, length) in enumerate(zip(scores, lengths, strict=True)):
        try:
            table[i, :length] = checked_scores(row[:length] if padded else row, length)
        except ValueError as error:
            raise ValueError(f"response {i} of {length} tokens: {error}") from error
    return table


class SentimentReward:
    """P(positive) of a text under a BERT sentiment classifier: `reward(texts) -> (B,)`, fp32 on the CPU.

    positive_label: the name of the positive label; None: the only label whose name begins with "positive" or "正".
    batch_size: texts a forward pass. precision: of the forward passes, as of `optimization.Precision`, or auto (see
        `precision_choice`). Not auto by itself: it also measures policies against each other, whose figures should not
        depend on the machine, and is a small part of the time of PPO.
    Longer texts than the classifier's positions are cut at the end.
    Raises ValueError if there is but one label, the positive one is not found, or the vocabulary does not match the
    model.
    """

    def __init__(
        self,
        model: BertClassifier,
        tokenizer: Tokenizer,
        positive_label: str | None = None,
        batch_size: int = 64,
        device: str | torch.device = "auto",
        precision: str = "fp32",
    ):
        model.fit_vocabulary(len(tokenizer))
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.model = model.eval().to(resolve_device(device))
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.precision_choice = choose_precision(precision, model, classifier_probe(model))
        self.precision = Precision(self.precision_choice.name, next(model.parameters()).device, model)
        self.positive = _positive_index(model.config.labels, positive_label)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str], **options: Any) -> SentimentReward:
        """Load a classifier folder. Warns if two plain sentences, one positive and one negative, come out reversed.

        options: as of the constructor. Raises as `BertClassifier.from_pretrained` and the constructor.
        """
        model, tokenizer = BertClassifier.from_pretrained(folder), Tokenizer.from_pretrained(folder)
        with naming(folder):
            reward = cls(model, tokenizer, **options)
            good, bad = reward(list(CANARIES)).tolist()
        if not good > bad:  # so written, NaN warns too
            warnings.warn(
                f"{folder} gives {CANARIES[0]!r} a lower P(positive), {good:.2f}, than {CANARIES[1]!r}, {bad:.2f}: "
                "are its labels in the right order?",
                stacklevel=2,
            )
        return reward

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """P(positive) (B,) of each text, in the order given. An empty text is scored as [CLS] [SEP]."""
        return self.probabilities(texts)[:, self.positive]

    def classify(self, texts: Sequence[str]) -> list[Classification]:
        """The most probable label of each text with its probability, `{"label": ..., "score": ...}`."""
        scores, labels = self.probabilities(texts).max(-1)
        names = self.model.config.labels
        return [{"label": names[i], "score": s} for i, s in zip(labels.tolist(), scores.tolist(), strict=True)]

    def probabilities(self, texts: Sequence[str]) -> Tensor:
        """Probabilities (B, L) of all labels, fp32 on the CPU, computed in batches of similar length."""
        if isinstance(texts, str):
            raise ValueError("texts must be a list of texts, got a single one")
        limit = self.model.config.max_position_embeddings
        with self.precision.autocast():
            logits = predict(self.model, self.tokenizer, texts, limit, self.batch_size)
        return logits.softmax(-1)


def _positive_index(labels: Sequence[str], name: str | None) -> int:
    if len(labels) < 2:
        raise ValueError(
            f"a classifier with the only label {labels[0]!r} gives it to every text; a reward model of one score loads "
            "with RewardModel.from_pretrained"
        )
    if name is not None:
        if name not in labels:
            raise ValueError(f"positive_label must be one of {list(labels)}, got {name!r}")
        return list(labels).index(name)
    found = [i for i, label in enumerate(labels) if label.lower().startswith(("positive", "正"))]
    if len(found) != 1:
        raise ValueError(f"cannot tell the positive label among {list(labels)}; pass positive_label=")
    return found[0]


def _is_row(scores: object) -> bool:
    """Whether something in a list of scores is a list itself; an array of one number is a number."""
    return isinstance(scores, (list, tuple)) or (getattr(scores, "ndim", 0) == 1 and len(scores) != 1)  # type: ignore


def _positional(reward: RewardFunction) -> tuple[list[str], int]:
    """The names of a reward's positional parameters, and how many of them are required."""
    try:
        # A module's __call__ takes anything; its forward says what it wants.
        called = reward.forward if isinstance(reward, nn.Module) else reward
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return [], 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p for p in parameters if p.kind in positional]
    return [p.name for p in found], sum(p.default is inspect.Parameter.empty for p in found)
