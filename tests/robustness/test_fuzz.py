"""Hostile files: a short run of the fuzzer, the fuzzer against loaders that are at fault, and what it has found."""

import contextlib
import hashlib
import itertools
import json
import os
import pickle
import random
import re
import signal
import sys
import time

import fuzz
import pytest
import torch

from conftest import VOCAB, make_bert, make_gpt2
from minirlhf import GPT2, ActorCritic, BertClassifier, PPOConfig, SentimentReward, Tokenizer
from minirlhf.io.files import read_json, write_json
from minirlhf.io.model_folder import read_tensors, write_tensors
from minirlhf.models import bert, gpt2

# ---- the fuzzer ------------------------------------------------------------------------------------------------------

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs fork, inotify and /proc")


@on_linux
@pytest.mark.parametrize("target", fuzz.targets(), ids=lambda target: target.name)
def test_hostile_files_are_loaded_or_refused_by_name(target):
    """As `python tests/robustness/fuzz.py`, which does it for longer."""
    report = fuzz.fuzz(target, 40, seed=0)
    assert report.failures == []
    assert report.outcomes["loaded"] + report.outcomes["refused"] == 40
    assert min(report.outcomes["refused"], report.outcomes["loaded"]) > 3


VALID = json.dumps({"name": "value", "number": 3, "list": [1, 2]})


def fails(function):
    """A target whose loader is at fault whenever the file is not the valid one."""

    def load(folder):
        if (folder / "config.json").is_file() and (folder / "config.json").read_text("latin-1") == VALID:
            return None
        return function(folder)

    return fuzz.Target("x", lambda folder: (folder / "config.json").write_text(VALID), load, lambda thing: thing)


def refuse(folder):
    raise ValueError(f"{folder} is bad")


def write_and_refuse(folder):
    (folder / "new").write_text("x")
    refuse(folder)


def swallow(folder):
    with contextlib.suppress(OSError):
        (folder / "../secret").read_text()


@on_linux
@pytest.mark.parametrize(("function", "said"), [
    (lambda folder: {}["x"], "KeyError"),
    (lambda folder: sys.exit(1), "SystemExit"),
    (lambda folder: int("x"), "ValueError: invalid literal"),  # no path in it
    (lambda folder: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL"),
    (lambda folder: time.sleep(60), "more than 1 seconds"),
    (lambda folder: bytearray(1 << 27), "MemoryError"),
    (lambda folder: torch.ones(1 << 25), "RuntimeError.*memory"),
    (lambda folder: (folder / "../outside/config.json").read_text(), "AssertionError: opened"),
    (lambda folder: torch.from_file(str(folder / "../outside/config.json"), size=4), "AssertionError: opened"),
    (swallow, "AssertionError: opened .*secret"),
    (lambda folder: os.listdir("/etc"), "AssertionError: opened .*/etc"),
    (lambda folder: pickle.loads(pickle.dumps(refuse)), "AssertionError: opened .*pickle.find_class"),
    (write_and_refuse, "AssertionError: a refused load changed the folder"),
])  # fmt: skip
def test_the_fuzzer_sees_a_loader_at_fault(monkeypatch, function, said):
    if "seconds" in said:
        monkeypatch.setattr(fuzz, "SECONDS", 1)
    report = fuzz.fuzz(fails(function), 3, seed=0)
    assert report.outcomes["failed"] == len(report.failures) >= 1
    assert all(re.search(said, failure) for failure in report.failures)


def test_an_input_depends_on_its_number_alone(tmp_path):
    for target in fuzz.targets():
        (tmp_path / target.name).mkdir()
        target.write(tmp_path / target.name)
        valid = fuzz.read_files(tmp_path / target.name)
        inputs = [fuzz.mutated(valid, random.Random(i)) for i in range(30)]
        assert inputs == [fuzz.mutated(valid, random.Random(i)) for i in range(30)]
        assert all(inputs.count(x) < 10 for x in inputs) and sum(x != valid for x in inputs) > 20


# ---- found by fuzzing: errors that did not say where ----------------------------------------------------------------


def reward_folder(folder):
    make_bert().save_pretrained(folder)
    Tokenizer(VOCAB).save_pretrained(folder)


def change(folder, **fields):
    write_json(folder / "config.json", {**read_json(folder / "config.json"), **fields})


def test_an_unknown_kind_of_value_head_is_named_with_its_file(tmp_path):
    model = ActorCritic(make_gpt2())
    model.save_pretrained(tmp_path)
    write_tensors(tmp_path / "value_head.safetensors", model.value_head.state_dict(), {"kind": "cubic"})
    message = "the kind of a value head must be one of linear, tanh, got 'cubic'"
    with pytest.raises(ValueError, match=rf"^{tmp_path}/value_head.safetensors: {message}"):
        ActorCritic.from_pretrained(tmp_path)


def test_a_reward_whose_files_do_not_fit_each_other_names_its_folder(tmp_path):
    reward_folder(tmp_path)
    change(tmp_path, id2label={"0": "A", "1": "B"})
    with pytest.raises(ValueError, match=rf"^{tmp_path}: cannot tell the positive label"):
        SentimentReward.from_pretrained(tmp_path, device="cpu")


def test_a_reward_that_scores_nan_warns(tmp_path):
    reward_folder(tmp_path)
    model = make_bert()
    with torch.no_grad():
        model.classifier.weight.fill_(3e38)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="nan"):
        SentimentReward.from_pretrained(tmp_path, device="cpu")


# ---- found by fuzzing: models built before their files were known to be of that size --------------------------------

SIZES = {
    GPT2: ("vocab_size", "n_positions", "n_embd", "n_layer", "n_inner"),
    BertClassifier: ("vocab_size", "max_position_embeddings", "type_vocab_size", "hidden_size", "num_hidden_layers",
                     "intermediate_size"),
}  # fmt: skip


@pytest.mark.parametrize("model", SIZES)
def test_a_config_of_another_size_is_refused_before_memory_is_taken(tmp_path, model):
    (make_gpt2() if model is GPT2 else make_bert()).save_pretrained(tmp_path)
    change(tmp_path, n_head=1, num_attention_heads=1)
    content = read_json(tmp_path / "config.json")
    for field, size in itertools.product(SIZES[model], (10**9, 2**62, 10**400)):
        write_json(tmp_path / "config.json", {**content, field: size})
        with pytest.raises(ValueError, match=rf"{tmp_path}.*(\b{field} must be|the config asks for)"):
            model.from_pretrained(tmp_path)


@pytest.mark.parametrize("model", [GPT2, BertClassifier])
def test_the_stored_tensors_bound_the_number_of_layers(tmp_path, model):
    """Without the bound 1,000 layers would be built, of 40 kB each, to say what is missing."""
    made, module = (make_gpt2(), gpt2) if model is GPT2 else (make_bert(), bert)
    layers = [name for name in made.state_dict() if re.search(r"\b(h|layer)\.0\.", name)]
    assert len(layers) == module.LAYER_TENSORS
    made.save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path / "model.safetensors")
    write_tensors(tmp_path / "model.safetensors", tensors | {f"x{i}": torch.zeros(1) for i in range(1200)})
    change(tmp_path, n_layer=1000, num_hidden_layers=1000)
    with pytest.raises(ValueError, match=rf"{tmp_path}: .*layers? must be at most \d\d\d?, the layers that are stored"):
        model.from_pretrained(tmp_path)


@pytest.mark.parametrize("count", [3, 10**9, "2", -1, [2], 2.5])
def test_a_number_of_nameless_labels_is_that_of_the_weights(tmp_path, count):
    model = make_bert()
    model.save_pretrained(tmp_path)
    change(tmp_path, id2label=None, num_labels=2)
    assert BertClassifier.from_pretrained(tmp_path).config.labels == ["LABEL_0", "LABEL_1"]
    change(tmp_path, num_labels=count)
    with pytest.raises(ValueError, match=f"{tmp_path}"):
        BertClassifier.from_pretrained(tmp_path)


def test_a_setting_beyond_every_float_is_refused():
    with pytest.raises(ValueError, match=r"PPOConfig.score_scale must be"):
        PPOConfig(score_scale=10**400)


# ---- found by fuzzing: checkpoints that we did not write, whose check sums are right --------------------------------


@pytest.fixture
def checkpoint(tmp_path):
    fuzz.write_checkpoint(tmp_path / "checkpoint")
    assert fuzz.resume_trainer(tmp_path / "checkpoint").iteration == 0
    return tmp_path / "checkpoint"


def refused_checkpoint(folder, said):
    files = fuzz.with_sums(fuzz.read_files(folder))
    fuzz.write_files(folder, files)
    with pytest.raises(ValueError, match=rf"{folder}.*{said}"):
        fuzz.resume_trainer(folder)


@pytest.mark.parametrize(("field", "value"), [
    ("format", None), ("iteration", -1), ("optimizer_steps", 10**400), ("bad_steps", "0"), ("micro_batch_size", 0),
    ("kl_coef", -1.0), ("scaler", {"scale": 1.0}), ("origin", {"name": 1}),
    ("frozen", [[]]), ("reference", {"sha256": 1, "source": None}), ("config", {"base": 1}), ("config", []),
])  # fmt: skip
def test_a_counter_of_a_checkpoint_that_is_none_is_named(checkpoint, field, value):
    content = read_json(checkpoint / "training.json")
    (checkpoint / "training.json").write_text(json.dumps({**content, field: value}))
    refused_checkpoint(checkpoint, field)
    del content[field]
    (checkpoint / "training.json").write_text(json.dumps(content))
    refused_checkpoint(checkpoint, field)


def test_a_checkpoint_that_leaves_nothing_to_train_is_refused(checkpoint):
    names = [name for name, _ in ActorCritic.from_pretrained(checkpoint).named_parameters()]
    content = read_json(checkpoint / "training.json")
    write_json(checkpoint / "training.json", {**content, "frozen": names})
    refused_checkpoint(checkpoint, "every parameter is frozen")


@pytest.mark.parametrize(("name", "tensor", "said"), [
    ("generator.sampling", None, "generator.sampling is missing"),
    ("generator.sampling", torch.zeros(4), "another kind of device"),
    ("optimizer.exp_avg.decoder.ln_f.bias", None, "exp_avg.decoder.ln_f.bias is missing"),
    ("optimizer.exp_avg.decoder.ln_f.bias", torch.zeros(3), r"exp_avg.decoder.ln_f.bias has shape \(3,\)"),
    ("optimizer.step.decoder.ln_f.bias", torch.zeros(1), r"step.decoder.ln_f.bias has shape \(1,\)"),
    ("optimizer.exp_avg_sq.decoder.ln_f.bias", torch.zeros(4).double(), "dtype torch.float64, where the model needs"),
])  # fmt: skip
def test_a_tensor_of_a_checkpoint_that_does_not_fit_is_named(checkpoint, name, tensor, said):
    tensors = read_tensors(checkpoint / "training.safetensors")
    moments = {"step": torch.zeros(()), "exp_avg": torch.zeros(4), "exp_avg_sq": torch.zeros(4)}
    tensors |= {f"optimizer.{key}.decoder.ln_f.bias": value for key, value in moments.items()}
    write_tensors(checkpoint / "training.safetensors", tensors)
    fuzz.write_files(checkpoint, fuzz.with_sums(fuzz.read_files(checkpoint)))
    assert fuzz.resume_trainer(checkpoint).iteration == 0
    tensors = {**tensors, name: tensor} if tensor is not None else {k: v for k, v in tensors.items() if k != name}
    write_tensors(checkpoint / "training.safetensors", tensors)
    refused_checkpoint(checkpoint, said)


def test_a_manifest_leads_nowhere_else(checkpoint):
    sums = read_json(checkpoint / "manifest.json")["sha256"]
    (checkpoint.parent / "outside.json").write_text("{}")
    for name in ("../outside.json", "/etc/passwd", "a\0b", "."):
        write_json(checkpoint / "manifest.json", {"sha256": {**sums, name: hashlib.sha256(b"{}").hexdigest()}})
        with pytest.raises(ValueError, match=rf"{checkpoint} is damaged: .* is missing"):
            fuzz.resume_trainer(checkpoint)
