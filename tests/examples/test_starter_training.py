"""weights/train: the review data, files for the examples, the starter's language model, and the second scorer."""

import argparse
import csv
import json
import random
import re
from pathlib import Path

import pytest

import reviews_data
import train_starter_weights as starter
from folders import snapshot
from minirlhf import NGramScorer, Tokenizer, load_decoder
from minirlhf.text.demonstrations import read_demonstrations
from minirlhf.text.preferences import read_rankings
from minirlhf.text.tokenizer import build_vocab

TRAIN = Path(__file__).resolve().parents[2] / "weights" / "train"

# ---- the reviews ----------------------------------------------------------------------------------------------------

HOTEL = [("1", "房间很好。"), ("0", "太差"), ("1", "一般"), ("0", "一般"), ("1", ""), ("0", "。。！")]
SHOPPING = [
    ("书籍", "1", "房间很好！！"),  # differs from the hotel review in punctuation alone
    ("书籍", "0", "推荐，推荐"),
    ("书籍", "1", "\ufeff推荐 推荐  。"),  # the same with the other label
    ("平板", "1", "WiFi  很\n好"),
    ("平板", "1", "wifi很好"),
]


def write_csv(path, header, rows, encoding="utf-8-sig"):
    with open(path, "w", encoding=encoding, newline="") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture
def data(tmp_path):
    write_csv(tmp_path / reviews_data.HOTEL_FILE, ["label", "review"], HOTEL)
    write_csv(tmp_path / reviews_data.SHOPPING_FILE, ["cat", "label", "review"], SHOPPING)
    return tmp_path


def test_reviews_are_loaded_without_duplicates_contradictions_and_marks(data):
    loaded = [(r.text, r.label, r.category) for r in reviews_data.load_reviews(data)]
    assert loaded == [("房间很好。", 1, "酒店"), ("太差", 0, "酒店"), ("WiFi 很 好", 1, "平板")]


def test_a_missing_file_is_named(data):
    for name in (reviews_data.SHOPPING_FILE, reviews_data.HOTEL_FILE):
        (data / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            reviews_data.load_reviews(data)


@pytest.mark.parametrize("column", ["cat", "label", "review"])
def test_a_missing_column_is_named_with_its_file(data, column):
    header = [name if name != column else "other" for name in ("cat", "label", "review")]
    write_csv(data / reviews_data.SHOPPING_FILE, header, SHOPPING)
    with pytest.raises(ValueError, match=rf"{reviews_data.SHOPPING_FILE} has no column '{column}'"):
        reviews_data.load_reviews(data)


def test_bad_rows_and_damaged_files_are_named(data):
    path = data / reviews_data.HOTEL_FILE
    write_csv(path, ["label", "review"], [("1", "好"), ("2", "差")])
    with pytest.raises(ValueError, match=rf"{path.name}, line 3: bad column 'label'"):
        reviews_data.load_reviews(data)
    path.write_text("label,review\n1,好\n1\n", encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{path.name}, line 3: bad column 'review'"):
        reviews_data.load_reviews(data)
    path.write_bytes("label,review\n1,好\n".encode("gb18030"))
    with pytest.raises(ValueError, match=rf"{path.name} is damaged"):
        reviews_data.load_reviews(data)


def make_reviews(count=4000, seed=0):
    """Distinct random texts, two of three positive."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices("酒店房间干净服务很好非常满意脏太差", k=rng.randint(25, 40))) for _ in range(count)]
    assert len(set(texts)) == count
    return [reviews_data.Review(text, int(i % 3 > 0), "酒店") for i, text in enumerate(texts)]


def test_the_split_is_balanced_disjoint_and_a_tenth():
    reviews = make_reviews()
    train, held_out = reviews_data.split_reviews(reviews)
    assert not set(train) & set(held_out) and set(train) | set(held_out) <= set(reviews)
    for side in (train, held_out):
        assert sum(review.label for review in side) * 2 == len(side)
    # All of the rarer label stay: 1334 negatives.
    assert len(train) + len(held_out) == 2 * sum(review.label == 0 for review in reviews)
    assert 0.08 < len(held_out) / (len(train) + len(held_out)) < 0.12
    kept = set(train)
    assert train == [review for review in reviews if review in kept]  # in the order given


def test_the_split_depends_on_the_texts_alone():
    reviews = make_reviews()
    shuffled = random.Random(1).sample(reviews, len(reviews))
    random.seed(5)  # nor on the global generator
    for one, other in zip(reviews_data.split_reviews(reviews), reviews_data.split_reviews(shuffled), strict=True):
        assert set(one) == set(other) and one != other


def test_texts_with_the_same_beginning_fall_on_the_same_side():
    reviews = make_reviews(300)
    copies = [reviews_data.Review(r.text[:22] + "，" + r.text[22:] + "推荐", r.label, r.category) for r in reviews]
    train, held_out = ({r.text[:20] for r in side} for side in reviews_data.split_reviews([*reviews, *copies]))
    assert train and held_out and not train & held_out


def test_openings_are_prefixes_of_10_to_20_characters():
    texts = [review.text for review in make_reviews(500)]
    openings = [reviews_data.opening(text) for text in texts]
    assert all(text.startswith(part) for text, part in zip(texts, openings, strict=True))
    assert {len(part) for part in openings} == set(range(10, 21))
    assert openings == [reviews_data.opening(text) for text in texts]
    assert {len(reviews_data.opening(text, 3, 5)) for text in texts} == {3, 4, 5}
    assert reviews_data.opening("很好") == "很好"


# ---- files for the examples -----------------------------------------------------------------------------------------


def test_pairs_are_positive_before_negative_of_one_kind():
    given = [reviews_data.Review(f"{mark}{kind}{i}", label, kind) for i in range(20)
             for label, mark in ((1, "好"), (0, "差")) for kind in ("书籍", "水果")]  # fmt: skip
    pairs = reviews_data.make_pairs(given, 0)
    assert len(pairs) == 40 and len({answer for pair in pairs for answer in pair}) == 80
    for good, bad in pairs:
        assert (good[0], bad[0]) == ("好", "差") and good[1:3] == bad[1:3]
    assert reviews_data.make_pairs(given, 0) == pairs != reviews_data.make_pairs(given, 1)


def test_the_files_are_what_the_examples_read(call, many, tmp_path):
    """Every text on the side on which the split has it; the pairs of each side from its own reviews."""
    error, shown = call(TRAIN / "reviews_data.py", "--data", many, "--output", tmp_path / "new" / "reviews")
    assert error is None
    sides = reviews_data.split_reviews(reviews_data.load_reviews(many))
    for side, suffix in zip(sides, ("", "_held_out"), strict=True):
        texts = [one.response for one in read_demonstrations(tmp_path / f"new/reviews/demonstrations{suffix}.txt")]
        assert texts and texts == [r.text for r in side if r.label == 1 and r.category == "酒店"]
        rankings = read_rankings(tmp_path / f"new/reviews/rankings{suffix}.jsonl")
        assert [r.answers for r in rankings] == reviews_data.make_pairs(side, 0)
        assert f"rankings{suffix}.jsonl: {len(rankings)}" in shown
    error, _ = call(TRAIN / "reviews_data.py", "--data", tmp_path / "nowhere", "--output", tmp_path / "other")
    assert error.startswith("error: ") and "ChnSentiCorp_htl_all.csv" in error and not (tmp_path / "other").exists()


# ---- train_starter_weights.py ---------------------------------------------------------------------------------------


def test_both_shapes_of_the_language_model_are_of_one_size():
    counts = [sum(p.numel() for p in make(4457, 0.0, 0).parameters()) for make in starter.SHAPES.values()]
    assert max(counts) <= 1.001 * min(counts)


@pytest.mark.parametrize("family", starter.SHAPES)
def test_a_language_model_of_either_family_is_trained_and_measured(tmp_path, family):
    """One step on twenty short reviews; the folder is a policy."""
    reviews = make_reviews(20)
    tokenizer = Tokenizer(build_vocab(review.text for review in reviews))
    settings = dict(lm_epochs=1, precision="fp32", device="cpu", seed=0, output=tmp_path)
    starter.train_language_model(argparse.Namespace(**settings), family, tokenizer, reviews, reviews[:2])
    folder = tmp_path / f"{family}-chinese-reviews-small"
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["epochs"] == 1 and figures["cpu_minutes"] > 0
    assert 1 < figures["held_out"]["character"] < 2 * len(tokenizer)
    assert load_decoder(folder).config.__class__.__name__.lower() == f"{family}config"
    assert Tokenizer.from_pretrained(folder).vocab == tokenizer.vocab


# ---- train_ngram_scorer.py ------------------------------------------------------------------------------------------

GOOD, BAD = ["房间很干净", "服务态度很好", "早餐丰富", "非常满意"], ["房间太脏", "服务很差", "早餐难吃", "非常失望"]
FILLER = "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多"


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """The two CSV files, with reviews whose sentiment stands in two phrases among characters at random."""
    folder, draw = tmp_path_factory.mktemp("data"), random.Random(0)

    def review(label):
        words = draw.sample(GOOD if label else BAD, 2) + ["".join(draw.choices(FILLER, k=8)) for _ in range(3)]
        draw.shuffle(words)
        return "，".join(words)

    for name, columns in (("ChnSentiCorp_htl_all.csv", 2), ("online_shopping_10_cats.csv", 3)):
        with (folder / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["cat", "label", "review"][-columns:])
            writer.writerows([["书籍", i % 2, review(i % 2)][-columns:] for i in range(600)])
    return folder


def test_the_scorer_is_fitted_on_the_held_out_part_and_measured_on_what_it_has_not_seen(call, many, tmp_path):
    pytest.importorskip("sklearn")
    code, out = call(TRAIN / "train_ngram_scorer.py", "--data", many, "--output", tmp_path / "scorer")
    assert code is None
    figures = json.loads(out)
    assert 80 <= figures["reviews"] <= 160 and figures["reviews"] + figures["reviews of the other part"] > 1000
    for name in ("cross-validated, whole", "on the other part, whole"):
        assert figures[name] > 0.95
    for part in ("whole", "openings"):
        folds = figures[f"of each fold, {part}"]
        assert len(folds) == 5 and figures[f"cross-validated, {part}"] == pytest.approx(sum(folds) / 5, abs=1e-3)
    scorer = NGramScorer.from_pretrained(tmp_path / "scorer")
    assert len(scorer.weights) == figures["n-grams"]
    assert scorer(["".join(GOOD), "".join(BAD)]).tolist() == pytest.approx([1, 0], abs=0.2)


def test_it_learns_nothing_where_there_is_nothing_to_learn(call, many, tmp_path):
    """With labels at random the accuracies are those of a coin: nothing that is measured was fitted on."""
    pytest.importorskip("sklearn")
    draw = random.Random(1)
    for path in many.iterdir():
        rows = list(csv.reader(path.open(encoding="utf-8", newline="")))
        with (tmp_path / path.name).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([rows[0]] + [[*r[:-2], draw.randint(0, 1), r[-1]] for r in rows[1:]])
    figures = json.loads(call(TRAIN / "train_ngram_scorer.py", "--data", tmp_path, "--output", tmp_path / "scorer")[1])
    assert abs(figures["cross-validated, whole"] - 0.5) < 0.2  # about 110 reviews: 4 standard errors
    assert abs(figures["on the other part, whole"] - 0.5) < 0.08  # about 1,000


def test_without_its_data_it_says_so(call, tmp_path):
    pytest.importorskip("sklearn")
    code, out = call(TRAIN / "train_ngram_scorer.py", "--data", tmp_path / "nowhere", "--output", tmp_path / "scorer")
    assert out == "" and re.fullmatch("error: .*nowhere.* is missing; .*", code) and snapshot(tmp_path) == {}
