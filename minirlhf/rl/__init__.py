"""Stage 3, the reference implementation of PPO; models, sampling and rewards live in wings of their own.

Read in this order, each file from its top:
    trainer      step, then _update, then _loss
    rollout      one batch of experience, and how it is collected
    logprobs     where a token meets the state that predicts it
    shaping      from scores to the rewards of tokens
    advantages   from rewards to advantages and returns, with groups of responses to one prompt in `groups`
    losses, kl   what is minimised, and the leash to the reference
    statistics, config, presets, state  what stands around the algorithm

Means and whitening over real tokens are in `common.masked`.
"""
