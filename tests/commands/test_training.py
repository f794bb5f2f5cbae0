"""train, sft, reward-model and resume: what they leave, what they are told, and what they refuse."""

import functools
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch

from minirlhf import GPT2, PPOConfig, RewardModel, Run
from minirlhf.commands import training
from minirlhf.evaluation import results
from minirlhf.io import starter as starter_module
from minirlhf.runs.locks import FolderLock

SMALL = ["--steps", 8, "--batch-size", 4, "--minibatch-size", 4, "--gen-len", 4, "--device", "cpu", "--ppo-epochs", 1]


@pytest.fixture
def run(cli, monkeypatch, tmp_path):
    """Exit code, stdout, stderr; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return cli


def started(folder):
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def weights(folder):
    return GPT2.from_pretrained(folder).state_dict()


def assert_equal(mine, other):
    assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


# ---- PPO ------------------------------------------------------------------------------------------------------------


def test_train_leaves_a_run_with_its_results(run, tiny, tmp_path, monkeypatch):
    small = functools.partial(results.EvaluationConfig, samples=8, best_of_prompts=4, resamples=50)
    monkeypatch.setattr(results, "EvaluationConfig", small)
    (tmp_path / "p.jsonl").write_text('{"prompt": "酒店"}\n{"prompt": "位置"}', encoding="utf-8")
    (tmp_path / "c.yaml").write_text("prompts: p.jsonl\nlr: 1e-3\nsteps: 999\nseed: 5\n", encoding="utf-8")
    models = ["--policy", tiny / "policy", "--reward", tiny / "reward"]
    code, out, err = run("train", *models, *SMALL, "--config", "c.yaml", "--output", "out")
    assert code == 0, err
    assert "saved in out" in out and "policy/reward" in out and "iteration 2 of 2" in out
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert there >= {"policy", "reference", "summary.json", "before_after.md", "metrics.jsonl", "config.json"}
    config = started(tmp_path / "out")
    assert config["command"] == "train" and config["arguments"]["prompts"] == ["酒店", "位置"]
    ppo = config["ppo"]
    assert (ppo["lr"], ppo["steps"], ppo["seed"], ppo["init_kl_coef"]) == (1e-3, 8, 5, 0.2)  # flags win
    assert_equal(weights("out/reference"), weights(tiny / "policy"))
    card = (tmp_path / "out/policy/README.md").read_text(encoding="utf-8")
    assert "PPO" in card and "policy/reward" in card
    code, out, err = run("evaluate", "--run", "out", "--reward", tiny / "reward", "--samples", 4, "--best-of", 1)
    assert code == 0, err
    code, out, err = run("push", "out", "alice/small", "--dry-run")
    assert (code, err) == (0, "") and out.splitlines()[0] == "out/policy to alice/small:"


def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(run, tiny, tmp_path, monkeypatch):
    common = ["--policy", tiny / "policy", "--reward", tiny / "reward", "--prompts", "酒店", "位置", *SMALL,
              "--no-evaluation", "--save-freq", 1, "--lr", 1e-2]  # fmt: skip
    assert run("train", *common, "--output", "whole")[0] == 0
    record = Run.record

    def stopping(self, *args):
        self._stop.made = self.trainer.steps_done == 1
        return record(self, *args)

    monkeypatch.setattr(Run, "record", stopping)
    code, _, err = run("train", *common, "--output", "half")
    assert code == 130 and err.endswith("stopped after step 1 of 2, which is saved; to go on: minirlhf resume half\n")
    code, _, err = run("push", "half", "alice/small", "--dry-run")
    assert code == 1 and "half has not come to its end" in err
    monkeypatch.setattr(Run, "record", record)
    monkeypatch.chdir(tiny)  # from elsewhere
    assert run("resume", tmp_path / "half")[0] == 0
    assert_equal(weights(tmp_path / "half/policy"), weights(tmp_path / "whole/policy"))
    assert not torch.equal(weights(tmp_path / "whole/policy")["wte.weight"], weights(tiny / "policy")["wte.weight"])
    assert not (tmp_path / "whole/summary.json").exists()  # --no-evaluation


def test_a_function_of_the_user_s_is_a_reward_and_is_found_again(run, tiny, tmp_path):
    (tmp_path / "my_reward_of_length.py").write_text("def longer(texts):\n    return [len(text) for text in texts]\n")
    models = ["--policy", tiny / "policy", "--reward", "my_reward_of_length:longer", "--prompts", "酒店"]
    code, _, err = run("train", *models, *SMALL, "--no-evaluation", "--output", "out")
    assert code == 0, err
    assert run("resume", "out")[0] == 0  # it has ended, so only its results are written again
    sys.modules.pop("my_reward_of_length")


def test_without_arguments_it_is_the_default_run_on_the_starter_weights(run, monkeypatch):
    seen = []
    monkeypatch.setattr(training, "load_decoder", lambda folder: seen.append(folder))
    monkeypatch.setattr(training, "PPOTrainer", lambda *args: seen.append(args[-1]) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("train")
    own, config = starter_module.starter(), seen[1]
    assert seen[0] == own.policy and (config.steps, config.lr, config.advantages) == (10240, 1.2e-4, "rloo_to_go")
    with pytest.raises(ZeroDivisionError):
        run("train", "--algorithm", "grpo", "--top-p", 0.5)
    config = seen[3]  # the method, at the scale of these weights
    assert (config.advantages, config.group_size, config.top_p, config.lr) == ("grpo", 8, 0.5, 1.2e-4)
    with pytest.raises(ZeroDivisionError):
        run("train", "--algorithm", "trl2020")
    assert seen[5] == PPOConfig.preset("trl2020")


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("command", "option"), [
    ("train", "--prompts"), ("sft", "--texts"), ("reward-model", "--rankings"), ("dpo", "--pairs"),
])  # fmt: skip
def test_english_texts_and_the_starter_weights(run, monkeypatch, command, option):
    def enough(*args, **options):
        raise ValueError("enough")

    monkeypatch.setattr(training, "load_decoder", enough)
    monkeypatch.setattr(training.RewardModel, "from_trunk", enough)
    ranked = option in ("--rankings", "--pairs")
    for language, said in (("the room is {}", True), ("酒店有{}", False)):
        lines = [language.format(i) + (f"\t{language.format(i)}!" if ranked else "") for i in range(60)]
        file = Path("ranked.tsv" if ranked else "texts.txt")
        file.write_text("\n".join(lines), encoding="utf-8")
        shown = run(command, option, file)[2].splitlines()
        assert [line.startswith("warning: the starter weights are Chinese") for line in shown[:-1]] == [True] * said
        assert shown[-1] == "error: enough"


def test_the_judge_s_settings_are_flags(tiny):
    judge = {"base_url": "http://127.0.0.1:1/v1", "model": "m", "rubric": "r", "high": 4.0}
    arguments = {"policy": str(tiny / "policy"), "reward": "judge", "judge": judge, "algorithm": "ppo"}
    assert training._ppo_config(arguments, {}).score_scale == 0.25
    assert training._ppo_config(arguments, {"score_scale": 2.0}).score_scale == 2.0
    pytest.importorskip("openai")
    found = training.reward_of(arguments, "cpu")
    assert found.config.high == 4.0 and found.config.rubric == "r"


@pytest.mark.parametrize(("arguments", "message"), [
    (["--policy", "POLICY"], r"--policy .* needs --reward and --prompts: .* starter weights, which are Chinese"),
    (["--algorithm", "ppp"], r"algorithm must be one of ppo, original, .*, got 'ppp'"),
    (["--lr", "-1"], r"PPOConfig.lr must be a finite number above 0, got -1.0"),
    (["--reward", "nowhere"], r"nowhere.* does not exist"),
    (["--reward", "no_such_module:f"], r"reward no_such_module:f: there is no module 'no_such_module'"),
    (["--reward", "judge", "--judge-model", "m"], r"--reward judge needs --judge-base-url and --judge-rubric"),
    (["--judge-low", "1"], r"--judge-low needs --reward judge"),
    (["--prompts", "nowhere.jsonl"], r"nowhere.jsonl does not exist"),
    (["--prompts", "房" * 30, "--policy", "POLICY", "--reward", "SECOND", "--gen-len", "4"],
     r"prompt .* has 31 tokens"),
    (["--config", "nowhere.yaml"], r"nowhere.yaml"),
])  # fmt: skip
def test_bad_input_is_one_line_before_anything_is_written(run, tiny, tmp_path, arguments, message):
    places = {"POLICY": str(tiny / "policy"), "SECOND": str(tiny / "second")}
    code, out, err = run("train", *[places.get(each, each) for each in arguments])
    assert code == 1 and out == "" and err.count("\n") == 1, err
    assert re.search(rf"error: .*{message}", err), err
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_being_written_is_refused(run, tiny, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/checkpoints").mkdir()
    (tmp_path / "out/config.json").write_text('{"command": "train", "arguments": {}}')
    lock = FolderLock(tmp_path / "out")
    try:
        for command in (["train", "--output", "out"], ["resume", "out"], ["push", "out", "a/b"]):
            code, out, err = run(*command)
            assert (code, out) == (1, "") and err.startswith("error: out is in use by process"), err
    finally:
        lock.release()
    assert run("train", "--output", "out")[2].startswith("error: out exists and is not empty")


def test_a_run_of_a_script_is_resumed_where_it_began(run, tmp_path):
    (tmp_path / "config.json").write_text('{"why": "mine"}')
    code, _, err = run("resume", tmp_path)
    assert code == 1 and "was not begun by a command of minirlhf" in err


# ---- the stages before it -------------------------------------------------------------------------------------------


def test_sft_learns_and_resumes(run, tiny, tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("".join(f"酒店很好{i}\n" for i in range(60)), encoding="utf-8")
    common = ["sft", "--model", tiny / "policy", "--texts", "t.txt", "--max-length", 16, "--tokens-per-batch", 256,
              "--epochs", 2, "--lr", 1e-2, "--device", "cpu", "--save-freq", 2]  # fmt: skip
    assert run(*common, "--output", "whole")[0] == 0
    summary = json.loads((tmp_path / "whole/summary.json").read_text())["perplexity a token"]
    assert summary["after"] < 0.5 * summary["before"]
    record = Run.record

    def failing(self, *args):
        if self.trainer.steps_done == 3:
            raise OSError("disk full")
        return record(self, *args)

    monkeypatch.setattr(Run, "record", failing)
    code, _, err = run(*common, "--output", "half")
    assert code == 1 and "disk full" in err and err.endswith("to go on: minirlhf resume half\n")
    monkeypatch.setattr(Run, "record", record)
    assert run("resume", "half")[0] == 0
    assert_equal(weights("half/policy"), weights("whole/policy"))
    for data in ([], ["--texts", "nowhere.txt"]):
        code, _, err = run("sft", *data)
        assert code == 1 and ("give --texts FILE" in err or "nowhere.txt does not exist" in err)


def test_a_reward_model_learns_and_is_normalised(run, tiny, tmp_path):
    (tmp_path / "r.tsv").write_text("".join(f"很好{i}\t太差{i}\n" for i in range(60)), encoding="utf-8")
    common = ["reward-model", "--model", tiny / "policy", "--rankings", "r.tsv", "--max-length", 16,
              "--tokens-per-batch", 128, "--epochs", 3, "--lr", 1e-2, "--device", "cpu"]  # fmt: skip
    code, out, err = run(*common, "--output", "rm")
    assert code == 0, err
    reward = RewardModel.from_pretrained("rm/reward", device="cpu")
    assert (reward(["很好7", "很好9"]) > reward(["太差7", "太差9"])).all() and reward.std != 1.0
    assert json.loads((tmp_path / "rm/summary.json").read_text())["held-out accuracy"]["after"] == 1.0
    assert run("resume", "rm")[0] == 0
    code, out, err = run("push", "rm", "alice/rm", "--dry-run")
    assert code == 0 and "rm/reward to alice/rm:" in out


def test_dpo_learns_and_resumes(run, tiny, tmp_path, monkeypatch):
    lines = (json.dumps({"prompt": "酒店", "chosen": f"很好{i}", "rejected": f"太差{i}"}) for i in range(60))
    (tmp_path / "p.jsonl").write_text("\n".join(lines), encoding="utf-8")
    common = ["dpo", "--policy", tiny / "policy", "--pairs", "p.jsonl", "--max-length", 16, "--tokens-per-batch", 512,
              "--batch-size", 16, "--epochs", 1, "--lr", 1e-2, "--device", "cpu", "--save-freq", 1]  # fmt: skip
    code, _, err = run(*common, "--output", "whole")
    assert code == 0, err
    assert json.loads((tmp_path / "whole/summary.json").read_text())["held-out accuracy"]["after"] == 1.0
    record = Run.record

    def failing(self, *args):
        if self.trainer.steps_done == 2:
            raise OSError("disk full")
        return record(self, *args)

    monkeypatch.setattr(Run, "record", failing)
    assert run(*common, "--output", "half")[0] == 1
    monkeypatch.setattr(Run, "record", record)
    code, _, err = run("resume", "half")
    assert code == 0, err
    assert_equal(weights("half/policy"), weights("whole/policy"))
