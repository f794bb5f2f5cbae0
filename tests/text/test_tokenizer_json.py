"""Tokenizers like those of Llama, Qwen, SmolLM2, MiniMind and Mistral, against transformers on the same folder."""

import json
from pathlib import Path

import pytest
import tokenizers
from bpe import CORPUS
from hypothesis import given, settings
from hypothesis import strategies as st
from test_byte_bpe import TEXTS
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from minirlhf import Tokenizer
from minirlhf.text.tokenizer_json import JSONTokenizer

# The patterns by which the published tokenizers split a text.
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIAL = [*CHAT, "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<s>", "</s>", "<unk>", "<think>"]
ALL_TEXTS = [*TEXTS, "", *SPECIAL, *(f"a{token}b {token} c\n{token}" for token in SPECIAL), "12345 1 22 333", "A\u030a",
             "I'VE I'll", "▁x ▁▁y", "<0x41>", "  two\r\n\r\nlines ", "\u2581"]  # fmt: skip


def byte_level(pattern: str | None = None, **options) -> pre_tokenizers.PreTokenizer:
    if pattern is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated", invert=False)
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_byte_level(before, special, **model) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(**model))
    backend.pre_tokenizer, backend.decoder = before, decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    )
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def qwen() -> tuple[tokenizers.Tokenizer, dict, dict, str]:
    backend = train_byte_level(byte_level(QWEN), CHAT)
    backend.normalizer = normalizers.NFC()
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
              "bos_token": None, "add_bos_token": False, "errors": "replace", "unk_token": None,
              "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}  # fmt: skip
    return backend, config, {"eos_token_id": ["<|im_end|>", "<|endoftext|>"], "temperature": 0.7}, "qwen2"


def llama3() -> tuple[tokenizers.Tokenizer, dict, dict, str]:
    special = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    backend = train_byte_level(byte_level(LLAMA3), special, ignore_merges=True)
    begin = (special[0], backend.token_to_id(special[0]))
    backend.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(single="<|begin_of_text|> $A", pair=None, special_tokens=[begin]),
    ])  # fmt: skip
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[2],
              "clean_up_tokenization_spaces": True}  # fmt: skip
    return backend, config, {"eos_token_id": [special[1], special[2]]}, "llama"


def smollm() -> tuple[tokenizers.Tokenizer, dict, dict, str]:
    digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": CHAT[1], "eos_token": CHAT[2],
              "pad_token": CHAT[2], "unk_token": CHAT[0]}  # fmt: skip
    return train_byte_level(digits, CHAT), config, {"eos_token_id": CHAT[2]}, "llama"


def minimind() -> tuple[tokenizers.Tokenizer, dict, dict, str]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": CHAT[1], "eos_token": CHAT[2],
              "pad_token": CHAT[0], "unk_token": CHAT[0], "add_bos_token": False, "add_eos_token": False,
              "added_tokens_decoder": {}}  # fmt: skip
    return train_byte_level(byte_level(), CHAT), config, {}, "qwen3"


def bytes_as_a_fallback(metaspace: bool) -> tokenizers.Tokenizer:
    special = ("<unk>", "<s>", "</s>")
    learner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    learner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=pieces, show_progress=False, limit_alphabet=70)
    learner.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    model = json.loads(learner.to_str())["model"]
    backend = tokenizers.Tokenizer(models.BPE(
        model["vocab"], [tuple(pair) for pair in model["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True,
    ))  # fmt: skip
    if metaspace:
        backend.pre_tokenizer = learner.pre_tokenizer
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", pair=None, special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return backend


def llama2() -> tuple[tokenizers.Tokenizer, dict, dict, str]:
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
              "add_bos_token": True, "add_eos_token": False, "legacy": False}  # fmt: skip
    return bytes_as_a_fallback(metaspace=True), config, {"eos_token_id": "</s>"}, "llama"


def mistral() -> tuple[tokenizers.Tokenizer, dict, dict, str]:
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
              "unk_token": "<unk>"}  # fmt: skip
    return bytes_as_a_fallback(metaspace=False), config, {}, "mistral"


def with_both_flags() -> tuple[tokenizers.Tokenizer, dict, dict, str]:
    backend, config, generation, kind = llama3()
    return backend, {**config, "add_bos_token": True, "add_eos_token": True}, generation, kind


KINDS = [qwen, llama3, smollm, minimind, llama2, mistral, with_both_flags]


def write(folder: Path, kind) -> Path:
    backend, config, generation, model_type = kind()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": 0}))
    if generation:
        ends = generation["eos_token_id"]
        ids = [backend.token_to_id(end) for end in ends] if isinstance(ends, list) else backend.token_to_id(ends)
        (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": ids}))
    return folder


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def folder(request, tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp(request.param.__name__), request.param)


@pytest.fixture(scope="module")
def pair(folder):
    return Tokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_ids_and_decoded_texts_equal_transformers(pair):
    ours, theirs = pair
    assert isinstance(ours.model, JSONTokenizer) and len(ours) == len(theirs)
    marked = {i for i, token in theirs.added_tokens_decoder.items() if token.special}
    assert ours.special_ids == marked >= set(theirs.all_special_ids)
    assert ours.eos_id == theirs.eos_token_id and ours.pad_id == (theirs.pad_token_id or theirs.eos_token_id)
    for text in ALL_TEXTS:
        ids = theirs(text)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.encode_batch(ALL_TEXTS) == [ours.encode(text) for text in ALL_TEXTS]
    assert len(ours.encode("the hotel is good")) <= 9  # it merges


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 339), max_size=16))
def test_any_ids_are_decoded_as_by_transformers_and_piece_by_piece(pair, ids):
    ours, theirs = pair
    expected = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert ours.decode(ids) == expected
    pieces = ours.decode_pieces(ids)
    assert len(pieces) == len(ids) and "".join(pieces) == expected


def test_prompts_and_documents(pair):
    """A prompt begins as a text does, without its end; a document has one end in any case."""
    ours, theirs = pair
    ids = theirs("hello world", add_special_tokens=False)["input_ids"]
    begin = [theirs.bos_token_id] if theirs("hello")["input_ids"][0] == theirs.bos_token_id else []
    assert ours.encode_prompt("hello world") == [*begin, *ids]
    assert ours.encode_documents(["hello world"]) == [[*begin, *ids, ours.eos_id]]
    assert (
        ours.encode("hello world", len(begin) + 2 + len(ours.model.closing))[: len(begin) + 2]
        == [*begin, *ids][: len(begin) + 2]
    )


def test_saving_and_loading_changes_nothing(folder, pair, tmp_path):
    ours, theirs = pair
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    ours.save_pretrained(tmp_path)
    again, read = Tokenizer.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in ALL_TEXTS:
        assert ours.encode(text) == again.encode(text) == read(text)["input_ids"]
    assert (again.eos_ids, again.pad_id, again.vocab) == (ours.eos_ids, ours.pad_id, ours.vocab)
    assert again.special_ids == ours.special_ids
    assert read.eos_token == theirs.eos_token and read.bos_token == theirs.bos_token
    assert again.model.files() == ours.model.files()
    if (folder / "generation_config.json").exists():
        name = "generation_config.json"
        assert json.loads((tmp_path / name).read_text()) == json.loads((folder / name).read_text())


def test_widths_are_characters(pair):
    ours, _ = pair
    for text in ("hello world", "酒店很好 😀", "naïve café"):
        visible = sum(not char.isspace() for char in text)
        assert sum(ours.width(i) for i in ours.encode(text) if i not in ours.special_ids) == visible


# ---- ids of the end and of padding ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "ends", "pad"), [
    (qwen, ["<|im_end|>", "<|endoftext|>"], "<|endoftext|>"), (smollm, ["<|im_end|>"], "<|im_end|>"),
    (llama3, ["<|eot_id|>", "<|end_of_text|>"], "<|eot_id|>"), (minimind, ["<|im_end|>"], "<|endoftext|>"),
])  # fmt: skip
def test_ends_come_from_tokenizer_config_and_generation_config(tmp_path, kind, ends, pad):
    tokenizer = Tokenizer.from_pretrained(write(tmp_path, kind))
    assert [tokenizer.vocab[i] for i in tokenizer.eos_ids] == ends and tokenizer.vocab[tokenizer.pad_id] == pad


def test_ends_that_only_the_configs_name(tmp_path):
    backend = write(tmp_path, qwen) and tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    end, pad = (backend.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    (tmp_path / "tokenizer_config.json").unlink()
    content = {"eos_token_id": [end, pad, 10**6], "pad_token_id": pad}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.eos_ids == (end, pad) and tokenizer.pad_id == pad
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": pad}))
    assert Tokenizer.from_pretrained(tmp_path).eos_ids == (pad,)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer.json: no eos_token is named: add it to tokenizer_config.json"):
        Tokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize(("name", "content", "message"), [
    ("generation_config.json", {"eos_token_id": "x"}, r"generation_config.json: eos_token_id must be an id or a list"),
    ("generation_config.json", {"eos_token_id": [1, -1]}, r"eos_token_id must be .* ids, got \[1, -1\]"),
    ("tokenizer_config.json", {"eos_token": "<end>"}, r"lacks the special tokens <end>"),
    ("tokenizer_config.json", {"eos_token": "<|im_end|>", "split_special_tokens": True}, r"split_special_tokens=True"),
    ("tokenizer_config.json", {"eos_token": "<|im_end|>", "add_prefix_space": True}, r"add_prefix_space=True, which"),
    ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, r"tokenizer_class='BertTokenizer', but this is a"),
])  # fmt: skip
def test_settings_that_are_not_supported(tmp_path, name, content, message):
    write(tmp_path, qwen)
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer.from_pretrained(tmp_path)
