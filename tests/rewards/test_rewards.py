"""The sentiment reward against transformers' pipeline, and what a reward function may return."""

import functools
import json
import math
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from transformers import pipeline

from conftest import VOCAB, make_bert
from minirlhf import SentimentReward, Tokenizer
from minirlhf.rewards.base import CANARIES, call_reward, reward_by_token, within

LABELS = {0: "negative (stars 1, 2 and 3)", 1: "positive (stars 4 and 5)"}
TEXTS = ["很好", "", "酒店位置很好，服务非常满意！推荐", "房间太脏", "hello world wifi", "差" * 30, "早餐一般。",
         "好" * 200, "😀"]  # fmt: skip


def make_reward(id2label=None, seed: int = 0, **options) -> SentimentReward:
    model = make_bert(seed=seed, scale=10.0, id2label=id2label or LABELS)
    return SentimentReward(model, Tokenizer(VOCAB), device="cpu", **options)


def probabilities_one_by_one(reward: SentimentReward, texts: list[str]) -> torch.Tensor:
    limit = reward.model.config.max_position_embeddings
    rows = [torch.tensor([reward.tokenizer.encode(text, limit)]) for text in texts]
    return torch.cat([reward.model(row).softmax(-1) for row in rows])


# ---- the sentiment reward -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("id2label", "positive_label", "column"), [
    (LABELS, None, 1), ({0: LABELS[1], 1: LABELS[0]}, None, 0), ({0: "Positive", 1: "neutral", 2: "negative"}, None, 0),
    ({0: "负面", 1: "正面"}, None, 1), ({1: "LABEL_0", 0: "LABEL_1"}, "LABEL_0", 1), (LABELS, LABELS[0], 0),
])  # fmt: skip
def test_the_positive_label_is_bound_by_name(id2label, positive_label, column):
    reward = make_reward(id2label, positive_label=positive_label)
    expected = probabilities_one_by_one(reward, TEXTS)
    assert expected.std(0).min() > 0.01  # texts and columns differ
    torch.testing.assert_close(reward(TEXTS), expected[:, column], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("id2label", "positive_label", "message"), [
    ({0: "LABEL_0", 1: "LABEL_1"}, None, "cannot tell the positive label among"),
    ({0: "positive a", 1: "positive b"}, None, "pass positive_label="),
    ({0: "not positive", 1: "negative"}, None, "cannot tell the positive label among"),
    (LABELS, "positive", "positive_label must be one of"),
])  # fmt: skip
def test_a_positive_label_that_cannot_be_told_is_refused(id2label, positive_label, message):
    with pytest.raises(ValueError, match=message):
        make_reward(id2label, positive_label=positive_label)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_scores_keep_the_order_of_the_texts(batch_size):
    reward = make_reward(batch_size=batch_size)
    expected = probabilities_one_by_one(reward, TEXTS)
    torch.testing.assert_close(reward.probabilities(TEXTS), expected, rtol=1e-5, atol=1e-6)
    backwards = reward.probabilities(TEXTS[::-1])
    torch.testing.assert_close(backwards, expected.flip(0), rtol=1e-5, atol=1e-6)
    assert reward(TEXTS).dtype == torch.float32 and reward(TEXTS).shape == (len(TEXTS),)


def test_no_texts_no_scores():
    assert make_reward()([]).shape == (0,)


def test_the_reward_is_in_evaluation_mode_and_gets_no_gradient():
    model = make_bert(id2label=LABELS).train()
    reward = SentimentReward(model, Tokenizer(VOCAB), device="cpu")
    first, second = reward(TEXTS), reward(TEXTS)
    assert torch.equal(first, second) and not first.requires_grad


def test_classify_equals_the_pipeline_of_transformers(tmp_path):
    reward = make_reward()
    with torch.no_grad():  # both labels are to occur
        reward.model.classifier.bias[1] -= reward.probabilities(TEXTS).log().diff().mean()
    reward.model.save_pretrained(tmp_path)
    reward.tokenizer.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights know no polarity
        ours = SentimentReward.from_pretrained(tmp_path, device="cpu").classify(TEXTS)
    classify = pipeline("sentiment-analysis", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu")
    theirs = classify(TEXTS, truncation=True, max_length=64)
    assert {row["label"] for row in theirs} == set(LABELS.values())
    assert [row["label"] for row in ours] == [row["label"] for row in theirs]
    assert [row["score"] for row in ours] == pytest.approx([row["score"] for row in theirs], abs=1e-5)


@pytest.mark.parametrize(("precision", "low", "high"), [("fp32", 0, 1e-4), ("bf16", 1e-3, 0.3)])
def test_the_precision_is_that_of_the_forward_passes(precision, low, high):
    exact, ours = make_reward(), make_reward(precision=precision).probabilities(TEXTS)
    exact.model.double()
    error = (ours - exact.probabilities(TEXTS)).abs().max()
    assert ours.dtype == torch.float32 and low <= error < high
    with pytest.raises(ValueError, match="precision must be one of"):
        make_reward(precision="int8")


def test_the_precision_auto_is_bf16_where_it_is_as_good(monkeypatch):
    assert make_reward().precision_choice.name == make_reward(precision="auto").precision.name == "fp32"  # it is small
    monkeypatch.setattr("minirlhf.device.precision.LARGE_MODEL", 1)
    monkeypatch.setattr("minirlhf.device.precision_choice.has_native_bf16", lambda device: True)
    assert make_reward().precision.name == "fp32"
    ours = make_reward(precision="auto")
    assert ours.precision.name == "bf16" and str(ours.precision_choice).startswith("precision auto: bf16 (")
    assert torch.equal(ours(TEXTS), make_reward(precision="bf16")(TEXTS))


def test_a_vocabulary_of_another_size_is_refused():
    with pytest.raises(ValueError, match=f"vocabulary has {len(VOCAB) + 1} tokens.*made for {len(VOCAB)}"):
        SentimentReward(make_bert(), Tokenizer([*VOCAB, "extra"]), device="cpu")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(batch_size):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make_reward(batch_size=batch_size)


def test_reversed_labels_give_a_warning(tmp_path):
    # Of these two models, whose labels are swapped, exactly one can be in the right order.
    model = make_bert(scale=10.0, id2label=LABELS)
    good, bad = SentimentReward(model, Tokenizer(VOCAB), device="cpu")(list(CANARIES)).tolist()
    assert good != bad
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for id2label, reversed_ in ((LABELS, good < bad), ({0: LABELS[1], 1: LABELS[0]}, good > bad)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": id2label}))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            SentimentReward.from_pretrained(tmp_path, device="cpu")
        assert [w for w in caught if "labels in the right order" in str(w.message)] == caught
        assert len(caught) == reversed_
        assert all(w.filename == __file__ for w in caught)  # it points at the caller


def test_loading_passes_options_on_and_names_what_is_missing(tmp_path):
    make_bert(id2label={0: "A", 1: "B"}).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vocab.txt"):
        SentimentReward.from_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reward = SentimentReward.from_pretrained(tmp_path, positive_label="B", batch_size=3, device="cpu")
    assert (reward.positive, reward.batch_size) == (1, 3)


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
    ([[3e38, 3e38], [0.0], [0.0] * 3], "scores must be finite, got 6.0.*for text 0"),
])  # fmt: skip
def test_bad_scores_of_tokens_are_refused(scores, message):
    with pytest.raises(ValueError, match=message):
        call_reward(lambda prompts, responses, tokens: scores, PROMPTS, RESPONSES, TOKENS)


def test_lists_of_scores_from_a_reward_that_gets_no_tokens_are_refused():
    with pytest.raises(ValueError, match="scores must be 3 numbers"):
        call_reward(lambda prompts, responses: [[1.0], [2.0], [3.0]], PROMPTS, RESPONSES, TOKENS)


def test_a_reward_may_change_the_lists_it_gets():
    prompts, responses = list(PROMPTS), list(RESPONSES)

    def reward(prompts, responses):
        prompts.clear()
        responses.clear()
        return [1, 2, 3]

    call_reward(reward, prompts, responses)
    assert (prompts, responses) == (PROMPTS, RESPONSES)


@pytest.mark.parametrize("scores", [
    [1, -2.5, 3], (1, -2.5, 3), np.array([1, -2.5, 3]), np.array([1, -2.5, 3], dtype=np.float16),
    [np.float64(1), np.float32(-2.5), np.int64(3)], torch.tensor([1, -2.5, 3]), torch.tensor([1, -2.5, 3]).double(),
    torch.tensor([1, -2.5, 3]).bfloat16(), torch.tensor([1, -2.5, 3], requires_grad=True),
    [torch.tensor(1.0), torch.tensor(-2.5), torch.tensor(3)], [torch.tensor(1.0), -2.5, np.float32(3)],
    [torch.tensor(1.0, requires_grad=True), torch.tensor(-2.5), torch.tensor(3.0)],
], ids=repr)  # fmt: skip
def test_scores_of_every_kind_become_an_fp64_tensor(scores):
    result = call_reward(lambda texts: scores, PROMPTS, RESPONSES)
    assert result.dtype == torch.float64 and not result.requires_grad
    assert result.tolist() == [1, -2.5, 3]


@pytest.mark.parametrize("buffer", [np.zeros(3), torch.zeros(3, dtype=torch.float64)], ids=["numpy", "torch"])
def test_a_reward_may_use_its_buffer_again(buffer):
    def reward(texts):
        buffer[:] += 1
        return buffer

    first = call_reward(reward, PROMPTS, RESPONSES)
    call_reward(reward, PROMPTS, RESPONSES)
    assert first.tolist() == [1, 1, 1]


@pytest.mark.parametrize("scores", [
    [1, 2], [1, 2, 3, 4], [], 1.0, torch.tensor(1.0), [[1, 2, 3]], [[1], [2], [3]], torch.zeros(3, 1),
    [torch.zeros(2)] * 3, [1, [2], 3],
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


def test_an_error_in_a_reward_passes_through():
    def reward(texts):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        call_reward(reward, PROMPTS, RESPONSES)


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
