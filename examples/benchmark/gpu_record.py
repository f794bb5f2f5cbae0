"""Everything that has to be seen on a GPU once: the tests that need one, graphed decoding against plain, the benchmark.

    PYTHONPATH=examples python -m benchmark.gpu_record [--output FILE]       # `make gpu`

Writes a dated record with the hardware to docs/gpu/. Ends with an error if there is no GPU, or if a test failed.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmark import report
from benchmark.work import Work, autocast
from minirlhf import GPT2, GraphedDecoder, SamplingConfig, generate
from minirlhf.common.printing import show
from minirlhf.io.files import atomic_write
from shared import command_line, run_script

REPO = Path(__file__).resolve().parents[2]
PRECISIONS = ("fp32", "bf16")


def main() -> None:
    name = REPO / "docs" / "gpu" / f"{time.strftime('%Y-%m-%d')}.md"
    args = command_line(__doc__, output=(str(name), "file of the record")).parse_args()
    if not torch.cuda.is_available():
        raise ValueError("PyTorch finds no GPU on this machine")
    device = torch.device("cuda")
    tests = outcome([sys.executable, "-m", "pytest", "-m", "gpu", "-n", "0", "-o", "addopts=", "-q", "tests"])
    show(tests[1])
    model = Work().gpt2().to(device)
    rows = [{"precision": precision, **parity(model, Work().lengths().prompts, precision)} for precision in PRECISIONS]
    output = REPO / "runs" / "gpu-benchmark"
    timed = outcome([sys.executable, "examples/benchmark", "--device", "cuda", "--precision", *PRECISIONS,
                     "--against", "transformers", "--output", str(output)])  # fmt: skip
    table = (output / "report.md").read_text(encoding="utf-8") if timed[0] else timed[1]
    text = record(report.machine(device), tests, rows, table)
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    atomic_write(args.output, text.encode())
    show(f"{text}\nwritten to {args.output}")
    if not tests[0] or not timed[0]:
        raise ValueError("a test or the benchmark failed; the record has its last lines")


def outcome(command: list[str]) -> tuple[bool, str]:
    """Whether a command of this repository ends well, and the last lines that it prints."""
    done = subprocess.run(command, cwd=REPO, capture_output=True, encoding="utf-8", errors="replace")
    return done.returncode == 0, "\n".join((done.stdout + done.stderr).strip().split("\n")[-20:])


def parity(model: GPT2, prompts: list[list[int]], precision: str, new_tokens: int = 16) -> dict[str, float]:
    """Samples from the same random numbers, decoded by replays of a graph and plainly.

    Returns the share of equal tokens, the largest difference of log-probabilities of tokens up to a row's first
    unequal one (nats), and the seconds of both.
    """
    device = next(model.parameters()).device
    found, seconds = [], []
    for graphed in (None, GraphedDecoder()):
        for _ in range(2):  # the first captures the graph
            start, generator = time.perf_counter(), torch.Generator(device).manual_seed(0)
            with autocast(device, precision):
                sampled = generate(model, prompts, new_tokens, SamplingConfig(top_p=0.95), generator=generator,
                                   graphed=graphed)  # fmt: skip
            same = sampled.tokens.cpu(), sampled.logprobs.cpu()  # waits for the GPU
        found.append(same)
        seconds.append(time.perf_counter() - start)
    (tokens, logprobs), (others, other_logprobs) = found
    equal = tokens[:, -new_tokens:] == others[:, -new_tokens:]
    before = equal.long().cumprod(-1).bool()
    difference = (logprobs - other_logprobs).abs()[before]
    return {"equal tokens": equal.double().mean().item(), "largest difference, nats": difference.max().item(),
            "plain s": seconds[0], "graphed s": seconds[1]}  # fmt: skip


def record(machine: dict[str, object], tests: tuple[bool, str], rows: list[dict[str, object]], benchmark: str) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if value not in ([], None))
    return (
        f"# On a GPU, {time.strftime('%Y-%m-%d')}\n\n`make gpu` ran the tests that need a GPU, decoded the same batch "
        f"with and without a CUDA graph, and timed one iteration of PPO. {facts}.\n\n## Tests\n\n"
        f"{'All passed.' if tests[0] else '**Some failed.**'}\n\n```text\n{tests[1]}\n```\n\n## Graphed against plain "
        f"decoding\n\n{report.table(rows)}\n\n## Benchmark\n\n{benchmark}\n"
    )


if __name__ == "__main__":
    run_script(main)
