"""PPO for language models (Ziegler et al. 2019; Stiennon et al. 2020): `PPOTrainer.step` is the algorithm.

Dropout is off by construction, in rollouts and in updates: a ratio between a policy with one dropout mask and the
same policy with another is not 1, and PPO clips the difference as if it were progress.

Left out: several GPUs, and a value model apart from the policy.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minirlhf import ppo, training_state
from minirlhf.metrics import Stats, TensorStats, mean_stats, rollout_statistics
from minirlhf.models.gpt2 import GPT2
from minirlhf.models.heads import ActorCritic
from minirlhf.optimization import PRECISIONS, SCHEDULES, Precision, lr_factor, resolve_device
from minirlhf.rewards import RewardFunction
from minirlhf.rollout import Rollout, collect_rollout, rollout_from_tokens
from minirlhf.sampling import SamplingConfig
from minirlhf.tokenizer import Tokenizer
from minirlhf.validation import (
    require_non_negative,
    require_one_of,
    require_positive,
    require_positive_ints,
    require_unit_interval,
)


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
        require_positive_ints(self, *counts)
        require_positive(self, "lr", "target", "horizon", "log_ratio_limit", "max_grad_norm")
        require_positive(self, "cliprange", "cliprange_value")
        require_non_negative(self, "init_kl_coef", "vf_coef", "entropy_coef", "adam_eps")
        require_unit_interval(self, "gamma", "lam", "lr_warmup")
        if self.target_kl is not None:
            require_positive(self, "target_kl")
        require_one_of(self, "lr_schedule", SCHEDULES)
        require_one_of(self, "precision", PRECISIONS)
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
        self.generators = {
            "sampling": torch.Generator(self.device).manual_seed(c.seed),
            "shuffling": torch.Generator().manual_seed(c.seed),
        }
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

        stats = rollout_statistics(rollout, kl, rewards, returns) | mean_stats(updates)
        # At the first minibatch the policy is still the one that sampled: anything but 0 is an error of scoring.
        stats["ppo/policy/first_ratio_error"] = float(updates[0]["ppo/policy/ratio_error"])
        stats["objective/kl_coef"] = self.kl_controller.coef
        stats["ppo/lr"] = self.optimizer.param_groups[0]["lr"]
        stats["ppo/updates"] = float(len(updates))
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
            generator=self.generators["sampling"],
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
            self.config.temperature,
            pad_token_id=self.tokenizer.pad_id,
            forward_batch_size=self.config.forward_batch_size,
            autocast=self.precision.autocast,
        )

    def _minibatches(self, count: int) -> Iterator[Tensor]:
        """Shuffled rows in minibatches; the last one may be smaller."""
        order = torch.randperm(count, generator=self.generators["shuffling"]).to(self.device)
        yield from order.split(self.config.minibatch_size)

    def _progress(self) -> float:
        """The share of the run's optimizer steps that are done."""
        c = self.config
        return min(self.optimizer_steps / (c.iterations * c.ppo_epochs * -(-c.batch_size // c.minibatch_size)), 1.0)

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def save_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Write everything that the next step depends on to one safetensors file, atomically.

        Policy, value head, optimizer state, KL coefficient, random generators, counters and config; not the
        reference, which never changes. Raises OSError if the file cannot be written.
        """
        training_state.save(self, path)

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Continue from `save_checkpoint`: on the CPU the run goes on bit for bit as if it had not been cut.

        Raises FileNotFoundError, or ValueError for a damaged file, or one of other models or settings.
        """
        training_state.load(self, path)


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
