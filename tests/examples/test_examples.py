"""The examples, run as a user runs them, on models of a few kilobytes.

Runs that must be undisturbed, killed or in another process are processes; bad input is tried in this one, by the
script's own `__main__`, where `sys.exit("error: ...")` is an exit code of 1 and that line on stderr.
"""

import errno
import json
import math
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from lives import process, script, wait_for
from ranks import together

from conftest import VOCAB, make_llama
from folders import content, snapshot
from minirlhf import GPT2, Llama, PPOConfig, Tokenizer, load_decoder
from minirlhf.runs.checkpoint import read_checkpoint
from minirlhf.runs.log import RunLog
from shared import prompt_pool

REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "examples"
SCRIPT = EXAMPLES / "positive_reviews.py"
CHAPTER = dict(
    batch_size=128, forward_batch_size=16, ppo_epochs=4, lr=2e-6, init_kl_coef=0.2, target=6, horizon=10000, gamma=1,
    lam=0.95, cliprange=0.2, cliprange_value=0.2, vf_coef=0.1, gen_len=16, save_freq=5, minibatch_size=1,
)  # fmt: skip
PROMISED_KEYS = {
    "reward/mean", "reward/std", "objective/kl", "objective/kl_coef", "objective/entropy", "ppo/loss/policy",
    "reward/flat_groups", "ppo/policy/clipfrac", "ppo/policy/approxkl", "time/generation", "time/scoring",
    "time/update", "time/tokens_per_second",
}  # fmt: skip
ITERATIONS, BATCH = 5, 4
SMALL = ["--steps", str(ITERATIONS * BATCH), "--batch-size", str(BATCH), "--group-size", "2", "--gen-len", "5",
         "--save-freq", "2"]  # fmt: skip


def models(tiny):
    return ["--policy", str(tiny / "policy"), "--reward", str(tiny / "reward")]


def lines(path, whole=False):
    """Of a JSON-lines file; with `whole` those that end in a line feed, of a file that need not be there."""
    text = path.read_text(encoding="utf-8") if path.exists() or not whole else ""
    return [json.loads(line) for line in (text[: text.rfind("\n") + 1] if whole else text).splitlines()]


def figures(run):
    """metrics.jsonl without the times."""
    return [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines(run / "metrics.jsonl")]


@pytest.fixture(scope="session")
def runs(tiny, tmp_path_factory):
    """name -> a run folder, each made once, by a process; `runs.printed` and `runs.exitcode` by name."""
    pytest.importorskip("tqdm")
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs")
    killed = {"plain": ("", 0), "killed": ("metrics.jsonl", 11)}  # before the line of step 4

    def get(name):
        run, output = folder / name, folder / f"{name}.txt"
        if name not in get.exitcode:
            arguments = [*models(tiny), *SMALL, "--seed", "3", "--output", run]
            made = process(script, output, run, *killed[name], SCRIPT, *arguments)
            made.join()
            get.exitcode[name], get.printed[name] = made.exitcode, output.read_text(encoding="utf-8")
        return run

    get.exitcode, get.printed = {}, {}
    return get


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(300)
def test_two_processes_leave_the_run_of_one(tiny, runs, tmp_path):
    """The same metrics and files, and each line of output once."""
    arguments = [*models(tiny), "--output", tmp_path / "run", *SMALL, "--seed", "3"]
    assert together(2, script, tmp_path / "output", tmp_path / "run", "", 0, SCRIPT, *arguments) == [None, None]
    for line, expected in zip(figures(tmp_path / "run"), figures(runs("plain")), strict=True):
        assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert snapshot(tmp_path / "run").keys() == snapshot(runs("plain")).keys()
    assert (tmp_path / "output").read_text(encoding="utf-8").count("saved in ") == 1


def test_a_policy_may_be_a_llama(call, tiny, tmp_path):
    make_llama(0, n_embd=16, n_layer=1, n_head=2, n_positions=32).save_pretrained(tmp_path / "llama")
    Tokenizer(VOCAB).save_pretrained(tmp_path / "llama")
    sizes = ["--steps", "8", "--batch-size", "4", "--group-size", "2", "--gen-len", "3"]
    arguments = ["--policy", tmp_path / "llama", "--reward", tiny / "reward", *sizes, "--output", tmp_path / "run"]
    error, _ = call(SCRIPT, *arguments)
    assert error is None and figures(tmp_path / "run")[-1]["objective/kl"] != 0
    assert isinstance(load_decoder(tmp_path / "run" / "policy"), Llama)


def test_metrics_have_a_line_an_iteration_with_the_promised_keys(runs):
    history = lines(runs("plain") / "metrics.jsonl")
    assert [line["step"] for line in history] == list(range(1, ITERATIONS + 1))
    for line in history:
        assert line.keys() >= PROMISED_KEYS, PROMISED_KEYS - line.keys()
        assert all(math.isfinite(value) for value in line.values())
        assert 0 <= line["reward/mean"] <= 1
    assert history[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert history[-1]["objective/kl"] != 0


def test_samples_are_logged_where_it_saves(runs):
    samples = lines(runs("plain") / "samples.jsonl")
    assert [line["step"] for line in samples] == [2, 4, 5]  # every second one, and the last
    for line in samples:
        assert len(line["samples"]) == BATCH
        for text, score in line["samples"]:
            assert text.startswith(("酒店", "周围", "位置", "前台")) and 0 <= score <= 1


def test_config_has_arguments_and_every_setting(runs, tiny):
    config = json.loads((runs("plain") / "config.json").read_text(encoding="utf-8"))
    assert config["arguments"]["policy"] == str(tiny / "policy")
    expected = dict(steps=20, batch_size=4, gen_len=5, save_freq=2, seed=3, lr=1.2e-4, minibatch_size=32)
    assert config["ppo"].items() >= expected.items()
    PPOConfig(**config["ppo"])  # all names are known


def test_summary_table_and_picture(runs):
    run = runs("plain")
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    names = {f"{model}/{name}" for model in ("policy", "reference") for name in ("reward", "distinct_1", "distinct_2")}
    said = summary.pop("optimum")
    assert summary.keys() >= names | {"kl", "kl_full_softmax", "objective/policy"}
    assert all(math.isfinite(value) for value in summary.values()) and summary["kl"] > 0
    assert said.startswith(f"reward {summary['policy/reward']:.3f} at {summary['kl']:.2f} nats")
    table = (run / "before_after.md").read_text(encoding="utf-8").splitlines()
    assert len(table) == 2 + 12 and all(row.startswith("| ") or row.startswith("|-") for row in table)
    assert table[0] == "| prompt | before | reward | after | reward |" and table[2].startswith("| 酒店 | ")
    picture = (run / "reward_curve.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in picture[-12:]
    names = {"metrics.jsonl", "samples.jsonl", "config.json", "summary.json", "before_after.md", "reward_curve.png"}
    assert {path.name for path in run.iterdir()} == names | {"checkpoints", "policy", "reference"}
    shown = runs.printed["plain"]
    assert str(run) in shown and "policy/reward" in shown and table[2] in shown and said in shown
    assert "precision auto: fp32 (the model has fewer than 33.6 million parameters)\n" in shown


def test_the_reference_is_the_input_and_the_policy_is_not(runs, tiny):
    given = GPT2.from_pretrained(tiny / "policy").state_dict()
    kept = GPT2.from_pretrained(runs("plain") / "reference").state_dict()
    tuned = GPT2.from_pretrained(runs("plain") / "policy")
    assert all(torch.equal(given[name], kept[name]) for name in given)
    assert not any(torch.equal(given[name], x) for name, x in tuned.state_dict().items() if x.ndim == 2)
    assert not (runs("plain") / "policy/value_head.safetensors").exists()  # the default method has none
    for name in ("policy", "reference"):
        assert Tokenizer.from_pretrained(runs("plain") / name).vocab == VOCAB


def test_the_same_seed_repeats_the_run_and_another_does_not(runs, tiny, tmp_path, call):
    for seed in (3, 4):  # in this process: the plain run was another one
        error, _ = call(SCRIPT, *models(tiny), *SMALL, "--seed", seed, "--output", tmp_path / str(seed))
        assert error is None
    plain, same, other = figures(runs("plain")), figures(tmp_path / "3"), figures(tmp_path / "4")
    assert same == plain
    assert all(a["reward/mean"] != b["reward/mean"] for a, b in zip(plain, other, strict=True))
    for name in ("policy/model.safetensors", "samples.jsonl", "summary.json"):
        assert content(tmp_path / "3" / name) == content(runs("plain") / name), name


def test_a_killed_run_resumes_to_the_same_end(runs, tmp_path):
    """Killed by SIGKILL in step 4 with the last save at 2, and with half a line in metrics.jsonl."""
    run, plain = runs("killed"), runs("plain")
    assert runs.exitcode["killed"] == -signal.SIGKILL
    assert not (run / "summary.json").exists() and not (run / "policy").exists()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rewa')
    assert [line["step"] for line in lines(run / "metrics.jsonl", whole=True)] == [1, 2, 3]
    assert read_checkpoint(run / "checkpoints" / "best")["counters"]["iteration"] == 2

    resumed = process(script, tmp_path / "output", run, "", 0, SCRIPT, "--resume", run)
    resumed.join()
    assert resumed.exitcode == 0, (tmp_path / "output").read_text()
    assert figures(run) == figures(plain)
    mine, theirs = snapshot(run), snapshot(plain)
    for each in (mine, theirs):  # times, and its own name
        del each["metrics.jsonl"], each["config.json"]
    assert mine == theirs


def test_a_killed_run_of_a_method_resumes_to_the_same_end(tiny, tmp_path, call):
    """GRPO, whose policy has no value head: killed before the line of step 4, with the last save at 2."""
    plain, run = tmp_path / "plain", tmp_path / "run"
    arguments = [*models(tiny), *SMALL, "--steps", 4 * BATCH, "--algorithm", "grpo"]
    assert call(SCRIPT, *arguments, "--output", plain)[0] is None
    killed = process(script, tmp_path / "output", run, "metrics.jsonl", 11, SCRIPT, *arguments, "--output", run)
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert [line["step"] for line in lines(run / "metrics.jsonl", whole=True)] == [1, 2, 3]
    assert call(SCRIPT, "--resume", run)[0] is None
    assert json.loads((run / "config.json").read_text())["ppo"]["advantages"] == "grpo"
    assert figures(run) == figures(plain)
    mine, theirs = snapshot(run), snapshot(plain)
    assert "policy/model.safetensors" in mine and not any("value_head" in name for name in mine)
    for each in (mine, theirs):
        del each["metrics.jsonl"], each["config.json"]
    assert mine == theirs


def test_ctrl_c_and_sigterm_stop_a_run_and_print_the_command_that_goes_on(tiny, tmp_path):
    """In a folder whose name the shell would take apart; the command is run as it was printed."""
    pytest.importorskip("tqdm")
    run, output = tmp_path / "my run's", tmp_path / "output"
    command = [SCRIPT, *models(tiny), *SMALL, "--steps", "40000", "--output", run]
    for number in (signal.SIGINT, signal.SIGTERM):
        before = len(lines(run / "metrics.jsonl", whole=True)) if run.exists() else 0
        output.unlink(missing_ok=True)
        child = process(script, output, run, "", 0, *command)
        wait_for(lambda before=before: len(lines(run / "metrics.jsonl", whole=True)) > before + 1)
        os.kill(child.pid, number)
        child.join()
        shown = output.read_text(encoding="utf-8")
        assert child.exitcode == 0, shown
        step = len(lines(run / "metrics.jsonl"))
        assert [line["step"] for line in lines(run / "metrics.jsonl")] == list(range(1, step + 1))
        assert read_checkpoint(run / "checkpoints" / f"step-{step:06d}")["counters"]["iteration"] == step
        told, printed = shown.splitlines()[-1].split("; to go on: python ")
        assert told == f"stopped after step {step} of 10000, which is saved"
        command = [Path(shlex.split(printed)[0]), *shlex.split(printed)[1:]]
        assert not (run / "summary.json").exists()


def test_a_run_that_fails_says_why_and_how_to_go_on_in_one_line(runs, tiny, tmp_path, call, monkeypatch):
    """By a disk that is full from step 4 on. The command is run as it was printed, and ends as if nothing had been."""
    run, plain = tmp_path / "run", runs("plain")
    metrics = RunLog.metrics

    def full(log, step, stats):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        metrics(log, step, stats)

    monkeypatch.setattr(RunLog, "metrics", full)
    error, _ = call(SCRIPT, *models(tiny), *SMALL, "--seed", "3", "--output", run)
    told, printed = error.split("; to go on: python ")
    assert told.startswith("error: step 4 of 5 failed: OSError: ") and "No space left on device" in told
    assert f"saved up to step 2, in {run}/checkpoints/step-000002" in told and "\n" not in error
    monkeypatch.undo()
    error, _ = call(*shlex.split(printed))
    assert error is None and figures(run) == figures(plain)


# ---- prompts and recipes --------------------------------------------------------------------------------------------


def test_a_file_of_prompts_with_a_text_a_line(tiny, tmp_path, call):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeff房间干净\r\n\n  \n早餐\n服务很好".encode())
    run = tmp_path / "run"
    error, _ = call(SCRIPT, *models(tiny), *SMALL, "--prompts", file, "--output", run)
    assert error is None
    table = (run / "before_after.md").read_text(encoding="utf-8").splitlines()[2:]
    assert [row.split(" | ")[0] for row in table] == ["| 房间干净", "| 早餐", "| 服务很好"] * 4


def test_a_long_prompt_is_a_prompt():
    """Longer than a file's name may be, and within the starter model's 128 positions."""
    assert prompt_pool(["很好" * 50]) == ["很好" * 50]


def test_the_original_recipe_is_the_chapter_s(tiny, tmp_path, call):
    arguments = ["--recipe", "original", "--steps", "1", "--batch-size", "4", "--output", tmp_path / "run"]
    assert call(SCRIPT, *models(tiny), *arguments)[0] is None
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))["ppo"]
    assert config["steps"] == 1
    assert {name: config[name] for name in CHAPTER} == {**CHAPTER, "batch_size": 4}
    assert PPOConfig.preset("original").batch_size == CHAPTER["batch_size"]
    assert config["max_grad_norm"] is None and config["logprobs_full_softmax"] is True
    assert config["top_p"] == 0.95 and config["temperature"] == 1
    (line,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert line["ppo/updates"] == 4 * 4


# ---- bad input ------------------------------------------------------------------------------------------------------


def damaged(tiny, tmp_path, model, change):
    """Arguments with a copy of one of the models, changed."""
    folder = tmp_path / "bad"
    shutil.copytree(tiny / model, folder)
    change(folder)
    return [*models(tiny), f"--{model}", folder]


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def prompt_file(tmp_path, content):
    (tmp_path / "prompts.txt").write_bytes(content)
    return ["--prompts", tmp_path / "prompts.txt"]


def full_folder(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("keep me")
    return ["--output", tmp_path / "full"]


BAD = {
    "output exists": (lambda tiny, tmp: full_folder(tmp), "full"),
    "no policy": (lambda tiny, tmp: ["--policy", tmp / "nowhere"], "nowhere"),
    "no reward": (lambda tiny, tmp: ["--reward", tmp / "nowhere"], "nowhere"),
    "policy is cut": (lambda tiny, tmp: damaged(tiny, tmp, "policy", cut), "model.safetensors"),
    "models swapped": (lambda tiny, tmp: ["--policy", tiny / "reward"], "bert"),
    "empty prompt file": (lambda tiny, tmp: prompt_file(tmp, b""), "prompt"),
    "misspelt prompt file": (lambda tiny, tmp: ["--prompts", "promts.txt"], "promts.txt"),  # and no prompt
    "prompt file not UTF-8": (lambda tiny, tmp: prompt_file(tmp, "酒店".encode("gb18030")), "utf-8"),
    "blank prompt": (lambda tiny, tmp: ["--prompts", "酒店", " "], "empty"),
    "long prompt": (lambda tiny, tmp: ["--prompts", "很好" * 14], "28 tokens|29 tokens"),
    "device": (lambda tiny, tmp: ["--device", "abacus"], "abacus"),
    "batch size": (lambda tiny, tmp: ["--batch-size", "0"], "batch_size"),
    "gen-len": (lambda tiny, tmp: ["--gen-len", "32"], "gen_len"),
    "resume nothing": (lambda tiny, tmp: ["--resume", tmp / "nowhere"], "nowhere"),
    "resume a model folder": (lambda tiny, tmp: ["--resume", tiny / "policy"], "policy"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_writes_nothing(tiny, tmp_path, call, name):
    make, named = BAD[name]
    arguments = make(tiny, tmp_path)
    if "--output" not in arguments:
        arguments = ["--output", tmp_path / "new", *arguments]
    before, before_tiny = snapshot(tmp_path), snapshot(tiny)
    try:
        error, shown = call(SCRIPT, *models(tiny), "--gen-len", "5", "--steps", "4", *arguments)
    except Exception as exception:
        pytest.fail(f"a traceback instead of one line: {exception!r}")
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error
    assert any(part in error for part in named.split("|")), error
    assert (shown, call.stderr) == ("", "")
    assert snapshot(tmp_path) == before and snapshot(tiny) == before_tiny


def test_a_resumed_run_has_the_prompts_it_was_started_with(tiny, tmp_path, call):
    """Whatever has become of their file since, and whatever the folder is in which it is resumed."""
    file, run = tmp_path / "prompts.txt", tmp_path / "run"
    file.write_text("房间\n", encoding="utf-8")
    assert call(SCRIPT, *models(tiny), *SMALL, "--prompts", file, "--output", run)[0] is None
    file.write_text("早餐\n", encoding="utf-8")
    before = content(run / "before_after.md")
    assert call(SCRIPT, "--resume", run)[0] is None
    assert content(run / "before_after.md") == before


def test_a_missing_extra_is_noticed_before_the_run_not_after_it(tiny, tmp_path, call, monkeypatch):
    for name in ["matplotlib", *(name for name in sys.modules if name.startswith("matplotlib."))]:
        monkeypatch.setitem(sys.modules, name, None)
    try:
        error, _ = call(SCRIPT, *models(tiny), *SMALL, "--output", tmp_path / "run")
    except ImportError as exception:
        pytest.fail(f"a traceback at the end instead of a line at the start: {exception}")
    assert isinstance(error, str) and ".[examples]" in error
    assert not (tmp_path / "run").exists()


# ---- the small scripts ----------------------------------------------------------------------------------------------


def test_explain_step_prints_a_row_a_token(tiny, call):
    error, shown = call(EXAMPLES / "explain_step.py", *models(tiny), "--prompt", "房间", "--batch-size", 4)
    assert error is None
    first, best, worst = shown.rstrip("\n").split("\n\n")
    assert first.startswith("mean score of the batch ")
    scores = []
    for block in (best, worst):
        title, *told = block.split("\n")
        at = next(i for i, line in enumerate(told) if line.split()[0] == "token")
        how_to_read, header, rows = " ".join(told[:at]), told[at], told[at + 1 :]
        assert how_to_read.count(".") == 2
        assert title.startswith("prompt '房间', score ")
        scores.append(float(title.rsplit(" ", 1)[1]))
        assert header.split() == (
            ["token", "logprob", "old_logprob", "ref_logprob", "kl", "reward", "value", "returns", "advantage"]
            + ["ratio", "clipped"]
        )
        assert len(rows) == PPOConfig().gen_len
        for row in rows:
            token, *numbers = row.split()
            assert token in VOCAB and len(numbers) in (9, 10) and numbers[9:] in ([], ["yes"])
            now, old, ref, kl, *_, ratio = map(float, numbers[:9])
            assert kl == pytest.approx(old - ref, abs=2e-4)
            assert ratio == pytest.approx(math.exp(now - old), rel=2e-3, abs=2e-4)
        assert any(float(row.split()[4]) != 0 for row in rows)  # the second step has a KL to show
    assert scores[0] > scores[1]


def test_seed_table_reads_the_summary_of_a_run(runs):
    pytest.importorskip("matplotlib")
    import seed_table

    summary = json.loads((runs("plain") / "summary.json").read_text(encoding="utf-8"))
    rows = [seed_table.row(seed, 90.0, {**summary, "policy/reward": seed / 4}) for seed in (1, 3)]
    header, _, first, second, mean, std = seed_table.markdown(rows).splitlines()
    column = header.split(" | ").index("reward after")
    cells = [line.split(" | ")[column] for line in (first, second, mean, std)]
    assert cells == ["0.250", "0.750", "0.500", "0.354"]  # std with n - 1
    assert rows[0]["minutes"] == 1.5


def test_the_seeds_are_drawn_as_a_mean_with_a_band(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    import seed_table

    bands, lines, fill, plot = [], [], Axes.fill_between, Axes.plot

    def noting(kept, drawn):
        return lambda ax, x, *ys, **style: (kept.append([list(v) for v in (x, *ys)]), drawn(ax, x, *ys, **style))[1]

    monkeypatch.setattr(Axes, "fill_between", noting(bands, fill))
    monkeypatch.setattr(Axes, "plot", noting(lines, plot))
    histories = [[{"reward/mean": r / 10, "objective/kl": r} for r in run] for run in ((1, 5), (3, 5), (8, 5))]
    seed_table.draw(histories, tmp_path / "curves.png")
    assert bands == [[[1, 2], [0.1, 0.5], [0.8, 0.5]], [[1, 2], [1, 5], [8, 5]]]
    assert lines == [[[1, 2], pytest.approx([0.4, 0.5])], [[1, 2], [4, 5]]]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
