"""Adapters on disk against peft, in both directions; what does not fit is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import VOCAB, assert_relatively_close, make_gpt2, make_llama
from minirlhf import GPT2, ActorCritic, LoRAConfig, load_decoder
from minirlhf.models.lora import adapters_off, add_lora

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

IDS = torch.randint(5, len(VOCAB), (3, 9), generator=torch.Generator().manual_seed(0))
CONFIGS = [LoRAConfig(rank=3, alpha=5), LoRAConfig(rank=2, alpha=16, targets=("c_attn",)),
           LoRAConfig(rank=1, alpha=1, targets=("attn.c_proj", "c_fc"))]  # fmt: skip


@torch.no_grad()
def moved(model, seed=0):
    """The model with its B away from 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


@pytest.fixture
def base(tmp_path):
    make_gpt2(0, scale=2.0).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def folder(base, tmp_path):
    """Adapters of ours."""
    model = GPT2.from_pretrained(base)
    add_lora(model, CONFIGS[0])
    moved(model).save_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def theirs(base):
    return transformers.AutoModelForCausalLM.from_pretrained(base).eval()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@torch.no_grad()
def test_peft_reads_what_we_write_and_a_merged_export_is_a_plain_model(base, tmp_path, config):
    model = GPT2.from_pretrained(base)
    add_lora(model, config)
    expected = moved(model)(IDS)
    model.save_adapter(tmp_path / "adapter")
    read = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "adapter").eval()
    assert_relatively_close(read(IDS).logits, expected, 1e-6)
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()  # finds the base by its name
    assert_relatively_close(alone(IDS).logits, expected, 1e-6)
    again = load_decoder(tmp_path / "adapter")
    assert torch.equal(again(IDS), expected) and again.lora == model.lora
    model.save_pretrained(tmp_path / "merged")
    for loaded in (GPT2.from_pretrained(tmp_path / "merged")(IDS), theirs(tmp_path / "merged")(IDS).logits):
        assert_relatively_close(loaded, expected, 1e-6)
    unloaded = read.merge_and_unload().state_dict()
    for name, weight in load_file(tmp_path / "merged/model.safetensors").items():
        torch.testing.assert_close(weight, unloaded[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("targets", [None, "all-linear", ["c_attn", "c_fc"], r".*\.1\.(attn|mlp)\.c_proj"], ids=str)
@torch.no_grad()
def test_we_read_what_peft_writes(base, tmp_path, targets):
    """Without a hash: peft stores none. None: its default, c_attn."""
    made = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=True)
    model = moved(peft.get_peft_model(theirs(base), made))
    model.save_pretrained(tmp_path / "theirs")
    ours = load_decoder(tmp_path / "theirs")
    assert (ours.lora.rank, ours.lora.alpha) == (4, 12)
    assert_relatively_close(ours(IDS), model(IDS).logits, 1e-6)
    ours.save_adapter(tmp_path / "ours")  # and back
    again = peft.PeftModel.from_pretrained(theirs(base), tmp_path / "ours").eval()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
@torch.no_grad()
def test_the_adapters_of_llama_and_its_relatives_are_peft_s(tmp_path, kind):
    """q, k, v, o, gate, up and down by default, in both directions; a merged export is a plain model."""
    make_llama(0, scale=2.0, model_type=kind).save_pretrained(tmp_path / "base")
    model = load_decoder(tmp_path / "base")
    plain = model(IDS)
    config = add_lora(model, LoRAConfig(rank=2, alpha=4))
    assert config.targets == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert torch.equal(model(IDS), plain)
    expected = moved(model)(IDS)
    assert torch.equal(adapters_off(model)(IDS), plain) and not torch.allclose(expected, plain, rtol=1e-3)
    model.save_adapter(tmp_path / "ours")
    model.save_pretrained(tmp_path / "merged")
    read = peft.PeftModel.from_pretrained(theirs(tmp_path / "base"), tmp_path / "ours").eval()
    for logits in (read(IDS).logits, theirs(tmp_path / "merged")(IDS).logits):
        assert_relatively_close(logits, expected, 2e-6)
    made = peft.get_peft_model(theirs(tmp_path / "base"), peft.LoraConfig(r=3, task_type="CAUSAL_LM"))
    moved(made).save_pretrained(tmp_path / "theirs")
    assert_relatively_close(load_decoder(tmp_path / "theirs")(IDS), made(IDS).logits, 2e-6)


def test_a_value_head_is_kept_beside_adapters(base, tmp_path):
    actor = ActorCritic(GPT2.from_pretrained(base), "tanh").eval()
    add_lora(actor.decoder, CONFIGS[0])
    moved(actor.decoder)
    torch.nn.init.normal_(actor.value_head.summary.weight)
    actor.save_adapter(tmp_path / "adapter")
    loaded = ActorCritic.from_pretrained(tmp_path / "adapter")
    for own, read in zip(actor(IDS), loaded(IDS), strict=True):
        assert torch.equal(own, read)


# ---- the base --------------------------------------------------------------------------------------------------------


def test_the_base_may_be_given_as_folder_or_model(base, folder, tmp_path):
    base.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match=r"their base was not found; pass it: load_decoder\(.*base=FOLDER\)"):
        load_decoder(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "\x1b[31mx"}))
    with pytest.raises(FileNotFoundError) as caught:
        load_decoder(folder)
    assert str(caught.value).isprintable()
    expected = load_decoder(folder, tmp_path / "moved")(IDS)
    assert torch.equal(load_decoder(folder, GPT2.from_pretrained(tmp_path / "moved"))(IDS), expected)
    assert torch.equal(ActorCritic.from_pretrained(folder, base=tmp_path / "moved")(IDS)[0], expected)
    with pytest.raises(ValueError, match="holds no adapters, so base must be None"):
        load_decoder(tmp_path / "moved", folder)
    with pytest.raises(ValueError, match="has some already"):
        load_decoder(folder, load_decoder(folder, tmp_path / "moved"))


def test_a_base_that_was_not_loaded_has_no_name(tmp_path):
    model = make_gpt2()
    add_lora(model, LoRAConfig())
    model.save_adapter(tmp_path)
    with pytest.raises(ValueError, match="does not name their base; pass it"):
        load_decoder(tmp_path)
    assert load_decoder(tmp_path, make_gpt2()).lora == model.lora
    with pytest.raises(ValueError, match="the model has no adapters to save"):
        make_gpt2().save_adapter(tmp_path / "other")


def test_an_adapter_for_another_base_is_refused_by_hash(folder):
    other = make_gpt2(1, scale=2.0)
    with pytest.raises(ValueError, match="adapters for another base: its tensors had the SHA-256"):
        load_decoder(folder, other)
    assert other.lora is None and other.state_dict().keys() == make_gpt2().state_dict().keys()


def test_what_was_trained_is_no_longer_the_folder_it_came_from(base, tmp_path):
    model = GPT2.from_pretrained(base)
    assert add_lora(model, None) is None and model.source is None


def test_a_folder_of_adapters_is_no_model(folder):
    with pytest.raises(ValueError, match=r"holds LoRA adapters; minirlhf\.load_decoder\('.*'\) loads their base too"):
        GPT2.from_pretrained(folder)


def test_a_merged_export_removes_the_adapters_that_were_there(base, folder):
    """transformers with peft would add them once more."""
    model = load_decoder(folder)
    model.save_pretrained(folder)
    assert not list(folder.glob("adapter*"))
    torch.testing.assert_close(theirs(folder)(IDS).logits, model(IDS), rtol=1e-4, atol=1e-4)
    adapters_off(model).save_pretrained(folder)
    assert torch.equal(load_decoder(folder)(IDS), GPT2.from_pretrained(base)(IDS))


# ---- bad folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "message"), [
    (dict(r=4), r"lora_A\.weight has shape \(3, 32\), the config asks for \(4, 32\)"),
    (dict(r=0), r"adapter_config\.json: LoRAConfig\.rank must be an integer of at least 1"),
    (dict(r="8"), "r must be"),
    (dict(lora_alpha=0), r"LoRAConfig\.alpha must be"),
    (dict(target_modules=["q_proj"]), r"targets has 'q_proj', which is no layer of the model's blocks: c_attn"),
    (dict(target_modules=["c_attn"]), r"unexpected base_model\.model\.transformer\.h\.0"),
    (dict(use_dora=True), "use_dora=True; only False is supported"),
    (dict(use_rslora=True), "use_rslora=True"),
    (dict(peft_type="IA3"), "peft_type='IA3'; only 'LORA' is supported"),
    (dict(rank_pattern={"c_fc": 2}), "rank_pattern"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(bias="all"), "bias='all'"),
    (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights='pissa_niter_4'"),
])  # fmt: skip
def test_a_config_that_does_not_fit_is_refused(folder, changes, message):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        load_decoder(folder)


def test_tensors_that_do_not_fit_are_refused(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_B.weight"
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, path)
    with pytest.raises(ValueError, match=rf"{name} holds NaN"):
        load_decoder(folder)
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"missing {name}"):
        load_decoder(folder)
