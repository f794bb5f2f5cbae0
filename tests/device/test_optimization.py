"""Devices, precision and learning-rate schedules."""

import contextlib
import math
import warnings
import weakref

import pytest
import torch
from torch import nn

from minirlhf.device.placement import in_batches_that_fit, resolve_device
from minirlhf.device.precision import Precision
from minirlhf.device.random import undone_on_error
from minirlhf.device.schedules import lr_factor

CPU = torch.device("cpu")


def small_model(seed: int = 0) -> nn.Linear:
    model = nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


# ---- devices --------------------------------------------------------------------------------------------------------


def test_devices_by_name():
    assert resolve_device("cpu") == CPU and resolve_device(CPU) == CPU
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu cpu"])
def test_unknown_devices_are_refused(device):
    with pytest.raises(ValueError, match="device must be 'auto', 'cpu'"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")])
def test_a_gpu_that_is_not_there_is_refused(device):
    with pytest.raises(ValueError, match="sees no GPU"):
        resolve_device(device)


# ---- precision ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_matrix_products_run_in_the_named_precision_over_fp32_weights(name, dtype):
    model, precision = small_model(), Precision(name, CPU)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = [p.detach().clone() for p in model.parameters()]
    with precision.autocast():
        output = model(torch.ones(4, 3))
    assert output.dtype == dtype
    loss = output.float().square().sum()
    precision.backward(loss)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    precision.step(optimizer, list(model.parameters()), 1e9, loss)
    for p, old in zip(model.parameters(), before, strict=True):
        assert p.dtype == torch.float32
        assert not torch.equal(p, old)
        assert not torch.equal(p, p.bfloat16().float())  # finer than bf16 could hold
        assert p.grad is None
    moments = [s["exp_avg"] for s in optimizer.state.values()]
    assert len(moments) == 2 and all(m.dtype == torch.float32 for m in moments)


@pytest.mark.parametrize(("limit", "factor"), [(1.0, 0.1), (10.0, 1.0), (1e9, 1.0)])
def test_step_clips_the_global_norm_and_returns_it_unclipped(limit, factor):
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([a, b], lr=1.0, fused=True)
    precision = Precision("fp32", CPU)
    loss = 6 * a.sum() + 8 * b[0]  # gradient (6, 8, 0): norm 10
    precision.backward(loss)
    assert precision.step(optimizer, [a, b], limit, loss).item() == pytest.approx(10)
    assert a.item() == pytest.approx(-6 * factor, rel=1e-5)
    assert b.tolist() == pytest.approx([-8 * factor, 0], rel=1e-5)


def test_an_optimizer_that_is_not_fused_is_clipped_and_skipped_for():
    def weights(fused):
        p, precision = nn.Parameter(torch.tensor([1.0, 2.0])), Precision("fp32", CPU)
        optimizer = torch.optim.AdamW([p], lr=0.1, fused=fused)
        for scale in (3.0, math.nan, 0.01):
            loss = (scale * p * torch.tensor([1.0, -2.0])).sum()
            precision.backward(loss)
            precision.step(optimizer, [p], 1.0, loss)
        return p.detach()

    assert torch.isfinite(weights(False)).all()
    torch.testing.assert_close(weights(False), weights(True))


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("loss", "gradient"), [
    (1.0, math.nan), (1.0, math.inf), (1.0, 1e30),  # whose square overflows
    (math.nan, 1.0), (math.inf, 1.0), (-math.inf, 1.0),
])  # fmt: skip
def test_a_step_that_is_not_finite_is_skipped(name, loss, gradient):
    p, precision = nn.Parameter(torch.ones(2)), Precision(name, CPU)
    optimizer = torch.optim.AdamW([p], lr=0.1, fused=True)
    precision.backward(p.sum())
    precision.step(optimizer, [p], 1.0, torch.tensor(1.0))
    before, state = p.detach().clone(), {key: x.clone() for key, x in optimizer.state[p].items()}
    precision.backward(p.sum())
    p.grad[1] *= gradient
    assert not math.isfinite(precision.step(optimizer, [p], 1.0, torch.tensor(loss)))
    assert torch.equal(p, before) and p.grad is None
    assert all(torch.equal(x, state[key]) for key, x in optimizer.state[p].items())
    precision.backward(p.sum())
    assert precision.step(optimizer, [p], 1.0, torch.tensor(1.0)).item() == pytest.approx(math.sqrt(2))
    assert not torch.equal(p, before)


def test_unknown_precision_is_refused():
    with pytest.raises(ValueError, match=r"fp32, tf32, bf16, fp16.*'fp8'"):
        Precision("fp8", CPU)


def test_a_gpu_that_cannot_compute_in_bf16_is_told_at_once(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    with pytest.raises(ValueError, match="'bf16', but cuda cannot compute in it; fp32 and fp16 it can"):
        Precision("bf16", torch.device("cuda"))
    assert Precision("bf16", CPU).name == "bf16" and Precision("fp32", torch.device("cuda")).name == "fp32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert Precision("bf16", torch.device("cuda")).name == "bf16"


# ---- memory and generators ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("room", "tried"), [(100, [12]), (12, [12]), (7, [12, 6]), (2, [12, 6, 3, 1]), (1, [12, 6, 3, 1])]
)
def test_batches_are_halved_until_they_fit(room, tried):
    seen = []

    def compute(size):
        seen.append(size)
        if size > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return f"in batches of {size}"

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert in_batches_that_fit(compute, 12) == (f"in batches of {tried[-1]}", tried[-1])
    assert seen == tried and len(caught) == len(tried) - 1


def test_what_does_not_fit_at_all_and_other_errors_are_raised():
    def never(size):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    with pytest.warns(UserWarning, match="with 2 sequences"), pytest.raises(torch.cuda.OutOfMemoryError):
        in_batches_that_fit(never, 2)
    with pytest.raises(ZeroDivisionError):
        in_batches_that_fit(lambda size: size // 0, 8)


def test_an_attempt_that_failed_is_let_go_of_before_the_next():
    """Or its tensors would still fill the memory."""

    class Activations:
        pass

    alive = []

    def compute(size):
        assert not [ref for ref in alive if ref() is not None]
        kept = Activations()
        alive.append(weakref.ref(kept))
        if size > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return size

    with pytest.warns(UserWarning):
        assert in_batches_that_fit(compute, 8) == (1, 1)
    assert len(alive) == 4


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_draws_are_undone_by_an_error_and_by_nothing_else(error):
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    before = [g.get_state() for g in generators]
    context = pytest.raises(error) if error else contextlib.nullcontext()
    with context, undone_on_error(generators):
        for g in generators:
            torch.rand(3, generator=g)
        if error:
            raise error
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True)) == bool(error)


# ---- learning rate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "progress", "warmup", "floor", "expected"), [
    ("constant", 0.0, 0.0, 0.0, 1.0), ("constant", 0.7, 0.0, 0.1, 1.0), ("constant", 1.0, 0.0, 0.0, 1.0),
    ("linear", 0.0, 0.0, 0.0, 1.0), ("linear", 0.25, 0.0, 0.0, 0.75), ("linear", 1.0, 0.0, 0.0, 0.0),
    ("linear", 0.5, 0.0, 0.2, 0.6), ("linear", 1.0, 0.0, 0.2, 0.2),
    ("cosine", 0.0, 0.0, 0.0, 1.0), ("cosine", 0.5, 0.0, 0.0, 0.5), ("cosine", 1.0, 0.0, 0.0, 0.0),
    ("cosine", 1 / 3, 0.0, 0.0, 0.75), ("cosine", 0.5, 0.0, 0.2, 0.6), ("cosine", 1.0, 0.0, 0.2, 0.2),
    ("constant", 0.05, 0.2, 0.0, 0.25), ("linear", 0.1, 0.2, 0.0, 0.5), ("cosine", 0.15, 0.2, 0.5, 0.75),
    ("linear", 0.2, 0.2, 0.0, 1.0), ("linear", 0.6, 0.2, 0.0, 0.5), ("cosine", 0.6, 0.2, 0.0, 0.5),
    ("constant", 0.5, 1.0, 0.0, 0.5), ("linear", 1.0, 1.0, 0.0, 1.0),
])  # fmt: skip
def test_lr_factor_golden_values(schedule, progress, warmup, floor, expected):
    assert lr_factor(schedule, progress, warmup, floor) == pytest.approx(expected, abs=1e-9)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"constant, linear, cosine.*'step'"):
        lr_factor("step", 0.5)


@pytest.mark.parametrize(("size", "matmul"), [(10, "highest"), (1000, "medium")])
def test_large_models_get_the_fast_products_in_both_passes(monkeypatch, size, matmul):
    monkeypatch.setattr("minirlhf.device.cpu._medium_is_full", lambda: True)
    monkeypatch.setattr("minirlhf.device.precision.LARGE_MODEL", 1000)
    model = torch.nn.Linear(size, 1, bias=False)
    precision = Precision("fp32", torch.device("cpu"), model)
    seen = []
    with precision.autocast():
        seen.append(torch.get_float32_matmul_precision())
        loss = model(torch.ones(size)).sum()
    model.weight.register_hook(lambda _: seen.append(torch.get_float32_matmul_precision()))
    precision.backward(loss)
    assert seen == [matmul, matmul] and torch.get_float32_matmul_precision() == "highest"
