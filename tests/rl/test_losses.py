"""The losses of PPO against the oracle, cases worked by hand, and what other libraries compute."""

import math

import numpy as np
import pytest
import torch
from ragged import DOUBLE, NAN, batches, close, spoil, tensors

import oracle
from minirlhf import PPOConfig
from minirlhf.rl.kl import kl_estimate
from minirlhf.rl.losses import log_ratio, policy_loss, token_weights, value_loss


def test_policy_loss_equals_the_oracle():
    for mask, logp, old, advantages, _ in batches():
        for scale in (0.2, 1.0, 30.0):  # up to beyond the limit of the ratio
            new = old + scale * (logp - old)
            actual = policy_loss(log_ratio(*tensors(new, old, mask)), torch.tensor(advantages), 0.2)
            assert actual.shape == mask.shape
            close(actual, oracle.policy_loss(new, old, advantages, 0.2))


def test_policy_loss_worked_by_hand():
    # r = 2, 2, 1/2, 1/2, 1 with A = 1, -1, 1, -1, 3 and clip .2: -1.2, 2, -.5, .8, -3
    ratio = torch.tensor([[2.0, 2, 0.5, 0.5, 1]], dtype=DOUBLE).log()
    advantages = torch.tensor([[1.0, -1, 1, -1, 3]], dtype=DOUBLE)
    close(policy_loss(ratio, advantages, 0.2), [[-1.2, 2.0, -0.5, 0.8, -3.0]])


def test_policy_gradient_vanishes_only_where_the_clip_binds():
    ratio = torch.tensor([2.0, 2, 0.5, 0.5, 1], dtype=DOUBLE).log().requires_grad_()
    policy_loss(ratio, torch.tensor([1.0, -1, 1, -1, 3], dtype=DOUBLE), 0.2).sum().backward()
    # d(-A r)/d log r = -A r where unclipped
    close(ratio.grad, [0.0, 2.0, -0.5, 0.0, -3.0])


def test_extreme_log_ratios_stay_finite():
    logp = torch.tensor([[-1000.0, 0.0, -0.0]], requires_grad=True)
    ratio = log_ratio(logp, torch.tensor([[0.0, -1000.0, 0.0]]), torch.ones(1, 3, dtype=torch.bool))
    assert ratio.tolist() == [[-20.0, 20.0, 0.0]]
    loss = policy_loss(ratio, torch.tensor([[1.0, -1.0, 1.0]]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all()


def test_value_loss_equals_the_oracle():
    for _, values, old, returns, _ in batches():
        for clip in (0.2, 1.5):
            actual = value_loss(*tensors(values, old, returns), clip)
            close(actual, oracle.value_loss(values, old, returns, clip))


def test_value_loss_worked_by_hand():
    # V_old 0, clip .2. V 1, R 1: unclipped 0, clipped (.2-1)^2 = .64 -> .32. V 1, R 0: 1 against .04 -> .5.
    # V .1, R 1: inside the clip, .81 -> .405.
    values, returns = torch.tensor([1.0, 1.0, 0.1], dtype=DOUBLE), torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE)
    close(value_loss(values, torch.zeros(3, dtype=DOUBLE), returns, 0.2), [0.32, 0.5, 0.405])


def test_a_higher_upper_clip_worked_by_hand():
    # r = 1.25, 1.5, .7, 1.25 with A = 1, 1, -1, -1, clips .2 and .3: 1.25 is within, 1.5 becomes 1.3, .7 becomes .8.
    ratio = torch.tensor([[1.25, 1.5, 0.7, 1.25]], dtype=DOUBLE).log().requires_grad_()
    loss = policy_loss(ratio, torch.tensor([[1.0, 1, -1, -1]], dtype=DOUBLE), 0.2, 0.3)
    close(loss.detach(), [[-1.25, -1.3, 0.8, 1.25]])
    loss.sum().backward()
    close(ratio.grad, [[-1.25, 0.0, 0.0, 1.25]])


def test_the_ratio_of_a_sequence_worked_by_hand():
    # Log-ratios .3, -.1, .4 of three tokens: mean .2; of one token -.5: itself. Padding has no part in it.
    new = torch.tensor([[0.3, -0.1, 0.4], [-0.5, NAN, NAN]], dtype=DOUBLE)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    close(log_ratio(new, torch.zeros_like(new), mask, "sequence"), [[0.2] * 3, [-0.5, 0, 0]])


def test_the_gradient_of_the_sequence_ratio_is_that_of_the_paper():
    """Zheng et al. 2025, eq. 10: s_i A_i times the mean over the sequence of grad log pi, and the mean over rows."""
    for mask, logp, old, _, scores in batches():
        new = torch.tensor(old + 0.1 * (logp - old), requires_grad=True)
        mask_, old_ = torch.tensor(mask), torch.tensor(old)
        ratio = log_ratio(new, old_, mask_, "sequence")
        advantages = torch.where(mask_, torch.tensor(scores)[:, None], 0.0)
        weights = token_weights(mask_, PPOConfig(loss_averaging="sequences"), DOUBLE)
        (policy_loss(ratio, advantages, 0.9, 9.0) * weights).sum().backward()
        for b, length in enumerate(mask.sum(1)):
            s = np.exp(np.mean(0.1 * (logp - old)[b][mask[b]]))
            close(new.grad[b][mask_[b]], np.full(length, -s * scores[b] / length / len(mask)))
        assert not new.grad[~mask_].any()


@pytest.mark.parametrize(("averaging", "expected"), [
    ("gen_len", [[1 / 12] * 3, [1 / 12, 0, 0], [1 / 12, 1 / 12, 0]]),  # of three rows and gen_len 4
    ("tokens", [[1 / 6] * 3, [1 / 6, 0, 0], [1 / 6, 1 / 6, 0]]),
    ("sequences", [[1 / 9] * 3, [1 / 3, 0, 0], [1 / 6, 1 / 6, 0]]),
    ("micro_batches", [[1 / 8] * 3, [1 / 8, 0, 0], [1 / 4, 1 / 4, 0]]),  # of two rows and of one
])  # fmt: skip
def test_the_weights_of_tokens_worked_by_hand(averaging, expected):
    config = PPOConfig(loss_averaging=averaging, forward_batch_size=2, gen_len=4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    close(token_weights(mask, config, DOUBLE), expected)


# ---- what other libraries compute -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("averaging", "factor", "theirs"), [
    # verl's "token-mean", TRL's "bnpo" and "dapo", DAPO of rlhf-book
    ("tokens", 1, lambda rows, width: sum(map(sum, rows)) / sum(map(len, rows))),
    # verl's "seq-mean-token-mean", TRL's "grpo", all losses of rlhf-book but DAPO: its Dr. GRPO among them
    ("sequences", 1, lambda rows, width: sum(sum(row) / len(row) for row in rows) / len(rows)),
    # TRL's "dr_grpo"
    ("gen_len", 1, lambda rows, width: sum(map(sum, rows)) / (len(rows) * width)),
    # verl's "seq-mean-token-sum" has no constant divisor: gen_len times ours
    ("gen_len", "width", lambda rows, width: sum(map(sum, rows)) / len(rows)),
    # verl's first "seq-mean-token-sum-norm" divides by the longest response of the batch, not by the rows as well
    ("gen_len", "rows", lambda rows, width: sum(map(sum, rows)) / width),
])  # fmt: skip
def test_how_other_libraries_average(averaging, factor, theirs):
    for mask, terms, _, _, _ in batches():
        weights = token_weights(torch.tensor(mask), PPOConfig(loss_averaging=averaging, gen_len=mask.shape[1]), DOUBLE)
        rows = [row[real].tolist() for row, real in zip(terms, mask, strict=True)]
        times = {"width": mask.shape[1], "rows": len(rows)}.get(factor, factor)
        close(times * (torch.tensor(terms) * weights).sum(), theirs(rows, mask.shape[1]))


def of_rlhf_book(method, new, old, ref, advantage, low, high, beta):
    """One row's terms of rlhf-book's GRPOLoss, GSPOLoss and DAPOLoss, whose KL is k3; DAPO has none."""
    logs = [a - b for a, b in zip(new, old, strict=True)]
    if method == "gspo":
        logs = [sum(logs) / len(logs)] * len(logs)
    clipped = [min(max(math.exp(x), 1 - low), 1 + high) for x in logs]
    terms = [-min(math.exp(x) * advantage, y * advantage) for x, y in zip(logs, clipped, strict=True)]
    return [t + beta * (math.exp(r - x) - 1 - (r - x)) for t, x, r in zip(terms, new, ref, strict=True)]


@pytest.mark.parametrize(("method", "averaging", "beta"), [
    ("grpo", "sequences", 0.3), ("gspo", "sequences", 0.3), ("dapo", "tokens", 0.0),
])  # fmt: skip
def test_the_losses_of_rlhf_book(method, averaging, beta):
    """Theirs multiplies by the mask, so a NaN at padding would stay; what is there has no part in ours."""
    for mask, logp, ref, noise, scores in batches():
        new, old = logp, logp + 0.3 * noise
        rows = [of_rlhf_book(method, *(x[b][mask[b]] for x in (new, old, ref)), scores[b], 0.2, 0.28, beta)
                for b in range(len(mask))]  # fmt: skip
        expected = oracle.token_mean(rows) if averaging == "tokens" else oracle.mean([oracle.mean(r) for r in rows])
        real = torch.tensor(mask)
        new, old, ref = (spoil(torch.tensor(x), real) for x in (new, old, ref))
        rho = log_ratio(new, old, real, "sequence" if method == "gspo" else "token")
        terms = policy_loss(rho, torch.tensor(scores)[:, None], 0.2, 0.28) + beta * kl_estimate(new, ref, "k3")
        weights = token_weights(real, PPOConfig(loss_averaging=averaging), DOUBLE)
        close(torch.where(real, terms, 0.0).mul(weights).sum(), expected)


def test_rlhf_books_reinforce_and_rloo_weigh_a_token_by_the_length_of_its_response():
    """-A log p, the mean over the response: the gradient of ours at a ratio of 1 times gen_len / length."""
    for mask, logp, _, _, scores in batches():
        theirs, ours = (torch.tensor(logp, requires_grad=True) for _ in range(2))
        real, advantages = torch.tensor(mask), torch.tensor(scores)[:, None]
        for row, n, advantage in zip(theirs, mask.sum(1), scores, strict=True):
            (-advantage * row[:n].sum() / n / len(mask)).backward(retain_graph=True)
        weights = token_weights(real, PPOConfig(loss_averaging="gen_len", gen_len=mask.shape[1]), DOUBLE)
        (policy_loss(log_ratio(ours, torch.tensor(logp), real), advantages) * weights).sum().backward()
        close(theirs.grad, (ours.grad * mask.shape[1] / real.sum(1, keepdim=True)).numpy())
