"""Log-probabilities of response tokens against a naive implementation over all logits."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import make_gpt2
from minirlhf import ActorCritic, Decoder, ValueHead
from minirlhf.rl import logprobs
from minirlhf.rl.logprobs import response_logprobs

V = 45  # not a multiple of 8: the last byte of a packed set is partly used
SIZES = dict(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2)
PROMPTS, RESPONSES = [4, 1, 2, 5], [3, 6, 1, 2]  # ragged on both sides, with one-token prompts and responses
R = max(RESPONSES)


def make_actor_critic(seed: int = 0, kind: str = "linear", make: Callable = make_gpt2) -> ActorCritic:
    head = ValueHead(SIZES["n_embd"], kind)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return ActorCritic(make(seed=seed, scale=12.0, **SIZES), head).double().eval()


def make_reference(make: Callable = make_gpt2) -> Decoder:
    return make(seed=7, scale=12.0, **SIZES).double().eval()


def ragged_rollout(prompts=PROMPTS, responses=RESPONSES) -> tuple[Tensor, Tensor]:
    """Tokens and mask as `generate` makes them: prompts padded on the left, responses on the right."""
    generator = torch.Generator().manual_seed(1)
    P, T = max(prompts), max(prompts) + max(responses)
    tokens, mask = torch.full((len(prompts), T), 9), torch.zeros(len(prompts), T, dtype=torch.int64)
    for i, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        tokens[i, P - p : P + r] = torch.randint(0, V, (p + r,), generator=generator)
        mask[i, P - p : P + r] = 1
    return tokens, mask


def random_sets(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Random sampling sets (B, R, V) that hold the sampled tokens, and the same in bits, lowest first."""
    keep = torch.rand(len(tokens), R, V, generator=torch.Generator().manual_seed(2)) < 0.4
    keep.scatter_(-1, tokens[:, -R:, None], True)
    return keep, torch.from_numpy(np.packbits(keep.numpy(), axis=-1, bitorder="little"))


def naive_score(model: ActorCritic, tokens, mask, temperature=1.0, keep=None, reference=None) -> dict[str, Tensor]:
    """One row at a time without padding, over all logits: column t is scored by the state at t - 1."""
    names = ["logprobs", "entropy", "values"] + (["ref_logprobs", "exact_kl"] if reference is not None else [])
    columns = {name: [] for name in names}
    for i, row in enumerate(mask.bool()):
        ids = tokens[i, row][None]
        r = int(row[-R:].sum())
        logits, values = model(ids)
        allowed = torch.ones(r, V, dtype=torch.bool) if keep is None else keep[i, :r]

        def logprobs_of(logits, allowed=allowed, r=r):
            return (logits[0, -r - 1 : -1] / temperature).masked_fill(~allowed, -torch.inf).log_softmax(-1)

        logp = logprobs_of(logits)
        picked = ids[0, -r:, None]
        found = {"logprobs": logp.gather(-1, picked)[:, 0], "values": values[0, -r - 1 : -1]}
        found["entropy"] = -(logp.exp() * logp.masked_fill(~allowed, 0)).sum(-1)
        if reference is not None:
            ref = logprobs_of(reference(ids)).detach()
            found["ref_logprobs"] = ref.gather(-1, picked)[:, 0]
            terms = logp.exp() * (logp.masked_fill(~allowed, 0) - ref.masked_fill(~allowed, 0))
            found["exact_kl"] = terms.sum(-1)
        for name, x in found.items():
            columns[name].append(torch.nn.functional.pad(x, (0, R - r)))
    return {name: torch.stack(rows) for name, rows in columns.items()}


@pytest.mark.parametrize("with_sets", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@torch.no_grad()
def test_score_equals_the_naive_implementation(make_decoder, temperature, with_sets):
    model, reference = make_actor_critic(make=make_decoder), make_reference(make_decoder)
    tokens, mask = ragged_rollout()
    keep, packed = random_sets(tokens) if with_sets else (None, None)
    scores = response_logprobs(model, tokens, mask, R, temperature, packed, reference)
    expected = naive_score(model, tokens, mask, temperature, keep, reference)
    assert len(expected) == 5
    for name, x in expected.items():
        torch.testing.assert_close(getattr(scores, name), x, rtol=1e-9, atol=1e-9)
        assert x[mask[:, -R:].bool()].std() > 1e-3
    assert (expected["exact_kl"][mask[:, -R:].bool()] > -1e-12).all()


@torch.no_grad()
def test_score_without_a_mask_is_that_of_full_rows():
    model = make_actor_critic()
    tokens, mask = ragged_rollout([3, 3], [R, R])
    expected = naive_score(model, tokens, mask)
    scores = response_logprobs(model, tokens, None, R)
    for name, x in expected.items():
        torch.testing.assert_close(getattr(scores, name), x, rtol=1e-9, atol=1e-9)
    assert scores.ref_logprobs is None and scores.exact_kl is None


def weighted(scores, mask: Tensor) -> Tensor:
    """A loss in which every token of every result has a weight of its own."""
    generator = torch.Generator().manual_seed(3)
    get = scores.get if isinstance(scores, dict) else lambda name: getattr(scores, name)
    return sum(
        (torch.where(mask[:, -R:].bool(), get(name), 0.0) * torch.randn(len(mask), R, generator=generator)).sum()
        for name in ("logprobs", "entropy", "values", "exact_kl")
    )


@pytest.mark.parametrize("rows_per_chunk", [None, 1, 5])
def test_score_gradient_equals_the_naive_one(monkeypatch, rows_per_chunk):
    model, reference = make_actor_critic(), make_reference()
    tokens, mask = ragged_rollout()
    keep, packed = random_sets(tokens)
    weighted(naive_score(model, tokens, mask, 0.7, keep, reference), mask).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    if rows_per_chunk is not None:
        monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", rows_per_chunk * V)
    weighted(response_logprobs(model, tokens, mask, R, 0.7, packed, reference), mask).backward()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=1e-8, atol=1e-11 * largest, msg=name)


def test_the_reference_gets_no_gradient():
    model, reference = make_actor_critic(), make_reference()
    tokens, mask = ragged_rollout()
    scores = response_logprobs(model, tokens, mask, R, reference=reference)
    assert scores.exact_kl.requires_grad and not scores.ref_logprobs.requires_grad
    scores.exact_kl.sum().backward()
    assert [name for name, p in reference.named_parameters() if p.grad is not None] == []


def test_the_entropy_of_a_sampling_set_has_a_finite_gradient_whatever_its_weight():
    """As loss scaling for fp16 makes it: 0 * inf must not become NaN at tokens outside the set."""
    model = make_actor_critic().float()
    tokens, mask = ragged_rollout()
    (1000 * response_logprobs(model, tokens, mask, R, 1.0, random_sets(tokens)[1]).entropy).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.decoder.parameters())


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (tuple, list)) else [result]
        self.elements = max([self.elements, *(x.numel() for x in outputs if isinstance(x, Tensor))])
        return result


@pytest.mark.parametrize("padded", [True, False])
def test_nothing_of_the_size_of_all_logits_is_made(monkeypatch, padded):
    B, T, response, vocab = 4, 24, 6, 2000
    sizes = {**SIZES, "vocab_size": vocab}
    model, reference = ActorCritic(make_gpt2(**sizes)), make_gpt2(seed=1, **sizes)
    tokens = torch.randint(0, vocab, (B, T), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens) if padded else None

    def largest(run) -> int:
        with LargestTensor() as record:
            run()
        return record.elements

    def step():
        scores = response_logprobs(model, tokens, mask, response, reference=reference)
        (scores.logprobs.sum() + scores.entropy.sum() + scores.exact_kl.sum() + scores.values.sum()).backward()

    assert largest(lambda: model(tokens)) == B * T * vocab  # the instrument sees what it should
    assert largest(step) == B * response * vocab
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", 3 * vocab)
    # Chunks of three rows; the largest tensor left is the gradient of the embedding.
    assert largest(step) == max(3 * vocab, model.decoder.wte.weight.numel())


@pytest.mark.parametrize("rows", [4, 24])
def test_chunks_keep_no_logits_for_the_backward_pass(monkeypatch, rows):
    vocab = 2000
    model = ActorCritic(make_gpt2(**{**SIZES, "vocab_size": vocab}))
    tokens = torch.randint(0, vocab, (4, 12), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(logprobs, "LOGITS_PER_CHUNK", rows * vocab)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        response_logprobs(model, tokens, None, 6).logprobs.sum()
    weights = {p.data_ptr() for p in model.parameters()}
    of_logits = [x for x in saved if x.numel() >= 4 * vocab and x.data_ptr() not in weights]
    assert bool(of_logits) == (rows == 24)  # 24 response tokens: a single chunk keeps its logits


@torch.no_grad()
def test_extra_padding_on_either_side_changes_nothing():
    model, reference = make_actor_critic(), make_reference()
    tokens, mask = ragged_rollout()
    _, packed = random_sets(tokens)
    narrow = response_logprobs(model, tokens, mask, R, 0.7, packed, reference)
    pad = torch.nn.functional.pad
    wide_sets = pad(packed, (0, 0, 0, 2))
    wide = response_logprobs(model, pad(tokens, (3, 2), value=11), pad(mask, (3, 2)), R + 2, 0.7, wide_sets, reference)
    for name in ("logprobs", "entropy", "values", "ref_logprobs", "exact_kl"):
        expected = pad(getattr(narrow, name), (0, 2))
        torch.testing.assert_close(getattr(wide, name), expected, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_padding_is_exactly_zero_whatever_stands_there():
    tokens, mask = ragged_rollout()
    other = torch.where(mask.bool(), tokens, 30)
    model = make_actor_critic()
    first, second = (response_logprobs(model, x, mask, R, reference=make_reference()) for x in (tokens, other))
    for name in ("logprobs", "entropy", "values", "ref_logprobs", "exact_kl"):
        assert torch.equal(getattr(first, name), getattr(second, name))
        assert (getattr(first, name)[~mask[:, -R:].bool()] == 0).all()


@pytest.mark.parametrize("length", [0, 10, 11, -1])
def test_a_response_length_that_leaves_no_prompt_is_refused(length):
    with pytest.raises(ValueError, match="response_length must be in 1 to 9"):
        response_logprobs(make_actor_critic(), torch.ones(2, 10, dtype=torch.int64), None, length)


@torch.no_grad()
def test_a_batch_without_response_tokens_scores_zero():
    tokens, mask = ragged_rollout()
    mask[:, -R:] = 0
    scores = response_logprobs(make_actor_critic(), tokens, mask, R)
    for x in (scores.logprobs, scores.entropy, scores.values):
        assert torch.equal(x, torch.zeros(len(tokens), R, dtype=x.dtype))
