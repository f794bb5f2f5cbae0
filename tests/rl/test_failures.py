"""What goes wrong in a run: gradients and losses that are not finite, no memory, rewards that fail."""

import itertools
import math
import time

import pytest
import torch
from small_trainer import NAN, PROMPTS, batch, figures, make_trainer, reward, same, same_figures, weights

WHOLE = dict(minibatch_size=5, forward_batch_size=5)  # of `batch()`: an epoch is one update


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

    trainer.policy.decoder.blocks[0].mlp.c_fc.weight.register_hook(hook)


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


# ---- memory ----------------------------------------------------------------------------------------------------------


def cramp(owner, name, room):
    """Let a function of a batch run out of memory beyond so many rows; returns the sizes that it will be given."""
    seen, inner = [], getattr(owner, name)

    def limited(rows, *rest):
        seen.append(len(rows))
        if len(rows) > room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inner(rows, *rest)

    setattr(owner, name, limited)
    return seen


@pytest.mark.parametrize("averaging", ["tokens", "sequences", "micro_batches"])
def test_out_of_memory_falls_to_smaller_micro_batches_with_the_same_gradients(averaging):
    settings = dict(dtype=torch.float64, minibatch_size=5, forward_batch_size=4, loss_averaging=averaging)
    plain, cramped = make_trainer(**settings), make_trainer(**settings)
    seen = cramp(cramped, "_loss", room=1)
    expected = plain.step(*batch())
    with pytest.warns(UserWarning, match="out of memory") as caught:
        stats = cramped.step(*batch())
    assert [str(w.message) for w in caught] == [
        "out of memory with 4 sequences a forward pass: now 2",
        "out of memory with 2 sequences a forward pass: now 1",
    ]
    assert seen == [4, 2, *[1] * 10]  # it remembers
    same(weights(plain), weights(cramped), 1e-12)
    same_figures(expected, stats, rel=1e-9, abs=1e-12)


def test_out_of_memory_in_the_middle_of_a_minibatch_begins_it_again():
    """Rows of 40 tokens have no room beside each other: half of the gradient is there when it fails."""
    plain, cramped = (make_trainer(dtype=torch.float64, minibatch_size=4, forward_batch_size=2) for _ in range(2))
    lengths = [(3, 4), (2, 7), (20, 20), (20, 19)]
    loss, failed = cramped._loss, []

    def limited(rows):
        if rows.tokens.numel() > 60:
            failed.append(any(p.grad is not None for p in cramped.policy.parameters()))
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return loss(rows)

    cramped._loss = limited
    with pytest.warns(UserWarning, match="now 1"):
        for seed in range(4):
            cramped.step(*batch(lengths, seed))
    for seed in range(4):
        plain.step(*batch(lengths, seed))
    assert failed == [True] or failed == [False]  # once, whatever the order of the rows
    same(weights(plain), weights(cramped), 1e-12)


def test_scoring_falls_to_smaller_batches_too():
    plain, cramped = make_trainer(), make_trainer()
    seen = cramp(cramped.reference, "hidden_states", room=2)
    with pytest.warns(UserWarning, match="now 2"):
        rollout = cramped.collect(PROMPTS, reward)
    assert seen == [4, 2, 2]
    torch.testing.assert_close(rollout.logprobs, plain.collect(PROMPTS, reward).logprobs)


def test_no_room_for_one_row_is_an_error():
    trainer = make_trainer()
    cramp(trainer, "_loss", room=0)
    before = weights(trainer)
    with pytest.warns(UserWarning), pytest.raises(torch.cuda.OutOfMemoryError):
        trainer.step(*batch())
    same(weights(trainer), before)


# ---- rewards ---------------------------------------------------------------------------------------------------------


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
    settings = dict(steps=16, reward_timeout=2.0 if name == "hangs" else None)
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
