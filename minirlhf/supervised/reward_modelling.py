"""Training and measuring a reward model on ranked answers: stage 2 of InstructGPT (Ouyang et al. 2022).

All pairs of a ranking are in one batch, and each answer goes through the model once: K forward passes for K (K - 1) / 2
comparisons, and no pair is seen in a later step, when its answers are already learned.

Left out: the language-model loss beside the ranking loss, ensembles, early stopping (one epoch is often best).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.validation import require_config
from minirlhf.device.processes import agreed, processes
from minirlhf.models.sharded import initial_device
from minirlhf.rewards.reward_model import RewardModel
from minirlhf.supervised.loop import FitConfig, SupervisedTrainer, check_positions
from minirlhf.text.batching import bucketed_batches
from minirlhf.text.preferences import Ranking
from minirlhf.text.text_files import listed

EXAMPLE = 'give [Ranking(prompt, (better, worse)), ...], or read_rankings("pairs.jsonl")'


@dataclass(frozen=True)
class RewardTrainingConfig(FitConfig):
    """Settings of reward modelling. Raises ValueError with the field, the value and what is allowed.

    A ranking is never divided, even if its answers exceed `tokens_per_batch`.
    """

    epochs: int = 1  # InstructGPT found that more overfit
    lr: float = 1e-4


@dataclass(frozen=True)
class RankingFigures:
    """How well a reward model predicts rankings.

    pairs: compared answers. loss: `ranking_loss`, nats, margins included.
    accuracy: share of pairs whose better answer has the higher score; equal scores count as half.
    calibration_error: expected calibration error (Guo et al. 2017) of sigmoid(r_w - r_l), the probability that the
        first answer is the better one; reliability: its table. Each pair counts in both directions, because the order
        in which it was written down carries no information.
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


class RewardModelTrainer(SupervisedTrainer[list[int]]):
    """Training of a reward model in place, without a normalisation (see `RewardModel.normalise`).

    A batch is a list of rankings by number. `runs.Run` saves the trainer and goes on with it; measure with
    `evaluate_rankings`.
    Warns with a count if texts are cut, or if answers of a ranking are the same tokens. Raises ValueError for no
    rankings, or a text of more tokens than the model has positions.
    """

    kind = "reward_model"
    entry = "score"
    model: RewardModel
    config: RewardTrainingConfig

    def __init__(self, model: RewardModel, rankings: Sequence[Ranking], config: RewardTrainingConfig | None = None):
        config = require_config(config, RewardTrainingConfig)
        if not isinstance(model, RewardModel):
            raise ValueError(
                f"model must be a RewardModel, got a {type(model).__name__}: RewardModel.from_trunk makes one"
            )
        rankings = checked_rankings(rankings, "train")
        self.encoded = _encode(model, rankings, config.max_length)
        self.margins = [ranking.margin for ranking in rankings]
        lengths = [max(map(len, answers)) for answers in self.encoded]
        check_positions(max(lengths), model.max_length, config.max_length)
        generator, sizes = torch.Generator().manual_seed(config.seed), [len(answers) for answers in self.encoded]
        epochs = [bucketed_batches(lengths, config.tokens_per_batch, generator, sizes) for _ in range(config.epochs)]
        model.to(initial_device(config))
        model.mean, model.std = 0.0, 1.0  # the old ones belong to the old weights
        data = [f"{margin!r} {answers}" for margin, answers in zip(self.margins, self.encoded, strict=True)]
        super().__init__(model, config, epochs, data, model.network.origin)

    def loss(self, batch: list[int]) -> Tensor:
        """`ranking_loss` of these rankings, with one forward pass of each answer."""
        scores = self.model.score([ids for i in batch for ids in self.encoded[i]])
        margins = torch.tensor([self.margins[i] for i in batch]).to(scores)
        return ranking_loss(scores, [len(self.encoded[i]) for i in batch], margins)


def checked_rankings(rankings: Sequence[Ranking], purpose: str) -> list[Ranking]:
    """The rankings as a list. Raises ValueError for none, with the purpose, and for anything but Rankings."""
    found = listed(rankings, "rankings", EXAMPLE)
    if not found:
        raise ValueError(f"rankings is empty: there is nothing to {purpose} on")
    for i, ranking in enumerate(found):
        if not isinstance(ranking, Ranking):
            raise ValueError(f"ranking {i} must be a Ranking, got a {type(ranking).__name__}: {EXAMPLE}")
    return found


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
    """Accuracy and calibration on held-out rankings; of several processes each scores a part, so all must call this.

    Raises ValueError for an empty list.
    """
    rankings = checked_rankings(rankings, "measure")
    texts, group = [text for ranking in rankings for text in ranking.texts], processes()
    with agreed("rankings"):
        scores = model.scores(texts[group.part(len(texts))])
    scores = group.gather_rows(len(texts), scores.double())[0]
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
        calibration_error=sum(row["count"] * abs(row["predicted"] - row["positive"]) for row in table) / len(truth),
        reliability=table,
    )


def reliability_table(probabilities: Tensor, labels: Tensor, bins: int = 10) -> list[dict[str, float]]:
    """Calibration of a binary classifier: for each bin of P(positive) its count, mean prediction and positive share.

    probabilities: (N,) P(label 1); labels: (N,) 0 or 1. Empty bins are left out.
    """
    index = (probabilities * bins).long().clamp_max(bins - 1)
    rows = []
    for b in index.unique().tolist():
        predicted, positive = probabilities[index == b], labels[index == b].float()
        means = {"predicted": predicted.mean().item(), "positive": positive.mean().item()}
        rows.append({"from": b / bins, "to": (b + 1) / bins, "count": len(predicted), **means})
    return rows


def _encode(model: RewardModel, rankings: Sequence[Ranking], max_length: int) -> list[list[list[int]]]:
    """Token ids of every answer after its prompt, cut to `max_length`; warns of what is lost."""
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
