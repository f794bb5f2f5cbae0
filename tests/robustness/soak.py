"""A long run stays flat: memory, open files, live objects and the time of a step, over thousands of small PPO steps.

    python tests/robustness/soak.py                           # 2,000 steps, some minutes
    python tests/robustness/soak.py --steps 20000 --output soak.json

Every step samples, scores, updates and logs as a real run does, and every tenth one saves a checkpoint; the models are
tiny, so that what a step leaves behind is not lost among what it needs. Needs Linux (/proc).
"""

from __future__ import annotations

import argparse
import datetime
import gc
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from minirlhf import GPT2, BertClassifier, BertConfig, GPT2Config, PPOTrainer, SentimentReward, Tokenizer
from minirlhf.io.files import write_json
from minirlhf.runs.checkpoint import save_checkpoint
from minirlhf.runs.log import RunLog

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"酒店周围位置前台房间干净服务很好非常满意早餐脏差，。"]
PROMPTS = ["酒店", "周围很", "位置", "前台服务非常好", "房间，早餐很"]
EOS = 3  # responses end early, so batches differ in shape
COUNTED = (torch.Tensor, torch.Generator, torch.optim.Optimizer)
COUNTS = 20  # how often what is alive is counted
LIMITS = {"memory": 1.01, "cpu_seconds": 1.1}  # last against first, of what may vary at all


def soak(steps: int, warmup: int, folder: Path, on_step: Callable[[], object] = lambda: None) -> dict[str, list[float]]:
    """Run steps. Returns name -> a value after each step that follows the warm-up, or after COUNTS of them."""
    trainer, reward = make_trainer(steps), make_reward()
    log = RunLog(folder)
    measured: dict[str, list[float]] = {}
    try:
        for i in range(1, steps + 1):
            start, cpu_start = time.perf_counter(), time.process_time()
            rollout = trainer.collect([PROMPTS[(i + k) % len(PROMPTS)] for k in range(4)], reward)
            log.metrics(i, trainer.step(rollout))
            if i % 10 == 0:
                log.samples(i, zip(rollout.texts, rollout.scores.tolist(), strict=True))
                save_checkpoint(trainer, folder / "checkpoint")
            on_step()
            now = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
            if i == warmup:
                gc.collect()
                gc.freeze()  # what is there by now is looked at no more
            elif i > warmup:
                now["memory"] = resident()
                if (i - warmup) % max(1, (steps - warmup) // COUNTS) == 0:
                    now |= counts()
                for name, value in now.items():
                    measured.setdefault(name, []).append(value)
    finally:
        gc.unfreeze()
    return measured


def make_trainer(steps: int) -> PPOTrainer:
    config = GPT2Config(vocab_size=len(VOCAB), n_positions=24, n_embd=16, n_layer=1, n_head=2)
    settings = dict(steps=4 * steps, batch_size=4, minibatch_size=2, ppo_epochs=2, gen_len=6, eos_token_id=EOS,
                    top_p=0.9)  # fmt: skip
    return PPOTrainer(GPT2(config), GPT2(config), Tokenizer(VOCAB), device="cpu", **settings)


def make_reward() -> SentimentReward:
    config = BertConfig(vocab_size=len(VOCAB), max_position_embeddings=24, hidden_size=16, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=32)  # fmt: skip
    return SentimentReward(BertClassifier(config), Tokenizer(VOCAB), device="cpu")


def resident() -> int:
    """Resident memory of this process, bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def counts() -> dict[str, int]:
    """Open files, and the tensors, random generators and optimizers that were made since the warm-up and are alive."""
    gc.collect()
    containers = gc.get_objects()
    # Python keeps no list of generators, but what holds one is in its list.
    things = {id(thing): type(thing) for thing in [*containers, *gc.get_referents(*containers)]}.values()
    found = {kind.__name__: sum(issubclass(type_, kind) for type_ in things) for kind in COUNTED}
    return {"open_files": len(os.listdir("/proc/self/fd")), **found}


def figures(measured: dict[str, list[float]]) -> dict[str, Any]:
    """For each name the median of the first tenth, of the last tenth, and their ratio."""
    result = {}
    for name, values in measured.items():
        tenth = max(1, len(values) // 10)
        first, last = statistics.median(values[:tenth]), statistics.median(values[-tenth:])
        ratio = last / first if first else 1.0 if last == 0 else math.inf
        result[name] = {"first": first, "last": last, "ratio": ratio}
    return result


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    version = ".".join(map(str, sys.version_info[:3]))
    date = datetime.date.today()
    return f"{cpu}, {os.cpu_count()} cores, 1 thread, torch {torch.__version__}, Python {version}, {date}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warmup", type=int, default=200, help="steps before the first measurement")
    parser.add_argument("--output", help="JSON file of the figures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        result = figures(soak(args.steps, args.warmup, Path(folder)))
    print("| | first tenth | last tenth | ratio |\n|---|---|---|---|")
    for name, row in result.items():
        print(f"| {name} | {row['first']:.6g} | {row['last']:.6g} | {row['ratio']:.4f} |")
    content = {"steps": args.steps, "warmup": args.warmup, "minutes": (time.perf_counter() - start) / 60,
               "machine": machine(), "figures": result}  # fmt: skip
    print(f"\n{args.steps} steps in {content['minutes']:.1f} minutes; {content['machine']}")
    if args.output:
        write_json(args.output, content)
    grown = [name for name in result if name != "seconds" and result[name]["ratio"] > LIMITS.get(name, 1.0)]
    print(f"not flat: {', '.join(grown)}" if grown else "flat")
    return int(bool(grown))


if __name__ == "__main__":
    sys.exit(main())
