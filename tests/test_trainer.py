"""The trainer's invariants: what must be 1 or 0 at the start, what must change nothing, and what must be refused."""

import copy
import dataclasses
import hashlib
import itertools
import math
import random

import numpy as np
import pytest
import torch

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, ActorCritic, GPT2Config, PPOConfig, PPOTrainer, Tokenizer
from minirlhf.checkpoints import read_metadata, read_tensors, write_tensors
from minirlhf.metrics import mean_stats

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
        policy, reference, Tokenizer(VOCAB), steps=32 * 24, batch_size=32, minibatch_size=16, forward_batch_size=16,
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
    *((name, value) for name in INTEGERS for value in (0, -1, 1.5, "4", None, True)),
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


# ---- checkpoints ----------------------------------------------------------------------------------------------------

RUN = dict(
    steps=20, eos_token_id=EOS, lr_schedule="linear", lr_warmup=0.1, horizon=50.0, init_kl_coef=0.3, top_p=0.9,
    score_whitening=True,
)  # fmt: skip


def test_a_run_cut_by_a_checkpoint_goes_on_bit_for_bit(tmp_path):
    path = tmp_path / "state.safetensors"
    whole = make_trainer(**RUN)
    expected = whole.train(PROMPTS, reward)

    cut = make_trainer(**RUN)

    class Crash(Exception):
        pass

    def crash_at_two(rollout, stats):
        if cut.iteration == 2:
            cut.save_checkpoint(path)
            raise Crash

    with pytest.raises(Crash):
        cut.train(PROMPTS, reward, crash_at_two)
    resumed = make_trainer(**RUN)
    resumed.step(*batch())  # whatever it did before is forgotten
    resumed.load_checkpoint(path)
    assert resumed.iteration == 2
    rest = resumed.train(PROMPTS, reward)
    assert [figures(stats) for stats in rest] == [figures(stats) for stats in expected[2:]]
    same(weights(whole), weights(resumed))


def test_a_checkpoint_of_a_new_trainer_loads(tmp_path):
    trainer = make_trainer()
    trainer.save_checkpoint(tmp_path / "state")
    other = make_trainer()
    other.step(*batch())
    other.load_checkpoint(tmp_path / "state")
    same(weights(other), weights(trainer))
    trainer.step(*batch())
    other.step(*batch())
    same(weights(other), weights(trainer))


@pytest.mark.parametrize("changed", [dict(lr=2e-3), dict(seed=9), dict(top_p=0.5), dict(eos_token_id=None)])
def test_a_checkpoint_of_other_settings_is_refused_by_name(tmp_path, changed):
    make_trainer(**RUN).save_checkpoint(tmp_path / "state")
    trainer = make_trainer(**{**RUN, **changed})
    before = weights(trainer)
    with pytest.raises(ValueError, match=next(iter(changed))):
        trainer.load_checkpoint(tmp_path / "state")
    same(weights(trainer), before)


def test_a_run_may_be_made_longer_and_cut_differently(tmp_path):
    trainer = make_trainer()
    trainer.save_checkpoint(tmp_path / "state")
    make_trainer(steps=80, forward_batch_size=1).load_checkpoint(tmp_path / "state")


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    other = PPOTrainer(make_gpt2(0, n_embd=8, n_layer=1, n_head=2), make_gpt2(1, **SMALL), Tokenizer(VOCAB), **DEFAULTS)
    other.save_checkpoint(tmp_path / "state")
    with pytest.raises(ValueError, match="shape"):
        make_trainer().load_checkpoint(tmp_path / "state")


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        make_trainer().load_checkpoint(tmp_path / "nothing")


DAMAGES = ["empty", "cut", "garbage", "foreign", "no generator", "no weight", "bad json", "nan"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(tmp_path, damage):
    path = tmp_path / "state"
    source = make_trainer()
    source.step(*batch())
    source.save_checkpoint(path)
    content, tensors, metadata = path.read_bytes(), read_tensors(path), read_metadata(path)
    if damage == "empty":
        path.write_bytes(b"")
    elif damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        path.write_bytes(b"\xff" * 200)
    elif damage == "foreign":
        write_tensors(path, tensors)
    elif damage == "no generator":
        write_tensors(path, {n: t for n, t in tensors.items() if not n.startswith("generator")}, metadata)
    elif damage == "no weight":
        write_tensors(path, {n: t for n, t in tensors.items() if n != "policy.gpt2.wte.weight"}, metadata)
    elif damage == "bad json":
        write_tensors(path, tensors, {**metadata, "trainer": "{"})
    elif damage == "nan":
        write_tensors(path, {n: t * NAN if n.startswith("policy") else t for n, t in tensors.items()}, metadata)
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(ValueError, match="state"):
        trainer.load_checkpoint(path)
    same(weights(trainer), before)
    assert trainer.iteration == 0


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "state"
    trainer = make_trainer()
    trainer.save_checkpoint(path)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    trainer.step(*batch())
    with pytest.raises(OSError, match="disk full"):
        trainer.save_checkpoint(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["state"]


def test_mean_stats_is_the_mean_of_each_name():
    stats = [{"a": torch.tensor(1.0), "b": torch.tensor(0.5)}, {"a": torch.tensor(3.0), "b": torch.tensor(0.0)}]
    assert mean_stats(stats) == {"a": 2.0, "b": 0.25}
