"""examples/ppo_in_one_file.py gives the numbers of the library's trainer, and uses nothing of its algorithm."""

import ast
import dataclasses
import sys

import pytest
import torch

import ppo_in_one_file as one
from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, PPOConfig, PPOTrainer, Tokenizer

# Clips of ratio, value and gradient that are reached within three steps, and a controller that moves quickly.
SETTINGS = one.Settings(
    iterations=3, batch_size=16, gen_len=6, ppo_epochs=2, minibatch_size=6, lr=1e-4, top_p=0.8, cliprange=0.002,
    cliprange_value=1e-4, max_grad_norm=0.4, vf_coef=0.7, gamma=0.97, lam=0.9, target=0.1, horizon=200.0, seed=3,
)  # fmt: skip
PROMPTS = ["酒店", "周围很好", "位置"]  # of two lengths, so that there is padding
NAMES = {
    "reward": "reward/mean",
    "kl": "objective/kl",
    "kl_coef": "objective/kl_coef",
    "entropy": "objective/entropy",
    "policy_loss": "ppo/loss/policy",
    "value_loss": "ppo/loss/value",
    "clipfrac": "ppo/policy/clipfrac",
    "grad_norm": "ppo/grad_norm",
}


def model(seed: int) -> GPT2:
    return make_gpt2(seed, scale=3.0, n_embd=16, n_head=2, n_positions=32)


def reward(texts: list[str]) -> torch.Tensor:
    return torch.tensor([sum(char in "好干净满意" for char in text) / len(text) for text in texts])


def trained_by_the_trainer(policy: GPT2) -> list[dict[str, float]]:
    fields = {name: value for name, value in vars(SETTINGS).items() if name != "iterations"}
    steps = SETTINGS.iterations * SETTINGS.batch_size
    # Micro-batches of the minibatch's size: a sum in another order would differ in the last digits.
    config = PPOConfig(**fields, steps=steps, forward_batch_size=6, device="cpu", precision="fp32")
    return PPOTrainer(policy, model(1), Tokenizer(VOCAB), config).train(PROMPTS, reward)


def test_three_steps_have_the_trainer_s_metrics_and_weights():
    mine, theirs, before = model(0), model(0), model(0)
    found = [stats for stats, _ in one.train(mine, model(1), Tokenizer(VOCAB), reward, PROMPTS, SETTINGS)]
    expected = trained_by_the_trainer(theirs)
    assert len(found) == len(expected) == 3
    for line, logged in zip(found, expected, strict=True):
        assert line == pytest.approx({name: logged[theirs] for name, theirs in NAMES.items()}, rel=1e-5, abs=1e-5)
    assert all(line["clipfrac"] > 0.05 and line["grad_norm"] > SETTINGS.max_grad_norm for line in found)
    assert found[0]["kl_coef"] != found[1]["kl_coef"] != found[2]["kl_coef"]
    for a, b, c in zip(mine.parameters(), theirs.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        assert (a - c).abs().max() > 1e-4  # or equality would say nothing


def test_a_token_outside_the_nucleus_is_never_drawn():
    """Probabilities .5, .3, .15, .05: the nucleus of .7 has two tokens, of .9 three; of equal ones the lower id."""
    probs = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.25, 0.25, 0.25, 0.25]])
    assert one.nucleus(probs, 0.7).tolist() == [[False, True, False, True], [True, True, True, False]]
    assert one.nucleus(probs, 0.9).tolist() == [[False, True, True, True], [True] * 4]
    policy = model(0)
    ids, mask = one.left_pad([[5, 6], [7]])
    tokens, mask, nuclei = one.sample(policy, ids, mask, 8, 0.3, torch.Generator().manual_seed(0))
    assert mask.tolist() == [[1] * 10, [0] + [1] * 9]
    assert nuclei.gather(-1, tokens[:, -8:, None]).all() and not nuclei.all()


def test_it_needs_the_models_and_the_tokenizer_alone():
    with open(one.__file__, encoding="utf-8") as file:
        text = file.read()
    imported = {
        (node.module, name.name)
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
    }
    ours = {name for module, name in imported if module.split(".")[0] not in sys.stdlib_module_names | {"torch"}}
    assert ours == {"GPT2", "SentimentReward", "Tokenizer"}
    assert {module for module, name in imported if name in ours} == {"minirlhf"}
    assert "import minirlhf" not in text and len(text.splitlines()) <= 250


def test_it_prints_a_line_an_iteration(monkeypatch, capsys):
    """On the starter weights, with a batch of four."""

    @dataclasses.dataclass(frozen=True)
    class Small(one.Settings):
        batch_size: int = 4

    monkeypatch.setattr(one, "Settings", Small)
    monkeypatch.setattr(sys, "argv", ["ppo_in_one_file.py", "--iterations", "2", "--seed", "1"])
    one.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["iteration  1", "iteration  2"]
    for line in lines:
        assert 0 < float(line.split("reward ")[1].split(",")[0]) < 1
        assert line.split("'")[1].startswith(tuple(one.PROMPTS))
    assert "KL 0.00" in lines[0] and "KL 0.00" not in lines[1]
