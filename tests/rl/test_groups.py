"""Groups of responses to one prompt: which have no spread, and dynamic sampling."""

import pytest
import torch
from small_trainer import EOS, PROMPTS, make_trainer, same

from minirlhf.rl.groups import flat_groups
from minirlhf.rl.rollout import logprobs_in_batches

SETTINGS = dict(advantages="dr_grpo", group_size=2, batch_size=6, minibatch_size=6, eos_token_id=EOS, gen_len=6)


def spread_of(*prompts):
    """A reward that tells responses to these prompts apart, and no others, and counts what it has scored."""

    def reward(asked, responses):
        reward.seen += list(asked)
        return [float(i) if prompt in prompts else 1.0 for i, prompt in enumerate(asked)]

    reward.seen = []
    return reward


def test_a_group_computes_its_prompt_once():
    """Tokens that layers get in the reference's pass and in the update: the distinct beginnings of a prompt's rows.

    The last token of a row predicts none.
    """
    trainer = make_trainer(advantages="dr_grpo", group_size=8, batch_size=16, minibatch_size=16, forward_batch_size=16,
                           gen_len=3, ppo_epochs=1)  # fmt: skip
    seen = {}
    for name, model in (("policy", trainer.policy.decoder), ("reference", trainer.reference)):
        first = next(module for module in model.modules() if type(module).__name__ == "MLP")
        first.register_forward_pre_hook(lambda _, x, name=name: seen.setdefault(name, []).append(x[0][..., 0].numel()))
    prompts = ["酒店很好，房间干净，服务", "早餐很好，位置"]
    rollout = trainer.collect(prompts, spread_of())
    widths = [len(trainer.tokenizer.encode_prompt(prompt)) for prompt in prompts]
    at = len(seen["policy"])
    trainer.step(rollout)
    rows = [row[real.bool()].tolist() for row, real in zip(rollout.tokens, rollout.mask, strict=True)]
    beginnings = {(prompt, *row[:n]) for prompt, row in zip(rollout.prompts, rows, strict=True)
                  for n in range(1, len(row))}  # fmt: skip
    assert seen["policy"][at:] == [len(beginnings)]  # the update
    assert seen["reference"] == [len(beginnings)]
    assert len(beginnings) <= sum(widths) + 16 * 2  # each prompt once
    assert len(beginnings) < 0.4 * (8 * sum(widths) + 16 * 2)


def test_flat_groups():
    assert flat_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0]), 2).tolist() == [True, False, True]
    assert flat_groups(torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 1.0]), 3).tolist() == [False, True]


def test_flat_groups_are_counted_after_scores_are_clipped():
    trainer = make_trainer(**SETTINGS)
    rollout = trainer.collect(PROMPTS[:3], spread_of("w"))
    assert rollout.prompts[2:4] == ("w", "w") and rollout.scores.tolist() == [1, 1, 2, 3, 1, 1]
    assert trainer.step(rollout)["reward/flat_groups"] == pytest.approx(2 / 3)
    clipped = make_trainer(**SETTINGS, score_clip=2.0)
    assert clipped.step(clipped.collect(PROMPTS[:3], spread_of("w")))["reward/flat_groups"] == 1.0
    alone = make_trainer(advantages="reinforce")
    assert "reward/flat_groups" not in alone.step(alone.collect(PROMPTS, spread_of()))


def test_groups_without_spread_are_replaced_by_those_of_other_prompts():
    trainer, reward = make_trainer(**SETTINGS, drop_flat_groups=20), spread_of("w")
    rollout = trainer.collect(PROMPTS[:3], reward)
    assert rollout.prompts == ("w",) * 6 and len(rollout) == 6 and rollout.group_size == 2
    assert not flat_groups(rollout.scores, 2).any()
    assert reward.seen[:6] == [prompt for prompt in PROMPTS[:3] for _ in range(2)]
    for i in range(6, len(reward.seen), 2):  # whole groups of prompts of the batch
        assert reward.seen[i] == reward.seen[i + 1] in PROMPTS[:3]
    assert all(seconds > 0 for seconds in rollout.seconds.values())
    assert trainer.step(rollout)["ppo/policy/first_ratio_error"] < 1e-5


def test_what_the_reward_reports_is_the_mean_over_all_rounds():
    def reward(asked, responses):
        rounds.append(len(asked))
        return spread_of("w")(asked, responses), {"rounds": float(len(rounds))}

    rounds = []
    trainer = make_trainer(**SETTINGS, drop_flat_groups=20)
    stats = trainer.step(trainer.collect(PROMPTS[:3], reward))
    assert len(rounds) > 1
    expected = sum(n * i for i, n in enumerate(rounds, 1)) / sum(rounds)
    assert stats["reward/rounds"] == pytest.approx(expected)


def test_rounds_of_dynamic_sampling_are_bounded_and_what_stays_flat_changes_nothing():
    trainer, reward = make_trainer(**SETTINGS, drop_flat_groups=3, init_kl_coef=0.0), spread_of()
    rollout = trainer.collect(PROMPTS[:3], reward)
    assert len(reward.seen) == 6 * 4 and len(rollout) == 6
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    stats = trainer.step(rollout)
    assert stats["reward/flat_groups"] == 1.0 and stats["ppo/loss/policy"] == 0.0 and stats["ppo/grad_norm"] == 0.0
    same(before, dict(trainer.policy.named_parameters()))


def test_a_batch_of_several_rounds_is_what_its_tokens_say():
    """Rows of prompts and responses of unlike lengths: log-probabilities computed anew from the joined tokens agree."""
    settings = {**SETTINGS, "seed": 3, "eos_token_id": None}
    sampled = make_trainer(**settings).collect(PROMPTS[:3], spread_of()).tokens
    settings |= {"eos_token_id": int(sampled[0, -4]), "drop_flat_groups": 20}  # so that the first row ends early
    trainer = make_trainer(**settings)
    rollout = trainer.collect(PROMPTS[:3], spread_of(PROMPTS[0], PROMPTS[1]))
    assert len(set(rollout.prompts)) == 2 and len(set(rollout.lengths[:, 1].tolist())) > 1
    R, vocab = rollout.response_mask.size(1), trainer.tokenizer
    for row, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses, strict=True)):
        ids = rollout.tokens[row, :-R][rollout.mask[row, :-R].bool()].tolist()
        assert ids == trainer.tokenizer.encode_prompt(prompt)
        new = rollout.tokens[row, -R:][rollout.response_mask[row]].tolist()
        assert "".join(vocab.decode_response(ids, new)) == response
    c = trainer.config
    found = logprobs_in_batches(
        trainer.models, rollout.tokens, rollout.mask, R, c.logprobs_divisor, rollout.sampling_sets
    )
    for name in ("logprobs", "ref_logprobs", "exact_kl"):
        torch.testing.assert_close(found[name], getattr(rollout, name), rtol=0, atol=1e-5)


def test_dynamic_sampling_repeats_with_its_seed_and_is_undone_after_an_error():
    def failing(texts):
        if failing.calls == 1:
            raise RuntimeError("no more")
        failing.calls += 1
        return [0.0] * len(texts)

    failing.calls = 0
    trainer, other = (make_trainer(**SETTINGS, drop_flat_groups=5) for _ in range(2))
    with pytest.raises(RuntimeError):
        trainer.collect(PROMPTS[:3], failing)
    a, b = (t.collect(PROMPTS[:3], spread_of("w")) for t in (trainer, other))
    assert torch.equal(a.tokens, b.tokens) and a.responses == b.responses
