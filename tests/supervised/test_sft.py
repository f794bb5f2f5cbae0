"""Supervised fine-tuning and perplexity, against transformers' loss."""

import dataclasses
import math

import pytest
import torch
from minirlhf.runs.checkpoint_folder import read_checkpoint, write_checkpoint
from transformers import AutoModelForCausalLM

from conftest import VOCAB, make_gpt2
from folders import snapshot
from minirlhf import GPT2, GPT2Config, PPOTrainer, SamplingConfig, Tokenizer, generate
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, cut, encode_demonstrations, perplexity, token_nll
from minirlhf.text.demonstrations import Demonstration

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
    sequences = encode_demonstrations(tokenizer, TEXTS)
    assert len({len(s.ids) for s in sequences}) > 1
    nll, count = token_nll(model, [[s] for s in sequences], tokenizer.pad_id)
    alone = []
    for s in sequences:
        logp = model(torch.tensor([s.ids]))[0].log_softmax(-1)
        alone += [-logp[t - 1, s.ids[t]].item() for t in range(1, len(s.ids))]
    assert count == len(alone) == len(nll)
    assert nll.tolist() == pytest.approx(alone, rel=1e-5)


def test_a_text_that_was_cut_has_no_end(tokenizer):
    whole = tokenizer.encode("酒店很好")
    assert whole[-1] == tokenizer.sep_id and len(whole) == 6
    for length in (2, 5, 6, 7):
        (found,) = cut(encode_demonstrations(tokenizer, ["酒店很好"]), length)
        assert found.ids == whole[:length]


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
    ({"accumulation": 0}, "accumulation"), ({"save_freq": 0}, "save_freq"), ({"packing": 1}, "packing"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        SFTConfig(**changes)


# ---- prompts and responses ------------------------------------------------------------------------------------------

PAIRS = [Demonstration("酒店", "很好，非常满意。"), Demonstration("房间", "干净"), Demonstration("hello w", "太差"),
         Demonstration("", "早餐一般")]  # fmt: skip


def pair_ids(pair: Demonstration) -> tuple[list[int], int]:
    """Token ids by the rule, and how many of them are not learned: the prompt as it is sampled from, or [CLS]."""
    by_rule = Tokenizer(VOCAB)
    before = by_rule.encode(pair.prompt)[:-1]
    return [*before, *by_rule.encode(pair.response)[1:]], len(before)


@torch.no_grad()
def response_nlls_by_transformers(folder, pairs) -> tuple[float, int]:
    model, total, count = AutoModelForCausalLM.from_pretrained(folder).double().eval(), 0.0, 0
    for pair in pairs:
        ids, first = pair_ids(pair)
        labels = torch.tensor([[-100] * first + ids[first:]])  # -100: left out of transformers' loss
        total += model(torch.tensor([ids]), labels=labels).loss.item() * (len(ids) - first)
        count += len(ids) - first
    return total, count


@pytest.mark.parametrize("packing", [False, True])
def test_the_loss_is_on_the_response_only(tmp_path, tokenizer, packing):
    model = make_gpt2(**SIZES, **NO_DROPOUT)
    model.save_pretrained(tmp_path)
    total, tokens = response_nlls_by_transformers(tmp_path, PAIRS)
    assert tokens == (8 + 1) + (2 + 1) + (2 + 1) + (4 + 1)
    losses = []
    config = dataclasses.replace(CONFIG, epochs=1, tokens_per_batch=1000, packing=packing)
    SFTTrainer(model, tokenizer, PAIRS, config).train(lambda progress, loss: losses.append(loss))
    assert losses == [pytest.approx(total / tokens, rel=1e-5)]


def test_perplexity_of_responses_equals_transformers(tmp_path, tokenizer):
    model = make_gpt2(**SIZES)
    model.save_pretrained(tmp_path)
    total, tokens = response_nlls_by_transformers(tmp_path, PAIRS)
    found = perplexity(model, tokenizer, PAIRS, 24)
    assert found["token"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["character"] == pytest.approx(math.exp(total / (9 + 3 + 3 + 5)), rel=1e-5)


def test_a_pair_begins_with_what_the_prompt_is_sampled_from(tokenizer):
    for pair, found in zip(PAIRS, encode_demonstrations(tokenizer, PAIRS), strict=True):
        assert (found.ids, found.first) == pair_ids(pair)
        if pair.prompt:
            assert found.ids[: found.first] == tokenizer.encode_prompt(pair.prompt)


def test_a_text_and_a_response_without_a_prompt_are_the_same(tokenizer):
    assert encode_demonstrations(tokenizer, TEXTS) == encode_demonstrations(
        tokenizer, [Demonstration("", text) for text in TEXTS]
    )


def test_what_is_cut_or_lost_is_said_with_its_count(tokenizer):
    pairs = [Demonstration("酒店很好", "好" * 30), Demonstration("酒" * 40, "好"), Demonstration("酒店", "好")]
    with pytest.warns(UserWarning, match=r"2 of 3 texts have more than max_length=24 .* 1 of them have no response"):
        trainer = SFTTrainer(fresh(), tokenizer, pairs, CONFIG)
    assert [len(s.ids) for s in trainer.sequences] == [24, 5]
    with (
        pytest.warns(UserWarning, match="1 of 1 texts"),
        pytest.raises(ValueError, match="no response has a token within max_length=24"),
    ):
        SFTTrainer(fresh(), tokenizer, [pairs[1]], CONFIG)
    with pytest.raises(ValueError, match="no response has a token within max_length=24"):
        perplexity(fresh(), tokenizer, [pairs[1]], 24)


def test_a_text_of_100000_characters_is_learned_as_far_as_it_fits(tokenizer):
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        trainer = SFTTrainer(fresh(), tokenizer, ["好" * 100_000, "酒店"], CONFIG)
    trainer.train()
    assert sorted(len(s.ids) for s in trainer.sequences) == [4, 24]


# ---- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 24])
def test_sequences_of_one_row_do_not_see_each_other(tokenizer, width):
    """Each has the likelihoods that it has alone, whatever stands before it in its row."""
    model = make_gpt2(**SIZES).double()
    sequences = encode_demonstrations(tokenizer, [*PAIRS, "很好"])
    rows = [[sequences[1], sequences[4], sequences[2]], [sequences[0]], [sequences[3], sequences[1]]]
    nll, count = token_nll(model, rows, tokenizer.pad_id, width)
    alone = [token_nll(model, [[s]], tokenizer.pad_id)[0] for row in rows for s in row]
    assert count == len(nll) == sum(map(len, alone))
    torch.testing.assert_close(nll, torch.cat(alone))
    without, _ = token_nll(model, [[sequences[2]]], tokenizer.pad_id)
    torch.testing.assert_close(nll[len(alone[0]) + len(alone[1]) :][: len(without)], without)


def test_packed_and_padded_steps_have_the_same_gradient(tokenizer):
    gradients = []
    for packing in (False, True):
        model = make_gpt2(**SIZES, **NO_DROPOUT)
        trainer = SFTTrainer(model, tokenizer, PAIRS * 3, dataclasses.replace(CONFIG, packing=packing))
        batch = [micro for step in trainer._batches(0) for micro in step]
        assert len(batch) > 1
        for part, share in trainer._shares(batch):
            (trainer._loss(part) * share).backward()
        gradients.append([p.grad for p in model.parameters()])
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)


def test_a_packed_row_is_nearly_full_and_a_batch_holds_what_it_may(tokenizer):
    texts = ["好" * (i % 20 + 1) for i in range(200)]
    config = dataclasses.replace(CONFIG, packing=True, tokens_per_batch=100)
    trainer = SFTTrainer(fresh(), tokenizer, texts, config)
    batches = [micro for step in trainer._batches(0) for micro in step]
    assert sorted(i for micro in batches for row in micro for i in row) == list(range(200))
    assert all(len(micro) == 100 // 24 for micro in batches[:-1])
    tokens = sum(len(s.ids) for s in trainer.sequences)
    assert tokens / (24 * sum(map(len, batches))) > 0.92  # padded: 0.52


# ---- accumulation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True])
def test_accumulated_steps_are_those_of_large_batches(tokenizer, packing):
    """However unequal the micro-batches are in what they predict: the step is the mean over all its tokens."""
    demonstrations = [*PAIRS, *TEXTS]
    whole = dataclasses.replace(CONFIG, epochs=3, tokens_per_batch=10**4, packing=packing)
    parts = dataclasses.replace(whole, tokens_per_batch=24, accumulation=100)
    losses, weights = [], []
    for config in (whole, parts):
        model = fresh()
        trainer = SFTTrainer(model, tokenizer, demonstrations, config)
        counts = [len(trainer._shares(step)) for step in trainer._batches(0)]
        assert len(counts) == 1 and (counts[0] == 1) == (config is whole)
        trainer = SFTTrainer(model, tokenizer, demonstrations, config)
        seen = []
        trainer.train(lambda progress, loss, seen=seen: seen.append(loss))
        losses.append(seen)
        weights.append(model.state_dict())
    assert len(losses[0]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-4)
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4)


def test_an_optimizer_step_has_as_many_forward_passes_as_asked_for(tokenizer):
    steps = []
    config = dataclasses.replace(CONFIG, epochs=1, accumulation=2)
    trainer = SFTTrainer(fresh(), tokenizer, ["好" * 20, "店" * 20, "差" * 20], config)
    trainer.train(lambda *step: steps.append(step))
    assert trainer.steps == len(steps) == 2  # three texts, each of them a batch: two passes, and one


# ---- saved and resumed ----------------------------------------------------------------------------------------------

RESUMED = dict(epochs=3, accumulation=2, max_grad_norm=0.5)


def stop_after(steps: int):
    def on_step(progress, loss):
        nonlocal steps
        steps -= 1
        if steps == 0:
            raise KeyboardInterrupt

    return on_step


def test_a_run_keeps_the_precision_that_auto_gave_it(tmp_path, tokenizer, monkeypatch):
    config = dataclasses.replace(CONFIG, precision="auto")
    assert SFTConfig().precision == "auto" and SFTTrainer(fresh(), tokenizer, TEXTS, config).config.precision == "fp32"
    monkeypatch.setattr("minirlhf.device.precision.LARGE_MODEL", 1)
    monkeypatch.setattr("minirlhf.device.precision_choice.has_native_bf16", lambda device: True)
    trainer = SFTTrainer(fresh(), tokenizer, TEXTS, config)
    named = SFTTrainer(fresh(), tokenizer, TEXTS, dataclasses.replace(config, precision="bf16"))
    assert trainer.precision_choice.reason and trainer.config == named.config
    trainer.save_checkpoint(tmp_path / "state")
    monkeypatch.setattr("minirlhf.device.precision_choice.has_native_bf16", lambda device: False)
    trainer = SFTTrainer.resume(tmp_path / "state", TEXTS)
    assert trainer.config.precision == "bf16"
    losses = [[], []]
    for each, seen in zip((trainer, named), losses, strict=True):
        each.train(lambda *step, seen=seen: seen.append(step))
    assert losses[0] == losses[1] and len(losses[0]) > 1


@pytest.mark.parametrize(("packing", "precision"), [(False, "fp32"), (True, "bf16"), (False, "fp16")])
def test_a_run_in_parts_ends_as_one_in_one_go(tmp_path, tokenizer, packing, precision):
    """Bit for bit, wherever it is cut: weights, moments, loss of each step; with dropout, which draws in every step."""
    config = dataclasses.replace(CONFIG, **RESUMED, packing=packing, precision=precision)
    data = [*PAIRS, *TEXTS, "很好很好", "差"]

    def new() -> SFTTrainer:
        return SFTTrainer(fresh(resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.1), tokenizer, data, config)

    whole, losses = new(), []
    whole.train(lambda *step: losses.append(step))
    whole.save_checkpoint(tmp_path / "whole")
    assert len(losses) >= 6
    for done in (
        0,
        1,
        2,
        len(losses) - 1,
    ):  # before it begins, within an epoch, at the end of one, before the last step
        trainer, seen = new(), []
        if done:
            with pytest.raises(KeyboardInterrupt):
                trainer.train(stop_after(done))
            assert not trainer.model.training
        trainer.save_checkpoint(tmp_path / "cut")
        torch.rand(3)  # what happens to the global stream meanwhile does not matter
        again = SFTTrainer.resume(tmp_path / "cut", data)
        assert again.steps == done and again.config == config
        again.save_checkpoint(tmp_path / "again")
        assert snapshot(tmp_path / "again") == snapshot(tmp_path / "cut")
        again.train(lambda *step, seen=seen: seen.append(step))
        again.save_checkpoint(tmp_path / "end")
        assert seen == losses[done:]
        assert snapshot(tmp_path / "end") == snapshot(tmp_path / "whole")


def test_a_run_that_is_over_stays_as_it_is(tmp_path, tokenizer):
    trainer = SFTTrainer(fresh(), tokenizer, TEXTS, CONFIG)
    trainer.train()
    trainer.save_checkpoint(tmp_path / "end")
    again = SFTTrainer.resume(tmp_path / "end", TEXTS)
    again.train(lambda *step: pytest.fail("a step"))
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), trainer.model.parameters(), strict=True))


def test_other_demonstrations_are_refused(tmp_path, tokenizer):
    SFTTrainer(fresh(), tokenizer, TEXTS, CONFIG).save_checkpoint(tmp_path / "run")
    for others in (TEXTS[:3], TEXTS[::-1], [*TEXTS[:3], "早"], [Demonstration("早", "餐一般"), *TEXTS[1:]]):
        with pytest.raises(
            ValueError, match="run cannot be resumed: it was trained on other demonstrations: on 4 of them"
        ):
            SFTTrainer.resume(tmp_path / "run", others)


def test_a_checkpoint_that_is_damaged_or_of_ppo_is_refused(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        SFTTrainer.resume(tmp_path / "nowhere", TEXTS)
    PPOTrainer(fresh(), fresh(), tokenizer, device="cpu").save_checkpoint(tmp_path / "ppo")
    with pytest.raises(ValueError, match="checkpoint format 1, this version reads sft-1"):
        SFTTrainer.resume(tmp_path / "ppo", TEXTS)
    SFTTrainer(fresh(), tokenizer, TEXTS, CONFIG).save_checkpoint(tmp_path / "run")
    with pytest.raises(ValueError, match="checkpoint format sft-1"):
        PPOTrainer.resume(tmp_path / "run", fresh())
    weights = tmp_path / "run" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"model.safetensors is not as it was written"):
        SFTTrainer.resume(tmp_path / "run", TEXTS)


def test_a_run_that_an_error_ended_goes_on_from_what_was_saved_only(tokenizer):
    trainer = SFTTrainer(fresh(), tokenizer, TEXTS, CONFIG)
    with pytest.raises(KeyboardInterrupt):
        trainer.train(stop_after(1))
    with pytest.raises(RuntimeError, match="go on from its last checkpoint"):
        trainer.train()


def test_a_checkpoint_that_we_did_not_write_is_refused_by_name(tmp_path, tokenizer):
    """Its sums are right, what it says is not."""
    trainer = SFTTrainer(fresh(), tokenizer, TEXTS, CONFIG)
    trainer.train()
    trainer.save_checkpoint(tmp_path / "good")
    tensors, counters = read_checkpoint(tmp_path / "good", "sft-1")

    def write_model(folder):
        trainer.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    def changed(tensors, counters):
        write_checkpoint(tmp_path / "bad", tensors, counters, write_model)
        with pytest.raises(ValueError, match=r"bad cannot be resumed|saved state is of another model"):
            SFTTrainer.resume(tmp_path / "bad", TEXTS).train()

    for name in ("steps", "epoch", "batch", "scaler", "data", "config", "origin"):
        for value in (None, "missing"):
            if (name, value) != ("origin", None):
                other = {**counters, name: value}
                changed(tensors, {k: v for k, v in other.items() if v != "missing"})
    for name in ("generator.batches", "generator.dropout", "optimizer.0.exp_avg"):
        changed({**tensors, name: torch.zeros(3)}, counters)
    changed({**tensors, "optimizer.x": torch.zeros(3)}, counters)
    changed({**tensors, "optimizer.99.exp_avg": torch.zeros(3)}, counters)
