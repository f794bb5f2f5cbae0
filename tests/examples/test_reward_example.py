"""examples/reward_model.py, run as a user runs it, on models of a few kilobytes."""

import csv
import json
import math
import random
import runpy
import sys
from pathlib import Path

import pytest
import torch

from conftest import VOCAB, make_bert, make_gpt2
from minirlhf import ActorCritic, RewardModel, SentimentReward, Tokenizer
from minirlhf.rewards.sentiment import CANARIES
from minirlhf.text.preferences import Ranking

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPT = EXAMPLES / "reward_model.py"
LETTERS = list("酒店周围位置前台房间")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> list[str]:
    """Arguments with small random models, and a run of two small steps."""
    folder = tmp_path_factory.mktemp("tiny")
    make_gpt2(0, n_embd=16, n_layer=1, n_head=2, n_positions=32).save_pretrained(folder / "policy")
    judge = make_bert(0, id2label={0: "negative", 1: "positive"})
    good, bad = SentimentReward(judge, Tokenizer(VOCAB), device="cpu")(list(CANARIES)).tolist()
    with torch.no_grad():  # the labels in the right order
        judge.classifier.weight.mul_(1 if good > bad else -1)
    judge.save_pretrained(folder / "judge")
    for name in ("policy", "judge"):
        Tokenizer(VOCAB).save_pretrained(folder / name)
    models = ["--policy", str(folder / "policy"), "--judge", str(folder / "judge")]
    return [*models, "--steps", "8", "--batch-size", "4", "--lr", "3e-3", "--device", "cpu"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Run the script in this process. Returns the error it ended with, or None, and what it printed."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        capsys.readouterr()
        error = None
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as exit:
            error = exit.code
        return error, capsys.readouterr().out

    return run


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
    names = {"config.json", "metrics.jsonl", "summary.json", "before_after.md", "reward", "policy"}
    assert {path.name for path in run.iterdir()} == names
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == [1, 2]
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
    assert ActorCritic.from_pretrained(run / "policy").gpt2.config.n_positions == 32
    assert Tokenizer.from_pretrained(run / "policy").vocab == VOCAB
    return summary


def test_rankings_of_one_s_own(tiny, tmp_path, call):
    run = tmp_path / "run"
    error, shown = call(*tiny, "--rankings", rankings_file(tmp_path), "--epochs", "3", "--output", run)
    assert error is None
    summary = check_run(run)
    pairs = summary["held_out"][0]["pairs"]
    assert pairs % 3 == 0 and 0 < pairs / 3 < 40  # all pairs of each list
    assert f"{150 - pairs // 3} rankings, 0 disputed, {pairs // 3} held out" in shown
    assert "after epoch 0 accuracy" in shown and "after epoch 3 accuracy" in shown and "step 2: learned" in shown
    assert (run / "before_after.md").read_text(encoding="utf-8") in shown
    assert json.loads((run / "config.json").read_text())["arguments"]["steps"] == "8"


def test_a_bert_as_the_trunk(tiny, tmp_path, call):
    run = tmp_path / "run"
    trunk = tiny[tiny.index("--judge") + 1]
    error, _ = call(*tiny, "--trunk", trunk, "--rankings", rankings_file(tmp_path), "--epochs", "3", "--output", run)
    assert error is None
    assert json.loads((run / "reward" / "config.json").read_text())["model_type"] == "bert"
    check_run(run)


@pytest.fixture
def reviews(tmp_path):
    """A folder with small files of the published form: two kinds of goods, good and bad by their first character."""
    for name, columns in (("ChnSentiCorp_htl_all.csv", 2), ("online_shopping_10_cats.csv", 3)):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["cat", "label", "review"][-columns:])
            for label, mark in ((1, "好"), (0, "差")):
                for text in texts(200, mark, 20 + label + columns):
                    writer.writerow(["书籍", label, text][-columns:])
    return tmp_path


def test_labelled_reviews(tiny, reviews, tmp_path, call):
    run = tmp_path / "run"
    error, shown = call(*tiny, "--data", reviews, "--limit", "200", "--epochs", "3", "--output", run)
    assert error is None and "200 rankings" in shown
    check_run(run)


def test_pairs_are_positive_before_negative_of_one_kind(reviews, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    script = runpy.run_path(str(SCRIPT), run_name="reward_model")
    review = script["Review"]
    given = [review(f"{mark}{kind}{i}", label, kind) for i in range(20) for label, mark in ((1, "好"), (0, "差"))
             for kind in ("书籍", "水果")]  # fmt: skip
    pairs = script["make_pairs"](given, 0)
    assert len(pairs) == 40 and len({answer for pair in pairs for answer in pair.answers}) == 80
    for pair in pairs:
        good, bad = pair.answers
        assert isinstance(pair, Ranking) and pair.prompt == ""
        assert (good[0], bad[0]) == ("好", "差") and good[1:3] == bad[1:3]
    assert script["make_pairs"](given, 0) == pairs != script["make_pairs"](given, 1)


def test_another_encoding_is_offered_and_taken(tiny, tmp_path, call):
    path, run = rankings_file(tmp_path, "gbk"), tmp_path / "run"
    error, _ = call(*tiny, "--rankings", path, "--output", run)
    assert f"error: {path}, line 1 is not utf-8" in error and "--encoding" in error
    error, _ = call(*tiny, "--rankings", path, "--encoding", "gbk", "--judge", "nowhere", "--output", run)
    assert "nowhere" in error and not run.exists()  # the rankings were read


@pytest.mark.parametrize(("arguments", "named"), [
    (["--rankings", "nowhere.tsv"], "nowhere.tsv"), (["--data", "nowhere"], "ChnSentiCorp_htl_all.csv"),
    (["--epochs", "0"], "epochs"), (["--steps", "0"], "steps"), (["--device", "abacus"], "abacus"),
    (["--judge", "nowhere"], "nowhere"), (["--policy", "nowhere"], "nowhere"),
    (["--trunk", "nowhere"], "nowhere"), (["--prompts", " "], "empty"),
    (["--output", "full"], "full exists and is not empty"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(tiny, tmp_path, call, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    source = [] if arguments[0] in ("--rankings", "--data") else ["--rankings", rankings_file(tmp_path)]
    before = sorted(tmp_path.rglob("*"))
    error, shown = call(*tiny, "--output", "run", *source, *arguments)
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error and named in error
    assert shown == "" and sorted(tmp_path.rglob("*")) == before


def test_a_source_of_rankings_is_needed(tiny, call):
    assert call(*tiny)[0] == 2  # argparse's own
