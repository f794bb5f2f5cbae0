"""The memory that PPO needs, by a formula, and what the device has.

Shapes: B sequences an iteration, F a micro-batch, S a scoring pass, P longest prompt, R new tokens, T = P + R,
L layers, C width, nh heads, K width of the keys of a token, V vocabulary.

Left out: the reward function's own memory, the CUDA context, and what an allocator loses between its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from minirlhf.device.precision import SIXTEEN_BITS
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.models.layers import SHORT_SEQUENCE
from minirlhf.models.static_decode import COLUMNS
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.logprobs import LOGITS_IN_CACHE, LOGITS_PER_CHUNK
from minirlhf.rl.trainer import PPOTrainer

FP32 = 4  # bytes
CGROUP = Path("/sys/fs/cgroup")
MEMINFO = Path("/proc/meminfo")


def estimate(
    trainer: PPOTrainer, batch_size: int, prompt_length: int, gen_len: int, micro_batch: int
) -> dict[str, int]:
    """`planned` for the models and settings of a trainer."""
    models = trainer.models
    return planned(
        trainer.policy, trainer.reference, trainer.config, (batch_size, prompt_length, gen_len, micro_batch),
        trainer.device.type, trainer.precision.name, models.scoring_batch_size, models.graphed is not None,
    )  # fmt: skip


def planned(
    policy: ActorCritic,
    reference: Decoder,
    config: PPOConfig,
    sizes: tuple[int, int, int, int],
    device: str,
    precision: str,
    scoring_batch_size: int = 128,
    graphed: bool = False,
) -> dict[str, int]:
    """Bytes by part, for sizes (B, P, R, F). The models may be without memory, as `shapes_only` builds them.

    weights: of policy and reference, with the policy's gradients and the two moments of Adam. rollout: the record of
    one batch. generation, scoring, update: what each phase has alive besides; they follow each other.

    With e bytes an activation (4; 2 under autocast), W bytes of weights, n(rows) = min(rows R, 2^25 / V) tokens whose
    logits are alive at once (2^22 in scoring on a CPU), s = 40 (14 without top-k and top-p), b and p the decoder's
    `block_width` and `pass_width` (16 C and 12 C for GPT-2), and a = 2 nh T where attention keeps its weights (short
    sequences on a CPU), else T for its mask:

        weights    = 4 W_policy + W_reference
        rollout    = B (17 T + (26 + V / 8) R)
        generation = B (2 L K T e + max(s V, P (p + 2 nh P) e))  key/value cache; sampling, or the prompt before it
        scoring    = S T (p + C) e + 30 n(S) V
        update     = F T (L + 1) (b + a) e + 14 n(F) V + 4 C V   one layer more for its backward pass; d wte

    Where a CUDA graph decodes, its cache stays: 2 B L K e for each of T columns, rounded up to a
    multiple of 64, is added to the rollout.
    With `checkpoint_activations`, F T (L C + 2 (b + a)) e of activations in the update.
    Autocast adds a copy of the policy's weights in 2 bytes to each phase.
    The factors count the tensors of the code, for the worst case; measurements lie at 55% to 105% of the formula.
    """
    model, (batch_size, prompt_length, gen_len, micro_batch) = policy.decoder, sizes
    heads, C, V, T = model.n_heads, model.width, model.vocab_size, prompt_length + gen_len
    L, K = len(model.blocks), model.kv_heads * model.head_size
    S, F = min(scoring_batch_size, batch_size), min(micro_batch, batch_size)
    reduced = precision in SIXTEEN_BITS
    e = 2 if reduced else FP32
    plain = device == "cpu" and T <= SHORT_SEQUENCE
    block = model.block_width + (2 * heads * T if plain else T)
    kept = L * C + 2 * block if config.checkpoint_activations else (L + 1) * block
    scored_at_once = LOGITS_IN_CACHE if device == "cpu" else LOGITS_PER_CHUNK
    sampling = 40 if config.sampling.truncates else 14

    def logits(rows: int, chunk: int = LOGITS_PER_CHUNK) -> int:
        return min(rows * gen_len, max(1, chunk // V)) * V

    graph = batch_size * 2 * L * K * -(-(T - 1) // COLUMNS) * COLUMNS * e if graphed else 0
    prompt = prompt_length * (model.pass_width + plain * 2 * heads * prompt_length)
    weights = weight_bytes(policy)
    copies = reduced * weights // 2
    return {
        "weights": 4 * weights + weight_bytes(reference),
        "rollout": batch_size * (17 * T + (26 + V // 8) * gen_len) + graph,
        "generation": batch_size * (2 * L * K * T * e + max(sampling * V, prompt * e)) + copies,
        "scoring": (model.pass_width + C) * S * T * e + 30 * logits(S, scored_at_once) + copies,
        "update": F * T * kept * e + 14 * logits(F) + FP32 * C * V + copies,
    }


def total(need: Mapping[str, int]) -> int:
    """Bytes at the worst moment of a run, from those of its parts; of the phases the largest counts."""
    return need["weights"] + need["rollout"] + max(need[phase] for phase in ("generation", "scoring", "update"))


def weight_bytes(model: ActorCritic | Decoder) -> int:
    """Bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def available_memory(device: torch.device) -> int | None:
    """Bytes that this process can still have on a device; None where the system does not say.

    A GPU: what is free, and what PyTorch's allocator holds unused. A CPU: MemAvailable of Linux, within the limit of
    the control group (containers).
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        lines = MEMINFO.read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
    try:
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return free
    return min(free, limit - used + int(stat.get("inactive_file", 0)))  # file pages that can be dropped count as free
