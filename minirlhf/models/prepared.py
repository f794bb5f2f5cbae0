"""The models that a rollout is sampled and scored with, on their device, checked against each other and the config."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minirlhf.common import validation
from minirlhf.device.cpu import keep_freed_memory, limit_threads
from minirlhf.device.placement import resolve_device
from minirlhf.device.precision import SIXTEEN_BITS, Precision
from minirlhf.device.precision_choice import PrecisionChoice, choose_precision
from minirlhf.device.processes import Processes, agreed, processes
from minirlhf.generation.generate import language_model
from minirlhf.models.decoder import Decoder, compile_blocks, share_frozen_parameters
from minirlhf.models.heads import ActorCritic, with_value_head
from minirlhf.models.loading import load_decoder
from minirlhf.models.lora import adapters_off, add_lora
from minirlhf.models.probes import language_model_probe
from minirlhf.models.sharded import gathered, initial_device, is_to_be_sharded, shard
from minirlhf.models.static_decode import GraphedDecoder
from minirlhf.text.tokenizer import Tokenizer, require_tokenizer
from minirlhf.version import __version__

if TYPE_CHECKING:
    from minirlhf.rl.config import PPOConfig


MOST_SETS = 2**33  # bytes of sampling sets that every one of several processes holds


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

    def whole(self) -> Models:
        """Those that sample and score: themselves, or whole copies of sharded ones, see `sharded`."""
        bits = SIXTEEN_BITS.get(self.precision.name)
        policy, reference = gathered(self.policy, bits), gathered(self.reference, bits)
        return dataclasses.replace(self, policy=policy, reference=reference)


@agreed("the models")
def prepare(
    policy: ActorCritic | Decoder,
    ref_policy: ActorCritic | Decoder | str | os.PathLike[str] | None,
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
    reference, source = load_reference(ref_policy, tokenizer)
    config = dataclasses.replace(config, lora=config.lora or language_model(policy).lora)
    if with_values and isinstance(policy, ActorCritic) and policy.value_head is None:
        advice = "pass the plain decoder, policy.decoder, to get a new one, or choose advantages without values"
        raise ValueError(f"advantages={config.advantages!r} needs a value head, and the policy has none: {advice}")
    kind = (config.value_head or "linear") if with_values else None
    actor = with_value_head(policy, kind, config.value_head_init, config.seed)
    if actor.value_head is not None and config.value_head is not None:
        own = actor.value_head.kind
        advice = f"{own!r}, the policy's own (pass the plain decoder to get a new head)"
        validation.require(config, "value_head", config.value_head == own, advice)
    if config.adapters_off:
        validation.require(config, "reference", config.lora is not None, "own or shared for a policy without LoRA")
        actor.decoder.fit_vocabulary(len(tokenizer), "policy")
        own_source = require_base(actor.decoder, reference)
        source = source or own_source
    elif reference is None:
        raise ValueError(
            "ref_policy is None: only with lora and reference='adapters off' is it the policy's own base; "
            "give the folder that the policy was loaded from"
        )
    else:
        check_pair(actor.decoder, reference, len(tokenizer))
    actor.decoder.tokenizer = tokenizer  # for `policy.generate`
    positions = actor.decoder.n_positions
    validation.require(config, "gen_len", config.gen_len <= positions, f"at most the model's {positions} positions")
    ends = config.eos_token_id if isinstance(config.eos_token_id, tuple) else (config.eos_token_id or 0,)
    validation.require(config, "eos_token_id", max(ends) < len(tokenizer), f"in [0, {len(tokenizer)})")
    config = dataclasses.replace(config, lora=add_lora(actor.decoder, config.lora, config.seed))
    if reference is None or config.adapters_off:
        reference = adapters_off(actor.decoder)
    device, group = resolve_device(config.device), processes()
    if device.type == "cpu":
        keep_freed_memory()
        limit_threads()
    actor = actor.to(initial_device(config)).eval()
    actor.decoder.checkpoint_activations = config.checkpoint_activations
    reference = reference.to(initial_device(config)).eval().requires_grad_(False)
    if config.reference == "shared":
        share_frozen_parameters(actor.decoder, reference)
    if config.compile:
        compile_blocks(actor.decoder, reference)
    make_equal(group, actor, reference, config)
    probe = language_model_probe(actor.decoder, config.logprobs_divisor)
    choice = group.broadcast("precision", choose_precision(config.precision, actor, probe, config.cliprange))
    # The config names the precision from here on, so that a run that goes on elsewhere keeps it.
    config = dataclasses.replace(config, precision=choice.name)
    graphed = GraphedDecoder() if config.cuda_graphs and device.type == "cuda" else None
    batch_size = 128 if device.type == "cpu" else 1024
    precision = Precision(choice.name, device, actor)
    precision.matmul = group.broadcast("matmul", precision.matmul)
    for model in (actor, reference) if is_to_be_sharded(config) else ():
        shard(model, device, choice.name)
    models = Models(actor, reference, tokenizer, precision, graphed, batch_size)
    return models, config, choice, source


def make_equal(group: Processes, actor: ActorCritic, reference: Decoder, config: PPOConfig) -> None:
    """Give every process the weights of the first one.

    Raises ValueError for versions, settings or shapes that differ, or a batch that the processes cannot share.
    """
    shapes = {name: tuple(p.shape) for model in (actor, reference) for name, p in model.named_parameters()}
    versions = {"minirlhf": __version__, "torch": torch.__version__, "device": actor.decoder.device.type}
    group.same("versions, settings and shapes", {**versions, **dataclasses.asdict(config), **shapes})
    enough = config.batch_size // config.group_size >= group.size
    each = f"at least {group.size * config.group_size}: each of {group.size} processes needs group_size rows"
    validation.require(config, "batch_size", enough, each)
    kept = 0 if config.logprobs_full_softmax or not config.sampling.truncates else -(-actor.decoder.vocab_size // 8)
    kept *= config.batch_size * config.gen_len if group.on else 0
    way_out = "small enough for sampling sets below 8 GiB, which all processes hold; or top_k=0 and top_p=1"
    validation.require(config, "batch_size", kept < MOST_SETS, way_out)
    group.copy_([*actor.parameters(), *reference.parameters()])


def load_reference(
    ref_policy: ActorCritic | Decoder | str | os.PathLike[str] | None, tokenizer: Tokenizer
) -> tuple[Decoder | None, str | None]:
    """The decoder of a reference, and the folder or name that it was loaded from; None for a model that was given.

    Raises ValueError for a folder whose own tokenizer, if it has one, gives ids to other tokens.
    """
    if not isinstance(ref_policy, (str, os.PathLike)):
        return None if ref_policy is None else language_model(ref_policy), None
    vocab: Sequence[str] = ()
    with contextlib.suppress(OSError, ValueError):  # a reference needs no tokenizer
        vocab = Tokenizer.from_pretrained(ref_policy).vocab
    for i, (theirs, ours) in enumerate(zip(vocab, tokenizer.vocab, strict=False)):
        if theirs != ours:
            raise ValueError(f"ref_policy {ref_policy} has another vocabulary: token {i} is {theirs!r} there and "
                             f"{ours!r} in the tokenizer")  # fmt: skip
    return load_decoder(ref_policy), absolute(ref_policy)


def absolute(source: str | os.PathLike[str]) -> str:
    """The path of a folder, whatever the current one is; a name on the hub as it is."""
    return os.path.abspath(source) if Path(source).is_dir() else os.fspath(source)


def check_pair(policy: Decoder, reference: Decoder, n_tokens: int) -> None:
    """Fit policy and reference to a vocabulary of `n_tokens`. Raises ValueError if they do not fit it or each other."""
    policy.fit_vocabulary(n_tokens, "policy")
    reference.fit_vocabulary(n_tokens, "reference")
    if {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}:
        raise ValueError("policy and ref_policy share parameters: the reference would move with the policy; load twice")
    if reference.n_positions < policy.n_positions:
        positions = f"{reference.n_positions} positions, fewer than the policy's {policy.n_positions}"
        raise ValueError(f"the reference has {positions}")


def require_base(policy: Decoder, reference: Decoder | None) -> str | None:
    """Raise ValueError for a reference, unless None, that is not what the policy is without its adapters.

    Returns the folder or name that the policy was loaded from.
    """
    others = {} if reference is None else dict(reference.named_parameters())
    for name, p in policy.named_parameters() if reference is not None else ():
        same = name in others and others[name].shape == p.shape and torch.equal(p, others[name].to(p))
        if not same and not name.endswith((".lora_A", ".lora_B")):
            raise ValueError(
                f"with LoRA the reference is the policy with its adapters off, but ref_policy has another {name}: pass "
                "None for ref_policy, or, to PPO, reference='own' to hold it as a second model"
            )
    return None if policy.source is None else absolute(policy.source)
