"""Settings of DPO: their types, their checks, and the names that others have for them."""

import dataclasses
import math
from typing import get_type_hints

import pytest

from minirlhf import DPOConfig, LoRAConfig
from minirlhf.supervised.dpo_config import FIELD_NAMES, DPOOverrides


def test_overrides_for_editors_are_the_fields_of_the_config():
    fields = [field.name for field in dataclasses.fields(DPOConfig)]
    assert list(DPOOverrides.__annotations__) == fields
    assert get_type_hints(DPOOverrides) == {n: t for n, t in get_type_hints(DPOConfig).items() if n in fields}


@pytest.mark.parametrize(("name", "meant"), [
    ("learning_rate", "did you mean 'lr'"), ("max_prompt_length", "prompt and response together.* 'max_length'"),
    ("loss_type", "\"sigmoid\" or \"ipo\"; did you mean 'loss'"), ("warmup_ratio", "share.*'warmup'"),
    ("per_device_train_batch_size", "'batch_size'"), ("precompute_ref_log_probs", "always computed once"),
    ("label_smoothin", "did you mean 'label_smoothing'"), ("colour", "the known names are epochs, "),
])  # fmt: skip
def test_an_unknown_name_suggests_what_is_meant(name, meant):
    with pytest.raises(ValueError, match=f"DPOConfig has no field '{name}'; .*{meant}"):
        DPOConfig.with_overrides(None, **{name: 1})


def test_every_name_that_is_suggested_exists():
    fields = {field.name for field in dataclasses.fields(DPOConfig)}
    assert {name for name, _ in FIELD_NAMES.values()} <= {*fields, None} and not fields & FIELD_NAMES.keys()


@pytest.mark.parametrize(("changes", "message"), [
    *(({"beta": beta}, "beta must be a finite number above 0") for beta in (0, -0.1, math.inf, math.nan, "0.1")),
    *(({"label_smoothing": eps}, "label_smoothing must be") for eps in (-0.1, 0.5, math.nan)),
    ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing must be 0 with loss='ipo'"),
    ({"loss": "hinge"}, "loss must be one of sigmoid, ipo, got 'hinge'"), ({"batch_size": 0}, "batch_size"),
    ({"reference_free": 1}, "reference_free"), ({"packing": 1}, "packing"), ({"reference_cache": 3}, "reference_cache"),
    ({"precision": "fp8"}, "precision"), ({"sharding": "full"}, "precision must be .* with sharding='full', got .auto"),
    ({"sharding": "full", "precision": "fp32", "lora": LoRAConfig()}, "lora must be None with sharding='full'"),
])  # fmt: skip
def test_bad_settings_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=rf"DPOConfig\.{message}"):
        DPOConfig(**changes)


def test_a_given_config_is_the_base_of_overrides(tmp_path):
    config = DPOConfig.with_overrides(DPOConfig(beta=0.3, lr=1e-5), lr=1e-4, reference_cache=tmp_path)
    assert (config.beta, config.lr, config.reference_cache) == (0.3, 1e-4, str(tmp_path))
