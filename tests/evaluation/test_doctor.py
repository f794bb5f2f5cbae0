"""The doctor against planted faults: each check finds its own, passes without it, and leaves everything as it was."""

import copy
import hashlib
import io
import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from conftest import VOCAB, add_outlier, make_bert, make_gpt2, make_llama, rewrite_config
from minirlhf import (
    GPT2,
    ActorCritic,
    Finding,
    PPOConfig,
    PPOTrainer,
    RewardModel,
    SentimentReward,
    Tokenizer,
    ValueHead,
    doctor,
    optimum,
)
from minirlhf.commands.main import main
from minirlhf.device.precision_choice import Rounding
from minirlhf.evaluation.doctor import run_checks
from minirlhf.evaluation.doctor.doctor import CHECKS
from minirlhf.evaluation.doctor.memory import total
from minirlhf.evaluation.doctor.setup import PROMPT_LENGTHS, Setup, words
from minirlhf.io.model_folder import read_tensors, write_tensors
from minirlhf.models.lora import add_lora
from minirlhf.models.lora_config import LoRAConfig
from minirlhf.rewards.reward_model import DecoderScorer
from minirlhf.rewards.sentiment import CANARIES
from minirlhf.rl.config import PRESETS

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
NAMES = [name for name, _, _ in CHECKS]
SMALL = dict(n_embd=16, n_layer=1, n_head=2)
DEFAULTS = dict(batch_size=4, minibatch_size=2, forward_batch_size=2, gen_len=5, ppo_epochs=1, lr=1e-3, device="cpu")
NEGATIVE_FIRST = {0: "negative (stars 1, 2 and 3)", 1: "positive (stars 4 and 5)"}
POSITIVE_FIRST = {0: "positive (stars 4 and 5)", 1: "negative (stars 1, 2 and 3)"}


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """The forecast of every run is made from fewer samples."""
    monkeypatch.setattr(run_checks, "FORECAST", 128)


def gpt2(seed=0, kind=GPT2, **sizes):
    """A small GPT-2 of this class."""
    model = make_gpt2(seed, scale=2.0, **{**SMALL, **sizes})
    model.__class__ = kind
    return model


def sentiment(swapped=False):
    """A random classifier whose labels are named so that the canaries come out in the right order, or the wrong one."""
    for id2label in (NEGATIVE_FIRST, POSITIVE_FIRST):
        model = make_bert(scale=10.0, num_hidden_layers=1, id2label=id2label)
        reward = SentimentReward(model, Tokenizer(VOCAB), device="cpu")
        good, bad = reward(list(CANARIES)).tolist()
        if (good > bad) != swapped:
            return reward
    raise AssertionError("equal scores")


def diagnose(policy=None, reference=None, reward=None, tokenizer=None, **settings):
    """The findings of a setup that is healthy but for what is given."""
    return doctor(
        policy or ActorCritic(gpt2()).eval(),
        reference or gpt2(),
        tokenizer or Tokenizer(VOCAB),
        reward or sentiment(),
        file=io.StringIO(),
        **{**DEFAULTS, **settings},
    )


def examine(*models, **given):
    """Status by name, and the findings by name."""
    findings = diagnose(*models, **given)
    assert [finding.name for finding in findings] == NAMES
    return {f.name: f.status for f in findings}, {f.name: f for f in findings}


def only(name, *models, **given):
    """The finding of one check, made after that of the rollout alone."""
    with pytest.MonkeyPatch.context() as patch:
        needed = [check for check in CHECKS if check[0] in ("rollout", name)]
        patch.setattr("minirlhf.evaluation.doctor.doctor.CHECKS", needed)
        return diagnose(*models, **given)[-1]


def others(status, *names):
    """The statuses of all checks but these."""
    return {status[name] for name in NAMES if name not in names}


# ---- health ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [
    {}, dict(precision="bf16"), dict(precision="fp16", init_kl_coef=0.0), dict(top_p=1.0, temperature=0.7),
    dict(top_k=1), dict(batch_size=1, gen_len=1), dict(eos_token_id=VOCAB.index("好"), gen_len=9, batch_size=20),
    dict(lr_schedule="linear", batch_size=2), dict(eos_token_id=0, missing_eos="replace"),
])  # fmt: skip
def test_a_healthy_run_passes(settings):
    status, findings = examine(**settings)
    assert set(status.values()) == {"ok"}
    assert all(finding.remedy == "" and finding.why for finding in findings.values())


@pytest.mark.parametrize("sizes", [{}, dict(model_type="llama", tie_word_embeddings=False)])
def test_a_healthy_llama_passes(sizes):
    policy, reference = (make_llama(0, scale=2.0, **SMALL, **sizes) for _ in range(2))
    assert others(examine(ActorCritic(policy).eval(), reference)[0]) == {"ok"}


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes(name):
    preset = {**PRESETS[name], **DEFAULTS}
    preset |= dict(group_size=2) if "group_size" in preset else {}
    unseen = {"precision"} if name == "gspo" else set()  # its clip range is too small for bf16
    assert others(examine(policy=gpt2(), **preset)[0], *unseen) == {"ok"}


def test_a_plain_gpt2_an_actor_critic_as_reference_and_a_tanh_head_pass():
    policy = ActorCritic(gpt2(), ValueHead(16, "tanh")).eval()
    assert others(examine(gpt2(), ActorCritic(gpt2()).eval())[0]) == {"ok"}
    assert others(examine(policy, value_head="tanh")[0]) == {"ok"}


def test_the_shipped_weights_pass(capsys):
    """By the command line; the report is a line a check."""
    folders = ["--policy", str(WEIGHTS / "gpt2-chinese-reviews-small")]
    folders += ["--reward", str(WEIGHTS / "bert-chinese-reviews-sentiment-small")]
    options = ["--precision", "bf16", "--batch-size", "64", "--gen-len", "8", "--device", "cpu", "--prompts", "酒店"]
    assert main(["doctor", *folders, *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5].strip() for line in lines] == ["ok"] * len(NAMES)
    assert [line[6:24].strip() for line in lines] == NAMES


# ---- one planted fault a check --------------------------------------------------------------------------------------


def test_another_vocabulary_is_found_and_what_needs_samples_is_skipped_with_the_reason():
    status, findings = examine(tokenizer=Tokenizer([*VOCAB, "extra"]))
    assert status["rollout"] == "fail"
    message = f"the vocabulary has {len(VOCAB) + 1} tokens, but the policy was made for {len(VOCAB)}"
    assert message in findings["rollout"].detail
    for name in ("reference", "ratio", "weights", "memory", "precision"):
        assert status[name] == "skip" and "needs the rollout" in findings[name].detail
    for name in ("labels", "masks", "dropout"):
        assert status[name] == "ok"
    assert "the reference was made for 7" in only("rollout", reference=gpt2(vocab_size=7)).detail


def test_prompts_that_leave_no_room_are_found():
    status, findings = examine(prompts=["好", "好" * 60])
    assert status["rollout"] == "fail" and "leave room for 59" in findings["rollout"].detail
    assert status["reference"] == "skip" and status["labels"] == "ok"


def perturbed(scale):
    reference = gpt2()
    with torch.no_grad():
        reference.wte.weight.add_(
            scale * torch.randn(reference.wte.weight.shape, generator=torch.Generator().manual_seed(0))
        )
    return reference


def test_another_reference_is_a_warning():
    status, findings = examine(reference=perturbed(0.05))
    assert status["reference"] == "warn" and others(status, "reference") == {"ok"}
    assert "tuned policy" in findings["reference"].remedy


def test_the_kl_of_another_reference_is_that_of_an_enumeration():
    """One position, the whole vocabulary by hand: gen_len 1, so KL a sequence is KL of the next token."""
    reference, prompt = perturbed(0.05), "酒店"
    ids = torch.tensor([Tokenizer(VOCAB).encode_prompt(prompt)])
    with torch.no_grad():
        p, q = (model(ids)[0, -1].double().softmax(-1).numpy() for model in (gpt2(), reference))
    expected = float((p * np.log(p / q)).sum())
    detail = only("reference", reference=reference, prompts=[prompt], gen_len=1).detail
    assert f"KL at step 0 is {expected:.2g} nats" in detail


class OtherInTraining(GPT2):
    """A forward pass that is another one when gradients are on."""

    def hidden_states(self, ids, attention_mask=None, cache=None):
        hidden = super().hidden_states(ids, attention_mask, cache)
        return hidden * 1.01 if torch.is_grad_enabled() else hidden


class OtherInSampling(GPT2):
    """A forward pass that is another one over a cache."""

    def hidden_states(self, ids, attention_mask=None, cache=None):
        hidden = super().hidden_states(ids, attention_mask, cache)
        return hidden * 1.01 if cache is not None else hidden


@pytest.mark.parametrize(("kind", "named"), [(OtherInTraining, "trained"), (OtherInSampling, "sampled")])
def test_a_first_ratio_away_from_one_is_found(kind, named):
    status, findings = examine(gpt2(kind=kind))
    assert status["ratio"] == "fail" and others(status, "ratio") == {"ok"}
    parts = dict(part.split(" against scored ") for part in findings["ratio"].detail.split(": ")[1].split(", "))
    assert max(parts, key=lambda name: float(parts[name])) == named


def test_samples_that_are_scored_with_the_full_softmax_on_purpose_are_not_held_against_the_sampler():
    status, findings = examine(logprobs_full_softmax=True, top_p=0.5)
    assert status["ratio"] == "ok" and "sampled" not in findings["ratio"].detail
    assert "sampled" in only("ratio", top_p=0.5).detail


def test_swapped_labels_are_found():
    status, findings = examine(reward=sentiment(swapped=True))
    assert status["labels"] == "fail" and others(status, "labels") == {"ok"}
    assert CANARIES[0] in findings["labels"].detail and "id2label" in findings["labels"].remedy


class IgnoresMask(GPT2):
    def hidden_states(self, ids, attention_mask=None, cache=None):
        return super().hidden_states(ids, None, cache)


class Plus(torch.nn.Module):
    def __init__(self, more):
        super().__init__()
        self.more = more
        self.eval()

    def forward(self, x):
        return x + self.more


class CountsPadding(GPT2):
    """Attends by the mask, but numbers padding as well."""

    def hidden_states(self, ids, attention_mask=None, cache=None):
        start = 0 if cache is None else cache.length
        place = torch.arange(start, start + ids.size(1))
        real = torch.ones_like(place).expand(ids.shape) if attention_mask is None else attention_mask
        counted = (real.cumsum(-1) - 1).clamp_min(0)[:, start:]
        shifted = copy.copy(self)
        shifted._modules = {**self._modules, "drop": Plus(self.wpe(place) - self.wpe(counted))}
        return GPT2.hidden_states(shifted, ids, attention_mask, cache)


@pytest.mark.parametrize("kind", [IgnoresMask, CountsPadding])
@pytest.mark.parametrize("who", ["policy", "reference"])
def test_a_model_that_sees_its_padding_is_found(kind, who):
    status, findings = examine(**{who: gpt2(kind=kind)}, prompts=["好", "酒店很好，非常满意"])
    assert status["masks"] == "fail"
    found = findings["masks"].detail
    assert f"{who}, left padding" in found and {"policy", "reference"} - {who} != set(found.split())
    # on the right a causal model sees no padding whatever it does
    assert "right padding" not in found and "classifier" not in found
    other = ({"policy", "reference"} - {who}).pop()
    assert f"{other}," not in found


def test_a_classifier_that_sees_its_padding_is_found():
    reward = sentiment()
    forward = type(reward.model).hidden_states
    reward.model.__class__ = type(
        "IgnoresMask", (type(reward.model),), {"hidden_states": lambda self, ids, mask=None: forward(self, ids)}
    )
    status, findings = examine(reward=reward)
    assert status["masks"] == "fail" and others(status, "masks") == {"ok"}
    assert "classifier, right padding" in findings["masks"].detail and "policy" not in findings["masks"].detail


def test_outputs_that_are_not_a_number_fail():
    policy = gpt2()
    with torch.no_grad():
        policy.ln_f.weight[0] = torch.nan
    status, _ = examine(policy)
    assert status["masks"] == status["dropout"] == status["rollout"] == "fail"


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_a_model_left_in_training_mode_is_found(who):
    status, findings = examine(**{who: gpt2().train()})
    assert status["dropout"] == "fail" and others(status, "dropout") == {"ok"}
    assert f"{who}, in training mode" in findings["dropout"].detail and "eval()" in findings["dropout"].remedy


def test_one_layer_left_in_training_mode_is_found_and_training_without_dropout_is_not_a_fault():
    policy = gpt2()
    policy.h[0].mlp.train()
    assert not policy.training and only("dropout", policy).status == "fail"
    reward = sentiment()
    reward.model.train()  # SentimentReward turns it off at each call
    assert only("dropout", reward=reward).status == "ok"
    still = gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0).train()
    assert only("dropout", still).status == "ok"


class AlwaysDrops(GPT2):
    """Dropout that eval() cannot turn off."""

    def hidden_states(self, ids, attention_mask=None, cache=None):
        return F.dropout(super().hidden_states(ids, attention_mask, cache), 0.1, training=True)


def test_dropout_that_eval_does_not_turn_off_is_found():
    status, findings = examine(reference=gpt2(kind=AlwaysDrops))
    assert status["dropout"] == "fail" and "reference, in eval mode" in findings["dropout"].detail
    assert "__init__" in findings["dropout"].remedy
    reward = sentiment()
    reward.model.dropout.forward = lambda x: F.dropout(x, 0.5)
    assert "classifier, in eval mode" in only("dropout", reward=reward).detail


def test_shared_parameters_are_found():
    policy = ActorCritic(gpt2()).eval()
    status, findings = examine(policy, policy.decoder)
    assert status["weights"] == "fail" and others(status, "weights") == {"ok"}
    assert "policy and ref_policy share parameters" in findings["weights"].detail


def test_a_step_that_also_moves_the_reference_is_found(monkeypatch):
    update = PPOTrainer._update

    def both(self, *args):
        with torch.no_grad():
            self.reference.h[0].mlp.c_fc.bias[3] += 1e-7
        return update(self, *args)

    monkeypatch.setattr(PPOTrainer, "_update", both)
    status, findings = examine()
    assert status["weights"] == "fail" and others(status, "weights") == {"ok"}
    assert "the reference changed" in findings["weights"].detail


def test_a_policy_that_cannot_move_is_found():
    status, findings = examine(lr=1e-30)  # the value head starts from 0, where the smallest step is a change
    assert status["weights"] == "fail" and "the policy did not move" in findings["weights"].detail
    policy = ActorCritic(gpt2()).eval()
    policy.decoder.requires_grad_(False)
    assert "the policy did not move" in only("weights", policy).detail


class OwnHead(GPT2):
    def lm_logits(self, hidden):
        return F.linear(hidden, self.lm_head)


@pytest.mark.parametrize("who", ["policy", "reference"])
def test_an_lm_head_of_its_own_is_found(who):
    models = {"policy": gpt2(kind=OwnHead), "reference": gpt2(kind=OwnHead)}  # equal, so that KL is 0
    for model in models.values():
        model.lm_head = nn.Parameter(model.wte.weight.detach().clone())
    with torch.no_grad():
        models[who].lm_head[7] += 0.5
    status, findings = examine(**models)
    assert (
        status["weights"] == "fail"
        and f"LM head of the {who} is not the one of its config after a step" in findings["weights"].detail
    )


def test_a_batch_that_does_not_fit_is_found():
    status, findings = examine(batch_size=10**10)
    assert status["memory"] == "fail" and others(status, "memory") == {"ok"}
    assert "batch_size" in findings["memory"].remedy
    of_update = only("memory", batch_size=10**9, forward_batch_size=10**9, minibatch_size=10**9, gen_len=50)
    assert "most of it for update" in of_update.detail


def test_the_need_is_compared_with_what_is_free_and_what_the_models_hold(monkeypatch):
    sizes = []
    original = run_checks.estimate

    def caught(*args):
        need = original(*args)
        sizes.append(total(need))
        return need

    monkeypatch.setattr(run_checks, "estimate", caught)
    assert only("memory").status == "ok"
    own = sum(p.numel() * 4 for model in (ActorCritic(gpt2()), gpt2()) for p in model.parameters())
    for share, expected in ((0.7, "ok"), (0.9, "warn"), (1.1, "fail")):
        free = int(sizes[0] / share) - own
        monkeypatch.setattr("minirlhf.evaluation.doctor.doctor.available_memory", lambda device, free=free: free)
        assert only("memory").status == expected


def test_where_the_system_does_not_say_what_is_free_the_need_is_still_said(monkeypatch):
    monkeypatch.setattr("minirlhf.evaluation.doctor.doctor.available_memory", lambda device: None)
    status, findings = examine()
    assert status["memory"] == "skip" and "needed by the formula" in findings["memory"].detail


def loud(factor):
    """A policy whose hidden states become large: exact enough in fp32, not in less."""
    policy = gpt2()
    with torch.no_grad():
        policy.h[0].mlp.c_fc.bias.fill_(factor)
        policy.h[0].mlp.c_proj.weight.mul_(1e-3)
    return policy


def test_weights_that_overflow_in_fp16_are_found_and_are_no_fault_in_bf16():
    status, findings = examine(loud(1e5), loud(1e5), precision="fp16")
    assert status["precision"] == "fail" and "not finite" in findings["precision"].detail
    assert "bf16" in findings["precision"].remedy
    assert status["rollout"] == status["reference"] == "ok"  # these are in fp32
    assert "not finite" not in only("precision", loud(1e5), loud(1e5), precision="bf16").detail


def sharp():
    return add_outlier(gpt2())


def test_log_probabilities_that_bf16_cannot_hold_are_found():
    status, findings = examine(sharp(), sharp(), precision="bf16")
    assert status["precision"] == "fail" and "clip range" in findings["precision"].detail
    status, findings = examine(sharp(), sharp())  # fp32 was chosen: a word for later
    assert status["precision"] == "warn" and "this run is in fp32" in findings["precision"].detail
    assert others(status, "precision") == {"ok"}


@pytest.mark.parametrize(("mean", "worst", "expected"), [
    (0.049, 0.19, "ok"), (0.051, 0.19, "fail"), (0.01, 0.21, "warn"), (float("nan"), 0.1, "fail"),
    (0.01, float("nan"), "warn"),
])  # fmt: skip
def test_rounding_may_take_a_quarter_of_the_clip_range(mean, worst, expected, monkeypatch):
    setup = Setup(gpt2(), gpt2(), Tokenizer(VOCAB), None, PPOConfig(**{**DEFAULTS, "precision": "bf16"}), None, None)
    run_checks.rollout(setup)
    monkeypatch.setattr(run_checks.Rounding, "between", lambda *given: Rounding(mean, worst))
    assert setup.config.cliprange == 0.2 and run_checks.precision(setup).status == expected


def test_what_auto_has_chosen_is_said(monkeypatch):
    monkeypatch.setattr("minirlhf.device.precision_choice.has_native_bf16", lambda device: True)
    detail = only("precision").detail
    assert "(this run is in fp32); precision auto: fp32 (the model has fewer than " in detail
    assert "; fp32 products by PyTorch's default library" in detail  # such a small model is not timed
    assert "auto" not in only("precision", precision="fp32").detail
    monkeypatch.setattr("minirlhf.device.precision.LARGE_MODEL", 1)
    status, findings = examine()
    assert set(status.values()) <= {"ok", "skip"} and "; precision auto: bf16 (" in findings["precision"].detail
    status, findings = examine(sharp(), sharp())  # what the doctor would find in bf16 is why it is not taken
    assert "; precision auto: fp32 (bf16 rounds too much: " in findings["precision"].detail
    assert others(status, "precision") == {"ok"} and status["precision"] == "warn"


def test_a_policy_with_lora_is_its_own_reference():
    """As for PPOTrainer; the findings are those with a copy of the base in its place."""
    settings = {**DEFAULTS, "lora": dict(rank=2), "file": io.StringIO()}
    alone, beside = (doctor(gpt2(), given, Tokenizer(VOCAB), **settings) for given in (None, gpt2()))
    assert [(f.name, f.status) for f in alone] == [(f.name, f.status) for f in beside]
    assert {f.status for f in alone} <= {"ok", "skip"} and {f.name: f for f in alone}["weights"].status == "ok"
    with_adapters = gpt2()
    add_lora(with_adapters, LoRAConfig(rank=2), seed=0)
    findings = doctor(with_adapters, None, Tokenizer(VOCAB), **{**DEFAULTS, "file": io.StringIO()})
    assert {f.status for f in findings} <= {"ok", "skip"}
    for config in (PPOConfig(**DEFAULTS), PPOConfig(**DEFAULTS, lora=dict(rank=2), reference="own")):
        with pytest.raises(ValueError, match="is its own base only with lora"):
            doctor(gpt2(), None, Tokenizer(VOCAB), config=config)


def test_what_a_base_in_bf16_costs_is_told():
    status, findings = examine(lora=dict(rank=2))
    assert set(status.values()) <= {"ok", "skip"} and "base" not in findings["precision"].detail
    found = only("precision", lora=dict(rank=2, base_dtype="bf16"))
    assert found.status == "ok"
    figures = re.findall(r"base held in bf16: .* is (\S+) on average and (\S+) at", found.detail)[0]
    mean, worst = map(float, figures)
    assert 1e-5 < mean < worst < 0.05  # matrices with 8 binary digits
    status, findings = examine(lora=dict(rank=2, base_dtype="bf16"), cliprange=1e-5)
    assert status["precision"] == "warn" and "hold the base in fp32 (base_dtype)" in findings["precision"].remedy


def test_words_of_the_vocabulary_stand_for_prompts_that_are_not_given():
    prompts = words(Tokenizer(VOCAB))
    assert [len(Tokenizer(VOCAB).encode_prompt(prompt)) > 1 for prompt in prompts] == [True] * 4
    assert len(set(prompts)) == len(PROMPT_LENGTHS) and len({len(prompt) for prompt in prompts}) > 1
    assert words(Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "1"]))  # no words at all


# ---- rewards of one's own -------------------------------------------------------------------------------------------


def test_a_reward_without_canaries_is_called_and_not_judged():
    seen = []

    def reward(texts):
        seen.extend(texts)
        return [float(len(set(text))) for text in texts]

    status, findings = examine(reward=reward)
    assert status["labels"] == "skip" and "canaries=" in findings["labels"].detail
    prompts = words(Tokenizer(VOCAB))
    assert all(text.startswith(prompt) for text, prompt in zip(seen[:4], prompts, strict=True))
    assert len(seen) == 4 + run_checks.FORECAST  # and those of the forecast
    assert others(status, "labels") == {"ok"}


def test_canaries_judge_any_reward():
    def reward(prompts, responses):
        return [response.count("早餐") for response in responses]

    good, bad = ("早餐很好", "房间")
    assert only("labels", reward=reward, canaries=(good, bad)).status == "ok"
    assert only("labels", reward=reward, canaries=(bad, good)).status == "fail"
    assert only("labels", reward=reward, canaries=(bad, bad)).status == "fail"


def test_a_classifier_that_cannot_read_the_canaries_is_not_judged_by_them():
    model = make_bert(scale=10.0, vocab_size=175)
    reward = SentimentReward(model, Tokenizer(VOCAB[:175]), device="cpu")  # no Chinese
    status, findings = examine(reward=reward)
    assert status["labels"] == "skip" and "canaries=" in findings["labels"].detail


@pytest.mark.parametrize(
    "reward", [lambda texts: [0.0], lambda texts: [float("nan")] * len(texts), lambda texts: 1 / 0]
)
def test_a_broken_reward_is_a_finding_and_stops_nothing_else(reward):
    status, findings = examine(reward=reward)
    assert status["labels"] == "fail" and "Error: " in findings["labels"].detail
    assert others(status, "labels", "forecast") == {"ok"} and status["forecast"] == "skip"


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path):
    gpt2().save_pretrained(tmp_path / "policy")
    reward = sentiment()
    reward.model.save_pretrained(tmp_path / "reward")
    for name in ("policy", "reward"):
        Tokenizer(VOCAB).save_pretrained(tmp_path / name)
    return tmp_path


def by_folder(folders, reference=None, **settings):
    findings = doctor(
        folders / "policy", reference, reward=str(folders / "reward"), file=io.StringIO(), **{**DEFAULTS, **settings}
    )
    assert [finding.name for finding in findings] == NAMES
    return {f.name: f.status for f in findings}, {f.name: f for f in findings}


def files(folder):
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


def test_folders_are_loaded_and_left_as_they_are(folders):
    before = files(folders)
    assert set(by_folder(folders)[0].values()) == {"ok"}
    assert files(folders) == before and len(before) >= 6


def test_a_folder_that_cannot_be_read_is_an_error_before_any_check(folders, capsys):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        by_folder(folders, folders / "nowhere")
    path = folders / "policy" / "model.safetensors"
    tensors = read_tensors(path)
    write_tensors(path, {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight differs"):
        by_folder(folders)
    Tokenizer([*VOCAB, "more"]).save_pretrained(folders / "reward")
    assert main(["doctor", "--policy", str(folders / "policy"), "--reward", str(folders / "reward")]) == 1
    shown = capsys.readouterr()
    assert shown.out == "" and re.fullmatch(r"error: .*\n", shown.err)


def test_swapped_labels_in_a_folder_are_a_finding_and_no_python_warning(folders, recwarn):
    labels = json.loads((folders / "reward" / "config.json").read_text())["id2label"]
    rewrite_config(folders / "reward", id2label={"0": labels["1"], "1": labels["0"]})
    assert by_folder(folders)[0]["labels"] == "fail" and not list(recwarn)


@pytest.mark.parametrize(("network", "normalised"), [
    (lambda: DecoderScorer(gpt2()), True), (lambda: make_bert(id2label={0: "reward"}), False),
])  # fmt: skip
def test_a_reward_model_in_a_folder_is_examined_by_canaries(folders, network, normalised):
    """One that we saved, or one with a single score of another tool."""
    model = RewardModel(network(), Tokenizer(VOCAB), device="cpu")
    model.save_pretrained(folders / "reward")
    if not normalised:
        path = folders / "reward" / "config.json"
        content = json.loads(path.read_text())
        del content["reward_normalisation"]
        path.write_text(json.dumps(content))
    status, findings = by_folder(folders)
    assert status["labels"] == "skip" and "canaries=" in findings["labels"].detail
    assert others(status, "labels") == {"ok"}
    canaries = sorted(["很好", "脏"], key=lambda text: model([text]).item())
    assert by_folder(folders, canaries=(canaries[1], canaries[0]))[0]["labels"] == "ok"
    assert by_folder(folders, canaries=(canaries[0], canaries[1]))[0]["labels"] == "fail"


def test_labels_without_a_meaning_need_the_name_of_the_positive_one(folders):
    labels = json.loads((folders / "reward" / "config.json").read_text())["id2label"]
    positive = next(int(i) for i, label in labels.items() if label.startswith("positive"))
    rewrite_config(folders / "reward", id2label={"0": "LABEL_0", "1": "LABEL_1"})
    with pytest.raises(ValueError, match="cannot tell the positive label"):
        by_folder(folders)
    assert set(by_folder(folders, positive_label=f"LABEL_{positive}")[0].values()) == {"ok"}
    assert by_folder(folders, positive_label=f"LABEL_{1 - positive}")[0]["labels"] == "fail"


def test_the_exit_code_of_the_command_line(folders, capsys):
    given = ["--policy", str(folders / "policy"), "--reward", str(folders / "reward"), "--device", "cpu"]
    given += ["--gen-len", "4", "--batch-size", "2"]
    assert main(["doctor", *given]) == 0
    capsys.readouterr()
    canaries = ["很好\x1b[2J\n", "脏"]
    scores = dict(
        zip(canaries, SentimentReward.from_pretrained(folders / "reward", device="cpu")(canaries), strict=True)
    )
    reversed_ = sorted(canaries, key=scores.__getitem__)
    assert main(["doctor", *given, "--canaries", *reversed_, "--prompts", "好"]) == 1
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\\x1b[2J\\n" in out
    assert len(out.splitlines()) == len(NAMES) + 2  # why and fix
    (line,) = (i for i, line in enumerate(out.splitlines()) if line.startswith("fail"))
    assert out.splitlines()[line + 1].split()[0] == "why:" and out.splitlines()[line + 2].split()[0] == "fix:"
    gpt2(1).save_pretrained(folders / "tuned")
    assert main(["doctor", *given, "--reference", str(folders / "tuned")]) == 0  # a warning is no failure
    assert any(line.startswith("warn  reference") for line in capsys.readouterr().out.splitlines())


# ---- nothing is changed ---------------------------------------------------------------------------------------------


def condition(model):
    """All that can be told of a module: weights and where they lie, gradients, flags, modes."""
    tensors = [(name, t.dtype, t.device, t.data_ptr(), t.requires_grad, None if t.grad is None else t.grad.tolist())
               for name, t in itertools.chain(model.named_parameters(), model.named_buffers())]  # fmt: skip
    digest = hashlib.sha256(b"".join(t.numpy().tobytes() for t in model.state_dict().values())).hexdigest()
    return tensors, digest, [(name, module.training) for name, module in model.named_modules()], type(model)


@pytest.mark.parametrize("fault", ["vocabulary", "training"])
def test_models_modes_and_random_states_are_as_before(fault):
    policy, reference, reward = ActorCritic(gpt2()).train(), gpt2(), sentiment()
    policy.decoder.h[0].attn.eval()
    policy.decoder.wpe.weight.requires_grad_(False)
    policy.decoder.wte.weight.grad = torch.ones_like(policy.decoder.wte.weight)
    reward.model.train()
    reward.model.bert.pooler.eval()
    if fault == "training":
        reference.train()
    tokenizer = Tokenizer([*VOCAB, "extra"]) if fault == "vocabulary" else Tokenizer(VOCAB)
    models = policy, reference, reward.model

    def noisy(texts):  # a reward that draws from the global generator
        return torch.rand(len(texts)).tolist()

    for function in (reward, noisy):
        before, states = [condition(model) for model in models], torch.get_rng_state().tolist()
        with torch.no_grad():
            examine(policy, reference, function, tokenizer, precision="bf16")
            assert not torch.is_grad_enabled()
        assert [condition(model) for model in models] == before and torch.get_rng_state().tolist() == states
        assert reward.model is models[2]


# ---- the interface --------------------------------------------------------------------------------------------------


def test_bad_settings_are_refused_before_any_check(capsys):
    with pytest.raises(ValueError, match=r"batch_sise.*did you mean 'batch_size'"):
        examine(batch_sise=3)
    with pytest.raises(ValueError, match=r"PPOConfig\.precision"):
        examine(precision="fp8")
    for given in (dict(reference=gpt2()), dict(tokenizer=Tokenizer(VOCAB))):
        with pytest.raises(ValueError, match="reference and tokenizer must be given"):
            doctor(gpt2(), **given)
    assert capsys.readouterr().out == ""


def test_settings_replace_the_fields_of_a_config():
    config = PPOConfig(**{**DEFAULTS, "precision": "fp16"})
    findings = doctor(gpt2(), gpt2(), Tokenizer(VOCAB), config=config, precision="bf16", file=io.StringIO())
    assert findings[-1].detail.startswith("bf16: ") and "this run" not in findings[-1].detail
    assert {f.name: f.status for f in findings}["labels"] == "skip"  # no reward was given


def test_a_finding_reads_as_one_line_or_three():
    good = Finding("masks", "ok", "fine\nly", "because")
    assert str(good) == "ok    masks              fine\\nly"
    bad = Finding("masks", "fail", "bad", "because", "do this")
    assert str(bad).splitlines() == [
        "fail  masks              bad",
        "                         why:  because",
        "                         fix:  do this",
    ]


# ---- forecast -------------------------------------------------------------------------------------------------------


def test_the_forecast_is_the_optimum_at_the_runs_beta_and_target(monkeypatch):
    monkeypatch.setattr(run_checks, "FORECAST", 256)
    prompts, beta = ["酒店", "很好"], 0.5
    reward = lambda texts: [len(set(text)) / 8 for text in texts]  # noqa: E731
    reference = gpt2()
    drawn = dict(tokenizer=Tokenizer(VOCAB), gen_len=5, samples=256, sampling=PPOConfig().sampling)
    expected = optimum(reference, prompts, reward, **drawn)
    best, at_target = expected.at(beta), expected.at_kl(0.01)
    settings = dict(reference=reference, reward=reward, prompts=prompts, init_kl_coef=beta, target=0.01)
    found = only("forecast", **settings)
    assert found.status == "ok"
    assert f"the reference has reward {expected.start:.3f}" in found.detail
    assert f"at beta 0.5 the best possible is {best.reward.mean:.3f} at {best.kl.mean:.2f} nats" in found.detail
    assert f"at the target of 0.01 nats the best possible is {at_target.reward.mean:.3f}" in found.detail
    assert best.reward.mean > expected.start and "words of the vocabulary" not in found.detail
    scaled = only("forecast", **{**settings, "init_kl_coef": 2 * beta, "score_scale": 2.0, "adaptive_kl": False})
    assert f"at beta 1 the best possible is {best.reward.mean:.3f}" in scaled.detail and "target" not in scaled.detail
    beyond = only("forecast", **{**settings, "init_kl_coef": 1e-3, "prompts": None})
    assert "beyond what 256 samples" in beyond.detail and "words of the vocabulary" in beyond.detail


def test_of_a_constant_reward_the_forecast_warns():
    found = only("forecast", reward=lambda texts: [1.0] * len(texts))
    assert found.status == "warn" and "every policy is as good as the reference" in found.detail
