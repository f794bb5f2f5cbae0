"""The reward model: what it reads, against transformers on all trunks, its folder, its normalisation."""

import warnings

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification as TheirModel
from transformers import (
    AutoTokenizer,
    BertForSequenceClassification,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from transformers import BertConfig as TheirBertConfig
from transformers import GPT2Config as TheirGPT2Config

from conftest import MAKERS, VOCAB, assert_relatively_close, make_bert, make_gpt2, rewrite_config
from minirlhf import BertClassifier, RewardModel, SentimentReward, Tokenizer
from minirlhf.io import model_folder
from minirlhf.rewards.base import call_reward
from minirlhf.rewards.reward_model import DecoderScorer
from minirlhf.rewards.scorers import load_scorer

TRUNKS = ["gpt2", "llama", "bert"]
TEXTS = ["很好", "", "酒店位置很好，服务非常满意！推荐", "房间太脏", "hello world wifi", "差" * 30, "早餐一般。",
         "好" * 200, "😀", "a[PAD]b [SEP]"]  # fmt: skip
LIMIT = 64  # positions of all trunks


def make_reward(trunk: str, seed: int = 0, **options) -> RewardModel:
    if trunk in MAKERS:
        network = DecoderScorer(MAKERS[trunk](seed), seed)
    else:
        network = make_bert(seed, scale=10.0, id2label={0: "reward"})
    return RewardModel(network, Tokenizer(VOCAB), device="cpu", **options)


def padded(texts) -> dict[str, torch.Tensor]:
    sequences = [Tokenizer(VOCAB).encode(text, LIMIT) for text in texts]
    width = max(map(len, sequences))
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(params=TRUNKS)
def trunk(request) -> str:
    return request.param


# ---- what is read ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trunk", MAKERS)
@torch.no_grad()
def test_a_decoder_is_read_at_the_last_real_token(trunk):
    model = make_reward(trunk)
    decoder, head = model.network.decoder, model.network.score.weight[0]
    expected = [(decoder.hidden_states(torch.tensor([model.tokenizer.encode(t, LIMIT)]))[0, -1] @ head) for t in TEXTS]
    torch.testing.assert_close(model.scores(TEXTS), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert model.scores(TEXTS).std() > 0.1


@torch.no_grad()
def test_a_bert_is_read_at_cls():
    model = make_reward("bert")
    bert = model.network
    expected = []
    for text in TEXTS:
        first = bert.hidden_states(torch.tensor([model.tokenizer.encode(text, LIMIT)]))[0, 0]
        pooled = torch.tanh(bert.bert.pooler["dense"](first))
        expected.append(bert.classifier.weight[0] @ pooled + bert.classifier.bias[0])
    torch.testing.assert_close(model.scores(TEXTS), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert model.scores(TEXTS).std() > 0.1


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_padding_and_order_change_nothing(trunk, batch_size):
    model = make_reward(trunk, batch_size=batch_size)
    alone = torch.cat([model.scores([text]) for text in TEXTS])
    torch.testing.assert_close(model.scores(TEXTS), alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.scores(TEXTS[::-1]), alone.flip(0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_stands_in_the_padding_changes_nothing(trunk):
    network = make_reward(trunk).network
    batch = padded(TEXTS)
    other = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 105)
    wider = torch.nn.functional.pad(batch["input_ids"][1:3, :40], (0, 3), value=7)
    wider_mask = torch.nn.functional.pad(batch["attention_mask"][1:3, :40], (0, 3))
    expected = network(**{"ids": batch["input_ids"], "attention_mask": batch["attention_mask"]})
    torch.testing.assert_close(network(other, batch["attention_mask"]), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network(wider, wider_mask), expected[1:3], rtol=1e-4, atol=1e-4)


def test_a_longer_text_is_cut_at_its_end(trunk):
    model = make_reward(trunk)
    text = ("酒店很好" * LIMIT)[: LIMIT - 2]
    cut, longer, other = model.scores([text, text + "差" * 9, "差" * 9 + text]).tolist()
    assert longer == pytest.approx(cut, rel=1e-4) and other != pytest.approx(cut, rel=1e-2)
    assert model.max_length == LIMIT


def test_scores_and_rewards_are_without_dropout_and_gradient(trunk):
    rates = {"gpt2": "resid_pdrop", "llama": "attention_dropout", "bert": "hidden_dropout_prob"}
    dropout = {rates[trunk]: 0.5}
    network = make_bert(id2label={0: "r"}, **dropout) if trunk == "bert" else DecoderScorer(MAKERS[trunk](**dropout))
    model = RewardModel(network.train(), Tokenizer(VOCAB), device="cpu")
    first = model(TEXTS)
    model.train()
    assert torch.equal(model(TEXTS), first) and not first.requires_grad
    assert model.training  # as it was
    assert not torch.equal(model.score([[102, 110, 103]] * 99).std(), torch.tensor(0.0))  # training has its dropout


def test_score_has_a_gradient_into_every_parameter(trunk):
    model = make_reward(trunk)
    model.score([model.tokenizer.encode(text, LIMIT) for text in TEXTS]).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ---- as a reward function -------------------------------------------------------------------------------------------


def test_it_is_a_reward_function_of_whole_texts(trunk):
    model = make_reward(trunk)
    prompts, responses = ["酒店", "早餐"], ["很好", "太差"]
    expected = model(["酒店很好", "早餐太差"])
    assert expected.shape == (2,) and expected.dtype == torch.float32 and expected.device.type == "cpu"
    assert torch.equal(call_reward(model, prompts, responses), expected.double())


def test_no_texts_no_scores(trunk):
    assert make_reward(trunk)([]).shape == (0,)


def test_a_single_text_is_refused(trunk):
    with pytest.raises(ValueError, match="texts must be a list of texts"):
        make_reward(trunk)("很好")


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_below_one_is_refused(trunk, batch_size):
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        make_reward(trunk, batch_size=batch_size)


def test_a_classifier_of_several_labels_is_refused():
    with pytest.raises(ValueError, match="a reward model has one label"):
        RewardModel(make_bert(), Tokenizer(VOCAB))


def test_models_and_tokenizers_of_another_library_are_refused_by_name():
    for attempt, message in [
        (lambda: RewardModel(torch.nn.Linear(1, 1), Tokenizer(VOCAB)), r"got a Linear: RewardModel\.from_pretrained"),
        (lambda: RewardModel(DecoderScorer(make_gpt2()), None), r"must be a minirlhf\.Tokenizer, got a NoneType"),
        (lambda: DecoderScorer(torch.nn.Linear(1, 1)), "got a torch Linear: save it with"),
    ]:
        with pytest.raises(ValueError, match=message):
            attempt()


def test_a_vocabulary_of_another_size_is_refused():
    with pytest.raises(ValueError, match=f"vocabulary has {len(VOCAB) + 1} tokens.*made for {len(VOCAB)}"):
        RewardModel(DecoderScorer(make_gpt2()), Tokenizer([*VOCAB, "extra"]))


# ---- normalisation --------------------------------------------------------------------------------------------------


def test_rewards_of_the_reference_texts_have_mean_0_and_standard_deviation_1(trunk):
    model = make_reward(trunk)
    raw = model.scores(TEXTS)
    assert torch.equal(model(TEXTS), raw)  # none yet
    model.normalise(TEXTS)
    rewards = model(TEXTS).double()
    assert rewards.mean().item() == pytest.approx(0, abs=1e-6)
    assert rewards.std(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert torch.equal(model.scores(TEXTS), raw)
    torch.testing.assert_close(model(["新的", *TEXTS])[1:], rewards.float(), rtol=1e-4, atol=1e-4)  # by these texts
    model.normalise(TEXTS)  # from the scores: a second time changes nothing
    torch.testing.assert_close(model(TEXTS), rewards.float())


@pytest.mark.parametrize("texts", [[], ["好"], ["好", "好"]])
def test_texts_without_spread_are_refused_and_change_nothing(trunk, texts):
    model = make_reward(trunk)
    model.normalise(TEXTS)
    before = model.mean, model.std
    with pytest.raises(ValueError, match=f"scores of {len(texts)} texts have no spread"):
        model.normalise(texts)
    assert (model.mean, model.std) == before


# ---- folders --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_bit_equal(trunk, tmp_path):
    model = make_reward(trunk)
    model.normalise(TEXTS)
    model.save_pretrained(tmp_path / "a")
    loaded = RewardModel.from_pretrained(str(tmp_path / "a"), device="cpu", batch_size=model.batch_size)
    assert (loaded.mean, loaded.std) == (model.mean, model.std) != (0.0, 1.0)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in loaded.state_dict().items())
    assert torch.equal(loaded(TEXTS), model(TEXTS)) and not loaded.training
    assert {"config.json", "model.safetensors", "vocab.txt"} <= {p.name for p in (tmp_path / "a").iterdir()}
    assert "RewardModel.from_pretrained" in (tmp_path / "a" / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@torch.no_grad()
def test_transformers_has_the_same_scores(trunk, tmp_path):
    model = make_reward(trunk)
    model.normalise(TEXTS)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs, found = TheirModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found.values()), found  # nothing missing, unexpected or of another shape
    assert theirs.config.num_labels == 1 and theirs.config.id2label == {0: "reward"}
    assert theirs.config.pad_token_id == model.tokenizer.pad_id
    assert theirs.config.reward_normalisation == {"mean": model.mean, "std": model.std}
    logits = theirs.eval()(**padded(TEXTS)).logits
    assert logits.shape == (len(TEXTS), 1)
    assert_relatively_close(model.scores(TEXTS), logits[:, 0], 1e-5)
    ids = AutoTokenizer.from_pretrained(tmp_path)(TEXTS, truncation=True)["input_ids"]
    assert ids == model.tokenizer.encode_batch(TEXTS, LIMIT) and max(map(len, ids)) == LIMIT
    theirs.save_pretrained(tmp_path / "theirs")
    model.tokenizer.save_pretrained(tmp_path / "theirs")
    back = RewardModel.from_pretrained(tmp_path / "theirs", device="cpu")
    assert (back.mean, back.std) == (model.mean, model.std) and torch.equal(back(TEXTS), model(TEXTS))
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in back.state_dict().items())


@torch.no_grad()
def test_what_transformers_wrote_is_loaded(trunk, tmp_path):
    small = dict(vocab_size=len(VOCAB), num_labels=1, pad_token_id=0)
    if trunk == "gpt2":
        config = TheirGPT2Config(n_positions=LIMIT, n_embd=16, n_layer=1, n_head=2, **small)
        theirs = GPT2ForSequenceClassification(config)
        assert not hasattr(theirs.score, "bias") or theirs.score.bias is None
    elif trunk == "llama":
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        theirs = LlamaForSequenceClassification(LlamaConfig(max_position_embeddings=LIMIT, **sizes, **small))
    else:
        sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
        theirs = BertForSequenceClassification(TheirBertConfig(max_position_embeddings=LIMIT, **sizes, **small))
    generator = torch.Generator().manual_seed(0)
    for p in theirs.parameters():
        p.add_(0.3 * torch.randn(p.shape, generator=generator))
    theirs.eval().save_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    model = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert (model.mean, model.std) == (0.0, 1.0)
    expected = theirs(**padded(TEXTS)).logits[:, 0]
    assert expected.std() > 0.01
    assert_relatively_close(model(TEXTS), expected, 1e-5)


def test_fp16_folders_load_in_fp32(trunk, tmp_path):
    model = make_reward(trunk)
    model.save_pretrained(tmp_path, torch.float16)
    loaded = RewardModel.from_pretrained(tmp_path, device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert load_file(tmp_path / "model.safetensors").popitem()[1].dtype == torch.float16
    torch.testing.assert_close(loaded(TEXTS), model(TEXTS), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("part", ["weights", "vocabulary", "config"])
def test_a_failed_save_leaves_the_old_model_whole(trunk, tmp_path, monkeypatch, part):
    """Also its normalisation: that of new weights would be nonsense with the old ones."""
    old, new = make_reward(trunk), make_reward(trunk, seed=1)
    old.normalise(TEXTS)
    old.save_pretrained(tmp_path / "a")
    if part == "weights":
        next(new.parameters()).data[0] = 1e6  # more than fp16 holds
    else:
        target, name = (Tokenizer, "save_pretrained") if part == "vocabulary" else (model_folder, "write_json")
        monkeypatch.setattr(target, name, lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises((OSError, ValueError), match=r"disk full|cannot hold"):
        new.save_pretrained(tmp_path / "a", torch.float16)
    assert torch.equal(RewardModel.from_pretrained(tmp_path / "a", device="cpu")(TEXTS), old(TEXTS))
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_new_model_on_the_trunk_of_a_folder(trunk, tmp_path):
    given = make_bert() if trunk == "bert" else MAKERS[trunk]()
    given.save_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    first, same, other = (RewardModel.from_trunk(tmp_path, seed, device="cpu") for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    kept = first.network.bert if trunk == "bert" else first.network.decoder
    trunk_of = given.bert if trunk == "bert" else given
    assert all(torch.equal(x, trunk_of.state_dict()[name]) for name, x in kept.state_dict().items())
    assert torch.equal(first(TEXTS), same(TEXTS)) and not torch.equal(first(TEXTS), other(TEXTS))
    assert not first.training and first(TEXTS).std() > 0


@pytest.mark.parametrize("problem_type", ["regression", "single_label_classification", "multi_label_classification"])
def test_the_loss_it_was_trained_by_does_not_decide_whether_it_loads(trunk, tmp_path, problem_type):
    model = make_reward(trunk)
    model.save_pretrained(tmp_path)
    rewrite_config(tmp_path, problem_type=problem_type)
    for load in (RewardModel.from_pretrained, load_scorer):
        assert torch.equal(load(tmp_path, device="cpu")(TEXTS), model(TEXTS))


def test_a_gpt2_whose_lm_head_was_untied_is_a_reward_model(tmp_path):
    model = make_reward("gpt2")
    model.save_pretrained(tmp_path)
    rewrite_config(tmp_path, tie_word_embeddings=False)
    assert torch.equal(RewardModel.from_pretrained(tmp_path, device="cpu")(TEXTS), model(TEXTS))


def test_the_new_head_of_a_gpt2_starts_with_scores_of_about_one():
    gpt2 = make_gpt2()
    weights = torch.cat([DecoderScorer(gpt2, seed).score.weight[0] for seed in range(300)])
    assert weights.std().item() == pytest.approx(33**-0.5, rel=0.03)
    assert weights.mean().item() == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("normalisation", [
    [], "x", {}, {"mean": 0.0}, {"mean": 0.0, "std": 0}, {"mean": 0.0, "std": -1.0}, {"mean": None, "std": 1.0},
    {"mean": float("nan"), "std": 1.0}, {"mean": 0.0, "std": float("inf")}, {"mean": True, "std": 1.0},
    {"mean": 10**400, "std": 1.0}, {"mean": 0.0, "std": 10**400},
])  # fmt: skip
def test_a_damaged_normalisation_is_named(trunk, tmp_path, normalisation):
    make_reward(trunk).save_pretrained(tmp_path)
    rewrite_config(tmp_path, reward_normalisation=normalisation)
    with pytest.raises(ValueError, match=r"config.json(: reward_normalisation must have| is not valid JSON)"):
        RewardModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("load", [RewardModel.from_pretrained, RewardModel.from_trunk])
def test_other_folders_are_refused_by_name(tmp_path, load):
    with pytest.raises(FileNotFoundError, match=r"nowhere"):
        load(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "phi3"}')
    with pytest.raises(ValueError, match="'phi3' model; the trunk of a reward model is one of bert, gpt2, llama"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config.json lacks model_type, which says what the trunk is: bert, gpt2"):
        load(tmp_path)


def test_a_model_without_a_scalar_head_is_refused(trunk, tmp_path):
    (make_bert() if trunk == "bert" else MAKERS[trunk]()).save_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"missing score.weight|one label"):
        RewardModel.from_pretrained(tmp_path)


def test_a_bert_reward_is_no_sentiment(tmp_path):
    make_reward("bert").save_pretrained(tmp_path)
    assert len(BertClassifier.from_pretrained(tmp_path).config.labels) == 1
    for options in ({}, {"positive_label": "reward"}):  # whose softmax would be 1 whatever the text
        with pytest.raises(ValueError, match="the only label 'reward' gives it to every text; a reward model of one"):
            SentimentReward.from_pretrained(tmp_path, **options)
