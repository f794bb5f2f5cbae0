"""One sample of a PPO step, token by token: what the algorithm saw, and what it did with it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import torch

from minirlhf.common.printing import show, text_table
from minirlhf.common.text import printable
from minirlhf.evaluation.plots import draw_tokens
from minirlhf.io.files import atomic_write
from minirlhf.rl.advantages import with_advantages
from minirlhf.rl.logprobs import response_logprobs
from minirlhf.rl.losses import clip_ratio, log_ratio
from minirlhf.rl.shaping import token_kl, with_token_rewards

if TYPE_CHECKING:
    from minirlhf.rl.rollout import Rollout
    from minirlhf.rl.trainer import PPOTrainer


READING = """\
A token with a positive advantage did better than expected: PPO makes it likelier, so after the step its ratio is above
1, and below 1 where the advantage is negative. Its reward is the KL penalty, at the last token also the score; where
clipped says yes, the ratio has left its range, and this batch moves the token no further."""  # two sentences
COLUMNS = ("token", "logprob", "old_logprob", "ref_logprob", "kl", "reward", "value", "returns", "advantage", "ratio",
           "clipped")  # fmt: skip


@dataclass(frozen=True)
class Explanation:
    """A prompt and its response, token by token; `str()` of it is a table, `draw()` a picture.

    group: the scores of all responses to the prompt, where there are several.
    tokens: the figures of each token by name; log-probabilities and KL in nats.
        logprob, old_logprob, ref_logprob: under the policy as it is now, as it was when it sampled, and the reference.
        kl: the KL estimate of the token before the update, as it was penalised. ratio: exp(logprob - old_logprob).
        clipped: whether clipping of the ratio keeps this token from moving the policy further. value, returns: left
        out for a policy without a value head. Further names: reward, advantage, and token: what it adds to the text, or
        its name in the vocabulary if that is nothing (special tokens, all but the last of a character).
    response: its text.
    """

    prompt: str
    score: float
    tokens: tuple[dict[str, Any], ...]
    group: tuple[float, ...] = ()
    response: str = ""

    def rows(self) -> list[list[str]]:
        """The table: the names of the columns, and a row a token."""
        names = [name for name in COLUMNS if name in self.tokens[0]]
        return [names, *([_cell(token[name]) for name in names] for token in self.tokens)]

    def __str__(self) -> str:
        head = f"prompt {printable(self.prompt)!r}, score {self.score:.4f}"
        if self.group:
            scores = ", ".join(f"{score:.4f}" for score in self.group)
            total = sum(self.group)  # what an advantage is compared with, by methods
            mean, others = total / len(self.group), (total - self.score) / (len(self.group) - 1)
            head += f"; the group's scores {scores} (mean {mean:.4f}, of the others {others:.4f})"
        return "\n".join([head, READING, *text_table(self.rows(), left=0)])

    def draw(self, path: str | os.PathLike[str] | None = None) -> Any:
        """The tokens coloured by advantage, clipped ones framed: a matplotlib Figure, also as a PNG at the path.

        Raises ImportError that names the extra if matplotlib is missing.
        """
        figure = draw_tokens(self.tokens, f"{printable(self.prompt)} ... score {self.score:.3f}")
        if path is not None:
            atomic_write(path, figure._repr_png_())
        return figure


@torch.no_grad()
def explain(trainer: PPOTrainer, rollout: Rollout, i: int, file: TextIO | None = None) -> Explanation:
    """Print one row of a rollout token by token, as PPO sees it, and return it.

    rollout: before or after `trainer.step` was called on it; the ratio shows how far the policy has moved since it was
        sampled. The KL coefficient is the controller's present one.
    i: the row. file: where to print; None: standard output.
    Raises ValueError for a row that is not there.
    """
    if not 0 <= i < len(rollout):
        raise ValueError(f"the rollout has rows 0 to {len(rollout) - 1}, got {i}")
    c = trainer.config
    row = with_advantages(with_token_rewards(rollout, trainer.kl_controller.coef, c)[0], c).rows(torch.tensor([i]))
    width = row.response_mask.size(1)
    with trainer.precision.autocast():
        now = response_logprobs(trainer.policy, row.tokens, row.mask, width, c.logprobs_divisor, row.sampling_sets)
    ratio = log_ratio(now.logprobs, row.logprobs, row.response_mask, c.policy_ratio).exp()
    outside = ratio - clip_ratio(ratio, c.cliprange, c.cliprange_high)  # clipping binds where the gain lies outside
    columns = {
        "logprob": now.logprobs,
        "old_logprob": row.logprobs,
        "ref_logprob": row.ref_logprobs,
        "kl": token_kl(row, c),
        "reward": row.token_rewards,
        "value": row.values,
        "returns": row.returns,
        "advantage": row.advantages,
        "ratio": ratio,
    }
    group = rollout.scores.view(-1, rollout.group_size)[i // rollout.group_size] if rollout.group_size > 1 else ()
    known = {name: x for name, x in columns.items() if x is not None}  # without a value head some are missing
    numbers = torch.cat(list(known.values())).T.tolist()  # one list a token
    tokenizer, (prompt_ids, response_ids) = trainer.tokenizer, row.tokens[0].split([row.tokens.size(1) - width, width])
    pieces = tokenizer.decode_response(prompt_ids, response_ids)
    texts = [piece or tokenizer.vocab[token] for piece, token in zip(pieces, response_ids.tolist(), strict=True)]
    explanation = Explanation(
        rollout.prompts[i] if rollout.prompts else tokenizer.decode(prompt_ids),
        rollout.scores[i].item(),
        tuple(
            {"token": text, **dict(zip(known, values, strict=True)), "clipped": cut > 0}
            for text, values, cut in zip(texts, numbers, (outside * row.advantages)[0].tolist(), strict=True)
        ),
        tuple(map(float, group)),
        "".join(pieces),
    )
    show(explanation, file)
    return explanation


def _cell(value: str | float | bool) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return value if isinstance(value, str) else f"{value:.4f}"
