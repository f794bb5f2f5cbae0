"""The Python of the guides runs as it stands, on models of a few kilobytes; the Chinese pages have the same.

A training ends after its first step.
"""

import ast
import builtins
import json
import re
import shlex
import shutil
import socket
import string
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from bpe import write_published
from test_readme import blocks, links, read, substitute

from conftest import make_gpt2
from minirlhf import PPOConfig, load_decoder
from minirlhf.commands.main import main
from minirlhf.io import starter as starter_weights
from minirlhf.io.files import read_jsonl

STARTER = dict(policy="gpt2-chinese-reviews-small", reward="bert-chinese-reviews-sentiment-small",
               second="ngrams-chinese-reviews-sentiment")  # fmt: skip
GUIDES = ["tutorial", "faq", "rewards", "prompts", "judge", "people", "machines", "curves", "from_the_book", "from_trl"]
PAGES = [f"docs/{name}.md" for name in (*GUIDES, "guide", "algorithms")]


@pytest.fixture
def beside_weights(tiny, tmp_path, monkeypatch):
    """A folder to work in, where weights/ holds tiny models in the place of the starter weights, and a run is in runs/.

    A training ends after its first step.
    """
    for name, folder in STARTER.items():
        shutil.copytree(tiny / name, tmp_path / "weights" / folder)
    (tmp_path / "runs/mine").mkdir(parents=True)
    lines = [json.dumps({"step": step, "reward/mean": 0.1 * step, "objective/kl": 0.2 * step}) for step in (1, 2)]
    (tmp_path / "runs/mine/metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(PPOConfig, "iterations", 1)
    monkeypatch.setattr(starter_weights, "CHECKOUT", tmp_path / "weights")
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page), "python")])
def test_the_blocks_of_a_page_run_one_after_the_other(page, beside_weights, monkeypatch, capsys):
    """A block may need those before it. Where `print(...)` has a comment [...], that is what it prints."""
    if "plot_run" in read(page):
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(builtins, "input", lambda text: str(1 + len(text) % 5))
    names, code = {"__name__": "__main__"}, blocks(read(page), "python")
    for block in code:
        exec(compile(block, page, "exec"), names)
    printed = capsys.readouterr().out
    for promised in re.findall(r"print\(.*\)  # (\[.*?\])", "\n".join(code)):
        assert promised in printed


def test_the_judge_behind_http_scores_a_run(beside_weights, monkeypatch):
    """The page's script, server and command, on a free port."""
    page = read("docs/judge.md")
    (script,) = (block for block in blocks(page, "python") if "urllib" in block)
    (server,) = blocks(page, "py")
    (command,) = (block for block in blocks(page, "sh") if "http_judge" in block)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for name, code in {"http_judge.py": script, "judge_server.py": server}.items():
        Path(name).write_text(substitute(code, "8123", str(port)), encoding="utf-8")
    monkeypatch.setattr(sys, "path", sys.path.copy())
    with open("asked", "w") as log, subprocess.Popen([sys.executable, "judge_server.py"], stderr=log) as process:
        try:
            while process.poll() is None:
                with socket.socket() as there:
                    if there.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.05)
            assert main(shlex.split(command)[1:]) == 0
        finally:
            process.kill()
    assert Path("asked").read_text().count("POST /score") == PPOConfig().batch_size  # no evaluation
    (line,) = read_jsonl("runs/http-judge/samples.jsonl")
    assert [score for _, score in line["samples"]] == [min(2, text.count("，")) / 2 for text, _ in line["samples"]]
    assert 0 < read_jsonl("runs/http-judge/metrics.jsonl")[0]["reward/mean"] < 1


def test_the_english_task_of_trl_users_runs(beside_weights, capsys):
    """On a tiny GPT-2 with a byte-level vocabulary, and transformers' pipeline with a tiny DistilBERT."""
    transformers = pytest.importorskip("transformers")
    (script,) = (block for block in blocks(read("docs/from_trl.md"), "py") if "load_decoder" in block)
    policy, judge = (Path("weights", name) for name in re.findall("download (.*) --to", read("docs/from_trl.md")))
    make_gpt2(vocab_size=400, n_embd=16, n_layer=1, n_head=2).save_pretrained(write_published(policy))
    judge.mkdir(parents=True)
    letters = [*string.ascii_lowercase, *(f"##{letter}" for letter in string.ascii_lowercase)]
    (judge / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    transformers.DistilBertTokenizer(str(judge / "vocab.txt")).save_pretrained(judge)
    sizes = dict(vocab_size=5 + len(letters), dim=16, hidden_dim=16, n_layers=1, n_heads=2)
    labels = {"NEGATIVE": 0, "POSITIVE": 1}
    config = transformers.DistilBertConfig(**sizes, label2id=labels, id2label={i: name for name, i in labels.items()})
    with torch.random.fork_rng():
        transformers.DistilBertForSequenceClassification(config).save_pretrained(judge)
    exec(compile(script, "from_trl.md", "exec"), {"__name__": "__main__"})
    assert len(ast.literal_eval(capsys.readouterr().out)) == 3  # texts
    assert load_decoder("runs/english/policy").config.vocab_size == 400
    assert 0 < read_jsonl("runs/english/metrics.jsonl")[0]["reward/mean"] < 1


def test_the_tutorial_shows_what_the_starter_weights_say(capsys):
    page = read("docs/tutorial.md")
    names, shown = {}, blocks(page, "text")
    for block in blocks(page, "python")[: len(shown)]:
        exec(compile(block, "tutorial.md", "exec"), names)
    assert capsys.readouterr().out == "".join(shown)


@pytest.mark.parametrize("name", GUIDES)
def test_a_chinese_page_is_its_english_one(name):
    """The same code, commands, links, headings, tables and lists; and in Chinese."""
    english, chinese = read(f"docs/{name}.md"), read(f"docs/{name}.zh-CN.md")

    def code(text):
        """Without comments, and texts in the code that are for people."""
        found = blocks(text, "(?:python|py|sh)")
        return [re.sub(r"\s*#.*", "", line) for block in found for line in block.splitlines()]

    for found in (
        code,
        lambda text: [re.sub(r"\.zh-CN|#.*", "", link) for link in links(text)],
        lambda text: [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)],
        lambda text: [line.count("|") for line in text.splitlines() if line.startswith("|")],
        lambda text: len(re.findall(r"^(?:- |\d+\. )", text, re.MULTILINE)),
    ):
        assert found(chinese) == found(english)
    prose = re.sub(r"^```.*?^```$", "", chinese, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^(?:#+ |- |\d+\. ).*", prose, re.MULTILINE)
    assert [line for line in lines if not re.search("[一-鿿]", line)] == []
