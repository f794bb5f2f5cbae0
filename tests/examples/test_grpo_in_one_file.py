"""examples/grpo_in_one_file.py gives the numbers of the library's trainer, and uses nothing of its algorithm."""

import ast
import dataclasses
import sys

import pytest
import torch
from test_ppo_in_one_file import PROMPTS, model

import grpo_in_one_file as one
from conftest import VOCAB
from minirlhf import GPT2, PPOConfig, PPOTrainer, Tokenizer

# Clips of ratio and gradient that are reached within three steps.
SETTINGS = one.Settings(
    iterations=3, batch_size=18, group_size=3, gen_len=6, ppo_epochs=2, minibatch_size=6, lr=1e-4, cliprange=0.002,
    max_grad_norm=0.1, init_kl_coef=0.3, seed=3,
)  # fmt: skip
NAMES = {
    "reward": "reward/mean",
    "kl": "objective/kl",
    "policy_loss": "ppo/loss/policy",
    "clipfrac": "ppo/policy/clipfrac",
    "grad_norm": "ppo/grad_norm",
}


def reward(texts: list[str]) -> torch.Tensor:
    """Of few values, so that some groups are flat."""
    return torch.tensor([float(sum(char in "好干净满意" for char in text) > 1) for text in texts])


def trained_by_the_trainer(policy: GPT2) -> list[dict[str, float]]:
    fields = {name: value for name, value in vars(SETTINGS).items() if name != "iterations"}
    fields |= dict(steps=SETTINGS.iterations * SETTINGS.batch_size, forward_batch_size=6, top_p=1.0)
    config = PPOConfig.preset("grpo", **fields, device="cpu", precision="fp32")
    return PPOTrainer(policy, model(1), Tokenizer(VOCAB), config).train(PROMPTS, reward)


def test_three_steps_have_the_trainer_s_metrics_and_weights():
    mine, theirs, before = model(0), model(0), model(0)
    found = [stats for stats, _ in one.train(mine, model(1), Tokenizer(VOCAB), reward, PROMPTS, SETTINGS)]
    expected = trained_by_the_trainer(theirs)
    assert len(found) == len(expected) == 3
    for line, logged in zip(found, expected, strict=True):
        assert line == pytest.approx({name: logged[theirs] for name, theirs in NAMES.items()}, rel=1e-5, abs=1e-5)
    assert sum(line["clipfrac"] for line in found) > 0.05
    assert max(line["grad_norm"] for line in found) > SETTINGS.max_grad_norm
    assert 0 < sum(logged["reward/flat_groups"] for logged in expected) < 3
    for a, b, c in zip(mine.parameters(), theirs.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert (a - c).abs().max() > 1e-4  # or equality would say nothing


def test_it_is_short_and_needs_the_models_and_the_tokenizer_alone():
    with open(one.__file__, encoding="utf-8") as file:
        text = file.read()
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    ours = [name.name for node in nodes if node.module == "minirlhf" for name in node.names]
    assert ours == ["GPT2", "SentimentReward", "Tokenizer"]
    assert "import minirlhf" not in text and "minirlhf." not in text and len(text.splitlines()) <= 120


def test_it_prints_a_line_an_iteration(monkeypatch, capsys):
    """On the starter weights, with a batch of four."""

    @dataclasses.dataclass(frozen=True)
    class Small(one.Settings):
        batch_size: int = 4
        group_size: int = 2

    monkeypatch.setattr(one, "Settings", Small)
    monkeypatch.setattr(sys, "argv", ["grpo_in_one_file.py", "--iterations", "2", "--seed", "1"])
    one.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["iteration  1", "iteration  2"]
    assert "KL 0.00" in lines[0] and "KL 0.00" not in lines[1]
