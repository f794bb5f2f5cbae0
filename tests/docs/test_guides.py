"""The Python of the guides runs as it stands, on models of a few kilobytes; the Chinese pages have the same.

A training ends after its first step.
"""

import builtins
import re
import shutil

import pytest
from test_readme import blocks, links, read

from minirlhf import PPOConfig
from minirlhf.io import starter as starter_weights

STARTER = dict(policy="gpt2-chinese-reviews-small", reward="bert-chinese-reviews-sentiment-small",
               second="ngrams-chinese-reviews-sentiment")  # fmt: skip
GUIDES = ["tutorial", "rewards", "prompts", "judge", "people", "machines", "curves", "from_the_book", "from_trl"]
PAGES = [f"docs/{name}.md" for name in (*GUIDES, "guide", "algorithms")]


@pytest.fixture
def beside_weights(tiny, tmp_path, monkeypatch):
    """A folder to work in, where weights/ holds tiny models under the names of the starter weights."""
    for name, folder in STARTER.items():
        shutil.copytree(tiny / name, tmp_path / "weights" / folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(read(page), "python")])
def test_the_blocks_of_a_page_run_one_after_the_other(page, beside_weights, monkeypatch, capsys):
    """A block may need those before it. Where `print(...)` has a comment [...], that is what it prints."""
    if "plot_run" in read(page):
        pytest.importorskip("matplotlib")
    monkeypatch.setattr(PPOConfig, "iterations", 1)
    monkeypatch.setattr(starter_weights, "CHECKOUT", beside_weights / "weights")
    monkeypatch.setattr(builtins, "input", lambda text: str(1 + len(text) % 5))
    names, code = {"__name__": "__main__"}, blocks(read(page), "python")
    for block in code:
        exec(compile(block, page, "exec"), names)
    printed = capsys.readouterr().out
    for promised in re.findall(r"print\(.*\)  # (\[.*?\])", "\n".join(code)):
        assert promised in printed


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
