"""`generate` and `stream` of decoders and actor-critics: texts from texts, of the model's own tokenizer."""

import pytest
import torch

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, ActorCritic, PPOTrainer, SamplingConfig, Tokenizer, generate, load_decoder
from minirlhf.generation import generate as module

SMALL = dict(n_embd=16, n_layer=1, n_head=2)


@pytest.fixture(scope="module")
def model():
    return make_gpt2(0, scale=4.0, **SMALL).eval()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    Tokenizer(VOCAB).save_pretrained(path)
    return path


def test_they_are_the_decoded_samples_of_one_seed(model):
    """Of `generate` over token ids with a generator of that seed."""
    tokenizer = Tokenizer(VOCAB)
    ids = tokenizer.encode_prompt("酒店")
    options = dict(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    drawn = generate(
        model, [ids] * 3, 8, SamplingConfig(0.9, 30, 0.95), generator=torch.Generator().manual_seed(5), **options
    )
    expected = ["".join(tokenizer.decode_response(ids, row)) for row in drawn.responses]
    torch.manual_seed(1)
    before = torch.get_rng_state()
    settings = dict(temperature=0.9, top_k=30, top_p=0.95, tokenizer=tokenizer)
    assert model.generate("酒店", 3, 8, seed=5, **settings) == expected
    assert torch.equal(torch.get_rng_state(), before)
    assert model.generate("酒店", 3, 8, seed=6, **settings) != expected


def test_every_loaded_model_knows_its_tokenizer(folder):
    loaded = [load_decoder(folder), GPT2.from_pretrained(folder), ActorCritic.from_pretrained(folder)]
    texts = [policy.generate("位置", n=3, max_new_tokens=6, top_p=0.95, seed=0) for policy in loaded]
    assert texts[0] == texts[1] == texts[2]
    assert len(texts[0]) == 3 and all(isinstance(text, str) for text in texts[0])
    with pytest.raises(ValueError, match="tokenizer="):
        make_gpt2(0, **SMALL).eval().generate("位置")


def test_a_trained_policy_has_the_trainers_tokenizer(model):
    trainer = PPOTrainer(make_gpt2(0, **SMALL), model, Tokenizer(VOCAB), batch_size=2, gen_len=2, device="cpu")
    assert trainer.policy.generate("酒店", max_new_tokens=2) == trainer.policy.decoder.generate(
        "酒店", max_new_tokens=2
    )


def test_a_list_of_texts_gives_a_list_for_each(model, monkeypatch):
    options = dict(n=2, max_new_tokens=4, tokenizer=Tokenizer(VOCAB))
    both = model.generate(["酒店", "很好"], **options)
    assert len(both) == 2 and all(len(texts) == 2 for texts in both)
    assert model.generate(["酒店"], **options) == [model.generate("酒店", **options)]
    assert model.generate([], **options) == []
    monkeypatch.setattr(module, "ROWS", 3)  # 3 + 1 rows
    assert [len(texts) for texts in model.generate(["酒店", "很好"], **options)] == [2, 2]


def test_a_stop_string_ends_a_text_before_itself(model):
    options = dict(max_new_tokens=12, tokenizer=Tokenizer(VOCAB))
    for whole in model.generate("酒店", 4, **options):
        assert len(whole) > 4
    whole = model.generate("酒店", **options)[0]
    late, early = whole[5:7], whole[3:5]
    assert model.generate("酒店", stop=late, **options) == [whole[: whole.index(late)]]
    assert model.generate("酒店", stop=[late, early], **options) == [whole[: whole.index(early)]]
    assert model.generate("酒店", stop="not in it", **options) == [whole]


def test_rows_that_are_all_stopped_are_decoded_no_further(model, monkeypatch):
    passes, inner = [], model.lm_logits
    monkeypatch.setattr(model, "lm_logits", lambda hidden: passes.append(len(hidden)) or inner(hidden))
    options = dict(max_new_tokens=12, tokenizer=Tokenizer(VOCAB))
    first = model.generate("酒店", **options)[0][0]
    assert len(passes) == 12
    passes.clear()
    assert model.generate("酒店", stop=first, **options) == [""] and len(passes) == 1


@pytest.mark.parametrize("stop", [(), "x", "slice"])
def test_the_pieces_of_a_stream_are_the_text(model, stop):
    options = dict(max_new_tokens=12, tokenizer=Tokenizer(VOCAB))
    whole = model.generate("酒店", **options)[0]
    stop = whole[6:9] if stop == "slice" else stop
    pieces = list(model.stream("酒店", stop=stop, **options))
    assert "".join(pieces) == model.generate("酒店", stop=stop, **options)[0]
    assert len(pieces) >= 3 and all(pieces)


def test_a_stream_says_a_piece_before_the_next_token_is_drawn(model, monkeypatch):
    passes, inner = [], model.lm_logits
    monkeypatch.setattr(model, "lm_logits", lambda hidden: passes.append(1) or inner(hidden))
    stream = model.stream("酒店", 12, tokenizer=Tokenizer(VOCAB))
    assert not passes
    next(stream)
    assert len(passes) < 4
    assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()


def test_what_may_begin_a_stop_string_is_held_back(model, monkeypatch):
    """Pieces of scripted texts: "ab" may begin the stop string "abc", and U+FFFD is half of a character."""
    request = object.__new__(module._Request)
    request.stop = ("abc",)
    for texts, expected in (
        (["x", "xa", "xab", "xabd"], ["x", "abd"]),
        (["x", "xa", "xab"], ["x", "ab"]),
        (["x", "xa", "x"], ["x"]),  # and then it was the stop string, which is cut
        (["x", "x\ufffd", "x好"], ["x", "好"]),
        (["aab", "aabd"], ["a", "abd"]),
    ):
        monkeypatch.setattr(request, "responses", lambda prompts, watched, texts=texts: ([t] for t in texts), False)
        assert list(request.pieces([1])) == expected


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(n=0), "n must be an integer of at least 1, got 0"),
        (dict(max_new_tokens=0), "max_new_tokens must be an integer of at least 1, got 0"),
        (dict(seed=-1), "seed must be an integer of at least 0, got -1"),
        (dict(stop=[""]), "stop must be texts with something in them"),
        (dict(top_p=0.0), "top_p"),
        (dict(max_new_tokens=1000), "leaves no room"),
        (dict(text=""), "is empty"),
        (dict(text={"input_ids": [[5]]}), "texts must be a collection of texts, got a dict"),
        (dict(text=None), "texts must be a collection of texts, got a NoneType"),
        (dict(stop=None), "stop must be texts"),
        (dict(tokenizer=len), "must be a minirlhf.Tokenizer, got a builtin_function_or_method"),
    ],
)
def test_bad_input_is_one_clear_error(model, given, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**{"text": "酒店", "tokenizer": Tokenizer(VOCAB), **given})
