"""Runs of supervised fine-tuning, of reward models and of DPO: cut anywhere, they end as if undisturbed."""

import json
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from lives import process
from ranks import together

from conftest import VOCAB, make_llama
from folders import snapshot
from minirlhf import GPT2, DPOTrainer, GPT2Config, Llama, RewardModel, Run, Tokenizer, load_decoder
from minirlhf.device.processes import processes
from minirlhf.io.files import read_jsonl
from minirlhf.rewards.reward_model import DecoderScorer
from minirlhf.runs import RunFailed, load_checkpoint, save_checkpoint
from minirlhf.supervised.reward_modelling import RewardModelTrainer, RewardTrainingConfig, evaluate_rankings
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, perplexity
from minirlhf.text.demonstrations import Demonstration
from minirlhf.text.preferences import Ranking

DEMONSTRATIONS = [Demonstration("酒店", "很好，非常满意。"), Demonstration("hello w", "太差"), "早餐一般", "服务很好！",
                  "hello world，wifi太差", "很好很好", "差"]  # fmt: skip
RANKINGS = [Ranking("酒店", ("很好", "一般", "太差")), Ranking("", ("满意", "失望"), 0.7),
            Ranking("早餐", ("推荐", "差")), Ranking("位置", ("好", "差评！", "脏太脏"))]  # fmt: skip
DATA = {"sft": DEMONSTRATIONS, "reward_model": RANKINGS, "dpo": [replace(ranking, margin=0.0) for ranking in RANKINGS]}
SETTINGS = dict(epochs=3, lr=1e-2, max_length=24, device="cpu", save_freq=2)
KINDS = ["sft", "reward_model", "dpo"]


def gpt2(seed=0) -> GPT2:
    sizes = dict(vocab_size=len(VOCAB), n_positions=24, n_embd=8, n_layer=1, n_head=2)
    return GPT2(GPT2Config(**sizes, resid_pdrop=0.2, embd_pdrop=0.1, attn_pdrop=0.1), seed)


def llama(seed=0) -> Llama:
    """That of DPO, so that every kind of run has one decoder, and the decoders have one run at least."""
    return make_llama(seed, n_positions=24, n_embd=8, n_layer=1, n_head=2)


def new(kind, data=None, **settings):
    data = DATA[kind] if data is None else data
    if kind == "sft":
        config = SFTConfig(**{**SETTINGS, "tokens_per_batch": 24, "accumulation": 2, **settings})
        return SFTTrainer(gpt2(), Tokenizer(VOCAB), data, config)
    if kind == "dpo":
        settings = {**SETTINGS, "tokens_per_batch": 30, "batch_size": 3, "loss": "ipo", **settings}
        return DPOTrainer(llama(), llama(1), Tokenizer(VOCAB), **settings)
    model = RewardModel(DecoderScorer(gpt2()), Tokenizer(VOCAB), device="cpu")
    return RewardModelTrainer(model, data, RewardTrainingConfig(**{**SETTINGS, "tokens_per_batch": 30, **settings}))


def given(kind, data=None) -> dict:
    """What a resumed run needs besides its folder."""
    return {"ref_policy": llama(1)} if kind == "dpo" else {"data": DATA[kind] if data is None else data}


def train(trainer, *on_step, data=None):
    """Train on the data of its kind, which DPO gets now."""
    trainer.train(*([DATA["dpo"] if data is None else data] if trainer.kind == "dpo" else []), *on_step)


def measure(trainer) -> dict[str, float]:
    if trainer.kind == "sft":
        return {"perplexity": perplexity(trainer.model, trainer.tokenizer, ["房间干净"], 24)["token"]}
    if trainer.kind == "dpo":
        return {"held_out/loss": trainer.evaluate([Ranking("", ("满意", "脏"))])["loss"]}
    return {"held_out/loss": evaluate_rankings(trainer.model, [Ranking("", ("满意", "脏"))]).loss}


def finish(folder, kind, on_step=lambda step: None):
    """Begin or resume a run and bring it to its end, with figures and a sample at every save."""
    started = (folder / "config.json").exists()
    with Run.resume(folder, **given(kind)) if started else Run.start(folder, new(kind), {"kind": kind}) as run:
        if run.trainer.steps_done == 0:
            run.log(measure(run.trainer), [("before", None)])

        def record(batch, stats):
            due = run.due
            shown = run.record(batch, {**stats, **(measure(run.trainer) if due else {})}, ["text"] if due else [])
            assert shown == ([("text", None)] if due else [])
            on_step(run.trainer.steps_done)

        train(run.trainer, record)
    return run


@pytest.fixture(scope="module", params=KINDS)
def undisturbed(request, tmp_path_factory):
    """The kind, and the content of a run to its end in one go."""
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(folder, request.param)
    return request.param, folder


def test_a_run_leaves_its_log_and_its_newest_checkpoints(undisturbed):
    kind, folder = undisturbed
    metrics = read_jsonl(folder / "metrics.jsonl")
    total = len(metrics) - 1
    assert [line["step"] for line in metrics] == list(range(total + 1)) and total >= 6
    assert [f"{kind}/loss" in line for line in metrics] == [False] + [True] * total
    assert metrics[-1][f"{kind}/progress"] == 1
    figure = "perplexity" if kind == "sft" else "held_out/loss"
    due = sorted({*range(0, total, 2), total})
    assert [line["step"] for line in metrics if figure in line] == due
    samples = read_jsonl(folder / "samples.jsonl")
    assert [line["step"] for line in samples] == due and samples[0]["samples"] == [["before", None]]
    names = [path.name for path in sorted((folder / "checkpoints").iterdir())]
    assert names == [f"step-{step:06d}" for step in due[-2:]]  # and no best: nothing was rated
    checkpoint = folder / "checkpoints" / names[-1]
    loaded = RewardModel.from_pretrained(checkpoint) if kind == "reward_model" else load_decoder(checkpoint)
    assert sum(p.numel() for p in loaded.parameters()) > 1000


class Crash(BaseException):
    pass


def test_a_run_in_parts_ends_as_one_in_one_go(tmp_path, undisturbed):
    """Left by an exception after one step more each time: the steps since the last save are made again."""
    kind, expected = undisturbed
    folder = tmp_path / "run"
    for step in range(1, 7):

        def leave(done, step=step):
            torch.rand(3)  # what happens to the global stream does not matter
            if done == step:
                raise Crash

        with pytest.raises(Crash):
            finish(folder, kind, leave)
    finish(folder, kind)
    assert snapshot(folder) == snapshot(expected)


def live(folder, kind, mention, number):
    from lives import die_before

    die_before(folder, mention, number)
    finish(folder, kind)


@pytest.mark.parametrize(("mention", "number"), [("run/.config.json", 3), ("metrics.jsonl", 9), ("checkpoints", 200)])
def test_killed_at_any_moment_a_run_ends_as_if_undisturbed(tmp_path, undisturbed, mention, number):
    kind, expected = undisturbed
    child = process(live, tmp_path / "run", kind, mention, number)
    child.join()
    assert child.exitcode == -signal.SIGKILL
    finish(tmp_path / "run", kind)
    assert snapshot(tmp_path / "run") == snapshot(expected)


def test_a_loss_that_is_not_finite_leaves_the_last_checkpoint(tmp_path, undisturbed):
    kind, _ = undisturbed
    folder = tmp_path / "run"
    told = r"step 4 of \d+ failed: FloatingPointError: the loss became nan.* saved up to step 2"
    with pytest.raises(RunFailed, match=told), Run.start(folder, new(kind), {"kind": kind}) as run:
        loss, trainer = run.trainer.loss, run.trainer
        trainer.loss = lambda batch: loss(batch) * (float("nan") if trainer.steps_done == 3 else 1)
        train(trainer, run.record)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000000", "step-000002"]


@pytest.mark.parametrize("settings", [
    {"packing": True, "precision": "bf16"}, {"precision": "fp16", "max_grad_norm": float("inf")},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_goes_on_bit_for_bit(tmp_path, kind, settings):
    """In every precision, and with settings that JSON has no number for."""
    settings = {name: value for name, value in settings.items() if kind != "reward_model" or name != "packing"}
    whole, losses = new(kind, **settings), []
    train(whole, lambda *step: losses.append(step))
    save_checkpoint(whole, tmp_path / "whole")
    for done in (1, len(losses)):
        trainer, seen = new(kind, **settings), []

        def leave(batch, stats, trainer=trainer, done=done):
            if trainer.steps_done == done:
                raise Crash

        with pytest.raises(Crash):
            train(trainer, leave)
        save_checkpoint(trainer, tmp_path / "cut")
        again = load_checkpoint(tmp_path / "cut", **given(kind))
        assert (again.steps_done, again.config) == (done, whole.config)
        save_checkpoint(again, tmp_path / "again")
        assert snapshot(tmp_path / "again") == snapshot(tmp_path / "cut")
        train(again, lambda *step, seen=seen: seen.append(step))
        assert seen == losses[done:]
        save_checkpoint(again, tmp_path / "end")
        assert snapshot(tmp_path / "end") == snapshot(tmp_path / "whole")


# ---- of sharded models ----------------------------------------------------------------------------------------------


def train_undropped(run, until=None):
    """Each of several processes has dropout of its own, so without it; with figures at every save."""
    trainer = run.trainer
    trainer.with_dropout = False

    def record(batch, stats):
        run.record(batch, {**stats, **(measure(trainer) if run.due else {})})
        return trainer.steps_done == until

    with run:
        train(trainer, record)
    return trainer


def sharded(folder):
    """By kind, the numbers that this process holds of the model's, and the steps of a run that stopped and went on."""
    found = {}
    for kind in KINDS:
        run = Run.start(folder / kind, new(kind, epochs=2, save_freq=3, sharding="full", precision="fp32"), {})
        trainer = train_undropped(run, until=3)
        parts = [(p.to_local().numel(), p.numel()) for p in trainer.model.parameters()]
        held, of = map(sum, zip(*parts, strict=True))
        trainer.save_pretrained(folder / f"{kind} export", {"algorithm": "sharded"})
        if processes().first:
            shutil.copytree(folder / kind, folder / f"{kind} copy")
        found[kind] = held, of, train_undropped(Run.resume(folder / kind, **given(kind))).steps_done
    return found


def test_a_sharded_run_goes_on_sharded_and_alone(tmp_path):
    """The run is that of whole models, and what is exported is whole."""
    outcome = together(2, sharded, tmp_path)
    assert all(isinstance(found, dict) for found in outcome), outcome
    for kind in KINDS:
        train_undropped(Run.start(tmp_path / f"{kind} alone", new(kind, epochs=2, save_freq=3, precision="fp32"), {}))
        export, checkpoint = tmp_path / f"{kind} export", tmp_path / f"{kind} copy" / "checkpoints" / "step-000003"
        load = RewardModel.from_pretrained if kind == "reward_model" else load_decoder
        for p, q in zip(load(export).parameters(), load(checkpoint).parameters(), strict=True):
            assert torch.equal(p, q)
        assert "sharded" in (export / "README.md").read_text(encoding="utf-8")
        train_undropped(Run.resume(tmp_path / f"{kind} copy", **given(kind)))  # by one process, with whole models
        lines = read_jsonl(tmp_path / f"{kind} alone" / "metrics.jsonl")
        for folder in (tmp_path / kind, tmp_path / f"{kind} copy"):
            for line, expected in zip(read_jsonl(folder / "metrics.jsonl"), lines, strict=True):
                assert line == pytest.approx(expected, rel=1e-3, abs=1e-4)
        for found in outcome:
            held, of, steps = found[kind]
            assert held < 0.6 * of and steps == len(lines)
        assert sum(found[kind][0] for found in outcome) == of


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_other_data_and_other_settings_are_refused(tmp_path, kind):
    trainer = new(kind)
    if kind == "dpo":  # before that it has no data
        trainer.train(DATA[kind])
    save_checkpoint(trainer, tmp_path / "state")
    data = DATA[kind]
    others = [data[:3], data[::-1]]
    if kind == "sft":
        others.append([Demonstration("", "很好，非常满意。"), *data[1:]])
    elif kind == "reward_model":
        others.append([replace(data[0], margin=0.5), *data[1:]])
    for other in others:
        with pytest.raises(ValueError, match="the run began with other data"):
            train(load_checkpoint(tmp_path / "state", **given(kind, other)), data=other)
    missing = (
        "pass it as ref_policy" if kind == "dpo" else f"kind '{kind}'; pass the demonstrations or rankings as data"
    )
    with pytest.raises(ValueError, match=missing):
        load_checkpoint(tmp_path / "state")
    trainer = load_checkpoint(tmp_path / "state", **given(kind), save_freq=7, device="cpu")
    assert trainer.config.save_freq == 7
    for changed in (dict(lr=1.0), dict(epochs=4), dict(seed=1)):
        with pytest.raises(ValueError, match=rf"Config.{next(iter(changed))} was .* may change device, .*save_freq"):
            load_checkpoint(tmp_path / "state", **given(kind), **changed)
    with pytest.raises(ValueError, match=r"has no field 'epoch'; did you mean 'epochs'"):
        load_checkpoint(tmp_path / "state", **given(kind), epoch=1)


def test_dpo_goes_on_with_its_own_reference_only(tmp_path):
    """From its folder if it came from one; a reference-free run needs none."""
    gpt2(1).save_pretrained(tmp_path / "reference")
    settings = {**SETTINGS, "tokens_per_batch": 30}
    save_checkpoint(DPOTrainer(gpt2(), tmp_path / "reference", Tokenizer(VOCAB), **settings), tmp_path / "state")
    assert load_checkpoint(tmp_path / "state").reference_source == str(tmp_path / "reference")
    with pytest.raises(ValueError, match="state: the run began with another reference"):
        load_checkpoint(tmp_path / "state", gpt2(2))
    (tmp_path / "reference").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"it is the reference of .*state: pass ref_policy"):
        load_checkpoint(tmp_path / "state")
    free = DPOTrainer(gpt2(), None, Tokenizer(VOCAB), **settings, reference_free=True)
    save_checkpoint(free, tmp_path / "free")
    assert load_checkpoint(tmp_path / "free").reference is None


def test_bad_pairs_end_a_run_before_its_first_step(tmp_path):
    told = "what comes before the first step failed: ValueError: pairs is empty"
    with pytest.raises(RunFailed, match=told), Run.start(tmp_path / "run", new("dpo"), {}) as run:
        run.trainer.train([], run.record)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_a_checkpoint_would_round_start_no_run(tmp_path, kind):
    trainer = new(kind)
    trainer.model.double()
    with pytest.raises(ValueError, match="a checkpoint holds fp32 weights"):
        Run.start(tmp_path / "run", trainer, {})
    assert list(tmp_path.iterdir()) == []


COUNTERS = ["kind", "steps", "scaler", "data", "config", "origin", "frozen", "run"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_we_did_not_write_is_refused_by_name(tmp_path, kind, monkeypatch):
    """Its sums are right, what it says is not."""
    save_checkpoint(new(kind), tmp_path / "state")
    path, manifest = tmp_path / "state" / "training.json", tmp_path / "state" / "manifest.json"
    counters = json.loads(path.read_text())
    monkeypatch.setattr("minirlhf.runs.checkpoint.sha256", lambda _: "x")
    manifest.write_text(json.dumps({"sha256": dict.fromkeys(json.loads(manifest.read_text())["sha256"], "x")}))
    for name in [*COUNTERS, *(["reference"] if kind == "dpo" else [])]:
        missing = {key: value for key, value in counters.items() if key != name}
        bad = [missing, *({**counters, name: value} for value in (None, -1, [1], {"x": 1}))]
        for content in bad[:1] + bad[2:] if name in ("origin", "run") else bad:  # these two may be None
            path.write_text(json.dumps(content))
            with pytest.raises(ValueError, match=rf"state.*({name}|field)"):
                load_checkpoint(tmp_path / "state", **given(kind))
