"""The memory that PPO needs: a formula, a measurement on a few sequences, and what the device has.

Shapes: B sequences an iteration, F a micro-batch, S a scoring pass, P longest prompt, R new tokens, T = P + R,
L layers, C width, nh heads, V vocabulary.

Left out: the reward function's own memory, the CUDA context, and what an allocator loses between its blocks.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minirlhf.device.precision import SIXTEEN_BITS
from minirlhf.evaluation.doctor.setup import logprobs
from minirlhf.generation.generate import generate
from minirlhf.generation.static_decode import COLUMNS
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.models.layers import SHORT_SEQUENCE
from minirlhf.rl.logprobs import LOGITS_IN_CACHE, LOGITS_PER_CHUNK
from minirlhf.rl.rollout import Rollout
from minirlhf.rl.trainer import PPOTrainer

FP32 = 4  # bytes
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that PPO needs.

    weights: of policy and reference, with the policy's gradients and the two moments of Adam.
    rollout: the record of one batch.
    generation, scoring, update: what each phase has alive besides; they follow each other, so the largest counts.
    """

    weights: int
    rollout: int
    generation: int
    scoring: int
    update: int

    @property
    def total(self) -> int:
        """Bytes at the worst moment of a run."""
        return self.weights + self.rollout + max(self.generation, self.scoring, self.update)

    @property
    def largest(self) -> str:
        """The name of the largest part."""
        return max(dataclasses.asdict(self).items(), key=lambda part: part[1])[0]


def estimate(trainer: PPOTrainer, batch_size: int, prompt_length: int, gen_len: int, micro_batch: int) -> MemoryNeed:
    """The need of B = `batch_size` sequences of P = `prompt_length` and R = `gen_len` tokens, F = `micro_batch`.

    With e bytes an activation (4; 2 under autocast), W bytes of weights, n(rows) = min(rows R, 2^25 / V) tokens whose
    logits are alive at once (2^22 in scoring on a CPU), s = 40 (14 without top-k and top-p), and a = 2 nh T where
    attention keeps its weights (short sequences on a CPU), else T for its mask:

        weights    = 4 W_policy + W_reference
        rollout    = B (17 T + (26 + V / 8) R)
        generation = B (2 L C T e + max(s V, P (12 C + 2 nh P) e))  key/value cache; sampling, or the prompt before it
        scoring    = 13 S T C e + 30 n(S) V
        update     = F T (L + 1) (16 C + a) e + 14 n(F) V + 4 C V   one layer more for its backward pass; d wte

    Where a CUDA graph decodes, its cache stays: 2 B L C e for each of T columns, rounded up to a
    multiple of 64, is added to the rollout.
    With `checkpoint_activations`, F T (L C + 2 (16 C + a)) e of activations in the update.
    Autocast adds a copy of the policy's weights in 2 bytes to each phase.
    The factors count the tensors of the code, for the worst case; measurements lie at 55% to 105% of the formula.
    """
    model, T = trainer.policy.decoder, prompt_length + gen_len
    heads, C, V = model.n_heads, model.width, model.vocab_size
    L = len(model.blocks)
    S, F = min(trainer.models.scoring_batch_size, batch_size), min(micro_batch, batch_size)
    reduced = trainer.precision.name in SIXTEEN_BITS
    e = 2 if reduced else FP32
    plain = trainer.device.type == "cpu" and T <= SHORT_SEQUENCE
    attention = 2 * heads * T if plain else T
    block = 16 * C + attention
    kept = L * C + 2 * block if trainer.config.checkpoint_activations else (L + 1) * block
    scored_at_once = LOGITS_IN_CACHE if trainer.device.type == "cpu" else LOGITS_PER_CHUNK
    sampling = 40 if trainer.config.sampling.truncates else 14

    def logits(rows: int, chunk: int = LOGITS_PER_CHUNK) -> int:
        return min(rows * gen_len, max(1, chunk // V)) * V

    graph = 0
    if trainer.models.graphed is not None:
        graph = batch_size * 2 * L * C * -(-(T - 1) // COLUMNS) * COLUMNS * e
    prompt = prompt_length * (12 * C + plain * 2 * heads * prompt_length)
    weights = weight_bytes(trainer.policy)
    copies = reduced * weights // 2
    return MemoryNeed(
        weights=4 * weights + weight_bytes(trainer.reference),
        rollout=batch_size * (17 * T + (26 + V // 8) * gen_len) + graph,
        generation=batch_size * (2 * L * C * T * e + max(sampling * V, prompt * e)) + copies,
        scoring=13 * S * T * C * e + 30 * logits(S, scored_at_once) + copies,
        update=F * T * kept * e + 14 * logits(F) + FP32 * C * V + copies,
    )


def measure(trainer: PPOTrainer, rollout: Rollout) -> dict[str, int]:
    """Bytes alive at the peak of each phase for the sequences of a rollout, all in one pass.

    The trainer's gradients are made and cleared.
    """
    R, precision = rollout.response_mask.size(1), trainer.precision
    prompts = [trainer.tokenizer.encode_prompt(prompt) for prompt in rollout.prompts]

    def generation() -> None:
        generator = torch.Generator(trainer.device).manual_seed(0)
        with precision.autocast():
            generate(
                trainer.policy.decoder,
                prompts,
                R,
                trainer.config.sampling,
                generator=generator,
                keep_sampling_sets=True,
            )

    def scoring() -> None:
        with torch.no_grad(), precision.autocast():
            logprobs(trainer, rollout, trainer.reference)

    def update() -> None:
        with torch.enable_grad(), precision.autocast():
            scored = logprobs(trainer, rollout)
            values = 0.0 if scored.values is None else scored.values
            loss = (scored.logprobs + scored.entropy + values).sum()
        loss.backward()

    update()  # now the gradients are there, as for every micro-batch but the first
    measured = {phase.__name__: peak_memory(phase, trainer.device) for phase in (generation, scoring, update)}
    trainer.policy.zero_grad(set_to_none=True)
    return measured


def extrapolate(measured: Mapping[str, int], small: MemoryNeed, full: MemoryNeed) -> MemoryNeed:
    """`full` with each phase scaled by what was measured over what the formula says of the same `small` batch."""
    scaled = {phase: int(getattr(full, phase) * bytes / getattr(small, phase)) for phase, bytes in measured.items()}
    return dataclasses.replace(full, **scaled)


def weight_bytes(model: ActorCritic | Decoder) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def peak_memory(work: Callable[[], None], device: torch.device) -> int:
    """The most bytes of tensors on a device that were made by `work` and alive at once.

    Counted from the operations themselves, on a CPU as on a GPU; what a kernel allocates for itself is not seen.
    """
    with _LiveTensors(device) as live:
        work()
    return live.peak


class _LiveTensors(TorchDispatchMode):
    """Follows every storage that an operation makes until it is freed."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device_type = device.type
        self.sizes: dict[int, int] = {}  # address -> bytes
        self.now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {storage.data_ptr() for storage in self._storages((args, kwargs))}
        for storage in self._storages(result):
            address = storage.data_ptr()
            if address and address not in given and address not in self.sizes:  # neither a view nor in place
                self.sizes[address] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, address).atexit = False
        return result

    def _storages(self, values: Any) -> list[torch.UntypedStorage]:
        tensors = [x for x in tree_leaves(values) if isinstance(x, Tensor)]
        return [x.untyped_storage() for x in tensors if x.device.type == self.device_type]

    def _freed(self, address: int) -> None:
        self.now -= self.sizes.pop(address)


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still have on a device; None where the system does not say.

    A GPU: what is free, and what PyTorch's allocator holds unused. A CPU: MemAvailable of Linux, within the limit of
    the control group (containers); elsewhere the free pages of sysconf.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = [x for x in (_meminfo(), _cgroup_room()) if x is not None]
    return min(found) if found else _free_pages()


def _meminfo() -> int | None:
    try:
        lines = MEMINFO.read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None


def _cgroup_room() -> int | None:
    """Bytes up to the limit of the control group; file pages that can be dropped count as free."""
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        return limit - used + int(stat.get("inactive_file", 0))
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _free_pages() -> int | None:
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
