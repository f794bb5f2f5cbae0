"""The matrix setting is put back and loses no precision; freed memory comes back without page faults."""

import platform
import subprocess
import sys

import pytest
import torch

from minirlhf import cpu

FAULTS = """
import resource, sys, torch
from minirlhf.cpu import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16 << 20)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if sys.argv[1] == "kept":
    assert keep_freed_memory()
print(min(faults() for _ in range(5)))  # a small block may come to lie in the gap of one
"""


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_the_setting_is_put_back_after_an_error_too(precision, setting):
    precision(setting)
    with cpu.fast_matmul():
        assert torch.get_float32_matmul_precision() == ("medium" if cpu._medium_is_full() else setting)
    with pytest.raises(ZeroDivisionError), cpu.fast_matmul():
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == setting


def test_products_stay_as_exact_as_fp32():
    a, b = torch.randn(2, 300, 300, generator=torch.Generator().manual_seed(3))
    truth = a.double() @ b.double()
    with cpu.fast_matmul():
        error = ((a @ b).double() - truth).abs().max() / truth.abs().max()
    assert error < 2e-6
    rounded = ((a.bfloat16() @ b.bfloat16()).double() - truth).abs().max() / truth.abs().max()
    assert rounded > 1e-4  # a product in bf16 would be seen


def test_where_medium_rounds_more_nothing_is_changed(precision, monkeypatch):
    precision("highest")
    monkeypatch.setattr(cpu, "_medium_is_full", lambda: False)
    with cpu.fast_matmul():
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_comes_back_without_page_faults():
    def run(mode):
        return int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True, text=True).stdout
        )

    assert run("kept") < run("given back") / 2  # 64 MiB are 16,384 pages, or 32 huge ones


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    assert cpu.keep_freed_memory.__wrapped__() is False


def test_a_setting_by_the_newer_interface_is_left_alone():
    code = (
        "import torch\nfrom minirlhf.cpu import fast_matmul\n"
        "if hasattr(torch.backends.cuda.matmul, 'fp32_precision'):\n"
        "    torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "    with fast_matmul():\n        pass\n"
        "    assert torch.backends.cuda.matmul.fp32_precision == 'tf32'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
