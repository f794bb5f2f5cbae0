"""Processes that train together, forked as in `lives`, and the cases that one and several of them must agree on."""

import contextlib
import errno
import io
import os
import pickle
import runpy
import shutil
import signal
import socket
import sys
import time
import traceback

import lives
import torch
from lives import context, process

from conftest import VOCAB, FewSamples, exact, make_bert, make_gpt2, make_llama
from minirlhf import (
    ActorCritic,
    DPOTrainer,
    EvaluationConfig,
    PPOTrainer,
    RewardModel,
    SamplingConfig,
    Tokenizer,
    best_of_n,
    evaluate,
)
from minirlhf.device.parts import full, is_part
from minirlhf.device.processes import processes
from minirlhf.evaluation import evaluate as evaluate_module
from minirlhf.evaluation import results
from minirlhf.models import prepared
from minirlhf.rewards.reward_model import DecoderScorer
from minirlhf.rl.presets import METHODS, PRESETS
from minirlhf.runs import run as run_module
from minirlhf.runs.checkpoint import restore_checkpoint, save_checkpoint
from minirlhf.runs.run import Run
from minirlhf.supervised.reward_modelling import RewardModelTrainer, RewardTrainingConfig, evaluate_rankings
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, perplexity
from minirlhf.text.demonstrations import Demonstration
from minirlhf.text.preferences import Ranking

PROMPTS = ["酒店很好", "w", "房间干净", "早餐", "wifi太差"]
EOS = VOCAB.index("##a")
SIZES = dict(n_embd=16, n_layer=1, n_head=2)
PPO = dict(steps=24, batch_size=8, minibatch_size=4, forward_batch_size=2, gen_len=5, ppo_epochs=2, lr=1e-3,
           device="cpu", adam_eps=1e-5, top_p=0.9, eos_token_id=EOS)  # fmt: skip

# ---- launching ------------------------------------------------------------------------------------------------------


def start(size, target, *arguments, **environment):
    """`target(*arguments)` in each of `size` processes, as torchrun would start them; (process, pipe) of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size,
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **environment}  # fmt: skip
        started.append((process(_of_rank, names, there, target, arguments), here))
        there.close()
    return started


def outcomes(started, seconds=200):
    """What each process returned; of one that raised, the error's type and text; None of one that was killed."""
    found = []
    for each, pipe in started:
        try:
            found.append(pickle.loads(pipe.recv_bytes()) if pipe.poll(seconds) else "still running")
        except EOFError:
            found.append(None)
        each.join(seconds)
    return found


def together(size, target, *arguments, **environment):
    """The outcome of each of `size` processes."""
    return outcomes(start(size, target, *arguments, **environment))


def _of_rank(environment, pipe, target, arguments):
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        pipe.send_bytes(pickle.dumps(target(*arguments)))  # tensors as bytes: the process may end at once
    except BaseException as error:
        if os.environ.get("SHOW_ERRORS"):
            traceback.print_exc()
        pipe.send_bytes(pickle.dumps((type(error).__name__, str(error))))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# ---- what they compute ----------------------------------------------------------------------------------------------


def reward(texts):
    return [len(set(text)) / 8 for text in texts]


def reporting(texts):
    """With a metric, which is the mean over the rows of all processes."""
    return reward(texts), {"length": sum(map(len, texts)) / len(texts)}


def coarse(texts):
    """Mostly equal in a group, so that few groups are drawn again, fewer than there are processes."""
    return [float(len(set(text)) > 5) for text in texts]


def by_token(prompts, responses, tokens):
    return [[len(piece) / 4 for piece in row] for row in tokens]


def models(dtype=torch.float64, make=make_gpt2):
    decoders = [make(seed, scale=4.0, **SIZES) for seed in (0, 1)]
    policy, reference = [exact(d) for d in decoders] if dtype == torch.float64 else decoders
    policy = ActorCritic(policy)
    with torch.no_grad():
        policy.value_head.summary.weight.normal_(generator=torch.Generator().manual_seed(0))
    return policy.to(dtype), reference, Tokenizer(VOCAB)


def weights(module):
    return {name: full(p.detach()).clone() for name, p in module.named_parameters()}


def ppo(reward=reward, dtype=torch.float64, make=make_gpt2, **settings):
    """Three steps: weights, tokens, texts and statistics."""
    trainer, steps = PPOTrainer(*models(dtype, make), **{**PPO, **settings}), []
    trainer.train(PROMPTS, reward, lambda rollout, stats: steps.append((rollout.tokens, rollout.texts, stats)))
    tokens, texts, stats = zip(*steps, strict=True)
    return dict(weights=weights(trainer.policy), tokens=tokens, texts=texts, stats=stats)


def own_tokens():
    """Steps on queries and responses that were sampled elsewhere."""
    policy, reference, tokenizer = models()
    trainer, generator = PPOTrainer(policy, reference, tokenizer, **PPO), torch.Generator().manual_seed(0)
    lengths = [(3, 4), (1, 1), (6, 2), (2, 7), (4, 5)]
    pairs = [[torch.randint(5, len(VOCAB), (n,), generator=generator) for n in pair] for pair in lengths]
    queries, responses = zip(*pairs, strict=True)
    stats = [trainer.step(queries, responses, [0.5, -1.0, 2.0, 0.0, 1.0])]
    return dict(weights=weights(trainer.policy), stats=stats)


TEXTS = ["酒店很好", "房间干净，服务很好。", Demonstration("早餐", "一般"), "wifi太差，非常失望", "前台满意",
         "hello world", "位置很好，推荐", "脏"]  # fmt: skip


def sft(make=make_gpt2, **settings):
    model, losses = exact(make(2, scale=2.0, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **SIZES)), []
    model.checkpoint_activations = "sharding" in settings
    limits = dict(epochs=2, max_length=12, tokens_per_batch=36, device="cpu")
    trainer = SFTTrainer(model, Tokenizer(VOCAB), TEXTS, SFTConfig(**{**limits, **settings}))
    trainer.train(lambda batch, stats: losses.append(stats))
    return dict(weights=weights(model), stats=losses, figures=perplexity(model, Tokenizer(VOCAB), TEXTS, batch_size=3))


def reward_model(network=None, **settings):
    network = network or DecoderScorer(exact(make_llama(3, scale=2.0, **SIZES)))
    model, stats = RewardModel(network, Tokenizer(VOCAB), device="cpu").double(), []
    words = ["酒店很好", "房间干净", "早餐", "脏", "差", "失望", "满意"]
    rankings = [Ranking("位置", tuple(words[i : i + 2 + i % 2])) for i in range(5)]
    config = RewardTrainingConfig(**{**dict(max_length=12, tokens_per_batch=60, device="cpu"), **settings})
    RewardModelTrainer(model, rankings, config).train(lambda batch, told: stats.append(told))
    figures = evaluate_rankings(model, rankings)
    return dict(weights=weights(model), stats=stats, figures=dict(loss=figures.loss, accuracy=figures.accuracy))


def dpo(make=make_gpt2, **settings):
    trained, reference, tokenizer = models(make=make)
    pairs = [dict(prompt=PROMPTS[i % 5], chosen="好" * (1 + i % 3), rejected="脏" * (1 + i % 2)) for i in range(6)]
    limits = dict(epochs=2, batch_size=4, tokens_per_batch=40, max_length=20, lr=1e-3, device="cpu")
    trainer, stats = DPOTrainer(trained.decoder, reference, tokenizer, **{**limits, **settings}), []
    trainer.train(pairs, lambda batch, told: stats.append(told))
    return dict(weights=weights(trainer.model), stats=stats, figures=trainer.evaluate(pairs))


def measured():
    """Best-of-n whose last batch has fewer rows than there are processes, and an evaluation."""
    policy, reference, tokenizer = models()
    drawn = best_of_n(policy, PROMPTS[:3], by_token, 3, tokenizer=tokenizer, gen_len=4, eos_token_id=EOS, batch_size=8,
                      generator=torch.Generator().manual_seed(0))  # fmt: skip
    config = EvaluationConfig(samples=10, gen_len=4, sampling=SamplingConfig(top_p=0.9), best_of=(2,), max_n=2,
                              best_of_prompts=4, resamples=20)  # fmt: skip
    found = evaluate(policy, reference, tokenizer, PROMPTS, reward, second_scorer=by_token, config=config)
    return dict(tokens=[drawn.candidate_scores], texts=[drawn.responses], figures=found.given.summary())


def bert():
    names = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "id2label": {0: "reward"}}
    return make_bert(3, scale=2.0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **names)


class Counter:
    """A reward with a state, which must be asked once for the whole batch."""

    scope = "batch"

    def __init__(self):
        self.rows = []

    def __call__(self, texts):
        self.rows.append(len(texts))
        return [value + len(self.rows) for value in reward(texts)]


def counted():
    count = Counter()
    found = ppo(count, steps=16, ppo_epochs=1)
    assert count.rows == ([8] * 2 if processes().first else [])
    return found


def every_method():
    """A step of each preset without a value head; the weights of all."""
    found = {}
    for name in METHODS:
        preset = {**PRESETS[name], "group_size": 2 if PRESETS[name].get("group_size", 1) > 1 else 1}
        one = ppo(**{**preset, "minibatch_size": 4, "steps": 8, "ppo_epochs": 1, "lr": 1e-3})
        found |= {f"{name} {parameter}": value for parameter, value in one["weights"].items()}
    return dict(weights=found)


FULL = dict(sharding="full", precision="fp32")
CASES = {
    "PPO": ppo,
    "every method": every_method,
    "fp32": lambda: ppo(dtype=torch.float32, steps=16, ppo_epochs=1),
    "minibatches smaller than W": lambda: ppo(minibatch_size=1, steps=8, ppo_epochs=1),
    "reward workers": lambda: ppo(reporting, reward_workers=2, steps=8, ppo_epochs=1),
    "uneven": lambda: ppo(reporting, batch_size=7, minibatch_size=5, steps=7, loss_averaging="sequences"),
    "exact KL": lambda: ppo(make=make_llama, whiten_scope="minibatch", kl_estimator="exact", steps=16, ppo_epochs=1),
    "micro-batches": lambda: ppo(by_token, loss_averaging="micro_batches", target_kl=1e-9, steps=8),
    "a reward that counts": counted,
    "RLOO": lambda: ppo(make=make_llama, advantages="rloo", group_size=2, steps=16, ppo_epochs=1),
    "flat groups drawn again": lambda: ppo(
        coarse, advantages="grpo", group_size=2, drop_flat_groups=2, steps=16, ppo_epochs=1
    ),
    "own tokens": own_tokens,
    "SFT": sft,
    "SFT, packed": lambda: sft(make_llama, packing=True, accumulation=2, epochs=1),
    "reward model": reward_model,
    "DPO": dpo,
    "DPO, packed": lambda: dpo(make_llama, packing=True, batch_size=1, epochs=1),
    "measured": measured,
    "sharded": lambda: ppo(**FULL, checkpoint_activations=True, steps=16),
    "sharded, exact KL": lambda: ppo(
        make=make_llama, **FULL, kl_estimator="exact", whiten_scope="minibatch", steps=16, ppo_epochs=1
    ),
    "sharded, uneven": lambda: ppo(**FULL, batch_size=7, minibatch_size=3, steps=7, advantages="reinforce"),
    # With micro-batches of one row and of several.
    "SFT, sharded": lambda: sft(**FULL, tokens_per_batch=12, accumulation=2),
    "DPO, sharded": lambda: dpo(make_llama, **FULL, batch_size=5),
    "reward model, sharded": lambda: reward_model(**FULL, tokens_per_batch=36),
    "BERT, sharded": lambda: reward_model(bert(), **FULL, tokens_per_batch=36),
}
OF_FOUR = ("PPO", "fp32", "minibatches smaller than W", "uneven", "RLOO", "SFT", "reward model", "DPO", "sharded",
           "sharded, uneven", "SFT, sharded", "DPO, sharded", "reward model, sharded")  # fmt: skip


def compute(names):
    return {name: CASES[name]() for name in names}


# ---- scripts --------------------------------------------------------------------------------------------------------


def scripts(commands):
    """Run scripts one after the other, as users start them: by name, the error of each, or None, and what it prints."""
    evaluate_module.EvaluationConfig = results.EvaluationConfig = FewSamples
    found = {}
    for name, (path, *arguments) in commands.items():
        sys.argv, sys.path[:0], error = [str(path), *map(str, arguments)], [str(path.parent)], None
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(io.StringIO()):
            try:
                runpy.run_path(str(path), run_name="__main__")
            except SystemExit as end:
                error = end.code
        found[name] = error, shown.getvalue()
    return found


# ---- what goes wrong ------------------------------------------------------------------------------------------------


def told(function, *arguments, **named):
    """The type and the text of the error that a call raises."""
    try:
        function(*arguments, **named)
    except Exception as error:
        return type(error).__name__, str(error)
    return "no error", ""


def trainer(**settings):
    return PPOTrainer(*models(torch.float32), **{**PPO, **settings})


def faults(folder):
    """Errors by name, as this process meets them; each of them on one process only."""
    rank, found = processes().rank, {}
    here = trainer(max_bad_steps=2)
    before = here.generators["sampling"].get_state()

    def raises(texts):
        raise KeyError("no score") if rank else AssertionError("the other one fails")

    found["reward"] = told(here.collect, PROMPTS, lambda texts: raises(texts) if rank else reward(texts))
    found["scores"] = told(here.collect, PROMPTS, lambda texts: reward(texts)[rank:])
    found["prompts"] = told(here.collect, [PROMPTS[0], "wx"[rank], PROMPTS[2]], reward)
    found["number of prompts"] = told(here.collect, PROMPTS[rank:], reward)
    assert torch.equal(before, here.generators["sampling"].get_state())
    found["queries"] = told(here.step, [[6, 7], [8]], [[9], [9, 10 + rank]], [0.0, 1.0])
    found["too few rows"] = told(trainer, batch_size=2, minibatch_size=2, group_size=2)
    found["config"] = told(trainer, lr=1e-3 * (1 + rank))
    version = prepared.__version__
    prepared.__version__ = f"{version}.{rank}"
    found["version"] = told(trainer)
    prepared.__version__ = version
    found["scope"] = told(here.collect, PROMPTS, type("Odd", (Counter,), {"scope": "rank"})())
    found["out of step"] = told(processes().gather, f"part {rank}", None)

    other = make_gpt2(5 + rank, scale=4.0, **SIZES)  # other weights on each: those of the first one count
    policy = PPOTrainer(other, *models(torch.float32)[1:], **PPO).policy
    found["weights"] = torch.cat([p.detach().flatten() for p in policy.parameters()])

    loss = here._loss
    here._loss = lambda batch: (loss(batch)[0] * (float("nan") if rank else 1.0), loss(batch)[1])
    weights_before = weights(here.policy)
    found["NaN"] = told(here.step, here.collect(PROMPTS[:4], reward))
    assert all(torch.equal(p, weights_before[name]) for name, p in here.policy.named_parameters())

    os.chdir(folder / str(rank))
    found["not shared"] = told(Run.start, "run", lives.new_trainer(), {})
    assert not rank or not os.path.exists("run")
    os.chdir(folder)
    found["full disk"] = told(run_with_a_full_disk, folder / "full", rank)
    return found


def sharded(folder):
    """A sharded run that is stopped after step 3 and resumed; what each process holds of the model, and figures."""
    found, settings = {}, dict(sharding="full", precision="fp32")
    with Run.start(folder / "run", lives.new_trainer(**settings), {}) as run:
        here = run.trainer
        found["held"] = sum(p.to_local().numel() for p in here.policy.parameters())
        here.train(lives.PROMPTS, reward, run.record, stop_when=lambda stats: here.iteration == 3)
        found["moments"] = {x.device_mesh.size() for x in here.state_dict()["tensors"].values() if is_part(x)}
    if processes().first:
        shutil.copytree(folder / "run", folder / "copy", symlinks=True)
    other = lives.new_trainer(**settings)  # as torchrun --max-restarts makes it
    restore_checkpoint(other, folder / "run" / "checkpoints" / "step-000003")
    assert all(torch.equal(x, weights(here.policy)[name]) for name, x in weights(other.policy).items())
    with Run.resume(folder / "run", lives.reference()) as run:
        run.trainer.train(lives.PROMPTS, reward, run.record)
        run.trainer.save_pretrained(folder / "policy")
        found["done"], found["weights"] = run.trainer.iteration, weights(run.trainer.policy)
    # In 16 bits the copy that samples and scores computes what the parts compute.
    bits = trainer(sharding="full", precision="bf16", checkpoint_activations=True)
    found["ratio error"] = bits.step(bits.collect(PROMPTS[:4], reward))["ppo/policy/first_ratio_error"]
    return found


def run_with_a_full_disk(folder, rank):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Run.start(folder, lives.new_trainer(), {}) as run:
        if not rank:
            run_module.save_checkpoint = full
        try:
            run.trainer.train(lives.PROMPTS, reward, run.record)
        finally:
            run_module.save_checkpoint = save_checkpoint


def live(folder, kill=None, stop=None, torchrun=None):
    """Begin or resume the run of `lives` and bring it to its end; (rank, step): where to kill or stop a process.

    torchrun: its number, which is stopped in the place of the process.
    """
    with lives.go_on(folder) as run:
        here = run.trainer

        def scored(texts):
            for number, place in ((signal.SIGKILL, kill), (signal.SIGTERM, stop)):
                if place == (processes().rank, here.iteration + 1):
                    os.kill(os.getpid() if number == signal.SIGKILL else torchrun or os.getpid(), number)
                    time.sleep(2.0 if torchrun else 0.0)  # until torchrun has told all
            return reward(texts)

        here.train(lives.PROMPTS, scored, run.record)
    return here.iteration
