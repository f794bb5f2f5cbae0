"""The table of docs/kl.md: which KL estimate, in which place, pulls at the KL. One token, enumerated."""

import re
from pathlib import Path

import pytest
import torch

from minirlhf.generation.token_statistics import exact_kl
from minirlhf.rl.kl import kl_estimate
from minirlhf.rl.presets import KL_PLACEMENTS

PAGE = Path(__file__).resolve().parents[2] / "docs/kl.md"
BETA = 0.3
REFERENCE = torch.tensor([0.35, 0.25, 0.2, 0.12, 0.06, 0.02], dtype=torch.float64).log()
SCORES = torch.linspace(0, 1, 6, dtype=torch.float64)
ELSEWHERE = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.1, 0.1], dtype=torch.float64).log()  # where the pull is measured


def estimate(logits, kind):
    """The KL estimate (6,) of each token that may be drawn."""
    if kind == "exact":
        return exact_kl(logits, REFERENCE).expand(6)
    return kl_estimate(logits.log_softmax(-1), REFERENCE, kind)


def loss(logits, kind, placement, scores=SCORES, whiten=False, rescale=False):
    """Its gradient is the expectation of what PPO follows on samples of the policy itself.

    whiten: divide the advantages by their standard deviation; rescale: and the KL in the loss as well.
    """
    logp = logits.log_softmax(-1)
    p, kl = logp.detach().exp(), estimate(logits, kind)
    rewards = scores - BETA * kl.detach() if placement == "reward" else scores
    advantages = rewards - (p * rewards).sum()
    scale = ((p * advantages.square()).sum() + 1e-8).rsqrt() if whiten else 1.0
    kl_loss = BETA * (p * kl).sum() * (placement == "loss") * (scale if rescale else 1.0)
    return kl_loss - (p * scale * advantages * logp).sum()


def gradient(function, logits=ELSEWHERE):
    logits = logits.clone().requires_grad_()
    return torch.autograd.grad(function(logits), logits)[0]


def share_of_the_pull(kind, placement):
    pull = gradient(lambda logits: loss(logits, kind, placement, scores=torch.zeros(6)))
    true = BETA * gradient(lambda logits: exact_kl(logits, REFERENCE))
    return (pull @ true / (true @ true)).item()


def kl_after_training(kind, placement, steps=800, **how):
    logits = REFERENCE.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(logits, kind, placement, **how).backward()
        optimizer.step()
    return exact_kl(logits.detach(), REFERENCE).item()


TEXT = PAGE.read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split(" | ")]
        for line in re.findall(r"^\| (?:reward|loss) .*$", TEXT, re.MULTILINE)]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1]} in the {row[0]}")
def test_a_row_of_the_table(row):
    placement, kind, _, share, end, word = row
    measured = share_of_the_pull(kind, placement), kl_after_training(kind, placement)
    assert (float(share), float(end)) == pytest.approx(measured, abs=0.006)
    assert word.startswith("accepted" if (kind, placement) in KL_PLACEMENTS else "refused")


def test_the_table_has_every_combination():
    combinations = [(place, kind) for place in ("reward", "loss") for kind in ("k1", "k2", "k3", "exact")]
    assert [(row[0], row[1]) for row in ROWS] == combinations


def test_the_optimum_and_what_whitening_does_to_a_kl_in_the_loss():
    optimum = exact_kl(REFERENCE + SCORES / BETA, REFERENCE).item()
    slack = kl_after_training("k2", "loss", whiten=True)
    held = kl_after_training("k2", "loss", whiten=True, rescale=True)
    assert [float(x) for x in re.findall(r"\*\*(\d\.\d\d)\*\*", TEXT)] == pytest.approx(
        [optimum, slack, held], abs=0.006
    )
