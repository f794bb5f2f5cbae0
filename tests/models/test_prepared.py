"""What a trainer is made of: models that fit each other, the value head, the precision, the reference."""

import pytest
import torch
from small_trainer import DEFAULTS, PROMPTS, SMALL, batch, figures, make_trainer, reward, same, weights

from conftest import VOCAB, make_gpt2
from minirlhf import ActorCritic, DPOTrainer, PPOConfig, PPOTrainer, Tokenizer


def test_models_and_tokenizer_of_different_vocabularies_are_refused():
    small = make_gpt2(0, vocab_size=50, **SMALL)
    normal, other = make_gpt2(0, **SMALL), make_gpt2(1, **SMALL)
    for policy, reference, tokens in (
        (small, normal, VOCAB),
        (normal, small, VOCAB),
        (normal, other, [*VOCAB, "more"]),
    ):
        with pytest.raises(ValueError, match=r"vocabulary|tokens"):
            PPOTrainer(policy, reference, Tokenizer(tokens), **DEFAULTS)


def test_a_tokenizer_of_another_library_is_refused_with_what_to_do():
    class BertTokenizerFast:
        pass

    for kind in (PPOTrainer, DPOTrainer):
        with pytest.raises(ValueError, match=r"minirlhf\.Tokenizer, got a BertTokenizerFast: save it"):
            kind(make_gpt2(0, **SMALL), make_gpt2(1, **SMALL), BertTokenizerFast())


def test_a_reference_that_shares_parameters_is_refused():
    policy = make_gpt2(0, **SMALL)
    tied = make_gpt2(1, **SMALL)
    tied.wpe.weight = policy.wpe.weight
    for reference in (policy, ActorCritic(policy), tied):
        with pytest.raises(ValueError, match="share"):
            PPOTrainer(policy, reference, Tokenizer(VOCAB), **DEFAULTS)


def test_a_reference_with_too_short_a_context_is_refused_before_the_reward_is_asked():
    policy, reference = make_gpt2(0, **SMALL), make_gpt2(0, n_positions=6, **SMALL)
    with pytest.raises(ValueError):
        trainer = PPOTrainer(policy, reference, Tokenizer(VOCAB), **DEFAULTS)
        trainer.train(PROMPTS, lambda texts: pytest.fail("the reward was asked"))


def test_a_reference_with_a_value_head_is_its_decoder():
    reference = ActorCritic(make_gpt2(1, **SMALL))
    assert PPOTrainer(make_gpt2(0, **SMALL), reference, Tokenizer(VOCAB), **DEFAULTS).reference is reference.decoder


def test_a_new_value_head_is_made_as_the_settings_say():
    heads = []
    for seed in (0, 0, 1):
        config = PPOConfig(value_head="tanh", value_head_init=0.25, seed=seed, device="cpu")
        trainer = PPOTrainer(make_gpt2(0, **SMALL), make_gpt2(1, **SMALL), Tokenizer(VOCAB), config)
        heads.append(trainer.policy.value_head)
        weight = heads[-1].summary.weight
        assert heads[-1].kind == "tanh" and 0.1 < weight.abs().max() <= 0.25
    assert torch.equal(heads[0].summary.weight, heads[1].summary.weight)
    assert not torch.equal(heads[0].summary.weight, heads[2].summary.weight)
    with pytest.raises(ValueError, match="linear"):
        make_trainer(value_head="tanh")  # the policy has a linear one already


def test_on_a_cpu_memory_is_kept_and_threads_are_limited(monkeypatch):
    called = []
    for name in ("keep_freed_memory", "limit_threads"):
        monkeypatch.setattr(f"minirlhf.models.prepared.{name}", lambda name=name: called.append(name))
    make_trainer()
    assert called == ["keep_freed_memory", "limit_threads"]


def make_frozen_trainer(make_decoder, **settings):
    policy = ActorCritic(make_decoder(0, n_layer=3)).eval()
    for module in [*policy.decoder.embeddings, *policy.decoder.blocks[:2]]:
        module.requires_grad_(False)
    settings = {"seed": 3, "batch_size": 8, "minibatch_size": 4, "gen_len": 5, "lr": 1e-3, "device": "cpu", **settings}
    return PPOTrainer(policy, make_decoder(0, n_layer=3), Tokenizer(VOCAB), **settings)


def test_a_shared_reference_changes_no_bit_of_a_run(make_decoder):
    runs = []
    for reference in ("own", "shared"):
        trainer = make_frozen_trainer(make_decoder, reference=reference, steps=16)
        history = trainer.train(["酒店", "hello"], lambda texts: [float(len(text)) for text in texts])
        runs.append((trainer, [figures(stats) for stats in history]))
    (apart, expected), (shared, stats) = runs
    assert stats == expected and stats[1]["objective/kl_exact"] > 0
    assert all(torch.equal(*pair) for pair in zip(apart.policy.parameters(), shared.policy.parameters(), strict=True))
    assert shared.reference_hash == apart.reference_hash
    frozen = [
        [p.data_ptr() for p in model.blocks[1].parameters()] for model in (shared.policy.decoder, shared.reference)
    ]
    assert frozen[0] == frozen[1]


def test_a_reference_that_cannot_be_shared_is_refused():
    with pytest.raises(ValueError, match="trains all of its parameters"):
        make_trainer(reference="shared")
    with pytest.raises(ValueError, match="reference must be one of"):
        make_trainer(reference="none")


# ---- precision -------------------------------------------------------------------------------------------------------


def test_a_small_model_is_trained_in_fp32_by_default():
    assert PPOConfig().precision == "auto"
    auto, named = make_trainer(), make_trainer(precision="fp32")
    assert auto.precision.name == "fp32" and auto.config == named.config
    assert auto.precision_choice.reason and not named.precision_choice.reason
    assert figures(auto.step(*batch())) == figures(named.step(*batch()))


@pytest.fixture
def favourable(monkeypatch):
    """Every model is large, and every device has bf16."""
    monkeypatch.setattr("minirlhf.device.precision.LARGE_MODEL", 1)
    monkeypatch.setattr("minirlhf.device.precision_choice.has_native_bf16", lambda device: True)


def test_auto_is_bf16_for_a_large_model_and_moves_no_generator(favourable):
    state = torch.get_rng_state()
    auto, named = make_trainer(), make_trainer(precision="bf16")
    assert auto.precision.name == "bf16" and auto.config == named.config and torch.equal(torch.get_rng_state(), state)
    assert figures(auto.train(PROMPTS, reward)[-1]) == figures(named.train(PROMPTS, reward)[-1])
    same(weights(auto), weights(named))
    assert make_trainer(cliprange=1e-3).precision.name == "fp32"  # PPO bears less
    # Sharper distributions have larger ratios.
    names = [make_trainer(cliprange=0.1, temperature=t).precision.name for t in (1.0, 0.05)]
    assert names == ["bf16", "fp32"]
