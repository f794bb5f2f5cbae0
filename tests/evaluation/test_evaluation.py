"""Policy against reference: identical models differ in nothing, figures are recomputed plainly, hacking is caught."""

import collections
import copy
import dataclasses
import functools
import json
import math

import numpy as np
import pytest
import torch

from conftest import CHINESE, make_gpt2
from minirlhf import ActorCritic, NGramScorer, PPOConfig, SamplingConfig, best_of_n, collect_rollout
from minirlhf.evaluation.best_of import best_of_n_kl, expected_best_of_n
from minirlhf.evaluation.evaluate import MAX_N, EvaluationConfig, evaluate
from minirlhf.evaluation.findings import Pair, before_after_table
from minirlhf.evaluation.statistics import Bootstrap, Estimate
from minirlhf.models.prepared import Models
from minirlhf.text.statistics import self_bleu, unit_of

PROMPTS = ["酒店", "服务很好", "w"]


def reward(texts):
    return [len(set(text)) / 8 for text in texts]


@functools.cache
def models(policy_seed):
    return ActorCritic(make_gpt2(policy_seed, scale=4.0)).eval(), make_gpt2(0, scale=4.0)


def test_a_table_has_texts_and_rewards_side_by_side_in_its_first_rows():
    table = before_after_table([Pair("a|b", "before", 0.5, "\x1b[31m", 0.754)] * 5, rows=2)
    assert table.splitlines()[2:] == [r"| a\|b | before | 0.50 | \\x1b\[31m | 0.75 |"] * 2


SMALL = dict(samples=8, gen_len=5, best_of=(2, 4), best_of_prompts=6, resamples=200)


def full_evaluation(tokenizer, policy_seed=1, prompts=PROMPTS, **options):
    settings = {**SMALL, **options.pop("settings", {})}
    policy, reference = models(policy_seed)
    reward_fn = options.pop("reward_fn", reward)
    return evaluate(policy, reference, tokenizer, prompts, reward_fn, config=EvaluationConfig(**settings), **options)


def draw(model, reference, tokenizer, prompts, sampling):
    """What `evaluate` draws from a model: its own way of sampling, from the seed."""
    config = PPOConfig(gen_len=5, **dataclasses.asdict(sampling))
    generator = torch.Generator().manual_seed(0)
    return collect_rollout(Models(model, reference, tokenizer), prompts, reward, config, generator)


def length(texts):
    return [float(len(text)) for text in texts]


def test_identical_models_gain_nothing_and_pay_nothing(tokenizer):
    found = full_evaluation(tokenizer, 0, second_scorer=length)
    x = found.given
    assert x.policy == x.reference and found.symptoms == () and found.held_out is None
    zero = Estimate(0.0, 0.0, 0.0)
    assert x.gain == zero and x.second_gain == zero
    for kl in (x.kl_exact, x.kl_sampled, x.kl_full_softmax):
        assert abs(kl.mean) < 1e-5
    assert x.equal_kl.n == pytest.approx(1.0, abs=0.02) and x.equal_kl.kl == pytest.approx(x.kl, abs=1e-5)


@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(0.8, 0, 0.7)])
def test_kl_and_perplexity_are_those_of_plain_forward_passes(tokenizer, sampling):
    """Of the same samples, a row at a time in fp64, without caches, padding or replayed sampling sets."""
    policy, reference = models(1)
    x = full_evaluation(tokenizer, settings={"sampling": sampling}).given
    drawn = {}
    for name, model in (("policy", policy), ("reference", ActorCritic(reference).eval())):
        drawn[name] = draw(model, reference, tokenizer, [PROMPTS[i % 3] for i in range(8)], sampling)
    assert drawn["policy"].responses == tuple(pair.after for pair in x.pairs)
    double = {"policy": copy.deepcopy(policy.decoder).double(), "reference": copy.deepcopy(reference).double()}

    def logprobs(name, rollout, row):
        tokens = rollout.tokens[row][rollout.mask[row].bool()]
        with torch.no_grad():
            return double[name](tokens[None])[0, -6:-1].log_softmax(-1), tokens[-5:]  # (R, V)

    full, sampled = [], []
    for row in range(8):
        (p, tokens), (q, _) = logprobs("policy", drawn["policy"], row), logprobs("reference", drawn["policy"], row)
        full.append((p.exp() * (p - q)).sum().item())
        sampled.append((p - q)[range(5), tokens].sum().item())
    assert x.kl_full_softmax.mean == pytest.approx(sum(full) / 8, rel=1e-4)
    if not sampling.truncates:
        assert x.kl_exact.mean == pytest.approx(sum(full) / 8, rel=1e-4)
        assert x.kl_sampled.mean == pytest.approx(sum(sampled) / 8, rel=1e-3)
    else:
        assert x.kl_exact.mean == pytest.approx(drawn["policy"].exact_kl.sum(-1).mean().item(), rel=1e-5)
        assert x.kl == max(x.kl_exact.mean, x.kl_full_softmax.mean)
    for name, figures in (("policy", x.policy), ("reference", x.reference)):
        nll = []
        for row in range(8):
            q, tokens = logprobs("reference", drawn[name], row)
            nll += (-q[range(5), tokens]).tolist()
        assert figures.perplexity == pytest.approx(math.exp(sum(nll) / 40), rel=1e-4)


def test_figures_are_those_of_the_samples(tokenizer):
    x = full_evaluation(tokenizer, second_scorer=length).given
    for figures, texts, rewards in (
        (x.policy, [p.after for p in x.pairs], [p.after_reward for p in x.pairs]),
        (x.reference, [p.before for p in x.pairs], [p.before_reward for p in x.pairs]),
    ):
        assert figures.reward == Bootstrap(200).mean(rewards)
        assert x.policy.unit == x.reference.unit == unit_of([p.before for p in x.pairs])
        parts = [text.split() if figures.unit == "word" else list(text) for text in texts]
        for n in (1, 2, 3):
            grams = [tuple(part[i : i + n]) for part in parts for i in range(len(part) - n + 1)]
            assert getattr(figures, f"distinct_{n}") == pytest.approx(len(set(grams)) / max(1, len(grams)))
        assert figures.self_bleu == pytest.approx(self_bleu(parts))
        assert figures.characters == pytest.approx(sum(map(len, texts)) / 8)
        assert figures.tokens == 5 and [p.prompt for p in x.pairs] == [PROMPTS[i % 3] for i in range(8)]
        assert figures.repeated == pytest.approx(sum(1 - len(set(x)) / len(x) for x in parts) / 8)
        assert rewards == [reward([p.prompt + t])[0] for p, t in zip(x.pairs, texts, strict=True)]
        whole = [len(p.prompt + t) for p, t in zip(x.pairs, texts, strict=True)]
        assert figures.second.mean == pytest.approx(sum(whole) / 8)
    assert x.gain.mean == pytest.approx(x.policy.reward.mean - x.reference.reward.mean)
    assert x.gain == Bootstrap(200).mean([p.after_reward - p.before_reward for p in x.pairs])
    assert x.second_gain.mean == pytest.approx(x.policy.second.mean - x.reference.second.mean)


def test_best_of_n_is_that_of_the_reference_at_every_n_and_at_equal_kl(tokenizer):
    _, reference = models(1)
    x = full_evaluation(tokenizer, second_scorer=length, settings={"best_of": (4, 2, 2)}).given
    assert [point.n for point in x.best_of_n] == [2, 4]
    n = x.equal_kl.n
    assert x.equal_kl.kl == pytest.approx(x.kl, rel=1e-6) and best_of_n_kl(n) == pytest.approx(x.kl, rel=1e-6)
    candidates = max(4, math.ceil(n))
    best = best_of_n(
        reference, [PROMPTS[i % 3] for i in range(6)], reward, candidates, tokenizer=tokenizer, gen_len=5,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    scores = best.candidate_scores.numpy()
    lengths = [[len(p + text) for text in row] for p, row in zip(best.prompts, best.candidates, strict=True)]
    for point in (*x.best_of_n, x.equal_kl):
        assert point.reward.mean == pytest.approx(expected_best_of_n(scores, point.n).mean())
        expected = expected_best_of_n(scores, point.n, np.array(lengths, dtype=float)).mean()
        assert point.second.mean == pytest.approx(expected)
    assert x.best_of_n[0].reward.mean < x.best_of_n[1].reward.mean
    assert x.ahead.mean == pytest.approx(x.policy.reward.mean - x.equal_kl.reward.mean)


def test_a_truncated_policy_is_charged_with_the_larger_kl(tokenizer):
    x = full_evaluation(tokenizer, settings={"sampling": SamplingConfig(top_p=0.5)}).given
    assert x.kl_exact.mean < 0.9 * x.kl_full_softmax.mean  # or this test would show nothing
    assert x.equal_kl.kl == pytest.approx(x.kl_full_softmax.mean)


def test_a_kl_that_no_best_of_n_reaches_is_said_to_be_so(tokenizer):
    """A policy that writes one character for ever is further away than any choice among 64 samples."""
    x = hacked(tokenizer).given
    assert x.kl > best_of_n_kl(MAX_N) and x.equal_kl is None and x.ahead is None
    assert any("is beyond" in line for line in hacked(tokenizer).lines())


def test_best_of_n_is_followed_no_further_than_asked(tokenizer):
    x = full_evaluation(tokenizer, settings={"max_n": 4}).given
    assert x.kl > best_of_n_kl(4) and x.equal_kl is None and [point.n for point in x.best_of_n] == [2, 4]


def test_eos_ends_responses(tokenizer):
    """At an id that the policy writes often, lengths differ, and what follows is neither text nor KL."""
    policy, reference = models(1)
    often = collections.Counter(
        draw(policy, reference, tokenizer, PROMPTS * 9, SamplingConfig()).tokens[:, -5:].flatten().tolist()
    ).most_common(1)[0][0]  # fmt: skip
    x = full_evaluation(tokenizer, settings={"eos_token_id": often}).given
    assert 1 <= x.policy.tokens < 5
    assert math.isfinite(x.policy.perplexity) and math.isfinite(x.kl)


def test_a_language_with_spaces_is_measured_in_words(tokenizer):
    class Spaced:
        """Decodes every token to a word of its own."""

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __len__(self):
            return len(tokenizer)

        def decode_response(self, prompt_ids, ids):
            return [f"{' ' * (n > 0)}word{'abcdefghij'[int(i) % 10]}" for n, i in enumerate(ids)]

    x = full_evaluation(Spaced()).given
    assert x.policy.unit == "word" and x.policy.characters == 29 and x.policy.tokens == 5
    grams = [tuple(pair.after.split()[i : i + 2]) for pair in x.pairs for i in range(4)]
    assert x.policy.distinct_2 == pytest.approx(len(set(grams)) / len(grams))
    assert any("distinct-2, by word" in row for row in x.rows())


def test_the_optimum_is_that_of_all_samples_of_the_reference(tokenizer):
    """Those before training and those for best-of-n, the policy's exact KL beside it."""
    settings = {"samples": 300, "best_of_prompts": 30, "best_of": (4,), "kl_coef": 0.2}
    x = full_evaluation(tokenizer, 0, settings=settings).given
    assert x.spending.needed is not None and x.spending.kl == x.kl_exact and x.spending.reward == x.policy.reward
    assert 0 <= x.spending.needed.kl.mean < 0.05 and x.spending.distribution == "in the full softmax"
    assert len(x.frontier) == 25 and x.frontier[-1].effective_samples >= 99
    assert any(row[0] == "KL exact that the optimum needs" for row in x.rows())
    assert any(remark.startswith("optimum: reward ") for remark in x.remarks())
    summary = x.summary()
    assert summary["optimum/kl"] == x.spending.needed.kl.mean and x.optimum == str(x.spending)
    assert summary["objective/optimum"] > summary["objective/policy"] == pytest.approx(x.policy.reward.mean, abs=1e-5)
    assert (summary["kl"], summary["reference/distinct_2"]) == (x.kl_exact.mean, x.reference.distinct_2)
    truncated = full_evaluation(tokenizer, settings={**settings, "sampling": SamplingConfig(top_p=0.9)}).given
    assert truncated.spending.kl == truncated.kl_exact and "sampled with top-p 0.9" in truncated.optimum
    for value in (0.5, 0.3):  # in fp32 .3 is another number
        constant = full_evaluation(tokenizer, reward_fn=lambda texts: [value] * len(texts)).given  # noqa: B023
        assert constant.spending is None and f"rewards are {value}: every policy is as good" in constant.optimum
        assert "optimum/kl" not in constant.summary()
    few = full_evaluation(tokenizer, 0).given
    assert few.frontier == () and "at least 100 in all, 10 of each prompt, are needed" in few.spending.note


def test_many_prompts_need_more_samples_and_equal_ones_count_once(tokenizer):
    settings = {"samples": 8, "best_of_prompts": 4, "best_of": (2,)}
    many = full_evaluation(tokenizer, prompts=list("酒店周围位置"), settings=settings).given
    assert many.spending is None
    assert many.optimum.endswith("at least 2 rewards needed, got shape (1,): draw more samples, or give fewer prompts")
    once, often = (full_evaluation(tokenizer, prompts=p, settings=settings).given for p in (["酒店"], ["酒店"] * 3))
    assert once == often


def test_held_out_prompts_are_looked_at_on_their_own(tokenizer):
    both = full_evaluation(tokenizer, held_out_prompts=["房间", "早餐"])
    assert both.held_out.prompts == ("房间", "早餐")
    assert {pair.prompt for pair in both.held_out.pairs} == {"房间", "早餐"}
    assert both.given == full_evaluation(tokenizer).given
    assert both.held_out == full_evaluation(tokenizer, prompts=["房间", "早餐"]).given
    assert list(both.comparisons) == ["given prompts", "held-out prompts"]


def test_a_plain_gpt2_is_a_policy_and_the_seed_decides(tokenizer):
    policy, reference = models(1)
    config = EvaluationConfig(**SMALL)
    found = evaluate(policy.decoder, reference, tokenizer, PROMPTS, reward, config=config)
    assert found == full_evaluation(tokenizer) != full_evaluation(tokenizer, settings={"seed": 3})


def test_evaluating_leaves_models_and_random_states_alone(tokenizer):
    policy, reference = models(1)
    before = [p.clone() for p in (*policy.parameters(), *reference.parameters())]
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    full_evaluation(tokenizer)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()  # noqa: NPY002
    assert all(map(torch.equal, before, (*policy.parameters(), *reference.parameters())))


def test_as_json_it_is_whole(tokenizer):
    found = full_evaluation(tokenizer, held_out_prompts=["房间"], second_scorer=length)
    content = json.loads(json.dumps(found.as_dict(), allow_nan=False))
    assert content["given"]["policy"]["reward"]["low"] == found.given.policy.reward.low
    assert content["held_out"]["best_of_n"][1]["n"] == 4 and len(content["given"]["pairs"]) == 8
    assert content["settings"]["samples"] == 8 and content["settings"]["sampling"]["top_p"] == 1.0


# ---- hacking --------------------------------------------------------------------------------------------------------


@functools.cache
def hacked(tokenizer):
    """The reward counts 好; the reference writes any Chinese character, and the policy little else than that one."""
    reference = make_gpt2(0, n_embd=16, n_layer=1, n_head=2, scale=1.0)
    with torch.no_grad():
        reference.ln_f.weight[0], reference.ln_f.bias[0] = 0.0, 4.0
        reference.wte.weight[:, 0] = torch.tensor([2.0 if token in CHINESE else -2.0 for token in tokenizer.vocab])
    policy = copy.deepcopy(reference)
    with torch.no_grad():
        policy.wte.weight[tokenizer.vocab.index("好"), 0] = 4.0
    second = NGramScorer({"好": 1.0, "好好": -3.0}, 0.0)
    return evaluate(
        policy, reference, tokenizer, ["酒店", "房间"], lambda texts: [text.count("好") / len(text) for text in texts],
        ["早餐"], second, EvaluationConfig(samples=24, gen_len=8, best_of=(2,), best_of_prompts=4, resamples=200),
    )  # fmt: skip


def test_what_the_reference_finds_impossible_has_a_perplexity_that_json_can_hold(tokenizer):
    """Logits that are thousands of nats apart."""
    policy, reference = (make_gpt2(seed, n_embd=16, n_layer=1, n_head=2, scale=3000.0) for seed in (1, 0))
    x = evaluate(policy, reference, tokenizer, PROMPTS, reward, config=EvaluationConfig(**SMALL)).given
    assert 1e100 < x.policy.perplexity < math.inf and x.equal_kl is None
    assert json.dumps(dataclasses.asdict(x), allow_nan=False)


def test_a_policy_that_hacks_its_reward_is_caught(tokenizer):
    found = hacked(tokenizer)
    assert found.given.gain.low > 0.3
    said = "\n".join(found.symptoms)
    for part in ("the second scorer did not", "lost variety", "are alike", "repeat themselves", "on held-out prompts"):
        assert part in said


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("options", "message"), [
    ({"prompts": []}, "got no prompts"), ({"prompts": "酒店"}, "prompts must be a collection of texts"),
    ({"held_out_prompts": []}, "got no prompts"), ({"prompts": ["酒店", ""]}, "empty"),
    ({"held_out_prompts": ["好" * 100]}, "has 101 tokens; .*gen_len=5 leave room for 59"),
    ({"held_out_prompts": ["房间", "酒店"]}, "must not be among the given ones, as is '酒店'"),
    ({"reward_fn": lambda texts: [math.nan] * len(texts)}, "nan"),
    ({"second_scorer": lambda texts: [1.0]}, "the second scorer: "),
    ({"reward_fn": "weights/reward"}, "a reward must be callable, got 'weights/reward' of type str; .*load_scorer"),
])  # fmt: skip
def test_bad_input_to_evaluate_is_one_clear_error(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        full_evaluation(tokenizer, **options)


def test_prompts_are_checked_before_anything_is_sampled(tokenizer):
    def never(texts):
        raise AssertionError

    with pytest.raises(ValueError, match="empty"):
        full_evaluation(tokenizer, held_out_prompts=[""], reward_fn=never)
    with pytest.raises(ValueError, match="the model's 8 positions less gen_len=5 leave room for 3"):
        evaluate(make_gpt2(0, n_positions=8), make_gpt2(0), tokenizer, ["酒店"], never, ["房间干净服务"],
                 config=EvaluationConfig(**SMALL))  # fmt: skip


def test_what_other_libraries_have_is_refused_by_name(tokenizer):
    for arguments, config, message in [
        ((make_gpt2(0), torch.nn.Linear(1, 1), tokenizer), None, "got a torch Linear: save it with"),
        ((make_gpt2(0), make_gpt2(1), "gpt2"), None, "must be a minirlhf.Tokenizer, got a str"),
        ((make_gpt2(0), make_gpt2(1), tokenizer), {"samples": 4}, r"it is EvaluationConfig\(\*\*config\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate(*arguments, PROMPTS, reward, config=config)


@pytest.mark.parametrize(("policy", "reference", "message"), [
    (dict(vocab_size=7), {}, "the policy was made for 7"), ({}, dict(vocab_size=7), "the reference was made for 7"),
])  # fmt: skip
def test_models_of_another_vocabulary_are_refused(tokenizer, policy, reference, message):
    with pytest.raises(ValueError, match=message):
        evaluate(make_gpt2(0, **policy), make_gpt2(0, **reference), tokenizer, PROMPTS, reward)


@pytest.mark.parametrize(("settings", "message"), [
    ({"samples": 1}, "EvaluationConfig.samples must be at least 2, got 1"), ({"gen_len": 0}, "gen_len"),
    ({"best_of": ()}, "best_of must be a tuple of integers from 1 to 64, got \\(\\)"), ({"best_of": (65,)}, "best_of"),
    ({"max_n": 65}, "max_n"), ({"max_n": 3, "best_of": (4,)}, "from 1 to 3"), ({"best_of": (2.0,)}, "best_of"),
    ({"best_of": 4}, "best_of"), ({"best_of_prompts": 0}, "best_of_prompts"),
    ({"resamples": 1}, "resamples .* at least 2"), ({"seed": -1}, "seed"),
    ({"sampling": 0.9}, "sampling must be a SamplingConfig"), ({"eos_token_id": -1}, "eos_token_id"),
    ({"kl_coef": -1.0}, "kl_coef"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**settings)
