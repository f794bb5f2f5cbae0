"""A task whose optimum is known exactly: PPO must find it.

The maximum of E[r(y)] - beta KL(p || ref) is p*(y) proportional to ref(y) exp(r(y) / beta) (Ziegler et al. 2019,
section 2.2; Korbak et al. 2022). Over 11 tokens and responses of 2 it can be enumerated. A wrong sign, a wrong scale
or a shift by one moves the fixed point, however good the curves look.
"""

import itertools

import pytest
import torch

from minirlhf import GPT2, ActorCritic, GPT2Config, PPOTrainer, Tokenizer, generate

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"好坏大小早晚"]
LENGTH, BETA = 2, 0.3
RESPONSES = torch.tensor(list(itertools.product(range(len(VOCAB)), repeat=LENGTH)))  # (121, 2)


def reward_of(responses: torch.Tensor) -> torch.Tensor:
    """Depends on both tokens and on their order, so that no factorised policy and no shifted one is optimal."""
    first, second = responses.T
    return (first == 5).double() * 0.6 + (second == first + 1).double() * 0.8 - (second == 0).double() * 0.5


def distribution(model: GPT2, prompt: list[int]) -> torch.Tensor:
    """p(y) of all responses, by the chain rule (121,)."""
    tokens = torch.cat([torch.tensor(prompt).expand(len(RESPONSES), -1), RESPONSES], 1)
    with torch.no_grad():
        logp = model(tokens)[:, len(prompt) - 1 : -1].double().log_softmax(-1)
    return logp.gather(-1, RESPONSES[..., None]).sum((1, 2)).exp()


@pytest.mark.parametrize("seed", range(5))
def test_fixed_beta_reaches_the_exact_optimum(seed):
    config = GPT2Config(vocab_size=len(VOCAB), n_positions=8, n_embd=32, n_layer=1, n_head=2, initializer_range=0.2)
    policy, reference = ActorCritic(GPT2(config, seed=seed)), GPT2(config, seed=seed).eval()
    tokenizer = Tokenizer(VOCAB)
    prompt = tokenizer.encode_prompt("大")
    ref = distribution(reference, prompt)
    optimum = ref * (reward_of(RESPONSES) / BETA).exp()
    optimum /= optimum.sum()

    trainer = PPOTrainer(
        policy, reference, tokenizer, steps=50 * 256, batch_size=256, minibatch_size=64, forward_batch_size=64,
        gen_len=LENGTH, lr=1e-3, lr_schedule="linear", adaptive_kl=False, init_kl_coef=BETA, top_p=1.0, vf_coef=0.5,
        cliprange_value=10.0, ppo_epochs=2, seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    for _ in range(trainer.config.iterations):
        responses = generate(policy.gpt2, [prompt] * 256, LENGTH, generator=generator).responses
        trainer.step([torch.tensor(prompt)] * 256, responses, reward_of(torch.stack(responses)))

    learned = distribution(policy.gpt2, prompt)
    before, after = (0.5 * (p - optimum).abs().sum().item() for p in (ref, learned))  # total variation
    assert before > 0.3
    assert after < 0.03
