"""Which tokens are computed once for several rows: a brute-force oracle, cases by hand, and there and back again."""

import pytest
import torch

from conftest import make_bert, make_gpt2, make_llama
from minirlhf import Decoder
from minirlhf.models.packing import WORTH, Packing, first_alike


def brute_force(ids: list[list[int]], real: list[list[bool]]) -> list[list[int]]:
    """Of each token the first place in its column with the same real tokens, at the same places, up to it."""
    T = len(ids[0])
    pasts = [[[i if r else None for i, r in zip(row, kept, strict=True)][: t + 1] for t in range(T)]
             for row, kept in zip(ids, real, strict=True)]  # fmt: skip
    return [[min(r for r in range(len(ids)) if pasts[r][t] == pasts[row][t]) * T + t for t in range(T)]
            for row in range(len(ids))]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_equal_pasts_are_found(seed):
    generator = torch.Generator().manual_seed(seed)
    B, T = (int(torch.randint(1, 7, (), generator=generator)) for _ in range(2))
    ids = torch.randint(0, 2, (B, T), generator=generator)
    real = torch.rand(B, T, generator=generator) < 0.8
    assert first_alike(ids, real).tolist() == brute_force(ids.tolist(), real.tolist())


def test_two_prompts_of_three_rows_by_hand():
    """Rows 0 and 2 begin with 7 8; row 1 with 7 9. Once computed: 7, its 8 and 9, and three last tokens."""
    ids = torch.tensor([[7, 8, 1], [7, 9, 1], [7, 8, 2]])
    packing = Packing.of(ids, None)
    assert packing is not None
    assert packing.kept.tolist() == [0, 1, 2, 4, 5, 8]
    assert packing.source.view(3, 3).tolist() == [[0, 1, 2], [0, 3, 4], [0, 1, 5]]
    x = ids[..., None].double()
    assert torch.equal(packing.unpack(packing.pack(x)), x)


@pytest.mark.parametrize("seed", range(5))
def test_real_tokens_come_back_as_they_were(seed):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 3, (5, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(1, 7, (5, 1), generator=generator)).long()
    packing = Packing.of(ids, mask)
    assert packing is not None and len(packing.kept) < ids.numel()
    back = packing.unpack(packing.pack(ids[..., None]))[..., 0]
    assert torch.equal(back, ids * mask)


@pytest.mark.parametrize("build", [make_gpt2, make_llama, make_bert])
@pytest.mark.parametrize("padding", [1, 9])
def test_a_row_that_is_not_finite_stays_alone_and_what_stands_at_padding_is_not_read(build, padding):
    model = build()
    word = model.embeddings[0] if isinstance(model, Decoder) else model.bert.embeddings.word_embeddings
    ids = torch.randint(8, 100, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1:, 12 - padding :] = 0
    ids = torch.where(mask.bool(), ids, 7)
    ids[0, 0] = 6
    with torch.no_grad():
        word.weight[6:8] = torch.nan
        hidden = model.hidden_states(ids, mask)
    assert hidden[0].isnan().any()
    assert hidden[1:][mask[1:].bool()].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5), (2, 5)])
def test_batches_without_tokens_are_no_error(shape):
    ids = torch.zeros(shape, dtype=torch.int64)
    model = make_gpt2()
    assert model(ids, torch.zeros_like(ids)).shape == (*shape, model.config.vocab_size)


def test_what_brings_little_or_must_not_be_shared_is_left_alone():
    alike = torch.ones(2, 4, dtype=torch.int64)
    assert Packing.of(alike, None) is not None
    assert Packing.of(alike, None, share=False) is None
    assert Packing.of(alike, torch.ones_like(alike), share=False) is None
    assert Packing.of(torch.arange(8).view(2, 4), None) is None
    assert Packing.of(alike[:1], None) is None
    one = torch.arange(20).view(2, 10)
    one[1, 0] = one[0, 0]  # 19 of 20 are distinct
    assert WORTH * 20 < 19 and Packing.of(one, None) is None
