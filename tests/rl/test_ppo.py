"""minirlhf.rl.ppo against the oracle, against cases worked by hand, and against what may stand in the padding."""

import inspect
import itertools
import math

import numpy as np
import pytest
import torch

import oracle
from minirlhf import AdaptiveKL, FixedKL
from minirlhf.rl import ppo

DOUBLE = torch.float64
EXACT = dict(rtol=1e-10, atol=1e-12)
NAN = float("nan")


def batches():
    """Ragged float64 batches: lengths 1 to 40, one row, equal rows, one token in all."""
    rng = np.random.default_rng(0)
    shapes = [(1, 1), (1, 40), (2, 1), (4, 2), (8, 17), (5, 40), (3, 3)]
    for rows, width in shapes:
        lengths = rng.integers(1, width + 1, rows)
        lengths[0] = width
        if rows > 2:
            lengths[1] = 1  # an end of text at the first position
        mask = np.arange(width)[None] < lengths[:, None]
        a, b, c = (rng.normal(size=(rows, width)) * 2 for _ in range(3))
        if rows == 3:  # all rows equal
            a, b, c, mask = (np.repeat(x[:1], rows, 0) for x in (a, b, c, mask))
        yield mask, a, b, c, rng.normal(size=rows)


def tensors(*arrays):
    return [torch.tensor(a) for a in arrays]


def spoil(x, mask):
    """NaN, and infinities, at the padding."""
    junk = torch.full_like(x, NAN)
    junk[..., ::2] = torch.inf
    return torch.where(mask.bool(), x, junk)


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(np.asarray(expected)), **(tolerance or EXACT))


def test_token_rewards_equal_the_oracle():
    for mask, kl, _, _, scores in batches():
        actual = ppo.token_rewards(*tensors(scores, kl), 0.3, torch.tensor(mask))
        close(actual, oracle.token_rewards(scores, kl, 0.3, mask))


def test_token_rewards_with_shares_of_single_tokens_equal_the_oracle():
    for mask, kl, shares, _, scores in batches():
        arguments = (*tensors(scores, kl), 0.3, torch.tensor(mask), "last_token", spoil(*tensors(shares, mask)))
        close(ppo.token_rewards(*arguments), oracle.token_rewards(scores, kl, 0.3, mask, shares))


def test_shares_and_the_rest_at_the_last_token_worked_by_hand():
    mask, shares = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1.0, -2.0, 4.0], [0.5, 9.0, 9.0]])
    scores, kl = torch.tensor([10.0, 0.5]), torch.zeros(2, 3)
    assert ppo.token_rewards(scores, kl, 1.0, mask, token_scores=shares).tolist() == [[1, -2, 4 + 7], [0.5, 0, 0]]
    last_column = ppo.token_rewards(scores, kl, 1.0, mask, "last_column", shares)
    assert last_column.tolist() == [[1, -2, 4 + 7], [0.5, 0, 0]]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0), (0.0, 0.95)])
def test_gae_equals_the_oracle(gamma, lam):
    for mask, rewards, values, _, _ in batches():
        advantages, returns = ppo.gae(*tensors(rewards, values, mask), gamma, lam)
        expected = oracle.gae(rewards, values, mask, gamma, lam)
        close(advantages, expected[0])
        close(returns, expected[1])


def test_gae_worked_by_hand():
    # gamma 1, lambda 1/2; row 0: rewards 0 0 1, values 1 2 4; row 1: reward 3, value 1, then padding.
    # delta = 0+2-1=1, 0+4-2=2, 1+0-4=-3;  A_2=-3, A_1=2-1.5=.5, A_0=1+.25=1.25;  returns = A + V
    rewards = torch.tensor([[0.0, 0, 1], [3, NAN, NAN]])
    values = torch.tensor([[1.0, 2, 4], [1, NAN, NAN]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    advantages, returns = ppo.gae(rewards, values, mask, 1.0, 0.5)
    assert advantages.tolist() == [[1.25, 0.5, -3.0], [2.0, 0.0, 0.0]]
    assert returns.tolist() == [[2.25, 2.5, 1.0], [3.0, 0.0, 0.0]]


def test_gae_with_lambda_one_is_the_reward_to_go():
    for mask, rewards, values, _, _ in batches():
        _, returns = ppo.gae(*tensors(rewards, values, mask), 1.0, 1.0)
        to_go = np.where(mask, rewards, 0.0)[:, ::-1].cumsum(1)[:, ::-1]
        close(returns, np.where(mask, to_go, 0.0))


def test_token_rewards_worked_by_hand():
    # -0.5 * KL at each token, the score at the last real one: 10 at column 1 of row 0, 20 at column 2 of row 1.
    kl = torch.tensor([[1.0, 2, NAN], [0, -4, 6]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = ppo.token_rewards(torch.tensor([10.0, 20.0]), kl, 0.5, mask)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [0.0, 2.0, 17.0]]


def test_the_score_counts_once_in_every_row():
    for mask, kl, _, _, scores in batches():
        rewards = ppo.token_rewards(torch.tensor(scores), torch.tensor(kl), 0.0, torch.tensor(mask))
        close(rewards.sum(-1), scores)
        assert (rewards != 0).sum(-1).tolist() == [1] * len(scores)


def test_token_rewards_of_a_row_without_tokens_are_zero():
    rewards = ppo.token_rewards(torch.tensor([5.0, 7.0]), torch.ones(2, 2), 1.0, torch.tensor([[0, 0], [1, 0]]))
    assert rewards.tolist() == [[0.0, 0.0], [6.0, 0.0]]


def test_a_score_at_the_last_column_is_lost_for_shorter_rows():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = ppo.token_rewards(torch.tensor([5.0, 7.0]), torch.ones(2, 3), 1.0, mask, score_position="last_column")
    assert rewards.tolist() == [[-1.0, -1.0, 0.0], [-1.0, -1.0, 6.0]]


def test_penalties_change_the_rows_they_are_for():
    scores, where = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([True, False, True])
    assert ppo.penalise(scores, where, "keep", -1.0).tolist() == [1.0, 2.0, 3.0]
    assert ppo.penalise(scores, where, "replace", -1.0).tolist() == [-1.0, 2.0, -1.0]
    assert ppo.penalise(scores, where, "subtract", 0.5).tolist() == [0.5, 2.0, 2.5]
    assert scores.tolist() == [1.0, 2.0, 3.0]
    with pytest.raises(ValueError, match="drop"):
        ppo.penalise(scores, where, "drop", 0.0)


def test_running_moments_are_those_of_all_scores_so_far():
    rng = np.random.default_rng(4)
    moments, seen = ppo.RunningMoments(), []
    for n in (1, 1, 5, 3, 16):
        part = rng.normal(3.0, 2.0, n)
        seen += part.tolist()
        moments.update(torch.tensor(part))
        std = math.sqrt(oracle.variance(seen)) if len(seen) > 1 else 1.0
        close(moments.whiten(torch.tensor(part)), (part - oracle.mean(seen)) / std)


def test_running_moments_of_equal_scores_only_centre():
    moments = ppo.RunningMoments()
    moments.update(torch.full((4,), 2.5))
    assert moments.whiten(torch.tensor([2.5, 3.5])).tolist() == [0.0, 1.0]


@pytest.mark.parametrize(
    ("row", "last"),
    [([1, 1, 1], 2), ([1, 1, 0], 1), ([1, 0, 0], 0), ([0, 1, 0], 1), ([0, 0, 1], 2), ([1, 0, 1], 2), ([0, 0, 0], None)],
)
def test_last_token_is_the_last_unmasked_one(row, last):
    for dtype in (torch.bool, torch.int64, torch.float32):
        found = ppo.last_token(torch.tensor([row, [1, 1, 1]], dtype=dtype))
        assert found.dtype == torch.bool
        assert found.tolist() == [[t == last for t in range(3)], [False, False, True]]


def test_masked_statistics_equal_the_oracle():
    for mask, x, _, _, _ in batches():
        xs = oracle.entries(x, mask)
        dirty = spoil(*tensors(x, mask))
        for m in (torch.tensor(mask), torch.tensor(mask).long()):
            close(ppo.masked_sum(dirty, m), sum(xs))
            close(ppo.masked_mean(dirty, m), oracle.mean(xs))
            for ddof in (0, 1):
                close(ppo.masked_var(dirty, m, ddof), oracle.variance(xs, ddof))


def test_masked_mean_of_nothing_is_zero():
    assert ppo.masked_mean(torch.full((2, 3), NAN), torch.zeros(2, 3)).item() == 0.0


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
def test_whiten_equals_the_oracle(shift_mean, ddof):
    for mask, x, _, _, _ in batches():
        actual = ppo.whiten(spoil(*tensors(x, mask)), torch.tensor(mask), shift_mean, ddof=ddof)
        close(actual, oracle.whiten(x, mask, shift_mean, ddof))


def test_whiten_is_over_the_whole_batch_with_the_unbiased_variance():
    # Entries 1 3 5 (padding 100): mean 3, variance (4+0+4)/2 = 4.
    x, mask = torch.tensor([[1.0, 3.0], [5.0, 100.0]], dtype=DOUBLE), torch.tensor([[1, 1], [1, 0]])
    close(ppo.whiten(x, mask, eps=0.0), [[-1.0, 0.0], [1.0, 0.0]])
    close(ppo.whiten(x, mask, shift_mean=False, eps=0.0), [[2.0, 3.0], [4.0, 0.0]])


def test_whiten_without_the_shift_keeps_the_mean():
    for mask, x, _, _, _ in batches():
        actual = ppo.whiten(torch.tensor(x), torch.tensor(mask), shift_mean=False)
        close(ppo.masked_mean(actual, torch.tensor(mask)), oracle.mean(oracle.entries(x, mask)))


def test_whiten_leaves_fewer_than_two_tokens_as_they_are():
    x = torch.tensor([[7.0, NAN], [NAN, NAN]])
    assert ppo.whiten(x, torch.tensor([[1, 0], [0, 0]])).tolist() == [[7.0, 0.0], [0.0, 0.0]]
    assert ppo.whiten(x, torch.zeros(2, 2)).tolist() == [[0.0, 0.0], [0.0, 0.0]]


def test_whiten_of_equal_entries_is_finite_and_small():
    whitened = ppo.whiten(torch.full((3, 7), 0.1), torch.ones(3, 7))
    assert whitened.abs().max() < 1e-2


def test_gather_logprobs_entropy_and_exact_kl_equal_the_oracle():
    rng = np.random.default_rng(1)
    for scale in (0.1, 3.0, 50.0):
        logits, ref = rng.normal(size=(2, 20, 9)) * scale
        tokens = rng.integers(0, 9, 20)
        picked = [oracle.log_softmax(row)[i] for row, i in zip(logits, tokens, strict=True)]
        close(ppo.gather_logprobs(*tensors(logits, tokens)), picked)
        close(ppo.entropy(torch.tensor(logits)), [oracle.entropy(row) for row in logits])
        kl = [oracle.exact_kl(p, q) for p, q in zip(logits, ref, strict=True)]
        close(ppo.exact_kl(*tensors(logits, ref)), kl, rtol=1e-9, atol=1e-12)


def test_tokens_of_probability_zero_add_nothing_to_entropy_and_kl():
    # p = (1/2, 1/2, 0), q = (1/4, 3/4, 0): H = ln 2, KL = (ln 2 + ln 2/3) / 2
    p = torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE).log().requires_grad_()
    q = torch.tensor([0.25, 0.75, 0.0], dtype=DOUBLE).log()
    close(ppo.entropy(p).detach(), math.log(2))
    close(ppo.exact_kl(p, q).detach(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    (ppo.entropy(p) + ppo.exact_kl(p, q)).backward()
    assert torch.isfinite(p.grad).all()


def test_entropy_of_the_uniform_distribution():
    close(ppo.entropy(torch.zeros(2, 8, dtype=DOUBLE)), [math.log(8)] * 2)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_estimators_equal_the_oracle(kind):
    for mask, logp, ref, _, _ in batches():
        expected = np.vectorize(getattr(oracle, kind))(logp, ref)
        actual = ppo.kl_estimate(*tensors(logp, ref), kind)
        assert actual.shape == mask.shape
        close(actual, expected)


def test_expected_estimators_over_a_vocabulary():
    """E_p[k1] = E_p[k3] = KL(p || q); E_p[k2] = E_p[(log p/q)^2] / 2, its own definition."""
    rng = np.random.default_rng(2)
    for size in (2, 5, 11):
        p, q = rng.dirichlet(np.ones(size)), rng.dirichlet(np.ones(size))
        kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        half_square = sum(a * math.log(a / b) ** 2 / 2 for a, b in zip(p, q, strict=True))
        for kind, expected in (("k1", kl), ("k2", half_square), ("k3", kl)):
            terms = ppo.kl_estimate(torch.tensor(np.log(p)), torch.tensor(np.log(q)), kind)
            close((torch.tensor(p) * terms).sum(), expected, rtol=1e-9, atol=1e-12)
        close(ppo.exact_kl(torch.tensor(np.log(p)), torch.tensor(np.log(q))), kl)


def test_k3_is_never_negative_and_exact_near_zero():
    ratios = torch.tensor([-20.0, -1.0, -1e-4, 0.0, 1e-4, 1.0, 20.0])
    k3 = ppo.kl_estimate(ratios, torch.zeros(7), "k3")
    assert (k3 >= 0).all()
    close(k3[2:5], torch.tensor([5e-9, 0.0, 5e-9]), rtol=0.05, atol=0)  # x^2/2 + O(x^3), fp32


def test_an_unknown_estimator_is_refused_by_name():
    with pytest.raises(ValueError, match="k4"):
        ppo.kl_estimate(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_policy_loss_equals_the_oracle():
    for mask, logp, old, advantages, _ in batches():
        for limit, scale in ((20.0, 0.2), (20.0, 1.0), (0.5, 1.0)):
            new = old + scale * (logp - old)
            log_ratio = ppo.log_ratio(*tensors(new, old), limit)
            actual = ppo.policy_loss(log_ratio, torch.tensor(advantages), 0.2)
            assert actual.shape == mask.shape
            close(actual, oracle.policy_loss(new, old, advantages, 0.2, limit))


def test_policy_loss_worked_by_hand():
    # r = 2, 2, 1/2, 1/2, 1 with A = 1, -1, 1, -1, 3 and clip .2: -1.2, 2, -.5, .8, -3
    log_ratio = torch.tensor([[2.0, 2, 0.5, 0.5, 1]], dtype=DOUBLE).log()
    advantages = torch.tensor([[1.0, -1, 1, -1, 3]], dtype=DOUBLE)
    close(ppo.policy_loss(log_ratio, advantages, 0.2), [[-1.2, 2.0, -0.5, 0.8, -3.0]])


def test_dual_clip_bounds_the_loss_of_negative_advantages_only():
    # c = 3. r = 5, 5, 2 with A = -1, 1, -1: min(5, 3), -1.2, 2
    log_ratio = torch.tensor([5.0, 5, 2], dtype=DOUBLE).log()
    advantages = torch.tensor([-1.0, 1, -1], dtype=DOUBLE)
    close(ppo.policy_loss(log_ratio, advantages, 0.2, dual_clip=3.0), [3.0, -1.2, 2.0])
    for _, logp, old, advantages, _ in batches():
        actual = ppo.policy_loss(ppo.log_ratio(*tensors(logp, old)), torch.tensor(advantages), 0.2, dual_clip=1.5)
        close(actual, oracle.policy_loss(logp, old, advantages, 0.2, dual_clip=1.5))


def test_policy_gradient_vanishes_only_where_the_clip_binds():
    log_ratio = torch.tensor([2.0, 2, 0.5, 0.5, 1], dtype=DOUBLE).log().requires_grad_()
    ppo.policy_loss(log_ratio, torch.tensor([1.0, -1, 1, -1, 3], dtype=DOUBLE), 0.2).sum().backward()
    # d(-A r)/d log r = -A r where unclipped
    close(log_ratio.grad, [0.0, 2.0, -0.5, 0.0, -3.0])


def test_extreme_log_ratios_stay_finite():
    logp = torch.tensor([[-1000.0, 0.0, -0.0]], requires_grad=True)
    log_ratio = ppo.log_ratio(logp, torch.tensor([[0.0, -1000.0, 0.0]]))
    assert log_ratio.tolist() == [[-20.0, 20.0, 0.0]]
    loss = ppo.policy_loss(log_ratio, torch.tensor([[1.0, -1.0, 1.0]]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all()


def test_value_loss_equals_the_oracle():
    for _, values, old, returns, _ in batches():
        for clip in (0.2, 1.5):
            actual = ppo.value_loss(*tensors(values, old, returns), clip)
            close(actual, oracle.value_loss(values, old, returns, clip))


def test_value_loss_worked_by_hand():
    # V_old 0, clip .2. V 1, R 1: unclipped 0, clipped (.2-1)^2 = .64 -> .32. V 1, R 0: 1 against .04 -> .5.
    # V .1, R 1: inside the clip, .81 -> .405.
    values, returns = torch.tensor([1.0, 1.0, 0.1], dtype=DOUBLE), torch.tensor([1.0, 0.0, 1.0], dtype=DOUBLE)
    close(ppo.value_loss(values, torch.zeros(3, dtype=DOUBLE), returns, 0.2), [0.32, 0.5, 0.405])


def test_explained_variance_equals_the_oracle():
    for mask, values, returns, _, _ in batches():
        dirty = [spoil(x, torch.tensor(mask)) for x in tensors(values, returns)]
        expected = oracle.explained_variance(values, returns, mask) if mask.sum() > 1 else 0.0
        close(ppo.explained_variance(*dirty, torch.tensor(mask)), expected)


def test_explained_variance_of_perfect_values_is_one():
    returns = torch.tensor([[1.0, 2.0, 4.0]])
    assert ppo.explained_variance(returns, returns, torch.ones(1, 3)).item() == 1.0


@pytest.mark.parametrize("constant", [0.0, 0.1, 1 / 3, 0.7, 123.456])
@pytest.mark.parametrize("count", [2, 3, 7, 48])
def test_explained_variance_is_zero_where_the_returns_do_not_vary(constant, count):
    values = torch.linspace(-1, 1, count)[None]
    assert ppo.explained_variance(values, torch.full((1, count), constant), torch.ones(1, count)).item() == 0.0


def functions_of_batches(x, y, z, mask, scores):
    """Every function of (B, R) tensors, reduced over the mask where it works token by token."""
    yield ppo.masked_sum(x, mask)
    yield ppo.masked_mean(x, mask)
    yield ppo.masked_var(x, mask)
    yield ppo.whiten(x, mask)
    yield ppo.whiten(x, mask, shift_mean=False)
    yield ppo.token_rewards(scores, x, 0.1, mask)
    yield from ppo.gae(x, y, mask)
    yield ppo.explained_variance(x, y, mask)
    for kind in ("k1", "k2", "k3"):
        yield ppo.masked_sum(ppo.kl_estimate(x, y, kind), mask)
    yield ppo.masked_sum(ppo.policy_loss(ppo.log_ratio(x, y), z), mask)
    yield ppo.masked_sum(ppo.value_loss(x, y, z), mask)


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
            loss = ppo.policy_loss(ppo.log_ratio(x, y), z) + ppo.value_loss(x, y, z)
            ppo.masked_sum(loss, mask).backward()
            grads.append(torch.where(mask, x.grad, 0.0))
        assert torch.equal(*grads)
        assert torch.isfinite(grads[1]).all()


def test_masked_statistics_have_clean_gradients():
    for name in ("masked_mean", "masked_var", "whiten"):
        x = torch.tensor([[1.0, 3.0, NAN], [6.0, NAN, torch.inf]], requires_grad=True)
        mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
        getattr(ppo, name)(x, mask).square().sum().backward()
        assert torch.isfinite(x.grad[mask.bool()]).all(), name


def test_no_function_changes_its_arguments():
    for mask, *arrays, scores in batches():
        arguments = tensors(*arrays, mask, scores)
        before = [x.clone() for x in arguments]
        list(functions_of_batches(*arguments))
        ppo.last_token(arguments[3])
        ppo.entropy(arguments[0])
        ppo.exact_kl(arguments[0], arguments[1])
        ppo.gather_logprobs(arguments[0], torch.zeros(len(scores), dtype=torch.int64))
        assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


def test_the_losses_of_micro_batches_add_up_to_the_token_mean():
    for mask, new, old, advantages, _ in batches():
        loss = ppo.policy_loss(ppo.log_ratio(*tensors(new, old)), torch.tensor(advantages))
        m = torch.tensor(mask)
        parts = [ppo.masked_sum(loss[i : i + 1], m[i : i + 1]) for i in range(len(m))]
        real = [[a[b][mask[b]] for a in (new, old, advantages)] for b in range(len(mask))]
        rows = [[float(oracle.policy_loss(*x, 0.2)) for x in zip(*row, strict=True)] for row in real]
        close(sum(parts) / m.sum(), oracle.token_mean(rows))


# ---- controllers ----------------------------------------------------------------------------------------------------


def test_adaptive_kl_equals_the_oracle_over_a_run():
    rng = np.random.default_rng(3)
    controller, coef = AdaptiveKL(0.2, target=6.0, horizon=100.0), 0.2
    for kl, n in zip(rng.uniform(-3, 15, 50), itertools.cycle((1, 7, 16)), strict=False):
        controller.update(float(kl), n)
        coef = oracle.adaptive_kl(coef, kl, n, 6.0, 100.0)
        assert controller.coef == pytest.approx(coef, rel=1e-12)


def test_adaptive_kl_worked_by_hand():
    # KL 6.6 against 6: error .1; times 1 + .1 * 20 / 100 = 1.02
    controller = AdaptiveKL(1.0, 6.0, 100.0)
    controller.update(6.6, 20)
    assert controller.coef == pytest.approx(1.02)


@pytest.mark.parametrize(("kl", "factor"), [(1e9, 1.02), (-1e9, 0.98), (0.0, 0.98), (12.0, 1.02), (6.0, 1.0)])
def test_adaptive_kl_error_is_clipped(kl, factor):
    controller = AdaptiveKL(1.0, 6.0, 100.0)
    controller.update(kl, 10)
    assert controller.coef == pytest.approx(factor)


def test_adaptive_kl_survives_a_kl_that_is_not_finite():
    for kl in (NAN, math.inf, -math.inf):
        controller = AdaptiveKL(0.2, 6.0, 100.0)
        controller.update(kl, 10)
        assert math.isfinite(controller.coef)


def test_adaptive_kl_never_pays_for_kl():
    """A batch far larger than the horizon must not turn the penalty into a reward."""
    controller = AdaptiveKL(0.2, target=6.0, horizon=10.0)
    controller.update(0.0, 128)
    assert controller.coef >= 0


def test_fixed_kl_stays():
    controller = FixedKL(0.3)
    controller.update(1e6, 100)
    assert controller.coef == 0.3
    assert FixedKL(0).coef == 0.0


@pytest.mark.parametrize(("init", "target", "horizon"), [(-0.1, 6, 100), (NAN, 6, 100), (0.2, 0, 100), (0.2, 6, 0)])
def test_bad_controllers_are_refused(init, target, horizon):
    with pytest.raises(ValueError):
        AdaptiveKL(init, target, horizon)


@pytest.mark.parametrize("coef", [-1.0, NAN])
def test_a_bad_fixed_coefficient_is_refused(coef):
    with pytest.raises(ValueError, match="coef"):
        FixedKL(coef)


def test_every_public_function_is_tested_here():
    """A new function of minirlhf.ppo needs a test in this file."""
    own = [name for name, f in inspect.getmembers(ppo, inspect.isfunction) if f.__module__ == ppo.__name__]
    with open(__file__, encoding="utf-8") as file:
        text = file.read()
    assert [name for name in own if not name.startswith("_") and f"ppo.{name}(" not in text] == []
