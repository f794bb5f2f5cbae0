"""What goes wrong on one of several processes: all end with one clear error, and a run goes on from its checkpoint.

The run of `lives`, by two processes; MINIRLHF_KILLS says how many are killed at a random moment. With MINIRLHF_TORCHRUN
set torchrun starts them, which takes a minute.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import lives
import pytest
import ranks
import torch
from ranks import live, together

from folders import snapshot
from minirlhf import ActorCritic
from minirlhf.io.files import read_jsonl

KILLS = int(os.environ.get("MINIRLHF_KILLS", "1"))
REPO = Path(__file__).resolve().parents[2]
LOST = "ConnectionError: another process of this run ended, or cannot be reached"
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    for name in "01":
        (folder / name).mkdir()
    outcome = together(2, ranks.faults, folder)
    assert all(isinstance(each, dict) for each in outcome), outcome
    return folder, outcome


EQUAL = "must be equal on all processes"
ERRORS = {
    "reward": ("KeyError", "rank 1: 'no score'"),
    "scores": ("ValueError", "rank 1: scores must be 3 numbers, one a text, got shape (2,)"),
    "prompts": ("ValueError", f"prompts {EQUAL}: number 1 is 'w' on rank 0 and 'x' on rank 1"),
    "number of prompts": ("ValueError", f"prompts {EQUAL}: their number is 5 on rank 0 and 4 on rank 1"),
    "queries": ("ValueError", f"queries, responses and scores {EQUAL}: number 3 is [9, 10] on rank 0 and [9, 11] on"),
    "too few rows": ("ValueError", "PPOConfig.batch_size must be at least 4: each of 2 processes needs group_size"),
    "config": ("ValueError", f"versions, settings and shapes {EQUAL}: lr is 0.001 on rank 0 and 0.002 on rank 1"),
    "version": ("ValueError", f"versions, settings and shapes {EQUAL}: minirlhf is "),
    "scope": ("ValueError", "the scope of a reward must be 'rows' or 'batch', got 'rank'"),
    "out of step": ("RuntimeError", f"what the processes do {EQUAL}: 'part 0' on rank 0 and 'part 1' on rank 1"),
    "NaN": ("FloatingPointError", "optimizer steps in a row were skipped"),
    "not shared": ("ValueError", "run of the first process is not seen here: all processes must share it"),
    "full disk": ("RunFailed", "saving step 2 of 6 failed: OSError: rank 0: [Errno 28] No space left on device"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_of_one_process_is_the_same_error_of_all(found, name):
    kind, text = ERRORS[name]
    for outcome in found[1]:
        assert outcome[name][0] == kind and text in outcome[name][1], outcome[name]


def test_all_processes_begin_with_the_weights_of_the_first(found):
    first, second = (outcome["weights"] for outcome in found[1])
    assert torch.equal(first, second)


def test_nothing_is_left_that_blocks_the_next_start(found):
    """By another number of processes, where the folder was not shared, and after the full disk."""
    folder, _ = found
    assert list((folder / "0" / "run").iterdir()) == []
    for place in (folder / "0" / "run", folder / "full"):
        assert live(place) == lives.STEPS


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of two processes to its end."""
    folder = tmp_path_factory.mktemp("two") / "run"
    assert together(2, live, folder) == [lives.STEPS] * 2
    return folder


def figures(folder):
    """The lines of metrics.jsonl, without the times."""
    lines = read_jsonl(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def same_bytes(folder, other):
    assert json.dumps(figures(folder)) == json.dumps(figures(other))
    assert snapshot(folder / "checkpoints") == snapshot(other / "checkpoints")


@pytest.mark.parametrize("number", range(KILLS))
def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on_to_the_same_bytes(tmp_path, undisturbed, number):
    draw, began = random.Random(number), time.monotonic()
    rank, step = 1, draw.randint(1, lives.STEPS)  # without torchrun the first process holds the store of all
    survivor, killed = together(2, live, tmp_path / "run", (rank, step))
    assert killed is None and survivor[0] == "RunFailed" and LOST in survivor[1], survivor
    assert time.monotonic() - began < 60
    assert together(2, live, tmp_path / "run") == [lives.STEPS] * 2
    same_bytes(tmp_path / "run", undisturbed)


def test_a_run_is_stopped_on_all_processes_after_the_same_step_and_goes_on_with_any_number(tmp_path, undisturbed):
    stopped = together(4, live, tmp_path / "run", None, (2, 3))
    assert stopped == [("Stopped", f"stopped after step 3 of {lives.STEPS}, which is saved")] * 4
    for size in (1, 2):
        folder = shutil.copytree(tmp_path / "run", tmp_path / str(size), symlinks=True)
        assert (together(size, live, folder) if size > 1 else [live(folder)]) == [lives.STEPS] * size
        for line, expected in zip(figures(folder), figures(undisturbed), strict=True):
            assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert (folder / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()


def test_a_sharded_run_goes_on_sharded_and_alone(tmp_path, undisturbed):
    """Each of two processes holds half of the model and its moments; the run is that of whole models."""
    outcome = together(2, ranks.sharded, tmp_path)
    assert all(isinstance(found, dict) for found in outcome), outcome
    assert live(tmp_path / "copy") == lives.STEPS  # by one process, with whole models
    for folder in (tmp_path / "run", tmp_path / "copy"):
        for line, expected in zip(figures(folder), figures(undisturbed), strict=True):
            assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)
        assert (folder / "samples.jsonl").read_bytes() == (undisturbed / "samples.jsonl").read_bytes()
    whole = outcome[0]["weights"]
    saved = ActorCritic.from_pretrained(tmp_path / "policy")
    for name, p in saved.named_parameters():
        assert torch.equal(whole[name], outcome[1]["weights"][name]) and torch.equal(whole[name], p)
    assert sum(found["held"] for found in outcome) == sum(p.numel() for p in saved.parameters())
    for found in outcome:
        assert found["moments"] == {2} and found["done"] == lives.STEPS
        assert found["held"] < 0.6 * sum(p.numel() for p in saved.parameters()) and found["ratio error"] < 1e-5


# ---- torchrun -------------------------------------------------------------------------------------------------------


def torchrun(folder, *options, **environment):
    """The run of `lives` in a folder by two processes of torchrun."""
    script = folder.parent / "script.py"
    script.write_text(
        "import os, sys, lives, ranks\nfrom pathlib import Path\nfrom shared import run_script\n"
        "from minirlhf.runs.run import Run\nfrom minirlhf.device.launch import restarted\n"
        "def main():\n"
        "    kill = None if restarted() or 'KILL' not in os.environ else tuple(map(int, os.environ['KILL'].split()))\n"
        "    lives.go_on = lambda folder: Run.start(folder, lives.new_trainer(), {})\n"
        "    stop = tuple(map(int, os.environ['STOP'].split())) if 'STOP' in os.environ else None\n"
        "    print('done', ranks.live(Path(sys.argv[1]), kill, stop, os.getppid()))\n"
        "run_script(main)\n"
    )
    paths = os.pathsep.join(str(REPO / place) for place in ("", "tests", "tests/robustness", "examples"))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options]
    return subprocess.Popen([*command, str(script), str(folder)], env=environment, encoding="utf-8",
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip


needs_torchrun = pytest.mark.skipif("MINIRLHF_TORCHRUN" not in os.environ, reason="slow: set MINIRLHF_TORCHRUN")


@needs_torchrun
@pytest.mark.timeout(600)
def test_torchrun_starts_the_processes_again_and_the_run_goes_on_to_the_same_bytes(tmp_path, undisturbed):
    done = torchrun(tmp_path / "run", "--max-restarts", "1", KILL="1 4")
    output, errors = done.communicate(timeout=240)
    assert done.returncode == 0, errors
    assert output.splitlines() == [f"done {lives.STEPS}"]
    assert errors.count("error: ") <= 1  # the survivor's, unless torchrun was quicker
    same_bytes(tmp_path / "run", undisturbed)


@needs_torchrun
@pytest.mark.timeout(600)
def test_sigterm_to_torchrun_stops_the_run_after_a_step(tmp_path, undisturbed):
    running = torchrun(tmp_path / "run", STOP="0 3")  # rank 0 sends it, in step 3
    output, errors = running.communicate(timeout=240)
    assert "stopped after step 3 of 6, which is saved; to go on: " in output and "Traceback" not in output, errors
    assert together(2, live, tmp_path / "run") == [lives.STEPS] * 2
    for line, expected in zip(figures(tmp_path / "run"), figures(undisturbed), strict=True):
        assert line == expected
