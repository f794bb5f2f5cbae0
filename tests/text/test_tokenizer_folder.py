"""Tokenizers in and out of folders: what transformers makes of ours, what we make of its, and what is refused."""

import json
import unicodedata
from pathlib import Path

import pytest
from bpe import END, trained_bpe, write_published
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, BertConfig, BertTokenizer, GPT2Config, GPT2Tokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import minirlhf
from conftest import VOCAB as WORDS
from minirlhf import Tokenizer
from minirlhf.text.tokenizer_json import JSONTokenizer
from minirlhf.text.tokenizer_models import ByteBPE, WordPiece

VOCAB, MERGES = trained_bpe()
WEIGHTS = Path(minirlhf.__file__).parents[1] / "weights"
TEXTS = [
    "酒店很好，wifi 太差！", "Hello WORLD hello", "the hotel isn't good , is n't it ?", "Café ÀÉ", "e\u0301",
    "很[MASK]好[SEP]x [sep]", f"a{END}b {END}", "ｈｅｌｌｏ　１２３", "😀\x00\t\u200b\n\n  x",
    "<|pad|>hello<|user|> hi", "",
]  # fmt: skip
OPTIONS = [
    {},
    {"do_lower_case": False},
    {"do_lower_case": False, "strip_accents": True},
    {"strip_accents": False},
    {"tokenize_chinese_chars": False},
]
MADE = {
    "wordpiece": lambda: WordPiece(WORDS),
    "wordpiece, cased": lambda: WordPiece([*WORDS, "Hello", "É"], do_lower_case=False, strip_accents=False),
    "wordpiece, words of Chinese": lambda: WordPiece([*WORDS, "酒店很好"], tokenize_chinese_chars=False),
    "wordpiece, more special tokens": lambda: WordPiece([*WORDS, "<|user|>"], extra_special=["<|user|>"]),
    "bpe": lambda: ByteBPE(VOCAB, MERGES),
    "bpe, padding": lambda: ByteBPE([*VOCAB, "<|pad|>"], MERGES, "<|pad|>"),
    "bpe, padding by the end": lambda: ByteBPE(VOCAB, MERGES, END),
    "bpe, more special tokens": lambda: ByteBPE([*VOCAB, "<|user|>"], MERGES, extra_special=["<|user|>"]),
}


def same(one: Tokenizer, other: Tokenizer) -> None:
    assert type(one.model) is type(other.model)
    assert one.vocab == other.vocab and one.special_ids == other.special_ids
    assert (one.pad_id, one.eos_id) == (other.pad_id, other.eos_id)
    assert one.encode_batch(TEXTS) == other.encode_batch(TEXTS)
    for tokenizer in (one, other):
        tokenizer.model.kept = {}
    assert one.model.files() == other.model.files()


def edit(path: Path, change) -> None:
    """Change a JSON file in place."""
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def write_vocab(folder: Path, vocab=WORDS, **config) -> Path:
    """A BERT folder as the uer models publish it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", encoding="utf-8")
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


# ---- ours in transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [GPT2Config, BertConfig])
@pytest.mark.parametrize("kind", MADE)
def test_auto_tokenizer_reproduces_what_we_saved_and_we_what_it_saves(tmp_path, kind, config):
    """Also where the model in the folder is of the other kind: uer's GPT-2 has the tokenizer of BERT."""
    ours = Tokenizer(MADE[kind]())
    config(vocab_size=len(ours), bos_token_id=0, eos_token_id=0).save_pretrained(tmp_path / "ours")
    ours.save_pretrained(tmp_path / "ours")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert len(theirs) == len(ours)
    for text in TEXTS:
        assert theirs(text)["input_ids"] == ours.encode(text), text
    assert set(theirs.all_special_ids) == ours.special_ids
    if "pad_token" in ours.model.roles:
        assert theirs.pad_token_id == ours.pad_id
    else:
        assert theirs.pad_token is None  # none was named: pad_id is our stand-in
    if isinstance(ours.model, ByteBPE):
        assert theirs.eos_token_id == ours.eos_id
        assert [theirs.decode(ours.encode(text), skip_special_tokens=True) for text in TEXTS] == [
            ours.decode(ours.encode(text)) for text in TEXTS
        ]
    theirs.save_pretrained(tmp_path / "theirs")
    assert "tokenizer.json" in names(tmp_path / "theirs")
    same(Tokenizer.from_pretrained(tmp_path / "theirs"), ours)


@pytest.mark.parametrize("kind", MADE)
@pytest.mark.parametrize("left_out", [(), ("tokenizer.json",)])
def test_saving_and_loading_changes_nothing(tmp_path, kind, left_out):
    """From tokenizer.json as from the files of the original implementations."""
    ours = Tokenizer(MADE[kind]())
    ours.save_pretrained(tmp_path)
    for name in left_out:
        (tmp_path / name).unlink()
    same(Tokenizer.from_pretrained(tmp_path), ours)


@pytest.mark.parametrize("kind", MADE)
def test_tokenizer_json_alone_encodes_as_we_do(tmp_path, kind):
    """As servers in other languages read it."""
    ours = Tokenizer(MADE[kind]())
    ours.save_pretrained(tmp_path)
    backend = Backend.from_file(str(tmp_path / "tokenizer.json"))
    assert [backend.encode(text).ids for text in TEXTS] == [ours.encode(text) for text in TEXTS]
    assert backend.decode(ours.encode("hellox hello")) == ours.decode(ours.encode("hellox hello")) == "hellox hello"


@pytest.mark.parametrize("kind", ["wordpiece, cased", "wordpiece, words of Chinese"])
def test_the_original_bert_reads_what_we_saved(tmp_path, kind):
    ours = Tokenizer(MADE[kind]())
    ours.save_pretrained(tmp_path)
    legacy = BertTokenizerLegacy.from_pretrained(tmp_path)
    assert [legacy(text)["input_ids"] for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_settings_that_change_no_id_are_saved_again(tmp_path):
    """Or a pipeline that is to cut a long text would not know where."""
    kept = {"model_max_length": 5, "padding_side": "left", "truncation_side": "right", "chat_template": "{{ 'x' }}"}
    write_vocab(tmp_path / "in", **kept, model_input_names=["input_ids", "attention_mask"], name_or_path="/somewhere")
    ours = Tokenizer.from_pretrained(tmp_path / "in")
    ours.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert {name: config[name] for name in kept} == kept and "name_or_path" not in config
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert theirs("酒店很好，太差", truncation=True)["input_ids"] == ours.encode("酒店很好，太差", 5)
    assert list(theirs("好")) == ["input_ids", "attention_mask"] and theirs.padding_side == "left"
    ours.save_pretrained(tmp_path / "out", 4)
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")("酒店很好，太差", truncation=True)["input_ids"]) == 4
    same(Tokenizer.from_pretrained(tmp_path / "out"), ours)


def test_saving_replaces_another_tokenizer_and_nothing_else(tmp_path):
    Tokenizer(MADE["bpe"]()).save_pretrained(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"x": 400}')
    (tmp_path / "config.json").write_text("kept")
    Tokenizer(MADE["wordpiece"]()).save_pretrained(tmp_path)
    expected = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt", "config.json"}
    assert names(tmp_path) == expected and (tmp_path / "config.json").read_text() == "kept"
    same(Tokenizer.from_pretrained(tmp_path), Tokenizer(MADE["wordpiece"]()))


@pytest.mark.parametrize("name", ["gpt2-chinese-reviews-small", "bert-chinese-reviews-sentiment-small"])
def test_auto_tokenizer_works_on_the_weights_that_ship(tmp_path, name):
    ours, theirs = Tokenizer.from_pretrained(WEIGHTS / name), AutoTokenizer.from_pretrained(WEIGHTS / name)
    assert len(theirs) == len(ours) == 4457 and theirs.model_max_length == 128
    assert [theirs(text)["input_ids"] for text in TEXTS] == ours.encode_batch(TEXTS)
    ours.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in (WEIGHTS / name).iterdir() if path.name in names(tmp_path)
    }


# ---- theirs in ours -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_settings_of_bert_equal_transformers(tmp_path, options):
    write_vocab(tmp_path, [*WORDS, "Hello", "É", "é", "酒店很好"], **options)
    ours = Tokenizer.from_pretrained(tmp_path)
    theirs = BertTokenizer.from_pretrained(tmp_path)
    legacy = BertTokenizerLegacy(str(tmp_path / "vocab.txt"), **options)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text
        if unicodedata.is_normalized("NFC", text):  # accents that stand apart: the pure-Python one alone joins them
            assert ours.encode(text) == legacy(text)["input_ids"], text


SILENT = {"full": None, "absent": None, "empty": {}, "class": {"tokenizer_class": "BertTokenizerFast"},
          "one setting": {"do_lower_case": True},
          "another class": {"tokenizer_class": "PreTrainedTokenizerFast"}}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("config", SILENT)
@pytest.mark.parametrize("model", ["bert", "gpt2 with BERT's tokenizer", "none"])
def test_a_tokenizer_json_of_bert(tmp_path, options, config, model):
    """A tokenizer_config.json that is silent, or not there: BertTokenizer has defaults, other classes a normalizer."""
    BertTokenizer(vocab={token: i for i, token in enumerate(WORDS)}, **options).save_pretrained(tmp_path)
    assert names(tmp_path) == {"tokenizer.json", "tokenizer_config.json"}
    if config != "full":
        (tmp_path / "tokenizer_config.json").unlink()
    if SILENT[config] is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(SILENT[config]))
    if model != "none":
        kind = {"bos_token_id": 0, "eos_token_id": 0, "tokenizer_class": "BertTokenizer"}
        (BertConfig() if model == "bert" else GPT2Config(**kind)).save_pretrained(tmp_path)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    if config == "full":
        same(ours, Tokenizer(WordPiece(WORDS, **options)))
    assert [theirs(text)["input_ids"] for text in TEXTS] == ours.encode_batch(TEXTS)


@pytest.mark.parametrize("end", ["\n", "", "\n\n", "\n\n\n"])
@pytest.mark.parametrize("more", [["好"], ["", "x"], ["", "", "x", "", "酒", "y"], ["[SEP]", "q"], ["\u3000", "z"]])
def test_double_and_blank_lines_are_numbered_as_in_transformers(tmp_path, more, end):
    """A token has the number of its last line; nothing has those of the others."""
    vocab = [*WORDS, *more]
    (tmp_path / "vocab.txt").write_text("\n".join(vocab) + end, encoding="utf-8")
    ours, theirs = Tokenizer.from_pretrained(tmp_path), BertTokenizer.from_pretrained(tmp_path)
    legacy = BertTokenizerLegacy(str(tmp_path / "vocab.txt"))
    texts = [*TEXTS, "酒店x y z q 好[SEP]"]
    assert len(ours) == len(vocab)
    assert ours.encode_batch(texts) == [theirs(text)["input_ids"] for text in texts]
    assert ours.encode_batch(texts) == [legacy(text)["input_ids"] for text in texts]
    for i, token in enumerate(ours.vocab):
        assert i in ours.special_ids or ours.decode([i]) == ("" if token == "" else token.removeprefix("##"))
    ours.save_pretrained(tmp_path / "saved")
    again = Tokenizer.from_pretrained(tmp_path / "saved")
    assert again.vocab == ours.vocab and again.encode_batch(texts) == ours.encode_batch(texts)
    (tmp_path / "saved" / "tokenizer.json").unlink()
    assert Tokenizer.from_pretrained(tmp_path / "saved").vocab == ours.vocab


@pytest.mark.parametrize("kind", ["wordpiece", "bpe"])
def test_a_byte_order_mark_is_read_in_every_file(tmp_path, kind):
    ours = Tokenizer(MADE[kind]())
    ours.save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    same(Tokenizer.from_pretrained(tmp_path), ours)
    (tmp_path / "tokenizer.json").unlink()
    same(Tokenizer.from_pretrained(tmp_path), Tokenizer(MADE[kind]()))


def test_a_tokenizer_json_of_bert_without_post_processor(tmp_path):
    """BertTokenizer puts [CLS] and [SEP] around a text all the same."""
    tokenizer = Tokenizer(WORDS)
    tokenizer.save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer.json", lambda content: content.update(post_processor=None))
    BertConfig().save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("好")["input_ids"] == tokenizer.encode("好")
    same(Tokenizer.from_pretrained(tmp_path), tokenizer)


def test_tokenizer_config_outweighs_tokenizer_json(tmp_path):
    """As in BertTokenizer."""
    Tokenizer(WORDS).save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", lambda content: content.update(do_lower_case=False))
    ids = Tokenizer.from_pretrained(tmp_path).encode("HELLO hello")
    assert ids == BertTokenizer.from_pretrained(tmp_path)("HELLO hello")["input_ids"]
    assert ids == Tokenizer(WordPiece(WORDS, do_lower_case=False)).encode("HELLO hello")


@pytest.mark.parametrize("end", ["\n", ""])
@pytest.mark.parametrize("separator", ["\n", "\r\n"])
@pytest.mark.parametrize("header", ["#version: 0.2", None])
def test_a_gpt2_as_it_was_published(tmp_path, header, separator, end):
    write_published(tmp_path)
    lines = [*([header] if header else []), *(" ".join(pair) for pair in MERGES)]
    (tmp_path / "merges.txt").write_bytes((separator.join(lines) + end.replace("\n", separator)).encode())
    same(Tokenizer.from_pretrained(tmp_path), Tokenizer(ByteBPE(VOCAB, MERGES)))


@pytest.mark.parametrize("header", ["#version: 0.2\n", ""])
def test_merges_that_begin_like_a_comment(tmp_path, header):
    vocab, merges = [*VOCAB[:-1], "##", "#v", END], [("#", "#"), ("#", "v")]
    Tokenizer(ByteBPE(vocab, merges)).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "merges.txt").write_text(f"{header}# #\n# v\n", encoding="utf-8")
    assert Tokenizer.from_pretrained(tmp_path).model.merges == merges


def test_a_tokenizer_json_of_the_first_years(tmp_path):
    """That of the published gpt2: no types in the model, merges as texts, a normalized end of text."""
    write_published(tmp_path)
    published = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": len(VOCAB) - 1, "special": True, "content": END, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True},
        "model": {"dropout": None, "unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "",
                  "fuse_unk": False, "vocab": {token: i for i, token in enumerate(VOCAB)},
                  "merges": [f"{left} {right}" for left, right in MERGES]},
    }  # fmt: skip
    (tmp_path / "tokenizer.json").write_text(json.dumps(published), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"model_max_length": 1024}', encoding="utf-8")
    (tmp_path / "merges.txt").unlink()
    same(Tokenizer.from_pretrained(tmp_path), Tokenizer(ByteBPE(VOCAB, MERGES)))


def test_a_gpt2_with_tokens_that_were_added(tmp_path):
    """As training with transformers leaves it: the vocabulary does not have them, the added tokens do."""
    theirs = GPT2Tokenizer.from_pretrained(write_published(tmp_path / "published"))
    theirs.add_special_tokens({"pad_token": "<|pad|>", "extra_special_tokens": ["<|user|>"]})
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Tokenizer.from_pretrained(tmp_path / "theirs")
    assert ours.vocab == [*VOCAB, "<|pad|>", "<|user|>"] and ours.pad_id == len(VOCAB) == theirs.pad_token_id
    assert ours.encode_batch(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]
    ours.save_pretrained(tmp_path / "ours")
    GPT2Config().save_pretrained(tmp_path / "ours")
    again = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert ours.encode_batch(TEXTS) == [again(text)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("token", ["<|pad|>", {"content": "<|pad|>", "lstrip": False, "rstrip": False}])
def test_the_padding_token_is_named_in_either_file(tmp_path, name, token):
    Tokenizer(MADE["bpe, padding"]()).save_pretrained(tmp_path)
    for unnamed in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / unnamed).unlink()
    (tmp_path / name).write_text(json.dumps({"pad_token": token}), encoding="utf-8")
    same(Tokenizer.from_pretrained(tmp_path), Tokenizer(MADE["bpe, padding"]()))


# ---- what is refused ------------------------------------------------------------------------------------------------


def refused(folder: Path, error: type, *parts: str) -> None:
    """One error, with the file and what is wrong in it."""
    with pytest.raises(error) as caught:
        Tokenizer.from_pretrained(folder)
    for part in parts:
        assert part in str(caught.value), part


def test_a_folder_without_a_tokenizer_lists_what_was_looked_for(tmp_path):
    looked_for = ("tokenizer.json", "vocab.json", "merges.txt", "vocab.txt")
    refused(tmp_path, FileNotFoundError, str(tmp_path), "found none of them", *looked_for)
    refused(tmp_path / "nowhere", FileNotFoundError, f"{tmp_path / 'nowhere'} does not exist")
    write_published(tmp_path)
    (tmp_path / "merges.txt").unlink()
    refused(tmp_path, FileNotFoundError, str(tmp_path), "found vocab.json", *looked_for)


@pytest.mark.parametrize(("content", "message"), [
    ({**{t: i for i, t in enumerate(VOCAB)}, "ab": 401}, "the ids 0 to 400, but 400 is missing"),
    ({t: i + 1 for i, t in enumerate(VOCAB)}, "but 0 is missing"),
    ({**{t: i for i, t in enumerate(VOCAB)}, "ab": 7}, f"{VOCAB[7]!r} and 'ab' have the same id 7"),
    ({**{t: i for i, t in enumerate(VOCAB)}, "ab": "400"}, "'ab' has the id '400', which is not a whole number"),
    ({**{t: i for i, t in enumerate(VOCAB)}, "ab": 400.0}, "which is not a whole number"),
    ({t: i for i, t in enumerate(VOCAB[:-1])}, "lacks the special tokens <|endoftext|>"),
    ({**{t: i for i, t in enumerate(VOCAB)}, "\ud800": 400}, "not valid Unicode"),
    ({t: i for i, t in enumerate(WORDS)}, "lacks"),
])  # fmt: skip
def test_a_bad_vocab_json(tmp_path, content, message):
    write_published(tmp_path)
    (tmp_path / "vocab.json").write_text(json.dumps(content), encoding="utf-8")
    refused(tmp_path, ValueError, str(tmp_path / "vocab.json"), message)


@pytest.mark.parametrize(("line", "message"), [
    ("q nothing", f"merge {len(MERGES) + 1}, 'q nothing', needs 'nothing', which no token is"),
    ("q q", "needs 'qq'"),
    ("e", f"merge {len(MERGES) + 1} must be two tokens, got 'e'"),
    ("e l l", "must be two tokens, got 'e l l'"),
    ("e ", "must be two tokens, got 'e '"),
    ("", "must be two tokens, got ''"),
    (" ".join(MERGES[0]), "is also merge 1"),
])  # fmt: skip
def test_bad_merges(tmp_path, line, message):
    write_published(tmp_path)
    with (tmp_path / "merges.txt").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    refused(tmp_path, ValueError, str(tmp_path), "merges.txt", message)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", ['{"酒店": 1}'.encode("gb18030"), b'{"a": 1', b'["a"]', b""])
def test_damaged_json_is_named(tmp_path, name, content):
    write_published(tmp_path)
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, ValueError, str(tmp_path / name), "UTF-8" if b"\xbe" in content else "JSON")


@pytest.mark.parametrize("name", ["merges.txt", "vocab.txt"])
def test_a_text_that_is_not_utf8_is_named(tmp_path, name):
    write_published(tmp_path) if name == "merges.txt" else write_vocab(tmp_path)
    (tmp_path / name).write_bytes("酒店".encode("gb18030"))
    refused(tmp_path, ValueError, f"{tmp_path / name} is not valid UTF-8")


@pytest.mark.parametrize(("config", "message"), [
    ({"tokenizer_class": "GPT2Tokenizer"}, "tokenizer_class='GPT2Tokenizer'"),
    ({"tokenizer_class": "XLNetTokenizer"}, "'BertTokenizer' or 'BertTokenizerFast' is supported"),
    ({"do_lower_case": "false"}, "do_lower_case='false'; only True or False is supported"),
    ({"do_lower_case": 1}, "do_lower_case=1"),
    ({"do_lower_case": None}, "do_lower_case=None"),
    ({"tokenize_chinese_chars": None}, "tokenize_chinese_chars=None"),
    ({"strip_accents": "no"}, "strip_accents='no'"),
    ({"do_basic_tokenize": False}, "do_basic_tokenize=False"),
    ({"never_split": ["a"]}, "never_split=['a']"),
    ({"split_special_tokens": True}, "split_special_tokens=True"),
    ({"unk_token": "<unk>"}, "unk_token='<unk>'; only '[UNK]'"),
    ({"sep_token": {"content": "</s>", "special": True}}, "sep_token='</s>'"),
    ({"mask_token": {"content": "[MASK]", "lstrip": True}}, "mask_token has lstrip=True"),
    ({"cls_token": 3}, "cls_token must hold the text of a token, got 3"),
    ({"additional_special_tokens": ["<|user|>"]}, "lacks the special tokens <|user|>"),
    ({"added_tokens_decoder": {"104": {"content": "a", "special": False}}}, "added_tokens_decoder has special=False"),
])  # fmt: skip
def test_settings_of_bert_that_are_not_supported(tmp_path, config, message):
    write_vocab(tmp_path, **config)
    named = "vocab.txt" if "lacks" in message else "tokenizer_config.json"
    refused(tmp_path, ValueError, str(tmp_path / named), message)


@pytest.mark.parametrize(("config", "message"), [
    ({"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class='RobertaTokenizer'"),
    ({"tokenizer_class": "BertTokenizer"}, "tokenizer_class='BertTokenizer'"),
    ({"add_prefix_space": True}, "add_prefix_space=True; only False is supported"),
    ({"add_bos_token": True}, "add_bos_token=True"),
    ({"add_eos_token": True}, "add_eos_token=True"),
    ({"errors": "strict"}, "errors='strict'"),
    ({"eos_token": "</s>"}, "eos_token='</s>'; only '<|endoftext|>'"),
    ({"cls_token": "<s>"}, "cls_token='<s>'"),
    ({"pad_token": "<|pad|>"}, "lacks the special tokens <|pad|>"),
])  # fmt: skip
def test_settings_of_gpt2_that_are_not_supported(tmp_path, config, message):
    write_published(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    named = "vocab.json" if "lacks" in message else "tokenizer_config.json"
    refused(tmp_path, ValueError, str(tmp_path / named), message)


def test_added_tokens_of_the_old_layout(tmp_path):
    write_published(tmp_path)
    (tmp_path / "added_tokens.json").write_text('{"<|pad|>": 400}')
    refused(tmp_path, ValueError, str(tmp_path / "added_tokens.json"))
    (tmp_path / "added_tokens.json").write_text("{}")
    assert Tokenizer.from_pretrained(tmp_path).vocab == VOCAB


UNIGRAM = models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0, False)
WORD_LEVEL = models.WordLevel({"[UNK]": 0}, "[UNK]")


@pytest.mark.parametrize(("model", "message"), [(UNIGRAM, "the type 'Unigram'"), (WORD_LEVEL, "the type 'WordLevel'")])
def test_tokenizers_of_another_type(tmp_path, model, message):
    Backend(model).save(str(tmp_path / "tokenizer.json"))
    refused(tmp_path, ValueError, str(tmp_path / "tokenizer.json"), message, "only WordPiece and BPE are supported")


def test_a_tokenizer_json_without_a_model(tmp_path):
    for content in ("{}", '{"model": null}', '{"model": {"type": null}}'):
        (tmp_path / "tokenizer.json").write_text(content)
        refused(tmp_path, ValueError, str(tmp_path / "tokenizer.json"), "the type None")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')
    refused(tmp_path, ValueError, str(tmp_path / "tokenizer.json"), "not a readable tokenizer")


def part(name, value):
    return lambda content: content.update({name: json.loads(value.__getstate__()) if value is not None else None})


def of_model(**changes):
    return lambda content: content["model"].update(changes)


def added(**changes):
    return lambda content: content["added_tokens"][-1].update(changes)


DIGITS = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
# Rust panics over it, as over a template without its tokens; such an error is no Exception of Python.
PANIC = {"type": "Precompiled", "precompiled_charsmap": ""}
ROBERTA = processors.RobertaProcessing((END, len(VOCAB) - 1), ("a", 66))


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("bpe", of_model(dropout=0.1), "model has dropout=0.1"),
    ("bpe", of_model(merges=[["q", "nothing"]]), "merge 1, 'q nothing', needs 'nothing'"),
    ("bpe", of_model(merges=[["q"]]), "merge 1 must be two tokens, got ['q']"),
    ("bpe", of_model(merges=[["q", 1]]), "merge 1 must be two tokens, got ['q', 1]"),
    ("bpe", of_model(merges=3), "must be two tokens, got 3"),
    ("bpe", of_model(vocab=["a"]), "must be a JSON object of token ids, got a list"),
    ("bpe", of_model(vocab={"a": 1}, merges=[]), "but 0 is missing"),
    ("bpe", added(id=3), "the added token '<|endoftext|>' has the id 3, but 399 in the vocabulary"),
    ("bpe", added(id=-3), "not a readable tokenizer"),
    ("bpe", lambda content: content.update(added_tokens=[{}]), "not a readable tokenizer"),
    ("wordpiece", lambda content: content["post_processor"].update(special_tokens={}), "not a readable tokenizer: no"),
    ("wordpiece", lambda content: content.update(normalizer=PANIC), "not a readable tokenizer: Precompiled"),
    ("wordpiece", part("normalizer", None), "normalizer has type=None; only 'BertNormalizer'"),
    ("wordpiece", part("normalizer", normalizers.BertNormalizer(clean_text=False)), "clean_text=False"),
    ("wordpiece", part("pre_tokenizer", pre_tokenizers.Whitespace()), "pre_tokenizer has type='Whitespace'"),
    ("wordpiece", part("post_processor", processors.BertProcessing(("a", 66), ("b", 67))), "[67, 66] around a text"),
    ("wordpiece", of_model(unk_token="<unk>"), "model has unk_token='<unk>'"),
    ("wordpiece", of_model(max_input_chars_per_word=5), "max_input_chars_per_word=5; only 100"),
    ("wordpiece", of_model(continuing_subword_prefix="@@"), "continuing_subword_prefix='@@'"),
    ("wordpiece", added(normalized=True), "the added token '[MASK]' has normalized=True"),
    ("wordpiece", added(lstrip=True), "the added token '[MASK]' has lstrip=True"),
    ("wordpiece", lambda content: content["model"]["vocab"].update({"a\nb": len(WORDS)}), "a token with a line break"),
])  # fmt: skip
def test_a_tokenizer_json_that_is_not_supported(tmp_path, kind, change, message):
    Tokenizer(MADE[kind]()).save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer.json", change)
    refused(tmp_path, ValueError, str(tmp_path / "tokenizer.json"), message)


@pytest.mark.parametrize("change", [
    part("normalizer", normalizers.NFC()), part("pre_tokenizer", DIGITS),
    part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
    part("pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False)), part("pre_tokenizer", None),
    part("post_processor", ROBERTA), of_model(ignore_merges=True), added(special=False),
])  # fmt: skip
def test_a_bpe_with_other_rules_than_gpt2_s_is_what_its_file_says(tmp_path, change):
    Tokenizer(MADE["bpe"]()).save_pretrained(tmp_path)
    edit(tmp_path / "tokenizer_config.json", lambda content: content.update(tokenizer_class="PreTrainedTokenizerFast"))
    edit(tmp_path / "tokenizer_config.json", lambda content: content.pop("add_prefix_space"))
    edit(tmp_path / "tokenizer.json", change)
    ours, theirs = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert type(ours.model) is JSONTokenizer
    assert ours.encode_batch(TEXTS) == [theirs(text)["input_ids"] for text in TEXTS]


def test_the_settings_of_bert_matter(tmp_path):
    """Or the test above would compare one tokenizer with itself."""
    vocab, text = [*WORDS, "Hello", "É", "é", "酒店很好"], "Hello É é 酒店很好"
    found = []
    for i, options in enumerate(OPTIONS):
        found.append(Tokenizer.from_pretrained(write_vocab(tmp_path / str(i), vocab, **options)).encode(text))
    assert len({tuple(ids) for ids in found}) == len(OPTIONS)


def test_padding_and_truncation_in_a_tokenizer_json_change_nothing(tmp_path):
    """transformers turns them off as well."""
    backend = Backend.from_str(Tokenizer(WORDS).model.backend.to_str())
    backend.enable_padding(length=16)
    backend.enable_truncation(3)
    backend.save(str(tmp_path / "tokenizer.json"))
    same(Tokenizer.from_pretrained(tmp_path), Tokenizer(WORDS))
