"""Networks and their heads: GPT-2, BERT, the value head, and what the rest may ask of a decoder.

How they are sampled or trained is decided elsewhere.
"""
