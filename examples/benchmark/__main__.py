"""How long PPO takes on this machine, how much memory it needs, and how close that is to what the machine can do.

    python examples/benchmark                                  # one iteration by phases, against its floor
    python examples/benchmark --precision fp32 bf16 --against transformers
    python examples/benchmark --peer-command "python x.py"      # in turns with a command, see peer_trl.py
    python examples/benchmark scaling ragged overhead          # the other tables
    python examples/benchmark lora --size gpt2-medium --batch 16    # all weights trained, or adapters
    python examples/benchmark methods                          # PPO, RLOO and GRPO
    python examples/benchmark --size tiny --quick              # a check that it runs; seconds

The work: a GPT-2 base and a BERT base with random weights (or --policy and --reward), 128 prompts of 3 tokens, 16 new
tokens, top-p .95, 4 epochs; with groups, 32 prompts and 4 responses to each. Prints tables, and writes results.json,
report.md and pictures to --output. A peer command prints a JSON object a line: {"peer": name, "phase": "generate",
"score" or "step", "seconds": 1.5, "peak_mb": 3000}; --json-lines prints the same of ours.
"""

import argparse
import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a folder, Python finds the folder's own files only
from benchmark import report, studies
from benchmark.floor import DTYPES, Rates, measure_rates, phase_costs, with_best
from benchmark.peers import TransformersPeer, Turn, in_turns, run_command
from benchmark.work import PROMPT_POOL, SIZES, Sample, Work, iteration
from minirlhf.common.printing import show
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import Precision
from minirlhf.io.files import atomic_write, write_json
from shared import run_script

TABLES = ("iteration", "scaling", "ragged", "overhead", "lora", "methods")
ADAPTERS = {"rank": 8, "alpha": 16}
GROUPS = {"group_size": 4, "whiten_advantages": False, "adaptive_kl": False}
K3 = {"kl_estimator": "k3", "kl_placement": "loss"}
# What the tables `lora` and `methods` compare: settings of PPOConfig by the name of a row.
WAYS: dict[str, dict[str, dict[str, Any]]] = {
    "lora": {
        "all weights": {},
        "all weights, checkpointed": {"checkpoint_activations": True},
        "LoRA": {"lora": ADAPTERS},
        "LoRA, base in bf16": {"lora": {**ADAPTERS, "base_dtype": "bf16"}},
        "LoRA, checkpointed": {"lora": ADAPTERS, "checkpoint_activations": True},
    },
    # In as many optimizer steps: the methods without a value head have one pass over a batch in their presets.
    "methods": {
        "PPO": {},
        "RLOO": {**GROUPS, "advantages": "rloo"},
        "GRPO": {**GROUPS, **K3, "advantages": "grpo", "loss_averaging": "sequences"},
    },
}


def main() -> None:
    args = read_arguments()
    resolve_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    works = [work_of(args, precision) for precision in args.precision]
    for work in works:  # errors come before anything is timed
        work.ppo(), work.lengths(), Precision(work.precision, torch.device(args.device))
    if args.json_lines:
        for work in works:
            for sample in Ours(work).repeat(args.repeats):
                print(json.dumps(dataclasses.asdict(sample)), flush=True)
        return
    report.figure()  # fail now, not after the timings, if matplotlib is missing
    result: dict[str, Any] = {
        "command": shlex.join(["python", "examples/benchmark", *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": report.machine(torch.device(args.device)),
        "work": {n: v for n, v in vars(works[0]).items() if n != "precision" and v not in (None, {})},
    }
    if "iteration" in args.tables:
        result |= time_iteration(works, args)
    work = works[0]
    quick = args.quick
    if "scaling" in args.tables:
        batches, lengths = ((4, 8), (8, 16)) if quick else ((8, 16, 32, 64, 128), (16, 32, 64, 128, 256, 512))
        result["scaling"] = studies.scaling(work, batches, lengths, rows=2 if quick else 8, repeats=args.repeats)
        result["exponents"] = report.exponents(result["scaling"])
    if "ragged" in args.tables:
        half = dataclasses.replace(work, batch=max(1, work.batch // 2))
        result["ragged"] = studies.ragged(half, args.repeats)
    if "overhead" in args.tables:
        few = dict(iterations=1, batch_size=4, minibatch_size=4) if quick else {}
        result["overhead"] = studies.overhead(args.repeats, device=args.device, **few)
    for table in set(args.tables) & WAYS.keys():
        result[table] = time_ways(work, WAYS[table], args)
    write(result, args.output)


def time_ways(work: Work, ways: dict[str, dict[str, Any]], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each way: median seconds by phase and peak memory, also over those of the first; in turns."""

    def side(name: str, config: dict[str, Any]) -> tuple[str, Any]:
        command = own_command(dataclasses.replace(work, config={**work.config, **config}), args)
        return name, lambda: [dataclasses.replace(sample, peer=name) for sample in run_command(command)]

    turns, _ = in_turns([side(*way) for way in ways.items()], args.repeats, tell)
    rows: dict[str, dict[str, Any]] = {}
    for found in report.summarise([sample for turn in turns for sample in turn.samples]):
        row = rows.setdefault(found["peer"], {"way": found["peer"]})
        row[f"{found['phase']} s"] = found["median s"]
        row["peak MB"] = max(row.pop("peak MB", 0.0), found["peak MB"])  # the last column
    first = next(iter(rows.values()))
    for row in rows.values():
        row |= {"time over the first": row["iteration s"] / first["iteration s"],
                "memory over the first": row["peak MB"] / first["peak MB"]}  # fmt: skip
    return list(rows.values())


def tell(number: int, turn: Turn) -> None:
    """A line on standard error about a turn that is done."""
    shown = ", ".join(f"{s.phase} {s.seconds:.2f} s" for s in turn.samples)
    show(f"turn {number + 1}: {turn.name}: {shown}; {turn.load}", sys.stderr)


def time_iteration(works: Sequence[Work], args: argparse.Namespace) -> dict[str, Any]:
    """Ours and the peers in turns, with rates measured before and after.

    Each side is a process of its own, so that its memory can be measured; only with `--against` ours and transformers
    share one.
    """
    device = torch.device(args.device)
    sides: list[tuple[str, Any]] = []
    for work in works:
        if args.against:
            peer = TransformersPeer(work)
            *batch, _ = peer.collect(work.prompts)  # warms up, as ours does
            if work.device == "cuda":
                peer.step(*batch)
            sides.append((work.name, Ours(work).once))
            sides.append((peer.name, lambda peer=peer, work=work: peer.iteration(work.prompts)))
        else:
            sides.append((work.name, lambda work=work: run_command(own_command(work, args))))
    sides += [(command, lambda command=command: run_command(command)) for command in args.peer_command]

    def measured() -> list[Rates]:
        width, duration = (128, 0.0) if args.quick else (768, 1.0)
        return [measure_rates(device, work.precision, duration, width) for work in works]

    before = measured()
    turns, dropped = in_turns(sides, args.repeats, tell)
    both = zip(before, measured(), strict=True)
    samples = [sample for turn in turns for sample in turn.samples]
    if args.against:  # two peers in one process share its memory
        samples = [dataclasses.replace(sample, peak_mb=None) for sample in samples]
    load = [{"turn": turn.name, "s": turn.seconds, "own cores": turn.load.own_cores,
             "other cores": turn.load.other_cores, "shared": turn.load.shared, "dropped": turn in dropped}
            for turn in turns + dropped]  # fmt: skip
    rates, bounds, floors = {}, {}, {}
    for work, found in zip(works, both, strict=True):
        precision, best = work.precision, with_best(found)
        rates[precision] = dataclasses.asdict(best)
        if work.ppo().lora is None:  # whose passes and optimizer have less to do
            costs = phase_costs(*work.configs(), work.lengths(), precision, work.ppo().ppo_epochs, work.minibatch)
            bounds[precision] = report.bounds(costs, best)
            floors[work.name] = {row["phase"]: row["floor s"] for row in bounds[precision]}
    rows = report.summarise(samples, floors, new_tokens=works[0].batch * works[0].new_tokens)
    names = [work.name for work in works]
    libraries = {sample.peer: sample.matmul for sample in samples if sample.matmul}
    return {"load": load, "products by": libraries, "rates": rates, "bounds": bounds, "iteration": rows,
            "ratios": report.ratios(rows, names),
            "samples": [dataclasses.asdict(sample) for sample in samples]}  # fmt: skip


class Ours:
    """Our side: models made once, then one batch as a warm-up; with training where kernels are compiled first."""

    def __init__(self, work: Work):
        self.work, self.trainer, self.reward = work, work.trainer(), work.reward_function()
        rollout = self.trainer.collect(work.drawn, self.reward)
        if self.trainer.device.type == "cuda" or self.trainer.config.compile:
            self.trainer.step(rollout)

    def once(self) -> list[Sample]:
        return iteration(self.trainer, self.work.drawn, self.reward, self.work.name)

    def repeat(self, times: int) -> list[Sample]:
        return [sample for _ in range(times) for sample in self.once()]


def own_command(work: Work, args: argparse.Namespace) -> list[str]:
    """This script as a process that times `work` once."""
    script = str(Path(__file__).parent)
    command = [sys.executable, script, "--json-lines", "--repeats", "1", "--size", work.size, "--batch", work.batch,
               "--new-tokens", work.new_tokens, "--minibatch", work.minibatch, "--precision", work.precision,
               "--device", work.device, "--different-prompts", work.different_prompts,
               "--threads", args.threads or torch.get_num_threads()]  # fmt: skip
    for name, folder in (("--policy", work.policy), ("--reward", work.reward)):
        command += [name, folder] if folder is not None else []
    changes = [f"{name}={json.dumps(value)}" for name, value in work.config.items()]
    return [str(word) for word in command + (["--config", *changes] if changes else [])]


def write(result: dict[str, Any], output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    text = report.markdown(result)
    show(text)
    write_json(output / "results.json", result)
    atomic_write(output / "report.md", text.encode())
    if "iteration" in result:
        report.draw_phases(result["iteration"], result["bounds"], output / "phases.png")
    if "scaling" in result:
        report.draw_scaling(result["scaling"], output / "scaling.png")
    show(f"saved in {output}", sys.stderr)


def work_of(args: argparse.Namespace, precision: str) -> Work:
    batch = args.batch if not args.quick else min(args.batch, 8)
    return Work(args.size, args.policy, args.reward, batch, args.new_tokens, args.device, precision, args.minibatch,
                args.different_prompts, dict(args.config))  # fmt: skip


def setting(text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value in JSON, or a text as it is."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text!r}")
    return int(text)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(TABLES)}; default iteration")
    parser.add_argument("--size", choices=list(SIZES), default="uer", help="of the random models")
    parser.add_argument("--policy", help="a GPT-2 folder instead of random weights")
    parser.add_argument("--reward", help="a BERT classifier's folder instead of random weights")
    parser.add_argument("--batch", type=at_least_one, default=128, help="sequences an iteration")
    parser.add_argument("--new-tokens", type=at_least_one, default=16)
    parser.add_argument("--minibatch", type=at_least_one, default=16, help="sequences an optimizer step")
    parser.add_argument("--different-prompts", type=at_least_one, default=Work.different_prompts, metavar="N",
                        help="of a batch (%(default)s); beginnings that rows share are computed once")  # fmt: skip
    parser.add_argument("--precision", nargs="+", choices=list(DTYPES), default=["fp32"])
    parser.add_argument("--config", nargs="+", type=setting, default=[], metavar="NAME=VALUE", help="of PPOConfig")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=at_least_one, help="of PyTorch on the CPU; default its own choice")
    parser.add_argument("--repeats", type=at_least_one, help="turns; default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="small batches and one turn: only to see that it runs")
    parser.add_argument("--against", choices=["transformers"], help="the same work in the same process, in turns")
    parser.add_argument("--peer-command", action="append", default=[], metavar="COMMAND", help="may be given again")
    parser.add_argument("--json-lines", action="store_true", help="print our timings as JSON lines, and nothing else")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmark"), help="folder of what is written")
    args = parser.parse_args()
    args.tables = args.tables or ["iteration"]
    args.repeats = args.repeats or (1 if args.quick else 3)
    if unknown := [name for name in args.tables if name not in TABLES]:
        raise ValueError(f"tables are {', '.join(TABLES)}, got {unknown[0]!r}")
    if "model_type" in SIZES[args.size][0] and not args.json_lines and not set(args.tables) <= WAYS.keys():
        raise ValueError(f"the size {args.size} is for the tables {', '.join(WAYS)}: the others count a GPT-2's work")
    if args.different_prompts > len(PROMPT_POOL):
        raise ValueError(f"--different-prompts is {args.different_prompts}, there are {len(PROMPT_POOL)}")
    if args.against and args.peer_command:
        raise ValueError("--against shares a process and --peer-command does not: run one after the other")
    return args


if __name__ == "__main__":
    run_script(main)
