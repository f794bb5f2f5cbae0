"""Train the two small models in `weights/` from labelled Chinese reviews, with this library's own code.

    python weights/train/train_starter_weights.py --data FOLDER [--output runs/weights] [--only gpt2|bert]

FOLDER holds ChnSentiCorp_htl_all.csv and online_shopping_10_cats.csv as ChineseNlpCorpus publishes them. One tenth of
the reviews is held out by hash. The language model sees texts only; the classifier learns from whole reviews,
openings and random excerpts. All figures are printed and written to `figures.json` beside the weights.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from minirlhf import GPT2, GPT2Config, Tokenizer
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, perplexity
from minirlhf.text.tokenizer import build_vocab
from reviews_data import Review, load_reviews, split_reviews

CONTEXT = 128  # positions of both models


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    train, held_out = split_reviews(load_reviews(args.data))
    tokenizer = Tokenizer(build_vocab(review.text for review in train))
    print(f"{len(train)} reviews to train on, {len(held_out)} held out, {len(tokenizer)} tokens", flush=True)
    if args.only in (None, "gpt2"):
        train_language_model(args, tokenizer, train, held_out)
    if args.only in (None, "bert"):
        from starter_classifier import train_sentiment_classifier

        train_sentiment_classifier(args, tokenizer, train, held_out, Progress("bert", "classifier"))


def train_language_model(
    args: argparse.Namespace, tokenizer: Tokenizer, train: list[Review], held_out: list[Review]
) -> None:
    sizes = dict(n_positions=CONTEXT, n_embd=256, n_layer=4, n_head=4)
    # No dropout on the attention weights: it would force the slow attention kernel.
    dropout = dict(embd_pdrop=0.1, resid_pdrop=0.1, attn_pdrop=0.0)
    model = GPT2(GPT2Config(vocab_size=len(tokenizer), **sizes, **dropout), seed=args.seed)
    config = SFTConfig(epochs=args.gpt2_epochs, lr=2e-3, max_length=CONTEXT, tokens_per_batch=2048,
                       precision=args.precision, device=args.device, seed=args.seed)  # fmt: skip
    start = time.time()
    SFTTrainer(model, tokenizer, [review.text for review in train], config).train(Progress("gpt2", "sft"))
    minutes = (time.time() - start) / 60
    figures = {"minutes": minutes, "held_out": perplexity(model, tokenizer, [r.text for r in held_out], CONTEXT)}
    figures["train"] = perplexity(model, tokenizer, [r.text for r in train[: len(held_out)]], CONTEXT)
    folder = args.output / "gpt2-chinese-reviews-small"
    model.save_pretrained(folder, dtype=torch.float16)
    tokenizer.save_pretrained(folder, CONTEXT)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(folder, figures, flush=True)


class Progress:
    """Prints the mean training loss twenty times a run; the `on_step` of a trainer of this kind."""

    def __init__(self, name: str, kind: str):
        self.name, self.kind, self.start, self.losses, self.shown = name, kind, time.time(), [], 0

    def __call__(self, batch: object, stats: dict[str, float]) -> None:
        progress = stats[f"{self.kind}/progress"]
        self.losses.append(stats[f"{self.kind}/loss"])
        if progress * 20 >= self.shown + 1 or progress * 20 < self.shown:
            self.shown = int(progress * 20)
            mean = sum(self.losses) / len(self.losses)
            print(f"{self.name} {progress:4.0%} loss {mean:.3f} {time.time() - self.start:.0f} s", flush=True)
            self.losses = []


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the two published CSV files")
    parser.add_argument("--output", type=Path, default=Path("runs/weights"))
    parser.add_argument("--only", choices=["gpt2", "bert"])
    parser.add_argument("--gpt2-epochs", type=int, default=7)
    parser.add_argument("--bert-epochs", type=int, default=22)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
