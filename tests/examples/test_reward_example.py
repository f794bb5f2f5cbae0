"""examples/reward_model.py, run as a user runs it, on models of a few kilobytes."""

import json
import math
import random
import re
import signal
from pathlib import Path

import pytest

from conftest import VOCAB
from minirlhf import ActorCritic, PPOTrainer, RewardModel, Tokenizer
from minirlhf.runs.run import Run

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "reward_model.py"
LETTERS = list("酒店周围位置前台房间")


@pytest.fixture(scope="session")
def given(tiny) -> list[str]:
    """Arguments with small random models, and a run of two small steps."""
    models = ["--policy", str(tiny / "policy"), "--judge", str(tiny / "reward")]
    return [*models, "--steps", "8", "--batch-size", "4", "--lr", "3e-3", "--device", "cpu"]


def texts(count: int, mark: str, seed: int) -> list[str]:
    rng = random.Random(seed)
    return ["".join([mark, *rng.choices(LETTERS, k=12)]) for _ in range(count)]


def rankings_file(tmp_path, encoding="utf-8"):
    """Better is what has a certain character."""
    path = tmp_path / "lists.tsv"
    lists = zip(texts(150, "好", 1), texts(150, "一", 2), texts(150, "差", 3), strict=True)
    path.write_bytes("".join("\t".join(answers) + "\n" for answers in lists).encode(encoding))
    return path


def check_run(run) -> dict:
    assert {path.name for path in run.iterdir()} == {
        "stage2", "stage3", "reward", "policy", "summary.json", "before_after.md"}  # fmt: skip
    learned, tuned = ([json.loads(line) for line in (run / stage / "metrics.jsonl").read_text().splitlines()]
                      for stage in ("stage2", "stage3"))  # fmt: skip
    assert [line["step"] for line in tuned] == [1, 2]
    losses = [line["reward_model/loss"] for line in learned if "reward_model/loss" in line]
    assert losses[-1] < losses[0]
    summary = json.loads((run / "summary.json").read_text())
    for name in ("judge", "learned_reward", "distinct_2", "kl"):
        assert summary[name].keys() == {"before", "after"} and all(map(math.isfinite, summary[name].values()))
    assert 0 < summary["judge"]["before"] < 1 and summary["kl"]["after"] > 0
    assert abs(summary["learned_reward"]["before"]) < 0.2  # by the normalisation, on other samples
    first, last = summary["held_out"][0], summary["held_out"][-1]
    assert len(summary["held_out"]) == 4
    assert last["accuracy"] > first["accuracy"] + 0.2 and last["accuracy"] > 0.9
    reward = RewardModel.from_pretrained(run / "reward", device="cpu")
    good, bad = texts(50, "好", 9), texts(50, "差", 10)
    assert (reward(good) > reward(bad)).float().mean() > 0.9
    assert ActorCritic.from_pretrained(run / "policy").decoder.config.n_positions == 32
    assert Tokenizer.from_pretrained(run / "policy").vocab == VOCAB
    return summary


def test_rankings_of_one_s_own(given, tmp_path, call):
    run = tmp_path / "run"
    error, shown = call(SCRIPT, *given, "--rankings", rankings_file(tmp_path), "--epochs", "3", "--output", run)
    assert error is None
    summary = check_run(run)
    pairs = sum(row["count"] for row in summary["reliability"]) // 2  # in both directions
    assert pairs % 3 == 0 and 0 < pairs / 3 < 40  # all pairs of each list
    assert f"{150 - pairs // 3} rankings, {pairs // 3} held out" in shown
    assert "after epoch 0 accuracy" in shown and "after epoch 3 accuracy" in shown and "step 2: learned" in shown
    assert (run / "before_after.md").read_text(encoding="utf-8") in shown
    assert json.loads((run / "stage2" / "config.json").read_text())["arguments"]["steps"] == 8


def test_a_bert_as_the_trunk(given, tmp_path, call):
    run = tmp_path / "run"
    trunk = given[given.index("--judge") + 1]
    error, _ = call(
        SCRIPT, *given, "--trunk", trunk, "--rankings", rankings_file(tmp_path), "--epochs", "3", "--output", run
    )
    assert error is None
    assert json.loads((run / "reward" / "config.json").read_text())["model_type"] == "bert"
    check_run(run)


def test_held_out_rankings_of_one_s_own_and_a_run_that_goes_on(given, tmp_path, call, monkeypatch):
    """Stopped after the first step of PPO: the reward model is not trained once more."""
    run = tmp_path / "run"
    for name, seed in (("lists.tsv", 1), ("other.tsv", 7)):
        pairs = zip(texts(120, "好", seed), texts(120, "差", seed + 1), strict=True)
        (tmp_path / name).write_text("".join(f"{good}\t{bad}\n" for good, bad in pairs), encoding="utf-8")
    files = ["--rankings", tmp_path / "lists.tsv", "--held-out", tmp_path / "other.tsv", "--limit", "100"]

    def interrupted(self, *step):
        if isinstance(self.trainer, PPOTrainer):
            signal.raise_signal(signal.SIGINT)
        return record(self, *step)

    record = Run.record
    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", interrupted)
        error, shown = call(SCRIPT, *given, *files, "--epochs", "3", "--output", run)
    assert error is None and "100 rankings, 120 held out" in shown
    assert f"stopped after step 1 of 2, which is saved; to go on: python {SCRIPT} --resume {run}/stage3" in shown
    error, shown = call(SCRIPT, "--resume", run / "stage3")
    assert error is None and "after epoch" not in shown and "step 2: learned" in shown
    check_run(run)


def test_another_encoding_is_offered_and_taken(given, tmp_path, call):
    path, run = rankings_file(tmp_path, "gbk"), tmp_path / "run"
    error, _ = call(SCRIPT, *given, "--rankings", path, "--output", run)
    assert f"error: {path}, line 1 is not utf-8" in error and "--encoding" in error
    error, _ = call(SCRIPT, *given, "--rankings", path, "--encoding", "gbk", "--judge", "nowhere", "--output", run)
    assert "nowhere" in error and not run.exists()  # the rankings were read


@pytest.mark.parametrize(("arguments", "named"), [
    (["--rankings", "nowhere.tsv"], "nowhere.tsv"), (["--held-out", "nowhere.tsv"], "nowhere.tsv"),
    (["--epochs", "0"], "epochs"), (["--steps", "0"], "steps"), (["--device", "abacus"], "abacus"),
    (["--judge", "nowhere"], "nowhere"), (["--policy", "nowhere"], "nowhere"),
    (["--trunk", "nowhere"], "nowhere"), (["--prompts", " "], "empty"),
    (["--output", "full"], "full exists and is not empty"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(given, tmp_path, call, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    source = [] if arguments[0] in ("--rankings",) else ["--rankings", rankings_file(tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    error, shown = call(SCRIPT, *given, "--output", "run", *source, *arguments)
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error and named in error
    assert shown == "" and sorted(tmp_path.rglob("*")) == before


def test_a_source_of_rankings_is_needed(given, call):
    assert call(SCRIPT, *given)[0] == 2  # argparse's own


def test_english_texts_are_never_judged_by_the_chinese_classifier_in_silence(tiny, tmp_path, call):
    lines = (f"the room was good {i}\tthe room was bad {i}\n" for i in range(60))
    (tmp_path / "lists.tsv").write_text("".join(lines), encoding="utf-8")
    common = ["--rankings", tmp_path / "lists.tsv", "--policy", tiny / "policy", "--prompts", "the room",
              "--output", tmp_path / "out", "--steps", 8, "--batch-size", 4, "--device", "cpu"]  # fmt: skip
    error, _ = call(SCRIPT, *common)
    assert re.fullmatch("error: the starter weights are Chinese: .*: --judge FOLDER, or --judge none .*", error)
    assert not (tmp_path / "out").exists()
    assert call(SCRIPT, *common, "--judge", "none")[0] is None
    assert json.loads((tmp_path / "out/summary.json").read_text()).keys().isdisjoint({"judge"})
