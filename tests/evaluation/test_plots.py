"""Pictures: what is on which axis, read from matplotlib's own objects; no picture is compared with another."""

import dataclasses
import warnings

import numpy as np
import pytest

from minirlhf.evaluation import plots
from minirlhf.evaluation.plots import draw_tokens, plot_run, readable

pytest.importorskip("matplotlib")


def history(**columns):
    """Five steps; a column is a number or five."""
    given = {"reward/mean": [0.5, 0.6, 0.7, 0.8, 0.9], "reward/std": 0.3, "objective/kl": [0, 1, 2, 3, 4],
             "objective/entropy": 30.0, "ppo/loss/value": 1.0, "tokens/response": 16.0, **columns}  # fmt: skip
    rows = zip(*(x if isinstance(x, list) else [x] * 5 for x in given.values()), strict=True)
    return [{"step": i + 1, **dict(zip(given, row, strict=True))} for i, row in enumerate(rows)]


def axes(figure):
    return {ax.get_title().split(",")[0].split(":")[0].split("\n")[0]: ax for ax in figure.axes}


def band(figure):
    (drawn,) = axes(figure)["reward"].collections
    return drawn.get_paths()[0].vertices[:, 1]


def test_without_a_path_a_figure_is_returned_that_a_notebook_shows(tmp_path):
    figure = plot_run(history())
    assert figure._repr_png_()[:4] == b"\x89PNG"
    plot_run(history(), tmp_path / "run.png")
    assert (tmp_path / "run.png").read_bytes()[:4] == b"\x89PNG"


def test_the_band_of_a_probability_ends_at_1_and_0_and_of_other_rewards_where_it_ends():
    assert (band(plot_run(history())).min(), band(plot_run(history())).max()) == pytest.approx((0.2, 1.0))
    low = history(**{"reward/mean": [0.1] * 5, "reward/std": 0.3})
    assert band(plot_run(low)).min() == 0.0
    beyond = history(**{"reward/mean": [0.5, 0.6, 0.7, 0.8, 1.2]})
    assert band(plot_run(beyond)).max() == pytest.approx(1.5)
    spread = history(**{"reward/mean": 0.9, "reward/std": 0.5})  # no numbers in [0, 1] have this spread
    assert band(plot_run(spread)).max() == pytest.approx(1.4)


def test_the_target_is_a_line_only_where_the_curve_can_be_seen_beside_it():
    near, far = plot_run(history(), target=5.0), plot_run(history(), target=50.0)
    lines = [[line.get_label() for line in axes(figure)["KL to the reference"].lines] for figure in (near, far)]
    assert lines == [["spent", "target"], ["spent"]]
    assert "target 50: beyond the axis" in axes(far)["KL to the reference"].get_title()
    assert "target" not in axes(plot_run(history()))["KL to the reference"].get_title()


def test_a_constant_length_is_a_number_and_no_axis():
    constant, varied = plot_run(history()), plot_run(history(**{"tokens/response": [9.0, 16.0, 16.0, 16.0, 16.0]}))
    assert "response length" not in axes(constant) and "response length" in axes(varied)
    assert axes(constant)["entropy"].get_title() == "entropy, nats a sequence of 16 tokens"
    assert axes(varied)["entropy"].get_title() == "entropy, nats a sequence"
    assert len(axes(plot_run(history(**{"tokens/response": None})))) == 4


def test_samples_stand_under_the_curves():
    lines = [{"step": step, "samples": [[f"text {step} {i}", i / 10] for i in range(5)]} for step in (1, 3, 5)]
    figure = plot_run(history(), samples=lines)
    (text,) = figure.axes[-1].texts
    said = text.get_text().split("\n")
    assert said[0] == "step 1: 0.00  text 1 0" and said[-1] == "step 5: 0.20  text 5 2" and len(said) == 6
    assert not any("text 3" in line for line in said)
    (hostile,) = (
        plot_run(history(), samples=[{"step": 1, "samples": [["$\\frac{\n\x1b[2J" * 40, None]]}]).axes[-1].texts
    )
    assert "\x1b" not in hostile.get_text() and len(hostile.get_text()) < 120


def test_characters_without_a_font_are_said_and_with_one_drawn(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of missing glyphs
        monkeypatch.setattr(plots, "CHINESE_FONTS", "no such font")
        text, families = readable("酒店很好", "look there")
        assert families is None and "font" in text and text.endswith("look there")
        figure = plot_run(history(), samples=[{"step": 1, "samples": [["酒店", 0.5]]}])
        assert "samples.jsonl" in figure.axes[-1].texts[0].get_text()
        figure._repr_png_()
    from matplotlib import font_manager
    from matplotlib.ft2font import FT2Font

    known, more = (FT2Font(font_manager.findfont(name)).get_charmap().keys() for name in ("DejaVu Sans", "STIXGeneral"))
    char = chr(min(more - known))
    monkeypatch.setattr(plots, "CHINESE_FONTS", "^STIXGeneral$")
    assert readable(f"a{char}", "") == (f"a{char}", ["DejaVu Sans", "STIXGeneral"])
    assert readable("plain", "") == ("plain", ["DejaVu Sans"])


def test_tokens_are_coloured_by_advantage_and_clipped_ones_framed(monkeypatch):
    given = (("good", 2.0, False), ("bad", -2.0, True), ("so", 0.0, False))
    tokens = [{"token": text, "advantage": advantage, "clipped": clipped} for text, advantage, clipped in given]
    figure = draw_tokens(tokens, "a hotel")
    boxes, colours = figure.axes[0].patches, [np.array(box.get_facecolor()[:3]) for box in figure.axes[0].patches]
    assert [text.get_text() for text in figure.axes[0].texts] == ["good", "bad", "so"]
    assert colours[0][0] > colours[0][2] and colours[1][2] > colours[1][0] and colours[2].min() > 0.9
    assert [box.get_edgecolor()[:3] == (0, 0, 0) for box in boxes] == [False, True, False]
    monkeypatch.setattr(plots, "CHINESE_FONTS", "no such font")
    numbered = draw_tokens([{**token, "token": "好"} for token in tokens], "a hotel")
    assert [text.get_text() for text in numbered.axes[0].texts] == ["1", "2", "3"]
    assert "tokens are numbered" in numbered.axes[0].get_title(loc="left")
    many = draw_tokens(tokens * 40, "a hotel")
    assert max(box.get_x() + box.get_width() for box in many.axes[0].patches) <= plots.COLUMNS
    assert len({box.get_y() for box in many.axes[0].patches}) > 3


def test_an_explanation_says_how_to_read_it_and_draws_itself(tmp_path):
    from minirlhf.evaluation.explanation import Explanation

    token = dict(token="good", logprob=-1.0, old_logprob=-1.2, ref_logprob=-1.2, kl=0.0, reward=0.5, value=0.4,
                 returns=0.5, advantage=0.1, ratio=1.22, clipped=True)  # fmt: skip
    explanation = Explanation("hotel", 0.5, (token, {**token, "clipped": False}))
    head, *reading, names, first, second = str(explanation).split("\n")
    assert head == "prompt 'hotel', score 0.5000" and "yes" in first and "yes" not in second and "ratio" in names
    assert "positive advantage" in " ".join(reading) and " ".join(reading).count(". ") == 1  # two sentences
    explanation.draw(tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").read_bytes()[:4] == b"\x89PNG"
    assert dataclasses.replace(explanation, prompt="$").draw()._repr_png_()
