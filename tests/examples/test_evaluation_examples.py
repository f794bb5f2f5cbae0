"""The examples of evaluation, as a user runs them, on models of a few kilobytes and reviews made up here."""

import csv
import json
import random
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from conftest import VOCAB, make_bert, make_gpt2
from folders import snapshot
from minirlhf import NGramScorer, SentimentReward, Tokenizer
from minirlhf.rewards.sentiment import CANARIES

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script by its own `__main__`: exit code or message, and what it printed."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        try:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        except SystemExit as stopped:
            return stopped.code, capsys.readouterr().out
        return 0, capsys.readouterr().out

    return run


# ---- frontier.py ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("models"), Tokenizer(VOCAB)
    make_gpt2(0, scale=3.0, n_embd=16, n_layer=1, n_head=2, n_positions=32).save_pretrained(folder / "policy")
    bert = make_bert(0, id2label={0: "negative", 1: "positive"})
    good, bad = SentimentReward(bert, tokenizer, device="cpu")(list(CANARIES)).tolist()
    if good <= bad:
        with torch.no_grad():
            bert.classifier.weight.neg_()
    bert.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    NGramScorer({"好": 2.0, "差": -2.0}, 0.0).save_pretrained(folder / "second")
    return folder


def options(models):
    return ["--policy", models / "policy", "--reward", models / "reward", "--second-scorer", models / "second",
            "--steps", 128, "--samples", 16]  # fmt: skip


def test_the_frontier_has_a_row_for_each_coefficient_and_n(call, models, tmp_path):
    pytest.importorskip("matplotlib")
    code, out = call(
        "frontier.py", *options(models), "--kl-coefs", 0.5, 0.1, 0.1, "--output", tmp_path / "new" / "sweep"
    )
    assert code == 0
    written = tmp_path / "new" / "sweep"
    assert {path.name for path in written.iterdir()} == {"frontier.md", "frontier.png", "second_scorer.png"}
    table = (written / "frontier.md").read_text(encoding="utf-8")
    assert table in out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == [
        "PPO, β = 0.1", "PPO, β = 0.5", "reference", "best of 2", "best of 4", "best of 8", "best of 16",
    ]  # fmt: skip
    assert {len(row) for row in rows} == {6}
    for row in rows[2:]:
        assert all(re.fullmatch(r"0\.\d{3} \[0\.\d{3}, 0\.\d{3}\]", cell) for cell in row[2:4]), row
    assert [row[1] for row in rows[-4:]] == ["0.19", "0.64", "1.20", "1.84"]
    assert (written / "frontier.png").read_bytes()[:4] == (written / "second_scorer.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--policy", "nowhere"], "nowhere.* does not exist"), (["--second-scorer", "nowhere"], "nowhere.* does not exist"),
    (["--kl-coefs", "-1"], "PPOConfig.init_kl_coef must be .*, got -1.0"), (["--steps", "0"], "PPOConfig.steps"),
    (["--top-p", "2"], "top_p must be"), (["--samples", "1"], "samples must be at least 2, got 1"),
])  # fmt: skip
def test_bad_input_to_the_sweep_is_one_line_and_writes_nothing(call, models, tmp_path, arguments, message):
    pytest.importorskip("matplotlib")
    code, out = call("frontier.py", *options(models), "--output", tmp_path / "sweep", *arguments)
    assert out == "" and re.fullmatch(rf"error: .*{message}.*", code)
    assert snapshot(tmp_path) == {}


def test_a_sweep_is_never_overwritten(call, models, tmp_path):
    pytest.importorskip("matplotlib")
    code, _ = call("frontier.py", *options(models), "--output", tmp_path)
    assert re.fullmatch("error: .*exists.*", code) and snapshot(tmp_path) == {}


# ---- train_ngram_scorer.py ------------------------------------------------------------------------------------------

GOOD, BAD = ["房间很干净", "服务态度很好", "早餐丰富", "非常满意"], ["房间太脏", "服务很差", "早餐难吃", "非常失望"]
FILLER = "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The two CSV files, with reviews whose sentiment stands in two phrases among characters at random."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def review(label):
        words = draw.sample(GOOD if label else BAD, 2) + ["".join(draw.choices(FILLER, k=8)) for _ in range(3)]
        draw.shuffle(words)
        return "，".join(words)

    for name, columns in (("ChnSentiCorp_htl_all.csv", 2), ("online_shopping_10_cats.csv", 3)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["cat", "label", "review"][-columns:])
            writer.writerows([["书籍", i % 2, review(i % 2)][-columns:] for i in range(600)])
    return folder


def test_the_scorer_is_fitted_on_the_held_out_part_and_measured_on_what_it_has_not_seen(call, data, tmp_path):
    pytest.importorskip("sklearn")
    code, out = call("train_ngram_scorer.py", "--data", data, "--output", tmp_path / "scorer")
    assert code == 0
    figures = json.loads(out)
    assert 80 <= figures["reviews"] <= 160 and figures["reviews"] + figures["reviews of the other part"] > 1000
    for name in ("cross-validated, whole", "on the other part, whole"):
        assert figures[name] > 0.95
    for part in ("whole", "openings"):
        folds = figures[f"of each fold, {part}"]
        assert len(folds) == 5 and figures[f"cross-validated, {part}"] == pytest.approx(sum(folds) / 5, abs=1e-3)
    scorer = NGramScorer.from_pretrained(tmp_path / "scorer")
    assert len(scorer.weights) == figures["n-grams"]
    assert scorer(["".join(GOOD), "".join(BAD)]).tolist() == pytest.approx([1, 0], abs=0.2)


def test_it_learns_nothing_where_there_is_nothing_to_learn(call, data, tmp_path):
    """With labels at random the accuracies are those of a coin: nothing that is measured was fitted on."""
    pytest.importorskip("sklearn")
    draw = random.Random(1)
    for path in data.iterdir():
        rows = list(csv.reader(path.open(encoding="utf-8", newline="")))
        with (tmp_path / path.name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([rows[0]] + [[*r[:-2], draw.randint(0, 1), r[-1]] for r in rows[1:]])
    figures = json.loads(call("train_ngram_scorer.py", "--data", tmp_path, "--output", tmp_path / "scorer")[1])
    assert abs(figures["cross-validated, whole"] - 0.5) < 0.2  # about 110 reviews: 4 standard errors
    assert abs(figures["on the other part, whole"] - 0.5) < 0.08  # about 1,000


def test_without_its_data_it_says_so(call, tmp_path):
    pytest.importorskip("sklearn")
    code, out = call("train_ngram_scorer.py", "--data", tmp_path / "nowhere", "--output", tmp_path / "scorer")
    assert out == "" and re.fullmatch("error: .*nowhere.* is missing; .*", code) and snapshot(tmp_path) == {}
