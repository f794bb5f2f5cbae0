"""Sampling sets against brute force and transformers; frequencies against probabilities."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from minirlhf.generation.sampling import (
    SamplingConfig,
    _top_p_by_sort,
    draw,
    draw_uniforms,
    pack_set,
    restrict,
    sample,
    sample_top_p,
    top_k_set,
    top_p_set,
    truncate,
    unpack_set,
)

# Probabilities in 64ths: every sum of them is exact in floating point.
counts = st.lists(st.integers(0, 12), min_size=1, max_size=7).filter(lambda c: sum(c) > 0)


def uniforms(rows, seed):
    return draw_uniforms(1, rows, torch.device("cpu"), torch.Generator().manual_seed(seed))[0]


def dyadic(numbers):
    """Integers to probabilities in 64ths that sum to 1, the remainder going to the first entry."""
    scaled = [64 * n // sum(numbers) for n in numbers]
    scaled[0] += 64 - sum(scaled)
    return [Fraction(n, 64) for n in scaled]


def smallest_size(probs, p):
    """How few tokens can have a mass of p, tried over all subsets; at least one."""
    for size in range(1, len(probs) + 1):
        if any(sum(subset) >= p for subset in itertools.combinations(probs, size)):
            return size
    return len(probs)


@given(counts, st.integers(1, 64))
@settings(max_examples=150, deadline=None)
def test_top_p_set_is_the_smallest_set_whose_mass_reaches_p(numbers, p64):
    probs, p = dyadic(numbers), Fraction(p64, 64)
    kept = top_p_set(torch.tensor([[float(x) for x in probs]]), float(p))[0].tolist()
    inside = [x for x, k in zip(probs, kept, strict=True) if k]
    outside = [x for x, k in zip(probs, kept, strict=True) if not k]
    assert sum(inside) >= p
    assert len(inside) == smallest_size(probs, p)
    assert not outside or max(outside) <= min(inside)  # the most probable ones


def test_of_equally_probable_tokens_the_lower_ids_come_first():
    probs = torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.125, 0.375, 0.125, 0.375]])
    assert top_p_set(probs, 0.5).tolist() == [[True, True, False, False], [False, True, False, True]]
    assert top_p_set(probs, 0.875).tolist() == [[True, True, True, True], [True, True, False, True]]
    assert top_k_set(probs, 3).tolist() == [[True, True, True, False], [True, True, False, True]]


def test_p_one_keeps_every_token_that_has_mass():
    probs = torch.tensor([[0.25, 0.0, 0.5, 0.25], [0.25] * 4])
    assert top_p_set(probs, 1.0).tolist() == [[True, False, True, True], [True] * 4]


def test_top_k_set_keeps_the_k_highest():
    logits = torch.randn(20, 9, generator=torch.Generator().manual_seed(0))
    for k in (1, 4, 9, 50):
        expected = [[x in sorted(row, reverse=True)[:k] for x in row] for row in logits.tolist()]
        assert top_k_set(logits, k).tolist() == expected


def test_no_set_where_nothing_is_cut():
    assert truncate(torch.zeros(2, 3), SamplingConfig(temperature=0.5))[1] is None
    assert not SamplingConfig(temperature=0.5).truncates
    assert SamplingConfig(top_k=1).truncates and SamplingConfig(top_p=0.99).truncates


@pytest.mark.parametrize(
    "setting",
    [(0.7, 0, 0.9), (1.0, 5, 1.0), (1.5, 5, 0.8), (0.3, 12, 0.99), (2.0, 3, 0.5), (1.0, 1, 1.0), (1.0, 99, 0.01)],
)
def test_the_set_is_the_one_of_transformers(setting):
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    temperature, top_k, top_p = setting
    logits = 3 * torch.randn(50, 23, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    warpers = [TemperatureLogitsWarper(temperature)] if temperature != 1 else []
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    expected = logits
    for warper in warpers:
        expected = warper(None, expected)
    keep = truncate(logits, SamplingConfig(temperature, top_k, top_p))[1]
    assert torch.equal(keep, torch.isfinite(expected))
    torch.testing.assert_close(restrict(logits, temperature, keep), expected)


def test_temperature_top_k_and_top_p_in_their_order_by_hand():
    # p ~ 8 4 2 1 1; temperature 1/2 squares it: 64 16 4 1 1. top_k=2 leaves 64:16 = .8:.2, so top_p=.8 keeps one token
    # (top-p first, over the mass of all, .744, would keep two).
    logits = torch.tensor([[8.0, 4, 2, 1, 1]], dtype=torch.float64).log()
    assert truncate(logits, SamplingConfig(0.5, 2, 0.79))[1].tolist() == [[True, False, False, False, False]]
    assert truncate(logits, SamplingConfig(0.5, 0, 0.79))[1].tolist() == [[True, True, False, False, False]]
    # Without the temperature 8:4 = .667:.333.
    assert truncate(logits, SamplingConfig(1.0, 2, 0.79))[1].tolist() == [[True, True, False, False, False]]


@pytest.mark.parametrize("setting", [(1.0, 0, 1.0), (0.6, 0, 1.0), (0.8, 4, 1.0), (1.3, 6, 0.8)])
def test_sampled_tokens_follow_the_truncated_renormalised_distribution(setting):
    config = SamplingConfig(*setting)
    logits = 1.5 * torch.randn(1, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    # The oracle: temperature, the k highest, then the smallest mass of top_p, renormalised.
    p = np.exp(logits[0].numpy() / config.temperature)
    order = np.argsort(-p)
    kept = list(order[: config.top_k or len(p)])
    share = p[kept] / p[kept].sum()
    kept = [i for i, before in zip(kept, np.cumsum(share) - share, strict=True) if before < config.top_p]
    expected = np.zeros_like(p)
    expected[kept] = p[kept] / p[kept].sum()

    draws = 20000
    tokens, logp, keep = sample(logits.repeat(draws, 1), config, uniforms(draws, 3))
    frequencies = np.bincount(tokens.numpy(), minlength=len(p))
    assert frequencies[expected == 0].sum() == 0
    np.testing.assert_allclose(logp.numpy(), np.log(expected[tokens.numpy()]), atol=1e-9)
    assert keep is None if len(kept) == len(p) else keep[0].tolist() == (expected > 0).tolist()
    assert stats.chisquare(frequencies[kept], draws * expected[kept]).pvalue > 1e-4


def test_greedy_is_top_k_one():
    logits = torch.randn(30, 11, generator=torch.Generator().manual_seed(4))
    tokens, logp, _ = sample(logits, SamplingConfig(top_k=1), uniforms(30, 5))
    assert torch.equal(tokens, logits.argmax(-1))
    assert logp.abs().max() == 0.0


def test_sample_top_p_follows_the_nucleus():
    # p = .4 .3 .2 .1, nucleus of .65: the first two, 4/7 and 3/7
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).repeat(7000, 1)
    tokens = sample_top_p(probs, 0.65, torch.Generator().manual_seed(6))
    assert tokens.shape == (7000,) and tokens.dtype == torch.int64
    frequencies = np.bincount(tokens.numpy(), minlength=4)
    assert frequencies[0] == frequencies[2] == 0
    assert stats.chisquare(frequencies[[1, 3]], [4000, 3000]).pvalue > 1e-4


def test_sampling_changes_neither_its_arguments_nor_the_global_random_state():
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(8))
    probs, before, state = logits.softmax(-1), logits.clone(), torch.get_rng_state()
    for config in (SamplingConfig(), SamplingConfig(0.5, 3, 0.7)):
        sample(logits, config, uniforms(5, 0))
    sample_top_p(probs, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(logits, before) and torch.equal(probs, before.softmax(-1))
    assert torch.equal(torch.get_rng_state(), state)


def test_bf16_logits_are_sampled_in_fp32():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(9)).bfloat16()
    tokens, logp, _ = sample(logits, SamplingConfig(0.9), uniforms(4, 0))
    assert logp.dtype == torch.float32
    expected = (logits.float() / 0.9).log_softmax(-1)[torch.arange(4), tokens]
    torch.testing.assert_close(logp, expected)


@given(st.lists(st.lists(st.booleans(), min_size=11, max_size=11), min_size=1, max_size=4), st.integers(1, 11))
@settings(max_examples=60, deadline=None)
def test_packed_sets_unpack_to_themselves(rows, width):
    keep = torch.tensor(rows)[:, :width]
    packed = pack_set(keep)
    assert packed.dtype == torch.uint8 and packed.shape == (len(rows), -(-width // 8))
    assert torch.equal(unpack_set(packed, width), keep)
    assert torch.equal(unpack_set(pack_set(keep[:, None]), width), keep[:, None])  # (B, 1, V)


def test_bits_are_packed_lowest_first():
    keep = torch.tensor([[True, False, True, False, False, False, False, True, True, False]])
    assert pack_set(keep).tolist() == [[1 + 4 + 128, 1]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0), ("temperature", -1.0), ("temperature", float("inf")), ("temperature", float("nan")),
        ("top_k", -1), ("top_k", 2.5), ("top_p", 0.0), ("top_p", 1.1), ("top_p", -0.5), ("top_p", float("nan")),
    ],
)  # fmt: skip
def test_a_bad_config_is_refused_by_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"{field}.*{value}"):
        SamplingConfig(**{field: value})


@pytest.mark.parametrize("p", [0.0, -0.1, 1.5, float("nan")])
def test_sample_top_p_refuses_a_p_out_of_range(p):
    with pytest.raises(ValueError, match="p must be"):
        sample_top_p(torch.ones(1, 2) / 2, p)


@given(st.integers(0, 2**31), st.floats(0.1, 8.0), st.sampled_from([0.05, 0.5, 0.9, 0.95, 0.999]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_the_histogram_finds_the_set_that_a_sort_finds(seed, scale, p, ties):
    """Up to one token at the border, whose running sums are rounded in another order; ties go to the lower ids."""
    logits = scale * torch.randn(8, 500, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    exact = (logits.round() if ties else logits).softmax(-1)
    for probs in (exact, exact.float()):
        fast, plain = top_p_set(probs, p), _top_p_by_sort(probs, p)
        for row in (fast != plain).any(-1).nonzero().flatten().tolist():
            assert (fast[row] != plain[row]).sum() == 1
            smaller = min(probs[row][fast[row]].double().sum(), probs[row][plain[row]].double().sum())
            assert abs(smaller - p) < 1e-6  # which of the two reaches p is a matter of rounding


def test_beyond_the_cpu_top_p_sorts():
    """By shapes alone, on the meta device, which stands for a GPU here."""
    keep = top_p_set(torch.empty(2, 5, device="meta"), 0.9)
    assert (keep.shape, keep.dtype, keep.device.type) == ((2, 5), torch.bool, "meta")


@pytest.mark.parametrize("size", [4, 5, 50, 1000])
def test_drawn_indices_follow_the_weights(size):
    weights = torch.rand(1, size, generator=torch.Generator().manual_seed(0)).pow(3)
    weights[0, 1::4] = 0
    indices, total = draw(weights.expand(50000, -1), uniforms(50000, 1))
    expected = weights[0].double().numpy()
    np.testing.assert_allclose(total.numpy(), expected.sum(), rtol=1e-6)
    frequencies = np.bincount(indices.numpy(), minlength=size)
    assert frequencies[expected == 0].sum() == 0
    some = expected > 0
    assert stats.chisquare(frequencies[some], 50000 * expected[some] / expected.sum()).pvalue > 1e-4


def test_no_weight_of_zero_is_drawn_even_where_the_draw_is_rounded_up_to_the_end():
    weights = torch.tensor([[0.3, 0.7, 0.0, 0.1, 0.0], [0.0, 1e-30, 0.0, 0.0, 0.0]])
    for number, expected in ((1.0, [3, 1]), (0.0, [0, 1])):
        assert draw(weights, torch.full((2,), number, dtype=torch.float64))[0].tolist() == expected


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_no_distribution_are_refused(bad):
    for config in (SamplingConfig(), SamplingConfig(top_p=0.9), SamplingConfig(top_k=2)):
        with pytest.raises(FloatingPointError, match="logits of a row"):
            sample(torch.full((1, 6), bad), config, uniforms(1, 0))


def test_a_p_below_all_numbers_of_fp32_keeps_the_most_probable_token():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    tokens, logprobs, keep = sample(logits, SamplingConfig(top_p=1e-50), uniforms(3, 0))
    assert torch.equal(tokens, logits.argmax(-1)) and keep.sum() == 3 and logprobs.abs().max() == 0


def test_top_p_of_one_distribution_is_that_of_a_batch_of_one():
    probs = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    for seed in range(5):
        one, row = (sample_top_p(x, 0.8, torch.Generator().manual_seed(seed)) for x in (probs, probs[None]))
        assert one.shape == () and torch.equal(one, row[0])
