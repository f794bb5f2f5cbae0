"""Decoding at fixed shapes, so that a GPU can replay it: one launch a token instead of some hundred.

Decoding a token is so little work for a GPU that most of the time goes into telling it what to do next. A CUDA graph is
told once and replayed (https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs), at the price that nothing in
it may change but the content of tensors. So the key/value cache has its full length from the start, columns that are
not written yet are hidden by a mask, and where the next token goes is a number in a tensor.

Only the forward pass of one token a row is in the graph. Sampling stays outside, with the caller's generator: what is
drawn is what `generation.generate` draws without a graph. Nothing waits for the GPU between two tokens (but once in
`CHECK_EVERY` if texts can end), so rows that ended go on; what they draw is dropped. There the two ways differ:
`generate` alone drops the rows themselves, so from the first end of a row on its random numbers go to other rows (the
distribution is the same).

Shapes: B rows, P prompt, R response, S columns of the cache, C width, nh heads, hs head size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import copy
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.generation.sampling import SamplingConfig, pack_set, sample
from minirlhf.models.gpt2 import GPT2, KVCache, Pass
from minirlhf.models.layers import Conv1D

COLUMNS = 64  # the length of a static cache is a multiple: batches of about the same length share a graph
WARM_UPS = 3  # runs before the capture, in which libraries choose kernels and take their workspace
# Tokens between two looks at whether all rows have ended. A look lets the queue run dry, which costs a GPU about as
# much as a token; a batch that ended may decode so many tokens for nothing.
CHECK_EVERY = 16


class StaticCache(KVCache):
    """A KVCache of fixed shape, for one token a row at a time: `column` (1,) says where it goes."""

    def __init__(self, model: GPT2, batch_size: int, columns: int):
        like = model.new_cache(batch_size, 0).layers[0]
        super().__init__(model.config, batch_size, columns, like)
        self.column = torch.zeros(1, dtype=torch.int64, device=like.device)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write this call's keys and values (B, nh, 1, hs) of a layer; return those of all columns (B, nh, S, hs)."""
        keys, values = self.layers[layer].unbind()
        keys.index_copy_(2, self.column, k)
        values.index_copy_(2, self.column, v)
        return keys, values

    def load(self, cache: KVCache) -> None:
        """Begin with what another cache of as many rows holds."""
        for mine, theirs in zip(self.layers, cache.layers, strict=True):
            mine[:, :, :, : cache.length] = theirs[:, :, :, : cache.length]
            # Hidden columns have the weight 0, but 0 times the NaN that may stand there would be NaN.
            mine[:, :, :, cache.length :] = 0
        self.column.fill_(cache.length)


class DecodeStep:
    """State and logits after one more token in each of B rows, computed in place in tensors of fixed shape.

    On a CPU it runs as it is; on a GPU, once it was captured, as a replay.

    Under autocast the weights are cast once for many tokens, as autocast does outside of a graph. Its own cache of
    casts must not be used in one: it would be emptied at the end of the context, and replays would read what stands in
    its memory then. So the matrices are copies in 16 bits, which `load` brings up to date.
    """

    def __init__(self, model: GPT2, batch_size: int, columns: int):
        weight = model.wte.weight
        device = weight.device
        self.model = model
        self.cache = StaticCache(model, batch_size, columns)
        dtype = self.cache.layers[0].dtype
        self.reduced = dtype if torch.is_autocast_enabled(device.type) else None
        self.blocks, self.head = model.h, model.head_weight
        if self.reduced is not None:
            self.blocks, self.head = (
                copy.deepcopy(model.h).requires_grad_(False),
                self.head.detach().to(dtype, copy=True),
            )
            for module in self.blocks.modules():
                if isinstance(module, Conv1D):
                    module.to(dtype)
        self.new = torch.zeros(batch_size, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros_like(self.new)
        self.real = torch.ones(batch_size, columns, dtype=torch.bool, device=device)  # False: padding of a prompt
        self.every_column = torch.arange(columns, device=device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: tuple[Tensor, Tensor] | None = None  # where a replay leaves them
        self.key = self.key_of(model, batch_size)

    @staticmethod
    def key_of(model: GPT2, batch_size: int) -> tuple[object, ...]:
        """What must be the same for a step to be used again: rows, types, and where the weights lie.

        Weights that an optimizer changes in place lie where they were.
        """
        device = model.wte.weight.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return batch_size, kind, *((p.data_ptr(), p.dtype) for p in model.parameters())

    def load(self, cache: KVCache, prompt_mask: Tensor) -> None:
        """Begin after the prompts: with their keys and values, and the weights as they are now.

        prompt_mask: (B, P), 1 at real tokens.
        """
        self.cache.load(cache)
        P = prompt_mask.size(1)
        self.real.fill_(True)
        self.real[:, :P] = prompt_mask.bool()
        self.positions.copy_(prompt_mask.sum(-1, keepdim=True))
        if self.reduced is not None:
            for mine, theirs in zip(self.blocks.parameters(), self.model.h.parameters(), strict=True):
                mine.copy_(theirs)
            self.head.copy_(self.model.head_weight)

    def __call__(self, new: Tensor) -> tuple[Tensor, Tensor]:
        """Feed one token a row (B,); return hidden states (B, C) and logits (B, V) after it.

        The next call overwrites them.
        """
        self.new.copy_(new.unsqueeze(-1))
        if self.graph is None or self.outputs is None:
            return self._forward()
        self.graph.replay()
        return self.outputs

    def _forward(self) -> tuple[Tensor, Tensor]:
        allowed = self.real & (self.every_column <= self.cache.column)  # (B, S)
        way = Pass(allowed[:, None, None], self.cache)
        with self._autocast():
            x = self.model.wte(self.new) + self.model.wpe(self.positions)  # (B, 1, C)
            for layer, block in enumerate(self.blocks):
                x = block.forward(x, way, layer)  # not what `torch.compile` made of it: see `compilation`
            state = self.model.ln_f(x)[:, -1]
            logits = F.linear(state, self.head)
        self.cache.column += 1
        self.positions += 1
        return state, logits

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.reduced is None:
            return contextlib.nullcontext()
        return torch.autocast(self.new.device.type, self.reduced, cache_enabled=False)

    def capture(self) -> None:
        """On a GPU, record the step as a graph. Raises RuntimeError if something in it cannot be recorded."""
        device = self.new.device
        if device.type != "cuda":
            return
        with torch.cuda.device(device):
            before = torch.cuda.current_stream()
            try:
                self._record(before)
            finally:  # a capture that fails leaves its own stream behind
                torch.cuda.set_stream(before)

    def _record(self, stream: torch.cuda.Stream) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._rewind()
                self._forward()
        stream.wait_stream(side)
        self._rewind()
        graph = torch.cuda.CUDAGraph()
        # Other threads, say of a reward function, may do on the GPU what they like meanwhile.
        with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
            outputs = self._forward()
        self.graph, self.outputs = graph, outputs

    def _rewind(self) -> None:
        self.cache.column.zero_()
        self.positions.zero_()


class GraphedDecoder:
    """Makes a DecodeStep for `generate`, and keeps it for later batches of as many rows and the same weights.

    It holds one key/value cache and, under autocast, a copy of the weights in 16 bits. A graph keeps the settings, for
    example of TF32, with which it was captured. If a capture fails, `generate` goes the plain way from then on.
    (PyTorch's global generator of that GPU may refuse to draw after that; the trainer has its own.)
    """

    def __init__(self) -> None:
        self._step: DecodeStep | None = None
        self._failed = False

    def step_for(self, model: GPT2, batch_size: int, columns: int) -> DecodeStep | None:
        """A step with room for so many columns; None, with a warning the first time, if it cannot be captured."""
        if self._failed:
            return None
        step, key = self._step, DecodeStep.key_of(model, batch_size)
        if step is not None and step.key == key and columns <= step.every_column.numel():
            return step
        self._step = step = None  # its memory is free before the next one takes as much
        try:
            step = DecodeStep(model, batch_size, -(-columns // COLUMNS) * COLUMNS)
            step.capture()
        except RuntimeError as error:
            self._failed = True
            warnings.warn(f"decoding without a CUDA graph, as it cannot be captured: {error}", stacklevel=3)
            return None
        self._step = step
        return step


def decode(
    step: DecodeStep,
    state: Tensor,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor,
    logprobs: Tensor,
    sets: Tensor | None,
    states: Tensor | None,
    sampling: SamplingConfig,
    eos_token_id: int | None,
    generator: torch.Generator | None,
) -> None:
    """Sample the R response columns of a batch, without waiting for the device between two tokens.

    step: loaded with the prompts. state: (B, C), and logits: (B, V), after the prompts.
    tokens, mask: (B, T); logprobs: (B, R); sets: (B, R, ceil(V / 8)) or None; states: (B, R, C) or None. Their last R
        columns, filled with what stands at padding, are written.
    """
    B, R = logprobs.shape
    P = tokens.size(1) - R
    running = torch.ones(B, dtype=torch.bool, device=tokens.device)
    for t in range(R):
        new, logp, keep = sample(logits, sampling, generator)
        tokens[:, P + t] = torch.where(running, new, tokens[:, P + t])
        mask[:, P + t] = running
        logprobs[:, t] = torch.where(running, logp, 0.0)
        if sets is not None and keep is not None:
            sets[:, t] = pack_set(keep & running.unsqueeze(-1))
        if states is not None:
            states[:, t] = state
        if t + 1 == R:
            break
        if eos_token_id is not None:
            running &= new != eos_token_id
            if (t + 1) % CHECK_EVERY == 0 and not running.any():
                break
        state, logits = step(new)
