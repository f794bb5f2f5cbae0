"""Direct preference optimisation (Rafailov et al. 2023): a policy learns from pairs, without a reward model.

The policy that is best for a reward S under a KL penalty beta is pi_ref exp(S / beta) / Z, so beta log(pi / pi_ref) is
a reward itself, up to a term that the responses to one prompt share. DPO fits it to the pairs as a reward model is
fitted. No dropout is used, and the reference's log-probabilities are computed once.

Left out: the hinge and other losses of TRL, a next-token loss beside them, and margins.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from minirlhf.common.progress import OnStep, functions_of
from minirlhf.device.precision import SIXTEEN_BITS
from minirlhf.device.precision_choice import choose_precision
from minirlhf.device.processes import agreed, processes
from minirlhf.device.random import eval_mode
from minirlhf.io.model_folder import check_tensors, read_tensors, write_tensors
from minirlhf.io.training_state import State, module_hash, require_same_reference
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic, language_model
from minirlhf.models.lora import adapters_off, add_lora
from minirlhf.models.prepared import check_pair, load_reference, require_base
from minirlhf.models.probes import language_model_probe
from minirlhf.models.sharded import gathered, initial_device, is_to_be_sharded, shard
from minirlhf.supervised.dpo_config import DPOConfig, DPOOverrides
from minirlhf.supervised.loop import Stats, SupervisedTrainer, check_positions, data_record, require_same_data
from minirlhf.supervised.preference_pairs import Pairs, TokenPair, encode_pairs
from minirlhf.supervised.sft import MicroBatch, Row, token_nll
from minirlhf.text.batching import bucketed_batches, packed_rows
from minirlhf.text.tokenizer import Tokenizer, require_tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DPOTrainer(SupervisedTrainer[list[MicroBatch]]):
    """Direct preference optimisation of a language model in place; `runs.Run` saves it and goes on with it.

    policy: only parameters with requires_grad are trained, and no value head.
    ref_policy: a second copy of the checkpoint that the policy begins as, or its folder; None with `reference_free`, or
        with LoRA, where it is the policy with its adapters off.
    tokenizer: of both. config: **overrides replace its fields by name.
    Raises ValueError for an unknown or bad field, models or tokenizer that do not fit each other, no reference, or one
    that shares its parameters with the policy.
    """

    kind = "dpo"
    with_dropout = False  # the ratio to the reference would be noise
    model: Decoder
    config: DPOConfig

    def __init__(
        self,
        policy: ActorCritic | Decoder,
        ref_policy: ActorCritic | Decoder | str | os.PathLike[str] | None,
        tokenizer: Tokenizer,
        config: DPOConfig | None = None,
        **overrides: Unpack[DPOOverrides],
    ):
        config = DPOConfig.with_overrides(config, **overrides)
        require_tokenizer(tokenizer)
        model, self.tokenizer = language_model(policy), tokenizer
        model.fit_vocabulary(len(tokenizer), "policy")
        reference, self.reference_source = None, None  # type: Decoder | None, str | None
        config = dataclasses.replace(config, lora=config.lora or model.lora)
        device = initial_device(config)
        if not config.reference_free:
            reference, self.reference_source = load_reference(ref_policy, tokenizer)
            if config.adapters_off:
                own_source = require_base(model, reference)
                self.reference_source = self.reference_source or own_source
            elif reference is None:
                raise ValueError("ref_policy is None, which needs reference_free=True or lora: DPO has a reference")
            else:
                check_pair(model, reference, len(tokenizer))
        config = dataclasses.replace(config, lora=add_lora(model, config.lora, config.seed))
        reference = adapters_off(model) if config.adapters_off else reference
        self.reference = None if reference is None else reference.to(device).eval().requires_grad_(False)
        self.reference_hash = "" if self.reference is None else module_hash(self.reference)
        processes().same("the reference", self.reference_hash)
        choice = choose_precision(config.precision, model.to(device), language_model_probe(model))
        self.precision_choice = processes().broadcast("precision", choice)
        config = dataclasses.replace(config, precision=self.precision_choice.name)  # so checkpoints have it
        self.pairs: list[TokenPair] = []
        self.ref_logps = torch.zeros(0, 2)
        self._known: dict[str, Tensor] = {}  # log-probabilities by the reference, by hash
        self._seen: list[Tensor] = []  # of a step, (2, n, 2): by the policy and by the reference
        self._counts: list[bool] = []  # which of them count: see `Processes.deal`
        super().__init__(model, config, [], (), model.origin)
        if self.reference is not None and is_to_be_sharded(config):
            shard(self.reference, self.device, config.precision)

    def train(  # type: ignore[override]
        self, pairs: Pairs, on_step: OnStep | Sequence[OnStep] | None = None, progress: bool = True
    ) -> None:
        """Train to the end of the last epoch.

        pairs: see `encode_pairs`; those that `text.preferences` reads, samples, or a file.
        on_step, progress: as in `SupervisedTrainer.train`; the statistics also have those of `preference_metrics`,
            before the step. After an interruption, here or in a resumed run, `train` with the same pairs goes on.
        Raises ValueError as `check_pairs`, and for other pairs than those that this trainer began with.
        """
        functions = functions_of(on_step)
        given = data_record([*map(str, encoded := self.check_pairs(pairs))])
        if self.data["count"]:
            require_same_data(self.data, given)
        self.processes.same("pairs", given)
        self.data, self.pairs, self.ref_logps = given, encoded, self._reference_logps(encoded)
        generator = torch.Generator().manual_seed(self.config.seed)
        self.epochs = [self._epoch(generator) for _ in range(self.config.epochs)]

        def with_metrics(batch: list[MicroBatch], stats: Stats) -> bool:
            own = [seen.cpu() for seen, counts in zip(self._seen, self._counts, strict=True) if counts]
            every = self.processes.gather("the pairs of a step", own)
            logps, ref_logps = torch.cat([seen for part in every for seen in part], 1)
            stats = stats | preference_metrics(logps, ref_logps, self.config.beta)
            return any([function(batch, stats) is True for function in functions])

        super().train(with_metrics if functions else None, progress)

    def check_pairs(self, pairs: Pairs) -> list[TokenPair]:
        """The tokens of pairs. Raises ValueError as `encode_pairs`, and for no pairs, a long one, or a bad token id."""
        encoded = encode_pairs(self.tokenizer, pairs)
        if not encoded:
            raise ValueError("pairs is empty: there is nothing to learn from")
        for i, pair in enumerate(encoded):
            if pair.length > self.config.max_length:
                side = "chosen" if len(pair.chosen) >= len(pair.rejected) else "rejected"
                told = f"{pair.length} tokens with its prompt, more than max_length={self.config.max_length}"
                raise ValueError(f"pair {i}: {side} has {told}; shorten it or leave the pair out")
            if max(ids := [*pair.prompt, *pair.chosen, *pair.rejected]) >= len(self.tokenizer) or min(ids) < 0:
                raise ValueError(f"pair {i} has token ids outside [0, {len(self.tokenizer)})")
        check_positions(max(pair.length for pair in encoded), self.model.n_positions, self.config.max_length)
        return encoded

    def evaluate(self, pairs: Pairs) -> Stats:
        """Loss and `preference_metrics` of other pairs, without a gradient. Raises ValueError as `check_pairs`."""
        encoded = self.check_pairs(pairs)
        logps, ref_logps = self._all_logps(self.model, encoded), self._reference_logps(encoded)
        loss = {"loss": self._losses(logps, ref_logps).mean().item()}
        return loss | preference_metrics(logps, ref_logps, self.config.beta)

    @property
    def steps_total(self) -> int:
        """Optimizer steps of the whole run; 0 before it has pairs."""
        return self.config.epochs * -(-self.data["count"] // self.config.batch_size)

    def parts(self, batch: list[MicroBatch]) -> list[tuple[list[MicroBatch], float]]:
        """This process's rows of each forward pass of a step, with their share of its pairs."""
        self._seen = []
        parts: list[tuple[list[MicroBatch], float]] = []
        total = sum(len(row) for rows in batch for row in rows)
        for rows in batch:
            [(dealt, factor)] = self.processes.deal(len(rows))
            mine: MicroBatch = [rows[i] for i in dealt]
            parts.append(([mine], factor * sum(map(len, mine)) / total))
        self._counts = [share > 0 for _, share in parts]
        return parts

    def loss(self, batch: list[MicroBatch]) -> Tensor:
        """The mean loss of these pairs."""
        rows = [row for micro in batch for row in micro]
        logps = self._logps(self.model, self.pairs, rows)
        ref_logps = self.ref_logps[[i for row in rows for i in row]]
        self._seen.append(torch.stack([logps.detach(), ref_logps]))
        return self._losses(logps, ref_logps).mean()

    def state_dict(self) -> State:
        """See `SupervisedTrainer.state_dict`; of the reference, hash and source."""
        state = super().state_dict()
        state["counters"]["reference"] = {"sha256": self.reference_hash, "source": self.reference_source}
        return state

    def load_state_dict(self, state: State) -> None:
        """See `SupervisedTrainer.load_state_dict`. Raises ValueError for another reference, `train` for other pairs."""
        require_same_reference(state["counters"]["reference"]["sha256"], self.reference_hash)
        self.data = state["counters"]["data"]
        super().load_state_dict(state)

    def _losses(self, logps: Tensor, ref_logps: Tensor) -> Tensor:
        """The loss (n,) of each pair, of log-probabilities (n, 2)."""
        c, margins = self.config, log_ratio_margins(logps, None if self.reference is None else ref_logps)
        return ipo_loss(margins, c.beta) if c.loss == "ipo" else dpo_loss(margins, c.beta, c.label_smoothing)

    def _epoch(self, generator: torch.Generator) -> list[list[MicroBatch]]:
        """The forward passes of each step of an epoch."""
        order, size = torch.randperm(len(self.pairs), generator=generator).tolist(), self.config.batch_size
        return [self._passes(self.pairs, order[i : i + size], generator) for i in range(0, len(order), size)]

    def _passes(self, pairs: Sequence[TokenPair], chosen: Row, generator: torch.Generator) -> list[MicroBatch]:
        """Rows of pairs, by number, in forward passes of about `tokens_per_batch` tokens, padding included."""
        limit = self.config.tokens_per_batch
        if self.config.packing:
            lengths = [sum(len(s.ids) for s in pairs[i].sequences) for i in chosen]
            rows, size = packed_rows(lengths, max(lengths), generator), max(1, limit // max(lengths))
            passes = [rows[i : i + size] for i in range(0, len(rows), size)]
        else:
            lengths = [pairs[i].length for i in chosen]
            batches = bucketed_batches(lengths, limit, generator, counts=[2] * len(lengths))
            passes = [[[i] for i in batch] for batch in batches]
        return [[[chosen[i] for i in row] for row in rows] for rows in passes]

    def _logps(self, model: Decoder, pairs: Sequence[TokenPair], rows: Sequence[Row]) -> Tensor:
        """Log-probabilities (n, 2), nats, of the chosen and the rejected response to each prompt, row after row."""
        sequences = [[s for i in row for s in pairs[i].sequences] for row in rows]
        flat = [s for row in sequences for s in row]
        nll, _ = token_nll(model, sequences if self.config.packing else [[s] for s in flat], self.tokenizer.pad_id)
        return -torch.stack([part.sum() for part in nll.split([len(s.ids) - s.first for s in flat])]).view(-1, 2)

    @torch.no_grad()
    def _all_logps(self, model: Decoder, pairs: Sequence[TokenPair]) -> Tensor:
        """Log-probabilities (n, 2) of all these pairs, in eval mode, by a whole copy of a sharded model."""
        model = gathered(model, SIXTEEN_BITS.get(self.precision.name))
        passes = self._passes(pairs, range(len(pairs)), torch.Generator().manual_seed(0))
        with eval_mode(model), self.precision.autocast():
            found = self.processes.spread(
                "log-probabilities", lambda rows: self._logps(model, pairs, rows).cpu(), passes
            )
        logps = torch.cat(found).to(self.device)
        order = torch.tensor([i for rows in passes for row in rows for i in row], device=logps.device)
        return logps[order.argsort()]

    def _reference_logps(self, pairs: Sequence[TokenPair]) -> Tensor:
        """Log-probabilities (n, 2) of pairs by the reference, computed unless its hash and the pairs are known."""
        if self.reference is None:
            return torch.zeros(len(pairs), 2, device=self.device)
        key = data_record([self.reference_hash, self.precision.name, *map(str, pairs)])["sha256"]
        folder = self.config.reference_cache
        path = None if folder is None else Path(folder) / f"{key}.safetensors"
        if key not in self._known:
            first = self.processes.first
            with agreed("the cache of the reference"):
                there = _read_cache(path, len(pairs)) if first and path is not None and path.is_file() else None
            known = self.processes.broadcast("the cache of the reference", there)
            self._known[key] = self._all_logps(self.reference, pairs) if known is None else known.to(self.device)
            with agreed("the cache of the reference"):
                if first and path is not None and known is None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_tensors(path, {"logps": self._known[key]})
        return self._known[key]


def _read_cache(path: Path, count: int) -> Tensor:
    """Log-probabilities (count, 2) from a file. Raises ValueError that says what to do for a damaged one."""
    try:
        check_tensors(tensors := read_tensors(path), {"logps": (count, 2)}, path)
    except ValueError as error:
        raise ValueError(f"{error}; remove the file, and it is computed anew") from error
    return tensors["logps"].float()


# ---- losses, of log-probabilities (n, 2) of the chosen and the rejected response ------------------------------------


def log_ratio_margins(logps: Tensor, ref_logps: Tensor | None = None) -> Tensor:
    """h = log pi(y_w | x) / pi_ref(y_w | x) - log pi(y_l | x) / pi_ref(y_l | x), (n,), nats; None: a uniform pi_ref."""
    ratios = logps if ref_logps is None else logps - ref_logps
    return ratios[:, 0] - ratios[:, 1]


def dpo_loss(margins: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """-log sigmoid(beta h), (n,), nats (Rafailov et al. 2023, eq. 7).

    label_smoothing: eps, the probability that a label is wrong, of conservative DPO (Mitchell 2023, eq. 3):
        -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h), least at beta h = log((1 - eps) / eps).
    """
    right, wrong = F.logsigmoid(beta * margins), F.logsigmoid(-beta * margins)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


def ipo_loss(margins: Tensor, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, (n,) (Azar et al. 2023, eq. 17, where beta is tau): h stays bounded.

    h is of whole responses, as in the paper; TRL takes the mean over their tokens.
    """
    return (margins - 1 / (2 * beta)).square()


def preference_metrics(logps: Tensor, ref_logps: Tensor, beta: float) -> Stats:
    """Means over pairs, by TRL's names, of log-probabilities (n, 2); docs/metrics.md has the glossary."""
    rewards = beta * (logps - ref_logps)
    margins = rewards[:, 0] - rewards[:, 1]
    sides = {"rewards": rewards, "logps": logps}.items()
    named = {f"{name}/{side}": x[:, i] for name, x in sides for i, side in enumerate(("chosen", "rejected"))}
    named |= {"rewards/margins": margins, "rewards/accuracies": (margins > 0).to(margins)}
    return {name: x.mean().item() for name, x in named.items()}
