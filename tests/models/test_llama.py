"""Llama, Qwen2, Qwen3 and Mistral against transformers, for every kind of rotary embedding; folders; refusals."""

import copy
import dataclasses
import functools
import json
import math

import pytest
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from conftest import assert_relatively_close, rewrite_config, rewrite_tensors
from minirlhf import Llama, LlamaConfig, SamplingConfig, generate, load_decoder
from minirlhf.models.rope import RopeConfig, frequencies

SIZES = dict(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=40)  # fmt: skip
ROPES = {
    "default": {"rope_theta": 500.0},
    "linear": {"factor": 3.0},
    "dynamic": {"factor": 2.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 12},
    "yarn, scaled": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 0.3, "truncate": False,
                     "beta_fast": 8.0, "beta_slow": 2.0},
    "yarn, given": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3},
}  # fmt: skip
FAMILIES = {
    "llama": ("llama", {}),
    "llama, tied, one head for all": ("llama", dict(tie_word_embeddings=True, num_key_value_heads=1)),
    "llama, biases": ("llama", dict(attention_bias=True, mlp_bias=True, head_dim=6, num_key_value_heads=4)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True)),
    # Heads of 4: a norm's sums over more features, in fp32 in transformers, have an order that is that of the memory.
    "qwen3": ("qwen3", dict(head_dim=4, num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True)),
    "qwen3, biases": ("qwen3", dict(head_dim=4, num_attention_heads=6, attention_bias=True)),
    "mistral": ("mistral", dict(sliding_window=None, hidden_act="gelu")),
}
CASES = [*((family, "default") for family in FAMILIES), *(("llama", rope) for rope in list(ROPES)[1:])]
LENGTHS = [7, 1, 4]


def random_theirs(family: str, rope: str = "default", seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """transformers' model with every parameter far from its initial value."""
    kind, own = FAMILIES[family]
    turned = {"rope_type": rope, "rope_theta": 10000.0, **ROPES[rope]}
    config = transformers.AutoConfig.for_model(kind, **{**SIZES, "rope_parameters": turned, **own, **overrides})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((p.ndim < 2) + 0.4 * torch.randn(p.shape, generator=generator))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folder(family, rope): random weights that transformers wrote."""

    @functools.cache
    def folder(family: str = "llama", rope: str = "default"):
        path = tmp_path_factory.mktemp("written")
        random_theirs(family, rope).save_pretrained(path)
        return path

    return folder


@pytest.fixture(params=CASES, ids=", ".join, scope="module")
def pair(request, folders):
    """One set of weights in both implementations, in fp64."""
    return load_decoder(folders(*request.param)).double(), random_theirs(*request.param).double()


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def ragged_batch() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows, their ids padded on the left by a real token, and their mask."""
    rows, width = [random_ids(n, seed=n) for n in LENGTHS], max(LENGTHS)
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, width - len(row) :], mask[i, width - len(row) :] = row, 1
    return rows, ids, mask


# ---- against transformers -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_logits_equal_transformers(pair):
    ids = random_ids(2, 40)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        ours, theirs = (copy.deepcopy(model).to(dtype) for model in pair)
        expected = theirs(ids).logits
        assert expected.std() > 0.5  # the comparison is of something
        assert_relatively_close(ours(ids), expected, tolerance)
    rope = ours.config.rope_parameters
    if rope.rope_type not in ("default", "dynamic"):  # the kind matters
        other = Llama(dataclasses.replace(ours.config, rope_parameters=RopeConfig())).double().eval()
        other.load_state_dict(ours.state_dict())
        assert not torch.allclose(other(ids), expected, rtol=1e-3)


def test_gradients_equal_transformers(pair):
    ids = random_ids(3, 12)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        ours, theirs = (copy.deepcopy(model).to(dtype) for model in pair)
        for logits in (ours(ids), theirs(ids).logits):
            F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        expected = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
        assert expected.keys() == {name for name, _ in ours.named_parameters()}
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, p in ours.named_parameters():
            torch.testing.assert_close(p.grad, expected[name], rtol=tolerance, atol=tolerance * largest, msg=name)


@torch.no_grad()
def test_left_padding_and_cached_decoding_equal_transformers(pair):
    (ours, theirs), (_, ids, mask) = pair, ragged_batch()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    cut, real = 4, mask.bool()
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    assert_relatively_close(ours(ids, mask)[real], expected[real], 1e-10)
    past = theirs(ids[:, :cut], attention_mask=mask[:, :cut], position_ids=positions[:, :cut]).past_key_values
    cache = ours.new_cache(3, 7)
    ours(ids[:, :cut], mask[:, :cut], cache)
    assert cache.layers[0].shape == (2, 3, ours.config.kv_heads, 7, ours.config.head_size)
    for t in range(cut, 7):
        new = dict(attention_mask=mask[:, : t + 1], position_ids=positions[:, t : t + 1], past_key_values=past)
        expected = theirs(ids[:, t : t + 1], **new).logits
        logits = ours(ids[:, t : t + 1], mask[:, : t + 1], cache)
        assert_relatively_close(logits[real[:, t]], expected[real[:, t]], 1e-10)


@torch.no_grad()
def test_greedy_generation_equals_transformers(pair):
    (ours, theirs), (rows, ids, mask) = pair, ragged_batch()
    settings = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = theirs.generate(ids, **settings)[:, ids.size(1) :]
    assert torch.equal(generate(ours, rows, 9, SamplingConfig(top_k=1)).tokens[:, -9:], expected)


@pytest.mark.parametrize("rope", ROPES)
def test_frequencies_are_those_of_transformers_to_the_bit_at_the_sizes_of_published_models(rope):
    parameters = {"rope_type": rope, "rope_theta": 500000.0, **ROPES[rope]}
    if rope == "llama3":  # Llama 3.2
        parameters.update(factor=32.0, original_max_position_embeddings=8192)
    config = transformers.LlamaConfig(
        hidden_size=2048, num_attention_heads=32, max_position_embeddings=131072, rope_parameters=parameters
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours, scale = frequencies(RopeConfig.from_json(config.to_dict()), 64, 131072)
    assert torch.equal(ours, theirs.inv_freq) and scale == theirs.attention_scaling


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "rope", "dtype"), [
    *((*case, torch.float32) for case in CASES), ("llama", "default", torch.bfloat16),
    ("qwen2", "default", torch.bfloat16),
])  # fmt: skip
@torch.no_grad()
def test_transformers_loads_what_we_save_to_the_bit(folders, tmp_path, family, rope, dtype):
    ours = load_decoder(folders(family, rope))
    ours.save_pretrained(tmp_path, dtype)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = random_ids(1, 8)
    assert theirs.dtype == dtype
    state = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(state[name if name == "lm_head.weight" else f"model.{name}"], tensor.to(dtype))
    again = load_decoder(tmp_path)
    assert again.config == ours.config
    assert_relatively_close(again(ids), theirs.float()(ids).logits, 1e-5)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (folders(family, rope), tmp_path))
    left_out = {"transformers_version", "dtype"}
    assert {name: after[name] for name in before.keys() - left_out} == {
        name: before[name] for name in before.keys() - left_out
    }
    assert after["dtype"] == str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral"])
@torch.no_grad()
def test_a_new_model_is_read_by_transformers(tmp_path, kind):
    rope = RopeConfig("yarn", 5000.0, factor=2.0)
    ours = Llama(LlamaConfig(kind, **SIZES, rope_parameters=rope, initializer_range=0.5), seed=3).eval()
    ours.save_pretrained(tmp_path)
    theirs, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval(), random_ids(2, 30)
    assert type(theirs).__name__ == f"{kind.title()}ForCausalLM" and theirs.config.eos_token_id is None
    assert_relatively_close(ours(ids), theirs(ids).logits, 1e-5)


@torch.no_grad()
def test_sharded_folders_in_bf16_load_in_fp32(tmp_path):
    theirs = random_theirs("qwen3").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    ours = load_decoder(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    for name, p in ours.named_parameters():
        assert torch.equal(p, theirs.get_parameter(f"model.{name}").float())


@pytest.mark.parametrize("rope", ROPES)
def test_the_fields_of_rotary_embeddings_from_before_transformers_5_mean_the_same(folders, tmp_path, rope):
    theirs = random_theirs("llama", rope)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    parameters = content.pop("rope_parameters")
    content["rope_theta"] = parameters.pop("rope_theta")
    kind = parameters.pop("rope_type")
    content["rope_scaling"] = None if kind == "default" else {"type": kind, **parameters}
    path.write_text(json.dumps(content))
    assert load_decoder(tmp_path).config == load_decoder(folders("llama", rope)).config
    assert (load_decoder(tmp_path).config.rope_parameters.rope_type == kind) and kind in rope


@torch.no_grad()
def test_other_spellings_of_a_checkpoint_load(folders, tmp_path):
    theirs = random_theirs("qwen2")
    theirs.save_pretrained(tmp_path)
    rewrite_tensors(tmp_path, lambda tensors: {
        **{name.removeprefix("model."): t for name, t in tensors.items()},
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2), "rotary_emb.inv_freq": torch.ones(2),
    })  # fmt: skip
    assert torch.equal(load_decoder(tmp_path)(random_ids(1, 5)), load_decoder(folders("qwen2"))(random_ids(1, 5)))
    rewrite_tensors(tmp_path, lambda tensors: {**tensors, "lm_head.weight": tensors["embed_tokens.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from embed_tokens.weight"):
        load_decoder(tmp_path)


def test_one_error_names_every_tensor_that_is_wrong(tmp_path):
    random_theirs("qwen2").save_pretrained(tmp_path)

    def damage(tensors):
        del tensors["model.norm.weight"], tensors["model.layers.1.self_attn.k_proj.bias"]
        tensors["model.layers.0.mlp.up_proj.weight"] = torch.zeros(16, 24)

    rewrite_tensors(tmp_path, damage)
    with pytest.raises(ValueError) as caught:
        load_decoder(tmp_path)
    transposed = "layers.0.mlp.up_proj.weight has shape (16, 24), the config asks for (24, 16) (it is transposed)"
    for problem in ("missing norm.weight (16,)", "missing layers.1.self_attn.k_proj.bias (8,)", transposed):
        assert problem in str(caught.value), problem


# ---- refusals -------------------------------------------------------------------------------------------------------


GPTQ, AWQ, BNB = ({"quant_method": method, "bits": 4} for method in ("gptq", "awq", "bitsandbytes"))


@pytest.mark.parametrize(("family", "changes", "message"), [
    ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0]}},
     r"rope_parameters has rope_type='longrope', supported are default, linear, dynamic, llama3, yarn: use a check"),
    ("llama", {"rope_scaling": {"type": "su"}}, r"rope_scaling has rope_type='su', .* remove rope_scaling from"),
    ("llama", {"rope_parameters": [3]}, r"rope_parameters must be an object"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0}}},
     r"rope_parameters\['full_attention'\] is not supported: all layers must have the same"),
    ("llama", {"rope_parameters": {"rope_type": "yarn"}}, r"RopeConfig.factor must be given for rope_type='yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4, "high_freq_factor": 1}},
     r"RopeConfig.high_freq_factor must be above low_freq_factor=4"),
    ("llama", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0.5 is not supported"),
    ("llama", {"quantization_config": GPTQ}, r"quantization_config=.* quantised by gptq .*use the folder .* in bf16"),
    ("qwen2", {"quantization_config": AWQ}, r"quantised by awq"),
    ("qwen3", {"quantization_config": BNB}, r"quantised by bitsandbytes"),
    ("llama", {"num_experts": 8}, r"num_experts=8: a mixture of experts is not supported; use a dense model"),
    ("llama", {"model_type": "mixtral", "num_local_experts": 8}, r"'mixtral': a mixture of experts"),
    ("llama", {"num_local_experts": 8}, r"num_local_experts=8: a mixture of experts"),
    ("qwen2", {"model_type": "qwen2_moe"}, r"model_type='qwen2_moe': a mixture of experts is not supported"),
    ("llama", {"vision_config": {"depth": 1}}, r"vision_config=.*multimodal .* use the text-only model"),
    ("llama", {"model_type": "gemma3", "text_config": {}}, r"text_config=.*multimodal"),
    ("llama", {"model_type": "phi3"}, r"model_type='phi3', expected one of gpt2, llama, mistral, qwen2, qwen3"),
    ("mistral", {"sliding_window": 8}, r"sliding_window=8, which is not supported; for texts no longer than it, set"),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, r"sliding_window=8, which is not supported"),
    ("qwen3", {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8}, r"sliding_window=8"),
    ("qwen3", {"layer_types": ["linear_attention", "full_attention"]}, r"'linear_attention' in layer_types, not only"),
    ("qwen2", {"layer_types": "chunked_attention"}, r"'chunked_attention' in layer_types, not only"),
    ("llama", {"is_causal": False}, r"is_causal=False; only True is supported"),
])  # fmt: skip
def test_what_is_not_supported_is_refused_with_the_field_and_what_to_do(tmp_path, family, changes, message):
    random_theirs(family).save_pretrained(tmp_path)
    rewrite_config(tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        load_decoder(tmp_path)


def test_a_mistral_without_the_field_has_a_window(tmp_path):
    random_theirs("mistral").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["sliding_window"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"sliding_window=4096"):
        load_decoder(tmp_path)


def test_a_missing_size_is_named(tmp_path):
    random_theirs("llama").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["num_attention_heads"], content["max_position_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"config.json lacks num_attention_heads, max_position_embeddings"):
        load_decoder(tmp_path)


@pytest.mark.parametrize(("field", "value"), [
    *((name, value) for name in ("vocab_size", "hidden_size", "num_key_value_heads", "head_dim") for value in (0, 2.0)),
    ("rms_norm_eps", 0), ("attention_dropout", 1.0), ("hidden_act", "swish9000"), ("model_type", "phi3"),
    ("tie_word_embeddings", 1), ("num_key_value_heads", 3), ("head_dim", 5), ("rope_parameters", {"factor": 2}),
    ("mlp_bias", True), ("initializer_range", math.nan),
])  # fmt: skip
def test_bad_config_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"LlamaConfig\.{field} must be"):
        LlamaConfig(**{"model_type": "mistral", **SIZES, field: value})


@pytest.mark.parametrize(("field", "value"), [
    ("rope_type", "longrope"), ("rope_theta", 1.0), ("factor", -1), ("beta_fast", "x"), ("truncate", 1),
    ("original_max_position_embeddings", 0.5), ("attention_factor", math.inf),
])  # fmt: skip
def test_bad_rotary_fields_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"RopeConfig\.{field} must be"):
        RopeConfig(**{"rope_type": "yarn", "factor": 2.0, field: value})


def test_building_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    first, second, other = (Llama(LlamaConfig(**SIZES), seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["embed_tokens.weight"], other["embed_tokens.weight"])
    assert (first["norm.weight"] == 1).all()


def test_stored_weights_have_the_published_names(folders):
    stored = load_file(folders("llama") / "model.safetensors")
    ours = load_decoder(folders("llama"))
    assert stored.keys() == ours.published()[1].keys()
