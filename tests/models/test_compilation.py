"""Compiled blocks compute what plain ones do; on a GPU: `test_gpu.py`."""

import copy
import os
import shutil

import pytest
import torch
from small_trainer import make_trainer
from torch import nn

from conftest import make_gpt2
from minirlhf import SamplingConfig, generate
from minirlhf.models.decoder import compile_blocks

COMPILER = shutil.which(os.environ.get("CXX", "g++"))


def ragged():
    ids = torch.randint(5, 100, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return ids, mask


def gradients(model, ids, mask):
    model.zero_grad()
    hidden = model.hidden_states(ids, mask) * mask.unsqueeze(-1)
    hidden.square().sum().backward()
    return hidden.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def quick_backend(monkeypatch):
    """Tracing and the compiler's own backward pass, without its kernels, which take long to make."""
    inner = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: inner(self, backend="aot_eager", **options))
    yield
    torch.compiler.reset()


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_compiled_blocks_give_the_same_states_and_gradients():
    model = make_gpt2(n_layer=1)
    names = list(model.state_dict())
    expected, plain = gradients(model, *ragged())
    compile_blocks(model)
    assert list(model.state_dict()) == names
    found, compiled = gradients(model, *ragged())
    assert not torch.equal(found, expected)  # fused kernels round otherwise: it was compiled at all
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(compiled, plain, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    torch.compiler.reset()


def test_blocks_are_compiled_whole_with_padding_and_without(quick_backend):
    model = make_gpt2(n_layer=1)
    compile_blocks(model)
    torch._dynamo.utils.counters.clear()
    gradients(model, *ragged())
    with torch.no_grad():
        model.hidden_states(ragged()[0])
    counted = torch._dynamo.utils.counters
    assert counted["stats"]["unique_graphs"] > 0 and not counted["graph_break"]


def test_blocks_of_policy_and_reference_are_compiled_only_if_asked_for(quick_backend):
    for on in (False, True):
        trainer = make_trainer(compile=on)
        blocks = [*trainer.policy.decoder.h, *trainer.reference.h]
        assert all((block._compiled_call_impl is not None) == on for block in blocks)
        assert all(block._compiled_call_impl is None for block in copy.deepcopy(trainer.policy).decoder.h)


def test_decoding_with_a_cache_compiles_nothing(quick_backend):
    model = make_gpt2()
    compile_blocks(model)
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    generate(model, [[5, 6], [7]], 4, SamplingConfig(top_k=1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled
