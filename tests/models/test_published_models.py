"""Models as they are published: folders of every layout in, the numbers of transformers, folders for all tools out.

The layouts are those of the uer models (GPT-2 and BERT, written by UER's conversion scripts as pickles), of OpenAI's
GPT-2 and of transformers itself.
"""

import dataclasses
import json
import os
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    RobertaConfig,
    RobertaForSequenceClassification,
    pipeline,
)
from transformers import BertConfig as TheirBertConfig
from transformers import GPT2Config as TheirGPT2Config

from conftest import VOCAB, assert_relatively_close, make_bert, make_gpt2, make_llama, rewrite_config
from minirlhf import (
    GPT2,
    ActorCritic,
    BertClassifier,
    BertConfig,
    GPT2Config,
    SamplingConfig,
    SentimentReward,
    Tokenizer,
    ValueHead,
    generate,
    load_decoder,
)
from minirlhf.io.model_folder import read_metadata, write_tensors
from minirlhf.models.layers import check_vocabulary, shapes_only

LABELS = {"0": "negative (stars 1, 2 and 3)", "1": "positive (stars 4 and 5)"}
# config.json of uer/gpt2-chinese-cluecorpussmall, of uer/roberta-base-finetuned-jd-binary-chinese and of gpt2.
UER_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "embd_pdrop": 0.1,
    "gradient_checkpointing": False, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
    "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_inner": None, "n_layer": 12, "n_positions": 1024,
    "output_past": True, "resid_pdrop": 0.1,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 320}},
    "tokenizer_class": "BertTokenizer", "vocab_size": 21128,
}  # fmt: skip
UER_BERT = {
    "architectures": ["BertForSequenceClassification"], "attention_probs_dropout_prob": 0.1, "directionality": "bidi",
    "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "hidden_size": 768,
    "id2label": LABELS, "initializer_range": 0.02, "intermediate_size": 3072,
    "label2id": {name: int(i) for i, name in LABELS.items()}, "layer_norm_eps": 1e-12, "max_position_embeddings": 512,
    "model_type": "bert", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
    "pooler_fc_size": 768, "pooler_num_attention_heads": 12, "pooler_num_fc_layers": 3, "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform", "position_embedding_type": "absolute", "type_vocab_size": 2,
    "vocab_size": 21128,
}  # fmt: skip
ENGLISH_GPT2 = {
    "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1, "bos_token_id": 50256,
    "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02, "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
    "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1, "summary_proj_to_labels": True,
    "summary_type": "cls_index", "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}}, "vocab_size": 50257,
}  # fmt: skip
SMALL_GPT2 = dict(n_embd=16, n_layer=2, n_head=2, n_positions=40, n_ctx=40)
SMALL_BERT = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24)


@pytest.mark.parametrize(("ours", "theirs", "unlike"), [
    (GPT2Config, TheirGPT2Config, {"vocab_size"}), (BertConfig, TheirBertConfig, {"vocab_size", "id2label"}),
])  # fmt: skip
def test_a_field_that_a_config_leaves_out_is_that_of_transformers(ours, theirs, unlike):
    names = {field.name for field in dataclasses.fields(ours)} - unlike
    own, other = ours(), theirs()
    assert {name: getattr(own, name) for name in names} == {name: getattr(other, name, None) for name in names}


@pytest.mark.parametrize("layers", [1, 12, 24])
@pytest.mark.parametrize("make", [make_gpt2, make_llama, make_bert])
def test_as_many_layers_as_published_models_have_load_and_not_one_more(make, layers, tmp_path):
    """What is stored bounds the layers that a config may ask for; small models would not notice a bound too low."""
    name = "n_layer" if make is make_gpt2 else "num_hidden_layers"
    width = {make_bert: dict(hidden_size=8, num_attention_heads=2)}.get(make, dict(n_embd=8, n_head=2))
    model = make(**width, **{name if make is make_bert else "n_layer": layers})
    model.save_pretrained(tmp_path)
    assert getattr(type(model).from_pretrained(tmp_path).config, name) == layers
    rewrite_config(tmp_path, **{name: layers + 1})
    with pytest.raises(ValueError):
        type(model).from_pretrained(tmp_path)


def random_state(kind, config, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights for a model of transformers: matrices of three times their initial spread, nothing neutral."""
    with shapes_only():
        shapes = {name: p.shape for name, p in kind(config).named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes.items():
        spread = 3 * 3**0.5 * config.initializer_range if len(shape) > 1 else 0.3
        state[name] = torch.empty(shape).uniform_(-spread, spread, generator=generator)
        if re.search(r"(ln_\w|LayerNorm)\.weight$", name):
            state[name] += 1
    return state


def theirs_with(kind, config, state):
    return kind.from_pretrained(None, config=config, state_dict=state).eval()


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ---- the same numbers, full size ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sizes", "parameters"), [
    (dict(n_layer=6), 81_912_576), (dict(), 124_439_808), (dict(n_layer=24, n_embd=1024, n_head=16), 354_823_168),
    (dict(n_layer=36, n_embd=1280, n_head=20), 774_030_080),
    (dict(n_layer=48, n_embd=1600, n_head=25), 1_557_611_200),
], ids=["distil", "base", "medium", "large", "xlarge"])  # fmt: skip
def test_the_family_has_its_published_sizes(sizes, parameters):
    with shapes_only():
        model = GPT2(GPT2Config(vocab_size=50257, **sizes))
    assert sum(p.numel() for p in model.parameters()) == parameters


# ---- layouts in the wild --------------------------------------------------------------------------------------------


def write_config(folder, config) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def uer_gpt2(folder) -> None:
    """As UER's convert_gpt2_from_uer_to_huggingface.py: transposed views, float masks, a head tied by its storage."""
    config = {**UER_GPT2, **SMALL_GPT2}
    write_config(folder, config)
    state = {}
    for name, tensor in random_state(GPT2LMHeadModel, TheirGPT2Config(**config)).items():
        state[name] = tensor.t().contiguous().t() if re.search(r"(attn|mlp)\.c_\w+\.weight", name) else tensor
        if name.endswith("ln_1.weight"):
            state[name.replace("ln_1.weight", "attn.bias")] = torch.ones(1, 1, 40, 40).tril()
    assert not state["transformer.h.0.attn.c_attn.weight"].is_contiguous()
    torch.save({**state, "lm_head.weight": state["transformer.wte.weight"]}, folder / "pytorch_model.bin")


def english_gpt2(folder) -> None:
    """As OpenAI's GPT-2 on the hub: no prefix, the causal masks of an old version."""
    config = {**ENGLISH_GPT2, **SMALL_GPT2}
    write_config(folder, config)
    state = random_state(GPT2LMHeadModel, TheirGPT2Config(**config))
    state = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in range(2)}
    save_file({**state, **masks}, folder / "model.safetensors", {"format": "pt"})


def sharded_gpt2(folder) -> None:
    config = TheirGPT2Config(**{**UER_GPT2, **SMALL_GPT2, "vocab_size": 300})
    model = theirs_with(GPT2LMHeadModel, config, random_state(GPT2LMHeadModel, config))
    model.save_pretrained(folder, max_shard_size="15KB")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2


def sharded_pickle_gpt2(folder) -> None:
    sharded_gpt2(folder)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    for path in folder.glob("*.safetensors"):
        torch.save(load_file(path), path.with_name(pickled(path.name)))
        path.unlink()
    weight_map = {name: pickled(shard) for name, shard in index["weight_map"].items()}
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickled(name: str) -> str:
    return "pytorch_" + name.replace(".safetensors", ".bin")


def only_a_head_gpt2(folder) -> None:
    """As `safetensors.torch.save_model` leaves tied weights: the first name in the alphabet stays."""
    config = {**UER_GPT2, **SMALL_GPT2, "vocab_size": 300}
    write_config(folder, config)
    state = random_state(GPT2LMHeadModel, TheirGPT2Config(**config))
    state["lm_head.weight"] = state.pop("transformer.wte.weight")
    save_file(state, folder / "model.safetensors", {"format": "pt", "transformer.wte.weight": "lm_head.weight"})


def hub_cache_gpt2(folder) -> None:
    """A snapshot of a hub cache: every file is a link into the blobs."""
    blobs = folder.parent / "blobs"
    sharded_gpt2(blobs)
    folder.mkdir()
    for path in blobs.iterdir():
        (folder / path.name).symlink_to(Path("..") / "blobs" / path.name)


def variant_gpt2(folder, **changes) -> None:
    """As transformers writes a GPT-2 of another computation."""
    config = TheirGPT2Config(**{**UER_GPT2, **SMALL_GPT2, "vocab_size": 300, **changes})
    theirs_with(GPT2LMHeadModel, config, random_state(GPT2LMHeadModel, config)).save_pretrained(folder)


@pytest.mark.parametrize("changes", [
    {"tie_word_embeddings": False}, {"activation_function": "quick_gelu"}, {"scale_attn_by_inverse_layer_idx": True},
])  # fmt: skip
@torch.no_grad()
def test_a_variant_computes_as_in_transformers_and_is_saved_as_it_computes(tmp_path, changes):
    variant_gpt2(tmp_path / "model", **changes)
    variant_gpt2(tmp_path / "plain")
    ours = GPT2.from_pretrained(tmp_path / "model")
    ids = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert_relatively_close(ours(ids), theirs(ids).logits, 1e-6)
    assert (ours(ids) - GPT2.from_pretrained(tmp_path / "plain")(ids)).abs().max() > 1e-4
    ours.save_pretrained(tmp_path / "saved")
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(loading.values())
    assert_relatively_close(theirs.eval()(ids).logits, ours(ids), 1e-5)
    assert torch.equal(GPT2.from_pretrained(tmp_path / "saved")(ids), ours(ids))


ALIASES = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "hidden_size": "n_embd",
           "max_position_embeddings": "n_positions"}  # fmt: skip


@pytest.mark.parametrize("both", [False, True])
@torch.no_grad()
def test_other_families_names_of_the_sizes_of_gpt2_are_read_as_transformers_reads_them(tmp_path, both):
    """The default of 12 heads would load as well, and compute something else."""
    variant_gpt2(tmp_path / "model", n_embd=24)
    content = json.loads((tmp_path / "model/config.json").read_text())
    ids = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    for alias, name in ALIASES.items():
        content[alias] = content[name] if both else content.pop(name)
    write_config(tmp_path / "model", content)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    ours = load_decoder(tmp_path / "model")
    assert_relatively_close(ours(ids), theirs(ids).logits, 1e-6)
    ours.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved/config.json").read_text())
    assert (saved["n_head"], saved["n_layer"], saved["n_embd"], saved["n_positions"]) == (2, 2, 24, 40)
    assert not ALIASES.keys() & saved.keys()
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "model", num_attention_heads=12).eval()
    assert (wide(ids).logits - theirs(ids).logits).abs().max() > 0.01


@pytest.mark.parametrize("alias", ALIASES)
def test_two_sizes_of_one_meaning_are_refused(tmp_path, alias):
    variant_gpt2(tmp_path)
    name = ALIASES[alias]
    size = json.loads((tmp_path / "config.json").read_text())[name]
    rewrite_config(tmp_path, **{alias: 4})
    with pytest.raises(ValueError, match=rf"config.json has {name}={size} and {alias}=4: .* must be equal"):
        GPT2.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "write", [uer_gpt2, english_gpt2, sharded_gpt2, sharded_pickle_gpt2, only_a_head_gpt2, hub_cache_gpt2]
)
@torch.no_grad()
def test_gpt2_layouts_are_read_as_transformers_reads_them(tmp_path, write):
    write(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval().double()
    ours = GPT2.from_pretrained(tmp_path / "model")
    ids = torch.randint(1, 300, (2, 12), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert expected.std() > 0.1
    assert_relatively_close(ours.double()(ids), expected, 1e-10)
    again = GPT2.from_pretrained(tmp_path / "model")  # by now from what the pickle became
    assert all(torch.equal(p, q) for p, q in zip(again.double().parameters(), ours.parameters(), strict=True))


WRAPPED = ["module.", "_orig_mod.", "model.", "pretrained_model.", "module._orig_mod.", "_orig_mod.module.model.",
           "base_model.model.", "_forward_module."]  # fmt: skip


@pytest.mark.parametrize("prefix", WRAPPED)
@pytest.mark.parametrize("kind", [GPT2, BertClassifier])
def test_prefixes_of_training_wrappers_are_no_part_of_a_name(tmp_path, kind, prefix):
    """DataParallel, torch.compile, Lightning and TRL put them before every tensor's name."""
    (make_gpt2() if kind is GPT2 else make_bert()).save_pretrained(tmp_path)
    expected = kind.from_pretrained(tmp_path).state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    save_file({prefix + name: t for name, t in stored.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    found = kind.from_pretrained(tmp_path).state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    save_file(
        {prefix + name: t.clone() for name, t in stored.items()} | stored,
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(ValueError, match=r"hold .* twice, once as"):
        kind.from_pretrained(tmp_path)


def test_blocks_that_were_compiled_one_by_one_are_read(tmp_path):
    make_gpt2().save_pretrained(tmp_path)
    expected = GPT2.from_pretrained(tmp_path).state_dict()
    stored = {re.sub(r"(h\.\d+\.)", r"\1_orig_mod.", name): t
              for name, t in load_file(tmp_path / "model.safetensors").items()}  # fmt: skip
    assert "transformer.h.0._orig_mod.ln_1.weight" in stored
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    found = GPT2.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["", "pretrained_model."])
def test_the_value_head_of_trl_is_read_with_the_policy(tmp_path, prefix):
    make_gpt2().save_pretrained(tmp_path)
    stored = {prefix + name: t for name, t in load_file(tmp_path / "model.safetensors").items()}
    head = {"v_head.summary.weight": torch.randn(1, 32, generator=torch.Generator().manual_seed(0)),
            "v_head.summary.bias": torch.tensor([0.5])}  # fmt: skip
    save_file(stored | head, tmp_path / "model.safetensors", {"format": "pt"})
    model, plain = ActorCritic.from_pretrained(tmp_path), GPT2.from_pretrained(tmp_path)
    ids = torch.tensor([[7, 8, 9]])
    values = model(ids)[1]
    assert_relatively_close(values, plain.hidden_states(ids) @ head["v_head.summary.weight"][0] + 0.5, 1e-6)
    with pytest.raises(ValueError, match="'linear' value head, but a 'tanh' one was asked for"):
        ActorCritic.from_pretrained(tmp_path, value_head="tanh")
    model.save_pretrained(tmp_path)
    assert torch.equal(ActorCritic.from_pretrained(tmp_path)(ids)[1], values)
    save_file(stored | head, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"holds two value heads, value_head.safetensors and v_head"):
        ActorCritic.from_pretrained(tmp_path)


@torch.no_grad()
def test_rows_that_pad_the_embedding_are_never_sampled(tmp_path):
    config = TheirGPT2Config(**{**UER_GPT2, **SMALL_GPT2, "vocab_size": 64})
    state = random_state(GPT2LMHeadModel, config)
    state["transformer.wte.weight"][len(SMALL_VOCAB) :] *= 50  # the padding would win
    theirs = theirs_with(GPT2LMHeadModel, config, state)
    theirs.save_pretrained(tmp_path)
    ours, ids = GPT2.from_pretrained(tmp_path), torch.tensor([[5, 6, 7]])
    assert_relatively_close(ours(ids), theirs(ids).logits, 1e-5)
    sampled = generate(ours, [[5, 6]] * 64, 6, SamplingConfig(), generator=torch.Generator().manual_seed(0))
    assert sampled.tokens.max() >= len(SMALL_VOCAB)
    ours.fit_vocabulary(len(SMALL_VOCAB))
    assert_relatively_close(ours(ids), theirs(ids).logits[..., : len(SMALL_VOCAB)], 1e-5)
    for sampling in (SamplingConfig(), SamplingConfig(top_p=0.9), SamplingConfig(top_k=3)):
        sampled = generate(ours, [[5, 6]] * 64, 6, sampling, generator=torch.Generator().manual_seed(0))
        assert sampled.tokens.max() < len(SMALL_VOCAB)
    ours.save_pretrained(tmp_path / "saved")  # with its padding
    assert torch.equal(GPT2.from_pretrained(tmp_path / "saved").wte.weight, ours.wte.weight)


@pytest.mark.parametrize("rows", [63, 64 + 1024, 21128])
def test_a_vocabulary_of_another_model_is_refused(rows):
    """More tokens than rows, or so many more rows that they are no padding."""
    with pytest.raises(ValueError, match=f"the vocabulary has 64 tokens, but the policy was made for {rows}"):
        check_vocabulary(rows, 64, "policy")


SMALL_VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"酒店好"]


def uer_bert(folder) -> None:
    """As UER's script for text classification: the segments are a slice of a larger tensor."""
    config = {**UER_BERT, **SMALL_BERT}
    write_config(folder, config)
    state = random_state(BertForSequenceClassification, TheirBertConfig(**config))
    segments = "bert.embeddings.token_type_embeddings.weight"
    state[segments] = torch.cat([torch.zeros(1, 16), state[segments]])[1:, :]
    positions = {"bert.embeddings.position_ids": torch.arange(512)[None]}
    torch.save({**state, **positions}, folder / "pytorch_model.bin")


def old_bert(folder) -> None:
    """As converted from TensorFlow: gamma and beta, and the heads of pretraining still there."""
    config = {**UER_BERT, **SMALL_BERT, "vocab_size": 300}
    write_config(folder, config)
    state = random_state(BertForSequenceClassification, TheirBertConfig(**config))
    state = {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
             for name, t in state.items()}  # fmt: skip
    state["cls.seq_relationship.weight"], state["cls.predictions.bias"] = torch.ones(2, 16), torch.ones(300)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("write", [uer_bert, old_bert])
@torch.no_grad()
def test_bert_layouts_are_read_as_transformers_reads_them(tmp_path, write):
    write(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "copy")
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "copy").eval().double()
    ours = BertClassifier.from_pretrained(tmp_path / "model").double()
    ids = torch.randint(1, 300, (4, 12), generator=torch.Generator().manual_seed(1))
    expected = theirs(ids).logits
    assert expected.std(0).min() > 0.001
    assert_relatively_close(ours(ids), expected, 1e-10)
    assert ours.config.labels == list(LABELS.values())


# ---- trunks: folders with another head, or none ---------------------------------------------------------------------

BERTS = [BertModel, BertForMaskedLM, BertForPreTraining, BertForSequenceClassification, BertForTokenClassification]


@pytest.mark.parametrize("kind", BERTS)
@torch.no_grad()
def test_the_encoder_of_any_bert_is_a_trunk(tmp_path, kind):
    config = TheirBertConfig(**{**UER_BERT, **SMALL_BERT, "vocab_size": 300, "problem_type": "regression"})
    theirs = theirs_with(kind, config, random_state(kind, config))
    theirs.save_pretrained(tmp_path)
    encoder = theirs if kind is BertModel else theirs.bert
    ours = BertClassifier.from_trunk(tmp_path, {0: "reward"}, seed=3)
    assert ours.config.labels == ["reward"] and ours.classifier.weight.shape == (1, 16) and not ours.training
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    assert_relatively_close(ours.hidden_states(ids), encoder(ids).last_hidden_state, 1e-5)
    if encoder.pooler is not None:
        assert torch.equal(ours.bert.pooler["dense"].weight, encoder.pooler.dense.weight)
    again, other = (BertClassifier.from_trunk(tmp_path, {0: "reward"}, seed=seed) for seed in (3, 4))
    assert torch.equal(ours(ids), again(ids)) and not torch.equal(ours(ids), other(ids))
    assert 0 < ours.classifier.weight.std() < 0.05 and ours.classifier.bias.abs().max() == 0
    ours.save_pretrained(tmp_path / "saved")
    assert torch.equal(BertClassifier.from_pretrained(tmp_path / "saved")(ids), ours(ids))
    saved = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert_relatively_close(saved(ids).logits, ours(ids), 1e-5)


@pytest.mark.parametrize("damage", ["bert.encoder.layer.1.output.dense.weight", "bert.pooler.dense.bias"])
def test_a_trunk_with_a_missing_part_is_refused(tmp_path, damage):
    make_bert().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    del stored[damage]
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"do not fit the model: missing {damage}"):
        BertClassifier.from_trunk(tmp_path, {0: "reward"})


@pytest.mark.parametrize(
    "kind", [GPT2Model, GPT2LMHeadModel, GPT2ForSequenceClassification, GPT2ForTokenClassification]
)
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_transformer_of_any_gpt2_is_a_trunk(tmp_path, kind, tied):
    config = TheirGPT2Config(**{**UER_GPT2, **SMALL_GPT2, "vocab_size": 300, "tie_word_embeddings": tied})
    theirs = theirs_with(kind, config, random_state(kind, config))
    theirs.save_pretrained(tmp_path)
    ours = GPT2.from_trunk(tmp_path)
    ids = torch.randint(1, 300, (2, 9), generator=torch.Generator().manual_seed(1))
    transformer = theirs if kind is GPT2Model else theirs.transformer
    assert_relatively_close(ours.hidden_states(ids), transformer(ids).last_hidden_state, 1e-5)
    assert ours.lm_head is None and ours.config.tie_word_embeddings
    ours.save_pretrained(tmp_path / "saved")
    assert torch.equal(GPT2.from_pretrained(tmp_path / "saved").hidden_states(ids), ours.hidden_states(ids))


@pytest.mark.parametrize("silent", [False, True])
def test_a_relative_of_bert_is_refused_by_name(tmp_path, silent):
    """It would load if only shapes counted, and compute something else."""
    sizes = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    RobertaForSequenceClassification(RobertaConfig(**sizes)).save_pretrained(tmp_path)
    if silent:
        content = json.loads((tmp_path / "config.json").read_text())
        del content["model_type"], content["architectures"]
        (tmp_path / "config.json").write_text(json.dumps(content))
    for load in (BertClassifier.from_pretrained, lambda folder: BertClassifier.from_trunk(folder, {0: "reward"})):
        with pytest.raises(ValueError, match="no classification head|missing bert" if silent else "holds a 'roberta"):
            load(tmp_path)


def test_a_sentiment_equals_the_pipeline_s_beyond_512_tokens(tmp_path):
    make_bert(scale=12.0, max_position_embeddings=512, id2label={0: "negative", 1: "positive"}).save_pretrained(
        tmp_path
    )
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    texts = ["很好" * 400, "房间太脏" * 127 + "差", "很好" * 255, "好" * 511 + "差" * 300, "很好"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights know no polarity
        ours = SentimentReward.from_pretrained(tmp_path, device="cpu")(texts)
    theirs = pipeline("sentiment-analysis", model=str(tmp_path), tokenizer=str(tmp_path), device="cpu", top_k=None)(
        texts, truncation=True, max_length=512
    )
    positive = [next(row["score"] for row in rows if row["label"] == "positive") for rows in theirs]
    assert ours.tolist() == pytest.approx(positive, abs=1e-5)


# ---- folders for other tools ----------------------------------------------------------------------------------------


def make_actor_critic(gpt2: GPT2) -> ActorCritic:
    return ActorCritic(gpt2, ValueHead(gpt2.config.n_embd, init_range=0.5))


@pytest.mark.parametrize("kind", ["GPT2", "ActorCritic"])
@torch.no_grad()
def test_gpt2_goes_to_transformers_and_back_bit_equal(tmp_path, kind):
    uer_gpt2(tmp_path / "uer")
    model = GPT2.from_pretrained(tmp_path / "uer")
    model.wte.weight.mul_(1.5)  # trained
    saved = model if kind == "GPT2" else make_actor_critic(model)
    saved.save_pretrained(tmp_path / "ours")
    theirs, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert type(theirs) is GPT2LMHeadModel and not any(loading.values())  # no key missing, unexpected or misshapen
    ids = torch.randint(1, 21128, (2, 12), generator=torch.Generator().manual_seed(1))
    assert_relatively_close(model(ids), theirs.eval()(ids).logits, 1e-5)
    theirs.save_pretrained(tmp_path / "theirs")
    back = GPT2.from_pretrained(tmp_path / "theirs")
    assert back.config == model.config
    assert back.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in back.state_dict().items())


@pytest.mark.parametrize(("write", "kind", "published"), [
    (uer_gpt2, GPT2, UER_GPT2 | SMALL_GPT2), (english_gpt2, GPT2, ENGLISH_GPT2 | SMALL_GPT2),
    (uer_bert, BertClassifier, UER_BERT | SMALL_BERT),
])  # fmt: skip
def test_a_saved_model_keeps_the_config_it_came_with(tmp_path, write, kind, published):
    write(tmp_path / "in")
    kind.from_pretrained(tmp_path / "in").save_pretrained(tmp_path / "out")
    kind.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    for folder in ("out", "again"):
        config = json.loads((tmp_path / folder / "config.json").read_text())
        assert {name: config[name] for name in published} == published


def test_a_model_without_special_tokens_gets_none_from_transformers(tmp_path):
    make_gpt2().save_pretrained(tmp_path / "small")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert theirs.config.eos_token_id is None and theirs.config.bos_token_id is None
    english_gpt2(tmp_path / "english")
    GPT2.from_pretrained(tmp_path / "english").save_pretrained(tmp_path / "saved")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "saved").config.eos_token_id == 50256


def test_the_value_head_is_in_no_other_tools_way(tmp_path):
    make_actor_critic(make_gpt2()).save_pretrained(tmp_path)
    # vLLM, filter_duplicate_safetensors_files: of all *.safetensors those that the index names, if there is one.
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    read = [path for path in tmp_path.glob("*.safetensors") if path.name in index.values()]
    assert [path.name for path in read] == ["model.safetensors"]
    assert index.keys() == load_file(read[0]).keys()
    # llama.cpp, get_model_part_names: model*.safetensors, which must hold what the index names.
    assert [path.name for path in tmp_path.glob("model*.safetensors")] == ["model.safetensors"]
    assert all(name.startswith("transformer.") for name in index)  # vLLM puts that before every other name
    # llama.cpp, GPT2Model.set_gguf_parameters.
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["n_ctx"], config["n_embd"], config["n_head"], config["n_layer"]) == (64, 32, 4, 2)


@torch.no_grad()
def test_model_and_value_head_are_saved_in_one_moment(tmp_path, monkeypatch):
    """At every rename the folder holds the old model with its head, or the new one with its own."""
    seen, replace = [], os.replace

    def watched(*args):
        replace(*args)
        loaded = ActorCritic.from_pretrained(tmp_path / "model")
        seen.append((loaded.decoder.wte.weight[0, 0].item(), loaded.value_head.summary.bias.item()))

    model = make_actor_critic(make_gpt2())
    for value in (1.0, 2.0):
        model.decoder.wte.weight[0, 0] = model.value_head.summary.bias[0] = value
        model.save_pretrained(tmp_path / "model")
        monkeypatch.setattr(os, "replace", watched)
    assert seen == [(1.0, 1.0)] * 5
    loaded = ActorCritic.from_pretrained(tmp_path / "model")
    assert (loaded.decoder.wte.weight[0, 0], loaded.value_head.summary.bias) == (2, 2)


@pytest.mark.parametrize("kind", ["GPT2", "ActorCritic", "BertClassifier"])
def test_the_card_tells_the_training_and_its_code_runs(tmp_path, kind):
    write = uer_bert if kind == "BertClassifier" else uer_gpt2
    write(tmp_path / "uer-small")
    model = {"GPT2": GPT2, "ActorCritic": ActorCritic, "BertClassifier": BertClassifier}[kind]
    folder = tmp_path / "saved"
    model.from_pretrained(tmp_path / "uer-small").save_pretrained(folder, summary={"reward": 0.9, "a | b": "c"})
    card = (folder / "README.md").read_text()
    assert "made from uer-small" in card and str(tmp_path) not in card
    assert "| reward | 0.9 |\n| a \\| b | c |\n" in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 1
    for block in blocks:
        scope = {}
        exec(block.replace("this/folder", str(folder)), scope)
        assert isinstance(scope["model"], torch.nn.Module)
    metadata = read_metadata(folder / "model.safetensors")
    assert metadata["base_model"] == "uer-small" and json.loads(metadata["training"]) == {"reward": 0.9, "a | b": "c"}


@pytest.mark.parametrize("make", [make_gpt2, make_bert, lambda: make_actor_critic(make_gpt2())])
def test_a_bad_summary_or_weight_changes_nothing(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="summary must map names"):
        model.save_pretrained(tmp_path, summary={"policy": model})
    for p in model.parameters():
        with torch.no_grad():
            p.view(-1)[0], kept = torch.nan, p.view(-1)[0].item()
        with pytest.raises(ValueError, match="holds values that"):
            model.save_pretrained(tmp_path)
        with torch.no_grad():
            p.view(-1)[0] = kept
    assert contents(tmp_path) == before


# ---- bad input ------------------------------------------------------------------------------------------------------


def rewrite_tensor(folder, name, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = change(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut(folder, keep) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])


WTE = "transformer.wte.weight"
DAMAGES = {
    "truncated": (lambda folder: cut(folder, -100), r"model.safetensors is not a readable safetensors file"),
    "NaN": (lambda folder: rewrite_tensor(folder, WTE, lambda t: t.index_fill(0, torch.tensor(3), torch.nan)),
            r"wte.weight holds NaN or infinite values"),
    "more layers": (lambda folder: rewrite_config(folder, n_layer=3), "n_layer must be at most 2"),
    "fewer layers": (lambda folder: rewrite_config(folder, n_layer=1), r"unexpected h.1.attn.c_attn.bias \(96,\)"),
    "another width": (lambda folder: rewrite_config(folder, n_embd=64),
                      r"h.0.attn.c_proj.weight has shape \(32, 32\), the config asks for \(64, 64\)"),
    "a vocabulary beyond all memory": (lambda folder: rewrite_config(folder, vocab_size=10**13),
                                       r"wte.weight has shape .*, the config asks for \(10000000000000, 32\)"),
    "nn.Linear's orientation": (
        lambda folder: rewrite_tensor(folder, "transformer.h.0.attn.c_attn.weight", lambda t: t.t().contiguous()),
        r"h.0.attn.c_attn.weight has shape \(96, 32\), the config asks for \(32, 96\) \(it is transposed\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", [GPT2, ActorCritic])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_bad_folder_is_one_clear_error_and_stays_as_it_is(tmp_path, damage, kind):
    folder = tmp_path / "model"
    make_actor_critic(make_gpt2()).save_pretrained(folder)
    (folder / "model.safetensors.index.json").unlink()
    change, message = DAMAGES[damage]
    change(folder)
    before = contents(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        kind.from_pretrained(folder)
    assert str(folder) in str(caught.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize(("head", "message"), [
    ({"summary.weight": torch.full((1, 32), torch.nan), "summary.bias": torch.zeros(1)}, "summary.weight holds NaN"),
    ({"summary.weight": torch.zeros(1, 32)}, "missing summary.bias"),
    ({"summary.weight": torch.zeros(1, 32), "summary.bias": torch.zeros(1, dtype=torch.int64)}, "bias has dtype"),
])  # fmt: skip
def test_a_bad_value_head_is_named(tmp_path, head, message):
    make_actor_critic(make_gpt2()).save_pretrained(tmp_path)
    write_tensors(tmp_path / "value_head.safetensors", head, {"kind": "linear"})
    with pytest.raises(ValueError, match=rf"value_head.safetensors do not fit the model: .*{message}"):
        ActorCritic.from_pretrained(tmp_path)
