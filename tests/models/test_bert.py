"""The BERT classifier against transformers' BertForSequenceClassification, and against itself."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification
from transformers import BertConfig as TheirConfig

from conftest import assert_relatively_close, make_bert, rewrite_config, rewrite_tensors
from minirlhf import BertClassifier, BertConfig

SIZES = dict(vocab_size=50, max_position_embeddings=24, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
             intermediate_size=24)  # fmt: skip
LABELS = {0: "bad", 1: "so so", 2: "good"}
LENGTHS = [7, 1, 4]


def random_theirs(seed: int = 0, **overrides) -> BertForSequenceClassification:
    """transformers' model with every parameter far from its initial value."""
    labels = {"id2label": LABELS, "label2id": {name: i for i, name in LABELS.items()}}
    model = BertForSequenceClassification(TheirConfig(**{**SIZES, **labels, **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.4 * torch.randn(p.shape, generator=generator)
            p.copy_(1 + noise if "LayerNorm.weight" in name else noise)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def ragged_batch() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    rows = [random_ids(n, seed=n) for n in LENGTHS]
    ids, mask = torch.full((3, max(LENGTHS)), 9), torch.zeros(3, max(LENGTHS), dtype=torch.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return rows, ids, mask


@pytest.fixture(params=["written by transformers", "written by us"])
def pair(request, tmp_path) -> tuple[BertClassifier, BertForSequenceClassification]:
    """One set of weights in both implementations, through a folder that the one or the other wrote."""
    if request.param == "written by us":
        ours = make_bert(scale=15.0, **SIZES, id2label=LABELS)
        ours.save_pretrained(tmp_path)
        return ours, AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    theirs = random_theirs()
    theirs.save_pretrained(tmp_path)
    return BertClassifier.from_pretrained(tmp_path).eval(), theirs


@pytest.fixture
def folder(tmp_path):
    make_bert(**SIZES).save_pretrained(tmp_path)
    return tmp_path


# ---- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_logits_equal_transformers(pair, dtype, tolerance):
    ours, theirs = (model.to(dtype) for model in pair)
    ids = random_ids(4, 20)
    expected = theirs(ids).logits
    assert expected.shape == (4, 3)
    assert expected.std(0).min() > 0.02  # the comparison is of something
    assert_relatively_close(ours(ids), expected, tolerance)


@torch.no_grad()
def test_padded_logits_equal_transformers(pair):
    ours, theirs = (model.double() for model in pair)
    _, ids, mask = ragged_batch()
    assert_relatively_close(ours(ids, mask), theirs(ids, attention_mask=mask).logits, 1e-10)


@pytest.mark.parametrize("overrides", [
    {"hidden_act": "gelu_new"}, {"hidden_act": "relu"}, {"hidden_act": "silu"}, {"num_attention_heads": 4},
    {"layer_norm_eps": 0.1}, {"type_vocab_size": 1}, {"num_hidden_layers": 1},
])  # fmt: skip
@torch.no_grad()
def test_config_fields_mean_what_transformers_means(tmp_path, overrides):
    theirs = random_theirs(**overrides)
    theirs.save_pretrained(tmp_path)
    _, ids, mask = ragged_batch()
    ours = BertClassifier.from_pretrained(tmp_path).double().eval()
    assert_relatively_close(ours(ids, mask), theirs.double()(ids, attention_mask=mask).logits, 1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gradients_equal_transformers(pair, dtype, tolerance):
    ours, theirs = (model.to(dtype) for model in pair)
    _, ids, mask = ragged_batch()
    labels = torch.tensor([2, 0, 1])
    for model, logits in ((ours, ours(ids, mask)), (theirs, theirs(ids, attention_mask=mask).logits)):
        model.zero_grad()
        F.cross_entropy(logits, labels).backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in expected.values())  # those of key biases are 0
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=tolerance, atol=tolerance / 10 * largest)


# ---- padding and length ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_padding_changes_nothing():
    model = make_bert(**SIZES).double()
    rows, ids, mask = ragged_batch()
    wider = torch.cat([ids, torch.full((3, 5), 11)], 1), torch.cat([mask, mask.new_zeros(3, 5)], 1)
    alone = torch.cat([model(row[None]) for row in rows])
    assert_relatively_close(model(ids, mask), alone, 1e-10)
    assert_relatively_close(model(*wider), alone, 1e-10)
    assert_relatively_close(model(ids, mask.bool()), alone, 1e-10)
    assert not torch.allclose(model(ids), alone, rtol=1e-3)  # the mask is what does it


def test_layers_that_work_on_single_tokens_skip_padding_and_gradients_are_those_of_the_rows_alone():
    model = make_bert(**SIZES).double()
    rows, ids, mask = ragged_batch()
    seen = []
    handle = model.bert.encoder["layer"][0].output.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model(ids, mask).square().sum().backward()
    handle.remove()
    assert [x.shape[:-1] for x in seen] == [(sum(map(len, rows)),)] and sum(map(len, rows)) < ids.numel()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row in rows:
        model(row[None]).square().sum().backward()
    largest = max(float(p.grad.abs().max()) for p in model.parameters())
    for ours, alone in zip(together, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-12 * largest)  # keys' biases have a gradient of 0


@torch.no_grad()
def test_texts_beyond_the_positions_are_refused():
    model = make_bert(**SIZES)
    model(random_ids(1, 24))
    with pytest.raises(ValueError, match=r"25 tokens.*24 positions"):
        model(random_ids(1, 25))


@pytest.mark.parametrize("shape", [(3, 6), (3, 1), (1, 7), (7,)])
@torch.no_grad()
def test_mask_of_another_shape_is_refused(shape):
    _, ids, _ = ragged_batch()
    with pytest.raises(ValueError, match="attention_mask"):
        make_bert(**SIZES)(ids, torch.ones(shape, dtype=torch.int64))


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    model = make_bert(**SIZES, hidden_act="relu", id2label=LABELS, attention_probs_dropout_prob=0.25)
    model.save_pretrained(tmp_path, dtype=dtype)
    loaded = BertClassifier.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {dtype}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float())


def test_labels_pass_through_folders(pair):
    ours, theirs = pair
    assert ours.config.labels == ["bad", "so so", "good"]
    assert theirs.config.id2label == LABELS
    assert theirs.config.label2id == {"bad": 0, "so so": 1, "good": 2}


def test_labels_are_in_the_order_of_the_logits_not_of_the_file(folder):
    rewrite_config(folder, id2label={"1": "first", "0": "zeroth"})
    assert BertClassifier.from_pretrained(folder).config.labels == ["zeroth", "first"]


def test_a_folder_without_labels_gets_no_invented_ones(folder):
    """To call them negative and positive would be a guess."""
    content = json.loads((folder / "config.json").read_text())
    del content["id2label"], content["label2id"]
    (folder / "config.json").write_text(json.dumps(content))
    assert BertClassifier.from_pretrained(folder).config.labels == ["LABEL_0", "LABEL_1"]


@pytest.mark.parametrize("id2label", [
    {}, {1: "a"}, {0: "a", 2: "b"}, {0: "same", 1: "same"}, {"zero": "a"}, ["a", "b"], 2, {-1: "a", 0: "b"},
])  # fmt: skip
def test_bad_labels_are_refused(folder, id2label):
    with pytest.raises(ValueError, match=r"BertConfig.id2label"):
        BertConfig(id2label=id2label)
    rewrite_config(folder, id2label=id2label)
    with pytest.raises(ValueError, match=r"BertConfig.id2label"):
        BertClassifier.from_pretrained(folder)


def test_label_count_must_fit_the_head(folder):
    rewrite_config(folder, id2label={"0": "a", "1": "b", "2": "c"})
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(2, 16\), the config asks for \(3, 16\)"):
        BertClassifier.from_pretrained(folder)


@pytest.mark.parametrize("change", [
    lambda tensors: {name.removeprefix("bert."): t for name, t in tensors.items()},
    lambda tensors: {name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
                     for name, t in tensors.items()},
    lambda tensors: {**tensors, "cls.predictions.bias": torch.ones(50), "cls.seq_relationship.weight": torch.ones(2),
                     "bert.embeddings.position_ids": torch.arange(24)[None]},
], ids=["no prefix", "gamma and beta", "heads of pretraining, positions"])  # fmt: skip
def test_other_spellings_of_a_checkpoint_load(folder, change):
    before = BertClassifier.from_pretrained(folder).state_dict()
    names = load_file(folder / "model.safetensors").keys()
    rewrite_tensors(folder, change)
    assert load_file(folder / "model.safetensors").keys() != names
    after = BertClassifier.from_pretrained(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("prefix", ["bert.", ""])
def test_a_model_that_was_not_trained_to_classify_is_named(folder, prefix):
    rewrite_tensors(folder, lambda tensors: {
        **{name.replace("bert.", prefix): t for name, t in tensors.items() if not name.startswith("classifier")},
        "cls.predictions.bias": torch.ones(50),
    })  # fmt: skip
    with pytest.raises(ValueError, match=r"holds no classification head \(classifier.weight") as caught:
        BertClassifier.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("name", ["net.classifier.weight", "classifier.modules_to_save.default.weight"])
def test_a_head_of_another_name_is_named(folder, name):
    """As saved inside another module, or by peft. It was trained, so the error must not say that it was not."""
    rewrite_tensors(folder, lambda tensors: tensors.update({name: tensors.pop("classifier.weight")}))
    with pytest.raises(ValueError, match=r"no classification head \(classifier.weight\); .* is not read") as caught:
        BertClassifier.from_pretrained(folder)
    assert str(caught.value).endswith(f": {name}") and "not yet trained" not in str(caught.value)


# ---- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    *((name, value) for name in (*SIZES, "type_vocab_size") for value in (0, -1, 2.0, "8", True, None)),
    *((name, value) for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
      for value in (-0.1, 1, math.nan, "0.1", None)),
    *((name, value) for name in ("layer_norm_eps", "initializer_range") for value in (0, -1e-5, math.nan, "x", None)),
    ("hidden_act", "swish9000"), ("hidden_act", None), ("num_attention_heads", 3),
])  # fmt: skip
def test_bad_config_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"BertConfig\.({field}|hidden_size must be a multiple)"):
        BertConfig(**{**SIZES, field: value})


def test_building_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    first, second, other = (BertClassifier(BertConfig(**SIZES), seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize("active", ["hidden_dropout_prob", "attention_probs_dropout_prob"])
@torch.no_grad()
def test_dropout_is_on_in_training_and_off_in_evaluation(active):
    rates = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model, none = make_bert(**SIZES, **{**rates, active: 0.5}), make_bert(**SIZES, **rates)
    ids = random_ids(4, 8)
    assert torch.equal(model(ids), none(ids))
    assert not torch.allclose(model.train()(ids), none(ids), atol=1e-3)
    assert torch.equal(model.eval()(ids), none(ids))
