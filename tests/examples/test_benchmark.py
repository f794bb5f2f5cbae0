"""examples/benchmark: its counting against hand-worked numbers and torch's own counter, its tables, whole runs."""

import dataclasses
import functools
import itertools
import json
import mmap
import os
import shlex
import statistics
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmark import __main__ as benchmark
from benchmark import floor, load, peer_trl, peers, report, scaling_model, studies
from benchmark.load import Load
from benchmark.work import Sample, Work, characters, iteration, peak_memory
from conftest import make_bert, make_gpt2
from minirlhf import BertConfig, GPT2Config
from minirlhf.models.lora import add_lora
from minirlhf.models.lora_config import LoRAConfig
from minirlhf.rl.logprobs import response_logprobs

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "examples" / "benchmark"

TINY = Work(size="tiny", batch=3, new_tokens=2, minibatch=2)
CPU = torch.device("cpu")


# ---- counting -------------------------------------------------------------------------------------------------------


def test_the_operations_of_a_layer_by_hand():
    """C = 2, inner 8: c_attn 2x6, c_proj 2x2, MLP 2x8 and 8x2 make 48 products and sums for a token, 96 operations;
    a query meets a key in 2 of them for the weight and 2 for the value, 8 operations; a row of 3 logits takes 12."""
    c = GPT2Config(vocab_size=3, n_positions=8, n_embd=2, n_layer=1, n_head=1)
    assert [floor.gpt2_flop(c, *counts) for counts in ((1, 0, 0), (0, 1, 0), (0, 0, 1))] == [96, 8, 12]
    deep = GPT2Config(vocab_size=3, n_positions=8, n_embd=2, n_layer=5, n_head=1, n_inner=4)
    assert floor.gpt2_flop(deep, 1, 1, 1) == 5 * (2 * (16 + 16) + 8) + 12
    bert = BertConfig(vocab_size=9, hidden_size=2, num_hidden_layers=3, num_attention_heads=1, intermediate_size=4,
                      id2label={0: "a", 1: "b"})  # fmt: skip
    # Two texts of 1 and 3 tokens: layers 4 x 64, pairs (1 + 9) x 8, pooler and classes 2 x (8 + 8).
    assert floor.bert_flop(bert, [1, 3]) == 3 * (4 * 64 + 10 * 8) + 2 * 16


def test_the_scaling_model_by_hand_and_its_table_in_the_docs():
    """124 M fp32 gradients in a ring of 8: 2 x 7/8 x 496 MB at 300 GB/s. 8 of 64 rows on each of 8 GPUs."""
    assert scaling_model.all_reduce_seconds(124e6, 8, 300e9) == pytest.approx(2.8933e-3, rel=1e-4)
    machine = scaling_model.Machine(flops=1e6, reached=0.5, memory_bandwidth=1e3)
    work = scaling_model.Work(rows=64, prompt=3, response=2, minibatch=32, epochs=3)
    found = scaling_model.iteration(10, 8, work, machine)
    # Two reads of 20 bytes and the prompts' 20 x 24 operations; 40 tokens by two models; 6 steps of 4 rows x 5 tokens.
    assert found.generation == pytest.approx(2 * 0.02 + 480 / 5e5) and found.scoring == pytest.approx(1600 / 5e5)
    assert found.update == pytest.approx(60 * 6 * 20 / 5e5) and found.limit == "generation"
    assert scaling_model.memory(10, 8, False) == 240 and scaling_model.memory(10, 8, True) == 20 + 40
    table = scaling_model.tables(scaling_model.Work(), scaling_model.Machine()).strip()
    assert table in (REPO / "docs" / "processes.md").read_text(encoding="utf-8")


def counted(run) -> int:
    counter = FlopCounterMode(display=False)
    with counter:
        run()
    return counter.get_total_flops()


def test_the_operations_are_those_that_torch_counts():
    """In plain models, which compute all T x T pairs and the logits of all positions; backward is twice forward."""
    transformers = pytest.importorskip("transformers")
    gpt2, bert = make_gpt2(n_inner=48).config, make_bert().config
    sizes = {name: value for name, value in dataclasses.asdict(gpt2).items() if not name.endswith("pdrop")}
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, attn_implementation="eager"))
    ids = torch.arange(14).view(2, 7)
    expected = floor.gpt2_flop(gpt2, 14, 2 * 7 * 7, 14)
    with torch.no_grad():
        assert counted(lambda: plain(ids)) == expected
    assert counted(lambda: plain(ids).logits.sum().backward()) == 3 * expected
    config = transformers.BertConfig(**dataclasses.asdict(bert), attn_implementation="eager")
    classifier = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        assert counted(lambda: classifier(ids)) == floor.bert_flop(bert, [7, 7])


def test_the_numbers_of_parameters():
    gpt2, bert = make_gpt2(n_inner=48), make_bert()
    assert floor.gpt2_parameters(gpt2.config) == sum(p.numel() for p in gpt2.parameters())
    read = [p.numel() for name, p in bert.named_parameters() if "embeddings" not in name and "classifier" not in name]
    assert floor.bert_parameters(bert.config) == sum(read)
    base = GPT2Config(vocab_size=50257)
    assert floor.gpt2_parameters(base) == 124_439_808  # as published


def test_tokens_and_pairs_of_a_batch_are_those_that_differ():
    """Counted one by one: a state is what stands before it, so equal prompts have equal states."""
    prompts, responses = [(1, 2, 3), (4,), (1, 2, 3), (1, 2)], [3, 1, 2, 4]
    states = set()
    for row, (prompt, new) in enumerate(zip(prompts, responses, strict=True)):
        states |= {(prompt, position) for position in range(len(prompt))}
        states |= {(prompt, row, len(prompt) + t) for t in range(new - 1)}
    pairs = sum(state[-1] + 1 for state in states)
    assert floor.context(floor.Batch(prompts, responses, [])) == (len(states), pairs)


@pytest.mark.parametrize(("rows", "size"), [(1, 2), (2, 2), (3, 2), (5, 2), (2, 5), (2, 9), (4, 1)])
def test_minibatches_that_hold_a_prompt(rows, size):
    orders = list(itertools.permutations(range(5)))
    found = [
        sum(any(row < rows for row in order[start : start + size]) for start in range(0, 5, size)) for order in orders
    ]
    assert floor.minibatches_with(rows, 5, size) == pytest.approx(statistics.mean(found))


def test_the_floor_of_the_work_by_hand():
    """128 rows of 4 prompts of 3 tokens and 16 new ones, GPT-2 base and BERT base, vocabulary 21128."""
    layers, head = 2 * 12 * 12 * 768**2, 2 * 768 * 21128  # operations a token, a row of logits
    prompts = [(101, i % 4, i % 4 + 50) for i in range(128)]
    batch = floor.Batch(prompts, [16] * 128, [20] * 128)
    assert batch.tokens == 128 * 19

    def costs(precision, minibatch):
        return floor.phase_costs(GPT2Config(), BertConfig(), batch, precision, 4, minibatch)

    found = costs("fp32", 128)
    flop = {phase: sum(cost.flop for cost in parts) for phase, parts in found.items()}
    once = 4 * 3 + 128 * 15  # tokens
    attention = 4 * 12 * 768 * (4 * 6 + 128 * sum(range(4, 19)))
    assert flop["generate"] == once * layers + (4 + 128 * 15) * head + attention
    assert flop["passes"] == once * layers + 128 * 16 * head + attention
    assert flop["update"] == 4 * 3 * flop["passes"]
    assert flop["score"] == pytest.approx(128 * 20 * layers, rel=0.01)
    assert flop["step"] == flop["passes"] + flop["update"]
    assert flop["iteration"] == flop["generate"] + flop["score"] + flop["step"]
    # At 16 rows a minibatch nearly every one needs all four prompts; at 1 each row pays for its own.
    assert sum(c.flop for c in costs("fp32", 16)["update"]) == pytest.approx(12 * (8 * 4 * 3 + 1920) * layers
                                                                           + 12 * 2048 * head, rel=0.01)  # fmt: skip
    single = costs("fp32", 1)["update"][0].flop
    assert single == 12 * (128 * 18 * layers + 2048 * head + 4 * 12 * 768 * 128 * sum(range(19)))

    parameters = 102_068_736
    assert found["update"][-1] == floor.Cost(0, 4 * 28 * parameters)  # Adam, once a step
    read = 4 * (parameters - 1024 * 768)
    pairs = 4 * 6 + 128 * sum(range(4, 19))
    assert found["generate"][0].bytes == 16 * read + 2 * 4 * 12 * 768 * pairs
    half = costs("bf16", 128)
    assert half["generate"][0].bytes == found["generate"][0].bytes / 2
    assert len(half["passes"]) == 2 and half["update"][-1].bytes == 4 * 30 * parameters
    assert "score" not in floor.phase_costs(GPT2Config(), None, batch, "fp32", 4, 16)


def test_the_longer_of_two_times_bounds_each_cost():
    rates = floor.Rates(flop=5, bytes=2)
    assert rates.seconds([floor.Cost(10, 1), floor.Cost(0, 6)]) == 2 + 3
    assert floor.with_best([floor.Rates(3, 9), floor.Rates(4, 7)]) == floor.Rates(4, 9)


# ---- the work -------------------------------------------------------------------------------------------------------


def test_the_work_is_what_it_says():
    assert Work().ppo().batch_size == 128 and Work().ppo().top_p == 0.95 and Work().ppo().ppo_epochs == 4
    batch = Work(size="tiny").lengths()
    assert [len(ids) for ids in batch.prompts] == [3] * 128 and len(set(map(tuple, batch.prompts))) == 4
    assert batch.responses == [16] * 128 and batch.texts == [20] * 128
    with pytest.raises(ValueError, match="batch_sise"):
        Work(config={"batch_sise": 3}).ppo()


def test_an_iteration_is_timed_by_phases():
    trainer, reward = TINY.trainer(), TINY.reward_function()
    before = trainer.policy.decoder.wte.weight.clone()
    samples = {s.phase: s for s in iteration(trainer, TINY.prompts, reward, "us")}
    assert tuple(samples) == report.PHASES and {s.peer for s in samples.values()} == {"us"}
    seconds = {name: s.seconds for name, s in samples.items()}
    assert min(seconds.values()) > 0 and seconds["step"] == seconds["passes"] + seconds["update"]
    parts = sum(seconds[name] for name in ("generate", "score", "step"))
    assert parts <= seconds["iteration"] + 1e-3  # clocks are read one after the other
    assert trainer.iteration == 1 and not torch.equal(trainer.policy.decoder.wte.weight, before)
    assert samples["iteration"].peak_mb == max(s.peak_mb for s in samples.values())
    assert {s.matmul for s in samples.values()} == {trainer.precision.matmul} == {"default"}  # it is small


def test_methods_train_on_as_many_sequences_in_as_many_steps():
    heads, steps = [], []
    for config in benchmark.WAYS["methods"].values():
        work = dataclasses.replace(TINY, batch=8, minibatch=4, config=config)
        trainer = work.trainer()
        rollout = trainer.collect(work.drawn, studies.nothing)
        assert list(rollout.prompts) == work.prompts and len(rollout) == 8 == len(work.lengths().prompts)
        heads.append(trainer.policy.value_head is not None)
        steps.append(trainer.step(rollout)["ppo/updates"])
    assert heads == [True, False, False] and steps == [8, 8, 8]
    assert studies.timed(trainer, 8, 1)["generate s"] > 0
    work = Work(config={"group_size": 4}, different_prompts=144)
    assert len(work.drawn) == len(set(work.drawn)) == 32 and len(set(work.lengths().prompts[0])) == 3


def test_memory_is_the_most_of_its_phase():
    with peak_memory(CPU) as small:
        pass
    with peak_memory(CPU) as large, mmap.mmap(-1, 2**28) as taken:  # past malloc, which may keep what was freed
        taken.write(bytes(2**28))
    assert large[0] - small[0] > 200
    if os.access("/proc/self/clear_refs", os.W_OK):
        with peak_memory(CPU) as after:
            pass
        assert large[0] - after[0] > 200


# ---- peers ----------------------------------------------------------------------------------------------------------


def test_transformers_does_the_same_work():
    pytest.importorskip("transformers")
    peer = peers.TransformersPeer(TINY)
    tokens, mask, scores, _ = peer.collect([*TINY.prompts, "酒店周围"])
    assert tokens.shape == mask.shape == (4, 5 + 2) and mask.sum(-1).tolist() == [5, 5, 5, 7]
    policy = TINY.trainer().policy
    with torch.no_grad():
        ours = response_logprobs(policy, tokens, mask, 2).logprobs
        theirs, _ = peer._score(peer.policy, tokens, mask)
    torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=0)
    texts = [p + peer.tokenizer.decode(row[-2:]) for p, row in zip([*TINY.prompts, "酒店周围"], tokens, strict=True)]
    torch.testing.assert_close(scores, TINY.reward_function()(texts), atol=1e-5, rtol=0)
    before = [p.clone() for p in peer.policy.parameters()]
    samples = peer.iteration(TINY.prompts)
    assert [s.phase for s in samples] == ["generate", "score", "step", "iteration"]
    assert all(s.peer == peer.name and s.seconds > 0 and s.peak_mb is None for s in samples)
    assert any(not torch.equal(p, q) for p, q in zip(peer.policy.parameters(), before, strict=True))


LINES = [{"peer": "x", "phase": p, "seconds": s, "peak_mb": m, "matmul": "onednn", "top_p": 1} for p, s, m in (
    ("generate", 1.5, 10), ("score", 0.5, 30), ("step", 4, 20))]  # fmt: skip


def printing(*lines) -> str:
    return shlex.join([sys.executable, "-c", f"print({chr(10).join(lines)!r})"])


def test_commands_that_time_themselves():
    command = printing("loading ...", *map(json.dumps, LINES), "[1]", '{"peer": "x"}', "3")
    assert peers.run_command(command) == [
        *(Sample("x", *row, "onednn") for row in (("generate", 1.5, 10), ("score", 0.5, 30), ("step", 4.0, 20))),
        Sample("x", "iteration", 6.0, 30),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="printed no timing: it said nothing"):
        peers.run_command(printing("nothing of use"))
    with pytest.raises(ValueError, match="ended with 3: boom"):
        peers.run_command([sys.executable, "-c", "import sys; print('boom', file=sys.stderr); sys.exit(3)"])
    with pytest.raises(OSError):
        peers.run_command("no-such-program-anywhere")


QUIET, BUSY = Load(wall=1.0, own=2.0, other=0.0), Load(wall=1.0, own=1.0, other=1000.0)


@pytest.fixture
def turns(monkeypatch):
    """Take turns of two sides whose iterations take so many seconds, under such loads.

    Returns the seconds of the turns that count and of the others, by side, and the order in which the sides ran.
    """

    def take(rounds, seconds, loads=None):
        told, left = [], {name: list(zip(values, (loads or {}).get(name, [QUIET] * 9), strict=False))
                          for name, values in seconds.items()}  # fmt: skip
        current = []
        monkeypatch.setattr(peers, "Meter", lambda: SimpleNamespace(load=lambda: current[-1]))

        def side(name):
            taken, load = left[name].pop(0)
            current.append(load)
            return [Sample(name, "step", taken / 2), Sample(name, "iteration", taken)]

        sides = [(name, functools.partial(side, name)) for name in seconds]
        kept, dropped = peers.in_turns(sides, rounds, lambda number, turn: told.append((number, turn.name)))
        by_side = [{name: [turn.seconds for turn in part if turn.name == name] for name in seconds}
                   for part in (kept, dropped)]  # fmt: skip
        return *by_side, told

    return take


def test_a_turn_that_is_an_outlier_is_repeated(turns):
    """The 91 s beside 63 s: it gives way to what repeats it, and a repetition that is slow as well does not count."""
    kept, dropped, told = turns(2, {"A": [91.0, 63.0, 64.0], "B": [80.0, 81.0]})
    assert kept == {"A": [63.0, 64.0], "B": [80.0, 81.0]} and dropped == {"A": [91.0], "B": []}
    assert told[-1] == (2, "A") and len(told) == 5
    kept, dropped, _ = turns(2, {"A": [91.0, 63.0, 95.0, 92.0]})
    assert kept == {"A": [91.0, 63.0]} and dropped == {"A": [95.0, 92.0]}  # no more than two repetitions


def test_a_turn_beside_other_work_is_repeated(turns):
    kept, dropped, _ = turns(1, {"A": [70.0, 60.0]}, {"A": [BUSY, QUIET]})
    assert kept == {"A": [60.0]} and dropped == {"A": [70.0]}
    kept, dropped, _ = turns(1, {"A": [70.0, 60.0]}, {"A": [QUIET, BUSY]})
    assert kept == {"A": [70.0]} and dropped == {"A": []}


def test_whose_load_it_was(monkeypatch, tmp_path):
    """user, nice, system, idle, iowait, irq, softirq, steal and guest in ticks; idle and guest are no load."""
    monkeypatch.setattr(load.os, "sysconf", lambda name: 100)
    monkeypatch.setattr(load.os, "cpu_count", lambda: 2)
    stat = "cpu  {} 20 30 9000 5000 40 50 60 70 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n"
    assert load.busy_seconds(stat.format(100)) == 3.0
    monkeypatch.setattr(load, "STAT", tmp_path / "stat")
    load.STAT.write_text(stat.format(100))
    meter = load.Meter()
    meter.start = (meter.start[0] - 10, meter.start[1] - 12, meter.start[2])  # by the clock, own CPU seconds
    load.STAT.write_text(stat.format(100 + 1300))
    found = meter.load()
    assert (found.wall, found.own, found.other) == pytest.approx((10.0, 12.0, 1.0), abs=0.1) and not found.shared
    assert Load(10.0, 12.0, 1.1).shared and "NOT ITS OWN" in str(Load(10.0, 12.0, 1.1))
    load.STAT.unlink()
    assert not Load(10.0, 12.0, None).shared and load.Meter().start[2] is None


# ---- the report -----------------------------------------------------------------------------------------------------

SAMPLES = [Sample("us", "generate", s, m) for s, m in ((1.0, 50.0), (9.0, 70.0), (2.0, 60.0))] + [
    Sample("them", "generate", 8.0, 140.0), Sample("them", "step", 3.0, None)]  # fmt: skip


def test_medians_spread_and_outliers():
    first, *others = report.summarise(SAMPLES, {"us": {"generate": 1.6}}, new_tokens=32)
    assert first == {
        "peer": "us", "phase": "generate", "median s": 2.0, "min s": 1.0, "max s": 9.0, "spread": 4.0, "repeats": 3,
        "outliers": 2, "new tokens/s": 16.0, "peak MB": 70.0, "floor s": 1.6, "times the floor": 1.25,
    }  # fmt: skip
    assert [(row["peer"], row["phase"], row["floor s"], row["new tokens/s"]) for row in others] == [
        ("them", "generate", None, 4.0), ("them", "step", None, None),
    ]  # fmt: skip


def test_ratios_are_of_what_both_timed():
    (row,) = report.ratios(report.summarise(SAMPLES), ["us"])
    assert row == {"ours": "us", "over": "them", "generate": 0.25, "shortest iteration": None, "peak memory": 0.5}


def test_exponents_of_known_powers():
    rows = [{"over": "batch", "batch": n, "x s": 3.0 * n**2, "y s": 5.0 * n, "peak MB": 1.0} for n in (2, 4, 16)]
    found = {row["phase"]: (row["exponent"], row["of the last two"]) for row in report.exponents(rows)}
    assert found == {"x": pytest.approx((2, 2)), "y": pytest.approx((1, 1))}


def test_the_bounds_of_a_phase():
    costs = {"update": [floor.Cost(30e9, 1e9), floor.Cost(0, 4e9)]}
    (row,) = report.bounds(costs, floor.Rates(10e9, 2e9))
    assert row == {"phase": "update", "GFLOP": 30, "GB": 5, "arithmetic s": 3, "memory s": 2.5, "floor s": 5}


def test_the_report_says_whose_load_it_was():
    def said(*turns):
        names = ("other cores", "shared", "dropped")
        return report.load_line([dict(zip(names, turn, strict=True)) for turn in turns])

    quiet, busy = (0.02, False, False), (0.9, True, True)
    assert said(quiet, quiet) == (
        "Load: its own in all turns; other work took up to 0.02 cores. Turns that were repeated: 0."
    )
    assert said(busy, quiet) == (
        "Load: **not its own in 1 of 2 turns**; other work took up to 0.90 cores. Turns that were repeated: 1."
    )
    assert "does not say" in said((None, False, False))


def test_the_report_names_the_library_of_each_side():
    made = {"command": "x", "date": "y", "machine": {}, "products by": {"us": "onednn", "old": "default"}}
    text = report.markdown(made)
    assert "fp32 products of us: through oneDNN\n" in text and "of old: through PyTorch's default\n" in text


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def timed(call, monkeypatch, tmp_path):
    """Run the benchmark in an empty folder: the error that it ended with or None, and what it printed."""
    monkeypatch.chdir(tmp_path)
    return functools.partial(call, SCRIPT)


SMALL = ["--size", "tiny", "--quick", "--batch", 3, "--new-tokens", 2]


def test_everything_at_once_in_turns_with_a_command(timed, tmp_path, monkeypatch):
    """Both sides are processes, so that each has its own memory. Whatever else runs here, no turn is repeated."""
    monkeypatch.setattr(Load, "shared", False)
    tables = ["iteration", "scaling", "ragged", "overhead"]
    options = ["--precision", "bf16", "--threads", 1, "--config", "cliprange=0.1", "--output", "out"]
    error, shown = timed(*tables, *SMALL, *options, "--peer-command", printing(*map(json.dumps, LINES)))
    assert error is None
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == ["phases.png", "report.md", "results.json", "scaling.png"]
    assert (tmp_path / "out/report.md").read_text(encoding="utf-8") == shown.removesuffix("\n")
    for name in ("phases.png", "scaling.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    result = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert result["machine"]["torch"] == torch.__version__ and result["work"]["batch"] == 3
    ours = "minirlhf bf16 minibatch 16 cliprange=0.1"
    rows = [row for row in result["iteration"] if row["peer"] == ours]
    assert result["products by"] == {"x": "onednn"} and "fp32 products of x: through oneDNN" in shown
    assert rows and all(row["times the floor"] > 0 and row["peak MB"] > 50 for row in rows)
    assert all(turn["own cores"] > 0 for turn in result["load"] if turn["turn"] == ours) and "Load: " in shown
    order = [peer for peer, _ in itertools.groupby(s["peer"] for s in result["samples"])]
    assert order == [ours, "x"]  # those that count
    (ratio,) = result["ratios"]
    assert (ratio["ours"], ratio["over"]) == (ours, "x") and ratio["iteration"] > 0 and ratio["peak memory"] > 1
    assert [row["batch"] for row in result["scaling"] if row["over"] == "batch"] == [4, 8]
    assert [row["new tokens"] for row in result["scaling"] if row["over"] == "new tokens"] == [8, 16]
    assert {row["what"].split()[0] for row in result["ragged"]} == {"prompts", "responses"}
    assert all(0 < row["real tokens' share"] <= 1 and row["times its share"] > 0 for row in result["ragged"])
    total = result["overhead"][-1]
    assert total["phase"] == "step of the default run" and total["times bare"] == total["s"] / total["bare s"]


def test_all_weights_against_adapters(monkeypatch):
    """Each way is a command of ours that makes the trainer meant; the table has medians, and ratios to the first."""
    seen = []

    def run(command):
        monkeypatch.setattr(sys, "argv", command[1:])
        args = benchmark.read_arguments()
        config = benchmark.work_of(args, args.precision[0]).ppo()
        trainer = benchmark.work_of(args, args.precision[0]).trainer()
        seen.append((config.lora and config.lora.base_dtype, config.checkpoint_activations))
        seconds, peak = (2.0, 300.0) if config.lora else (4.0, 1000.0)
        assert trainer.config.adapters_off == (config.lora is not None) and config.batch_size == 3
        return [Sample("us", "update", seconds / 2, peak), Sample("us", "iteration", seconds, peak / 2)]

    monkeypatch.setattr(benchmark, "run_command", run)
    monkeypatch.setattr(peers, "Meter", lambda: SimpleNamespace(load=lambda: QUIET))
    monkeypatch.setattr(sys, "argv", ["x", "lora", "--size", "tiny", "--batch", "3", "--repeats", "1"])
    args = benchmark.read_arguments()
    rows = benchmark.time_ways(benchmark.work_of(args, "fp32"), benchmark.WAYS["lora"], args)
    assert seen == [(None, False), (None, True), ("fp32", False), ("bf16", False), ("fp32", True)]
    assert [row["way"] for row in rows] == list(benchmark.WAYS["lora"])
    assert rows[0] == {"way": "all weights", "update s": 2.0, "iteration s": 4.0, "peak MB": 1000.0,
                       "time over the first": 1.0, "memory over the first": 1.0}  # fmt: skip
    assert (rows[2]["time over the first"], rows[2]["memory over the first"]) == (0.5, 0.3)


def test_the_commands_of_the_readme_are_commands(monkeypatch):
    text = (REPO / "examples/README.md").read_text(encoding="utf-8").split("\n## Benchmark\n")[1]
    commands = [shlex.split(line) for line in text.splitlines() if line.startswith("python examples/benchmark")]
    assert len(commands) >= 8
    for command in commands:
        monkeypatch.setattr(sys, "argv", command[1:])
        args = benchmark.read_arguments()
        assert benchmark.work_of(args, args.precision[0]).ppo()
        for peer in args.peer_command:
            assert (REPO / shlex.split(peer)[1]).exists()


def test_the_other_side_has_the_same_work():
    """128 prompts of four kinds and 3 tokens, 16 new tokens, texts of 20: what its own tokenizer says."""
    pytest.importorskip("transformers")
    batch = Work(size="tiny").lengths()
    assert [len(query) for query in peer_trl.QUERIES] == [len(ids) for ids in batch.prompts]
    assert len({tuple(query.tolist()) for query in peer_trl.QUERIES}) == len(set(map(tuple, batch.prompts)))
    assert [len(response) for response in peer_trl.RESPONSES] == batch.responses
    tokenizer = peer_trl.characters()
    assert [len(ids) for ids in tokenizer(peer_trl.TEXTS)["input_ids"]] == batch.texts
    assert sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get) == characters(21128)
    assert peer_trl.RESPONSES[5].tolist() == tokenizer(peer_trl.TEXTS[5])["input_ids"][3:-1]


def test_trl_s_adapters_are_ours():
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    decoder = make_gpt2(n_embd=8, n_layer=1, n_head=2)
    sizes = {name: getattr(decoder.config, name) for name in ("vocab_size", "n_embd", "n_layer", "n_head")}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes))
    theirs = peft.get_peft_model(theirs, peer_trl.lora(benchmark.ADAPTERS["rank"]))
    ours = LoRAConfig.of(benchmark.ADAPTERS)
    add_lora(decoder, ours)
    own, other = ([sorted(p.shape) for p in m.parameters() if p.requires_grad] for m in (decoder, theirs))
    assert sorted(own) == sorted(other)
    assert theirs.peft_config["default"].lora_alpha / ours.rank == ours.alpha / ours.rank


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_same_tables_on_a_gpu(timed, tmp_path):
    error, _ = timed("iteration", "scaling", "ragged", "overhead", *SMALL, "--device", "cuda", "--precision", "bf16",
                    "tf32", "--output", "out", "--against", "transformers")  # fmt: skip
    assert error is None
    result = json.loads((tmp_path / "out/results.json").read_text(encoding="utf-8"))
    assert result["machine"]["GPU"] and len({row["peer"] for row in result["iteration"]}) == 4
    assert all(row["memory s"] > 0 for precision in ("bf16", "tf32") for row in result["bounds"][precision])
    assert result["overhead"]


@pytest.mark.parametrize(("arguments", "message"), [
    (["speed"], "tables are iteration, scaling, ragged, overhead, lora, methods, got 'speed'"),
    (["--against", "transformers", "--peer-command", "true"], "one after the other"),
    (["--config", "lrr=1"], "did you mean 'lr'"),
    (["--policy", "nowhere"], "nowhere"),
    (["--size", "qwen3-0.6b"], "the size qwen3-0.6b is for the tables lora, methods"),
    (["--different-prompts", "145"], "--different-prompts is 145, there are 144"),
    (["--precision", "tf32"], "'tf32' needs a GPU"),
    (["--batch", "0"], 2),
    (["--config", "lr"], 2),
])  # fmt: skip
def test_bad_input_is_one_line(timed, arguments, message, tmp_path):
    error, _ = timed(*SMALL, *arguments, "--output", "out")
    if message == 2:  # of argparse, which has said why
        assert error == 2
    else:
        assert isinstance(error, str) and error.startswith("error: ") and message in error and "\n" not in error
    assert not (tmp_path / "out").exists()
