"""Transformer models written from scratch, with the parameter names of the published checkpoints."""
