"""Tensors of which a process holds a part: what happens to those of which it holds all.

`tests/models/test_sharded.py` and `tests/robustness` have real parts.
"""

import warnings

import torch

from minirlhf.device.parts import as_part, full, is_part, load_parts, save_parts


def test_ordinary_tensors_stay_as_they_are(tmp_path):
    x = torch.arange(6.0).view(2, 3)
    assert not is_part(x) and full(x) is x and as_part(x, torch.zeros(2, 3)) is x
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: there is no process group
        save_parts(tmp_path / "parts", {"a": x, "b": x[0].clone()})
    found = load_parts(tmp_path / "parts", {"a": torch.zeros(2, 3), "b": torch.zeros(3)})
    assert torch.equal(found["a"], x) and torch.equal(found["b"], x[0])
    assert {path.suffix for path in (tmp_path / "parts").iterdir()} == {".safetensors"}  # and no pickle
