"""How processes find each other, and which one tells an error."""

import pytest

from minirlhf.device.launch import require_nccl, restarted, started_together, tells


def test_gpu_tensors_are_exchanged_by_nccl_only():
    require_nccl("cpu:gloo,cuda:nccl")
    with pytest.raises(ValueError, match="'cpu:gloo,cuda:gloo', not by NCCL; let minirlhf start the process group"):
        require_nccl("cpu:gloo,cuda:gloo")


def test_what_torchrun_says(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert not started_together() and not restarted() and tells(ValueError("alone"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not started_together()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert started_together() and restarted()
