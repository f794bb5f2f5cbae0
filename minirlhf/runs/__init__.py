"""The folder of a run: one `Run` with its lock, log and checkpoints, for PPO, SFT and reward models.

What a training computes is in `rl` and `supervised`.
"""

from minirlhf.runs.checkpoint import load_checkpoint, save_checkpoint
from minirlhf.runs.run import Run, RunFailed, Stopped

__all__ = ["Run", "RunFailed", "Stopped", "load_checkpoint", "save_checkpoint"]
