"""Against the plain formulas in fp64, and their gradients by autograd and by finite differences."""

import pytest
import torch

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


def test_gradients_by_finite_differences():
    logits, tokens, keep = make(rows=3, vocab=5)
    assert torch.autograd.gradcheck(lambda x: logprobs_and_entropy(x, tokens, 0.8, keep), logits)


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
    logprobs, entropy = logprobs_and_entropy(logits, tokens, 1.0, keep)
    assert logprobs[0] == -torch.inf and logprobs[1] == 0 and entropy[1] == 0
    (gradient,) = torch.autograd.grad(logprobs[1] + entropy[1], logits)
    assert gradient.abs().max() == 0


def test_the_logits_are_left_as_they_were():
    logits, tokens, keep = make()
    before = logits.detach().clone()
    for kept in (None, keep):
        sum(logprobs_and_entropy(logits, tokens, 1.0, kept)).sum().backward()
    assert torch.equal(logits.detach(), before)


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
