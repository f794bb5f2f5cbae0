"""The card: front matter that YAML reads, a table that no text breaks, and nobody's own README overwritten."""

import json
import math
import re

import pytest
import yaml

from minirlhf import __version__
from minirlhf.common.printing import markdown
from minirlhf.common.text import printable
from minirlhf.io.model_card import CLASSES, OURS, ModelCard, Origin, write_card

HOSTILE = [
    "a | b", "a || b\\", "\\|", "\\\\|", "`code | more`", "``", "line\nnext", "a\r\nb", "a\u2028b\x0b\x0c\x85c",
    "\n\n# title",
    "</td></table><script>alert(1)</script>", "<!-- ", "[text](javascript:alert(1))", "![x](http://x/y.png)", "a\t|\tb",
    "&#124; &lt;b&gt;", "$$x$$", "*bold* ~~gone~~", "\u202egpj.exe", "\x00\x1b[31m", "---", "| --- |",
    "```\n```", "[^1]", "\ud800", "酒店 😀", "", " ", "|",
]  # fmt: skip


def front_matter(text: str) -> dict:
    head = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    return yaml.safe_load(head[1])


def table(text: str) -> list[list[str]]:
    """The body cells of the only table as a Markdown parser sees them; nothing but text may be in them."""
    tokens = (
        pytest.importorskip("markdown_it")
        .MarkdownIt("commonmark", {"html": True})
        .enable(["table", "strikethrough"])
        .parse(text)
    )
    rows, inside = [], False
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        inside |= token.type == "tbody_open"
        if inside and token.type == "tr_open":
            rows.append([])
        if inside and token.type == "td_open":
            assert {child.type for child in following.children} <= {"text", "text_special"}
            rows[-1].append("".join(child.content for child in following.children))
    assert [token.type for token in tokens].count("table_open") == 1 and tokens[-1].type == "table_close"
    return rows


def body(text: str) -> str:
    return text.split(OURS)[1]


@pytest.mark.parametrize("text", HOSTILE, ids=ascii)
def test_no_text_breaks_out_of_the_table(text):
    summary = {"first": 1, text: text + "x", "last": 2}
    row = [printable(text).strip(), printable(text + "x").strip()]
    assert table(body(ModelCard("GPT2", None, summary).text())) == [["first", "1"], row, ["last", "2"]]


def test_values_are_shown_as_json_and_numbers_short():
    summary = {"reward": 0.9130434782608695, "steps": 1280, "done": True, "none": None, "prompts": ["酒店", "|"],
               "kl": math.nan, "sampling": {"top_k": 5}}  # fmt: skip
    assert [value for _, value in table(body(ModelCard("GPT2", None, summary).text()))] == [
        "0.913043", "1280", "true", "null", '["酒店", "|"]', "nan", '{"top_k": 5}',
    ]  # fmt: skip


@pytest.mark.parametrize("model_class", CLASSES)
def test_a_card_says_what_it_is_and_how_to_load_it(model_class):
    text = ModelCard(model_class).text()
    assert front_matter(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation" if model_class in ("GPT2", "Llama", "ActorCritic") else "text-classification",
        "tags": ["minirlhf"],
    }
    assert f"from minirlhf import {model_class}\n" in text and __version__ in text
    assert "Training" not in text


@pytest.mark.parametrize(("name", "known"), [
    ("uer/gpt2-chinese-cluecorpussmall", True), ("gpt2-folder", False), ('a/b"\nlicense: x', True), ("a/b: #c", True),
])  # fmt: skip
def test_the_base_model_is_named_and_linked_if_it_is_on_the_hub(name, known):
    text = ModelCard("GPT2", Origin(name, {})).text()
    assert front_matter(text).get("base_model") == (name if known else None)
    assert len(front_matter(text)) == 3 + known
    assert f"made from {markdown(name)}, saved by minirlhf" in text


def test_metadata_are_texts_that_give_the_summary_back():
    summary = {"reward": 0.9, "prompts": ["酒店"], "note": "a | b"}
    metadata = ModelCard("GPT2", Origin("uer/gpt2", {}), summary).metadata()
    assert metadata.pop("library") == f"minirlhf {__version__}"
    assert json.loads(metadata.pop("training")) == summary
    assert metadata == {"base_model": "uer/gpt2"}
    assert ModelCard("GPT2").metadata().keys() == {"library"}


@pytest.mark.parametrize("summary", [{"a": object()}, {"a": {1, 2}}, {("a", "b"): 1}, ["a"], "text", 3])
def test_a_summary_that_is_not_json_is_refused(summary):
    with pytest.raises(ValueError, match="summary must map names to JSON values"):
        ModelCard("GPT2", None, summary)


def test_a_readme_that_is_not_ours_stays(tmp_path):
    path = tmp_path / "README.md"
    write_card(tmp_path, ModelCard("GPT2", None, {"run": 1}))
    write_card(tmp_path, ModelCard("GPT2", None, {"run": 2}))
    assert "| run | 2 |" in path.read_text()
    for own in (path.read_text().replace(OURS, ""), "# My model\n", "", b"\xff\xfe".decode("latin1")):
        path.write_text(own)
        write_card(tmp_path, ModelCard("GPT2", None, {"run": 3}))
        assert path.read_text() == own


def test_an_origin_does_not_tell_where_a_folder_lies(tmp_path, monkeypatch):
    folder = tmp_path / "gpt2-small"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for source in (folder, str(folder), f"{folder}/", "../gpt2-small", "."):
        assert Origin.of(source, {}).name == "gpt2-small"
    assert Origin.of("uer/gpt2-chinese-cluecorpussmall", {}).name == "uer/gpt2-chinese-cluecorpussmall"
