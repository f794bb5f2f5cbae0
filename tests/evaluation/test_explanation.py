"""One sample of a step, token by token: with groups and without values, and with them."""

import io

import pytest
from small_trainer import PROMPTS, make_trainer

from minirlhf.evaluation.explanation import COLUMNS, explain


def told(trainer, scores, i):
    """A rollout with these scores, the explanation of row i, and what it printed."""
    c, file = trainer.config, io.StringIO()
    rollout = trainer.collect(PROMPTS[: c.batch_size // c.group_size], lambda texts: scores)
    explanation = explain(trainer, rollout, i, file)
    assert file.getvalue() == f"{explanation}\n"
    return rollout, explanation, file.getvalue().splitlines()


def test_a_sample_of_a_group_stands_beside_the_scores_of_the_others():
    # Scores 2 and 4 of the second prompt, k3 in the loss: mean 3, standard deviation sqrt(2).
    trainer = make_trainer(
        advantages="grpo", group_size=2, whiten_advantages=False, kl_estimator="k3", kl_placement="loss"
    )
    rollout, explanation, lines = told(trainer, [0.5, 0.25, 2.0, 4.0], 3)
    assert rollout.prompts[3] == PROMPTS[1] == explanation.prompt
    assert lines[0] == "prompt 'w', score 4.0000; mean of the group 3.0000 (2.0000, 4.0000)"
    assert explanation.group == (2.0, 4.0) and explanation.score == 4.0
    for token in explanation.tokens:
        assert token["advantage"] == pytest.approx(1 / 2**0.5, rel=1e-5)
        assert token["kl"] > 0 and "value" not in token and "returns" not in token
    assert [token["reward"] for token in explanation.tokens] == [0.0, 0.0, 0.0, 0.0, 4.0]
    assert lines[-6].split() == [name for name in COLUMNS if name not in ("value", "returns")]  # then 5 tokens


def test_alone_a_sample_has_values_and_no_group():
    _, explanation, lines = told(make_trainer(), [1.0, 2.0, 3.0, 4.0], 2)
    assert explanation.group == () and lines[0] == f"prompt '{PROMPTS[2]}', score 3.0000"
    assert lines[-6].split() == list(COLUMNS)


def test_a_row_that_is_not_there_is_refused():
    trainer = make_trainer()
    rollout = trainer.collect(PROMPTS, lambda texts: [0.0] * 4)
    for i in (-1, 4):
        with pytest.raises(ValueError, match=f"rows 0 to 3, got {i}"):
            explain(trainer, rollout, i, io.StringIO())
