"""From logits to sampled tokens and texts: sampling, and the loop over the tokens of a batch.

It knows a decoder by its interface alone. No reward and no training lives here.
"""
