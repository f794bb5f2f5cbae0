"""A rollout: its fields, its rows, its reward functions, and that nothing in it can be changed."""

import dataclasses

import pytest
import torch

from conftest import MAKERS, VOCAB
from minirlhf import ActorCritic, Models, PPOConfig, Tokenizer, collect_rollout, generate
from minirlhf.rl import rollout as rollouts
from minirlhf.rl.logprobs import response_logprobs

PROMPTS = ["酒店很好", "w", "房间干净，服务", "早餐"]
TRUNCATED = dict(temperature=0.9, top_k=30, top_p=0.8)
EOS = 150


def lengths_of_text(texts):
    return [float(len(text)) for text in texts]


@pytest.fixture(scope="module", params=MAKERS)
def models(request):
    make = MAKERS[request.param]
    policy = ActorCritic(make(0, scale=4.0))
    with torch.no_grad():
        policy.value_head.summary.weight.normal_(generator=torch.Generator().manual_seed(0))
    return Models(policy.eval(), make(1, scale=4.0), Tokenizer(VOCAB))


def collect(models, prompts=PROMPTS, reward=lengths_of_text, length=6, seed=0, **settings):
    config = PPOConfig(gen_len=length, **{**TRUNCATED, **settings})
    return collect_rollout(models, prompts, reward, config, torch.Generator().manual_seed(seed))


def test_fields_and_shapes(models):
    rollout = collect(models)
    assert len(rollout) == 4
    P = max(len(models.tokenizer.encode_prompt(p)) for p in PROMPTS)
    assert rollout.tokens.shape == rollout.mask.shape == (4, P + 6)
    assert rollout.tokens.dtype == rollout.mask.dtype == torch.int64
    assert rollout.response_mask.shape == (4, 6) and rollout.response_mask.dtype == torch.bool
    for name in ("logprobs", "ref_logprobs", "values", "entropy", "exact_kl", "sampler_logprobs"):
        x = getattr(rollout, name)
        assert x.shape == (4, 6) and x.dtype == torch.float32 and not x.requires_grad, name
    assert rollout.scores.shape == (4,) and rollout.scores.dtype == torch.float32
    assert rollout.sampling_sets.shape == (4, 6, -(-len(VOCAB) // 8))
    assert rollout.prompts == tuple(PROMPTS)
    assert rollout.texts == [p + r for p, r in zip(PROMPTS, rollout.responses, strict=True)]
    assert rollout.scores.tolist() == lengths_of_text(rollout.texts)
    assert all(seconds >= 0 for seconds in rollout.seconds.values()) and rollout.seconds
    for tokens, mask, text in zip(rollout.tokens, rollout.mask, rollout.texts, strict=True):
        assert text == models.tokenizer.decode(tokens[mask.bool()])  # of all tokens: spaces between prompt and response


def test_scores_of_single_tokens_stand_at_their_tokens(models):
    def reward(prompts, responses, tokens):
        assert prompts == PROMPTS and ["".join(row) for row in tokens] == responses
        return [[i + 0.125 * len(token) for token in row] for i, row in enumerate(tokens, 1)]

    eos = int(collect(models, length=8).tokens[1, -5])
    rollout = collect(models, reward=reward, length=8, eos_token_id=eos)
    assert rollout.score_shares.shape == rollout.values.shape and rollout.score_shares.dtype == torch.float32
    assert len(set(rollout.response_mask.sum(-1).tolist())) > 1  # ragged
    for i in range(4):
        ids = rollout.tokens[i, -8:][rollout.response_mask[i]].tolist()
        own = rollout.score_shares[i]
        prompt = models.tokenizer.encode_prompt(PROMPTS[i])
        expected = [i + 1 + 0.125 * len(piece) for piece in models.tokenizer.decode_response(prompt, ids)]
        assert own.tolist() == [*expected, *[0.0] * (8 - len(ids))]
        assert rollout.scores[i].item() == sum(expected)
    rows = rollout.rows(torch.tensor([2, 0]))
    assert torch.equal(rows.score_shares, rollout.score_shares[[2, 0], : rows.response_mask.size(1)])
    whole = collect(models, length=8, eos_token_id=eos)
    assert whole.score_shares is None and torch.equal(whole.tokens, rollout.tokens)


@pytest.mark.parametrize("from_decode", [True, False])
def test_every_row_is_scored_as_if_it_stood_alone(models, monkeypatch, from_decode):
    """Log-probabilities, reference, values and entropies of one row: its own tokens, no padding, the same sets."""
    policy, reference = models.policy, models.reference
    if not from_decode:  # without the states of the decode, as in 16 bits
        monkeypatch.setattr(
            rollouts, "generate", lambda *a, **options: generate(*a, **{**options, "keep_states": False})
        )
    rollout = collect(models, length=8, eos_token_id=EOS, seed=3)
    for b in range(4):
        tokens = rollout.tokens[b][rollout.mask[b].bool()][None]
        R = int(rollout.response_mask[b].sum())
        with torch.no_grad():
            alone = response_logprobs(policy, tokens, None, R, 0.9, rollout.sampling_sets[b : b + 1, :R], reference)
        for name in ("logprobs", "ref_logprobs", "values", "entropy", "exact_kl"):
            together = getattr(rollout, name)[b]
            torch.testing.assert_close(together[:R], getattr(alone, name)[0], atol=2e-5, rtol=1e-5, msg=name)
            assert together[R:].abs().sum() == 0, name


@pytest.mark.parametrize("size", [1, 3, 128])
def test_the_policy_reads_nothing_twice_if_the_decode_tells_its_states(models, monkeypatch, size):
    models = dataclasses.replace(models, scoring_batch_size=size)
    calls = []
    for name, model in (("policy", models.policy.decoder), ("reference", models.reference)):

        def watched(ids, mask=None, cache=None, name=name, inner=model.hidden_states):
            calls.append((name, cache is None))
            return inner(ids, mask, cache)

        monkeypatch.setattr(model, "hidden_states", watched)
    collect(models)
    assert calls == [("policy", False)] * 6 + [("reference", True)] * -(-len(PROMPTS) // size)


def test_rows_are_trimmed_without_changing_what_is_scored(models):
    policy = models.policy
    rollout = collect(models, PROMPTS * 3, length=10, eos_token_id=EOS, seed=2, temperature=1.5, top_k=0, top_p=1.0)
    lengths = rollout.response_mask.sum(-1)
    short = int(lengths.argmin())
    assert lengths[short] < 10  # otherwise nothing is trimmed
    for index in ([short], [short, 1, 5], [2, 0], list(range(12))):
        rows = rollout.rows(torch.tensor(index))
        R = int(lengths[index].max())
        P = int(rollout.mask[index, :-10].sum(-1).max())
        assert len(rows) == len(index)
        assert rows.tokens.shape == rows.mask.shape == (len(index), P + R)
        assert rows.response_mask.shape == rows.logprobs.shape == (len(index), R)
        for new, old in enumerate(index):
            kept = rows.mask[new].bool()
            assert torch.equal(rows.tokens[new][kept], rollout.tokens[old][rollout.mask[old].bool()])
            assert rows.response_mask[new].sum() == lengths[old]
            assert rows.scores[new] == rollout.scores[old]
            for name in ("logprobs", "ref_logprobs", "values", "entropy", "exact_kl", "sampler_logprobs"):
                assert torch.equal(getattr(rows, name)[new], getattr(rollout, name)[old, :R]), name
        with torch.no_grad():
            again = response_logprobs(policy, rows.tokens, rows.mask, R, 1.5, rows.sampling_sets)
        torch.testing.assert_close(again.logprobs, rows.logprobs, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(again.values, rows.values, atol=1e-5, rtol=1e-5)


def test_the_full_softmax_scores_the_same_truncated_samples(models):
    policy = models.policy
    truncated, full = collect(models), collect(models, logprobs_full_softmax=True)
    assert torch.equal(full.tokens, truncated.tokens)  # what is drawn does not depend on how it is scored
    assert full.sampling_sets is None
    with torch.no_grad():
        expected = response_logprobs(policy, full.tokens, full.mask, 6, 0.9).logprobs
    torch.testing.assert_close(full.logprobs, expected, atol=1e-6, rtol=1e-6)
    assert (full.logprobs < truncated.logprobs - 1e-3).any() and (full.logprobs <= truncated.logprobs + 1e-5).all()


@pytest.mark.parametrize("scores", [
    [1.0] * 3, [1.0] * 5, [], 1.0, [[1.0, 2.0]] * 4, [1.0, float("nan"), 0, 0], [1.0, float("inf"), 0, 0], ["a"] * 4,
    None,
])  # fmt: skip
def test_wrong_scores_are_refused_before_anything_is_scored(models, monkeypatch, scores):
    monkeypatch.setattr(models.reference, "hidden_states", lambda *_: pytest.fail("the rollout was scored"))
    with pytest.raises(ValueError, match="scores"):
        collect(models, reward=lambda texts: scores)


def test_nothing_can_be_assigned(models):
    rollout = collect(models)
    for field in dataclasses.fields(rollout):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(rollout, field.name, None)


@pytest.mark.parametrize("prompts", [[], ["酒店", ""], ["  "], ["好" * 100]])
def test_bad_prompts_are_refused_before_the_reward_is_asked(models, prompts):
    with pytest.raises(ValueError, match="prompt"):
        collect(models, prompts=prompts, reward=lambda texts: pytest.fail("the reward was asked"))


def test_collecting_leaves_the_global_random_state_and_the_weights_alone(models):
    state, weights = torch.get_rng_state(), [p.clone() for p in models.policy.parameters()]
    collect(models)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights, models.policy.parameters(), strict=True))


def test_rows_know_whether_they_are_padded(models):
    prompts = ["酒店", "房间", "早餐很好", "很好"]
    rollout = collect(models, prompts)
    assert [rollout.rows(torch.tensor(rows)).attention_mask is not None for rows in ([0, 1, 3], [2], [0, 2])] == [
        False,
        False,
        True,
    ]
    eos = int(rollout.tokens[0, -2])
    ended = collect(models, prompts[:2] * 16, eos_token_id=eos, length=12)
    lengths = ended.response_mask.sum(-1)
    assert lengths.min() < lengths.max()  # some rows ended
    for i in (int(lengths.argmin()), int(lengths.argmax())):
        assert ended.rows(torch.tensor([i])).attention_mask is None
    assert ended.rows(torch.tensor([int(lengths.argmin()), int(lengths.argmax())])).attention_mask is not None
