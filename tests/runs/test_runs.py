"""Nothing is lost: runs that are killed, stopped, given faulty rewards and full disks, or started twice."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import threading
import time
import warnings

import pytest
from lives import PROMPTS, STEPS, go_on, hang, live, new_trainer, process, reference, reward, wait_for

from folders import snapshot
from minirlhf.io.files import read_jsonl
from minirlhf.runs.checkpoint import read_checkpoint, save_checkpoint
from minirlhf.runs.run import Run, RunFailed, Stopped

KILLS = int(os.environ.get("MINIRLHF_KILLS", "2"))  # 50 in the run that is documented


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def figures(folder):
    """The lines of metrics.jsonl as texts, without the times."""
    lines = read_jsonl(folder / "metrics.jsonl")
    return [json.dumps({k: v for k, v in line.items() if not k.startswith("time/")}) for line in lines]


def finish(folder, **settings):
    """Begin or resume a run and bring it to its end, here."""
    with go_on(folder, **settings) as run:
        run.trainer.train(PROMPTS, reward, run.record)
    return run


def same_end(folder, other):
    assert figures(folder) == figures(other)
    assert (folder / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in other.iterdir())
    assert checkpoints(folder) == checkpoints(other)
    assert os.readlink(folder / "checkpoints" / "best") == os.readlink(other / "checkpoints" / "best")
    assert snapshot(folder / "checkpoints") == snapshot(other / "checkpoints")


def same_last_step(folder, other, but=""):
    """What `same_end` compares but for earlier checkpoints, and one file of the last."""
    assert figures(folder) == figures(other)
    assert (folder / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()
    mine, theirs = (snapshot(run / f"checkpoints/step-{STEPS:06d}") for run in (folder, other))
    assert {**mine, but: 0} == {**theirs, but: 0}


def whole(folder):
    """What must hold whenever a process has died: every checkpoint can be read, no line is missing or doubled."""
    if not (folder / "config.json").exists():
        return
    steps = [read_checkpoint(path)["counters"]["iteration"] for path in (folder / "checkpoints").glob("step-*")]
    lines = [line["step"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert steps and lines == list(range(1, len(lines) + 1)) and len(lines) >= max(steps)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run to its end in one go."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder)
    return folder


@pytest.fixture
def copied(tmp_path, undisturbed):
    """A copy of that run."""
    return shutil.copytree(undisturbed, tmp_path / "run", symlinks=True)


# ---- what a run leaves ----------------------------------------------------------------------------------------------


def test_a_run_leaves_its_log_its_newest_checkpoints_and_the_best(undisturbed):
    assert sorted(path.name for path in undisturbed.iterdir()) == [
        "checkpoints", "config.json", "metrics.jsonl", "samples.jsonl"
    ]  # fmt: skip
    assert [line["step"] for line in read_jsonl(undisturbed / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert [line["step"] for line in read_jsonl(undisturbed / "samples.jsonl")] == [2, 4, 6]
    assert {"step-000004", "step-000006", "best"} <= set(checkpoints(undisturbed))


def run_of_rewards(folder, rewards):
    """A run whose batches have these mean rewards, saved at every step. Returns its checkpoints after each step."""
    shown = []
    with Run.start(folder, new_trainer(save_freq=1, steps=4 * len(rewards)), {}) as run:
        run.trainer.train(
            PROMPTS,
            lambda texts: [rewards[run.trainer.iteration]] * len(texts),
            lambda *step: (run.record(*step), shown.append(checkpoints(folder))),
        )
    return shown


def test_the_newest_checkpoints_stay_and_the_first_of_the_best(tmp_path):
    shown = run_of_rewards(tmp_path / "run", [0.25, 0.5, 0.375, 0.5, 0.125, 0.75])
    expected = [[0, 1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6]]
    assert shown == [["best", *(f"step-{step:06d}" for step in steps)] for steps in expected]
    assert os.readlink(tmp_path / "run" / "checkpoints" / "best") == "step-000006"


def test_samples_are_texts_of_the_batch_with_their_scores(tmp_path):
    returned = []
    with Run.start(tmp_path / "run", new_trainer(), {}) as run:
        run.trainer.train(
            PROMPTS, reward, lambda rollout, stats: returned.append((rollout, run.record(rollout, stats)))
        )
    assert [bool(samples) for _, samples in returned] == [False, True] * 3
    for rollout, samples in returned:
        assert set(samples) <= set(zip(rollout.texts, rollout.scores.tolist(), strict=True))
    logged = [line["samples"] for line in read_jsonl(tmp_path / "run" / "samples.jsonl")]
    assert logged == [[list(pair) for pair in samples] for _, samples in returned if samples]


def test_record_wants_every_step_once(tmp_path):
    with pytest.raises(RunFailed, match="after step 1 came 1"), Run.start(tmp_path / "run", new_trainer(), {}) as run:
        run.trainer.train(PROMPTS, reward, lambda *step: (run.record(*step), run.record(*step)))
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == 1


# ---- start and resume -----------------------------------------------------------------------------------------------


def test_a_run_in_parts_ends_as_one_in_one_go(tmp_path, undisturbed):
    """Left by an exception at every step in turn; the steps since the last save are made again, or were saved."""

    class Crash(BaseException):
        pass

    folder = tmp_path / "run"
    for part in range(1, 4):
        with pytest.raises(Crash), go_on(folder) as run:

            def leave(rollout, stats, run=run, step=part + 1):
                run.record(rollout, stats)
                if run.trainer.iteration == step:
                    raise Crash

            run.trainer.train(PROMPTS, reward, leave)
        whole(folder)
    finish(folder)
    same_end(folder, undisturbed)
    finish(folder)  # it is at its end: nothing changes
    same_end(folder, undisturbed)


def test_a_run_may_be_made_longer(copied, tmp_path):
    with Run.resume(tmp_path / "run", reference(), steps=4 * STEPS + 8) as run:
        run.trainer.train(PROMPTS, reward, run.record)
    assert len(read_jsonl(tmp_path / "run" / "metrics.jsonl")) == STEPS + 2


def test_a_run_is_never_overwritten(copied, tmp_path):
    for name in ("thesis.txt", "config.json", "lock"):
        (tmp_path / name[:1]).mkdir()
        (tmp_path / name[:1] / name).write_text("mine")
    (tmp_path / "l" / "more.txt").write_text("mine")
    (tmp_path / "foreign" / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "file").write_text("mine")
    before = snapshot(tmp_path)
    for name in ("run", "t", "c", "l", "foreign"):
        with pytest.raises(FileExistsError, match=f"{name} exists and is not empty"):
            Run.start(tmp_path / name, new_trainer(), {})
    with pytest.raises(OSError, match="file"):
        Run.start(tmp_path / "file", new_trainer(), {})
    assert snapshot(tmp_path) == before


def test_a_run_that_could_not_be_started_leaves_an_empty_folder(tmp_path):
    (tmp_path / "run").mkdir()
    double = new_trainer()
    double.policy.double()
    with pytest.raises(ValueError, match="fp32"):
        Run.start(tmp_path / "run", double, {})
    with pytest.raises(TypeError):
        Run.start(tmp_path / "run", new_trainer(), {"not": {"for", "JSON"}})
    assert list((tmp_path / "run").iterdir()) == []
    finish(tmp_path / "run")


def test_what_is_no_run_is_not_resumed(tmp_path):
    reference().save_pretrained(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    for name, error in (("model", ValueError), ("empty", FileNotFoundError), ("nowhere", FileNotFoundError)):
        with pytest.raises(error, match=name):
            Run.resume(tmp_path / name)
    assert snapshot(tmp_path) == before


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "training.json", "manifest.json"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before_and_says_so(copied, undisturbed, name):
    path = copied / "checkpoints" / f"step-{STEPS:06d}" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"step-000006 is damaged.*; going back to the checkpoint before it"):
        run = Run.resume(copied, reference())
    assert run.trainer.iteration == 4 and len(read_jsonl(copied / "metrics.jsonl")) == 4
    with run:
        run.trainer.train(PROMPTS, reward, run.record)
    shutil.rmtree(copied / "checkpoints" / "step-000006.damaged")  # it was kept, out of the way
    same_end(copied, undisturbed)


def test_a_checkpoint_that_was_kept_before_stays(copied):
    aside = copied / "checkpoints" / f"step-{STEPS:06d}.damaged"
    aside.mkdir()
    (aside / "notes.txt").write_text("mine")
    (copied / "checkpoints" / f"step-{STEPS:06d}" / "manifest.json").write_text("{}")
    with pytest.warns(UserWarning, match="is damaged"):
        Run.resume(copied, reference())
    assert (aside / "notes.txt").read_text() == "mine" and aside.with_name(f"{aside.name}-2").is_dir()


def test_a_checkpoint_of_another_step_than_its_name_says_is_told_and_kept(copied, undisturbed):
    """Or it would be the newest again after every step to come, and the log cut back to it."""
    checkpoints = copied / "checkpoints"
    shutil.copytree(checkpoints / "step-000004", checkpoints / "step-000099")
    content = snapshot(checkpoints / "step-000099")
    with (
        pytest.warns(UserWarning, match=r"step-000099 is a checkpoint of step 4; going back to the checkpoint before"),
        Run.resume(copied, reference()) as run,
    ):
        assert run.trainer.iteration == STEPS
    assert snapshot(checkpoints / "step-000099.damaged") == content
    shutil.rmtree(checkpoints / "step-000099.damaged")
    same_end(copied, undisturbed)


def test_a_run_without_a_readable_checkpoint_says_so_and_keeps_what_there_is(copied, tmp_path):
    for path in (copied / "checkpoints").glob("step-*/training.safetensors"):
        path.unlink()
    before = snapshot(tmp_path)
    with (
        pytest.warns(UserWarning, match="damaged"),
        pytest.raises(ValueError, match="run has no checkpoint that can be"),
    ):
        Run.resume(copied, reference())
    assert snapshot(tmp_path) == before


LOG_DAMAGES = {
    "NULs": lambda content: b"\0" * len(content),
    "empty": lambda content: b"",
    "no rewards": lambda content: content.replace(b'"reward/mean"', b'"reward/sean"'),
    "other rewards": lambda content: content.replace(b'"reward/mean": 9.0', b'"reward/mean": 0.0'),
}


@pytest.mark.parametrize("damage", LOG_DAMAGES)
def test_a_damaged_log_is_repaired_and_deletes_no_checkpoint(tmp_path, damage):
    folder = tmp_path / "run"
    rewards = [9.0, 1.0, 2.0, 1.0]  # the first is the best, the last two are the newest
    run_of_rewards(folder, rewards)
    before, log = snapshot(folder / "checkpoints"), folder / "metrics.jsonl"
    assert checkpoints(folder) == ["best", "step-000001", "step-000003", "step-000004"]
    log.write_bytes(LOG_DAMAGES[damage](log.read_bytes()))
    with (
        pytest.warns(UserWarning, match=r"metrics\.jsonl is damaged"),
        Run.resume(folder, reference(), steps=4 * STEPS) as run,
    ):
        assert os.readlink(folder / "checkpoints" / "best") == "step-000001"
        assert snapshot(folder / "checkpoints") == before
        history = run.history()
        assert [line["step"] for line in history] == [1, 2, 3, 4]
        if damage in ("NULs", "empty"):  # only what the checkpoint knows
            assert history == [{"step": i, "reward/mean": x} for i, x in enumerate(rewards, 1)]
        rollout = run.trainer.collect(PROMPTS, lambda texts: [3.0] * len(texts))
        run.record(rollout, run.trainer.step(rollout))
    assert checkpoints(folder) == ["best", "step-000001", "step-000004", "step-000005"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the repaired log is the one that step 5 was saved with
        with Run.resume(folder, reference()):
            assert os.readlink(folder / "checkpoints" / "best") == "step-000001"


MARKS = {name: {"bytes": 0, "sha256": ""} for name in ("metrics.jsonl", "samples.jsonl")}


@pytest.mark.parametrize("record", [
    None, {}, {"log": {}, "rewards": {}}, {"log": {"../metrics.jsonl": 0}, "rewards": {}},
    {"log": {**MARKS, "samples.jsonl": {"bytes": -1, "sha256": ""}}, "rewards": {}},
    {"log": MARKS, "rewards": {"٣": 1.0}}, {"log": MARKS, "rewards": {"3": "1"}},
])  # fmt: skip
def test_a_checkpoint_without_the_record_of_a_run_is_refused(tmp_path, record):
    run = finish(tmp_path / "run")
    save_checkpoint(run.trainer, tmp_path / "run" / "checkpoints" / "step-000099", record)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"step-000099.*(was saved by no run|holds no valid run)"):
        Run.resume(tmp_path / "run", reference())
    assert snapshot(tmp_path) == before


# ---- folders that other tools made ----------------------------------------------------------------------------------


def test_a_copy_that_followed_links_is_resumed(tmp_path, undisturbed):
    """As by cp -rL, zip or object storage: `best` is a folder, which is kept; by archives without links, a file."""
    for number, place in enumerate(("folder", "file")):
        folder = tmp_path / str(number)
        shutil.copytree(undisturbed, folder, symlinks=place == "file")
        best = folder / "checkpoints" / "best"
        if place == "file":
            best.unlink()
            best.write_text("step-000002")
            finish(folder)
        else:
            content = snapshot(best)
            with pytest.warns(UserWarning, match=r"best is a folder and no link; it is kept as best\.copy"):
                finish(folder)
            assert snapshot(folder / "checkpoints" / "best.copy") == content
            shutil.rmtree(folder / "checkpoints" / "best.copy")
        same_end(folder, undisturbed)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_has_the_name_for_the_copy_of_best_stays(copied, kind):
    best, taken = copied / "checkpoints" / "best", copied / "checkpoints" / "best.copy"
    best.unlink()
    best.mkdir()
    (best / "notes.txt").write_text("a copy")
    if kind == "folder":
        taken.mkdir()
        (taken / "notes.txt").write_text("mine")
    elif kind == "file":
        taken.write_text("mine")
    else:
        taken.symlink_to("nowhere")
    before = snapshot(taken) if kind == "folder" else os.readlink(taken) if kind == "link" else taken.read_text()
    with pytest.warns(UserWarning, match=r"best is a folder and no link; it is kept as best\.copy-2"):
        finish(copied)
    after = snapshot(taken) if kind == "folder" else os.readlink(taken) if kind == "link" else taken.read_text()
    assert after == before and best.is_symlink()
    assert (copied / "checkpoints" / "best.copy-2" / "notes.txt").read_text() == "a copy"


def test_names_that_are_not_ours_do_not_block_a_run(copied):
    names = ["step-٠٠٠٠٠٩", "step-０００００９", "step-²²²²²²", "step-0000009", "step-9", "step-000009 "]
    for name in names:
        (copied / "checkpoints" / name).mkdir()
    assert Run.resume(copied, reference()).trainer.iteration == STEPS
    assert all((copied / "checkpoints" / name).is_dir() for name in names)


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "samples.jsonl", "checkpoints"])
def test_nothing_is_written_through_a_link(copied, tmp_path, name):
    folder, victim = copied, tmp_path / "victim"
    if name == "checkpoints":
        (folder / name).rename(victim)
    else:
        victim.write_text("precious\n" * 100)
        (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match="is a symbolic link"):
        Run.resume(folder, reference())
    assert snapshot(tmp_path) == before


def test_a_hard_link_in_a_run_leaves_its_other_name_as_it_was(copied, tmp_path):
    """As `cp -al` and strangers' archives make them."""
    others = {name: tmp_path / f"other {name}" for name in ("lock", "metrics.jsonl", "samples.jsonl")}
    (copied / "lock").write_text("precious")
    for name, other in others.items():
        os.link(copied / name, other)
    before = {name: other.read_bytes() for name, other in others.items()}
    with Run.resume(copied, reference()) as run:
        run.log({"more": 1.0}, [("酒店", 1.0)])
        assert (copied / "lock").exists()
    assert {name: other.read_bytes() for name, other in others.items()} == before
    assert (copied / "metrics.jsonl").read_bytes().startswith(before["metrics.jsonl"])
    assert len((copied / "metrics.jsonl").read_bytes()) > len(before["metrics.jsonl"])


def test_a_checkpoint_that_is_a_link_is_no_checkpoint_of_the_run(copied, tmp_path, undisturbed):
    """It is neither loaded nor rotated away, and nothing is saved through it."""
    folder, victim = copied, tmp_path / "victim"
    shutil.copytree(undisturbed / "checkpoints" / "step-000006", victim)
    before, link = snapshot(victim), folder / "checkpoints" / "step-000008"
    link.symlink_to(victim)
    with (
        pytest.raises(RunFailed, match=r"saving step 8 of 8 failed: FileExistsError: .*step-000008 is a symbolic link"),
        pytest.warns(UserWarning, match=r"step-000008 is a checkpoint of step 6; going back"),
        Run.resume(folder, reference(), steps=4 * 8) as run,
    ):
        assert run.trainer.iteration == STEPS
        run.trainer.train(PROMPTS, reward, run.record)
    assert link.is_symlink() and snapshot(victim) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_newest_checkpoint_that_was_moved_and_linked_loses_no_step(copied, tmp_path, there):
    """The one before would be the newest, and the log would be cut back to it. The other disk may be absent."""
    newest = copied / "checkpoints" / f"step-{STEPS:06d}"
    newest.rename(tmp_path / "moved")
    newest.symlink_to(tmp_path / ("moved" if there else "nowhere"))
    before = snapshot(tmp_path)
    with pytest.raises(OSError, match=r"step-000006 is a symbolic link, .*: put the folder itself in its place"):
        Run.resume(copied, reference())
    assert snapshot(tmp_path) == before
    newest.unlink()
    (tmp_path / "moved").rename(newest)
    assert Run.resume(copied, reference()).trainer.iteration == STEPS


def test_an_earlier_checkpoint_may_be_a_link(copied, tmp_path):
    earlier = copied / "checkpoints" / "step-000004"
    earlier.rename(tmp_path / "moved")
    earlier.symlink_to(tmp_path / "moved")
    content = snapshot(tmp_path / "moved")
    with Run.resume(copied, reference(), steps=4 * 8) as run:
        run.trainer.train(PROMPTS, reward, run.record)
    assert run.trainer.iteration == 8 and earlier.is_symlink() and snapshot(tmp_path / "moved") == content


def test_a_run_of_an_older_version_is_refused_by_name(copied, tmp_path):
    (copied / "checkpoint").mkdir()  # where version 0.1.0 kept a supervised run's
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"run of supervised fine-tuning by minirlhf 0\.1\.0, which can resume it"):
        Run.resume(copied)
    assert snapshot(tmp_path) == before


# ---- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(120 + 30 * KILLS)
def test_killed_at_any_moment_a_run_ends_as_if_undisturbed(tmp_path):
    """Random moments, most of them before a file operation: of starting, logging, saving, rotating, resuming.

    Runs in fp32 and bf16 in turn, each compared with one that nobody killed.
    """
    rng, kills, runs, before = random.Random(KILLS), 0, 0, time.perf_counter()
    undisturbed = {}
    while kills < KILLS:
        precision = ("fp32", "bf16")[runs % 2]
        if precision not in undisturbed:
            start, folder, count = time.perf_counter(), tmp_path / precision, tmp_path / "count"
            child = process(live, folder, count=count, precision=precision)
            child.join()
            assert child.exitcode == 0
            undisturbed[precision] = folder, int(count.read_text()), time.perf_counter() - start
        expected, operations, seconds = undisturbed[precision]
        assert operations > 300  # it counts
        folder, exitcode = tmp_path / f"run{runs}", None
        while exitcode != 0:
            last = kills == KILLS  # now it may come to its end
            at_operation = not last and rng.random() < 0.7
            number = rng.randint(1, operations) if at_operation else 0
            child = process(live, folder, number=number, precision=precision)
            if not last and not at_operation:
                time.sleep(rng.uniform(0, seconds))
                child.kill()
            child.join()
            exitcode = child.exitcode
            assert exitcode in (0, -signal.SIGKILL)
            kills += exitcode != 0
            whole(folder)
        same_end(folder, expected)
        runs += 1
    print(f"\n{kills} kills in {runs} runs, {time.perf_counter() - before:.0f} s")


@pytest.mark.parametrize("mention", [
    "training.json", "run/.config.json", "checkpoints/.best", "checkpoints/.step-000004"
])  # fmt: skip
def test_killed_while_it_saves_a_run_is_begun_again_or_resumed(tmp_path, undisturbed, mention):
    """In the first checkpoint, before config.json makes it a run, between a checkpoint and its link; later on."""
    folder = tmp_path / "run"
    child = process(live, folder, mention, 3)  # before what was written is renamed
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert (folder / "config.json").exists() == mention.startswith("checkpoints/")
    assert (folder / "lock").exists() and list(folder.rglob(".*.partial"))
    whole(folder)
    finish(folder)
    same_end(folder, undisturbed)


# ---- stopped --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "number"), [(1, signal.SIGTERM), (4, signal.SIGINT), (STEPS, signal.SIGTERM)])
def test_asked_to_stop_a_run_ends_its_step_and_saves_it(tmp_path, undisturbed, number, step, capfd):
    folder, before = tmp_path / "run", [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def interrupted(texts):
        if run.trainer.iteration + 1 == step:
            signal.raise_signal(number)
        return reward(texts)

    expected = pytest.raises(Stopped, match=f"stopped after step {step} of {STEPS}, which is saved")
    with expected as stopped, go_on(folder) as run:
        run.trainer.train(PROMPTS, interrupted, run.record)
    assert stopped.value.folder == folder
    assert f"{number.name}: finishing the step, then saving; once more" in capfd.readouterr().err
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before
    assert read_checkpoint(folder / "checkpoints" / f"step-{step:06d}")["counters"]["iteration"] == step
    assert not (folder / "lock").exists()
    finish(folder)
    same_last_step(folder, undisturbed)


def test_asked_twice_a_run_stops_at_once(tmp_path):
    """Though its reward hangs. By the signal's own default: exit status and all."""
    folder, output = tmp_path / "run", tmp_path / "output"
    child = process(hang, folder, output)
    wait_for(lambda: output.exists() and "hanging" in output.read_text())
    os.kill(child.pid, signal.SIGINT)
    wait_for(lambda: "SIGINT: finishing" in output.read_text())
    assert child.is_alive()
    os.kill(child.pid, signal.SIGINT)
    child.join(60)
    assert child.exitcode == -signal.SIGINT
    finish(folder)


def test_who_ignores_a_signal_means_it_and_threads_have_none(tmp_path):
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with go_on(tmp_path / "run") as run:
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
            run.trainer.train(PROMPTS, reward, run.record)
    finally:
        signal.signal(signal.SIGINT, previous)
    worker = threading.Thread(target=finish, args=(tmp_path / "other",))
    worker.start()
    worker.join()
    same_end(tmp_path / "other", tmp_path / "run")


# ---- faults ---------------------------------------------------------------------------------------------------------


def fails(texts):
    raise ConnectionError("the judge does not answer")


def hangs(texts):
    time.sleep(60)


FAULTS = {
    "raises": (fails, "ConnectionError: the judge does not answer"),
    "hangs": (hangs, "TimeoutError: the reward function took longer"),
    "NaN": (lambda texts: [0.0, math.nan, 0.0, 0.0], "ValueError: scores must be finite, got nan for text 1"),
    "wrong count": (lambda texts: [0.0] * 3, "ValueError: scores must be 4 numbers"),
    "wrong type": (lambda texts: ["good"] * 4, "ValueError: scores must be 4 numbers, got list"),
}


@pytest.mark.parametrize(("name", "step"), [("raises", 1), *((name, 4) for name in FAULTS)])
def test_a_reward_that_fails_ends_the_run_saved_up_to_the_step_before(tmp_path, undisturbed, name, step):
    fault, message = FAULTS[name]
    folder = tmp_path / "run"
    saved = f"checkpoints/step-{step - 1:06d}"
    told = rf"^step {step} of 6 failed: {message}.*up to step {step - 1}, in .*{saved}$"
    limit = 2.0 if name == "hangs" else None  # enough for one that answers
    with pytest.raises(RunFailed, match=told), go_on(folder, reward_timeout=limit) as run:
        run.trainer.train(PROMPTS, lambda t: (fault if run.trainer.iteration + 1 == step else reward)(t), run.record)
    whole(folder)
    assert read_checkpoint(folder / saved)["counters"]["iteration"] == step - 1
    finish(folder)
    same_last_step(folder, undisturbed, "training.json" if name == "hangs" else "")  # it has another reward_timeout


def test_a_step_whose_line_is_not_written_is_not_saved(tmp_path, undisturbed):
    def fail_first(rollout, stats):
        if run.trainer.iteration == 4:
            raise KeyError("before record")
        run.record(rollout, stats)

    folder = tmp_path / "run"
    with pytest.raises(RunFailed, match=r"step 4 of 6 failed: KeyError.* saved up to step 2"), go_on(folder) as run:
        run.trainer.train(PROMPTS, reward, fail_first)
    assert checkpoints(folder) == ["best", "step-000000", "step-000002"]
    finish(folder)
    same_end(folder, undisturbed)


def test_gradients_that_are_nan_end_the_run_at_its_last_good_checkpoint(tmp_path):
    folder = tmp_path / "run"
    told = r"step 4 of 6 failed: FloatingPointError: step 4: 3 .* up to step 2, in .*000002"
    with pytest.raises(RunFailed, match=told), go_on(folder, max_bad_steps=3, ppo_epochs=2) as run:
        weight = run.trainer.policy.value_head.summary.weight
        weight.register_hook(lambda gradient: gradient * (math.nan if run.trainer.iteration == 3 else 1))
        run.trainer.train(PROMPTS, reward, run.record)
    whole(folder)
    assert checkpoints(folder) == ["best", "step-000000", "step-000002"]
    finish(folder)  # nothing of it is in there
    finish(tmp_path / "undisturbed", max_bad_steps=3, ppo_epochs=2)
    same_end(folder, tmp_path / "undisturbed")


def test_an_error_after_the_last_step_says_so(tmp_path):
    with (
        pytest.raises(RunFailed, match="what comes after the last step, 6, failed: KeyError"),
        go_on(tmp_path / "run") as run,
    ):
        run.trainer.train(PROMPTS, reward, run.record)
        raise KeyError("summary")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of half a mebibyte, which root can make."""
    path = tmp_path / "disk"
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", path], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize(("room", "doing"), [(0, r"(step \d|saving step 4) of 6"), (16, "saving step 4 of 6")])
def test_a_full_disk_ends_the_run_with_all_that_was_saved(small_disk, undisturbed, room, doing):
    """room: KiB that are left from step 3 on; nothing, or enough for the lines but not for a checkpoint."""
    folder, filler = small_disk / "run", small_disk / "filler"

    def fill(rollout, stats):
        run.record(rollout, stats)
        if run.trainer.iteration == 3:
            free = os.statvfs(small_disk)
            filler.write_bytes(bytes(free.f_bavail * free.f_frsize - room * 1024))

    told = rf"^{doing} failed: OSError: .*No space left on device.*saved up to step 2"
    with pytest.raises(RunFailed, match=told), go_on(folder) as run:
        run.trainer.train(PROMPTS, reward, fill)
    whole(folder)
    assert checkpoints(folder) == ["best", "step-000000", "step-000002"]
    filler.unlink()
    finish(folder)
    same_end(folder, undisturbed)


def test_a_disk_too_small_for_the_first_checkpoint_is_an_error_that_leaves_nothing(small_disk):
    (small_disk / "filler").write_bytes(bytes(500 * 1024))
    with pytest.raises(OSError, match="No space left"):
        Run.start(small_disk / "run", new_trainer(), {})
    assert list((small_disk / "run").iterdir()) == []


# ---- two at once ----------------------------------------------------------------------------------------------------


def test_a_second_run_in_one_folder_is_refused_with_a_clear_word(tmp_path):
    folder = tmp_path / "run"
    with go_on(folder) as run:
        before = snapshot(folder)
        for attempt in (lambda: Run.start(folder, new_trainer(), {}), lambda: Run.resume(folder, reference())):
            with pytest.raises(BlockingIOError, match=f"run is in use by process {os.getpid()} on"):
                attempt()
        assert snapshot(folder) == before
        run.trainer.train(PROMPTS, reward, run.record)
    assert not (folder / "lock").exists()
    assert Run.resume(folder, reference()).trainer.iteration == STEPS


@pytest.mark.parametrize("keep_last", [0, 1.5, True])
def test_a_bad_number_of_checkpoints_to_keep_is_refused_before_any_work(tmp_path, keep_last):
    calls = lambda: Run.start(tmp_path / "new", None, {}, keep_last), lambda: Run.resume(tmp_path, keep_last=keep_last)
    for call in calls:
        with pytest.raises(ValueError, match="keep_last must be an integer of at least 1"):
            call()
    assert not (tmp_path / "new").exists()
