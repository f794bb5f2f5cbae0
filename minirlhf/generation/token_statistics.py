"""What a softmax over logits says of tokens: log-probability, entropy, KL divergence.

First as they are defined, then in fewer passes over the logits: `compare` for a rollout, `LogprobsAndEntropy` for the
update. Only a loss with the exact KL in it runs the definitions; the tests compare the two ways.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minirlhf.generation.sampling import restrict

LOWEST = -1e30  # in the place of -inf: times a probability of 0 it is 0


def gather_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability (...) of each token (...) under logits (..., V), in nats."""
    return logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy (...) in nats of the distributions softmax(logits (..., V)); logits of -inf have probability 0."""
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(-1)  # 0 * -inf would be NaN


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(p || q) (...) in nats, with p = softmax(logits (..., V)) and q of `ref_logits`; where p is 0 the term is 0."""
    logp, logq = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (logp.exp() * torch.where(logits == -torch.inf, 0.0, logp - logq)).sum(-1)


# ---- the same in fewer passes ---------------------------------------------------------------------------------------


@torch.no_grad()
def compare(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, temperature: float = 1.0, keep: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probability, entropy, the reference's log-probability, and KL(policy || reference), each (N,), in nats.

    logits, ref_logits: (N, V), finite. Other arguments as of `LogprobsAndEntropy`.
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
    # Differences are summed, so that no digits are lost; not by a matrix product, which autocast would round.
    entropy = -(p * logp).sum(-1)
    kl = p.mul_(logp.sub_(logq)).sum(-1)
    return logprobs, entropy, ref_logprobs, kl


class LogprobsAndEntropy(torch.autograd.Function):
    """`apply`: log-probability (N,) of each token, -inf for one outside `keep`, and entropy (N,), in nats.

    logits: (N, V), finite. tokens: (N,) int64. temperature, keep (N, V) bool: as in `sampling.restrict`. Autograd of
    the definitions keeps half a dozen tensors of the logits' shape for the backward pass; this keeps one. With
    p = softmax(x), x = logits / temperature, and H the entropy of p:

        d log p_i / dx_j = [i = j] - p_j        dH / dx_j = -p_j (log p_j + H)
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        x = restrict(logits, temperature, keep)
        p = x.softmax(-1)
        largest, where = p.max(-1, keepdim=True)
        total = p.sum(-1, keepdim=True)  # a softmax in fp32 may miss 1 in the sixth digit
        maximum, logsumexp = x.gather(-1, where), (total / largest).log()  # (N, 1), the second of x - maximum
        picked = x.gather(-1, tokens.unsqueeze(-1)) - maximum
        # Less the maximum, so that logits around 100 do not cost the entropy three digits.
        x = x - maximum if x is logits else x.sub_(maximum)
        if keep is not None:
            x.clamp_min_(LOWEST)
        entropy = logsumexp - p.mul_(x).sum(-1, keepdim=True) / total  # no matrix product, which autocast would round
        ctx.save_for_backward(x, tokens, logsumexp, entropy)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        ctx.set_materialize_grads(False)
        return (picked - logsumexp).squeeze(-1), entropy.squeeze(-1)

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
