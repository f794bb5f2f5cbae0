"""What a reward is: a callable that scores texts, responses or tokens, and how its scores are checked."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from minirlhf.device.processes import agreed, processes

RewardFunction = Callable[..., Any]  # from B texts, or prompts and responses, to B finite scores; see `call_reward`
TAKEN = ("reward/mean", "reward/std", "reward/shaped")  # names of metrics that the trainer itself logs
Result = TypeVar("Result")


class Scored(NamedTuple):
    """Scores, (B,) or (B, R), fp64, and the metrics that the reward reported about this batch."""

    scores: Tensor
    metrics: dict[str, float]


def call_reward(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    tokens: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """Score B prompts and responses: (B,) fp64 on the CPU.

    The reward's positional parameters decide what it gets. If the third one is named `tokens`, it gets (prompts,
    responses, tokens) and may return a list of scores per response, one per token, whose sum is the score. If two are
    required, it gets (prompts, responses); otherwise it gets the list of prompt + response. Higher is better.

    tokens: the text that each token of a response adds, "" for one that adds nothing, so that `"".join(tokens[i]) ==
        responses[i]` (see `Tokenizer.decode_pieces`); None: the characters.
    A reward may be an async function, say one that awaits many judges at once. It may return (scores, metrics), where
    metrics is a dict of numbers by name, or have a method `metrics() -> dict[str, float]`; a training logs them with
    each step, a name without "/" as reward/NAME.
    Raises ValueError unless the reward returns B finite numbers, or B lists of one number per token.
    """
    scores = reward_by_token(reward, prompts, responses, tokens)
    return scores if scores.ndim == 1 else checked_scores(scores.sum(-1), len(prompts))


def reward_by_token(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    tokens: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """`call_reward` before the sum over tokens: (B, R) if the reward scores tokens, (B,) if it scores responses.

    R is the length of the longest response in tokens; shorter ones are filled up with 0. Raises as `call_reward`.
    """
    return rewards_by_token({"": reward}, prompts, responses, tokens)[""].scores


def reward_with_metrics(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    tokens: Sequence[Sequence[str]] | None = None,
) -> Scored:
    """`reward_by_token`, and all that the reward reports about the batch, by the names that are logged.

    Raises as `call_reward`, and ValueError for metrics that are not numbers by name.
    """
    scores, metrics = rewards_by_token({"": reward}, prompts, responses, tokens)[""]
    return Scored(scores, own_metrics(reward) | metrics)


def own_metrics(reward: RewardFunction) -> dict[str, float]:
    """What a reward's method `metrics` reports, by the names that are logged; raises as `reward_with_metrics`."""
    return _metrics(reward.metrics()) if callable(getattr(reward, "metrics", None)) else {}  # type: ignore[attr-defined]


def rewards_by_token(
    rewards: Mapping[str, RewardFunction],
    prompts: Sequence[str],
    responses: Sequence[str],
    tokens: Sequence[Sequence[str]] | None = None,
) -> dict[str, Scored]:
    """`reward_by_token` of several named rewards; those that are async functions run at once.

    Raises as it does; a ValueError begins with the part's name if that is not blank.
    """
    asked = {name: _Asked(reward, prompts, responses, tokens) for name, reward in rewards.items()}
    waiting = [x.answer for x in asked.values() if inspect.isawaitable(x.answer)]
    arrived = iter(_awaited(waiting) if waiting else [])
    found = {}
    for name, x in asked.items():
        try:
            answer = next(arrived) if inspect.isawaitable(x.answer) else x.answer
            if isinstance(answer, BaseException):
                raise answer
            found[name] = x.checked(answer)
        except ValueError as error:
            raise (ValueError(f"part {name!r}: {error}") if name else error) from error
    return found


class _Asked:
    """A reward that was called; its answer is an awaitable if it is an async function, or the error that it raised."""

    def __init__(self, reward: RewardFunction, prompts: Sequence[str], responses: Sequence[str], tokens: Any):
        self.count, self.lengths = len(prompts), None  # type: int, list[int] | None
        if not callable(reward):
            got = f"{reward!r:.60} of type {type(reward).__name__}"
            raise ValueError(
                f"a reward must be callable, got {got}; a folder's is minirlhf.rewards.scorers.load_scorer(folder)"
            )
        names, required = _positional(reward)
        given: list[list[Any]] = [list(prompts), list(responses)]
        if names[2:3] == ["tokens"]:
            given.append([list(r) for r in tokens] if tokens is not None else [list(r) or [""] for r in responses])
            self.lengths = list(map(len, given[2]))
        elif required != 2:
            given = [[p + r for p, r in zip(prompts, responses, strict=True)]]
        try:
            self.answer = reward(*given)
        except Exception as error:  # raised again in its turn, when no other reward is left waiting
            self.answer = error

    def checked(self, answer: Any) -> Scored:
        """The answer's scores and metrics. Raises ValueError for bad ones."""
        reported: Mapping[Any, Any] = {}
        if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping):
            answer, reported = answer
        lengths = self.lengths
        scores = checked_scores(answer, self.count) if lengths is None else checked_token_scores(answer, lengths)
        return Scored(scores, _metrics(reported))


def _awaited(answers: Sequence[Any]) -> list[Any]:
    """The results of awaitables, or their exceptions, in order, awaited at once."""

    async def gather() -> list[Any]:
        return await asyncio.gather(*answers, return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather())
    with ThreadPoolExecutor(1, thread_name_prefix="reward function") as pool:  # a notebook's loop runs in this thread
        return pool.submit(asyncio.run, gather()).result()


def _metrics(reported: Mapping[Any, Any]) -> dict[str, float]:
    """Metrics by the names that are logged. Raises ValueError for a bad name, a taken one, and what is no number."""
    found = {}
    for key, value in reported.items():
        name = key if isinstance(key, str) and "/" in key else f"reward/{key}"
        if not isinstance(key, str) or not key.strip() or name in TAKEN or name in found:
            raise ValueError(f"the reward reported a metric named {key!r}: names must be texts, and not {TAKEN}")
        try:
            found[name] = float(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the metric {key!r} of the reward must be a number, got {value!r:.80}") from error
    return found


def within(seconds: float | None, function: Callable[..., Result], *arguments: Any) -> Result:
    """Return `function(*arguments)`; raise TimeoutError if it takes longer than `seconds` (None: no limit).

    A function that hangs goes on in a daemon thread, and its result is dropped: Python cannot stop it.
    """
    if seconds is None:
        return function(*arguments)
    outcome: Future[Result] = Future()

    def work() -> None:
        try:
            outcome.set_result(function(*arguments))
        except BaseException as error:  # raised again where the caller is
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="reward function", daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))
    if not outcome.done():
        raise took_too_long(seconds)
    return outcome.result()


def took_too_long(seconds: float) -> TimeoutError:
    """The error of a reward that takes longer than `seconds`."""
    return TimeoutError(f"the reward function took longer than reward_timeout={seconds:g} seconds")


def score_rows(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    tokens: Sequence[Sequence[str]] | None,
    count: int,
    seconds: float | None = None,
) -> Scored:
    """`reward_with_metrics` within `seconds`, for the rows of this process, of `count` in all (see `Processes.share`).

    A reward whose attribute `scope` is "batch" (a person, a paid judge, a state) is asked by the first process only,
    for the rows of all. Metrics are means over the rows of all processes. Raises as `reward_with_metrics` and `within`;
    an error of one process is raised by all.
    """
    group, arguments = processes(), (prompts, responses, *(() if tokens is None else (tokens,)))
    if not group.on or scope_of(reward) == "rows":
        with agreed("the reward"):
            own = within(seconds, reward_with_metrics, reward, *arguments)
        return Scored(own.scores, mean_metrics(group.gather("metrics", (len(prompts), own.metrics))))
    parts = group.gather("texts", arguments)
    with agreed("the reward"):
        whole = [[x for part in column for x in part][:count] for column in zip(*parts, strict=True)]
        scores = within(seconds, reward_with_metrics, reward, *whole) if group.first else None
    scored: Scored = group.broadcast("scores", scores)  # type: ignore[assignment]
    before = 0 if len(prompts) == count else sum(len(part[0]) for part in parts[: group.rank])
    return Scored(scored.scores[before : before + len(prompts)], scored.metrics)


def mean_metrics(parts: Sequence[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """The mean of each metric over the rows of the parts that have it."""
    if len(parts) == 1:
        return parts[0][1]
    names = dict.fromkeys(name for _, metrics in parts for name in metrics)
    having = {name: [(rows, metrics[name]) for rows, metrics in parts if name in metrics] for name in names}
    return {name: sum(rows * x for rows, x in found) / sum(rows for rows, _ in found) for name, found in having.items()}


def score_all(
    reward: RewardFunction,
    prompts: Sequence[str],
    responses: Sequence[str],
    tokens: Sequence[Sequence[str]] | None = None,
) -> Tensor:
    """`call_reward`, of which each process computes some rows, and all get the result.

    Raises as `call_reward`.
    """
    group = processes()
    mine = group.share(len(prompts))
    given = prompts[mine], responses[mine], None if tokens is None else tokens[mine]
    scores = score_rows(reward, *given, len(prompts)).scores
    with agreed("the sums of token scores"):
        scores = scores if scores.ndim == 1 else checked_scores(scores.sum(-1), len(scores))
    return group.gather_rows(len(prompts), scores)[0]


def scope_of(*rewards: RewardFunction) -> str:
    """ "batch" if a reward must see the rows of all processes in one call, by its attribute `scope`; else "rows".

    Raises ValueError for another scope.
    """
    scopes = {getattr(reward, "scope", "rows") for reward in rewards}
    if not scopes <= {"rows", "batch"}:
        raise ValueError(f"the scope of a reward must be 'rows' or 'batch', got {min(scopes - {'rows', 'batch'})!r}")
    return "batch" if "batch" in scopes else "rows"


def checked_scores(scores: Any, count: int) -> Tensor:
    """Scores as a tensor (count,), fp64, on the CPU.

    scores: a list, an array or a tensor of numbers, of shape (count,) or (count, 1). Numbers in a list are not rounded.
    Raises ValueError if they are not `count` finite numbers.
    """
    try:
        if isinstance(scores, (list, tuple)):
            tensor = torch.tensor([_number(score) for score in scores], dtype=torch.float64)
        else:
            if not isinstance(scores, Tensor) and hasattr(scores, "__array__"):  # a pandas Series and the like
                scores = np.asarray(scores)
            tensor = torch.as_tensor(scores).detach()
            if tensor.is_complex() or tensor.layout != torch.strided:  # a cast would drop the imaginary part
                raise TypeError(f"they have dtype {tensor.dtype} and layout {tensor.layout}")
            tensor = tensor.to("cpu", torch.float64, copy=True)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"scores must be {count} numbers, got {type(scores).__name__}: {error}") from error
    if tensor.shape == (count, 1):
        tensor = tensor[:, 0]
    if tensor.shape != (count,):
        raise ValueError(f"scores must be {count} numbers, one a text, got shape {tuple(tensor.shape)}")
    bad = (~torch.isfinite(tensor.float())).nonzero().flatten().tolist()  # a rollout holds scores in fp32
    if bad:
        first = tensor[bad[0]].item()
        raise ValueError(f"scores must be finite, got {first} for text {bad[0]} ({len(bad)} bad in all)")
    return tensor


def checked_token_scores(scores: Any, lengths: Sequence[int]) -> Tensor:
    """Scores of tokens as a tensor (B, R), scores of responses as a tensor (B,), fp64 on the CPU.

    scores: B lists with the `lengths` of the responses, or an array (B, R) with R the largest length, whose padding is
        not read.
    Raises ValueError that names the response for anything else.
    """
    padded = getattr(scores, "ndim", 0) == 2 and (scores.shape[1] != 1 or max(lengths, default=0) == 1)
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


def _number(score: Any) -> Any:
    """A score out of an array of one element. Raises TypeError for what a transformers pipeline says of a text."""
    row = score[0] if isinstance(score, (list, tuple)) and score else score
    if isinstance(row, Mapping):
        wanted = (
            'row["score"] if row["label"] == "positive" else 1 - row["score"]' if row is score
            else 'next(x["score"] for x in row if x["label"] == "positive")'
        )  # fmt: skip
        raise TypeError(
            f"a pipeline's {row!r:.80}, which says how sure a label is and not how good the text; return "
            f"[{wanted} for row in output], with the name of your good label"
        )
    size = score.numel() if isinstance(score, Tensor) else getattr(score, "size", 0)
    return score.item() if size == 1 else score


def _is_row(scores: object) -> bool:
    """Whether an element of a list of scores is a list itself; an array of one number counts as a number."""
    return isinstance(scores, (list, tuple)) or (getattr(scores, "ndim", 0) == 1 and len(scores) != 1)  # type: ignore


def _positional(reward: RewardFunction) -> tuple[list[str], int]:
    """The names of a reward's positional parameters, and the number of those that are required."""
    try:
        # nn.Module.__call__ takes any arguments; the signature is that of forward.
        called = reward.forward if isinstance(reward, nn.Module) else reward
        parameters = inspect.signature(called).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature
        return [], 1
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    found = [p for p in parameters if p.kind in positional]
    return [p.name for p in found], sum(p.default is inspect.Parameter.empty for p in found)
