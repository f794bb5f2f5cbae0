"""Index files: every tensor from the file that the index names, and nothing from outside the folder."""

import json

import pytest
import torch
from safetensors.torch import save_file

from minirlhf.io.model_folder import read_tensors
from minirlhf.io.shards import read_index, read_shards

WEIGHT_MAP = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",
              "c": "model-00001-of-00002.safetensors"}  # fmt: skip
TENSORS = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0]), "c": torch.tensor([3.0])}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def index(tmp_path):
    for shard in (FIRST, SECOND):
        save_file({name: t for name, t in TENSORS.items() if WEIGHT_MAP[name] == shard}, tmp_path / shard)
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 12}, "weight_map": WEIGHT_MAP}))
    return path


def test_every_tensor_comes_from_its_shard(index):
    tensors = read_shards(index, read_tensors)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert read_index(index) == {FIRST: {"a", "c"}, SECOND: {"b"}}


@pytest.mark.parametrize("shard", [
    "../model.safetensors", "../../etc/passwd", "/etc/passwd", "sub/model.safetensors", "./model.safetensors", "..",
    ".", "", "sub/", "..\\model.safetensors", "C:\\model.safetensors", "C:model.safetensors", "\\\\host\\share",
    "model.safetensors\x00.txt", "a\nb", None, 3, ["model.safetensors"],
], ids=repr)  # fmt: skip
def test_an_index_leads_nowhere_but_to_its_own_folder(index, shard):
    opened = []
    index.write_text(json.dumps({"weight_map": {**WEIGHT_MAP, "b": shard}}))
    with pytest.raises(ValueError, match=r"index.json places b in .*, which is not the name of a file beside it"):
        read_shards(index, opened.append)
    assert opened == []


def test_a_shard_may_be_a_link_as_in_a_hub_cache(index, tmp_path_factory):
    blobs = tmp_path_factory.mktemp("blobs")
    (index.parent / FIRST).rename(blobs / "0123abcd")
    (index.parent / FIRST).symlink_to(blobs / "0123abcd")
    assert torch.equal(read_shards(index, read_tensors)["c"], TENSORS["c"])


def test_a_link_to_anything_but_tensors_is_refused(index, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("root:x:0:0:a line of somebody else's file\n" * 50)
    (index.parent / FIRST).unlink()
    (index.parent / FIRST).symlink_to(secret)
    with pytest.raises(ValueError, match=f"{FIRST} is not a readable safetensors file") as caught:
        read_shards(index, read_tensors)
    assert "somebody" not in str(caught.value)


@pytest.mark.parametrize("content", [
    "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": null}', '{"weight_map": "model.safetensors"}',
])  # fmt: skip
def test_an_index_without_a_map_is_refused(index, content):
    index.write_text(content)
    with pytest.raises(ValueError, match=r"index.json has no weight_map"):
        read_shards(index, read_tensors)


def test_an_index_that_names_a_tensor_twice_is_refused(index):
    index.write_text('{"weight_map": {"a": "%s", "b": "%s", "a": "%s"}}' % (FIRST, SECOND, SECOND))  # noqa: UP031
    with pytest.raises(ValueError, match=r"index.json is not valid JSON: it names a twice"):
        read_shards(index, read_tensors)


def test_missing_shards_are_named_before_any_is_read(index):
    opened = []
    (index.parent / SECOND).unlink()
    with pytest.raises(FileNotFoundError, match=f"index.json names files that do not exist: {SECOND}"):
        read_shards(index, opened.append)
    assert opened == []


def test_a_tensor_that_the_shard_does_not_hold_is_named(index):
    index.write_text(json.dumps({"weight_map": {**WEIGHT_MAP, "d": SECOND}}))
    with pytest.raises(ValueError, match=f"{SECOND} does not hold what model.safetensors.index.json says: missing d"):
        read_shards(index, read_tensors)


@pytest.mark.parametrize("extra", ["c", "z"])
def test_a_tensor_that_the_index_places_elsewhere_or_nowhere_is_named(index, extra):
    save_file({"b": TENSORS["b"], extra: torch.zeros(1)}, index.parent / SECOND)
    with pytest.raises(ValueError, match=f"{SECOND} holds tensors that .*index.json does not place there: {extra}$"):
        read_shards(index, read_tensors)
