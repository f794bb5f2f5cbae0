"""The HTML report: whole, self-contained, and no text of a run is more than a text in it."""

import base64
import dataclasses
import re
import sys
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from test_findings import EQUAL, FINE, after, changed, sure
from test_hostile_text import HISTORY, TEXTS, every_text, steers
from test_optimum_frontier import UNIFORM

from minirlhf.common.text import printable
from minirlhf.evaluation.findings import Evaluation, Pair, symptoms
from minirlhf.evaluation.plots import FrontierPoint, draw_frontier, plot_run
from minirlhf.evaluation.report import report
from minirlhf.evaluation.report_texts import Texts
from minirlhf.evaluation.statistics import Estimate

pytest.importorskip("matplotlib")

VOID = {"meta", "img", "br"}
PAIR = Pair("酒店", "房间不好", 0.1, "房间很好", 0.9)
POINTS = tuple(dataclasses.replace(EQUAL, n=n, kl=kl) for n, kl in ((2, 0.19), (4, 0.64), (8, 1.2), (16, 1.84)))


class Page(HTMLParser):
    """Elements with their attributes, and texts; every tag that opens closes, in order."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.texts, self.stack = [], [], []
        self.feed(text)
        self.close()
        assert not self.stack

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if "style" not in self.stack:
            self.texts.append(data)

    def __contains__(self, text):
        return any(text in found for found in self.texts)


def evaluation(pairs=(PAIR,), held_out=True, found=(), settings=None):
    x = dataclasses.replace(FINE, best_of_n=POINTS, pairs=tuple(pairs))
    return Evaluation(settings or {"samples": 1}, x, x if held_out else None, tuple(found))


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without the time that pictures take."""
    monkeypatch.setattr("minirlhf.evaluation.report.draw_frontier", lambda *given: b"drawn")
    drawn = SimpleNamespace(_repr_png_=lambda: b"drawn")
    monkeypatch.setattr("minirlhf.evaluation.report.plot_run", lambda *given: drawn)


def test_it_has_the_figures_pictures_and_samples():
    page = Page(report(evaluation(found=["the samples are alike"]), "A run", {"policy": "runs/a"}, HISTORY, 6.0))
    for text in ("A run", "the samples are alike", "房间不好", "房间很好", "policy: "[:6], "runs/a", "self-BLEU",
                 "On the given prompts", "On the held-out prompts", "best of 16", "0.600"):  # fmt: skip
        assert text in page, text
    images = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 5  # reward and second scorer on both lists of prompts, and the curves
    for source in images:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"))[:8] == b"\x89PNG\r\n\x1a\n"
    assert [tag for tag, _ in page.elements].count("table") == 4


def test_it_begins_with_samples_a_few_and_the_rest_folded(undrawn):
    text = report(evaluation(found=["the samples are alike"]), "A run", history=HISTORY)
    order = [
        text.index(part)
        for part in (
            "<h1>",
            "Samples on the given",
            "Samples on the held-out",
            "<h2>Findings",
            "the samples are alike",
            "On the given prompts</h2>",
            "Settings</h2>",
        )
    ]
    assert order == sorted(order)
    pairs = evaluation().given.pairs
    many = dataclasses.replace(evaluation(), given=dataclasses.replace(evaluation().given, pairs=pairs * 30))
    shown, folded, _ = re.split("<details>|</details>", report(many, history=HISTORY), maxsplit=2)
    assert (shown.count('class="pair"'), folded.count('class="pair"')) == (6, 18)


def test_without_second_scorer_held_out_prompts_and_run_it_has_less():
    x = after(second=None)
    x = dataclasses.replace(x, reference=dataclasses.replace(x.reference, second=None), second_gain=None,
                            best_of_n=POINTS, equal_kl=None, ahead=None)  # fmt: skip
    page = Page(
        report(Evaluation({"eos_token_id": None, "sampling": {"top_p": 0.75}}, x, None, ()), "t", {"run": None})
    )
    assert "0.75" in page and "top_p" in page
    assert "None" not in page and "eos_token_id" not in page and "sampling" not in page
    assert "No symptom of reward hacking was found." in page and "On the held-out prompts" not in page
    assert [tag for tag, _ in page.elements].count("img") == 1
    assert "The policy's KL of 1.60 is beyond what best-of-n was drawn for" in page


def test_it_is_self_contained_and_a_phone_can_show_it(undrawn):
    text = report(evaluation(), history=HISTORY)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "form", "base"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        assert not {"href", "srcset", "style", "onload", "onerror"} & attributes.keys(), tag
        assert attributes.get("src", "data:").startswith("data:image/png;base64,") or "src" not in attributes
    assert "url(" not in text and "@import" not in text and "http:" not in text and "https:" not in text
    metas = [attributes for tag, attributes in page.elements if tag == "meta"]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in metas
    (policy,) = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert {"charset": "utf-8"} in metas and text.index("charset") < 200


@every_text
def test_a_hostile_text_is_shown_and_never_obeyed(text, undrawn):
    """In every place that texts of a run can reach. (No picture is one: see below.)"""
    text = text[:4000]
    pair = Pair(text, text, 0.5, text, 0.75)
    found = evaluation([pair], False, [text], {text: text})
    found = dataclasses.replace(found, given=dataclasses.replace(found.given, prompts=(text,)))
    raw = report(found, text, {"policy": text}).encode("utf-8").decode("utf-8")  # lone surrogates could not be written
    assert not steers(raw.replace("\n", ""))
    page, plain = Page(raw), Page(report(evaluation([PAIR], False, ["x"], {"a": 1}), "t", {"policy": "x"}))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in plain.elements]  # no element more
    assert sum(printable(text) in found for found in page.texts) >= 8
    assert all(a["alt"] in {p["alt"] for t, p in plain.elements if t == "img"} for t, a in page.elements if t == "img")


def test_of_all_samples_the_first_are_shown(undrawn, monkeypatch):
    monkeypatch.setattr("minirlhf.evaluation.report.MORE_ROWS", 7)
    page = Page(report(evaluation([dataclasses.replace(PAIR, after=f"text {i};") for i in range(9)], held_out=False)))
    assert "text 6;" in page and "text 7;" not in page


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib \(minirlhf's extra examples\)"):
        report(evaluation())


# ---- the frontier ---------------------------------------------------------------------------------------------------


def test_a_label_is_a_text_and_not_a_formula():
    curve = [FrontierPoint("n = 1", 0.0, sure(0.5)), FrontierPoint("2", 0.19, sure(0.6))]
    for label in ("$", TEXTS["formula"], TEXTS["markup"][:20]):
        picture = draw_frontier(curve, [FrontierPoint(label, 1.0, sure(0.9))], label)
        assert picture[:4] == b"\x89PNG"


def test_what_is_drawn_depends_on_every_point():
    curve = [FrontierPoint("n = 1", 0.0, sure(0.5)), FrontierPoint("2", 0.19, sure(0.6))]
    policy = [FrontierPoint("beta 0.1", 1.0, sure(0.9))]
    wide = [FrontierPoint("beta 0.1", 1.0, Estimate(0.9, 0.7, 0.95))]
    optimum = UNIFORM.curve(3)
    pictures = [draw_frontier(curve, policy), draw_frontier(curve[:1], policy), draw_frontier(curve, wide),
                draw_frontier(curve, []), draw_frontier(curve, policy, "second scorer"),
                draw_frontier(curve, policy, optimum=optimum), draw_frontier(curve, policy, optimum=optimum[:-1]),
                draw_frontier(curve, policy, distribution="in the full softmax")]  # fmt: skip
    assert len(set(pictures)) == 8
    with pytest.raises(ValueError, match="best_of_n is empty"):
        draw_frontier([], policy)


def test_the_curves_of_a_run_have_the_kl_that_its_rewards_would_need(tmp_path):
    optimum, beyond = UNIFORM.curve(3), [{**line, "reward/mean": 2.0, "ppo/loss/value": None} for line in HISTORY]
    labels = [line.get_label() for ax in plot_run(HISTORY, None, None, optimum).axes for line in ax.lines]
    assert "needed by the optimum for this reward" in labels
    plot_run(beyond, tmp_path / "run.png", None, optimum)  # nothing is drawn there, and nothing fails
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_an_empty_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        plot_run([], tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()


def test_the_report_and_the_tables_have_the_optimum(undrawn):
    spending = UNIFORM.spent(sure(0.8), sure(1.6), 0.15)
    x = dataclasses.replace(FINE, best_of_n=POINTS, spending=spending, frontier=tuple(UNIFORM.curve(3)))
    page = Page(report(Evaluation({}, x, None, ())))
    for text in ("KL exact that the optimum needs", f"{spending.efficiency:.2f}", f"Optimum: {spending}"):
        assert text in page
    lines = "\n".join(Evaluation({}, x, None, ()).lines())
    assert f"optimum: {spending}" in lines and f"{spending.efficiency:.3f}" in lines
    without = dataclasses.replace(x, spending=None, no_optimum="all 9 rewards are 1: every policy is as good")
    assert "optimum: all 9 rewards are 1" in "\n".join(Evaluation({}, without, None, ()).lines())


# ---- the tables -----------------------------------------------------------------------------------------------------


def test_the_tables_of_a_terminal_have_the_same_figures():
    x = dataclasses.replace(FINE, best_of_n=POINTS)
    lines = list(Evaluation({}, x, None, ("odd",)).lines())
    assert lines[0] == "given prompts" and lines[-1] == "! odd"
    names = [line.split("  ")[1] for line in lines if line.startswith("  best of")]
    assert [name.split(",")[0] for name in names] == [f"best of {n}" for n in ("2", "4", "8", "12.00", "16")]
    (distinct,) = [line.split() for line in lines if "distinct-2" in line]
    assert distinct == ["distinct-2,", "by", "character", "0.480", "0.400"]
    assert any("equal KL: -0.050 [-0.070, -0.030]" in line for line in lines)
    assert list(Evaluation({}, x, None, ()).lines())[-1] == "no symptom of reward hacking"


# ---- what it says ---------------------------------------------------------------------------------------------------


def test_it_begins_with_samples_and_explains_every_figure_and_picture(undrawn):
    page = Page(report(evaluation(), history=HISTORY))
    places = [page.texts.index(text) for text in ("Samples on the given prompts", "On the given prompts", "Settings")]
    assert places == sorted(places) and page.texts.index("房间不好") < places[1]
    inside, explained = evaluation().given, Texts("en").explained
    meanings = [explained(name) for name, *_ in (*inside.rows(), *inside.best_of_n_rows())]
    assert all(len(meaning) > 20 and meaning in page for meaning in meanings)
    pictures = sum(tag == "img" for tag, _ in page.elements)
    assert pictures == 5 and "The higher and the further left" in page and "whether the value head follows" in page


def test_in_chinese_only_names_and_numbers_are_left_in_english(undrawn):
    found = ["the samples are alike: self-BLEU rose from 0.400 to 0.750",
             "on held-out prompts the samples lost variety: distinct-2 fell from 0.480 to 0.200"]  # fmt: skip
    raw = report(evaluation(found=found), "标题", history=HISTORY, language="zh")
    assert '<html lang="zh">' in raw
    page = Page(raw)
    assert "样本彼此雷同：self-BLEU 从 0.400 升到 0.750" in page and "在未训练提示词上，样本变得单一" in page
    names = {name for name, *_ in (*FINE.rows(), *dataclasses.replace(FINE, best_of_n=POINTS).best_of_n_rows())}
    for text in page.texts:
        if text.strip() and text not in names and not re.match(r"minirlhf |samples|: 1$|[-\d.\[\], ]+$|KL$|n/a", text):
            assert re.search(r"[\u4e00-\u9fff]", text), text
    assert all(re.search(r"[\u4e00-\u9fff]", a["alt"]) for tag, a in page.elements if tag == "img")
    with pytest.raises(ValueError, match="language must be one of en, zh, got 'fr'"):
        report(evaluation(), language="fr")


@pytest.mark.parametrize("comparison", [
    changed(second_gain=sure(0.01)), changed(second_gain=sure(0.05)), after(distinct_2=0.2), after(self_bleu=0.75),
    after(repeated=0.3), after(perplexity=30.0), after(characters=30.0), changed(ahead=None), changed(gain=sure(0.01)),
    changed(equal_kl=dataclasses.replace(EQUAL, reward=sure(0.8))),
])  # fmt: skip
def test_every_sentence_of_the_findings_has_a_chinese_one(comparison):
    texts = Texts("zh")
    said = [*symptoms(comparison, None), *symptoms(FINE, comparison), *comparison.remarks()]
    assert all(re.search(r"[\u4e00-\u9fff]", texts.sentence(sentence)) for sentence in said)
    assert Texts("en").sentence("the end") == "the end"
