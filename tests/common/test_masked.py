"""Statistics over real tokens, and that what stands in the padding reaches no function of (B, R) tensors."""

import pytest
import torch
from ragged import DOUBLE, NAN, batches, close, spoil, tensors

import oracle
from minirlhf.common import masked
from minirlhf.common.masked import (
    explained_variance,
    last_token,
    masked_mean,
    masked_sum,
    masked_var,
    whiten,
    whitening_scale,
)
from minirlhf.generation.token_statistics import entropy, exact_kl, gather_logprobs
from minirlhf.rl.advantages import gae
from minirlhf.rl.kl import kl_estimate
from minirlhf.rl.losses import log_ratio, policy_loss, value_loss
from minirlhf.rl.shaping import token_rewards


@pytest.mark.parametrize(
    ("row", "last"),
    [([1, 1, 1], 2), ([1, 1, 0], 1), ([1, 0, 0], 0), ([0, 1, 0], 1), ([0, 0, 1], 2), ([1, 0, 1], 2), ([0, 0, 0], None)],
)
def test_last_token_is_the_last_unmasked_one(row, last):
    for dtype in (torch.bool, torch.int64, torch.float32):
        found = last_token(torch.tensor([row, [1, 1, 1]], dtype=dtype))
        assert found.dtype == torch.bool
        assert found.tolist() == [[t == last for t in range(3)], [False, False, True]]


def test_masked_statistics_equal_the_oracle():
    for mask, x, _, _, _ in batches():
        xs = oracle.entries(x, mask)
        dirty = spoil(*tensors(x, mask))
        for m in (torch.tensor(mask), torch.tensor(mask).long()):
            close(masked_sum(dirty, m), sum(xs))
            close(masked_mean(dirty, m), oracle.mean(xs))
            for ddof in (0, 1):
                close(masked_var(dirty, m, ddof), oracle.variance(xs, ddof))


def test_masked_mean_of_nothing_is_zero():
    assert masked_mean(torch.full((2, 3), NAN), torch.zeros(2, 3)).item() == 0.0


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_equals_the_oracle(shift_mean, ddof):
    for mask, x, _, _, _ in batches():
        actual = whiten(spoil(*tensors(x, mask)), torch.tensor(mask), shift_mean, ddof=ddof)
        close(actual, oracle.whiten(x, mask, shift_mean, ddof))


def test_whiten_is_over_the_whole_batch_with_the_unbiased_variance():
    # Entries 1 3 5 (padding 100): mean 3, variance (4+0+4)/2 = 4.
    x, mask = torch.tensor([[1.0, 3.0], [5.0, 100.0]], dtype=DOUBLE), torch.tensor([[1, 1], [1, 0]])
    close(whiten(x, mask, eps=0.0), [[-1.0, 0.0], [1.0, 0.0]])
    close(whiten(x, mask, shift_mean=False, eps=0.0), [[2.0, 3.0], [4.0, 0.0]])


def test_whiten_leaves_fewer_than_two_tokens_as_they_are():
    x = torch.tensor([[7.0, NAN], [NAN, NAN]])
    assert whiten(x, torch.tensor([[1, 0], [0, 0]])).tolist() == [[7.0, 0.0], [0.0, 0.0]]
    assert whiten(x, torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_whiten_of_equal_entries_is_finite_and_small():
    whitened = whiten(torch.full((3, 7), 0.1), torch.ones(3, 7))
    assert whitened.abs().max() < 1e-2


def test_explained_variance_equals_the_oracle():
    for mask, values, returns, _, _ in batches():
        dirty = [spoil(x, torch.tensor(mask)) for x in tensors(values, returns)]
        expected = oracle.explained_variance(values, returns, mask) if mask.sum() > 1 else 0.0
        close(explained_variance(*dirty, torch.tensor(mask)), expected)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 0.7, 123.456])
@pytest.mark.parametrize("count", [2, 3, 7, 48])
def test_explained_variance_is_zero_where_the_returns_do_not_vary(constant, count):
    values = torch.linspace(-1, 1, count)[None]
    assert explained_variance(values, torch.full((1, count), constant), torch.ones(1, count)).item() == 0.0


# ---- padding ---------------------------------------------------------------------------------------------------------


def functions_of_batches(x, y, z, mask, scores):
    """Every function of (B, R) tensors, reduced over the mask where it works token by token."""
    yield masked_sum(x, mask)
    yield masked_mean(x, mask)
    yield masked_var(x, mask)
    yield whiten(x, mask)
    yield whiten(x, mask, shift_mean=False)
    yield masked_sum(whitening_scale(x, mask, per_row=True), mask)
    yield token_rewards(scores, x, 0.1, mask)
    yield from gae(x, y, mask)
    yield explained_variance(x, y, mask)
    for kind in ("k1", "k2", "k3"):
        yield masked_sum(kl_estimate(x, y, kind), mask)
    yield masked_sum(policy_loss(log_ratio(x, y, mask), z), mask)
    yield masked_sum(value_loss(x, y, z), mask)


def test_what_stands_in_the_padding_changes_no_value():
    for mask, *arrays, scores in batches():
        *clean, mask, scores = tensors(*arrays, mask, scores)
        dirty = [spoil(x, mask) for x in clean]
        results = zip(
            functions_of_batches(*clean, mask, scores), functions_of_batches(*dirty, mask, scores), strict=True
        )
        for number, (a, b) in enumerate(results):
            assert torch.equal(a, b), f"function {number}"


def test_what_stands_in_the_padding_changes_no_gradient_of_a_loss():
    for mask, *arrays, _ in batches():
        *clean, mask = tensors(*arrays, mask)
        grads = []
        for x, y, z in (clean, [spoil(x, mask) for x in clean]):
            x = x.clone().requires_grad_()
            loss = policy_loss(log_ratio(x, y, mask), z) + value_loss(x, y, z)
            masked_sum(loss, mask).backward()
            grads.append(torch.where(mask, x.grad, 0.0))
        assert torch.equal(*grads)
        assert torch.isfinite(grads[1]).all()


def test_masked_statistics_have_clean_gradients():
    for name in ("masked_mean", "masked_var", "whiten"):
        x = torch.tensor([[1.0, 3.0, NAN], [6.0, NAN, torch.inf]], requires_grad=True)
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        getattr(masked, name)(x, mask).square().sum().backward()
        assert torch.isfinite(x.grad[mask.bool()]).all(), name


def test_no_function_changes_its_arguments():
    for mask, *arrays, scores in batches():
        arguments = tensors(*arrays, mask, scores)
        before = [x.clone() for x in arguments]
        list(functions_of_batches(*arguments))
        last_token(arguments[3])
        entropy(arguments[0])
        exact_kl(arguments[0], arguments[1])
        gather_logprobs(arguments[0], torch.zeros(len(scores), dtype=torch.int64))
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
