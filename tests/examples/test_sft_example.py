"""examples/sft_reviews.py, run as a user runs it, on models of a few kilobytes."""

import json
import random
import signal
from pathlib import Path

import pytest

from conftest import VOCAB
from minirlhf import GPT2, Tokenizer
from minirlhf.io.files import read_jsonl
from minirlhf.runs.run import Run

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "sft_reviews.py"
LETTERS = list("酒店周围位置前台房间")
RUN_FILES = {"config.json", "metrics.jsonl", "samples.jsonl", "summary.json", "checkpoints", "policy"}


@pytest.fixture(scope="session")
def given(tiny) -> list[str]:
    """Arguments with a small random model, and three epochs of a few steps."""
    sizes = ["--max-length", "32", "--tokens-per-batch", "200", "--gen-len", "4", "--device", "cpu", "--lr", "0.01"]
    return ["--model", str(tiny / "policy"), *sizes, "--save-freq", "3"]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Prompts, each with the response that says it backwards."""
    rng, path = random.Random(0), tmp_path_factory.mktemp("data") / "pairs.jsonl"
    prompts = ["".join(rng.choices(LETTERS, k=rng.randint(3, 8))) for _ in range(60)]
    lines = [json.dumps({"prompt": p, "response": p[::-1]}, ensure_ascii=False) for p in prompts]
    path.write_bytes(("\ufeff" + "\r\n".join(lines)).encode())
    return path


def check_run(run, shown: str) -> None:
    assert {path.name for path in run.iterdir()} == RUN_FILES
    metrics = read_jsonl(run / "metrics.jsonl")
    steps = [line for line in metrics if "sft/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1)) and steps[-1]["sft/progress"] == 1
    measured = [line for line in metrics if "perplexity/token" in line]
    assert [m["step"] for m in measured] == sorted({*range(0, len(steps), 3), len(steps)})
    samples = read_jsonl(run / "samples.jsonl")
    assert [line["step"] for line in samples] == [m["step"] for m in measured]
    assert [text[:2] for text, score in samples[0]["samples"]] == ["酒店", "周围", "位置", "前台"]
    summary = json.loads((run / "summary.json").read_text())["perplexity a character"]
    assert summary == {"before": measured[0]["perplexity/character"], "after": measured[-1]["perplexity/character"]}
    assert summary["after"] < 0.7 * summary["before"]
    assert f"step {len(steps)}: held-out perplexity {measured[-1]['perplexity/token']:.2f} a token" in shown
    assert f"    {samples[-1]['samples'][0][0]}" in shown
    assert GPT2.from_pretrained(run / "policy").config.n_positions == 32
    assert Tokenizer.from_pretrained(run / "policy").vocab == VOCAB


@pytest.mark.parametrize("more", [[], ["--packing", "--accumulation", "2", "--precision", "bf16"]])
def test_pairs_of_one_s_own(given, data, tmp_path, call, more):
    run = tmp_path / "run"
    error, shown = call(SCRIPT, *given, "--texts", data, *more, "--output", run)
    assert error is None
    check_run(run, shown)
    assert ("; precision: bf16\n" if more else "; precision auto: fp32 (the model has fewer than ") in shown
    (last, *_) = sorted((run / "checkpoints").iterdir(), reverse=True)
    assert json.loads((last / "training.json").read_text())["config"]["packing"] == bool(more)


def test_held_out_texts_of_one_s_own(given, tmp_path, call):
    rng = random.Random(1)
    for name, count in (("good.txt", 90), ("more.txt", 30)):
        (tmp_path / name).write_text("".join("好" + "".join(rng.choices(LETTERS, k=12)) + "\n" for _ in range(count)))
    run, files = tmp_path / "run", ["--texts", tmp_path / "good.txt", "--held-out", tmp_path / "more.txt"]
    error, shown = call(SCRIPT, *given, *files, "--limit", "60", "--epochs", "4", "--output", run)
    assert error is None and f"{run}: 60 demonstrations, 30 held out" in shown
    check_run(run, shown)


def test_a_run_that_was_asked_to_stop_says_how_it_goes_on(given, data, tmp_path, call, monkeypatch):
    record, run, output = Run.record, tmp_path / "run", tmp_path / "other"

    def interrupted(self, *step):
        if self.trainer.steps_done == 3:
            signal.raise_signal(signal.SIGINT)
        return record(self, *step)

    with monkeypatch.context() as patched:
        patched.setattr(Run, "record", interrupted)
        error, shown = call(SCRIPT, *given, "--texts", data, "--output", run)
    assert error is None and "stopped after step 3 of " in shown and f"--resume {run}" in shown
    assert read_jsonl(run / "metrics.jsonl")[-1]["step"] == 3 and not (run / "lock").exists()
    error, shown = call(SCRIPT, "--resume", run)
    assert error is None and "step 0:" not in shown
    assert call(SCRIPT, *given, "--texts", data, "--output", output)[0] is None
    assert (run / "metrics.jsonl").read_bytes() == (output / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("content", "name", "named"), [
    ("酒店很好\n".encode("gbk"), "d.txt", "d.txt, line 1 is not utf-8"),
    ("酒店\n".encode() + "酒店很好\n".encode("gbk"), "d.txt", "d.txt, line 2 is not utf-8"),
    (b'{"text": "a"}\n{"text": ""}\n', "d.jsonl", "d.jsonl, line 2: the text is empty"),
    (b'{"text": "a"}\n\n{"text": \n', "d.jsonl", "d.jsonl, line 3: this is not valid JSON"),
    (b"a\n", "d.csv", "must be named .txt"), (b"", "d.txt", "holds no texts"), (b"a\n", "d.txt", "give more data"),
])  # fmt: skip
def test_bad_data_is_one_line_and_writes_nothing(given, tmp_path, call, content, name, named):
    (tmp_path / name).write_bytes(content)
    error, shown = call(SCRIPT, *given, "--texts", tmp_path / name, "--output", tmp_path / "run")
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error and named in error
    assert shown == "" and [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(("arguments", "named"), [
    (["--texts", "nowhere.txt"], "nowhere.txt"), (["--held-out", "nowhere.txt"], "nowhere.txt"),
    (["--resume", "nowhere"], "nowhere"), (["--model", "nowhere"], "nowhere"), (["--epochs", "0"], "epochs"),
    (["--precision", "fp8"], "precision"), (["--save-freq", "0"], "save_freq"),
    (["--accumulation", "0"], "accumulation"), (["--prompts", ""], "empty"), (["--gen-len", "32"], "leaves no room"),
    (["--encoding", "klingon"], "klingon"), (["--output", "full"], "full exists and is not empty"),
])  # fmt: skip
def test_bad_arguments_are_one_line_and_write_nothing(given, data, tmp_path, call, monkeypatch, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    source = [] if arguments[0] in ("--texts", "--resume") else ["--texts", data]
    error, _ = call(SCRIPT, *given, "--output", "run", *source, *arguments)
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error and named in error
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")} == {"full", "full/thesis.txt"}


def test_texts_or_a_run_are_needed(given, call):
    assert call(SCRIPT, *given)[0] == 2  # argparse has said why
