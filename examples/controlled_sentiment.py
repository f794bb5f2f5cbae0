"""One policy, three sentiments: the prompt says which, [正向] (positive), [中性] (neutral) or [负向] (negative).

    python examples/controlled_sentiment.py [--steps 9600 --output runs/controlled --seed 0]

The tag is a part of the prompt, so the policy reads it; the classifier does not see it. The reward is P(positive) under
[正向], 1 - P under [负向], and 1 - |2P - 1| under [中性], less a small penalty on repetition. Each token gets what it
added to that (`Increments`): a word that turns the text is paid at once, and not taken for the fifteen around it.
Leaves metrics.jsonl, samples.jsonl, config.json, summary.json, before_after.md and policy/ under --output.
"""

import argparse
import dataclasses
import random
import sys
import time
from pathlib import Path

from minirlhf import GPT2, PPOConfig, PPOTrainer, SentimentReward, Tokenizer
from minirlhf.common.text import printable
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.findings import before_after_table
from minirlhf.io.files import write_json
from minirlhf.rewards.composed import (
    TARGETS,
    ControlledSentiment,
    Increments,
    RepetitionPenalty,
    WeightedSum,
    check_tags,
)
from minirlhf.runs.log import RunLog

WEIGHTS = Path(__file__).resolve().parent.parent / "weights"
PROMPTS = ["酒店", "周围", "位置", "前台"]  # hotel, surroundings, location, front desk


def main() -> None:
    args = read_arguments()
    tokenizer = Tokenizer.from_pretrained(args.policy)
    check_tags(tokenizer)  # a tag that is read as [UNK] would say nothing
    classifier = SentimentReward.from_pretrained(args.reward)
    sentiment = ControlledSentiment(classifier)
    repetition = RepetitionPenalty(n=2, per_token=True)
    reward = WeightedSum({"sentiment": (1.0, Increments(sentiment)), "repetition": (0.5, repetition)})

    # A batch has 32 samples of each tag. Three behaviours lie further from the reference than one: a larger target for
    # the KL and a smaller first penalty than in positive_reviews.py. An entropy bonus would only lead away from the
    # reference: these prompts are new to it, so that it is uncertain enough.
    config = PPOConfig(
        steps=args.steps,
        batch_size=args.batch_size,
        lr=args.lr,
        init_kl_coef=args.init_kl_coef,
        target=8.0,
        minibatch_size=32,
        forward_batch_size=32,
        entropy_coef=args.entropy_coef,
        ppo_epochs=2,
        vf_coef=0.5,
        seed=args.seed,
    )
    policy, reference = GPT2.from_pretrained(args.policy), GPT2.from_pretrained(args.policy)
    trainer = PPOTrainer(policy, reference, tokenizer, config)
    output = Path(args.output or f"runs/controlled-{time.strftime('%Y%m%d-%H%M%S')}")
    log = RunLog(output, {"arguments": vars(args), "ppo": dataclasses.asdict(config)})

    for iteration in range(config.iterations):
        # The tags in turn, so that each has its share of every batch; the rest of the prompt at random.
        draw = random.Random(f"{config.seed} {iteration}")
        prompts = [TARGETS[i % len(TARGETS)].tag + draw.choice(PROMPTS) for i in range(config.batch_size)]
        rollout = trainer.collect(prompts, reward)
        stats = trainer.step(rollout)
        parts = reward.metrics()  # the mean of each part
        by_tag = {t.name: rollout.scores[i :: len(TARGETS)].mean().item() for i, t in enumerate(TARGETS)}
        log.metrics(iteration + 1, {**stats, **parts, **{f"reward/{name}": mean for name, mean in by_tag.items()}})
        means = ", ".join(f"{name} {mean:.3f}" for name, mean in by_tag.items())
        print(f"step {iteration + 1}: {means}, KL {stats['objective/kl']:.1f}", flush=True)
        if (iteration + 1) % config.save_freq == 0 or iteration + 1 == config.iterations:
            texts, scores = rollout.texts[:6], rollout.scores[:6].tolist()
            log.samples(iteration + 1, texts, scores)
            for text, score in zip(texts, scores, strict=True):
                print(f"    {score:5.2f}  {printable(text)}")

    # Did it learn to obey? Fresh samples under each tag, without the penalty, from the policy and the reference, and
    # what the classifier says of them: P(positive) is to be near 1, 1/2 and 0.
    summary, tables = {}, []
    for target in TARGETS:
        prompts = [target.tag + prompt for prompt in PROMPTS]
        settings = EvaluationConfig(args.samples, config.gen_len, config.sampling, max_n=16, seed=config.seed)
        found = evaluate(trainer.policy, reference, tokenizer, prompts, sentiment, config=settings).given
        figures, pairs = found.summary(), found.pairs
        for model, side in (("reference", "before"), ("policy", "after")):
            p = classifier([pair.prompt.removeprefix(target.tag) + getattr(pair, side) for pair in pairs])
            figures |= {f"{model}/p_positive": p.mean().item(), f"{model}/from_half": (p - 0.5).abs().mean().item()}
        summary |= {f"{target.name}/{name}": value for name, value in figures.items()}
        tables.append(before_after_table(pairs, rows=8))
        for name, what in (("reward", "reward"), ("p_positive", "P(positive)"), ("from_half", "|P - 1/2|")):
            print(f"{target.tag} {what:11} {figures[f'reference/{name}']:.3f} -> {figures[f'policy/{name}']:.3f}")
    write_json(output / "summary.json", summary)
    (output / "before_after.md").write_text("\n".join(tables), encoding="utf-8")
    trainer.policy.save_pretrained(output / "policy")
    tokenizer.save_pretrained(output / "policy")
    print(f"saved in {output}")


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default=str(WEIGHTS / "gpt2-chinese-reviews-small"), help="GPT-2 folder")
    parser.add_argument("--reward", default=str(WEIGHTS / "bert-chinese-reviews-sentiment-small"), help="BERT folder")
    parser.add_argument("--steps", type=int, default=9600, help="samples in all")
    parser.add_argument("--batch-size", type=int, default=96, help="a multiple of three")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--init-kl-coef", type=float, default=0.05)
    parser.add_argument("--entropy-coef", type=float, default=0.0)
    parser.add_argument("--samples", type=int, default=256, help="fresh samples a tag at the end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="folder of the run, default runs/controlled-<time>")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line, no traceback
        sys.exit(f"error: {error}")
