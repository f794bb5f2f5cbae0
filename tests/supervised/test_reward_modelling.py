"""The ranking loss against explicit loops in float64, one forward pass an answer, and training on toy preferences."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import oracle
from conftest import VOCAB, exact, make_bert, make_gpt2
from minirlhf import GPT2, BertClassifier, BertConfig, GPT2Config, RewardModel, Tokenizer
from minirlhf.rewards.reward_model import DecoderScorer
from minirlhf.supervised.reward_modelling import (
    RankingFigures,
    RewardModelTrainer,
    RewardTrainingConfig,
    comparisons,
    evaluate_rankings,
    ranking_loss,
    reliability_table,
)
from minirlhf.text.preferences import Ranking, split_rankings

CONFIG = RewardTrainingConfig(epochs=1, lr=3e-3, max_length=16, tokens_per_batch=200, device="cpu", betas=(0.9, 0.95))
SIZES = dict(vocab_size=len(VOCAB), n_positions=16, n_embd=16, n_layer=1, n_head=2)
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
RAGGED = [
    Ranking("酒店", ("很好", "一般", "太差")), Ranking("", ("满意", "失望"), 0.7),
    Ranking("位置", ("好", "差评！", "脏太脏", "a b c d", "wifi太差")), Ranking("早餐", ("推荐", "差")),
]  # fmt: skip


def fresh(trunk: str = "gpt2", dropout: float = 0.0) -> RewardModel:
    if trunk == "gpt2":
        rates = dict.fromkeys(NO_DROPOUT, dropout)
        network = DecoderScorer(GPT2(GPT2Config(**SIZES, **rates, initializer_range=0.1)))
    else:
        network = BertClassifier(BertConfig(
            vocab_size=len(VOCAB), max_position_embeddings=16, hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=16, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, initializer_range=0.2, id2label={0: "reward"},
        ))  # fmt: skip
    return RewardModel(network, Tokenizer(VOCAB), device="cpu")


# ---- the loss -------------------------------------------------------------------------------------------------------


def loss_by_loops(scores, sizes, margins):
    """-1 / C(K, 2) E[log sigmoid(r(x, y_w) - r(x, y_l))] (Ouyang et al. 2022, eq. 1), a margin off each difference.

    scores: real or complex numbers, list after list, best first.
    """
    total, start = 0.0, 0
    for size, margin in zip(sizes, margins, strict=True):
        of_this_list = 0.0
        for better in range(size):
            for worse in range(better + 1, size):
                z = scores[start + better] - scores[start + worse] - margin
                of_this_list = of_this_list - np.log(1 / (1 + np.exp(-z)))
        total = total + of_this_list / math.comb(size, 2)
        start += size
    return total / len(sizes)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 9), st.floats(0, 3)), min_size=1, max_size=5), st.integers(0, 2**31))
def test_loss_and_gradient_equal_the_loops(lists, seed):
    sizes, margins = zip(*lists, strict=True)
    values = 3 * np.random.default_rng(seed).standard_normal(sum(sizes))
    scores = torch.tensor(values, requires_grad=True)
    loss = ranking_loss(scores, sizes, torch.tensor(margins, dtype=torch.float64))
    loss.backward()
    assert loss.dtype == torch.float64 and loss.shape == ()
    assert loss.item() == pytest.approx(loss_by_loops(values, sizes, margins), rel=1e-12)
    h = 1e-30  # the complex step: f'(x) = Im f(x + ih) / h
    slopes = [loss_by_loops(values + 1j * h * step, sizes, margins).imag / h for step in np.eye(len(values))]
    assert scores.grad.tolist() == pytest.approx(slopes, rel=1e-10, abs=1e-14)


def test_loss_by_hand():
    assert ranking_loss(torch.zeros(2), [2]).item() == pytest.approx(math.log(2))
    # Differences 1, 3 and 2 of the first list; 0.5 - 1.5 of the second.
    scores, margins = torch.tensor([3.0, 2.0, 0.0, 0.5, 0.0]), torch.tensor([0.0, 1.5])
    first = (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3)) + math.log1p(math.exp(-2))) / 3
    second = math.log1p(math.exp(1))
    assert ranking_loss(scores, [3, 2], margins).item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert ranking_loss(scores, [3, 2]).item() == pytest.approx((first + math.log1p(math.exp(-0.5))) / 2, rel=1e-6)


def test_large_differences_do_not_overflow():
    scores = torch.tensor([0.0, 1e4], requires_grad=True)
    loss = ranking_loss(scores, [2])
    loss.backward()
    assert loss.item() == pytest.approx(1e4) and scores.grad.tolist() == [-1.0, 1.0]


def test_all_pairs_of_each_list():
    winners, losers, lists = comparisons([3, 2])
    assert list(zip(winners.tolist(), losers.tolist(), lists.tolist(), strict=True)) == [
        (0, 1, 0), (0, 2, 0), (1, 2, 0), (3, 4, 1),
    ]  # fmt: skip
    assert [x.shape for x in comparisons([])] == [(0,)] * 3


def test_the_gradient_of_the_whole_model_is_the_oracle_s(tokenizer, make_decoder):
    """Text to loss in float64 through a second decoder in numpy, along random directions in the space of weights."""
    decoder = exact(make_decoder(scale=3.0, **SIZES))
    model = RewardModel(DecoderScorer(decoder), tokenizer, device="cpu").double()
    sequences = [tokenizer.encode(text) for ranking in RAGGED for text in ranking.texts]
    sizes, margins = [len(r.answers) for r in RAGGED], [r.margin for r in RAGGED]
    scored = model.network(*padded(sequences)).squeeze(-1)
    loss = ranking_loss(scored, sizes, torch.tensor(margins, dtype=torch.float64))
    loss.backward()

    parameters = {name: p for name, p in model.network.named_parameters()}
    rng = np.random.default_rng(0)
    for _ in range(3):
        directions = {name: rng.standard_normal(p.shape) for name, p in parameters.items()}
        moved = {name: (p.detach().numpy() + 1e-30j * directions[name])[None] for name, p in parameters.items()}
        states = [oracle.hidden_states(moved, ids, SIZES["n_head"])[0, -1] for ids in sequences]
        theirs = loss_by_loops([(moved["score.weight"][0, 0] * h).sum() for h in states], sizes, margins)
        slope = sum((p.grad.numpy() * directions[name]).sum() for name, p in parameters.items())
        assert loss.item() == pytest.approx(theirs.real, rel=1e-10)
        assert slope == pytest.approx(theirs.imag / 1e-30, rel=1e-8)


def padded(sequences) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, sequences))
    rows = [(s + [0] * (width - len(s)), [1] * len(s) + [0] * (width - len(s))) for s in sequences]
    return torch.tensor([ids for ids, _ in rows]), torch.tensor([mask for _, mask in rows])


# ---- training -------------------------------------------------------------------------------------------------------

FILLERS = list("酒店周围位置前台房间")


def train(model, rankings, config=CONFIG, held_out=()) -> list[RankingFigures]:
    """Train to the end. Returns the figures on held-out rankings, before the first step and after each."""
    figures = [evaluate_rankings(model, held_out)] if held_out else []
    trainer = RewardModelTrainer(model, rankings, config)
    trainer.train(lambda *_: figures.append(evaluate_rankings(model, held_out)) if held_out else None)
    return figures


def toy(count: int, wanted: str = "好", size: int = 2) -> list[Ranking]:
    """Random texts; better is the one with more of a character."""
    rng, rankings = random.Random(0), []
    while len(rankings) < count:
        texts = []
        for times in reversed(range(size)):
            letters = rng.choices(FILLERS, k=rng.randint(4, 8)) + [wanted] * times
            rng.shuffle(letters)
            texts.append("".join(letters))
        rankings.append(Ranking(rng.choice(FILLERS), tuple(texts)))
    return rankings


@pytest.mark.parametrize(("trunk", "size"), [("gpt2", 3), ("bert", 2)])
def test_a_toy_preference_is_learned_on_held_out_lists(trunk, size):
    rankings, held_out = split_rankings(toy(200, size=size), 0.25, by="answers")
    model = fresh(trunk)
    before = evaluate_rankings(model, held_out)
    train(model, rankings, dataclasses.replace(CONFIG, epochs=6))
    after = evaluate_rankings(model, held_out)
    assert after.pairs == len(held_out) * size * (size - 1) / 2 > 25
    assert 0.2 < before.accuracy < 0.8 and after.accuracy > 0.97 and after.loss < 0.15 < before.loss
    assert not model.training


@pytest.mark.parametrize("margin", [0.0, 1.0])
def test_disputed_pairs_get_the_log_odds_and_a_margin_holds_them_apart(margin):
    """Three votes against one. At the least loss 3 sigmoid(m - d) = sigmoid(m + d), that is x^2 - 2 M x - 3 = 0
    with x = exp(d) and M = exp(m): d = log 3 without a margin."""
    model, pair = fresh(), ("很好", "太差")
    votes = [Ranking("", pair, margin)] * 3 + [Ranking("", pair[::-1], margin)]
    train(model, votes, dataclasses.replace(CONFIG, epochs=150, weight_decay=0.0))
    good, bad = model.scores(pair).tolist()
    assert good - bad == pytest.approx(math.log(math.exp(margin) + math.sqrt(math.exp(2 * margin) + 3)), abs=0.05)


@pytest.mark.parametrize("tokens_per_batch", [16, 60, 4096])
def test_one_forward_pass_an_answer_and_a_ranking_in_one_batch(monkeypatch, tokens_per_batch):
    """K passes for K (K - 1) / 2 pairs, nothing twice, nothing divided, within the budget of tokens."""
    model, seen, losses = fresh(), [], []
    original = model.score
    monkeypatch.setattr(model, "score", lambda ids: seen.append([list(x) for x in ids]) or original(ids))
    config = dataclasses.replace(CONFIG, epochs=2, tokens_per_batch=tokens_per_batch)
    trainer = RewardModelTrainer(model, RAGGED, config)
    trainer.train(lambda *step: losses.append(step))
    assert trainer.steps_total == trainer.steps_done == len(losses)
    tokenizer = Tokenizer(VOCAB)
    rankings = [[tokenizer.encode(text, 16) for text in ranking.texts] for ranking in RAGGED]
    answers = sorted(ids for ranking in rankings for ids in ranking)
    assert sorted(ids for batch in seen for ids in batch) == sorted(answers * 2)
    assert len(seen) == len(losses)
    for batch in seen:  # whole rankings one after the other
        left, count = batch, 0
        while left:
            (whole,) = [ranking for ranking in rankings if left[: len(ranking)] == ranking]
            left, count = left[len(whole) :], count + 1
        assert count == 1 or len(batch) * max(map(len, batch)) <= tokens_per_batch
    assert {16: 4, 60: 2, 4096: 1}[tokens_per_batch] == len(seen) / 2


def test_the_first_loss_is_that_of_the_untrained_model():
    model = fresh()
    expected, seen = evaluate_rankings(model, RAGGED).loss, []
    config = dataclasses.replace(CONFIG, tokens_per_batch=4096)
    RewardModelTrainer(model, RAGGED, config).train(lambda _, stats: seen.append(stats))
    assert seen == [{"reward_model/progress": 1.0, "reward_model/loss": pytest.approx(expected, rel=1e-5)}]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_same_seed_gives_the_same_weights(dropout):
    """With measuring in between or not."""

    def trained(seed: int, held_out=()) -> dict[str, torch.Tensor]:
        model = fresh(dropout=dropout)
        train(model, toy(20), dataclasses.replace(CONFIG, epochs=2, seed=seed), held_out)
        return model.state_dict()

    torch.rand(1)  # whatever the global generator has done before
    state = torch.get_rng_state()
    first, second, other = trained(0), trained(0, toy(5)), trained(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("trunk", "precision"), [("gpt2", "bf16"), ("bert", "fp16")])
def test_mixed_precision_learns_too(trunk, precision):
    model, losses = fresh(trunk), []
    config = dataclasses.replace(CONFIG, epochs=4, precision=precision)
    RewardModelTrainer(model, toy(100), config).train(lambda _, stats: losses.append(stats["reward_model/loss"]))
    assert np.mean(losses[-3:]) < 0.5 * np.mean(losses[:3])
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        assert model.score([[102, 110, 103]]).dtype == torch.float32


def test_training_ends_an_old_normalisation():
    model = fresh()
    model.normalise(["好", "差"])
    assert (model.mean, model.std) != (0.0, 1.0)
    train(model, RAGGED)
    assert (model.mean, model.std) == (0.0, 1.0)


# ---- what is warned of and refused ----------------------------------------------------------------------------------


def test_long_texts_are_cut_with_a_count():
    """A text of 100,000 characters costs what the context costs, and is read as it will be in use."""
    model, seen = fresh(), []
    original = model.score
    model.score = lambda ids: seen.extend(ids) or original(ids)
    rankings = [Ranking("酒店", ("好" * 100_000, "差")), Ranking("", ("好" * 15, "差" * 14)), *RAGGED]
    with pytest.warns(UserWarning, match=r"^2 of 16 texts have more than max_length=16 tokens and are cut") as caught:
        RewardModelTrainer(model, rankings, CONFIG).train()
    assert caught[0].filename == __file__  # it points at the caller
    assert max(map(len, seen)) == 16
    assert model.tokenizer.encode("酒店" + "好" * 100, 16) in seen


def test_pairs_that_are_the_same_to_the_model_are_counted():
    """Cut to the same tokens, or unknown characters both."""
    rankings = [Ranking("", ("好" * 20, "好" * 30, "好" * 5)), Ranking("", ("龘", "齉")), *RAGGED]
    with pytest.warns(UserWarning) as caught:
        RewardModelTrainer(fresh(), rankings, CONFIG)
    assert [str(w.message).split(" ")[:2] for w in caught] == [["2", "of"], ["2", "pairs"]]
    assert "the same tokens to the model" in str(caught[1].message)


def test_nothing_to_train_or_measure_on_is_refused():
    with pytest.raises(ValueError, match="rankings is empty: there is nothing to train on"):
        RewardModelTrainer(fresh(), [], CONFIG)
    with pytest.raises(ValueError, match="rankings is empty: there is nothing to measure on"):
        evaluate_rankings(fresh(), [])


@pytest.mark.parametrize(("rankings", "message"), [
    ([{"prompt": "", "chosen": "好", "rejected": "差"}], r"ranking 0 must be a Ranking, got a dict: give \[Ranking\("),
    (None, "rankings must be a collection, got a NoneType"), ("pairs.jsonl", "'pairs.jsonl' of type str: give"),
])  # fmt: skip
def test_what_is_no_ranking_is_refused_by_type_and_example(rankings, message):
    with pytest.raises(ValueError, match=message):
        RewardModelTrainer(fresh(), rankings, CONFIG)


@pytest.mark.parametrize("trunk", ["gpt2", "bert"])
def test_more_tokens_than_positions_are_refused_where_a_text_has_them(trunk):
    config = dataclasses.replace(CONFIG, max_length=128, tokens_per_batch=200)
    fits = Ranking("", ("好" * 14, "差"))
    assert RewardModelTrainer(fresh(trunk), [*RAGGED, fits], config).steps_total > 0
    with pytest.raises(ValueError, match=r"17 tokens within max_length=128, more than the model's 16 positions"):
        RewardModelTrainer(fresh(trunk), [*RAGGED, Ranking("", ("好" * 15, "差"))], config)


@pytest.mark.parametrize(("changes", "field"), [
    ({"epochs": 0}, "epochs"), ({"save_freq": 0}, "save_freq"), ({"precision": "auto"}, "precision"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(changes, field):
    with pytest.raises(ValueError, match=f"RewardTrainingConfig.{field} must be"):
        RewardTrainingConfig(**changes)


# ---- measuring ------------------------------------------------------------------------------------------------------


class Fixed(RewardModel):
    """A reward model whose scores are written in the texts."""

    def scores(self, texts):
        return torch.tensor([float(text) for text in texts])


def fixed() -> Fixed:
    return Fixed(DecoderScorer(make_gpt2()), Tokenizer(VOCAB), device="cpu")


def logit(p: float) -> str:
    return f"{math.log(p / (1 - p)):.9f}"


def test_figures_by_hand():
    """Predictions .95 (right), .65 (right), .65 (wrong: of .35), .5 (neither)."""
    rankings = [Ranking("", (logit(0.95), "0.0")), Ranking("", (logit(0.65), "0.00"), 0.5),
                Ranking("", ("0", logit(0.65))), Ranking("", ("7", "7.0"))]  # fmt: skip
    figures = evaluate_rankings(fixed(), rankings)
    assert (figures.pairs, figures.accuracy) == (4, (1 + 1 + 0 + 0.5) / 4)
    assert str(figures).startswith(f"accuracy 0.625 on 4 pairs, loss {figures.loss:.3f}, ")
    losses = [-math.log(0.95), math.log1p(math.exp(0.5 - float(logit(0.65)))), -math.log(0.35), math.log(2)]
    assert figures.loss == pytest.approx(sum(losses) / 4, rel=1e-6)
    table = {round(row["from"], 1): row for row in figures.reliability}
    assert {b: row["count"] for b, row in table.items()} == {0.0: 1, 0.3: 2, 0.5: 2, 0.6: 2, 0.9: 1}
    for b, predicted, positive in ((0.0, 0.05, 0), (0.3, 0.35, 0.5), (0.5, 0.5, 0.5), (0.6, 0.65, 0.5), (0.9, 0.95, 1)):
        assert table[b]["predicted"] == pytest.approx(predicted, abs=1e-6) and table[b]["positive"] == positive
    # 1 of 8 is .05 off, at both ends; 2 of 8 are .15 off, twice; 2 of 8 are right.
    assert figures.calibration_error == pytest.approx((0.05 + 2 * 0.15 + 0 + 2 * 0.15 + 0.05) / 8, abs=1e-6)


def test_pairs_of_lists_are_all_measured():
    figures = evaluate_rankings(fixed(), [Ranking("", ("3", "1", "2")), Ranking("", ("1", "0"))])
    assert figures.pairs == 4 and figures.accuracy == 3 / 4


@pytest.mark.parametrize("factor", [1.0, 4.0, 0.5])
def test_the_calibration_of_a_known_preference(factor):
    """Preferences drawn from sigmoid(r_a - r_b) are what the scores say; with the scores times 4 they are not."""
    rng, rankings, errors = random.Random(0), [], []
    for i in range(10_000):
        a, b = rng.gauss(0, 1), rng.gauss(0, 1)
        if rng.random() > 1 / (1 + math.exp(b - a)):
            a, b = b, a
        rankings.append(Ranking("", (f"{factor * a:.6f}", f"{factor * b:.6f}{i % 10}")))
        errors.append(abs(1 / (1 + math.exp(factor * (b - a))) - 1 / (1 + math.exp(b - a))))
    figures = evaluate_rankings(fixed(), rankings)
    assert figures.calibration_error == pytest.approx(np.mean(errors), abs=0.01)
    assert 0.6 < figures.accuracy < 0.8


def test_measuring_leaves_the_model_as_it_was():
    model = RewardModel(make_bert(id2label={0: "reward"}), Tokenizer(VOCAB), device="cpu").train()
    first, second = evaluate_rankings(model, RAGGED), evaluate_rankings(model, RAGGED)
    assert first == second and isinstance(first, RankingFigures) and model.training


def test_reliability_table_by_hand():
    probabilities = torch.tensor([0.0, 0.1, 0.24, 0.25, 0.6, 0.7, 0.9, 1.0])
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 1, 1])
    expected = [
        (0.0, 0.25, 3, 0.34 / 3, 1 / 3),
        (0.25, 0.5, 1, 0.25, 1),
        (0.5, 0.75, 2, 0.65, 0.5),
        (0.75, 1, 2, 0.95, 1),
    ]
    for row, golden in zip(reliability_table(probabilities, labels, bins=4), expected, strict=True):
        assert tuple(row.values()) == pytest.approx(golden, abs=1e-6)
