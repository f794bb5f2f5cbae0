"""From scores to rewards of tokens: against the oracle, worked by hand, and as the settings say."""

import pytest
import torch
from ragged import NAN, batches, close, spoil, tensors
from small_trainer import EOS, batch, from_tokens, make_trainer, same, weights

import oracle
from minirlhf.rl.shaping import token_rewards, with_token_rewards


def test_token_rewards_equal_the_oracle():
    for mask, kl, _, _, scores in batches():
        actual = token_rewards(*tensors(scores, kl), 0.3, torch.tensor(mask))
        close(actual, oracle.token_rewards(scores, kl, 0.3, mask))


def test_token_rewards_with_shares_of_single_tokens_equal_the_oracle():
    for mask, kl, shares, _, scores in batches():
        arguments = (*tensors(scores, kl), 0.3, torch.tensor(mask), "last_token", spoil(*tensors(shares, mask)))
        close(token_rewards(*arguments), oracle.token_rewards(scores, kl, 0.3, mask, shares))


def test_shares_and_the_rest_at_the_last_token_worked_by_hand():
    mask, shares = torch.tensor([[1, 1, 1], [1, 0, 0]]), torch.tensor([[1.0, -2.0, 4.0], [0.5, 9.0, 9.0]])
    scores, kl = torch.tensor([10.0, 0.5]), torch.zeros(2, 3)
    assert token_rewards(scores, kl, 1.0, mask, score_shares=shares).tolist() == [[1, -2, 4 + 7], [0.5, 0, 0]]
    last_column = token_rewards(scores, kl, 1.0, mask, "last_column", shares)
    assert last_column.tolist() == [[1, -2, 4 + 7], [0.5, 0, 0]]


def test_token_rewards_worked_by_hand():
    # -0.5 * KL at each token, the score at the last real one: 10 at column 1 of row 0, 20 at column 2 of row 1.
    kl = torch.tensor([[1.0, 2, NAN], [0, -4, 6]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = token_rewards(torch.tensor([10.0, 20.0]), kl, 0.5, mask)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [0.0, 2.0, 17.0]]


def test_rlhf_book_takes_the_mean_of_the_kl_of_a_response_and_we_the_sum():
    """Its reward of REINFORCE, RLOO and PPO is S - beta mean(KL): ours with beta over the length of the row."""
    for mask, kl, _, _, scores in batches():
        for b, n in enumerate(mask.sum(1)):
            theirs = scores[b] - 0.3 * sum(kl[b][:n]) / n
            ours = token_rewards(*tensors(scores[b : b + 1], kl[b : b + 1]), 0.3 / n, torch.tensor(mask[b : b + 1]))
            close(ours.sum(), theirs)


def test_token_rewards_of_a_row_without_tokens_are_zero():
    rewards = token_rewards(torch.tensor([5.0, 7.0]), torch.ones(2, 2), 1.0, torch.tensor([[0, 0], [1, 0]]))
    assert rewards.tolist() == [[0.0, 0.0], [6.0, 0.0]]


def test_a_score_at_the_last_column_is_lost_for_shorter_rows():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    rewards = token_rewards(torch.tensor([5.0, 7.0]), torch.ones(2, 3), 1.0, mask, score_position="last_column")
    assert rewards.tolist() == [[-1.0, -1.0, 0.0], [-1.0, -1.0, 6.0]]


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(score_scale=0.5), [1.0, -2.0, 0.5, 3.0, 0.0]),
        (dict(score_clip=1.5), [1.5, -1.5, 1.0, 1.5, 0.0]),
        (dict(score_scale=0.5, score_clip=1.5), [1.0, -1.5, 0.5, 1.5, 0.0]),
        (dict(missing_eos="replace", missing_eos_score=-9.0, eos_token_id=EOS), [2.0, -9.0, -9.0, -9.0, 0.0]),
        (dict(missing_eos="subtract", missing_eos_score=1.0, eos_token_id=EOS), [2.0, -5.0, 0.0, 5.0, 0.0]),
        (dict(missing_eos="replace", missing_eos_score=-9.0, eos_token_id=(EOS, 7)), [2.0, -9.0, 1.0, -9.0, 0.0]),
    ],
)
def test_scores_are_changed_as_the_settings_say(settings, expected):
    """The same as a step on scores that were changed by hand. Responses have 4, 1, 2, 7 and 5 tokens."""
    queries, responses, _ = batch()
    scores = [2.0, -4.0, 1.0, 6.0, 0.0]
    responses[0][-1] = responses[4][-1] = EOS
    responses[3][2], responses[2][-1] = EOS, 7  # in the middle: does not end with it
    one, other = make_trainer(**settings), make_trainer()
    one.step(queries, responses, scores)
    other.step(queries, responses, expected)
    same(weights(one), weights(other))


def token_scores(responses, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(len(response), generator=generator).tolist() for response in responses]


def test_scores_of_single_tokens_are_kept_and_their_sum_is_the_score():
    queries, responses, _ = batch()
    scores = token_scores(responses)
    trainer = make_trainer(dtype=torch.float64)
    rollout = from_tokens(trainer, queries, responses, scores)
    assert rollout.scores.tolist() == pytest.approx([sum(row) for row in scores])
    with_rewards, shaped = with_token_rewards(rollout, 0.0, trainer.config)
    assert shaped.tolist() == rollout.scores.tolist()
    for row, given, response in zip(with_rewards.token_rewards.tolist(), scores, responses, strict=True):
        assert row == pytest.approx([*given, *[0.0] * (7 - len(response))], abs=1e-6)


@pytest.mark.parametrize("settings", [
    dict(score_scale=0.25), dict(score_scale=3.0, score_clip=0.5), dict(score_clip=0.25),
    dict(missing_eos="subtract", missing_eos_score=1.0, eos_token_id=EOS),
])  # fmt: skip
def test_shares_of_tokens_are_scaled_as_the_score_is_and_the_last_one_gets_the_rest(settings):
    queries, responses, _ = batch()
    scores = token_scores(responses)
    trainer = make_trainer(dtype=torch.float64, **settings)
    given = [scores, [sum(row) for row in scores]]
    (of_tokens, shaped), (as_one, expected) = (
        with_token_rewards(from_tokens(trainer, queries, responses, form), 0.0, trainer.config) for form in given
    )
    rewards = of_tokens.token_rewards
    assert shaped.tolist() == pytest.approx(expected.tolist(), abs=1e-6)  # as for scores of whole responses
    assert rewards.sum(-1).tolist() == pytest.approx(as_one.token_rewards.sum(-1).tolist(), abs=1e-6)
    factor = settings.get("score_scale", 1.0)
    for row, given in zip(rewards.tolist(), scores, strict=True):
        before_last = len(given) - 1
        assert row[:before_last] == pytest.approx([factor * x for x in given[:-1]], abs=1e-6)
