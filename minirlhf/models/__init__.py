"""Networks and their heads: GPT-2, BERT, the value head, what the rest may ask of a decoder, and models made ready.

How they are trained is decided elsewhere.
"""
