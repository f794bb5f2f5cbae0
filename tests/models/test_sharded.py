"""Models in parts, here one part of one process; `tests/device/test_processes.py` trains two."""

import pytest
import torch

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, ActorCritic, RewardModel, Tokenizer, generate
from minirlhf.device.parts import full, is_part
from minirlhf.models.sharded import exported, gathered, is_sharded, shard
from minirlhf.rewards.reward_model import DecoderScorer

IDS = torch.tensor([[7, 8, 9, 10], [11, 12, 13, 14]])


@pytest.fixture
def group(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_passes_gradients_and_copies_are_those_of_the_whole_model(group, tmp_path):
    whole, parted = (ActorCritic(make_gpt2(0, n_layer=2).double(), "linear").double() for _ in range(2))
    assert gathered(parted) is parted and not is_sharded(parted)
    shard(parted, torch.device("cpu"), "fp32")
    assert is_sharded(parted) and all(is_part(p) for p in parted.parameters())
    assert all(not is_part(p) for p in whole.parameters())
    for model in (whole, parted):
        states = model.hidden_states(IDS)
        (model.decoder.lm_logits(states).logsumexp(-1).sum() + model.value_head(states + 1).sum()).backward()
    for (name, p), q in zip(whole.named_parameters(), parted.parameters(), strict=True):
        torch.testing.assert_close(full(q.grad), p.grad, msg=name)
    with pytest.raises(ValueError, match=r"the model is sharded, and samples come from .* trainer.models.whole"):
        generate(parted, [[7, 8]], 2)
    with pytest.raises(ValueError, match=r"the model is sharded: save it by trainer.save_pretrained"):
        parted.save_pretrained(tmp_path / "parts")
    copy = gathered(parted)
    assert type(copy) is ActorCritic and type(copy.decoder) is GPT2 and not is_sharded(copy) and not copy.training
    assert all(
        torch.equal(p, q) and not q.requires_grad for p, q in zip(whole.parameters(), copy.parameters(), strict=True)
    )
    assert torch.equal(copy.decoder(IDS), whole.eval().decoder(IDS))
    short = gathered(parted, torch.bfloat16)
    assert all(torch.equal(p.bfloat16(), q) for p, q in zip(whole.parameters(), short.parameters(), strict=True))
    exported(parted).decoder.float().save_pretrained(tmp_path / "policy")
    loaded = GPT2.from_pretrained(tmp_path / "policy")
    assert all(torch.equal(p.float(), q) for p, q in zip(whole.decoder.parameters(), loaded.parameters(), strict=True))


def test_a_reward_model_scores_and_is_exported_with_its_normalisation(group, tmp_path):
    texts, tokenizer = ["酒店很好", "房间脏，太差", "w"], Tokenizer(VOCAB)
    whole, parted = (RewardModel(DecoderScorer(make_gpt2(0, n_layer=2)), tokenizer, device="cpu") for _ in range(2))
    shard(parted, torch.device("cpu"), "fp32", "score")
    for model in (whole, parted):
        model.normalise(texts)
        model.score([[7, 8, 9], [10]]).sum().backward()
    for p, q in zip(whole.parameters(), parted.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None) and (p.grad is None or torch.equal(full(q.grad), p.grad))
    assert (whole.mean, whole.std) == (parted.mean, parted.std) and torch.equal(parted(texts), whole(texts))
    assert gathered(parted).tokenizer is tokenizer
    exported(parted).save_pretrained(tmp_path / "reward")
    assert torch.equal(RewardModel.from_pretrained(tmp_path / "reward", device="cpu")(texts), whole(texts))
