"""The picture of a run."""

import pytest
from test_hostile_text import HISTORY

from minirlhf.evaluation.plots import plot_run


@pytest.mark.parametrize("target", [None, 6.0])
def test_plot_run_writes_a_picture(tmp_path, target):
    pytest.importorskip("matplotlib")
    plot_run([*HISTORY, {**HISTORY[0], "ppo/loss/value": None}], tmp_path / "run.png", target)
    content = (tmp_path / "run.png").read_bytes()
    assert content.startswith(b"\x89PNG\r\n\x1a\n") and len(content) > 5000


def test_an_empty_history_is_refused(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        plot_run([], tmp_path / "run.png")
    assert not (tmp_path / "run.png").exists()
