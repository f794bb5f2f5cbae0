"""What follows each step: callbacks in their order, the best model, and the bar. Trained with in `tests/rl`."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from minirlhf.common.progress import AfterSteps
from minirlhf.device.processes import Processes


class Counter:
    """A trainer that only counts; a saved model is a file with the number of its step."""

    def __init__(self, total=5):
        self.steps_done, self.steps_total, self.processes = 0, total, Processes()

    def save_pretrained(self, folder):
        folder.mkdir(exist_ok=True)
        (folder / "model").write_text(str(self.steps_done))


def run(trainer, rewards, key="reward/mean", **settings):
    """Steps with these rewards, as a trainer makes them; returns how many were done."""
    with AfterSteps(trainer, progress=False, **settings) as ends:
        for i, reward in enumerate(rewards):
            trainer.steps_done += 1
            if ends(f"batch {i}", {key: reward} if reward is not None else {}):
                break
    return trainer.steps_done


def test_each_function_is_called_and_true_ends_the_training():
    seen = []
    first = lambda batch, stats: seen.append((batch, stats["reward/mean"]))  # noqa: E731
    ends = lambda batch, stats: stats["reward/mean"] > 0.3  # noqa: E731
    last = lambda batch, stats: seen.append("last")  # noqa: E731
    assert run(Counter(), [0.1, 0.5, 0.9], on_step=[first, ends, last]) == 2
    assert seen == [("batch 0", 0.1), "last", ("batch 1", 0.5), "last"]
    assert run(Counter(), [0.1, 0.5], on_step=lambda *step: ["samples", "of a run"]) == 2  # only True itself ends it
    assert run(Counter(), [0.1, 0.5, 0.9], stop_when=lambda stats: stats["reward/mean"] > 0.3) == 2


def test_a_first_batch_of_equal_scores_is_told():
    def steps(*batches):
        trainer = Counter()
        with AfterSteps(trainer, progress=False) as ends:
            for scores in batches:
                trainer.steps_done += 1
                ends(SimpleNamespace(scores=torch.tensor(scores)), {})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps([0.7])  # a batch of one has no spread
        steps([0.5, 0.5, 0.5001], [1.0, 1.0])  # a policy may reach the best score
    with pytest.warns(UserWarning, match="all scores of the first batch are 0.1: such a batch teaches nothing") as told:
        steps([0.1, 0.1], [0.0, 0.0])
    assert len(told) == 1


def test_the_best_model_is_kept_and_a_resumed_training_replaces_only_what_is_worse(tmp_path):
    trainer = Counter()
    run(trainer, [0.1, 0.5, 0.3, float("nan")], save_best=tmp_path / "best")
    assert (tmp_path / "best" / "model").read_text() == "2"
    assert json.loads((tmp_path / "best" / "best.json").read_text()) == {"step": 2, "reward": 0.5}
    run(trainer, [0.4], save_best=tmp_path / "best")
    assert (tmp_path / "best" / "model").read_text() == "2"
    run(trainer, [0.6], save_best=tmp_path / "best")
    assert (tmp_path / "best" / "model").read_text() == "6"
    run(Counter(), [0.2], save_best=tmp_path / "best")  # another training
    assert (tmp_path / "best" / "model").read_text() == "1"


def test_with_evaluations_they_say_which_is_best(tmp_path):
    settings = dict(save_best=tmp_path / "best", evaluate_every=2)
    run(Counter(), [0.9, 0.99], **settings)  # of the batches only
    assert not (tmp_path / "best").exists()
    run(Counter(), [None, 0.2, None, 0.3], key="evaluation/reward", **settings)
    assert (tmp_path / "best" / "model").read_text() == "4"
    trainer = Counter()
    with AfterSteps(trainer, evaluate_every=2, progress=False) as ends:
        due = []
        for trainer.steps_done in range(1, 6):
            due.append(ends.evaluation_due)
    assert due == [False, True, False, True, False]


def test_the_bar_has_reward_kl_and_the_time_left(monkeypatch, capsys):
    pytest.importorskip("tqdm")
    trainer = Counter()
    with AfterSteps(trainer) as ends:
        for _ in range(5):
            trainer.steps_done += 1
            ends(None, {"reward/mean": 0.5, "objective/kl": 1.25, "ppo/loss/total": 3.0})
    bar = capsys.readouterr().err
    assert "reward 0.500, KL 1.250" in bar and "5/5" in bar and "00:00<00:00" in bar and "loss" not in bar
    with AfterSteps(SimpleNamespace(steps_done=3, steps_total=4, processes=Processes())) as ends:
        ends(None, {"sft/progress": 1.0, "sft/loss": 2.5})
    bar = capsys.readouterr().err
    assert "4/4" in bar and "loss 2.500" in bar
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # not installed
    with AfterSteps(Counter()) as ends:
        assert ends(None, {}) is False
    assert run(Counter(), [0.1]) == 1 and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "given", [dict(on_step=3), dict(on_step=[print, "x"]), dict(stop_when=0.5), dict(evaluate_every=0)]
)
def test_bad_settings_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        AfterSteps(Counter(), **given)
