"""Devices by name, and batches that fit into their memory."""

import warnings
import weakref

import pytest
import torch

from minirlhf.device.placement import resolve_device, sizes_that_fit

CPU = torch.device("cpu")


def in_sizes_that_fit(compute, size):
    """What `compute` gives of the first size that fits, and that size."""
    for attempt in sizes_that_fit(size):
        with attempt:
            result = compute(attempt.size)
    return result, attempt.size


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
        assert in_sizes_that_fit(compute, 12) == (f"in batches of {tried[-1]}", tried[-1])
    assert seen == tried and len(caught) == len(tried) - 1


def test_an_attempt_may_be_the_only_one():
    """Other processes would wait inside it for this one."""
    with pytest.raises(torch.cuda.OutOfMemoryError):
        for attempt in sizes_that_fit(8, once=True):
            with attempt:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory.")


def test_what_does_not_fit_at_all_and_other_errors_are_raised():
    def never(size):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    with pytest.warns(UserWarning, match="with 2 sequences"), pytest.raises(torch.cuda.OutOfMemoryError):
        in_sizes_that_fit(never, 2)
    with pytest.raises(ZeroDivisionError):
        in_sizes_that_fit(lambda size: size // 0, 8)


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
        assert in_sizes_that_fit(compute, 8) == (1, 1)
    assert len(alive) == 4


def test_each_of_several_processes_takes_the_gpu_of_its_number(monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve_device("cuda:0") == torch.device("cuda:0") and current == []  # alone
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    for name in ("auto", "cuda"):
        assert resolve_device(name) == torch.device("cuda:1")
    assert current == [1, 1] and resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match=r"'cuda:0', but 2 processes run .*: with 'cuda' each takes its own"):
        resolve_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="4 processes on this machine have 2 GPUs: start 2, or use device 'cpu'"):
        resolve_device("auto")
