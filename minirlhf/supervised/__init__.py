"""Stages 1 and 2: supervised fine-tuning and the training of reward models, with the loop they share.

Stage 3, PPO, is in `rl`; the folder that a training is saved in, in `runs`.
"""
