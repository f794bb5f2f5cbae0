"""DPO: a policy learns from pairs of responses, those of a file or its own samples, without a reward model.

    python examples/dpo.py --pairs FILE         # .jsonl pairs or .tsv lists, see minirlhf/text/preferences.py
    python examples/dpo.py --online             # in each round --reward picks the best and the worst of --n samples
    python examples/dpo.py --resume runs/NAME/ROUND     # continue a run that was stopped

Each round is a run under --output, round-1/ and so on, with its samples in round-1.json, and begins where the last one
ended. The reference is always --policy. At the end there are policy/, summary.json and before_after.md as well.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path

import torch

from minirlhf import DPOConfig, DPOTrainer, SentimentReward, Tokenizer, generate, load_decoder
from minirlhf.common.printing import show
from minirlhf.device.launch import restarted
from minirlhf.device.processes import agreed
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.findings import before_after_table
from minirlhf.io.files import atomic_write, read_json, write_json
from minirlhf.rewards.base import score_all
from minirlhf.runs.run import Run
from minirlhf.supervised.preference_pairs import TokenPair
from minirlhf.text.language import warn_of_language
from minirlhf.text.preferences import read_rankings, split_rankings
from shared import LOGGERS, POLICY, PROMPTS, REWARD, command_line, new_folder, parse, prompt_pool, run_script

FIELDS = dict(beta=0.1, loss="sigmoid", label_smoothing=0.0, lr=2e-4, batch_size=32, epochs=2, packing=False,
              device="auto", seed=0)  # fmt: skip


def main() -> None:
    args = read_arguments()
    output, prompts = Path(args.output), prompt_pool(args.prompts, args.policy, args.reward)
    if args.pairs:
        labelled = split_rankings(read_rankings(args.pairs, args.encoding), by="answers")
        warn_of_language([text for ranking in labelled[0] for text in ranking.texts], args.policy)
    config = DPOConfig(**{name: getattr(args, name) for name in FIELDS})
    reward = SentimentReward.from_pretrained(args.reward, device=args.device)
    tokenizer, policy = Tokenizer.from_pretrained(args.policy), load_decoder(args.policy)
    if output.exists() and any(output.iterdir()) and not (args.resume or restarted()):
        raise FileExistsError(f"{output} exists and is not empty; choose another --output, or --resume a round of it")
    begun = [n for n in range(1, args.rounds + 1) if (output / f"round-{n}" / "config.json").exists()]
    for number in range(max(begun, default=1), args.rounds + 1 if args.online else 2):
        folder = output / f"round-{number}"
        # 1. The policy as the last round left it, and the reference; or both as the run was stopped.
        run = Run.resume(folder) if number in begun else None
        trainer = run.trainer if run else DPOTrainer(policy, args.policy, tokenizer, config)
        # 2. Pairs. Those that are held out show whether the policy learns.
        if args.online:
            pairs, held_out = sampled_pairs(trainer, prompts, reward, args, number), []
        else:
            pairs, held_out = labelled
        trainer.check_pairs(pairs)
        with run or Run.start(folder, trainer, {"arguments": vars(args)}, loggers=args.loggers) as run:  # 3. The loop
            train(run, pairs, held_out)
        policy = trainer.model

    # 4. Reward and exact KL of fresh samples, beside the least KL that such a reward needs.
    settings = EvaluationConfig(gen_len=args.gen_len, best_of=(16,), max_n=16, kl_coef=args.beta, seed=args.seed)
    found = evaluate(policy, trainer.reference, tokenizer, prompts, reward, config=settings).given
    if not trainer.processes.first:
        return
    policy.save_pretrained(output / "policy", summary={"algorithm": "DPO", **found.summary()})
    tokenizer.save_pretrained(output / "policy")
    write_json(output / "summary.json", {**found.summary(), "optimum": found.optimum})
    table = before_after_table(found.pairs)
    atomic_write(output / "before_after.md", table.encode())
    show(table)
    figures = [f"{name:28} {value:.3f}" for name, value in found.summary().items()]
    show("\n".join([*figures, found.optimum, f"saved in {output}"]))


def train(run: Run[DPOTrainer], pairs: list, held_out: list) -> None:
    def on_step(batch, stats) -> None:
        found = run.trainer.evaluate(held_out) if held_out and run.due else {}
        run.record(batch, {**stats, **{f"held_out/{name}": value for name, value in found.items()}})
        told = f"loss {stats['dpo/loss']:.3f}, margin {stats['rewards/margins']:.3f}"
        told += f", held-out accuracy {found['rewards/accuracies']:.3f}" if found else ""
        show(f"{run.folder}, step {run.trainer.steps_done} of {run.trainer.steps_total}: {told}")

    run.trainer.train(pairs, on_step)


def sampled_pairs(trainer: DPOTrainer, prompts: list[str], reward, args, number: int) -> list[TokenPair]:
    """The best and the worst of n responses to each prompt, as they were sampled; those of a stopped run again."""
    path, tokenizer, group = Path(args.output) / f"round-{number}.json", trainer.tokenizer, trainer.processes
    if not group.broadcast("whether there are pairs", path.exists()):
        texts = list(itertools.islice(itertools.cycle(prompts), max(1, args.samples // args.n)))
        texts = [text for text in texts for _ in range(args.n)]
        ids = [tokenizer.encode_prompt(text) for text in texts]
        generator = torch.Generator(trainer.device).manual_seed(args.seed + number)
        mine = group.share(len(ids))  # each of several processes samples some of the rows, and all get all
        drawn = generate(trainer.model.eval(), ids, args.gen_len, generator=generator, share=mine).responses
        responses = [response for part in group.gather("responses", drawn) for response in part][: len(ids)]
        spoken = ["".join(tokenizer.decode_response(p, r)) for p, r in zip(ids, responses, strict=True)]
        scores = score_all(reward, texts, spoken).view(-1, args.n)
        show(f"round {number}: mean reward of {scores.numel()} samples {scores.mean():.3f}")
        groups = zip(scores.argmax(-1).tolist(), scores.argmin(-1).tolist(), itertools.count(0, args.n))
        rows = [(ids[i], responses[i + best].tolist(), responses[i + worst].tolist()) for best, worst, i in groups]
        with agreed("the pairs"):  # all wait until the first process has written them
            if group.first:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, {"pairs": [dataclasses.asdict(TokenPair(*row)) for row in rows if row[1] != row[2]]})
    return [TokenPair(**pair) for pair in read_json(path)["pairs"]]


def read_arguments() -> argparse.Namespace:
    parser = command_line(
        __doc__,
        pairs=(str, "pairs or rankings, .jsonl or .tsv; a tenth of them is held out"),
        encoding=("utf-8", "of this file"),
        online=(False, "learn from samples instead"),
        rounds=(4, "online: of sampling and training"),
        samples=(256, "online: a round"),
        n=(4, "online: responses a prompt"),
        gen_len=(16, "tokens of a sample"),
        policy=(POLICY, "GPT-2 folder"),
        reward=(REWARD, "BERT folder"),
        **{name: (default, f"DPOConfig.{name}") for name, default in FIELDS.items()},
        prompts=(PROMPTS, "texts to continue, or one file, .txt or .jsonl"),
        output=(new_folder("dpo-"), "folder of all rounds"),
        loggers=LOGGERS,
        resume=(str, "continue the run in this folder, round-1/ or another of --output, with its own settings"),
    )
    args = parse(parser)
    if bool(args.pairs) == args.online:
        parser.error("either --pairs or --online is needed, or --resume")
    if args.rounds < 1 or args.n < 2:
        raise ValueError(f"--rounds must be at least 1 and --n at least 2, got {args.rounds} and {args.n}")
    return args


if __name__ == "__main__":
    run_script(main)
