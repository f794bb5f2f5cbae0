"""Stage 1 of RLHF: a GPT-2 learns from demonstrations, texts or prompts with a response, by supervised fine-tuning.

    python examples/sft_reviews.py --texts FILE [--held-out FILE] --model GPT2_FOLDER     # .txt or .jsonl
    python examples/sft_reviews.py --resume runs/NAME   # continue a run that was stopped

`weights/train/reviews_data.py` makes such files of published reviews. A run leaves config.json, metrics.jsonl,
samples.jsonl, summary.json, checkpoints/ and the tuned model in policy/ under --output. It may be killed at any moment,
and resumed.
"""

import argparse
import sys

try:
    from tqdm import tqdm
except ImportError:
    sys.exit("the examples need tqdm: pip install -e '.[examples]'")

import torch

from minirlhf import SamplingConfig, Tokenizer, generate, load_decoder
from minirlhf.common.printing import show
from minirlhf.common.text import printable
from minirlhf.device.random import eval_mode
from minirlhf.io.files import write_json
from minirlhf.runs.run import Run
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, perplexity
from minirlhf.text.demonstrations import read_demonstrations, split_demonstrations
from minirlhf.text.language import warn_of_language
from shared import LOGGERS, POLICY, PROMPTS, command_line, new_folder, parse, run_script

FIELDS = dict(epochs=3, lr=3e-4, schedule="cosine", warmup=0.05, max_length=128, tokens_per_batch=2048,
              accumulation=1, save_freq=100, precision="auto", device="auto", seed=0, packing=False)  # fmt: skip


def main() -> None:
    args = read_arguments()
    # 1. Demonstrations. Perplexity on those that are held out shows whether the model learns.
    train = read_demonstrations(args.texts, args.encoding)
    if args.held_out:
        held_out = read_demonstrations(args.held_out, args.encoding)
    else:
        train, held_out = split_demonstrations(train)
    train = train[: args.limit or None]
    warn_of_language([*map(str, train), *args.prompts], args.model)

    # 2. The model, the run and its folder, or the ones that were stopped.
    if args.resume:
        run = Run.resume(args.resume, data=train)
    else:
        model, tokenizer = load_decoder(args.model), Tokenizer.from_pretrained(args.model)
        trainer = SFTTrainer(model, tokenizer, train, SFTConfig(**{name: getattr(args, name) for name in FIELDS}))
        samples(trainer, args.prompts, args.gen_len)  # a bad prompt is found before anything is written
        run = Run.start(args.output, trainer, {"arguments": vars(args)}, loggers=args.loggers)
    trainer = run.trainer
    show(f"{run.folder}: {len(train)} demonstrations, {len(held_out)} held out; {trainer.precision_choice}")
    bar = tqdm(total=1.0, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")

    # 3. Before the first step and at every save: perplexity on the held-out texts, and some samples.
    def measure() -> tuple[dict[str, float], list[str]]:
        figures = perplexity(trainer.model, trainer.tokenizer, held_out, trainer.config.max_length)
        texts = samples(trainer, args.prompts, args.gen_len)
        shown = ", ".join(f"{value:.2f} a {name}" for name, value in figures.items())
        bar.write(f"step {trainer.steps_done}: held-out perplexity {shown}", file=sys.stdout)
        bar.write("\n".join(f"    {printable(text)}" for text in texts), file=sys.stdout)
        return {f"perplexity/{name}": value for name, value in figures.items()}, texts

    def on_step(batch, stats) -> None:
        bar.update(stats["sft/progress"] - bar.n)
        bar.set_postfix_str(f"step {trainer.steps_done}, loss {stats['sft/loss']:.3f}")
        figures, texts = measure() if run.due else ({}, [])
        run.record(batch, {**stats, **figures}, texts)

    # 4. The loop: forward, backward, step, with a line in metrics.jsonl for each.
    with run, bar:
        if trainer.steps_done == 0:
            figures, texts = measure()
            run.log(figures, [(text, None) for text in texts])
        trainer.train(on_step)
        if not trainer.processes.first:
            return
        measured = [line["perplexity/character"] for line in run.history() if "perplexity/character" in line]
        summary = {"perplexity a character": {"before": measured[0], "after": measured[-1]},
                   "demonstrations": len(train)}  # fmt: skip
        trainer.model.save_pretrained(run.folder / "policy", summary={"algorithm": "SFT", **summary})
        trainer.tokenizer.save_pretrained(run.folder / "policy")
        write_json(run.folder / "summary.json", summary)
    show(f"held-out perplexity a character {measured[0]:.2f} -> {measured[-1]:.2f}, saved in {run.folder}")


def samples(trainer: SFTTrainer, prompts: list[str], gen_len: int) -> list[str]:
    """A continuation of each prompt, by the same random numbers each time."""
    model, tokenizer, seed = trainer.model, trainer.tokenizer, trainer.config.seed
    ids = [tokenizer.encode_prompt(prompt) for prompt in prompts]
    ends = dict(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_id)
    generator = torch.Generator(model.device).manual_seed(seed)
    with eval_mode(model):
        drawn = generate(model, ids, gen_len, SamplingConfig(top_p=0.95), **ends, generator=generator)
    rows = zip(prompts, ids, drawn.responses, strict=True)
    return [p + "".join(tokenizer.decode_response(i, r)) for p, i, r in rows]


def read_arguments() -> argparse.Namespace:
    parser = command_line(
        __doc__,
        texts=(str, "demonstrations, .txt or .jsonl"),
        held_out=(str, "other demonstrations, to measure perplexity on; if not given, a tenth of --texts"),
        encoding=("utf-8", "of both files"),
        model=(POLICY, "GPT-2 folder"),
        **{name: (default, f"SFTConfig.{name}") for name, default in FIELDS.items()},
        prompts=(PROMPTS, "texts to continue"),
        gen_len=(24, "tokens of a sample"),
        limit=(0, "train on the first demonstrations only; 0: on all"),
        output=(new_folder("sft-"), "folder of the run"),
        loggers=LOGGERS,
        resume=(str, "continue the run in this folder, with its own settings"),
    )
    args = parse(parser)
    if args.texts is None:
        parser.error("--texts or --resume is needed")
    return args


if __name__ == "__main__":
    run_script(main)
