"""A small trainer, a ragged batch for it, and what two of them are compared by."""

import pytest
import torch

from conftest import VOCAB, make_gpt2
from minirlhf import ActorCritic, PPOTrainer, Tokenizer
from minirlhf.rl.rollout import rollout_from_tokens

PROMPTS = ["酒店很好", "w", "房间干净", "早餐"]
EOS = VOCAB.index("##a")
SMALL = dict(n_embd=16, n_layer=1, n_head=2)
DEFAULTS = dict(
    steps=8, batch_size=4, minibatch_size=2, forward_batch_size=2, gen_len=5, ppo_epochs=2, lr=1e-3, device="cpu",
    adam_eps=1e-5,
)  # fmt: skip
NAN = float("nan")


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


def from_tokens(trainer, *rows):
    """The Rollout that `step` makes of queries, responses and scores."""
    return rollout_from_tokens(trainer.models, *rows, trainer.config)


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
