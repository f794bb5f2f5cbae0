"""Rewards made of rewards, against plain Python, and sentiment on command on the starter vocabulary."""

import asyncio
import functools
import json
import math
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import VOCAB, FewSamples, make_bert, make_gpt2
from controlled_sentiment import ControlledSentiment, check_tags
from minirlhf import PPOTrainer, SentimentReward, Tokenizer
from minirlhf.io.files import read_jsonl
from minirlhf.rewards.base import call_reward, reward_by_token
from minirlhf.rewards.composed import Increments, RepetitionPenalty, WeightedSum
from minirlhf.rewards.sentiment import CANARIES

REPO = Path(__file__).resolve().parents[2]
TAGS = {"positive": "[正向]", "neutral": "[中性]", "negative": "[负向]"}
PROMPTS, RESPONSES = ["酒店", "很好", "wifi", ""], ["很好很好", "", "hello world", "好好好好"]


def by_text(texts):
    return [len(text) / 2 for text in texts]


def by_pair(prompts, responses):
    return [len(p) - len(r) for p, r in zip(prompts, responses, strict=True)]


def doubles(scores):
    return torch.tensor(scores, dtype=torch.float64)  # lists of floats pass through fp32


class Reporting:
    """A reward that reports, once, the values given."""

    def __init__(self, **figures):
        self.figures = figures

    def __call__(self, texts):
        return [0.0] * len(texts)

    def metrics(self):
        figures, self.figures = self.figures, {}
        return figures


# ---- weighted sums --------------------------------------------------------------------------------------------------


def test_a_weighted_sum_of_rewards_of_both_forms_and_the_means_of_its_parts():
    reward = WeightedSum({"text": (2.0, by_text), "pair": (-0.5, by_pair)})
    scores = reward(PROMPTS, RESPONSES)
    assert scores.tolist() == [2 * len(p + r) / 2 - 0.5 * (len(p) - len(r))
                               for p, r in zip(PROMPTS, RESPONSES, strict=True)]  # fmt: skip
    assert scores.dtype == torch.float64
    assert reward.metrics() == {
        "reward/parts/text": pytest.approx(sum(len(p + r) / 2 for p, r in zip(PROMPTS, RESPONSES, strict=True)) / 4),
        "reward/parts/pair": pytest.approx(sum(by_pair(PROMPTS, RESPONSES)) / 4),
    }


def test_means_are_over_all_samples_since_the_last_time():
    reward = WeightedSum({"text": (1, by_text)})
    assert reward.metrics() == {}
    reward(["", ""], ["a", "aa"])
    reward([""], ["aaaaaa"])
    assert reward.metrics() == {"reward/parts/text": pytest.approx((0.5 + 1 + 3) / 3)}
    assert reward.metrics() == {}
    reward([""], [""])
    assert reward.metrics() == {"reward/parts/text": 0}
    reward = WeightedSum({"own": (1, lambda texts: ([0.0] * len(texts), {"longest": max(map(len, texts))}))})
    reward(["", ""], ["a", "aa"])  # what a part returned with its scores as well: 2 of two texts, 5 of one
    reward([""], ["aaaaa"])
    assert reward.metrics()["own/reward/longest"] == pytest.approx((2 * 2 + 5) / 3)


def test_what_parts_report_is_passed_on_and_never_overwritten():
    reward = WeightedSum({"a": (1.0, Reporting(cost=1.0, x=2.0)), "b": (1.0, Reporting(cost=3.0))})
    reward([""], ["a"])
    assert reward.metrics() == {
        "reward/parts/a": 0, "reward/parts/b": 0, "cost": 1.0, "x": 2.0, "b/cost": 3.0,
    }  # fmt: skip


def test_parts_that_are_async_functions_are_asked_at_once_and_errors_name_the_part():
    both = threading.Barrier(2, timeout=5)  # passed only if both wait at the same time

    def part(score):
        async def reward(texts):
            await asyncio.to_thread(both.wait)
            return [score] * len(texts), {"asked": score}

        return reward

    reward = WeightedSum({"a": (1.0, part(1.0)), "plain": (1.0, by_text), "b": (10.0, part(2.0))})
    assert reward(["", ""], ["a", "aaa"]).tolist() == [21.5, 22.5]
    assert reward.metrics() == {
        "reward/parts/a": 1.0, "reward/parts/plain": 1.0, "reward/parts/b": 2.0, "a/reward/asked": 1.0,
        "b/reward/asked": 2.0,
    }  # fmt: skip

    async def bad(texts):
        return []

    with pytest.raises(ValueError, match="part 'bad': scores must be 1 numbers"):
        WeightedSum({"plain": (1.0, by_text), "bad": (1.0, bad)})([""], ["a"])

    def broken(texts):
        raise OSError("no connection")

    with pytest.raises(OSError, match="no connection"):  # and the coroutine of the other part is not left behind
        WeightedSum({"broken": (1.0, broken), "bad": (1.0, bad)})([""], ["a"])


@pytest.mark.parametrize(("parts", "message"), [
    ({}, "parts is empty"), ({" ": (1, by_text)}, "names of parts"), ({7: (1, by_text)}, "names of parts"),
    ({"a": (math.nan, by_text)}, "weight of part 'a' must be a finite number, got nan"),
    ({"a": (True, by_text)}, "weight of part 'a'"), ({"a": ("1", by_text)}, "weight of part 'a'"),
    ({"a": (1, by_text), "b": (1, "text")}, "part 'b' must be a reward, got 'text' of type str"),
])  # fmt: skip
def test_bad_parts_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        WeightedSum(parts)


def test_a_part_with_bad_scores_is_named():
    reward = WeightedSum({"fine": (1.0, by_text), "broken": (1.0, lambda texts: [math.nan, 1])})
    with pytest.raises(ValueError, match=r"part 'broken': scores must be finite, got nan for text 0"):
        reward(["", ""], ["", ""])


# ---- repetition -----------------------------------------------------------------------------------------------------


def test_the_repetition_penalty_by_hand():
    # 好好好好: 好好 three times, two of them repeated. 很好很好: 很好 好很 很好. abcabc: abc bca cab abc.
    assert RepetitionPenalty(2)([""] * 5, ["好好好好", "很好很好", "abcd", "a", ""]) == pytest.approx(
        [-2 / 3, -1 / 3, 0, 0, 0]
    )
    assert RepetitionPenalty()([""], ["abcabc"]) == pytest.approx([-1 / 4])
    assert RepetitionPenalty(1)(["aaaa"], ["aab"]) == pytest.approx([-1 / 3])


@given(st.text(alphabet="ab很好", max_size=12), st.integers(1, 4))
def test_the_repetition_penalty_is_the_share_of_n_grams_that_were_there_before(text, n):
    grams = [text[i : i + n] for i in range(len(text) - n + 1)]
    repeated = sum(gram in grams[:i] for i, gram in enumerate(grams))
    (penalty,) = RepetitionPenalty(n)([""], [text])
    assert penalty == pytest.approx(-repeated / len(grams) if grams else 0) and -1 < penalty <= 0


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_a_bad_n_is_refused(bad):
    with pytest.raises(ValueError, match=r"RepetitionPenalty.n must be an integer of at least 1"):
        RepetitionPenalty(bad)


# ---- rewards of single tokens ---------------------------------------------------------------------------------------

TOKENS = [["很好", "很", "", "好"], [""], ["hello", " world"], [*"好好好好"]]


def by_token(prompts, responses, tokens):
    return [[float(len(token)) for token in row] for row in tokens]


def table(rows):
    return [[*row, *[0.0] * (4 - len(row))] for row in rows]


def test_a_sum_of_scores_of_tokens_and_of_responses_gives_the_latter_to_the_last_token():
    reward = WeightedSum({"token": (2.0, by_token), "pair": (-0.5, by_pair), "text": (1.0, by_text)})
    whole = [-0.5 * p + t for p, t in zip(by_pair(PROMPTS, RESPONSES), map(lambda p, r: len(p + r) / 2, PROMPTS,
                                                                           RESPONSES), strict=True)]  # fmt: skip
    expected = [[2.0 * len(token) for token in row] for row in TOKENS]
    for row, last in zip(expected, whole, strict=True):
        row[-1] += last
    scores = reward_by_token(reward, PROMPTS, RESPONSES, TOKENS)
    assert scores.tolist() == table(expected)
    lengths = [len(response) for response in RESPONSES]
    assert reward.metrics()["reward/parts/token"] == pytest.approx(sum(lengths) / 4)
    assert call_reward(reward, PROMPTS, RESPONSES, TOKENS).tolist() == [sum(row) for row in expected]
    assert reward(PROMPTS, RESPONSES).tolist() == [sum(row) for row in expected]


def test_a_sum_of_scores_of_responses_stays_one_a_response():
    reward = WeightedSum({"pair": (-0.5, by_pair), "text": (1.0, by_text)})
    scores = reward_by_token(reward, PROMPTS, RESPONSES, TOKENS)
    assert scores.shape == (4,) and scores.tolist() == reward(PROMPTS, RESPONSES).tolist()


def test_a_repetition_is_charged_to_the_token_that_completes_it():
    # 很好很好: 很好 again at its end. 好好好好: 好好 again at the third and the fourth character.
    reward = RepetitionPenalty(2, per_token=True)
    expected = [[0, 0, 0, -1 / 3], [0], [0, 0], [0, 0, -1 / 3, -1 / 3]]
    scores = reward_by_token(reward, PROMPTS, RESPONSES, TOKENS)
    torch.testing.assert_close(scores, doubles(table(expected)))
    assert reward_by_token(RepetitionPenalty(2), PROMPTS, RESPONSES, TOKENS).shape == (4,)


@given(st.lists(st.text(alphabet="ab很好", max_size=3), min_size=1, max_size=8), st.integers(1, 4))
def test_charges_of_tokens_add_up_to_the_penalty(tokens, n):
    scores = reward_by_token(RepetitionPenalty(n, per_token=True), [""], ["".join(tokens)], [tokens])
    assert scores.sum().item() == pytest.approx(RepetitionPenalty(n)([""], ["".join(tokens)])[0], abs=1e-6)
    text = ""
    for token, charge in zip(tokens, scores[0].tolist(), strict=True):
        before, text = text, text + token
        grams = [text[end - n : end] for end in range(n, len(text) + 1)]
        again = [g for i, g in enumerate(grams) if g in grams[:i] and i + n > len(before)]
        assert charge == pytest.approx(-len(again) / max(1, sum(map(len, tokens)) - n + 1), abs=1e-6)


def test_increments_are_what_each_token_adds_to_the_score():
    asked = []

    def squared(prompts, responses):
        asked.extend(zip(prompts, responses, strict=True))
        return [10 * len(p) + len(r) ** 2 for p, r in zip(prompts, responses, strict=True)]

    scores = reward_by_token(Increments(squared), PROMPTS, RESPONSES, TOKENS)
    assert scores.tolist() == table([[20 + 4, 5, 0, 7], [20], [40 + 25, 121 - 25], [1, 3, 5, 7]])
    assert asked[:3] == [
        ("酒店", "很好"),
        ("酒店", "很好很"),
        ("酒店", "很好很好"),
    ]  # and none for the token without text
    assert len(asked) == 3 + 1 + 2 + 4
    whole = [10 * len(p) + len(r) ** 2 for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    assert scores.sum(-1).tolist() == whole == Increments(squared)(PROMPTS, RESPONSES).tolist()
    assert call_reward(Increments(squared), PROMPTS, RESPONSES).tolist() == whole  # whatever the tokens are


def test_increments_of_texts_and_of_sentiment_on_command():
    tokens = [["很", "好"], ["太", "", "差"]]
    reward = Increments(ControlledSentiment(lambda texts: [len(text) / 8 for text in texts]))
    scores = reward_by_token(reward, ["[正向]酒店", "[负向]酒店"], ["很好", "太差"], tokens)
    assert scores.tolist() == [[3 / 8, 1 / 8, 0], [5 / 8, 0, -1 / 8]]


@pytest.mark.parametrize("bad", [None, 1.0, "reward"])
def test_increments_of_something_else_are_refused(bad):
    with pytest.raises(ValueError, match="Increments must be of a reward, got"):
        Increments(bad)
    with pytest.raises(ValueError, match=r"RepetitionPenalty.per_token must be True or False, got 1"):
        RepetitionPenalty(2, per_token=1)


def test_a_part_with_bad_scores_of_tokens_is_named():
    reward = WeightedSum({"fine": (1.0, by_token), "broken": (1.0, lambda p, r, tokens: [[1.0]] * 4)})
    with pytest.raises(ValueError, match=r"part 'broken': response 0 of 4 tokens: scores must be 4 numbers"):
        call_reward(reward, PROMPTS, RESPONSES, TOKENS)


def test_ppo_gives_a_composed_reward_to_the_tokens_it_names(tokenizer):
    sizes = dict(n_embd=16, n_layer=1, n_head=2)
    reward = WeightedSum({
        "words": (0.5, Increments(by_text)), "repetition": (1.0, RepetitionPenalty(2, per_token=True)),
        "length": (1.0, lambda prompts, responses: [-abs(len(response) - 4) / 4 for response in responses]),
    })  # fmt: skip
    trainer = PPOTrainer(
        make_gpt2(0, **sizes), make_gpt2(1, **sizes), tokenizer, batch_size=4, steps=4, gen_len=4, device="cpu",
        init_kl_coef=0.0,
    )  # fmt: skip
    rollout = trainer.collect(["酒店", "位置"] * 2, reward)
    responses = list(rollout.responses)
    assert rollout.scores.tolist() == pytest.approx(reward(list(rollout.prompts), responses).tolist(), abs=1e-5)
    for ids, shares, prompt, response in zip(
        rollout.tokens[:, -4:].tolist(), rollout.score_shares.tolist(), rollout.prompts, responses, strict=True
    ):
        pieces = tokenizer.decode_pieces(ids)
        charges = RepetitionPenalty(2, per_token=True)([prompt], [response], [pieces])[0]
        expected = [len(piece) / 4 + charge for piece, charge in zip(pieces, charges, strict=True)]
        expected[0] += len(prompt) / 4
        expected[-1] -= abs(len(response) - 4) / 4
        assert shares == pytest.approx(expected, abs=1e-5)
    stats = trainer.step(rollout)
    assert stats["objective/reward_with_kl"] == pytest.approx(rollout.scores.mean().item(), abs=1e-5)


# ---- sentiment on command -------------------------------------------------------------------------------------------


def oracle(name, p):
    return {"positive": p, "neutral": 1 - abs(2 * p - 1), "negative": 1 - p}[name]


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("name", TAGS)
def test_the_reward_follows_the_tag(name, p):
    reward = ControlledSentiment(lambda texts: [p] * len(texts))
    assert reward([TAGS[name] + "酒店"], ["很好"]).tolist() == pytest.approx([oracle(name, p)])


@pytest.mark.parametrize("form", ["texts", "pairs"])
def test_the_tag_is_removed_before_scoring_and_nothing_else(form):
    seen = []

    def by_texts(texts):
        seen.extend(texts)
        return [0.5] * len(texts)

    def by_pairs(prompts, responses):
        seen.extend(zip(prompts, responses, strict=True))
        return [0.5] * len(prompts)

    prompts, responses = ["[正向]酒店", "[中性] 酒[店", "[负向]", "[正向]酒店[负向]"], ["很好", "[正向]", "差", ""]
    ControlledSentiment(by_texts if form == "texts" else by_pairs)(prompts, responses)
    rests = ["酒店", " 酒[店", "", "酒店[负向]"]
    pairs = list(zip(rests, responses, strict=True))
    assert seen == (pairs if form == "pairs" else [p + r for p, r in pairs])


def test_a_mixed_batch_keeps_its_order():
    names = ["negative", "positive", "neutral", "positive", "negative"]
    ps = [0.1, 0.2, 0.3, 0.4, 0.5]
    reward = ControlledSentiment(lambda texts: torch.tensor(ps))
    scores = reward([TAGS[name] + "酒店" for name in names], [""] * 5)
    expected = [oracle(name, p) for name, p in zip(names, ps, strict=True)]
    assert scores.tolist() == pytest.approx(expected) and scores.dtype == torch.float64
    assert ps == [0.1, 0.2, 0.3, 0.4, 0.5]


@pytest.mark.parametrize("prompt", [
    "酒店", "", "[正面]酒店", " [正向]酒店", "[正向", "正向酒店", "[正向][负向]酒店", "[正向][正向]酒店", "酒店[正向]",
    "［正向］酒店",
])  # fmt: skip
def test_a_prompt_without_exactly_one_tag_in_front_is_refused_before_scoring(prompt):
    def sentiment(texts):
        raise AssertionError("it was scored")

    with pytest.raises(ValueError, match=r"must begin with exactly one of \[正向\], \[中性\], \[负向\], got "):
        ControlledSentiment(sentiment)(["[正向]酒店", prompt], ["", ""])


@pytest.mark.parametrize("bad", [-0.25, 1.25, 7.0])
def test_a_sentiment_outside_0_to_1_is_refused(bad):
    with pytest.raises(ValueError, match=rf"sentiment must be in \[0, 1\], got {bad} for text 1"):
        ControlledSentiment(lambda texts: [0.5, bad])(["[正向]a", "[负向]a"], ["", ""])


# ---- tags and tokens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["gpt2-chinese-reviews-small", "bert-chinese-reviews-sentiment-small"])
def test_tags_are_distinct_tokens_of_the_starter_vocabulary_and_come_back(model):
    tokenizer = Tokenizer.from_pretrained(REPO / "weights" / model)
    check_tags(tokenizer)
    pieces = {tag: [tokenizer.vocab[i] for i in tokenizer.encode_prompt(tag + "酒店")] for tag in TAGS.values()}
    assert pieces == {tag: ["[CLS]", *tag, "酒", "店"] for tag in TAGS.values()}  # one token a character, none [UNK]
    for tag in TAGS.values():
        assert tokenizer.decode(tokenizer.encode_prompt(tag + "酒店")) == tag + "酒店"


def test_tags_that_a_vocabulary_cannot_spell_are_refused():
    spelled = [*VOCAB, *"[]正中负向性"]
    check_tags(Tokenizer(spelled))
    for char in "[]正中负向性":
        with pytest.raises(ValueError, match=r"the vocabulary cannot spell the tag \["):
            check_tags(Tokenizer([token for token in spelled if token != char]))


# ---- the example ----------------------------------------------------------------------------------------------------


@pytest.fixture
def example(call, tmp_path):
    """Run the example on small random models. Returns its error, if any, and what it printed."""
    tokenizer = Tokenizer([*VOCAB, *"[]正中负向性"])
    size = dict(vocab_size=len(tokenizer))
    make_gpt2(0, n_embd=16, n_layer=1, n_head=2, n_positions=32, **size).save_pretrained(tmp_path / "policy")
    bert = make_bert(0, id2label={0: "negative", 1: "positive"}, **size)
    good, bad = SentimentReward(bert, tokenizer, device="cpu")(list(CANARIES)).tolist()
    with torch.no_grad():
        bert.classifier.weight.mul_(1 if good > bad else -1)
    bert.save_pretrained(tmp_path / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(tmp_path / name)
    models = ("--policy", tmp_path / "policy", "--reward", tmp_path / "reward")
    return functools.partial(call, REPO / "examples" / "controlled_sentiment.py", *models)


def test_the_example_trains_all_three_and_says_how_each_fares(example, tmp_path, monkeypatch):
    monkeypatch.setattr("minirlhf.evaluation.evaluate.EvaluationConfig", FewSamples)
    run = tmp_path / "run"
    error, out = example("--steps", 6, "--batch-size", 3, "--samples", 4, "--output", run)
    assert error is None
    metrics, (samples,) = read_jsonl(run / "metrics.jsonl"), read_jsonl(run / "samples.jsonl")
    assert [line["step"] for line in metrics] == [1, 2] and samples["step"] == 2
    sentiment = SentimentReward.from_pretrained(tmp_path / "reward", device="cpu")
    rewards, sentiments = {name: [] for name in TAGS}, []
    for text, score in samples["samples"]:  # the whole last batch
        (name,) = (name for name, tag in TAGS.items() if text.startswith(tag))
        response = text[6:]  # after a tag of four characters and a prompt of two
        grams = [response[i : i + 2] for i in range(len(response) - 1)]
        penalty = 1 - len(set(grams)) / len(grams) if grams else 0
        reward = oracle(name, sentiment([text[4:]]).item())
        rewards[name].append(reward - 0.5 * penalty)
        sentiments.append(reward)
        assert score == pytest.approx(rewards[name][-1], abs=1e-5)
    for name, values in rewards.items():
        assert [metrics[-1][f"reward/{name}"]] == pytest.approx(values, abs=1e-5)  # one of each
    assert metrics[-1]["reward/parts/sentiment"] == pytest.approx(sum(sentiments) / 3, abs=1e-5)
    assert metrics[-1]["reward/parts/repetition"] <= 0
    summary = json.loads((run / "summary.json").read_text())
    assert {f"{name}/{model}/reward" for name in TAGS for model in ("policy", "reference")} <= summary.keys()
    for name, tag in TAGS.items():
        for figure, shown in (("reward", "reward"), ("p_positive", "P(positive)"), ("from_half", "|P - 1/2|")):
            before, after = (summary[f"{name}/{model}/{figure}"] for model in ("reference", "policy"))
            assert f"{tag} {shown:11} {before:.3f} -> {after:.3f}" in out
        for model in ("reference", "policy"):
            p, reward = (summary[f"{name}/{model}/{figure}"] for figure in ("p_positive", "reward"))
            half = summary[f"{name}/{model}/from_half"]
            assert reward == pytest.approx({"positive": p, "neutral": 1 - 2 * half, "negative": 1 - p}[name], abs=1e-5)
    assert (run / "before_after.md").read_text(encoding="utf-8").count("| prompt |") == 3
    assert Tokenizer.from_pretrained(run / "policy").vocab[-1] == "性"


def test_the_example_refuses_a_vocabulary_without_the_tags(example, tmp_path):
    Tokenizer(VOCAB).save_pretrained(tmp_path / "policy")
    error, _ = example("--output", tmp_path / "run")
    assert error == "error: the vocabulary cannot spell the tag [正向]: a character of it has no token"
    assert not (tmp_path / "run").exists()
