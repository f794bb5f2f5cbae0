"""The n-gram scorer: its formula, its folder, and the one that ships."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from minirlhf import NGramScorer
from minirlhf.io.files import read_json, write_json
from minirlhf.io.model_folder import read_tensors, write_tensors
from minirlhf.rewards.sentiment import CANARIES

SHIPPED = Path(__file__).resolve().parents[2] / "weights" / "ngrams-chinese-reviews-sentiment"
WEIGHTS = {"好": 2.0, "不": -0.5, "不好": -4.0, "very": 3.0}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_worked_by_hand():
    scorer = NGramScorer(WEIGHTS, 0.25)
    odds = [0.25, 0.25 + 2, 0.25 + (2 - 0.5 - 4) / math.sqrt(3), 0.25 + 2, 0.25 + (2 + 3) / math.sqrt(2)]
    texts = ["", "好", "不好", "好x好 好", "VERY 好"]  # an n-gram counts once; case and white space do not
    assert [scorer.log_odds(text) for text in texts] == pytest.approx(odds)
    assert scorer(texts).tolist() == pytest.approx([sigmoid(x) for x in odds])
    assert scorer(["不 \n好"]).tolist() == pytest.approx([sigmoid(odds[2])])


def test_it_is_the_linear_model_of_scikit_learn():
    text = pytest.importorskip("sklearn.feature_extraction.text")
    texts = ["房间很好", "服务不好，very bad", "好好好", "早餐一般", "", "x" * 50]
    count = text.CountVectorizer(analyzer="char", ngram_range=(1, 3), binary=True, lowercase=False)
    present = count.fit_transform(["".join(t.split()) for t in texts]).toarray().astype(float)
    weights = np.random.default_rng(0).normal(size=present.shape[1])
    norms = np.maximum(1, np.linalg.norm(present, axis=1))
    expected = 0.3 + present @ weights / norms
    scorer = NGramScorer(dict(zip(count.get_feature_names_out().tolist(), weights.tolist(), strict=True)), 0.3)
    assert [scorer.log_odds(t) for t in texts] == pytest.approx(expected)


@pytest.mark.parametrize("text", ["\x00", "\ud800", "\u202e|<b>", "好" * 100_000, "\u2028\x85 \n"])
def test_any_text_has_a_score(text):
    assert 0 <= NGramScorer(WEIGHTS, 0.0)([text]).item() <= 1


@pytest.mark.parametrize(("weights", "bias", "message"), [
    ({}, 0.0, "weights is empty"), ({"": 1.0}, 0.0, "n-gram must be"), ({"a b": 1.0}, 0.0, "n-gram must be .*'a b'"),
    ({"A": 1.0}, 0.0, "lower case"), ({"a\n": 1.0}, 0.0, "white space"), ({"a": math.nan}, 0.0, "'a' must be a finite"),
    ({"a": 1.0}, math.inf, "bias must be a finite number, got inf"),
])  # fmt: skip
def test_bad_weights_are_refused(weights, bias, message):
    with pytest.raises(ValueError, match=message):
        NGramScorer(weights, bias)


def test_a_single_text_is_refused():
    with pytest.raises(ValueError, match="texts must be a list"):
        NGramScorer(WEIGHTS, 0.0)("好")


# ---- its folder -----------------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(tmp_path):
    scorer = NGramScorer({"好": 0.1, "\U0001f600": -0.2, "ab": 7.0, "#": 1e-3}, -0.7)
    scorer.save_pretrained(tmp_path / "s", torch.float64)
    loaded = NGramScorer.from_pretrained(tmp_path / "s")
    assert list(loaded.weights.items()) == list(scorer.weights.items()) and loaded.bias == scorer.bias
    scorer.save_pretrained(tmp_path / "s", torch.float16)  # over the old one
    halved = NGramScorer.from_pretrained(tmp_path / "s")
    assert halved.weights["ab"] == 7.0 and 0 < abs(halved.weights["好"] - 0.1) < 1e-4
    with pytest.raises(ValueError, match="infinite"):
        NGramScorer({"a": 1e6}, 0.0).save_pretrained(tmp_path / "s", torch.float16)
    assert NGramScorer.from_pretrained(tmp_path / "s").weights == halved.weights


def no_ngrams(folder):
    (folder / "ngrams.txt").unlink()


def one_less(folder):
    path = folder / "ngrams.txt"
    path.write_bytes(path.read_bytes().split(b"\n", 1)[1])


def doubled(folder):
    (folder / "ngrams.txt").write_text("好\n" * 4, encoding="utf-8")


def of_gbk(folder):
    path = folder / "ngrams.txt"
    path.write_bytes(path.read_text(encoding="utf-8").encode("gbk"))


def with_crlf(folder):
    path = folder / "ngrams.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def not_finite(folder):
    tensors = read_tensors(folder / "model.safetensors")
    write_tensors(folder / "model.safetensors", {**tensors, "bias": torch.tensor([math.nan])})


def of_integers(folder):
    tensors = read_tensors(folder / "model.safetensors")
    write_tensors(folder / "model.safetensors", {**tensors, "weight": torch.arange(4)})


def cut(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def other_model(folder):
    write_json(folder / "config.json", {"model_type": "bert"})


def no_model(folder):
    write_json(folder / "config.json", {})


def later_format(folder):
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "format": 2})


@pytest.mark.parametrize(("damage", "error", "message"), [
    (no_ngrams, FileNotFoundError, "ngrams.txt does not exist"), (one_less, ValueError, "weight has shape"),
    (doubled, ValueError, "ngrams.txt: an n-gram occurs twice"), (of_gbk, ValueError, "ngrams.txt: .*utf-8"),
    (with_crlf, ValueError, "n-gram must be"), (not_finite, ValueError, "bias holds NaN"),
    (of_integers, ValueError, "weight has dtype"), (cut, ValueError, "not a readable safetensors"),
    (other_model, ValueError, "holds a 'bert' model"), (no_model, ValueError, "holds a '' model"),
    (later_format, ValueError, "format=2; only 1"), (shutil.rmtree, FileNotFoundError, "scorer"),
])  # fmt: skip
def test_a_damaged_folder_is_one_clear_error(tmp_path, damage, error, message):
    NGramScorer(WEIGHTS, 0.0).save_pretrained(tmp_path / "scorer")
    damage(tmp_path / "scorer")
    with pytest.raises(error, match=message) as raised:
        NGramScorer.from_pretrained(tmp_path / "scorer")
    assert "scorer" in str(raised.value)


# ---- the one that ships ---------------------------------------------------------------------------------------------

LABELLED = [
    ("房间干净整洁，服务态度非常好，下次还会入住", 1), ("早餐丰富，位置方便，性价比很高，推荐", 1),
    ("手机很好用，反应快，物流也很快，满意", 1), ("水果很新鲜，很甜，家人都喜欢", 1),
    ("房间很脏，还有异味，服务员态度恶劣", 0), ("隔音太差，一晚上没睡好，再也不会住了", 0),
    ("质量太差了，用了两天就坏了，客服不理人", 0), ("收到的苹果都烂了，非常失望，差评", 0),
]  # fmt: skip


def test_the_shipped_scorer_knows_good_from_bad():
    scorer = NGramScorer.from_pretrained(SHIPPED)
    assert [round(p) for p in scorer([text for text, _ in LABELLED]).tolist()] == [label for _, label in LABELLED]
    good, bad = scorer(list(CANARIES)).tolist()
    assert good > 0.9 and bad < 0.1


def test_the_shipped_scorer_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) < 1.5e6
    assert sum(path.stat().st_size for path in SHIPPED.parent.rglob("*") if path.is_file()) < 24e6
