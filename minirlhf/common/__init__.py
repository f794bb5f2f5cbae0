"""What has no opinion: validation of settings, text that is safe to print, pages in the browser.

Nothing here knows tensors, files or models.
"""
