"""DPO against explicit loops in float64, cases worked by hand, its known optimum, and what it refuses."""

import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import oracle
from conftest import MAKERS, VOCAB, exact, make_gpt2, make_tiny
from conftest import TINY_TOKENS as TOKENS
from minirlhf import GPT2, ActorCritic, Decoder, DPOConfig, DPOTrainer, Tokenizer
from minirlhf.supervised.dpo import dpo_loss, ipo_loss, log_ratio_margins, preference_metrics
from minirlhf.supervised.preference_pairs import TokenPair
from minirlhf.text.preferences import Ranking

SMALL = dict(n_embd=16, n_layer=1, n_head=2, n_positions=24)
PLAIN = dict(schedule="constant", warmup=0.0, max_grad_norm=math.inf, device="cpu", max_length=24, tokens_per_batch=48)
RANKINGS = [Ranking("酒店", ("很好", "太差差差")), Ranking("房间", ("干净", "脏")), Ranking("", ("满意，推荐", "失望")),
            Ranking("hello w", ("好好好好好", "wifi太差")), Ranking("早餐", ("很好", "一般")),
            Ranking("周围", ("很好，非常满意，推荐很好很好很好", "差" * 15))]  # fmt: skip
RAGGED = [TokenPair([5, 6], [7, 8, 3], [9]), TokenPair([2], [10], [11, 5, 6, 7]), TokenPair([8, 9, 2], [5, 3], [6, 3]),
          TokenPair([11], [5, 5, 5, 5, 5, 3], [5, 5, 3]), TokenPair([4, 7], [8], [9, 9])]  # fmt: skip


def tiny(seed, kind="gpt2") -> Decoder:
    """A model in float64, with every parameter away from its neutral value."""
    model, generator = make_tiny(kind, n_positions=12), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.5)
    return model.eval()


def trainer(policy=None, reference=None, **settings) -> DPOTrainer:
    policy, reference = policy or make_gpt2(0, **SMALL), reference or make_gpt2(1, **SMALL)
    return DPOTrainer(policy, reference, Tokenizer(VOCAB), **{**PLAIN, **settings})


def steps_of(trainer, pairs) -> tuple[list[list[int]], list[dict[str, float]]]:
    """Train; return the numbers of the pairs of each step, and its statistics."""
    batches, seen = [], []

    def on_step(batch, stats):
        batches.append([i for micro in batch for row in micro for i in row])
        seen.append(stats)

    trainer.train(pairs, on_step)
    return batches, seen


def logp_by_hand(model, prompt, response) -> torch.Tensor:
    logprobs = model(torch.tensor([[*prompt, *response]]))[0].log_softmax(-1)
    return sum(logprobs[len(prompt) + t - 1, token] for t, token in enumerate(response))


# ---- the oracle -----------------------------------------------------------------------------------------------------


def arrays(model):
    return {f"decoder.{name}": p.detach().numpy().copy() for name, p in model.named_parameters()}


def oracle_loss(kind, h, beta, eps):
    """Of one pair: eq. 7 of Rafailov et al. 2023, eq. 3 of Mitchell 2023, eq. 17 of Azar et al. 2023."""
    if kind == "ipo":
        return (h - 1 / beta / 2) ** 2
    right = 1 / (1 + np.exp(-beta * h))
    return -(1 - eps) * np.log(right) - eps * np.log(1 - right)


def oracle_step(params, state, ref_params, pairs, numbers, c):
    """One optimizer step in explicit loops, with the gradient by the complex step. Returns params, state, loss."""
    variants, total = oracle._variants(params), 0.0
    ref = {name: a[None].astype(complex) for name, a in ref_params.items()}
    for i in numbers:
        h = 0.0
        for sign, response in ((1, pairs[i].chosen), (-1, pairs[i].rejected)):
            row = {"query": pairs[i].prompt, "response": response}
            new_logps, old_logps = (oracle.score_row(p, row, 2, 1.0)[0] for p in (variants, ref))
            for new, old in zip(new_logps, old_logps, strict=True):
                h = h + sign * (new - (0.0 if c.reference_free else old))
        total = total + oracle_loss(c.loss, h, c.beta, c.label_smoothing) / len(numbers)
    grads, t = oracle._gradients(params, total), state["t"] + 1
    out, new_state = {}, {"t": t}
    for name, a in params.items():
        decay = c.weight_decay if a.ndim >= 2 else 0.0
        m, v = state.get(name, (0.0, 0.0))
        out[name], *new_state[name] = oracle.adamw(a, grads[name], m, v, t, c.lr, c.betas, weight_decay=decay)
    return out, new_state, total[0].real


@pytest.mark.parametrize("settings", [
    {}, {"label_smoothing": 0.2, "beta": 0.7}, {"loss": "ipo", "beta": 0.4}, {"reference_free": True},
    {"packing": True, "weight_decay": 0.3}, {"loss": "ipo", "reference_free": True, "tokens_per_batch": 12},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", MAKERS)
def test_three_steps_equal_explicit_loops(settings, kind):
    policy, reference = tiny(0, kind), tiny(1, kind)
    params, ref_params, state = arrays(policy), arrays(reference), {"t": 0}
    settings = {**PLAIN, "max_length": 12, "tokens_per_batch": 24, "batch_size": 2, "lr": 5e-4, **settings}
    made = DPOTrainer(policy, reference, Tokenizer(TOKENS), **settings)
    batches, seen = steps_of(made, RAGGED)
    assert sorted(i for batch in batches for i in batch) == list(range(5)) and len(batches) == 3
    for numbers, stats in zip(batches, seen, strict=True):
        params, state, loss = oracle_step(params, state, ref_params, RAGGED, numbers, made.config)
        assert stats["dpo/loss"] == pytest.approx(loss, rel=1e-9)
    for name, p in policy.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), params[f"decoder.{name}"], rtol=0, atol=1e-9, err_msg=name)
        assert np.abs(params[f"decoder.{name}"] - arrays(tiny(0, kind))[f"decoder.{name}"]).max() > 1e-4


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_losses_worked_by_hand():
    """h = (-1 + 2) - (-3 + 2.5) = 1.5. TRL's published formulas say the same of these numbers."""
    logps, ref = torch.tensor([[-1.0, -3.0]], dtype=torch.float64), torch.tensor([[-2.0, -2.5]], dtype=torch.float64)
    h = log_ratio_margins(logps, ref)
    assert h.item() == 1.5 and log_ratio_margins(logps).item() == 2.0
    right, wrong = math.log(1 + math.exp(-0.3)), math.log(1 + math.exp(0.3))
    assert dpo_loss(h, 0.2).item() == pytest.approx(right, rel=1e-12)
    assert dpo_loss(h, 0.2, 0.1).item() == pytest.approx(0.9 * right + 0.1 * wrong, rel=1e-12)
    assert ipo_loss(h, 0.2).item() == pytest.approx((1.5 - 2.5) ** 2)
    assert preference_metrics(logps, ref, 0.2) == pytest.approx({
        "rewards/chosen": 0.2, "rewards/rejected": -0.1, "rewards/margins": 0.3, "rewards/accuracies": 1.0,
        "logps/chosen": -1.0, "logps/rejected": -3.0,
    })  # fmt: skip


def test_losses_do_not_overflow():
    far = torch.tensor([-1e4, 1e4])
    assert dpo_loss(far, 1.0).tolist() == [1e4, 0.0] and dpo_loss(far, 1.0, 0.25).tolist() == [7500.0, 2500.0]


@pytest.mark.parametrize(("settings", "loss", "slope"), [
    ({"beta": 0.3}, math.log(2), -0.3 / 2), ({"beta": 0.3, "label_smoothing": 0.1}, math.log(2), -0.8 * 0.3 / 2),
    ({"beta": 0.5, "loss": "ipo"}, 1.0, -2.0),
], ids=str)  # fmt: skip
def test_at_the_reference_the_gradient_is_the_difference_of_log_likelihoods(settings, loss, slope):
    """h = 0: d loss / dh is -beta / 2, -(1 - 2 eps) beta / 2, or -1 / beta."""
    made = DPOTrainer(tiny(0), tiny(0), Tokenizer(TOKENS), **{**PLAIN, **settings}, lr=1e-12)
    seen = []
    made.optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in made.parameters]))
    _, (stats,) = steps_of(made, RAGGED)
    assert stats["dpo/loss"] == pytest.approx(loss, rel=1e-9)
    assert stats["rewards/margins"] == pytest.approx(0, abs=1e-12)
    other = tiny(0)
    sides = [(logp_by_hand(other, p.prompt, p.chosen), logp_by_hand(other, p.prompt, p.rejected)) for p in RAGGED]
    (slope * sum(w - l for w, l in sides) / len(RAGGED)).backward()
    for found, p in zip(seen[0], other.parameters(), strict=True):
        torch.testing.assert_close(found, p.grad, rtol=1e-9, atol=1e-12)


def test_metrics_are_means_over_the_pairs_of_the_step():
    """Whatever they are cut into, and before the step."""
    made = trainer(beta=0.5, tokens_per_batch=24, batch_size=3, lr=1e-3)
    pairs, before = made.check_pairs(RANKINGS), make_gpt2(0, **SMALL)
    batches, seen = steps_of(made, RANKINGS)
    assert [len(batch) for batch in batches] == [3, 3]
    rewards = []
    for i in batches[0]:
        row = [logp_by_hand(before, pairs[i].prompt, y).item() for y in (pairs[i].chosen, pairs[i].rejected)]
        ref = [logp_by_hand(made.reference, pairs[i].prompt, y).item() for y in (pairs[i].chosen, pairs[i].rejected)]
        rewards.append([0.5 * (a - b) for a, b in zip(row, ref, strict=True)])
    chosen, rejected = np.array(rewards).T
    expected = {"rewards/chosen": chosen.mean(), "rewards/rejected": rejected.mean()}
    expected |= {"rewards/margins": (chosen - rejected).mean(), "rewards/accuracies": (chosen > rejected).mean()}
    assert {name: seen[0][name] for name in expected} == pytest.approx(expected, rel=1e-4)


# ---- the known optimum ----------------------------------------------------------------------------------------------


def three_responses(model) -> torch.Tensor:
    """Log-probabilities of the responses a, b, c to [CLS], among themselves."""
    return model(torch.tensor([[2]]))[0, 0, 5:8].log_softmax(-1).detach()


def test_pairs_of_a_bradley_terry_model_lead_to_its_optimum():
    """S = 0, log 3, 2 log 3: one is preferred to the next 3 : 1 and to the second next 9 : 1; the optimum is
    pi_ref exp(S / beta)."""
    a, b, c = [5], [6], [7]
    wins = [(b, a, 3), (a, b, 1), (c, b, 3), (b, c, 1), (c, a, 9), (a, c, 1)]
    pairs = [TokenPair([2], winner, loser) for winner, loser, count in wins for _ in range(count)]
    policy, reference, beta = tiny(0), tiny(0), 0.5
    before = three_responses(reference)
    settings = {**PLAIN, "schedule": "cosine", "lr_floor": 0.0, "epochs": 60, "batch_size": 18, "lr": 0.05}
    made = DPOTrainer(policy, reference, Tokenizer(TOKENS), **settings, beta=beta)
    made.train(pairs)
    optimum = (before + torch.tensor([0.0, math.log(3), 2 * math.log(3)]) / beta).log_softmax(-1)
    found = three_responses(policy)
    kl, kl_before = ((q.exp() * (q - optimum)).sum().item() for q in (found, before))
    assert kl < 1e-3 < kl_before
    assert torch.equal(three_responses(reference), before)


def test_ipo_stops_at_its_margin():
    """Where one response always wins, h ends at 1 / (2 beta), and DPO's would grow without bound."""
    policy, reference = tiny(0), tiny(0)
    settings = {**PLAIN, "schedule": "cosine", "lr_floor": 0.0, "epochs": 80, "lr": 0.05}
    made = DPOTrainer(policy, reference, Tokenizer(TOKENS), **settings, beta=0.25, loss="ipo")
    made.train([TokenPair([2], [5], [6])])
    change = three_responses(policy) - three_responses(reference)
    assert (change[0] - change[1]).item() == pytest.approx(2.0, abs=0.01)


# ---- policy and reference -------------------------------------------------------------------------------------------


def test_no_dropout_in_policy_or_reference():
    """In training mode both would be noisy, and the first margins would not be 0."""
    noisy = dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    made = trainer(make_gpt2(0, **SMALL, **noisy).train(), make_gpt2(0, **SMALL, **noisy).train())
    _, (stats,) = steps_of(made, RANKINGS)
    assert stats["dpo/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert not made.model.training


def test_packed_and_padded_are_equal(make_decoder):
    weights, figures = [], []
    for packing in (False, True):
        models = (exact(make_decoder(seed, **SMALL)) for seed in (0, 1))
        made = trainer(*models, packing=packing, batch_size=6, epochs=2, lr=1e-3)
        rows = [row for micro in made._passes(made.check_pairs(RANKINGS), range(6), torch.Generator()) for row in micro]
        assert (max(map(len, rows)) > 1) == packing
        figures.append(steps_of(made, RANKINGS)[1])
        weights.append(list(made.model.parameters()))
    for padded, packed in zip(*figures, strict=True):
        assert packed == pytest.approx(padded, rel=1e-9)
    for padded, packed in zip(*weights, strict=True):
        torch.testing.assert_close(packed, padded, rtol=0, atol=1e-7)


def test_only_what_requires_a_gradient_is_trained():
    """As with adapters, which are a few parameters beside frozen ones."""
    policy = make_gpt2(0, **SMALL).requires_grad_(False)
    policy.ln_f.weight.requires_grad_(True)
    trainer(policy, lr=1e-2).train(RANKINGS)
    moved = [name for (name, p), old in zip(policy.named_parameters(), make_gpt2(0, **SMALL).parameters(), strict=True)
             if not torch.equal(p, old)]  # fmt: skip
    assert moved == ["ln_f.weight"]


class Counting(GPT2):
    calls = 0

    def hidden_states(self, *args, **named):
        Counting.calls += 1
        return super().hidden_states(*args, **named)


def counting(seed) -> GPT2:
    model = Counting(make_gpt2(seed, **SMALL).config)
    model.load_state_dict(make_gpt2(seed, **SMALL).state_dict())
    Counting.calls = 0
    return model


def test_the_reference_is_asked_once_and_again_if_it_or_the_pairs_change(tmp_path):
    cached = dict(reference_cache=tmp_path / "cache", epochs=3, tokens_per_batch=1000)
    first = trainer(reference=counting(1), **cached)
    first.train(RANKINGS)
    held_out = [{"prompt": "位置", "chosen": "好", "rejected": "差"}]
    assert Counting.calls == 1
    figures = [first.evaluate(held_out) for _ in range(2)]
    assert Counting.calls == 2 and figures[0] == figures[1]
    again = trainer(reference=counting(1), **cached, beta=0.7)
    again.train(RANKINGS)
    assert Counting.calls == 0 and torch.equal(again.ref_logps, first.ref_logps)
    others = trainer(reference=counting(2), **cached)
    others.train(RANKINGS)
    assert Counting.calls == 1 and not torch.equal(others.ref_logps, first.ref_logps)
    trainer(reference=counting(1), **cached).train(RANKINGS[:3])
    assert Counting.calls == 1
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_without_a_reference_none_is_needed():
    made = trainer(reference_free=True, beta=0.5)
    assert made.reference is None
    made = DPOTrainer(make_gpt2(0, **SMALL), None, Tokenizer(VOCAB), reference_free=True, **PLAIN)
    _, (stats,) = steps_of(made, RANKINGS)
    assert stats["rewards/chosen"] == pytest.approx(0.1 * stats["logps/chosen"], rel=1e-6)


def test_an_actor_critic_and_a_folder_are_taken(tmp_path):
    make_gpt2(1, **SMALL).save_pretrained(tmp_path)
    losses = [steps_of(trainer(ActorCritic(make_gpt2(0, **SMALL)), tmp_path), RANKINGS)[1],
              steps_of(trainer(), RANKINGS)[1]]  # fmt: skip
    assert losses[0] == losses[1]


def test_training_with_the_same_pairs_goes_on_and_with_others_is_refused():
    made = trainer(batch_size=2, lr=1e-3)
    with pytest.raises(KeyboardInterrupt):
        made.train(RANKINGS, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (made.steps_done, made.steps_total) == (1, 3)
    with pytest.raises(ValueError, match=r"the run began with other data: with 6 .*, 4 are given"):
        made.train(RANKINGS[:4])
    assert len(steps_of(made, RANKINGS)[1]) == 2
    whole = trainer(batch_size=2, lr=1e-3)
    whole.train(RANKINGS)
    for p, q in zip(made.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("content", "message"), [
    ({"other": torch.zeros(6, 2)}, "missing logps"), ({"logps": torch.zeros(1, 2)}, r"logps has shape \(1, 2\)"),
    ({"logps": torch.zeros(())}, "logps has shape"), ({"logps": torch.full((6, 2), math.nan)}, "logps holds NaN"),
    ({"logps": torch.zeros(6, 2, dtype=torch.int64)}, "logps has dtype"),
])  # fmt: skip
def test_a_damaged_cache_of_the_reference_is_not_trained_on(tmp_path, content, message):
    trainer(reference_cache=tmp_path).train(RANKINGS)
    (path,) = tmp_path.iterdir()
    save_file(content, path)
    with pytest.raises(ValueError, match=f"{message}.*; remove the file, and it is computed anew"):
        trainer(reference_cache=tmp_path).train(RANKINGS)


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_several_functions_follow_a_step_and_one_that_returns_true_ends_the_training():
    seen = []
    dpo = trainer(batch_size=2, epochs=3)
    dpo.train(RANKINGS, [lambda batch, stats: seen.append(stats), lambda batch, stats: len(seen) == 2])
    assert dpo.steps_done == len(seen) == 2 < dpo.steps_total and "rewards/margins" in seen[0]
    with pytest.raises(ValueError, match="on_step must be a function, got 3"):
        dpo.train(RANKINGS, [3])


@pytest.mark.parametrize(("pairs", "message"), [
    ([], "pairs is empty"), (None, "pairs must be a collection, got a NoneType: give"),
    ({"prompt": ["酒店"], "chosen": ["好"], "rejected": ["差"]}, "pairs must be a collection, got a dict: give"),
    ([*RANKINGS, {"prompt": "酒店", "chosen": "好", "rejected": "好"}], "pair 6: answers 1 and 2 are equal: '好'"),
    ([*RANKINGS, {"prompt": "酒店", "chosen": "好", "rejected": " "}], "pair 6: answer 2 is empty"),
    ([{"prompt": "酒店", "chosen": "好", "rejected": "差" * 30}], r"pair 0: rejected has 34 tokens .* max_length=24"),
    ([TokenPair([5], [len(VOCAB)], [6])], r"pair 0 has token ids outside \[0, "),
])  # fmt: skip
def test_bad_pairs_are_refused_before_any_work(pairs, message):
    made = trainer()
    before = [p.clone() for p in made.model.parameters()]
    with pytest.raises(ValueError, match=message):
        made.train(pairs)
    assert made.steps_done == 0 and made.data["count"] == 0
    assert all(torch.equal(p, q) for p, q in zip(before, made.model.parameters(), strict=True))


def test_pairs_longer_than_the_context_are_refused():
    made = trainer(max_length=100, tokens_per_batch=100)
    with pytest.raises(ValueError, match=r"a text has 34 tokens .* more than the model's 24 positions"):
        made.train([{"prompt": "酒店", "chosen": "好", "rejected": "差" * 30}])


def test_models_that_do_not_fit_are_refused():
    policy = make_gpt2(0, **SMALL)
    fewer = make_tiny("gpt2", n_positions=24)
    for reference, message in [
        (fewer, f"the vocabulary has {len(VOCAB)} tokens, but the reference was made for {len(TOKENS)}"),
        (policy, "policy and ref_policy share parameters"), (None, "ref_policy is None, which needs reference_free"),
        (make_gpt2(1, **{**SMALL, "n_positions": 16}), "the reference has 16 positions, fewer than the policy's 24"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message):
            DPOTrainer(policy, reference, Tokenizer(VOCAB), **PLAIN)
    with pytest.raises(ValueError, match=r"must be a minirlhf.Tokenizer, got a str"):
        DPOTrainer(policy, make_gpt2(1, **SMALL), "gpt2")
    with pytest.raises(ValueError, match=r"DPOConfig.beta must be a finite number above 0, got 0"):
        DPOTrainer(policy, make_gpt2(1, **SMALL), Tokenizer(VOCAB), DPOConfig(), beta=0)
