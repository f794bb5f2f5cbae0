"""Decoding at fixed shapes, so that a GPU can replay it: one launch a token instead of some hundred.

A CUDA graph is recorded once and replayed (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs); nothing
in it may change but the content of tensors. So `models.cache.StaticKVCache` has its full length from the start. Only
the forward pass of one token a row is in the graph; `generate` samples outside. Nothing synchronises with the GPU
between two tokens, so rows that have ended go on, and `generate` drops what they draw.

Shapes: B rows, P prompt, C width, V vocabulary.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from minirlhf.models.cache import StaticKVCache
from minirlhf.models.decoder import Decoder

COLUMNS = 64  # the length of a static cache is a multiple: batches of about the same length share a graph
WARM_UPS = 3  # runs before the capture, in which libraries choose kernels and take their workspace


class DecodeStep:
    """State and logits after one more token in each of B rows, computed in place; once captured, by a replay."""

    def __init__(self, model: Decoder, batch_size: int, columns: int):
        self.model, self.columns = model, columns
        self.cache = StaticKVCache(model.new_cache(batch_size, 0), batch_size, columns)
        self.new = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, Tensor] | None = None  # where a replay leaves them
        self.key = self.key_of(model, batch_size)

    @staticmethod
    def key_of(model: Decoder, batch_size: int) -> tuple[object, ...]:
        """What must be equal to use a step again: rows, types, and addresses of weights, which an optimizer keeps."""
        device = model.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return batch_size, kind, *((p.data_ptr(), p.dtype) for p in model.parameters())

    def __call__(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Feed one token a row (B,); return states (B, C) and logits (B, V) after it. The next call overwrites them."""
        self.new.copy_(new.unsqueeze(-1))
        if self.graph is None or self.outputs is None:
            return self._forward()
        self.graph.replay()
        return self.outputs

    def _forward(self) -> tuple[Tensor, Tensor]:
        device = self.new.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # No cache of casts, which a context empties at its end: a replay would read freed memory.
        with torch.autocast(device, dtype, enabled, cache_enabled=False):
            state = self.model.hidden_states(self.new, cache=self.cache)[:, -1]
            return state, self.model.lm_logits(state)

    def capture(self) -> None:
        """On a GPU, record the step as a graph. Raises RuntimeError if something in it cannot be recorded."""
        if self.new.device.type != "cuda":
            return
        with torch.cuda.device(self.new.device):
            graph, side, before = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.current_stream()
            try:
                side.wait_stream(before)
                with torch.cuda.stream(side):
                    for _ in range(WARM_UPS):  # the new cache has room for them, and is loaded before it is read
                        self._forward()
                before.wait_stream(side)
                # Other threads, say of a reward function, may use the GPU meanwhile.
                with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
                    outputs = self._forward()
            finally:  # a capture that fails leaves its own stream behind
                torch.cuda.set_stream(before)
        self.graph, self.outputs = graph, outputs


class GraphedDecoder:
    """Makes a DecodeStep for `generate`, and keeps it for later batches of as many rows and the same weights.

    A graph keeps the settings, for example of TF32, with which it was captured. If a capture fails, `generate` decodes
    plainly from then on. (PyTorch's global generator of that GPU may then refuse to draw; the trainer has its own.)
    """

    def __init__(self) -> None:
        self._step: DecodeStep | None = None
        self._failed = False

    def step_for(self, model: Decoder, batch_size: int, columns: int) -> DecodeStep | None:
        """A step with room for so many columns; None, with a warning the first time, if it cannot be captured."""
        step = self._step
        if step is not None and step.key == DecodeStep.key_of(model, batch_size) and columns <= step.columns:
            return step
        self._step = step = None  # frees its memory before the next one takes as much
        if not self._failed:
            try:
                step = DecodeStep(model, batch_size, -(-columns // COLUMNS) * COLUMNS)
                step.capture()
                self._step = step
            except RuntimeError as error:
                self._failed = True
                warnings.warn(f"decoding without a CUDA graph, as it cannot be captured: {error}", stacklevel=3)
        return self._step
