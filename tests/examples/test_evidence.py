"""examples/evidence/, run as a user runs it, on models of a few kilobytes."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from curves import CASES
from measure import Frontier, area, spread
from methods import reached
from overoptimisation import fitted

EVIDENCE = Path(__file__).resolve().parents[2] / "examples" / "evidence"
METHODS = ["ppo", "rloo"]


def options(tiny, output):
    return ["--policy", tiny / "policy", "--reward", tiny / "reward", "--second-scorer", tiny / "second",
            "--threads", 1, "--iterations", 1, "--samples", 16, "--reference-samples", 128,
            "--kl-coefs", 0.1, "--output", output]  # fmt: skip


def runs(folder):
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()]


def test_methods_are_measured_and_a_finished_run_is_not_run_again(call, tiny, tmp_path):
    given, folder = options(tiny, tmp_path / "out"), tmp_path / "out"
    code, out = call(EVIDENCE / "methods.py", *given, "--seeds", 0, "--methods", *METHODS)
    assert code is None, code
    assert [run["method"] for run in runs(folder)] == METHODS
    code, out = call(EVIDENCE / "methods.py", *given, "--seeds", 0, 1, "--methods", "rloo")
    assert code is None, code
    assert [(run["method"], run["seed"]) for run in runs(folder)[2:]] == [("rloo", 1)]
    for run in runs(folder):
        for name in ("sampled", "full"):
            assert 0 < run[name]["reward"] < 1 and run[name]["kl"] > -1e-6
        assert len(run["history"]) == 1 and run["cpu_seconds"] > 0
    found = json.loads((folder / "methods.json").read_text())["methods"]
    assert list(found) == METHODS and found["ppo"]["points"]["0.1"]["samples_to_goal"] is None
    rloo = found["rloo"]["points"]["0.1"]["sampled/reward"]
    values = [run["sampled"]["reward"] for run in runs(folder) if run["method"] == "rloo"]
    assert rloo["count"] == 2 and rloo["mean"] == pytest.approx(sum(values) / 2)
    assert rloo["std"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)
    table = (folder / "methods.md").read_text(encoding="utf-8")
    assert table in out and all(f"| {name} | 0.1 |" in table for name in METHODS) and "n = 2:" in table
    assert (folder / "methods.png").read_bytes()[:4] == b"\x89PNG"
    code, _ = call(EVIDENCE / "methods.py", *given, "--iterations", 2)
    assert re.fullmatch(r"error: .*begun with other settings \(iterations\).*", code)


def test_a_method_that_is_not_there_is_named(call, tiny, tmp_path):
    code, _ = call(EVIDENCE / "methods.py", *options(tiny, tmp_path / "out"), "--methods", "trpo")
    assert re.fullmatch("error: --methods must be of ppo, .*, got trpo", code) and not (tmp_path / "out").exists()


TRAINS_NOTHING = """#!/bin/sh
echo "a line of a library"
echo '{"reward": 0.5, "kl": 0.0, "seconds": 2.0, "cpu_seconds": 1.0}'
while [ $# -gt 0 ]; do
    [ "$1" = --policy ] && from=$2
    [ "$1" = --output ] && to=$2
    shift
done
cp "$from"/* "$to"
"""


def test_what_trl_trained_is_measured_as_ours_is(call, tiny, tmp_path):
    python, folder = tmp_path / "python", tmp_path / "out"
    python.write_text(TRAINS_NOTHING)
    python.chmod(0o755)
    given = [*options(tiny, folder), "--seeds", 0, "--methods", "trl"]
    code, _ = call(EVIDENCE / "methods.py", *given)
    assert code == "error: --methods trl needs --trl-python"
    code, _ = call(EVIDENCE / "methods.py", *given, "--trl-python", python)
    assert code is None, code
    [run] = runs(folder)
    assert run["history"] == [{"reward": 0.5, "kl": 0.0, "seconds": 2.0, "cpu_seconds": 1.0}]
    assert abs(run["sampled"]["kl"]) < 1e-6 and abs(run["full"]["kl"]) < 1e-6 < run["seconds"]


def test_areas_and_intervals_worked_by_hand():
    # From (0, .5) to (1, 1) it is a triangle of 1/4 above .5; from there to 2 a rectangle of 1/2.
    assert area([1.0], [1.0], 0.5, 2.0) == pytest.approx(0.75, rel=1e-3)
    assert area([1.0], [0.5], 0.5, 2.0) == 0.0
    # 1, 2, 3: standard deviation 1, and the 97.5% point of Student's t with 2 degrees of freedom is 4.303.
    found = spread([1.0, None, 2.0, 3.0])
    assert (found.mean, found.std, found.count) == (2.0, 1.0, 3) and str(found) == "2.000 ± 1.000"
    assert found.interval == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert f"{found:.0f}" == "2 ± 1"
    assert spread([1.0]).std is None and spread([None]) is None


def test_the_goal_is_reached_by_three_entries_in_the_samples_of_all():
    """Of four entries with 128 samples each: the mean of the second to the fourth is .9, of the first three .8."""
    history = [{"reward": r, "kl": kl, "cpu_seconds": 10.0 * i} for i, (r, kl) in enumerate(
        [(0.6, 0.0), (0.9, 1.0), (0.9, 2.0), (0.9, 3.0)], 1)]  # fmt: skip
    assert reached(history, 512) == {"samples": 512, "cpu_seconds": 40.0}
    assert reached(history[1:], 384) == {"samples": 384, "cpu_seconds": 40.0}
    assert reached([*history[:3], {**history[3], "kl": 3.1}], 512) is None
    assert reached(history[:2], 256) is None


def test_the_area_of_best_of_n_has_an_interval_that_more_samples_narrow():
    generator = np.random.default_rng(3)
    found = [Frontier.of({"酒店": generator.random(n).tolist()}).share_of_best_of_n(1.0) for n in (256, 2048)]
    assert all(x.low < x.mean < x.high for x in found) and found[1].mean < 1
    assert found[1].high - found[1].low < (found[0].high - found[0].low) / 2


def test_overoptimisation_of_a_proxy_is_measured_and_resumed(call, tiny, tmp_path):
    folder = tmp_path / "out"
    given = [
        "--policy",
        tiny / "policy",
        "--reward",
        tiny / "reward",
        "--second-scorer",
        tiny / "second",
        "--pairs",
        *(8, 9),
        "--trained",
        8,
        "--seeds",
        0,
        "--kl-coefs",
        0,
        "--iterations",
        2,
        "--candidates",
        8,
        "--threads",
        1,
        "--output",
        folder,
    ]
    code, out = call(EVIDENCE / "overoptimisation.py", *given, "--methods", "rloo")
    assert code is None, code
    done = [("best-of-n", 8, 4), ("rloo", 8, 2), ("best-of-n", 9, 4)]  # the proxy of 9 pairs trains no policy
    assert [(run["method"], run["pairs"], len(run["curve"])) for run in runs(folder)] == done
    assert (folder / "overoptimisation.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "overoptimisation.md").read_text(encoding="utf-8") in out
    rows = json.loads((folder / "overoptimisation.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["best-of-n", "rloo", "best-of-n"] and rows[0]["R2"]["mean"] <= 1
    before = (folder / "runs.jsonl").read_bytes()
    code, _ = call(EVIDENCE / "overoptimisation.py", *given, "--methods", "rloo")
    assert code is None and (folder / "runs.jsonl").read_bytes() == before


def test_the_laws_of_overoptimisation_are_fitted():
    """On curves that follow them exactly: d (2 - d / 2) peaks at d = 2, and d (2 - log d) at d = e."""
    ds = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
    laws = ((False, lambda d: d * (2 - d / 2), 4.0), (True, lambda d: d * (2 - math.log(d)), math.e**2))
    for logarithm, law, peak in laws:
        found = fitted([{"kl": d * d, "gold": 1 + (law(d) if d else 0.0)} for d in ds], logarithm)
        assert found["R2"] == pytest.approx(1) and found["a"] == pytest.approx(2)
        assert found["peak_kl"] == pytest.approx(peak)


@pytest.mark.parametrize("case", CASES)
def test_the_curves_of_a_case_are_drawn(case, call, tiny, tmp_path):
    models = ["--policy", tiny / "policy", "--reward", tiny / "reward", "--second-scorer", tiny / "second"]
    sizes = ["--iterations", 2, "--batch-size", 32]
    code, out = call(EVIDENCE / "curves.py", case, *models, *sizes, "--output", tmp_path / "new" / "curves.png")
    assert code is None, code
    assert (tmp_path / "new" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert out.count("step 1: ") == out.count("step 2: ") == 2  # a sample of each group


def test_each_case_stands_in_the_docs_with_its_command_and_its_picture():
    page = (EVIDENCE.parents[1] / "docs" / "curves.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^python examples/evidence/curves.py (\w+) --output runs/curves_(\w+).png$", page, re.MULTILINE
    )
    assert [case for case, _ in commands] == [name for _, name in commands] == list(CASES)
    assert re.findall(r"^!\[.*\]\(curves_(\w+).png\)$", page, re.MULTILINE) == list(CASES)
