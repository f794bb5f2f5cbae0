"""The same work done by others: transformers with PPO as TRL writes it, and commands that time themselves."""

import contextlib
import json
import shlex
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmark.floor import now
from benchmark.load import Load, Meter
from benchmark.report import OUTLIER
from benchmark.work import Sample, Work, autocast
from minirlhf.common.masked import whiten
from minirlhf.device.gpu import tf32_matmul
from minirlhf.rl.advantages import gae
from minirlhf.rl.losses import policy_loss, value_loss
from minirlhf.rl.shaping import token_rewards


class TransformersPeer:
    """One iteration on transformers' models: `generate`, one padded classifier batch, and a step like TRL's.

    As in TRL 0.11: one pass each of policy and reference before the update, logits at all positions, a log-softmax over
    all of them, plain Adam, autocast for 16 bits. Raises ImportError if transformers is not installed.
    """

    def __init__(self, work: Work):
        try:
            import transformers
        except ImportError as error:
            raise ImportError("--against transformers needs transformers: pip install -e '.[dev]'") from error
        transformers.logging.set_verbosity_error()
        self.work, self.config, self.device = work, work.ppo(), torch.device(work.device)
        self.name = f"transformers {transformers.__version__} {work.precision} minibatch {work.minibatch}"
        self.tokenizer, self.texts_tokenizer = work.tokenizers()
        self.policy, self.reference = (self._gpt2(transformers) for _ in range(2))
        self.classifier = self._bert(transformers)
        self.value_head = torch.nn.Linear(self.policy.config.n_embd, 1, device=self.device)
        self.optimizer = torch.optim.Adam([*self.policy.parameters(), *self.value_head.parameters()], lr=self.config.lr)
        self.order = torch.Generator().manual_seed(self.config.seed)

    def collect(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, list[float]]:
        """Tokens (B, T), their mask (B, T), scores (B,), and the times at which sampling and scoring ended."""
        ids = [self.tokenizer.encode_prompt(prompt) for prompt in prompts]
        width, new = max(map(len, ids)), self.config.gen_len
        padded = torch.tensor([[0] * (width - len(row)) + row for row in ids], device=self.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids], device=self.device)
        with torch.no_grad(), autocast(self.device, self.work.precision):
            tokens = self.policy.generate(
                padded, attention_mask=mask, do_sample=True, top_k=0, top_p=self.config.top_p, max_new_tokens=new,
                min_new_tokens=new, pad_token_id=self.tokenizer.pad_id,
            )  # fmt: skip
            responses = [self.tokenizer.decode(row) for row in tokens[:, width:]]
            sampled = now(self.device)
            texts = [p + r for p, r in zip(prompts, responses, strict=True)]
            read = self.texts_tokenizer.encode_batch(texts)
            longest = max(map(len, read))
            batch = torch.tensor([row + [0] * (longest - len(row)) for row in read], device=self.device)
            real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in read], device=self.device)
            scores = self.classifier(batch, attention_mask=real).logits.float().softmax(-1)[:, 1]
        return tokens, torch.cat([mask, mask.new_ones(len(mask), new)], 1), scores, [sampled, now(self.device)]

    def step(self, tokens: Tensor, mask: Tensor, scores: Tensor) -> None:
        c, new = self.config, self.config.gen_len
        with torch.no_grad():
            old, values = self._score(self.policy, tokens, mask)
            reference, _ = self._score(self.reference, tokens, mask)
        response = mask[:, -new:].bool()
        rewards = token_rewards(scores, old - reference, c.init_kl_coef, response)
        advantages, returns = gae(rewards, values, response, c.gamma, c.lam)
        advantages = whiten(advantages, response)
        for _ in range(c.ppo_epochs):
            for rows in torch.randperm(len(tokens), generator=self.order).split(c.minibatch_size):
                rows = rows.to(self.device)
                logprobs, now_values = self._score(self.policy, tokens[rows], mask[rows])
                loss = policy_loss(logprobs - old[rows], advantages[rows], c.cliprange).mean()
                of_values = value_loss(now_values, values[rows], returns[rows], c.cliprange_value).mean()
                self.optimizer.zero_grad()
                with tf32_matmul() if self.work.precision == "tf32" else contextlib.nullcontext():
                    (loss + c.vf_coef * of_values).backward()
                self.optimizer.step()

    def iteration(self, prompts: Sequence[str]) -> list[Sample]:
        """The Samples of one batch, without memory, because two peers in one process share it."""
        start = now(self.device)
        *batch, (sampled, scored) = self.collect(prompts)
        self.step(*batch)
        end = now(self.device)
        times = dict(generate=sampled - start, score=scored - sampled, step=end - scored, iteration=end - start)
        return [Sample(self.name, phase, seconds) for phase, seconds in times.items()]

    def _score(self, model: torch.nn.Module, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and values (B, R) of the response tokens."""
        new = self.config.gen_len
        with autocast(self.device, self.work.precision):
            positions = (mask.cumsum(-1) - 1).clamp_min(0)
            out = model(tokens, attention_mask=mask, position_ids=positions, output_hidden_states=True, use_cache=False)
            values = self.value_head(out.hidden_states[-1]).squeeze(-1).float()
        logprobs = out.logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        return logprobs[:, -new:], values[:, -new - 1 : -1]

    def _gpt2(self, transformers: Any) -> torch.nn.Module:
        config, tensors = self.work.gpt2().published()
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**config))
        model.load_state_dict({**tensors, "lm_head.weight": tensors["transformer.wte.weight"]})
        model.generation_config.eos_token_id = None
        return model.to(self.device).eval()

    def _bert(self, transformers: Any) -> torch.nn.Module:
        bert = self.work.bert()
        config = transformers.BertConfig(**{**vars(bert.config), "id2label": dict(bert.config.id2label)})
        model = transformers.BertForSequenceClassification(config)
        model.load_state_dict(bert.state_dict(), strict=False)
        return model.to(self.device).eval()


def run_command(command: str | Sequence[str]) -> list[Sample]:
    """Run a command that prints a JSON object a line, with "peer", "phase", "seconds" and perhaps "peak_mb".

    If "iteration" is missing, it is the sum of "generate", "score" and "step". Other lines are ignored.
    Raises ValueError if it fails, or prints no such line.
    """
    words = shlex.split(command) if isinstance(command, str) else list(command)
    done = subprocess.run(words, capture_output=True, text=True, encoding="utf-8", errors="replace")
    last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
    if done.returncode != 0:
        raise ValueError(f"{shlex.join(words)} ended with {done.returncode}: {last}")
    samples = read_lines(done.stdout)
    if not samples:
        raise ValueError(f"{shlex.join(words)} printed no timing: {last}")
    return samples


def read_lines(text: str) -> list[Sample]:
    """The Samples in the output of a command."""
    samples = []
    for line in text.splitlines():
        try:
            read = json.loads(line)
            known = float(read["seconds"]), read.get("peak_mb"), read.get("matmul")
            samples.append(Sample(str(read["peer"]), str(read["phase"]), *known))
        except (ValueError, KeyError, TypeError):
            continue
    phases = {sample.phase: sample for sample in samples}
    parts = [phases[name] for name in ("generate", "score", "step") if name in phases]
    if len(parts) == 3 and "iteration" not in phases:
        peaks = [part.peak_mb for part in parts if part.peak_mb is not None]
        samples.append(Sample(parts[0].peer, "iteration", sum(p.seconds for p in parts), max(peaks, default=None)))
    return samples


@dataclass(frozen=True)
class Turn:
    """One side's timings of one iteration, with the load of the machine meanwhile. name: of the side."""

    name: str
    samples: list[Sample]
    load: Load

    @property
    def seconds(self) -> float:
        """Of the iteration."""
        return max(sample.seconds for sample in self.samples)


def in_turns(
    sides: Sequence[tuple[str, Callable[[], list[Sample]]]],
    rounds: int,
    on_turn: Callable[[int, Turn], object],
) -> tuple[list[Turn], list[Turn]]:
    """Every side once, and again: A B A B; then turns that cannot be trusted once more, at most `rounds` a side.

    A turn is not trusted if other work shared the machine, or if it took more than OUTLIER times the side's shortest.
    A longer turn gives way to the one that repeats it.
    sides: names, and what times them. on_turn: called with the number of each turn, from 0, and the turn.
    Returns the turns that count, and those that gave way.
    """
    turns: dict[str, list[Turn]] = {name: [] for name, _ in sides}
    dropped: list[Turn] = []

    def take(name: str, run: Callable[[], list[Sample]]) -> Turn:
        meter, number = Meter(), len(turns[name]) + sum(turn.name == name for turn in dropped)
        turn = Turn(name, run(), meter.load())
        on_turn(number, turn)
        turns[name].append(turn)
        return turn

    for _ in range(rounds):
        for name, run in sides:
            take(name, run)
    for _ in range(rounds):
        for name, run in sides:
            shortest = min(turn.seconds for turn in turns[name])
            doubtful = [turn for turn in turns[name] if turn.load.shared or turn.seconds > OUTLIER * shortest]
            if doubtful:
                worst = max(doubtful, key=lambda turn: turn.seconds)
                again = take(name, run)
                gone = max(worst, again, key=lambda turn: turn.seconds)
                turns[name].remove(gone)
                dropped.append(gone)
    return [turn for found in turns.values() for turn in found], dropped
