"""Pairs of texts and their tokens."""

import json

import pytest
import torch

from minirlhf.supervised.preference_pairs import TokenPair, encode_pairs
from minirlhf.text.preferences import Ranking


def test_a_prompt_is_the_same_tokens_for_both_responses(tokenizer):
    """ "wifi" is one token, but not across the border between prompt and response."""
    (pair,) = encode_pairs(tokenizer, [{"prompt": "hello w", "chosen": "ifi很好", "rejected": "ifi差"}])
    assert pair.prompt == tokenizer.encode_prompt("hello w")
    assert pair.chosen == tokenizer.encode("ifi很好")[1:] and pair.rejected == tokenizer.encode("ifi差")[1:]
    assert pair.chosen[-1] == tokenizer.eos_id
    chosen, rejected = pair.sequences
    assert chosen.ids == pair.prompt + pair.chosen and rejected.ids == pair.prompt + pair.rejected
    assert chosen.first == rejected.first == len(pair.prompt)
    assert pair.length == max(len(chosen.ids), len(rejected.ids))


def test_rankings_mappings_tokens_and_files_are_taken(tokenizer, tmp_path):
    """Of a ranking every pair, best first; without a prompt the response begins a text."""
    row = {"prompt": "", "chosen": "好", "rejected": "差"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row))
    ready = TokenPair([2], torch.tensor([7, 8]), (9,))
    first, *ranked, last = encode_pairs(tokenizer, [row, Ranking("酒店", ("很好", "一般", "太差")), ready])
    assert [first] == encode_pairs(tokenizer, tmp_path / "pairs.jsonl")
    assert first.prompt == [tokenizer.cls_id] and last is ready
    assert (ready.chosen, ready.rejected) == ([7, 8], [9])
    texts = [(tokenizer.decode(pair.chosen), tokenizer.decode(pair.rejected)) for pair in ranked]
    assert texts == [("很好", "一般"), ("很好", "太差"), ("一般", "太差")]


@pytest.mark.parametrize(("pair", "message"), [
    ({"prompt": "酒店", "chosen": "好"}, "pair 0: rejected missing"),
    ({"prompt": "酒店", "chosen": "好", "rejected": "好 "}, "pair 0: answers 1 and 2 are equal"),
    ({"prompt": "酒店", "chosen": "很好", "rejected": "很 好"}, "pair 0: chosen and rejected are the same tokens"),
    ({"prompt": "酒店", "chosen": "", "rejected": "好"}, "pair 0: answer 1 is empty"),
    ({"prompt": "酒店", "chosen": "\x01", "rejected": "好"}, "pair 0: an answer is empty: it has no token but its end"),
    ({"prompt": " ", "chosen": "好", "rejected": "差"}, "pair 0: prompt ' ' is empty"),
    (Ranking("酒店", ("好", "差"), 0.5), "pair 0: a margin of 0.5 is for reward models; DPO has none"),
    (("酒店", "好", "差"), "pair 0: must have prompt, chosen and rejected, or be a Ranking; got a tuple"),
])  # fmt: skip
def test_bad_pairs_are_refused_by_number(tokenizer, pair, message):
    with pytest.raises(ValueError, match=message):
        encode_pairs(tokenizer, [pair])


@pytest.mark.parametrize(("fields", "message"), [
    (([2], [], [3]), "chosen is empty"), (([], [2, 3], [4]), "rejected is empty: it has no token to predict"),
    (([2], [3], [3]), "the same tokens"),
])  # fmt: skip
def test_bad_tokens_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        TokenPair(*fields)
