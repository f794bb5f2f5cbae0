"""Decoding at fixed shapes against the plain way; graphs themselves are in `test_gpu.py`."""

import contextlib
import copy
import warnings

import pytest
import torch
from test_generation import GREEDY, PROMPTS, TRUNCATED, eos_of, seeded, varied

from conftest import MAKERS, make_gpt2
from minirlhf import SamplingConfig, generate
from minirlhf.generation.generate import CHECK_EVERY
from minirlhf.models.static_decode import COLUMNS, DecodeStep, GraphedDecoder

EVEN = [[5, 6, 7], [9, 120, 4], [5, 6, 7]]
SAMPLINGS = [GREEDY, SamplingConfig(), TRUNCATED, SamplingConfig(1.0, 0, 0.6)]


@pytest.fixture(scope="module", params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return varied(kind)


def both(model, prompts, length, sampling, autocast=contextlib.nullcontext, **options):
    """The plain and the static way from generators of one seed."""
    results = []
    for decoder in (None, GraphedDecoder()):
        with autocast():
            results.append(generate(model, prompts, length, sampling, generator=seeded(3), keep_sampling_sets=True,
                                    graphed=decoder, **options))  # fmt: skip
    return results


def assert_same(one, other, atol=1e-5):
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.mask, other.mask)
    assert torch.equal(one.response_mask, other.response_mask)
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=atol, rtol=0)
    assert (one.sampling_sets is None) == (other.sampling_sets is None)
    if one.sampling_sets is not None:
        assert torch.equal(one.sampling_sets, other.sampling_sets)


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("prompts", [PROMPTS, EVEN])
def test_the_same_tokens_as_the_plain_way(model, prompts, sampling):
    plain, static = both(model, prompts, 12, sampling, pad_token_id=3)
    assert_same(plain, static)
    assert len(set(plain.tokens[:, -12:].flatten().tolist())) > 5  # no text of one token


def test_after_rows_have_ended_both_ways_draw_the_same_tokens(kind):
    model = varied(kind, scale=3.0)
    prompts = PROMPTS * 4
    eos = eos_of(model, 3)
    plain, static = both(model, prompts, 12, TRUNCATED, eos_token_id=eos)
    lengths = static.response_mask.sum(-1)
    assert 1 < lengths.min() < 12 and lengths.max() == 12
    assert_same(plain, static)
    ended = ~static.response_mask
    assert (static.logprobs[ended] == 0).all() and (static.tokens[:, -12:][ended] == 0).all()
    assert (static.sampling_sets[ended] == 0).all()


@pytest.mark.parametrize("stops", [True, False])
def test_the_states_are_kept_as_in_the_plain_way(model, stops):
    eos = eos_of(model, 4) if stops else None
    plain, static = both(model, PROMPTS, 8, GREEDY, eos_token_id=eos, keep_states=True)
    assert static.states.shape == (*static.logprobs.shape, model.width)
    real = static.response_mask
    torch.testing.assert_close(static.states[real], plain.states[real], atol=1e-5, rtol=1e-5)


def test_a_batch_that_ended_decodes_a_few_tokens_more_at_most(model, monkeypatch):
    prompts = [PROMPTS[0]] * 3
    eos = eos_of(model, 3, prompts)
    calls = []
    inner = DecodeStep.__call__
    monkeypatch.setattr(DecodeStep, "__call__", lambda self, new: calls.append(new) or inner(self, new))
    plain, static = both(model, prompts, 3 * CHECK_EVERY, GREEDY, eos_token_id=eos)
    assert_same(plain, static)
    assert len(calls) == CHECK_EVERY - 1


def test_state_and_logits_are_those_of_the_whole_sequence(model):
    """By hand: two tokens fed to a step, against one pass without a cache."""
    ids = torch.tensor([[5, 6, 7], [0, 9, 4]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    more = torch.tensor([[8, 30], [11, 12]])
    with torch.no_grad():
        cache = model.new_cache(2, 3)
        model.hidden_states(ids, mask, cache)
        step = DecodeStep(model, 2, 8)
        for layer in step.cache.layers:
            layer.fill_(torch.nan)  # what an earlier batch left must not be seen
        step.cache.load(cache, mask)
        for t in (1, 2):
            state, logits = step(more[:, t - 1])
            read = torch.cat([ids, more[:, :t]], 1), torch.cat([mask, torch.ones(2, t, dtype=torch.int64)], 1)
            torch.testing.assert_close(state, model.hidden_states(*read)[:, -1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(logits, model(*read)[:, -1], atol=1e-5, rtol=1e-5)


def test_under_autocast_it_is_the_plain_way_in_that_type(model):
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    plain, static = both(model, PROMPTS, 8, TRUNCATED, autocast)
    assert torch.equal(plain.tokens, static.tokens)
    torch.testing.assert_close(static.logprobs, plain.logprobs, atol=0.03, rtol=0)  # sums over more columns round anew
    exact, _ = both(model, PROMPTS, 8, TRUNCATED)
    assert (exact.logprobs - plain.logprobs).abs().max() > 1e-3  # it was bf16 at all


@pytest.mark.parametrize("autocast", [contextlib.nullcontext, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_a_step_is_kept_and_sees_weights_that_changed_in_place(kind, autocast):
    model, decoder = varied(kind), GraphedDecoder()
    with autocast():
        kept = decoder.step_for(model, 5, 10)
        before = generate(model, PROMPTS, 8, GREEDY, graphed=decoder)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-0.7)
    with autocast():
        after = generate(model, PROMPTS, 8, GREEDY, graphed=decoder)
        assert decoder.step_for(model, 5, COLUMNS) is kept
        assert torch.equal(after.tokens, generate(model, PROMPTS, 8, GREEDY).tokens)
    assert not torch.equal(before.tokens, after.tokens)


def test_a_new_step_for_more_rows_more_columns_other_weights_or_another_type():
    model, decoder = make_gpt2(n_positions=100), GraphedDecoder()
    steps = [decoder.step_for(model, 2, 10), decoder.step_for(model, 3, 10), decoder.step_for(model, 3, COLUMNS + 1)]
    assert decoder.step_for(model, 3, COLUMNS - 1) is steps[-1]  # room enough
    other = copy.deepcopy(model)
    steps.append(decoder.step_for(other, 3, 10))
    with torch.autocast("cpu", torch.bfloat16):
        steps.append(decoder.step_for(other, 3, 10))
    assert len(set(map(id, steps))) == len(steps)
    assert [step.columns for step in steps] == [COLUMNS, COLUMNS, 2 * COLUMNS, COLUMNS, COLUMNS]


def test_a_capture_that_fails_falls_back_with_one_warning(model, monkeypatch):
    def fails(self):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(DecodeStep, "capture", fails)
    decoder = GraphedDecoder()
    plain = generate(model, PROMPTS, 6, TRUNCATED, generator=seeded())
    with pytest.warns(UserWarning, match="without a CUDA graph.*not permitted"):
        first = generate(model, PROMPTS, 6, TRUNCATED, generator=seeded(), graphed=decoder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = generate(model, PROMPTS, 6, TRUNCATED, generator=seeded(), graphed=decoder)
    assert torch.equal(first.tokens, plain.tokens) and torch.equal(second.tokens, plain.tokens)
