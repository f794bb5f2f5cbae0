"""The least that an iteration of PPO costs: operations, bytes, and the rates of this machine.

The operations are those of matrix products, 2 m k n for (m, k) @ (k, n), in an implementation that computes nothing
twice: a key/value cache, a prompt that occurs n times computed once, attention over the tokens before only, the LM head
at response tokens only, no padding. Softmax, LayerNorm, activations, sampling and Python are not counted. Bytes are
those that must come from memory at least once: weights, the key/value cache, and the state of Adam. The longer of the
two times is the bound.

In fp32 the old log-probabilities are by-products of the decode. In 16 bits they would differ from those of the update's
forward pass by a few hundredths of a nat, so a pass of the policy is counted there.
"""

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minirlhf import BertConfig, GPT2Config

ADAM_BYTES = 28  # a parameter: weight, gradient and two moments read, weight and moments written, 4 bytes each
DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Cost:
    """Operations of matrix products, and bytes moved meanwhile."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class Rates:
    """What the machine can do: operations a second in matrix products, and bytes a second read and written."""

    flop: float
    bytes: float

    def seconds(self, costs: Sequence[Cost]) -> float:
        """The time of these costs one after the other, each bounded by its arithmetic or its memory."""
        return sum(max(cost.flop / self.flop, cost.bytes / self.bytes) for cost in costs)


@dataclass(frozen=True)
class Batch:
    """Prompts as token ids, how many tokens follow each, and how many tokens the classifier reads of each text."""

    prompts: Sequence[Sequence[int]]
    responses: Sequence[int]
    texts: Sequence[int]

    @property
    def tokens(self) -> int:
        """Real tokens, of prompts and responses."""
        return sum(map(len, self.prompts)) + sum(self.responses)


# ---- operations -----------------------------------------------------------------------------------------------------


def gpt2_flop(c: GPT2Config, tokens: float, pairs: float, logits: float) -> float:
    """Operations of a forward pass: tokens through the layers, (query, key) pairs a head, rows of the LM head."""
    matrices = 4 * c.n_embd**2 + 2 * c.n_embd * (c.n_inner or 4 * c.n_embd)
    return 2 * c.n_layer * (tokens * matrices + 2 * pairs * c.n_embd) + 2 * logits * c.n_embd * c.vocab_size


def bert_flop(c: BertConfig, lengths: Sequence[int]) -> float:
    """Operations of classifying texts of these lengths: layers, attention, pooler, classes."""
    matrices = 4 * c.hidden_size**2 + 2 * c.hidden_size * c.intermediate_size
    layers = sum(n * matrices + 2 * n * n * c.hidden_size for n in lengths)
    return 2 * c.num_hidden_layers * layers + 2 * len(lengths) * c.hidden_size * (c.hidden_size + len(c.id2label))


def context(batch: Batch, times: Callable[[int], float] = lambda rows: 1.0) -> tuple[float, float]:
    """Tokens and (query, key) pairs before the last token of each row, whose own state predicts nothing.

    times: the number of rows with a prompt -> how often that prompt is computed.
    """
    tokens = pairs = 0.0
    for prompt, rows in Counter(map(tuple, batch.prompts)).items():
        tokens += times(rows) * len(prompt)
        pairs += times(rows) * len(prompt) * (len(prompt) + 1) / 2
    for prompt, new in zip(batch.prompts, batch.responses, strict=True):
        tokens += new - 1
        pairs += (new - 1) * len(prompt) + (new - 1) * new / 2
    return tokens, pairs


def minibatches_with(rows: int, batch_size: int, minibatch_size: int) -> float:
    """How many minibatches of a random order hold at least one of these rows, on average."""
    sizes = [min(minibatch_size, batch_size - start) for start in range(0, batch_size, minibatch_size)]
    return sum(1 - math.comb(batch_size - rows, size) / math.comb(batch_size, size) for size in sizes)


def phase_costs(
    gpt2: GPT2Config, bert: BertConfig | None, batch: Batch, precision: str, epochs: int, minibatch: int
) -> dict[str, list[Cost]]:
    """The costs of each phase of an iteration, by the phase's name; without a classifier no "score"."""
    width = DTYPES[precision].itemsize
    parameters = gpt2_parameters(gpt2)
    read = width * (parameters - gpt2.n_positions * gpt2.n_embd)  # positions are looked up, a row a token
    tokens, pairs = context(batch)
    distinct, new = len(set(map(tuple, batch.prompts))), sum(batch.responses)
    cache = 2 * gpt2.n_layer * gpt2.n_embd * width * pairs
    drawn = new - len(batch.prompts) + distinct  # rows of logits that are sampled from
    one_pass = Cost(gpt2_flop(gpt2, tokens, pairs, new), read)

    rows = len(batch.prompts)
    steps = epochs * -(-rows // minibatch)
    shared = context(batch, lambda n: minibatches_with(n, rows, minibatch))
    trained = Cost(3 * epochs * gpt2_flop(gpt2, *shared, new), 3 * steps * read)  # forward, and twice that backward
    adam = Cost(0, steps * parameters * (ADAM_BYTES + (0 if width == 4 else width)))

    costs = {
        "generate": [Cost(gpt2_flop(gpt2, tokens, pairs, drawn), max(batch.responses) * read + cache)],
        "passes": [one_pass] * (1 if width == 4 else 2),
        "update": [trained, adam],
    }
    if bert is not None:
        costs["score"] = [Cost(bert_flop(bert, batch.texts), width * bert_parameters(bert))]
    costs["step"] = costs["passes"] + costs["update"]
    costs["iteration"] = [cost for name in ("generate", "score", "step") for cost in costs.get(name, [])]
    return costs


def gpt2_parameters(c: GPT2Config) -> int:
    """Numbers in a GPT-2 with a tied LM head."""
    C, inner = c.n_embd, c.n_inner or 4 * c.n_embd
    layer = 4 * C * C + 4 * C + 2 * C * inner + inner + C + 4 * C  # attention, MLP, two LayerNorms
    return (c.vocab_size + c.n_positions) * C + c.n_layer * layer + 2 * C


def bert_parameters(c: BertConfig) -> int:
    """Numbers in the layers of a BERT that every text passes; its embeddings are looked up, a row a token."""
    C, inner = c.hidden_size, c.intermediate_size
    return c.num_hidden_layers * (4 * C * C + 2 * C * inner + 9 * C + inner) + C * C + C


# ---- rates ----------------------------------------------------------------------------------------------------------


def measure_rates(device: torch.device, precision: str, seconds: float = 1.0, width: int = 768) -> Rates:
    """The best median over a few shapes and libraries, each measured for `seconds`; width: of the model."""
    return Rates(matrix_rate(device, precision, seconds, width), memory_rate(device, seconds, width))


def matrix_rate(device: torch.device, precision: str, seconds: float, width: int) -> float:
    """Operations a second in products of the MLP's shape and of a cube, by the fastest library of the right precision.

    On a CPU 'medium' hands fp32 products to another library, which may be faster, and may round to bf16.
    """
    width *= 4 if device.type == "cuda" else 1
    shapes = [(3 * width, width, 4 * width), (3 * width,) * 3]
    before, dtype = torch.get_float32_matmul_precision(), DTYPES[precision]
    rates = []
    try:
        for way in {"fp32": ("highest", "medium"), "tf32": ("high",)}.get(precision, (before,)):
            torch.set_float32_matmul_precision(way)
            if precision == "fp32" and not _is_exact(device):
                continue
            for m, k, n in shapes:
                a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((m, k), (k, n)))
                out = torch.empty(m, n, device=device, dtype=dtype)
                rates.append(
                    2 * m * k * n / _median_time(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device, seconds)
                )
    finally:
        torch.set_float32_matmul_precision(before)
    return max(rates)


def memory_rate(device: torch.device, seconds: float, width: int) -> float:
    """Bytes a second, read and written, beyond the caches: the faster of a copy and a step of fused Adam."""
    weights = torch.nn.Parameter(torch.ones(57 * width**2 * (1 if device.type == "cpu" else 8), device=device))
    weights.grad = torch.ones_like(weights)
    source, target = weights.detach(), weights.grad
    copy = 2 * source.nbytes / _median_time(lambda: target.copy_(source), device, seconds)
    step = torch.optim.AdamW([weights], lr=1e-6, fused=True).step
    return max(copy, ADAM_BYTES * weights.numel() / _median_time(step, device, seconds))


def with_best(rates: Sequence[Rates]) -> Rates:
    """The best of several measurements: a floor must not rise because the machine was busy."""
    return Rates(*(max(column) for column in zip(*map(dataclasses.astuple, rates), strict=True)))


def _is_exact(device: torch.device) -> bool:
    """Whether fp32 products have fp32's precision with the present setting."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=generator) for _ in range(2))
    error = (a.to(device) @ b.to(device)).cpu().double() - a.double() @ b.double()
    return bool(error.norm() / (a.double() @ b.double()).norm() < 1e-5)


def _median_time(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The median time of at least three calls, after a warm-up call."""
    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        start = now(device)
        work()
        times.append(now(device) - start)
    return statistics.median(times[1:])


def now(device: torch.device) -> float:
    """Seconds by the clock, on a GPU after the queued work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
