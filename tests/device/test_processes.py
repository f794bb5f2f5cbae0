"""W processes compute what one computes: the same tokens and texts, weights to 1e-10 in float64, and figures."""

import json
from pathlib import Path

import pytest
import torch
from ranks import CASES, OF_FOUR, compute, ppo, scripts, together

from minirlhf import GPT2
from minirlhf.device.launch import tells
from minirlhf.device.processes import agreed, processes

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"


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


@pytest.mark.timeout(300)
def test_every_example_and_a_command_run_on_two_processes(tiny, tmp_path):
    """Each ends without an error, leaves what it leaves alone, and only the first process prints."""
    pytest.importorskip("tqdm"), pytest.importorskip("matplotlib")
    texts = [f"{word}{a}{b}" for word in ("酒店", "房间") for a in "很好差脏" for b in "位置前台早餐"]
    pairs = [dict(prompt=text[:2], chosen=f"{text[2:]}好", rejected=f"{text[2:]}差") for text in texts]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    policy, reward, cpu = ("--policy", tiny / "policy"), ("--reward", tiny / "reward"), ("--device", "cpu")
    data, sizes = ("--texts", tmp_path / "texts.txt"), ("--steps", 8, "--batch-size", 4)
    dpo = ["dpo.py", *policy, *reward, "--batch-size", 4, "--epochs", 1, "--gen-len", 4]
    sft = [*data, "--model", tiny / "policy", "--max-length", 16, "--tokens-per-batch", 64]
    commands = {
        "sft": ["sft_reviews.py", *sft],
        "command": [REPO / "minirlhf" / "__main__.py", "sft", *sft, "--sharding", "full", "--precision", "fp32"],
        "reward": ["reward_model.py", "--rankings", tmp_path / "pairs.jsonl", *policy, "--judge", tiny / "reward",
                   *sizes],
        "dpo": [*dpo, "--pairs", tmp_path / "pairs.jsonl"],
        "online": [*dpo, "--online", "--rounds", 2, "--samples", 10, "--n", 2],
        "ppo": ["positive_reviews.py", *policy, *reward, *sizes, "--group-size", 2, "--gen-len", 4],
        "bad": ["positive_reviews.py", *policy, *reward, "--batch-size", 2, "--group-size", 2],
    }  # fmt: skip
    commands = {name: [EXAMPLES / script, *rest, *cpu, "--output", tmp_path / name]
                for name, (script, *rest) in commands.items()}  # fmt: skip
    outcomes = together(2, scripts, commands)
    errors = sorted(map(str, (found.pop("bad")[0] for found in outcomes)))
    del commands["bad"]
    assert "PPOConfig.batch_size must be at least 4" in errors[1], errors
    assert errors[0] in ("1", errors[1])  # told once, or twice if the process that they ask ended first
    assert not (tmp_path / "bad").exists()
    for rank, found in enumerate(outcomes):
        assert isinstance(found, dict), found
        for name, (error, shown) in found.items():
            assert not error and bool(shown.strip()) == (rank == 0), (name, error, shown)
    for name in commands:
        assert (tmp_path / name / "summary.json").is_file()
        assert GPT2.from_pretrained(tmp_path / name / "policy").config.n_positions == 32
    rounds = [(tmp_path / "online" / f"round-{n}" / "metrics.jsonl").read_text() for n in (1, 2)]
    assert all(len(lines.splitlines()) >= 1 for lines in rounds)


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
    [(rows, factor)] = alone.deal(3)
    assert torch.equal(rows, torch.arange(3)) and factor == 1.0
    error = ValueError("mine")
    with pytest.raises(ValueError) as raised, agreed("nothing"):
        raise error
    assert raised.value is error and tells(error)


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_sharded_step_of_one_process_is_an_ordinary_one(tmp_path, record_property):
    """Through NCCL; the memory that each takes is recorded."""
    settings, weights = dict(device="cuda", precision="fp32", steps=16, ppo_epochs=1), {}
    for sharding in (None, "full"):
        torch.cuda.reset_peak_memory_stats()
        if sharding:
            torch.distributed.init_process_group(
                "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path / 'sharded'}", rank=0, world_size=1
            )
        try:
            weights[sharding] = ppo(dtype=torch.float32, sharding=sharding, **settings)["weights"]
        finally:
            if sharding:
                torch.distributed.destroy_process_group()
        record_property(f"bytes with sharding={sharding}", torch.cuda.max_memory_allocated())
    for name, value in weights[None].items():
        assert (weights["full"][name] - value).abs().mean() < 1e-5
