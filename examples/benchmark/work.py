"""The work that is timed: models, prompts, and one iteration of PPO by phases, with its time and memory."""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmark.floor import Batch, now
from minirlhf import (
    GPT2,
    BertClassifier,
    BertConfig,
    Decoder,
    GPT2Config,
    Llama,
    LlamaConfig,
    PPOConfig,
    PPOTrainer,
    SentimentReward,
    Tokenizer,
)
from minirlhf.device.precision import Precision
from minirlhf.models.rope import RopeConfig
from shared import PROMPTS  # 3 tokens each, with [CLS]

# Those of the example, then any two of these characters: also 3 tokens each.
PROMPT_POOL = [*dict.fromkeys([*PROMPTS, *map("".join, itertools.product("酒店周围位置前台房间早餐", repeat=2))])]
TINY_BERT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
SIZES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "uer": ({}, {}),  # GPT-2 base and BERT base, the defaults of their configs
    "tiny": (dict(n_embd=32, n_layer=2, n_head=2, n_positions=640), TINY_BERT),
    "gpt2-medium": (dict(vocab_size=50257, n_embd=1024, n_layer=24, n_head=16), TINY_BERT),
    "qwen3-0.6b": (
        dict(
            model_type="qwen3",
            vocab_size=151936,
            hidden_size=1024,
            intermediate_size=3072,
            num_hidden_layers=28,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=True,
            rope_parameters=RopeConfig(rope_theta=1e6),
        ),
        TINY_BERT,
    ),
}


@dataclass(frozen=True)
class Sample:
    """One timing: peer, phase, seconds, peak memory in MB (None if unknown), and the library of fp32 products."""

    peer: str
    phase: str
    seconds: float
    peak_mb: float | None = None
    matmul: str | None = None


@dataclass(frozen=True)
class Work:
    """What to do: models (a name in SIZES, or folders), sequences, new tokens, prompts to draw from, and settings."""

    size: str = "uer"
    policy: str | None = None
    reward: str | None = None
    batch: int = 128
    new_tokens: int = 16
    device: str = "cpu"
    precision: str = "fp32"
    minibatch: int = 16
    different_prompts: int = len(PROMPTS)
    config: dict[str, Any] = dataclasses.field(default_factory=dict)  # more fields of PPOConfig

    @property
    def name(self) -> str:
        """The name of our side in the tables."""
        more = "".join(f" {name}={value}" for name, value in self.config.items())
        return f"minirlhf {self.precision} minibatch {self.minibatch}{more}"

    @property
    def drawn(self) -> list[str]:
        """The prompts that are collected: one a group."""
        return [PROMPT_POOL[i % self.different_prompts] for i in range(self.batch // self.group_size)]

    @property
    def prompts(self) -> list[str]:
        """The prompt of each sequence."""
        return [prompt for prompt in self.drawn for _ in range(self.group_size)]

    @property
    def group_size(self) -> int:
        return self.config.get("group_size", 1)

    def ppo(self, **changes: Any) -> PPOConfig:
        fields = dict(batch_size=self.batch, gen_len=self.new_tokens, top_p=0.95, ppo_epochs=4, device=self.device,
                      precision=self.precision, minibatch_size=self.minibatch)  # fmt: skip
        return PPOConfig.with_overrides(**{**fields, **self.config, **changes})

    def configs(self) -> tuple[GPT2Config, BertConfig]:
        """The configs of policy and classifier."""
        gpt2, bert = (kind(**sizes) for kind, sizes in zip((GPT2Config, BertConfig), SIZES[self.size], strict=True))
        return (gpt2 if self.policy is None else self.gpt2().config,
                bert if self.reward is None else self.bert().config)  # fmt: skip

    def gpt2(self) -> GPT2:
        """A new copy of the policy."""
        if self.policy is not None:
            return GPT2.from_pretrained(self.policy)
        return GPT2(GPT2Config(**SIZES[self.size][0])).eval()

    def decoder(self) -> Decoder:
        """A new copy of the policy, of whichever family."""
        sizes = SIZES[self.size][0]
        if self.policy is None and "model_type" in sizes:
            return Llama(LlamaConfig(**sizes)).eval()
        return self.gpt2()

    def bert(self) -> BertClassifier:
        if self.reward is not None:
            return BertClassifier.from_pretrained(self.reward)
        return BertClassifier(BertConfig(**SIZES[self.size][1])).eval()

    def tokenizers(self) -> tuple[Tokenizer, Tokenizer]:
        """The tokenizers of policy and classifier; for random models a vocabulary of characters."""
        counts = SIZES[self.size][0].get("vocab_size", GPT2Config().vocab_size), BertConfig().vocab_size
        folders = self.policy, self.reward
        return tuple(
            Tokenizer(characters(count)) if folder is None else Tokenizer.from_pretrained(folder)
            for count, folder in zip(counts, folders, strict=True)
        )

    def trainer(self, **changes: Any) -> PPOTrainer:
        """A trainer of new models; changes: of the fields of PPOConfig."""
        config = self.ppo(**changes)
        reference = None if config.adapters_off else self.decoder()
        return PPOTrainer(self.decoder(), reference, self.tokenizers()[0], config)

    def reward_function(self) -> SentimentReward:
        """The classifier, in the precision of the work."""
        options = dict(batch_size=self.batch, device=self.device, precision=self.precision)
        return SentimentReward(self.bert(), self.tokenizers()[1], **options)

    def lengths(self) -> Batch:
        """The batch in tokens: every response has all its tokens, and the texts are as long as they were sampled."""
        tokenizer = self.tokenizers()[0]
        prompts = [tokenizer.encode_prompt(prompt) for prompt in self.prompts]
        new = [self.new_tokens] * self.batch
        return Batch(prompts, new, [len(ids) + n + 1 for ids, n in zip(prompts, new, strict=True)])  # and [SEP]


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The context for a forward pass in this precision over fp32 weights."""
    return Precision(precision, device).autocast()


def characters(count: int) -> list[str]:
    """A vocabulary of BERT's special tokens, printable ASCII and Chinese characters, one token a character."""
    head = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    head += [chr(c) for c in range(33, 127)]
    common, rare = range(0x4E00, 0xA000), range(0x20000, 0x40000)
    return head + [chr(c) for c in itertools.islice(itertools.chain(common, rare), count - len(head))]


def iteration(trainer: PPOTrainer, prompts: Sequence[str], reward: Any, name: str) -> list[Sample]:
    """One batch collected and trained on: a Sample a phase, "step" and "iteration" among them.

    "step" is what TRL's `step` does: passes and update.
    """
    device = trainer.device
    with peak_memory(device) as collecting:
        start = now(device)
        rollout = trainer.collect(prompts, reward)
        middle = now(device)
    with peak_memory(device) as updating:
        trainer.step(rollout)
        end = now(device)
    generate, score, passes = (rollout.seconds[phase] for phase in ("generation", "reward", "scoring"))
    update = end - middle
    first, second = collecting[0], updating[0]
    found = dict(generate=(generate, first), score=(score, first), passes=(passes, first), update=(update, second),
                 step=(passes + update, second), iteration=(end - start, max(first, second)))  # fmt: skip
    library = trainer.precision.matmul if device.type == "cpu" and trainer.config.precision == "fp32" else None
    return [Sample(name, phase, *pair, library) for phase, pair in found.items()]


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[list[float]]:
    """A context that measures peak memory; afterwards the list holds it, in MB.

    On a GPU the memory of tensors; on a CPU the resident set of the process, since its start if the kernel cannot reset
    the peak.
    """
    found: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):  # Linux: forget the peak so far
            Path("/proc/self/clear_refs").write_text("5")
    try:
        yield found
    finally:
        if device.type == "cuda":
            found.append(torch.cuda.max_memory_allocated(device) / 2**20)
        else:
            found.append(resident_peak_mb())


def resident_peak_mb() -> float:
    """The largest resident set of this process, MB."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    import resource  # Windows has none

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024
