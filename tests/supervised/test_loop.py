"""The supervised loop: a loop written by hand, parts of a batch, what stops it, and its state."""

import math

import pytest
import torch
from torch import nn

from minirlhf.device.random import DropoutStream
from minirlhf.supervised.loop import FitConfig, SupervisedTrainer

PLAIN = dict(lr=0.05, schedule="constant", warmup=0.0, device="cpu")


class Regression(SupervisedTrainer):
    """A linear model, which can bring the loss to 0; dropout is of its inputs."""

    kind = "regression"

    def __init__(self, config, epochs=None, model=None, dropout=0.0, sizes=None):
        self.rate, self.sizes, self.seen = dropout, sizes, []
        epochs = [[batch(), batch()]] * config.epochs if epochs is None else epochs
        super().__init__(small_model() if model is None else model, config, epochs, [str(i) for i in range(16)])

    def loss(self, batch):
        self.seen.append(self.model.training)
        x, y = batch
        return (self.model(nn.functional.dropout(x, self.rate, self.model.training)).float() - y).square().mean()

    def parts(self, batch):
        if self.sizes is None:
            return super().parts(batch)
        rows = zip(*(x.split(self.sizes) for x in batch), strict=True)
        return [(part, len(part[0]) / len(batch[0])) for part in rows]


def small_model() -> nn.Linear:
    model, generator = nn.Linear(3, 2), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return model.eval()


def batch(rows: int = 16):
    x = torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    y = x @ torch.tensor([[1.0, -1.0], [0.5, 2.0], [0.0, 1.0]]) + 0.3
    return x[:rows], y[:rows]


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


# ---- configuration --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    *(("epochs", v) for v in (0, -1, 1.5, "3")), *(("lr", v) for v in (0, -1e-3, math.nan)),
    *(("max_grad_norm", v) for v in (0, -1, math.nan)), *(("warmup", v) for v in (-0.1, 1.1, math.nan)),
    *(("lr_floor", v) for v in (-0.1, 1.1, math.nan)), *(("weight_decay", v) for v in (-0.1, math.nan)),
    ("schedule", "step"), ("precision", "fp8"), ("precision", None), ("precision", "auto"),
    ("betas", [0.9, 0.9]), ("betas", (0.9,)), ("betas", (0.9, 1.0)), ("max_length", 1), ("max_length", True),
    ("tokens_per_batch", 127), ("tokens_per_batch", 4096.0), ("seed", 0.5),
    ("sharding", "half"), ("sharding", True),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=f"FitConfig.{field} must be"):
        FitConfig(**{field: value})


# ---- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_brings_the_loss_down_and_leaves_evaluation_mode(precision):
    trainer = Regression(FitConfig(epochs=60, precision=precision, weight_decay=0.0, **PLAIN))
    before = trainer.loss(batch()).item()
    trainer.train()
    assert trainer.seen[1:] == [True] * 120 and not trainer.model.training
    assert trainer.loss(batch()).item() < 0.01 * before


def test_it_equals_a_loop_by_hand():
    other = small_model()
    config = FitConfig(epochs=2, lr=0.1, schedule="linear", warmup=0.0, lr_floor=0.2, weight_decay=0.5,
                       betas=(0.8, 0.9), max_grad_norm=0.7, device="cpu")  # fmt: skip
    trainer = Regression(config)
    trainer.train()
    groups = [{"params": [other.weight], "weight_decay": 0.5}, {"params": [other.bias], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    x, y = batch()
    for factor in (0.9, 0.7, 0.5, 0.3):  # linear from 1 to 0.2, at the middle of each of four steps
        optimizer.zero_grad()
        (other(x) - y).square().mean().backward()
        nn.utils.clip_grad_norm_(other.parameters(), 0.7)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * factor
        optimizer.step()
    torch.testing.assert_close(trainer.model.weight, other.weight)
    torch.testing.assert_close(trainer.model.bias, other.bias)


def test_every_step_is_reported_with_its_batch():
    epochs = [[batch(n) for n in range(1, epoch + 2)] for epoch in range(3)]
    trainer, steps = Regression(FitConfig(epochs=3, **PLAIN), epochs), []
    first = trainer.loss(batch(1)).item()
    trainer.train(lambda *step: steps.append(step))
    assert [len(x) for (x, _), _ in steps] == [1, 1, 2, 1, 2, 3] and trainer.steps_done == trainer.steps_total == 6
    progress = [stats["regression/progress"] for _, stats in steps]
    assert progress == pytest.approx([1 / 3, 1 / 2, 2 / 3, 7 / 9, 8 / 9, 1])
    assert steps[0][1]["regression/loss"] == pytest.approx(first)


def test_parts_of_a_batch_make_one_step_of_it():
    """Their shares weigh them, so unequal parts are the mean over all rows; the gradient of the sum is clipped."""
    config, losses, trainers = FitConfig(epochs=3, max_grad_norm=0.3, **PLAIN), [], []
    for sizes in ([16], [1, 10, 5]):
        trainers.append(Regression(config, [[batch()]] * 3, sizes=sizes))
        seen = []
        trainers[-1].train(lambda _, stats, seen=seen: seen.append(stats["regression/loss"]))
        losses.append(seen)
    assert len(losses[1]) == 3 and losses[1] == pytest.approx(losses[0], rel=1e-5)
    torch.testing.assert_close(trainers[1].model.weight, trainers[0].model.weight)


def test_a_single_step_with_the_default_schedule_trains():
    trainer = Regression(FitConfig(epochs=1, device="cpu"), [[batch()]])
    trainer.train()
    assert not torch.equal(trainer.model.weight, small_model().weight)


def test_frozen_parameters_stay():
    model = small_model()
    model.bias.requires_grad_(False)
    trainer = Regression(FitConfig(epochs=2, **PLAIN), model=model)
    trainer.train()
    assert torch.equal(model.bias, small_model().bias) and not torch.equal(model.weight, small_model().weight)
    assert trainer.state_dict()["counters"]["frozen"] == ["bias"]


# ---- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("of", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_it_reaches_the_weights(of, bad, monkeypatch):
    trainer = Regression(FitConfig(**PLAIN))
    if of == "loss":
        monkeypatch.setattr(trainer, "loss", lambda _: trainer.model.weight.sum() * bad)
    else:
        trainer.model.weight.register_hook(lambda gradient: gradient * bad)
    with pytest.raises(FloatingPointError, match=f"the {of} became .* in epoch 0, batch 0; lower the learning rate"):
        trainer.train()
    assert same(trainer.model, small_model()) and not trainer.model.training
    for attempt in (trainer.train, trainer.state_dict):
        with pytest.raises(RuntimeError, match="stopped within"):
            attempt()


# ---- state ----------------------------------------------------------------------------------------------------------


def stop_at(step: int):
    def on_step(batch, stats):
        nonlocal step
        step -= 1
        if step == 0:
            raise KeyboardInterrupt

    return on_step


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 6])
def test_a_state_is_gone_on_from_bit_for_bit(stop):
    """Moments, the stream of dropout and the position, within an epoch and at its end; there or in the same trainer."""
    x, y = batch()
    epochs = [[(x[i : i + 6], y[i : i + 6]) for i in (0, 5, 10)]] * 2

    def new():
        return Regression(FitConfig(epochs=2, **PLAIN), epochs, dropout=0.5)

    whole, parts, expected, seen = new(), new(), [], []
    whole.train(lambda _, stats: expected.append(stats))
    if stop:
        with pytest.raises(KeyboardInterrupt):
            parts.train(stop_at(stop))
    state = parts.state_dict()
    assert state["counters"]["steps"] == stop
    torch.rand(5)  # what happens to the global stream meanwhile does not matter
    again = new()
    again.model.load_state_dict(parts.model.state_dict())
    again.load_state_dict(
        {"tensors": {n: t.clone() for n, t in state["tensors"].items()}, "counters": state["counters"]}
    )
    before = torch.get_rng_state()
    again.train(lambda _, stats: seen.append(stats))
    parts.train()
    assert torch.equal(torch.get_rng_state(), before)
    assert seen == expected[stop:] and same(again.model, whole.model) and same(parts.model, whole.model)


def test_other_data_and_states_that_do_not_fit_are_refused():
    trainer = Regression(FitConfig(**PLAIN))
    trainer.train()
    state = trainer.state_dict()

    def refused(told, tensors=None, **counters):
        other = {"tensors": state["tensors"] | (tensors or {}), "counters": state["counters"] | counters}
        with pytest.raises(ValueError, match=told):
            Regression(FitConfig(**PLAIN)).load_state_dict(other)

    data = state["counters"]["data"]
    refused("began with other data: with 9 texts or rankings, 16 are given", data={**data, "count": 9})
    refused("began with other data", data={**data, "sha256": "other"})
    refused("generator.dropout is missing, or was saved on another", {"generator.dropout": torch.zeros(3)})
    refused(r"exp_avg.bias has shape \(3,\)", {"optimizer.exp_avg.bias": torch.zeros(3)})
    refused("dtype torch.float64", {"optimizer.exp_avg_sq.bias": torch.zeros(2).double()})


def test_a_dropout_stream_is_its_own_and_gives_the_global_one_back():
    streams, before = [DropoutStream(seed, torch.device("cpu")) for seed in (1, 1, 2)], torch.get_rng_state()
    drawn = []
    for stream in streams:
        for _ in range(2):
            with stream.use():
                drawn.append(torch.rand(3))
    first, second, *again, other, _ = drawn
    assert torch.equal(first, again[0]) and torch.equal(second, again[1])
    assert not torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
