"""A short soak: nothing that a step makes outlives it; and a leak would be seen."""

import math
import sys

import pytest
import soak
import torch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
STEPS, WARMUP, COUNTS = 14, 8, 3
KINDS = ("open_files", "Tensor", "Generator", "Optimizer")


def test_files_tensors_generators_and_optimizers_stay_as_many(tmp_path, monkeypatch):
    monkeypatch.setattr(soak, "COUNTS", COUNTS)
    measured = soak.soak(STEPS, WARMUP, tmp_path)
    for name in KINDS:
        assert len(set(measured[name])) == 1, (name, measured[name])
        assert len(measured[name]) == COUNTS
    assert len(measured["memory"]) == len(measured["seconds"]) == STEPS - WARMUP


def test_a_leak_is_counted(tmp_path):
    kept = []

    def leak():
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        kept.append((open("/dev/null"), torch.Generator(), optimizer))  # noqa: SIM115

    measured = soak.soak(8, 3, tmp_path, on_step=leak)  # counted after each of the last five
    for name in KINDS:
        assert measured[name] == sorted(measured[name]) and measured[name][-1] >= measured[name][0] + 4, name
        assert soak.figures(measured)[name]["ratio"] > 1


def test_figures_worked_by_hand():
    result = soak.figures({"x": [1.0, 3.0, *[9.0] * 16, 4.0, 8.0], "none": [0.0, 0.0], "some": [0.0, 2.0]})
    assert result["x"] == {"first": 2.0, "last": 6.0, "ratio": 3.0}
    assert (result["none"]["ratio"], result["some"]["ratio"]) == (1.0, math.inf)
