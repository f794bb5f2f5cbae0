"""Training in 16 bits: fp32 weights, finite figures, one cast of each weight an update."""

import math

import pytest
import torch
from small_trainer import PROMPTS, batch, from_tokens, make_trainer, reward, weights
from torch.utils._python_dispatch import TorchDispatchMode


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
    rollout = from_tokens(trainer, *rows)
    whole = make_trainer(precision="bf16", minibatch_size=5, forward_batch_size=5, ppo_epochs=1)
    with Casts(trainer.policy.decoder.blocks[0].mlp.c_fc.weight.shape) as casts:
        stats = trainer.step(rollout)
    assert casts.count == 1
    same = whole.step(*rows)
    for name in ("ppo/loss/total", "ppo/grad_norm"):
        assert stats[name] == pytest.approx(same[name], rel=0.02)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_clips_the_gradient_of_the_loss_itself(precision):
    """The norm that is clipped and logged is that of fp32, not one multiplied by the loss scale."""
    norms = [
        make_trainer(precision=name, ppo_epochs=1, minibatch_size=5).step(*batch())["ppo/grad_norm"]
        for name in ("fp32", precision)
    ]
    assert norms[1] == pytest.approx(norms[0], rel=0.1)


def test_with_fp16_a_loss_scale_is_found_before_the_run_is_given_up():
    trainer = make_trainer(precision="fp16", minibatch_size=5, forward_batch_size=5, ppo_epochs=30)
    trainer.precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30)
    stats = trainer.step(*batch())
    assert stats["ppo/skipped_updates"] > 3 and stats["ppo/updates"] > 3
    assert trainer.bad_steps == 0 and trainer.precision.scaler.get_scale() < 2.0**30
