"""Commands on a single model: download, convert, generate, score."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from minirlhf.commands.console import bars, batches
from minirlhf.commands.table import AS_JSON, DEVICE, EOS, SEED, argument, command, integer, visible
from minirlhf.common.printing import show, text_table
from minirlhf.common.text import json_line, printable
from minirlhf.device.placement import resolve_device
from minirlhf.generation import generate as generation
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.io import hub, model_folder, upload
from minirlhf.io.files import naming
from minirlhf.io.model_folder import CONFIG_FILE
from minirlhf.models.bert import BertClassifier
from minirlhf.models.loading import load_decoder
from minirlhf.rewards.sentiment import SentimentReward
from minirlhf.runs.locks import FolderLock
from minirlhf.runs.run import BEST, CHECKPOINTS
from minirlhf.text.language import warn_of_language
from minirlhf.text.tokenizer import Tokenizer

BATCH = 16  # texts a forward pass; their output appears together


@command(
    argument("name", metavar="NAME", help="model on the hub, such as uer/gpt2-chinese-cluecorpussmall"),
    argument("--to", metavar="FOLDER", help="put it into FOLDER/NAME, such as weights/; default: the hub's cache"),
    argument("--revision", default="main", help="branch, tag or commit; default %(default)s"),
)
def download(args: argparse.Namespace) -> None:
    """Fetch a model from the hub, convert its weights to safetensors if need be, and print its folder."""
    folder = hub.download(args.name, args.to, args.revision)
    model_folder.convert(folder)
    show(folder)


@command(argument("folder", metavar="FOLDER", help="folder with pytorch_model.bin, single or sharded"))
def convert(args: argparse.Namespace) -> None:
    """Convert the pickled weights of a model folder to safetensors, and print their path."""
    show(model_folder.convert(args.folder))


@command(
    argument("folder", metavar="RUN|FOLDER", help="a finished run, whose model it takes, or a model folder"),
    argument("name", metavar="OWNER/NAME", help="repository on the hub; it is made if need be"),
    argument("--private", action="store_true", help="make a new repository private"),
    argument("--dry-run", action="store_true", help="only list what would go"),
)
def push(args: argparse.Namespace) -> None:
    """Upload a model with its card to the hub."""
    folder = trained_model(args.folder)
    files = upload.files_to_push(folder)
    if args.dry_run:
        rows = [(name, f"{size:,} bytes") for name, size in files.items()]
        show("\n".join([f"{folder} to {args.name}:", *text_table(rows, indent="  ")]))
        return
    show(upload.push(folder, args.name, args.private))


def trained_model(folder: str) -> Path:
    """The model folder of a finished run, or the folder itself if it is no run.

    Raises BlockingIOError for a run that is being written, ValueError for one that has not come to its end.
    """
    run = Path(folder)
    if not (run / CHECKPOINTS).is_dir():
        return hub.locate(folder)
    FolderLock.check(run)
    for name in ("policy", "reward"):
        if (run / name / CONFIG_FILE).is_file():
            return run / name
    raise ValueError(
        f"{run} has not come to its end, so it has no policy/ or reward/: run `minirlhf resume {run}`, or name a "
        f"checkpoint, such as {run / CHECKPOINTS / BEST}"
    )


@command(
    argument("--model", required=True, metavar="FOLDER", help="folder of a language model"),
    argument("--prompt", nargs="+", type=visible, metavar="TEXT", help="default: the lines of standard input"),
    argument("--n", type=integer(1), default=5, metavar="N", help="continuations a prompt; default %(default)s"),
    argument("--gen-len", type=integer(1), default=32, metavar="N", help="tokens of each; default %(default)s"),
    argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus; 1: all; default %(default)s"),
    argument("--top-k", type=integer(0), default=0, metavar="K", help="most probable tokens; 0: all, the default"),
    argument("--temperature", type=float, default=1.0, metavar="T", help="divides the logits; default %(default)s"),
    SEED,
    EOS,
    DEVICE,
    AS_JSON,
)
def generate(args: argparse.Namespace) -> None:
    """Print continuations of prompts."""
    sampling, where = SamplingConfig(args.temperature, args.top_k, args.top_p), resolve_device(args.device)
    tokenizer, model = Tokenizer.from_pretrained(args.model), load_decoder(args.model).to(where)
    with naming(args.model):
        model.fit_vocabulary(len(tokenizer))
    generator = torch.Generator(where).manual_seed(args.seed)
    # One prompt at a time, so that the samples do not depend on how the prompts arrive.
    for (text,) in batches(args.prompt, 1):
        warn_of_language([text], args.model)
        ids = tokenizer.encode_prompt(text)
        for done in range(0, args.n, BATCH):
            sampled = generation.generate(
                model, [ids] * min(BATCH, args.n - done), args.gen_len, sampling,
                eos_token_id=tokenizer.eos_token_id if args.eos else None, pad_token_id=tokenizer.pad_id,
                generator=generator,
            )  # fmt: skip
            for row in sampled.responses:
                response = "".join(tokenizer.decode_response(ids, row))
                show(json_line({"prompt": text, "response": response}) if args.as_json else printable(text + response))


@command(
    argument("--model", required=True, metavar="FOLDER", help="BERT classifier folder"),
    argument("texts", nargs="*", metavar="TEXT", help="what to score; default: the lines of standard input"),
    DEVICE,
    AS_JSON,
)
def score(args: argparse.Namespace) -> None:
    """Print the probability of each label for texts."""
    classifier, tokenizer = BertClassifier.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
    labels = classifier.config.labels
    with naming(args.model):  # all labels are shown, so any of them may be the positive one
        reward = SentimentReward(classifier, tokenizer, labels[-1], device=args.device)
    for batch in batches(args.texts or None, BATCH):
        warn_of_language(batch, args.model)
        for text, row in zip(batch, reward.probabilities(batch).tolist(), strict=True):
            scores = dict(zip(labels, row, strict=True))
            show(json_line({"text": text, "scores": scores}) if args.as_json else f"{printable(text)}\n{bars(scores)}")
