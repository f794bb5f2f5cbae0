"""PPO for language models (Ziegler et al. 2019; Stiennon et al. 2020): `step`, then `_update`, then `_loss`.

Dropout is off in rollouts and in updates: the ratio between a policy with one dropout mask and the same policy with
another is not 1, and PPO would clip the difference as if it were progress.

Left out: a value model apart from the policy.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from minirlhf.common.masked import masked_sum
from minirlhf.common.progress import AfterSteps, OnStep
from minirlhf.device.placement import sizes_that_fit
from minirlhf.device.processes import processes
from minirlhf.device.random import undone_on_error
from minirlhf.device.schedules import lr_factor
from minirlhf.io.training_state import State, module_hash
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic
from minirlhf.models.prepared import prepare
from minirlhf.models.sharded import exported
from minirlhf.rewards.base import RewardFunction
from minirlhf.rl.advantages import USES_VALUES, with_advantages
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.groups import collect_groups_with_spread
from minirlhf.rl.kl import AdaptiveKL, FixedKL, kl_estimate
from minirlhf.rl.logprobs import TokenLogprobs, response_logprobs
from minirlhf.rl.losses import clip_ratio, log_ratio, policy_loss, token_weights, value_loss
from minirlhf.rl.rollout import Rollout, collect_rollout, evaluation, rollout_from_tokens
from minirlhf.rl.shaping import with_token_rewards
from minirlhf.rl.state import load_trainer_state, trainer_state
from minirlhf.rl.statistics import Stats, TensorStats, mean_stats, read_stats, rollout_statistics, time_statistics
from minirlhf.text.prompts import Prompt, as_prompts, require_room
from minirlhf.text.tokenizer import Tokenizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from minirlhf.rl.presets import PPOOverrides


class PPOTrainer:
    """Proximal policy optimisation of a language model against a reward, held near a reference by a KL penalty.

    policy: trained in place; a plain decoder gets a new value head, as the config says.
    ref_policy: the frozen reference, usually a second copy of the same checkpoint; or the folder to load it from;
        None with LoRA, where it is the policy with its adapters off.
    tokenizer: of both.
    config: **overrides replace its fields by name, so the whole dict of the original recipe may be given. In the
        trainer's own config precision "auto" has become a name; `precision_choice` says why that one.
    Raises ValueError for an unknown or bad field, models or tokenizer that do not fit each other, or a reference
    that shares its parameters with the policy.
    """

    def __init__(
        self,
        policy: ActorCritic | Decoder,
        ref_policy: ActorCritic | Decoder | str | os.PathLike[str] | None,
        tokenizer: Tokenizer,
        config: PPOConfig | None = None,
        **overrides: Unpack[PPOOverrides],
    ):
        config = PPOConfig.with_overrides(config, **overrides)
        prepared = prepare(policy, ref_policy, tokenizer, config, config.advantages in USES_VALUES)
        self.models, self.config, self.precision_choice, self.reference_source = prepared
        self.policy, self.reference, self.tokenizer = self.models.policy, self.models.reference, tokenizer
        self.precision, self.device = self.models.precision, self.policy.decoder.device
        c, self.processes = self.config, processes()
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=c.lr, eps=c.adam_eps, weight_decay=0.0, fused=True)
        adaptive = AdaptiveKL(c.init_kl_coef, c.target, c.horizon)
        self.kl_controller: AdaptiveKL | FixedKL = adaptive if c.adaptive_kl else FixedKL(c.init_kl_coef)
        self.generators = {
            "sampling": torch.Generator(self.device).manual_seed(c.seed),
            "shuffling": torch.Generator().manual_seed(c.seed + 1),
        }
        self.iteration = 0  # batches trained on
        self.optimizer_steps = 0  # skipped ones included
        self.bad_steps = 0  # skipped in a row
        self.micro_batch_size = min(c.forward_batch_size, c.minibatch_size)  # less once a GPU had no room for them
        self.interrupted = False  # True inside `step`, where the state is inconsistent and must not be saved

    def __repr__(self) -> str:
        done, of = f"step {self.iteration} of {self.config.iterations}", type(self.policy.decoder).__name__
        return f"PPOTrainer({done}, {of}, {self.config.advantages}, {self.config.precision}, {self.device})"

    # ---- the algorithm ----------------------------------------------------------------------------------------------

    def step(
        self,
        queries: Rollout | Sequence[Tensor],
        responses: Sequence[Tensor] | None = None,
        scores: Sequence[float] | Sequence[Sequence[float]] | Sequence[Tensor] | Tensor | None = None,
    ) -> Stats:
        """Train on one batch: a Rollout, as `collect` gives it, or token lists with their scores.

        queries, responses: B 1-D int64 tensors each, of any lengths of at least 1; scores: B finite numbers, or B
        lists of them with one a token. Token lists carry no sampling sets, so their log-probabilities are those of
        the full softmax at the configured temperature.
        Returns the statistics of the step by name (docs/metrics.md has their glossary).
        Raises ValueError for lists of unequal or no length, empty or too long sequences, bad token ids or bad scores;
        FloatingPointError if `max_bad_steps` optimizer steps in a row had a loss or gradient that is not finite.
        """
        start = time.perf_counter()
        self.policy.eval()  # whatever mode it was put into between steps
        if not isinstance(queries, Rollout):
            queries = rollout_from_tokens(self.models.whole(), queries, responses, scores, self.config)
        rollout = queries
        self.interrupted = True

        # r_t = score at the last token - beta * KL_t;  A_t by the config's estimator; with GAE R_t = A_t + V(s_t)
        batch, shaped = with_token_rewards(rollout, self.kl_controller.coef, self.config)
        batch = with_advantages(batch, self.config)

        updates: list[TensorStats] = []
        for _ in range(self.config.ppo_epochs):
            epoch: list[TensorStats] = []
            for rows in self._minibatches(len(batch)):
                epoch.append(self._update(batch.rows(rows)))
            updates += epoch
            if self._moved_too_far(epoch):
                break

        stats = {**rollout.reward_metrics, **rollout_statistics(batch, shaped)} | self._update_statistics(
            read_stats(updates)
        )
        self.kl_controller.update(stats["objective/kl"], len(batch))  # k1, whatever the estimator of the penalty
        self.iteration += 1
        self.interrupted = False
        return stats | time_statistics(stats, {**rollout.seconds, "update": time.perf_counter() - start}, len(batch))

    def _update(self, minibatch: Rollout) -> TensorStats:
        """One optimizer step on a minibatch; skipped if its loss or gradient is not finite."""
        c = self.config
        if c.whiten_scope == "minibatch":  # made anew; those of the whole batch served its statistics
            minibatch = with_advantages(minibatch, c)
        if c.loss_averaging != "micro_batches":  # similar lengths side by side, so that micro-batches have less padding
            minibatch = minibatch.rows(minibatch.lengths.sum(-1).argsort(descending=True, stable=True))
        weights = token_weights(minibatch.response_mask, c, minibatch.logprobs.dtype)
        minibatch = minibatch.replace(weights=weights)

        for attempt in sizes_that_fit(self.micro_batch_size, once=c.sharding is not None and self.processes.on):
            with attempt, self.precision.autocast():  # one context for all micro-batches: weights are cast once
                self.optimizer.zero_grad(set_to_none=True)
                totals: TensorStats = {}
                for rows, factor in self.processes.deal(len(minibatch), attempt.size):  # all rows, if alone
                    part = minibatch.rows(rows)
                    loss, sums = self._loss(part.replace(weights=part.weights * factor))
                    self.precision.backward(loss)
                    totals = {name: totals.get(name, 0.0) + value.detach() for name, value in sums.items()}
        self.micro_batch_size = attempt.size
        self.processes.sum_([*(p.grad for p in self.parameters if p.grad is not None), *totals.values()])

        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * lr_factor(c.lr_schedule, self._progress())
        limit, loss = c.max_grad_norm or math.inf, totals["ppo/loss/total"]
        totals["ppo/grad_norm"] = self.precision.step(self.optimizer, self.parameters, limit, loss)
        self.optimizer_steps += 1
        return totals

    def _loss(self, batch: Rollout) -> tuple[Tensor, TensorStats]:
        """The loss of a micro-batch, its share of the minibatch's mean, and the same of what is worth logging."""
        c, mask = self.config, batch.response_mask
        reference = self.reference if c.kl_estimator == "exact" else None
        inputs, sets = (batch.tokens, batch.attention_mask, mask.size(1)), batch.sampling_sets
        now = response_logprobs(self.policy, *inputs, c.logprobs_divisor, sets, reference)

        def mean(x: Tensor) -> Tensor:
            return masked_sum(x * batch.weights, mask)

        # rho_t = pi(y_t) / pi_old(y_t);  max(-A_t rho_t, -A_t clip(rho_t, 1 +- cliprange))
        log_rho = log_ratio(now.logprobs, batch.logprobs, mask, c.policy_ratio)
        of_policy = mean(policy_loss(log_rho, batch.advantages, c.cliprange, c.cliprange_high))
        loss, sums = of_policy, {"ppo/loss/policy": of_policy}
        if batch.returns is not None and now.values is not None:
            of_values = mean(value_loss(now.values, batch.values, batch.returns, c.cliprange_value))
            loss = c.vf_coef * of_values + loss
            moved = (now.values.detach() - batch.values).abs() > c.cliprange_value
            sums |= {"ppo/loss/value": of_values, "ppo/val/clipfrac": mean(moved.to(batch.weights))}
        if c.entropy_coef > 0:  # its gradient costs two more passes over the logits
            loss = loss - c.entropy_coef * mean(now.entropy)
        if c.kl_in_loss:
            loss = loss + self.kl_controller.coef * mean(self._kl_loss(now, batch))
        ratio, drift = log_rho.detach().exp(), log_ratio(now.logprobs.detach(), batch.logprobs, mask)
        sums |= {
            "ppo/loss/total": loss,
            "ppo/policy/approxkl": mean(0.5 * drift.square()),
            "ppo/policy/clipfrac": mean((ratio != clip_ratio(ratio, c.cliprange, c.cliprange_high)).to(batch.weights)),
            "ppo/policy/ratio_error": mean((ratio - 1).abs()),
        }
        return loss, sums

    def _kl_loss(self, now: TokenLogprobs, batch: Rollout) -> Tensor:
        """KL (B, R) to the reference with its gradient, on the scale of the advantages that it is weighed against."""
        kl = now.exact_kl
        if kl is None:
            kl = kl_estimate(now.logprobs, batch.ref_logprobs, self.config.kl_estimator)
        return kl if batch.advantage_scale is None else kl * batch.advantage_scale

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        """Shuffled rows in minibatches, on the CPU, with whole groups; the last one may be smaller."""
        c = self.config
        groups = torch.randperm(count // c.group_size, generator=self.generators["shuffling"])
        order = (groups[:, None] * c.group_size + torch.arange(c.group_size)).flatten()
        yield from order.split(c.minibatch_size)

    def _progress(self) -> float:
        """The share of the run's optimizer steps that are done."""
        c = self.config
        return min(self.optimizer_steps / (c.iterations * c.ppo_epochs * -(-c.batch_size // c.minibatch_size)), 1.0)

    def _moved_too_far(self, epoch: list[TensorStats]) -> bool:
        """Whether the policy left the trust region that `target_kl` draws around the one that sampled."""
        limit = self.config.target_kl
        return limit is not None and mean_stats(read_stats(epoch))["ppo/policy/approxkl"] > limit

    def _update_statistics(self, updates: Sequence[Stats]) -> Stats:
        """The means over the updates of a step. Raises FloatingPointError if too many in a row were skipped."""
        skipped = [not math.isfinite(update["ppo/grad_norm"]) for update in updates]
        for update, bad in zip(updates, skipped, strict=True):
            self.bad_steps = self.bad_steps + 1 if bad else 0
            if self.bad_steps >= self.config.max_bad_steps:
                loss, norm = update["ppo/loss/total"], update["ppo/grad_norm"]
                raise FloatingPointError(
                    f"step {self.iteration + 1}: {self.bad_steps} optimizer steps in a row were skipped, as their loss "
                    f"(the last one: {loss}) or the norm of their gradient ({norm}) was not finite"
                )
        stats = mean_stats(updates)
        # At the first minibatch the policy is still the one that sampled: anything but 0 is an error of scoring.
        stats["ppo/policy/first_ratio_error"] = updates[0]["ppo/policy/ratio_error"]
        stats["objective/kl_coef"] = self.kl_controller.coef
        stats["ppo/lr"] = self.optimizer.param_groups[0]["lr"]
        stats["ppo/updates"], stats["ppo/skipped_updates"] = float(len(updates) - sum(skipped)), float(sum(skipped))
        return stats

    # ---- experience -------------------------------------------------------------------------------------------------

    def collect(self, prompts: Sequence[str], reward_fn: RewardFunction) -> Rollout:
        """`collect_rollout` with the trainer's own; after an error the trainer is as it was before."""
        self.policy.eval()
        collect = collect_groups_with_spread if self.config.drop_flat_groups else collect_rollout
        with undone_on_error(self.generators.values()):
            return collect(self.models.whole(), prompts, reward_fn, self.config, self.generators["sampling"])

    def train(
        self,
        prompts: Iterable[Prompt] | os.PathLike[str],
        reward_fn: RewardFunction,
        on_step: OnStep | Sequence[OnStep] | None = None,
        *,
        evaluate_every: int | None = None,
        save_best: str | os.PathLike[str] | None = None,
        stop_when: Callable[[Stats], object] | None = None,
        progress: bool = True,
    ) -> list[Stats]:
        """Run `config.steps` episodes: draw a batch of prompts from the pool, sample, score, step, and again.

        prompts: the pool, drawn from with replacement: a collection of texts or chats, or a file (see `text.prompts`).
        on_step, evaluate_every, save_best, stop_when, progress: see `AfterSteps`, and `evaluation`; `Run.record` is an
            `on_step`.
        Returns the statistics of each step, and its number as "step", as in metrics.jsonl. Raises ValueError for an
        empty pool, or a prompt that is empty or too long, before any training. After an error of the reward function
        the trainer is as it was after the last step.
        """
        pool, history = self.check_prompts(prompts), []
        with AfterSteps(self, on_step, progress, save_best, evaluate_every, stop_when) as ends:
            while self.iteration < self.config.iterations:
                with undone_on_error(self.generators.values()):
                    count = self.config.batch_size // self.config.group_size
                    drawn = torch.randint(len(pool), (count,), generator=self.generators["shuffling"])
                    rollout = self.collect([pool[i] for i in drawn], reward_fn)
                history.append({"step": self.iteration + 1, **self.step(rollout)})
                if ends.evaluation_due:
                    history[-1] |= evaluation(self.models.whole(), pool, reward_fn, self.config)
                if ends(rollout, history[-1]):
                    break
        return history

    def check_prompts(self, prompts: Iterable[Prompt] | os.PathLike[str]) -> list[str]:
        """The pool as a list. Raises ValueError as `as_prompts`, and for a prompt without room for `gen_len` tokens."""
        pool = as_prompts(prompts, self.tokenizer)
        require_room(pool, self.tokenizer, self.policy.decoder.n_positions, self.config.gen_len)
        return pool

    # ---- state: `runs` writes it to disk and reads it ---------------------------------------------------------------

    kind: ClassVar[str] = "ppo"

    @property
    def steps_done(self) -> int:
        """Batches trained on."""
        return self.iteration

    @property
    def steps_total(self) -> int:
        """Batches of the whole run."""
        return self.config.iterations

    @functools.cached_property
    def reference_hash(self) -> str:
        """SHA-256 of the reference's tensors, which never change."""
        return module_hash(self.reference)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write policy, adapters merged, value head and tokenizer as a model folder, once for all processes."""
        policy = exported(self.policy)
        if self.processes.first:
            policy.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)

    def state_dict(self) -> State:
        """See `state.trainer_state`."""
        return trainer_state(self)

    def load_state_dict(self, state: State) -> None:
        """See `state.load_trainer_state`."""
        load_trainer_state(self, state)
