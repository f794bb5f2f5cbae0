"""The folder of a run: one `Run` with its lock, log and checkpoints, for PPO, SFT and reward models.

What a training computes is in `rl` and `supervised`.
"""
