"""Validation of settings, text that is safe to print, and other helpers that every wing may use.

Nothing here knows tensors, files or models.
"""
