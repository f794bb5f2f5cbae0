"""The tokenizer against transformers' (the Rust-backed one and the original pure-Python one), and its decoding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertTokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from conftest import VOCAB
from minirlhf import Tokenizer
from minirlhf.text.tokenizer import build_vocab

TEXTS = [
    "酒店很好，服务非常满意！", "hello world", "Hello, WORLD!", "WiFi很好wifi好", "房间3间，2.5米",
    "ｈｅｌｌｏ　１２３，！", "😀酒店👍🏽很好", "酒\x00店\x01\x7f很\u200b好\ufffd", "龘靐㐀𠀀好",
    "  酒  店\t很\n好\r\n\u3000差\xa0评  ", "[SEP]酒店[SEP]", "很[MASK]好[CLS] [PAD][UNK]x", "[sep] [SEP",
    "Café naïve ÀÉÎ e\u0301", "İstanbul ß ǅ", "don't stop-it", "x" * 100, "x" * 101,
    "한국어 にほんご カタカナ", "…—“”《》", "a\u00adb\u2028c", "٣½²", "日本語", "$100 + 5% = ^~`", "", " ", "##a ## #",
]  # fmt: skip


@pytest.fixture(scope="module")
def vocab_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocab")
    (folder / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def fast(vocab_folder) -> BertTokenizer:
    return BertTokenizer.from_pretrained(vocab_folder)


@pytest.fixture(scope="module")
def legacy(vocab_folder) -> BertTokenizerLegacy:
    return BertTokenizerLegacy(str(vocab_folder / "vocab.txt"))


def ids_of(*tokens: str) -> list[int]:
    return [VOCAB.index(token) for token in tokens]


# ---- encoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_transformers(tokenizer, fast, legacy, text):
    assert tokenizer.encode(text) == fast(text)["input_ids"] == legacy(text)["input_ids"]


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from("酒店很好aB1 ，[]#SEP"), max_size=30))
def test_encoding_any_text_equals_transformers(tokenizer, fast, text):
    assert tokenizer.encode(text) == fast(text)["input_ids"]


def test_encoding_by_hand(tokenizer):
    assert tokenizer.encode("酒店 很好WIFI") == ids_of("[CLS]", "酒", "店", "很", "好", "wifi", "[SEP]")
    assert tokenizer.encode("hellox hex") == ids_of("[CLS]", "hello", "##x", "h", "##e", "##x", "[SEP]")
    assert tokenizer.encode("龘") == ids_of("[CLS]", "[UNK]", "[SEP]")
    assert tokenizer.encode("") == ids_of("[CLS]", "[SEP]")
    assert tokenizer.encode("好[SEP]") == ids_of("[CLS]", "好", "[SEP]", "[SEP]")


@pytest.mark.parametrize("text", ["酒店很好", "hello, wifi", "[SEP]"])
def test_a_prompt_is_left_open(tokenizer, text):
    assert [*tokenizer.encode_prompt(text), tokenizer.sep_id] == tokenizer.encode(text)


@pytest.mark.parametrize("text", ["", "  \t\n", "\u3000\xa0", "\x00\u200b"])
def test_an_empty_prompt_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="is empty"):
        tokenizer.encode_prompt(text)


@pytest.mark.parametrize("text", [None, 3, b"abc", ["a"], ("a", "b")])
def test_what_is_no_text_is_refused(tokenizer, text):
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda t: tokenizer.encode_batch(["a", t])):
        with pytest.raises(ValueError):
            encode(text)


@pytest.mark.parametrize("text", ["x\ud83d", "酒店\udc80", "a\ud800b" * 99])
def test_half_a_surrogate_pair_is_read_as_the_replacement_character(tokenizer, text):
    readable = "".join("\ufffd" if 0xD800 <= ord(char) < 0xE000 else char for char in text)
    for encode in (tokenizer.encode, tokenizer.encode_prompt, lambda t: tokenizer.encode_batch(["a", t])):
        assert encode(text) == encode(readable)


@pytest.mark.parametrize("texts", [["酒店很好", "hello, wifi", "", "[SEP]"], []])
def test_a_document_is_an_encoded_text(tokenizer, texts):
    assert tokenizer.encode_documents(texts) == tokenizer.encode_batch(texts)


@pytest.mark.parametrize("max_length", [2, 3, 5, 6, 7, 100])
def test_truncation_equals_transformers(tokenizer, fast, max_length):
    text = "酒店很好"  # 6 tokens with [CLS] and [SEP]
    ids = tokenizer.encode(text, max_length)
    assert ids == fast(text, truncation=True, max_length=max_length)["input_ids"]
    assert len(ids) == min(6, max_length)


@pytest.mark.parametrize("max_length", [1, 0, -1])
def test_no_room_for_the_special_tokens_is_refused(tokenizer, max_length):
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenizer.encode("好", max_length)
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenizer.encode_batch(["好"], max_length)


@pytest.mark.parametrize("max_length", [None, 2, 5])
def test_a_batch_is_encoded_as_its_texts_are(tokenizer, max_length):
    assert tokenizer.encode_batch(TEXTS, max_length) == [tokenizer.encode(text, max_length) for text in TEXTS]
    assert tokenizer.encode_batch([]) == []


# ---- decoding -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "text"), [
    (["[CLS]", "酒", "店", "很", "好", "[SEP]"], "酒店很好"),
    (["hello", "world"], "hello world"),
    (["hello", "，", "world", "！"], "hello，world！"),
    (["wifi", "很", "好", "wifi"], "wifi很好wifi"),
    (["h", "##e", "##l", "##l", "##o", "world"], "hello world"),
    (["1", "##2", "##3", "间"], "123间"),
    (["酒", "[PAD]", "[PAD]", "店", "[SEP]", "[UNK]", "[MASK]"], "酒店"),
    (["hello", "[SEP]", "world"], "hello world"),
    (["##a", "##b"], "ab"),
    (["[PAD]"], ""),
    ([], ""),
])  # fmt: skip
def test_decoding_rules(tokenizer, tokens, text):
    ids = [VOCAB.index(token) if token in VOCAB else None for token in tokens]
    if None in ids:  # a token that the shared vocabulary does not have
        tokenizer = Tokenizer([*VOCAB, *(token for token in tokens if token not in VOCAB)])
        ids = [tokenizer.vocab.index(token) for token in tokens]
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(torch.tensor(ids, dtype=torch.int64)) == text
    assert tokenizer.decode(iter(ids)) == text


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.sampled_from([*"酒店周围很好，。！？", "hello", "world", "wifi"]), max_size=12))
def test_decoding_what_was_encoded_gives_the_text_back(tokenizer, parts):
    """Where Latin words, and nothing else, are separated by a space."""
    text = ""
    for part in parts:
        text += (" " if text and text[-1].isascii() and part.isascii() else "") + part
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("bad", [-1, len(VOCAB), 10**9])
def test_decoding_an_id_outside_the_vocabulary_is_refused(tokenizer, bad):
    with pytest.raises(ValueError, match=rf"token id {bad} is outside the vocabulary of {len(VOCAB)}"):
        tokenizer.decode([VOCAB.index("好"), bad])


def test_widths_count_the_characters_of_a_text(tokenizer):
    for token, width in (("好", 1), ("hello", 5), ("##a", 1), ("[SEP]", 1), ("[UNK]", 1), ("，", 1)):
        assert tokenizer.width(VOCAB.index(token)) == width


# ---- vocabularies ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vocab", "message"), [
    ([t for t in VOCAB if t not in ("[SEP]", "[MASK]")], r"lacks the special tokens \[SEP\], \[MASK\]"),
    ([], r"lacks the special tokens \[PAD\]"),
])  # fmt: skip
def test_bad_vocabularies_are_refused(tmp_path, vocab, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(vocab)
    (tmp_path / "vocab.txt").write_text("\n".join(vocab), encoding="utf-8")
    with pytest.raises(ValueError, match=message if vocab else "vocab.txt") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path / "vocab.txt") in str(caught.value)


def test_a_token_twice_in_a_list_is_refused():
    """In a file it happens to published vocabularies; a list is somebody's mistake."""
    with pytest.raises(ValueError, match=f"'好' twice, at ids {VOCAB.index('好')} and {len(VOCAB)}"):
        Tokenizer([*VOCAB, "好"])


@pytest.mark.parametrize(("separator", "end"), [("\n", ""), ("\n", "\n"), ("\r\n", ""), ("\r\n", "\r\n")])
def test_line_ends_do_not_matter(tmp_path, separator, end):
    (tmp_path / "vocab.txt").write_bytes((separator.join(VOCAB) + end).encode("utf-8"))
    assert Tokenizer.from_pretrained(tmp_path).vocab == VOCAB


def test_only_line_feeds_separate_tokens(tmp_path):
    """Published vocabularies hold characters that `str.splitlines` would cut at."""
    vocab = [*VOCAB, "\u2028", "a\x85b", "\x0b"]
    (tmp_path / "vocab.txt").write_bytes("\n".join(vocab).encode("utf-8"))
    assert Tokenizer.from_pretrained(tmp_path).vocab == vocab


def test_special_ids_are_found_by_name():
    moved = ["a", "[MASK]", "[SEP]", "[UNK]", "[PAD]", "[CLS]"]
    tokenizer = Tokenizer(moved)
    found = (tokenizer.mask_id, tokenizer.sep_id, tokenizer.pad_id, tokenizer.cls_id)
    assert found == (1, 2, 4, 5) and tokenizer.eos_id == tokenizer.sep_id
    assert tokenizer.special_ids == {1, 2, 3, 4, 5}
    assert tokenizer.encode("a?") == [5, 0, 3, 2]


# ---- building a vocabulary ------------------------------------------------------------------------------------------


def test_built_vocabulary_has_the_published_special_ids():
    tokenizer = Tokenizer(build_vocab(["酒店很好"] * 3))
    special = (tokenizer.pad_id, tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id)
    assert special == (0, 101, 102, 103) and tokenizer.vocab[100] == "[UNK]"
    assert tokenizer.vocab[1:100] == [f"[unused{i}]" for i in range(1, 100)]


def test_built_vocabulary_keeps_what_is_frequent_enough():
    vocab = build_vocab(["好好好店店", "好 店 hello HELLO", "差hello"], min_count=3)
    assert vocab[104 + 2 * len("ehlo") :] == ["好", "hello", "店"]  # 4, 3 and 3 times
    assert "差" in build_vocab(["差"], min_count=1) and "差" not in build_vocab(["差"], min_count=2)


def test_built_vocabulary_spells_every_latin_word():
    texts = ["好 Zebra 42"]
    tokenizer = Tokenizer(build_vocab(texts, min_count=3))
    assert set("zebra42") | {f"##{c}" for c in "zebra42"} <= set(tokenizer.vocab)
    pieces = [tokenizer.vocab[i] for i in tokenizer.encode("barez24")[1:-1]]
    assert pieces == ["b", "##a", "##r", "##e", "##z", "##2", "##4"]
    assert tokenizer.encode("好")[1] == tokenizer.vocab.index("[UNK]")


# ---- a prompt and its response --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prompt", "response", "texts"), [
    (["[CLS]", "hotel"], ["wifi", "好"], ("hotel", " wifi好")), (["[CLS]", "店", "wifi"], ["##s"], ("店wifi", "s")),
    (["[CLS]", "酒"], ["店", "[SEP]", "[PAD]"], ("酒", "店")),
    (["[CLS]", "good"], ["[SEP]", "good"], ("good", " good")),
    (["2008"], ["[UNK]", "[PAD]"], ("2008", "")), (["hotel"], [], ("hotel", "")), ([], ["好"], ("", "好")),
])  # fmt: skip
def test_prompt_and_response_join_to_the_decoding_of_all_tokens(prompt, response, texts):
    tokenizer = Tokenizer(
        ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"酒店好", "hotel", "wifi", "good", "##s", "2008"]
    )
    ids = [[tokenizer.vocab.index(token) for token in part] for part in (prompt, response)]
    assert "".join(tokenizer.decode_response(*ids)) == texts[1]
    assert tokenizer.decode_response(*map(torch.tensor, ids)) == tokenizer.decode_response(*ids)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(*[st.lists(st.integers(0, len(VOCAB) - 1) | st.sampled_from(ids_of("hello", "##a", "[SEP]")), max_size=8)] * 2)
def test_any_prompt_and_response_join(tokenizer, prompt, response):
    pieces = tokenizer.decode_response(prompt, response)
    assert len(pieces) == len(response)
    assert tokenizer.decode(prompt) + "".join(pieces) == tokenizer.decode([*prompt, *response])


# ---- the text of each token -----------------------------------------------------------------------------------------


def test_pieces_by_hand(tokenizer):
    ids = ids_of("[CLS]", "很", "hello", "##x", "[SEP]", "world", "好", "wifi", "[PAD]")
    assert tokenizer.decode_pieces(ids) == ["", "很", "hello", "x", "", " world", "好", "wifi", ""]
    assert tokenizer.decode_pieces(torch.tensor(ids)) == tokenizer.decode_pieces(ids)
    assert tokenizer.decode_pieces([]) == [] and tokenizer.decode_pieces(ids_of("[SEP]")) == [""]


@pytest.mark.parametrize("tokens", [
    ["é", "", "a"], ["", "a", "", "", "b", ""], ["a", "[SEP]", "", "b"], ["hello", "", "##a", "酒", "", "a"], [""],
])  # fmt: skip
def test_a_blank_line_of_the_vocabulary_adds_nothing(tokens):
    vocab = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "", "é", "a", "b", "酒", "", "hello", "##a"]
    blank = Tokenizer(vocab)
    ids = [vocab.index(token) for token in tokens]
    pieces = blank.decode_pieces(ids)
    assert "".join(pieces) == blank.decode(ids) and len(pieces) == len(ids)
    assert all(piece == "" for piece, token in zip(pieces, tokens, strict=True) if token == "")
    for cut in range(len(ids) + 1):
        joined = blank.decode(ids[:cut]) + "".join(blank.decode_response(ids[:cut], ids[cut:]))
        assert joined == blank.decode(ids)
    with pytest.raises(ValueError, match=f"token id {len(vocab)} is outside"):
        blank.decode_pieces([len(vocab)])


@pytest.mark.parametrize(
    "vocab", [{token: i for i, token in enumerate(VOCAB)}, set(VOCAB), "abc", len], ids=lambda x: type(x).__name__
)
def test_a_vocabulary_without_an_order_is_refused(vocab):
    """As the `get_vocab()` of other libraries is, or their tokenizer itself."""
    with pytest.raises(
        ValueError, match=f"must be a list of tokens by id, got a {type(vocab).__name__}: .*from_pretrained"
    ):
        Tokenizer(vocab)


@pytest.mark.parametrize("ids", [None, 5, "5", [1.0], [[5, 6]], torch.tensor([[5, 6]])], ids=repr)
def test_decoding_what_is_no_row_of_ids_is_refused(tokenizer, ids):
    with pytest.raises(ValueError, match="expected token ids of one text, got"):
        tokenizer.decode(ids)


def test_one_text_is_no_batch_of_its_characters(tokenizer):
    with pytest.raises(ValueError, match="texts must be a list of texts, got a single one"):
        tokenizer.encode_batch("酒店")
