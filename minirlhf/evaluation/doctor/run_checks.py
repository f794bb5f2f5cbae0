"""Checks of a run: a few samples are drawn, and what PPO would do with them is done on copies of the models.

Each takes the patient and returns a verdict, as in `model_checks`. Left out: whether the reward is a good one, and
whether the policy can write.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from minirlhf.device.precision_choice import ROUNDING_SHARE, Rounding
from minirlhf.evaluation.doctor.memory import estimate, extrapolate, measure, weight_bytes
from minirlhf.evaluation.doctor.patient import FAIL, OK, WARN, Patient, Skipped, Verdict, needed
from minirlhf.evaluation.doctor.probes import SAME_OUTPUT, fingerprint, shared_parameters, untied_error
from minirlhf.rl.rollout import Rollout, score_in_batches
from minirlhf.rl.trainer import PPOTrainer

ROWS, TOKENS = 8, 32  # at most so many sequences and new tokens in the rollout
SAME_KL = 1e-3  # nats a sequence; rounding in fp32 stays ten times and more below this and the next
SAME_RATIO = 1e-3  # |ratio - 1| in fp32
# A step that moves the policy: no warm-up from 0, no skipped fp16 step, no scores replaced by one penalty.
PLAIN_STEP: dict[str, Any] = dict(
    precision="fp32", lr_schedule="constant", lr_warmup=0.0, value_warmup=0, missing_eos="keep", overlong="keep",
    compile=False,
)  # fmt: skip
FULL = 0.8  # of the available memory; beyond it, fragments and the reward model may tip the balance


def rollout(patient: Patient) -> Verdict:
    """A trainer can be made of the models, the prompts fit, and sampling works; in fp32, for the checks after it."""
    needed(patient.vocabulary, "one vocabulary")
    policy, reference = (copy.deepcopy(model) for model in patient.models())  # one by one: the copies share nothing
    # Not compiled: it would take longer than all checks, and hide tensors from those that count them.
    whole = PPOTrainer(policy, reference, needed(patient.tokenizer, "the tokenizer"), patient.config, compile=False)
    whole.check_prompts(patient.prompts)
    patient.config, patient.precision = whole.config, whole.precision_choice
    trainer = _with(whole, precision="fp32", gen_len=min(patient.config.gen_len, TOKENS))
    patient.rollout, patient.trainer = _collect(trainer, patient.prompts), trainer
    B, R = patient.rollout.response_mask.shape
    return Verdict(OK, f"{B} sequences of up to {R} new tokens were sampled and scored")


def reference(patient: Patient) -> Verdict:
    """Before the first step KL(policy || reference) is 0."""
    trainer, rollout = patient.experience()
    with torch.no_grad():
        R = rollout.response_mask.size(1)
        scored = trainer.policy.score(rollout.tokens, rollout.mask, R, reference=trainer.reference)
    assert scored.exact_kl is not None
    c, kl = patient.config, scored.exact_kl.sum(-1).mean().item() * patient.config.gen_len / trainer.config.gen_len
    detail = f"KL at step 0 is {kl:.2g} nats a sequence (full softmax, {len(rollout)} sequences)"
    if abs(kl) <= SAME_KL:
        return Verdict(OK, detail)
    remedy = (
        "in a first run load both models from one folder. To go on with a tuned policy against its old reference is "
        "right; so much of the KL is then spent at the start"
    )
    in_unit = kl if c.kl_unit == "sequence" else kl / c.gen_len
    if c.adaptive_kl and c.init_kl_coef > 0 and in_unit > c.target:
        detail += f", beyond the target of {c.target:g} a {c.kl_unit}"
        return Verdict(FAIL, detail, f"{remedy}: raise target above it, or PPO begins by pulling the policy back")
    return Verdict(WARN if kl > 0 else FAIL, detail, remedy)


def ratio(patient: Patient) -> Verdict:
    """The first minibatch's ratio is 1: what samples, what scores and what trains are one policy."""
    trainer, rollout = patient.experience()
    exact = _first_ratio(trainer, rollout)
    chosen = patient.config.precision
    if exact.status != OK or chosen == "fp32":
        return exact
    reduced = _with(trainer, precision=chosen)
    verdict = _first_ratio(reduced, _collect(reduced, patient.prompts))
    return verdict._replace(detail=f"{exact.detail}; {verdict.detail}")


def weights(patient: Patient) -> Verdict:
    """LM heads are the embeddings, before and after one PPO step on copies, in which the reference does not change."""
    models = patient.models()
    shared = shared_parameters(*models)
    if shared:
        names = f"{', '.join(shared[:3])}{f' and {len(shared) - 3} more' if len(shared) > 3 else ''}"
        remedy = "load the reference once more, or give copy.deepcopy(policy)"
        return Verdict(FAIL, f"policy and reference share {names}: both would move in each step", remedy)
    untouched, rollout = patient.experience()
    policy, reference = copy.deepcopy(models)  # in one go: what they have in common stays in common
    trainer = PPOTrainer(policy, reference, untouched.tokenizer, patient.config, **PLAIN_STEP)
    before = fingerprint(reference)
    heads = {"policy": untied_error(trainer.policy), "reference": untied_error(reference)}
    scores = torch.linspace(1, 2, len(rollout)).to(rollout.scores)  # something to learn, whatever the reward
    stats = trainer.step(dataclasses.replace(rollout, scores=scores))
    heads["policy after a step"] = untied_error(trainer.policy)
    pairs = zip(trainer.policy.gpt2.parameters(), untouched.policy.gpt2.parameters(), strict=True)
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
        return Verdict(FAIL, "; ".join(problems), "; ".join(dict.fromkeys(problems.values())))
    step = f"{stats['ppo/updates']:.0f} updates moved the policy by up to {moved:.1g}, and not a bit of the reference"
    return Verdict(OK, f"LM heads are tied; {step}")


def memory(patient: Patient) -> Verdict:
    """The formula of `memory.estimate`, and the same scaled by a measurement, against what the device has."""
    c, (short, rollout) = patient.config, patient.experience()
    trainer, R = _with(short, precision=c.precision), rollout.response_mask.size(1)
    small = estimate(trainer, len(rollout), rollout.tokens.size(1) - R, R, len(rollout))
    longest = max(len(trainer.tokenizer.encode_prompt(prompt)) for prompt in patient.prompts)
    formula = estimate(trainer, c.batch_size, longest, c.gen_len, min(c.forward_batch_size, c.minibatch_size))
    measured = extrapolate(measure(trainer, rollout), small, formula)
    need = max(formula, measured, key=lambda need: need.total)
    detail = (
        f"{_gib(formula.total)} needed by the formula, {_gib(measured.total)} by measuring {len(rollout)} sequences, "
        f"most of it for {need.largest}"
    )
    if patient.available is None:
        raise Skipped(f"{detail}; this system does not say how much is available")
    own = sum(weight_bytes(m) for m in patient.models() if next(m.parameters()).device.type == trainer.device.type)
    room = patient.available + own  # the need counts the models themselves
    detail += f"; {_gib(room)} available on the {trainer.device.type}"
    if need.total <= FULL * room:
        return Verdict(OK, detail)
    remedies = {"weights": "take a smaller model", "update": "lower forward_batch_size"}
    remedy = remedies.get(need.largest, "lower batch_size or gen_len")
    return Verdict(WARN if need.total <= room else FAIL, detail, f"{remedy}, or find a device with more memory")


def precision(patient: Patient) -> Verdict:
    """Log-probabilities in the chosen reduced precision, bf16 if none is chosen, against fp32."""
    c, (trainer, rollout) = patient.config, patient.experience()
    name = "bf16" if c.precision == "fp32" else c.precision
    reduced, R = _with(trainer, precision=name), rollout.response_mask.size(1)
    with torch.no_grad(), reduced.precision.autocast():
        scored = reduced.policy.score(
            rollout.tokens, rollout.mask, R, trainer.score_temperature, rollout.sampling_sets, trainer.reference
        )
    outputs = [x for x in (scored.logprobs, scored.values, scored.ref_logprobs) if x is not None]
    remedy = f"train in fp32{', or in bf16, whose range is that of fp32' if name == 'fp16' else ''}"
    if bad := sum(int((~torch.isfinite(x)).sum()) for x in outputs):
        detail = f"{name}: {bad} of {sum(x.numel() for x in outputs)} log-probabilities and values are not finite"
        verdict = Verdict(FAIL, detail, remedy)
    else:
        real = rollout.response_mask
        difference = (scored.logprobs - rollout.logprobs)[real].abs()
        rounding = Rounding.between(scored.logprobs[real], rollout.logprobs[real])
        detail = (
            f"{name} against fp32: log-probabilities differ by {difference.mean():.2g} nats on average, "
            f"{difference.max():.2g} at worst, so |ratio - 1| is {rounding.mean:.2g} and {rounding.worst:.2g}"
        )
        verdict = _rounding(rounding, c.cliprange, detail, remedy)
    chosen = needed(patient.precision, "the precision")
    if c.precision == "fp32":  # no reason to stop this run
        status = WARN if verdict.status == FAIL else verdict.status
        verdict = verdict._replace(status=status, detail=f"{verdict.detail} (this run is in fp32)")
    return verdict._replace(detail=f"{verdict.detail}; {chosen}") if chosen.reason else verdict


def _with(trainer: PPOTrainer, **settings: Any) -> PPOTrainer:
    """A trainer of the same models under other settings."""
    return PPOTrainer(trainer.policy, trainer.ref_policy, trainer.tokenizer, trainer.config, **settings)


def _collect(trainer: PPOTrainer, prompts: Sequence[str]) -> Rollout:
    """A small rollout, scored by a pass of its own even where training takes the states of the decode.

    The caller's reward function is not asked: the check of the labels does that.
    """
    rows = min(trainer.config.batch_size, ROWS)
    rollout = trainer.collect([prompts[i % len(prompts)] for i in range(rows)], lambda texts: [0.0] * len(texts))
    with trainer.precision.autocast():
        scored = score_in_batches(
            trainer.policy, trainer.ref_policy, rollout.tokens, rollout.mask, rollout.response_mask.size(1),
            trainer.score_temperature, rollout.sampling_sets, trainer.scoring_batch_size,
        )  # fmt: skip
    return dataclasses.replace(rollout, **scored)


def _rescored(trainer: PPOTrainer, rollout: Rollout) -> Tensor:
    """Log-probabilities (B, R) as an update computes them: in micro-batches, with gradients."""
    c, result = trainer.config, torch.zeros_like(rollout.logprobs)
    for rows in torch.arange(len(rollout)).split(min(c.forward_batch_size, c.minibatch_size)):
        batch = rollout.rows(rows)
        width = batch.response_mask.size(1)
        with torch.enable_grad(), trainer.precision.autocast():
            scored = trainer.policy.score(
                batch.tokens, batch.mask, width, trainer.score_temperature, batch.sampling_sets
            )
        result[rows, :width] = scored.logprobs.detach()
    return result


def _first_ratio(trainer: PPOTrainer, rollout: Rollout) -> Verdict:
    """Log-probabilities of the training forward and of the sampler against those of scoring."""
    c = trainer.config
    compared = {"trained": _rescored(trainer, rollout)}
    scored_in_full = (c.score_full_softmax and c.sampling.truncates) or trainer.score_temperature != c.temperature
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
    return Verdict(OK, detail) if worst <= SAME_RATIO else Verdict(FAIL, detail, remedy)


def _rounding(rounding: Rounding, cliprange: float, detail: str, remedy: str) -> Verdict:
    """The verdict on what reduced precision does."""
    if not rounding.mean_fits(cliprange):
        return Verdict(
            FAIL, f"{detail}; the mean is above {ROUNDING_SHARE:.0%} of the clip range {cliprange:g}", remedy
        )
    if not rounding.worst_fits(cliprange):
        return Verdict(WARN, f"{detail}; the worst is outside the clip range {cliprange:g}", remedy)
    return Verdict(OK, detail)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
