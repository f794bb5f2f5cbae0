"""Learning-rate schedules."""

import pytest

from minirlhf.device.schedules import lr_factor


@pytest.mark.parametrize(("schedule", "progress", "warmup", "floor", "expected"), [
    ("constant", 0.0, 0.0, 0.0, 1.0), ("constant", 0.7, 0.0, 0.1, 1.0), ("constant", 1.0, 0.0, 0.0, 1.0),
    ("linear", 0.0, 0.0, 0.0, 1.0), ("linear", 0.25, 0.0, 0.0, 0.75), ("linear", 1.0, 0.0, 0.0, 0.0),
    ("linear", 0.5, 0.0, 0.2, 0.6), ("linear", 1.0, 0.0, 0.2, 0.2),
    ("cosine", 0.0, 0.0, 0.0, 1.0), ("cosine", 0.5, 0.0, 0.0, 0.5), ("cosine", 1.0, 0.0, 0.0, 0.0),
    ("cosine", 1 / 3, 0.0, 0.0, 0.75), ("cosine", 0.5, 0.0, 0.2, 0.6), ("cosine", 1.0, 0.0, 0.2, 0.2),
    ("constant", 0.05, 0.2, 0.0, 0.25), ("linear", 0.1, 0.2, 0.0, 0.5), ("cosine", 0.15, 0.2, 0.5, 0.75),
    ("linear", 0.2, 0.2, 0.0, 1.0), ("linear", 0.6, 0.2, 0.0, 0.5), ("cosine", 0.6, 0.2, 0.0, 0.5),
    ("constant", 0.5, 1.0, 0.0, 0.5), ("linear", 1.0, 1.0, 0.0, 1.0),
])  # fmt: skip
def test_lr_factor_golden_values(schedule, progress, warmup, floor, expected):
    assert lr_factor(schedule, progress, warmup, floor) == pytest.approx(expected, abs=1e-9)


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"constant, linear, cosine.*'step'"):
        lr_factor("step", 0.5)
