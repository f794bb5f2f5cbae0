"""Training and measuring a reward model on ranked answers: stage 2 of InstructGPT (Ouyang et al. 2022).

All pairs of a ranking are in one batch, and each answer goes through the model once: K forward passes for K (K - 1) / 2
comparisons, and no pair seen in a later step with the answers already learned.

Left out: the language-model loss beside the ranking loss, ensembles, early stopping (the figures of every epoch are
returned; one epoch is often best).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.validation import require
from minirlhf.device.placement import resolve_device
from minirlhf.rewards.reward_model import RewardModel
from minirlhf.supervised.classification import reliability_table
from minirlhf.supervised.loop import FitConfig, fit
from minirlhf.text.batching import bucketed_batches
from minirlhf.text.preferences import Ranking


@dataclass(frozen=True)
class RewardTrainingConfig(FitConfig):
    """Settings of reward modelling. Raises ValueError for a bad one."""

    epochs: int = 1  # InstructGPT found that more overfit
    lr: float = 1e-4
    max_length: int = 128  # tokens a text, prompt, answer, [CLS] and [SEP] together; longer texts are cut at the end
    tokens_per_batch: int = 4096  # padding included; a ranking is never divided

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "max_length", type(self.max_length) is int and self.max_length >= 2, "an integer of at least 2")
        fits = type(self.tokens_per_batch) is int and self.tokens_per_batch >= self.max_length
        require(self, "tokens_per_batch", fits, f"an integer of at least max_length={self.max_length}")


@dataclass(frozen=True)
class RankingFigures:
    """How well a reward model knows rankings.

    pairs: compared answers. loss: `ranking_loss`, nats, margins included.
    accuracy: share of pairs whose better answer has the higher score; equal scores count as half.
    calibration_error: expected calibration error (Guo et al. 2017) of sigmoid(r_w - r_l), the probability that the
        better answer is the better one; reliability: its table. A pair is in it in both directions, as the direction
        in which it was written down says nothing.
    """

    pairs: int
    loss: float
    accuracy: float
    calibration_error: float
    reliability: list[dict[str, float]]

    def __str__(self) -> str:
        return (
            f"accuracy {self.accuracy:.3f} on {self.pairs} pairs, loss {self.loss:.3f}, "
            f"calibration error {self.calibration_error:.3f}"
        )


def train_reward_model(
    model: RewardModel,
    rankings: Sequence[Ranking],
    config: RewardTrainingConfig | None = None,
    held_out: Sequence[Ranking] = (),
    on_step: Callable[[float, float], None] | None = None,
    on_epoch: Callable[[int, RankingFigures], None] | None = None,
) -> list[RankingFigures]:
    """Train a reward model in place; it is left in eval mode, and without a normalisation (see `normalise`).

    held_out: rankings to measure on, before the first epoch and after each.
    on_step: called after every optimizer step with the progress in (0, 1] and the loss.
    on_epoch: called with every measurement and the number of epochs done.
    Returns the measurements, 1 + epochs of them; none without `held_out`.
    Warns with a count if texts are cut, or pairs are the same to the model. Raises ValueError for no rankings, or a
    `max_length` beyond the model's positions.
    """
    config = config or RewardTrainingConfig()
    if len(rankings) == 0:
        raise ValueError("rankings is empty: there is nothing to train on")
    if config.max_length > model.max_length:
        raise ValueError(f"max_length={config.max_length} exceeds the model's {model.max_length} positions")
    model.to(resolve_device(config.device))
    model.mean, model.std = 0.0, 1.0  # those of the old weights
    encoded = _encode(model, rankings, config.max_length)
    generator = torch.Generator().manual_seed(config.seed)
    history: list[RankingFigures] = []

    def measure() -> None:
        if held_out:
            history.append(evaluate_rankings(model, held_out))
            if on_epoch is not None:
                on_epoch(len(history) - 1, history[-1])

    def epoch_batches(epoch: int) -> list[list[int]]:
        measure()
        longest = [max(map(len, answers)) for answers in encoded]
        return bucketed_batches(longest, config.tokens_per_batch, generator, [len(answers) for answers in encoded])

    def loss_of(batch: list[int]) -> Tensor:
        scores = model.score([ids for i in batch for ids in encoded[i]])  # one forward pass of each answer
        margins = torch.tensor([rankings[i].margin for i in batch]).to(scores)
        return ranking_loss(scores, [len(encoded[i]) for i in batch], margins)

    fit(model, epoch_batches, loss_of, config, on_step)
    measure()
    return history


def comparisons(sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of lists of these sizes that lie one after the other, each list best first.

    Returns (winners, losers, lists), int64 (M,): positions of the better and the worse answer, and whose pair it is.
    """
    rows, start = [], 0
    for number, size in enumerate(sizes):
        rows += [(start + i, start + j, number) for i, j in itertools.combinations(range(size), 2)]
        start += size
    winners, losers, lists = torch.tensor(rows, dtype=torch.int64).view(-1, 3).unbind(1)
    return winners, losers, lists


def ranking_loss(scores: Tensor, sizes: Sequence[int], margins: Tensor | None = None) -> Tensor:
    """The loss of a batch of rankings, 0-d, nats (Ouyang et al. 2022, eq. 1; the model of Bradley & Terry 1952).

    -1 / C(K, 2) * sum over pairs of log sigmoid(r_w - r_l - margin), averaged over the rankings, whatever their K.

    scores: (N,), list after list, best first. sizes: K of each of the B lists.
    margins: (B,), of the pairs of each list (Touvron et al. 2023, eq. 2); None: 0.
    """
    winners, losers, lists = (x.to(scores.device) for x in comparisons(sizes))
    differences = scores[winners] - scores[losers]  # (M,)
    if margins is not None:
        differences = differences - margins[lists]
    pairs = torch.tensor([size * (size - 1) / 2 for size in sizes]).to(scores)  # C(K, 2), (B,)
    return -(F.logsigmoid(differences) / pairs[lists]).sum() / len(sizes)


def evaluate_rankings(model: RewardModel, rankings: Sequence[Ranking], bins: int = 10) -> RankingFigures:
    """Accuracy and calibration on rankings that were not trained on. Raises ValueError for none."""
    if len(rankings) == 0:
        raise ValueError("rankings is empty: there is nothing to measure on")
    scores = model.scores([text for ranking in rankings for text in ranking.texts]).double()
    sizes = [len(ranking.answers) for ranking in rankings]
    winners, losers, _ = comparisons(sizes)
    differences = scores[winners] - scores[losers]
    preferred = torch.cat([differences, -differences]).sigmoid()
    truth = torch.cat([torch.ones(len(differences)), torch.zeros(len(differences))])
    table = reliability_table(preferred, truth, bins)
    margins = torch.tensor([ranking.margin for ranking in rankings], dtype=torch.float64)
    return RankingFigures(
        pairs=len(differences),
        loss=ranking_loss(scores, sizes, margins).item(),
        accuracy=((differences > 0).double() + 0.5 * (differences == 0)).mean().item(),
        calibration_error=expected_calibration_error(table),
        reliability=table,
    )


def expected_calibration_error(table: Sequence[dict[str, float]]) -> float:
    """Mean distance of prediction and truth over the bins of a reliability table, weighted by their counts."""
    total = sum(row["count"] for row in table)
    return sum(row["count"] / total * abs(row["predicted"] - row["positive"]) for row in table)


def _encode(model: RewardModel, rankings: Sequence[Ranking], max_length: int) -> list[list[list[int]]]:
    """Token ids of every answer behind its prompt, cut to `max_length`; warns of what is lost by it."""
    tokenizer = model.tokenizer
    texts = [text for ranking in rankings for text in ranking.texts]
    whole, cut = tokenizer.encode_batch(texts), tokenizer.encode_batch(texts, max_length)
    longer = sum(len(ids) > max_length for ids in whole)
    if longer:
        warnings.warn(
            f"{longer} of {len(whole)} texts have more than max_length={max_length} tokens and are cut at the end",
            stacklevel=3,
        )
    answers = iter(cut)
    encoded = [list(itertools.islice(answers, len(ranking.answers))) for ranking in rankings]
    same = sum(a == b for sequences in encoded for a, b in itertools.combinations(sequences, 2))
    if same:
        warnings.warn(
            f"{same} pairs of answers are the same tokens to the model, cut or unknown to its vocabulary: "
            "nothing is learned from them",
            stacklevel=3,
        )
    return encoded
