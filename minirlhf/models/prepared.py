"""The models that a rollout is sampled and scored with, on their device, checked against each other and the config."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minirlhf.common import validation
from minirlhf.device.cpu import keep_freed_memory, limit_threads
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import Precision
from minirlhf.device.precision_choice import PrecisionChoice, choose_precision
from minirlhf.device.processes import agreed, processes
from minirlhf.generation.generate import language_model
from minirlhf.models.decoder import Decoder, compile_blocks, share_frozen_parameters
from minirlhf.models.heads import ActorCritic, with_value_head
from minirlhf.models.loading import load_decoder
from minirlhf.models.probes import language_model_probe
from minirlhf.models.static_decode import GraphedDecoder
from minirlhf.text.tokenizer import Tokenizer
from minirlhf.version import __version__

if TYPE_CHECKING:
    from minirlhf.rl.config import PPOConfig


MOST_SETS = 2**33  # bytes of sampling sets


@dataclass(frozen=True)
class Models:
    """The models of a rollout: policy and frozen reference with one vocabulary on one device, and their tokenizer.

    precision: of their forward passes. graphed: decodes by CUDA graphs; None: plainly.
    scoring_batch_size: sequences of a pass without gradient.
    """

    policy: ActorCritic
    reference: Decoder
    tokenizer: Tokenizer
    precision: Precision = field(default_factory=lambda: Precision("fp32", torch.device("cpu")))
    graphed: GraphedDecoder | None = None
    scoring_batch_size: int = 128


@agreed("the models")
def prepare(
    policy: ActorCritic | Decoder,
    ref_policy: ActorCritic | Decoder | str | os.PathLike[str],
    tokenizer: Tokenizer,
    config: PPOConfig,
    with_values: bool,
) -> tuple[Models, PPOConfig, PrecisionChoice, str | None]:
    """The models ready to train, the config with its precision chosen, the choice, and the reference's folder or name.

    with_values: whether the policy needs a value head; without, it gets none.
    Of several processes all get the weights and the precision of the first one.
    Raises ValueError for models or a tokenizer that do not fit each other or the config, or that differ in shape, like
    the config and the versions, between processes.
    """
    require_tokenizer(tokenizer)
    reference, source = load_reference(ref_policy)
    if with_values and isinstance(policy, ActorCritic) and policy.value_head is None:
        advice = "pass the plain decoder, policy.decoder, to get a new one, or choose advantages without values"
        raise ValueError(f"advantages={config.advantages!r} needs a value head, and the policy has none: {advice}")
    kind = (config.value_head or "linear") if with_values else None
    actor = with_value_head(policy, kind, config.value_head_init, config.seed)
    if actor.value_head is not None and config.value_head is not None:
        own = actor.value_head.kind
        advice = f"{own!r}, the policy's own (pass the plain decoder to get a new head)"
        validation.require(config, "value_head", config.value_head == own, advice)
    check_pair(actor.decoder, reference, len(tokenizer))
    actor.decoder.tokenizer = tokenizer  # for `policy.generate`
    positions = actor.decoder.n_positions
    validation.require(config, "gen_len", config.gen_len <= positions, f"at most the model's {positions} positions")
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id or 0,)
    validation.require(config, "eos_token_id", max(ends) < len(tokenizer), f"in [0, {len(tokenizer)})")
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
        limit_threads()
    actor = actor.to(device).eval()
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    reference = reference.to(device).eval().requires_grad_(False)
    if config.reference == "shared":
        share_frozen_parameters(actor.decoder, reference)
    if config.compile:
        compile_blocks(actor.decoder, reference)
    group = processes()
    shapes = {name: tuple(p.shape) for model in (actor, reference) for name, p in model.named_parameters()}
    versions = {"minirlhf": __version__, "torch": torch.__version__, "device": device.type}
    group.same("versions, settings and shapes", {**versions, **dataclasses.asdict(config), **shapes})
    enough = config.batch_size // config.group_size >= group.size
    each = f"at least {group.size * config.group_size}: each of {group.size} processes needs group_size rows"
    validation.require(config, "batch_size", enough, each)
    kept = 0 if config.logprobs_full_softmax or not config.sampling.truncates else -(-actor.decoder.vocab_size // 8)
    kept *= config.batch_size * config.gen_len if group.on else 0
    way_out = "small enough for sampling sets below 8 GiB, which all processes hold; or top_k=0 and top_p=1"
    validation.require(config, "batch_size", kept < MOST_SETS, way_out)
    group.copy_([*actor.parameters(), *reference.parameters()])
    probe = language_model_probe(actor.decoder, config.logprobs_divisor)
    choice = group.broadcast("precision", choose_precision(config.precision, actor, probe, config.cliprange))
    # The config names the precision from here on, so that a run that goes on elsewhere keeps it.
    config = dataclasses.replace(config, precision=choice.name)
    graphed = GraphedDecoder() if config.cuda_graphs and device.type == "cuda" else None
    batch_size = 128 if device.type == "cpu" else 1024
    precision = Precision(choice.name, device, actor)
    precision.matmul = group.broadcast("matmul", precision.matmul)
    models = Models(actor, reference, tokenizer, precision, graphed, batch_size)
    return models, config, choice, source


def require_tokenizer(tokenizer: object) -> None:
    """Raise ValueError for a tokenizer of another library."""
    if not hasattr(tokenizer, "encode_prompt"):
        advice = "save it with save_pretrained(folder) and load it with minirlhf.Tokenizer.from_pretrained(folder)"
        raise ValueError(f"the tokenizer must be a minirlhf.Tokenizer, got a {type(tokenizer).__name__}: {advice}")


def load_reference(ref_policy: ActorCritic | Decoder | str | os.PathLike[str]) -> tuple[Decoder, str | None]:
    """The decoder of a reference, and the folder or name that it was loaded from; None for a model that was given."""
    if not isinstance(ref_policy, (str, os.PathLike)):
        return language_model(ref_policy), None
    source = os.path.abspath(ref_policy) if Path(ref_policy).is_dir() else os.fspath(ref_policy)
    return load_decoder(ref_policy), source


def check_pair(policy: Decoder, reference: Decoder, n_tokens: int) -> None:
    """Fit policy and reference to a vocabulary of `n_tokens`. Raises ValueError if they do not fit it or each other."""
    policy.fit_vocabulary(n_tokens, "policy")
    reference.fit_vocabulary(n_tokens, "reference")
    if {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}:
        raise ValueError("policy and ref_policy share parameters: the reference would move with the policy; load twice")
    if reference.n_positions < policy.n_positions:
        positions = f"{reference.n_positions} positions, fewer than the policy's {policy.n_positions}"
        raise ValueError(f"the reference has {positions}")
