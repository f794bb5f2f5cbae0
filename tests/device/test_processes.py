"""W processes compute what one computes: the same tokens and texts, weights to 1e-10 in float64, and figures."""

import pytest
import torch
from ranks import CASES, OF_FOUR, compute, together


@pytest.fixture(scope="module")
def alone():
    return compute(CASES)


@pytest.fixture(scope="module")
def several():
    return {2: together(2, compute, [*CASES]), 4: together(4, compute, OF_FOUR)}


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("size", "name"), [(2, name) for name in CASES] + [(4, name) for name in OF_FOUR])
def test_several_processes_compute_what_one_computes(alone, several, size, name):
    one, tolerance = alone[name], 1e-5 if name == "fp32" else 1e-10
    for rank, outcome in enumerate(several[size]):
        assert isinstance(outcome, dict), outcome
        found = outcome[name]
        assert found.keys() == one.keys()
        for key in ("tokens", "texts"):
            for a, b in zip(found.get(key, ()), one.get(key, ()), strict=True):
                assert torch.equal(a, b) if key == "tokens" else a == b
        for a, b in zip(found.get("stats", [{}]), one.get("stats", [{}]), strict=True):
            assert figures(a) == pytest.approx(figures(b), rel=tolerance, abs=tolerance)
        assert found.get("figures", {}) == pytest.approx(one.get("figures", {}), rel=1e-6, abs=1e-9)
        for parameter, value in one.get("weights", {}).items():
            # In fp32 Adam turns the rounding of gradients near 0 into steps of the size lr.
            apart = (found["weights"][parameter] - value).abs()
            assert apart.mean() < 1e-5 if name == "fp32" else apart.max() < 1e-10
            assert torch.equal(found["weights"][parameter], several[size][0][name]["weights"][parameter]), rank


def figures(stats):
    return {name: value for name, value in stats.items() if not name.startswith("time/")}
