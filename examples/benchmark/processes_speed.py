"""Two processes of one thread against one process of two threads and of one, in turns: seconds of an iteration of PPO.

    python examples/benchmark/processes_speed.py                        # the default example: 2 x 1, 1 x 2, 1 x 1
    python examples/benchmark/processes_speed.py --size uer --steps 2   # the same for random models of that size
    python examples/benchmark/processes_speed.py --reward-seconds 0.5   # a reward that sleeps, by several threads

Each turn runs a few steps of `positive_reviews.py`'s settings in processes of their own. The first step is left out,
and the median of the rest over all turns counts. The table says how many times as fast as its last row each side is.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmark.work import SIZES as MODELS
from benchmark.work import Work
from minirlhf import PPOConfig, PPOTrainer
from minirlhf.common.printing import markdown_table, show
from minirlhf.device.processes import processes
from minirlhf.rl.presets import DEFAULT_METHOD, starter_run
from shared import POLICY, PROMPTS, REWARD, run_script

SIDES = {"2 processes x 1 thread": (2, 1), "1 process x 2 threads": (1, 2), "1 process x 1 thread": (1, 1)}
WORKERS = (7, 3, 1, 0)  # threads that score, for a slow reward


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(MODELS), help="of random models, in the place of the folders")
    parser.add_argument("--policy", default=POLICY, help="GPT-2 folder (default %(default)s)")
    parser.add_argument("--reward", default=REWARD, help="BERT folder (default %(default)s)")
    parser.add_argument("--steps", type=int, default=4, help="of a turn (default %(default)s)")
    parser.add_argument("--turns", type=int, default=3, help="of each side (default %(default)s)")
    parser.add_argument(
        "--reward-seconds", type=float, default=0.0, help="slept for every 16 texts; compares `reward_workers`"
    )
    parser.add_argument("--side", metavar="FILE", help=argparse.SUPPRESS)  # a turn, whose times go into the file
    args = parser.parse_args()
    if args.steps < 2 or args.turns < 1:
        raise ValueError(f"--steps must be at least 2 and --turns at least 1, got {args.steps} and {args.turns}")
    if args.side is not None:
        return turn(args)
    times: dict[str, list[float]] = {}
    for _ in range(args.turns):
        if args.reward_seconds:
            found = {f"reward_workers={count}": iterations(args, count) for count in WORKERS}
        else:
            found = {name: run(*side) for name, side in SIDES.items()}
        times = {name: times.get(name, []) + seconds for name, seconds in found.items()}
    slowest, rows = statistics.median(list(times.values())[-1]), []
    for name, seconds in times.items():
        median = statistics.median(seconds)
        rows.append([name, f"{median:.2f}", f"{max(seconds) - min(seconds):.2f}", f"{slowest / median:.2f}"])
    show(markdown_table(["side", "seconds an iteration", "longest less shortest", "times as fast"], rows))


def run(count: int, threads: int) -> list[float]:
    """The seconds of each iteration but the first of `count` processes with so many threads."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "times.json")
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
        command = [sys.executable, *launch, __file__, *sys.argv[1:], "--side", file]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
        return json.loads(Path(file).read_text())


def turn(args: argparse.Namespace) -> None:
    """Some steps of PPO; the first process writes how long each took."""
    seconds = iterations(args)
    if processes().first:
        Path(args.side).write_text(json.dumps(seconds))


def iterations(args: argparse.Namespace, workers: int = 0) -> list[float]:
    """The seconds of each iteration but the first. workers: threads that score."""
    config = PPOConfig(**starter_run(DEFAULT_METHOD), reward_workers=workers)
    work = Work(policy=args.policy, reward=args.reward) if args.size is None else Work(size=args.size)
    trainer = PPOTrainer(work.decoder(), work.decoder(), work.tokenizers()[0], config)
    reward, seconds = work.reward_function(), []

    def slow(texts: list[str]) -> list[float]:
        time.sleep(args.reward_seconds * len(texts) / 16)
        return reward(texts)

    for _ in range(args.steps):
        start = time.perf_counter()
        prompts = PROMPTS * (trainer.config.batch_size // trainer.config.group_size // len(PROMPTS))
        trainer.step(trainer.collect(prompts, slow))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


if __name__ == "__main__":
    run_script(main)
