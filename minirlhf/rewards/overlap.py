"""Slow rewards: threads score parts of a batch while the next part is sampled."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import contextmanager
from typing import Any

import torch

from minirlhf.device.processes import agreed, processes
from minirlhf.generation.generate import Generation, joined
from minirlhf.rewards.base import (
    RewardFunction,
    Scored,
    mean_metrics,
    own_metrics,
    rewards_by_token,
    scope_of,
    score_rows,
    took_too_long,
)
from minirlhf.text.batching import cat_padded

Texts = tuple[list[str], list[str], list[list[str]]]  # prompts, responses, and what each token adds to its response
Sampled = tuple[Generation, Texts]


def sample_and_score(
    sample: Callable[[slice], Sampled],
    reward: RewardFunction,
    count: int,
    group_size: int = 1,
    workers: int = 0,
    seconds: float | None = None,
) -> tuple[Generation, Texts, Scored]:
    """What `sample` returns for the rows of this process, and their scores, as `score_rows` gives them.

    count: rows of all processes, in groups of `group_size`; see `Processes.share`.
    workers: 0: the rows are sampled, then scored in one call. N: they are cut into N + 1 parts, and N threads score
        them while the next one is sampled. The reward is then called by several threads at once, and must score each
        text by itself. If its scope is "batch", one thread scores one part after the other; of several processes the
        first one still gets all rows in one call, after they were sampled.
    seconds: that the reward may take after the last part was sampled; None: any time.
    Raises as `score_rows`; of several errors the one of the first rows.
    """
    group, once = processes(), scope_of(reward) == "batch"
    rows = group.share(count, group_size)
    parts = min(workers + 1, max(1, count // group_size // group.size))  # equally many on all processes
    if parts == 1 or (once and group.on):
        generation, texts = sample(rows)
        return generation, texts, score_rows(reward, *texts, count, seconds)
    n, sampled, answers = rows.stop - rows.start, [], []  # type: int, list[Sampled], list[Future[Scored]]
    with _threads(1 if once else workers) as start:
        for i in range(parts):
            sampled.append(sample(slice(rows.start + i * n // parts, rows.start + (i + 1) * n // parts)))
            answers.append(start(_scored, reward, rows.start + i * n // parts, sampled[i][1]))
        with agreed("the reward"):
            deadline = None if seconds is None else time.monotonic() + seconds
            scored = [_answer(answer, deadline, seconds) for answer in answers]
            metrics = own_metrics(reward) | mean_metrics([(len(part.scores), part.metrics) for part in scored])
    columns: Any = ([x for _, texts in sampled for x in texts[i]] for i in range(3))
    scores = [part.scores for part in scored]
    whole = Scored(
        torch.cat(scores) if scores[0].ndim == 1 else cat_padded(scores),
        mean_metrics(group.gather("metrics", (n, metrics))),
    )
    return joined([generation for generation, _ in sampled]), tuple(columns), whole


def _scored(reward: RewardFunction, first: int, texts: Texts) -> Scored:
    """The scores of a part whose first row is `first`."""
    try:
        return rewards_by_token({"": reward}, *texts)[""]
    except ValueError as error:
        raise ValueError(f"in the part of the batch from text {first}: {error}") from error


def _answer(answer: Future[Scored], deadline: float | None, seconds: float | None) -> Scored:
    while not answer.done():
        left = 1.0 if deadline is None else deadline - time.monotonic()
        if left <= 0 and seconds is not None:
            raise took_too_long(seconds)
        wait([answer], min(left, 1.0))  # again and again, as on Windows Ctrl-C interrupts no endless wait
    return answer.result()


@contextmanager
def _threads(count: int) -> Iterator[Callable[..., Future[Any]]]:
    """Threads that call functions in the order in which they are given; at the end those not begun are dropped.

    They are daemons, unlike those of an executor: Python cannot stop a reward that hangs, and should end all the same.
    """
    tasks: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = queue.SimpleQueue()
    given: list[Future[Any]] = []

    def work() -> None:
        while (task := tasks.get()) is not None:
            future, function, arguments = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:  # raised again where the caller is
                    future.set_exception(error)

    def start(function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        given.append(Future())
        tasks.put((given[-1], function, arguments))
        return given[-1]

    for _ in range(count):
        threading.Thread(target=work, name="reward function", daemon=True).start()
    try:
        yield start
    finally:
        for future in given:
            future.cancel()
        for _ in range(count):
            tasks.put(None)
