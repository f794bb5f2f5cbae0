"""LoRA: fresh adapters change no bit, adapters compute what the equation says, and PPO trains them alone."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import oracle
from conftest import VOCAB, make_gpt2, make_llama
from folders import snapshot
from minirlhf import GPT2, ActorCritic, DPOTrainer, GPT2Config, LoRAConfig, PPOConfig, PPOTrainer, Run, Tokenizer
from minirlhf.models.layers import Conv1D
from minirlhf.models.lora import adapters_off, add_lora, matrices, merged
from minirlhf.runs.checkpoint import load_checkpoint, restore_checkpoint, save_checkpoint
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, perplexity

ROOT = Path(__file__).resolve().parents[2]
ALL = ("c_attn", "c_proj", "c_fc")
IDS = torch.randint(5, len(VOCAB), (3, 9), generator=torch.Generator().manual_seed(0))
DOUBLE = dict(rtol=1e-11, atol=1e-11)


def adapted(config=None, seed=0, **sizes):
    """A random GPT-2 with adapters that matter."""
    model = make_gpt2(0, scale=3.0, **sizes)
    add_lora(model, config or LoRAConfig(rank=3, alpha=6))
    train(model, seed)
    return model


@torch.no_grad()
def train(model, seed=0):
    """B away from 0, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("lora_B"):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator))


# ---- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value", "allowed"), [
    ("rank", 0, "an integer of at least 1"), ("rank", -2, "at least 1"), ("rank", 2.0, "an integer"),
    ("alpha", 0, "above 0"), ("alpha", float("nan"), "above 0"), ("dropout", 1.0, r"in \[0, 1\)"),
    ("base_dtype", "int8", "fp32, bf16"), ("targets", "c_attn", "a tuple of names"), ("targets", (), "a tuple"),
])  # fmt: skip
def test_a_bad_field_is_named(field, value, allowed):
    with pytest.raises(ValueError, match=rf"LoRAConfig\.{field} must be .*{allowed}.*, got"):
        LoRAConfig(**{field: value})


def test_settings_may_be_a_dict_and_survive_json():
    config = PPOConfig(lora=dict(rank=2, targets=["c_attn"]))
    assert config.lora == LoRAConfig(2, targets=("c_attn",)) and config.adapters_off
    assert PPOConfig(**json.loads(json.dumps(dataclasses.asdict(config)))) == config
    assert SFTConfig(lora=dict(rank=2)).lora == LoRAConfig(2)
    with pytest.raises(ValueError, match=r"LoRAConfig has no field 'r'; did you mean 'rank'\?"):
        PPOConfig(lora=dict(r=8))
    with pytest.raises(ValueError, match="lora must be a LoRAConfig"):
        PPOConfig(lora=8)


# ---- adapters --------------------------------------------------------------------------------------------------------


def test_fresh_adapters_change_no_bit_and_are_all_that_is_trained():
    model = make_gpt2()
    with torch.no_grad():
        before = model(IDS)
    config = add_lora(model, LoRAConfig(rank=3))
    assert config == LoRAConfig(rank=3, targets=ALL) == model.lora
    assert torch.equal(model(IDS), before)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {f"{name}.lora_{x}" for name in matrices(model) for x in "AB"} and len(names) == 16
    widths = [(32, 96), (32, 32), (32, 128), (128, 32)]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 2 * 3 * sum(map(sum, widths))


def test_the_first_A_are_peft_s_and_depend_on_the_seed_alone():
    state = torch.get_rng_state()
    one, two, other = make_gpt2(0), make_gpt2(1), make_gpt2(0)
    for model, seed in ((one, 5), (two, 5), (other, 6)):
        add_lora(model, LoRAConfig(), seed)
    A, same, different = (model.h[0].mlp.c_proj.lora_A for model in (one, two, other))
    assert torch.equal(A, same) and not torch.equal(A, different) and torch.equal(torch.get_rng_state(), state)
    bound = 1 / 128**0.5  # kaiming_uniform with a = sqrt(5)
    assert 0.95 * bound < A.abs().max() <= bound and abs(A.mean()) < 0.1 * bound


def test_a_layer_computes_the_equation():
    model = adapted(LoRAConfig(rank=2, alpha=5)).double()
    layer, x = model.h[1].attn.c_attn, torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(1)).double()
    W, b, A, B = (p.detach().numpy() for p in (layer.weight, layer.bias, layer.lora_A, layer.lora_B))
    expected = np.array([[row @ W + b + 5 / 2 * (B @ (A @ row)) for row in rows] for rows in x.numpy()])
    torch.testing.assert_close(layer(x).detach(), torch.tensor(expected), **DOUBLE)


def test_targets_are_names_or_ends_of_names():
    model = make_gpt2()
    add_lora(model, LoRAConfig(targets=("c_attn", "mlp.c_proj", "h.1.mlp.c_fc")))
    found = [name for name, _ in model.named_parameters() if name.endswith("lora_A")]
    layers = ["h.0.attn.c_attn", "h.0.mlp.c_proj", "h.1.attn.c_attn", "h.1.mlp.c_fc", "h.1.mlp.c_proj"]
    assert found == [f"{name}.lora_A" for name in layers]
    for target in ("q_proj", "attn", "lm_head", "wte", "_attn"):
        model = make_gpt2(tie_word_embeddings=False)
        with pytest.raises(ValueError, match=rf"targets has '{target}', which is no layer.*: c_attn, c_proj, c_fc$"):
            add_lora(model, LoRAConfig(targets=("c_fc", target)))
        assert model.lora is None and isinstance(model.h[0].mlp.c_fc, Conv1D)


def test_adapters_that_are_there_are_kept_and_another_rank_is_refused():
    model = adapted(LoRAConfig(rank=3, alpha=6))
    before = {name: p.clone() for name, p in model.named_parameters()}
    for config in (None, LoRAConfig(rank=3, alpha=6), LoRAConfig(rank=3, alpha=6, targets=ALL, dropout=0.5)):
        assert add_lora(model, config).targets == ALL
    assert model.h[0].mlp.c_fc.dropout.p == 0.5
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for field, value in (("rank", 8), ("alpha", 1.0), ("targets", ("c_attn",))):
        config = LoRAConfig(**{"rank": 3, "alpha": 6, field: value})
        with pytest.raises(ValueError, match=rf"LoRAConfig\.{field} is .*, but the model has adapters of .*leave lora"):
            add_lora(model, config)


def test_dropout_acts_in_training_mode_only():
    model = adapted(LoRAConfig(rank=3, dropout=0.5), resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    with torch.no_grad(), torch.random.fork_rng():
        assert torch.equal(model(IDS), model(IDS))
        model.train()
        assert not torch.allclose(model(IDS), model(IDS))


def test_merged_and_off_leave_the_model_alone():
    model, plain = adapted().double(), make_gpt2(0, scale=3.0).double()
    with torch.no_grad():
        own = model(IDS)
        whole, base = merged(model), adapters_off(model)
        torch.testing.assert_close(whole(IDS), own, **DOUBLE)
        assert torch.equal(base(IDS), plain(IDS)) and not torch.allclose(own, plain(IDS))
        assert torch.equal(model(IDS), own)
    for other in (whole, base):
        assert other.lora is None and other.state_dict().keys() == plain.state_dict().keys()
    mine = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert all(p.data_ptr() == mine[name] for name, p in base.named_parameters())
    assert merged(plain) is plain


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_base_in_bf16_is_a_rounded_base(checkpointed):
    """The same logits and gradients, computed in fp32, as with matrices that were rounded before; half the memory."""
    rounded, held = make_gpt2(), make_gpt2()
    for layer in matrices(rounded).values():
        layer.weight.data = layer.weight.data.bfloat16().float()
    found = []
    for model, dtype in ((rounded, "fp32"), (held, "bf16")):
        add_lora(model, LoRAConfig(rank=3, targets=("c_attn", "c_fc"), base_dtype=dtype))
        train(model)
        model.checkpoint_activations = checkpointed
        logits = model(IDS)
        logits.logsumexp(-1).sum().backward()
        found.append((logits, *(p.grad for p in model.parameters() if p.requires_grad)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert {layer.weight.dtype for layer in matrices(held).values()} == {torch.bfloat16}  # c_proj has no adapter
    assert {p.dtype for name, p in held.named_parameters() if "weight" not in name or "c_" not in name} == {
        torch.float32
    }
    torch.testing.assert_close(merged(held)(IDS), merged(rounded)(IDS), rtol=1e-4, atol=1e-4)


# ---- PPO -------------------------------------------------------------------------------------------------------------

PROMPTS = ["酒店很好", "w", "房间干净", "早餐"]
SMALL = dict(n_embd=16, n_layer=1, n_head=2)
DEFAULTS = dict(
    steps=8, batch_size=4, minibatch_size=2, forward_batch_size=2, gen_len=5, ppo_epochs=2, lr=1e-2, device="cpu",
    lora=LoRAConfig(rank=2, alpha=4),
)  # fmt: skip


def reward(texts):
    return [len(set(text)) / 8 for text in texts]


def make_trainer(ref_policy=None, make=make_gpt2, **settings):
    model = make(0, scale=4.0, **SMALL)
    return PPOTrainer(model, ref_policy, Tokenizer(VOCAB), **{**DEFAULTS, **settings})


@pytest.mark.parametrize(("make", "base_dtype"), [(make_gpt2, "fp32"), (make_gpt2, "bf16"), (make_llama, "bf16")])
def test_the_kl_is_0_to_the_bit_and_only_adapters_move(make, base_dtype):
    trainer = make_trainer(make=make, lora=dict(rank=2, base_dtype=base_dtype))
    before = {name: p.detach().clone() for name, p in trainer.policy.named_parameters()}
    first = trainer.collect(PROMPTS, reward)
    assert torch.equal(first.logprobs, first.ref_logprobs) and not first.exact_kl.any()
    stats = trainer.train(PROMPTS, reward)
    assert stats[0]["objective/kl"] == stats[0]["objective/kl_exact"] == 0 < stats[-1]["objective/kl_exact"]
    moved = {n for n, p in trainer.policy.named_parameters() if not torch.equal(p, before[n])}
    adapters = {n for n in before if "lora_" in n}
    assert moved == adapters | {"value_head.summary.weight", "value_head.summary.bias"}
    assert len(adapters) == (8 if make is make_gpt2 else 14)
    assert {id(p) for p in trainer.parameters} == {id(p) for n, p in trainer.policy.named_parameters() if n in moved}
    own = {p.data_ptr() for p in trainer.policy.decoder.parameters()}
    assert {p.data_ptr() for p in trainer.reference.parameters()} < own  # one copy in memory


def test_a_reference_of_its_own_gives_the_same_run(tmp_path):
    make_gpt2(0, scale=4.0, **SMALL).save_pretrained(tmp_path)
    histories, one, folder = [], make_gpt2(0, scale=4.0, **SMALL), str(tmp_path)
    for ref_policy, reference in ((None, None), (one, None), (folder, None), (folder, "own"), (folder, "shared")):
        trainer = make_trainer(ref_policy, reference=reference)
        histories.append([{n: x for n, x in s.items() if "time/" not in n} for s in trainer.train(PROMPTS, reward)])
    for history in histories[1:]:
        for stats, expected in zip(history, histories[0], strict=True):
            assert stats == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_a_reference_that_adapters_off_cannot_be_is_refused(tmp_path):
    make_gpt2(1, scale=4.0, **SMALL).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"ref_policy has another wte\.weight"):
        make_trainer(tmp_path)
    with pytest.raises(ValueError, match=r"ref_policy has another wte\.weight: pass None .*reference='own'"):
        make_trainer(make_gpt2(1, scale=4.0, **SMALL))
    assert make_trainer(make_gpt2(1, scale=4.0, **SMALL), reference="own").collect(PROMPTS, reward).exact_kl.any()
    with pytest.raises(ValueError, match=r"ref_policy is None: only with lora"):
        make_trainer(lora=None)
    with pytest.raises(ValueError, match=r"PPOConfig\.reference must be own or shared for a policy without LoRA"):
        make_trainer(lora=None, reference="adapters off")


def test_adapters_of_another_rank_are_refused_by_the_trainer():
    model = adapted(LoRAConfig(rank=3), **SMALL)
    assert PPOTrainer(model, None, Tokenizer(VOCAB), device="cpu").config.lora.rank == 3
    with pytest.raises(ValueError, match=r"LoRAConfig\.rank is 8, but the model has adapters of 3"):
        PPOTrainer(model, None, Tokenizer(VOCAB), lora=LoRAConfig(rank=8))


def test_a_step_is_that_of_the_oracle_on_a_low_rank_change_of_dense_weights(monkeypatch):
    """The oracle differentiates, by the complex step in float64, through W + alpha / rank (B A)^T."""
    tokens, scale = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"], 5 / 2
    sizes = dict(vocab_size=len(tokens), n_positions=16, n_embd=4, n_layer=1, n_head=2, n_inner=8)
    policy = ActorCritic(GPT2(GPT2Config(**sizes))).double()
    with torch.no_grad():
        for i, p in enumerate(policy.parameters()):
            p.add_(0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i), dtype=p.dtype))
    add_lora(policy.decoder, LoRAConfig(rank=2, alpha=5))
    train(policy.decoder)
    settings = dict(
        batch_size=3, minibatch_size=3, forward_batch_size=2, ppo_epochs=3, lr=3e-3, top_p=1.0, device="cpu"
    )
    trainer = PPOTrainer(policy, None, Tokenizer(tokens), gen_len=4, **settings)
    whole = {name: p.detach().numpy().copy() for name, p in policy.named_parameters()}
    trained = {name: a for name, a in whole.items() if name.startswith("value_head.") or "lora_" in name}
    frozen = {name: a for name, a in whole.items() if name not in trained}
    plain_score = oracle.score_row

    def dense(p):
        count, kind = next(iter(p.values())).shape[0], next(iter(p.values())).dtype
        full = {name: np.broadcast_to(a, (count, *a.shape)).astype(kind) for name, a in frozen.items()} | p
        for name in [name.removesuffix(".lora_A") for name in p if name.endswith(".lora_A")]:
            product = np.matmul(full.pop(f"{name}.lora_B"), full.pop(f"{name}.lora_A"))
            full[f"{name}.weight"] = full[f"{name}.weight"] + scale * product.swapaxes(-1, -2)
        return full

    monkeypatch.setattr(oracle, "score_row", lambda p, *rest: plain_score(dense(p), *rest))
    lengths, rng = [(2, 1), (3, 4), (1, 3)], np.random.default_rng(0)
    rows = [{"query": rng.integers(0, 12, q).tolist(), "response": rng.integers(0, 12, r).tolist(), "score": s}
            for (q, r), s in zip(lengths, [1.0, -0.5, 0.25], strict=True)]  # fmt: skip
    stats = trainer.step(*([torch.tensor(row[part]) for row in rows] for part in ("query", "response")),
                         [row["score"] for row in rows])  # fmt: skip
    read = ("lr", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "max_grad_norm", "adam_eps", "temperature")
    known = {name: getattr(trainer.config, name) for name in read}
    expected, _, figures = oracle.ppo_step(trained, frozen, rows, [[0, 1, 2]] * 3, n_head=2, **known)
    assert stats["objective/kl"] == pytest.approx(figures["objective/kl"], rel=1e-9) and stats["objective/kl"] != 0
    for name, p in policy.named_parameters():
        if name in trained:
            np.testing.assert_allclose(p.detach().numpy(), expected[name], rtol=0, atol=1e-9, err_msg=name)
            assert np.abs(expected[name] - trained[name]).max() > 1e-4, name
        else:
            assert np.array_equal(p.detach().numpy(), frozen[name]), name


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_a_run_cut_by_a_checkpoint_goes_on_bit_for_bit(tmp_path, base_dtype):
    """Checkpoints hold the adapters; the base is found where it was loaded from, and known by its hash."""
    make_gpt2(0, scale=4.0, **SMALL).save_pretrained(tmp_path / "base")

    def started():
        policy = GPT2.from_pretrained(tmp_path / "base")
        lora = dict(rank=2, base_dtype=base_dtype)
        return PPOTrainer(policy, None, Tokenizer(VOCAB), **{**DEFAULTS, "lora": lora, "save_freq": 1})

    whole, cut = started(), started()
    whole.train(PROMPTS, reward)
    with pytest.raises(KeyboardInterrupt), Run.start(tmp_path / "run", cut, {}) as run:
        cut.train(PROMPTS, reward, lambda rollout, stats: (run.record(rollout, stats), stop(cut.iteration == 1)))
    checkpoint = tmp_path / "run/checkpoints/step-000001"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not (checkpoint / "model.safetensors").exists()
    with Run.resume(tmp_path / "run") as run:
        run.trainer.train(PROMPTS, reward, run.record)
    for (name, a), b in zip(whole.policy.named_parameters(), run.trainer.policy.parameters(), strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype, name
    save_checkpoint(whole, tmp_path / "whole")
    save_checkpoint(run.trainer, tmp_path / "resumed")
    assert snapshot(tmp_path / "resumed") == snapshot(tmp_path / "whole")
    again = started()
    restore_checkpoint(again, checkpoint)
    for a, b in zip(again.policy.parameters(), load_checkpoint(checkpoint).policy.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"PPOConfig\.lora was .* and cannot become"):
        load_checkpoint(checkpoint, lora=dict(rank=4))


def stop(now):
    if now:
        raise KeyboardInterrupt


def test_a_base_from_no_folder_is_passed_and_another_one_is_refused(tmp_path):
    trainer = make_trainer()
    trainer.step(trainer.collect(PROMPTS, reward))
    save_checkpoint(trainer, tmp_path / "state")
    with pytest.raises(ValueError, match="pass it as ref_policy"):
        load_checkpoint(tmp_path / "state")
    with pytest.raises(ValueError, match="holds adapters for another base"):
        load_checkpoint(tmp_path / "state", make_gpt2(1, scale=4.0, **SMALL))
    base = make_gpt2(0, scale=4.0, **SMALL)
    resumed = load_checkpoint(tmp_path / "state", base)
    assert resumed.policy.decoder.lora == trainer.config.lora and base.lora is None
    with torch.no_grad():
        trainer.policy.decoder.h[0].attn.c_attn.weight += 1  # behind the trainer's back
    with pytest.raises(RuntimeError, match="the reference is not what it was"):
        save_checkpoint(trainer, tmp_path / "later")


def test_sft_trains_adapters_with_dropout_and_goes_on_bit_for_bit(tmp_path):
    make_gpt2(0, scale=4.0, **SMALL).save_pretrained(tmp_path / "base")
    texts, lora = ["酒店很好", "房间干净", "早餐非常一般", "位置很好"], dict(rank=2, dropout=0.3)
    config = SFTConfig(epochs=4, max_length=16, tokens_per_batch=16, lr=1e-2, device="cpu", lora=lora)

    def started():
        return SFTTrainer(GPT2.from_pretrained(tmp_path / "base"), Tokenizer(VOCAB), texts, config)

    whole, cut = started(), started()
    before = perplexity(whole.model, Tokenizer(VOCAB), texts)["token"]
    whole.train()
    assert perplexity(whole.model, Tokenizer(VOCAB), texts)["token"] < 0.9 * before
    with pytest.raises(KeyboardInterrupt):
        cut.train(lambda batch, stats: (save_checkpoint(cut, tmp_path / "state"), stop(cut.steps_done == 2)))
    resumed = load_checkpoint(tmp_path / "state", data=texts)
    resumed.train()
    base, trained = make_gpt2(0, scale=4.0, **SMALL).state_dict(), dict(whole.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, trained[name]), name
        assert "lora_" in name or torch.equal(p, base[name]), name
    whole.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(GPT2.from_pretrained(tmp_path / "merged")(IDS), whole.model(IDS), rtol=1e-4, atol=1e-4)


def test_dpo_begins_at_its_base_and_goes_on_bit_for_bit(tmp_path):
    make_gpt2(0, scale=4.0, **SMALL).save_pretrained(tmp_path / "base")
    sides = [("很好", "太差"), ("干净", "脏"), ("非常满意", "失望"), ("推荐", "一般")]
    pairs = [{"prompt": "酒店", "chosen": chosen, "rejected": rejected} for chosen, rejected in sides]
    settings = dict(epochs=3, batch_size=2, lr=1e-2, beta=1.0, device="cpu", lora=dict(rank=2))

    def started(ref_policy=None):
        return DPOTrainer(GPT2.from_pretrained(tmp_path / "base"), ref_policy, Tokenizer(VOCAB), **settings)

    seen, whole, cut = [], started(), started(tmp_path / "base")
    whole.train(pairs, lambda batch, stats: seen.append(stats))
    assert seen[0]["rewards/margins"] == 0 and seen[0]["dpo/loss"] == pytest.approx(np.log(2), rel=1e-6)
    assert whole.evaluate(pairs)["rewards/margins"] > 0.1
    with pytest.raises(KeyboardInterrupt):
        cut.train(pairs, lambda batch, stats: (save_checkpoint(cut, tmp_path / "state"), stop(cut.steps_done == 2)))
    resumed = load_checkpoint(tmp_path / "state")
    resumed.train(pairs)
    base, trained = make_gpt2(0, scale=4.0, **SMALL).state_dict(), dict(whole.model.named_parameters())
    for name, p in resumed.model.named_parameters():
        assert torch.equal(p, trained[name]), name
        assert "lora_" in name or torch.equal(p, base[name]), name
    with pytest.raises(ValueError, match="ref_policy has another"):
        make_gpt2(1, scale=4.0, **SMALL).save_pretrained(tmp_path / "other")
        started(tmp_path / "other")


def test_the_lines_of_the_guide_run(tiny, tmp_path, monkeypatch, capsys):
    text = (ROOT / "docs/guide.md").read_text(encoding="utf-8").split("\n## LoRA\n")[1]
    code = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace("weights/gpt2-chinese-reviews-small", str(tiny / "policy")).replace("64", "8"), {})
    assert capsys.readouterr().out.startswith("LoRAConfig(rank=8, alpha=16")
    assert (tmp_path / "runs/merged/model.safetensors").is_file()
