"""The memory that PPO needs with common models, by the doctor's formula: the table of docs/models.md.

    python examples/benchmark/memory_of_models.py

No weights are needed or made: the formula reads shapes. The sizes are those of the published config.json files.
"""

from collections.abc import Callable
from typing import Any

from minirlhf import GPT2, ActorCritic, Decoder, GPT2Config, Llama, LlamaConfig, PPOConfig
from minirlhf.evaluation.doctor.memory import planned, total
from minirlhf.evaluation.doctor.run_checks import FULL
from minirlhf.models.layers import shapes_only
from minirlhf.models.lora import adapters_off, add_lora

CARDS = (8, 16, 24, 80)  # GiB
BATCH, PROMPT, RESPONSE, MICRO_BATCH = 64, 128, 128, 4
GIB = 2**30


def llama(
    kind: str, V: int, C: int, inner: int, layers: int, heads: int, kv_heads: int, size: int | None = None
) -> Llama:
    """A model of Llama's family with a tied head and 2,048 positions, which take no memory."""
    return Llama(LlamaConfig(kind, V, C, inner, layers, heads, kv_heads, size, tie_word_embeddings=True))


def gpt2(C: int, layers: int, heads: int) -> GPT2:
    return GPT2(GPT2Config(50257, 1024, C, layers, heads))


MODELS: dict[str, Callable[[], Decoder]] = {
    "MiniMind2-small": lambda: llama("llama", 6400, 512, 1408, 8, 8, 2),
    "MiniMind2": lambda: llama("llama", 6400, 768, 2048, 16, 8, 2),
    "GPT-2": lambda: gpt2(768, 12, 12),
    "SmolLM2-135M": lambda: llama("llama", 49152, 576, 1536, 30, 9, 3),
    "GPT-2 medium": lambda: gpt2(1024, 24, 16),
    "SmolLM2-360M": lambda: llama("llama", 49152, 960, 2560, 32, 15, 5),
    "Qwen2.5-0.5B": lambda: llama("qwen2", 151936, 896, 4864, 24, 14, 2),
    "Qwen3-0.6B": lambda: llama("qwen3", 151936, 1024, 3072, 28, 16, 8, 128),
    "Llama-3.2-1B": lambda: llama("llama", 128256, 2048, 8192, 16, 32, 8, 64),
    "Qwen2.5-1.5B": lambda: llama("qwen2", 151936, 1536, 8960, 28, 12, 2),
    "SmolLM2-1.7B": lambda: llama("llama", 49152, 2048, 8192, 24, 32, 32),
}


# Column of the table -> settings, in the order in which they would be tried.
WAYS: dict[str, dict[str, Any]] = {
    "needs, GiB": {},
    "with checkpointing": dict(checkpoint_activations=True),
    "LoRA": dict(lora=dict(rank=8)),
    "LoRA, base in bf16": dict(lora=dict(rank=8, base_dtype="bf16")),
}
FITS = ("yes", "checkpointing", "LoRA", "LoRA, bf16")


def gib(make: Callable[[], Decoder], model: Decoder, reference: Decoder, settings: dict[str, Any]) -> float:
    """What PPO of this policy with a reference of the same shape needs, on a GPU, in bf16 over fp32 weights."""
    config = PPOConfig(batch_size=BATCH, gen_len=RESPONSE, forward_batch_size=MICRO_BATCH, **settings)
    if config.lora is not None:
        with shapes_only():
            model = make()
        model.base_hash = "of no weights"
        add_lora(model, config.lora)
        reference = adapters_off(model)
    sizes = (BATCH, PROMPT, RESPONSE, MICRO_BATCH)
    return total(planned(ActorCritic(model), reference, config, sizes, "cuda", "bf16", scoring_batch_size=1024)) / GIB


def main() -> None:
    cards = " | ".join(f"{card} GB" for card in CARDS)
    print(f"| model | parameters, M | {' | '.join(WAYS)} | {cards} |")
    print(f"|---|---|{'---|' * (len(WAYS) + len(CARDS))}")
    for name, make in MODELS.items():
        with shapes_only():
            pair = make(), make()
        count = sum(p.numel() for p in pair[0].parameters()) / 1e6
        needs = [gib(make, *pair, settings) for settings in WAYS.values()]
        fits = [
            next((way for way, need in zip(FITS, needs, strict=True) if need <= FULL * card), "no") for card in CARDS
        ]
        print(f"| {name} | {count:,.0f} | {' | '.join(f'{need:.1f}' for need in needs)} | {' | '.join(fits)} |")


if __name__ == "__main__":
    main()
