"""The optimizer step: precision of its products, clipping, and steps that are not finite."""

import math

import pytest
import torch
from torch import nn

from minirlhf.device.precision import Precision

CPU = torch.device("cpu")


def small_model(seed: int = 0) -> nn.Linear:
    model = nn.Linear(3, 2)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model


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


@pytest.mark.parametrize(("size", "matmul"), [(10, "highest"), (1000, "medium")])
def test_large_models_get_the_fast_products_in_both_passes(monkeypatch, size, matmul):
    monkeypatch.setattr("minirlhf.device.cpu._offers_onednn", lambda: True)
    monkeypatch.setattr("minirlhf.device.precision.fastest_matmul", lambda n_in, n_out: "onednn")
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
