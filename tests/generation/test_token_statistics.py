"""Against the oracle, and in fewer passes against the plain formulas in fp64, their gradients by autograd too."""

import math

import numpy as np
import pytest
import torch
from ragged import DOUBLE, close, tensors

import oracle
from minirlhf.generation.sampling import restrict
from minirlhf.generation.token_statistics import LogprobsAndEntropy, compare, entropy, exact_kl, gather_logprobs

logprobs_and_entropy = LogprobsAndEntropy.apply


def make(dtype=torch.float64, rows=7, vocab=13, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    tokens = torch.randint(vocab, (rows,), generator=generator)
    keep = torch.rand(rows, vocab, generator=generator) < 0.6
    keep[torch.arange(rows), tokens] = True
    return logits.to(dtype).requires_grad_(), tokens, keep


def plain(logits, tokens, temperature, keep):
    x = restrict(logits, temperature, keep)
    return gather_logprobs(x, tokens), entropy(x)


def test_gather_logprobs_entropy_and_exact_kl_equal_the_oracle():
    rng = np.random.default_rng(1)
    for scale in (0.1, 3.0, 50.0):
        logits, ref = rng.normal(size=(2, 20, 9)) * scale
        tokens = rng.integers(0, 9, 20)
        picked = [oracle.log_softmax(row)[i] for row, i in zip(logits, tokens, strict=True)]
        close(gather_logprobs(*tensors(logits, tokens)), picked)
        close(entropy(torch.tensor(logits)), [oracle.entropy(row) for row in logits])
        kl = [oracle.exact_kl(p, q) for p, q in zip(logits, ref, strict=True)]
        close(exact_kl(*tensors(logits, ref)), kl, rtol=1e-9, atol=1e-12)


def test_tokens_of_probability_zero_add_nothing_to_entropy_and_kl():
    # p = (1/2, 1/2, 0), q = (1/4, 3/4, 0): H = ln 2, KL = (ln 2 + ln 2/3) / 2
    p = torch.tensor([0.5, 0.5, 0.0], dtype=DOUBLE).log().requires_grad_()
    q = torch.tensor([0.25, 0.75, 0.0], dtype=DOUBLE).log()
    close(entropy(p).detach(), math.log(2))
    close(exact_kl(p, q).detach(), 0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    (entropy(p) + exact_kl(p, q)).backward()
    assert torch.isfinite(p.grad).all()


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (0.7, -1.3), (1.0, None), (None, 1.0)])
def test_values_and_gradients_are_those_of_the_plain_formulas(truncated, temperature, weights):
    logits, tokens, keep = make()
    kept = keep if truncated else None
    results = []
    for function in (logprobs_and_entropy, plain):
        outputs = function(logits, tokens, temperature, kept)
        coefficients = torch.linspace(-1, 2, len(tokens), dtype=torch.float64)  # a different one for each row
        loss = sum(w * (coefficients * x).sum() for w, x in zip(weights, outputs, strict=True) if w is not None)
        results.append((*outputs, *torch.autograd.grad(loss, logits)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-6), (torch.float16, 2e-6)])
def test_low_precision_logits_are_computed_in_fp32(dtype, tolerance):
    logits, tokens, keep = make(dtype)
    exact = plain(logits.detach().double(), tokens, 0.7, keep)
    with torch.autocast("cpu", torch.float16):
        ours = logprobs_and_entropy(logits, tokens, 0.7, keep)
    for mine, truth in zip(ours, exact, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), truth, rtol=tolerance, atol=1e-5)
    (ours[0].sum() + ours[1].sum()).backward()
    assert logits.grad.dtype == dtype


def test_a_token_outside_the_set_has_no_probability_and_one_alone_has_all():
    logits, tokens, keep = make()
    keep[0, tokens[0]] = False
    keep[1] = torch.arange(13) == tokens[1]
    logprobs, entropies = logprobs_and_entropy(logits, tokens, 1.0, keep)
    assert logprobs[0] == -torch.inf and logprobs[1] == 0 and entropies[1] == 0
    (gradient,) = torch.autograd.grad(logprobs[1] + entropies[1], logits)
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_comparison_is_that_of_the_plain_formulas(truncated, temperature, dtype):
    logits, tokens, keep = make(dtype)
    ref_logits = make(dtype, seed=1)[0]
    kept = keep if truncated else None
    before = logits.detach().clone(), ref_logits.detach().clone()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        ours = compare(logits, ref_logits, tokens, temperature, kept)
    x, y = (restrict(z.detach().double(), temperature, kept) for z in (logits, ref_logits))
    theirs = gather_logprobs(x, tokens), entropy(x), gather_logprobs(y, tokens), exact_kl(x, y)
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    for mine, truth in zip(ours, theirs, strict=True):
        assert not mine.requires_grad
        torch.testing.assert_close(mine.double(), truth, rtol=tolerance, atol=tolerance)
    assert torch.equal(logits, before[0]) and torch.equal(ref_logits, before[1])


def test_a_model_compared_with_itself_has_no_kl_and_a_token_outside_the_set_no_probability():
    logits, tokens, keep = make(torch.float32)
    keep[0, tokens[0]] = False
    logprobs, _, ref_logprobs, kl = compare(logits, logits, tokens, 0.7, keep)
    assert kl.tolist() == [0.0] * 7 and torch.equal(logprobs, ref_logprobs) and logprobs[0] == -torch.inf


@pytest.mark.parametrize("shift", [0.0, 100.0, -100.0])
@pytest.mark.parametrize("truncated", [False, True])
def test_large_logits_cost_no_digits(shift, truncated):
    """A vocabulary of full size in fp32, against fp64: a sum of p x with x around 100 would lose 3e-4 nats."""
    generator = torch.Generator().manual_seed(0)
    logits = shift + 3 * torch.randn(20, 21128, generator=generator)
    tokens = logits.argmax(-1)
    keep = logits > logits.mean() if truncated else None
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    found, expected = logprobs_and_entropy(ours, tokens, 1.0, keep), plain(exact, tokens, 1.0, keep)
    for mine, truth in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=0, atol=5e-6)
    for outputs in (found, expected):
        (outputs[0].sum() + outputs[1].sum()).backward()
    torch.testing.assert_close(ours.grad.double(), exact.grad, rtol=0, atol=2e-6)
    assert torch.equal(ours.detach(), logits)  # the caller's logits stay
