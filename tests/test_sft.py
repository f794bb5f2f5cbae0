"""Supervised fine-tuning and perplexity, against transformers' loss."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, GPT2Config, SamplingConfig, Tokenizer, generate
from minirlhf.sft import SFTConfig, SFTTrainer, encode_for_lm, perplexity, token_nll

TEXTS = ["酒店很好，非常满意。", "房间干净，服务很好！", "早餐一般", "hello world，wifi太差"]
SIZES = dict(vocab_size=len(VOCAB), n_positions=24, n_embd=32, n_layer=1, n_head=2)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
CONFIG = SFTConfig(epochs=2, lr=1e-2, max_length=24, tokens_per_batch=24, device="cpu")


def fresh(**overrides) -> GPT2:
    return GPT2(GPT2Config(**{**SIZES, **NO_DROPOUT, **overrides}), seed=0)


@torch.no_grad()
def nlls_by_transformers(folder, texts: list[str], max_length: int = 10**6) -> tuple[float, int]:
    """Total negative log-likelihood in nats and number of predicted tokens, one text at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).double().eval(), Tokenizer(VOCAB)
    total, count = 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer.encode(text)[:max_length]])
        predicted = ids.size(1) - 1
        total += model(ids, labels=ids).loss.item() * predicted  # transformers' loss is the mean over the tokens
        count += predicted
    return total, count


# ---- measuring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("max_length", [24, 5])
def test_perplexity_equals_transformers(tmp_path, tokenizer, batch_size, max_length):
    model = make_gpt2(**SIZES)
    model.save_pretrained(tmp_path)
    total, tokens = nlls_by_transformers(tmp_path, TEXTS, max_length)
    found = perplexity(model, tokenizer, TEXTS, max_length, batch_size)
    assert found["token"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_perplexity_by_character_counts_characters(tmp_path, tokenizer):
    model = make_gpt2(**SIZES)
    model.save_pretrained(tmp_path)
    texts = ["酒店", "hello 好"]
    total, tokens = nlls_by_transformers(tmp_path, texts)
    assert tokens == (2 + 1) + (2 + 1)
    characters = (2 + 1) + (6 + 1)  # an end of text counts as one, a space as none
    found = perplexity(model, tokenizer, texts, 24)
    assert found["character"] == pytest.approx(math.exp(total / characters), rel=1e-5)


@pytest.mark.parametrize("loaded", [True, False])
def test_perplexity_is_without_dropout(tmp_path, tokenizer, loaded):
    """Also right after loading, and in a callback during training."""
    model = make_gpt2(**SIZES, resid_pdrop=0.5)
    model.save_pretrained(tmp_path)
    total, tokens = nlls_by_transformers(tmp_path, TEXTS)
    model = GPT2.from_pretrained(tmp_path) if loaded else model.train()
    mode = model.training
    assert perplexity(model, tokenizer, TEXTS, 24)["token"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert model.training == mode


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size(tokenizer):
    model = fresh()
    with torch.no_grad():
        model.wte.weight.zero_()
    assert perplexity(model.eval(), tokenizer, TEXTS, 24)["token"] == pytest.approx(len(VOCAB), rel=1e-5)


def test_perplexity_of_nothing_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one text"):
        perplexity(make_gpt2(**SIZES), tokenizer, [], 24)


@torch.no_grad()
def test_token_nll_in_a_batch_is_that_of_each_sequence_alone(tokenizer):
    model = make_gpt2(**SIZES).double()
    sequences = encode_for_lm(tokenizer, TEXTS, 24)
    assert len({len(s) for s in sequences}) > 1
    nll, count = token_nll(model, sequences, tokenizer.pad_id)
    alone = []
    for ids in sequences:
        logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        alone += [-logp[t - 1, ids[t]].item() for t in range(1, len(ids))]
    assert count == len(alone) == len(nll)
    assert nll.tolist() == pytest.approx(alone, rel=1e-5)


def test_a_text_that_was_cut_has_no_end(tokenizer):
    whole = tokenizer.encode("酒店很好")
    assert whole[-1] == tokenizer.sep_id and len(whole) == 6
    for length in (2, 5, 6, 7):
        assert encode_for_lm(tokenizer, ["酒店很好"], length) == [whole[:length]]


# ---- training -------------------------------------------------------------------------------------------------------


def test_a_tiny_model_learns_a_text_by_heart(tokenizer):
    model, text = fresh(), "酒店很好，非常满意。"
    before = perplexity(model.eval(), tokenizer, [text], 24)["token"]
    assert before > 100
    config = dataclasses.replace(CONFIG, epochs=60, warmup=0.1)
    SFTTrainer(model, tokenizer, [text], config).train()
    assert not model.training
    assert perplexity(model, tokenizer, [text], 24)["token"] < 1.05
    prompt, rest = tokenizer.encode_prompt("酒店"), tokenizer.encode("很好，非常满意。")[1:]
    response = generate(model, [prompt], 12, SamplingConfig(top_k=1), eos_token_id=tokenizer.sep_id).responses[0]
    assert response.tolist() == rest  # the end of the text included


def test_the_first_loss_is_the_mean_over_all_tokens_of_the_batch(tmp_path, tokenizer):
    model = make_gpt2(**SIZES, **NO_DROPOUT)
    model.save_pretrained(tmp_path)
    total, tokens = nlls_by_transformers(tmp_path, TEXTS)
    losses = []
    config = dataclasses.replace(CONFIG, epochs=1, tokens_per_batch=1000)
    SFTTrainer(model, tokenizer, TEXTS, config).train(lambda progress, loss: losses.append((progress, loss)))
    assert losses == [(1.0, pytest.approx(total / tokens, rel=1e-5))]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_seed_gives_the_same_weights(tokenizer, dropout):
    def trained(seed: int) -> dict[str, torch.Tensor]:
        model = fresh(resid_pdrop=dropout, embd_pdrop=dropout)
        SFTTrainer(model, tokenizer, TEXTS, dataclasses.replace(CONFIG, seed=seed)).train()
        return model.state_dict()

    first, second, other = trained(0), trained(0), trained(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_leaves_the_global_random_state(tokenizer, dropout):
    model = fresh(resid_pdrop=dropout)
    state = torch.get_rng_state()
    SFTTrainer(model, tokenizer, TEXTS, dataclasses.replace(CONFIG, epochs=1)).train()
    assert torch.equal(torch.get_rng_state(), state)


def test_nothing_to_train_on_is_refused(tokenizer):
    with pytest.raises(ValueError, match="at least one text"):
        SFTTrainer(fresh(), tokenizer, [], CONFIG)


def test_more_tokens_than_positions_are_refused(tokenizer):
    with pytest.raises(ValueError, match="max_length=25 exceeds the model's 24 positions"):
        SFTTrainer(fresh(), tokenizer, TEXTS, dataclasses.replace(CONFIG, max_length=25, tokens_per_batch=100))


@pytest.mark.parametrize(("changes", "field"), [
    ({"max_length": 1}, "max_length"), ({"max_length": 0}, "max_length"),
    ({"tokens_per_batch": 127}, "tokens_per_batch"),
    ({"epochs": 0}, "epochs"), ({"lr": -1.0}, "lr"), ({"precision": "fp8"}, "precision"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        SFTConfig(**changes)
