"""Three more questions, each answered by a list of table rows.

scaling: does the cost grow with batch and new tokens, or faster? ragged: what does padding waste, and do rows that
ended still cost? overhead: how much of a step of the default example is not forward, backward or decode?
"""

import gc
import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmark.floor import now
from benchmark.work import PROMPTS, Work, autocast, iteration
from minirlhf import GPT2, BertClassifier, Generation, GraphedDecoder, PPOTrainer, SentimentReward, Tokenizer, generate
from minirlhf.runs.run import Run

Row = dict[str, Any]
END = 5  # id of the token that ends a response in the study of ragged batches, an unused one


def nothing(texts: Sequence[str]) -> list[float]:
    """A reward that takes no time and differs between texts."""
    return [i / len(texts) for i in range(len(texts))]


# ---- scaling --------------------------------------------------------------------------------------------------------


def scaling(work: Work, batches: Sequence[int], new_tokens: Sequence[int], rows: int, repeats: int) -> list[Row]:
    """Seconds of sampling, passes and one epoch of update: over the batch, and over new tokens at a batch of `rows`."""
    table = []
    trainer = work.trainer(ppo_epochs=1)
    for batch in batches:
        table.append({"over": "batch", "batch": batch, "new tokens": work.new_tokens} | timed(trainer, batch, repeats))
    for new in new_tokens:
        del trainer
        gc.collect()
        trainer = work.trainer(ppo_epochs=1, gen_len=new)
        table.append({"over": "new tokens", "batch": rows, "new tokens": new} | timed(trainer, rows, repeats))
    return table


def timed(trainer: PPOTrainer, batch: int, repeats: int) -> dict[str, float]:
    """Medians over `repeats` iterations, after a warm-up iteration that also creates the optimizer state.

    The warm-up batch is small, except on a GPU, where a CUDA graph is captured for a fixed number of rows.
    """

    def measure(rows: int) -> dict[str, float]:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(rows // trainer.config.group_size)]
        samples = iteration(trainer, prompts, nothing, "")
        kept = {s.phase: s for s in samples if s.phase in ("generate", "passes", "update")}
        return {f"{name} s": s.seconds for name, s in kept.items()} | {"peak MB": samples[-1].peak_mb or 0.0}

    least = trainer.config.group_size
    measure(max(least, batch // 8) if trainer.models.graphed is None else batch)
    runs = [measure(batch) for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def exponent(xs: Sequence[float], ys: Sequence[float]) -> float:
    """The slope of log y over log x by least squares: 1 is linear, 2 quadratic. NaN for fewer than two sizes."""
    if len(set(xs)) < 2:
        return math.nan
    return statistics.linear_regression([math.log(x) for x in xs], [math.log(y) for y in ys]).slope


# ---- ragged batches -------------------------------------------------------------------------------------------------


def ragged(work: Work, repeats: int, shortest: int = 2, longest: int = 60) -> list[Row]:
    """Batches of 2 to 60 tokens against full ones of 60: the time over what the share of real tokens would cost."""
    lengths = [shortest + i * (longest - shortest) // max(work.batch - 1, 1) for i in range(work.batch)]
    lengths = [lengths[i] for i in torch.randperm(work.batch, generator=torch.Generator().manual_seed(0)).tolist()]
    full = [longest] * work.batch
    trainer = work.trainer(ppo_epochs=1)
    reward = work.reward_function()
    vocabulary = [char for char in trainer.tokenizer.vocab if "\u4e00" <= char <= "\u9fff"]

    def texts(sizes: Sequence[int]) -> list[str]:  # with [CLS], so many tokens
        return [
            "".join(vocabulary[(7 * i + 13 * t) % len(vocabulary)] for t in range(n - 1)) for i, n in enumerate(sizes)
        ]

    def prompts(sizes: Sequence[int]) -> dict[str, float]:
        samples = {s.phase: s.seconds for s in iteration(trainer, texts(sizes), reward, "")}
        return {name: samples[name] for name in ("generate", "score", "passes", "update")}

    def responses(sizes: Sequence[int]) -> dict[str, float]:
        ids = [torch.tensor(trainer.tokenizer.encode_prompt(text)) for text in texts([n + 1 for n in sizes])]
        queries, answers = [row[:1].repeat(3) for row in ids], [row[1:] for row in ids]
        start = now(trainer.device)
        trainer.step(queries, answers, nothing(answers))
        return {"step": now(trainer.device) - start}

    new = work.new_tokens
    if trainer.models.graphed is not None:
        prompts(full)  # captures the graph for so many rows
    table = compared("prompts", prompts, lengths, full, [n + new for n in lengths], [n + new for n in full], repeats)
    table += compared("responses", responses, lengths, full, [n + 3 for n in lengths], [n + 3 for n in full], repeats)
    return table + [ended(work, longest, repeats)]


def compared(
    what: str, measure: Callable[[Sequence[int]], dict[str, float]], lengths: Sequence[int], full: Sequence[int],
    real: Sequence[int], most: Sequence[int], repeats: int,
) -> list[Row]:  # fmt: skip
    """A row a phase; ragged and full in turns. real, most: the tokens of each row, of which the shares are taken."""
    runs: dict[str, list[dict[str, float]]] = {"ragged": [], "full": []}
    measure(lengths[: max(1, len(lengths) // 8)])  # warms up
    for _ in range(repeats):
        for name, sizes in (("ragged", lengths), ("full", full)):
            runs[name].append(measure(sizes))
    share = sum(real) / sum(most)
    return [
        share_row(f"{what} of {min(lengths)} to {max(lengths)} tokens: {phase}",
                  *(statistics.median(run[phase] for run in runs[name]) for name in runs), share)
        for phase in runs["full"][0]
    ]  # fmt: skip


def share_row(what: str, seconds: float, full: float, share: float) -> Row:
    return {"what": what, "s": seconds, "full batch s": full, "real tokens' share": share,
            "times its share": seconds / (full * share)}  # fmt: skip


def ended(work: Work, longest: int, repeats: int) -> Row:
    """Sampling that ends at random against sampling that does not end, both from a policy that ends often."""
    policy = ending_policy(work.gpt2(), chance=2 / longest).to(work.device)
    tokenizer, device = work.tokenizers()[0], torch.device(work.device)
    prompts = [tokenizer.encode_prompt(prompt) for prompt in work.prompts]
    times: dict[int | None, list[float]] = {END: [], None: []}
    real: list[int] = []
    graphed = GraphedDecoder() if device.type == "cuda" and work.ppo().cuda_graphs else None

    def sampled_with(end: int | None, seed: int) -> Generation:
        generator, sampling = torch.Generator(device).manual_seed(seed), work.ppo().sampling
        with autocast(device, work.precision):
            return generate(policy, prompts, longest, sampling, eos_token_id=end, generator=generator, graphed=graphed)

    if graphed is not None:
        sampled_with(None, 0)  # captures the graph
    for i in range(repeats):
        for end in times:
            start = now(device)
            sampled = sampled_with(end, i)
            times[end].append(now(device) - start)
            if end is not None:
                real.append(int(sampled.response_mask.sum()))
    share = statistics.mean(real) / (len(prompts) * longest)
    cost = {end: statistics.median(seconds) for end, seconds in times.items()}
    return share_row(f"responses that end at random, at most {longest} tokens: generate", cost[END], cost[None], share)


@torch.no_grad()
def ending_policy(policy: GPT2, chance: float) -> GPT2:
    """The random policy, changed to sample the token END with about this probability wherever it is.

    A bias of the last LayerNorm in one direction, which the embeddings of other tokens hardly have.
    """
    size = math.log(chance / (1 - chance) * (policy.config.vocab_size - 1))  # of the logit, others being about 0
    policy.wte.weight[:, 0] = 0.0
    policy.wte.weight[END] = 0.0
    policy.wte.weight[END, 0] = 1.0
    policy.ln_f.weight[0], policy.ln_f.bias[0] = 0.0, size
    return policy


# ---- overhead -------------------------------------------------------------------------------------------------------


def overhead(repeats: int, device: str = "cpu", iterations: int = 5, **changes: Any) -> list[Row]:
    """A step of PPO with a value head, as in the example with `--algorithm ppo`, against its bare arithmetic.

    Each repeat is so many iterations with their records and saves. changes: of the example's settings.
    """
    from minirlhf.rl.presets import starter_run
    from shared import POLICY, REWARD

    reward = SentimentReward.from_pretrained(REWARD, device=device)
    settings = {**starter_run("ppo"), "device": device, **changes}
    trainer = PPOTrainer(GPT2.from_pretrained(POLICY), POLICY, Tokenizer.from_pretrained(POLICY), **settings)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(trainer.config.batch_size)]
    bare = Bare(trainer, reward.model, prompts)
    whole: dict[str, list[float]] = {}
    parts: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as parent, Run.start(f"{parent}/run", trainer, {}) as run:
        for i in range(repeats * iterations + 1):
            for times, found in ((whole, default_step(run, prompts, reward)), (parts, bare.step())):
                for name, seconds in found.items() if i else ():  # the first warms up
                    times.setdefault(name, []).append(seconds)
    rows = []
    for name in whole:
        # The mean of what is recorded: one in five writes a checkpoint.
        seconds = statistics.mean(whole[name]) if name == "record" else statistics.median(whole[name])
        rows.append({"phase": name, "s": seconds, "bare s": statistics.median(parts.get(name, [0.0]))})
    rows.append({"phase": "step of the default run"} | {n: sum(row[n] for row in rows) for n in ("s", "bare s")})
    return [{**row, "times bare": row["s"] / row["bare s"] if row["bare s"] else None} for row in rows]


def default_step(run: Run, prompts: Sequence[str], reward: SentimentReward) -> dict[str, float]:
    """What `positive_reviews.py` does in an iteration, in seconds a phase."""
    trainer = run.trainer
    start = now(trainer.device)
    rollout = trainer.collect(prompts, reward)
    collected = now(trainer.device)
    stats = trainer.step(rollout)
    stepped = now(trainer.device)
    run.record(rollout, stats)
    recorded = now(trainer.device)
    generate, score, passes = (rollout.seconds[phase] for phase in ("generation", "reward", "scoring"))
    other = collected - start - generate - score - passes
    return {"generate": generate, "score": score, "passes": passes + other, "update": stepped - collected,
            "record": recorded - stepped}  # fmt: skip


class Bare:
    """The arithmetic of a default step and nothing else: forward, backward, decode and Adam on ready tensors.

    Random tokens of the same shapes; no tokenizer, no sampling, no advantages, no statistics, no files.
    """

    def __init__(self, trainer: PPOTrainer, classifier: BertClassifier, prompts: Sequence[str]):
        self.config, self.device, self.classifier = trainer.config, trainer.device, classifier
        self.policy = GPT2(trainer.policy.decoder.config).to(self.device).eval()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-6, fused=True)
        width = len(trainer.tokenizer.encode_prompt(prompts[0]))
        self.shape = len(prompts), width + self.config.gen_len
        generator = torch.Generator().manual_seed(0)

        def draw(vocabulary: int, width: int) -> torch.Tensor:
            return torch.randint(vocabulary, (len(prompts), width), generator=generator).to(self.device)

        self.prompt_width = width
        self.tokens = draw(self.policy.config.vocab_size, self.shape[1])
        self.texts = draw(classifier.config.vocab_size, self.shape[1] + 1)  # and [SEP]

    def step(self) -> dict[str, float]:
        phases = {"generate": self.decode, "score": self.classify, "passes": self.passes, "update": self.update}
        seconds = {}
        for name, work in phases.items():
            start = now(self.device)
            work()
            seconds[name] = now(self.device) - start
        return seconds

    @torch.no_grad()
    def decode(self) -> None:
        """Prompt and new tokens through the cache, with the logits of each next token."""
        B, T = self.shape
        cache = self.policy.new_cache(B, T - 1)
        for start, end in [(0, self.prompt_width), *((t, t + 1) for t in range(self.prompt_width, T - 1))]:
            self.policy.lm_logits(self.policy.hidden_states(self.tokens[:, start:end], None, cache)[:, -1])

    @torch.no_grad()
    def classify(self) -> None:
        self.classifier(self.texts)

    @torch.no_grad()
    def passes(self) -> None:
        for _ in range(2):  # policy and reference
            self.loss(self.tokens)

    def update(self) -> None:
        for _ in range(self.config.ppo_epochs):
            for rows in self.tokens.split(self.config.minibatch_size):
                self.loss(rows).backward()
                self.optimizer.step()
                self.optimizer.zero_grad()

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the response tokens: the cheapest that needs logits and log-probabilities."""
        hidden = self.policy.hidden_states(tokens[:, :-1])[:, -self.config.gen_len :]
        return F.cross_entropy(self.policy.lm_logits(hidden).flatten(0, 1), tokens[:, -self.config.gen_len :].flatten())
