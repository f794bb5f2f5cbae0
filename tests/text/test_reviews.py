"""Token ids of thousands of real reviews against transformers; the texts are not part of this repository.

MINIRLHF_REVIEWS names the folder of the two CSV files (`weights/train/reviews_data.py` says which).
"""

import os
from pathlib import Path

import pytest
from bpe import OriginalBPE, trained_bpe, write_published
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

import minirlhf
from minirlhf import Tokenizer
from minirlhf.text.tokenizer_models import ByteBPE

REPO = Path(minirlhf.__file__).parents[1]
SHIPPED = REPO / "weights" / "gpt2-chinese-reviews-small"
COUNT = 2500


@pytest.fixture(scope="module")
def reviews() -> list[str]:
    folder = os.environ.get("MINIRLHF_REVIEWS")
    if not folder:
        pytest.skip("MINIRLHF_REVIEWS names no folder with the files of reviews")
    from reviews_data import load_reviews

    texts = [review.text for review in load_reviews(folder)]
    assert len(texts) >= COUNT
    return texts[:: len(texts) // COUNT]


def test_the_shipped_tokenizer_equals_transformers(reviews):
    ours = Tokenizer.from_pretrained(SHIPPED).encode_batch(reviews)
    assert ours == BertTokenizer.from_pretrained(SHIPPED)(reviews)["input_ids"]
    assert ours == AutoTokenizer.from_pretrained(SHIPPED)(reviews)["input_ids"]


def test_the_shipped_tokenizer_equals_the_original_in_plain_python(reviews):
    ours, legacy = Tokenizer.from_pretrained(SHIPPED), BertTokenizerLegacy(str(SHIPPED / "vocab.txt"))
    assert [text for text in reviews if ours.encode(text) != legacy(text)["input_ids"]] == []


def test_byte_level_bpe_equals_transformers_and_comes_back(reviews, tmp_path):
    vocab, merges = trained_bpe()
    ours = Tokenizer(ByteBPE(vocab, merges))
    ids = ours.encode_batch(reviews)
    assert ids == GPT2Tokenizer.from_pretrained(write_published(tmp_path))(reviews)["input_ids"]
    assert [ours.decode(row) for row in ids] == reviews
    oracle = OriginalBPE(vocab, merges)
    assert [text for text, row in zip(reviews[::10], ids[::10], strict=True) if oracle.encode(text) != row] == []
