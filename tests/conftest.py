"""Fixtures that many tests share: a small vocabulary, small random models, and one thread for small tensors."""

import json
import os
import runpy
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# Threads cost more than they bring at these sizes. Libraries read this when they load, and processes inherit it.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import hypothesis
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from minirlhf import (
    GPT2,
    BertClassifier,
    BertConfig,
    Decoder,
    GPT2Config,
    Llama,
    LlamaConfig,
    NGramScorer,
    SentimentReward,
    Tokenizer,
)
from minirlhf.commands.main import main
from minirlhf.evaluation import evaluate, results
from minirlhf.models.llama import RMSNorm
from minirlhf.models.rope import rotary
from minirlhf.rewards.sentiment import CANARIES

# A busy machine takes any time for an example; every test has a timeout of its own.
hypothesis.settings.register_profile("without a deadline", deadline=None)
hypothesis.settings.load_profile("without a deadline")

HEAD = ["[PAD]", *(f"[unused{i}]" for i in range(1, 100)), "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
LATIN = [*"abcdefghijklmnopqrstuvwxyz0123456789", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz0123456789")]
CHINESE = [*"酒店周围位置前台房间干净服务很好非常满意推荐脏太差失望评早餐一般，。！？", "wifi", "hello", "world"]
VOCAB = [*HEAD, *LATIN, *CHINESE]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(VOCAB)


def make_gpt2(seed: int = 0, scale: float = 6.0, **overrides) -> GPT2:
    """A random GPT-2 whose weights are large enough that positions, heads and padding matter."""
    sizes = dict(vocab_size=len(VOCAB), n_positions=64, n_embd=32, n_layer=2, n_head=4)
    model = GPT2(GPT2Config(**{**sizes, **overrides}), seed=seed).eval()
    _scale(model, scale, seed)
    return model


# GPT-2's name of a size -> Llama's.
LLAMA_NAMES = {"n_positions": "max_position_embeddings", "n_embd": "hidden_size", "n_layer": "num_hidden_layers",
               "n_head": "num_attention_heads", "attn_pdrop": "attention_dropout", "resid_pdrop": None,
               "embd_pdrop": None}  # fmt: skip


def make_llama(seed: int = 0, scale: float = 6.0, **overrides) -> Llama:
    """A random Qwen3, whose keys serve two heads each, as `make_gpt2`; sizes may have GPT-2's names."""
    sizes = dict(vocab_size=len(VOCAB), n_positions=64, n_embd=32, n_layer=2, n_head=4, intermediate_size=48,
                 model_type="qwen3", num_key_value_heads=overrides.get("n_head", 4) // 2, head_dim=6,
                 tie_word_embeddings=True)  # fmt: skip
    sizes = {LLAMA_NAMES.get(name, name): value for name, value in {**sizes, **overrides}.items()}
    sizes.pop(None, None)  # dropout that there is none of
    model = Llama(LlamaConfig(**sizes), seed=seed).eval()
    _scale(model, scale, seed)
    return model


class ExactNorm(RMSNorm):
    """In fp64 where the model is; as published it computes in fp32."""

    def forward(self, x):
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)


class ExactLlama(Llama):
    """With rotary angles in fp64, for comparisons to 1e-9."""

    def rotary(self, positions):
        half = torch.arange(self.head_size // 2, dtype=torch.float64) / (self.head_size // 2)
        return rotary(positions, self.config.rope_parameters.rope_theta**-half, 1.0)


def exact(model: Decoder) -> Decoder:
    """The model in float64; a Llama with all that it computes."""
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.__class__ = ExactNorm
    if isinstance(model, Llama):
        model.__class__ = ExactLlama
    return model.double()


MAKERS = {"gpt2": make_gpt2, "llama": make_llama}


TINY_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefg"]


def make_tiny(kind: str, n_positions: int = 48) -> Decoder:
    """A decoder of a few hundred numbers, in float64, for the oracle's explicit loops; as new."""
    shared = dict(vocab_size=len(TINY_TOKENS), n_positions=n_positions, n_embd=4, n_layer=1, n_head=2)
    if kind == "gpt2":
        return GPT2(GPT2Config(**shared, n_inner=8)).double()
    sizes = {LLAMA_NAMES.get(name, name): value for name, value in shared.items()}
    more = dict(model_type="qwen3", num_key_value_heads=1, head_dim=4, intermediate_size=6, tie_word_embeddings=True)
    return exact(Llama(LlamaConfig(**sizes, **more)))


@pytest.fixture(params=MAKERS)
def make_decoder(request) -> Callable[..., Decoder]:
    """`make_gpt2` or `make_llama`: what is proven of one decoder holds of the other."""
    return MAKERS[request.param]


def make_bert(seed: int = 0, scale: float = 6.0, **overrides) -> BertClassifier:
    """A random BERT classifier; scaled as `make_gpt2`."""
    sizes = dict(vocab_size=len(VOCAB), max_position_embeddings=64, hidden_size=32, num_hidden_layers=2,
                 num_attention_heads=4, intermediate_size=64)  # fmt: skip
    model = BertClassifier(BertConfig(**{**sizes, **overrides}), seed=seed).eval()
    _scale(model, scale, seed)
    return model


@torch.no_grad()
def add_outlier(model: GPT2) -> GPT2:
    """Give a GPT-2 one feature whose product adds 900 to every logit: fp32 does not mind, bf16 holds 900 to 4."""
    model.wte.weight.mul_(10)
    model.ln_f.weight[0], model.ln_f.bias[0], model.wte.weight[:, 0] = 0.0, 30.0, 30.0
    return model


@torch.no_grad()
def _scale(model: torch.nn.Module, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed + 1000)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            parameter.mul_(scale)
        else:  # biases and LayerNorms away from their neutral values
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def assert_relatively_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


def rewrite_tensors(folder: Path, change: Callable[[dict], dict | None]) -> None:
    """Store what `change` makes of a model's tensors, or leaves in them."""
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors) or tensors
    save_file({name: t.contiguous() for name, t in changed.items()}, folder / "model.safetensors", {"format": "pt"})


def names(folder: Path) -> list[str]:
    """Of what is in a folder, sorted."""
    return sorted(path.name for path in folder.iterdir())


def rewrite_config(folder: Path, **changes: object) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, **changes}))


@dataclass(frozen=True)
class FewSamples(evaluate.EvaluationConfig):
    """What scripts evaluate with in tests, where they do not say: as many samples as give every figure."""

    samples: int = 64
    best_of_prompts: int = 8
    resamples: int = 100


# ---- scripts --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder of random models of a few kilobytes: policy/, reward/ with its labels in the right order, second/."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), Tokenizer(VOCAB)
    make_gpt2(0, n_embd=16, n_layer=1, n_head=2, n_positions=32).save_pretrained(folder / "policy")
    bert = make_bert(0, id2label={0: "negative", 1: "positive"})
    good, bad = SentimentReward(bert, tokenizer, device="cpu")(list(CANARIES)).tolist()
    with torch.no_grad():
        bert.classifier.weight.mul_(1 if good > bad else -1)
    bert.save_pretrained(folder / "reward")
    for name in ("policy", "reward"):
        tokenizer.save_pretrained(folder / name)
    NGramScorer({"好": 2.0, "差": -2.0}, 0.0).save_pretrained(folder / "second")
    return folder


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a script, or a folder that is one, in this process as a user runs it.

    Returns what it said: the error that it ended with, or None, and its stdout; `call.stderr` has the rest. The curves
    of a run, which take longer than a small run, are not drawn.
    """
    pytest.importorskip("tqdm"), pytest.importorskip("matplotlib")
    for module in (evaluate, results):
        monkeypatch.setattr(module, "EvaluationConfig", FewSamples)
    monkeypatch.setattr(results, "plot_run", lambda *given: None)

    def run(script: Path, *arguments: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        capsys.readouterr()
        error = None
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as exit:
            error = exit.code
        captured = capsys.readouterr()
        run.stderr = captured.err
        return error, captured.out

    return run


@pytest.fixture
def cli(capsys):
    """Run a command line of minirlhf in this process. Returns its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[object, str, str]:
        capsys.readouterr()
        try:
            code: object = main([str(argument) for argument in arguments])
        except SystemExit as exit:  # argparse
            code = exit.code
        return code, *capsys.readouterr()

    return run
