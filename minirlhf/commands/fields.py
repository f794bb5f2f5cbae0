"""A flag for every field of a config, described by the comment in its source, and files that give the same settings.

A flag that is not given is absent from the parsed arguments, so that a file can give it; flags win over the file.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from minirlhf.commands.table import Argument, argument
from minirlhf.common.field_names import FIELD_NAMES
from minirlhf.common.suggestions import suggest
from minirlhf.io.files import read_json, read_text

# What other libraries call the arguments of commands, and fields that mean something else here than in PPO.
_NAMES = {
    "policy": "model_name model_name_or_path model_path pretrain actor sft_model_path base_model",
    "model": "model_name model_name_or_path model_path pretrain base_model policy trunk reward_pretrain",
    "reward": "reward_model reward_model_path reward_pretrain rm_path scorer reward_fn reward_funcs",
    "prompts": "prompt_data prompt_file dataset dataset_name train_files query_dataset",
    "texts": "dataset dataset_name train_file train_files train_dataset demonstrations",
    "rankings": "dataset dataset_name train_file train_files train_dataset preferences preference_dataset",
    "pairs": "dataset dataset_name train_file train_files train_dataset preferences preference_dataset rankings",
    "output": "output_dir save_path run_dir default_local_dir run",
    "algorithm": "algo advantage_estimator adv_estimator method recipe preset",
    "epochs": "num_train_epochs max_epochs total_epochs num_epochs",
    "max_length": "max_seq_length max_seq_len max_len cutoff_len",
    "accumulation": "gradient_accumulation_steps",
    "warmup": "warmup_ratio warmup_steps lr_warmup_ratio",
    "schedule": "lr_scheduler lr_scheduler_type lr_schedule",
    "weight_decay": "l2 wd",
    "beta": "kl_coef init_kl_coef dpo_beta",
}


class Settings(NamedTuple):
    """The config whose fields are settings of a command. prefix: before their names, if the command has two configs."""

    config: type[Any]
    prefix: str = ""

    @property
    def flags(self) -> dict[str, Argument]:
        """A flag for each field, by the name that it has as a setting."""
        kinds, told = get_type_hints(self.config), descriptions(self.config)
        return {
            self.prefix + f.name: _flag(self.prefix + f.name, kinds[f.name], told.get(f.name, ""), f)
            for f in dataclasses.fields(self.config)
        }

    def of(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of this config among settings."""
        names = [f.name for f in dataclasses.fields(self.config)]
        return {name: values[self.prefix + name] for name in names if self.prefix + name in values}


def flags(settings: Sequence[Settings]) -> list[Argument]:
    """The flags of all fields of these configs."""
    return [flag for each in settings for flag in each.flags.values()]


CONFIG = argument("--config", metavar="FILE", help="YAML or JSON with settings by name; flags win over it")


def settings_of(
    args: argparse.Namespace, arguments: Sequence[Argument], settings: Sequence[Settings]
) -> dict[str, Any]:
    """What flags and the file of --config give of a command's arguments and settings, and nothing else.

    Raises ValueError that names the file and the setting for an unknown one, with the one that is meant, and for a
    value of the wrong type.
    """
    given = {name: value for name, value in vars(args).items() if name not in ("command", "config")}
    path = getattr(args, "config", None)
    if path is None:
        return given
    known = {_dest(names): (names, options) for names, options in arguments if _dest(names) != "config"}
    for each in settings:
        known |= each.flags
    read = read_settings(path)
    for name in read:
        if name not in known:
            raise ValueError(f"{path}: there is no setting {name!r}; {_meant(str(name), list(known))}")
    return {name: _converted(path, name, value, known[name][1]) for name, value in read.items()} | given


def read_settings(path: str) -> dict[str, Any]:
    """The settings in a file, `.json` or YAML: one object of names and values.

    Raises ValueError with the file, and the line if there is one, ImportError for YAML without PyYAML.
    """
    if Path(path).suffix.lower() == ".json":
        return read_json(path)
    text = read_text(path)
    try:
        import yaml
    except ImportError as error:
        told = f"{path} needs PyYAML: pip install pyyaml (minirlhf's extra yaml), or write the file as .json"
        raise ImportError(told) from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if content is None:  # an empty file
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold settings by name, such as `lr: 1.0e-5`, got a {type(content).__name__}")
    return content


def descriptions(config: type[Any]) -> dict[str, str]:
    """What comments say of each field of a dataclass: those on its lines, or else those on the lines before it.

    A field without a comment on its lines in a subclass keeps the base class's. {} without the source.
    """
    found: dict[str, str] = {}
    for cls in reversed([cls for cls in config.__mro__ if dataclasses.is_dataclass(cls)]):
        try:
            source = textwrap.dedent(inspect.getsource(cls))
        except (OSError, TypeError):
            return {}
        lines = source.splitlines()
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments = {t.start[0]: t.string.lstrip("# ").strip() for t in tokens if t.type == tokenize.COMMENT}
        alone = {number for number in comments if lines[number - 1].lstrip().startswith("#")}
        (body,) = [node.body for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
        for node in body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                on = [n for n in range(node.lineno, (node.end_lineno or node.lineno) + 1) if n in comments]
                first = node.lineno
                while first - 1 in alone:
                    first -= 1
                if on:
                    found[node.target.id] = " ".join(comments[n] for n in on)
                elif first < node.lineno:
                    found.setdefault(node.target.id, " ".join(comments[n] for n in range(first, node.lineno)))
    return found


def _flag(name: str, kind: Any, said: str, field: dataclasses.Field[Any]) -> Argument:
    options: dict[str, Any] = {"default": argparse.SUPPRESS}
    optional = get_origin(kind) in (Union, types.UnionType) and type(None) in get_args(kind)
    kinds = [each for each in get_args(kind) if each is not type(None)] if optional else [kind]
    kind = kinds[0]
    if get_origin(kind) is Literal:
        options["choices"] = [*get_args(kind), *([None] if optional else [])]
        options |= {"type": _or_none(str) if optional else str, "metavar": "|".join(map(_shown, options["choices"]))}
    elif kind is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif kind is int and any(get_origin(each) is tuple for each in kinds):
        options |= {"type": _or_none(_integers) if optional else _integers, "metavar": "N[,N...]"}
    elif get_origin(kind) is tuple:
        options |= {"nargs": len(get_args(kind)), "type": get_args(kind)[0], "metavar": "X"}
    elif dataclasses.is_dataclass(kind) or get_origin(kind) in (dict, Mapping):
        options |= {"type": _or_none(_json) if optional else _json, "metavar": "JSON"}
    else:
        base = kind if kind in (int, float) else str
        options |= {"type": _or_none(base) if optional else base, "metavar": {int: "N", float: "X", str: "TEXT"}[base]}
    if field.default is not dataclasses.MISSING:
        default = _shown(field.default)
    elif field.default_factory is not dataclasses.MISSING:
        default = _shown(field.default_factory())
    else:
        default = "none: it must be given"
    help = f"{said}; default {default}" if said else f"default {default}"
    return argument(f"--{name.replace('_', '-')}", help=help.replace("%", "%%"), **options)


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    parse.__name__ = kind.__name__
    return parse


def _integers(text: str) -> int | list[int]:
    """One, or several with commas between them, in brackets or not."""
    several = [int(each) for each in text.strip().removeprefix("[").removesuffix("]").split(",")]
    return several[0] if len(several) == 1 else several


_integers.__name__ = "int"  # argparse: "invalid int value"


def _json(text: str) -> Any:
    return json.loads(text)


def _shown(value: object) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, (dict, tuple)) else str(value)


def _meant(name: str, known: Sequence[str]) -> str:
    own_names = {other: (own, "") for own, names in _NAMES.items() if own in known for other in names.split()}
    return suggest(name, known, FIELD_NAMES | own_names)


def flags_meant(unknown: Sequence[str], arguments: Sequence[Argument]) -> str:
    """What is meant by those words of a command line that no argument takes; blank if nothing is near."""
    known, told = [_dest(names) for names, _ in arguments if names[-1].startswith("--")], []
    for word in unknown:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            meant = _meant(flag[2:].replace("-", "_"), known)
            meant = re.sub(r"did you mean '(\w+)'", lambda m: f"did you mean --{m[1].replace('_', '-')}", meant)
            told += [] if meant.startswith("the known names") else [f"{flag}: {meant}"]
    return "; ".join(told)


def _dest(names: Sequence[str]) -> str:
    return names[-1].lstrip("-").replace("-", "_")


def _converted(path: str, name: str, value: Any, options: Mapping[str, Any]) -> Any:
    """A value of a file as its flag would give it: YAML takes 1e-5 for a text, and has no tuples.

    What is left to check, the config checks.
    """
    kind = options.get("type", str)
    try:
        if options.get("nargs") == "+":
            value = value if isinstance(value, list) else [value]
            if not (value and all(isinstance(each, str) for each in value)):
                raise TypeError
        elif isinstance(options.get("nargs"), int):
            value = tuple(kind(each) for each in value)
        elif isinstance(value, str) and "action" not in options:
            value = kind(value)
        elif kind is str and "action" not in options and not isinstance(value, str):
            raise TypeError
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        wanted = getattr(kind, "__name__", "str").replace("str", "text")
        raise ValueError(f"{path}: {name} must be of the type {wanted}, got {value!r:.80}") from None
    return value
