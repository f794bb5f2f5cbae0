"""One HTML file that shows an evaluation: samples before and after side by side, figures with their meaning, pictures.

It fetches and runs nothing: pictures are data URIs, there is no script, and a content security policy forbids both.
Every text is escaped and `printable`, so that no text can add markup or turn the text around it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minirlhf.common.printing import escaped
from minirlhf.evaluation.findings import Comparison, Evaluation, Pair
from minirlhf.evaluation.plots import FrontierPoint, draw_frontier, plot_run
from minirlhf.evaluation.report_texts import Texts
from minirlhf.version import __version__

ROWS, MORE_ROWS = 6, 24  # samples of each list of prompts that are shown at once, and with those that unfold
STYLE = """
:root { color-scheme: light dark; --soft: #8882; --line: #8884; --good: #2a8a4a; --bad: #c0392b; }
body { font: 16px/1.5 system-ui, "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif;
  max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; }
h1, p, li { overflow-wrap: anywhere; }
.box { border-left: 4px solid var(--good); background: var(--soft); padding: .5rem .8rem; border-radius: 4px; }
.box.bad { border-color: var(--bad); }
.box ul { margin: 0; padding-left: 1.1rem; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: .8rem; }
img { width: 100%; height: auto; background: #fff; border-radius: 6px; }
.wide { overflow-x: auto; }
.wide img { min-width: 44rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .5rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; opacity: .7; white-space: nowrap; }
td small.meaning { white-space: normal; min-width: 12rem; }
.pair { border: 1px solid var(--line); border-radius: 6px; margin: .6rem 0; padding: .4rem .6rem; }
.pair p, .sides div { unicode-bidi: isolate; }
.pair p { margin: 0; font-weight: 600; max-height: 6rem; overflow: auto; }
.sides { display: grid; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: .6rem; }
.sides div { max-height: 16rem; overflow: auto; overflow-wrap: anywhere; }
.sides small { display: block; opacity: .75; font-variant-numeric: tabular-nums; }
footer { margin-top: 2rem; font-size: .8rem; opacity: .75; overflow-wrap: anywhere; }
"""


def report(
    evaluation: Evaluation,
    title: str = "Policy against reference",
    about: Mapping[str, Any] | None = None,
    history: Sequence[Mapping[str, Any]] | None = None,
    target: float | None = None,
    samples: Sequence[Mapping[str, Any]] = (),
    language: str = "en",
) -> str:
    """The report as a text of HTML.

    title, about: of the run: its name, and further facts by name. history, samples: lines of its metrics.jsonl and
        samples.jsonl, drawn as `plot_run` does, with the KL target; history None: no curves.
    language: "en" or "zh".
    Raises ImportError that names the extra if matplotlib is missing, ValueError for another language.
    """
    texts = Texts(language)
    parts = [f"<h1>{escaped(title)}</h1>"]
    for name, comparison in evaluation.comparisons.items():
        parts += [f"<h2>{texts.say(f'Samples on the {name}')}</h2>"]
        parts += [f"<p>{texts.say('The first ones, unpicked; left before, right after.')}</p>"]
        shown, more = comparison.pairs[:ROWS], comparison.pairs[ROWS:MORE_ROWS]
        parts += [_pair(pair, texts) for pair in shown]
        folded = "".join(_pair(pair, texts) for pair in more)
        parts += [f"<details><summary>{texts.say('More')}</summary>{folded}</details>"] if more else []
    parts += [f"<h2>{texts.say('Findings')}</h2>", _conclusion(evaluation, texts)]
    for name, comparison in evaluation.comparisons.items():
        parts += [f"<h2>{texts.say(f'On the {name}')}</h2>", _pictures(comparison, texts)]
        parts += [f"<h3>{texts.say('Figures')}</h3>", _table(("", "reference", "policy"), comparison.rows(), texts)]
        parts += [f"<h3>{texts.say('Best-of-n of the reference, and the optimum')}</h3>", _best_of_n(comparison, texts)]
    if history:
        curves = plot_run(history, None, target, evaluation.given.frontier, samples)
        curves = _image(curves._repr_png_(), texts.say("curves of the run"))
        parts += [f"<h2>{texts.say('The run')}</h2>", f'<div class="wide">{curves}</div>']
        parts += [f"<p>{texts.explained('picture of the run')}</p>"]
    parts += [f"<h2>{texts.say('Settings')}</h2>"]
    facts = {**(about or {})}
    facts |= {texts.say(f"the {name}"): ", ".join(x.prompts) for name, x in evaluation.comparisons.items()}
    for name, value in evaluation.settings.items():
        facts.update(value if isinstance(value, dict) else {name: value})
    parts += [_definitions((name, value) for name, value in facts.items() if value is not None)]
    parts += [f"<footer>minirlhf {escaped(__version__)}</footer>"]
    return (
        f'<!DOCTYPE html>\n<html lang="{language}">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escaped(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _conclusion(evaluation: Evaluation, texts: Texts) -> str:
    if not evaluation.symptoms:
        return f'<div class="box">{texts.say("No symptom of reward hacking was found.")}</div>'
    items = "".join(f"<li>{escaped(texts.sentence(symptom))}</li>" for symptom in evaluation.symptoms)
    return f'<div class="box bad"><ul>{items}</ul></div>'


def _pictures(x: Comparison, texts: Texts) -> str:
    """Reward and second score over the exact KL: all in the distribution that was sampled."""
    pictures = []
    for name, title in (("reward", "reward"), ("second", "second scorer")):
        start, end = getattr(x.reference, name), getattr(x.policy, name)
        if start is None or end is None:
            continue
        curve = [FrontierPoint("n = 1", 0.0, start)]
        points = {point.kl: point for point in (*x.best_of_n, *([x.equal_kl] if x.equal_kl else []))}
        curve += [FrontierPoint(f"{p.n:.3g}", kl, getattr(p, name)) for kl, p in points.items() if kl > 0]
        policy, where = FrontierPoint("policy", x.kl_exact.mean, end), x.spending.distribution if x.spending else ""
        drawn = draw_frontier(curve, [policy], title, x.frontier if name == "reward" else (), where)
        pictures.append(_image(drawn, texts.say(f"{title} over KL: policy, best-of-n and optimum")))
    return f'<div class="pictures">{"".join(pictures)}</div><p>{texts.explained("picture over KL")}</p>'


def _best_of_n(x: Comparison, texts: Texts) -> str:
    said = [texts.sentence(remark) for remark in x.remarks()]
    remarks = "".join(f"<p>{escaped(remark[0].upper() + remark[1:])}</p>" for remark in said)
    return _table(("", "KL", "reward", "second scorer"), x.best_of_n_rows(), texts) + remarks


def _pair(pair: Pair, texts: Texts) -> str:
    sides = (("before", pair.before_reward, pair.before), ("after", pair.after_reward, pair.after))
    shown = "".join(f"<div><small>{texts.say(w)} {score:.3f}</small>{escaped(text)}</div>" for w, score, text in sides)
    return f'<div class="pair"><p>{escaped(pair.prompt)}</p><div class="sides">{shown}</div></div>'


def _image(png: bytes, what: str) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(png).decode()}" alt="{escaped(what)}">'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], texts: Texts) -> str:
    """Under the name of a row stands what it means; estimates, `mean [low, high]`, get their interval below them."""

    def cell(text: str) -> str:
        mean, bracket, interval = text.partition(" [")
        return f"<td>{escaped(mean)}{f'<small>[{escaped(interval)}</small>' if bracket else ''}</td>"

    def named(name: str) -> str:
        return f'<td>{escaped(name)}<small class="meaning">{texts.explained(name)}</small></td>'

    top = "".join(f"<th>{escaped(name and texts.say(name))}</th>" for name in head)
    body = "".join(f"<tr>{named(name)}{''.join(map(cell, row))}</tr>" for name, *row in rows)
    return f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def _definitions(items: Iterable[tuple[str, Any]]) -> str:
    return "<ul>" + "".join(f"<li><b>{escaped(name)}</b>: {escaped(value)}</li>" for name, value in items) + "</ul>"
