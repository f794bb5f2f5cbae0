"""The plain attention formula against PyTorch's kernel, values and gradients; models built for their shapes alone."""

import pytest
import torch
import torch.nn.functional as F

from minirlhf import GPT2, BertClassifier, BertConfig, GPT2Config
from minirlhf.models import layers


@pytest.mark.parametrize("length", [1, 7, layers.SHORT_SEQUENCE])
@pytest.mark.parametrize("masked", ["causal", "padding", "none"])
def test_plain_attention_equals_the_fused_kernel(length, masked):
    generator = torch.Generator().manual_seed(length)
    q, k, v, weight = torch.randn(4, 2, 3, length, 8, dtype=torch.float64, generator=generator).unbind(0)
    allowed = torch.rand(2, 1, 1, length, generator=generator) < 0.7 if masked == "padding" else None
    if allowed is not None:
        allowed[..., 0] = True
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    ours = layers.attention(*inputs, allowed, is_causal=masked == "causal")
    gradients = torch.autograd.grad((ours * weight).sum(), inputs)
    fused = [x.clone().requires_grad_() for x in (q, k, v)]
    theirs = F.scaled_dot_product_attention(*fused, attn_mask=allowed, is_causal=masked == "causal")
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(gradients, torch.autograd.grad((theirs * weight).sum(), fused), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_fused_kernel_is_used_where_it_is_faster(monkeypatch):
    called = []

    def fused(q, *args, **kwargs):
        called.append(q.size(2))
        return q

    monkeypatch.setattr(layers.F, "scaled_dot_product_attention", fused)

    def attend(length, queries=None, **options):
        x = torch.zeros(1, 1, length, 4)
        layers.attention(x[:, :, :queries], x, x, **options)

    attend(5)
    attend(1000, queries=1)
    assert called == []
    attend(layers.SHORT_SEQUENCE + 1)
    attend(6, dropout_p=0.1)
    assert called == [layers.SHORT_SEQUENCE + 1, 6]


@pytest.mark.parametrize("build", [
    lambda: GPT2(GPT2Config(vocab_size=10**12)), lambda: BertClassifier(BertConfig(vocab_size=10**12)),
], ids=["gpt2", "bert"])  # fmt: skip
def test_shapes_take_no_memory_and_no_random_numbers(build):
    state = torch.get_rng_state()
    outside = torch.zeros(3)
    with layers.shapes_only():
        model = build()
        torch.nn.init.normal_(outside)
        outside.uniform_()
    assert torch.equal(outside, torch.zeros(3))
    assert all(p.is_meta for p in model.parameters())
    assert next(model.parameters()).shape == (10**12, 768)
    assert torch.equal(torch.get_rng_state(), state)
    drawn = torch.nn.Linear(3, 4).weight  # outside, weights are drawn as ever
    assert drawn.device.type == "cpu" and drawn.std() > 0


def test_a_model_of_shapes_is_filled_in_fp32_once_everything_fits():
    with layers.shapes_only():
        model = torch.nn.Linear(3, 2)
    tensors = {"weight": torch.arange(6.0).view(2, 3).half(), "bias": torch.ones(2)}
    with pytest.raises(ValueError, match="in here do not fit the model: missing bias"):
        layers.fill(model, {"weight": tensors["weight"]}, "here")
    assert model.weight.is_meta
    layers.fill(model, tensors, "here")
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight, tensors["weight"].float())
    assert model.bias.data_ptr() != tensors["bias"].data_ptr() and model.bias.requires_grad
