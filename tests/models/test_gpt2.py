"""GPT-2 against transformers' GPT2LMHeadModel, and against itself: padding and the key/value cache change nothing."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel
from transformers import GPT2Config as TheirConfig

from conftest import assert_relatively_close, make_gpt2, rewrite_config, rewrite_tensors
from minirlhf import GPT2, GPT2Config, SamplingConfig, generate
from minirlhf.models.decoder import share_frozen_parameters
from minirlhf.models.masks import segment_positions
from minirlhf.text.batching import left_pad, right_pad

SIZES = dict(vocab_size=50, n_positions=24, n_embd=16, n_layer=2, n_head=2)
LENGTHS = [7, 1, 4]


def random_theirs(seed: int = 0, **overrides) -> GPT2LMHeadModel:
    """transformers' model with every parameter far from its initial value."""
    model = GPT2LMHeadModel(TheirConfig(**{**SIZES, **overrides})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = 0.4 * torch.randn(p.shape, generator=generator)
            p.copy_(1 + noise if "ln_" in name and name.endswith("weight") else noise)
    return model


def random_ids(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def ragged_batch(side: str) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Rows, their padded ids and mask. The padding is a real token id, so that reading it would show."""
    rows = [random_ids(n, seed=n) for n in LENGTHS]
    width = max(LENGTHS)
    ids, mask = torch.full((len(rows), width), 9), torch.zeros(len(rows), width, dtype=torch.int64)
    for i, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(len(row))
        ids[i, where], mask[i, where] = row, 1
    return rows, ids, mask


@pytest.fixture(params=["written by transformers", "written by us"])
def pair(request, tmp_path) -> tuple[GPT2, GPT2LMHeadModel]:
    """One set of weights in both implementations, through a folder that the one or the other wrote."""
    if request.param == "written by us":
        ours = make_gpt2(scale=20.0, **SIZES)
        ours.save_pretrained(tmp_path)
        return ours, AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    theirs = random_theirs()
    theirs.save_pretrained(tmp_path)
    return GPT2.from_pretrained(tmp_path).eval(), theirs


@pytest.fixture
def folder(tmp_path):
    make_gpt2(**SIZES).save_pretrained(tmp_path)
    return tmp_path


# ---- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_logits_equal_transformers(pair, dtype, tolerance):
    ours, theirs = (model.to(dtype) for model in pair)
    ids = random_ids(3, 20)
    expected = theirs(ids).logits
    assert expected.std() > 0.5  # the comparison is of something
    assert_relatively_close(ours(ids), expected, tolerance)


@pytest.mark.parametrize("overrides", [
    {"activation_function": "gelu"}, {"activation_function": "relu"}, {"activation_function": "silu"},
    {"activation_function": "tanh"}, {"activation_function": "gelu_pytorch_tanh"},
    {"activation_function": "gelu_fast"}, {"activation_function": "gelu_python"}, {"activation_function": "swish"},
    {"n_inner": 24}, {"n_head": 4}, {"layer_norm_epsilon": 0.1},
])  # fmt: skip
@torch.no_grad()
def test_config_fields_mean_what_transformers_means(tmp_path, overrides):
    theirs = random_theirs(**overrides)
    theirs.save_pretrained(tmp_path)
    ids = random_ids(2, 12)
    expected = theirs.double()(ids).logits
    ours = GPT2.from_pretrained(tmp_path).double().eval()
    assert_relatively_close(ours(ids), expected, 1e-10)
    default = GPT2(GPT2Config(**SIZES))  # the field matters: without it the result is another one
    if not {"n_inner"} & overrides.keys() | {"gelu_pytorch_tanh", "gelu_fast"} & set(overrides.values()):
        default.load_state_dict(ours.state_dict())
        assert not torch.allclose(default.double().eval()(ids), expected, rtol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_gradients_equal_transformers(pair, dtype, tolerance):
    ours, theirs = (model.to(dtype) for model in pair)
    ids = random_ids(3, 12)
    for model, logits in ((ours, ours(ids)), (theirs, theirs(ids).logits)):
        model.zero_grad()
        F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert expected.keys() == {name for name, _ in ours.named_parameters()}
    for name, p in ours.named_parameters():
        assert_relatively_close(p.grad, expected[name], tolerance)


@torch.no_grad()
def test_left_padding_equals_transformers(pair):
    ours, theirs = (model.double() for model in pair)
    _, ids, mask = ragged_batch("left")
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    expected = theirs(ids, attention_mask=mask, position_ids=positions).logits
    assert_relatively_close(ours(ids, mask)[mask.bool()], expected[mask.bool()], 1e-10)


@pytest.mark.parametrize("eos", ["never", "early"])
@torch.no_grad()
def test_greedy_generation_equals_transformers(pair, eos):
    ours, theirs = (model.double() for model in pair)
    rows, ids, mask = ragged_batch("left")
    R = 12

    def expected(eos_id: int | None) -> torch.Tensor:
        ended = theirs.generate(
            ids, attention_mask=mask, max_new_tokens=R, do_sample=False, pad_token_id=0, eos_token_id=eos_id
        )[:, ids.size(1) :]
        return F.pad(ended, (0, R - ended.size(1)))

    # An end token that the first row does emit, in the middle of its response.
    eos_id = int(expected(None)[0, 4]) if eos == "early" else None
    result = generate(ours, rows, R, SamplingConfig(top_k=1), eos_token_id=eos_id)
    assert torch.equal(result.tokens[:, -R:], expected(eos_id))


# ---- padding and cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_nothing(side):
    model = make_gpt2(**SIZES).double()
    rows, ids, mask = ragged_batch(side)
    logits = model(ids, mask)
    assert torch.isfinite(logits).all()
    for i, row in enumerate(rows):
        assert_relatively_close(logits[i, mask[i].bool()], model(row[None])[0], 1e-10)


@torch.no_grad()
def test_the_future_is_not_seen():
    model = make_gpt2(**SIZES)
    ids = random_ids(1, 10)
    changed = ids.clone()
    changed[0, 6] = ids[0, 6] % 49 + 1  # another id
    before, after = model(ids), model(changed)
    assert torch.equal(before[0, :6], after[0, :6])
    assert (before[0, 6:] - after[0, 6:]).abs().amax(-1).min() > 1e-3


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("chunks", [(1,) * 7, (4, 1, 2), (3, 4), (7,)])
@torch.no_grad()
def test_cache_equals_the_full_forward_at_every_position(chunks, padding):
    model = make_gpt2(**SIZES).double()
    _, ids, mask = ragged_batch(padding or "left")
    mask = None if padding is None else mask
    real = torch.ones_like(ids).bool() if mask is None else mask.bool()
    cache = model.new_cache(len(ids), ids.size(1))
    pieces, end = [], 0
    for size in chunks:
        start, end = end, end + size
        pieces.append(model(ids[:, start:end], None if mask is None else mask[:, :end], cache))
        assert cache.length == end
    assert_relatively_close(torch.cat(pieces, 1)[real], model(ids, mask)[real], 1e-10)


@torch.no_grad()
def test_cache_goes_on_after_take_rows():
    model = make_gpt2(**SIZES).double()
    _, ids, mask = ragged_batch("left")
    kept = torch.tensor([2, 0])
    cache = model.new_cache(3, 7)
    model(ids[:, :4], mask[:, :4], cache)
    cache.take_rows(kept)
    logits = model(ids[kept, 4:], mask[kept], cache)
    assert_relatively_close(logits, model(ids, mask)[kept, 4:], 1e-10)


@torch.no_grad()
def test_sequences_beyond_the_positions_are_refused():
    model = make_gpt2(**SIZES)
    model(random_ids(1, 24))
    with pytest.raises(ValueError, match=r"25 tokens.*24 positions"):
        model(random_ids(1, 25))
    cache = model.new_cache(1, 30)
    model(random_ids(1, 24), None, cache)
    with pytest.raises(ValueError, match=r"25 tokens.*24 positions"):
        model(random_ids(1, 1), None, cache)


@torch.no_grad()
def test_mask_of_another_shape_is_refused():
    model = make_gpt2(**SIZES)
    for ids in (torch.tensor([5, 6]), [[5, 6]]):
        with pytest.raises(ValueError, match=r"ids must be a tensor \(B, T\), got"):
            make_gpt2()(ids)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\), expected \(2, 5\)"):
        model(random_ids(2, 5), torch.ones(2, 4))
    cache = model.new_cache(2, 8)
    model(random_ids(2, 5), None, cache)
    with pytest.raises(ValueError, match=r"expected \(2, 6\)"):
        model(random_ids(2, 1), torch.ones(2, 1), cache)


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trip_is_bit_equal(tmp_path, dtype):
    model = make_gpt2(**SIZES, activation_function="gelu", n_inner=24, attn_pdrop=0.25)
    model.save_pretrained(tmp_path, dtype=dtype)
    loaded = GPT2.from_pretrained(tmp_path)
    assert loaded.config == model.config
    stored = load_file(tmp_path / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {dtype}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, model.state_dict()[name].to(dtype).float())


def test_weights_beyond_the_stored_type_are_not_written_as_infinities(folder):
    model = make_gpt2(seed=5, **SIZES)
    with torch.no_grad():
        model.wte.weight[0, 0] = 1e6  # fp16 ends at 65504
    with pytest.raises(ValueError, match=r"wte.weight"):
        model.save_pretrained(folder, dtype=torch.float16)
    assert torch.equal(GPT2.from_pretrained(folder).wte.weight, make_gpt2(**SIZES).wte.weight)  # the old one is whole


@pytest.mark.parametrize("change", [
    lambda tensors: {name.removeprefix("transformer."): t for name, t in tensors.items()},
    lambda tensors: {**tensors, "lm_head.weight": tensors["transformer.wte.weight"].clone()},
    lambda tensors: {**tensors, "transformer.h.0.attn.bias": torch.ones(1, 1, 24, 24).tril().bool(),
                     "transformer.h.1.attn.masked_bias": torch.tensor(-1e4)},
    lambda tensors: {**{name.removeprefix("transformer."): t for name, t in tensors.items()},
                     "h.0.attn.bias": torch.ones(1, 1, 24, 24, dtype=torch.uint8)},
    lambda tensors: {name: t.half().float() if t.ndim < 2 else t for name, t in tensors.items()},
], ids=["no prefix", "lm_head", "buffers", "no prefix, buffers", "as written"])  # fmt: skip
@torch.no_grad()
def test_other_spellings_of_a_checkpoint_load(folder, change):
    rewrite_tensors(folder, change)
    stored = load_file(folder / "model.safetensors")
    loaded = GPT2.from_pretrained(folder)
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, stored.get(name, stored.get(f"transformer.{name}")))


@pytest.mark.parametrize("prefix", ["transformer.", ""])
def test_a_tied_head_may_be_all_there_is_of_the_embedding(folder, prefix):
    """As `safetensors.torch.save_model` leaves tied weights."""
    before = GPT2.from_pretrained(folder)

    def change(tensors):
        tensors = {name.replace("transformer.", prefix): t for name, t in tensors.items()}
        tensors["lm_head.weight"] = tensors.pop(f"{prefix}wte.weight")
        return tensors

    rewrite_tensors(folder, change)
    assert torch.equal(GPT2.from_pretrained(folder).wte.weight, before.wte.weight)


def test_layer_norms_may_have_their_old_names(folder):
    before = GPT2.from_pretrained(folder).state_dict()
    rewrite_tensors(folder, lambda tensors: {
        name.replace(".weight", ".gamma").replace(".bias", ".beta") if ".ln_" in name else name: t
        for name, t in tensors.items()
    })  # fmt: skip
    assert "transformer.h.0.ln_1.gamma" in load_file(folder / "model.safetensors")
    after = GPT2.from_pretrained(folder).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_untied_head_that_is_not_there_is_refused(folder):
    rewrite_config(folder, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"do not fit the model: missing lm_head.weight"):
        GPT2.from_pretrained(folder)
    rewrite_tensors(folder, lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"].clone()})
    GPT2.from_pretrained(folder)


def test_untied_head_is_refused(folder):
    rewrite_tensors(folder, lambda t: {**t, "lm_head.weight": t["transformer.wte.weight"] + 1})
    with pytest.raises(ValueError, match=r"lm_head.weight differs from wte.weight"):
        GPT2.from_pretrained(folder)


def test_one_error_names_every_tensor_that_is_wrong(folder):
    def damage(tensors):
        del tensors["transformer.wpe.weight"], tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.h.7.ln_1.bias"] = torch.zeros(16)
        tensors["transformer.wte.weight"] = torch.zeros(49, 16)
        tensors["transformer.h.0.ln_1.weight"][3] = torch.nan
        tensors["transformer.h.0.ln_2.weight"][3] = -torch.inf
        tensors["transformer.ln_f.bias"] = torch.zeros(16, dtype=torch.int32)

    rewrite_tensors(folder, damage)
    with pytest.raises(ValueError) as caught:
        GPT2.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message
    for problem in ("missing wpe.weight (24, 16)", "missing h.1.ln_2.bias", "unexpected h.7.ln_1.bias",
                    "wte.weight has shape (49, 16), the config asks for (50, 16)",
                    "h.0.ln_1.weight holds NaN", "h.0.ln_2.weight holds NaN or infinite",
                    "ln_f.bias has dtype"):  # fmt: skip
        assert problem in message, problem


@pytest.mark.parametrize(("changes", "message"), [
    ({"model_type": "bert"}, "'bert' model, expected 'gpt2'"),
    ({"scale_attn_weights": False}, "scale_attn_weights=False; only True is supported"),
    ({"is_causal": False}, "is_causal=False; only True is supported"),
])  # fmt: skip
def test_a_config_that_computes_something_else_is_refused(folder, changes, message):
    rewrite_config(folder, **changes)
    with pytest.raises(ValueError, match=message) as caught:
        GPT2.from_pretrained(folder)
    assert str(folder) in str(caught.value)


# ---- construction ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), [
    *((name, value) for name in ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head", "n_inner")
      for value in (0, -1, 2.0, "8", True)),
    *((name, value) for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop")
      for value in (-0.1, 1, 1.5, math.nan, "0.1", None, True)),
    *((name, value) for name in ("layer_norm_epsilon", "initializer_range")
      for value in (0, -1e-5, math.nan, "x", None)),
    ("activation_function", "swish9000"), ("activation_function", None), ("activation_function", ["gelu"]),
    ("n_head", 3),
])  # fmt: skip
def test_bad_config_values_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"GPT2Config\.({field}|n_embd must be a multiple)"):
        GPT2Config(**{**SIZES, field: value})


def test_building_depends_on_the_seed_alone():
    state = torch.get_rng_state()
    first, second, other = (GPT2(GPT2Config(**SIZES), seed=seed).state_dict() for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["wte.weight"], other["wte.weight"])
    assert not torch.equal(first["h.0.attn.c_proj.weight"], other["h.0.attn.c_proj.weight"])


def test_initial_weights_have_the_spread_of_the_paper():
    model = GPT2(GPT2Config(vocab_size=50, n_positions=64, n_embd=64, n_layer=8, n_head=2, initializer_range=0.1))
    for name, p in model.named_parameters():
        if p.ndim < 2:
            assert (p == (1 if "ln_" in name and name.endswith("weight") else 0)).all()
        else:
            expected = 0.1 / math.sqrt(2 * 8) if "c_proj" in name else 0.1
            assert abs(p.std().item() / expected - 1) < 0.1, name


@pytest.mark.parametrize("active", ["resid_pdrop", "embd_pdrop", "attn_pdrop"])
@torch.no_grad()
def test_dropout_is_on_in_training_and_off_in_evaluation(active):
    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model, none = make_gpt2(**SIZES, **{**rates, active: 0.5}), make_gpt2(**SIZES, **rates)
    ids = random_ids(2, 8)
    assert torch.equal(model(ids), none(ids))
    assert not torch.allclose(model.train()(ids), none(ids), atol=1e-3)
    assert torch.equal(model.eval()(ids), none(ids))


@pytest.mark.parametrize(("side", "begin", "computed"), [
    (left_pad, 10, 8 + 2 + 5), (right_pad, 10, 8 + 2 + 5), (right_pad, 0, 8), (left_pad, 0, 8 + 2 + 5),
], ids=["left", "right", "right, alike", "left, in other columns"])  # fmt: skip
def test_padding_and_what_rows_share_cost_nothing_and_change_no_gradient(side, begin, computed):
    """Layers that work on single tokens get the distinct ones; states and gradients are those of the rows alone."""
    model = make_gpt2(1)
    rows = [torch.arange(1 + i * begin, 2 + i * begin + n) for i, n in enumerate((7, 1, 4))]
    ids, mask = side(rows)
    seen = []
    handle = model.h[0].mlp.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    (model.hidden_states(ids, mask)[mask.bool()].square() * torch.linspace(1, 2, 32)).sum().backward()
    handle.remove()
    assert seen == [(computed, 32)]
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for row in rows:
        (model.hidden_states(row[None]).square() * torch.linspace(1, 2, 32)).sum().backward()
    for ours, alone in zip(together, (p.grad for p in model.parameters()), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-4, atol=1e-4 * float(alone.abs().max()))


def test_dropout_is_drawn_for_every_row_though_rows_begin_alike():
    model = make_gpt2(1, resid_pdrop=0.5, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = torch.ones(2, 9, dtype=torch.int64)
    assert torch.equal(*model(ids))
    assert not torch.allclose(*model.train()(ids), atol=1e-3)
    model.eval().h[1].mlp.dropout.train()  # as Monte Carlo dropout has it
    assert not torch.allclose(*model(ids), atol=1e-3)


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_checkpointed_activations_give_the_same_gradients_to_the_bit(padded, autocast):
    model = make_gpt2(2, n_layer=3)
    ids = torch.randint(1, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 1 - padded
    calls, gradients = [], []
    handle = model.h[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for checkpointed in (False, True):
        model.checkpoint_activations = checkpointed
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, mask)[mask.bool()].float().log_softmax(-1)[:, 5].sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    handle.remove()
    assert len(calls) == 1 + 2  # once more in the backward pass
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def freeze(model, layers):
    for module in (model.wte, model.wpe, *model.h[:layers]):
        module.requires_grad_(False)
    return model


@pytest.mark.parametrize("layers", [0, 2, 3])
def test_frozen_parameters_are_held_once_and_the_reference_computes_the_same_bits(layers):
    model, reference, apart = (make_gpt2(4, n_layer=3) for _ in range(3))
    frozen = [p for p in freeze(model, layers).parameters() if not p.requires_grad]
    share_frozen_parameters(model, reference)
    with torch.no_grad():
        for parameter in model.parameters():  # the policy moves on, where it can
            if parameter.requires_grad:
                parameter.mul_(1.5)
    ids, mask = left_pad([torch.arange(1, 6), torch.arange(7, 9)])
    assert torch.equal(reference.hidden_states(ids, mask), apart.hidden_states(ids, mask))
    assert not torch.equal(model.hidden_states(ids, mask), reference.hidden_states(ids, mask))
    shared = {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in reference.parameters()}
    assert shared == {p.data_ptr() for p in frozen}


def test_what_is_trained_or_differs_is_not_shared():
    model, reference = make_gpt2(4), make_gpt2(4)
    addresses = {p.data_ptr() for p in reference.parameters()}
    with pytest.raises(ValueError, match="trains all of its parameters"):
        share_frozen_parameters(model, reference)
    with torch.no_grad():
        freeze(model, 2).h[1].ln_1.bias[0] += 1
    with pytest.raises(ValueError, match=r"h\.1\.ln_1\.bias is frozen, but differs"):
        share_frozen_parameters(model, reference)
    assert {p.data_ptr() for p in reference.parameters()} == addresses  # nothing was shared before it was found


def test_packed_segments_have_the_states_of_rows_of_their_own():
    model = make_gpt2(3)
    parts = [[5, 6, 7], [9, 4], [5, 6, 8, 2]]
    ids = torch.tensor([[*parts[0], *parts[1], *parts[2]]])
    segments = torch.tensor([[7] * 3 + [2] * 2 + [7] * 4])  # any numbers that differ from their neighbours
    packed = model.hidden_states(ids, segments=torch.tensor([[0] * 3 + [1] * 2 + [2] * 4]))
    alone = torch.cat([model.hidden_states(torch.tensor([part])) for part in parts], 1)
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert segment_positions(segments).tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]


def test_positions_count_real_tokens_so_padding_may_be_wider_than_the_context():
    model = make_gpt2(3, n_positions=8)
    ids, mask = torch.tensor([[0] * 4 + [5, 6, 7, 8, 9, 4]]), torch.tensor([[0] * 4 + [1] * 6])
    torch.testing.assert_close(
        model.hidden_states(ids, mask)[:, 4:], model.hidden_states(ids[:, 4:]), atol=1e-5, rtol=1e-5
    )
    assert model.hidden_states(ids, torch.tensor([[0, 0] + [1] * 8])).isfinite().all()  # as many as there are positions
    with pytest.raises(ValueError, match="10 tokens is longer than the model's 8 positions"):
        model.hidden_states(ids)
    with pytest.raises(ValueError, match="9 tokens is longer"):
        model.hidden_states(ids, torch.tensor([[0] + [1] * 9]))
