"""Log-probability and entropy of tokens straight from logits, with their gradients in closed form.

`ppo.gather_logprobs` and `ppo.entropy` say what is computed, and are the oracles of the tests. Written out like that,
autograd keeps half a dozen tensors of the logits' shape for the backward pass; here it keeps one, and passes over it
about a third as often.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minirlhf.generation.sampling import restrict

LOWEST = -1e30  # in the place of -inf: times a probability of 0 it is 0


def logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0, keep: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What a softmax says of the tokens, in nats, fp32 (fp64 for logits in fp64).

    logits: (N, V), finite. tokens: (N,) int64. temperature, keep (N, V) bool: of the distribution that was sampled
    from, as in `sampling.restrict`.
    Returns the log-probability (N,) of each token, -inf for one that is not kept, and the entropy (N,) of each row.
    """
    return _LogprobsAndEntropy.apply(logits, tokens, temperature, keep)


@torch.no_grad()
def compare(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float = 1.0, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What two softmaxes say of the tokens, without gradients and in half the passes over the logits.

    logits, ref_logits: (N, V), finite, of policy and reference. Other arguments as of `logprobs_and_entropy`.
    Returns four times (N,), in nats: the log-probability of each token, the entropy of each row, the reference's
    log-probability, and KL(policy || reference).
    """

    def normalised(z: Tensor) -> Tensor:  # (N, V), finite also where it is not kept
        z = restrict(z, temperature)
        return z - (z if keep is None else z.masked_fill(~keep, -torch.inf)).logsumexp(-1, keepdim=True)

    def of_tokens(z: Tensor) -> Tensor:  # (N,)
        picked = z.gather(-1, at)
        return (picked if keep is None else picked.masked_fill(~keep.gather(-1, at), -torch.inf)).squeeze(-1)

    at, logp, logq = tokens.unsqueeze(-1), normalised(logits), normalised(ref_logits)
    logprobs, ref_logprobs = of_tokens(logp), of_tokens(logq)
    p = logp.exp() if keep is None else logp.exp().masked_fill_(~keep, 0.0)
    # Logarithms are subtracted before they are summed, so that no digits are lost; by no matrix product, which autocast
    # would round.
    entropy = -(p * logp).sum(-1)
    kl = p.mul_(logp.sub_(logq)).sum(-1)
    return logprobs, entropy, ref_logprobs, kl


class _LogprobsAndEntropy(torch.autograd.Function):
    """With p = softmax(x), x = logits / temperature, and H the entropy of p:

    d log p_i / dx_j = [i = j] - p_j        dH / dx_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = restrict(logits, temperature, keep)
        p = x.softmax(-1)
        largest, where = p.max(-1, keepdim=True)
        logsumexp = x.gather(-1, where) - largest.log()  # (N, 1)
        logprobs = x.gather(-1, tokens.unsqueeze(-1)) - logsumexp
        if keep is not None:  # then x is a copy of our own
            x.clamp_min_(LOWEST)
        entropy = logsumexp - p.mul_(x).sum(-1, keepdim=True)  # no matrix product, which autocast would round
        ctx.save_for_backward(x, tokens, logsumexp, entropy)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return logprobs.squeeze(-1), entropy.squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        x, tokens, logsumexp, entropy = ctx.saved_tensors
        of_logprobs = torch.zeros_like(entropy) if gradients[0] is None else gradients[0].unsqueeze(-1)
        gradient = (x - logsumexp).exp_()  # p
        if gradients[1] is None:
            gradient.mul_(-of_logprobs)
        else:  # log p_j = x_j - logsumexp
            of_entropy = gradients[1].unsqueeze(-1)
            gradient.mul_((x * -of_entropy).add_(of_entropy * (logsumexp - entropy) - of_logprobs))
        gradient.scatter_add_(-1, tokens.unsqueeze(-1), of_logprobs).div_(ctx.temperature)
        return gradient.to(ctx.dtype), None, None, None
