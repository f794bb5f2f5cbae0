"""One policy, three sentiments: the prompt says which, [正向] (positive), [中性] (neutral) or [负向] (negative).

    python examples/controlled_sentiment.py [--steps 9600 --output runs/controlled --seed 0]
    python examples/controlled_sentiment.py --resume runs/controlled

The tag is a part of the prompt, so the policy reads it; the classifier does not see it. The reward is P(positive) under
[正向], 1 - P under [负向], and 1 - |2P - 1| under [中性], less a small penalty on repetition. Each token gets what it
added to that (`Increments`): a word that turns the text is paid at once, and not mistaken for the fifteen around it.
Leaves metrics.jsonl, samples.jsonl, config.json, summary.json, before_after.md, checkpoints/ and policy/ under
--output.
"""

import dataclasses
import random
from collections.abc import Callable, Sequence

import torch

from minirlhf import PPOConfig, PPOTrainer, SentimentReward, Tokenizer, load_decoder
from minirlhf.common.printing import show
from minirlhf.evaluation.evaluate import EvaluationConfig, evaluate
from minirlhf.evaluation.findings import before_after_table
from minirlhf.io.files import atomic_write, write_json
from minirlhf.rewards.base import RewardFunction, call_reward
from minirlhf.rewards.composed import Increments, RepetitionPenalty, WeightedSum
from minirlhf.runs.run import Run
from minirlhf.text.language import warn_of_language
from shared import LOGGERS, POLICY, PROMPTS, REWARD, STARTER, command_line, new_folder, parse, run_script


@dataclasses.dataclass(frozen=True)
class Target:
    """A sentiment that a prompt can ask for: its tag, its name in metrics, and the reward of P(positive)."""

    tag: str
    name: str
    reward: Callable[[torch.Tensor], torch.Tensor]


TARGETS = (
    Target("[正向]", "positive", lambda p: p),
    Target("[中性]", "neutral", lambda p: 1 - (2 * p - 1).abs()),
    Target("[负向]", "negative", lambda p: 1 - p),
)


class ControlledSentiment:
    """Sentiment on command, after TRL's gpt2-sentiment-control notebook (von Werra 2020), which rewards logits.

    A prompt begins with one tag, [正向] (positive), [中性] (neutral) or [负向] (negative). `sentiment` scores the rest
    of the prompt with the response, P = P(positive), and the reward is P, 1 - |2P - 1|, or 1 - P.

    sentiment: a reward of texts or of prompts and responses with scores in [0, 1], such as SentimentReward.
    """

    def __init__(self, sentiment: RewardFunction):
        self.sentiment = sentiment

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        """Rewards (B,) in [0, 1], fp64.

        Raises ValueError for a prompt that does not begin with exactly one tag, before anything is scored, and for a
        sentiment outside [0, 1].
        """
        targets, untagged = zip(*map(_split_tag, prompts), strict=True) if prompts else ((), ())
        p = call_reward(self.sentiment, untagged, responses)
        bad = ((p < 0) | (p > 1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(f"sentiment must be in [0, 1], got {p[bad[0]].item()} for text {bad[0]}")
        rewards = torch.empty_like(p)
        for target in TARGETS:
            rows = [i for i, asked in enumerate(targets) if asked is target]
            rewards[rows] = target.reward(p[rows])
        return rewards


def check_tags(tokenizer: Tokenizer) -> None:
    """Raise ValueError if this vocabulary cannot spell a tag."""
    for target in TARGETS:
        if tokenizer.decode(tokenizer.encode_prompt(target.tag)) != target.tag:
            raise ValueError(f"the vocabulary cannot spell the tag {target.tag}: a character of it has no token")


def _split_tag(prompt: str) -> tuple[Target, str]:
    """The target that a prompt begins with, and the rest."""
    for target in TARGETS:
        rest = prompt.removeprefix(target.tag)
        if rest != prompt and not rest.startswith(tuple(other.tag for other in TARGETS)):
            return target, rest
    tags = ", ".join(target.tag for target in TARGETS)
    raise ValueError(f"a prompt must begin with exactly one of {tags}, got {prompt[:40]!r}")


def main() -> None:
    parser = command_line(
        __doc__,
        policy=(POLICY, "GPT-2 folder"),
        reward=(REWARD, "BERT folder"),
        steps=(9600, "samples in all"),
        batch_size=(96, "a multiple of three"),
        lr=(3e-4, "PPOConfig.lr"),
        init_kl_coef=(0.05, "PPOConfig.init_kl_coef"),
        entropy_coef=(0.0, "PPOConfig.entropy_coef"),
        samples=(256, "fresh samples a tag at the end"),
        seed=(0, "of everything"),
        output=(new_folder("controlled-"), "folder of the run"),
        loggers=LOGGERS,
        resume=(str, "continue the run in this folder, with its own settings"),
    )
    args = parse(parser)
    tokenizer = Tokenizer.from_pretrained(args.policy)
    warn_of_language(PROMPTS, args.policy, args.reward)
    check_tags(tokenizer)  # a tag that is read as [UNK] would say nothing
    classifier = SentimentReward.from_pretrained(args.reward)
    sentiment = ControlledSentiment(classifier)
    repetition = RepetitionPenalty(n=2, per_token=True)
    reward = WeightedSum({"sentiment": (1.0, Increments(sentiment)), "repetition": (0.5, repetition)})

    # Three behaviours lie further from the reference than one: the target of the KL is larger and the first penalty
    # smaller than in positive_reviews.py. There is no entropy bonus: the reference does not know these prompts, so the
    # policy is uncertain enough.
    if args.resume:
        run = Run.resume(args.resume)
    else:
        given = {name: getattr(args, name) for name in ("steps", "batch_size", "lr", "init_kl_coef", "entropy_coef")}
        config = PPOConfig(**{**STARTER, **given}, target=8.0, ppo_epochs=2, vf_coef=0.5, seed=args.seed)
        trainer = PPOTrainer(load_decoder(args.policy), args.policy, tokenizer, config)
        run = Run.start(
            args.output, trainer, {"arguments": vars(args), "ppo": dataclasses.asdict(config)}, loggers=args.loggers
        )
    with run:
        trainer, config = run.trainer, run.trainer.config
        for iteration in range(trainer.iteration, config.iterations):
            # The tags in turn, so that each has its share of every batch; the rest of the prompt at random.
            draw = random.Random(f"{config.seed} {iteration}")
            prompts = [TARGETS[i % len(TARGETS)].tag + draw.choice(PROMPTS) for i in range(config.batch_size)]
            rollout = trainer.collect(prompts, reward)
            stats = trainer.step(rollout)
            by_tag = {t.name: rollout.scores[i :: len(TARGETS)].mean().item() for i, t in enumerate(TARGETS)}
            tagged = {f"reward/{name}": mean for name, mean in by_tag.items()}
            samples = run.record(rollout, {**stats, **tagged})
            means = ", ".join(f"{name} {mean:.3f}" for name, mean in by_tag.items())
            show(f"step {iteration + 1}: {means}, KL {stats['objective/kl']:.1f}")
            for text, score in samples:
                show(f"    {score:5.2f}  {text}")

        # Did it learn to obey? Fresh samples under each tag from policy and reference, rewarded without the penalty,
        # and the classifier's P(positive) of each, which should be near 1, 1/2 and 0.
        summary, tables = {}, []
        for target in TARGETS:
            prompts = [target.tag + prompt for prompt in PROMPTS]
            settings = EvaluationConfig(args.samples, config.gen_len, config.sampling, max_n=16, seed=config.seed)
            models = trainer.policy, trainer.reference, tokenizer
            found = evaluate(*models, prompts, sentiment, config=settings).given
            figures, pairs = found.summary(), found.pairs
            for model, side in (("reference", "before"), ("policy", "after")):
                p = classifier([pair.prompt.removeprefix(target.tag) + getattr(pair, side) for pair in pairs])
                figures |= {f"{model}/p_positive": p.mean().item(), f"{model}/from_half": (p - 0.5).abs().mean().item()}
            summary |= {f"{target.name}/{name}": value for name, value in figures.items()}
            tables.append(before_after_table(pairs, rows=8))
            for name, what in (("reward", "reward"), ("p_positive", "P(positive)"), ("from_half", "|P - 1/2|")):
                show(f"{target.tag} {what:11} {figures[f'reference/{name}']:.3f} -> {figures[f'policy/{name}']:.3f}")
        if not trainer.processes.first:
            return
        write_json(run.folder / "summary.json", summary)
        atomic_write(run.folder / "before_after.md", "\n".join(tables).encode())
        trainer.save_pretrained(run.folder / "policy")
    show(f"saved in {run.folder}")


if __name__ == "__main__":
    run_script(main)
