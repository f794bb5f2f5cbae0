"""The trainer's invariants: what must be 1 or 0 at the start, what must change nothing, and what must be refused."""

import copy
import dataclasses
import hashlib
import itertools
import math
import random
import time

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, ActorCritic, GPT2Config, PPOConfig, PPOTrainer, Tokenizer
from minirlhf.generation.static_decode import GraphedDecoder
from minirlhf.models import gpt2
from minirlhf.rl.statistics import mean_stats, read_stats

PROMPTS = ["酒店很好", "w", "房间干净", "早餐"]
EOS = VOCAB.index("##a")
SMALL = dict(n_embd=16, n_layer=1, n_head=2)
DEFAULTS = dict(
    steps=8, batch_size=4, minibatch_size=2, forward_batch_size=2, gen_len=5, ppo_epochs=2, lr=1e-3, device="cpu",
    adam_eps=1e-5,
)  # fmt: skip


def reward(texts):
    return [len(set(text)) / 8 for text in texts]


def make_trainer(ref_seed=1, dtype=torch.float32, **settings):
    """A small policy with a value head away from zero, and a reference; equal to every other one it is asked for."""
    policy = ActorCritic(make_gpt2(0, scale=4.0, **SMALL))
    with torch.no_grad():
        policy.value_head.summary.weight.normal_(generator=torch.Generator().manual_seed(0))
    reference = make_gpt2(ref_seed, scale=4.0, **SMALL)
    return PPOTrainer(policy.to(dtype), reference.to(dtype), Tokenizer(VOCAB), **{**DEFAULTS, **settings})


def batch(lengths=((3, 4), (1, 1), (6, 2), (2, 7), (4, 5)), seed=0):
    """Ragged queries and responses of these lengths, and scores."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [[torch.randint(5, len(VOCAB), (n,), generator=generator) for n in pair] for pair in lengths]
    queries, responses = zip(*pairs, strict=True)
    return list(queries), list(responses), [float(x) for x in torch.randn(len(lengths), generator=generator)]


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}


def same(a, b, atol=0.0):
    assert a.keys() == b.keys()
    for name in a:
        if atol == 0:
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol, msg=name)


def figures(stats):
    return {name: value for name, value in stats.items() if not name.startswith("time/")}


def same_figures(a, b, **tolerance):
    assert figures(a).keys() == figures(b).keys()
    for name, value in figures(a).items():
        assert b[name] == pytest.approx(value, **tolerance), name


def fingerprint(module):
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


# ---- at the start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(top_p=1.0), dict(top_p=0.8, temperature=0.7), dict(top_p=1.0, top_k=9)])
def test_the_first_ratio_is_one(settings):
    trainer = make_trainer(batch_size=8, minibatch_size=3, eos_token_id=EOS, gen_len=9, **settings)
    rollout = trainer.collect(PROMPTS * 2, reward)
    for rows in (torch.tensor([0, 3, 5]), torch.tensor([1]), torch.arange(8)):
        part = rollout.rows(rows)
        scored = trainer.policy.score(
            part.tokens, part.mask, part.response_mask.size(1), trainer.config.temperature, part.sampling_sets
        )
        assert ((scored.logprobs - part.logprobs).exp() - 1).abs().max() < 1e-5
    stats = trainer.step(rollout)
    assert stats["ppo/policy/first_ratio_error"] < 1e-5
    assert stats["ppo/policy/approxkl"] > 1e-9  # later minibatches have moved


def test_before_the_first_update_there_is_no_kl_to_itself_and_nothing_is_clipped():
    trainer = make_trainer(ppo_epochs=1, minibatch_size=5)
    stats = trainer.step(*batch())
    assert stats["ppo/policy/approxkl"] < 1e-10
    assert stats["ppo/policy/clipfrac"] == stats["ppo/val/clipfrac"] == 0.0
    assert stats["ppo/updates"] == 1.0
    # -mean(A) of advantages that were whitened over these very tokens
    assert abs(stats["ppo/loss/policy"]) < 1e-5


def test_the_kl_of_a_policy_to_its_own_copy_is_zero():
    trainer = make_trainer(ref_seed=0)
    stats = trainer.step(*batch())
    for name in ("kl", "kl_k2", "kl_k3", "kl_exact"):
        assert abs(stats[f"objective/{name}"]) < 1e-5, name
    assert make_trainer(ref_seed=1).step(*batch())["objective/kl_exact"] > 0.1


def test_the_figures_of_a_step_by_hand():
    queries, responses, _ = batch()
    scores = [1.0, 2.0, 3.0, 4.0, 5.0]
    trainer = make_trainer(ppo_epochs=3, init_kl_coef=0.25, horizon=100.0)
    stats = trainer.step(queries, responses, scores)
    assert stats["reward/mean"] == pytest.approx(3.0)
    assert stats["reward/std"] == pytest.approx(math.sqrt(2.0))
    assert stats["tokens/response"] == pytest.approx((4 + 1 + 2 + 7 + 5) / 5)
    assert stats["ppo/updates"] == 3 * 3  # 5 rows in minibatches of 2: the last has one
    assert stats["ppo/lr"] == 1e-3
    assert stats["objective/kl_coef"] == 0.25  # the one of this step, not of the next
    expected = 3.0 - 0.25 * stats["objective/kl"]
    assert stats["objective/reward_with_kl"] == pytest.approx(expected, rel=1e-5)
    assert all(math.isfinite(value) for value in stats.values())


# ---- what must change nothing ---------------------------------------------------------------------------------------


def test_the_order_of_the_rows_changes_nothing():
    rows = batch()
    order = [3, 0, 4, 2, 1]
    one, other = (make_trainer(dtype=torch.float64, minibatch_size=5, forward_batch_size=5) for _ in range(2))
    first = one.step(*rows)
    second = other.step(*([part[i] for i in order] for part in rows))
    same_figures(first, second, rel=1e-9, abs=1e-12)
    same(weights(one), weights(other), 1e-12)


def test_more_padding_and_what_stands_there_change_nothing():
    one, other = (
        make_trainer(dtype=torch.float64, batch_size=5, minibatch_size=5, eos_token_id=EOS, gen_len=9) for _ in range(2)
    )
    rollout = one.collect([*PROMPTS, "好"], reward)
    R = rollout.response_mask.size(1)
    generator = torch.Generator().manual_seed(0)

    def wider(x, left, right, junk):
        sides = [junk(x[:, :1].expand(-1, n, *x.shape[2:])) for n in (left, right)]
        return torch.cat([sides[0], x, sides[1]], 1)

    fields = {}
    for field in dataclasses.fields(rollout):
        x = getattr(rollout, field.name)
        if field.name == "tokens":
            x = torch.where(rollout.mask.bool(), x, torch.randint(0, len(VOCAB), x.shape, generator=generator))
            x = wider(x, 3, 2, lambda y: torch.full_like(y, 7))
        elif field.name == "mask":
            x = wider(x, 3, 2, torch.zeros_like)
        elif isinstance(x, torch.Tensor) and x.ndim >= 2:
            if x.is_floating_point():
                x = torch.where(rollout.response_mask, x, 1e6)
                x = wider(x, 0, 2, lambda y: torch.full_like(y, float("nan")))
            else:
                x = wider(x, 0, 2, torch.zeros_like)
        fields[field.name] = x
    padded = dataclasses.replace(rollout, **fields)
    assert padded.response_mask.shape == (5, R + 2)
    same_figures(one.step(rollout), other.step(padded), rel=1e-9, abs=1e-12)
    same(weights(one), weights(other), 1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_size_of_micro_batches_changes_nothing(size):
    whole, cut = (make_trainer(dtype=torch.float64, minibatch_size=5, forward_batch_size=n) for n in (5, size))
    first, second = (trainer.step(*batch()) for trainer in (whole, cut))
    same(weights(whole), weights(cut), 1e-12)
    same_figures(first, second, rel=1e-9, abs=1e-12)


def test_token_lists_and_rollout_train_alike_when_nothing_is_truncated():
    one, other = (make_trainer(dtype=torch.float64, top_p=1.0, temperature=0.8, eos_token_id=EOS) for _ in range(2))
    rollout = one.collect(PROMPTS, reward)
    R = rollout.response_mask.size(1)
    queries = [row[m.bool()] for row, m in zip(rollout.tokens[:, :-R], rollout.mask[:, :-R], strict=True)]
    responses = [row[m] for row, m in zip(rollout.tokens[:, -R:], rollout.response_mask, strict=True)]
    first, second = one.step(rollout), other.step(queries, responses, rollout.scores)
    same_figures(first, second, rel=1e-9, abs=1e-12)
    same(weights(one), weights(other), 1e-12)


def test_a_step_changes_none_of_its_inputs():
    queries, responses, _ = rows = batch()
    rows = (queries, responses, torch.tensor(rows[2]))
    before = copy.deepcopy(rows)
    trainer = make_trainer(top_p=0.8, eos_token_id=EOS)
    trainer.step(*rows)
    for a, b in zip([*rows[0], *rows[1], rows[2]], [*before[0], *before[1], before[2]], strict=True):
        assert torch.equal(a, b)
    rollout = trainer.collect(PROMPTS, reward)
    kept = copy.deepcopy(rollout)
    trainer.step(rollout)
    for field in dataclasses.fields(rollout):
        a, b = getattr(rollout, field.name), getattr(kept, field.name)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, field.name


def test_the_reference_never_changes_and_the_policy_does():
    trainer = make_trainer()
    reference, policy = fingerprint(trainer.ref_policy), weights(trainer)
    trainer.train(PROMPTS, reward)
    assert fingerprint(trainer.ref_policy) == reference
    assert all(not torch.equal(policy[name], p) for name, p in trainer.policy.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in trainer.ref_policy.parameters())


def test_frozen_parameters_stay():
    policy = ActorCritic(make_gpt2(0, **SMALL))
    policy.gpt2.wte.requires_grad_(False)
    policy.gpt2.wpe.requires_grad_(False)
    trainer = PPOTrainer(policy, make_gpt2(1, **SMALL), Tokenizer(VOCAB), **DEFAULTS)
    before = weights(trainer)
    trainer.step(*batch())
    for name, p in trainer.policy.named_parameters():
        assert torch.equal(p, before[name]) == (not p.requires_grad), name


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    runs = []
    for seed in (5, 5, 6):
        trainer = make_trainer(seed=seed, eos_token_id=EOS)
        history = trainer.train(PROMPTS, reward)
        runs.append(([figures(stats) for stats in history], weights(trainer)))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    same(runs[0][1], runs[1][1])


def test_the_global_random_states_are_not_touched():
    trainer = make_trainer()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    trainer.train(PROMPTS, reward)
    trainer.step(*batch())
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_making_a_trainer_does_not_touch_the_global_random_state():
    policy, reference = (make_gpt2(seed, **SMALL) for seed in range(2))
    state = torch.get_rng_state()
    PPOTrainer(policy, reference, Tokenizer(VOCAB), **DEFAULTS)
    assert torch.equal(torch.get_rng_state(), state)


def test_dropout_is_off_even_if_the_policy_was_put_into_training_mode():
    trainer = make_trainer()
    trainer.policy.train()
    expected = make_trainer()
    rows = batch()
    same_figures(expected.step(*rows), trainer.step(*rows), rel=0, abs=0)
    same(weights(expected), weights(trainer))


# ---- settings that must do what they say ----------------------------------------------------------------------------


def test_target_kl_stops_the_epochs():
    # One minibatch an epoch: the first epoch has no KL yet, the second has.
    settings = dict(minibatch_size=5, ppo_epochs=4)
    assert make_trainer(target_kl=1e-12, **settings).step(*batch())["ppo/updates"] == 2
    assert make_trainer(target_kl=1e9, **settings).step(*batch())["ppo/updates"] == 4
    assert make_trainer(**settings).step(*batch())["ppo/updates"] == 4


def learning_rates(**settings):
    """Of every optimizer step of a run of 3 batches, 2 epochs and 2 minibatches."""
    trainer = make_trainer(steps=12, **settings)
    seen = []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"] / 1e-3))
    trainer.train(PROMPTS, reward)
    assert len(seen) == 3 * 2 * 2
    return seen


def test_a_linear_schedule_falls_evenly_over_all_optimizer_steps():
    assert learning_rates(lr_schedule="linear") == pytest.approx([1 - k / 12 for k in range(12)])


def test_a_cosine_schedule_is_a_cosine_over_all_optimizer_steps():
    expected = [(1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)]
    assert learning_rates(lr_schedule="cosine") == pytest.approx(expected)


def test_a_constant_schedule_is_constant():
    assert learning_rates() == pytest.approx([1.0] * 12)


def test_a_warm_up_rises_to_the_peak():
    seen = learning_rates(lr_warmup=0.5)
    assert all(a < b for a, b in itertools.pairwise(seen[:7]))
    assert seen[6:] == pytest.approx([1.0] * 6)


def test_an_entropy_bonus_raises_the_entropy():
    """Without reward and KL the bonus is all there is."""
    changes = []
    queries, responses, _ = batch()
    for coef in (0.0, 1.0):
        trainer = make_trainer(entropy_coef=coef, init_kl_coef=0.0, vf_coef=0.0, minibatch_size=5, temperature=0.2)
        with torch.no_grad():
            trainer.policy.value_head.summary.weight.zero_()
        runs = [trainer.step(queries, responses, [0.0] * 5)["objective/entropy"] for _ in range(3)]
        changes.append(runs[-1] - runs[0])
    assert abs(changes[0]) < 1e-3
    assert changes[1] > 0.5


def test_the_adaptive_coefficient_follows_the_kl_and_the_fixed_one_stays():
    settings = dict(horizon=100.0, init_kl_coef=0.1)
    for target, factor in ((1e-6, 1.01), (1e6, 0.99)):  # 5 episodes: 1 +- 0.2 * 5 / 100
        trainer = make_trainer(target=target, **settings)
        coefs = [trainer.step(*batch())["objective/kl_coef"] for _ in range(3)]
        assert coefs == pytest.approx([0.1, 0.1 * factor, 0.1 * factor**2])
    trainer = make_trainer(target=1e-6, adaptive_kl=False, **settings)
    assert [trainer.step(*batch())["objective/kl_coef"] for _ in range(3)] == [0.1] * 3


def test_the_controller_may_aim_at_the_kl_of_a_token():
    settings = dict(horizon=100.0, init_kl_coef=0.1)
    kl = make_trainer(**settings).step(*batch())["objective/kl"]
    tokens = (4 + 1 + 2 + 7 + 5) / 5
    target = kl / tokens / 1.1  # a tenth above the target, in tokens
    for unit, factor in (("token", 1 + 0.1 * 5 / 100), ("sequence", 1 + 0.2 * 5 / 100)):
        trainer = make_trainer(target=target, kl_unit=unit, **settings)
        trainer.step(*batch())
        assert trainer.step(*batch())["objective/kl_coef"] == pytest.approx(0.1 * factor, rel=1e-6)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(score_scale=0.5), [1.0, -2.0, 0.5, 3.0, 0.0]),
        (dict(score_clip=1.5), [1.5, -1.5, 1.0, 1.5, 0.0]),
        (dict(score_scale=0.5, score_clip=1.5), [1.0, -1.5, 0.5, 1.5, 0.0]),
        (dict(overlong="replace", overlong_score=-3.0, max_response_tokens=4), [2.0, -4.0, 1.0, -3.0, -3.0]),
        (dict(overlong="subtract", overlong_score=1.0, max_response_tokens=4), [2.0, -4.0, 1.0, 5.0, -1.0]),
        (dict(missing_eos="replace", missing_eos_score=-9.0, eos_token_id=EOS), [2.0, -9.0, -9.0, -9.0, 0.0]),
        (dict(missing_eos="subtract", missing_eos_score=1.0, eos_token_id=EOS), [2.0, -5.0, 0.0, 5.0, 0.0]),
    ],
)
def test_scores_are_changed_as_the_settings_say(settings, expected):
    """The same as a step on scores that were changed by hand. Responses have 4, 1, 2, 7 and 5 tokens."""
    queries, responses, _ = batch()
    scores = [2.0, -4.0, 1.0, 6.0, 0.0]
    responses[0][-1] = responses[4][-1] = EOS
    responses[3][2] = EOS  # in the middle: does not end with it
    one, other = make_trainer(**settings), make_trainer()
    one.step(queries, responses, scores)
    other.step(queries, responses, expected)
    same(weights(one), weights(other))


def test_running_score_whitening_is_that_of_all_scores_so_far():
    queries, responses, _ = batch()
    one, other = (make_trainer(dtype=torch.float64, score_whitening=flag) for flag in (True, False))
    parts = [[1.0, 2.0, 4.0, 7.0, 0.0], [0.5, 3.0, 3.0, -1.0, 2.0]]
    for i in range(2):
        seen = np.concatenate(parts[: i + 1])
        one.step(queries, responses, parts[i])
        other.step(queries, responses, torch.tensor((np.array(parts[i]) - seen.mean()) / seen.std(ddof=1)))
    same(weights(one), weights(other), 1e-6)  # scores given are rounded to fp32


def token_scores(responses, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(response), generator=generator).tolist() for response in responses]


def test_scores_of_single_tokens_are_kept_and_their_sum_is_the_score():
    queries, responses, _ = batch()
    scores = token_scores(responses)
    trainer = make_trainer(init_kl_coef=0.0, dtype=torch.float64)
    rollout = trainer._rollout(queries, responses, scores)
    assert rollout.scores.tolist() == pytest.approx([sum(row) for row in scores])
    rewards, shaped = trainer._token_rewards(rollout)
    assert shaped.tolist() == rollout.scores.tolist()
    for row, given, response in zip(rewards.tolist(), scores, responses, strict=True):
        assert row == pytest.approx([*given, *[0.0] * (7 - len(response))], abs=1e-6)


@pytest.mark.parametrize("settings", [
    dict(score_scale=0.25), dict(score_whitening=True), dict(score_whitening=True, score_scale=3.0, score_clip=0.5),
    dict(score_clip=0.25), dict(overlong="replace", overlong_score=-3.0, max_response_tokens=4),
    dict(missing_eos="subtract", missing_eos_score=1.0, eos_token_id=EOS),
])  # fmt: skip
def test_shares_of_tokens_are_scaled_as_the_score_is_and_the_last_one_gets_the_rest(settings):
    queries, responses, _ = batch()
    scores = token_scores(responses)
    trainer, whole = (make_trainer(init_kl_coef=0.0, dtype=torch.float64, **settings) for _ in range(2))
    totals = [sum(row) for row in scores]
    rollout = trainer._rollout(queries, responses, scores)
    rewards, shaped = trainer._token_rewards(rollout)
    as_one, expected = whole._token_rewards(whole._rollout(queries, responses, totals))
    assert shaped.tolist() == pytest.approx(expected.tolist(), abs=1e-6)  # as for scores of whole responses
    assert rewards.sum(-1).tolist() == pytest.approx(as_one.sum(-1).tolist(), abs=1e-6)
    factor = settings.get("score_scale", 1.0)
    if "score_whitening" in settings:
        factor /= np.std([factor * x for x in totals], ddof=1) * 1.0
    for row, given in zip(rewards.tolist(), scores, strict=True):
        before_last = len(given) - 1
        assert row[:before_last] == pytest.approx([factor * x for x in given[:-1]], abs=1e-6)


def test_explaining_shows_the_rewards_of_single_tokens(capsys):
    queries, responses, _ = batch()
    scores = token_scores(responses)
    trainer = make_trainer(init_kl_coef=0.0)
    rollout = trainer._rollout(queries, responses, scores)
    trainer.step(rollout)
    shown = trainer.explain(rollout, 3)
    assert [token.reward for token in shown.tokens] == pytest.approx(scores[3], abs=1e-5)


def test_during_value_warm_up_the_value_loss_alone_is_trained():
    trainer = make_trainer(value_warmup=1)
    plain = make_trainer()
    frozen = [make_trainer(value_warmup=9, vf_coef=0.0), make_trainer(vf_coef=0.0, value_warmup=0)]
    before = weights(frozen[0])
    for each in (trainer, plain, *frozen):
        each.step(*batch())
    same(weights(frozen[0]), before)  # no value loss either
    assert not torch.equal(weights(frozen[1])["gpt2.wte.weight"], before["gpt2.wte.weight"])
    assert not torch.equal(weights(plain)["gpt2.wte.weight"], before["gpt2.wte.weight"])
    assert torch.equal(weights(trainer)["gpt2.wte.weight"], before["gpt2.wte.weight"])  # the policy itself stays
    head = "value_head.summary.weight"
    assert not torch.equal(weights(trainer)[head], before[head])


def test_scores_may_leave_the_temperature_out():
    """score_temperature=False, as TRL had it: sampled at 0.5, scored at 1."""
    trainer = make_trainer(temperature=0.5, top_p=1.0, score_temperature=False)
    rollout = trainer.collect(PROMPTS, reward)
    width = rollout.response_mask.size(1)
    with torch.no_grad():
        at_one, at_half = (trainer.policy.score(rollout.tokens, rollout.mask, width, t).logprobs for t in (1.0, 0.5))
    torch.testing.assert_close(rollout.logprobs, at_one)
    assert (rollout.logprobs - at_half).abs().max() > 0.1
    assert trainer.step(rollout)["ppo/policy/first_ratio_error"] < 1e-5  # the update scores alike


def test_a_new_value_head_is_made_as_the_settings_say():
    heads = []
    for seed in (0, 0, 1):
        config = PPOConfig(value_head="tanh", value_head_init=0.25, seed=seed, device="cpu")
        trainer = PPOTrainer(make_gpt2(0, **SMALL), make_gpt2(1, **SMALL), Tokenizer(VOCAB), config)
        heads.append(trainer.policy.value_head)
        weight = heads[-1].summary.weight
        assert heads[-1].kind == "tanh" and 0.1 < weight.abs().max() <= 0.25
    assert torch.equal(heads[0].summary.weight, heads[1].summary.weight)
    assert not torch.equal(heads[0].summary.weight, heads[2].summary.weight)
    with pytest.raises(ValueError, match="linear"):
        make_trainer(value_head="tanh")  # the policy has a linear one already


def test_every_preset_trains():
    for name in ("original", "oai2019", "trl2020", "trl0.11"):
        config = PPOConfig.preset(name, **DEFAULTS)
        trainer = PPOTrainer(make_gpt2(0, **SMALL), make_gpt2(1, **SMALL), Tokenizer(VOCAB), config)
        stats = trainer.step(trainer.collect(PROMPTS, reward))
        assert all(math.isfinite(value) for value in stats.values()), name
    with pytest.raises(ValueError, match="trl2020"):
        PPOConfig.preset("trl2021")


def test_explaining_a_row_changes_nothing_and_shows_its_tokens(tokenizer, capsys):
    trainer = make_trainer(eos_token_id=EOS, score_whitening=True)
    rollout = trainer.collect(PROMPTS, reward)
    twin = make_trainer(eos_token_id=EOS, score_whitening=True)
    explanation = trainer.explain(rollout, 1)
    length = int(rollout.response_mask[1].sum())
    row = rollout.tokens[1, -rollout.response_mask.size(1) :][:length]
    assert [t.token for t in explanation.tokens] == [VOCAB[i] for i in row]
    assert [t.ratio for t in explanation.tokens] == pytest.approx([1.0] * length, abs=1e-5)
    assert [t.old_logprob for t in explanation.tokens] == rollout.logprobs[1, :length].tolist()
    kl = rollout.logprobs - rollout.ref_logprobs
    assert [t.kl for t in explanation.tokens] == pytest.approx(kl[1, :length].tolist(), abs=1e-6)
    assert capsys.readouterr().out
    same_figures(trainer.step(rollout), twin.step(rollout), rel=0, abs=0)
    with pytest.raises(ValueError, match="4"):
        trainer.explain(rollout, 4)


def test_train_runs_all_steps_and_tells_of_each():
    trainer = make_trainer(steps=11)
    seen = []
    history = trainer.train(PROMPTS, reward, on_step=lambda rollout, stats: seen.append((len(rollout), stats)))
    assert len(history) == trainer.iteration == 3  # 11 episodes in batches of 4
    assert [stats for _, stats in seen] == history and {size for size, _ in seen} == {4}


def test_the_tokens_of_a_run_keep_to_the_pool_and_the_length():
    trainer = make_trainer()
    rollouts = []
    trainer.train(PROMPTS[:2], reward, on_step=lambda rollout, _: rollouts.append(rollout))
    assert {prompt for rollout in rollouts for prompt in rollout.prompts} <= set(PROMPTS[:2])
    assert all(rollout.response_mask.all() and rollout.response_mask.size(1) == 5 for rollout in rollouts)


def test_a_small_model_is_trained_in_fp32_by_default():
    assert PPOConfig().precision == "auto"
    auto, named = make_trainer(), make_trainer(precision="fp32")
    assert auto.precision.name == "fp32" and auto.config == named.config
    assert auto.precision_choice.reason and not named.precision_choice.reason
    assert figures(auto.step(*batch())) == figures(named.step(*batch()))


def test_on_a_cpu_memory_is_kept_and_threads_are_limited(monkeypatch):
    called = []
    for name in ("keep_freed_memory", "limit_threads"):
        monkeypatch.setattr(f"minirlhf.rl.trainer.{name}", lambda name=name: called.append(name))
    make_trainer()
    assert called == ["keep_freed_memory", "limit_threads"]


@pytest.fixture
def favourable(monkeypatch):
    """Every model is large, and every device has bf16."""
    monkeypatch.setattr("minirlhf.device.precision.LARGE_MODEL", 1)
    monkeypatch.setattr("minirlhf.device.precision_choice.has_native_bf16", lambda device: True)


def test_auto_is_bf16_for_a_large_model_and_moves_no_generator(favourable):
    state = torch.get_rng_state()
    auto, named = make_trainer(), make_trainer(precision="bf16")
    assert auto.precision.name == "bf16" and auto.config == named.config and torch.equal(torch.get_rng_state(), state)
    assert figures(auto.train(PROMPTS, reward)[-1]) == figures(named.train(PROMPTS, reward)[-1])
    same(weights(auto), weights(named))
    assert make_trainer(cliprange=1e-3).precision.name == "fp32"  # PPO bears less
    # Sharper distributions have larger ratios.
    names = [make_trainer(cliprange=0.1, temperature=t).precision.name for t in (1.0, 0.05)]
    assert names == ["bf16", "fp32"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_keeps_fp32_weights_and_finite_figures(precision):
    trainer = make_trainer(precision=precision)
    before = weights(trainer)
    history = trainer.train(PROMPTS, reward)
    for name, p in trainer.policy.named_parameters():
        assert p.dtype == torch.float32 and torch.isfinite(p).all(), name
    assert any(not torch.equal(before[name], p) for name, p in trainer.policy.named_parameters())
    for stats in history:
        assert all(math.isfinite(value) for name, value in stats.items() if name != "ppo/grad_norm")
        assert stats["ppo/policy/first_ratio_error"] < 0.05


class Casts(TorchDispatchMode):
    """Counts how often a weight of this shape is made a copy of in 16 bits."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        cast = function is torch.ops.aten._to_copy.default and result.dtype == torch.bfloat16
        self.count += cast and args[0].shape == self.shape and args[0].dtype == torch.float32
        return result


def test_weights_are_cast_once_an_optimizer_step_however_many_micro_batches_it_has():
    trainer = make_trainer(precision="bf16", minibatch_size=5, forward_batch_size=1, ppo_epochs=1)
    rows = batch()
    rollout = trainer._rollout(*rows)
    whole = make_trainer(precision="bf16", minibatch_size=5, forward_batch_size=5, ppo_epochs=1)
    with Casts(trainer.policy.gpt2.h[0].mlp.c_fc.weight.shape) as casts:
        stats = trainer.step(rollout)
    assert casts.count == 1
    same = whole.step(*rows)
    for name in ("ppo/loss/total", "ppo/grad_norm"):
        assert stats[name] == pytest.approx(same[name], rel=0.02)


def test_micro_batches_hold_rows_of_similar_length():
    trainer = make_trainer(minibatch_size=6, forward_batch_size=2, ppo_epochs=1)
    ragged = [torch.arange(1, 3 + n) for n in (9, 1, 8, 2, 9, 1)]
    seen, rows = [], trainer._rollout([torch.tensor([5])] * 6, ragged, [0.1 * i for i in range(6)])
    score = trainer.policy.score
    trainer.policy.score = lambda tokens, *rest: seen.append(tokens.size(1)) or score(tokens, *rest)
    trainer.step(rows)
    assert seen == [1 + 11, 1 + 10, 1 + 3]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_clips_the_gradient_of_the_loss_itself(precision):
    """The norm that is clipped and logged is that of fp32, not one multiplied by the loss scale."""
    norms = [
        make_trainer(precision=name, ppo_epochs=1, minibatch_size=5).step(*batch())["ppo/grad_norm"]
        for name in ("fp32", precision)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_an_adam_eps_of_zero_is_refused_or_harmless():
    """Position embeddings beyond the batch get no gradient: 0 / (sqrt(0) + 0)."""
    try:
        trainer = make_trainer(adam_eps=0.0)
    except ValueError:
        return
    trainer.step(*batch())
    assert all(torch.isfinite(p).all() for p in trainer.policy.parameters())


def test_a_tiny_task_is_learned():
    """The share of Chinese characters in the response; at random most tokens are something else."""
    policy, reference = (GPT2(GPT2Config(vocab_size=len(VOCAB), n_positions=16, **SMALL)) for _ in range(2))
    trainer = PPOTrainer(
        policy, reference, Tokenizer(VOCAB), steps=32 * 32, batch_size=32, minibatch_size=16, forward_batch_size=16,
        gen_len=4, lr=1e-2, top_p=1.0, device="cpu", init_kl_coef=0.01,
    )  # fmt: skip

    def share_of_chinese(prompts, responses):
        return [sum("一" <= c <= "龥" for c in text) / max(len(text), 1) for text in responses]

    history = trainer.train(["好", "酒", "服"], share_of_chinese)
    rewards = [stats["reward/mean"] for stats in history]
    assert rewards[0] < 0.3
    assert sum(rewards[-3:]) / 3 > 0.9
    assert history[-1]["objective/kl"] > 0.1
    assert history[-1]["objective/entropy"] < history[0]["objective/entropy"]


def test_each_token_learns_from_its_own_score():
    """With gamma = 0 nothing comes back from later tokens: a score at the last one teaches the others nothing."""

    def is_chinese(prompts, responses, tokens):
        return [[float(any("一" <= c <= "龥" for c in token)) for token in row] for row in tokens]

    def total(prompts, responses):
        return [sum("一" <= c <= "龥" for c in text) for text in responses]

    shares = []
    for reward in (is_chinese, total):
        policy, reference = (GPT2(GPT2Config(vocab_size=len(VOCAB), n_positions=16, **SMALL)) for _ in range(2))
        trainer = PPOTrainer(
            policy, reference, Tokenizer(VOCAB), steps=32 * 16, batch_size=32, minibatch_size=16,
            forward_batch_size=32, gen_len=4, lr=1e-2, top_p=1.0, device="cpu", init_kl_coef=0.0, gamma=0.0,
        )  # fmt: skip
        last = []
        trainer.train(["好", "酒", "服"], reward, lambda rollout, _, last=last: last.append(rollout))
        tokens = torch.cat([rollout.tokens[:, -4:-1] for rollout in last[-3:]])  # all but the last token
        chinese = torch.tensor(["一" <= token[0] <= "龥" for token in VOCAB])
        shares.append(chinese[tokens].float().mean().item())
    assert shares[0] > 0.9 and shares[0] > shares[1] + 0.1


# ---- edges ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[(3, 4)], [(1, 1)], [(2, 1), (5, 1)], [(1, 1), (1, 40)]])
def test_small_and_uneven_batches_train(lengths):
    trainer = make_trainer()
    before = weights(trainer)
    stats = trainer.step(*batch(lengths))
    assert all(math.isfinite(value) for value in stats.values())
    assert any(not torch.equal(before[name], p) for name, p in trainer.policy.named_parameters())
    assert all(torch.isfinite(p).all() for p in trainer.policy.parameters())


def test_scores_may_be_a_list_of_numbers_of_tensors_or_a_tensor():
    queries, responses, scores = batch()
    forms = [scores, tuple(scores), [torch.tensor(x) for x in scores], torch.tensor(scores), np.array(scores)]
    results = []
    for form in forms:
        trainer = make_trainer()
        trainer.step(queries, responses, form)
        results.append(weights(trainer))
    for result in results[1:]:
        same(results[0], result)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("batchsize", "batch_size"), ("mini_batch_size", "minibatch_size"), ("kl_coef", "init_kl_coef"),
     ("clip_range", "cliprange"), ("learning", "")],
)  # fmt: skip
def test_an_unknown_setting_suggests_the_nearest(wrong, near):
    with pytest.raises(ValueError, match=rf"{wrong}.*{near}"):
        make_trainer(**{wrong: 1})


INTEGERS = ("steps", "batch_size", "forward_batch_size", "gen_len", "save_freq", "ppo_epochs", "minibatch_size")
POSITIVE = ("lr", "target", "horizon", "cliprange", "cliprange_value", "max_grad_norm", "log_ratio_limit")
NAN = float("nan")
BAD_FIELDS = [
    *((name, value) for name in (*INTEGERS, "max_bad_steps") for value in (0, -1, 1.5, "4", None, True)),
    *((name, value) for name in POSITIVE for value in (0, -1.0, NAN, "1")),
    *((name, None) for name in POSITIVE if name != "max_grad_norm"),  # None: no clipping
    *((name, value) for name in ("init_kl_coef", "vf_coef", "entropy_coef", "adam_eps") for value in (-0.1, NAN, "1")),
    *((name, value) for name in ("gamma", "lam", "lr_warmup") for value in (-0.1, 1.1, NAN, "1")),
    *(("target_kl", value) for value in (0, -1.0, NAN, "1")),
    *(("temperature", value) for value in (0, -1.0, NAN, math.inf)),
    *(("top_p", value) for value in (0, 1.5, NAN)),
    *(("top_k", value) for value in (-1, 0.5)),
    *(("lr_schedule", value) for value in ("step", None)),
    *(("precision", value) for value in ("fp8", None)),
    *(("dual_clip", value) for value in (1.0, 0.5, NAN, "2")),
    *(("value_warmup", value) for value in (-1, 1.5)),
    *(("score_clip", value) for value in (0, -1.0)),
    *((name, value) for name in ("score_scale", "missing_eos_score", "overlong_score") for value in (NAN, "1")),
    *((name, "other") for name in ("kl_estimator", "kl_placement", "kl_unit", "missing_eos", "overlong", "value_head")),
    *((name, "other") for name in ("whiten_scope", "loss_averaging", "score_position")),
    *(("reward_timeout", value) for value in (0, -1.0, NAN, math.inf, "1")),
    ("whiten_ddof", 2),
    ("missing_eos", "replace"),  # without an eos_token_id
    ("lr", math.inf),
    ("device", "nowhere"),
    ("gen_len", 64),
    ("eos_token_id", len(VOCAB)),
    ("eos_token_id", -1),
    ("eos_token_id", 1.5),
    ("temperature", "1"),
    ("top_p", "1"),
    ("seed", 1.5),
    ("seed", "a"),
    ("adaptive_kl", "no"),
    ("score_full_softmax", "no"),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_bad_setting_is_refused_by_its_name(field, value):
    with pytest.raises(ValueError, match=field):
        make_trainer(**{field: value})


@pytest.mark.parametrize("value", [None, 0, 2.5])
def test_a_penalty_for_length_needs_a_length(value):
    with pytest.raises(ValueError, match="max_response_tokens"):
        PPOConfig(overlong="replace", max_response_tokens=value)


def test_settings_cannot_be_changed_afterwards():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPOConfig().lr = 1.0


def test_overrides_replace_fields_of_a_given_config():
    base = PPOConfig(lr=0.5, gen_len=3)
    config = PPOConfig.with_overrides(base, lr=0.25)
    assert (config.lr, config.gen_len, base.lr) == (0.25, 3, 0.5)


def ids(*values):
    return torch.tensor(values)


GOOD = [ids(5, 6), ids(7)]
BAD_BATCHES = {
    "one score too few": (GOOD, GOOD, [1.0]),
    "one score too many": (GOOD, GOOD, [1.0, 2.0, 3.0]),
    "a score that is not a number": (GOOD, GOOD, [1.0, NAN]),
    "an infinite score": (GOOD, GOOD, [1.0, math.inf]),
    "scores as a column": (GOOD, GOOD, torch.ones(2, 1)),
    "a token without a score": (GOOD, GOOD, [[1.0], [2.0]]),
    "a score without a token": (GOOD, GOOD, [[1.0, 2.0], [2.0, 3.0]]),
    "token scores of too few responses": (GOOD, GOOD, [[1.0, 2.0]]),
    "a token score that is not a number": (GOOD, GOOD, [[1.0, NAN], [2.0]]),
    "token scores and a score": (GOOD, GOOD, [[1.0, 2.0], 2.0]),
    "scores as texts": (GOOD, GOOD, ["a", "b"]),
    "no scores": (GOOD, GOOD, None),
    "no responses": (GOOD, None, [1.0, 2.0]),
    "unequal lists": (GOOD, GOOD[:1], [1.0, 2.0]),
    "empty lists": ([], [], []),
    "an empty response": (GOOD, [ids(5), torch.tensor([], dtype=torch.int64)], [1.0, 2.0]),
    "an empty query": ([ids(5), torch.tensor([], dtype=torch.int64)], GOOD, [1.0, 2.0]),
    "float ids": (GOOD, [ids(5), ids(5.0)], [1.0, 2.0]),
    "a mask for ids": (GOOD, [ids(5), ids(True, False)], [1.0, 2.0]),
    "an id past the vocabulary": (GOOD, [ids(5), ids(len(VOCAB))], [1.0, 2.0]),
    "a negative id": ([ids(-1), ids(5)], GOOD, [1.0, 2.0]),
    "ids in two dimensions": (GOOD, [ids(5), torch.ones(1, 2, dtype=torch.int64)], [1.0, 2.0]),
    "a single id without dimension": (GOOD, [ids(5), torch.tensor(5)], [1.0, 2.0]),
    "too many tokens": (GOOD, [ids(5), torch.full((65,), 5)], [1.0, 2.0]),
}


@pytest.mark.parametrize("name", BAD_BATCHES)
def test_a_bad_batch_is_refused_before_anything_is_trained(name):
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(ValueError):
        trainer.step(*BAD_BATCHES[name])
    same(weights(trainer), before)
    assert trainer.iteration == 0


def test_models_and_tokenizer_of_different_vocabularies_are_refused():
    small = make_gpt2(0, vocab_size=50, **SMALL)
    normal = make_gpt2(0, **SMALL)
    for policy, reference, tokens in ((small, normal, VOCAB), (normal, small, VOCAB), (normal, normal, VOCAB[:-1])):
        with pytest.raises(ValueError, match="vocabulary"):
            PPOTrainer(policy, reference, Tokenizer(tokens), **DEFAULTS)


def test_a_reference_that_shares_parameters_is_refused():
    policy = make_gpt2(0, **SMALL)
    tied = make_gpt2(1, **SMALL)
    tied.wpe.weight = policy.wpe.weight
    for reference in (policy, ActorCritic(policy), tied):
        with pytest.raises(ValueError, match="share"):
            PPOTrainer(policy, reference, Tokenizer(VOCAB), **DEFAULTS)


@pytest.mark.parametrize("prompts", [[], ["酒店", ""], ["酒店", " \n"], ["酒店", "好" * 100], "酒店", ["酒店", None]])
def test_a_bad_pool_is_refused_before_any_training(prompts):
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"prompt|text"):
        trainer.train(prompts, lambda texts: pytest.fail("the reward was asked"))
    same(weights(trainer), before)
    assert trainer.iteration == 0


def test_a_reference_with_too_short_a_context_is_refused_before_the_reward_is_asked():
    policy, reference = make_gpt2(0, **SMALL), make_gpt2(0, n_positions=6, **SMALL)
    with pytest.raises(ValueError):
        trainer = PPOTrainer(policy, reference, Tokenizer(VOCAB), **DEFAULTS)
        trainer.train(PROMPTS, lambda texts: pytest.fail("the reward was asked"))


# ---- what goes wrong in a step --------------------------------------------------------------------------------------


def optimizer_state(trainer):
    names = {p: name for name, p in trainer.policy.named_parameters()}
    return {f"{names[p]} {key}": x.clone() for p, state in trainer.optimizer.state.items() for key, x in state.items()}


def plant(trainer, updates, value=NAN):
    """Put a value into the gradient of one weight, in the updates of these numbers (of a step in whole minibatches)."""
    count = itertools.count()

    def hook(gradient):
        if next(count) in updates:
            gradient = gradient.clone()
            gradient[0, 0] = value
        return gradient

    trainer.policy.gpt2.h[0].mlp.c_fc.weight.register_hook(hook)


WHOLE = dict(minibatch_size=5, forward_batch_size=5)  # of `batch()`: an epoch is one update


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_an_update_whose_gradient_is_not_finite_changes_nothing_but_the_count(value):
    trainer = make_trainer(**WHOLE, ppo_epochs=3)
    trainer.step(*batch())  # so that the optimizer has a state to keep
    plant(trainer, {0, 1, 2}, value)
    before, moments = weights(trainer), optimizer_state(trainer)
    stats = trainer.step(*batch())
    same(weights(trainer), before)
    same(optimizer_state(trainer), moments)
    assert (stats["ppo/updates"], stats["ppo/skipped_updates"], trainer.bad_steps) == (0, 3, 3)
    assert not math.isfinite(stats["ppo/grad_norm"])  # nothing else is there to tell of
    stats = trainer.step(*batch())
    assert (stats["ppo/updates"], stats["ppo/skipped_updates"], trainer.bad_steps) == (3, 0, 0)
    assert all(math.isfinite(x) for x in stats.values())


@pytest.mark.parametrize("field", ["logprobs", "values"])
def test_an_update_whose_loss_is_not_finite_is_skipped(field):
    trainer = make_trainer(minibatch_size=1, ppo_epochs=1, whiten_scope="sequence")
    rollout = trainer.collect(PROMPTS, reward)
    getattr(rollout, field)[2] = NAN  # one row of four
    stats = trainer.step(rollout)
    assert (stats["ppo/updates"], stats["ppo/skipped_updates"]) == (3, 1)
    assert all(torch.isfinite(x).all() for x in [*weights(trainer).values(), *optimizer_state(trainer).values()])


def test_a_skipped_update_is_one_that_was_never_made_and_not_in_the_means():
    """The same as a trainer whose optimizer is told to do nothing in these updates."""
    bad = {1, 4}
    planted, expected = (make_trainer(**WHOLE, ppo_epochs=6) for _ in range(2))
    plant(planted, bad)
    real, calls, norms = expected.precision.step, itertools.count(), []

    def step(optimizer, parameters, *rest):
        if next(calls) in bad:
            optimizer.zero_grad(set_to_none=True)
            return torch.zeros(())
        norms.append(real(optimizer, parameters, *rest))
        return norms[-1]

    expected.precision.step = step
    stats = planted.step(*batch())
    expected.step(*batch())
    same(weights(planted), weights(expected))
    same(optimizer_state(planted), optimizer_state(expected))
    assert stats["ppo/grad_norm"] == pytest.approx(sum(norms) / 4)
    assert (stats["ppo/updates"], stats["ppo/skipped_updates"]) == (4, 2)


def test_too_many_bad_updates_in_a_row_end_the_run_and_say_where():
    trainer = make_trainer(**WHOLE, ppo_epochs=3, max_bad_steps=4)
    plant(trainer, {1, 2, *range(4, 100)})  # two in a row, a good one, then five
    trainer.step(*batch())
    assert trainer.bad_steps == 2
    trainer.step(*batch())
    assert trainer.bad_steps == 2  # the fourth update was fine
    before = weights(trainer)
    with pytest.raises(FloatingPointError, match=r"step 3: 4 optimizer steps in a row .* \(nan\)"):
        trainer.step(*batch())
    same(weights(trainer), before)
    assert trainer.iteration == 2


def test_with_fp16_a_loss_scale_is_found_before_the_run_is_given_up():
    trainer = make_trainer(precision="fp16", **WHOLE, ppo_epochs=30)
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    stats = trainer.step(*batch())
    assert stats["ppo/skipped_updates"] > 3 and stats["ppo/updates"] > 3
    assert trainer.bad_steps == 0 and trainer.precision.scaler.get_scale() < 2.0**30


class Small:
    """A GPU with room for so many rows of a policy, on the CPU; seen are the sizes that it was given."""

    def __init__(self, trainer, room, training=True):
        self.seen, score = [], trainer.policy.score

        def limited(tokens, *rest, **named):
            if torch.is_grad_enabled() == training:
                self.seen.append(len(tokens))
                if len(tokens) > room:
                    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return score(tokens, *rest, **named)

        trainer.policy.score = limited


@pytest.mark.parametrize("averaging", ["tokens", "sequences", "micro_batches"])
def test_out_of_memory_falls_to_smaller_micro_batches_with_the_same_gradients(averaging):
    settings = dict(dtype=torch.float64, minibatch_size=5, forward_batch_size=4, loss_averaging=averaging)
    plain, cramped = make_trainer(**settings), make_trainer(**settings)
    small = Small(cramped, room=1)
    expected = plain.step(*batch())
    with pytest.warns(UserWarning, match="out of memory") as caught:
        stats = cramped.step(*batch())
    assert [str(w.message) for w in caught] == [
        "out of memory with 4 sequences a forward pass: now 2",
        "out of memory with 2 sequences a forward pass: now 1",
    ]
    assert small.seen == [4, 2, *[1] * 10]  # it remembers
    same(weights(plain), weights(cramped), 1e-12)
    same_figures(expected, stats, rel=1e-9, abs=1e-12)


def test_out_of_memory_in_the_middle_of_a_minibatch_begins_it_again():
    """Rows of 40 tokens have no room beside each other: half of the gradient is there when it fails."""
    plain, cramped = (make_trainer(dtype=torch.float64, minibatch_size=4, forward_batch_size=2) for _ in range(2))
    lengths = [(3, 4), (2, 7), (20, 20), (20, 19)]
    score, failed = cramped.policy.score, []

    def limited(tokens, *rest, **named):
        if torch.is_grad_enabled() and tokens.numel() > 60:
            failed.append(any(p.grad is not None for p in cramped.policy.parameters()))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return score(tokens, *rest, **named)

    cramped.policy.score = limited
    with pytest.warns(UserWarning, match="now 1"):
        for seed in range(4):
            cramped.step(*batch(lengths, seed))
    for seed in range(4):
        plain.step(*batch(lengths, seed))
    assert failed == [True] or failed == [False]  # once, whatever the order of the rows
    same(weights(plain), weights(cramped), 1e-12)


def test_scoring_falls_to_smaller_batches_too():
    plain, cramped = make_trainer(), make_trainer()
    small = Small(cramped, room=2, training=False)
    with pytest.warns(UserWarning, match="now 2"):
        rollout = cramped.collect(PROMPTS, reward)
    assert small.seen == [4, 2, 2]
    torch.testing.assert_close(rollout.logprobs, plain.collect(PROMPTS, reward).logprobs)


def test_no_room_for_one_row_is_an_error():
    trainer = make_trainer()
    Small(trainer, room=0)
    before = weights(trainer)
    with pytest.warns(UserWarning), pytest.raises(torch.cuda.OutOfMemoryError):
        trainer.step(*batch())
    same(weights(trainer), before)


# ---- rewards that fail ----------------------------------------------------------------------------------------------


def fails(texts):
    raise ConnectionError("the judge does not answer")


def hangs(texts):
    time.sleep(60)


BAD_REWARDS = {
    "raises": (fails, ConnectionError, "does not answer"),
    "hangs": (hangs, TimeoutError, "reward_timeout=2 "),
    "NaN": (lambda texts: [0.0, NAN, 0.0, 0.0], ValueError, "finite, got nan for text 1"),
    "one too few": (lambda texts: [0.0] * 3, ValueError, r"4 numbers, one a text, got shape \(3,\)"),
    "one too many": (lambda texts: [0.0] * 5, ValueError, "4 numbers"),
    "words": (lambda texts: ["good"] * 4, ValueError, "4 numbers, got list"),
    "nothing": (lambda texts: None, ValueError, "4 numbers, got NoneType"),
}


@pytest.mark.parametrize("name", BAD_REWARDS)
def test_a_reward_that_fails_leaves_the_trainer_as_it_was_after_the_last_step(name):
    """Called again with a reward that works, it goes on as if nothing had been."""
    bad, error, message = BAD_REWARDS[name]
    settings = dict(steps=16, reward_timeout=2.0 if name == "hangs" else None, score_whitening=True)
    plain, trainer = make_trainer(**settings), make_trainer(**settings)
    expected = plain.train(PROMPTS, reward)
    calls = itertools.count()
    with pytest.raises(error, match=message):
        trainer.train(PROMPTS, lambda texts: bad(texts) if next(calls) == 2 else reward(texts))
    assert trainer.iteration == 2 and not trainer.interrupted
    rest = trainer.train(PROMPTS, reward)
    assert [figures(stats) for stats in rest] == [figures(stats) for stats in expected[2:]]
    same(weights(plain), weights(trainer))


def test_a_batch_that_cannot_be_collected_was_never_drawn():
    trainer, before = make_trainer(), make_trainer().generators["sampling"].get_state()
    with pytest.raises(ConnectionError):
        trainer.collect(PROMPTS, fails)
    assert torch.equal(trainer.generators["sampling"].get_state(), before)
    trainer.collect(PROMPTS, reward)
    assert not torch.equal(trainer.generators["sampling"].get_state(), before)


def test_a_time_limit_changes_nothing_for_a_reward_that_keeps_it():
    plain, limited = make_trainer(), make_trainer(reward_timeout=60.0)
    assert [figures(s) for s in plain.train(PROMPTS, reward)] == [figures(s) for s in limited.train(PROMPTS, reward)]


def test_mean_stats_is_the_mean_of_each_name():
    stats = [{"a": torch.tensor(1.0), "b": torch.tensor(0.5)}, {"a": torch.tensor(3.0), "b": torch.tensor(0.0)}]
    assert mean_stats(read_stats(stats)) == {"a": 2.0, "b": 0.25}


def test_mean_stats_leaves_out_what_was_skipped_unless_all_was():
    stats = [{"a": torch.tensor(x), "b": torch.tensor(y)} for x, y in ((1.0, NAN), (3.0, 2.0), (math.inf, 4.0))]
    assert mean_stats(read_stats(stats)) == {"a": 3.0, "b": 2.0}
    means = mean_stats(read_stats([stats[0], stats[0]]))
    assert means["a"] == 1.0 and math.isnan(means["b"])


def test_checkpointed_activations_change_no_bit_of_a_step():
    trainers = [make_trainer(checkpoint_activations=on) for on in (False, True)]
    stats = [trainer.step(*batch()) for trainer in trainers]
    kept = [{name: value for name, value in s.items() if not name.startswith("time/")} for s in stats]
    assert kept[0] == kept[1] and trainers[1].policy.gpt2.checkpoint_activations
    pairs = zip(trainers[0].policy.parameters(), trainers[1].policy.parameters(), strict=True)
    assert all(torch.equal(*pair) for pair in pairs)


def make_frozen_trainer(**settings):
    policy = ActorCritic(make_gpt2(0, n_layer=3)).eval()
    for module in (policy.gpt2.wte, policy.gpt2.wpe, policy.gpt2.h[0], policy.gpt2.h[1]):
        module.requires_grad_(False)
    settings = {"seed": 3, "batch_size": 8, "minibatch_size": 4, "gen_len": 5, "lr": 1e-3, "device": "cpu", **settings}
    return PPOTrainer(policy, make_gpt2(0, n_layer=3), Tokenizer(VOCAB), **settings)


def test_a_shared_reference_changes_no_bit_of_a_run():
    runs = []
    for reference in ("own", "shared"):
        trainer = make_frozen_trainer(reference=reference, steps=16)
        history = trainer.train(["酒店", "hello"], lambda texts: [float(len(text)) for text in texts])
        runs.append((trainer, [{k: v for k, v in s.items() if not k.startswith("time/")} for s in history]))
    (apart, expected), (shared, stats) = runs
    assert stats == expected and stats[1]["objective/kl_exact"] > 0
    assert all(torch.equal(*pair) for pair in zip(apart.policy.parameters(), shared.policy.parameters(), strict=True))
    assert shared.reference_hash == apart.reference_hash and shared.policy.gpt2.h[1] is shared.reference.h[1]


def test_a_reference_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="trains its embeddings"):
        make_trainer(reference="shared")
    with pytest.raises(ValueError, match="reference must be one of"):
        make_trainer(reference="none")


@pytest.mark.parametrize("prompts", [["酒店", "房间", "早餐", "很好"], PROMPTS])
def test_attention_gets_a_mask_only_where_there_is_padding(monkeypatch, prompts):
    """Without a mask a GPU can take its flash kernel."""
    masks, inner = [], gpt2.attention

    def watched(q, k, v, allowed, *rest, **named):
        masks.append(allowed is not None)
        return inner(q, k, v, allowed, *rest, **named)

    monkeypatch.setattr(gpt2, "attention", watched)
    trainer = make_trainer()
    rollout = trainer.collect(prompts, reward)
    sampled = len(masks)
    trainer.step(rollout)
    assert sampled > 0 and len(masks) > sampled
    assert any(masks) == (prompts is PROMPTS)


def test_a_decoder_is_for_gpus_and_changes_no_rollout():
    trainers = [make_trainer(cuda_graphs=True) for _ in range(2)]
    assert trainers[0].decoder is None
    trainers[1].decoder = GraphedDecoder()
    one, other = (trainer.collect(PROMPTS, reward) for trainer in trainers)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.sampling_sets, other.sampling_sets)
    torch.testing.assert_close(one.sampler_logprobs, other.sampler_logprobs, atol=1e-5, rtol=0)
    assert trainers[1].decoder._step is not None
