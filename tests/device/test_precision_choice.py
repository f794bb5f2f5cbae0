"""What "auto" stands for: bf16 for a large model, on a device that has it, if it changes next to nothing."""

import platform
import sys
from pathlib import Path

import pytest
import torch

from conftest import add_outlier, make_bert, make_gpt2
from minirlhf.device import precision_choice
from minirlhf.device.precision import Precision
from minirlhf.device.precision_choice import PrecisionChoice, choose_precision, has_native_bf16
from minirlhf.models.probes import classifier_probe, language_model_probe

CPU = torch.device("cpu")
NATIVE = has_native_bf16


@pytest.fixture
def favourable(monkeypatch):
    """Every model is large, and every device has bf16."""
    monkeypatch.setattr("minirlhf.device.precision.LARGE_MODEL", 1)
    monkeypatch.setattr(precision_choice, "has_native_bf16", lambda device: True)


def never():
    raise AssertionError("there is nothing to compare")


def outliers():
    return add_outlier(make_gpt2())


def of_gpt2(model, **options):
    return choose_precision("auto", model, language_model_probe(model), **options)


# ---- the choice -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16"])
def test_what_is_asked_for_is_taken_unseen(name):
    choice = choose_precision(name, make_gpt2(), never)
    assert choice == PrecisionChoice(name) and str(choice) == f"precision: {name}"


@pytest.mark.parametrize("name", ["fp8", "", None])
def test_an_unknown_precision_is_refused(name):
    with pytest.raises(ValueError, match="precision must be one of auto, fp32, tf32, bf16, fp16, got"):
        choose_precision(name, make_gpt2(), never)


def test_a_small_model_stays_in_fp32(monkeypatch):
    monkeypatch.setattr(precision_choice, "has_native_bf16", lambda device: True)
    choice = choose_precision("auto", make_gpt2(), never)
    assert str(choice) == "precision auto: fp32 (the model has fewer than 33.6 million parameters)"


def test_a_device_without_bf16_stays_in_fp32(favourable, monkeypatch):
    monkeypatch.setattr(precision_choice, "has_native_bf16", lambda device: False)
    choice = choose_precision("auto", make_gpt2(), never)
    assert choice.name == "fp32" and "this CPU has no instructions for bf16" in choice.reason


def test_a_large_model_whose_figures_stay_gets_bf16(favourable):
    choice = of_gpt2(make_gpt2())
    assert choice.name == "bf16" and str(choice).startswith("precision auto: bf16 (|ratio - 1| against fp32 is ")


def test_weights_with_outliers_fail_and_stay_in_fp32(favourable):
    choice = of_gpt2(outliers())
    assert choice.name == "fp32" and choice.reason.startswith("bf16 rounds too much: |ratio - 1| against fp32 is ")
    assert choice.reason.endswith("where 0.05 and 0.2 are allowed")
    assert of_gpt2(outliers(), cliprange=1e9).name == "bf16"  # it was rounding, and nothing else


@pytest.mark.parametrize(("ratios", "cliprange", "expected"), [
    ((1.04, 1.0, 1.0, 0.94), 0.2, "bf16"),
    ((1.06, 0.95, 0.95, 1.05), 0.2, "fp32"),  # 0.0525 on average
    ((1.06, 0.95, 0.95, 1.05), 0.3, "bf16"),
    ((1.19, 1.0, 1.0, 1.0), 0.2, "bf16"),
    ((1.21, *[1.0] * 9), 0.2, "fp32"),  # 0.021 on average, but one that PPO would clip
    ((0.79, *[1.0] * 9), 0.2, "fp32"),
    ((float("nan"), *[1.0] * 9), 0.2, "fp32"),
    ((float("inf"), *[1.0] * 9), 0.2, "fp32"),
])  # fmt: skip
def test_a_quarter_of_the_clip_range_on_average_and_all_of_it_at_worst(favourable, ratios, cliprange, expected):
    answers = iter([torch.zeros(len(ratios)) - 3.0, torch.tensor(ratios).log() - 3.0])
    choice = choose_precision("auto", torch.nn.Linear(2, 2), lambda: next(answers), cliprange)
    assert choice.name == expected


def test_the_probe_runs_in_fp32_then_in_bf16_without_dropout_and_gradients(favourable):
    model, seen = torch.nn.Linear(2, 2), []

    def probe():
        assert not model.training and not torch.is_grad_enabled()
        seen.append(model(torch.ones(1, 2)).dtype)
        return torch.zeros(1)

    model.train()
    choose_precision("auto", model, probe)
    assert seen == [torch.float32, torch.bfloat16] and model.training


# ---- the probes -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_language_model_is_compared_on_tokens_of_its_own(temperature):
    """The same 64 tokens in both precisions, found again in the full table of the model's log-probabilities."""
    model = make_gpt2(scale=2.0)
    probe = language_model_probe(model, temperature)
    state = torch.get_rng_state()
    exact = probe()
    with Precision("bf16", CPU).autocast():
        reduced = probe()
    assert torch.equal(probe(), exact) and torch.equal(torch.get_rng_state(), state)
    generator, V = torch.Generator().manual_seed(0), model.config.vocab_size
    ids = torch.randint(V, (4, 16), generator=generator)
    table = (model(ids) / temperature).log_softmax(-1).view(64, V)
    distance, token = (table - exact).abs().min(-1)
    assert distance.max() < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        rounded = (model(ids).float() / temperature).log_softmax(-1).view(64, V)
    assert (rounded.gather(-1, token[:, None]) - reduced).abs().max() < 0.02 and not torch.equal(exact, reduced)


@torch.no_grad()
def test_a_classifier_is_compared_on_the_probabilities_of_its_labels(favourable):
    model = make_bert(scale=4.0)
    found = classifier_probe(model)()
    assert found.shape == (4, 2) and found.exp().sum(-1) == pytest.approx(torch.ones(4))
    assert choose_precision("auto", model, classifier_probe(model)).name == "bf16"
    model.classifier.weight.mul_(1e3)
    assert choose_precision("auto", model, classifier_probe(model)).name == "fp32"


# ---- the device -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("machine", "onednn", "instructions", "expected"), [
    ("x86_64", True, {}, False),  # AVX-512 alone: oneDNN says yes, and computes in fp32
    ("x86_64", True, {"_is_avx512_bf16_supported"}, True),
    ("AMD64", True, {"_is_amx_tile_supported"}, True),
    ("x86_64", False, {"_is_avx512_bf16_supported"}, False),
    ("aarch64", True, {}, True),
    ("aarch64", False, {}, False),
])  # fmt: skip
def test_a_cpu_has_bf16_only_by_its_own_instructions(monkeypatch, machine, onednn, instructions, expected):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions, raising=False)
    assert NATIVE(CPU) is expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_has_bf16_from_ampere_on(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert NATIVE(torch.device("cuda")) is expected


@pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64" or not hasattr(torch.cpu, "_is_avx512_bf16_supported"),
    reason="needs /proc/cpuinfo of an x86 and a PyTorch that can be asked",
)
def test_this_cpu_has_what_the_system_says():
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    assert NATIVE(CPU) == bool({"avx512_bf16", "amx_bf16"} & set(flags))
