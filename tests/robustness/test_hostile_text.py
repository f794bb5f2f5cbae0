"""Prompts and texts that would steer a terminal, or break a line, a table or a page: shown and stored, never obeyed."""

import json
import runpy
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from conftest import VOCAB, make_bert, make_gpt2
from minirlhf import PPOTrainer, SentimentReward, Tokenizer
from minirlhf.common.text import printable
from minirlhf.evaluation.explanation import COLUMNS, READING, Explanation
from minirlhf.evaluation.findings import Pair, before_after_table
from minirlhf.evaluation.plots import plot_run
from minirlhf.io.files import read_json, read_jsonl, write_json
from minirlhf.runs.log import RunLog

TEXTS = {
    "controls": "".join(map(chr, [*range(32), *range(127, 160)])),
    "escape sequences": "a\x1b[2J\x1b]0;title\x07\x1b[31m\x9b5m\x9d0;x\x9c\x08\x08b",
    "line ends": "a\nb\r\nc\rd\x0be\x0cf\x1cg\x1dh\x1ei\x85j\u2028k\u2029l",
    "right to left": "\u202eevil\u202c \u2066x\u2069 \u200f\u061cعربى",
    "invisible": "a\u200b\u2060\ufeff\u00adb\U000e0041c",
    "emoji": "😀👩\u200d💻🇨🇳❤\ufe0f",
    "combining": "e" + "\u0301" * 1000,
    "lone surrogates": "a\ud800b\udfff\udcff",
    "markup": "|a|`b`*c* **d** _e_ ~~f~~ <script>g</script> [h](http://i) ![j](k) &lt; $l$ \\| \\\\| back\\",
    "JSON": '"}\n{"step": 99, "x": "\\u2028\\',
    "formula": "$\\frac{",
    "long": "酒店" * 50_000,
    "long and hostile": "\x1b[31m\u202e|\n" * 12_500,
}
every_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
STEERING = ("Cc", "Cf", "Cs", "Zl", "Zp")


def steers(text):
    return any(unicodedata.category(char) in STEERING for char in text)


# ---- terminal -------------------------------------------------------------------------------------------------------


def test_of_all_characters_none_that_steers_is_printed_and_every_other_is_itself():
    for char in map(chr, [*range(0x30000), *range(0xE0000, 0xE1000)]):  # in between is nothing assigned
        shown = printable(char)
        if shown == char:  # Python's own idea of printable, or a space, a private or an unassigned character
            assert char.isprintable() or unicodedata.category(char) in ("Zs", "Co", "Cn")
        else:
            assert not char.isprintable() and shown.isascii() and shown.isprintable() and shown.startswith("\\")


@every_text
def test_a_printed_text_is_one_line_that_any_terminal_can_take(text):
    shown = printable(text)
    assert not steers(shown) and len(shown.splitlines()) == 1
    assert shown.encode("utf-8")  # lone surrogates cannot be written at all


@every_text
def test_an_explanation_keeps_its_lines(text):
    token = {**dict.fromkeys(COLUMNS, 0.5), "token": text}
    lines = str(Explanation(text, 0.5, (token, token))).split("\n")
    assert len(lines) == 4 + READING.count("\n") + 1 and not any(map(steers, lines))


# ---- JSON -----------------------------------------------------------------------------------------------------------


@every_text
def test_a_logged_text_is_one_line_and_reads_back_as_it_was(tmp_path, text):
    log = RunLog(tmp_path)
    log.samples(1, [(text, 0.25), (text, 1.0)])
    marks = log.flush()
    log.samples(2, [("b", 0.5)])
    path = log.folder / "samples.jsonl"
    raw = path.read_bytes().decode()
    assert len(raw.splitlines()) == raw.count("\n") == 2  # also for a reader that ends lines at U+2028
    assert not steers(raw.replace("\n", ""))  # as `tail -f samples.jsonl` shows it
    expected = {"step": 1, "samples": [[text, 0.25], [text, 1.0]]}
    assert read_jsonl(path)[0] == json.loads(raw.splitlines()[0]) == expected
    RunLog.resume(tmp_path, marks, 1, {})
    assert path.read_bytes().decode() == raw.splitlines(keepends=True)[0]


@every_text
def test_a_text_in_a_json_file_reads_back_as_it_was(tmp_path, text):
    write_json(tmp_path / "x.json", {"text": text, "酒店": 1})
    assert read_json(tmp_path / "x.json") == {"text": text, "酒店": 1}
    assert "酒店" in (tmp_path / "x.json").read_text(encoding="utf-8")


# ---- table ----------------------------------------------------------------------------------------------------------


@every_text
def test_a_table_shows_a_text_as_it_is(text):
    """Rendered by a Markdown library, each cell holds the printable text and nothing else: no markup, no HTML."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable(["table", "strikethrough"])
    table = before_after_table([Pair(text[:20], "x" + text, 0.5, text[-20:], 0.75)])
    assert len(table.splitlines()) == 3 and not steers(table.replace("\n", ""))
    cells = [token for token in markdown.parse(table) if token.type == "inline"][5:]
    assert {part.type for cell in cells for part in cell.children} <= {"text", "text_special"}
    expected = [text[:20], "x" + text, "0.50", text[-20:], "0.75"]
    assert ["".join(part.content for part in c.children) for c in cells] == [printable(t).strip() for t in expected]


# ---- plot -----------------------------------------------------------------------------------------------------------

HISTORY = [
    {"step": i, "reward/mean": i / 4, "reward/std": 0.1, "objective/kl": 1.0 * i, "objective/entropy": 30.0 - i,
     "ppo/loss/value": 0.5, "tokens/response": 16.0}
    for i in range(1, 4)
]  # fmt: skip


def test_no_text_of_a_run_reaches_its_picture(tmp_path):
    """A title or legend made of it could be a formula that does not parse; and a file may have any name."""
    kind = pytest.importorskip("matplotlib.text").Text
    hostile = [{**line, **TEXTS, **dict.fromkeys(TEXTS.values(), 1.0)} for line in HISTORY]
    plain, shown = (sorted(text.get_text() for text in plot_run(run).findobj(kind)) for run in (HISTORY, hostile))
    assert shown == plain and "value loss" in plain
    plot_run(hostile, tmp_path / "$\\frac{\n.png")
    assert (tmp_path / "$\\frac{\n.png").read_bytes().startswith(b"\x89PNG")


# ---- a whole run ----------------------------------------------------------------------------------------------------

# What a model with such a vocabulary writes. A vocabulary file cannot hold line feeds and lone surrogates.
TOKENS = ["\x1b[2J", "\x9b31m", "\u202e", "\u2028", "\x85", "\x07", "|", "<b>", "`", "😀", "$\\frac{", "\\", '"',
          "\ufeff"]  # fmt: skip
PROMPTS = ["酒店\x1b[2J", "\u202e房间\u2028", "|很好|\n", "😀w", "a\udcffb"]


@pytest.fixture
def models(tmp_path):
    """A folder with policy/ and reward/, whose language model writes hostile tokens and little else."""
    tokenizer = Tokenizer([*VOCAB[: -len(TOKENS)], *TOKENS])
    policy = make_gpt2(0, n_embd=16, n_layer=1, n_head=2)
    with torch.no_grad():
        policy.ln_f.weight[0], policy.ln_f.bias[0] = 0.0, 4.0
        policy.wte.weight[:, 0] = torch.tensor([2.0 if token in TOKENS else -2.0 for token in tokenizer.vocab])
    policy.save_pretrained(tmp_path / "policy")
    make_bert(0, id2label={0: "negative", 1: "positive"}).save_pretrained(tmp_path / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(tmp_path / name)
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*labels in the right order")
def test_a_run_on_hostile_prompts_that_writes_hostile_texts(models, monkeypatch, capfd):
    """The example from its command line: what it prints and what it leaves steer nothing, and lose nothing."""
    pytest.importorskip("tqdm"), pytest.importorskip("matplotlib")
    script = Path(__file__).resolve().parents[2] / "examples" / "positive_reviews.py"
    run = models / "run"
    sizes = ["--steps", "10", "--batch-size", "10", "--group-size", "2", "--gen-len", "6"]
    folders = ["--policy", models / "policy", "--reward", models / "reward", "--output", run]
    monkeypatch.setattr(sys, "argv", [str(script), *map(str, folders), *sizes, "--prompts", *PROMPTS])
    runpy.run_path(str(script), run_name="__main__")
    out, err = capfd.readouterr()
    assert not any(steers(line) for line in out.split("\n"))
    assert not any(steers(line) for line in err.replace("\r", "\n").split("\n"))  # the progress bar goes back
    (line,) = read_jsonl(run / "samples.jsonl")
    texts = [text for text, _ in line["samples"]]
    assert all(text.startswith(tuple(PROMPTS)) for text in texts)
    assert sum(steers(text) for text in texts) >= 4  # or this test would show nothing
    for name in ("samples.jsonl", "metrics.jsonl"):
        assert len((run / name).read_text(encoding="utf-8").splitlines()) == 1
    table = (run / "before_after.md").read_text(encoding="utf-8")
    assert len(table.splitlines()) == 14 and not steers(table.replace("\n", ""))
    assert read_json(run / "config.json")["arguments"]["prompts"] == PROMPTS


def test_prompts_of_any_length_are_taken_or_refused_by_name(tokenizer):
    trainer = PPOTrainer(make_gpt2(0), make_gpt2(0), tokenizer, batch_size=2, gen_len=4, device="cpu")
    reward = SentimentReward(make_bert(0), tokenizer, device="cpu")
    for text in TEXTS.values():
        assert 0 <= reward([text]).item() <= 1  # a text of any length is scored
        try:
            trainer.check_prompts([text])
        except ValueError as error:
            assert "prompt" in str(error)
        else:
            rollout = trainer.collect([text], lambda texts: [0.0] * len(texts))
            assert rollout.texts[0].startswith(text)
