"""PPO for language models (Ziegler et al. 2019; Stiennon et al. 2020): `PPOTrainer.step` is the algorithm.

Dropout is off by construction, in rollouts and in updates: a ratio between a policy with one dropout mask and the
same policy with another is not 1, and PPO clips the difference as if it were progress.

Left out: several GPUs, and a value model apart from the policy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor

from minirlhf.device.cpu import keep_freed_memory, limit_threads
from minirlhf.device.gpu import to_device
from minirlhf.device.placement import in_batches_that_fit, resolve_device
from minirlhf.device.precision import Precision
from minirlhf.device.precision_choice import choose_precision
from minirlhf.device.random import undone_on_error
from minirlhf.device.schedules import lr_factor
from minirlhf.evaluation.explanation import Explanation, TokenExplanation
from minirlhf.generation.static_decode import GraphedDecoder
from minirlhf.io.files import naming
from minirlhf.models.compilation import compile_blocks
from minirlhf.models.gpt2 import GPT2, share_frozen_layers
from minirlhf.models.heads import ActorCritic, ValueHead, language_model
from minirlhf.models.probes import language_model_probe
from minirlhf.rewards.base import RewardFunction, reward_by_token, within
from minirlhf.rl import ppo
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.rollout import Rollout, collect_rollout, rollout_from_tokens
from minirlhf.rl.statistics import Stats, TensorStats, mean_stats, read_stats, rollout_statistics, time_statistics
from minirlhf.runs import training_state
from minirlhf.text.tokenizer import Tokenizer


class PPOTrainer:
    """Proximal policy optimisation of a language model against a reward, held near a reference by a KL penalty.

    policy: an ActorCritic; a plain GPT2 gets a new value head, as the config has it. It is trained in place.
    ref_policy: the frozen reference, usually a second copy of the same checkpoint; or the folder to load it from, which
        `resume` then finds by itself.
    tokenizer: of both; needed for texts only.
    config: a PPOConfig; **overrides replace its fields by name, so the whole dict of the original recipe may be given.
        In the trainer's own config precision "auto" has become a name; `precision_choice` says why that one.
    Raises ValueError for an unknown or bad field, models or tokenizer that do not fit each other, or a reference
    that shares its parameters with the policy.
    """

    def __init__(
        self,
        policy: ActorCritic | GPT2,
        ref_policy: ActorCritic | GPT2 | str | os.PathLike[str],
        tokenizer: Tokenizer,
        config: PPOConfig | None = None,
        **overrides: Any,
    ):
        self.config = PPOConfig.with_overrides(config, **overrides)
        self.reference_source: str | None = None
        if isinstance(ref_policy, (str, os.PathLike)):
            self.reference_source = os.path.abspath(ref_policy) if Path(ref_policy).is_dir() else os.fspath(ref_policy)
            ref_policy = GPT2.from_pretrained(ref_policy)
        policy = _with_value_head(policy, self.config)
        _check_models(policy, ref_policy, tokenizer, self.config)
        self.device = resolve_device(self.config.device)
        if self.device.type == "cpu":
            keep_freed_memory()
            limit_threads()
        self.policy = policy.to(self.device).eval()
        self.policy.gpt2.checkpoint_activations = self.config.checkpoint_activations
        self.ref_policy = ref_policy.to(self.device).eval().requires_grad_(False)
        if self.config.reference == "shared":
            share_frozen_layers(self.policy.gpt2, self.reference)
            _ = self.reference_hash  # as it is now
        if self.config.compile:
            compile_blocks(self.policy.gpt2, self.reference)
        self.tokenizer = tokenizer
        probe = language_model_probe(self.policy.gpt2, self.score_temperature)
        self.precision_choice = choose_precision(self.config.precision, self.policy, probe, self.config.cliprange)
        # From here on it has its name: a run that goes on elsewhere keeps the precision that it began with.
        self.config = dataclasses.replace(self.config, precision=self.precision_choice.name)
        self.precision = Precision(self.config.precision, self.device, self.policy)
        self.decoder = GraphedDecoder() if self.config.cuda_graphs and self.device.type == "cuda" else None
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.config.lr, eps=self.config.adam_eps, weight_decay=0.0, fused=True
        )
        c = self.config
        self.kl_controller: ppo.AdaptiveKL | ppo.FixedKL = (
            ppo.AdaptiveKL(c.init_kl_coef, c.target, c.horizon) if c.adaptive_kl else ppo.FixedKL(c.init_kl_coef)
        )
        self.generators = {
            "sampling": torch.Generator(self.device).manual_seed(c.seed),
            "shuffling": torch.Generator().manual_seed(c.seed + 1),
        }
        self.score_moments = ppo.RunningMoments()
        self.iteration = 0  # batches trained on
        self.optimizer_steps = 0  # those that were skipped as well
        self.bad_steps = 0  # skipped in a row
        self.micro_batch_size = min(c.forward_batch_size, c.minibatch_size)  # less once a GPU had no room for them
        self.within_step = False  # what is in between two steps is no state to save

    @property
    def reference(self) -> GPT2:
        return language_model(self.ref_policy)

    @functools.cached_property
    def reference_hash(self) -> str:
        """SHA-256 of the reference's tensors, which never change."""
        return training_state.module_hash(self.reference)

    @property
    def score_temperature(self) -> float:
        """What logits are divided by when tokens are scored: what was sampled is what is scored, unless turned off."""
        return self.config.temperature if self.config.score_temperature else 1.0

    @property
    def scoring_batch_size(self) -> int:
        """Sequences a scoring pass, which keeps no activations for a backward pass."""
        return max(self.config.forward_batch_size, 128 if self.device.type == "cpu" else 1024)

    # ---- the algorithm ----------------------------------------------------------------------------------------------

    def step(
        self,
        queries: Rollout | Sequence[Tensor],
        responses: Sequence[Tensor] | None = None,
        scores: Sequence[float] | Sequence[Sequence[float]] | Sequence[Tensor] | Tensor | None = None,
    ) -> Stats:
        """Train on one batch.

        queries, responses: B 1-D int64 tensors each, of any lengths of at least 1; scores: B finite numbers, or B
        lists of them with one a token. Or one Rollout in the place of all three. Token lists carry no sampling sets,
        so they are scored with the full softmax at the configured temperature.
        Returns the statistics of the step by name (the README has their glossary).
        Raises ValueError for lists of unequal or no length, empty responses, bad token ids, or bad scores;
        FloatingPointError if `max_bad_steps` optimizer steps in a row had a loss or gradient that is not finite.
        """
        start = time.perf_counter()
        self.policy.eval()  # whatever was done to it between steps
        rollout = queries if isinstance(queries, Rollout) else self._rollout(queries, responses, scores)
        self.within_step = True

        # r_t = score at the last token - beta * KL_t;  A_t by GAE, whitened;  R_t = A_t + V(s_t)
        rewards, scores = self._token_rewards(rollout)
        advantages, returns = self.advantages(rewards, rollout.values, rollout.response_mask)

        updates: list[TensorStats] = []
        for _ in range(self.config.ppo_epochs):
            epoch = []
            for rows in self._minibatches(len(rollout)):
                epoch.append(self._update(rollout, rewards, advantages, returns, rows))
            updates += epoch
            if self._moved_too_far(epoch):
                break

        stats = self._update_statistics(read_stats(updates))
        stats = rollout_statistics(rollout, scores, rewards, returns) | stats
        self._update_kl_coef(stats, len(rollout))
        self.iteration += 1
        self.within_step = False
        return stats | time_statistics(stats, {**rollout.seconds, "update": time.perf_counter() - start}, len(rollout))

    def _token_kl(self, rollout: Rollout) -> Tensor:
        """KL (B, R) of each token between the sampling policy and the reference, as the config estimates it."""
        if self.config.kl_estimator == "exact":
            return rollout.exact_kl
        return ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, self.config.kl_estimator)

    def _token_rewards(self, rollout: Rollout, update: bool = True) -> tuple[Tensor, Tensor]:
        """Token rewards (B, R), and the scores (B,) in them. update: as in `_shaped_scores`."""
        c = self.config
        scores = self._shaped_scores(rollout, update)
        # r_t = score at the last token - beta * KL_t
        beta = self.kl_controller.coef if c.kl_placement == "reward" else 0.0
        shares = rollout.token_scores
        if shares is not None:  # scaled as the scores are; penalties, centring and clipping are left to the last token
            shares = shares * (c.score_scale / (self.score_moments.scale if c.score_whitening else 1.0))
        kl, mask = self._token_kl(rollout), rollout.response_mask
        return ppo.token_rewards(scores, kl, beta, mask, c.score_position, shares), scores

    def _shaped_scores(self, rollout: Rollout, update: bool) -> Tensor:
        """The scores (B,) that become rewards: penalties, then scale, running whitening and clipping.

        update: take the scores into the running moments.
        """
        c, mask = self.config, rollout.response_mask
        scores = rollout.scores
        if c.missing_eos != "keep":
            last = ppo.last_token(mask)
            ended = (last & (rollout.tokens[:, -mask.size(1) :] == c.eos_token_id)).any(-1)
            scores = ppo.penalise(scores, ~ended, c.missing_eos, c.missing_eos_score)
        if c.overlong != "keep" and c.max_response_tokens is not None:
            scores = ppo.penalise(scores, mask.sum(-1) > c.max_response_tokens, c.overlong, c.overlong_score)
        scores = scores * c.score_scale
        if c.score_whitening:
            if update:
                self.score_moments.update(scores)
            scores = self.score_moments.whiten(scores)
        return scores if c.score_clip is None else scores.clamp(-c.score_clip, c.score_clip)

    def advantages(self, rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages, whitened, and returns, (B, R), of the rows given."""
        c = self.config
        if c.whiten_scope == "sequence" and len(mask) > 1:
            rows = [self.advantages(*row) for row in zip(rewards.split(1), values.split(1), mask.split(1), strict=True)]
            return torch.cat([row[0] for row in rows]), torch.cat([row[1] for row in rows])
        if c.whiten_rewards:
            rewards = ppo.whiten(rewards, mask, shift_mean=False, ddof=c.whiten_ddof)
        advantages, returns = ppo.gae(rewards, values, mask, c.gamma, c.lam)
        return ppo.whiten(advantages, mask, ddof=c.whiten_ddof), returns

    def _update(
        self, rollout: Rollout, rewards: Tensor, advantages: Tensor, returns: Tensor, rows: Tensor
    ) -> TensorStats:
        """One optimizer step on a minibatch; skipped if its loss or gradient is not finite.

        rows: which of the rollout it has, int64 on the CPU.
        """
        c = self.config
        if c.loss_averaging != "micro_batches":  # similar lengths side by side, so that micro-batches have less padding
            rows = rows[rollout.lengths[rows].sum(-1).argsort(descending=True, stable=True)]
        there = to_device(rows, self.device)
        mask = rollout.response_mask[there]
        if c.whiten_scope == "minibatch":
            advantages, returns = self.advantages(rewards[there], rollout.values[there], mask)
        else:
            advantages, returns = advantages[there], returns[there]
        weights = self._weights(mask)
        totals, self.micro_batch_size = in_batches_that_fit(
            lambda size: self._gradient(rollout, rows, advantages, returns, weights, size), self.micro_batch_size
        )
        if self.iteration < c.value_warmup:  # the value head alone learns: a moving trunk would move the policy
            self.policy.gpt2.zero_grad(set_to_none=True)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * lr_factor(c.lr_schedule, self._progress(), c.lr_warmup)
        limit, loss = c.max_grad_norm or math.inf, totals["ppo/loss/total"]
        totals["ppo/grad_norm"] = self.precision.step(self.optimizer, self.parameters, limit, loss)
        self.optimizer_steps += 1
        return totals

    def _gradient(
        self, rollout: Rollout, rows: Tensor, advantages: Tensor, returns: Tensor, weights: Tensor, size: int
    ) -> TensorStats:
        """Leave the gradient of the loss on these rows in the parameters, summed over micro-batches of this size.

        Returns the sums of what is worth logging.
        """
        self.optimizer.zero_grad(set_to_none=True)  # of an attempt that ran out of memory
        totals: TensorStats = {}
        with self.precision.autocast():  # around all of them: weights are cast once
            for start in range(0, len(rows), size):
                micro = slice(start, start + size)
                batch = rollout.rows(rows[micro])
                here = micro, slice(batch.response_mask.size(1))
                loss, sums = self._loss(batch, advantages[here], returns[here], weights[here])
                self.precision.backward(loss)
                for name, value in sums.items():
                    totals[name] = totals.get(name, 0.0) + value.detach()
        return totals

    def _weights(self, mask: Tensor) -> Tensor:
        """The weight (B, R) of each token in the mean over its minibatch, whose mask is given."""
        c, mask = self.config, mask.to(self.policy.value_head.summary.weight.dtype)
        if c.loss_averaging == "tokens":
            return mask / mask.sum()
        if c.loss_averaging == "sequences":
            return mask / mask.sum(-1, keepdim=True) / len(mask)
        parts = mask.split(c.forward_batch_size)
        return torch.cat([part / part.sum() / len(parts) for part in parts])

    def _loss(self, batch: Rollout, advantages: Tensor, returns: Tensor, weights: Tensor) -> tuple[Tensor, TensorStats]:
        """The loss of a micro-batch, its share of the minibatch's mean, and the same of what is worth logging.

        Run within `precision.autocast`.
        """
        c, mask = self.config, batch.response_mask
        exact = c.kl_placement == "loss" and c.kl_estimator == "exact"
        scored = self.policy.score(
            batch.tokens,
            batch.mask if batch.padded else None,
            mask.size(1),
            self.score_temperature,
            batch.sampling_sets,
            self.reference if exact else None,
        )
        assert scored.values is not None

        def mean(x: Tensor) -> Tensor:
            return ppo.masked_sum(x * weights, mask)

        log_ratio = ppo.log_ratio(scored.logprobs, batch.logprobs, c.log_ratio_limit)
        policy_loss = mean(ppo.policy_loss(log_ratio, advantages, c.cliprange, c.dual_clip))
        value_loss = mean(ppo.value_loss(scored.values, batch.values, returns, c.cliprange_value))
        loss = c.vf_coef * value_loss
        if self.iteration >= c.value_warmup:
            loss = loss + policy_loss
            if c.entropy_coef > 0:  # its gradient costs two more passes over the logits
                loss = loss - c.entropy_coef * mean(scored.entropy)
            if c.kl_placement == "loss":
                kl = scored.exact_kl if exact else ppo.kl_estimate(scored.logprobs, batch.ref_logprobs, c.kl_estimator)
                assert kl is not None
                loss = loss + self.kl_controller.coef * mean(kl)
        ratio_error = log_ratio.detach().expm1().abs()
        value_change = (scored.values.detach() - batch.values).abs()
        sums = {
            "ppo/loss/policy": policy_loss,
            "ppo/loss/value": value_loss,
            "ppo/loss/total": loss,
            "ppo/policy/approxkl": mean(0.5 * log_ratio.detach().square()),
            "ppo/policy/clipfrac": mean((ratio_error > c.cliprange).to(weights)),
            "ppo/policy/ratio_error": mean(ratio_error),
            "ppo/val/clipfrac": mean((value_change > c.cliprange_value).to(weights)),
        }
        return loss, sums

    @torch.no_grad()
    def explain(self, rollout: Rollout, i: int, file: TextIO | None = None) -> Explanation:
        """Print one row of a rollout token by token, as PPO sees it, and return it.

        rollout: before or after `step` was called on it; the ratio shows how far the policy has moved since it was
            sampled. The KL coefficient is the controller's present one.
        i: the row. file: where to print; None: standard output.
        Raises ValueError for a row that is not there.
        """
        if not 0 <= i < len(rollout):
            raise ValueError(f"the rollout has rows 0 to {len(rollout) - 1}, got {i}")
        c, mask = self.config, rollout.response_mask
        kl, rewards = self._token_kl(rollout), self._token_rewards(rollout, update=False)[0]
        advantages, returns = self.advantages(rewards, rollout.values, mask)
        row = rollout.rows(torch.tensor([i]))
        width = row.response_mask.size(1)
        with self.precision.autocast():
            now = self.policy.score(row.tokens, row.mask, width, self.score_temperature, row.sampling_sets).logprobs
        log_ratio = ppo.log_ratio(now, row.logprobs, c.log_ratio_limit)
        advantage, ratio = advantages[i : i + 1, :width], log_ratio.exp()
        clipped = torch.where(advantage > 0, ratio > 1 + c.cliprange, ratio < 1 - c.cliprange)
        columns = {
            "logprob": now,
            "old_logprob": row.logprobs,
            "ref_logprob": row.ref_logprobs,
            "kl": kl[i : i + 1, :width],
            "reward": rewards[i : i + 1, :width],
            "value": row.values,
            "returns": returns[i : i + 1, :width],
            "advantage": advantage,
            "ratio": ratio,
        }
        numbers = torch.cat(list(columns.values())).T.tolist()  # one list a token
        texts = [self.tokenizer.vocab[token] for token in row.tokens[0, -width:].tolist()]
        explanation = Explanation(
            rollout.prompts[i] if rollout.prompts else self.tokenizer.decode(row.tokens[0, :-width]),
            rollout.scores[i].item(),
            tuple(
                TokenExplanation(text, clipped=bool(cut), **dict(zip(columns, values, strict=True)))
                for text, values, cut in zip(texts, numbers, clipped[0].tolist(), strict=True)
            ),
        )
        print(explanation, file=file)
        return explanation

    # ---- experience -------------------------------------------------------------------------------------------------

    def collect(self, prompts: Sequence[str], reward_fn: RewardFunction) -> Rollout:
        """`collect_rollout` with the trainer's models, settings and generator.

        Raises TimeoutError if the reward function takes longer than `reward_timeout`. After that, as after any error
        of its own, the trainer is as it was before.
        """
        c = self.config
        self.policy.eval()

        def scores(prompts: list[str], responses: list[str], tokens: list[list[str]]) -> Tensor:
            return within(c.reward_timeout, reward_by_token, reward_fn, prompts, responses, tokens)

        with undone_on_error(self.generators.values()):
            return collect_rollout(
                self.policy,
                self.ref_policy,
                self.tokenizer,
                prompts,
                scores,
                c.gen_len,
                c.sampling,
                eos_token_id=c.eos_token_id,
                generator=self.generators["sampling"],
                forward_batch_size=self.scoring_batch_size,
                score_full_softmax=c.score_full_softmax,
                score_temperature=self.score_temperature,
                score_from_decode=self.precision.name == "fp32",
                autocast=self.precision.autocast,
                decoder=self.decoder,
            )

    def train(
        self,
        prompts: Sequence[str],
        reward_fn: RewardFunction,
        on_step: Callable[[Rollout, Stats], object] | None = None,
    ) -> list[Stats]:
        """Run `config.steps` episodes: draw a batch of prompts from the pool, sample, score, step, and again.

        prompts: the pool, drawn from with replacement.
        reward_fn: a reward of any form that `rewards.call_reward` takes.
        on_step: called after every step with its rollout and statistics; `Run.record` is one.
        Returns the statistics of all steps. Raises ValueError for an empty pool, or a prompt that is empty or too
        long, before any training. After an error of the reward function the trainer is as it was after the last step.
        """
        self.check_prompts(prompts)
        history = []
        while self.iteration < self.config.iterations:
            with undone_on_error(self.generators.values()):
                drawn = torch.randint(len(prompts), (self.config.batch_size,), generator=self.generators["shuffling"])
                rollout = self.collect([prompts[i] for i in drawn], reward_fn)
            history.append(self.step(rollout))
            if on_step is not None:
                on_step(rollout, history[-1])
        return history

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises ValueError for an empty pool, an empty prompt, or one that leaves no room for `gen_len` tokens."""
        if isinstance(prompts, str) or len(prompts) == 0:
            raise ValueError(f"prompts must be a list with at least one text, got {prompts!r}")
        room = self.policy.gpt2.config.n_positions - self.config.gen_len
        for prompt in prompts:
            length = len(self.tokenizer.encode_prompt(prompt))
            if length > room:
                raise ValueError(
                    f"prompt {prompt[:20]!r}... has {length} tokens; the model's {self.policy.gpt2.config.n_positions} "
                    f"positions less gen_len={self.config.gen_len} leave room for {room}"
                )

    def _rollout(self, queries: Sequence[Tensor], responses: Sequence[Tensor] | None, scores: Any) -> Rollout:
        """A Rollout of token lists, which carry no sampling sets: scored with the full softmax."""
        if responses is None or scores is None:
            raise ValueError("step takes a Rollout, or queries, responses and scores")
        return rollout_from_tokens(
            self.policy,
            self.ref_policy,
            queries,
            responses,
            scores,
            self.score_temperature,
            pad_token_id=self.tokenizer.pad_id,
            forward_batch_size=self.config.forward_batch_size,
            autocast=self.precision.autocast,
        )

    def _moved_too_far(self, epoch: list[TensorStats]) -> bool:
        """Whether the policy left the trust region that `target_kl` draws around the one that sampled."""
        limit = self.config.target_kl
        return limit is not None and mean_stats(read_stats(epoch))["ppo/policy/approxkl"] > limit

    def _update_kl_coef(self, stats: Stats, count: int) -> None:
        """Let the controller see the batch's KL, in the unit of its target."""
        tokens = 1.0 if self.config.kl_unit == "sequence" else stats["tokens/response"]
        self.kl_controller.update(stats["objective/kl"] / tokens, count)

    def _update_statistics(self, updates: Sequence[Stats]) -> Stats:
        """The means over the updates of a step. Raises FloatingPointError if too many in a row were skipped."""
        skipped = [not math.isfinite(update["ppo/grad_norm"]) for update in updates]
        for update, bad in zip(updates, skipped, strict=True):
            self.bad_steps = self.bad_steps + 1 if bad else 0
            if self.bad_steps >= self.config.max_bad_steps:
                raise FloatingPointError(
                    f"step {self.iteration + 1}: {self.bad_steps} optimizer steps in a row were skipped, as their loss "
                    f"(the last one: {update['ppo/loss/total']}) or the norm of their gradient "
                    f"({update['ppo/grad_norm']}) was not finite"
                )
        stats = mean_stats(updates)
        # At the first minibatch the policy is still the one that sampled: anything but 0 is an error of scoring.
        stats["ppo/policy/first_ratio_error"] = updates[0]["ppo/policy/ratio_error"]
        stats["objective/kl_coef"] = self.kl_controller.coef
        stats["ppo/lr"] = self.optimizer.param_groups[0]["lr"]
        stats["ppo/updates"], stats["ppo/skipped_updates"] = float(len(updates) - sum(skipped)), float(sum(skipped))
        return stats

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        """Shuffled rows in minibatches, on the CPU; the last one may be smaller."""
        order = torch.randperm(count, generator=self.generators["shuffling"])
        yield from order.split(self.config.minibatch_size)

    def _progress(self) -> float:
        """The share of the run's optimizer steps that are done."""
        c = self.config
        return min(self.optimizer_steps / (c.iterations * c.ppo_epochs * -(-c.batch_size // c.minibatch_size)), 1.0)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Write everything that the next step depends on into a folder, which is replaced as one.

        Policy, value head, tokenizer, optimizer state, loss scale, KL coefficient, running moments, random generators,
        counters and config; of the reference, which never changes, the hash and the source. The folder is also a model
        folder. Raises RuntimeError after an error within `step`, FileExistsError for a folder that holds something
        else, OSError if it cannot be written.
        """
        training_state.save(self, folder)

    @classmethod
    def resume(
        cls,
        folder: str | os.PathLike[str],
        ref_policy: ActorCritic | GPT2 | str | os.PathLike[str] | None = None,
        **overrides: Any,
    ) -> PPOTrainer:
        """The trainer that `save_checkpoint` wrote: on the CPU it goes on bit for bit as if it had not been cut.

        ref_policy: the reference, or its folder; None: the folder that it was loaded from at first.
        overrides: of `steps` and other fields that do not change what is computed (`training_state.FREE_FIELDS`).
        Raises FileNotFoundError for a missing folder, ValueError for a damaged checkpoint, another reference than the
        run began with, or an override that is not allowed.
        """
        state = training_state.read(folder)
        config = state.config(**overrides)
        source = state.reference_source if ref_policy is None else ref_policy
        if source is None:
            raise ValueError(f"{folder} was saved with a reference that came from no folder; pass it as ref_policy")
        try:
            with naming(folder):
                trainer = cls(state.policy(), source, Tokenizer.from_pretrained(folder), config)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; it is the reference of {folder}: pass ref_policy") from error
        state.restore(trainer)
        return trainer


def _with_value_head(policy: ActorCritic | GPT2, config: PPOConfig) -> ActorCritic:
    if isinstance(policy, GPT2):
        kind = config.value_head or "linear"
        head = ValueHead(policy.config.n_embd, kind, init_range=config.value_head_init, seed=config.seed)
        return ActorCritic(policy, head)
    if config.value_head not in (None, policy.value_head.kind):
        raise ValueError(
            f"PPOConfig.value_head is {config.value_head!r}, but the policy has a {policy.value_head.kind!r} head; "
            "pass the plain GPT2 to get a new one"
        )
    return policy


def _check_models(policy: ActorCritic, ref_policy: ActorCritic | GPT2, tokenizer: Tokenizer, config: PPOConfig) -> None:
    reference = language_model(ref_policy)
    policy.gpt2.fit_vocabulary(len(tokenizer), "policy")
    reference.fit_vocabulary(len(tokenizer), "reference")
    if {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}:
        raise ValueError("policy and ref_policy share parameters: the reference would move with the policy; load twice")
    if reference.config.n_positions < policy.gpt2.config.n_positions:
        raise ValueError(
            f"the reference has {reference.config.n_positions} positions, fewer than the policy's "
            f"{policy.gpt2.config.n_positions}: it could not score what the policy writes"
        )
    if config.gen_len > policy.gpt2.config.n_positions:  # the last token needs no position: nothing follows it
        raise ValueError(
            f"PPOConfig.gen_len must be at most the model's {policy.gpt2.config.n_positions} positions, "
            f"got {config.gen_len}"
        )
    if config.eos_token_id is not None and not 0 <= config.eos_token_id < len(tokenizer):
        raise ValueError(f"PPOConfig.eos_token_id must be in [0, {len(tokenizer)}), got {config.eos_token_id}")
