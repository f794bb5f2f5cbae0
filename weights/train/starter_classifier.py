"""The sentiment classifier of the starter weights: trained on labels and on teachers.

40,000 reviews are too few for a transformer from random weights to reach character n-grams on its own. Three things
help: it starts with the word embeddings of the language model; its first layer starts with heads that look at the
neighbours of each character; and it learns by distillation (Hinton et al. 2015) from the teachers in
`starter_teachers.py`.
"""

import argparse
import json
import math
import random
import time

import torch

from classification import ClassifierTrainingConfig, fit_temperature, train_classifier
from minirlhf import GPT2, BertClassifier, BertConfig, Tokenizer
from minirlhf.rewards.sentiment import predict
from minirlhf.supervised.reward_modelling import reliability_table
from reviews_data import Review, excerpt, opening
from starter_teachers import Teachers

CONTEXT = 128
DRAWS = 5  # different excerpts of a review; more of them would mostly cost the teachers' time
LABEL_WEIGHT = 0.4  # of the review's label in the target; the rest is the teachers' opinion
NEIGHBOURS = (-1, 1, -2, 2)  # where the heads of the first layer look at the start
SHARPNESS = 1.3  # of that look: about 0.85 of the attention is on that neighbour
CUTS = {"whole": str, "openings": opening}


def train_sentiment_classifier(
    args: argparse.Namespace, tokenizer: Tokenizer, train: list[Review], held_out: list[Review], on_step
) -> None:
    start = time.time()
    tuning, train = train[::20], [review for i, review in enumerate(train) if i % 20]  # 5% to fit the temperature on
    language_model = GPT2.from_pretrained(args.output / "gpt2-chinese-reviews-small")
    teachers = Teachers(language_model, tokenizer, train, args.seed)
    print(f"teachers fitted, {time.time() - start:.0f} s", flush=True)
    model = BertClassifier(bert_config(len(tokenizer)), seed=args.seed)
    start_from(language_model, model, args.seed)
    curve = []
    drawn: dict[int, list[tuple[str, list[float]]]] = {}

    def examples(epoch: int) -> list[tuple[str, list[float]]]:
        """One excerpt of every review with its target, another one in each of `DRAWS` epochs."""
        if epoch:
            curve.append({"epoch": epoch, **accuracies(model, tokenizer, tuning)})
            print(curve[-1], flush=True)
        draw = epoch % DRAWS
        if draw not in drawn:
            rng = random.Random(f"{args.seed} {draw}")
            texts = [excerpt(review.text, rng) for review in train]
            drawn[draw] = []
            for review, text, opinion in zip(train, texts, teachers(texts), strict=True):
                positive = LABEL_WEIGHT * review.label + (1 - LABEL_WEIGHT) * opinion
                drawn[draw].append((text, [1 - positive, positive]))
        return drawn[draw]

    config = ClassifierTrainingConfig(
        epochs=args.bert_epochs, lr=6e-4, weight_decay=0.05, mask_probability=0.0, max_length=CONTEXT,
        tokens_per_batch=2048, precision=args.precision, device=args.device, seed=args.seed,
    )  # fmt: skip
    train_classifier(model, tokenizer, examples, config, on_step)

    labels = torch.tensor([review.label for review in tuning] * 2)
    texts = [review.text for review in tuning] + [opening(review.text) for review in tuning]
    temperature = fit_temperature(predict(model, tokenizer, texts, CONTEXT), labels)
    with torch.no_grad():  # softmax(logits / T), written into the last layer
        model.classifier.weight /= temperature
        model.classifier.bias /= temperature
    figures = {
        "minutes": (time.time() - start) / 60,
        "temperature": temperature,
        "held_out": accuracies(model, tokenizer, held_out),
        "learning_curve_on_tuning_reviews": curve,
    }
    truth = torch.tensor([review.label for review in held_out])
    for name, cut in CUTS.items():
        positive = predict(model, tokenizer, [cut(r.text) for r in held_out], CONTEXT).softmax(-1)[:, 1]
        figures[f"{name}_reliability"] = reliability_table(positive, truth)
    folder = args.output / "bert-chinese-reviews-sentiment-small"
    model.save_pretrained(folder, dtype=torch.float16)
    tokenizer.save_pretrained(folder, CONTEXT)
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(folder, json.dumps(figures, indent=1), flush=True)


def accuracies(model: BertClassifier, tokenizer: Tokenizer, reviews: list[Review]) -> dict[str, float]:
    """Share of reviews whose label is found, from the whole text and from the opening."""
    truth = torch.tensor([review.label for review in reviews])
    found = {}
    for name, cut in CUTS.items():
        logits = predict(model, tokenizer, [cut(review.text) for review in reviews], CONTEXT)
        found[name] = (logits.argmax(-1) == truth).float().mean().item()
    return found


def bert_config(vocab_size: int) -> BertConfig:
    # No dropout: every epoch shows new excerpts, and the teacher's opinions do not overfit.
    return BertConfig(
        vocab_size=vocab_size, max_position_embeddings=CONTEXT, hidden_size=256, num_hidden_layers=3,
        num_attention_heads=4, intermediate_size=1024, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip


@torch.no_grad()
def start_from(language_model: GPT2, model: BertClassifier, seed: int) -> None:
    """What the language model knows of each token, and heads in the first layer that see the neighbours of each one.

    Positions are sinusoids (Vaswani et al. 2017, section 3.5) of evenly spaced frequencies w, so that different ones
    are nearly orthogonal. Turned by w * d, the sinusoids of position t become those of t + d: a head whose query turns
    them so, and whose key does not, attends to the token d places on. Only a starting point, which a small model
    would take thousands of steps to find.
    """
    words = language_model.embeddings[0].weight
    width = words.size(1)
    layer = model.bert.encoder["layer"][0]
    attention, dense = layer.attention["self"], layer.attention["output"].dense
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.arange(1, width // 2 + 1) / (width // 2 + 1) * math.pi
    angles = torch.arange(CONTEXT)[:, None] * frequencies  # (T, C / 2)
    model.bert.embeddings.word_embeddings.weight.copy_(words)
    model.bert.embeddings.position_embeddings.weight.copy_(torch.cat([angles.sin(), angles.cos()], 1) * words.std())
    size = width // len(NEIGHBOURS)  # of a head
    query, key = torch.zeros(width, width), torch.zeros(width, width)
    shares = torch.randperm(width // 2, generator=generator).split(size // 2)  # each head has some of the frequencies
    for head, (distance, share) in enumerate(zip(NEIGHBOURS, shares, strict=True)):
        sines, cosines = share, share + width // 2  # where they stand in the embedding
        rows = torch.arange(head * size, head * size + size // 2)
        turn = frequencies[share] * distance
        # sin(a + b) = sin a cos b + cos a sin b; cos(a + b) = cos a cos b - sin a sin b
        query[rows, sines], query[rows, cosines] = turn.cos(), turn.sin()
        query[rows + size // 2, sines], query[rows + size // 2, cosines] = -turn.sin(), turn.cos()
        key[rows, sines] = key[rows + size // 2, cosines] = 1.0
    attention.query.weight.copy_(SHARPNESS * query)
    attention.key.weight.copy_(SHARPNESS * key)
    attention.value.weight.normal_(0, width**-0.5, generator=generator)
    dense.weight.normal_(0, 0.5 * width**-0.5, generator=generator)
