"""Stage 1 of RLHF: a GPT-2 learns from demonstrations, texts or prompts with a response, by supervised fine-tuning.

    python examples/sft_reviews.py --data FOLDER        # positive hotel reviews, see reviews_data.py
    python examples/sft_reviews.py --texts FILE --model GPT2_FOLDER     # your own: .txt or .jsonl
    python examples/sft_reviews.py --resume runs/NAME   # go on where a run was stopped

A run leaves config.json, metrics.jsonl, samples.jsonl, summary.json, checkpoint/ and the tuned model in policy/ under
--output. It may be killed at any moment, and resumed.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

try:
    from tqdm import tqdm
except ImportError:
    sys.exit("the examples need tqdm: pip install -e '.[examples]'")

import torch

from minirlhf import GPT2, SamplingConfig, Tokenizer, generate
from minirlhf.common.text import printable
from minirlhf.device.random import eval_mode
from minirlhf.io.files import read_json, write_json
from minirlhf.runs.sft_run import SFTRun
from minirlhf.runs.stopping import Stopped
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, perplexity
from minirlhf.text.demonstrations import Demonstration, read_demonstrations, split_demonstrations
from reviews_data import load_reviews, split_reviews

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPTS = ["酒店", "周围", "位置", "前台"]  # hotel, surroundings, location, front desk
FIELDS = dict(epochs=3, lr=3e-4, schedule="cosine", warmup=0.05, max_length=128, tokens_per_batch=2048,
              accumulation=1, save_freq=100, precision="auto", device="auto", seed=0)  # fmt: skip


def main() -> None:
    args = read_arguments()
    # 1. Demonstrations, of which some are held out: perplexity on those is what shows that the model learns.
    train, held_out = read_data(args)

    # 2. The model, the run and its folder, or the ones that were stopped.
    if args.resume:
        run = SFTRun.resume(args.resume, train)
    else:
        model, tokenizer = GPT2.from_pretrained(args.model), Tokenizer.from_pretrained(args.model)
        config = SFTConfig(**{name: getattr(args, name) for name in FIELDS}, packing=args.packing)
        trainer = SFTTrainer(model, tokenizer, train, config)
        samples(trainer, args.prompts, args.gen_len)  # a bad prompt is better known now
        run = SFTRun.start(args.output, trainer, {"arguments": vars(args)})
    trainer, model, tokenizer = run.trainer, run.trainer.model, run.trainer.tokenizer
    print(f"{run.folder}: {len(train)} demonstrations, {len(held_out)} held out; {trainer.precision_choice}")

    # 3. Every so often: how surprising is what the model has not seen, and what does it write by itself?
    def measure():
        figures = perplexity(model, tokenizer, held_out, trainer.config.max_length)
        shown = samples(trainer, args.prompts, args.gen_len)
        return {f"perplexity/{name}": value for name, value in figures.items()}, shown

    # 4. The loop: forward, backward, step, with a line in metrics.jsonl for each.
    bar = tqdm(total=1.0, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")

    def on_step(progress: float, loss: float) -> None:
        bar.update(progress - bar.n)
        bar.set_postfix_str(f"step {trainer.steps}, loss {loss:.3f}")

    def on_measure(figures, texts) -> None:
        shown = ", ".join(f"{value:.2f} a {name.split('/')[1]}" for name, value in figures.items())
        bar.write(f"step {trainer.steps}: held-out perplexity {shown}", file=sys.stdout)
        bar.write("\n".join(f"    {printable(text)}" for text in texts), file=sys.stdout)

    with run, bar:
        run.train(measure, on_step, on_measure)
        measured = [line for line in run.history() if "perplexity/token" in line]
        before, after = measured[0]["perplexity/character"], measured[-1]["perplexity/character"]
        summary = {"perplexity a character": {"before": before, "after": after}, "demonstrations": len(train)}
        model.save_pretrained(run.folder / "policy", summary={"algorithm": "SFT", **summary})
        tokenizer.save_pretrained(run.folder / "policy")
        write_json(run.folder / "summary.json", summary)
    print(f"held-out perplexity a character {before:.2f} -> {after:.2f}, saved in {run.folder}")


def samples(trainer: SFTTrainer, prompts: list[str], gen_len: int) -> list[str]:
    """A continuation of each prompt, by the same random numbers each time."""
    model, tokenizer, seed = trainer.model, trainer.tokenizer, trainer.config.seed
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    ends = dict(eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.pad_id)
    generator = torch.Generator(model.wte.weight.device).manual_seed(seed)
    with eval_mode(model):
        drawn = generate(model, ids, gen_len, SamplingConfig(top_p=0.95), **ends, generator=generator)
    return [p + tokenizer.decode(r) for p, r in zip(prompts, drawn.responses, strict=True)]


def read_data(args: argparse.Namespace) -> tuple[list[Demonstration], list[Demonstration]]:
    if args.data:
        sides = split_reviews(load_reviews(args.data))
        train, held_out = ([Demonstration("", r.text) for r in side if r.label == 1 and r.category == "酒店"]
                           for side in sides)  # fmt: skip
    else:
        train, held_out = split_demonstrations(read_demonstrations(args.texts, args.encoding))
    return train[: args.limit or None], held_out


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", help="folder with the two published CSV files")
    source.add_argument("--texts", help="your own demonstrations, .txt or .jsonl; a tenth is held out")
    source.add_argument("--resume", metavar="RUN", help="continue the run in this folder, with its own settings")
    parser.add_argument("--encoding", default="utf-8", help="of --texts")
    parser.add_argument("--model", default=str(WEIGHTS / "gpt2-chinese-reviews-small"), help="GPT-2 folder")
    for name, default in FIELDS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default, help="(%(default)s)")
    parser.add_argument("--packing", action="store_true", help="several texts a row, none of which sees another")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="texts to continue")
    parser.add_argument("--gen-len", type=int, default=24)
    parser.add_argument("--limit", type=int, default=0, help="train on the first demonstrations only; 0: on all")
    parser.add_argument("--output", default=f"runs/sft-{time.strftime('%Y%m%d-%H%M%S')}", help="folder of the run")
    args = parser.parse_args()
    if args.resume:
        started = read_json(Path(args.resume) / "config.json")
        if "texts" not in started.get("arguments", {}):
            raise ValueError(f"{args.resume} is no run of this script")
        args = argparse.Namespace(**{**started["arguments"], "resume": args.resume})
    return args


if __name__ == "__main__":
    try:
        main()
    except Stopped as stopped:  # by Ctrl-C or SIGTERM
        print(f"{stopped}; to go on: python {shlex.join([sys.argv[0], '--resume', str(stopped.folder)])}")
    except (ValueError, OSError) as error:  # bad input: one line, no traceback
        sys.exit(f"error: {error}")
