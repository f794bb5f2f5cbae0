"""PPO for language models (Ziegler et al. 2019; Stiennon et al. 2020): `PPOTrainer.step` is the algorithm.

Dropout is off by construction, in rollouts and in updates: a ratio between a policy with one dropout mask and the
same policy with another is not 1, and PPO clips the difference as if it were progress.

Left out: several GPUs, and a value model apart from the policy.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minirlhf import ppo
from minirlhf.batching import left_pad, right_pad
from minirlhf.checkpoints import check_tensors, read_metadata, read_tensors, write_tensors
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.heads import ActorCritic
from minirlhf.optimization import PRECISIONS, SCHEDULES, Precision, lr_factor, resolve_device
from minirlhf.rewards import RewardFunction, checked_scores
from minirlhf.rollout import Rollout, collect_rollout, score_in_batches
from minirlhf.sampling import SamplingConfig
from minirlhf.tokenizer import Tokenizer

Stats = dict[str, float]
TensorStats = dict[str, Tensor]


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO; names and defaults of the first block are those of the original recipe.

    Raises ValueError with the field, the value and what is allowed.
    """

    # The loop
    steps: int = 25000  # episodes (sequences) of the whole run: steps / batch_size iterations
    batch_size: int = 128  # sequences an iteration
    forward_batch_size: int = 16  # sequences a forward pass: micro-batches; memory and speed, not results
    gen_len: int = 16  # new tokens a prompt
    save_freq: int = 5  # iterations between printed samples and saves
    # The algorithm
    ppo_epochs: int = 4  # passes over each batch
    lr: float = 2e-6
    init_kl_coef: float = 0.2  # first weight of the KL penalty in the reward
    target: float = 6.0  # KL per sequence (sum over its tokens) that the controller aims at, nats
    horizon: float = 10000.0  # episodes; the time scale of the controller
    gamma: float = 1.0  # discount
    lam: float = 0.95  # of GAE
    cliprange: float = 0.2  # of the ratio
    cliprange_value: float = 0.2
    vf_coef: float = 0.1  # weight of the value loss

    # What a modern trainer needs besides
    adaptive_kl: bool = True  # False: init_kl_coef stays
    minibatch_size: int = 16  # sequences an optimizer step; 1 in the original recipe
    max_grad_norm: float = 1.0  # inf: no clipping
    adam_eps: float = 1e-8
    lr_schedule: str = "constant"  # constant, linear or cosine, counted in optimizer steps over the whole run
    lr_warmup: float = 0.0  # share of all optimizer steps
    target_kl: float | None = None  # stop the epochs of a batch once approxkl passes this, nats a token
    entropy_coef: float = 0.0  # weight of an entropy bonus
    log_ratio_limit: float = ppo.LOG_RATIO_LIMIT  # log-ratios are clamped to +- this before exp
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 0.95
    score_full_softmax: bool = False  # True: score truncated samples with the full softmax, as the original recipe
    eos_token_id: int | None = None  # None: every response has gen_len tokens
    precision: str = "fp32"  # fp32, bf16 or fp16, over fp32 weights
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "forward_batch_size", "gen_len", "save_freq", "ppo_epochs", "minibatch_size")
        for name in counts:
            self._require(name, type(getattr(self, name)) is int and getattr(self, name) >= 1, "an integer >= 1")
        for name in ("lr", "target", "horizon", "log_ratio_limit", "max_grad_norm"):
            self._require(name, self._is_number(name) and getattr(self, name) > 0, "a number > 0")
        for name in ("init_kl_coef", "vf_coef", "entropy_coef", "adam_eps"):
            self._require(name, self._is_number(name) and 0 <= getattr(self, name) < math.inf, "a finite number >= 0")
        for name in ("gamma", "lam", "lr_warmup"):
            self._require(name, self._is_number(name) and 0 <= getattr(self, name) <= 1, "a number in [0, 1]")
        for name in ("cliprange", "cliprange_value"):
            self._require(name, self._is_number(name) and 0 < getattr(self, name) < math.inf, "a finite number > 0")
        self._require("target_kl", self.target_kl is None or self.target_kl > 0, "None or a number > 0")
        self._require("lr_schedule", self.lr_schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._require("precision", self.precision in PRECISIONS, f"one of {', '.join(PRECISIONS)}")
        _ = self.sampling  # temperature, top_k and top_p are checked there

    @property
    def sampling(self) -> SamplingConfig:
        return SamplingConfig(self.temperature, self.top_k, self.top_p)

    @property
    def iterations(self) -> int:
        """Batches of the whole run."""
        return -(-self.steps // self.batch_size)

    @classmethod
    def with_overrides(cls, base: PPOConfig | None = None, **overrides: Any) -> PPOConfig:
        """`base`, or the defaults, with some fields replaced.

        Raises ValueError for an unknown name, with the nearest known one.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known)}"
                raise ValueError(f"PPOConfig has no field {name!r}; {hint}")
        return dataclasses.replace(base or cls(), **overrides)

    def _is_number(self, name: str) -> bool:
        value = getattr(self, name)
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    def _require(self, name: str, fine: bool, allowed: str) -> None:
        if not fine:
            raise ValueError(f"PPOConfig.{name} must be {allowed}, got {getattr(self, name)!r}")


class PPOTrainer:
    """Proximal policy optimisation of a language model against a reward, held near a reference by a KL penalty.

    policy: an ActorCritic; a plain GPT2 gets a new value head. It is trained in place.
    ref_policy: the frozen reference, usually a second copy of the same checkpoint.
    tokenizer: of both; needed for texts only.
    config: a PPOConfig; **overrides replace its fields by name, so the whole dict of the original recipe may be given.
    Raises ValueError for an unknown or bad field, models or tokenizer that do not fit each other, or a reference
    that shares its parameters with the policy.
    """

    def __init__(
        self,
        policy: ActorCritic | GPT2,
        ref_policy: ActorCritic | GPT2,
        tokenizer: Tokenizer,
        config: PPOConfig | None = None,
        **overrides: Any,
    ):
        self.config = PPOConfig.with_overrides(config, **overrides)
        policy = policy if isinstance(policy, ActorCritic) else ActorCritic(policy)
        _check_models(policy, ref_policy, tokenizer, self.config)
        self.device = resolve_device(self.config.device)
        self.policy = policy.to(self.device).eval()
        self.ref_policy = ref_policy.to(self.device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.precision = Precision(self.config.precision, self.device)
        self.parameters = [p for p in self.policy.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=self.config.lr, eps=self.config.adam_eps, weight_decay=0.0, fused=True
        )
        c = self.config
        self.kl_controller: ppo.AdaptiveKL | ppo.FixedKL = (
            ppo.AdaptiveKL(c.init_kl_coef, c.target, c.horizon) if c.adaptive_kl else ppo.FixedKL(c.init_kl_coef)
        )
        self.sampling_generator = torch.Generator(self.device).manual_seed(c.seed)
        self.shuffling_generator = torch.Generator().manual_seed(c.seed)
        self.iteration = 0  # batches trained on
        self.optimizer_steps = 0

    # ---- the algorithm ----------------------------------------------------------------------------------------------

    def step(
        self,
        queries: Rollout | Sequence[Tensor],
        responses: Sequence[Tensor] | None = None,
        scores: Sequence[float] | Sequence[Tensor] | Tensor | None = None,
    ) -> Stats:
        """Train on one batch.

        queries, responses: B 1-D int64 tensors each, of any lengths of at least 1; scores: B finite numbers.
        Or one Rollout in the place of all three. Token lists carry no sampling sets, so they are scored with the full
        softmax at the configured temperature.
        Returns the statistics of the step by name (the README has their glossary).
        Raises ValueError for lists of unequal or no length, empty responses, bad token ids, or bad scores.
        """
        start = time.perf_counter()
        rollout = queries if isinstance(queries, Rollout) else self._rollout(queries, responses, scores)
        c, mask = self.config, rollout.response_mask

        # r_t = score at the last token - beta * (log pi_old - log pi_ref)
        kl = ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs)
        rewards = ppo.token_rewards(rollout.scores, kl, self.kl_controller.coef, mask)
        advantages, returns = ppo.gae(rewards, rollout.values, mask, c.gamma, c.lam)
        advantages = ppo.whiten(advantages, mask)

        updates: list[TensorStats] = []
        for _ in range(c.ppo_epochs):
            epoch = [self._update(rollout, advantages, returns, rows) for rows in self._minibatches(len(rollout))]
            updates += epoch
            if c.target_kl is not None and mean_stats(epoch)["ppo/policy/approxkl"] > c.target_kl:
                break

        stats = self._statistics(rollout, kl, rewards, returns, updates)
        self.kl_controller.update(stats["objective/kl"], len(rollout))
        self.iteration += 1
        seconds = {**rollout.seconds, "update": time.perf_counter() - start}
        stats |= {f"time/{phase}": value for phase, value in seconds.items()}
        stats["time/tokens_per_second"] = stats["tokens/response"] * len(rollout) / sum(seconds.values())
        return stats

    def _update(self, rollout: Rollout, advantages: Tensor, returns: Tensor, rows: Tensor) -> TensorStats:
        """One optimizer step on these rows (minibatch), its gradient summed over micro-batches."""
        c = self.config
        tokens = rollout.response_mask[rows].sum()  # of the whole minibatch: its cut into micro-batches changes nothing
        totals: TensorStats = {}
        for micro in rows.split(c.forward_batch_size):
            batch = rollout.rows(micro)
            width = batch.response_mask.size(1)
            loss, sums = self._loss(batch, advantages[micro, :width], returns[micro, :width])
            self.precision.backward(loss / tokens)
            for name, value in sums.items():
                totals[name] = totals.get(name, 0.0) + value.detach() / tokens
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * lr_factor(c.lr_schedule, self._progress(), c.lr_warmup)
        totals["ppo/grad_norm"] = self.precision.step(self.optimizer, self.parameters, c.max_grad_norm)
        self.optimizer_steps += 1
        return totals

    def _loss(self, batch: Rollout, advantages: Tensor, returns: Tensor) -> tuple[Tensor, TensorStats]:
        """The loss of a micro-batch, summed over its tokens, and the sums of what is worth logging."""
        c, mask = self.config, batch.response_mask
        with self.precision.autocast():
            scored = self.policy.score(batch.tokens, batch.mask, mask.size(1), c.temperature, batch.sampling_sets)
        assert scored.values is not None
        log_ratio = ppo.log_ratio(scored.logprobs, batch.logprobs, c.log_ratio_limit)
        policy_loss = ppo.masked_sum(ppo.policy_loss(log_ratio, advantages, c.cliprange), mask)
        value_loss = ppo.masked_sum(ppo.value_loss(scored.values, batch.values, returns, c.cliprange_value), mask)
        entropy = ppo.masked_sum(scored.entropy, mask)
        loss = policy_loss + c.vf_coef * value_loss - c.entropy_coef * entropy
        ratio_error = log_ratio.detach().expm1().abs()
        sums = {
            "ppo/loss/policy": policy_loss,
            "ppo/loss/value": value_loss,
            "ppo/loss/total": loss,
            "ppo/policy/approxkl": ppo.masked_sum(0.5 * log_ratio.detach().square(), mask),
            "ppo/policy/clipfrac": ppo.masked_sum((ratio_error > c.cliprange).float(), mask),
            "ppo/policy/ratio_error": ppo.masked_sum(ratio_error, mask),
            "ppo/val/clipfrac": ppo.masked_sum(
                ((scored.values.detach() - batch.values).abs() > c.cliprange_value).float(), mask
            ),
        }
        return loss, sums

    # ---- experience -------------------------------------------------------------------------------------------------

    def collect(self, prompts: Sequence[str], reward_fn: RewardFunction) -> Rollout:
        """`collect_rollout` with the trainer's models, settings and generator."""
        c = self.config
        return collect_rollout(
            self.policy,
            self.ref_policy,
            self.tokenizer,
            prompts,
            reward_fn,
            c.gen_len,
            c.sampling,
            eos_token_id=c.eos_token_id,
            generator=self.sampling_generator,
            forward_batch_size=max(c.forward_batch_size, 128 if self.device.type == "cpu" else 1024),
            score_full_softmax=c.score_full_softmax,
            autocast=self.precision.autocast,
        )

    def train(
        self,
        prompts: Sequence[str],
        reward_fn: RewardFunction,
        on_step: Callable[[Rollout, Stats], None] | None = None,
    ) -> list[Stats]:
        """Run `config.steps` episodes: draw a batch of prompts from the pool, sample, score, step, and again.

        prompts: the pool, drawn from with replacement.
        reward_fn: texts -> (B,) floats, or (prompts, responses) -> (B,) floats.
        on_step: called after every step with its rollout and statistics.
        Returns the statistics of all steps. Raises ValueError for an empty pool, or a prompt that is empty or too
        long, before any training.
        """
        self.check_prompts(prompts)
        history = []
        while self.iteration < self.config.iterations:
            drawn = torch.randint(len(prompts), (self.config.batch_size,), generator=self.shuffling_generator)
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
        """A Rollout of token lists, scored with the full softmax."""
        if responses is None or scores is None:
            raise ValueError("step takes a Rollout, or queries, responses and scores")
        if not len(queries) == len(responses):
            raise ValueError(f"got {len(queries)} queries but {len(responses)} responses")
        for name, sequences in (("query", queries), ("response", responses)):
            for i, ids in enumerate(sequences):
                _check_ids(f"{name} {i}", torch.as_tensor(ids), self.policy.gpt2.config.vocab_size)
        scores = checked_scores(scores, len(queries))
        query_ids, query_mask = left_pad(queries, self.tokenizer.pad_id)
        response_ids, response_mask = right_pad(responses, self.tokenizer.pad_id)
        tokens = torch.cat([query_ids, response_ids], 1).to(self.device)
        mask = torch.cat([query_mask, response_mask], 1).to(self.device)
        if tokens.size(1) - 1 > self.policy.gpt2.config.n_positions:
            raise ValueError(
                f"the longest query and response together have {tokens.size(1)} tokens, more than the model's "
                f"{self.policy.gpt2.config.n_positions} positions"
            )
        with self.precision.autocast():
            scored = score_in_batches(
                self.policy, self.ref_policy, tokens, mask, response_ids.size(1), self.config.temperature, None,
                max(self.config.forward_batch_size, 128),
            )  # fmt: skip
        return Rollout(
            tokens=tokens,
            mask=mask,
            response_mask=response_mask.bool().to(self.device),
            scores=scores.to(scored["values"]),
            **scored,
        )

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        """Shuffled rows in minibatches; the last one may be smaller."""
        order = torch.randperm(count, generator=self.shuffling_generator).to(self.device)
        yield from order.split(self.config.minibatch_size)

    def _progress(self) -> float:
        """The share of the run's optimizer steps that are done."""
        c = self.config
        return min(self.optimizer_steps / (c.iterations * c.ppo_epochs * -(-c.batch_size // c.minibatch_size)), 1.0)

    # ---- statistics -------------------------------------------------------------------------------------------------

    def _statistics(
        self, rollout: Rollout, kl: Tensor, rewards: Tensor, returns: Tensor, updates: list[TensorStats]
    ) -> Stats:
        mask = rollout.response_mask
        lengths = mask.sum(-1).float()
        log_ratio = rollout.logprobs - rollout.ref_logprobs

        def per_sequence(x: Tensor) -> Tensor:
            return torch.where(mask, x, 0.0).sum(-1).mean()

        collected = {
            "objective/kl": per_sequence(kl),
            "objective/kl_k2": per_sequence(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k2")),
            "objective/kl_k3": per_sequence(ppo.kl_estimate(rollout.logprobs, rollout.ref_logprobs, "k3")),
            "objective/kl_exact": per_sequence(rollout.exact_kl),
            "objective/kl_token_max": torch.where(mask, log_ratio, -torch.inf).max(),
            "objective/entropy": per_sequence(rollout.entropy),
            "objective/reward_with_kl": torch.where(mask, rewards, 0.0).sum(-1).mean(),
            "reward/mean": rollout.scores.mean(),
            "reward/std": rollout.scores.std(unbiased=False),
            "ppo/val/mean": ppo.masked_mean(rollout.values, mask),
            "ppo/val/var_explained": ppo.explained_variance(rollout.values, returns, mask),
            "ppo/returns/mean": ppo.masked_mean(returns, mask),
            "tokens/response": lengths.mean(),
        }
        stats = mean_stats([collected]) | mean_stats(updates)
        # At the first minibatch the policy is still the one that sampled: anything but 0 is an error of scoring.
        stats["ppo/policy/first_ratio_error"] = updates[0]["ppo/policy/ratio_error"].item()
        stats["objective/kl_coef"] = self.kl_controller.coef
        stats["ppo/updates"] = float(len(updates))
        stats["ppo/lr"] = self.optimizer.param_groups[0]["lr"]
        return stats

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write everything that the next step depends on to one safetensors file, atomically.

        Policy, value head, optimizer state, KL coefficient, random generators, counters and config; not the
        reference, which never changes. Raises OSError if the file cannot be written.
        """
        tensors = {f"policy.{name}": t for name, t in self.policy.state_dict().items()}
        names = [name for name, p in self.policy.named_parameters() if p.requires_grad]
        for name, parameter in zip(names, self.parameters, strict=True):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["generator.sampling"] = self.sampling_generator.get_state()
        tensors["generator.shuffling"] = self.shuffling_generator.get_state()
        counters = {
            "iteration": self.iteration,
            "optimizer_steps": self.optimizer_steps,
            "kl_coef": self.kl_controller.coef,
            "scaler": self.precision.scaler.state_dict(),
            "config": dataclasses.asdict(self.config),
        }
        write_tensors(path, tensors, {"trainer": json.dumps(counters)})

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Continue from `save_checkpoint`: on the CPU the run goes on bit for bit as if it had not been cut.

        Raises FileNotFoundError, or ValueError for a damaged file, or one of other models or settings.
        """
        tensors, metadata = read_tensors(path), read_metadata(path)
        if "trainer" not in metadata:
            raise ValueError(f"{path} is not a trainer checkpoint: its metadata has no 'trainer' entry")
        counters = json.loads(metadata["trainer"])
        self._check_config(counters["config"], path)
        prefix = "policy."
        weights = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        check_tensors(weights, {name: t.shape for name, t in self.policy.state_dict().items()}, path)
        self.policy.load_state_dict(weights)
        names = [name for name, p in self.policy.named_parameters() if p.requires_grad]
        for name, parameter in zip(names, self.parameters, strict=True):
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
            state = {key: tensors[f"optimizer.{key}.{name}"].to(parameter.device) for key in keys}
            self.optimizer.state[parameter] = state
        self.sampling_generator.set_state(tensors["generator.sampling"])
        self.shuffling_generator.set_state(tensors["generator.shuffling"])
        self.precision.scaler.load_state_dict(counters["scaler"])
        self.iteration, self.optimizer_steps = counters["iteration"], counters["optimizer_steps"]
        self.kl_controller.coef = counters["kl_coef"]

    def _check_config(self, saved: dict[str, Any], path: str | os.PathLike[str]) -> None:
        free = {"steps", "save_freq", "forward_batch_size", "device"}  # may change between parts of a run
        own = dataclasses.asdict(self.config)
        differing = [name for name in own if name not in free and saved.get(name) != own[name]]
        changed = [f"{name}: {saved.get(name)!r} then, {own[name]!r} now" for name in differing]
        if changed:
            raise ValueError(f"{path} was written under other settings: {'; '.join(changed)}")


def mean_stats(stats: Sequence[TensorStats]) -> Stats:
    """The mean of each statistic over minibatches, read from the device in one transfer."""
    names = list(stats[0])
    means = torch.stack([torch.stack([s[name].float() for name in names]) for s in stats]).mean(0)
    return dict(zip(names, means.tolist(), strict=True))


def _check_models(policy: ActorCritic, ref_policy: ActorCritic | GPT2, tokenizer: Tokenizer, config: PPOConfig) -> None:
    reference = ref_policy.gpt2 if isinstance(ref_policy, ActorCritic) else ref_policy
    sizes = policy.gpt2.config.vocab_size, reference.config.vocab_size, len(tokenizer)
    if len(set(sizes)) != 1:
        raise ValueError(
            f"policy, reference and tokenizer must share one vocabulary, but have {sizes[0]}, {sizes[1]} and "
            f"{sizes[2]} tokens"
        )
    if {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in reference.parameters()}:
        raise ValueError("policy and ref_policy share parameters: the reference would move with the policy; load twice")
    if config.gen_len >= policy.gpt2.config.n_positions:
        raise ValueError(
            f"PPOConfig.gen_len must be below the model's {policy.gpt2.config.n_positions} positions, "
            f"got {config.gen_len}"
        )
    if config.eos_token_id is not None and not 0 <= config.eos_token_id < sizes[0]:
        raise ValueError(f"PPOConfig.eos_token_id must be in [0, {sizes[0]}), got {config.eos_token_id}")


def _check_ids(name: str, ids: Tensor, vocab_size: int) -> None:
    if ids.ndim != 1 or ids.is_floating_point() or len(ids) == 0:
        raise ValueError(
            f"{name} must be a 1-D tensor of at least one token id, got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise ValueError(f"{name} has token ids outside [0, {vocab_size}): {ids.min()} to {ids.max()}")
