"""Pickles become safetensors once: the same tensors, tied ones once, and nothing that the pickle says is run."""

import errno
import hashlib
import json
import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.torch_version import TorchVersion

from conftest import names
from minirlhf.io import conversion
from minirlhf.io.conversion import untied
from minirlhf.io.model_folder import convert, read_weights

LEGACY = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])


def state_dict() -> dict[str, torch.Tensor]:
    """Tensors as UER's conversion script leaves them: transposed views, a slice of a larger one, a tied head."""
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(5, 4, generator=generator)
    segments = torch.randn(3, 4, generator=generator)
    return {
        "lm_head.weight": embedding,
        "transformer.wte.weight": embedding,
        "transformer.h.0.attn.c_attn.weight": torch.randn(12, 4, generator=generator).t(),
        "bert.embeddings.token_type_embeddings.weight": segments[1:, :],
        "all_segments": segments,
        "half": torch.ones(3).half(),
        "mask": torch.ones(2, 2).tril().bool(),
        "step": torch.tensor(7),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }


def metadata(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return file.metadata()


@LEGACY
def test_a_pickle_is_converted_to_the_same_tensors(tmp_path, zipped):
    expected = state_dict()
    torch.save(expected, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    assert convert(tmp_path) == tmp_path / "model.safetensors"
    assert names(tmp_path) == ["model.safetensors", "pytorch_model.bin"]
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == expected.keys() - {"lm_head.weight"}
    for name, tensor in stored.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name])
    content = metadata(tmp_path / "model.safetensors")
    raw = (tmp_path / "pytorch_model.bin").read_bytes()
    (source,) = json.loads(content.pop("sources")).items()
    assert source[0] == "pytorch_model.bin" and source[1].pop("times")
    assert source[1] == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert content == {
        "format": "pt", "converted_from": "pytorch_model.bin", "lm_head.weight": "transformer.wte.weight",
    }  # fmt: skip


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json"])
def test_existing_safetensors_are_left_alone(tmp_path, name):
    (tmp_path / name).write_bytes(b"as it is")
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert convert(str(tmp_path)) == tmp_path / name
    assert names(tmp_path) == sorted([name, "pytorch_model.bin"]) and (tmp_path / name).read_bytes() == b"as it is"


# ---- a pickle that changes after it was converted -------------------------------------------------------------------


def later(path):
    """Another content in the place of a file, of the same size."""
    torch.save({"a": torch.full((2,), 2.0)}, path)


def later_as_if_it_were_old(path):
    """As `cp -p` or rsync leave it: size and time are those of the old file."""
    old = path.stat()
    later(path)
    assert path.stat().st_size == old.st_size
    os.utime(path, ns=(old.st_atime_ns, old.st_mtime_ns))


def later_by_a_rename(path):
    later(path.with_name("new"))
    path.with_name("new").replace(path)


CHANGES = pytest.mark.parametrize("change", [later, later_as_if_it_were_old, later_by_a_rename])


@CHANGES
def test_a_newer_pickle_is_converted_anew(tmp_path, change):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.full((2,), 1.0)}, path)
    assert read_weights(tmp_path)["a"].tolist() == [1, 1]
    change(path)
    assert read_weights(tmp_path)["a"].tolist() == [2, 2]
    before = convert(tmp_path).stat()
    assert load_file(convert(tmp_path))["a"].tolist() == [2, 2] and convert(tmp_path).stat() == before


@CHANGES
def test_a_newer_shard_of_a_pickle_is_converted_anew(tmp_path, change):
    for name in "ab":
        torch.save({name: torch.full((2,), 1.0)}, tmp_path / f"{name}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text('{"weight_map": {"a": "a.bin", "b": "b.bin"}}')
    convert(tmp_path)
    change(tmp_path / "a.bin")
    assert {name: t.tolist() for name, t in read_weights(tmp_path).items()} == {"a": [2, 2], "b": [1, 1]}


def test_a_copied_folder_is_not_converted_again(tmp_path):
    """Its times are new, but the hash is the recorded one."""
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    convert(tmp_path)
    shutil.copytree(tmp_path, tmp_path / "copy", copy_function=shutil.copyfile)
    before = (tmp_path / "copy" / "model.safetensors").stat()
    assert convert(tmp_path / "copy").stat() == before


@pytest.mark.parametrize("sources", [None, "", "{", "[]", "{}", '{"pytorch_model.bin": 3}', "[" * 10**5])
def test_a_conversion_that_does_not_say_of_what_is_made_anew(tmp_path, sources):
    """Those of older versions do not."""
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    recorded = {} if sources is None else {"sources": sources}
    save_file(
        {"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"converted_from": "pytorch_model.bin", **recorded}
    )
    assert read_weights(tmp_path)["a"].tolist() == [1, 1]


def test_weights_that_were_saved_beside_a_pickle_are_no_conversion_of_it(tmp_path):
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "pt"})
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert read_weights(tmp_path)["a"].tolist() == [0, 0]


SHARDED_PICKLE = "pytorch_model.bin.index.json"


def write_shards(folder, index, files):
    """Shards of one tensor each, and their index; files: name of tensor and shard -> value."""
    for name, value in files.items():
        content, path = {name: torch.full((2,), value)}, folder / f"{name}.shard"
        torch.save(content, path) if index == SHARDED_PICKLE else save_file(content, path)
    (folder / index).write_text(json.dumps({"weight_map": {name: f"{name}.shard" for name in files}}))


@pytest.mark.parametrize("deleted", [True, False])
def test_shards_that_came_after_a_conversion_are_read(tmp_path, deleted):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    convert(tmp_path)
    if deleted:
        (tmp_path / "pytorch_model.bin").unlink()
    write_shards(tmp_path, "model.safetensors.index.json", {"a": 2.0, "b": 3.0})
    assert convert(tmp_path) == tmp_path / "model.safetensors.index.json"
    assert {name: t.tolist() for name, t in read_weights(tmp_path).items()} == {"a": [2, 2], "b": [3, 3]}
    (tmp_path / "b.shard").unlink()
    with pytest.raises(FileNotFoundError, match=r"index.json names files that do not exist: b.shard"):
        read_weights(tmp_path)


@pytest.mark.parametrize("replaced", [True, False])
def test_a_missing_shard_of_a_pickle_is_an_error_and_not_the_old_conversion(tmp_path, replaced):
    write_shards(tmp_path, SHARDED_PICKLE, {"a": 1.0, "b": 1.0})
    convert(tmp_path)
    if replaced:
        write_shards(tmp_path, SHARDED_PICKLE, {"a": 2.0, "c": 2.0})
    lost = "c.shard" if replaced else "b.shard"
    (tmp_path / lost).rename(tmp_path / "elsewhere")
    for read in (read_weights, convert):
        with pytest.raises(FileNotFoundError, match=rf"{lost} does not exist.* or remove {SHARDED_PICKLE} to load mod"):
            read(tmp_path)
    (tmp_path / "elsewhere").rename(tmp_path / lost)
    expected = {"a": [2, 2], "c": [2, 2]} if replaced else {"a": [1, 1], "b": [1, 1]}
    assert {name: t.tolist() for name, t in read_weights(tmp_path).items()} == expected


@pytest.mark.parametrize("name", ["pytorch_model.bin", SHARDED_PICKLE, "model.safetensors.index.json"])
def test_a_broken_link_is_an_error_and_not_the_old_conversion(tmp_path, name):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    convert(tmp_path)
    (tmp_path / "pytorch_model.bin").unlink()
    (tmp_path / name).symlink_to("newer")
    with pytest.raises(FileNotFoundError, match=rf"{name} does not exist, or is not a file"):
        read_weights(tmp_path)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_conversion_whose_pickle_was_deleted_is_read(tmp_path, sharded):
    if sharded:
        write_shards(tmp_path, SHARDED_PICKLE, {"a": 1.0, "b": 1.0})
    else:
        torch.save({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    converted = convert(tmp_path)
    for path in set(tmp_path.iterdir()) - {converted}:
        path.unlink()
    assert {name: t.tolist() for name, t in read_weights(tmp_path).items()} == {"a": [1, 1], "b": [1, 1]}


def test_a_folder_that_cannot_be_written_is_read_in_memory_with_a_note(tmp_path, monkeypatch):
    """A read-only disk, a full one, a folder of somebody else: reading needs no right to write."""
    expected = state_dict()
    torch.save(expected, tmp_path / "pytorch_model.bin")

    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr("minirlhf.io.files.tempfile.mkstemp", refuse)
        for _ in range(2):
            with pytest.warns(
                UserWarning, match="cannot be written .Read-only file system., so pytorch_model.bin"
            ) as said:
                in_memory = read_weights(tmp_path)
            assert len(said) == 1
        with pytest.raises(OSError):
            convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]
    converted = read_weights(tmp_path)
    assert in_memory.keys() == converted.keys()
    assert all(torch.equal(in_memory[name], converted[name]) for name in converted)


def test_a_conversion_replaces_a_link_and_is_not_written_through_it(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    victim = tmp_path / "victim"
    save_file({"a": torch.zeros(2)}, victim, {"converted_from": "pytorch_model.bin"})
    before = victim.read_bytes()
    (tmp_path / "model.safetensors").symlink_to(victim)
    assert not convert(tmp_path).is_symlink() and victim.read_bytes() == before


# ---- other inputs ---------------------------------------------------------------------------------------------------


def test_tensors_of_one_storage_part():
    """Whatever views a storage has, what is stored is contiguous, and safetensors accepts it."""
    base = torch.arange(12.0)
    views = {"whole": base, "again": base, "square": base.view(3, 4), "transposed": base.view(3, 4).t(),
             "head": base[:3], "tail": base[9:], "int": base.view(torch.int32), "empty": base[:0], "nothing": base[:0],
             }  # fmt: skip
    stored, aliases = untied(views)
    assert aliases == {"again": "whole"}
    assert stored.keys() == views.keys() - {"again"}
    for name, tensor in stored.items():
        assert tensor.is_contiguous() and torch.equal(tensor, views[name])
    addresses = [t.untyped_storage().data_ptr() for t in stored.values() if t.numel()]
    assert len(set(addresses)) == len(addresses)


# ---- what is refused ------------------------------------------------------------------------------------------------


class Command:
    """A pickle of this runs a shell command when it is loaded without care."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("kind", ["zip", "legacy", "protocol 2", "protocol 4", "shard"])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, kind):
    proof, folder = tmp_path / "proof", tmp_path / "model"
    folder.mkdir()
    path = folder / ("pytorch_model-00001-of-00001.bin" if kind == "shard" else "pytorch_model.bin")
    content = {"wte.weight": torch.ones(2), "bias": Command(proof)}
    if kind.startswith("protocol"):
        path.write_bytes(pickle.dumps(Command(proof), protocol=int(kind[-1])))
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=kind != "legacy")
        torch.load(path, weights_only=False)
    assert proof.exists()  # the attack works on whoever loads it carelessly
    proof.unlink()
    if kind == "shard":
        weight_map = {"weight_map": dict.fromkeys(content, path.name)}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps(weight_map))
    before = names(folder)
    why = "is not a readable file of tensors" if kind == "protocol 4" else "is refused: it asks to load posix.system"
    with pytest.raises(ValueError, match=f"{path.name} {why}") as caught:
        convert(folder)
    assert not proof.exists() and names(folder) == before
    assert "weights_only" not in str(caught.value) and caught.value.__cause__ is None  # no advice to switch it off


@pytest.mark.parametrize(("content", "message"), [
    ({"model": {"a": torch.ones(2)}, "epoch": 3}, "plain tensors by name, but 'model' is a dict"),
    ({"a": torch.ones(2), "epoch": 3}, "'epoch' is a int"), ([torch.ones(2)], "tensors by name, but holds a list"),
    ({3: torch.ones(2)}, "but 3 is a"), ({"a": torch.ones(2).to_sparse()}, "'a' is a torch.sparse_coo tensor"),
    ({"a": torch.empty(2, device="meta")}, "'a' is a"), (torch.ones(2), "holds a Tensor"),
    ({"a": torch.zeros(1).expand(10**13)}, "'a' is a"),  # 40 TB, were it made contiguous
    ({"a": torch.ones(2, dtype=torch.complex64).conj().imag}, "'a' is a"),  # its memory has the other sign
], ids=str)  # fmt: skip
def test_a_pickle_of_anything_but_plain_tensors_by_name_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=rf"pytorch_model.bin must hold .*{message}"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize("name", ["\udc80", "__metadata__"])
def test_a_name_that_safetensors_cannot_hold_is_refused(tmp_path, name):
    torch.save({name: torch.ones(2)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model.bin names a tensor '.*', which safetensors cannot"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


def test_an_archive_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    """Deflated zeros grow a thousandfold; `torch.load` would unpack them."""
    path, bomb = tmp_path / "pytorch_model.bin", tmp_path / "bomb"
    torch.save({"a": torch.zeros(2**20)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    assert torch.load(bomb, weights_only=True)["a"].numel() == 2**20 and bomb.stat().st_size < 10_000
    bomb.replace(path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin is refused: .* would unpack to 419\d{4} bytes"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


@LEGACY
def test_views_that_would_grow_beyond_all_measure_are_refused(tmp_path, zipped):
    """Each of them is a tensor of its own once it is converted."""
    base = torch.zeros(2**16)
    for count, refused in ((8, False), (200, True)):
        views = {f"t{i}": base[i:] for i in range(count)}
        torch.save(views, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        if refused:
            with pytest.raises(ValueError, match=r"pytorch_model.bin is refused: its 200 tensors share memory and"):
                convert(tmp_path)
            assert names(tmp_path) == ["pytorch_model.bin"]
        else:
            convert(tmp_path).unlink()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@LEGACY
@pytest.mark.parametrize("damage", [
    lambda raw: b"", lambda raw: raw[:10], lambda raw: raw[: len(raw) // 2], lambda raw: raw[:-1],
    lambda raw: b"<html>" + raw,
])  # fmt: skip
def test_a_damaged_pickle_is_named(tmp_path, damage, zipped):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(20)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"pytorch_model.bin is (not a readable file of tensors: \w+|refused)"):
        convert(tmp_path)
    assert names(tmp_path) == ["pytorch_model.bin"]


@pytest.mark.parametrize("version", ["2.4.0", "2.5.1+cu121"])
def test_an_old_torch_does_not_read_pickles(tmp_path, monkeypatch, version):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    monkeypatch.setattr(conversion.torch, "__version__", TorchVersion(version))
    with pytest.raises(RuntimeError, match=rf"pytorch_model.bin is a pickle.*2\.6 on, not {version[:5]}"):
        convert(tmp_path)
    monkeypatch.setattr(conversion.torch, "__version__", TorchVersion("2.10.0"))
    assert convert(tmp_path).is_file()
