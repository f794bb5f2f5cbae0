"""Files: writes that are whole or not at all, and errors that name the file."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from conftest import VOCAB, names
from minirlhf import Tokenizer
from minirlhf.io import files
from minirlhf.io.files import read_json, write_json
from minirlhf.io.model_card import ModelCard, Origin
from minirlhf.io.model_folder import (
    cast,
    check_published,
    check_supported,
    check_tensors,
    published_config,
    read_folder,
    read_metadata,
    read_tensors,
    renamed,
    write_folder,
    write_tensors,
)
from minirlhf.io.shards import read_shards

# ---- safetensors ----------------------------------------------------------------------------------------------------

TENSORS = {
    "float": torch.arange(6.0).view(2, 3), "half": torch.tensor([1.5, -2.0]).half(), "bf16": torch.ones(2).bfloat16(),
    "int": torch.tensor([1, 2]), "bool": torch.tensor([True, False]), "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 2),
    "transposed": torch.arange(6.0).view(2, 3).t(), "grad": torch.ones(2, requires_grad=True),
}  # fmt: skip


def test_tensors_round_trip_bit_equal(tmp_path):
    write_tensors(tmp_path / "x.safetensors", TENSORS, {"note": "酒店"})
    loaded = read_tensors(tmp_path / "x.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    assert read_metadata(tmp_path / "x.safetensors") == {"format": "pt", "note": "酒店"}
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:  # what transformers insists on
        assert file.metadata()["format"] == "pt"


def test_equal_content_gives_equal_bytes(tmp_path):
    """safetensors itself writes the metadata in any order."""
    metadata = {f"key {i}": '酒店 "\x1b' for i in range(8)}
    raw = set()
    for i in range(12):
        write_tensors(tmp_path / str(i), dict(reversed(TENSORS.items())) if i % 2 else TENSORS, metadata)
        raw.add((tmp_path / str(i)).read_bytes())
    assert len(raw) == 1
    header = int.from_bytes(next(iter(raw))[:8], "little")
    assert header % 8 == 0 and read_metadata(tmp_path / "0") == {"format": "pt", **metadata}
    assert torch.equal(read_tensors(tmp_path / "0")["float"], TENSORS["float"])


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:4], lambda raw: raw[:50], lambda raw: raw[:-1], lambda raw: raw + b"x",
    lambda raw: b"\xff" * 8 + raw[8:], lambda raw: raw.replace(b"F32", b"F99"), lambda raw: b"<html>" + raw,
    lambda raw: raw.replace(b'"shape":[2,3]', b'"shape":[2,9]'), lambda raw: raw.replace(b"{", b"[", 1),
])  # fmt: skip
def test_a_damaged_safetensors_file_is_named(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    write_tensors(path, {"w": torch.arange(6.0).view(2, 3)})
    damaged = damage(path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    for read in (read_tensors, read_metadata):
        with pytest.raises(ValueError, match=r"model.safetensors is not a readable safetensors file"):
            read(path)


@pytest.mark.parametrize("read", [read_json, read_tensors, read_metadata])
def test_a_missing_file_is_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"gone.file"):
        read(tmp_path / "gone.file")


# ---- folders --------------------------------------------------------------------------------------------------------


def test_missing_parts_of_a_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model folder .*nowhere does not exist"):
        read_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config.json"):
        read_folder(tmp_path)
    write_json(tmp_path / "config.json", {})
    with pytest.raises(FileNotFoundError, match=r"model.safetensors"):
        read_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config.json"):  # a file is no folder
        read_folder(tmp_path / "config.json")


def test_writing_makes_the_folder_and_keeps_what_else_is_there(tmp_path):
    folder = tmp_path / "a" / "b"
    write_folder(folder, {"n": 1}, {"w": torch.ones(2)})
    (folder / "vocab.txt").write_text("kept")
    write_folder(str(folder), {"n": 2}, {"w": torch.zeros(2)})
    assert names(folder) == ["config.json", "model.safetensors", "vocab.txt"]
    config, tensors = read_folder(str(folder))
    assert config == {"n": 2} and torch.equal(tensors["w"], torch.zeros(2))


def test_whole_weights_go_before_an_index(tmp_path):
    """As in transformers."""
    write_json(tmp_path / "config.json", {})
    save_file({"a": torch.zeros(2)}, tmp_path / "model-00001-of-00001.safetensors")
    shards = {"a": "model-00001-of-00001.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": shards})
    assert read_folder(tmp_path)[1].keys() == {"a"}
    write_tensors(tmp_path / "model.safetensors", {"c": torch.ones(1)})
    assert read_folder(tmp_path)[1].keys() == {"c"}


def test_a_save_leaves_no_shards_of_an_older_model(tmp_path):
    """Other tools would read them as part of the new one, or in its place."""
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({"old": torch.ones(1)}, tmp_path / name)
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"old": "model-00001-of-00002.safetensors"}})
    (tmp_path / "model-card.txt").write_text("kept")
    write_folder(tmp_path, {}, {"w": torch.ones(2)})
    assert names(tmp_path) == ["config.json", "model-card.txt", "model.safetensors"]


def test_an_index_sets_the_model_apart_from_other_tensors(tmp_path):
    """vLLM and SGLang load all safetensors files of a folder, or those that the index names."""
    model = {"b": torch.ones(2), "a": torch.ones(3, dtype=torch.float16)}
    write_folder(tmp_path, {}, model, beside={"head.safetensors": ({"h": torch.zeros(1)}, {"kind": "x"})})
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 14}, "weight_map": dict.fromkeys("ab", "model.safetensors")}
    assert read_tensors(tmp_path / "head.safetensors")["h"].tolist() == [0]
    assert read_metadata(tmp_path / "head.safetensors") == {"format": "pt", "kind": "x"}
    write_folder(tmp_path, {}, {"c": torch.ones(1)})  # the head is still there, so the index is written anew
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].keys() == {"c"}
    (tmp_path / "head.safetensors").unlink()
    write_folder(tmp_path, {}, model)
    assert "model.safetensors.index.json" not in names(tmp_path)


@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_whichever_write_fails_the_folder_is_as_it_was(tmp_path, monkeypatch, function):
    """Model, head, index, config and card: old ones all of them, until the folders change places."""
    folder, original, calls = tmp_path / "model", getattr(files.os, function), []

    def save(run: int) -> None:
        head = {"head.safetensors": ({"h": torch.tensor([run])}, {"kind": str(run)})}
        write_folder(folder, {"n": run}, {f"w{run}": torch.ones(2)}, ModelCard("GPT2", None, {"n": run}), head)

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    def failing(at: int):
        def watched(*args):
            calls.append(content())
            if len(calls) == at:
                raise KeyboardInterrupt
            return original(*args)

        return watched

    save(1)
    old = content()
    with monkeypatch.context() as patch:
        for at in range(1, 6):
            calls.clear()
            patch.setattr(files.os, function, failing(at))
            with pytest.raises(KeyboardInterrupt):
                save(2)
            assert content() == old and names(tmp_path) == ["model"]
            assert calls == [old] * at
        patch.setattr(files.os, function, failing(0))
        save(2)
    new = content()
    assert len(old) == 5 and all(new[name] != old[name] for name in old)
    assert all(seen in (old, new) for seen in calls)  # never a mixture


def test_what_a_loaded_config_said_besides_is_kept():
    origin = Origin("x", {"eos_token_id": 3, "n": 1, "tokenizer_class": "BertTokenizer", "dtype": "float16",
                          "transformers_version": "4.1", "_name_or_path": "/home/me", "auto_map": {"A": "code.py"},
                          })  # fmt: skip
    assert published_config({"n": 2, "torch_dtype": "float32"}, origin) == {
        "n": 2, "torch_dtype": "float32", "eos_token_id": 3, "tokenizer_class": "BertTokenizer",
    }  # fmt: skip
    assert published_config({"n": 2}, None) == {"n": 2}


def test_names_become_the_own_ones():
    tensors = {"x.LayerNorm.gamma": 1, "x.LayerNorm.beta": 2, "x.dense.weight": 3, "mask": 4, "x.gamma_rays": 5}
    own = renamed(tensors, lambda name: None if name == "mask" else name.removeprefix("x."), "here")
    assert own == {"LayerNorm.weight": 1, "LayerNorm.bias": 2, "dense.weight": 3, "gamma_rays": 5}


def test_a_published_config_of_another_kind_is_refused():
    fixed = {"a": (True,), "b": (None, "one")}
    for content in ({}, {"a": True, "b": "one", "model_type": "gpt2"}, {"b": None}):
        check_published(content, "here", "gpt2", fixed)
    for content, message in (({"a": False}, "a=False; only True"), ({"b": "two"}, "b='two'; only None or 'one'"),
                             ({"model_type": "bert"}, "'bert' model, expected 'gpt2'")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            check_published(content, "here", "gpt2", fixed)


@pytest.mark.parametrize(("tensor", "problem"), [
    (torch.ones(2, 3, dtype=torch.int8), "has dtype torch.int8, expected one of torch.float16, .*torch.float64"),
    (torch.ones(2, 3, dtype=torch.bool), "has dtype torch.bool"),
    (torch.ones(2, 3, dtype=torch.complex64), "has dtype torch.complex64"),
    (torch.ones(2, 3).to(torch.float8_e4m3fn), "has dtype torch.float8_e4m3fn"),
    (torch.full((2, 3), torch.nan), "holds NaN or infinite values"),
    (torch.full((2, 3), torch.inf).half(), "holds NaN or infinite values"),
    (torch.full((2, 3), 1e39, dtype=torch.float64), "holds NaN or infinite values"),  # in fp32, as it is loaded
    (torch.ones(3, 2), r"has shape \(3, 2\), the config asks for \(2, 3\) \(it is transposed\)$"),
    (torch.ones(2, 4), r"has shape \(2, 4\), the config asks for \(2, 3\)$"),
    (torch.ones(6), r"has shape \(6,\), the config asks for \(2, 3\)$"),
])  # fmt: skip
def test_a_tensor_that_does_not_fit_is_described(tensor, problem):
    with pytest.raises(ValueError, match=f"do not fit the model: w {problem}"):
        check_tensors({"w": tensor}, {"w": torch.Size([2, 3])}, "here")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e6])
def test_weights_that_a_type_cannot_hold_are_not_stored(value):
    with pytest.raises(ValueError, match=r"w holds values that torch.float16 cannot hold: up to"):
        cast({"w": torch.tensor([1.0, value])}, torch.float16)


def test_check_tensors_passes_what_fits_and_lists_what_does_not():
    expected = {"a": torch.Size([2]), "b": torch.Size([2])}
    check_tensors({"a": torch.ones(2), "b": torch.ones(2).half()}, expected, "here")
    with pytest.raises(ValueError, match="in here do not fit") as caught:
        check_tensors({"a": torch.tensor([1.0, torch.inf]), "c": torch.ones(1)}, expected, "here")
    assert all(part in str(caught.value) for part in ("missing b (2,)", "unexpected c (1,)", "a holds NaN or infinite"))


def test_names_of_strangers_cannot_steer_the_terminal_that_shows_the_error(tmp_path):
    """Python prints the message of an error as it is."""
    evil = "evil\x1b[31m\n"
    save_file({evil: torch.ones(1)}, tmp_path / "a.safetensors")
    write_json(tmp_path / "1.json", {"weight_map": {evil: "../a"}})
    write_json(tmp_path / "2.json", {"weight_map": {evil + "2": "a.safetensors"}})
    config = {"quantization_config": {"quant_method": "\x1b[31m"}}
    for attempt in (
        lambda: check_tensors({evil: torch.ones(1)}, {}, "folder"),
        lambda: renamed({f"{evil}.beta": torch.ones(1), f"{evil}.bias": torch.ones(1)}, str, "folder"),
        lambda: read_shards(tmp_path / "1.json", read_tensors),
        lambda: read_shards(tmp_path / "2.json", read_tensors),
        lambda: check_supported(config, "folder"),
        lambda: Tokenizer([*VOCAB, "\x1b[31m", "\x1b[31m"]),
    ):
        with pytest.raises(ValueError) as caught:
            attempt()
        assert str(caught.value).isprintable(), caught.value


def test_a_list_of_problems_shows_what_is_missing_and_what_is_there_instead():
    """As of a folder whose names all have a prefix that is not known."""
    stored, expected = {f"actor.{i}": torch.ones(1) for i in range(40)}, {str(i): (1,) for i in range(40)}
    with pytest.raises(ValueError, match=r"missing 0 .*unexpected actor\.0 .*; and 60 more"):
        check_tensors(stored, expected, "folder")
