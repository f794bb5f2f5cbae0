"""Checks of a run: draw a few samples, and do on copies of the models what PPO would do with them.

Each takes the setup and returns a result, as in `model_checks`. Left out: whether the reward is a good one, and
whether the policy can write.
"""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf.device.placement import resolve_device
from minirlhf.device.precision_choice import ROUNDING_SHARE, Rounding
from minirlhf.evaluation.doctor.memory import estimate, extrapolate, measure, weight_bytes
from minirlhf.evaluation.doctor.probes import SAME_OUTPUT, fingerprint, shared_parameters, untied_error
from minirlhf.evaluation.doctor.setup import FAIL, OK, WARN, Result, Setup, Skipped, logprobs, needed
from minirlhf.evaluation.optimum import OptimumPoint, TooFewSamples, optimum
from minirlhf.rewards.base import call_reward
from minirlhf.rl.rollout import Rollout, logprobs_in_batches
from minirlhf.rl.trainer import PPOTrainer

ROWS, TOKENS = 8, 32  # at most so many sequences and new tokens in the rollout
SAME_KL = 1e-3  # nats a sequence; rounding in fp32 stays ten times and more below this and the next
SAME_RATIO = 1e-3  # |ratio - 1| in fp32
# A step that moves the policy: no skipped fp16 step, no scores replaced by one penalty.
PLAIN_STEP: dict[str, Any] = dict(precision="fp32", lr_schedule="constant", missing_eos="keep", compile=False)
FULL = 0.8  # of the available memory; beyond it, fragments and the reward model may not fit
FORECAST_SAMPLES, FORECAST_TOKENS, FORECAST_PROMPTS = 512, 2**14, 4  # of the reference, at most
SLOW_REWARD = 2.0  # seconds for the samples of the rollout; a slower reward is not asked for a forecast


def rollout(setup: Setup) -> Result:
    """A trainer can be made of the models, the prompts fit, and sampling works; in fp32, for the checks after it."""
    needed(setup.vocabulary, "one vocabulary")
    policy, reference = (copy.deepcopy(model) for model in setup.models())  # one by one: the copies share nothing
    # Not compiled: it would take longer than all checks, and hide tensors from those that count them.
    whole = PPOTrainer(policy, reference, needed(setup.tokenizer, "the tokenizer"), setup.config, compile=False)
    whole.check_prompts(setup.pool())
    setup.config, setup.precision = whole.config, whole.precision_choice
    trainer = _with(whole, precision="fp32", gen_len=min(setup.config.gen_len, TOKENS))
    setup.rollout, setup.trainer = _collect(trainer, setup.pool()), trainer
    B, R = setup.rollout.response_mask.shape
    return Result(OK, f"{B} sequences of up to {R} new tokens were sampled and scored")


def reference(setup: Setup) -> Result:
    """Before the first step KL(policy || reference), scored anew, is at most SAME_KL nats a sequence.

    More is a warning, as a tuned policy may be trained on; more than the target of an adaptive penalty is a failure.
    """
    trainer, rollout = setup.experience()
    with torch.no_grad():
        scored = logprobs(trainer, rollout, trainer.reference, full_softmax=True)
    assert scored.exact_kl is not None
    c, kl = setup.config, scored.exact_kl.sum(-1).mean().item() * setup.config.gen_len / trainer.config.gen_len
    detail = (
        f"KL at step 0 is {kl:.2g} nats a sequence (full softmax, {len(rollout)} sequences, scored anew; a run logs up "
        "to 1e-6 a token where it takes the states of the decode)"
    )
    if abs(kl) <= SAME_KL:
        return Result(OK, detail)
    remedy = (
        "in a first run load both models from one folder. To go on with a tuned policy against its old reference is "
        "right; so much of the KL is then spent at the start"
    )
    if c.adaptive_kl and c.init_kl_coef > 0 and kl > c.target:
        detail += f", beyond the target of {c.target:g}"
        return Result(FAIL, detail, f"{remedy}: raise target above it, or PPO begins by pulling the policy back")
    return Result(WARN if kl > 0 else FAIL, detail, remedy)


def ratio(setup: Setup) -> Result:
    """Before any update, sampling, scoring and the training forward give ratios of 1.

    In fp32 up to SAME_RATIO; in bf16 and fp16 the mean error is at most a quarter of cliprange, and the worst within it
    (else a warning).
    """
    trainer, rollout = setup.experience()
    exact = _first_ratio(trainer, rollout)
    chosen = setup.config.precision
    if exact.status != OK or chosen == "fp32":
        return exact
    reduced = _with(trainer, precision=chosen)
    result = _first_ratio(reduced, _collect(reduced, setup.pool()))
    return result._replace(detail=f"{exact.detail}; {result.detail}")


def weights(setup: Setup) -> Result:
    """LM heads are tied, nothing is shared, and one PPO step moves the policy and not the reference."""
    models = setup.models()
    shared = shared_parameters(*models)
    if shared:
        names = f"{', '.join(shared[:3])}{f' and {len(shared) - 3} more' if len(shared) > 3 else ''}"
        remedy = "load the reference once more, or give copy.deepcopy(policy)"
        return Result(FAIL, f"policy and reference share {names}: both would move in each step", remedy)
    untouched, rollout = setup.experience()
    policy, reference = copy.deepcopy(models)  # in one go: what they have in common stays in common
    trainer = PPOTrainer(policy, reference, untouched.tokenizer, setup.config, **PLAIN_STEP)
    before = fingerprint(reference)
    heads = {"policy": untied_error(trainer.policy), "reference": untied_error(reference)}
    scores = torch.linspace(1, 2, len(rollout)).to(rollout.scores)  # something to learn, whatever the reward
    stats = trainer.step(dataclasses.replace(rollout, scores=scores))
    heads["policy after a step"] = untied_error(trainer.policy)
    pairs = zip(trainer.policy.decoder.parameters(), untouched.policy.decoder.parameters(), strict=True)
    moved = max((new - old).abs().max().item() for new, old in pairs)

    tie = "let lm_logits use wte.weight itself; a checkpoint with an LM head of its own is not supported"
    problems = {
        f"the LM head of the {name} is not its embedding": tie for name, x in heads.items() if not x <= SAME_OUTPUT
    }
    if fingerprint(reference) != before:
        problems["the reference changed in one PPO step"] = "nothing but the policy's own parameters may be trained"
    if not moved > 0:
        problems["the policy did not move in one PPO step"] = "requires_grad_(True) on what is to learn, or a larger lr"
    if problems:
        return Result(FAIL, "; ".join(problems), "; ".join(dict.fromkeys(problems.values())))
    step = f"{stats['ppo/updates']:.0f} updates moved the policy by up to {moved:.1g}, and not a bit of the reference"
    return Result(OK, f"LM heads are tied; {step}")


def memory(setup: Setup) -> Result:
    """The need, by `memory.estimate` and by a measurement, fits what is free; above FULL of it is a warning."""
    c, (short, rollout) = setup.config, setup.experience()
    trainer, R = _with(short, precision=c.precision), rollout.response_mask.size(1)
    small = estimate(trainer, len(rollout), rollout.tokens.size(1) - R, R, len(rollout))
    longest = max(len(trainer.tokenizer.encode_prompt(prompt)) for prompt in setup.pool())
    formula = estimate(trainer, c.batch_size, longest, c.gen_len, min(c.forward_batch_size, c.minibatch_size))
    measured = extrapolate(measure(trainer, rollout), small, formula)
    need = max(formula, measured, key=lambda need: need.total)
    detail = (
        f"{_gib(formula.total)} needed by the formula, {_gib(measured.total)} by measuring {len(rollout)} sequences, "
        f"most of it for {need.largest}"
    )
    if setup.available is None:
        raise Skipped(f"{detail}; this system does not say how much is available")
    own = sum(weight_bytes(m) for m in setup.models() if next(m.parameters()).device.type == trainer.device.type)
    room = setup.available + own  # the need counts the models themselves
    detail += f"; {_gib(room)} available on the {trainer.device.type}"
    if need.total <= FULL * room:
        return Result(OK, detail)
    remedies = {"weights": "take a smaller model", "update": "lower forward_batch_size"}
    remedy = remedies.get(need.largest, "lower batch_size or gen_len")
    return Result(WARN if need.total <= room else FAIL, detail, f"{remedy}, or find a device with more memory")


def precision(setup: Setup) -> Result:
    """Log-probabilities in the chosen precision against fp32, by the limits of the ratio.

    For a run in fp32 it is bf16 that is compared, as a word only. Says what "auto" has chosen, and why.
    """
    c, (trainer, rollout) = setup.config, setup.experience()
    name = "bf16" if c.precision == "fp32" else c.precision
    reduced = _with(trainer, precision=name)
    with torch.no_grad(), reduced.precision.autocast():
        scored = logprobs(reduced, rollout, trainer.reference)
    outputs = [x for x in (scored.logprobs, scored.values, scored.ref_logprobs) if x is not None]
    remedy = f"train in fp32{', or in bf16, whose range is that of fp32' if name == 'fp16' else ''}"
    if bad := sum(int((~torch.isfinite(x)).sum()) for x in outputs):
        detail = f"{name}: {bad} of {sum(x.numel() for x in outputs)} log-probabilities and values are not finite"
        result = Result(FAIL, detail, remedy)
    else:
        real = rollout.response_mask
        difference = (scored.logprobs - rollout.logprobs)[real].abs()
        rounding = Rounding.between(scored.logprobs[real], rollout.logprobs[real])
        detail = (
            f"{name} against fp32: log-probabilities differ by {difference.mean():.2g} nats on average, "
            f"{difference.max():.2g} at worst, so |ratio - 1| is {rounding.mean:.2g} and {rounding.worst:.2g}"
        )
        result = _rounding(rounding, c.cliprange, detail, remedy)
    chosen = needed(setup.precision, "the precision")
    if c.precision == "fp32":  # no reason to stop this run
        status = WARN if result.status == FAIL else result.status
        result = result._replace(status=status, detail=f"{result.detail} (this run is in fp32)")
    return result._replace(detail=f"{result.detail}; {chosen}") if chosen.reason else result


def device(setup: Setup) -> Result:
    """What could change results on a GPU without a word is off; else a warning."""
    c, where = setup.config, resolve_device(setup.config.device)
    if where.type == "cpu":
        return Result(OK, f"cpu, {torch.get_num_threads()} threads")
    untested = {"cuda_graphs": c.cuda_graphs, "compile": c.compile, "precision tf32": c.precision == "tf32"}
    if asked := [name for name, on in untested.items() if on]:
        remedy = "leave it off, or run the tests of the GPU on this device first: pytest -m gpu"
        return Result(WARN, f"{where}; {', '.join(asked)} may change results on a GPU without a word", remedy)
    return Result(OK, f"{where}; {', '.join(untested)}, which could change results without a word, are off")


def forecast(setup: Setup) -> Result:
    """The best reward that any policy can have at the run's KL coefficient and target (see `optimum`)."""
    (trainer, rollout), c = setup.experience(), setup.config
    if setup.prompts is None:
        raise Skipped("the best possible reward depends on the prompts: give the pool of the run")
    reward = setup.copied_reward()
    start = time.perf_counter()
    call_reward(reward, rollout.prompts, rollout.responses)
    if (seconds := time.perf_counter() - start) > SLOW_REWARD:
        slow = f"the reward took {seconds:.1f} s for {len(rollout)} samples, and a forecast needs hundreds"
        raise Skipped(f"{slow}: minirlhf.optimum makes one")
    distinct = list(dict.fromkeys(setup.prompts))
    prompts = distinct[:FORECAST_PROMPTS]
    found = optimum(
        trainer.reference, prompts, reward, tokenizer=trainer.tokenizer, gen_len=c.gen_len, sampling=c.sampling,
        eos_token_id=c.eos_token_id, samples=min(FORECAST_SAMPLES, FORECAST_TOKENS // c.gen_len),
    )  # fmt: skip
    asked: list[tuple[str, Callable[[], OptimumPoint]]] = []
    if c.init_kl_coef > 0 and c.score_scale > 0 and c.kl_placement == "reward":
        asked.append((f"at beta {c.init_kl_coef:g}", lambda: found.at(c.init_kl_coef / c.score_scale)))
    if c.adaptive_kl:
        asked.append((f"at the target of {c.target:g} nats", lambda: found.at_kl(c.target)))
    parts = []
    for where, ask in asked:
        try:
            best = ask()
            parts.append(f"{where} the best possible is {best.reward.mean:.3f} at {best.kl.mean:.2f} nats")
        except TooFewSamples as error:
            parts.append(str(error))
    if not parts:
        raise Skipped("the config has no KL coefficient in the reward and no target to forecast for")
    many = f" of the first {len(prompts)} prompts" if prompts != distinct else ""
    detail = f"the reference has {found.start:.3f}; {'; '.join(parts)}"
    return Result(OK, f"{detail} ({found.samples} samples{many}, {found.distribution})")


def _with(trainer: PPOTrainer, **settings: Any) -> PPOTrainer:
    """A trainer of the same models under other settings."""
    return PPOTrainer(trainer.policy, trainer.reference, trainer.tokenizer, trainer.config, **settings)


def _collect(trainer: PPOTrainer, prompts: Sequence[str]) -> Rollout:
    """A small rollout, scored by a pass of its own even where training takes the states of the decode.

    The caller's reward function is not asked: the check of the labels does that.
    """
    rows = min(trainer.config.batch_size, ROWS)
    rollout = trainer.collect([prompts[i % len(prompts)] for i in range(rows)], lambda texts: [0.0] * len(texts))
    with trainer.precision.autocast():
        R, divisor = rollout.response_mask.size(1), trainer.config.logprobs_divisor
        scored = logprobs_in_batches(trainer.models, rollout.tokens, rollout.mask, R, divisor, rollout.sampling_sets)
    return dataclasses.replace(rollout, **scored)


def _rescored(trainer: PPOTrainer, rollout: Rollout) -> Tensor:
    """Log-probabilities (B, R) as an update computes them: in micro-batches, with gradients."""
    c, result = trainer.config, torch.zeros_like(rollout.logprobs)
    for rows in torch.arange(len(rollout)).split(min(c.forward_batch_size, c.minibatch_size)):
        batch = rollout.rows(rows)
        with torch.enable_grad(), trainer.precision.autocast():
            scored = logprobs(trainer, batch).logprobs.detach()
        result[rows, : scored.size(1)] = scored
    return result


def _first_ratio(trainer: PPOTrainer, rollout: Rollout) -> Result:
    """Log-probabilities of the training forward and of the sampler against those of scoring."""
    c = trainer.config
    compared = {"trained": _rescored(trainer, rollout)}
    scored_in_full = (c.logprobs_full_softmax and c.sampling.truncates) or c.logprobs_divisor != c.temperature
    if rollout.sampler_logprobs is not None and not scored_in_full:
        compared["sampled"] = rollout.sampler_logprobs
    real = rollout.response_mask
    found = {name: Rounding.between(x[real], rollout.logprobs[real]) for name, x in compared.items()}
    mean, worst = torch.tensor([[x.mean, x.worst] for x in found.values()], dtype=torch.float64).amax(0).tolist()
    parts = ", ".join(f"{name} against scored {rounding.worst:.2g}" for name, rounding in found.items())
    detail = f"worst |ratio - 1| before any update in {c.precision}: {parts}"
    if c.precision != "fp32":
        return _rounding(Rounding(mean, worst), c.cliprange, f"{detail}, mean {mean:.2g}", "see the line on precision")
    remedy = (
        "the forward passes of sampling, scoring and training must agree: no dropout or noise, one mask, nothing that "
        "depends on the other rows or on whether gradients are on"
    )
    return Result(OK, detail) if worst <= SAME_RATIO else Result(FAIL, detail, remedy)


def _rounding(rounding: Rounding, cliprange: float, detail: str, remedy: str) -> Result:
    """The result for an error of reduced precision."""
    if not rounding.mean_fits(cliprange):
        return Result(FAIL, f"{detail}; the mean is above {ROUNDING_SHARE:.0%} of the clip range {cliprange:g}", remedy)
    if not rounding.worst_fits(cliprange):
        return Result(WARN, f"{detail}; the worst is outside the clip range {cliprange:g}", remedy)
    return Result(OK, detail)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
