"""Kinds of tokenizers, each in one module, and the folders that they are read from."""
