"""Generators that are put back after an error, dropout from a stream of its own, and dropout off."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


@contextlib.contextmanager
def seeded_dropout(seed: int, device: torch.device) -> Iterator[None]:
    """Within it dropout, which knows no generator but the global one, draws from a stream of this seed.

    The global random state is the caller's again afterwards.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        if device.type == "cuda":
            torch.cuda.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
        yield


@contextlib.contextmanager
def undone_on_error(generators: Iterable[torch.Generator]) -> Iterator[None]:
    """Within it generators may be drawn from; if an error leaves it, they are as they were before."""
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in states:
            generator.set_state(state)
        raise


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within it a model is in eval mode; afterwards in the mode that it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
