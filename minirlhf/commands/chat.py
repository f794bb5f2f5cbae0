"""A chat with a model in the terminal."""

from __future__ import annotations
