"""The package minirlhf-starter: the starter weights, which `minirlhf.starter()` finds. It holds no code."""
