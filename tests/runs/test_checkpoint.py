"""Checkpoints: a run that was cut goes on bit for bit; what does not fit, or was damaged, is refused by name."""

import hashlib
import math
import shutil

import pytest
import torch

from conftest import VOCAB, make_gpt2, make_llama
from folders import snapshot
from minirlhf import ActorCritic, PPOTrainer, Tokenizer
from minirlhf.io.files import read_json, sha256, write_json
from minirlhf.io.training_state import module_hash
from minirlhf.runs import checkpoint
from minirlhf.runs.checkpoint import DamagedCheckpoint, load_checkpoint, restore_checkpoint, save_checkpoint

PROMPTS = ["酒店很好", "w", "房间干净", "早餐"]
EOS = VOCAB.index("##a")
SMALL = dict(n_embd=16, n_layer=1, n_head=2)
DEFAULTS = dict(
    steps=8, batch_size=4, minibatch_size=2, forward_batch_size=2, gen_len=5, ppo_epochs=2, lr=1e-3, device="cpu",
    adam_eps=1e-5,
)  # fmt: skip


def reward(texts):
    return [len(set(text)) / 8 for text in texts]


def make_trainer(make=make_gpt2, **settings):
    """A small policy with a value head away from zero, and a reference."""
    policy = ActorCritic(make(0, scale=4.0, **SMALL))
    with torch.no_grad():
        policy.value_head.summary.weight.normal_(generator=torch.Generator().manual_seed(0))
    return PPOTrainer(policy, make_reference(make), Tokenizer(VOCAB), **{**DEFAULTS, **settings})


def make_reference(make=make_gpt2):
    return make(1, scale=4.0, **SMALL)


def one_step(trainer):
    trainer.step(trainer.collect(PROMPTS, reward))


def same_weights(trainer, other):
    for (name, a), b in zip(trainer.policy.named_parameters(), other.policy.parameters(), strict=True):
        assert torch.equal(a, b), name


def figures(stats):
    return {name: value for name, value in stats.items() if not name.startswith("time/")}


RUN = dict(
    steps=20, eos_token_id=EOS, lr_schedule="linear", horizon=50.0, init_kl_coef=0.3, top_p=0.9,
)  # fmt: skip


def resume(folder, make=make_gpt2, **overrides):
    return load_checkpoint(folder, make_reference(make), **overrides)


@pytest.mark.parametrize("settings", [
    {}, dict(precision="bf16"), dict(precision="fp16", adaptive_kl=False, max_grad_norm=math.inf),
    dict(make=make_llama, eos_token_id=(EOS, 7)), dict(make=make_llama, precision="bf16"),
], ids=["fp32", "bf16", "fp16", "llama", "llama bf16"])  # fmt: skip
def test_a_run_cut_by_a_checkpoint_goes_on_bit_for_bit(tmp_path, settings):
    make = settings.get("make", make_gpt2)
    settings = {**RUN, **settings}
    whole = make_trainer(**settings)
    expected = whole.train(PROMPTS, reward)

    cut = make_trainer(**settings)

    class Crash(Exception):
        pass

    def crash_at_two(rollout, stats):
        if cut.iteration == 2:
            save_checkpoint(cut, tmp_path / "cut")
            raise Crash

    with pytest.raises(Crash):
        cut.train(PROMPTS, reward, crash_at_two)
    resumed = resume(tmp_path / "cut", make)
    assert resumed.iteration == 2 and resumed.config == whole.config
    rest = resumed.train(PROMPTS, reward)
    assert [figures(stats) for stats in rest] == [figures(stats) for stats in expected[2:]]
    same_weights(whole, resumed)
    save_checkpoint(whole, tmp_path / "whole")
    save_checkpoint(resumed, tmp_path / "resumed")
    assert snapshot(tmp_path / "resumed") == snapshot(tmp_path / "whole")  # all else: moments, generators, counters


@pytest.mark.parametrize(
    "settings",
    [{}, dict(advantages="dr_grpo", group_size=2), dict(advantages="dr_grpo", group_size=2, lora={"rank": 2})],
    ids=["value head", "no value head", "adapters and no value head"],
)
def test_a_trainer_made_anew_gets_weights_and_state_of_a_checkpoint(tmp_path, settings):
    def new():
        reference = None if "lora" in settings else make_reference()
        policy = make_gpt2(0, scale=4.0, **SMALL)
        return PPOTrainer(policy, reference, Tokenizer(VOCAB), **{**DEFAULTS, **settings})

    trainer, again = new(), new()
    prompts = PROMPTS[: 4 // trainer.config.group_size]
    trainer.step(trainer.collect(prompts, reward))
    save_checkpoint(trainer, tmp_path / "c")
    restore_checkpoint(again, tmp_path / "c")
    a, b = (figures(each.step(each.collect(prompts, reward))) for each in (trainer, again))
    assert a == b
    same_weights(trainer, again)


def test_what_was_frozen_stays_frozen_and_bad_steps_are_remembered(tmp_path):
    policy = ActorCritic(make_gpt2(0, **SMALL))
    policy.decoder.wte.requires_grad_(False)
    trainer = PPOTrainer(policy, make_reference(), Tokenizer(VOCAB), **DEFAULTS)
    one_step(trainer)
    trainer.micro_batch_size, trainer.bad_steps = 1, 2  # as after a GPU had no room for more, and NaN gradients
    save_checkpoint(trainer, tmp_path / "state")
    resumed = resume(tmp_path / "state")
    assert (resumed.micro_batch_size, resumed.bad_steps) == (1, 2)
    assert resume(tmp_path / "state", forward_batch_size=4).micro_batch_size == 2
    for each in (trainer, resumed):
        one_step(each)
    assert not resumed.policy.decoder.wte.weight.requires_grad
    same_weights(resumed, trainer)


def test_a_checkpoint_is_a_model_folder_of_safetensors_and_json(tmp_path):
    trainer = make_trainer(value_head="linear")
    one_step(trainer)
    save_checkpoint(trainer, tmp_path / "state")
    policy = ActorCritic.from_pretrained(tmp_path / "state")
    assert all(torch.equal(a, b) for a, b in zip(policy.parameters(), trainer.policy.parameters(), strict=True))
    assert Tokenizer.from_pretrained(tmp_path / "state").vocab == VOCAB
    names = {path.name for path in (tmp_path / "state").iterdir()}
    assert {name for name in names if not name.endswith((".safetensors", ".json"))} == {"vocab.txt", "README.md"}


# ---- the reference --------------------------------------------------------------------------------------------------


def with_reference_folder(tmp_path):
    make_reference().save_pretrained(tmp_path / "reference")
    return PPOTrainer(ActorCritic(make_gpt2(0, **SMALL)), tmp_path / "reference", Tokenizer(VOCAB), **DEFAULTS)


def test_a_reference_from_a_folder_is_found_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_reference().save_pretrained("reference")
    trainer = PPOTrainer(ActorCritic(make_gpt2(0, **SMALL)), "reference", Tokenizer(VOCAB), **DEFAULTS)
    assert module_hash(trainer.reference) == module_hash(make_reference())
    save_checkpoint(trainer, "state")
    monkeypatch.chdir("/")
    resumed = load_checkpoint(tmp_path / "state")
    assert module_hash(resumed.reference) == module_hash(make_reference())
    assert resumed.reference_source == trainer.reference_source == str(tmp_path / "reference")


def test_a_reference_that_moved_may_be_passed(tmp_path):
    save_checkpoint(with_reference_folder(tmp_path), tmp_path / "state")
    (tmp_path / "reference").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"reference.* pass ref_policy"):
        load_checkpoint(tmp_path / "state")
    save_checkpoint(make_trainer(), tmp_path / "other")
    with pytest.raises(ValueError, match="reference that came from no folder; pass it as ref_policy"):
        load_checkpoint(tmp_path / "other")
    assert load_checkpoint(tmp_path / "state", tmp_path / "moved").iteration == 0
    assert resume(tmp_path / "state").iteration == 0


def test_another_reference_is_refused(tmp_path):
    """Other by one bit of one weight; in its folder, or passed."""
    trainer = with_reference_folder(tmp_path)
    save_checkpoint(trainer, tmp_path / "state")
    other = make_reference()
    with torch.no_grad():
        weight = other.wpe.weight[3, :1]
        weight.copy_(torch.nextafter(weight, torch.tensor(math.inf)))
    with pytest.raises(ValueError, match=rf"another reference.*{trainer.reference_hash[:12]}"):
        load_checkpoint(tmp_path / "state", other)
    other.save_pretrained(tmp_path / "reference")
    with pytest.raises(ValueError, match="another reference"):
        load_checkpoint(tmp_path / "state")


def test_the_hash_of_a_reference_is_of_names_types_shapes_and_bytes():
    def hash_of(**tensors):
        module = torch.nn.Module()
        for name, x in tensors.items():
            module.register_buffer(name, x)
        return module_hash(module)

    x = torch.arange(6.0)
    digest = hashlib.sha256(b"a torch.float32 (2, 3)\n" + x.numpy().tobytes())
    digest.update(b"b torch.int64 ()\n" + (7).to_bytes(8, "little"))
    first = hash_of(a=x.view(2, 3), b=torch.tensor(7))
    assert first == digest.hexdigest()
    assert first == hash_of(b=torch.tensor(7), a=x.view(2, 3).t().contiguous().t())  # however it lies in memory
    others = [hash_of(a=x.view(3, 2), b=torch.tensor(7)), hash_of(c=x.view(2, 3), b=torch.tensor(7)),
              hash_of(a=x.view(2, 3).view(torch.int32), b=torch.tensor(7)), hash_of(a=x.view(2, 3))]  # fmt: skip
    assert len({first, *others}) == 5


# ---- other settings, other folders, damage --------------------------------------------------------------------------


def test_a_run_may_be_made_longer_and_cut_differently_and_nothing_else(tmp_path):
    save_checkpoint(make_trainer(**RUN), tmp_path / "state")
    for changed in (dict(lr=2e-3), dict(seed=9), dict(top_p=0.5), dict(eos_token_id=None)):
        (name,) = changed
        with pytest.raises(ValueError, match=rf"PPOConfig\.{name} was .* cannot become {changed[name]}; .* may change"):
            resume(tmp_path / "state", **changed)
    config = resume(tmp_path / "state", steps=80, forward_batch_size=1, max_bad_steps=3, reward_timeout=9.0).config
    assert (config.steps, config.forward_batch_size, config.max_bad_steps, config.reward_timeout) == (80, 1, 3, 9.0)
    with pytest.raises(ValueError, match=r"stepz.*steps"):
        resume(tmp_path / "state", stepz=80)
    save_checkpoint(make_trainer(loss_averaging="micro_batches"), tmp_path / "other")
    with pytest.raises(ValueError, match="forward_batch_size"):  # there the cut is part of the loss
        resume(tmp_path / "other", forward_batch_size=1)


@pytest.mark.parametrize("found", [1, "sft-1", 3, None])
def test_a_checkpoint_of_another_format_is_refused(tmp_path, monkeypatch, found):
    monkeypatch.setattr(checkpoint, "FORMAT", found)
    save_checkpoint(make_trainer(), tmp_path / "state")
    monkeypatch.undo()
    with pytest.raises(ValueError, match=rf"format {found!r}, this version reads 2 \(minirlhf 0\.1\.0 can resume 1 "):
        resume(tmp_path / "state")


FILES = ["README.md", "config.json", "manifest.json", "model.safetensors", "model.safetensors.index.json",
         "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json", "training.json", "training.safetensors",
         "value_head.safetensors", "vocab.txt"]  # fmt: skip


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-5]),
    "a bit": flip_a_bit,
    "missing": lambda path: path.unlink(),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    trainer = make_trainer()
    one_step(trainer)
    folder = tmp_path_factory.mktemp("saved") / "state"
    save_checkpoint(trainer, folder)
    assert resume(folder).iteration == 1
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused(saved, tmp_path, damage):
    """A changed bit of the manifest may spoil its JSON, a name or a sum: all are noticed."""
    assert sorted(path.name for path in saved.iterdir()) == FILES
    shutil.copytree(saved, tmp_path / "state")
    for path in (tmp_path / "state").iterdir():
        DAMAGES[damage](path)
        with pytest.raises(DamagedCheckpoint, match="state is damaged"):
            resume(tmp_path / "state")
        shutil.copy(saved / path.name, path)
    assert resume(tmp_path / "state").iteration == 1


@pytest.mark.parametrize(("name", "value"), [
    *(("matmul", value) for value in (None, "missing", 3, ["default"], "mkl")),
    *(("micro_batch_size", value) for value in (None, "missing", 0, -1, 1.5, "2")),
])  # fmt: skip
def test_a_counter_that_no_trainer_has_is_refused(saved, tmp_path, name, value):
    shutil.copytree(saved, tmp_path / "state")
    counters, manifest = (read_json(tmp_path / "state" / name) for name in ("training.json", "manifest.json"))
    counters = {key: x for key, x in {**counters, name: value}.items() if x != "missing"}
    write_json(tmp_path / "state/training.json", counters)
    manifest["sha256"]["training.json"] = sha256(tmp_path / "state/training.json")
    write_json(tmp_path / "state/manifest.json", manifest)
    with pytest.raises(ValueError, match=rf"training.json: the saved state holds no valid {name}"):
        resume(tmp_path / "state")


def test_a_model_folder_is_no_checkpoint_and_is_not_overwritten_by_one(tmp_path):
    make_reference().save_pretrained(tmp_path / "model")
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"model is damaged, or no checkpoint.*manifest\.json does not exist"):
        resume(tmp_path / "model")
    with pytest.raises(FileExistsError, match="model is not empty, and no checkpoint"):
        save_checkpoint(make_trainer(), tmp_path / "model")
    with pytest.raises(FileNotFoundError, match="nothing"):
        resume(tmp_path / "nothing")
    assert snapshot(tmp_path) == before


def test_a_trainer_that_stopped_within_a_step_is_not_saved(tmp_path):
    """Some of its updates are made: it is in the state of no step."""
    trainer = make_trainer(max_bad_steps=1)
    with pytest.raises(ValueError):
        trainer.collect(PROMPTS, lambda texts: [math.nan] * 4)
    save_checkpoint(trainer, tmp_path / "state")  # nothing was begun
    trainer.policy.decoder.h[0].mlp.c_fc.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError):
        one_step(trainer)
    before = snapshot(tmp_path)
    with pytest.raises(RuntimeError, match="within step 1"):
        save_checkpoint(trainer, tmp_path / "state")
    assert snapshot(tmp_path) == before


def test_a_run_keeps_the_precision_that_auto_gave_it(monkeypatch, tmp_path):
    monkeypatch.setattr("minirlhf.device.precision.LARGE_MODEL", 1)
    monkeypatch.setattr("minirlhf.device.precision_choice.has_native_bf16", lambda device: True)
    trainer = make_trainer(**RUN)
    save_checkpoint(trainer, tmp_path / "state")
    monkeypatch.setattr("minirlhf.device.precision_choice.has_native_bf16", lambda device: False)  # another machine
    assert make_trainer().precision.name == "fp32"
    for overrides in ({}, dict(precision="auto"), dict(precision="bf16")):
        resumed = resume(tmp_path / "state", **overrides)
        assert resumed.precision.name == "bf16" and resumed.config == trainer.config
    with pytest.raises(ValueError, match=r"PPOConfig\.precision was 'bf16' .* and cannot become 'fp32'"):
        resume(tmp_path / "state", precision="fp32")


def test_a_shared_reference_is_resumed_and_guarded_by_its_hash(tmp_path):
    policy = ActorCritic(make_gpt2(0, n_layer=3)).eval()
    for module in (policy.decoder.wte, policy.decoder.wpe, policy.decoder.h[0], policy.decoder.h[1]):
        module.requires_grad_(False)
    trainer = PPOTrainer(policy, make_gpt2(0, n_layer=3), Tokenizer(VOCAB), **DEFAULTS, reference="shared")
    save_checkpoint(trainer, tmp_path / "state")
    resumed = load_checkpoint(tmp_path / "state", make_gpt2(0, n_layer=3))
    shared, own = resumed.policy.decoder.h[1].attn.c_attn.weight, resumed.policy.decoder.h[2].attn.c_attn.weight
    assert shared.data_ptr() == resumed.reference.h[1].attn.c_attn.weight.data_ptr()
    assert own.data_ptr() != resumed.reference.h[2].attn.c_attn.weight.data_ptr()
    with torch.no_grad():
        trainer.policy.decoder.h[0].ln_1.bias += 1  # behind the trainer's back
    with pytest.raises(RuntimeError, match="the reference is not what it was"):
        save_checkpoint(trainer, tmp_path / "later")
    assert not (tmp_path / "later").exists()
