"""From a language model to sampled tokens: sampling, `generate`, decoding at fixed shapes.

No reward and no training lives here.
"""
