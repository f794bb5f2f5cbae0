"""Texts and models of other languages beside the starter weights."""

import warnings

import pytest
from bpe import write_published

import minirlhf
from minirlhf import Tokenizer
from minirlhf.io import starter as module
from minirlhf.text.language import is_foreign, warn_of_language

OWN = minirlhf.starter()
ENGLISH, CHINESE = ["The room", "was 好", "clean"], ["酒店很好", "wifi 很好"]


@pytest.fixture(autouse=True)
def every_warning_is_an_error():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_texts_are_foreign_if_most_have_no_chinese_character():
    assert is_foreign(["hello"]) and is_foreign(ENGLISH)
    assert not is_foreign(["酒店 hotel", "wifi"]) and not is_foreign([])


@pytest.mark.parametrize("folders", [[OWN.policy], [None, "x", OWN.reward], [OWN.second_scorer, "module:function"]])
def test_foreign_texts(folders):
    with pytest.warns(UserWarning, match=r"the starter weights are Chinese.* \(the first: 'The room'\)$"):
        warn_of_language(["  ", *ENGLISH], *folders)
    warn_of_language(CHINESE, *folders)
    warn_of_language([], *folders)


def test_foreign_texts_for_a_model_that_was_trained_from_them(tmp_path):
    Tokenizer.from_pretrained(OWN.policy).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="the starter weights are Chinese"):
        warn_of_language(ENGLISH, str(tmp_path))


def test_a_foreign_model_beside_them(tmp_path):
    english, chinese = tmp_path / "english", tmp_path / "chinese"
    Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "room"]).save_pretrained(english)
    Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"酒店周围位置前台"]).save_pretrained(chinese)
    for texts, folders in ((CHINESE, [english, OWN.reward]), (OWN.prompts, [english]), ([], [OWN.policy, english])):
        with pytest.warns(UserWarning, match=f"the vocabulary of {english} is not: name prompts and models of one"):
            warn_of_language(texts, *map(str, folders))
    warn_of_language(CHINESE, str(english))  # neither weights nor prompts of the starter
    warn_of_language(OWN.prompts, OWN.policy, str(chinese), OWN.reward, str(tmp_path / "nowhere"))


def test_bytes_are_no_chinese(tmp_path):
    write_published(tmp_path)  # spells every character, by two or three tokens
    with pytest.warns(UserWarning, match="is not"):
        warn_of_language(OWN.prompts, str(tmp_path))


def test_without_starter_weights_there_is_nothing_to_say(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "CHECKOUT", tmp_path)
    warn_of_language(ENGLISH, OWN.policy)
