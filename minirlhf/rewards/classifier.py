"""Class logits of texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from minirlhf.device.gpu import to_device
from minirlhf.device.random import eval_mode
from minirlhf.models.bert import BertClassifier
from minirlhf.text.batching import length_sorted_batches, right_pad
from minirlhf.text.tokenizer import Tokenizer


@torch.no_grad()
def predict(
    model: BertClassifier, tokenizer: Tokenizer, texts: Sequence[str], max_length: int, batch_size: int = 64
) -> Tensor:
    """Class logits (N, L) in fp32 on the CPU, in the order of the texts, computed in batches of similar length."""
    sequences = tokenizer.encode_batch(texts, max_length)
    device = next(model.parameters()).device
    logits = torch.empty(len(texts), len(model.config.labels))
    with eval_mode(model):
        for batch in length_sorted_batches([len(s) for s in sequences], batch_size):
            ids, mask = right_pad([sequences[i] for i in batch], tokenizer.pad_id)
            padded = None if bool(mask.all()) else to_device(mask, device)
            logits[batch] = model(to_device(ids, device), padded).float().cpu()
    return logits
