"""examples/shared.py: the command line of the examples, and how they end."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import minirlhf
import shared

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ESCAPE = "\x1b[31mred\x1b[0m\u202e"


@pytest.fixture
def read(monkeypatch):
    parser = shared.command_line("x", count=(3, "a"), rate=(0.5, "b"), names=(["p"], "c"), flag=(False, "d"),
                                 seed=(int, "e"), resume=(str, "f"))  # fmt: skip

    def parse(*arguments):
        monkeypatch.setattr("sys.argv", ["x.py", *map(str, arguments)])
        return shared.parse(parser)

    return parse


def test_a_default_decides_what_an_option_takes(read):
    assert vars(read()) == dict(count=3, rate=0.5, names=["p"], flag=False, seed=None, resume=None)
    given = read("--count", 4, "--rate", "1e-3", "--names", "q", "r", "--flag", "--seed", 7)
    assert vars(given) == dict(count=4, rate=0.001, names=["q", "r"], flag=True, seed=7, resume=None)


def test_a_resumed_run_has_the_arguments_that_it_was_started_with(read, tmp_path):
    started = vars(read("--count", 4, "--flag"))
    (tmp_path / "config.json").write_text(json.dumps({"arguments": started}))
    assert vars(read("--resume", tmp_path)) == {**started, "resume": str(tmp_path)}
    with pytest.raises(ValueError, match="keeps its settings, so drop count, seed"):
        read("--resume", tmp_path, "--count", 5, "--seed", 1)
    for content in ({}, {"arguments": 3}, {"arguments": {**started, "other": 1}}):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match="is no run of this script"):
            read("--resume", tmp_path)


def test_prompts_come_from_a_file_if_the_only_one_names_it(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "酒店"}\n{"prompt": "早餐"}\n', encoding="utf-8")
    assert shared.prompt_pool([str(tmp_path / "p.jsonl")]) == ["酒店", "早餐"]
    assert shared.prompt_pool(["酒店", "p.jsonl"]) == ["酒店", "p.jsonl"]
    with pytest.raises(FileNotFoundError):
        shared.prompt_pool(["nowhere.jsonl"])


ENGLISH = {
    "controlled_sentiment.py": ["--policy", "english"],  # its prompts are Chinese
    "dpo.py": ["--pairs", "english.tsv"],
    "explain_step.py": ["--prompt", "the room"],
    "human_feedback.py": ["--prompts", "the room"],
    "judge_reward.py": ["--prompts", "the room", "--base-url", "http://127.0.0.1:1/v1", "--model", "m"],
    "positive_reviews.py": ["--prompts", "english.txt"],
    "reward_model.py": ["--rankings", "english.tsv", "--judge", "none"],
    "sft_reviews.py": ["--texts", "english.txt"],
}


@pytest.mark.parametrize("script", ENGLISH)
def test_english_and_the_starter_weights_meet_with_a_warning(script, tmp_path, call, monkeypatch):
    def enough(*args, **options):
        raise ValueError("enough")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(minirlhf, "load_decoder", enough)
    monkeypatch.setattr(minirlhf.SentimentReward, "from_pretrained", enough)
    Path("english.txt").write_text("".join(f"the room {i}\n" for i in range(60)), encoding="utf-8")
    Path("english.tsv").write_text("".join(f"good {i}\tbad {i}\n" for i in range(60)), encoding="utf-8")
    minirlhf.Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "room"]).save_pretrained("english")
    with pytest.warns(UserWarning, match="Chinese"):
        error, shown = call(EXAMPLES / script, *ENGLISH[script])
    assert error.startswith("error: ") and shown == ""  # before anything was done


@pytest.mark.parametrize("script", sorted(path.name for path in EXAMPLES.glob("*.py") if path.name != "shared.py"))
def test_a_tensor_s_name_cannot_steer_the_terminal(script, tmp_path, tiny, call):
    """Every option that takes a model gets a folder whose tensors have an escape sequence in their names."""
    source = (EXAMPLES / script).read_text(encoding="utf-8")
    names, shown_escaped = ("policy", "model", "reward", "judge", "second_scorer"), False
    folders = [name for name in names if f" {name}=(" in source]
    if not folders:
        assert script in ("ppo_in_one_file.py", "grpo_in_one_file.py")  # they read the starter weights alone
        return
    (tmp_path / "texts.txt").write_text("".join(f"酒店很好{i}\n" for i in range(60)), encoding="utf-8")
    (tmp_path / "lists.tsv").write_text("".join(f"好{i}\t差{i}\n" for i in range(60)), encoding="utf-8")
    needed = {"sft_reviews.py": ["--texts", tmp_path / "texts.txt"],
              "dpo.py": ["--online"],
              "reward_model.py": ["--rankings", tmp_path / "lists.tsv"],
              "judge_reward.py": ["--base-url", "http://127.0.0.1:1/v1", "--model", "m"]}  # fmt: skip
    for name in folders:
        if (script, name) == ("judge_reward.py", "model"):
            continue
        kind = "reward" if name in ("reward", "judge") else "second" if name == "second_scorer" else "policy"
        bad = tmp_path / name
        bad.mkdir()
        for path in (tiny / kind).iterdir():
            if path.name != "model.safetensors":
                (bad / path.name).write_bytes(path.read_bytes())
        tensors = load_file(tiny / kind / "model.safetensors")
        save_file({**tensors, f"{ESCAPE}.weight": torch.zeros(2)}, bad / "model.safetensors")
        good = ["--policy", tiny / "policy"] if " policy=(" in source and name != "policy" else []
        error, shown = call(EXAMPLES / script, *needed.get(script, []), *good, f"--{name.replace('_', '-')}", bad,
                            *(["--output", tmp_path / "out"] if " output=(" in source else []))  # fmt: skip
        assert isinstance(error, str) and error.startswith("error: "), (name, error)
        assert not re.search("[\x00-\x1f\x7f\u202e]", error + shown.replace("\n", "")), (name, error)
        shown_escaped |= "\\x1b[31mred" in error
    # The small vocabulary has no tags, which is found first; without the rest this test would show nothing.
    assert shown_escaped or script == "controlled_sentiment.py"
