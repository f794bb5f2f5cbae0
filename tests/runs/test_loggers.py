"""Loggers beside metrics.jsonl: TensorBoard's files for real, the services in their offline modes if installed."""

import importlib.util
import inspect
import json
import warnings
from pathlib import Path
from typing import ClassVar

import pytest
from lives import PROMPTS, new_trainer, reference, reward

from folders import snapshot
from minirlhf.io.files import read_jsonl
from minirlhf.runs.loggers import LOGGERS, LOGGERS_FILE, Loggers, check_loggers, choose_loggers
from minirlhf.runs.run import Run


class Recording:
    """A logger of the test: what it was told, by the run's id."""

    told: ClassVar[list] = []

    def __init__(self, folder, id, step, config):
        self.told.append(("open", id, step, config))

    def metrics(self, step, stats):
        self.told.append(("metrics", step, stats))

    def samples(self, step, samples):
        self.told.append(("samples", step, samples))

    def close(self):
        self.told.append(("close",))


class Offline(Recording):
    """A service that is not there."""

    def metrics(self, step, stats):
        raise ConnectionError("no network\n\x1b[2J")


@pytest.fixture
def registered(monkeypatch):
    """`json` is installed everywhere."""
    monkeypatch.setitem(LOGGERS, "json", Recording)
    monkeypatch.setitem(LOGGERS, "csv", Offline)
    monkeypatch.setattr(Recording, "told", [])
    return Recording


def train(run, steps=None):
    with run:
        run.trainer.train(PROMPTS, reward, run.record, stop_when=lambda stats: stats["step"] == steps, progress=False)
    return run


def test_a_logger_gets_what_metrics_jsonl_has_and_a_resumed_run_goes_on_with_its_id(tmp_path, registered):
    run = train(Run.start(tmp_path, new_trainer(), {"a": 1}, loggers=["jsonl", "json"]), steps=2)
    (kind, id, step, config), *rest = registered.told
    assert (kind, step, config) == ("open", 0, {"a": 1}) and len(id) == 21 and id.isalnum()
    assert rest[-1] == ("close",)
    lines = read_jsonl(tmp_path / "metrics.jsonl")
    assert [{"step": told[1], **told[2]} for told in rest if told[0] == "metrics"] == lines == run.history()
    assert not any("step" in told[2] for told in rest if told[0] == "metrics")  # no curve of its own number
    samples = [{"step": told[1], "samples": [list(x) for x in told[2]]} for told in rest if told[0] == "samples"]
    assert samples == read_jsonl(tmp_path / "samples.jsonl") != []
    registered.told.clear()
    train(Run.resume(tmp_path, reference()), steps=3)
    assert registered.told[0] == ("open", id, 2, {"a": 1}) and [
        told[1] for told in registered.told if told[0] == "metrics"
    ] == [3]
    registered.told.clear()
    train(Run.resume(tmp_path, reference(), loggers=["jsonl"]))
    assert registered.told == [] and json.loads((tmp_path / LOGGERS_FILE).read_text())["id"] == id


def test_a_logger_that_is_offline_is_dropped_with_one_warning(tmp_path, registered):
    run = Run.start(tmp_path, new_trainer(), {}, loggers=["csv", "json"])
    with pytest.warns(UserWarning, match="the logger csv gave up") as found:
        train(run)
    assert len(found) == 1
    told = [kind for kind, *_ in registered.told]
    assert told.count("close") == 1 and told.count("metrics") == len(read_jsonl(tmp_path / "metrics.jsonl"))


def test_a_logger_that_cannot_be_opened_is_dropped_too(tmp_path, registered, monkeypatch):
    def refuse(*given):
        raise OSError("no key")

    monkeypatch.setitem(LOGGERS, "json", refuse)
    choose_loggers(tmp_path, ["json"])
    with pytest.warns(UserWarning, match="no key"):
        opened = Loggers(tmp_path, 0, {})
    opened.metrics(1, {"x": 1.0})
    opened.close()


def test_a_run_without_other_loggers_has_no_file_of_them(tmp_path):
    choose_loggers(tmp_path, ["jsonl"])
    Loggers(tmp_path, 0, {}).close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("names", "kind", "message"),
    [
        (["wanbd"], ValueError, "did you mean 'wandb'"),
        ("wandb", ValueError, r"give \['wandb'\]"),
        (["nothing"], ImportError, r"pip install nothing \(minirlhf's extra nothing\)"),
    ],
)
def test_unknown_and_missing_loggers_are_refused_before_any_write(tmp_path, monkeypatch, names, kind, message):
    monkeypatch.setitem(LOGGERS, "nothing", Recording)
    with pytest.raises(kind, match=message):
        Run.start(tmp_path / "run", new_trainer(), {}, loggers=names)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_refuses_them_as_well_and_stays_as_it_is(tmp_path):
    train(Run.start(tmp_path / "run", new_trainer(), {}), steps=1)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match="did you mean 'wandb'"):
        Run.resume(tmp_path / "run", reference(), loggers=["wanbd"])
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", LOGGERS)
def test_a_logger_is_fifteen_lines_at_most(name):
    source = inspect.getsource(LOGGERS[name]).splitlines()
    lines = [line for line in source if line.strip() and '"""' not in line]
    assert len(lines) <= 15, f"{len(lines)} lines"


# ---- the loggers themselves -----------------------------------------------------------------------------------------


def test_tensorboard_has_the_curves_and_a_resumed_run_continues_them_without_the_steps_that_were_cut(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = LOGGERS["tensorboard"](tmp_path, "id", 0, {})
        for step in range(1, 6):
            first.metrics(step, {"reward/mean": step / 10, "objective/kl": float("nan")})
        first.samples(5, [("很好 <b> | x", 0.9), ("plain", None)])
        first.close()
        again = LOGGERS["tensorboard"](tmp_path, "id", 3, {})  # steps 4 and 5 were not saved
        again.metrics(4, {"reward/mean": 0.75})
        again.close()
        found = EventAccumulator(str(tmp_path / "tensorboard"), purge_orphaned_data=True)
        found.Reload()
    curve = [(event.step, round(event.value, 6)) for event in found.Scalars("reward/mean")]
    assert curve == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.75)]
    assert "objective/kl" in found.Tags()["scalars"]


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_a_service_takes_metrics_and_samples_offline_and_goes_on(name, tmp_path, monkeypatch):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    for key, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "SWANLAB_MODE": "offline",
                       "TRACKIO_DIR": str(tmp_path / "trackio")}.items():  # fmt: skip
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(Loggers, "_drop", lambda self, name, error: pytest.fail(f"{name}: {error}"))
    choose_loggers(tmp_path, [name])
    for steps in ((1, 2), (2, 3)):
        opened = Loggers(tmp_path, steps[0] - 1, {"ppo": {"lr": 0.1}})
        for step in steps:
            opened.metrics(step, {"reward/mean": 0.5, "ppo/lr": 1e-4})
        opened.samples(steps[-1], [("很好 <b>", 0.9), ("plain", None)])
        opened.close()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != LOGGERS_FILE]
    assert written or name == "trackio"


def test_every_logger_is_an_extra_of_its_name():
    text = (Path(__file__).parents[2] / "setup.py").read_text(encoding="utf-8")
    for name in LOGGERS:
        assert f'"{name}": ' in text
    check_loggers(["jsonl"])
