"""GPT-2's byte-level BPE against transformers, a plain Python encoder and hand-made merges; and a PPO and SFT run."""

import math

import pytest
import torch
from bpe import END, OriginalBPE, trained_bpe, write_published
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import GPT2Tokenizer, GPT2TokenizerFast

from conftest import make_gpt2
from minirlhf import PPOTrainer, Tokenizer
from minirlhf.evaluation.explanation import explain
from minirlhf.rl.rollout import rollout_from_tokens
from minirlhf.supervised.sft import encode_demonstrations
from minirlhf.text.demonstrations import Demonstration
from minirlhf.text.tokenizer_models import ByteBPE, byte_alphabet

VOCAB, MERGES = trained_bpe()
ORACLE = OriginalBPE(VOCAB, MERGES)
TEXTS = [
    "hello world", " hello  world ", "the hotel's good", "I don't, we've, IT'S", "hotels2go 100% 3.14",
    "\n\n a\t b\r\n", "酒店很好，服务非常满意！", "ｆｕｌｌ　ｗｉｄｔｈ１２３", "😀👍🏽 ok",
    "a\x00b\x01\x7f\x85\xa0\u200b\u2028\ufeff", "naïve e\u0301 ß ǅ İ", "龘靐㐀𠀀", "한국어 にほんご العربية", "٣½² ①",
    "   ", " ", "x" * 300, "Ġ Ċ ĠhelloÄ", "<|endoftext", "endoftext|>",
]  # fmt: skip
SPECIAL_TEXTS = [END, f"{END}hello{END} world", f"酒店{END} {END}", f"hello {END}\n"]
SIZES = dict(vocab_size=len(VOCAB), n_embd=16, n_layer=1, n_head=2)

texts = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("the hotl'sdv 12 \n酒店，é😀Ġ"), max_size=40)


@pytest.fixture(scope="module")
def ours() -> Tokenizer:
    return Tokenizer(ByteBPE(VOCAB, MERGES))


@pytest.fixture(scope="module", params=[GPT2Tokenizer, GPT2TokenizerFast], ids=["slow", "fast"])
def theirs(request, tmp_path_factory):
    return request.param.from_pretrained(write_published(tmp_path_factory.mktemp("published")))


# ---- encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [*TEXTS, *SPECIAL_TEXTS, ""])
def test_encoding_equals_transformers(ours, theirs, text):
    assert ours.encode(text) == theirs(text)["input_ids"]


@pytest.mark.parametrize("text", [*TEXTS, ""])
def test_encoding_equals_the_original_in_plain_python(ours, text):
    assert ours.encode(text) == ORACLE.encode(text)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(texts)
def test_any_text_is_encoded_as_by_both_and_comes_back(ours, theirs, text):
    assume(END not in text)  # the oracle has no special tokens; `test_encoding_by_hand` has one
    ids = ours.encode(text)
    assert ids == theirs(text)["input_ids"] == ORACLE.encode(text)
    assert ours.decode(ids) == text


def test_encoding_by_hand():
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "hell"), ("å", "¥")]
    vocab = [*byte_alphabet(), *("".join(pair) for pair in merges), END]
    tokenizer = Tokenizer(ByteBPE(vocab, merges))
    found = [vocab[i] for i in tokenizer.encode(f"hello hello\n好{END}")]
    # "Ġhello" needs ("Ġ", "hello") or ("Ġhell", "o"), which are no merges: "hell" + "o" has the better rank.
    assert found == ["hello", "Ġ", "hello", "Ċ", "å¥", "½", END]
    assert tokenizer.eos_id == tokenizer.pad_id == len(vocab) - 1


def test_the_alphabet_is_that_of_gpt2():
    alphabet = byte_alphabet()
    assert sorted(alphabet.values()) == list(range(256))
    assert {byte: char for char, byte in alphabet.items()} == ORACLE.characters
    assert alphabet["Ġ"] == 32 and alphabet["Ċ"] == 10 and alphabet["a"] == 97 and alphabet["ÿ"] == 255


@pytest.mark.parametrize("max_length", [1, 2, 3, 100])
def test_truncation_equals_transformers(ours, theirs, max_length):
    text = "hello world, wifi"
    expected = theirs(text, truncation=True, max_length=max_length)["input_ids"]
    assert ours.encode(text, max_length) == expected == ours.encode(text)[:max_length]


def test_a_prompt_is_encoded_as_it_is(ours):
    for text in (*TEXTS, *SPECIAL_TEXTS):
        assert ours.encode_prompt(text) == ours.encode(text)
    assert ours.encode_prompt(END) == [ours.eos_id]
    with pytest.raises(ValueError, match="prompt '' is empty"):
        ours.encode_prompt("")


def test_a_document_ends_with_the_end_of_text(ours):
    assert ours.encode_documents(["hello", " "]) == [
        [*ours.encode("hello"), ours.eos_id],
        [*ours.encode(" "), ours.eos_id],
    ]
    with pytest.raises(ValueError, match="text 1 is empty"):
        ours.encode_documents(["hello", ""])


@pytest.mark.parametrize("text", ["\ud83d", "hello \udc80", "好\ud800好"])
def test_half_a_surrogate_pair_is_read_as_the_replacement_character(ours, text):
    readable = "".join("\ufffd" if 0xD800 <= ord(char) < 0xE000 else char for char in text)
    assert ours.encode(text) == ours.encode(readable)
    assert ours.encode_batch([text]) == [ours.encode(readable)]


@pytest.mark.parametrize("name", ["cls_id", "sep_id", "mask_id"])
def test_the_tokens_of_bert_are_missing(ours, name):
    with pytest.raises(ValueError, match=rf"byte-level BPE has no \[{name[:3].upper()}"):
        getattr(ours, name)


# ---- decoding -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, len(VOCAB) - 1), max_size=30))
def test_decoding_any_ids_equals_transformers(ours, theirs, ids):
    """Whatever a model samples: bytes that are no UTF-8 become the same replacement characters."""
    expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids) == expected == ours.decode(torch.tensor(ids, dtype=torch.int64))


def test_a_character_that_was_cut_is_replaced_once(ours):
    ids = [VOCAB.index(ORACLE.characters[byte]) for byte in "好😀".encode()]
    assert ours.decode(ids) == "好😀"
    assert [ours.decode(ids[:n]) for n in range(1, 7)] == ["�", "�", "好", "好�", "好�", "好�"]
    assert ours.decode([*ids[:2], ours.eos_id, ids[2]]) == "好"


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(texts)
def test_widths_add_up_to_the_characters_of_a_text(ours, text):
    assume("<|endoftext|>" not in text)  # one token, which is no text
    visible = sum(not (char.isascii() and char.isspace()) for char in text)
    assert sum(ours.width(i) for i in ours.encode(text)) == visible
    assert ours.width(ours.eos_id) == 1


# ---- vocabularies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "merges", "message"), [
    ([*VOCAB, "e"], MERGES, f"'e' twice, at ids {VOCAB.index('e')} and {len(VOCAB)}"),
    ([*VOCAB, ""], MERGES, f"empty token at id {len(VOCAB)}"),
    ([*VOCAB, "\ud800"], MERGES, rf"'\\ud800' at id {len(VOCAB)}, which is not valid Unicode"),
    (VOCAB[:-1], MERGES, r"lacks the special tokens <\|endoftext\|>"),
    ([token for token in VOCAB if token not in ("!", "Ā")], [], "lacks 2 of the 256 byte tokens, the first '!'"),
    ([*VOCAB, "a b"], MERGES, rf"'a b' at id {len(VOCAB)}, which is not written in byte characters"),
    (VOCAB, [*MERGES, ("q", "nothing")], f"merge {len(MERGES) + 1}, 'q nothing', needs 'nothing'"),
    (VOCAB, [*MERGES, ("q", "q")], f"merge {len(MERGES) + 1}, 'q q', needs 'qq'"),
    (VOCAB, [*MERGES, MERGES[3]], f"merge {len(MERGES) + 1}, '{' '.join(MERGES[3])}', is also merge 4"),
])  # fmt: skip
def test_bad_vocabularies_and_merges_are_refused(vocab, merges, message):
    with pytest.raises(ValueError, match=message):
        ByteBPE(vocab, merges)


def test_a_padding_token_and_more_special_tokens():
    vocab = [*VOCAB, "<|pad|>", "<|user|>"]
    tokenizer = Tokenizer(ByteBPE(vocab, MERGES, "<|pad|>", ["<|user|>"]))
    assert (tokenizer.eos_id, tokenizer.pad_id) == (len(VOCAB) - 1, len(VOCAB))
    assert tokenizer.special_ids == {len(VOCAB) - 1, len(VOCAB), len(VOCAB) + 1}
    ids = tokenizer.encode("hello<|user|>hello<|pad|>")
    assert ids == [*tokenizer.encode("hello"), len(VOCAB) + 1, *tokenizer.encode("hello"), len(VOCAB)]
    assert tokenizer.decode(ids) == "hellohello"
    with pytest.raises(ValueError, match=r"lacks the special tokens <\|pad\|>"):
        ByteBPE(VOCAB, MERGES, "<|pad|>")


def test_responses_follow_their_prompts_and_end(ours):
    """Encoded apart, as they are when a response is sampled; without a prompt nothing comes before the first token."""
    pairs = [Demonstration("the ho", "tel 😀"), Demonstration("", "酒店很好"), Demonstration(" ", "a")]
    found = encode_demonstrations(ours, pairs)
    for pair, (ids, first) in zip(pairs, [(s.ids, s.first) for s in found], strict=True):
        before, after = (ours.encode(text) if text else [] for text in (pair.prompt, pair.response))
        assert ids == [*before, *after, ours.eos_id] and first == max(len(before), 1)


# ---- a model ---------------------------------------------------------------------------------------------------------


def test_a_step_of_ppo(ours):
    """With padding and end of text the same id: masks, not ids, say what is padding."""
    policy, reference = (make_gpt2(seed, scale=4.0, **SIZES) for seed in (0, 1))
    eos, prompts = ours.eos_id, ["hello", "the hotel is very good", "酒店", END] * 4
    with torch.no_grad():  # an end of text that is drawn at times: its logit gets 2 |bias|^2 on top
        policy.wte.weight[eos] = 2 * policy.ln_f.bias
    before = policy.wte.weight.clone()
    trainer = PPOTrainer(
        policy, reference, ours, batch_size=16, minibatch_size=8, gen_len=6, lr=1e-3, eos_token_id=eos,
        missing_eos="replace", missing_eos_score=-1.0, ppo_epochs=2, device="cpu",
    )  # fmt: skip
    rollout = trainer.collect(prompts, lambda texts: [len(text.encode()) / 10 for text in texts])
    lengths = rollout.response_mask.sum(-1)
    ended = torch.tensor(
        [eos in row[kept] for row, kept in zip(rollout.tokens[:, -6:], rollout.response_mask, strict=True)]
    )
    assert 0 < ended.sum() < 16 and (lengths[~ended] == 6).all() and lengths.min() < 6
    for prompt, response, tokens, mask in zip(prompts, rollout.responses, rollout.tokens, rollout.mask, strict=True):
        real = tokens[mask.bool()]
        assert real[: len(ours.encode(prompt))].tolist() == ours.encode(prompt)  # also where it is the end of text
        assert ours.decode(real[len(ours.encode(prompt)) :]) == response
    stats = trainer.step(rollout)
    assert stats["ppo/policy/first_ratio_error"] < 1e-5
    assert all(math.isfinite(value) for value in stats.values())
    shaped = torch.where(ended, rollout.scores, -1.0).mean().item()
    assert stats["reward/shaped"] == pytest.approx(shaped, rel=1e-5)
    assert not torch.equal(trainer.policy.decoder.wte.weight, before)
    explanation = explain(trainer, rollout, 1)
    assert len(explanation.tokens) == lengths[1] and explanation.response == rollout.responses[1]


def test_an_explanation_shows_what_each_token_adds_to_the_text(ours):
    """Bytes of one character but the last, and the end, add nothing: they go by their names."""
    single = {bytes([b]): i for i, b in enumerate(ours.model.bytes) for b in b if len(ours.model.bytes[i]) == 1}
    prompt, *response = [torch.tensor([single[bytes([byte])]]) for byte in "a店 b\n".encode()]
    response = torch.cat([*response, torch.tensor([ours.eos_id])])
    models = [make_gpt2(0, **SIZES) for _ in range(2)]
    trainer = PPOTrainer(*models, ours, batch_size=2, minibatch_size=2, gen_len=7, device="cpu")
    longer = torch.cat([prompt, prompt])  # so that the first prompt is padded
    rollout = rollout_from_tokens(trainer.models.whole(), [prompt, longer], [response] * 2, [0.0, 0.0], trainer.config)
    explanation = explain(trainer, rollout, 0)
    assert [token["token"] for token in explanation.tokens] == ["å", "º", "店", " ", "b", "\n", END]
    assert (explanation.prompt, explanation.response) == ("a", "店 b\n")


def test_the_piece_of_a_character_of_several_tokens_is_the_last_one_s(ours):
    single = {bytes([b]): i for i, b in enumerate(ours.model.bytes) for b in b if len(ours.model.bytes[i]) == 1}
    ids = [single[bytes([byte])] for byte in "a店 b".encode()]
    assert ours.decode_pieces(ids) == ["a", "", "", "店", " ", "b"]
    assert ours.decode_pieces(ids[:3]) == ["a", "", "\ufffd"]  # cut within a character


def test_a_character_that_the_prompt_began_belongs_to_the_response(ours):
    single = {bytes([b]): i for i, b in enumerate(ours.model.bytes) for b in b if len(ours.model.bytes[i]) == 1}
    ids = [single[bytes([byte])] for byte in "a店 b".encode()]
    found = ["".join(ours.decode_response(ids[:n], ids[n:])) for n in (1, 2, 3, 4)]
    assert found == ["店 b", "店 b", "店 b", " b"]


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, len(VOCAB) - 1), max_size=12))
def test_pieces_of_any_tokens_make_up_the_text(ours, ids):
    pieces = ours.decode_pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == ours.decode(ids)
    for t in range(len(ids)):  # no piece before its time
        assert ours.decode(ids[: t + 1]).startswith("".join(pieces[: t + 1]))


def test_the_trained_vocabulary_merges_what_is_frequent(ours):
    """Or the tests above would compare bytes."""
    assert len(ours.encode("the hotel is good")) <= 5
    assert len(ours.encode("酒店很好")) < len("酒店很好".encode())
