"""Batched generation: rows as if alone, stops that cost nothing, and probabilities that are those of the sampler."""

import numpy as np
import pytest
import torch

from conftest import MAKERS, make_gpt2, make_llama
from minirlhf import SamplingConfig, generate
from minirlhf.generation.sampling import draw_uniforms, unpack_set
from minirlhf.models.heads import ActorCritic
from minirlhf.rl.logprobs import response_logprobs

PROMPTS = [[5, 6, 7, 8], [9], [120, 30, 40], [7, 7], [150, 3, 160, 20, 11]]
GREEDY = SamplingConfig(top_k=1)
TRUNCATED = SamplingConfig(0.8, 20, 0.7)


def varied(kind="gpt2", scale=6.0):
    """A model whose greedy text does not repeat one token: positions count for more, or the head is another matrix."""
    if kind == "llama":
        return make_llama(scale=scale, tie_word_embeddings=False)
    model = make_gpt2(scale=scale)
    with torch.no_grad():
        model.wpe.weight.mul_(10)
    return model


@pytest.fixture(scope="module", params=MAKERS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(kind):
    return varied(kind)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def counted_rows(model, monkeypatch):
    """A list that gets the number of rows of every forward pass."""
    rows, inner = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda ids, *a, **more: rows.append(len(ids)) or inner(ids, *a, **more))
    return rows


def eos_of(model, column, prompts=PROMPTS, length=8):
    """A token that the greedy continuation of the first prompt has at this column, and not before."""
    row = generate(model, prompts, length, GREEDY).responses[0].tolist()
    return next(token for token in row[column:] if token not in row[:column])


def test_greedy_tokens_are_the_argmax_of_the_whole_sequence(model):
    result = generate(model, PROMPTS, 6, GREEDY)
    for prompt, row in zip(PROMPTS, result.responses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row.tolist()]))[0]
        assert row.tolist() == logits[len(prompt) - 1 : -1].argmax(-1).tolist()


def test_shapes_masks_and_padding(model):
    result = generate(model, PROMPTS, 7, generator=seeded(), pad_token_id=3)
    assert result.tokens.shape == result.mask.shape == (5, 12)
    assert result.response_mask.dtype == torch.bool and result.response_mask.all()
    assert result.response_mask.shape == result.logprobs.shape == (5, 7)
    assert result.sampling_sets is None
    for row, mask, prompt in zip(result.tokens.tolist(), result.mask.tolist(), PROMPTS, strict=True):
        padding = 5 - len(prompt)
        assert row[:5] == [3] * padding + prompt
        assert mask == [0] * padding + [1] * (len(prompt) + 7)


def test_a_row_ends_with_its_end_of_text_and_is_padding_from_then_on(model):
    eos = eos_of(model, 5)
    result = generate(model, PROMPTS, 8, GREEDY, eos_token_id=eos, pad_token_id=1)
    free = generate(model, PROMPTS, 8, GREEDY).responses
    columns = result.tokens[:, -8:]
    lengths = []
    for row, mask, unstopped, logp in zip(columns, result.response_mask, free, result.logprobs, strict=True):
        tokens = unstopped.tolist()
        length = tokens.index(eos) + 1 if eos in tokens else 8
        lengths.append(length)
        assert row[:length].tolist() == tokens[:length]
        assert row[length:].tolist() == [1] * (8 - length)
        assert mask.tolist() == [True] * length + [False] * (8 - length)
        assert logp[length:].tolist() == [0.0] * (8 - length)
    assert torch.equal(result.mask[:, -8:].bool(), result.response_mask)
    assert lengths[0] < 8 and max(lengths) == 8  # some row stopped, some went on


def test_finished_rows_are_not_computed_again(model, monkeypatch):
    eos = eos_of(model, 5)
    rows = counted_rows(model, monkeypatch)
    result = generate(model, PROMPTS, 8, GREEDY, eos_token_id=eos)
    lengths = result.response_mask.sum(-1)
    # Column t needs one forward of the rows that are longer than t; the first is the prompts themselves.
    assert rows == [int((lengths > t).sum()) for t in range(8) if (lengths > t).any()]


def test_generation_stops_when_all_rows_are_finished(model, monkeypatch):
    prompts = [PROMPTS[0]] * 3
    eos = eos_of(model, 3, prompts)
    calls = counted_rows(model, monkeypatch)
    result = generate(model, prompts, 30, GREEDY, eos_token_id=eos)
    length = int(result.response_mask[0].sum())
    assert length < 30 and calls == [1] + [3] * (length - 1)  # the prompt that all share is read once
    assert result.tokens.shape[1] == 4 + 30


def test_equal_prompts_are_read_once_and_each_row_goes_on_with_its_own(model, monkeypatch):
    prompts = [PROMPTS[i] for i in (1, 0, 2, 1, 1, 0)]
    calls = counted_rows(model, monkeypatch)
    together = generate(model, prompts, 6, GREEDY).responses
    assert calls == [3] + [6] * 5
    for prompt, response in zip(prompts, together, strict=True):
        assert generate(model, [prompt], 6, GREEDY).responses[0].tolist() == response.tolist()


def test_an_end_of_text_at_the_first_position(model):
    eos = eos_of(model, 0)
    result = generate(model, PROMPTS, 5, GREEDY, eos_token_id=eos)
    assert result.response_mask[0].tolist() == [True, False, False, False, False]
    assert result.responses[0].tolist() == [eos]


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.7), TRUNCATED, SamplingConfig(1.0, 0, 0.9)])
def test_logprobs_are_those_of_scoring(kind, sampling):
    model = varied(kind, scale=3.0)
    eos = eos_of(model, 3)
    result = generate(model, PROMPTS, 8, sampling, generator=seeded(1), eos_token_id=eos, keep_sampling_sets=True)
    with torch.no_grad():
        scored = response_logprobs(
            ActorCritic(model, None), result.tokens, result.mask, 8, sampling.temperature, result.sampling_sets
        )
    torch.testing.assert_close(scored.logprobs, result.logprobs, atol=1e-5, rtol=0)
    assert (result.logprobs[result.response_mask] < 0).any()


@pytest.mark.parametrize("sampling", [TRUNCATED, SamplingConfig(1.0, 3, 1.0), SamplingConfig(1.0, 0, 0.5)])
def test_every_token_also_the_first_is_inside_the_set_of_its_context(model, sampling):
    prompts = PROMPTS * 8
    result = generate(model, prompts, 4, sampling, generator=seeded(2), keep_sampling_sets=True)
    sets = unpack_set(result.sampling_sets, model.config.vocab_size)
    for prompt, row, kept in zip(prompts, result.responses, sets, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + row.tolist()]))[0, len(prompt) - 1 : -1]
        for t in range(4):
            assert kept[t, row[t]]
            probs = (logits[t] / sampling.temperature).softmax(-1)
            order = probs.argsort(descending=True)[: sampling.top_k or None]
            share = probs[order] / probs[order].sum()
            allowed = order[share.cumsum(-1) - share < sampling.top_p]
            assert kept[t].nonzero().flatten().tolist() == sorted(allowed.tolist())


def test_sets_are_kept_on_request_only(model):
    assert generate(model, PROMPTS, 2, TRUNCATED, generator=seeded()).sampling_sets is None
    whole = generate(model, PROMPTS, 2, SamplingConfig(), generator=seeded(), keep_sampling_sets=True)
    assert whole.sampling_sets is None  # nothing was truncated
    kept = generate(model, PROMPTS, 2, TRUNCATED, generator=seeded(), keep_sampling_sets=True)
    assert kept.sampling_sets.shape == (5, 2, -(-model.config.vocab_size // 8))
    assert torch.equal(kept.tokens, generate(model, PROMPTS, 2, TRUNCATED, generator=seeded()).tokens)


@pytest.mark.parametrize("stops", [True, False])
def test_states_are_those_of_a_pass_over_the_whole_row(model, stops):
    eos = eos_of(model, 4) if stops else None
    result = generate(model, PROMPTS, 8, GREEDY, eos_token_id=eos, keep_states=True)
    assert generate(model, PROMPTS, 2, GREEDY).states is None
    for i, (prompt, row) in enumerate(zip(PROMPTS, result.responses, strict=True)):
        with torch.no_grad():
            whole = model.hidden_states(torch.tensor([prompt + row.tolist()]))[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(result.states[i, : len(row)], whole, rtol=1e-4, atol=1e-4)


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others(model):
    runs = [generate(model, PROMPTS, 6, generator=seeded(seed)) for seed in (4, 4, 5)]
    assert torch.equal(runs[0].tokens, runs[1].tokens) and torch.equal(runs[0].logprobs, runs[1].logprobs)
    assert not torch.equal(runs[0].tokens, runs[2].tokens)


def test_the_global_random_state_is_not_touched(model):
    state = torch.get_rng_state()
    generate(model, PROMPTS, 5, TRUNCATED, generator=seeded(), eos_token_id=7)
    assert torch.equal(torch.get_rng_state(), state)


def test_prompts_are_not_changed(model):
    prompts = [torch.tensor(p) for p in PROMPTS]
    generate(model, prompts, 3, generator=seeded())
    assert [p.tolist() for p in prompts] == PROMPTS


def test_a_response_may_fill_the_whole_context(model):
    room = model.n_positions
    result = generate(model, [[5]], room - 1, generator=seeded())
    assert result.tokens.shape == (1, room)
    assert generate(model, [[5]], 1, generator=seeded()).tokens.shape == (1, 2)
    with pytest.raises(ValueError, match=str(room)):
        generate(model, [[5]], room)


@pytest.mark.parametrize(
    ("prompts", "length", "message"),
    [
        ([], 3, "no sequences"), ([[5], []], 3, "prompt 1 must be 1-D with at least one"), ([[5]], 0, "max_new_tokens"),
        ([[5]], 3.0, "max_new_tokens must be an integer"), ([[5]], "3", "max_new_tokens"), (None, 3, "got a NoneType"),
        ([5, 6], 3, "prompt 0 must be 1-D"), ([[5, -1]], 3, r"outside \[0, "),
        ([[5], [10**6]], 3, "prompt 1 .* outside"),
        ([[1.5, 2]], 3, "prompt 0 must be 1-D .*float"), ({"input_ids": [[5]]}, 3, "got a dict"),
        ([[None]], 3, r"prompt 0 must be token ids, got \[None\]"), (["酒店"], 3, "tokenizer.encode_prompt"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(model, prompts, length, message):
    with pytest.raises(ValueError, match=message):
        generate(model, prompts, length)


def test_a_model_in_training_mode_is_refused():
    model = make_gpt2().train()
    with pytest.raises(ValueError, match="eval"):
        generate(model, PROMPTS, 2)


def test_a_row_depends_on_no_other_row_and_not_on_who_has_ended(kind):
    model = varied(kind, scale=3.0)
    eos = eos_of(model, 3) if kind == "gpt2" else tuple(range(0, 200, 8))
    free = generate(model, PROMPTS, 12, TRUNCATED, generator=seeded(6))
    stopped = generate(model, PROMPTS, 12, TRUNCATED, generator=seeded(6), eos_token_id=eos)
    assert 0 < int((stopped.response_mask.sum(-1) < 12).sum()) < len(PROMPTS)
    for ours, theirs in zip(stopped.responses, free.responses, strict=True):
        assert ours.tolist() == theirs[: len(ours)].tolist()


def test_the_stream_is_one_uniform_a_row_and_token(model):
    """By hand: R * B numbers are drawn at once, token t of row b by number [t, b], as drawing them token by token."""
    generator, expected = seeded(8), seeded(8)
    generate(model, PROMPTS, 3, TRUNCATED, generator=generator)
    one_by_one = [torch.rand(len(PROMPTS), 1, dtype=torch.float64, generator=expected) for _ in range(3)]
    assert torch.equal(generator.get_state(), expected.get_state())
    assert torch.equal(torch.cat(one_by_one, 1).T, draw_uniforms(3, len(PROMPTS), torch.device("cpu"), seeded(8)))


def test_a_padded_batch_may_be_wider_than_the_context(make_decoder):
    model = make_decoder(n_positions=8)
    prompts = [[5, 6, 7, 8], [9]]
    alone = [generate(model, [prompt], 4, GREEDY).responses[0].tolist() for prompt in prompts]
    assert [row.tolist() for row in generate(model, prompts, 4, GREEDY).responses] == alone


@pytest.mark.parametrize("end", ["x", 3.0, [[3]], {3}, torch.ones(2)], ids=repr)
def test_ends_that_are_no_ids_are_refused(model, end):
    with pytest.raises(ValueError, match="eos_token_id must be an id, several of them, or None"):
        generate(model, PROMPTS, 2, eos_token_id=end)


def test_settings_in_a_dict_are_refused_with_what_makes_them(model):
    with pytest.raises(ValueError, match=r"got a dict: of a dict it is SamplingConfig\(\*\*config\)"):
        generate(model, PROMPTS, 2, {"top_p": 0.9})


def test_numpy_s_integers_are_ids(model):
    given = dict(eos_token_id=7, generator=seeded()), dict(eos_token_id=np.int64(7), generator=seeded())
    first, second = (generate(model, PROMPTS, 4, **options) for options in given)
    assert torch.equal(first.tokens, second.tokens) and torch.equal(first.mask, second.mask)
