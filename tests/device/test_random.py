"""Generators that are put back after an error."""

import contextlib

import pytest
import torch

from minirlhf.device.random import undone_on_error


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, None])
def test_draws_are_undone_by_an_error_and_by_nothing_else(error):
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    before = [g.get_state() for g in generators]
    context = pytest.raises(error) if error else contextlib.nullcontext()
    with context, undone_on_error(generators):
        for g in generators:
            torch.rand(3, generator=g)
        if error:
            raise error
    assert all(torch.equal(g.get_state(), state) for g, state in zip(generators, before, strict=True)) == bool(error)
