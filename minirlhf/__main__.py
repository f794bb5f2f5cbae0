"""The command line: `python -m minirlhf COMMAND ...`; without a command it prints help.

A command is a function entered in COMMANDS together with its arguments; its help is its docstring. Exit codes: 0 done,
1 a failure (one line `error: ...` on stderr), 2 a command line that cannot be understood, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

import minirlhf
from minirlhf.commands.console import bars, batches, show
from minirlhf.commands.evaluation_request import EvaluationRequest
from minirlhf.common.text import json_line, printable
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import PRECISION_SETTINGS
from minirlhf.evaluation import evaluate as evaluation
from minirlhf.evaluation.doctor.doctor import PROMPTS
from minirlhf.evaluation.doctor.patient import FAIL
from minirlhf.evaluation.evaluate import MAX_N, EvaluationConfig
from minirlhf.generation import generate as generation
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.io import hub, model_folder
from minirlhf.io.files import naming
from minirlhf.models.bert import BertClassifier
from minirlhf.models.gpt2 import GPT2
from minirlhf.rewards.scorers import load_scorer
from minirlhf.rewards.sentiment import SentimentReward
from minirlhf.text.tokenizer import Tokenizer

BATCH = 16  # texts a forward pass; their output appears together


class Argument(NamedTuple):
    """One argument, as `ArgumentParser.add_argument` takes it."""

    names: tuple[str, ...]
    options: dict[str, Any]


class Command(NamedTuple):
    """What runs, and an argument for each of its parameters."""

    run: Callable[..., int | None]  # the exit code; None: 0
    arguments: tuple[Argument, ...]


COMMANDS: dict[str, Command] = {}
Entered = TypeVar("Entered", bound=Callable[..., int | None])


def command(*arguments: Argument) -> Callable[[Entered], Entered]:
    """Enter a function in COMMANDS under its name."""

    def enter(function: Entered) -> Entered:
        COMMANDS[function.__name__] = Command(function, arguments)
        return function

    return enter


def argument(*names: str, **options: Any) -> Argument:
    """An Argument, written as a call of `add_argument`."""
    return Argument(names, options)


def integer(low: int, high: int = 2**63 - 1) -> Callable[[str], int]:
    """The type of an argument that is an integer in [low, high]."""

    def parse(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must be an integer of at least {low}, got {text}")
        return value

    parse.__name__ = "integer"  # argparse: "invalid integer value"
    return parse


def visible(text: str) -> str:
    """The type of an argument that is a text with something in it."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must hold at least one visible character")
    return text


AS_JSON = argument("--json", dest="as_json", action="store_true", help="one JSON object a line")
DEVICE = argument("--device", default="auto", help="auto, cpu or cuda[:index]; default %(default)s")


# ---- commands -------------------------------------------------------------------------------------------------------


@command(
    argument("name", metavar="NAME", help="model on the hub, such as uer/gpt2-chinese-cluecorpussmall"),
    argument("--to", metavar="FOLDER", help="put it into FOLDER/NAME, such as weights/; default: the hub's cache"),
    argument("--revision", default="main", help="branch, tag or commit; default %(default)s"),
)
def download(name: str, to: str | None, revision: str) -> None:
    """Fetch a model from the hub, convert its weights to safetensors if need be, and print its folder."""
    folder = hub.download(name, to, revision)
    model_folder.convert(folder)
    print(folder)


@command(argument("folder", metavar="FOLDER", help="folder with pytorch_model.bin, single or sharded"))
def convert(folder: str) -> None:
    """Convert the pickled weights of a model folder to safetensors, and print their path."""
    print(model_folder.convert(folder))


@command(
    argument("--model", required=True, metavar="FOLDER", help="GPT-2 folder"),
    argument("--prompt", nargs="+", type=visible, metavar="TEXT", help="default: the lines of standard input"),
    argument("--n", type=integer(1), default=5, metavar="N", help="continuations a prompt; default %(default)s"),
    argument("--gen-len", type=integer(1), default=32, metavar="N", help="tokens of each; default %(default)s"),
    argument("--top-p", type=float, default=0.95, metavar="P", help="nucleus; 1: all; default %(default)s"),
    argument("--top-k", type=integer(0), default=0, metavar="K", help="most probable tokens; 0: all, the default"),
    argument("--temperature", type=float, default=1.0, metavar="T", help="divides the logits; default %(default)s"),
    argument("--seed", type=integer(0), default=0, metavar="N", help="of the sampling; default %(default)s"),
    argument("--eos", action="store_true", help="stop at the token that ends a text"),
    DEVICE,
    AS_JSON,
)
def generate(
    model: str,
    prompt: list[str] | None,
    n: int,
    gen_len: int,
    top_p: float,
    top_k: int,
    temperature: float,
    seed: int,
    eos: bool,
    device: str,
    as_json: bool,
) -> None:
    """Print continuations of prompts."""
    sampling, where = SamplingConfig(temperature, top_k, top_p), resolve_device(device)
    tokenizer, gpt2 = Tokenizer.from_pretrained(model), GPT2.from_pretrained(model).to(where)
    with naming(model):
        gpt2.fit_vocabulary(len(tokenizer))
    generator = torch.Generator(where).manual_seed(seed)
    # A prompt at a time: what is sampled does not depend on how the prompts come in.
    for (text,) in batches(prompt, 1):
        ids = tokenizer.encode_prompt(text)
        for done in range(0, n, BATCH):
            sampled = generation.generate(
                gpt2, [ids] * min(BATCH, n - done), gen_len, sampling,
                eos_token_id=tokenizer.eos_id if eos else None, pad_token_id=tokenizer.pad_id, generator=generator,
            )  # fmt: skip
            responses = [tokenizer.decode(response) for response in sampled.responses]
            if as_json:
                show(json_line({"prompt": text, "response": response}) for response in responses)
            else:
                show(printable(text + response) for response in responses)


@command(
    argument("--model", required=True, metavar="FOLDER", help="BERT classifier folder"),
    argument("texts", nargs="*", metavar="TEXT", help="what to score; default: the lines of standard input"),
    DEVICE,
    AS_JSON,
)
def score(model: str, texts: list[str], device: str, as_json: bool) -> None:
    """Print the probability of each label for texts."""
    classifier, tokenizer = BertClassifier.from_pretrained(model), Tokenizer.from_pretrained(model)
    labels = classifier.config.labels
    with naming(model):  # all labels are shown, so whichever of them is the good one
        reward = SentimentReward(classifier, tokenizer, labels[-1], device=device)
    for batch in batches(texts or None, BATCH):
        scored = [dict(zip(labels, row, strict=True)) for row in reward.probabilities(batch).tolist()]
        if as_json:
            show(json_line({"text": t, "scores": scores}) for t, scores in zip(batch, scored, strict=True))
        else:
            show(f"{printable(t)}\n{bars(scores)}" for t, scores in zip(batch, scored, strict=True))


@command(
    argument("--policy", required=True, metavar="FOLDER", help="GPT-2 folder with its tokenizer"),
    argument("--reward", required=True, metavar="FOLDER", help="sentiment classifier, reward model or n-gram scorer"),
    argument("--positive-label", metavar="NAME", help="of the classifier; default: that which says so"),
    argument("--reference", metavar="FOLDER", help="GPT-2 folder; default: that of the policy"),
    argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="the pool of prompts"),
    argument("--canaries", nargs=2, metavar=("GOOD", "BAD"), help="two texts that the reward must order"),
    argument("--precision", choices=PRECISION_SETTINGS, help="PPOConfig.precision"),
    argument("--batch-size", type=int, help="PPOConfig.batch_size"),
    argument("--gen-len", type=int, help="PPOConfig.gen_len"),
    DEVICE,
)
def doctor(
    policy: str,
    reward: str,
    positive_label: str | None,
    reference: str | None,
    prompts: Sequence[str],
    canaries: tuple[str, str] | None,
    precision: str | None,
    batch_size: int | None,
    gen_len: int | None,
    device: str,
) -> int:
    """Examine a PPO run before it starts; the exit code is 1 if a check failed."""
    settings: dict[str, Any] = {"precision": precision, "batch_size": batch_size, "gen_len": gen_len, "device": device}
    given = {name: value for name, value in settings.items() if value is not None}
    findings = minirlhf.doctor(
        policy, reference, reward=reward, prompts=prompts, positive_label=positive_label, canaries=canaries, **given
    )
    return int(any(finding.status == FAIL for finding in findings))


@command(
    argument(
        "--run", metavar="FOLDER", help="of a run: stands for its policy/, reference/ and prompts, adds its curves"
    ),
    argument("--policy", metavar="FOLDER", help="GPT-2 folder with its tokenizer; default: that of --run"),
    argument("--reference", metavar="FOLDER", help="GPT-2 folder; default: that of --run"),
    argument("--reward", required=True, metavar="FOLDER", help="sentiment classifier, reward model or n-gram scorer"),
    argument("--second-scorer", metavar="FOLDER", help="another one, that the policy was not trained on"),
    argument("--prompts", nargs="+", metavar="TEXT", help="it was trained on, or one file with a text a line"),
    argument("--held-out-prompts", nargs="+", metavar="TEXT", help="it was not trained on; in the same form"),
    argument("--encoding", default="utf-8", help="of such files; default %(default)s"),
    argument("--samples", type=integer(2), default=512, metavar="N", help="of each model; default %(default)s"),
    argument("--best-of", nargs="+", type=integer(1, MAX_N), default=[2, 4, 8, 16], metavar="N", help="2 4 8 16"),
    argument("--gen-len", type=integer(1), default=16, metavar="N", help="tokens of each; default %(default)s"),
    argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus; 1: all, the default"),
    argument("--top-k", type=integer(0), default=0, metavar="K", help="most probable tokens; 0: all, the default"),
    argument("--temperature", type=float, default=1.0, metavar="T", help="divides the logits; default %(default)s"),
    argument("--seed", type=integer(0), default=0, metavar="N", help="of the sampling; default %(default)s"),
    argument("--eos", action="store_true", help="stop at the token that ends a text"),
    argument("--output", metavar="FOLDER", help="leave evaluation.json and report.html there"),
    DEVICE,
    AS_JSON,
)
def evaluate(
    run: str | None,
    policy: str | None,
    reference: str | None,
    reward: str,
    second_scorer: str | None,
    prompts: list[str] | None,
    held_out_prompts: list[str] | None,
    encoding: str,
    samples: int,
    best_of: list[int],
    gen_len: int,
    top_p: float,
    top_k: int,
    temperature: float,
    seed: int,
    eos: bool,
    output: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Compare a policy with its reference, and look for reward hacking."""
    sampling, where = SamplingConfig(temperature, top_k, top_p), resolve_device(device)
    asked = EvaluationRequest.of(run, policy, reference, prompts, held_out_prompts, encoding, output)
    tokenizer = Tokenizer.from_pretrained(asked.policy)
    config = EvaluationConfig(samples, gen_len, sampling, tokenizer.eos_id if eos else None, tuple(best_of), seed=seed)
    found = evaluation.evaluate(
        GPT2.from_pretrained(asked.policy).to(where), GPT2.from_pretrained(asked.reference).to(where), tokenizer,
        asked.prompts, load_scorer(reward, device), asked.held_out,
        None if second_scorer is None else load_scorer(second_scorer, device), config,
    )  # fmt: skip
    about = {"policy": asked.policy, "reference": asked.reference, "reward": reward, "second scorer": second_scorer}
    asked.write(found, about)
    show([json_line({**about, **found.as_dict()})] if as_json else found.lines())


# ---- entrance -------------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser of all COMMANDS."""
    parser = argparse.ArgumentParser("python -m minirlhf", description=minirlhf.__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, entry in COMMANDS.items():
        described = entry.run.__doc__
        sub = commands.add_parser(name, help=described, description=described, allow_abbrev=False)
        for names, options in entry.arguments:
            sub.add_argument(*names, **options)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line, without the program's name; None: this process's own. Returns the exit code."""
    parser = build_parser()
    arguments = vars(parser.parse_args(argv))
    name = arguments.pop("command")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # of another encoding: an escape is better than a crash
            stream.reconfigure(errors="backslashreplace")
    if name is None:
        parser.print_help()
        return 0
    try:
        code = COMMANDS[name].run(**arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        print(f"error: {printable(' '.join(str(error).split()))}", file=sys.stderr)
        return 1
    else:
        return code or 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
