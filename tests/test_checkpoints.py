"""Files: writes that are whole or not at all, and errors that name the file."""

import json
import os
import stat

import pytest
import torch
from safetensors import safe_open

from minirlhf import checkpoints
from minirlhf.checkpoints import (
    atomic_write,
    check_tensors,
    read_folder,
    read_json,
    read_metadata,
    read_tensors,
    write_folder,
    write_json,
    write_tensors,
)


def names(folder) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


# ---- atomic writes --------------------------------------------------------------------------------------------------


def test_write_replaces_the_content(tmp_path):
    path = tmp_path / "file"
    for content in (b"a longer first content", b"second", b""):
        atomic_write(path, content)
        assert path.read_bytes() == content
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("function", ["replace", "fsync", "chmod"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, function, error):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, function, fail)
        with pytest.raises(type(error)):
            atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file"]


def test_the_target_never_holds_a_part(tmp_path, monkeypatch):
    """Everything is on the disk before the rename, which is the last thing that happens."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    calls, fsync, replace = [], os.fsync, os.replace

    def recording_fsync(descriptor):
        fsync(descriptor)
        calls.append(("fsync", os.fstat(descriptor).st_size, path.read_bytes()))

    def recording_replace(source, target):
        calls.append(("replace", os.stat(source).st_size, path.read_bytes()))
        assert os.path.dirname(source) == str(tmp_path)  # a rename within one file system
        replace(source, target)

    monkeypatch.setattr(checkpoints.os, "fsync", recording_fsync)
    monkeypatch.setattr(checkpoints.os, "replace", recording_replace)
    atomic_write(path, b"12345")
    assert calls[:2] == [("fsync", 5, b"old"), ("replace", 5, b"old")]
    assert path.read_bytes() == b"12345"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_file_mode_respects_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        atomic_write(tmp_path / "file", b"x")
        assert os.umask(umask) == umask  # and leaves it as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_folder_that_does_not_exist_is_an_os_error(tmp_path):
    with pytest.raises(OSError):
        atomic_write(tmp_path / "nowhere" / "file", b"x")


def test_a_failed_save_keeps_the_old_model(tmp_path, monkeypatch):
    write_folder(tmp_path, {"n": 1}, {"w": torch.ones(2)})

    def fail(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            write_folder(tmp_path, {"n": 2}, {"w": torch.zeros(2)})
    config, tensors = read_folder(tmp_path)
    assert config == {"n": 1} and torch.equal(tensors["w"], torch.ones(2))
    assert names(tmp_path) == ["config.json", "model.safetensors"]


# ---- JSON -----------------------------------------------------------------------------------------------------------


def test_json_round_trip_in_readable_utf8(tmp_path):
    content = {"z": "酒店", "a": [1, 2.5, None, True], "nested": {"0": "x"}}
    write_json(tmp_path / "x.json", content)
    assert read_json(tmp_path / "x.json") == content
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert "酒店" in text and text.endswith("}\n")
    assert list(json.loads(text)) == ["z", "a", "nested"]


@pytest.mark.parametrize("content", [
    b"", b"{", b'{"a": 1,}', b"{'a': 1}", b'{"a": 1} x', b"\xff\xfe{}", b'{"a": "\xc0"}', b"[" * 100_000,
])  # fmt: skip
def test_invalid_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize(("content", "kind"), [("[1]", "list"), ("null", "NoneType"), ('"a"', "str"), ("3", "int")])
def test_json_that_is_no_object_is_named(tmp_path, content, kind):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"config.json must hold a JSON object, but holds a {kind}"):
        read_json(tmp_path / "config.json")


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


@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:4], lambda raw: raw[:50], lambda raw: raw[:-1], lambda raw: raw + b"x",
    lambda raw: b"\xff" * 8 + raw[8:], lambda raw: raw.replace(b"F32", b"F99"), lambda raw: b"<html>" + raw,
    lambda raw: raw.replace(b'"shape":[2,3]', b'"shape":[2,9]'), lambda raw: raw.replace(b"{", b"[", 1),
    lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n",
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


def test_a_file_in_the_way_of_a_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        write_folder(tmp_path / "file", {}, {})


def test_check_tensors_passes_what_fits_and_lists_what_does_not():
    expected = {"a": torch.Size([2]), "b": torch.Size([2])}
    check_tensors({"a": torch.ones(2), "b": torch.ones(2).half()}, expected, "here")
    with pytest.raises(ValueError, match="in here do not fit") as caught:
        check_tensors({"a": torch.tensor([1.0, torch.inf]), "c": torch.ones(1)}, expected, "here")
    assert all(part in str(caught.value) for part in ("missing b (2,)", "unexpected c (1,)", "a holds NaN or infinite"))


def test_a_long_list_of_problems_is_cut():
    with pytest.raises(ValueError, match=r"missing t19 .*and 30 more$") as caught:
        check_tensors({}, {f"t{i}": torch.Size([1]) for i in range(50)}, "here")
    assert "t20" not in str(caught.value)
