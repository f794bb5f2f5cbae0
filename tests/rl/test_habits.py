"""What users of other libraries hand over: accepted where it is unambiguous, else refused with the conversion."""

import warnings

import numpy as np
import pytest
import torch
from transformers import BertTokenizer, GPT2LMHeadModel
from transformers import GPT2Config as TheirConfig

from conftest import VOCAB, make_gpt2
from minirlhf import ActorCritic, PPOConfig, PPOTrainer, SamplingConfig, generate

THEIRS = GPT2LMHeadModel(
    TheirConfig(vocab_size=len(VOCAB), n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=1)
).eval()


def test_generate_takes_an_actor_critic():
    model = make_gpt2()
    found = generate(ActorCritic(model).eval(), [[5, 6]], 4, SamplingConfig(top_k=1))
    assert torch.equal(found.tokens, generate(model, [[5, 6]], 4, SamplingConfig(top_k=1)).tokens)


@pytest.mark.parametrize("prompts", ["酒店", ["酒店"]])
def test_texts_are_refused_with_the_line_that_encodes_them(prompts):
    with pytest.raises(ValueError, match="encode_prompt"):
        generate(make_gpt2(), prompts, 3)


def test_models_and_tokenizers_of_transformers_are_refused_by_name(tokenizer, tmp_path):
    named = r"a transformers GPT2LMHeadModel: save it .* minirlhf.load_decoder"
    for call in (lambda: generate(THEIRS, [[5]], 2), lambda: PPOTrainer(THEIRS, make_gpt2(), tokenizer),
                 lambda: PPOTrainer(make_gpt2(), THEIRS, tokenizer)):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            call()
    (tmp_path / "vocab.txt").write_text("\n".join(VOCAB), encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be a minirlhf\.Tokenizer, got a BertTokenizer"):
        PPOTrainer(make_gpt2(), make_gpt2(), BertTokenizer(str(tmp_path / "vocab.txt")))


def test_the_config_first_names_the_order(tokenizer):
    named = "config must be a PPOConfig, got a .*Tokenizer: it comes after the models and the tokenizer, or by name"
    with pytest.raises(ValueError, match=named):
        PPOTrainer(PPOConfig(), make_gpt2(), make_gpt2(), tokenizer)


def test_responses_that_repeat_their_queries_are_told(tokenizer):
    """As `generate` of transformers and TRL return them; one row that does is a response like another."""
    trainer = PPOTrainer(make_gpt2(), make_gpt2(), tokenizer, gen_len=4, batch_size=2, device="cpu")
    queries = [[5, 6], [7, 8]]
    with pytest.warns(UserWarning, match=r"each response begins with its query: .* response\[len\(query\):\]"):
        trainer.step(*(list(map(torch.tensor, rows)) for rows in (queries, [[5, 6, 9], [7, 8, 3, 4]])), [0.5, 0.1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.step(*(list(map(torch.tensor, rows)) for rows in (queries, [[5, 6, 9], [7, 9]])), [0.5, 0.1])


def test_a_batch_of_one_is_a_row(tokenizer):
    stats = []
    for shape in ((-1,), (1, -1)):
        trainer = PPOTrainer(make_gpt2(), make_gpt2(), tokenizer, gen_len=3, batch_size=2, lr=1e-3, device="cpu")
        queries, responses = ([torch.tensor(x).view(shape) for x in rows] for rows in ([[5, 6], [7]], [[8], [9, 4]]))
        stats.append(trainer.step(queries, responses, [0.5, -1.0]))
    assert stats[0]["ppo/loss/total"] == stats[1]["ppo/loss/total"]


def test_numpy_scalars_are_numbers():
    config = PPOConfig(batch_size=np.int64(8), lr=np.float64(1e-4), adaptive_kl=np.bool_(False), minibatch_size=8)
    assert config == PPOConfig(batch_size=8, lr=1e-4, adaptive_kl=False, minibatch_size=8)
    assert type(config.batch_size) is int and type(config.adaptive_kl) is bool


@pytest.mark.parametrize("kind", [SamplingConfig, PPOConfig])
def test_a_temperature_of_zero_names_greedy_decoding(kind):
    with pytest.raises(ValueError, match=r"temperature must be above 0 \(top_k=1 is greedy decoding\), got 0"):
        kind(temperature=0)
