"""The memory formula against a count by hand and against measurements, and what a system says is free."""

import dataclasses

import pytest
import torch

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, GPT2Config, PPOTrainer, Tokenizer
from minirlhf.evaluation.doctor import memory
from minirlhf.evaluation.doctor.memory import MemoryNeed, available_memory, estimate, extrapolate, measure, peak_memory
from minirlhf.generation.static_decode import GraphedDecoder
from minirlhf.rl.logprobs import LOGITS_IN_CACHE, LOGITS_PER_CHUNK

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


def make_trainer(V, C, L=1, nh=2, n_positions=64, **settings):
    config = GPT2Config(vocab_size=V, n_embd=C, n_layer=L, n_head=nh, n_positions=n_positions)
    return PPOTrainer(GPT2(config).eval(), GPT2(config).eval(), AnyText(V), **{"device": "cpu", **settings})


# ---- the formula ----------------------------------------------------------------------------------------------------


def test_the_formula_by_hand():
    trainer = make_trainer(V=80, C=8, L=3, nh=2)
    need = estimate(trainer, batch_size=10, prompt_length=4, gen_len=6, micro_batch=5)  # T = 10
    # wte 640, wpe 512; a block 2 * 16 + 8*24 + 24 + 64 + 8 + 8*32 + 32 + 32*8 + 8 = 872; ln_f 16; value head 9
    reference = 4 * (640 + 512 + 3 * 872 + 16)
    assert need.weights == 4 * (reference + 4 * 9) + reference
    assert need.rollout == 10 * (17 * 10 + (26 + 10) * 6)
    assert need.generation == 10 * (2 * 3 * 8 * 10 * 4 + max(40 * 80, 48 * 8 * 4))
    assert need.scoring == 52 * 10 * 10 * 8 + 30 * 10 * 6 * 80
    assert need.update == 5 * 10 * 4 * (16 * 8 + 2 * 2 * 10) * 4 + 14 * 5 * 6 * 80 + 4 * 8 * 80
    assert need.total == need.weights + need.rollout + need.scoring and need.scoring > need.update > need.generation
    assert need.largest == "scoring"


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_graph_keeps_is_counted(precision):
    trainer = make_trainer(V=80, C=16, L=2, precision=precision)
    without = estimate(trainer, 10, 4, 6, 5)
    graphed = GraphedDecoder()
    trainer.models = dataclasses.replace(trainer.models, graphed=graphed)
    counted = estimate(trainer, 10, 4, 6, 5).rollout - without.rollout
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
    assert small.update == 100 * trunk + 14 * 100 * 50 * 1000 + 4 * 8 * 1000
    assert large.update - 1000 * trunk == larger.update - 2000 * trunk == 14 * tokens * 1000 + 4 * 8 * 1000
    rows = trainer.models.scoring_batch_size
    assert rows * 50 > LOGITS_IN_CACHE // 1000
    assert large.scoring == 13 * rows * 51 * 8 * 4 + 30 * (LOGITS_IN_CACHE // 1000) * 1000  # not of all 10^6
    assert estimate(trainer, 3, 1, 50, 1000).update == 3 * trunk + 14 * 3 * 50 * 1000 + 4 * 8 * 1000


@pytest.mark.parametrize(("V", "C", "L", "rows", "P", "R", "settings"), [
    (200, 64, 2, 4, 40, 8, {}), (2000, 32, 2, 8, 3, 6, {}), (3000, 32, 2, 4, 3, 6, dict(precision="bf16")),
    (215, 64, 3, 4, 30, 8, dict(precision="bf16")), (100, 64, 2, 2, 135, 8, {}),
    (3000, 32, 2, 8, 3, 6, dict(top_p=1.0)), (200, 64, 4, 8, 40, 8, dict(checkpoint_activations=True)),
])  # fmt: skip
def test_measurements_are_near_the_formula(V, C, L, rows, P, R, settings):
    trainer = make_trainer(V, C, L, 4, 160, gen_len=R, batch_size=rows, **settings)
    rollout = trainer.collect([chr(1 + i) * P for i in range(rows)], lambda texts: [0.0] * len(texts))
    measured, formula = measure(trainer, rollout), estimate(trainer, rows, P, R, rows)
    assert set(measured) == {"generation", "scoring", "update"}
    for phase, amount in measured.items():
        assert 0.55 < amount / getattr(formula, phase) < 1.05, phase


def test_what_is_measured_for_few_rows_tells_the_need_of_many():
    few, many = (make_trainer(1000, 32, 2, 4, gen_len=12, batch_size=rows, top_p=0.9) for rows in (4, 32))
    prompts = [chr(1 + i) * 5 for i in range(32)]
    rollouts = [t.collect(prompts[: t.config.batch_size], lambda texts: [0.0] * len(texts)) for t in (few, many)]
    small, full = (estimate(few, rows, 5, 12, rows) for rows in (4, 32))
    told, true = extrapolate(measure(few, rollouts[0]), small, full), measure(many, rollouts[1])
    for phase, amount in true.items():
        assert getattr(told, phase) == pytest.approx(amount, rel=0.15), phase
    assert (told.weights, told.rollout) == (full.weights, full.rollout)


def test_extrapolation_by_hand():
    small, full = MemoryNeed(1, 1, 10, 20, 30), MemoryNeed(7, 5, 100, 400, 600)
    scaled = extrapolate({"generation": 5, "scoring": 22, "update": 30}, small, full)
    assert scaled == MemoryNeed(7, 5, 50, 440, 600)
    assert scaled.total == 7 + 5 + 600 and scaled.largest == "update"


def test_measuring_leaves_no_gradients():
    trainer = PPOTrainer(make_gpt2(0), make_gpt2(0), Tokenizer(VOCAB), gen_len=2, batch_size=2, device="cpu")
    before = [p.detach().clone() for p in trainer.policy.parameters()]
    measure(trainer, trainer.collect(["好", "酒店"], lambda texts: [0.0, 0.0]))
    assert all(p.grad is None for p in trainer.policy.parameters())
    assert all(torch.equal(p, old) for p, old in zip(trainer.policy.parameters(), before, strict=True))


def test_gradients_are_counted_with_the_weights_and_not_in_the_update():
    trainer = make_trainer(50, 128, 4, 4, gen_len=2, batch_size=1)
    measured = measure(trainer, trainer.collect(["xx"], lambda texts: [0.0]))
    assert measured["update"] < memory.weight_bytes(trainer.policy) / 4


# ---- the measurement ------------------------------------------------------------------------------------------------


def test_peak_memory_by_hand():
    kept = torch.zeros(1000)  # 4000 bytes that were there before

    def work():
        a = kept + 1  # 4000
        b = a.view(10, 100).t()  # the same memory
        b += 1
        c = b.double()  # 8000 more
        del a, b  # 4000 less
        d = torch.cat([c, c])  # 16000 more: 24000
        del c, d
        _ = kept[:10] * 2

    assert peak_memory(work, CPU) == 24000
    assert peak_memory(lambda: None, CPU) == 0
    assert peak_memory(lambda: kept.add_(1), CPU) == 0


def test_peak_memory_sees_what_autograd_keeps_and_its_gradients():
    weight, x, held = torch.ones(10, 10, requires_grad=True), torch.ones(50, 10), []
    # x @ weight is 2000 bytes and goes, its exp is 2000 bytes and is kept for the backward pass, the sum has 4
    assert peak_memory(lambda: held.append((x @ weight).exp().sum()), CPU) == 4000
    # 4 of the incoming gradient, 2000 of the product with exp, 400 of the weight's gradient
    assert peak_memory(held[0].backward, CPU) == 2404
    assert weight.grad is not None


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
def test_elsewhere_the_pages_that_are_free_count_or_nothing_is_said(system, text, monkeypatch):
    write(system / "meminfo", text)
    answers = {"SC_AVPHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(memory.os, "sysconf", answers.__getitem__)
    assert available_memory(CPU) == 4096000

    def unknown(name):
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(memory.os, "sysconf", unknown)
    assert available_memory(CPU) is None
    limit(system, 2**31)
    assert available_memory(CPU) == 2**30 + 2**28


def test_this_machine_has_some_memory():
    available = available_memory(CPU)
    assert available is None or 2**20 < available < 2**50
