"""Best-of-n: its KL by enumeration, its expected reward by all choices, and the sampler itself."""

import itertools
import math
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minirlhf
from conftest import VOCAB, make_gpt2
from minirlhf import ActorCritic, SamplingConfig, Tokenizer, best_of_n
from minirlhf.evaluation.best_of import best_of_n_kl, expected_best_of_n, n_of_kl

PROMPTS = ["酒店", "服务很好", "w"]


# ---- what it costs --------------------------------------------------------------------------------------------------


def enumerated_kl(p, rewards, n):
    """KL(best-of-n || p) on a discrete distribution, by all n-tuples; of equal rewards the first drawn is kept."""
    q = np.zeros(len(p))
    for draws in itertools.product(range(len(p)), repeat=n):
        best = max(draws, key=lambda i: rewards[i])
        q[best] += math.prod(p[i] for i in draws)
    assert q.sum() == pytest.approx(1.0)
    return sum(q[i] * math.log(q[i] / p[i]) for i in range(len(p)) if q[i] > 0)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 1), st.integers(0, 3)), min_size=1, max_size=5), st.integers(1, 4))
def test_the_bound_holds_on_every_discrete_distribution(outcomes, n):
    p = np.array([mass for mass, _ in outcomes])
    assert enumerated_kl(p / p.sum(), [reward for _, reward in outcomes], n) <= best_of_n_kl(n) + 1e-9


@pytest.mark.parametrize("n", [2, 3, 4, 16])
def test_the_bound_is_reached_as_outcomes_become_many(n):
    """Uniform over K outcomes of different reward: the best is the i-th with ((i/K)^n - ((i-1)/K)^n)."""

    def exact(K):
        q = np.diff((np.arange(K + 1) / K) ** n)
        q = q[q > 0]
        return float((q * np.log(q * K)).sum())

    if n <= 3:
        assert exact(6) == pytest.approx(enumerated_kl(np.full(6, 1 / 6), range(6), n))
    assert exact(50) < exact(500) < best_of_n_kl(n)
    assert exact(200_000) == pytest.approx(best_of_n_kl(n), abs=1e-4)


def test_its_values():
    assert best_of_n_kl(1) == 0
    assert [best_of_n_kl(n) for n in (2, 4, 8, 16)] == pytest.approx([0.19315, 0.63629, 1.20444, 1.83509], abs=1e-5)


@pytest.mark.parametrize("n", [1.0, 1.5, 2, 7.25, 64, 1e6])
def test_n_of_kl_is_its_inverse(n):
    assert n_of_kl(best_of_n_kl(n)) == pytest.approx(n, rel=1e-6)


def test_no_kl_is_best_of_1():
    assert n_of_kl(0.0) == n_of_kl(-0.3) == pytest.approx(1.0)


@pytest.mark.parametrize("n", [0, 0.5, math.nan, math.inf, -1])
def test_an_n_below_1_has_no_kl(n):
    with pytest.raises(ValueError, match="n must be a finite number of at least 1"):
        best_of_n_kl(n)


# ---- what it brings -------------------------------------------------------------------------------------------------

SCORES = np.random.default_rng(0).normal(size=(3, 6))
VALUES = np.random.default_rng(1).normal(size=(3, 6))


@pytest.mark.parametrize("n", range(1, 7))
def test_the_expected_best_is_the_mean_over_all_choices(n):
    choices = list(itertools.combinations(range(6), n))
    best = [[max(choice, key=lambda i: row[i]) for choice in choices] for row in SCORES]
    for values in (None, VALUES):
        table = SCORES if values is None else values
        expected = [np.mean([table[r, i] for i in row]) for r, row in enumerate(best)]
        assert expected_best_of_n(SCORES, n, values) == pytest.approx(expected)


def test_between_integers_it_is_linear_in_the_kl():
    at = {n: expected_best_of_n(SCORES, n)[0] for n in (2, 2.4, 3)}
    slope = (at[3] - at[2]) / (best_of_n_kl(3) - best_of_n_kl(2))
    assert at[2.4] == pytest.approx(at[2] + slope * (best_of_n_kl(2.4) - best_of_n_kl(2)))
    assert at[2] < at[2.4] < at[3]


@pytest.mark.parametrize("n", [0, 0.5, 6.5, 7, math.nan])
def test_more_than_the_candidates_are_refused(n):
    with pytest.raises(ValueError, match=r"n must be in \[1, 6\]"):
        expected_best_of_n(SCORES, n)


# ---- the sampler ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return make_gpt2(0, scale=4.0)


def reward(texts):
    return [len(set(text)) / 8 for text in texts]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_it_keeps_the_best_of_its_candidates(model, tokenizer):
    seen = []

    def counting(prompts, responses):
        seen.append(len(prompts))
        return [len(set(p + r)) for p, r in zip(prompts, responses, strict=True)]

    best = best_of_n(model, PROMPTS, counting, 5, tokenizer=tokenizer, gen_len=6, generator=generator())
    assert seen == [15]  # one call, whatever the reward is
    assert best.prompts == tuple(PROMPTS) and best.candidate_scores.shape == (3, 5)
    for prompt, response, score, row, scores in zip(
        PROMPTS, best.responses, best.scores.tolist(), best.candidates, best.candidate_scores.tolist(), strict=True
    ):
        expected = [len(set(prompt + text)) for text in row]
        assert scores == expected and score == max(expected) and response == row[expected.index(max(expected))]
    assert any(len(set(row)) > 1 for row in best.candidates)


def test_candidates_are_draws_from_the_model(tokenizer):
    """Of a one-token response, by frequency; the best of 2 by F^2 - F-^2, for a reward that ranks all tokens."""
    model = make_gpt2(3, n_embd=16, n_layer=1, n_head=2, scale=2.0)
    probabilities = model(torch.tensor([tokenizer.encode_prompt("酒")]))[0, -1].double().softmax(-1)

    def by_rank(prompts, responses):
        return [zlib.crc32(text.encode()) % 10007 for text in responses]

    best = best_of_n(model, ["酒"] * 3000, by_rank, 2, tokenizer=tokenizer, gen_len=1, generator=generator(),
                     batch_size=6000)  # fmt: skip
    texts = [tokenizer.decode([i]) for i in range(len(VOCAB))]
    every = by_rank(None, texts)
    expected = 0.0
    for value in sorted(set(every)):
        below = sum(p for p, r in zip(probabilities.tolist(), every, strict=True) if r < value)
        up_to = sum(p for p, r in zip(probabilities.tolist(), every, strict=True) if r <= value)
        expected += value * (up_to**2 - below**2)
    assert best.scores.mean().item() == pytest.approx(expected, abs=4 * best.scores.std().item() / math.sqrt(3000))


def test_a_folder_is_a_policy_as_well(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = best_of_n(str(tmp_path), PROMPTS, reward, 3, gen_len=4, generator=generator())
    given = best_of_n(
        ActorCritic(model).eval(), PROMPTS, reward, 3, tokenizer=tokenizer, gen_len=4, generator=generator()
    )
    assert loaded.candidates == given.candidates


def test_best_of_1_is_sampling_and_seeds_decide(model, tokenizer):
    def run(seed, **options):
        return best_of_n(model, PROMPTS, reward, 1, tokenizer=tokenizer, gen_len=6, generator=generator(seed),
                         **options).responses  # fmt: skip

    assert run(0) == run(0) != run(1)
    ids = [tokenizer.encode_prompt(prompt) for prompt in PROMPTS]
    sampled = minirlhf.generate(model, ids, 6, generator=generator(), pad_token_id=tokenizer.pad_id)
    assert run(0) == tuple(map(tokenizer.decode, sampled.responses))
    assert len(set(run(0, sampling=SamplingConfig(top_k=1)) + run(1, sampling=SamplingConfig(top_k=1)))) <= 3


def test_it_leaves_the_global_random_state_alone(model, tokenizer):
    state = torch.get_rng_state()
    best_of_n(model, PROMPTS, reward, 2, tokenizer=tokenizer, gen_len=3, generator=generator())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("options", "message"), [
    ({"n": 0}, "n must be an integer of at least 1, got 0"), ({"n": 2.0}, "n must be an integer"),
    ({"n": True}, "n must be an integer"), ({"batch_size": 0}, "batch_size must be"), ({"gen_len": 0}, "gen_len must"),
    ({"prompts": []}, "got no prompts"), ({"prompts": "酒店"}, "prompts must be a collection of texts"),
    ({"prompts": ["酒店", ""]}, "empty"), ({"prompts": [3]}, "prompt 0 must be a text, got 3"),
    ({"prompts": ["酒店", "好" * 100]}, "has 101 tokens; .*gen_len=4 leave room for 60"),
    ({"tokenizer": None}, "needs tokenizer="), ({"tokenizer": Tokenizer([*VOCAB, "新"])}, "the vocabulary has"),
    ({"policy": 3}, "policy must be a Decoder, an ActorCritic or a folder, got a int"),
    ({"reward": lambda texts: [math.nan] * len(texts)}, "nan"), ({"reward": lambda texts: [1.0]}, "score"),
])  # fmt: skip
def test_bad_input_is_one_clear_error(model, tokenizer, options, message):
    arguments = dict(policy=model, prompts=PROMPTS, reward=reward, n=2, tokenizer=tokenizer, gen_len=4)
    with pytest.raises(ValueError, match=message):
        best_of_n(**{**arguments, **options})


def test_a_model_in_training_mode_is_refused(tokenizer):
    with pytest.raises(ValueError, match="training mode"):
        best_of_n(make_gpt2(0).train(), PROMPTS, reward, 2, tokenizer=tokenizer, gen_len=4)
