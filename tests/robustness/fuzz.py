"""Hostile files: mutations of valid folders, given to everything of this library that reads one.

    python tests/robustness/fuzz.py --inputs 100000 --seed 0              # all targets; a table at the end
    python tests/robustness/fuzz.py --target GPT-2 --seed 0 --only 1234   # one input again, with its traceback

What must hold of every input: the entrance returns an object that can be used, or raises ValueError or OSError with the
path in its message and leaves the folder as it was. Never another exception, a crash, more than SECONDS, more memory
than ALLOWANCE bytes and FACTOR times the folder's size, or a look at a file outside the folder.

Each input depends on seed, target and number alone. Inputs run in a forked process, so that a crash, or the alarm that
ends a hang, costs one input. Needs Linux (fork, inotify, /proc); a loader that follows symbolic links is not at fault,
for the cache of the Hugging Face hub is made of them, so the only links here lead to themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import hashlib
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import struct
import sys
import sysconfig
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers.pre_tokenizers import ByteLevel

import minirlhf
from minirlhf import GPT2, ActorCritic, BertClassifier, BertConfig, GPT2Config, PPOTrainer, SentimentReward, Tokenizer
from minirlhf.io.conversion import read_pickle
from minirlhf.io.files import read_json, read_jsonl, write_json
from minirlhf.io.model_folder import read_tensors, write_tensors
from minirlhf.runs.checkpoint import load_checkpoint, save_checkpoint
from minirlhf.runs.run import Run
from minirlhf.text.preferences import read_rankings

SECONDS = 20  # for one input, on a busy machine
ALLOWANCE, FACTOR = 32 << 20, 64  # bytes that any load may take, and more for each byte of the folder
ENOUGH = 100  # failures of one target
LARGE = 1 << 17  # bytes of a folder from which the measured factor says something
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "酒", "店", "很", "好", "，", "a", "##b"]
PACKAGES = [sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib"), str(Path(minirlhf.__file__).parent), __file__]
FORBIDDEN = {"pickle.find_class", "subprocess.Popen", "os.system", "os.exec", "socket.connect"}

# ---- targets --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Target:
    """An entrance. write: makes a valid folder. load: folder -> object, or an error. use: works with the object."""

    name: str
    write: Callable[[Path], object]
    load: Callable[[Path], Any]
    use: Callable[[Any], object]


def targets() -> list[Target]:
    """A line for everything that reads files."""
    return [
        Target("GPT-2", write_gpt2, GPT2.from_pretrained, use_gpt2),
        Target("actor-critic", write_actor_critic, ActorCritic.from_pretrained, lambda model: use_gpt2(model.decoder)),
        Target("BERT", write_bert, BertClassifier.from_pretrained, lambda model: model(torch.tensor([[0]]))),
        Target("sentiment reward", write_reward, load_reward, lambda reward: reward(["酒店", ""])),
        Target("vocab.txt", write_tokenizer, Tokenizer.from_pretrained, use_tokenizer),
        Target("byte-level BPE", write_bpe, Tokenizer.from_pretrained, use_tokenizer),
        Target("shards", write_shards, GPT2.from_pretrained, use_gpt2),
        Target("pickle", write_pickle, lambda folder: read_pickle(folder / "pytorch_model.bin"), dict.items),
        Target("checkpoint", write_checkpoint, resume_trainer, use_trainer),
        Target("run", write_whole_run, lambda folder: Run.resume(folder, a_gpt2(1)), use_run),
        Target("pairs", write_pairs, lambda folder: read_rankings(folder / "pairs.jsonl"), len),
        Target("rank lists", write_lists, lambda folder: read_rankings(folder / "lists.tsv"), len),
        Target("metrics.jsonl", write_metrics, lambda folder: read_jsonl(folder / "metrics.jsonl"), dict_items),
        Target("config.json", write_config, lambda folder: read_json(folder / "config.json"), dict.items),
    ]


def a_gpt2(seed: int = 0) -> GPT2:
    return GPT2(GPT2Config(vocab_size=len(VOCAB), n_positions=8, n_embd=4, n_layer=1, n_head=2), seed=seed)


def write_gpt2(folder: Path) -> None:
    a_gpt2().save_pretrained(folder)


def use_gpt2(model: GPT2) -> None:
    model(torch.tensor([[0]]), torch.tensor([[1]]))


def write_actor_critic(folder: Path) -> None:
    ActorCritic(a_gpt2()).save_pretrained(folder)


def write_bert(folder: Path) -> None:
    config = BertConfig(vocab_size=len(VOCAB), max_position_embeddings=8, hidden_size=4, num_hidden_layers=1,
                        num_attention_heads=2, intermediate_size=8)  # fmt: skip
    BertClassifier(config).save_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    Tokenizer(VOCAB).save_pretrained(folder)


def use_tokenizer(tokenizer: Tokenizer) -> None:
    tokenizer.decode(tokenizer.encode("酒店 ab\u2028 [SEP]\x00")), tokenizer.decode(range(min(len(tokenizer), 100)))


def write_reward(folder: Path) -> None:
    write_bert(folder), write_tokenizer(folder)


def load_reward(folder: Path) -> SentimentReward:
    return SentimentReward.from_pretrained(folder, device="cpu")


def write_bpe(folder: Path) -> None:
    vocab = {token: i for i, token in enumerate([*sorted(ByteLevel.alphabet()), "ab", "abc", "<|endoftext|>"])}
    write_json(folder / "vocab.json", vocab)
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c\n", encoding="utf-8")


def write_shards(folder: Path) -> None:
    a_gpt2().save_pretrained(folder)
    tensors = read_tensors(folder / "model.safetensors")
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    of = {tensor: names[i % 2] for i, tensor in enumerate(sorted(tensors))}
    for name in names:
        write_tensors(folder / name, {tensor: tensors[tensor] for tensor in of if of[tensor] == name})
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": of})
    (folder / "model.safetensors").unlink()


def write_pickle(folder: Path) -> None:
    torch.save(a_gpt2().state_dict(), folder / "pytorch_model.bin")


def write_checkpoint(folder: Path) -> None:
    save_checkpoint(PPOTrainer(a_gpt2(), a_gpt2(1), Tokenizer(VOCAB), device="cpu", gen_len=2), folder)


def resume_trainer(folder: Path) -> PPOTrainer:
    return load_checkpoint(folder, a_gpt2(1))


def use_trainer(trainer: PPOTrainer) -> None:
    use_gpt2(trainer.policy.decoder), use_tokenizer(trainer.tokenizer)


def write_whole_run(folder: Path) -> None:
    trainer = PPOTrainer(a_gpt2(), a_gpt2(1), Tokenizer(VOCAB), device="cpu", gen_len=2, steps=2, batch_size=1)
    with Run.start(folder, trainer, {"why": "to be fuzzed"}) as run:
        trainer.train(["酒店"], lambda texts: [1.0], run.record)
    (folder / "checkpoints" / "best").unlink()  # a link, which the next save makes again


def use_run(run: Run) -> None:
    with run:
        use_trainer(run.trainer)


def write_pairs(folder: Path) -> None:
    (folder / "pairs.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5}\n' * 2)


def write_lists(folder: Path) -> None:
    (folder / "lists.tsv").write_text("prompt\tbest\tworst\np\ta\tb\tc\n\td\te\n")


def write_metrics(folder: Path) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "reward/mean": 0.5}\n{"step": 2, "reward/mean": -1e-05}\n')


def write_config(folder: Path) -> None:
    write_json(folder / "config.json", {"arguments": {"prompts": ["酒店"], "resume": None}, "ppo": {"lr": 1e-5}})


def dict_items(lines: list[dict[str, Any]]) -> None:
    for line in lines:
        line.items()


# ---- mutations ------------------------------------------------------------------------------------------------------

Files = dict[str, bytes | str]  # name -> content, or what stands there in the place of a file
PLACES = ("nothing", "a folder", "a pipe", "a loop")
DEEP, DIGITS = "@deep", "@digits"  # stand for JSON that `json.dumps` cannot write
VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 7, 2**31, 2**63, 10**9, 10**18, 10**400, 0.5, -0.0, 1e-300, 1e308, -1e9,
    math.inf, math.nan, "", "0", "x", "nan", "\0", "a\u2028b\n", "\ud800", "\x1b[2J", "\u202e😀", "a" * 10_000, [], {},
    [[]], [1, 2], {"": None}, {"0": "a"}, "/etc/passwd", "../outside/config.json", "../outside", "..", DEEP, DIGITS,
]  # fmt: skip
BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "I16": 16, "U16": 16, "F16": 16,
        "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4,
        "F6_E2M3": 6, "F6_E3M2": 6}  # fmt: skip
MANY = 20_000  # of what a file is grown by


def mutated(files: Mapping[str, bytes], random: Random) -> Files:
    """One to three mutations of a folder's files."""
    result: Files = dict(files)
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        name = random.choice(sorted(files))
        content = result[name]
        if isinstance(content, str) or random.random() < 0.01:
            result[name] = random.choice(PLACES)
        elif random.random() < 0.3:
            result[name] = mutated_bytes(content, random)
        else:
            try:
                result[name] = MUTATIONS.get(Path(name).suffix, mutated_bytes)(content, random)
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
                assert content != files[name]  # an earlier mutation left nothing to take apart
    return with_sums(result) if random.random() < 0.7 else result


def with_sums(files: Files) -> Files:
    """The same with manifests that fit it, so that what stands behind the check of a checkpoint is reached as well."""
    result = dict(files)
    for manifest in [name for name in files if Path(name).name == "manifest.json"]:
        try:
            content = json.loads(files[manifest])
            for name in content["sha256"]:
                beside = files.get(str(Path(manifest).parent / name))
                if isinstance(beside, bytes):
                    content["sha256"][name] = hashlib.sha256(beside).hexdigest()
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
        result[manifest] = json.dumps(content).encode("utf-8", "surrogatepass")
    return result


def mutated_bytes(content: bytes, random: Random) -> bytes:
    a, b = sorted(random.randrange(len(content) + 1) for _ in range(2))
    some = random.choice([random.randbytes(1), random.randbytes(8), b"\xff" * 8, b"\0" * 64, b"\n", b'"', b"[", b"}",
                          b"\xed\xa0\x80", b"\xc0", b"\xef\xbb\xbf", b"NaN", b"1e999", b"\xe2\x80\xa8"])  # fmt: skip
    return random.choice([content[:a], content[a:], content[:a] + content[b:], content[:a] + some + content[a:],
                          content[:a] + some + content[a + len(some) :], content[:b] + content[a:], b"",
                          content + some])  # fmt: skip


def mutated_json(content: bytes, random: Random) -> bytes:
    return dumped(mutated_tree(json.loads(content), random), random)


def dumped(tree: Any, random: Random) -> bytes:
    text = json.dumps(tree, ensure_ascii=random.random() < 0.5)
    text = text.replace(f'"{DEEP}"', "[" * 50_000 + "]" * 50_000).replace(f'"{DIGITS}"', "9" * 5000)
    return text.encode("utf-8", "surrogatepass")


def mutated_tree(tree: Any, random: Random) -> Any:
    """A JSON tree with one value or key replaced, dropped, copied or nudged, or one container grown."""
    places = list(slots(tree))
    if not places or random.random() < 0.01:
        return random.choice(VALUES)
    container, key = random.choice(places)
    value, action = container[key], random.choice(["value", "value", "nudge", "nudge", "drop", "copy", "key", "inner"])
    if random.random() < 0.004:
        container[key] = {f"{i}": "x" for i in range(MANY)} if random.random() < 0.5 else [{}] * MANY
    elif action == "drop":
        del container[key]
    elif action == "copy":
        other, name = random.choice(places)
        container[key] = copy.deepcopy(other[name]) if key in other or isinstance(other, list) else None
    elif action == "key" and isinstance(container, dict):
        container[str(random.choice([*VALUES, *container]))] = container.pop(key)
    elif action == "nudge" and isinstance(value, (int, float)):
        near = [value + 1, value - 1, value * 2, value * 1000, -value, float(value), str(value)]
        container[key] = random.choice(near)
    elif action == "inner" and isinstance(value, str) and value.startswith("{"):  # JSON in the text of JSON
        container[key] = dumped(mutated_tree(json.loads(value), random), random).decode("utf-8", "surrogatepass")
    else:
        container[key] = random.choice(VALUES)
    return tree


def slots(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from slots(tree[key])


def mutated_lines(content: bytes, random: Random) -> bytes:
    lines = content.split(b"\n")
    i, j = random.randrange(len(lines)), random.randrange(len(lines))
    if random.random() < 0.005:
        lines[i:i] = [f"w{n}".encode() for n in range(MANY)]
    else:
        new = random.choice([b"", lines[j], b"##", b" ", b"\0", b"\xff", "\u2028".encode(), b"x" * 10_000, b"\r"])
        lines[i : i + random.randrange(2)] = random.choice([[], [new], [lines[i] + new], [new + lines[i]]])
    return b"\n".join(lines)


def mutated_json_lines(content: bytes, random: Random) -> bytes:
    if random.random() < 0.2:
        return mutated_lines(content, random)
    if random.random() < 0.005:
        return content + b'{"step":1}\n' * MANY
    lines = content.split(b"\n")
    i = random.randrange(len(lines) - 1)
    lines[i] = mutated_json(lines[i], random)
    return b"\n".join(lines)


def mutated_safetensors(content: bytes, random: Random) -> bytes:
    """Half of the time a header that no longer describes the data, half a valid file of other tensors."""
    length = int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    if random.random() < 0.5:
        length_error = random.choice([0, 0, 0, 0, 1, -1, 10**6, 2**62])
        changed = dumped(mutated_tree(header, random), random)
        return struct.pack("<Q", max(0, len(changed) + length_error)) + changed + data
    metadata = header.pop("__metadata__", {})
    tensors = {name: [x["dtype"], x["shape"], data[slice(*x["data_offsets"])]] for name, x in header.items()}
    mutate_tensors(tensors, metadata, random)
    header, data = {"__metadata__": metadata}, b""
    for name, (dtype, shape, raw) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    changed = dumped(header, random)
    return struct.pack("<Q", len(changed)) + changed + data


def mutate_tensors(tensors: dict[str, list[Any]], metadata: dict[str, Any], random: Random) -> None:
    name = random.choice(sorted(tensors))
    dtype, shape, raw = tensors[name]
    action = random.choice(["drop", "rename", "copy", "dtype", "shape", "fill", "metadata", "grow"])
    if action == "drop":
        del tensors[name]
    elif action == "rename":
        new = random.choice([*sorted(tensors), "x", "", "\ud800", "wte.weight\n", "h.999999999.ln_1.weight", "h.-1.x"])
        tensors[new] = tensors.pop(name)
    elif action == "copy":
        tensors["copied"] = [dtype, shape, raw]
    elif action == "dtype":
        dtype = random.choice(sorted(BITS))
        tensors[name] = [dtype, shape, resized(raw, dtype, shape)]
    elif action == "shape":
        shape = random.choice([[*shape, 1], [1, *shape], shape[::-1], shape[:-1], [0], [], [2 * n for n in shape],
                               [math.prod(shape)], [n + 1 for n in shape]])  # fmt: skip
        tensors[name] = [dtype, shape, resized(raw, dtype, shape)]
    elif action == "fill":
        pattern = random.choice([b"\xff\xff\xff\xff", b"\0\0\x80\x7f", b"\0\0\0\0", b"\xff\xff\x7f\x7f", b"\1\0\0\0"])
        tensors[name] = [dtype, shape, resized(pattern, dtype, shape)]
    elif action == "metadata" and metadata:
        mutated_tree(metadata, random)
    elif random.random() < 0.03:
        tensors.update({f"h.{i}.ln_1.weight": [dtype, shape, raw] for i in range(MANY // 10)})


def resized(raw: bytes, dtype: str, shape: Sequence[int]) -> bytes:
    """The bytes repeated or cut to what a dtype and a shape need."""
    size = math.prod(shape) * BITS[dtype] // 8
    return (raw or b"\0") * (size // max(len(raw), 1)) + (raw or b"\0")[: size % max(len(raw), 1)]


MUTATIONS: dict[str, Callable[[bytes, Random], bytes]] = {
    ".json": mutated_json, ".jsonl": mutated_json_lines, ".txt": mutated_lines, ".safetensors": mutated_safetensors,
}  # fmt: skip


# ---- one input ------------------------------------------------------------------------------------------------------


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_files(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "a folder":
            path.mkdir()
        elif content == "a pipe":  # it would be waited for forever
            os.mkfifo(path)
        elif content == "a loop":
            path.symlink_to(path.name)


class Watch:
    """Sees what is opened outside a folder: by Python through its audit events, by compiled code through inotify.

    Imports are no offence: a module may be imported at its first use.
    """

    def __init__(self, folder: Path, outside: Path):
        self.seen: list[str] = []
        self.on = False
        self.folder = str(folder)
        self.outside = outside
        libc = ctypes.CDLL(None, use_errno=True)
        self.inotify = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert libc.inotify_add_watch(self.inotify, os.fsencode(outside), 0x20) >= 0  # IN_OPEN
        sys.addaudithook(self.audit)

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in FORBIDDEN:
            self.seen.append(f"{event}{arguments}")
        elif event in ("open", "os.listdir", "os.scandir") and not isinstance(arguments[0], int):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if not f"{path}/".startswith((f"{self.folder}/", *PACKAGES)):
                self.seen.append(path)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        self.on = True
        try:
            yield
        finally:
            self.on = False
            with contextlib.suppress(BlockingIOError):
                while os.read(self.inotify, 4096):
                    self.seen.append(f"{self.outside}, or a file of it")
        if self.seen:
            raise AssertionError(f"opened {self.seen}")


def memory(name: str) -> int:
    """VmSize, VmRSS or VmHWM (the peak of VmRSS) of this process, bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))


@contextlib.contextmanager
def memory_limit(size: int) -> Iterator[None]:
    """Within it no more address space can be had than ALLOWANCE and FACTOR times the size."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + ALLOWANCE + FACTOR * size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(target: Target, folder: Path, files: Files, watch: Watch) -> str:
    """Give one folder to a target. Returns "loaded" or "refused"; raises for anything that must not be."""
    write_files(folder, files)
    before = read_files(folder)
    with memory_limit(sum(map(len, before.values()))), watch.watching():
        try:
            thing = target.load(folder)
        except (ValueError, OSError) as error:
            if str(folder) not in str(error):
                raise
            refused = True
        else:
            target.use(thing)
            refused = False
    if refused:
        assert read_files(folder) == before, "a refused load changed the folder"
    return "refused" if refused else "loaded"


# ---- many inputs ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """What became of the inputs of one target; growth and size in bytes, of memory and of the folder."""

    target: str
    outcomes: dict[str, int]
    failures: list[str]
    slowest: float
    growth: int
    factor: float

    def __str__(self) -> str:
        counts = " | ".join(str(self.outcomes[name]) for name in ("loaded", "refused"))
        return (
            f"| {self.target} | {sum(self.outcomes.values())} | {counts} | {len(self.failures)} "
            f"| {1000 * self.slowest:.0f} | {self.growth / 2**20:.1f} | {self.factor:.0f} |"
        )


COLUMNS = ("target", "inputs", "loaded", "refused", "failures", "slowest, ms", "most memory, MiB", "memory / size")
HEAD = "| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|"
OUTCOMES = ("not run", "loaded", "refused", "failed")


def fuzz(target: Target, inputs: int, seed: int) -> Report:
    """Give a target its inputs 0 .. inputs - 1."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as root:
        (valid := Path(root) / "outside").mkdir()
        target.write(valid)
        outcomes, seconds = multiprocessing.RawArray("b", inputs), multiprocessing.RawArray("d", inputs)
        growth, sizes = multiprocessing.RawArray("q", inputs), multiprocessing.RawArray("q", inputs)
        at, failures = multiprocessing.RawValue("q", -1), Path(root) / "failures"
        failures.touch()
        while at.value + 1 < inputs and list(outcomes).count(OUTCOMES.index("failed")) < ENOUGH:
            if (child := os.fork()) == 0:
                try:
                    run(target, Path(root), seed, at, (outcomes, seconds, growth, sizes), failures)
                except BaseException:
                    traceback.print_exc()
                    os._exit(1)
                os._exit(0)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if status > 0:
                raise RuntimeError("the harness itself failed")
            if status < 0:
                outcomes[at.value] = OUTCOMES.index("failed")
                with failures.open("a") as file:
                    died = f"more than {SECONDS} seconds" if -status == signal.SIGALRM else signal.Signals(-status).name
                    file.write(json.dumps(f"{at.value}: {died}") + "\n")
        counts = {name: list(outcomes).count(i) for i, name in enumerate(OUTCOMES) if i}
        return Report(
            target.name,
            counts,
            [json.loads(line) for line in failures.read_text().splitlines()],
            max(seconds),
            max(growth),
            max((g / size for g, size in zip(growth, sizes, strict=True) if size >= LARGE), default=0.0),
        )


def run(target: Target, root: Path, seed: int, at: Any, results: Sequence[Any], failures: Path) -> None:
    """The forked process: goes on after input `at`, until all are done or one kills it."""
    outcomes, seconds, growth, sizes = results
    libc = prepare(target, root)
    valid, watch = read_files(root / "outside"), Watch(root / "folder", root / "outside")
    while at.value + 1 < len(outcomes):
        at.value += 1
        i = at.value
        files = mutated(valid, Random(f"{seed} {target.name} {i}"))
        sizes[i] = sum(len(content) for content in files.values() if isinstance(content, bytes))
        libc.malloc_trim(0)
        resident = reset_peak()
        start = time.perf_counter()
        signal.alarm(SECONDS)
        try:
            outcomes[i] = OUTCOMES.index(attempt(target, root / "folder", files, watch))
        except BaseException as error:  # also what Rust raises in a panic
            outcomes[i] = OUTCOMES.index("failed")
            with failures.open("a") as file:
                file.write(json.dumps(f"{i}: {type(error).__name__}: {str(error)[:300]}") + "\n")
            return  # what it may have left behind is no burden of the next input
        signal.alarm(0)
        seconds[i] = time.perf_counter() - start
        growth[i] = memory("VmHWM") - resident


def prepare(target: Target, root: Path) -> ctypes.CDLL:
    """Settle what is done once in a process, so that no input pays for it: imports, threads, the warm heap."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ["RUST_BACKTRACE"] = "0"  # else a panic would have it look for the names of its functions
    warnings.simplefilter("ignore")
    libc = ctypes.CDLL(None)
    libc.mallopt(-8, 1)  # M_ARENA_MAX: a thread's arena would take 64 MiB of address space
    for _ in range(2):
        write_files(root / "folder", dict(read_files(root / "outside")))
        target.use(target.load(root / "folder"))
    return libc


def reset_peak() -> int:
    """Start VmHWM anew; returns the resident memory, bytes."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return memory("VmRSS")


def again(target: Target, seed: int, number: int) -> None:
    """One input in this process, which may die of it; its folder is left in place."""
    root = Path(tempfile.mkdtemp())
    (root / "outside").mkdir()
    target.write(root / "outside")
    prepare(target, root)
    files = mutated(read_files(root / "outside"), Random(f"{seed} {target.name} {number}"))
    print(f"{root}/folder", {name: c if isinstance(c, str) else f"{len(c)} bytes" for name, c in files.items()})
    print(attempt(target, root / "folder", files, Watch(root / "folder", root / "outside")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="this one alone")
    parser.add_argument("--only", type=int, help="this input of the target alone")
    args = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [target for target in targets() if args.target in (None, target.name)]
    if args.only is not None:
        again(chosen[0], args.seed, args.only)
        return 0
    start, reports = time.perf_counter(), []
    for target in chosen:
        reports.append(fuzz(target, -(-args.inputs // len(chosen)), args.seed))
        print("\n".join(f"{target.name}, input {failure}" for failure in reports[-1].failures[:20]), flush=True)
    print(HEAD, *reports, sep="\n")
    print(f"\n{sum(sum(r.outcomes.values()) for r in reports)} inputs in {time.perf_counter() - start:.0f} seconds")
    return int(any(report.failures for report in reports))


if __name__ == "__main__":
    sys.exit(main())
