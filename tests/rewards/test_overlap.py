"""Threads that score parts of a batch while the next part is sampled."""

import threading
import time

import pytest
import torch

from conftest import VOCAB, make_gpt2
from minirlhf import PPOTrainer, Tokenizer
from minirlhf.rewards.composed import WeightedSum

PROMPTS = ["酒店很好", "w", "房间干净", "早餐", "wifi太差", "前台", "位置"]
SETTINGS = dict(batch_size=7, minibatch_size=7, gen_len=5, top_p=0.9, eos_token_id=VOCAB.index("##a"), device="cpu")


def collected(reward, workers=0, **settings):
    trainer = PPOTrainer(
        make_gpt2(0, scale=4.0), make_gpt2(1), Tokenizer(VOCAB), reward_workers=workers, **SETTINGS, **settings
    )
    return trainer.collect(PROMPTS, reward)


def distinct(texts):
    return [len(set(text)) / 8 for text in texts]


def of_tokens(prompts, responses, tokens):
    return [[len(piece) / 4 for piece in row] for row in tokens]


def reporting(texts):
    return distinct(texts), {"length": sum(map(len, texts)) / len(texts)}


async def awaited(texts):
    return distinct(texts)


@pytest.mark.parametrize("reward", [distinct, of_tokens, reporting, awaited, WeightedSum({"a": (2.0, distinct)})])
@pytest.mark.parametrize("workers", [1, 3, 50])
def test_scores_and_samples_are_those_of_one_call(reward, workers):
    one, several = collected(reward), collected(reward, workers)
    for name in ("tokens", "mask", "response_mask", "scores", "sampling_sets"):
        assert torch.equal(getattr(one, name), getattr(several, name)), name
    assert (one.prompts, one.responses) == (several.prompts, several.responses)
    torch.testing.assert_close(one.logprobs, several.logprobs)
    assert (one.score_shares is None) == (several.score_shares is None)
    assert several.score_shares is None or torch.equal(one.score_shares, several.score_shares)
    assert several.reward_metrics == pytest.approx(one.reward_metrics)


def test_a_part_is_scored_while_the_next_is_sampled():
    """The first call waits until two parts more were asked for, which needs the main thread to go on sampling."""
    calls, third = [], threading.Event()

    def reward(texts):
        calls.append(threading.current_thread())
        if len(calls) == 3:
            third.set()
        assert third.wait(60)
        return distinct(texts)

    assert collected(reward, 3).scores.tolist() == collected(distinct).scores.tolist()
    assert len(calls) == 4 and threading.main_thread() not in calls


def test_a_reward_that_exists_once_gets_its_parts_one_after_the_other():
    at_work, seen = threading.Lock(), []

    class Person:
        scope = "batch"

        def __call__(self, texts):
            assert at_work.acquire(blocking=False), "two calls at once"
            time.sleep(0.01)
            seen.extend(texts)
            at_work.release()
            return distinct(texts)

    assert collected(Person(), 3).texts == seen


def counted_once(texts):
    return distinct(texts)


def test_costs_are_asked_for_once_a_batch():
    counted_once.metrics = iter([{"texts": 7.0}]).__next__
    assert collected(counted_once, 2).reward_metrics == {"reward/texts": 7.0}


def late(texts):
    """The last part, of three texts, takes long."""
    time.sleep(0.5 if len(texts) == 3 else 0.0)
    return distinct(texts)


@pytest.mark.parametrize(("reward", "kind", "text"), [
    (lambda texts: [1.0] * (len(texts) - 1), ValueError, "in the part of the batch from text 0: scores must be 2"),
    (lambda texts: [float("nan") if text.startswith("房间") else 0.0 for text in texts], ValueError,
     "in the part of the batch from text 2: scores must be finite, got nan for text 0"),
    (lambda texts: {}[texts[0]], KeyError, "酒店"),
    (late, TimeoutError, "longer than reward_timeout=0.1 seconds"),
])  # fmt: skip
def test_errors_are_those_of_one_call(reward, kind, text):
    trainer = PPOTrainer(
        make_gpt2(0, scale=4.0), make_gpt2(1), Tokenizer(VOCAB), reward_workers=2,
        reward_timeout=0.1 if kind is TimeoutError else None, **SETTINGS,
    )  # fmt: skip
    before = trainer.generators["sampling"].get_state()
    with pytest.raises(kind, match=text):
        trainer.collect(PROMPTS, reward)
    assert torch.equal(before, trainer.generators["sampling"].get_state())


def test_threads_end_with_the_batch():
    before = threading.active_count()
    collected(distinct, 3)
    deadline = time.monotonic() + 30
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_own_timeouts_of_a_reward_are_its_own():
    def reward(texts):
        raise TimeoutError("the server said nothing")

    with pytest.raises(TimeoutError, match="the server said nothing"):
        collected(reward, 1, reward_timeout=60.0)
