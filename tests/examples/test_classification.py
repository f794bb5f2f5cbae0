"""Training a BERT classifier, masked tokens, calibration."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from conftest import VOCAB, make_bert
from minirlhf import BertClassifier, BertConfig
from minirlhf.rewards.sentiment import predict

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "weights" / "train"))
from classification import ClassifierTrainingConfig, fit_temperature, train_classifier

SIZES = dict(vocab_size=len(VOCAB), max_position_embeddings=16, hidden_size=32, num_hidden_layers=1,
             num_attention_heads=2, intermediate_size=32)  # fmt: skip
GOOD, BAD = ["服务很好", "非常满意，推荐", "房间干净", "位置好"], ["房间太脏", "服务太差", "失望", "差评！"]
EXAMPLES = [*((text, (0.0, 1.0)) for text in GOOD), *((text, (1.0, 0.0)) for text in BAD)]
CONFIG = ClassifierTrainingConfig(epochs=2, lr=3e-3, max_length=16, tokens_per_batch=40, device="cpu")


def fresh(dropout: float = 0.0) -> BertClassifier:
    rates = dict(hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return BertClassifier(BertConfig(**SIZES, **rates, initializer_range=0.2))  # wide enough to learn at once


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"mask_probability": 0.0}, {"mlm_weight": 0.5}], ids=["plain", "masked tokens"])
def test_a_tiny_model_learns_its_examples(tokenizer, changes):
    model = fresh()
    train_classifier(model, tokenizer, EXAMPLES, dataclasses.replace(CONFIG, epochs=60, **changes))
    assert not model.training
    probabilities = predict(model, tokenizer, [*GOOD, *BAD], 16).softmax(-1)
    assert (probabilities[:4, 1] > 0.9).all() and (probabilities[4:, 0] > 0.9).all()


def test_soft_targets_are_approached(tokenizer):
    model = fresh()
    config = dataclasses.replace(CONFIG, epochs=60, mask_probability=0.0, weight_decay=0.0)
    train_classifier(model, tokenizer, [("很好", (0.3, 0.7)), ("太差", (0.8, 0.2))], config)
    probabilities = predict(model, tokenizer, ["很好", "太差"], 16).softmax(-1)
    torch.testing.assert_close(probabilities, torch.tensor([[0.3, 0.7], [0.8, 0.2]]), atol=0.05, rtol=0)


def test_the_first_loss_is_the_mean_cross_entropy(tokenizer):
    model = make_bert(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    logits = predict(model, tokenizer, [*GOOD, *BAD], 16)
    expected = F.cross_entropy(logits, torch.tensor([1] * 4 + [0] * 4)).item()
    losses = []
    config = dataclasses.replace(CONFIG, epochs=1, mask_probability=0.0, tokens_per_batch=1000)
    train_classifier(model, tokenizer, EXAMPLES, config, lambda _, stats: losses.append(stats))
    assert losses == [{"classifier/progress": 1.0, "classifier/loss": pytest.approx(expected, rel=1e-5)}]


def test_masked_tokens_are_predicted_from_the_others(tokenizer):
    """With uninformative labels all that is left to learn is the masked tokens."""
    model = fresh()
    texts = ["酒店很好", "房间太脏"]
    config = dataclasses.replace(CONFIG, epochs=80, lr=6e-3, mask_probability=0.3, mlm_weight=1.0, tokens_per_batch=16)
    train_classifier(model, tokenizer, [(text, (0.5, 0.5)) for text in texts] * 2, config)
    ids = torch.tensor([tokenizer.encode(text) for text in texts])
    masked = ids.clone()
    masked[:, 2] = tokenizer.mask_id  # one token of each
    with torch.no_grad():
        probabilities = model.lm_logits(model.hidden_states(masked)[:, 2]).softmax(-1)
    assert (probabilities[[0, 1], ids[:, 2]] > 0.8).all()


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_only_inner_tokens_are_masked_and_about_the_named_share(monkeypatch, tokenizer, share):
    model, seen = fresh(), []
    original = BertClassifier.hidden_states

    def recording(self, ids, attention_mask=None):
        seen.append((ids, attention_mask))
        return original(self, ids, attention_mask)

    monkeypatch.setattr(BertClassifier, "hidden_states", recording)
    config = dataclasses.replace(CONFIG, epochs=20, mask_probability=share, tokens_per_batch=1000)
    train_classifier(model, tokenizer, EXAMPLES, config)
    masked = real = 0
    for ids, mask in seen:
        ends = mask.sum(-1) - 1
        assert (ids[:, 0] == tokenizer.cls_id).all()
        assert (ids.gather(1, ends[:, None]) == tokenizer.sep_id).all()
        assert (ids[mask == 0] == tokenizer.pad_id).all()
        masked += int((ids == tokenizer.mask_id).sum())
        real += int(mask.sum()) - 2 * len(ids)
    assert real == 20 * sum(len(text) for text, _ in EXAMPLES)
    assert abs(masked / real - share) < 0.06


def test_examples_may_be_drawn_for_each_epoch(tokenizer):
    epochs = []

    def draw(epoch):
        epochs.append(epoch)
        return EXAMPLES[epoch : epoch + 2]

    train_classifier(fresh(), tokenizer, draw, CONFIG)
    assert epochs == [0, 1]


@pytest.mark.parametrize(("examples", "message"), [
    ([], "examples is empty"), (lambda epoch: [], "examples is empty"),
    ([("好", (1.0, 0.0)), ("差", (1.0,))], "every target must have 2 probabilities"),
    ([("好", (0.2, 0.3, 0.5))], "every target must have 2 probabilities"),
])  # fmt: skip
def test_bad_examples_are_refused(tokenizer, examples, message):
    with pytest.raises(ValueError, match=message):
        train_classifier(fresh(), tokenizer, examples, CONFIG)


def test_more_tokens_than_positions_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length=17 exceeds the model's 16 positions"):
        train_classifier(fresh(), tokenizer, EXAMPLES, dataclasses.replace(CONFIG, max_length=17))


@pytest.mark.parametrize(("changes", "field"), [
    ({"max_length": 1}, "max_length"), ({"tokens_per_batch": 127}, "tokens_per_batch"),
    *(({"mask_probability": v}, "mask_probability") for v in (-0.1, 1.0, math.nan)),
    *(({"mlm_weight": v}, "mlm_weight") for v in (-1.0, math.nan, math.inf)),
    ({"mlm_weight": 1.0, "mask_probability": 0.0}, "mlm_weight"), ({"epochs": 0}, "epochs"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        ClassifierTrainingConfig(**changes)


# ---- predicting -----------------------------------------------------------------------------------------------------


# ---- calibration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0])
def test_a_known_temperature_is_recovered(temperature):
    """Labels drawn from softmax(logits); the logits are then multiplied by the temperature."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(20_000, 3, generator=generator)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
    assert fit_temperature(temperature * logits, labels) == pytest.approx(temperature, rel=0.03)
