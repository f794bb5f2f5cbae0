"""On paper: how one iteration of PPO scales over data-parallel GPUs, what limits it, and the memory a GPU.

    python examples/benchmark/scaling_model.py                 # tables for 8, 64 and 1,024 GPUs
    python examples/benchmark/scaling_model.py --measure 2     # the model's all-reduce against local CPU processes

Nothing here was measured on GPUs. The assumptions are the defaults of `Machine` and `Work`; change them there. The
terms, P parameters, W processes:

    all-reduce   2 (W - 1) / W * 4 P / bandwidth: fp32 gradients in a ring, one exchange an optimizer step
    arithmetic   2 P operations a token and forward pass, 6 P with the backward pass, at a share of the peak
    generation   R times the weights read from memory, whatever W is, or its arithmetic if that takes longer
    gather       the rollout of all rows, to each process
    memory       weights, gradients, two moments of Adam, the exchange buffer and the reference, on every GPU; fully
                 sharded, W of them share one of each, and have policy and reference whole, in 16 bits, to sample
"""

import argparse
import dataclasses
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from minirlhf.common.printing import markdown_table, show
from minirlhf.device.processes import processes
from shared import run_script

MODELS = {"GPT-2 124 M": 124e6, "GPT-2 1.5 B": 1.5e9, "7 B": 7e9}
SIZES = (8, 64, 1024)


@dataclass(frozen=True)
class Machine:
    """Of one GPU, by default an H100, 8 to a node; rates in bytes and operations a second."""

    flops: float = 990e12  # dense bf16, as its data sheet says
    reached: float = 0.4  # share of it that matrix products of a training reach
    memory_bandwidth: float = 3.3e12
    memory: float = 80e9

    def ring(self, W: int) -> float:
        """Bandwidth of a ring over W GPUs: NVLink within a node, then a network that gets slower as it grows."""
        return 300e9 if W <= 8 else 200e9 if W <= 64 else 150e9


@dataclass(frozen=True)
class Work:
    """One iteration: rows of prompt + response tokens, sampled once, trained on in `epochs` epochs of minibatches."""

    rows: int = 512
    prompt: int = 64
    response: int = 256
    minibatch: int = 512
    epochs: int = 4

    @property
    def tokens(self) -> int:
        """Of the whole batch."""
        return self.rows * (self.prompt + self.response)

    @property
    def optimizer_steps(self) -> int:
        """Of the iteration."""
        return self.epochs * -(-self.rows // self.minibatch)


@dataclass(frozen=True)
class Seconds:
    """Of each part of an iteration, on W GPUs."""

    generation: float
    scoring: float
    gather: float
    update: float
    all_reduce: float

    @property
    def total(self) -> float:
        """Of the iteration; nothing overlaps."""
        return sum(dataclasses.astuple(self))

    @property
    def limit(self) -> str:
        """The part that takes longest."""
        return max(vars(self), key=lambda name: getattr(self, name)).replace("_", "-")


def all_reduce_seconds(parameters: float, W: int, bandwidth: float) -> float:
    """A ring all-reduce of fp32 gradients: each process sends and gets 2 (W - 1) / W of the bytes."""
    return 2 * (W - 1) / W * 4 * parameters / bandwidth


def iteration(parameters: float, W: int, work: Work, machine: Machine) -> Seconds:
    """The seconds of an iteration whose rows are split over W GPUs."""
    rate = machine.flops * machine.reached
    rows = -(-work.rows // W)  # of the process with most of them
    tokens = rows * (work.prompt + work.response)
    read = 2 * parameters / machine.memory_bandwidth  # bf16 weights, once a token and batch
    decode = work.response * max(read, 2 * parameters * rows / rate)
    bytes_gathered = work.rows * (8 * (work.prompt + work.response) + 8 + 24 * work.response)
    return Seconds(
        generation=decode + 2 * parameters * rows * work.prompt / rate,
        scoring=2 * 2 * parameters * tokens / rate,  # policy and reference
        gather=bytes_gathered * (W - 1) / W / machine.ring(W),
        update=6 * parameters * work.optimizer_steps * -(-work.minibatch // W) * (work.prompt + work.response) / rate,
        all_reduce=work.optimizer_steps * all_reduce_seconds(parameters, W, machine.ring(W)),
    )


def memory(parameters: float, W: int, sharded: bool) -> float:
    """Bytes a GPU without activations: fp32 weights, gradients, two moments, exchange buffer and reference."""
    if sharded:  # between updates, when there are no gradients; there is no flat buffer
        return (4 + 8 + 4) * parameters / W + (2 + 2) * parameters
    return (4 + 4 + 8 + 4 + 4) * parameters


def efficiency(parameters: float, W: int, work: Work, machine: Machine, weak: bool) -> float:
    """The share of W times one GPU's rate; weak: the work grows with W, else it stays."""
    grown = dataclasses.replace(work, rows=work.rows * W, minibatch=work.minibatch * W) if weak else work
    one = iteration(parameters, 1, work, machine).total
    return one / iteration(parameters, W, grown, machine).total / (1 if weak else W)


def tables(work: Work, machine: Machine) -> str:
    """Markdown: seconds, efficiency and memory of each model and number of GPUs."""
    head = ["model", "GPUs", "all-reduce, ms", "iteration, s", "limited by", "strong", "weak", "GB a GPU",
            "GB fully sharded"]  # fmt: skip
    rows = []
    for name, P in MODELS.items():
        for W in SIZES:
            found = iteration(P, W, work, machine)
            rows.append([
                name, f"{W:,}", f"{1000 * all_reduce_seconds(P, W, machine.ring(W)):.1f}", f"{found.total:.2f}",
                found.limit, *(f"{efficiency(P, W, work, machine, weak):.0%}" for weak in (False, True)),
                *(f"{memory(P, W, sharded) / 1e9:.1f}" for sharded in (False, True)),
            ])  # fmt: skip
    return markdown_table(head, rows)


# ---- against local processes ----------------------------------------------------------------------------------------


def measure(W: int, port: int, rank: int = 0) -> None:
    """Print the time of `Processes.sum_` for several sizes, and what the model makes of the largest one's bandwidth."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(W), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    group, found = processes(), {}
    for size in (2**25, 2**23, 2**21, 2**19):
        x, times = torch.zeros(size), []
        for _ in range(5):
            group.gather("ready", None)
            start = time.perf_counter()
            group.sum_([x])
            times.append(time.perf_counter() - start)
        found[size] = min(times[1:])
    largest = max(found)
    bandwidth = 2 * (W - 1) / W * 4 * largest / found[largest]
    rows = [
        [f"{size:,}", f"{1000 * seconds:.1f}", f"{1000 * all_reduce_seconds(size, W, bandwidth):.1f}"]
        for size, seconds in found.items()
    ]
    if group.first:
        show(f"{W} processes, {bandwidth / 1e9:.2f} GB/s at the largest size")
        show(markdown_table(["parameters", "measured, ms", "model, ms"], rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", type=int, metavar="W", help="time the all-reduce of W local processes")
    for field in dataclasses.fields(Work):
        name = f"--{field.name}"
        parser.add_argument(name, type=int, default=field.default, help=f"Work.{field.name} (default %(default)s)")
    args = parser.parse_args()
    if args.measure is None:
        show(tables(Work(*(getattr(args, field.name) for field in dataclasses.fields(Work))), Machine()))
        return
    if args.measure < 2:
        raise ValueError(f"--measure must be at least 2, got {args.measure}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    started = [spawn.Process(target=measure, args=(args.measure, port, rank)) for rank in range(args.measure)]
    for process in started:
        process.start()
    for process in started:
        process.join()


if __name__ == "__main__":
    run_script(main)
