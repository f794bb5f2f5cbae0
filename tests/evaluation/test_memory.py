"""The memory formula against a count by hand and against measurements, and what a system says is free."""

import dataclasses
import itertools

import pytest
import torch

from minirlhf import GPT2, GPT2Config, Llama, LlamaConfig, PPOTrainer
from minirlhf.evaluation.doctor import memory
from minirlhf.evaluation.doctor.memory import available_memory, estimate, total
from minirlhf.generation.generate import generate
from minirlhf.models.static_decode import GraphedDecoder
from minirlhf.rl.logprobs import LOGITS_IN_CACHE, LOGITS_PER_CHUNK, response_logprobs

CPU = torch.device("cpu")


class AnyText:
    """A tokenizer of a vocabulary of any size: one token a character, its number."""

    pad_id = 0

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def encode_prompt(self, text):
        return [ord(char) % self.size for char in text]

    def decode(self, ids):
        return ""

    def decode_response(self, prompt_ids, ids):
        return [""] * len(ids)


def make_trainer(V, C, L=1, nh=2, n_positions=64, kind="gpt2", **settings):
    def model():
        if kind == "gpt2":
            return GPT2(GPT2Config(vocab_size=V, n_embd=C, n_layer=L, n_head=nh, n_positions=n_positions)).eval()
        return Llama(LlamaConfig(
            kind, V, C, 3 * C, L, nh, max(nh // 4, 1), max_position_embeddings=n_positions, tie_word_embeddings=True,
        )).eval()  # fmt: skip

    reference = None if "lora" in settings else model()
    return PPOTrainer(model(), reference, AnyText(V), **{"device": "cpu", **settings})


# ---- the formula ----------------------------------------------------------------------------------------------------


def test_the_formula_by_hand():
    trainer = make_trainer(V=80, C=8, L=3, nh=2)
    need = estimate(trainer, batch_size=10, prompt_length=4, gen_len=6, micro_batch=5)  # T = 10
    # wte 640, wpe 512; a block 2 * 16 + 8*24 + 24 + 64 + 8 + 8*32 + 32 + 32*8 + 8 = 872; ln_f 16; value head 9
    reference = 4 * (640 + 512 + 3 * 872 + 16)
    assert need["weights"] == 4 * (reference + 4 * 9) + reference
    assert need["rollout"] == 10 * (17 * 10 + (26 + 10) * 6)
    assert need["generation"] == 10 * (2 * 3 * 8 * 10 * 4 + max(40 * 80, 48 * 8 * 4))
    assert need["scoring"] == 52 * 10 * 10 * 8 + 30 * 10 * 6 * 80
    assert need["update"] == 5 * 10 * 4 * (16 * 8 + 2 * 2 * 10) * 4 + 14 * 5 * 6 * 80 + 4 * 8 * 80
    assert need["scoring"] > need["update"] > need["generation"]
    assert total(need) == need["weights"] + need["rollout"] + need["scoring"]


@pytest.mark.parametrize("base_dtype", ["fp32", "bf16"])
def test_adapters_by_hand(base_dtype):
    """One copy of the base, of which a block's 12 C^2 numbers may take 2 bytes; gradients and moments of adapters."""
    lora = dict(rank=2, targets=["c_attn", "c_fc"], base_dtype=base_dtype)
    trainer = make_trainer(V=80, C=8, L=3, nh=2, lora=lora)
    need = estimate(trainer, batch_size=10, prompt_length=4, gen_len=6, micro_batch=5)
    whole = estimate(make_trainer(V=80, C=8, L=3, nh=2), 10, 4, 6, 5)
    base, matrices, head = 640 + 512 + 3 * 872 + 16, 3 * 12 * 8 * 8, 9
    adapters = 3 * 2 * ((8 + 24) + (8 + 32))
    held, copy = (2, 4 * 32 * 8) if base_dtype == "bf16" else (4, 0)  # the largest matrix, widened
    assert need["weights"] == 4 * (base - matrices) + held * matrices + 16 * (adapters + head)
    assert need["rollout"] == whole["rollout"] and need["scoring"] == whole["scoring"] + copy
    block = 16 * 8 - (8 + 32) + 2 * 2 + 2 * 2 * 10  # no inputs of both c_proj, but the two adapters' middles
    assert need["update"] == 5 * 10 * 4 * block * 4 + 14 * 5 * 6 * 80 + copy  # and no gradient of the embedding


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_graph_keeps_is_counted(precision):
    trainer = make_trainer(V=80, C=16, L=2, precision=precision)
    without = estimate(trainer, 10, 4, 6, 5)
    graphed = GraphedDecoder()
    trainer.models = dataclasses.replace(trainer.models, graphed=graphed)
    counted = estimate(trainer, 10, 4, 6, 5)["rollout"] - without["rollout"]
    with trainer.precision.autocast():
        step = graphed.step_for(trainer.policy.decoder, 10, 9)
    kept = sum(layer.nbytes for layer in step.cache.layers)
    assert kept <= counted < 1.1 * kept


def test_no_more_logits_are_counted_than_are_alive_and_no_more_rows_than_a_pass_has():
    trainer = make_trainer(V=1000, C=8)
    small, large, larger = (estimate(trainer, 10**6, 1, 50, rows) for rows in (100, 1000, 2000))
    tokens = LOGITS_PER_CHUNK // 1000
    assert 100 * 50 < tokens < 1000 * 50
    trunk = 51 * 2 * (16 * 8 + 2 * 2 * 51) * 4  # a row, without logits
    assert small["update"] == 100 * trunk + 14 * 100 * 50 * 1000 + 4 * 8 * 1000
    assert large["update"] - 1000 * trunk == larger["update"] - 2000 * trunk == 14 * tokens * 1000 + 4 * 8 * 1000
    rows = trainer.models.scoring_batch_size
    assert rows * 50 > LOGITS_IN_CACHE // 1000
    assert large["scoring"] == 13 * rows * 51 * 8 * 4 + 30 * (LOGITS_IN_CACHE // 1000) * 1000  # not of all 10^6
    assert estimate(trainer, 3, 1, 50, 1000)["update"] == 3 * trunk + 14 * 3 * 50 * 1000 + 4 * 8 * 1000


def peak_of(work):
    """The most bytes that PyTorch's allocator handed out at once during `work`, by its profiler."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        work()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


@pytest.mark.parametrize(("V", "C", "L", "rows", "P", "R", "settings"), [
    (200, 64, 2, 4, 40, 8, {}), (3000, 32, 2, 4, 3, 6, dict(precision="bf16")), (100, 64, 2, 2, 135, 8, {}),
    (3000, 32, 2, 8, 3, 6, dict(top_p=1.0)), (200, 64, 4, 8, 40, 8, dict(checkpoint_activations=True)),
    (200, 64, 2, 4, 40, 8, dict(lora={})), (200, 64, 2, 4, 40, 8, dict(lora=dict(base_dtype="bf16"), precision="bf16")),
    (200, 64, 4, 4, 40, 8, dict(kind="qwen3", lora={})), (200, 64, 2, 4, 40, 8, dict(kind="qwen3")),
    (100, 64, 2, 2, 135, 8, dict(kind="llama")),
])  # fmt: skip
def test_measurements_are_near_the_formula(V, C, L, rows, P, R, settings):
    trainer = make_trainer(V, C, L, 4, 160, gen_len=R, batch_size=rows, **settings)
    rollout = trainer.collect([chr(1 + i) * P for i in range(rows)], lambda texts: [0.0] * len(texts))
    prompts = [trainer.tokenizer.encode_prompt(prompt) for prompt in rollout.prompts]

    def logprobs(reference=None):
        return response_logprobs(trainer.policy, rollout.tokens, rollout.mask, R, 1.0, rollout.sampling_sets, reference)

    def generation():
        generate(trainer.policy.decoder, prompts, R, trainer.config.sampling, keep_sampling_sets=True)

    def scoring():
        with torch.no_grad():
            logprobs(trainer.reference)

    def update():
        scored = logprobs()
        (scored.logprobs + scored.entropy + scored.values).sum().backward()

    update()  # now the gradients are there, as for every micro-batch but the first
    formula = estimate(trainer, rows, P, R, rows)
    for phase in (generation, scoring, update):
        with trainer.precision.autocast():
            assert 0.55 < peak_of(phase) / formula[phase.__name__] < 1.05, phase.__name__


# ---- what is free ---------------------------------------------------------------------------------------------------


def write(path, text):
    path.write_text(text)
    return path


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A machine with 3 GiB free, in no control group."""
    text = "MemTotal:       9000000 kB\nMemFree:         100000 kB\nMemAvailable:   3145728 kB\n"
    monkeypatch.setattr(memory, "MEMINFO", write(tmp_path / "meminfo", text))
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    (tmp_path / "cgroup").mkdir()
    return tmp_path


def limit(system, maximum):
    write(system / "cgroup" / "memory.max", f"{maximum}\n")
    write(system / "cgroup" / "memory.current", f"{2**30}\n")
    write(system / "cgroup" / "memory.stat", f"anon 5\ninactive_file {2**28}\n")


def test_what_linux_says_is_available(system):
    assert available_memory(CPU) == 3 * 2**30


@pytest.mark.parametrize(("maximum", "expected"), [
    (2**31, 2**30 + 2**28), (2**40, 3 * 2**30), ("max", 3 * 2**30),
])  # fmt: skip
def test_a_container_has_what_its_limit_leaves(system, maximum, expected):
    limit(system, maximum)
    assert available_memory(CPU) == expected


@pytest.mark.parametrize("text", ["", "MemAvailable: many kB\n", "MemFree: 3 kB\n", "MemAvailable:\n"])
def test_elsewhere_nothing_is_said(system, text):
    write(system / "meminfo", text)
    assert available_memory(CPU) is None


def test_this_machine_has_some_memory():
    available = available_memory(CPU)
    assert available is None or 2**20 < available < 2**50
