"""Random generators restored after an error, a stream of random numbers for dropout, and evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn


class DropoutStream:
    """Random numbers for dropout, which draws from the global generators, from a stream of its own.

    states: of the CPU's generator and the device's, after the last use; set them to resume.
    """

    def __init__(self, seed: int, device: torch.device):
        self.device = device
        self.states = {"dropout": torch.Generator().manual_seed(seed).get_state()}
        if device.type == "cuda":
            self.states["dropout_cuda"] = torch.Generator(device).manual_seed(seed).get_state()

    @contextlib.contextmanager
    def use(self, rank: int = 0, size: int = 1) -> Iterator[None]:
        """Inside this context the global generators are this stream; afterwards they are as before.

        Each of `size` processes gets numbers of its own, by one number of the stream, which stays equal on all.
        """
        cuda = self.device.type == "cuda"
        with torch.random.fork_rng(devices=[self.device] if cuda else []):
            torch.set_rng_state(self.states["dropout"])
            if cuda:
                torch.cuda.set_rng_state(self.states["dropout_cuda"], self.device)
            if size > 1:
                seed = int(torch.randint(2**62, ())) + rank
                self.states["dropout"] = torch.get_rng_state()
                torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
                if cuda:
                    own = torch.Generator(self.device).manual_seed(seed).get_state()
                    torch.cuda.set_rng_state(own, self.device)
                yield
                return
            yield
            self.states = {"dropout": torch.get_rng_state()}
            if cuda:
                self.states["dropout_cuda"] = torch.cuda.get_rng_state(self.device)


@contextlib.contextmanager
def undone_on_error(generators: Iterable[torch.Generator]) -> Iterator[None]:
    """Restore the states of these generators if an error leaves the context."""
    states = [(generator, generator.get_state()) for generator in generators]
    try:
        yield
    except BaseException:
        for generator, state in states:
            generator.set_state(state)
        raise


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside this context; afterwards its mode is as before."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
