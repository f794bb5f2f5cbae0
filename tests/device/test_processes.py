"""W processes compute what one computes: the same tokens and texts, weights to 1e-10 in float64, and figures."""

import pytest
import torch
from ranks import CASES, OF_FOUR, compute, together

from minirlhf.device.processes import Processes, _require_nccl, agreed, processes, tells


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


def test_alone_there_is_no_process_group_and_nothing_is_exchanged(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")  # torchrun with one process
    alone, x = processes(), torch.ones(3)
    assert not torch.distributed.is_initialized() and (alone.first, alone.rank, alone.size, alone.on) == (
        True,
        0,
        1,
        False,
    )
    assert alone.share(5) == slice(0, 5) and alone.gather("x", 1) == [1] and alone.gather_rows(3, x)[0] is x
    assert torch.equal(alone.deal(3)[0], torch.arange(3)) and alone.deal(3)[1] == 1.0
    error = ValueError("mine")
    with pytest.raises(ValueError) as raised, agreed("nothing"):
        raise error
    assert raised.value is error and tells(error)


@pytest.mark.parametrize(("count", "unit", "shares"), [
    (8, 1, [(0, 2), (2, 5), (5, 8)]), (8, 2, [(0, 2), (2, 4), (4, 8)]), (3, 1, [(0, 1), (1, 2), (2, 3)]),
    (2, 1, [(0, 2)] * 3), (4, 2, [(0, 4)] * 3),
])  # fmt: skip
def test_groups_stay_whole_and_too_few_are_computed_by_all(count, unit, shares):
    group = Processes()
    group.size = 3
    for rank, (start, stop) in enumerate(shares):
        group.rank = rank
        assert group.share(count, unit) == slice(start, stop)


def test_every_row_is_dealt_once_and_a_process_without_one_has_a_row_of_no_weight():
    group = Processes()
    group.size = 4
    for count in range(1, 10):
        counted = []
        for rank in range(4):
            group.rank = rank
            rows, factor = group.deal(count)
            assert len(rows) and (factor == 1.0 or rows.tolist() == [0])
            counted += rows.tolist() if factor else []
        assert sorted(counted) == [*range(count)]


def test_gpu_tensors_are_exchanged_by_nccl_only():
    _require_nccl("cpu:gloo,cuda:nccl")
    with pytest.raises(ValueError, match="'cpu:gloo,cuda:gloo', not by NCCL; let minirlhf start the process group"):
        _require_nccl("cpu:gloo,cuda:gloo")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nccl_with_one_process(tmp_path):
    """Sums and gathered rows of one process are its own, through NCCL."""
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        group, x = processes(), torch.randn(3, 4, device="cuda")
        total = x.clone()
        group.copy_([total])
        group.sum_([total])
        assert group.on and torch.equal(total, x) and torch.equal(group.gather_rows(3, x)[0], x)
    finally:
        torch.distributed.destroy_process_group()
