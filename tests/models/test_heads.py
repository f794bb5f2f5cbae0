"""The value head, and the actor-critic and its folders."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from conftest import make_gpt2
from minirlhf import ActorCritic, ValueHead
from minirlhf.models import heads

V = 45
SIZES = dict(vocab_size=V, n_positions=32, n_embd=16, n_layer=2, n_head=2)


def make_actor_critic(seed: int = 0, kind: str = "linear") -> ActorCritic:
    head = ValueHead(SIZES["n_embd"], kind)
    with torch.no_grad():
        for p in head.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return ActorCritic(make_gpt2(seed=seed, scale=12.0, **SIZES), head).double().eval()


def random_tokens(*shape: int) -> torch.Tensor:
    return torch.randint(0, V, shape, generator=torch.Generator().manual_seed(1))


# ---- the value head -------------------------------------------------------------------------------------------------


def test_value_head_starts_at_zero():
    hidden = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    for kind in heads.VALUE_HEAD_KINDS:
        assert torch.equal(ValueHead(16, kind).eval()(hidden), torch.zeros(2, 3))


@torch.no_grad()
def test_value_head_kinds():
    hidden = 50 * torch.randn(20, 3, 16, generator=torch.Generator().manual_seed(0))
    linear, tanh = ValueHead(16, "linear"), ValueHead(16, "tanh").eval()
    linear.summary.weight.fill_(0.1)
    linear.summary.bias.fill_(0.5)
    tanh.load_state_dict(linear.state_dict())
    expected = 0.1 * hidden.sum(-1) + 0.5
    assert expected.abs().max() > 20
    torch.testing.assert_close(linear(hidden), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tanh(hidden), expected.tanh(), rtol=1e-4, atol=1e-4)
    assert tanh(hidden).abs().max() <= 1


@torch.no_grad()
def test_value_head_dropout_is_off_in_evaluation_and_only_in_the_tanh_head():
    hidden = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    for kind, drops in (("tanh", True), ("linear", False)):
        head = ValueHead(16, kind, dropout=0.5)
        head.summary.weight.fill_(0.1)
        exact = head.eval()(hidden)
        assert torch.equal(head(hidden), exact)
        zeros = (head.train()(hidden) == 0).float().mean().item()
        assert (0.3 < zeros < 0.7) if drops else zeros == 0


def test_a_model_of_another_library_is_refused_with_the_line_that_converts_it():
    with pytest.raises(ValueError, match=r"got a torch Linear: save it with model.save_pretrained\(folder\)"):
        ActorCritic(torch.nn.Linear(1, 1))


def test_unknown_value_head_is_refused():
    with pytest.raises(ValueError, match=r"linear, tanh.*'cubic'"):
        ValueHead(16, "cubic")


@torch.no_grad()
def test_values_are_fp32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert ValueHead(16)(torch.ones(2, 16)).dtype == torch.float32


# ---- the actor-critic -----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_forward_gives_logits_and_values_of_every_position():
    model = make_actor_critic()
    tokens, mask = random_tokens(4, 11), torch.ones(4, 11, dtype=torch.int64)
    mask[1:, :3] = mask[2, -5:] = 0
    logits, values = model(tokens, mask)
    assert logits.shape == (*tokens.shape, V) and values.shape == tokens.shape
    torch.testing.assert_close(logits, model.decoder(tokens, mask))
    torch.testing.assert_close(values, model.value_head(model.decoder.hidden_states(tokens, mask)))


# ---- folders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", heads.VALUE_HEAD_KINDS)
def test_round_trip_is_bit_equal(make_decoder, tmp_path, kind):
    decoder = make_decoder(3, scale=12.0, **SIZES)
    model = ActorCritic(decoder, ValueHead(decoder.width, kind, init_range=0.5, seed=4))
    model.save_pretrained(tmp_path)
    loaded = ActorCritic.from_pretrained(tmp_path)
    assert loaded.value_head.kind == ActorCritic.from_pretrained(tmp_path, value_head=kind).value_head.kind == kind
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@torch.no_grad()
def test_other_tools_see_a_plain_gpt2(tmp_path):
    model = make_actor_critic().float()
    model.save_pretrained(tmp_path)
    tokens = random_tokens(2, 6)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).logits, model(tokens)[0], rtol=1e-5, atol=1e-4)
    assert load_file(tmp_path / "value_head.safetensors").keys() == {"summary.weight", "summary.bias"}


@torch.no_grad()
def test_a_plain_gpt2_gets_a_new_value_head(tmp_path):
    gpt2 = make_gpt2(**SIZES)
    gpt2.save_pretrained(tmp_path)
    loaded = ActorCritic.from_pretrained(tmp_path).eval()
    tokens = random_tokens(2, 6)
    logits, values = loaded(tokens)
    assert torch.equal(logits, gpt2(tokens))
    assert torch.equal(values, torch.zeros(tokens.shape))


@pytest.mark.parametrize("has_head", [True, False])
def test_the_card_names_a_value_head_only_if_there_is_one(tmp_path, has_head):
    ActorCritic(make_gpt2(**SIZES), "linear" if has_head else None).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert ("value head" in card, "ActorCritic.from_pretrained" in card) == (has_head, has_head)
    assert ("GPT2.from_pretrained" in card) != has_head


def test_a_value_head_of_another_kind_is_not_loaded_silently(tmp_path):
    make_actor_critic(kind="tanh").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tanh"):
        ActorCritic.from_pretrained(tmp_path, value_head="linear")


def test_a_damaged_value_head_is_named(tmp_path):
    make_actor_critic().save_pretrained(tmp_path)
    (tmp_path / "value_head.safetensors").write_bytes(b"\x00" * 5)
    with pytest.raises(ValueError, match=r"value_head.safetensors"):
        ActorCritic.from_pretrained(tmp_path)
