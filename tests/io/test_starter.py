"""Where the starter weights are found, and what comes from them."""

import shutil
import sys

import pytest

import minirlhf
from minirlhf import GPT2, NGramScorer, SentimentReward, Tokenizer
from minirlhf.io import starter as module
from minirlhf.io.starter import FOLDERS


def test_a_checkout_has_them_and_they_load():
    found = minirlhf.starter()
    policy, tokenizer = GPT2.from_pretrained(found.policy), Tokenizer.from_pretrained(found.policy)
    assert policy.vocab_size == len(tokenizer) and all(map(tokenizer.encode_prompt, found.prompts))
    for scorer in (SentimentReward, NGramScorer):
        folder = found.reward if scorer is SentimentReward else found.second_scorer
        good, bad = scorer.from_pretrained(folder)(["房间很干净，非常满意", "房间很脏，非常失望"])
        assert good > bad
    assert found.policy in found and f"{found.reward}/../{FOLDERS[1]}" in found and "elsewhere" not in found


def test_the_package_counts_before_the_checkout(tmp_path, monkeypatch):
    for name in FOLDERS:
        (tmp_path / "minirlhf_starter" / name).mkdir(parents=True)
        (tmp_path / "minirlhf_starter" / name / "config.json").write_text("{}")
    (tmp_path / "minirlhf_starter/__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert minirlhf.starter().policy == str(tmp_path / "minirlhf_starter" / FOLDERS[0])
    shutil.rmtree(tmp_path / "minirlhf_starter" / FOLDERS[2])  # not whole
    assert minirlhf.starter().policy == str(module.CHECKOUT / FOLDERS[0])
    assert "minirlhf_starter" not in sys.modules  # looked for, and not imported
    monkeypatch.setattr(module, "CHECKOUT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"`pip install ./weights` in minirlhf's repository"):
        minirlhf.starter()


def test_a_model_with_their_vocabulary_descends_from_them(tmp_path):
    own = minirlhf.starter()
    assert own.descends(own.policy) and own.descends(own.second_scorer)
    assert not own.descends(str(tmp_path)) and not own.descends("my_module:my_reward")
    tokenizer = Tokenizer.from_pretrained(own.policy)
    tokenizer.save_pretrained(tmp_path / "tuned")
    assert own.descends(str(tmp_path / "tuned")) and str(tmp_path / "tuned") not in own
    Tokenizer([*tokenizer.vocab, "a word of their own"]).save_pretrained(tmp_path / "other")
    assert not own.descends(str(tmp_path / "other"))
