"""The trainer's invariants: what must be 1 or 0 at the start, what must change nothing, and what is refused."""

import copy
import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from small_trainer import (
    DEFAULTS,
    EOS,
    NAN,
    PROMPTS,
    SMALL,
    batch,
    figures,
    from_tokens,
    make_trainer,
    reward,
    same,
    same_figures,
    weights,
)
from transformers import AutoModelForCausalLM

import oracle
from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, ActorCritic, GPT2Config, PPOTrainer, Tokenizer
from minirlhf.models import gpt2
from minirlhf.models.static_decode import GraphedDecoder
from minirlhf.rl.logprobs import response_logprobs
from minirlhf.rl.rollout import evaluation

# ---- a second implementation -----------------------------------------------------------------------------------------


def test_two_epochs_are_those_of_a_plain_loop_over_transformers(make_decoder, tmp_path):
    """Row by row, without padding, with autograd of another model's code; the oracle does GPT-2 from its equations."""
    settings = dict(batch_size=5, minibatch_size=5, forward_batch_size=2, top_p=1.0, cliprange=0.02, lr=5e-3)
    decoder, other, lr = make_decoder(0, scale=4.0, **SMALL), make_decoder(1, scale=4.0, **SMALL), settings["lr"]
    for model, name in ((decoder, "policy"), (other, "reference")):
        model.save_pretrained(tmp_path / name)
    theirs, reference = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).double() for name in ("policy", "reference")
    )
    policy = ActorCritic(decoder)
    with torch.no_grad():
        policy.value_head.summary.weight.normal_(generator=torch.Generator().manual_seed(0))
    head = copy.deepcopy(policy.value_head.summary).double()
    trainer = PPOTrainer(policy.double(), other.double(), Tokenizer(VOCAB), **{**DEFAULTS, **settings})
    rows, coef = list(zip(*batch(), strict=True)), trainer.config.init_kl_coef
    stats = trainer.step(*batch())

    def read(model, query, response):
        output = model(torch.cat([query, response])[None], output_hidden_states=True)
        before = slice(len(query) - 1, -1)
        values = head(output.hidden_states[-1][0, before]).squeeze(-1)
        return output.logits[0, before].log_softmax(-1).gather(-1, response[:, None]).squeeze(-1), values

    old, targets = [], []
    for query, response, score in rows:
        with torch.no_grad():
            (logp, values), (ref, _) = read(theirs, query, response), read(reference, query, response)
        rewards = (-coef * (logp - ref)).tolist()
        rewards[-1] += score
        old.append((logp, values))
        targets.append(oracle.gae_row(rewards, values.tolist(), 1.0, trainer.config.lam))
    advantages = oracle.whiten_rows([advantage for advantage, _ in targets])
    parameters = [*theirs.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=lr, eps=trainer.config.adam_eps, weight_decay=0.0)
    for _ in range(trainer.config.ppo_epochs):
        losses = []
        for (query, response, _), (logp, values), A, (_, returns) in zip(rows, old, advantages, targets, strict=True):
            now, new = read(theirs, query, response)
            A, returns, ratio = torch.tensor(A), torch.tensor(returns), (now - logp).exp()
            clipped = values + (new - values).clamp(-0.2, 0.2)
            value_loss = 0.5 * torch.maximum((new - returns) ** 2, (clipped - returns) ** 2)
            losses.append(torch.maximum(-A * ratio, -A * ratio.clamp(0.98, 1.02)) + 0.1 * value_loss)
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
    assert stats["ppo/policy/first_ratio_error"] < 1e-9 and stats["ppo/policy/clipfrac"] > 0
    tolerance = 1e-8 if isinstance(decoder, GPT2) else 2e-6  # an RMSNorm rounds to fp32, in both
    expected = {name.removeprefix(decoder.prefix): p for name, p in theirs.named_parameters()}
    for name, p in trainer.policy.decoder.named_parameters():
        torch.testing.assert_close(p, expected[name], rtol=0, atol=tolerance, msg=name)
    torch.testing.assert_close(trainer.policy.value_head.summary.weight, head.weight, rtol=0, atol=tolerance)


# ---- at the start ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [dict(top_p=1.0), dict(top_p=0.8, temperature=0.7), dict(top_p=1.0, top_k=9)])
def test_the_first_ratio_is_one(settings):
    trainer = make_trainer(batch_size=8, minibatch_size=3, eos_token_id=EOS, gen_len=9, **settings)
    rollout = trainer.collect(PROMPTS * 2, reward)
    for rows in (torch.tensor([0, 3, 5]), torch.tensor([1]), torch.arange(8)):
        part = rollout.rows(rows)
        scored = response_logprobs(
            trainer.policy, part.tokens, part.mask, part.response_mask.size(1), trainer.config.temperature,
            part.sampling_sets,
        )  # fmt: skip
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


# ---- what must change nothing ----------------------------------------------------------------------------------------


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


def test_micro_batches_hold_rows_of_similar_length():
    trainer = make_trainer(minibatch_size=6, forward_batch_size=2, ppo_epochs=1)
    ragged = [torch.arange(1, 3 + n) for n in (9, 1, 8, 2, 9, 1)]
    seen, rows = [], from_tokens(trainer, [torch.tensor([5])] * 6, ragged, [0.1 * i for i in range(6)])
    loss = trainer._loss
    trainer._loss = lambda micro_batch: seen.append(micro_batch.tokens.size(1)) or loss(micro_batch)
    trainer.step(rows)
    assert seen == [1 + 11, 1 + 10, 1 + 3]


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
    reference, policy = copy.deepcopy(trainer.reference.state_dict()), weights(trainer)
    trainer.train(PROMPTS, reward)
    same(trainer.reference.state_dict(), reference)
    assert all(not torch.equal(policy[name], p) for name, p in trainer.policy.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in trainer.reference.parameters())


def test_frozen_parameters_stay():
    policy = ActorCritic(make_gpt2(0, **SMALL))
    for module in policy.decoder.embeddings:
        module.requires_grad_(False)
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
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    trainer = make_trainer(value_head="linear")
    trainer.train(PROMPTS, reward)
    trainer.step(*batch())
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_dropout_is_off_even_if_the_policy_was_put_into_training_mode():
    trainer = make_trainer()
    trainer.policy.train()
    expected = make_trainer()
    rows = batch()
    same_figures(expected.step(*rows), trainer.step(*rows), rel=0, abs=0)
    same(weights(expected), weights(trainer))


def test_a_decoder_is_for_gpus_and_changes_no_rollout():
    trainers = [make_trainer(cuda_graphs=True) for _ in range(2)]
    assert trainers[0].models.graphed is None
    trainers[1].models = dataclasses.replace(trainers[1].models, graphed=GraphedDecoder())
    one, other = (trainer.collect(PROMPTS, reward) for trainer in trainers)
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.sampling_sets, other.sampling_sets)
    torch.testing.assert_close(one.sampler_logprobs, other.sampler_logprobs, atol=1e-5, rtol=0)
    assert trainers[1].models.graphed._step is not None


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


# ---- settings that must do what they say -----------------------------------------------------------------------------


def test_target_kl_stops_the_epochs():
    # One minibatch an epoch: the first epoch has no KL yet, the second has.
    settings = dict(minibatch_size=5, ppo_epochs=4)
    assert make_trainer(target_kl=1e-12, **settings).step(*batch())["ppo/updates"] == 2
    assert make_trainer(target_kl=1e9, **settings).step(*batch())["ppo/updates"] == 4
    assert make_trainer(**settings).step(*batch())["ppo/updates"] == 4


@pytest.mark.parametrize(("schedule", "expected"), [
    ("linear", [1 - k / 12 for k in range(12)]),
    ("cosine", [(1 + math.cos(math.pi * k / 12)) / 2 for k in range(12)]),
    ("constant", [1.0] * 12),
])  # fmt: skip
def test_a_schedule_runs_over_all_optimizer_steps(schedule, expected):
    """Of a run of 3 batches, 2 epochs and 2 minibatches."""
    trainer, seen = make_trainer(steps=12, lr_schedule=schedule), []
    trainer.optimizer.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.param_groups[0]["lr"] / 1e-3))
    trainer.train(PROMPTS, reward)
    assert seen == pytest.approx(expected)


def test_scores_may_leave_the_temperature_out():
    """logprobs_temperature=False, as TRL had it: sampled at 0.5, scored at 1."""
    trainer = make_trainer(temperature=0.5, top_p=1.0, logprobs_temperature=False)
    rollout = trainer.collect(PROMPTS, reward)
    width = rollout.response_mask.size(1)
    with torch.no_grad():
        at_one, at_half = (
            response_logprobs(trainer.policy, rollout.tokens, rollout.mask, width, t).logprobs for t in (1.0, 0.5)
        )
    torch.testing.assert_close(rollout.logprobs, at_one)
    assert (rollout.logprobs - at_half).abs().max() > 0.1
    assert trainer.step(rollout)["ppo/policy/first_ratio_error"] < 1e-5  # the update scores alike


# ---- groups ----------------------------------------------------------------------------------------------------------


def test_the_responses_of_a_prompt_stand_side_by_side_in_rollout_and_minibatches():
    trainer = make_trainer(batch_size=12, minibatch_size=8, group_size=4, ppo_epochs=3, seed=1, eos_token_id=EOS)
    rollout = trainer.collect(PROMPTS[:3], reward)
    assert rollout.prompts == tuple(prompt for prompt in PROMPTS[:3] for _ in range(4)) and rollout.group_size == 4
    assert len(set(rollout.responses[:4])) > 1
    seen, update = [], trainer._update
    trainer._update = lambda minibatch: seen.append(minibatch) or update(minibatch)
    trainer.step(rollout.replace(scores=torch.arange(12.0)))
    assert [len(minibatch) for minibatch in seen] == [8, 4] * 3 and {part.group_size for part in seen} == {4}
    groups = [[row for part in seen[i : i + 2] for row in part.scores.view(-1, 4).tolist()] for i in (0, 2, 4)]
    for epoch in groups:
        assert sorted(epoch) == torch.arange(12.0).view(3, 4).tolist()
    assert groups[0] != groups[1] or groups[1] != groups[2]  # shuffled


def test_a_run_draws_as_many_prompts_as_its_batches_have_groups():
    trainer, rollouts = make_trainer(group_size=2), []
    trainer.train(PROMPTS, reward, lambda rollout, _: rollouts.append(rollout))
    assert all(len(rollout) == 4 and rollout.prompts[::2] == rollout.prompts[1::2] for rollout in rollouts)


def test_token_lists_that_cannot_be_cut_into_groups_are_refused():
    with pytest.raises(ValueError, match="5 responses cannot be cut into groups of group_size=2"):
        make_trainer(group_size=2).step(*batch())
    queries, responses, scores = batch([(3, 4), (3, 1), (3, 2), (3, 2)])
    with pytest.raises(ValueError, match="query 1 is not that of its group"):
        make_trainer(group_size=2).step(queries, responses, scores)
    alike = [queries[i - i % 2] for i in range(4)]
    trainer = make_trainer(group_size=2)
    rollout = from_tokens(trainer, alike, responses, scores)
    assert trainer.step(rollout)["reward/mean"] == pytest.approx(sum(scores) / 4)
    with pytest.raises(ValueError, match="the rollout has groups of 2, the config group_size=1"):
        make_trainer().step(rollout)


# ---- runs ------------------------------------------------------------------------------------------------------------


def test_train_runs_all_steps_and_tells_of_each():
    trainer = make_trainer(steps=11)
    seen = []
    history = trainer.train(PROMPTS, reward, on_step=lambda rollout, stats: seen.append((len(rollout), stats)))
    assert len(history) == trainer.iteration == 3  # 11 episodes in batches of 4
    assert [stats for _, stats in seen] == history and {size for size, _ in seen} == {4}


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


# ---- edges and bad input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[(51, 4), (2, 50)], [(63, 1), (1, 63)], [(64, 1), (1, 64)]])
def test_rows_train_that_fit_while_their_padded_table_does_not(lengths):
    """64 positions; the last token of a row needs none. A row by itself has the same log-probabilities."""
    trainer = make_trainer()
    rows = batch(lengths)
    together = from_tokens(trainer, *rows)
    for i, (_, length) in enumerate(lengths):
        alone = from_tokens(trainer, *([part[i]] for part in rows))
        torch.testing.assert_close(together.logprobs[i, :length], alone.logprobs[0], atol=1e-5, rtol=0)
    before = weights(trainer)
    assert all(math.isfinite(value) for value in trainer.step(together).values())
    assert any(not torch.equal(before[name], p) for name, p in weights(trainer).items())


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
    forms.append(torch.tensor(scores)[:, None])
    results = []
    for form in forms:
        trainer = make_trainer()
        trainer.step(queries, responses, form)
        results.append(weights(trainer))
    for result in results[1:]:
        same(results[0], result)


def ids(*values):
    return torch.tensor(values)


GOOD = [ids(5, 6), ids(7)]
BAD_BATCHES = {
    "one score too few": (GOOD, GOOD, [1.0]),
    "a score that is not a number": (GOOD, GOOD, [1.0, NAN]),
    "a token without a score": (GOOD, GOOD, [[1.0], [2.0]]),
    "a token score that is not a number": (GOOD, GOOD, [[1.0, NAN], [2.0]]),
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
    "ids in two dimensions": (GOOD, [ids(5), torch.ones(2, 2, dtype=torch.int64)], [1.0, 2.0]),
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


@pytest.mark.parametrize(
    "prompts", [[], ["酒店", ""], ["酒店", " \n"], [*["酒店"] * 500, "好" * 100], "酒店", ["酒店", None]]
)  # the long one would hardly be drawn in a batch of four
def test_a_bad_pool_is_refused_before_any_training(prompts):
    trainer = make_trainer()
    before = weights(trainer)
    with pytest.raises(ValueError, match=r"prompt|text"):
        trainer.train(prompts, lambda texts: pytest.fail("the reward was asked"))
    same(weights(trainer), before)
    assert trainer.iteration == 0


# ---- what follows a step --------------------------------------------------------------------------------------------


def test_train_ends_when_a_callback_says_true_and_goes_on_from_there():
    whole = make_trainer()
    expected = whole.train(PROMPTS, reward, progress=False)
    parts, seen = make_trainer(), []
    first = parts.train(PROMPTS, reward, [lambda rollout, stats: seen.append(stats), lambda *step: True])
    assert [stats["step"] for stats in first] == [1] == [stats["step"] for stats in seen]
    assert seen[0] is first[0]
    rest = parts.train(PROMPTS, reward, stop_when=lambda stats: stats["step"] == 2)
    assert [figures(stats) for stats in first + rest] == [figures(stats) for stats in expected]
    same(weights(parts), weights(whole))


def test_evaluations_change_nothing_and_use_the_same_random_numbers():
    plain, evaluated = make_trainer(), make_trainer()
    expected = plain.train(PROMPTS, reward)
    history = evaluated.train(PROMPTS, reward, evaluate_every=2)
    assert ["evaluation/reward" in stats for stats in history] == [False, True]
    found = {name: history[-1].pop(name) for name in ("evaluation/reward", "evaluation/kl")}
    assert [figures(stats) for stats in history] == [figures(stats) for stats in expected]
    same(weights(plain), weights(evaluated))
    again = evaluation(evaluated.models, PROMPTS, reward, evaluated.config)
    assert again == found and found["evaluation/kl"] > 0
    prompts = []
    evaluation(evaluated.models, PROMPTS[:3], lambda p, r: prompts.extend(p) or [0.0] * len(p), evaluated.config)
    assert prompts == [*PROMPTS[:3], PROMPTS[0]]  # in turn


def test_the_best_policy_is_a_model_folder(tmp_path):
    trainer = make_trainer()
    trainer.train(PROMPTS, reward, save_best=tmp_path / "best", stop_when=lambda stats: True)
    best = ActorCritic.from_pretrained(tmp_path / "best")
    same(dict(best.named_parameters()), weights(trainer))
    assert best.generate("酒店", max_new_tokens=2)


def test_what_a_reward_reports_is_among_the_statistics():
    trainer = make_trainer()

    async def judge(texts):
        return reward(texts), {"asked": len(texts), "judge/cost": 0.25}

    stats = trainer.train(PROMPTS, judge)[-1]
    assert stats["reward/asked"] == 4 and stats["judge/cost"] == 0.25 and stats["time/reward"] > 0


def test_a_rollout_and_its_trainer_have_short_reprs():
    trainer = make_trainer()
    rollout = trainer.collect(["酒店<b>", *PROMPTS[1:]], lambda texts: [0.5] * len(texts))
    assert repr(rollout) == "Rollout(4 responses of up to 5 tokens, mean score 0.500)"
    page = rollout._repr_html_()
    assert page.count("<tr>") == 5 and "酒店&lt;b&gt;" in page and "0.500" in page
    assert repr(trainer) == "PPOTrainer(step 0 of 2, GPT2, gae, fp32, cpu)"
    assert repr(trainer.tokenizer) == f"Tokenizer(WordPiece, {len(VOCAB)} tokens, pad '[PAD]', end '[SEP]')"
