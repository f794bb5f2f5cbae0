"""Train the two small models in `weights/` from labelled Chinese reviews, with this library's own code.

    python weights/train/train_starter_weights.py --data FOLDER [--output runs/weights] [--only gpt2|llama|bert]

`--only llama` trains a language model of that shape and the same size, which does not ship.

FOLDER holds ChnSentiCorp_htl_all.csv and online_shopping_10_cats.csv as ChineseNlpCorpus publishes them. One tenth of
the reviews is held out by hash. The language model sees texts only; the classifier learns from whole reviews,
openings and random excerpts. All figures are printed and written to `figures.json` beside the weights.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from minirlhf import GPT2, GPT2Config, Llama, LlamaConfig, Tokenizer
from minirlhf.models.decoder import Decoder
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, perplexity
from minirlhf.text.tokenizer import build_vocab
from reviews_data import Review, load_reviews, split_reviews

CONTEXT = 128  # positions of all models
# Two shapes of 4.33 M parameters, equal within 0.1%, at 4457 tokens.
SHAPES: dict[str, Callable[[int, float, int], Decoder]] = {
    # No dropout on the attention weights: it would force the slow attention kernel.
    "gpt2": lambda vocab_size, dropout, seed: GPT2(
        GPT2Config(vocab_size=vocab_size, n_positions=CONTEXT, n_embd=256, n_layer=4, n_head=4,
                   embd_pdrop=dropout, resid_pdrop=dropout, attn_pdrop=0.0), seed),
    "llama": lambda vocab_size, dropout, seed: Llama(
        LlamaConfig(vocab_size=vocab_size, max_position_embeddings=CONTEXT, hidden_size=256, intermediate_size=696,
                    num_hidden_layers=4, num_attention_heads=4, tie_word_embeddings=True), seed),
}  # fmt: skip


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    train, held_out = split_reviews(load_reviews(args.data))
    tokenizer = Tokenizer(build_vocab(review.text for review in train))
    print(f"{len(train)} reviews to train on, {len(held_out)} held out, {len(tokenizer)} tokens", flush=True)
    family = args.only or "gpt2"
    if family in SHAPES:
        train_language_model(args, family, tokenizer, train, held_out)
    if args.only in (None, "bert"):
        from starter_classifier import train_sentiment_classifier

        train_sentiment_classifier(args, tokenizer, train, held_out, Progress("bert", "classifier"))


def train_language_model(
    args: argparse.Namespace, family: str, tokenizer: Tokenizer, train: list[Review], held_out: list[Review]
) -> None:
    # In a single epoch no text is seen twice, and dropout has nothing to prevent.
    model = SHAPES[family](len(tokenizer), 0.1 if args.lm_epochs > 1 else 0.0, args.seed)
    config = SFTConfig(epochs=args.lm_epochs, lr=2e-3, max_length=CONTEXT, tokens_per_batch=2048,
                       precision=args.precision, device=args.device, seed=args.seed)  # fmt: skip
    start = time.process_time(), time.time()
    SFTTrainer(model, tokenizer, [review.text for review in train], config).train(Progress(family, "sft"))
    figures: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "epochs": args.lm_epochs,
        "minutes": (time.time() - start[1]) / 60,
        "cpu_minutes": (time.process_time() - start[0]) / 60,
        "held_out": perplexity(model, tokenizer, [r.text for r in held_out], CONTEXT),
        "train": perplexity(model, tokenizer, [r.text for r in train[: len(held_out)]], CONTEXT),
    }
    folder = args.output / f"{family}-chinese-reviews-small"
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
    parser.add_argument("--only", choices=[*SHAPES, "bert"], help="one model instead of gpt2 and bert")
    parser.add_argument("--lm-epochs", type=int, default=7)
    parser.add_argument("--bert-epochs", type=int, default=22)
    parser.add_argument("--precision", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()
