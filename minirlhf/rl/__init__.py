"""Stage 3, the reference implementation of PPO."""
