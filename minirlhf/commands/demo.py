"""A run of PPO in the browser: what the policy writes beside its reference, and one step of it token by token."""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from minirlhf.commands.table import argument, command, integer
from minirlhf.commands.training import ARGUMENTS, COMMAND, reward_of
from minirlhf.common.printing import escaped, html_table, markdown
from minirlhf.common.text import printable
from minirlhf.common.web_page import HOST, PORT, require_web, served
from minirlhf.evaluation.explanation import READING, Explanation, explain
from minirlhf.evaluation.report_texts import LANGUAGES
from minirlhf.evaluation.results import REFERENCE
from minirlhf.io.files import read_json
from minirlhf.models.heads import with_value_head
from minirlhf.models.prepared import Models
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.scorers import load_scorer
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.rollout import Rollout, collect_rollout
from minirlhf.runs.checkpoint import COUNTERS_FILE, load_checkpoint
from minirlhf.runs.log import CONFIG_FILE
from minirlhf.runs.run import newest_checkpoint
from minirlhf.text.prompts import Prompt, as_prompts

EXAMPLES = 20  # prompts of the run that are offered
SHOWN = 16  # samples of a step, from the best to the worst, that can be chosen
ORANGE, PURPLE = "230, 97, 1", "94, 60, 153"  # above and below 0, for every kind of eye
WORDS = {
    "en": {
        "prompt": "Prompt", "examples": "Prompts of the run", "count": "Continuations", "seed": "Seed",
        "write": "Write", "reference": "Reference: before", "policy": "Policy: after training",
        "mean": "mean reward", "step": "Take a step of PPO on this prompt", "tokens": "Token by token",
        "about": "One more step is taken in memory, and shown as the algorithm sees it; the policy stays as it is.",
        "sample": "Sample, with its reward", "figure": "Colour", "reward": "reward", "value": "value",
        "advantage": "advantage", "clipping": "clipping: ratio - 1, clipped ones framed", "table": "All figures",
        "reading": READING,
    },
    "zh": {
        "prompt": "提示词", "examples": "训练用的提示词", "count": "续写条数", "seed": "随机种子",
        "write": "续写", "reference": "参考模型：训练之前", "policy": "策略：训练之后",
        "mean": "平均奖励", "step": "用这个提示词走一步 PPO", "tokens": "逐个词元看",
        "about": "在内存里再走一步，按算法看到的样子显示；策略本身保持不变。",
        "sample": "样本及其奖励", "figure": "着色依据", "reward": "奖励", "value": "价值",
        "advantage": "优势", "clipping": "裁剪：ratio - 1，被裁剪的加框", "table": "全部数值",
        "reading": "优势为正的词元比预期好：PPO 提高它的概率，走完这一步它的 ratio 大于 1；优势为负则小于 1。"
                   "reward 是 KL 惩罚，最后一个词元还加上得分；clipped 为 yes 时 ratio 已出界，这批数据不再推动它。",
    },
}  # fmt: skip
CSS = f"""
.pair {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1rem }}
.pair h3 {{ display: flex; justify-content: space-between; align-items: baseline; margin: 0 0 .5rem; font-size: 1rem }}
.pair h3 small {{ font-weight: 400; opacity: .75 }}
.sample {{ display: flex; gap: .8rem; margin: .5rem 0; padding: .6rem .8rem; border-radius: 8px; line-height: 1.6;
  border: 1px solid var(--border-color-primary); background: var(--block-background-fill) }}
.sample p {{ flex: 1; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere }}
.sample i {{ opacity: .6; font-style: normal }}
.tokens {{ display: flex; flex-wrap: wrap; gap: 4px; line-height: 1.3 }}
.tokens span {{ padding: .3rem .5rem; border-radius: 6px; border: 2px solid transparent; text-align: center }}
.tokens .held {{ border-color: var(--body-text-color) }}
.tokens small {{ display: block; font-size: .7rem; opacity: .8 }}
.scale {{ display: flex; align-items: center; gap: .5rem; margin: .8rem 0; font-size: .8rem }}
.scale i {{ width: 12rem; height: .6rem; border-radius: 3px;
  background: linear-gradient(to right, rgba({PURPLE}, .75), transparent, rgba({ORANGE}, .75)) }}
.figures table {{ font-size: .8rem; border-collapse: collapse }}
.figures td, .figures th {{ padding: .15rem .6rem; text-align: right; font-variant-numeric: tabular-nums }}
.figures {{ overflow-x: auto }} @media (max-width: 40rem) {{ .pair {{ grid-template-columns: 1fr }} }}
"""


class Demo:
    """A run of PPO in memory, asked by several threads, of which one at a time works.

    reward: a folder or module:function; None: the run's own, of a run that `minirlhf train` began. device: None: the
    run's own.
    Raises BlockingIOError for a run that is being written, FileNotFoundError for a folder that is no run, ValueError
    for one of another kind, or one that does not say what its reward was, and as `load_checkpoint`.
    """

    def __init__(self, run: Path, reward: str | None = None, device: str | None = None):
        checkpoint = newest_checkpoint(run)
        if (kind := read_json(checkpoint / COUNTERS_FILE).get("kind")) != "ppo":
            raise ValueError(f"{run} is a run of kind {kind!r}, and a demo shows runs of PPO")
        started = read_json(run / CONFIG_FILE)
        arguments = started.get(ARGUMENTS)
        arguments = arguments if isinstance(arguments, dict) else {}
        if reward is None and started.get(COMMAND) != "train":  # what a script calls "reward" may be a part of it
            raise ValueError(f"{run} does not say what its reward was: give --reward")
        overrides = {} if device is None else {"device": device}
        try:
            self.trainer = load_checkpoint(checkpoint, **overrides)
        except (FileNotFoundError, ValueError):
            if not (run / REFERENCE).is_dir():
                raise
            # What the run left at its end; below adapters over a bf16 base it is rounded, so it comes second.
            self.trainer = load_checkpoint(checkpoint, run / REFERENCE, **overrides)
        where = self.trainer.config.device
        self.reward: RewardFunction = (
            reward_of(arguments, where)
            if reward is None
            else load_scorer(reward, where, arguments.get("positive_label"))
        )
        pool: list[Prompt] = arguments.get("prompts") or []
        self.prompts: dict[str, Prompt] = {}  # of the run, by what the page shows of each
        for prompt in pool[:EXAMPLES]:
            self.prompts.setdefault(prompt[-1]["content"] if isinstance(prompt, list) else prompt, prompt)
        self.chat = next((prompt for prompt in pool if isinstance(prompt, list)), None)  # None: no chats
        self._lock = threading.Lock()

    def continuations(self, text: str, count: int, seed: int) -> dict[str, Rollout]:
        """What reference and policy make of a prompt, sampled as in the run. Raises ValueError for a bad prompt."""
        t, c = self.trainer, self.trainer.config
        sampling = PPOConfig(gen_len=c.gen_len, temperature=c.temperature, top_k=c.top_k, top_p=c.top_p,
                             eos_token_id=c.eos_token_id, reward_timeout=c.reward_timeout)  # fmt: skip
        found = {}
        with self._lock:
            for name, model in (("reference", with_value_head(t.reference, None)), ("policy", t.policy.eval())):
                models = Models(model, t.reference, t.tokenizer, t.precision)
                generator = torch.Generator(t.device).manual_seed(seed)
                found[name] = collect_rollout(models, self._prompts(text, count), self.reward, sampling, generator)
        return found

    def step(self, text: str, seed: int) -> list[Explanation]:
        """Samples of a batch of this prompt as a step of PPO sees them, best first; the trainer stays as it was.

        Raises as `PPOTrainer.collect`.
        """
        t, c = self.trainer, self.trainer.config
        with self._lock:
            weights, state = copy.deepcopy(t.policy.state_dict()), copy.deepcopy(t.state_dict())
            try:
                t.generators["sampling"].manual_seed(seed)
                t.optimizer_steps = 0  # at the end of a schedule a step may change nothing
                rollout = t.collect(self._prompts(text, c.batch_size // c.group_size), self.reward)
                coef = t.kl_controller.coef
                t.step(rollout)
                t.kl_controller.coef = coef  # that the step had, not the one after it
                order = rollout.scores.argsort(descending=True)
                chosen = order[torch.linspace(0, len(order) - 1, min(SHOWN, len(order))).long()]
                return [explain(t, rollout, i, io.StringIO()) for i in chosen.tolist()]
            finally:
                t.policy.load_state_dict(weights)
                t.optimizer.state.clear()  # a run without steps has no moments to load
                t.load_state_dict(state)
                t.interrupted = False

    def _prompts(self, text: str, count: int) -> list[str]:
        prompt: Prompt = text
        if text in self.prompts:
            prompt = self.prompts[text]
        elif self.chat is not None:
            system = itertools.takewhile(lambda message: message["role"] == "system", self.chat)
            prompt = [*system, {"role": "user", "content": text}]
        return as_prompts([prompt], self.trainer.tokenizer) * count


def pair_html(found: Mapping[str, Rollout], words: Mapping[str, str]) -> str:
    """The continuations of reference and policy side by side, each with its reward."""
    columns = []
    for name, rollout in found.items():
        scores = rollout.scores.tolist()
        cards = [f'<div class="sample"><p><i>{_lines(prompt)}</i>{_lines(text)}</p><b>{score:.3f}</b></div>'
                 for prompt, text, score in zip(rollout.prompts, rollout.responses, scores, strict=True)]  # fmt: skip
        mean = f"<small>{words['mean']} {sum(scores) / len(scores):.3f}</small>"
        columns.append(f'<div class="{name}"><h3>{words[name]}{mean}</h3>{"".join(cards)}</div>')
    return f'<div class="pair">{"".join(columns)}</div>'


def tokens_html(explanation: Explanation, figure: str) -> str:
    """The tokens of a sample, coloured by one of `figures`: orange above 0, purple below; clipped ones are framed."""
    tokens = explanation.tokens
    values = [token["ratio"] - 1 if figure == "clipping" else token[figure] for token in tokens]
    most = max(map(abs, values)) or 1.0
    chips = [f'<span class="{"held" if token["clipped"] and figure == "clipping" else ""}" style="background: '
             f'rgba({ORANGE if x > 0 else PURPLE}, {0.75 * abs(x) / most:.3f})">{escaped(token["token"])}'
             f"<small>{x:.3f}</small></span>" for token, x in zip(tokens, values, strict=True)]  # fmt: skip
    scale = f'<div class="scale">{-most:.3f} <i></i> {most:.3f}</div>'
    return f'<div class="tokens">{"".join(chips)}</div>{scale}'


def figures(explanation: Explanation) -> list[str]:
    """What the tokens can be coloured by; a policy without a value head has no values."""
    known = {*explanation.tokens[0], "clipping"}
    return [name for name in ("advantage", "reward", "value", "clipping") if name in known]


def _lines(text: str) -> str:
    return "\n".join(map(escaped, text.split("\n")))


def page_of(demo: Demo, title: str, language: str) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio

    words = WORDS[language]

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*inputs: Any) -> Any:
            try:
                return function(*inputs)
            except Exception as error:  # whatever a user's reward may raise
                raise gradio.Error(escaped(error) or type(error).__name__, print_exception=False) from error

        return call

    def write(text: str, count: int, seed: int | None) -> str:  # None: the field was emptied
        return pair_html(demo.continuations(text, int(count), int(seed or 0)), words)

    def step(text: str, seed: int | None) -> tuple[Any, ...]:
        found = demo.step(text, int(seed or 0))
        samples = [(f"{each.score:.3f}  {printable(each.response)}", i) for i, each in enumerate(found)]
        colours = [(words[name], name) for name in figures(found[0])]
        return (
            found,
            gradio.Dropdown(samples, value=0, visible=True),
            gradio.Radio(colours, value="advantage", visible=True),
            *show_tokens(found, 0, "advantage"),
        )

    def show_tokens(found: Sequence[Explanation], sample: int, figure: str) -> tuple[str, str]:
        if not found:
            return "", ""
        head, *rows = found[sample].rows()
        reading = f"<p>{escaped(words['reading'])}</p>"
        return tokens_html(found[sample], figure), f'{reading}<div class="figures">{html_table(head, rows)}</div>'

    with gradio.Blocks(title=f"minirlhf: {title}", analytics_enabled=False) as page:
        gradio.Markdown(f"## {markdown(title)}")
        prompts = list(demo.prompts)
        prompt = gradio.Textbox(prompts[0] if prompts else "", label=words["prompt"], lines=1, autofocus=True)
        if prompts:
            gradio.Examples(prompts, prompt, label=words["examples"], examples_per_page=EXAMPLES)
        with gradio.Row(equal_height=True):
            count = gradio.Slider(1, 8, 4, step=1, label=words["count"])
            seed = gradio.Number(0, label=words["seed"], precision=0, minimum=0)
            button = gradio.Button(words["write"], variant="primary")
        beside = gradio.HTML()
        gradio.Markdown(f"### {words['tokens']}\n{words['about']}")
        stepped, found = gradio.Button(words["step"]), gradio.State([])
        with gradio.Row():
            sample = gradio.Dropdown([], label=words["sample"], visible=False)
            figure = gradio.Radio([], label=words["figure"], visible=False)
        tokens = gradio.HTML()
        with gradio.Accordion(words["table"], open=False):
            table = gradio.HTML()
        for trigger in (button.click, prompt.submit):
            trigger(told(write), [prompt, count, seed], beside)
        stepped.click(told(step), [prompt, seed], [found, sample, figure, tokens, table])
        for each in (sample, figure):
            each.input(show_tokens, [found, sample, figure], [tokens, table])
    return page


@command(
    argument("run", metavar="RUN", help="folder of a run of PPO or a relative of it"),
    argument("--reward", metavar="REWARD", help="folder or module:function; default: the run's own, if train began it"),
    argument("--host", default=HOST, help="0.0.0.0 lets other machines in; default %(default)s"),
    argument("--port", type=integer(1, 65535), default=PORT, metavar="N", help="default %(default)s"),
    argument("--language", choices=LANGUAGES, default="en", help="of the page; default %(default)s"),
    argument(
        "--device", help="auto, cpu or cuda[:index], of the kind of device that the run was on; default: the run's own"
    ),
)
def demo(args: argparse.Namespace) -> None:
    """Show a run in the browser: policy beside reference, and one step of PPO token by token; Ctrl-C ends."""
    require_web(args.host, args.port)  # before anything is loaded
    run = Path(args.run)
    page = page_of(Demo(run, args.reward, args.device), run.resolve().name, args.language)
    with contextlib.suppress(KeyboardInterrupt), served(page, args.host, args.port, CSS):
        while True:  # an endless wait for a lock cannot be interrupted on Windows
            time.sleep(3600)
