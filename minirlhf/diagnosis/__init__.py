"""The pre-flight check of a run: `minirlhf.doctor` and what it is made of."""
