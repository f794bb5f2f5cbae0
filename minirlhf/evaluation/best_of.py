"""Best-of-n: sample n responses to each prompt and keep the one with the highest reward.

It needs no training and is hard to beat (Stiennon et al. 2020; Nakano et al. 2021; Gao et al. 2022), so PPO is compared
with it, at the KL that it costs.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minirlhf.device.processes import agreed, processes
from minirlhf.generation.generate import generate, language_model
from minirlhf.generation.sampling import SamplingConfig
from minirlhf.io.files import StrPath
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.models.loading import load_decoder
from minirlhf.rewards.base import RewardFunction, score_all
from minirlhf.text.prompts import as_prompts, require_room
from minirlhf.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class BestOfN:
    """The best of n responses to each of B prompts.

    scores: (B,) fp64, the rewards of the responses. candidates: the n responses to each prompt that were sampled;
    candidate_scores: (B, n) fp64, their rewards.
    """

    prompts: tuple[str, ...]
    responses: tuple[str, ...]
    scores: Tensor
    candidates: tuple[tuple[str, ...], ...]
    candidate_scores: Tensor


def best_of_n(
    policy: Decoder | ActorCritic | StrPath,
    prompts: Sequence[str],
    reward: RewardFunction,
    n: int,
    *,
    tokenizer: Tokenizer | None = None,
    gen_len: int = 16,
    sampling: SamplingConfig | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 128,
) -> BestOfN:
    """Sample n responses to each prompt and keep the best; of equal ones the first.

    Of several processes all get the result, and each samples and scores some of the prompts.
    policy: a model in eval mode, or its folder, which holds the tokenizer too; a model needs `tokenizer`.
    prompts: B texts. reward: of any form that `rewards.call_reward` takes; it gets all B n responses in one call.
    gen_len, eos_token_id: response tokens, and the token or tokens that end one earlier.
    sampling: None: the model's own distribution. generator: on the model's device; None: PyTorch's global one.
    batch_size: responses that are sampled at once; it changes memory, speed, and which responses are drawn.
    Raises ValueError for no prompts, an empty or too long one, an n or batch_size below 1, a model without a tokenizer
    or with another vocabulary, and rewards that are not finite numbers, one for each response.
    """
    for name, value in (("n", n), ("gen_len", gen_len), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    model, tokenizer = loaded(policy, tokenizer)
    prompts = as_prompts(prompts, tokenizer)
    require_room(prompts, tokenizer, model.n_positions, gen_len)
    repeated = [row for row in map(tokenizer.encode_prompt, prompts) for _ in range(n)]
    tokens: list[list[str]] = []
    group = processes()
    for start in range(0, len(repeated), batch_size):
        batch = repeated[start : start + batch_size]
        mine = group.share(len(batch))
        with agreed("best-of-n"):
            sampled = generate(
                model, batch, gen_len, sampling,
                eos_token_id=eos_token_id, pad_token_id=tokenizer.pad_id, generator=generator, share=mine,
            )  # fmt: skip
            drawn = [tokenizer.decode_response(*pair) for pair in zip(batch[mine], sampled.responses, strict=True)]
        tokens += [row for part in group.gather("responses", drawn) for row in part][: len(batch)]
    responses = ["".join(row) for row in tokens]
    scores = score_all(reward, [p for p in prompts for _ in range(n)], responses, tokens).view(len(prompts), n)
    candidates = tuple(tuple(responses[start : start + n]) for start in range(0, len(responses), n))
    best = scores.argmax(1).tolist()  # of equal ones the first
    return BestOfN(
        prompts=tuple(prompts),
        responses=tuple(row[i] for row, i in zip(candidates, best, strict=True)),
        scores=scores.amax(1),
        candidates=candidates,
        candidate_scores=scores,
    )


def best_of_n_kl(n: float) -> float:
    """log n - (n - 1) / n, nats: KL(best-of-n || the policy it draws from), a sequence.

    Exact if no two responses have equal rewards and none has a probability of its own, otherwise an upper bound
    (Hilton 2023; Beirami et al. 2024). n may lie between integers. Raises ValueError for n below 1.
    """
    if not 1 <= n < math.inf:
        raise ValueError(f"n must be a finite number of at least 1, got {n!r}")
    return math.log(n) - (n - 1) / n


def n_of_kl(kl: float) -> float:
    """The n >= 1, between integers in general, whose best-of-n costs so many nats; 1 for a KL of 0 or less."""
    low, high = 1.0, math.exp(max(kl, 0.0) + 1)  # log n - 1 < log n - (n - 1) / n
    for _ in range(200):  # bisection: it is monotone in n
        middle = (low + high) / 2
        low, high = (middle, high) if best_of_n_kl(middle) < kl else (low, middle)
    return low


def expected_best_of_n(scores: NDArray[np.float64], n: float, values: NDArray[np.float64] | None = None) -> NDArray:
    """The expected figure of the best of n, from N >= n candidates a prompt: (M, N) to (M,), without bias.

    Of all choices of n candidates, the i-th lowest of N is the best of C(i - 1, n - 1) / C(N, n) (Nakano et al. 2021,
    appendix I). So one set of candidates serves every n, and all of them count.
    scores: (M, N), by which the best is chosen. values: (M, N), the figure of each candidate; None: the scores.
    n: between integers, linear in the KL between its neighbours.
    Raises ValueError for n outside [1, N].
    """
    N = scores.shape[1]
    if not 1 <= n <= N:
        raise ValueError(f"n must be in [1, {N}], the number of candidates, got {n!r}")
    order = np.argsort(scores, 1, kind="stable")
    ranked = np.take_along_axis(scores if values is None else values, order, 1)
    below = math.floor(n)
    at_below = ranked @ _best_probabilities(N, below)
    if n == below:
        return at_below
    kls = [best_of_n_kl(x) for x in (below, n, below + 1)]
    share = (kls[1] - kls[0]) / (kls[2] - kls[0])
    return (1 - share) * at_below + share * (ranked @ _best_probabilities(N, below + 1))


def _best_probabilities(N: int, n: int) -> NDArray[np.float64]:
    """(N,): the probability that the i-th lowest of N is the best of n of them."""
    every = math.comb(N, n)
    return np.array([math.comb(i, n - 1) / every for i in range(N)])


def loaded(policy: object, tokenizer: Tokenizer | None) -> tuple[Decoder, Tokenizer]:
    """The language model and the tokenizer of what `best_of_n` takes, with its errors."""
    if isinstance(policy, (str, os.PathLike)):
        model, tokenizer = load_decoder(policy), tokenizer or Tokenizer.from_pretrained(policy)
    elif isinstance(policy, (Decoder, ActorCritic)):
        model = language_model(policy)
    else:
        raise ValueError(f"policy must be a Decoder, an ActorCritic or a folder, got a {type(policy).__name__}")
    if tokenizer is None:
        raise ValueError("a policy that is a model needs tokenizer=")
    model.fit_vocabulary(len(tokenizer))
    return model, tokenizer
