"""Supervised fine-tuning and perplexity, against transformers' loss."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, GPT2Config, LoRAConfig, SamplingConfig, Tokenizer, generate
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, cut, encode_demonstrations, perplexity, token_nll
from minirlhf.text.demonstrations import Conversation, Demonstration

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


def test_nothing_to_train_or_measure_on_is_refused(tokenizer):
    for attempt in (SFTTrainer, perplexity):
        with pytest.raises(ValueError, match="at least one text"):
            attempt(fresh(), tokenizer, [])


@pytest.mark.parametrize("packing", [False, True])
def test_more_tokens_than_positions_are_refused_where_a_text_has_them(tokenizer, packing):
    """max_length may exceed the positions, as the default does, while every text fits; packed rows as well."""
    config = dataclasses.replace(CONFIG, max_length=128, tokens_per_batch=128, packing=packing, epochs=1)
    fits = ["好" * 22, *TEXTS]  # 24 tokens
    losses = [[], []]
    for seen, settings in zip(losses, (config, dataclasses.replace(config, max_length=24)), strict=True):
        SFTTrainer(fresh(), tokenizer, fits, settings).train(lambda _, stats, seen=seen: seen.append(stats["sft/loss"]))
    assert losses[0] == losses[1] != []
    with pytest.raises(ValueError, match=r"a text has 25 tokens within max_length=128, more than the model's 24"):
        SFTTrainer(fresh(), tokenizer, ["好" * 23, *TEXTS], config)


def test_a_prompt_of_exactly_max_length_has_nothing_to_learn(tokenizer):
    """One token less, and a single token of the response is learned."""
    pairs = [Demonstration("好" * n, "差评") for n in (22, 23, 24)]  # [CLS] and n tokens
    encoded = encode_demonstrations(tokenizer, pairs)
    assert [s.first for s in encoded] == [23, 24, 25]
    (kept,) = cut(encoded, 24)
    assert (len(kept.ids), kept.first) == (24, 23)
    _, count = token_nll(fresh(), [[kept]], tokenizer.pad_id)
    assert count == 1
    with pytest.warns(UserWarning, match="3 of 3 texts .* 2 of them have no response left"):
        trainer = SFTTrainer(fresh(), tokenizer, pairs, CONFIG)
    assert trainer.sequences == [kept]
    for pair in pairs[1:]:
        with pytest.raises(ValueError, match="no response has a token within max_length=24"):
            perplexity(fresh(), tokenizer, [pair], 24)
    whole = encode_demonstrations(tokenizer, [Demonstration("", "好" * 22)])  # a text that fits to the last token
    assert len(whole[0].ids) == 24 and cut(whole, 24) == whole


@pytest.mark.parametrize(("changes", "field"), [
    ({"epochs": 0}, "epochs"), ({"precision": "fp8"}, "precision"),
    ({"accumulation": 0}, "accumulation"), ({"save_freq": 0}, "save_freq"), ({"packing": 1}, "packing"),
    ({"sharding": "full"}, "precision must be .* with sharding='full', got 'auto'"),
    ({"sharding": "full", "precision": "fp32", "lora": LoRAConfig()}, "SFTConfig.lora must be None with sharding"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=field):
        SFTConfig(**changes)


# ---- prompts and responses ------------------------------------------------------------------------------------------

PAIRS = [Demonstration("酒店", "很好，非常满意。"), Demonstration("房间", "干净"), Demonstration("hello w", "太差"),
         Demonstration("", "早餐一般 好")]  # fmt: skip


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
def test_the_loss_is_on_the_response_only(make_decoder, tmp_path, tokenizer, packing):
    model = make_decoder(**SIZES, **NO_DROPOUT)
    model.save_pretrained(tmp_path)
    total, tokens = response_nlls_by_transformers(tmp_path, PAIRS)
    assert tokens == (8 + 1) + (2 + 1) + (2 + 1) + (5 + 1)
    losses = []
    config = dataclasses.replace(CONFIG, epochs=1, tokens_per_batch=1000, packing=packing)
    SFTTrainer(model, tokenizer, PAIRS, config).train(lambda _, stats: losses.append(stats["sft/loss"]))
    assert losses == [pytest.approx(total / tokens, rel=1e-5)]


def test_perplexity_of_responses_equals_transformers(make_decoder, tmp_path, tokenizer):
    model = make_decoder(**SIZES)
    model.save_pretrained(tmp_path)
    total, tokens = response_nlls_by_transformers(tmp_path, PAIRS)
    found = perplexity(model, tokenizer, PAIRS, 24)
    assert found["token"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    assert found["character"] == pytest.approx(math.exp(total / (9 + 3 + 3 + 6)), rel=1e-5)  # a space counts as none


def test_a_pair_begins_with_what_the_prompt_is_sampled_from(tokenizer):
    for pair, found in zip(PAIRS, encode_demonstrations(tokenizer, PAIRS), strict=True):
        assert (found.ids, found.first) == pair_ids(pair)
        if pair.prompt:
            assert found.ids[: found.first] == tokenizer.encode_prompt(pair.prompt)


# ---- packing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 24])
def test_sequences_of_one_row_do_not_see_each_other(make_decoder, tokenizer, width):
    """Each has the likelihoods that it has alone, whatever stands before it in its row."""
    model = make_decoder(**SIZES).double()
    sequences = encode_demonstrations(tokenizer, [*PAIRS, "很好"])
    rows = [[sequences[1], sequences[4], sequences[2]], [sequences[0]], [sequences[3], sequences[1]]]
    nll, count = token_nll(model, rows, tokenizer.pad_id, width)
    alone = [token_nll(model, [[s]], tokenizer.pad_id)[0] for row in rows for s in row]
    assert count == len(nll) == sum(map(len, alone))
    torch.testing.assert_close(nll, torch.cat(alone))
    without, _ = token_nll(model, [[sequences[2]]], tokenizer.pad_id)
    torch.testing.assert_close(nll[len(alone[0]) + len(alone[1]) :][: len(without)], without)


def test_packed_and_padded_steps_have_the_same_gradient(make_decoder, tokenizer):
    gradients = []
    for packing in (False, True):
        model = make_decoder(**SIZES, **NO_DROPOUT)
        trainer = SFTTrainer(model, tokenizer, PAIRS * 3, dataclasses.replace(CONFIG, packing=packing))
        batch = [micro for step in trainer.epochs[0] for micro in step]
        assert len(batch) > 1
        for part, share in trainer.parts(batch):
            (trainer.loss(part) * share).backward()
        gradients.append([p.grad for p in model.parameters()])
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-4, atol=1e-6)


def test_a_packed_row_is_nearly_full_and_a_batch_holds_what_it_may(tokenizer):
    texts = ["好" * (i % 20 + 1) for i in range(200)]
    config = dataclasses.replace(CONFIG, packing=True, tokens_per_batch=100)
    trainer = SFTTrainer(fresh(), tokenizer, texts, config)
    batches = [micro for step in trainer.epochs[0] for micro in step]
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
        counts = [len(trainer.parts(step)) for step in trainer.epochs[0]]
        assert len(counts) == 1 and (counts[0] == 1) == (config is whole)
        trainer = SFTTrainer(model, tokenizer, demonstrations, config)
        seen = []
        trainer.train(lambda _, stats, seen=seen: seen.append(stats["sft/loss"]))
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
    assert trainer.steps_done == trainer.steps_total == len(steps) == 2  # of three batches: two passes, and one


# ---- chats ----------------------------------------------------------------------------------------------------------

CHAT = Conversation([
    {"role": "user", "content": "酒店"}, {"role": "assistant", "content": "很好"},
    {"role": "user", "content": "房间"}, {"role": "assistant", "content": "干净，一般"},
])  # fmt: skip


def test_of_a_chat_the_assistant_s_turns_are_learned(tokenizer, tmp_path):
    """Loss and packing against a loop over the turns by hand: [CLS] asks, and [SEP] ends a turn."""
    speaker = Tokenizer(tokenizer.vocab)
    template = "{{ m.content + '[SEP]' if m.role == 'assistant' else '[PAD]' + m.content + '[CLS]' }}"
    speaker.model.kept = {"chat_template": f"{{% for m in messages %}}{template}{{% endfor %}}"}
    (found, text) = encode_demonstrations(speaker, [CHAT, "很好"])
    spelled = ["[PAD]", *"酒店", "[CLS]", *"很好", "[SEP]", "[PAD]", *"房间", "[CLS]", *"干净，一般", "[SEP]"]
    assert [VOCAB[i] for i in found.ids] == spelled
    assert found.predicted == [4, 5, 6, *range(11, 17)] and text.predicted == [1, 2, 3]
    assert [s.predicted for s in cut([found], 9)] == [[4, 5, 6]] and cut([found], 4) == []
    model = make_gpt2(**SIZES).double()
    logprobs = model(torch.tensor([found.ids]))[0].log_softmax(-1)
    by_hand = [-logprobs[i - 1, found.ids[i]].item() for i in (4, 5, 6, *range(11, 17))]
    for rows in ([[found]], [[text, found]], [[found, text]]):
        nll, count = token_nll(model, rows, 0)
        assert count == len(nll) == 9 + 3 * (len(rows[0]) - 1)
        mine = nll[3:] if rows[0][0] is text else nll[:9]
        torch.testing.assert_close(mine.double(), torch.tensor(by_hand, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert perplexity(model, speaker, [CHAT], 24)["token"] == pytest.approx(math.exp(sum(by_hand) / 9), rel=1e-5)
    trainer = SFTTrainer(make_gpt2(**SIZES, **NO_DROPOUT), speaker, [CHAT] * 8, CONFIG)
    losses = []
    trainer.train(lambda batch, stats: losses.append(stats["sft/loss"]))
    assert losses[-1] < losses[0] - 0.1
    with pytest.raises(ValueError, match="no chat_template"):
        SFTTrainer(fresh(), tokenizer, [CHAT], CONFIG)
