"""What has no opinion: validation of settings and text that is safe to print.

Nothing here knows tensors, files or models.
"""
