"""Rewards named as module:function, and what is said of bad ones."""

import sys
import warnings

import pytest

from conftest import make_bert, make_gpt2
from minirlhf import NGramScorer, RewardModel, SentimentReward
from minirlhf.rewards.scorers import imported_reward, is_import, load_scorer


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a module into the current folder; it is forgotten after the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)

    def write(name, content):
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content, encoding="utf-8")

    yield write
    for name in set(sys.modules) - before:
        if name.startswith("reward_of_mine"):
            del sys.modules[name]


def test_functions_and_attributes_are_found(written):
    written("reward_of_mine", "class Judge:\n    def score(self, texts):\n        return [1.0]\n\njudge = Judge()\n"
            "def count(texts):\n    return [len(t) for t in texts]\n")  # fmt: skip
    assert imported_reward("reward_of_mine:count")(["ab"]) == [2]
    assert load_scorer("reward_of_mine:judge.score")(["ab"]) == [1.0]


def test_a_folder_is_what_its_config_says(tmp_path, tokenizer):
    labels = {0: "negative", 1: "positive"}
    for name, model in (("bert", make_bert(id2label=labels)), ("one", make_bert(id2label={0: "reward"}))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    NGramScorer({"好": 1.0}, 0.0).save_pretrained(tmp_path / "ngrams")
    kinds = {"bert": SentimentReward, "one": RewardModel, "ngrams": NGramScorer}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a random classifier orders no canaries
        assert {name: type(load_scorer(tmp_path / name, device="cpu")) for name in kinds} == kinds
    make_gpt2().save_pretrained(tmp_path / "writer")
    with pytest.raises(ValueError, match="holds a 'gpt2' model without a reward head, expected a reward"):
        load_scorer(tmp_path / "writer")


def test_a_folder_of_such_a_name_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_import("a:b") and is_import("a.b:c.d")
    (tmp_path / "a:b").mkdir()
    for text in ("a:b", "a", "a:", ":b", "a:b:c", "./a:b", "a b:c", "a:b\n", "owner/name", None):
        assert not is_import(text)


@pytest.mark.parametrize(("content", "name", "message"), [
    ("", "reward_of_nobody:f", r"there is no module 'reward_of_nobody'"),
    ("", "reward_of_mine_2.sub:f", r"there is no module 'reward_of_mine_2.sub'"),
    ("x = 1\ny = 1 / 0", "reward_of_mine_2:f",
     r"importing reward_of_mine_2 raised ZeroDivisionError: .* \(line 2 of reward_of_mine_2.py\)"),
    ("import nothing_like_it", "reward_of_mine_2:f", r"raised ModuleNotFoundError: .*nothing_like_it.* \(line 1 of "),
    ("def f(:", "reward_of_mine_2:f", r"raised SyntaxError: .* \(line 1 of reward_of_mine_2.py\)"),
    ("raise SystemExit(3)", "reward_of_mine_2:f", r"raised SystemExit: 3 \(line 1"),
    ("raise ValueError('a\\nb')", "reward_of_mine_2:f", r"raised ValueError: a b \(line 1"),
    ("def lenght(texts): ...", "reward_of_mine_2:length", r"reward_of_mine_2 has no 'length'; did you mean 'lenght'\?"),
    ("def one(x): ...", "reward_of_mine_2:other", r"has no 'other'; it has one"),
    ("f = 3", "reward_of_mine_2:f", r"reward reward_of_mine_2:f must be a function, got a int"),
])  # fmt: skip
def test_bad_ones_are_one_line_that_names_the_module(written, content, name, message):
    written("reward_of_mine_2", content)
    with pytest.raises(ValueError, match=rf"reward {name}.*{message}|{message}") as caught:
        imported_reward(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_model_type_that_is_no_text_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": ["gpt2"]}')
    with pytest.raises(ValueError, match=r"config.json: model_type must be a text, got \['gpt2'\]"):
        load_scorer(tmp_path)
