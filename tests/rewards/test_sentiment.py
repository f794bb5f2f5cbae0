"""The sentiment reward: which label is good, transformers' pipeline beside it, and texts that show a wrong order."""

import json
import math
import warnings

import numpy as np
import pytest
import torch
from transformers import pipeline

from conftest import VOCAB, make_bert, rewrite_config
from minirlhf import BertClassifier, BertConfig, SentimentReward, Tokenizer
from minirlhf.rewards.labels import label_order, label_values
from minirlhf.rewards.sentiment import CANARIES, CHINESE_CANARIES, ENGLISH_CANARIES

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
    (LABELS, None, 1), ({0: LABELS[1], 1: LABELS[0]}, None, 0),
    ({0: "Positive", 1: "neutral", 2: "negative"}, "Positive", 0),
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
    (LABELS, "positive", "positive_label must be one of"), (LABELS, ["positive"], "positive_label must be one of"),
    (LABELS, list(LABELS.values()), "must tell labels apart, but gives each of"),
    (LABELS, [], "must tell labels apart"), (LABELS, 1, "must be one of .*, got 1"),
    (LABELS, [["x"]], "must be one of"),
    (LABELS, {LABELS[0]: 10**400}, "a finite number, got 1000"), (LABELS, math.nan, "must be one of .*, got nan"),
    (LABELS, {LABELS[0]: math.nan}, "a finite number, got nan"), (LABELS, {LABELS[0]: "1"}, "a finite number, got '1'"),
])  # fmt: skip
def test_a_positive_label_that_cannot_be_told_is_refused(id2label, positive_label, message):
    with pytest.raises(ValueError, match=message):
        make_reward(id2label, positive_label=positive_label)


@pytest.mark.parametrize(("labels", "expected"), [
    ("Very Negative, Negative, Neutral, Positive, Very Positive", [0, 0.25, 0.5, 0.75, 1]),
    ("非常正面, 负面, 中性, 正面, 非常负面", [1, 0.25, 0.5, 0.75, 0]),
    ("negative, neutral, positive, strongly positive", [0, 1 / 3, 2 / 3, 1]),
    ("very_negative, somewhat_negative, somewhat_positive, very_positive", [0, 0.25, 0.75, 1]),
    ("POS, NEU, NEG", [1, 0.5, 0]), ("VeryPositive, negativeReview", [1, 0]),
    ("1 star, 2 stars, 3 stars, 4 stars, 5 stars", [0, 0.25, 0.5, 0.75, 1]),
    ("五星, 一星, 二星", [1, 0, 0.25]), ("★☆☆☆☆, ★★★★★, ★★★☆☆", [0, 1, 0.5]), ("one star, five stars", [0, 1]),
    ("很差, 较差, 一般, 较好, 很好", [0, 0.25, 0.5, 0.75, 1]),
    ("正面情绪, 负面情绪", [1, 0]), ("满意, 不满意, 非常不满意", [1, 1 / 3, 0]),
    ("negative (stars 1 and 2), positive (stars 3 to 5)", [0, 1]), ("good, bad", [1, 0]),
])  # fmt: skip
def test_an_ordered_scale_is_read_from_its_names(labels, expected):
    names = labels.split(", ")
    assert label_values(names) == pytest.approx(expected)
    reward = make_reward(dict(enumerate(names)))
    by_hand = (probabilities_one_by_one(reward, TEXTS) * torch.tensor(expected)).sum(-1)
    torch.testing.assert_close(reward(TEXTS), by_hand, rtol=1e-5, atol=1e-6)
    assert reward.positive == expected.index(1)


@pytest.mark.parametrize("labels", [
    "LABEL_0, LABEL_1", "0, 1", "1, 2, 3, 4, 5", "positive, other", "positive, not positive", "good, not good",
    "正常, 异常",
    "positive, Positive review", "very positive, extremely positive, negative", "1 star, negative", "joy, anger",
    "negative, neutral, positive, irrelevant", "five, one", "many stars, few stars", "1 star, one star", "大好, 大差",
])  # fmt: skip
def test_names_that_say_no_order_are_refused_with_the_ways_to_say_it(labels):
    names = labels.split(", ")
    assert label_order(names) is None
    with pytest.raises(
        ValueError, match="pass positive_label= with the good one, a list of the good ones, or"
    ) as caught:
        make_reward(dict(enumerate(names)))
    assert str(names) in str(caught.value) and f"{{{names[0]!r}: ..., {names[1]!r}: ..." in str(caught.value)


@pytest.mark.parametrize(("positive_label", "values", "meaning"), [
    ("b", [0, 1, 0], "P('b')"), (["a", "c"], [1, 0, 1], "P('a') + P('c')"), (("c",), [0, 0, 1], "P('c')"),
    ({"a": -1, "c": np.float32(0.5)}, [-1, 0, 0.5], "-1 P('a') + 0.5 P('c')"),
])  # fmt: skip
def test_one_label_several_or_a_number_for_each(positive_label, values, meaning):
    reward = make_reward({0: "a", 1: "b", 2: "c"}, positive_label=positive_label)
    by_hand = probabilities_one_by_one(reward, TEXTS) @ torch.tensor(values, dtype=torch.float32)
    torch.testing.assert_close(reward(TEXTS), by_hand, rtol=1e-5, atol=1e-6)
    assert reward.meaning == meaning and reward.values.tolist() == values


def test_the_meaning_of_a_scale_is_its_formula():
    assert make_reward().meaning == f"P({LABELS[1]!r})"
    scale = {0: "negative", 1: "neutral", 2: "positive"}
    assert make_reward(scale).meaning == "0.5 P('neutral') + P('positive')"
    assert make_reward(scale, positive_label="positive").meaning == "P('positive')"


def test_rounding_leads_no_score_out_of_its_range():
    names = ["bad", "neutral", "good", "very good"]
    reward = make_reward(dict(enumerate(names)), positive_label=names[2:])
    reward.model.classifier.weight.data.zero_()
    reward.model.classifier.bias.data = torch.tensor([-100.0, -100.0, 0.1, 0.7])  # two of fp32 whose sum is above 1
    assert reward(["a"]).item() <= 1


@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
def test_scores_keep_the_order_of_the_texts(batch_size):
    reward = make_reward(batch_size=batch_size)
    expected = probabilities_one_by_one(reward, TEXTS)
    torch.testing.assert_close(reward.probabilities(TEXTS), expected, rtol=1e-5, atol=1e-6)
    backwards = reward.probabilities(TEXTS[::-1])
    torch.testing.assert_close(backwards, expected.flip(0), rtol=1e-5, atol=1e-6)
    assert reward(TEXTS).dtype == torch.float32 and reward(TEXTS).shape == (len(TEXTS),)


def test_the_reward_is_in_evaluation_mode_and_gets_no_gradient():
    model = make_bert(id2label=LABELS).train()
    reward = SentimentReward(model, Tokenizer(VOCAB), device="cpu")
    first, second = reward(TEXTS), reward(TEXTS)
    assert torch.equal(first, second) and not first.requires_grad


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


def test_models_and_tokenizers_of_another_library_are_refused_by_name():
    with pytest.raises(ValueError, match=r"got a Linear: SentimentReward\.from_pretrained"):
        SentimentReward(torch.nn.Linear(1, 1), Tokenizer(VOCAB))
    with pytest.raises(ValueError, match=r"must be a minirlhf\.Tokenizer, got a str"):
        SentimentReward(make_bert(), "bert")


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


ENGLISH = sorted({word for text in ENGLISH_CANARIES for word in text.replace(",", " ,").split()})
SCALE = {0: "negative", 1: "neutral", 2: "positive"}


def save_scorer(folder, vocab, id2label, good: str, bad: str):
    """A BERT whose first label's logit is the number of bad words less that of good ones, and whose last one's is the
    opposite: an average word counts for a label in the middle."""
    tokenizer = Tokenizer([*VOCAB[:104], *vocab])
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = BertClassifier(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, id2label=id2label,
                                      hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))  # fmt: skip
    last = len(id2label) - 1
    ids = torch.tensor(tokenizer.encode_batch([good, bad]))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(ids), torch.tensor([last, 0])).backward()
        optimizer.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def warnings_of_loading(folder, **options) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        SentimentReward.from_pretrained(folder, device="cpu", **options)
    return [str(w.message) for w in caught]


def test_an_english_scorer_is_tested_in_english(tmp_path):
    good, bad = "the room was clean", "the room was dirty"
    save_scorer(tmp_path, ENGLISH, LABELS, good, bad)
    assert warnings_of_loading(tmp_path) == []
    save_scorer(tmp_path, ENGLISH, LABELS, bad, good)
    (message,) = warnings_of_loading(tmp_path)
    assert "clean" in message and "dirty" in message and "labels in the right order" in message


@pytest.mark.parametrize("vocab", [
    [word for word in ENGLISH if word != "terrible"],  # it knows English, but not all of the words
    [*ENGLISH, *(f"слово{chr(1072 + i)}" for i in range(12))], [*ENGLISH, *VOCAB[-40:-28]],  # several languages
    ["der", "raum", "war", "sauber", "clean", "dirty", "room"],
], ids=["words missing", "Cyrillic too", "Chinese too", "German"])  # fmt: skip
def test_another_language_is_not_tested(tmp_path, vocab):
    save_scorer(tmp_path, vocab, LABELS, "room dirty", "room clean")  # the wrong way round
    assert warnings_of_loading(tmp_path) == [] and SentimentReward.from_pretrained(tmp_path).canaries == ()


def test_where_words_of_the_test_sentences_are_cut_loading_says_that_nothing_was_tested(tmp_path):
    pieces = [*(chr(i) for i in range(97, 123)), *(f"##{chr(i)}" for i in range(97, 123))]
    vocab = [*(word for word in ENGLISH if word not in ("terrible", "a")), *pieces]
    save_scorer(tmp_path, vocab, LABELS, "the room was dirty", "the room was clean")  # the wrong way round
    (message,) = warnings_of_loading(tmp_path)
    assert message.startswith(f"{tmp_path}: the order of its labels was not tested: its vocabulary cuts the words")
    assert warnings_of_loading(tmp_path, positive_label=LABELS[0]) == []  # the caller wants what the names deny


def test_of_a_scale_better_is_more_in_the_middle_too():
    assert make_reward(SCALE).canaries == CHINESE_CANARIES
    assert make_reward().canaries == make_reward(SCALE, positive_label="positive").canaries == CANARIES


def test_a_scale_whose_middle_is_out_of_order_gives_a_warning(tmp_path, monkeypatch):
    reward = make_reward(SCALE)
    reward.model.save_pretrained(tmp_path)
    reward.tokenizer.save_pretrained(tmp_path)
    for scores, alarms in (([0.9, 0.5, 0.1], 0), ([0.5, 0.9, 0.1], 1), ([0.9, 0.1, 0.5], 1), ([0.9, math.nan, 0.1], 1)):
        monkeypatch.setattr(SentimentReward, "__call__", lambda self, texts, scores=scores: torch.tensor(scores))
        assert len(warnings_of_loading(tmp_path)) == alarms


def test_numbers_against_the_names_are_meant_so_and_raise_no_alarm(tmp_path):
    save_scorer(tmp_path, ENGLISH, SCALE, "the room was clean", "the room was dirty")
    for wanted in ("negative", "neutral", {"negative": 1.0, "positive": -1.0}):
        assert warnings_of_loading(tmp_path, positive_label=wanted) == []
    names = {0: "LABEL_0", 1: "LABEL_1"}
    save_scorer(tmp_path, ENGLISH, names, "the room was clean", "the room was dirty")
    assert warnings_of_loading(tmp_path, positive_label="LABEL_1") == []
    assert len(warnings_of_loading(tmp_path, positive_label="LABEL_0")) == 1  # a slip, as far as can be seen


@pytest.mark.parametrize("problem_type", ["single_label_classification", "multi_label_classification", None])
def test_the_loss_that_it_was_trained_by_is_read_as_a_pipeline_reads_it(tmp_path, problem_type):
    ours = make_reward()
    with torch.no_grad():  # both labels are to occur
        ours.model.classifier.bias[1] -= ours.probabilities(TEXTS).log().diff().mean()
    ours.model.save_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": problem_type}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reward = SentimentReward.from_pretrained(tmp_path, device="cpu")
    classify = pipeline("sentiment-analysis", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu", top_k=None)
    theirs = [{row["label"]: row["score"] for row in rows} for rows in classify(TEXTS, truncation=True, max_length=64)]
    assert {max(row, key=row.get) for row in theirs} == set(LABELS.values())
    assert reward(TEXTS).tolist() == pytest.approx([row[LABELS[1]] for row in theirs], abs=1e-5)


def test_labels_that_are_no_scale_by_their_training_are_refused(tmp_path):
    make_reward(SCALE).model.save_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for problem_type, message in (("regression", "trained by regression"), ("multi_label_classification", "no scale")):
        (tmp_path / "config.json").write_text(json.dumps({**config, "problem_type": problem_type}))
        with pytest.raises(ValueError, match=message):
            SentimentReward.from_pretrained(tmp_path, device="cpu")
    warnings_of_loading(tmp_path, positive_label="positive")


def test_outputs_of_a_regression_count_as_they_are_if_each_is_given_a_number(tmp_path):
    make_reward(SCALE).model.save_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    rewrite_config(tmp_path, problem_type="regression")
    for label in ("positive", ["positive", "neutral"]):
        with pytest.raises(ValueError, match="no probabilities; pass positive_label= with a number for each"):
            SentimentReward.from_pretrained(tmp_path, positive_label=label, device="cpu")
    model = BertClassifier.from_pretrained(tmp_path)
    numbers = {"negative": -1.0, "neutral": 0.5, "positive": 3.0}
    reward = SentimentReward(model, Tokenizer(VOCAB), numbers, device="cpu")
    with torch.no_grad():
        model.classifier.weight.mul_(10)
        outputs = [model(torch.tensor(Tokenizer(VOCAB).encode_batch([text], 64)))[0].double() for text in TEXTS]
    weights = torch.tensor([numbers[label] for label in model.config.labels], dtype=torch.float64)
    assert reward(TEXTS).tolist() == pytest.approx([float(row @ weights) for row in outputs], rel=1e-5)
    assert max(reward(TEXTS).abs()) > 3  # not held within the numbers, as an expected value is
    assert reward.meaning == "-1 output('negative') + 0.5 output('neutral') + 3 output('positive')"


def test_loading_passes_options_on_and_names_what_is_missing(tmp_path):
    make_bert(id2label={0: "A", 1: "B"}).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"vocab.txt"):
        SentimentReward.from_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reward = SentimentReward.from_pretrained(tmp_path, positive_label="B", batch_size=3, device="cpu")
    assert (reward.positive, reward.batch_size) == (1, 3)
