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
import resource, sys, torch
from minirlhf.device.cpu import keep_freed_memory

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


@pytest.mark.parametrize("setting", ["highest", "medium"])
def test_the_setting_is_put_back_after_an_error_too(precision, setting):
    precision(setting)
    with cpu.onednn_matmul():
        assert torch.get_float32_matmul_precision() == ("medium" if cpu._medium_is_full() else setting)
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
    monkeypatch.setattr(cpu, "_medium_is_full", lambda: False)
    with cpu.onednn_matmul():
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize(("onednn", "expected"), [(0.5, "onednn"), (0.99, "default"), (2.0, "default")])
def test_the_library_is_the_one_that_was_faster(monkeypatch, onednn, expected):
    """With a clock that counts what a product costs: 1 by default, `onednn` through oneDNN."""
    now = [0.0]

    def clock():
        now[0] += onednn if torch.get_float32_matmul_precision() == "medium" else 1.0
        return now[0]

    monkeypatch.setattr(cpu, "_medium_is_full", lambda: True)
    monkeypatch.setattr(cpu.time, "perf_counter", clock)
    assert cpu.fastest_matmul.__wrapped__(64, 256) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_was_freed_comes_back_without_page_faults():
    def run(mode):
        return int(
            subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, check=True, text=True).stdout
        )

    assert run("kept") < run("given back") / 2  # 64 MiB are 16,384 pages, or 32 huge ones


def test_a_setting_by_the_newer_interface_is_left_alone():
    code = (
        "import torch\nfrom minirlhf.device.cpu import matmul_precision\n"
        "if hasattr(torch.backends.cuda.matmul, 'fp32_precision'):\n"
        "    torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "    with matmul_precision('medium'):\n        pass\n"
        "    assert torch.backends.cuda.matmul.fp32_precision == 'tf32'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- threads --------------------------------------------------------------------------------------------------------


def plant(monkeypatch, folder, own, files):
    """Control groups as files below a folder; own: the lines of /proc/self/cgroup."""
    for name, text in files.items():
        (folder / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "cgroup" / name).write_text(text)
    (folder / "own").write_text(own)
    monkeypatch.setattr(cpu, "CGROUPS", folder / "cgroup")
    monkeypatch.setattr(cpu, "OWN_CGROUP", folder / "own")


@pytest.mark.parametrize(("own", "files", "expected"), [
    ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
    ("0::/\n", {"cpu.max": "max 100000\n"}, None),
    ("0::/\n", {}, None),
    ("0::/a/b\n", {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "300000 100000\n", "cpu.max": "800000 100000\n"}, 3),
    ("0::/a/b\n", {"a/c/cpu.max": "100000 100000\n"}, None),  # of another group
    ("0::/../../outside\n", {"cpu.max": "50000 100000\n"}, 0.5),
    ("4:cpu,cpuacct:/box\n", {}, None),  # version 1
    ("0::/\n", {"cpu.max": "nonsense"}, None), ("0::/\n", {"cpu.max": "100000 0\n"}, None),
])  # fmt: skip
def test_the_smallest_quota_of_the_groups_is_read(monkeypatch, tmp_path, own, files, expected):
    plant(monkeypatch, tmp_path, own, files)
    assert cpu.cpu_quota() == expected


def test_a_system_without_control_groups_has_no_quota(monkeypatch, tmp_path):
    monkeypatch.setattr(cpu, "OWN_CGROUP", tmp_path / "missing")
    assert cpu.cpu_quota() is None


@pytest.fixture
def machine(monkeypatch):
    """A Linux of so many cores, with so many threads and such a quota -> what was set."""

    def make(cores, threads, quota, **environment):
        chosen = []
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(cpu.sys, "platform", "linux")
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        monkeypatch.setattr(torch, "set_num_threads", chosen.append)
        monkeypatch.setattr(cpu, "cpu_quota", lambda: quota)
        assert [cpu.limit_threads.__wrapped__()] == (chosen or [None])
        return chosen

    return make


def test_threads_are_lowered_to_the_quota(machine):
    assert machine(64, 64, 4.0) == [4]
    assert machine(64, 32, 4.0) == [4]  # PyTorch takes one of two threads a core
    assert machine(8, 8, 2.5) == [3] and machine(8, 8, 0.2) == [1]


def test_threads_are_never_raised_and_a_number_that_was_set_stays(machine):
    assert machine(64, 64, None) == machine(2, 2, 2.0) == machine(2, 2, 16.0) == []
    assert machine(64, 8, 4.0) == machine(64, 1, 0.5) == []  # by torch.set_num_threads
    assert machine(64, 64, 4.0, OMP_NUM_THREADS="64") == machine(64, 32, 4.0, MKL_NUM_THREADS="32") == []
