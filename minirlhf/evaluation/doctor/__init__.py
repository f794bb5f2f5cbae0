"""Checks of models, settings and reward before a run: what would go wrong, and what to do."""
