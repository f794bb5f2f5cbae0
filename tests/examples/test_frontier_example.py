"""examples/evidence/frontier.py, run as a user runs it, on models of a few kilobytes."""

import re
from pathlib import Path

import pytest

from folders import snapshot

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "evidence" / "frontier.py"


def options(tiny):
    return ["--policy", tiny / "policy", "--reward", tiny / "reward", "--second-scorer", tiny / "second",
            "--steps", 128, "--samples", 16]  # fmt: skip


def test_the_frontier_has_a_row_for_each_coefficient_and_n(call, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    code, out = call(SCRIPT, *options(tiny), "--kl-coefs", 0.5, 0.1, 0.1, "--output", tmp_path / "new" / "sweep")
    assert code is None
    written = tmp_path / "new" / "sweep"
    assert {path.name for path in written.iterdir()} == {"frontier.md", "frontier.png", "second_scorer.png"}
    table = (written / "frontier.md").read_text(encoding="utf-8")
    assert table in out
    lines = [line for line in table.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
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
def test_bad_input_to_the_sweep_is_one_line_and_writes_nothing(call, tiny, tmp_path, arguments, message):
    pytest.importorskip("matplotlib")
    code, out = call(SCRIPT, *options(tiny), "--output", tmp_path / "sweep", *arguments)
    assert out == "" and re.fullmatch(rf"error: .*{message}.*", code)
    assert snapshot(tmp_path) == {}


def test_a_sweep_is_never_overwritten(call, tiny, tmp_path):
    pytest.importorskip("matplotlib")
    code, _ = call(SCRIPT, *options(tiny), "--output", tmp_path)
    assert re.fullmatch("error: .*exists.*", code) and snapshot(tmp_path) == {}
