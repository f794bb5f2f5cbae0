"""examples/dpo.py, run as a user runs it, on models of a few kilobytes."""

import json
import random
import signal
from pathlib import Path

import pytest

from conftest import VOCAB
from minirlhf import GPT2, Tokenizer
from minirlhf.runs.run import Run

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "dpo.py"
LETTERS = list("酒店周围位置前台房间")


@pytest.fixture(scope="session")
def given(tiny) -> list[str]:
    """Arguments with small random models, and rounds of two small steps."""
    models = ["--policy", str(tiny / "policy"), "--reward", str(tiny / "reward"), "--device", "cpu"]
    return [*models, "--samples", "32", "--rounds", "2", "--batch-size", "8", "--gen-len", "5", "--lr", "3e-3"]


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """Better is what has a certain character."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "pairs.jsonl"
    ends = ["".join(rng.choices(LETTERS, k=6)) for _ in range(80)]
    rows = [{"prompt": "酒店", "chosen": f"好{end}", "rejected": f"差{end}"} for end in ends]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def lines(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def check_end(run) -> dict:
    summary = json.loads((run / "summary.json").read_text())
    assert 0 < summary["policy/reward"] < 1 and summary["kl"] > 0 and summary["optimum"]
    assert (run / "before_after.md").read_text().startswith("| prompt | before |")
    assert GPT2.from_pretrained(run / "policy").config.n_positions == 32
    assert Tokenizer.from_pretrained(run / "policy").vocab == VOCAB
    return summary


def test_pairs_of_a_file(given, pairs, tmp_path, call):
    run = tmp_path / "run"
    error, shown = call(SCRIPT, *given, "--pairs", pairs, "--output", run, "--epochs", "3")
    assert error is None
    assert {path.name for path in run.iterdir()} == {"round-1", "policy", "summary.json", "before_after.md"}
    steps = lines(run / "round-1")
    assert steps[-1]["rewards/accuracies"] > 0.9 and steps[-1]["dpo/loss"] < steps[0]["dpo/loss"]
    (measured,) = [step for step in steps if "held_out/loss" in step]  # at the end
    assert measured["held_out/rewards/accuracies"] > 0.9
    assert f"held-out accuracy {measured['held_out/rewards/accuracies']:.3f}" in shown
    check_end(run)


def test_rounds_of_samples_go_on_where_they_stopped(given, tmp_path, call, monkeypatch):
    """Stopped in the second round, which then begins with the same samples and ends as one that was not disturbed."""
    record, run, other = Run.record, tmp_path / "run", tmp_path / "other"

    def interrupted(self, *step):
        if self.folder.name == "round-2" and self.trainer.steps_done == 1:
            signal.raise_signal(signal.SIGINT)
        return record(self, *step)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", interrupted)
        error, shown = call(SCRIPT, *given, "--online", "--output", run)
    assert error is None and f"--resume {run / 'round-2'}" in shown
    error, shown = call(SCRIPT, "--resume", run / "round-2")
    assert error is None and "round 2: mean reward" not in shown
    assert call(SCRIPT, *given, "--online", "--output", other)[0] is None
    for name in ("round-1", "round-2"):
        assert (run / f"{name}.json").read_bytes() == (other / f"{name}.json").read_bytes()
        assert (run / name / "metrics.jsonl").read_bytes() == (other / name / "metrics.jsonl").read_bytes()
    samples = json.loads((run / "round-1.json").read_text())["pairs"]
    assert 4 <= len(samples) <= 8 and all(len(p["chosen"]) == len(p["rejected"]) == 5 for p in samples)
    first, second = (lines(run / name)[0]["rewards/margins"] for name in ("round-1", "round-2"))
    assert first == pytest.approx(0, abs=1e-4) != second  # always against the first policy
    assert check_end(run) == check_end(other)


@pytest.mark.parametrize(("arguments", "named"), [
    (["--pairs", "nowhere.jsonl"], "nowhere.jsonl"), (["--resume", "nowhere"], "nowhere"),
    (["--online", "--policy", "nowhere"], "nowhere"), (["--online", "--n", "1"], "--n at least 2, got 2 and 1"),
    (["--online", "--rounds", "0"], "--rounds must be at least 1"), (["--online", "--beta", "0"], "beta must be"),
    (["--online", "--loss", "ipo", "--label-smoothing", "0.1"], "label_smoothing must be 0"),
    (["--online", "--output", "full"], "full exists and is not empty"),
])  # fmt: skip
def test_bad_arguments_are_one_line_and_write_nothing(given, tmp_path, call, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    error, _ = call(SCRIPT, *given, "--output", "run", *arguments)
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error and named in error
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {"full", "full/thesis.txt"}


@pytest.mark.parametrize("arguments", [[], ["--online", "--pairs", "pairs.jsonl"]])
def test_either_pairs_or_samples(given, call, arguments):
    assert call(SCRIPT, *given, *arguments)[0] == 2  # argparse has said why
