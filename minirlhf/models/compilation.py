"""`torch.compile` of a GPT-2, block by block: one small program that all layers share, compiled in seconds."""

from __future__ import annotations

from minirlhf.models.decoder import Decoder


def compile_blocks(*models: Decoder) -> None:
    """Let the blocks of these models run compiled where they see whole sequences, in scoring and training.

    In place: names in the state dict stay, copies of a model are plain again. Sizes are symbols from the start, as
    micro-batches differ in theirs. With a key/value cache the blocks run as they are: a cache is one token longer each
    time. The first passes take the time that compiling needs, for each combination of gradient and padding anew.
    """
    for model in models:
        for block in model.blocks:
            block.compile(dynamic=True)
