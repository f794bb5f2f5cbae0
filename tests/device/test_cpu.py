"""The matrix setting is put back and loses no precision; freed memory comes back without page faults; no more threads
than a quota has time for."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from minirlhf.device import cpu
from minirlhf.device.gpu import tf32_matmul

FAULTS = """
import resource, torch
from minirlhf.device.cpu import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = min(faults() for _ in range(5))
assert keep_freed_memory()
print(given_back, min(faults() for _ in range(5)))  # a small block may come to lie in the gap of one
"""


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["highest", "medium"])
def test_the_setting_is_put_back_after_an_error_too(precision, setting):
    precision(setting)
    with cpu.onednn_matmul():
        assert torch.get_float32_matmul_precision() == ("medium" if cpu._offers_onednn() else setting)
    with pytest.raises(ZeroDivisionError), tf32_matmul():
        assert torch.get_float32_matmul_precision() == "high"
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == setting


def test_products_stay_as_exact_as_fp32():
    a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(3))
    truth = a.double() @ b.double()
    with cpu.onednn_matmul():
        error = ((a @ b).double() - truth).abs().max() / truth.abs().max()
    assert error < 2e-6
    rounded = ((a.bfloat16() @ b.bfloat16()).double() - truth).abs().max() / truth.abs().max()
    assert rounded > 1e-4  # a product in bf16 would be seen


def test_where_medium_rounds_more_nothing_is_changed(precision, monkeypatch):
    precision("highest")
    monkeypatch.setattr(cpu, "_offers_onednn", lambda: False)
    with cpu.onednn_matmul():
        assert torch.get_float32_matmul_precision() == "highest"


def test_without_a_way_to_onednn_there_is_no_choice(precision, monkeypatch):
    """As with AVX2, where "medium" changes nothing: the same library was timed twice, and the noise chose."""
    monkeypatch.setattr(cpu, "onednn_has_bf16", lambda: False)
    assert not cpu._offers_onednn.__wrapped__()
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        x, weight = (torch.randn(252, 768, generator=torch.Generator().manual_seed(0)) for _ in range(2))
        expected = x @ weight.T
        precision("medium")
        assert torch.equal(x @ weight.T, expected)


@pytest.mark.parametrize(("onednn", "expected"), [(0.5, "onednn"), (0.99, "default"), (2.0, "default")])
def test_the_library_is_the_one_that_was_faster(monkeypatch, onednn, expected):
    """With a clock that counts what a product costs: 1 by default, `onednn` through oneDNN."""
    now = [0.0]

    def clock():
        now[0] += onednn if torch.get_float32_matmul_precision() == "medium" else 1.0
        return now[0]

    monkeypatch.setattr(cpu, "_offers_onednn", lambda: True)
    monkeypatch.setattr(cpu.time, "perf_counter", clock)
    assert cpu.fastest_matmul.__wrapped__(64, 256) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_comes_back_without_page_faults():
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, check=True, text=True)
    given_back, kept = map(int, done.stdout.split())
    assert kept < given_back / 2  # 64 MiB are 16,384 pages, or 32 huge ones


def test_a_setting_by_the_newer_interface_is_left_alone():
    products = torch.backends.cuda.matmul
    if not hasattr(products, "fp32_precision"):
        pytest.skip("this PyTorch has the older interface only")
    before = products.fp32_precision
    try:
        products.fp32_precision = "tf32"
        with cpu.matmul_precision("medium"):
            pass
        assert products.fp32_precision == "tf32"
    finally:
        products.fp32_precision = before
    torch.get_float32_matmul_precision()  # as before, this is told again


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cores", "threads", "quota", "environment", "chosen"), [
    (64, 64, "400000 100000\n", (), [4]), (64, 32, "400000 100000\n", (), [4]),  # one of two threads a core
    (8, 8, "250000 100000\n", (), [3]), (8, 8, "20000 100000\n", (), [1]),
    (64, 64, "max 100000\n", (), []), (64, 64, "nonsense", (), []), (64, 64, "100000 0\n", (), []),
    (64, 64, None, (), []), (2, 2, "200000 100000\n", (), []), (2, 2, "1600000 100000\n", (), []),  # never raised
    (64, 8, "400000 100000\n", (), []), (64, 1, "50000 100000\n", (), []),  # by torch.set_num_threads
    (64, 64, "400000 100000\n", ("OMP_NUM_THREADS",), []), (64, 32, "400000 100000\n", ("MKL_NUM_THREADS",), []),
])  # fmt: skip
def test_threads_are_lowered_to_the_quota(monkeypatch, tmp_path, cores, threads, quota, environment, chosen):
    """On a machine of so many cores, with so many threads."""
    found = []
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name in environment:
        monkeypatch.setenv(name, str(threads))
    monkeypatch.setattr(cpu, "CPU_MAX", tmp_path / "cpu.max")
    if quota is not None:
        cpu.CPU_MAX.write_text(quota)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    assert [cpu.limit_threads.__wrapped__()] == (chosen or [None]) and found == chosen
