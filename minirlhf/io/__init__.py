"""Files and folders in the Hugging Face layout: reading, writing, converting, downloading.

What the tensors mean is decided in `models`.
"""
