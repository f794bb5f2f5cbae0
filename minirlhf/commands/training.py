"""Commands that train: PPO and its relatives, the stages before it, and the resumption of any of them.

A run's config.json says which command began it, with which arguments, so that `resume` needs no others.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minirlhf.commands.fields import CONFIG, Settings, flags, settings_of
from minirlhf.commands.table import Argument, argument, command
from minirlhf.common.printing import show
from minirlhf.common.text import printable
from minirlhf.device.launch import restarted
from minirlhf.device.processes import agreed
from minirlhf.evaluation.results import save_results
from minirlhf.io.files import read_json, write_json
from minirlhf.io.starter import Starter, starter
from minirlhf.models.loading import load_decoder
from minirlhf.rewards.base import RewardFunction
from minirlhf.rewards.judge import ChatJudge, ChatJudgeConfig
from minirlhf.rewards.reward_model import RewardModel
from minirlhf.rewards.scorers import load_scorer
from minirlhf.rl.config import PPOConfig
from minirlhf.rl.presets import DEFAULT_METHOD, METHODS, PRESETS, starter_run
from minirlhf.rl.trainer import PPOTrainer
from minirlhf.runs.log import CONFIG_FILE
from minirlhf.runs.loggers import check_loggers
from minirlhf.runs.run import Run
from minirlhf.supervised.dpo import DPOTrainer
from minirlhf.supervised.dpo_config import DPOConfig
from minirlhf.supervised.reward_modelling import RewardModelTrainer, RewardTrainingConfig, evaluate_rankings
from minirlhf.supervised.sft import SFTConfig, SFTTrainer, perplexity
from minirlhf.text.chat import ChatPrompt
from minirlhf.text.demonstrations import Conversation, Demonstration, read_demonstrations, split_demonstrations
from minirlhf.text.language import warn_of_language
from minirlhf.text.preferences import Ranking, read_rankings, split_rankings
from minirlhf.text.prompts import read_pool
from minirlhf.text.tokenizer import Tokenizer

JUDGE = "judge"
COMMAND, ARGUMENTS = "command", "arguments"  # in a run's config.json


def optional(*names: str, **options: Any) -> Argument:
    """An argument that a file may give in its place."""
    return argument(*names, default=argparse.SUPPRESS, **options)


OUTPUT = optional("--output", metavar="FOLDER", help="of the run, which must be new; default runs/COMMAND-TIME")
ENCODING = optional("--encoding", metavar="NAME", help="of text files; default utf-8")
LOGGERS = optional(
    "--loggers", metavar="NAME", nargs="+", help="of the curves: jsonl (default), tensorboard, wandb, swanlab, trackio"
)
HELD_OUT = optional("--held-out", metavar="FILE", help="to measure on; default: a tenth of the others")
STAGE = (HELD_OUT, ENCODING, LOGGERS, OUTPUT, CONFIG)

# ---- PPO ------------------------------------------------------------------------------------------------------------

TRAIN = (
    optional("--policy", metavar="FOLDER", help="the decoder to tune, and the reference; default: the starter weights"),
    optional("--prompts", metavar="TEXT", nargs="+", help="texts, or one file, .txt or .jsonl; default: the starter's"),
    optional("--reward", metavar="REWARD", help="folder, module:function, or judge, for an OpenAI-compatible endpoint "
             "(--judge-...); default: the starter's"),
    optional("--positive-label", metavar="NAME", help="of a classifier; default: as its labels say"),
    optional("--algorithm", metavar="NAME", help=f"ppo, or {', '.join(PRESETS)}"),
    optional("--evaluation", action=argparse.BooleanOptionalAction,
             help="compare policy and reference at the end; default: yes, unless the reward is a judge"),
    ENCODING,
    LOGGERS,
    OUTPUT,
    CONFIG,
)  # fmt: skip
TRAIN_SETTINGS = (Settings(PPOConfig), Settings(ChatJudgeConfig, "judge_"))


@command(*TRAIN, flags=flags(TRAIN_SETTINGS))
def train(args: argparse.Namespace) -> None:
    """Tune a language model against a reward by PPO or another algorithm."""
    given = settings_of(args, TRAIN, TRAIN_SETTINGS)
    overrides, judge = (each.of(given) for each in TRAIN_SETTINGS)
    theirs = "policy" in given and not _is_starter(given["policy"])
    missing = [f"--{name}" for name in ("reward", "prompts") if theirs and name not in given]
    if missing:
        raise ValueError(
            f"--policy {given['policy']} needs {' and '.join(missing)}: without --policy they are those of the starter "
            "weights, which are Chinese"
        )
    own = starter() if not {"policy", "reward", "prompts"} <= given.keys() else Starter("", "", "")
    arguments = {
        "policy": _place(given.get("policy", own.policy)),
        "reward": _place(given.get("reward", own.reward)),
        "positive_label": given.get("positive_label"),
        "judge": judge,
        "algorithm": given.get("algorithm"),
        "evaluation": given.get("evaluation", given.get("reward") != JUDGE),
    }
    pool = read_pool(given["prompts"], given.get("encoding", "utf-8")) if "prompts" in given else list(own.prompts)
    if arguments["algorithm"] is None:
        arguments["algorithm"] = DEFAULT_METHOD if _is_starter(arguments["policy"]) else "ppo"
    config = _ppo_config(arguments, overrides)
    output = _new_output(given, "train")
    warn_of_language([str(prompt) for prompt in pool], arguments["policy"], arguments["reward"])

    reward = reward_of(arguments, config.device)
    policy, tokenizer = load_decoder(arguments["policy"]), Tokenizer.from_pretrained(arguments["policy"])
    trainer = PPOTrainer(policy, None if config.adapters_off else arguments["policy"], tokenizer, config)
    arguments["prompts"] = [p.messages if isinstance(p, ChatPrompt) else p for p in trainer.check_prompts(pool)]
    started = {COMMAND: "train", ARGUMENTS: arguments, "ppo": dataclasses.asdict(config)}
    _go_on_with_ppo(Run.start(output, trainer, started, loggers=_loggers(given)), arguments, reward)


def _go_on_with_ppo(run: Run[PPOTrainer], arguments: Mapping[str, Any], reward: RewardFunction | None = None) -> None:
    trainer = run.trainer
    reward = reward or reward_of(arguments, trainer.config.device)
    pool = trainer.check_prompts(arguments["prompts"])
    show(f"{run.folder}: {trainer.steps_total} iterations; {trainer.precision_choice}")

    def on_step(rollout: Any, stats: Mapping[str, float]) -> None:
        samples = run.record(rollout, stats)
        if samples:
            told = f"mean reward {stats['reward/mean']:.3f}, KL {stats['objective/kl']:.2f}"
            show(f"iteration {trainer.steps_done} of {trainer.steps_total}: {told}")
            show("\n".join(f"    {score:6.2f}  {printable(text)}" for text, score in samples))

    with run:
        trainer.train(pool, reward, on_step)
        show(save_results(run, pool, reward if arguments["evaluation"] else None, arguments["algorithm"]))


def _ppo_config(arguments: Mapping[str, Any], overrides: Mapping[str, Any]) -> PPOConfig:
    """The settings of an algorithm, with those that suit the starter weights or a judge, and then the user's own."""
    algorithm, known = arguments["algorithm"], ("ppo", *PRESETS)
    if algorithm not in known:
        raise ValueError(f"algorithm must be one of {', '.join(known)}, got {algorithm!r}")
    suited: dict[str, Any] = {}
    if _is_starter(arguments["policy"]) and algorithm in ("ppo", *METHODS):
        suited |= starter_run(algorithm)
    if arguments["reward"] == JUDGE:
        low, high = (arguments["judge"].get(name, getattr(ChatJudgeConfig, name)) for name in ("low", "high"))
        suited["score_scale"] = 1 / (high - low) if high > low else 1.0
    settings: Any = {**suited, **overrides}
    return (
        PPOConfig.preset(algorithm, **settings) if algorithm in PRESETS else PPOConfig.with_overrides(None, **settings)
    )


def reward_of(arguments: Mapping[str, Any], device: str) -> RewardFunction:
    """The reward of a run of `train`, by the arguments in its config.json."""
    judge = arguments["judge"]
    if arguments["reward"] != JUDGE:
        if judge:
            raise ValueError(f"--judge-{min(judge).replace('_', '-')} needs --reward judge")
        return load_scorer(arguments["reward"], device, arguments["positive_label"])
    missing = [f"--judge-{name.replace('_', '-')}" for name in ("base_url", "model", "rubric") if name not in judge]
    if missing:
        raise ValueError(f"--reward judge needs {' and '.join(missing)}")
    return ChatJudge(ChatJudgeConfig(**judge))


# ---- the stages before it -------------------------------------------------------------------------------------------


def _train_measured(
    run: Run[Any],
    train: Callable[[Callable[..., object]], None],
    measure: Callable[[], dict[str, float]],
    name: str,
    algorithm: str,
    figure: str,
    title: str,
) -> None:
    """Train to the end, measured before the first step and at every checkpoint, and save the model and a summary.

    name: of the model's folder in the run's.
    figure: of those that `measure` returns, the one whose change is in the summary, under `title`.
    """
    with run:
        if run.trainer.steps_done == 0:
            run.log(measure())
        train(lambda batch, stats: run.record(batch, {**stats, **(measure() if run.due else {})}))
        measured = [line[figure] for line in run.history() if figure in line]
        summary = {title: {"before": measured[0], "after": measured[-1]}}
        run.trainer.save_pretrained(run.folder / name, {"algorithm": algorithm, **summary})
        if run.trainer.processes.first:
            write_json(run.folder / "summary.json", summary)
    show(f"saved in {run.folder}")


SFT = (
    optional("--model", metavar="FOLDER", help="the decoder to tune; default: the starter's"),
    optional("--texts", metavar="FILE", help="demonstrations, .txt or .jsonl"),
    *STAGE,
)
SFT_SETTINGS = (Settings(SFTConfig),)


@command(*SFT, flags=flags(SFT_SETTINGS))
def sft(args: argparse.Namespace) -> None:
    """Fine-tune a language model on texts, on responses to prompts, or on an assistant's turns in chats."""
    given = settings_of(args, SFT, SFT_SETTINGS)
    arguments = _stage_arguments(given, "texts")
    config, output = SFTConfig(**SFT_SETTINGS[0].of(given)), _new_output(given, "sft")
    data = _demonstrations(arguments)
    warn_of_language([str(one) for one in data[0]], arguments["model"])
    model, tokenizer = load_decoder(arguments["model"]), Tokenizer.from_pretrained(arguments["model"])
    trainer = SFTTrainer(model, tokenizer, data[0], config)
    started = {COMMAND: "sft", ARGUMENTS: arguments, "settings": dataclasses.asdict(config)}
    _go_on_with_sft(Run.start(output, trainer, started, loggers=_loggers(given)), arguments, data)


def _go_on_with_sft(run: Run[SFTTrainer], arguments: Mapping[str, Any], data: Any = None) -> None:
    trainer, (_, held_out) = run.trainer, data or _demonstrations(arguments)

    def measure() -> dict[str, float]:
        figures = perplexity(trainer.model, trainer.tokenizer, held_out, trainer.config.max_length)
        shown = ", ".join(f"{value:.2f} a {name}" for name, value in figures.items())
        show(f"step {trainer.steps_done} of {trainer.steps_total}: held-out perplexity {shown}")
        return {f"perplexity/{name}": value for name, value in figures.items()}

    _train_measured(run, trainer.train, measure, "policy", "SFT", "perplexity/token", "perplexity a token")


def _demonstrations(arguments: Mapping[str, Any]) -> tuple[list[Demonstration | Conversation], ...]:
    """Those to train on, and those held out."""
    texts = read_demonstrations(arguments["texts"], arguments["encoding"])
    if arguments["held_out"] is None:
        return split_demonstrations(texts)
    return texts, read_demonstrations(arguments["held_out"], arguments["encoding"])


REWARD_MODEL = (
    optional("--model", metavar="FOLDER", help="decoder or BERT that it begins from; default: the starter's GPT-2"),
    optional("--rankings", metavar="FILE", help="ranked answers, .jsonl or .tsv"),
    *STAGE,
)
REWARD_MODEL_SETTINGS = (Settings(RewardTrainingConfig),)


@command(*REWARD_MODEL, flags=flags(REWARD_MODEL_SETTINGS))
def reward_model(args: argparse.Namespace) -> None:
    """Train a reward model on ranked answers; its scores get mean 0 and deviation 1 over the answers."""
    given = settings_of(args, REWARD_MODEL, REWARD_MODEL_SETTINGS)
    arguments = _stage_arguments(given, "rankings")
    config = RewardTrainingConfig(**REWARD_MODEL_SETTINGS[0].of(given))
    output, data = _new_output(given, "reward-model"), _rankings(arguments)
    warn_of_language([text for ranking in data[0] for text in ranking.texts], arguments["model"])
    model = RewardModel.from_trunk(arguments["model"], config.seed, device="cpu")
    trainer = RewardModelTrainer(model, data[0], config)
    started = {COMMAND: "reward-model", ARGUMENTS: arguments, "settings": dataclasses.asdict(config)}
    _go_on_with_reward_model(Run.start(output, trainer, started, loggers=_loggers(given)), arguments, data)


def _go_on_with_reward_model(run: Run[RewardModelTrainer], arguments: Mapping[str, Any], data: Any = None) -> None:
    trainer, (rankings, held_out) = run.trainer, data or _rankings(arguments)

    def measure() -> dict[str, float]:
        figures = evaluate_rankings(trainer.model, held_out)
        show(f"step {trainer.steps_done} of {trainer.steps_total}: held-out {figures}")
        return {f"held_out/{name}": getattr(figures, name) for name in ("accuracy", "loss", "calibration_error")}

    def train(on_step: Callable[..., object]) -> None:
        trainer.train(on_step)
        trainer.model.normalise([text for ranking in rankings for text in ranking.texts])

    _train_measured(run, train, measure, "reward", "reward model", "held_out/accuracy", "held-out accuracy")


def _rankings(arguments: Mapping[str, Any]) -> tuple[list[Ranking], list[Ranking]]:
    """Those to train on, and those held out."""
    rankings = read_rankings(arguments["pairs" if "pairs" in arguments else "rankings"], arguments["encoding"])
    if arguments["held_out"] is None:
        return split_rankings(rankings, by="answers")
    return rankings, read_rankings(arguments["held_out"], arguments["encoding"])


DPO = (
    optional("--policy", metavar="FOLDER", help="the decoder to tune, and the reference; default: the starter's"),
    optional("--pairs", metavar="FILE", help="pairs or ranked answers, .jsonl or .tsv"),
    *STAGE,
)
DPO_SETTINGS = (Settings(DPOConfig),)


@command(*DPO, flags=flags(DPO_SETTINGS))
def dpo(args: argparse.Namespace) -> None:
    """Tune a language model on preferred and rejected answers, without a reward model."""
    given = settings_of(args, DPO, DPO_SETTINGS)
    arguments = _stage_arguments(given, "pairs", "policy")
    config, output, data = DPOConfig(**DPO_SETTINGS[0].of(given)), _new_output(given, "dpo"), _rankings(arguments)
    warn_of_language([text for ranking in data[0] for text in ranking.texts], arguments["policy"])
    policy, tokenizer = load_decoder(arguments["policy"]), Tokenizer.from_pretrained(arguments["policy"])
    alone = config.reference_free or config.adapters_off
    trainer = DPOTrainer(policy, None if alone else arguments["policy"], tokenizer, config)
    for pairs in data:
        trainer.check_pairs(pairs)
    started = {COMMAND: "dpo", ARGUMENTS: arguments, "settings": dataclasses.asdict(config)}
    _go_on_with_dpo(Run.start(output, trainer, started, loggers=_loggers(given)), arguments, data)


def _go_on_with_dpo(run: Run[DPOTrainer], arguments: Mapping[str, Any], data: Any = None) -> None:
    trainer, (pairs, held_out) = run.trainer, data or _rankings(arguments)

    def measure() -> dict[str, float]:
        figures = trainer.evaluate(held_out)
        told = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        show(f"step {trainer.steps_done}: held-out {told}")
        return {f"held_out/{name}": value for name, value in figures.items()}

    train = functools.partial(trainer.train, pairs)
    _train_measured(run, train, measure, "policy", "DPO", "held_out/rewards/accuracies", "held-out accuracy")


# ---- all of them ----------------------------------------------------------------------------------------------------

# Command of config.json -> what goes on with its run, and what reads its data.
GOES_ON: dict[str, tuple[Callable[..., None], Callable[[Mapping[str, Any]], Any] | None]] = {
    "train": (_go_on_with_ppo, None),
    "sft": (_go_on_with_sft, _demonstrations),
    "reward-model": (_go_on_with_reward_model, _rankings),
    "dpo": (_go_on_with_dpo, None),
}


@command(argument("run", metavar="RUN", help="folder of a run that was stopped"))
def resume(args: argparse.Namespace) -> None:
    """Go on with a run of any kind from its last checkpoint, with the settings that it has."""
    started = read_json(Path(args.run) / CONFIG_FILE)
    kind, arguments = started.get(COMMAND), started.get(ARGUMENTS)
    if kind not in GOES_ON or not isinstance(arguments, dict):
        raise ValueError(
            f"{args.run} was not begun by a command of minirlhf, so its {CONFIG_FILE} does not say which reward or "
            "data it has; resume it where it began: an example by its --resume, a script of yours by Run.resume"
        )
    go_on, read_data = GOES_ON[kind]
    if read_data is None:
        go_on(Run.resume(args.run), arguments)
    else:
        data = read_data(arguments)
        go_on(Run.resume(args.run, data=data[0]), arguments, data)


def _stage_arguments(given: Mapping[str, Any], data: str, model: str = "model") -> dict[str, Any]:
    """The arguments of a training on a file of data. Raises ValueError without it."""
    if data not in given:
        raise ValueError(f"give --{data} FILE, or {data} in the file of --config")
    held_out = given.get("held_out")
    return {
        model: _place(given.get(model) or starter().policy),
        data: _place(given[data]),
        "held_out": None if held_out is None else _place(held_out),
        "encoding": given.get("encoding", "utf-8"),
    }


def _new_output(given: Mapping[str, Any], kind: str) -> Path:
    """The folder of a new run. Raises, before anything is loaded, if another run is in it."""
    output = Path(given.get("output") or f"runs/{kind}-{time.strftime('%Y%m%d-%H%M%S')}")
    with agreed("the output folder"):  # all processes have looked before the first one writes
        if not restarted():
            Run.check_new(output)
    check_loggers(_loggers(given))
    return output


def _loggers(given: Mapping[str, Any]) -> list[str]:
    return given.get("loggers", ["jsonl"])


def _place(name: str) -> str:
    """A folder or file by its whole path, which a resumed run finds from anywhere; other names as they are."""
    return os.path.abspath(name) if os.path.exists(name) else name


def _is_starter(folder: str) -> bool:
    try:
        return folder in starter()
    except FileNotFoundError:
        return False
