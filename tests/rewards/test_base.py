"""What a reward function may be and may return."""

import asyncio
import functools
import math
import threading
import time

import numpy as np
import pytest
import torch

from minirlhf.rewards.base import call_reward, checked_scores, reward_by_token, reward_with_metrics, within

# ---- reward functions -----------------------------------------------------------------------------------------------

PROMPTS, RESPONSES = ["酒店", "很好", "wifi"], ["很好", "", "hello"]


class ByPair:
    def __call__(self, prompts, responses):
        return [len(p) - 10 * len(r) for p, r in zip(prompts, responses, strict=True)]


class ByText:
    def __call__(self, texts):
        return [len(text) for text in texts]


BY_PAIR, BY_TEXT = [2 - 20, 2, 4 - 50], [4, 2, 9]


@pytest.mark.parametrize(("reward", "expected"), [
    (lambda texts: [len(t) for t in texts], BY_TEXT), (ByText(), BY_TEXT), (ByText().__call__, BY_TEXT),
    (lambda prompts, responses: ByPair()(prompts, responses), BY_PAIR), (ByPair(), BY_PAIR),
    (ByPair().__call__, BY_PAIR),
    (lambda texts, scale=2: [scale * len(t) for t in texts], [8, 4, 18]),
    (lambda texts, *, scale=2: [scale * len(t) for t in texts], [8, 4, 18]),
    (lambda p, r, scale=2: [scale * x for x in ByPair()(p, r)], [2 * x for x in BY_PAIR]),
    (functools.partial(lambda scale, texts: [scale * len(t) for t in texts], 2), [8, 4, 18]),
    (functools.partial(lambda scale, p, r: ByPair()(p, r), 2), BY_PAIR),
    (lambda *args: [len(t) for t in args[0]], BY_TEXT),
])  # fmt: skip
def test_a_reward_gets_texts_or_prompts_and_responses_by_its_signature(reward, expected):
    assert call_reward(reward, PROMPTS, RESPONSES).tolist() == expected


# ---- scores of single tokens ----------------------------------------------------------------------------------------

TOKENS = [["很", "好"], [""], ["he", "", "llo"]]


class ByToken:
    def __call__(self, prompts, responses, tokens):
        assert ["".join(row) for row in tokens] == responses
        return [[len(p) + 10.0 * len(token) for token in row] for p, row in zip(prompts, tokens, strict=True)]


BY_TOKEN = [[12, 12], [2], [24, 4, 34]]


@pytest.mark.parametrize("reward", [
    ByToken(), ByToken().__call__, lambda p, r, tokens: ByToken()(p, r, tokens),
    lambda p, r, tokens=None: ByToken()(p, r, tokens),
    lambda p, r, tokens: tuple(map(tuple, ByToken()(p, r, tokens))),
    lambda p, r, tokens: [torch.tensor(row) for row in ByToken()(p, r, tokens)],
    lambda p, r, tokens: [np.array(row) for row in ByToken()(p, r, tokens)],
    lambda p, r, tokens: torch.tensor([[*row, *[math.nan] * (3 - len(row))] for row in ByToken()(p, r, tokens)]),
])  # fmt: skip
def test_a_reward_with_a_third_parameter_tokens_may_score_each_of_them(reward):
    scores = reward_by_token(reward, PROMPTS, RESPONSES, TOKENS)
    assert scores.dtype == torch.float64
    assert scores.tolist() == [[*row, *[0.0] * (3 - len(row))] for row in BY_TOKEN]
    assert call_reward(reward, PROMPTS, RESPONSES, TOKENS).tolist() == [sum(row) for row in BY_TOKEN]


def test_it_may_score_whole_responses_as_well():
    def reward(prompts, responses, tokens):
        return [len(row) for row in tokens]

    assert reward_by_token(reward, PROMPTS, RESPONSES, TOKENS).tolist() == [2, 1, 3]
    assert call_reward(reward, PROMPTS, RESPONSES, TOKENS).tolist() == [2, 1, 3]


def test_without_tokens_characters_stand_for_them():
    seen = []
    call_reward(lambda p, r, tokens: seen.extend(tokens) or [0, 0, 0], PROMPTS, RESPONSES)
    assert seen == [["很", "好"], [""], [*"hello"]]


def test_other_rewards_get_no_tokens():
    assert reward_by_token(ByPair(), PROMPTS, RESPONSES, TOKENS).tolist() == BY_PAIR
    assert reward_by_token(lambda tokens: [len(t) for t in tokens], PROMPTS, RESPONSES, TOKENS).tolist() == BY_TEXT
    assert call_reward(lambda p, r, scale=2: ByPair()(p, r), PROMPTS, RESPONSES, TOKENS).tolist() == BY_PAIR


def test_the_tokens_it_gets_are_its_own():
    def reward(prompts, responses, tokens):
        for row in tokens:
            row.clear()
        return [[1.0, 2.0], [3.0], [4.0, 5.0, 6.0]]

    assert call_reward(reward, PROMPTS, RESPONSES, TOKENS).tolist() == [3, 3, 15]
    assert TOKENS == [["很", "好"], [""], ["he", "", "llo"]]


@pytest.mark.parametrize(("scores", "message"), [
    ([[1.0, 2.0], [3.0]], "token scores must be 3 lists, one a response, got 2"),
    ([[1.0], [2.0], [3.0, 4.0, 5.0]], "response 0 of 2 tokens: scores must be 2 numbers, .* got shape"),
    ([[1.0, 2.0], [3.0], [4.0, 5.0, math.inf]], "response 2 of 3 tokens: scores must be finite, got inf"),
    ([[1.0, 2.0], [3.0], [4.0, 5.0, "6"]], "response 2 of 3 tokens: scores must be 3 numbers"),
    ([[1.0, 2.0], 3.0, [4.0, 5.0, 6.0]], "response 1 of 1 tokens: scores must be 1 numbers"),
    ([[], [], []], "response 0 of 2 tokens"), (np.zeros((3, 2)), r"must be of shape \(3, 3\), got \(3, 2\)"),
    (torch.zeros(3, 4), r"must be of shape \(3, 3\), got \(3, 4\)"), (np.zeros((3, 3, 1)), "scores must be 3 numbers"),
    ([[3e38, 3e38], [0.0], [0.0] * 3], r"scores must be finite, got 6e\+38 for text 0"),
])  # fmt: skip
def test_bad_scores_of_tokens_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        call_reward(lambda prompts, responses, tokens: scores, PROMPTS, RESPONSES, TOKENS)


class Column:
    """As a pandas Series or a jax array: it has its numbers as an array."""

    def __init__(self, numbers):
        self.numbers = numbers

    def __repr__(self):
        return f"Column({self.numbers})"

    def __array__(self, dtype=None, copy=None):
        return np.array(self.numbers, dtype)


@pytest.mark.parametrize("scores", [
    [1, -2.5, 3], (1, -2.5, 3), np.array([1, -2.5, 3]), np.array([1, -2.5, 3], dtype=np.float16),
    [np.float64(1), np.float32(-2.5), np.int64(3)], torch.tensor([1, -2.5, 3]), torch.tensor([1, -2.5, 3]).double(),
    torch.tensor([1, -2.5, 3]).bfloat16(), torch.tensor([1, -2.5, 3], requires_grad=True),
    [torch.tensor(1.0), torch.tensor(-2.5), torch.tensor(3)], [torch.tensor(1.0), -2.5, np.float32(3)],
    [torch.tensor(1.0, requires_grad=True), torch.tensor(-2.5), torch.tensor(3.0)],
    [[1], [-2.5], [3]], torch.tensor([[1], [-2.5], [3]]), np.array([[1], [-2.5], [3]]),
    [np.array([x]) for x in (1, -2.5, 3)],
    [torch.tensor([x]) for x in (1, -2.5, 3)], Column([1, -2.5, 3]),
], ids=repr)  # fmt: skip
def test_scores_of_every_kind_become_an_fp64_tensor(scores):
    result = call_reward(lambda texts: scores, PROMPTS, RESPONSES)
    assert result.dtype == torch.float64 and not result.requires_grad
    assert result.tolist() == [1, -2.5, 3]


@pytest.mark.parametrize("kind", [
    list, tuple, np.array, torch.tensor, Column, lambda x: [[value] for value in x], lambda x: list(np.array(x)),
    lambda x: list(torch.tensor(x, dtype=torch.float64)),
])  # fmt: skip
def test_no_score_is_rounded_to_fp32(kind):
    exact = [0.1, 1 / 3, 2.0**-40 + 1]
    expected = torch.tensor(exact).double().tolist() if kind is torch.tensor else exact  # that one is fp32 already
    assert checked_scores(kind(exact), 3).tolist() == expected


def test_scores_of_tokens_that_are_a_column_are_scores_of_responses():
    column = reward_by_token(lambda p, r, tokens: np.array([[1.0], [2.0], [3.0]]), PROMPTS, RESPONSES, TOKENS)
    assert column.tolist() == [1, 2, 3]
    single = reward_by_token(lambda p, r, tokens: np.array([[1.0], [2.0]]), ["a", "b"], ["c", "d"], [["c"], ["d"]])
    assert single.tolist() == [[1], [2]]


SAID = {"label": "negative", "score": 0.9}


@pytest.mark.parametrize(("scores", "line"), [
    ([SAID] * 3, 'row["score"] if row["label"] == "positive" else 1 - row["score"] for row in output]'),
    ([[SAID, {"label": "positive", "score": 0.1}]] * 3, 'next(x["score"] for x in row if x["label"] == "positive")'),
])  # fmt: skip
def test_what_a_pipeline_returns_is_refused_with_the_line_that_converts_it(scores, line):
    with pytest.raises(ValueError, match=r"a pipeline's .*'negative'.*how sure a label is") as caught:
        call_reward(lambda texts: scores, PROMPTS, RESPONSES)
    assert line in str(caught.value)
    converted = eval(str(caught.value).split("return ")[1].split(", with the name")[0], {"output": scores})
    assert converted == pytest.approx([0.1] * 3)


@pytest.mark.parametrize("buffer", [np.zeros(3), torch.zeros(3, dtype=torch.float64)], ids=["numpy", "torch"])
def test_a_reward_may_use_its_buffer_again(buffer):
    def reward(texts):
        buffer[:] += 1
        return buffer

    first = call_reward(reward, PROMPTS, RESPONSES)
    call_reward(reward, PROMPTS, RESPONSES)
    assert first.tolist() == [1, 1, 1]


@pytest.mark.parametrize("scores", [
    [1, 2], [1, 2, 3, 4], [], 1.0, torch.tensor(1.0), [[1, 2, 3]], torch.zeros(3, 2), torch.zeros(1, 3),
    [torch.zeros(2)] * 3, [1, [2], 3], torch.zeros(3, 1, 1),
], ids=repr)  # fmt: skip
def test_scores_of_another_count_or_shape_are_refused(scores):
    with pytest.raises(ValueError, match="scores must be 3 numbers"):
        call_reward(lambda texts: scores, PROMPTS, RESPONSES)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("kind", [list, np.array, lambda x: [torch.tensor(value) for value in x]])
def test_scores_that_are_not_finite_are_refused_with_their_place(kind, bad):
    with pytest.raises(ValueError, match=r"scores must be finite, got (nan|-?inf) for text 1 \(1 bad in all\)"):
        call_reward(lambda texts: kind([0.0, bad, 1.0]), PROMPTS, RESPONSES)


@pytest.mark.parametrize("scores", [
    [1j, 1.0, 0.0], np.zeros(3, complex), torch.zeros(3, dtype=torch.cfloat), torch.ones(3).to_sparse(),
    None, "123", ["1", "2", "3"], [None, 1, 2], {0: 1, 1: 2, 2: 3}, {1, 2, 3}, iter([1, 2, 3]), object(),
    np.array(["a", "b", "c"]), np.array([1, 2, 3], dtype=object), [10**400, 1, 2],
], ids=lambda x: type(x).__name__)  # fmt: skip
def test_scores_of_the_wrong_type_are_refused(scores):
    with pytest.raises(ValueError, match="scores must be 3 numbers"):
        call_reward(lambda texts: scores, PROMPTS, RESPONSES)


def test_a_score_beyond_fp32_is_refused():
    """Rollouts hold scores in fp32, where this one would become infinite."""
    with pytest.raises(ValueError, match="text 1"):
        call_reward(lambda texts: [0.0, 1e39, 1.0], PROMPTS, RESPONSES)


# ---- time limits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [None, 60.0, 1e300])
def test_within_returns_what_the_function_returns_and_raises_what_it_raises(seconds):
    assert within(seconds, lambda a, b: torch.tensor([a, b]), 1, 2).tolist() == [1, 2]
    for error in (KeyError("x"), TimeoutError("its own"), SystemExit(3), KeyboardInterrupt()):

        def fail(error=error):
            raise error

        with pytest.raises(type(error)) as caught:
            within(seconds, fail)
        assert caught.value is error


def test_a_function_that_hangs_is_left_behind_and_cannot_hold_the_process():
    release = threading.Event()
    start = time.perf_counter()
    with pytest.raises(TimeoutError, match=r"longer than reward_timeout=0\.1 seconds"):
        within(0.1, release.wait)
    assert time.perf_counter() - start < 30
    left = [thread for thread in threading.enumerate() if thread.name == "reward function"]
    assert left and all(thread.daemon for thread in left)
    release.set()


# ---- metrics, and rewards that are async functions ------------------------------------------------------------------


def test_a_reward_may_report_metrics_beside_its_scores_or_by_a_method():
    class Counting:
        def __call__(self, texts):
            return [1.0] * len(texts), {"length": 2, "judge/cost": 0.5}

        def metrics(self):
            return {"judge/requests": 3}

    scored = reward_with_metrics(Counting(), PROMPTS, RESPONSES)
    assert scored.scores.tolist() == [1.0] * len(PROMPTS)
    assert scored.metrics == {"reward/length": 2.0, "judge/cost": 0.5, "judge/requests": 3.0}
    assert call_reward(Counting(), PROMPTS, RESPONSES).tolist() == [1.0] * len(PROMPTS)
    assert reward_with_metrics(lambda texts: (1.0, 2.0, 3.0), PROMPTS, RESPONSES).metrics == {}  # a tuple of scores


@pytest.mark.parametrize("metrics", [{"mean": 1.0}, {"reward/std": 1.0}, {3: 1.0}, {" ": 1.0}, {"x": "much"}])
def test_bad_metrics_are_refused(metrics):
    with pytest.raises(ValueError, match="metric"):
        reward_with_metrics(lambda texts: ([1.0] * len(texts), metrics), PROMPTS, RESPONSES)


def test_a_reward_may_be_an_async_function_that_asks_many_judges_at_once():
    running, most = 0, 0

    async def judge(text):
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.02 if text.startswith(PROMPTS[0]) else 0.0)  # the first answers last
        running -= 1
        return float(len(text))

    async def reward(texts):
        return await asyncio.gather(*map(judge, texts))

    expected = [len(p + r) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert call_reward(reward, PROMPTS, RESPONSES).tolist() == expected  # in order
    assert most == len(PROMPTS)

    async def notebook():  # whose loop runs already
        return call_reward(reward, PROMPTS, RESPONSES).tolist()

    assert asyncio.run(notebook()) == expected
    assert within(5.0, call_reward, reward, PROMPTS, RESPONSES).tolist() == expected


def test_errors_and_bad_scores_of_async_rewards_are_those_of_others():
    async def raising(texts):
        raise KeyError("the judge is out")

    async def short(texts):
        return [1.0]

    async def hanging(texts):
        await asyncio.sleep(1)

    with pytest.raises(KeyError, match="the judge is out"):
        call_reward(raising, PROMPTS, RESPONSES)
    with pytest.raises(ValueError, match="scores must be"):
        call_reward(short, PROMPTS, RESPONSES)
    with pytest.raises(TimeoutError, match="reward_timeout"):
        within(0.05, call_reward, hanging, PROMPTS, RESPONSES)
