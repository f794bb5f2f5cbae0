"""Every field of every JSON file of a model folder: whatever stands there, loading works or says what is wrong."""

import json

import pytest
import torch

from conftest import VOCAB, make_bert, make_gpt2
from minirlhf import ActorCritic, BertClassifier, Tokenizer
from minirlhf.text.tokenizer_models import ByteBPE

MISSING = object()
VALUES = [MISSING, None, True, 0, 3, -1, 2**70, 1.5, "12", ["x"], [3], {}, {"a": 3}, {"0": ["x"]}]
NUMBERS = ["1e400", "NaN", "9" * 5000]  # that JSON can hold and no config may


def fields(content, path=()):
    """The paths of all fields of a JSON object, objects within it too; of lists and vocabularies the first entries."""
    for name in list(content)[: 2 if len(content) > 40 else None]:
        yield (*path, name)
        below = content[name]
        if isinstance(below, dict):
            yield from fields(below, (*path, name))
        elif isinstance(below, list) and below and isinstance(below[0], dict):
            yield from ((*path, name, 0, *rest) for rest in fields(below[0]))


def with_value(content, path, value):
    if not path:
        return value
    copied = list(content) if isinstance(content, list) else dict(content)
    if len(path) == 1 and value is MISSING:
        del copied[path[0]]
    else:
        copied[path[0]] = with_value(copied[path[0]], path[1:], value)
    return copied


def make_gpt2_folder(folder):
    ActorCritic(make_gpt2(n_layer=1)).save_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()  # for other tools: not read beside whole weights
    # Fields that our own folders do not have and others do.
    more = {"n_ctx": 64, "hidden_size": 32, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False, "tie_word_embeddings": True}  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def make_bert_folder(folder):
    make_bert(num_hidden_layers=1).save_pretrained(folder)
    path = folder / "config.json"
    more = {"num_labels": 2, "position_embedding_type": "absolute", "is_decoder": False, "problem_type": None}
    path.write_text(json.dumps({**json.loads(path.read_text()), **more}))


def make_tokenizer_folder(model, left_out=()):
    def make(folder):
        Tokenizer(model).save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        more = {"additional_special_tokens": [], "added_tokens_decoder": {}, "extra_special_tokens": {},
                "model_max_length": 5, "padding_side": "left", "chat_template": "x", "model_input_names": ["x"],
                "split_special_tokens": False}  # fmt: skip
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **more}))
        (folder / "config.json").write_text(json.dumps({"model_type": "bert", "tokenizer_class": "BertTokenizer"}))
        (folder / "added_tokens.json").write_text("{}")
        for name in left_out:
            (folder / name).unlink()

    return make


WORDS = [*VOCAB[: VOCAB.index("[MASK]") + 1], "a", "b"]
SMALL_BPE = [*(chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324)]), "ab"]
SMALL_BPE = ByteBPE([*SMALL_BPE, "<|endoftext|>"], [("a", "b")])
FOLDERS = {
    "gpt2": (make_gpt2_folder, ActorCritic.from_pretrained),
    "bert": (make_bert_folder, BertClassifier.from_pretrained),
    "wordpiece": (make_tokenizer_folder(WORDS), Tokenizer.from_pretrained),
    "bpe": (make_tokenizer_folder(SMALL_BPE), Tokenizer.from_pretrained),
    "vocab.txt": (make_tokenizer_folder(WORDS, ["tokenizer.json"]), Tokenizer.from_pretrained),
    "vocab.json": (make_tokenizer_folder(SMALL_BPE, ["tokenizer.json"]), Tokenizer.from_pretrained),
}


def loads_and_works(load, folder):
    """A model that loads tells tokens apart; a tokenizer encodes and has files to save."""
    loaded = load(folder)
    if isinstance(loaded, Tokenizer):
        assert loaded.decode(loaded.encode("a b")) is not None
        json.dumps(loaded.model.files(), allow_nan=False)
        return
    network = loaded.decoder if isinstance(loaded, ActorCritic) else loaded
    with torch.no_grad():
        states = network.hidden_states(torch.tensor([[5, 6, 7]]))
    assert torch.isfinite(states).all() and not torch.allclose(states[0, 0], states[0, 1])
    json.dumps(dict(network.origin.config), allow_nan=False)


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_field_is_checked(tmp_path, kind):
    make, load = FOLDERS[kind]
    make(tmp_path)
    loads_and_works(load, tmp_path)
    tried = refused = 0
    for path in [path for path in tmp_path.glob("*.json") if path.is_file()]:
        raw = path.read_text(encoding="utf-8")
        content = json.loads(raw)
        for where in fields(content):
            texts = [json.dumps(with_value(content, where, value)) for value in VALUES]
            texts += [json.dumps(with_value(content, where, "@")).replace('"@"', number) for number in NUMBERS]
            for text in texts:
                path.write_text(text, encoding="utf-8")
                tried += 1
                try:
                    loads_and_works(load, tmp_path)
                except (ValueError, FileNotFoundError) as error:
                    refused += 1
                    assert str(tmp_path) in str(error) and len(str(error)) < 8000, (path.name, where, str(error)[:200])
                except Exception as error:
                    raise AssertionError(f"{path.name}, {where}: {text[:300]}") from error
        path.write_text(raw, encoding="utf-8")
    assert tried > 50 and 0.2 < refused / tried < 1
