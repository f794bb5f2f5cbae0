"""Policy against reference on fresh samples: what PPO gained, and what it paid.

Left out: confidence intervals, best-of-n, second scorers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minirlhf.metrics import distinct_n, printable
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.heads import ActorCritic
from minirlhf.rewards import RewardFunction
from minirlhf.rollout import Rollout, collect_rollout
from minirlhf.sampling import SamplingConfig
from minirlhf.tokenizer import Tokenizer

MARKUP = r"[\\`*_~\[\]<&|$]"  # what Markdown, HTML in it, or a table would take for its own


@dataclass(frozen=True)
class Pair:
    """Two continuations of one prompt, with their rewards: by the reference, and by the policy."""

    prompt: str
    before: str
    before_reward: float
    after: str
    after_reward: float


def compare(
    policy: ActorCritic,
    reference: GPT2,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    reward_fn: RewardFunction,
    gen_len: int = 16,
    sampling: SamplingConfig | None = None,
    samples: int = 512,
    seed: int = 0,
) -> tuple[dict[str, float], list[Pair]]:
    """Sample `samples` continuations from both models, the prompts in turn, and measure them.

    Returns the figures by name and the samples as pairs. For "policy" and "reference" each: mean reward, distinct-1
    and distinct-2 (over the characters of the responses). `kl`: KL(policy || reference) a sequence (sum over its
    tokens), nats, the exact KL at each token of the policy's samples, in the distribution that was sampled;
    `kl_full_softmax`: the same with the models' untruncated distributions at each token, still on samples of the
    truncated policy.
    Raises ValueError as `collect_rollout`.
    """
    if isinstance(prompts, str) or len(prompts) == 0:
        raise ValueError(f"prompts must be a list with at least one text, got {prompts!r}")
    chosen = [prompts[i % len(prompts)] for i in range(samples)]
    device = reference.wte.weight.device

    def draw(model: ActorCritic, full_softmax: bool = False) -> Rollout:
        generator = torch.Generator(device).manual_seed(seed)
        return collect_rollout(
            model, reference, tokenizer, chosen, reward_fn, gen_len, sampling,
            generator=generator, score_full_softmax=full_softmax,
        )  # fmt: skip

    after, before = draw(policy), draw(ActorCritic(reference).to(device).eval())
    summary = {}
    for name, rollout in (("policy", after), ("reference", before)):
        summary[f"{name}/reward"] = rollout.scores.mean().item()
        for n in (1, 2):
            summary[f"{name}/distinct_{n}"] = distinct_n(rollout.responses, n)
    summary["kl"] = after.exact_kl.sum(-1).mean().item()
    summary["kl_full_softmax"] = draw(policy, full_softmax=True).exact_kl.sum(-1).mean().item()
    pairs = [
        Pair(*fields)
        for fields in zip(
            chosen, before.responses, before.scores.tolist(), after.responses, after.scores.tolist(), strict=True
        )
    ]
    return summary, pairs


def before_after_table(pairs: Sequence[Pair], rows: int = 12) -> str:
    """The first rows as a Markdown table that shows the texts as they are: control characters visible, no markup."""
    lines = ["| prompt | before | reward | after | reward |", "|---|---|---|---|---|"]
    for pair in pairs[:rows]:
        texts = [re.sub(MARKUP, r"\\\g<0>", printable(text)) for text in (pair.prompt, pair.before, pair.after)]
        lines.append(f"| {texts[0]} | {texts[1]} | {pair.before_reward:.2f} | {texts[2]} | {pair.after_reward:.2f} |")
    return "\n".join(lines) + "\n"
