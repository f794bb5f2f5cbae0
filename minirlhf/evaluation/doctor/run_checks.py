"""Checks of a run: draw a few samples, and do on copies of the models what PPO would do with them.

Each takes the setup and returns a result, as in `model_checks`. Left out: whether the reward is a good one, and
whether the policy can write.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from minirlhf.device.precision_choice import ROUNDING_SHARE, Rounding
from minirlhf.evaluation.doctor.memory import estimate, total, weight_bytes
from minirlhf.evaluation.doctor.model_checks import SAME_OUTPUT, distance, untied_error
from minirlhf.evaluation.doctor.setup import FAIL, OK, WARN, Result, Setup, Skipped
from minirlhf.evaluation.optimum import EqualRewards, OptimumPoint, TooFewSamples, optimum, price_of_kl
from minirlhf.models.decoder import Decoder
from minirlhf.models.heads import ActorCritic, language_model
from minirlhf.rewards.sentiment import SentimentReward
from minirlhf.rl.logprobs import TokenLogprobs, response_logprobs
from minirlhf.rl.rollout import Rollout, logprobs_in_batches
from minirlhf.rl.trainer import PPOTrainer

FORECAST, FORECAST_PROMPTS = 512, 4  # samples of the reference, of so many prompts
ROWS, TOKENS = 8, 32  # at most so many sequences and new tokens in the rollout
SAME_KL = 1e-3  # nats a sequence; rounding in fp32 stays ten times and more below this and the next
SAME_RATIO = 1e-3  # |ratio - 1| in fp32
# A step that moves the policy: no skipped fp16 step, no scores replaced by one penalty.
PLAIN_STEP: dict[str, Any] = dict(precision="fp32", lr_schedule="constant", missing_eos="keep", compile=False)
FULL = 0.8  # of the available memory; beyond it, fragments and the reward model may not fit


def rollout(setup: Setup) -> Result:
    """Models and tokenizer have one vocabulary, the prompts fit, and sampling works; in fp32, for the checks after it.

    The sample is scored by a pass of its own even where training takes the states of the decode. The caller's reward
    function is not asked: the check of the labels does that.
    """
    tokenizer = setup.tokenizer
    policy, reference = copy.deepcopy(setup.policy), copy.deepcopy(setup.reference)  # the copies share nothing
    # Not compiled: it would take longer than all checks.
    whole = PPOTrainer(policy, reference, tokenizer, setup.config, compile=False)
    pool = setup.pool()
    whole.check_prompts(pool)
    setup.config, setup.precision = whole.config, whole.precision_choice
    # All scores will be 0, so no group has spread, and none may be sampled anew.
    trainer = _with(whole, precision="fp32", gen_len=min(setup.config.gen_len, TOKENS), drop_flat_groups=0)
    groups = max(1, min(trainer.config.batch_size, ROWS) // trainer.config.group_size)
    prompts = [pool[i % len(pool)] for i in range(groups)]
    sampled = trainer.collect(prompts, lambda texts: [0.0] * len(texts))
    B, R = sampled.response_mask.shape
    divisor = trainer.config.logprobs_divisor
    scored = logprobs_in_batches(trainer.models, sampled.tokens, sampled.mask, R, divisor, sampled.sampling_sets)
    setup.rollout, setup.trainer = dataclasses.replace(sampled, **scored), trainer
    return Result(OK, f"{len(tokenizer)} tokens in one vocabulary; {B} sequences of up to {R} new tokens were sampled")


def reference(setup: Setup) -> Result:
    """Before the first step KL(policy || reference), scored anew, is at most SAME_KL nats a sequence.

    More is a warning, as a tuned policy may be trained on.
    """
    trainer, rollout = setup.experience()
    with torch.no_grad():
        scored = _logprobs(trainer, rollout, trainer.reference, full_softmax=True)
    assert scored.exact_kl is not None
    kl = scored.exact_kl.sum(-1).mean().item()
    lengths = f"{len(rollout)} sequences of up to {rollout.response_mask.size(1)} tokens"
    detail = f"KL at step 0 is {kl:.2g} nats a sequence (full softmax, {lengths})"
    if abs(kl) <= SAME_KL:
        return Result(OK, detail)
    remedy = (
        "in a first run load both models from one folder. To go on with a tuned policy against its old reference is "
        "right; so much of the KL is then spent at the start, and a target must be above it"
    )
    return Result(WARN, detail, remedy)


def ratio(setup: Setup) -> Result:
    """Before any update, sampling, scoring and the training forward agree in fp32: |ratio - 1| is below SAME_RATIO."""
    trainer, rollout = setup.experience()
    c, real = trainer.config, rollout.response_mask
    compared = {"trained": _rescored(trainer, rollout)}
    scored_in_full = (c.logprobs_full_softmax and c.sampling.truncates) or c.logprobs_divisor != c.temperature
    if rollout.sampler_logprobs is not None and not scored_in_full:
        compared["sampled"] = rollout.sampler_logprobs
    worst = {name: Rounding.between(x[real], rollout.logprobs[real]).worst for name, x in compared.items()}
    parts = ", ".join(f"{name} against scored {x:.2g}" for name, x in worst.items())
    detail = f"worst |ratio - 1| before any update in fp32: {parts}"
    if all(x <= SAME_RATIO for x in worst.values()):
        return Result(OK, detail)
    remedy = (
        "the forward passes of sampling, scoring and training must agree: no dropout or noise, one mask, nothing that "
        "depends on the other rows or on whether gradients are on"
    )
    return Result(FAIL, detail, remedy)


def weights(setup: Setup) -> Result:
    """Models share nothing, one PPO step moves the policy and not the reference, and LM heads are tied after it."""
    untouched, rollout = setup.experience()
    policy, reference = copy.deepcopy((setup.policy, setup.reference))  # in one go: what is shared stays so
    trainer = PPOTrainer(policy, reference, untouched.tokenizer, setup.config, **PLAIN_STEP)  # raises if they share
    scores = torch.linspace(1, 2, len(rollout)).to(rollout.scores)  # something to learn, whatever the reward
    stats = trainer.step(dataclasses.replace(rollout, scores=scores))
    heads = {"policy": untied_error(trainer.policy)}
    if reference is not None:
        heads["reference"] = untied_error(reference)
    moved = distance(trainer.policy.decoder, untouched.policy.decoder)

    tie = "let lm_logits use the token embedding itself, or a head of its own by tie_word_embeddings=False"
    problems = {
        f"the LM head of the {name} is not the one of its config after a step": tie
        for name, x in heads.items()
        if not x <= SAME_OUTPUT
    }
    if distance(trainer.reference, untouched.reference) != 0:
        problems["the reference changed in one PPO step"] = "nothing but the policy's own parameters may be trained"
    if not moved > 0:
        problems["the policy did not move in one PPO step"] = "requires_grad_(True) on what is to learn, or a larger lr"
    if problems:
        return Result(FAIL, "; ".join(problems), "; ".join(dict.fromkeys(problems.values())))
    step = f"{stats['ppo/updates']:.0f} updates moved the policy by up to {moved:.1g}, and not a bit of the reference"
    return Result(OK, f"LM heads are those of the configs; {step}")


def forecast(setup: Setup) -> Result:
    """The reward and KL of the best possible policy at the run's KL coefficient, and the best reward at its KL target.

    From FORECAST samples of the reference and their rewards (see `evaluation.optimum`); no training can have more. A
    reward that is the same for all of them is a warning.
    """
    if setup.reward is None:
        raise Skipped("no reward function was given")
    trainer, _ = setup.experience()
    c, reward = setup.config, setup.reward
    if isinstance(reward, SentimentReward):
        reward = copy.copy(reward)
        reward.model = copy.deepcopy(reward.model)
    pool = list(dict.fromkeys(setup.pool()))
    prompts = pool[:FORECAST_PROMPTS]
    try:
        found = optimum(
            trainer.reference, prompts, reward, tokenizer=trainer.tokenizer, gen_len=c.gen_len, sampling=c.sampling,
            eos_token_id=c.eos_token_id, samples=FORECAST, seed=c.seed,
        )  # fmt: skip
    except EqualRewards as error:
        return Result(WARN, str(error), "give a reward that tells samples of the reference apart")
    except Exception as error:  # the check of the labels has said what is wrong with a reward
        raise Skipped(f"samples could not be scored: {type(error).__name__}: {error}") from error
    said = [f"the reference has reward {found.start:.3f}"]
    asked: list[tuple[str, Callable[[float], OptimumPoint], float]] = []
    if beta := price_of_kl(c.init_kl_coef, vars(c)):
        asked.append((f"at beta {c.init_kl_coef:g}", found.at, beta))
    if c.adaptive_kl:
        asked.append((f"at the target of {c.target:g} nats", found.at_kl, c.target))
    for where, ask, value in asked:
        try:
            best = ask(value)
            known = f"{best.reward.mean:.3f} at {best.kl.mean:.2f} nats ({best.effective_samples:.0f} samples tell it)"
            said += [f"{where} the best possible is {known}", *filter(None, [best.note])]
        except TooFewSamples as error:
            said.append(f"{where} nothing can be said: {error}")
    unknown = "; these prompts are words of the vocabulary, give prompts= for your own" * (setup.prompts is None)
    some = f" of the first {len(prompts)} of {len(pool)} prompts" if len(pool) > len(prompts) else ""
    return Result(OK, f"{'; '.join(said)} ({found.samples} samples{some} {found.distribution}){unknown}")


def memory(setup: Setup) -> Result:
    """What the formula says is needed fits what is free; above FULL of it is a warning."""
    c, (trainer, _) = setup.config, setup.experience()
    trainer = _with(trainer, precision=c.precision)
    longest = max(len(trainer.tokenizer.encode_prompt(prompt)) for prompt in setup.pool())
    need = estimate(trainer, c.batch_size, longest, c.gen_len, trainer.micro_batch_size)
    largest, bytes = max(need, key=need.__getitem__), total(need)
    detail = f"{_gib(bytes)} needed by the formula, most of it for {largest}"
    if setup.available is None:
        raise Skipped(f"{detail}; this system does not say how much is available")
    kind, models = trainer.device.type, (setup.policy, setup.reference)
    given = [model for model in models if model is not None and next(model.parameters()).device.type == kind]
    own = sum(weight_bytes(model) for model in given)
    room = setup.available + own  # the need counts the models themselves
    detail += f"; {_gib(room)} available on the {kind}"
    if bytes <= FULL * room:
        return Result(OK, detail)
    remedies = {"weights": "take a smaller model", "update": "lower forward_batch_size"}
    remedy = remedies.get(largest, "lower batch_size or gen_len")
    return Result(WARN if bytes <= room else FAIL, detail, f"{remedy}, or find a device with more memory")


def precision(setup: Setup) -> Result:
    """Log-probabilities in the chosen precision against fp32, by the limits of `Rounding`.

    For a run in fp32 it is bf16 that is compared, as a word only. Says what "auto" has chosen, and why, which library
    multiplies on a CPU (see `cpu.fastest_matmul`), and what LoRA's base costs that is held in bf16.
    """
    c, (trainer, rollout) = setup.config, setup.experience()
    name = "bf16" if c.precision == "fp32" else c.precision
    reduced = _with(trainer, precision=name)
    with torch.no_grad(), reduced.precision.autocast():
        scored = _logprobs(reduced, rollout, trainer.reference)
    outputs = [x for x in (scored.logprobs, scored.values, scored.ref_logprobs) if x is not None]
    status = OK
    if bad := sum(int((~torch.isfinite(x)).sum()) for x in outputs):
        detail = f"{name}: {bad} of {sum(x.numel() for x in outputs)} log-probabilities and values are not finite"
        status = FAIL
    else:
        real = rollout.response_mask
        rounding = Rounding.between(scored.logprobs[real], rollout.logprobs[real])
        detail = f"{name}: {rounding}"
        if not rounding.mean_fits(c.cliprange):
            status = FAIL
            detail += f"; the mean is above {ROUNDING_SHARE:.0%} of the clip range {c.cliprange:g}"
        elif not rounding.worst_fits(c.cliprange):
            status = WARN
            detail += f"; the worst is outside the clip range {c.cliprange:g}"
    if c.precision == "fp32":  # no reason to stop this run
        status = WARN if status == FAIL else status
        detail += " (this run is in fp32)"
    assert setup.precision is not None  # with the rollout
    if setup.precision.reason:
        detail += f"; {setup.precision}"
    if trainer.device.type == "cpu":
        library = {"default": "PyTorch's default library"}.get(trainer.precision.matmul, trainer.precision.matmul)
        detail += f"; fp32 products by {library}"
    remedy = f"train in fp32{', or in bf16, whose range is that of fp32' if name == 'fp16' else ''}"
    if c.lora is not None and c.lora.base_dtype == "bf16":
        of_base = _rounding_of_base(setup)
        detail += f"; the base held in bf16: {of_base}"
        if not (of_base.mean_fits(c.cliprange) and of_base.worst_fits(c.cliprange)):
            status = WARN if status == OK else status  # rollouts and updates share the rounded base
            remedy = f"hold the base in fp32 (base_dtype); {remedy}"
    return Result(status, detail, "" if status == OK else remedy)


def _rounding_of_base(setup: Setup) -> Rounding:
    """Probabilities of the response tokens with the base held in bf16 against the policy as it was given, in fp32."""
    trainer, rollout = setup.experience()
    given = language_model(copy.deepcopy(setup.policy)).to(trainer.device).eval()
    given.fit_vocabulary(len(trainer.tokenizer))
    exact, R = ActorCritic(given, None), rollout.response_mask.size(1)
    arguments = rollout.tokens, rollout.mask, R, trainer.config.logprobs_divisor, rollout.sampling_sets
    with torch.no_grad():
        logprobs, known = (response_logprobs(model, *arguments).logprobs for model in (trainer.policy, exact))
    return Rounding.between(logprobs[rollout.response_mask], known[rollout.response_mask])


def _with(trainer: PPOTrainer, **settings: Any) -> PPOTrainer:
    """A trainer of the same models under other settings."""
    return PPOTrainer(trainer.policy, trainer.reference, trainer.tokenizer, trainer.config, **settings)


def _logprobs(
    trainer: PPOTrainer, rollout: Rollout, reference: Decoder | None = None, full_softmax: bool = False
) -> TokenLogprobs:
    """What the policy, and a reference, say of a rollout's response tokens, as an update computes it.

    full_softmax: at temperature 1 and over the whole vocabulary instead.
    """
    temperature, sets = (1.0, None) if full_softmax else (trainer.config.logprobs_divisor, rollout.sampling_sets)
    R = rollout.response_mask.size(1)
    return response_logprobs(trainer.policy, rollout.tokens, rollout.mask, R, temperature, sets, reference)


def _rescored(trainer: PPOTrainer, rollout: Rollout) -> Tensor:
    """Log-probabilities (B, R) as an update computes them: in micro-batches, with gradients."""
    c, result = trainer.config, torch.zeros_like(rollout.logprobs)
    for rows in torch.arange(len(rollout)).split(min(c.forward_batch_size, c.minibatch_size)):
        batch = rollout.rows(rows)
        with torch.enable_grad(), trainer.precision.autocast():
            scored = _logprobs(trainer, batch).logprobs.detach()
        result[rows, : scored.size(1)] = scored
    return result


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
