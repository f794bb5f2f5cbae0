"""What needs a GPU, and what `gpu` does without one. The CPU is the oracle, or the plain way on the same GPU."""

import contextlib
import copy
import math
import subprocess
import sys

import pytest
import torch
from small_trainer import DEFAULTS, batch, reward, weights
from test_generation import GREEDY, PROMPTS, TRUNCATED, varied
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import VOCAB, make_gpt2
from minirlhf import ActorCritic, PPOConfig, PPOTrainer, SamplingConfig, Tokenizer, generate
from minirlhf.device.gpu import to_device
from minirlhf.device.precision import Precision
from minirlhf.generation import generate as samples
from minirlhf.generation.generate import CHECK_EVERY
from minirlhf.models.static_decode import GraphedDecoder
from minirlhf.rl.advantages import with_advantages
from minirlhf.rl.logprobs import response_logprobs
from minirlhf.rl.shaping import with_token_rewards
from minirlhf.runs.checkpoint import load_checkpoint, save_checkpoint
from minirlhf.supervised.loop import FitConfig

EVEN_PROMPTS = ["酒店", "房间", "早餐", "位置"]
SMALL = dict(n_embd=64, n_layer=2, n_head=4)


def needs_gpu(test):
    absent = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    return pytest.mark.gpu(absent(test))


@contextlib.contextmanager
def without_waiting():
    """Within it whatever waits for the GPU raises RuntimeError."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def cuda_model(scale=6.0):
    return varied(scale=scale).cuda()


def seeded(seed=0):
    return torch.Generator("cuda").manual_seed(seed)


def reduced(enabled=True):
    return torch.autocast("cuda", torch.bfloat16, enabled=enabled)


def make_trainer(**settings):
    policy = ActorCritic(make_gpt2(0, scale=3.0, **SMALL))
    with torch.no_grad():
        policy.value_head.summary.weight.normal_(generator=torch.Generator().manual_seed(0))
    settings = {**DEFAULTS, "device": "cuda", **settings}
    return PPOTrainer(policy, make_gpt2(1, scale=3.0, **SMALL), Tokenizer(VOCAB), **settings)


# ---- transfers ------------------------------------------------------------------------------------------------------


@needs_gpu
def test_a_host_tensor_is_fetched_without_waiting():
    x = torch.arange(2**20)
    torch.ones(1, device="cuda")
    with without_waiting():
        there = to_device(x, torch.device("cuda"))
    assert there.device.type == "cuda" and torch.equal(there.cpu(), x)
    assert to_device(there, there.device) is there
    with without_waiting(), pytest.raises(RuntimeError, match="synchroniz"):  # the check sees one that waits
        x.cuda()


@needs_gpu
def test_pinned_memory_is_not_taken_back_before_its_copy_is_done():
    tensors = [torch.full((2**18,), float(i)) for i in range(64)]
    torch.cuda._sleep(10**9)  # copies queue behind it
    there = [to_device(x, torch.device("cuda")) for x in tensors]
    assert [x.unique().tolist() for x in there] == [[float(i)] for i in range(64)]


# ---- TF32 -----------------------------------------------------------------------------------------------------------


def test_tf32_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="'tf32' needs a GPU, but the device is cpu"):
        Precision("tf32", torch.device("cpu"))
    assert PPOConfig(precision="tf32").precision == FitConfig(precision="tf32").precision == "tf32"


@needs_gpu
def test_products_are_rounded_to_tf32_only_where_it_was_chosen():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(512, 512, generator=generator) for _ in range(2))
    truth, x, y = a.double() @ b.double(), a.cuda().requires_grad_(), b.cuda()

    def error(product):
        return float((product.detach().cpu().double() - truth).norm() / truth.norm())

    def backward_error(precision):
        x.grad = None
        precision.backward((x @ y).square().sum() / 2)  # its gradient: x y y^T, whose second product is the backward's
        exact = truth @ b.double().T
        return float((x.grad.cpu().double() - exact).norm() / exact.norm())

    exact, rounded = (Precision(name, torch.device("cuda")) for name in ("fp32", "tf32"))
    for precision, least, most in ((exact, 0.0, 1e-5), (rounded, 1e-5, 1e-2), (exact, 0.0, 1e-5)):
        with precision.autocast():
            assert least <= error(x @ y) < most
        assert least <= backward_error(precision) < most
        assert error(x @ y) < 1e-5  # outside


# ---- decoding -------------------------------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7], [9, 120, 4]]])
@pytest.mark.parametrize("sampling", [GREEDY, TRUNCATED, SamplingConfig()])
def test_a_graph_decodes_what_the_plain_way_does(prompts, sampling):
    model, decoder = cuda_model(), GraphedDecoder()
    options = dict(sampling=sampling, keep_sampling_sets=True)
    plain = generate(model, prompts, 20, generator=seeded(), **options)
    graphed = generate(model, prompts, 20, generator=seeded(), graphed=decoder, **options)
    assert decoder.step_for(model, len(prompts), 20).graph is not None
    assert torch.equal(plain.tokens, graphed.tokens) and torch.equal(plain.mask, graphed.mask)
    torch.testing.assert_close(plain.logprobs, graphed.logprobs, atol=1e-3, rtol=0)
    if sampling == GREEDY:
        on_cpu = generate(varied(), prompts, 20, sampling)
        assert torch.equal(on_cpu.tokens, graphed.tokens.cpu())


@needs_gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_a_replay_uses_the_weights_of_the_moment(autocast):
    """Each generation under autocast of its own, whose cache of casts is gone when the next one begins."""
    model, decoder = varied(scale=3.0).cuda(), GraphedDecoder()
    kept = []
    for factor in (1.0, -0.7, 1.3):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(factor)
        with reduced(autocast):
            result = generate(model, PROMPTS * 4, 12, generator=seeded(), graphed=decoder)
            kept.append(decoder.step_for(model, len(PROMPTS) * 4, 12))
        with torch.no_grad(), reduced(autocast):
            scored = response_logprobs(ActorCritic(model, None), result.tokens, result.mask, 12)
        difference = (scored.logprobs - result.logprobs).abs()
        assert difference.mean() < (0.05 if autocast else 1e-3)  # those of other weights are nats away
    assert kept[0] is kept[1] is kept[2] and kept[0].graph is not None


@needs_gpu
@pytest.mark.parametrize("eos", [None, 7])
@pytest.mark.parametrize("sampling", [GREEDY, TRUNCATED, SamplingConfig(0.7), SamplingConfig(1.0, 0, 0.9)])
def test_nothing_waits_for_the_gpu_between_two_tokens(monkeypatch, sampling, eos):
    model, decoder, calls = cuda_model(), GraphedDecoder(), []

    class Watched(samples._Samples):
        """From when the prompts have been read to when the result is looked at."""

        def __init__(self, *arguments):
            super().__init__(*arguments)
            torch.cuda.set_sync_debug_mode("error")

        def finished(self):
            torch.cuda.set_sync_debug_mode("default")
            calls.append(1)
            return super().finished()

    monkeypatch.setattr(samples, "_Samples", Watched)
    with contextlib.ExitStack() as stack:
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        for _ in range(2):  # one that captures, one that replays
            generate(model, PROMPTS, CHECK_EVERY, sampling, eos_token_id=eos, generator=seeded(),
                     keep_sampling_sets=True, graphed=decoder)  # fmt: skip
    assert len(calls) == 2


FAILING_CAPTURE = """
import sys, warnings
sys.path[:0] = sys.argv[1:]
import torch
from minirlhf import generate
from minirlhf.models.static_decode import DecodeStep, GraphedDecoder
from test_generation import GREEDY, PROMPTS, varied

inner = DecodeStep._forward
def waits(self):
    if torch.cuda.is_current_stream_capturing():
        self.new.sum().item()
    return inner(self)

DecodeStep._forward = waits
model, decoder = varied().cuda(), GraphedDecoder()
before = torch.cuda.current_stream()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    seeded = lambda: torch.Generator("cuda").manual_seed(0)
    results = [generate(model, PROMPTS, 8, GREEDY, graphed=decoder, generator=seeded()) for _ in range(2)]
assert sum("without a CUDA graph" in str(w.message) for w in caught) == 1, [str(w.message) for w in caught]
assert torch.cuda.current_stream() == before
plain = generate(model, PROMPTS, 8, GREEDY, generator=seeded())
assert all(torch.equal(result.tokens, plain.tokens) for result in results)
"""


@needs_gpu
def test_a_step_that_waits_cannot_be_captured_and_the_plain_way_is_taken(request):
    """In a process of its own: a capture that failed half-way may leave PyTorch's own generator unusable."""
    tests = request.path.parents[1]
    subprocess.run([sys.executable, "-c", FAILING_CAPTURE, str(tests), str(tests / "generation")], check=True)


# ---- training -------------------------------------------------------------------------------------------------------


def change(trainer, start):
    """All changes of the weights since the start, as one vector on the CPU."""
    return torch.cat([(p.cpu() - start[name]).flatten() for name, p in weights(trainer).items()])


@needs_gpu
@pytest.mark.parametrize(("precision", "statistics", "direction"), [
    ("fp32", 1e-3, 0.9999), ("tf32", 2e-2, 0.999), ("bf16", 0.05, 0.999),
])  # fmt: skip
def test_a_step_is_that_of_the_cpu(precision, statistics, direction):
    on_cpu, on_gpu = make_trainer(device="cpu"), make_trainer(precision=precision)
    start = weights(on_cpu)
    expected, found = on_cpu.step(*batch()), on_gpu.step(*batch())
    for name in ("objective/kl", "objective/entropy", "ppo/loss/value", "ppo/val/mean"):
        assert found[name] == pytest.approx(expected[name], rel=statistics, abs=statistics), name
    ours, theirs = change(on_gpu, start), change(on_cpu, start)
    assert torch.cosine_similarity(ours, theirs, dim=0) > direction
    assert ours.norm() / theirs.norm() == pytest.approx(1, abs=0.05)
    assert found["ppo/skipped_updates"] == 0


@needs_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_update_of_rows_without_padding_waits_for_nothing(precision):
    trainer = make_trainer(precision=precision, top_p=0.9)
    rollout = trainer.collect(EVEN_PROMPTS, reward)
    assert rollout.attention_mask is None  # the lengths are read here
    rewarded, _ = with_token_rewards(rollout, 0.2, trainer.config)
    ready = with_advantages(rewarded, trainer.config)
    trainer._update(ready.rows(torch.tensor([0, 1])))  # the optimizer gets its state
    with without_waiting():
        for rows in ([2, 3], [1, 0]):
            trainer._update(ready.rows(torch.tensor(rows)))


@needs_gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_logits_that_are_not_finite_are_an_error_and_not_the_end_of_the_process(graphs):
    model = cuda_model()
    decoder = GraphedDecoder() if graphs else None
    with torch.no_grad():
        model.ln_f.weight[0] = torch.nan
    with pytest.raises(FloatingPointError, match="cannot sample"):
        generate(model, PROMPTS, 4, TRUNCATED, generator=seeded(), graphed=decoder)
    assert torch.ones(3, device="cuda").sum().item() == 3


@needs_gpu
@pytest.mark.parametrize("settings", [
    {}, dict(precision="bf16"), dict(precision="fp16"), dict(eos_token_id=VOCAB.index("##a")), dict(cuda_graphs=False),
])  # fmt: skip
def test_collecting_and_stepping_on_a_gpu_that_was_found(settings):
    trainer = make_trainer(**{"device": "auto", **settings})
    assert trainer.device.type == "cuda"
    for _ in range(2):
        rollout = trainer.collect(["酒店很好", "w", "房间干净", "早餐"], reward)
        stats = trainer.step(rollout)
    assert math.isfinite(stats["ppo/loss/total"]) and math.isfinite(stats["objective/kl"])
    assert all(p.isfinite().all() for p in trainer.policy.parameters())
    graphs = settings.get("cuda_graphs", True)
    assert (trainer.models.graphed is not None) == graphs
    if graphs:
        assert trainer.models.graphed._step.graph is not None


@needs_gpu
def test_without_padding_flash_attention_is_open_in_decoding_scoring_and_training():
    """With no other kernel allowed: a mask, which the flash kernel does not take, would be an error."""
    trainer = make_trainer(precision="bf16", cuda_graphs=False)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        rollout = trainer.collect(EVEN_PROMPTS, reward)
        trainer.step(rollout)
        with pytest.raises(RuntimeError):
            trainer.collect([*EVEN_PROMPTS[:3], "w很好"], reward)


@needs_gpu
def test_a_resumed_run_goes_on_as_one_that_was_not_cut(tmp_path):
    trainer = make_trainer()
    trainer.step(trainer.collect(EVEN_PROMPTS, reward))
    save_checkpoint(trainer, tmp_path / "saved")
    reference = copy.deepcopy(trainer.reference)
    resumed = load_checkpoint(tmp_path / "saved", reference)
    assert resumed.device.type == "cuda"
    rollouts = [t.collect(EVEN_PROMPTS, reward) for t in (trainer, resumed)]
    assert torch.equal(rollouts[0].tokens, rollouts[1].tokens)
    stats = [t.step(rollout) for t, rollout in zip((trainer, resumed), rollouts, strict=True)]
    assert stats[1]["ppo/loss/total"] == pytest.approx(stats[0]["ppo/loss/total"], rel=1e-3, abs=1e-5)
    for ours, theirs in zip(weights(trainer).values(), weights(resumed).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


@needs_gpu
@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_step_is_that_of_a_plain_one(checkpointed):
    trainers = [make_trainer(compile=on, checkpoint_activations=checkpointed) for on in (False, True)]
    start = weights(make_trainer(device="cpu"))
    stats = [trainer.step(*batch()) for trainer in trainers]
    assert stats[1]["ppo/loss/total"] == pytest.approx(stats[0]["ppo/loss/total"], rel=1e-3, abs=1e-4)
    assert torch.cosine_similarity(*(change(trainer, start) for trainer in trainers), dim=0) > 0.999
    trainers[1].step(trainers[1].collect(EVEN_PROMPTS, reward))  # with a graph beside it
    assert trainers[1].models.graphed._step.graph is not None
    torch.compiler.reset()
