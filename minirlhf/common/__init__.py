"""Validation of settings, text that is safe to print, and pages in the browser.

Nothing here knows tensors, files or models.
"""
