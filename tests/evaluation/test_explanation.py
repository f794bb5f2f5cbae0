"""The explanation of one response: its figures against explicit loops, over both decoders."""

import io
import math

import pytest
import torch

import oracle
from conftest import VOCAB
from minirlhf import ActorCritic, PPOTrainer, Tokenizer
from minirlhf.evaluation.explanation import COLUMNS, explain

SMALL = dict(n_embd=16, n_layer=1, n_head=2)
PROMPTS = ["酒店很好", "w", "房间干净", "早餐"]


def test_every_figure_of_a_token_is_that_of_explicit_loops(make_decoder, capsys):
    """After a step, so that policy, old policy and reference are three; without sampling sets."""
    policy = ActorCritic(make_decoder(0, scale=4.0, **SMALL))
    with torch.no_grad():
        policy.value_head.summary.weight.normal_(generator=torch.Generator().manual_seed(0))
    trainer = PPOTrainer(
        policy, make_decoder(1, scale=4.0, **SMALL), Tokenizer(VOCAB), batch_size=4, minibatch_size=2, gen_len=5,
        top_p=1.0, lr=1e-2, whiten_advantages=False, adaptive_kl=False, init_kl_coef=0.3, gamma=0.9, lam=0.8,
        device="cpu",
    )  # fmt: skip
    rollout = trainer.collect(PROMPTS, lambda texts: [len(set(text)) / 8 for text in texts])
    trainer.step(rollout)
    explanation = explain(trainer, rollout, 2)
    prompt, ids = rollout.tokens[2, :-5][rollout.mask[2, :-5].bool()], rollout.tokens[2, -5:]
    with torch.no_grad():
        logits, reference = (model(torch.cat([prompt, ids])[None]) for model in (policy, trainer.reference))
    new, ref = ([oracle.log_softmax(row)[token] for row, token in zip(found[0, -6:-1].tolist(), ids, strict=True)]
                for found in (logits[0], reference))  # fmt: skip
    old, values = rollout.logprobs[2].tolist(), rollout.values[2].tolist()
    kl = [oracle.k1(p, q) for p, q in zip(old, ref, strict=True)]
    rewards = [-0.3 * x for x in kl]
    rewards[-1] += rollout.scores[2].item()
    advantages, returns = oracle.gae_row(rewards, values, 0.9, 0.8)
    ratios = [math.exp(p - q) for p, q in zip(new, old, strict=True)]
    expected = {"logprob": new, "old_logprob": old, "ref_logprob": ref, "kl": kl, "reward": rewards, "value": values,
                "returns": returns, "advantage": advantages, "ratio": ratios}  # fmt: skip
    for name, column in expected.items():
        assert [token[name] for token in explanation.tokens] == pytest.approx(column, rel=2e-4, abs=2e-4), name
    bound = [r > 1.2 if a > 0 else r < 0.8 for r, a in zip(ratios, advantages, strict=True)]
    assert [token["clipped"] for token in explanation.tokens] == bound and any(bound)
    assert [token["token"].strip() for token in explanation.tokens] == [VOCAB[i].removeprefix("##") for i in ids]
    assert (explanation.prompt, explanation.response) == (PROMPTS[2], rollout.responses[2])
    assert explanation.score == rollout.scores[2].item()
    assert str(explanation) in capsys.readouterr().out
    with pytest.raises(ValueError, match="the rollout has rows 0 to 3, got 4"):
        explain(trainer, rollout, 4)


def test_a_sample_of_a_group_stands_beside_the_scores_of_the_others(make_decoder):
    """Scores 2 and 4 of the second prompt, the KL in the loss: mean 3, standard deviation sqrt(2), no values."""
    trainer = PPOTrainer(
        make_decoder(0, **SMALL), make_decoder(1, **SMALL), Tokenizer(VOCAB), advantages="grpo", group_size=2,
        batch_size=4, minibatch_size=2, gen_len=3, whiten_advantages=False, kl_estimator="k3", kl_placement="loss",
        device="cpu",
    )  # fmt: skip
    rollout = trainer.collect(PROMPTS[:2], lambda texts: [0.5, 0.25, 2.0, 4.0])
    explanation = explain(trainer, rollout, 3, io.StringIO())
    lines = str(explanation).splitlines()
    assert (
        lines[0]
        == f"prompt {PROMPTS[1]!r}, score 4.0000; the group's scores 2.0000, 4.0000 (mean 3.0000, of the others 2.0000)"
    )
    assert explanation.group == (2.0, 4.0) and [token["reward"] for token in explanation.tokens] == [0.0, 0.0, 4.0]
    assert [token["advantage"] for token in explanation.tokens] == pytest.approx([0.5**0.5] * 3, rel=1e-5)
    assert lines[-4].split() == [name for name in COLUMNS if name not in ("value", "returns")]  # then 3 tokens
