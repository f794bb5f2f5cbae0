"""A small byte-level BPE for tests: trained with `tokenizers`, written as GPT-2 was published, and an oracle for it."""

import functools
import itertools
import json
from pathlib import Path

import regex
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

END = "<|endoftext|>"
CORPUS = [
    "the hotel is very good, and the service is good as well",
    "I don't like it; we've paid 100 yuan, it's not worth 2 stars!",
    "hello world, wifi  in the   room\n\nhello again",
    "酒店很好，服务非常满意。酒店很好，房间干净",
    "naïve café, déjà vu 😀😀",
] * 3


@functools.cache
def trained_bpe(size: int = 400) -> tuple[list[str], list[tuple[str, str]]]:
    """Vocabulary, with the end of text last as in the published one, and merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size - 1, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocab = sorted(model["vocab"], key=model["vocab"].get)
    return [*vocab, END], [(left, right) for left, right in model["merges"]]


def write_published(folder: Path, size: int = 400) -> Path:
    """The two files of a GPT-2 as it was published in 2019."""
    vocab, merges = trained_bpe(size)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocab)}), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


class OriginalBPE:
    """GPT-2's encoder written after `encoder.py` of openai/gpt-2, in plain Python, for texts without special tokens."""

    PATTERN = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def __init__(self, vocab: list[str], merges: list[tuple[str, str]]):
        self.ids = {token: i for i, token in enumerate(vocab)}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
        self.characters = {byte: chr(byte) for byte in visible}
        for byte in range(256):
            if byte not in self.characters:
                self.characters[byte] = chr(256 + len(self.characters) - len(visible))

    def encode(self, text: str) -> list[int]:
        ids = []
        for word in self.PATTERN.findall(text):
            parts = [self.characters[byte] for byte in word.encode("utf-8")]
            while True:
                pairs = [pair for pair in itertools.pairwise(parts) if pair in self.ranks]
                if not pairs:
                    break
                best = min(pairs, key=self.ranks.__getitem__)
                merged, i = [], 0
                while i < len(parts):
                    joined = tuple(parts[i : i + 2]) == best
                    merged.append("".join(best) if joined else parts[i])
                    i += 2 if joined else 1
                parts = merged
            ids += [self.ids[part] for part in parts]
        return ids
