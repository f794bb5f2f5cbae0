"""Flags and files of settings: every field of every config, its comment as help, values as the config takes them."""

import argparse
import dataclasses
import json
import re
import sys
from typing import Literal

import pytest

from minirlhf import LoRAConfig, PPOConfig
from minirlhf.commands.fields import CONFIG, Settings, descriptions, flags, settings_of
from minirlhf.commands.main import main
from minirlhf.commands.table import COMMANDS, argument
from minirlhf.commands.training import DPOConfig, RewardTrainingConfig, SFTConfig
from minirlhf.rewards.judge import ChatJudgeConfig


@dataclasses.dataclass(frozen=True)
class Base:
    count: int = 3  # how many
    rate: float = 0.5  # 50% of it
    kept: str = "x"  # stays


@dataclasses.dataclass(frozen=True)
class Sample(Base):
    # The group
    rate: float | None = 0.25
    # Said above,
    # on two lines.
    limit: float | None = None
    on: bool = False
    kind: Literal["a", "b"] | None = None
    pair: tuple[float, float] = (0.1, 0.2)
    more: dict[str, int] = dataclasses.field(  # anything else
        default_factory=lambda: {"k": 1}
    )


SETTINGS = [Settings(Sample), Settings(Base, "other_")]
ARGUMENTS = [argument("--name", default=argparse.SUPPRESS), CONFIG,
             argument("--texts", nargs="+", default=argparse.SUPPRESS)]  # fmt: skip


def parse(*given):
    parser = argparse.ArgumentParser()
    for names, options in [*ARGUMENTS, *flags(SETTINGS)]:
        parser.add_argument(*names, **options)
    return settings_of(parser.parse_args([str(x) for x in given]), ARGUMENTS, SETTINGS)


def test_comments_become_descriptions():
    assert descriptions(Sample) == {
        "count": "how many", "rate": "50% of it", "kept": "stays", "limit": "Said above, on two lines.",
        "more": "anything else",
    }  # fmt: skip


def test_help_has_comment_and_default(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    shown = " ".join(capsys.readouterr().out.split())
    for said in ("--count N how many; default 3", "--rate X 50% of it; default 0.25", "--no-on default False",
                 "--kind a|b|none default none", "--pair X X default [0.1, 0.2]",
                 '--more JSON anything else; default {"k": 1}',
                 "--other-kept TEXT stays; default x"):  # fmt: skip
        assert said in shown


def test_only_what_is_given_is_there():
    assert parse() == {}
    given = [
        "--count",
        4,
        "--rate",
        "none",
        "--limit",
        "1e-3",
        "--on",
        "--kind",
        "a",
        "--pair",
        1,
        2,
        "--more",
        '{"a": 1}',
    ]
    found = parse(*given, "--other-count", 7, "--name", "n", "--texts", "t", "u")
    own = dict(count=4, rate=None, limit=0.001, on=True, kind="a", pair=[1.0, 2.0], more={"a": 1})
    assert found == {**own, "other_count": 7, "name": "n", "texts": ["t", "u"]}
    assert SETTINGS[0].of(found) == own and SETTINGS[1].of(found) == {"count": 7}
    assert parse("--no-on", "--kind", "none") == {"on": False, "kind": None}


@pytest.mark.parametrize("config", [PPOConfig, SFTConfig, DPOConfig])
def test_a_config_in_a_config_is_json(config):
    parser = argparse.ArgumentParser()
    for names, options in flags([Settings(config)]):
        parser.add_argument(*names, **options)
    assert config(**vars(parser.parse_args(["--lora", '{"rank": 2}']))).lora == LoRAConfig(2)
    assert config(**vars(parser.parse_args(["--lora", "none"]))).lora is None


def test_one_id_or_several_end_a_response(tmp_path):
    parser = argparse.ArgumentParser()
    for names, options in flags([Settings(PPOConfig)]):
        parser.add_argument(*names, **options)
    for text, ids in {"7": 7, "7,9": (7, 9), "[7, 9]": (7, 9), "none": None}.items():
        assert PPOConfig(**vars(parser.parse_args(["--eos-token-id", text]))).eos_token_id == ids
    with pytest.raises(SystemExit):
        parser.parse_args(["--eos-token-id", "7,x"])
    (tmp_path / "s.json").write_text('{"eos_token_id": [7, 9]}')
    args = argparse.Namespace(config=str(tmp_path / "s.json"))
    assert PPOConfig(**settings_of(args, [], [Settings(PPOConfig)])).eos_token_id == (7, 9)


@pytest.mark.parametrize("name", ["s.yaml", "s.yml", "s.json"])
def test_a_file_gives_the_rest_and_flags_win(tmp_path, name):
    path, content = (
        tmp_path / name,
        dict(count=9, limit=0.5, on=True, pair=[0.5, 1], texts="t", other_rate=1, rate=None),
    )
    path.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    expected = {**content, "count": 1, "pair": (0.5, 1.0), "texts": ["t"]}
    assert parse("--config", path, "--count", 1) == expected


def test_yaml_takes_1e_5_for_a_text_and_we_for_a_number(tmp_path):
    path = tmp_path / "s.yaml"
    path.write_text("rate: 1e-5  # a comment\nlimit: none\nname: '5'\ntexts: [酒店, 位置]\n", encoding="utf-8")
    assert parse("--config", path) == {"rate": 1e-5, "limit": None, "name": "5", "texts": ["酒店", "位置"]}
    path.write_text("", encoding="utf-8")
    assert parse("--config", path) == {}


@pytest.mark.parametrize(("content", "message"), [
    ("cuont: 3", r"s.yaml: there is no setting 'cuont'; did you mean 'count'\?"),
    ("rate: fast", r"s.yaml: rate must be of the type float, got 'fast'"),
    ("name: 5", r"s.yaml: name must be of the type text, got 5"),
    ("texts: [1]", r"s.yaml: texts must be of the type text, got \[1\]"),
    ("pair: [a, b]", r"s.yaml: pair must be of the type float, got \['a', 'b'\]"),
    ("pair: 3", r"s.yaml: pair must be of the type float, got 3"),
    ("- a\n- b", r"s.yaml must hold settings by name, .* got a list"),
    ("a: [", r"s.yaml is not valid YAML: .*line 1"),
])  # fmt: skip
def test_bad_files_are_one_line(tmp_path, content, message):
    (tmp_path / "s.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        parse("--config", tmp_path / "s.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("command", "name", "meant"), [
    ("train", "learning_rate", "lr"), ("train", "model_name_or_path", "policy"),
    ("train", "reward_model_path", "reward"),
    ("train", "num_ppo_epochs", "ppo_epochs"), ("train", "output_dir", "output"), ("train", "bacth_size", "batch_size"),
    ("sft", "num_train_epochs", "epochs"), ("sft", "gradient_accumulation_steps", "accumulation"),
    ("sft", "max_seq_length", "max_length"), ("reward-model", "model_name_or_path", "model"),
])  # fmt: skip
def test_names_of_other_libraries_are_known(tmp_path, command, name, meant):
    (tmp_path / "s.json").write_text(json.dumps({name: 1}))
    args = argparse.Namespace(command=command, config=str(tmp_path / "s.json"))
    with pytest.raises(ValueError, match=rf"there is no setting '{name}'; .*did you mean '{meant}'\?"):
        COMMANDS[command].run(args)


@pytest.mark.parametrize(("line", "meant"), [
    ("train --learning_rate 1e-5", "--learning_rate: did you mean --lr?"),
    ("train --max-new-tokens=8 --seed 1", "--max-new-tokens: in new tokens a prompt, .*did you mean --gen-len?"),
    ("sft --texts t.txt --num_train_epochs 2", "--num_train_epochs: did you mean --epochs?"),
    ("doctor --policy a --reward b --batchsize 3", "--batchsize: did you mean --batch-size?"),
])  # fmt: skip
def test_flags_of_other_libraries_are_known(capsys, line, meant):
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2
    assert re.search(rf"error: unrecognized arguments: .*\({meant.replace('?', '[?]')}\)", capsys.readouterr().err)


def test_flags_like_no_other_get_no_guess(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--frobnicate", "x"])
    assert capsys.readouterr().err.endswith("error: unrecognized arguments: --frobnicate x\n")


def test_without_pyyaml_the_extra_is_named_and_json_works(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    for name in ("s.yaml", "s.json"):
        (tmp_path / name).write_text('{"count": 1}')
    assert parse("--config", tmp_path / "s.json") == {"count": 1}
    with pytest.raises(ImportError, match=r"pip install pyyaml \(minirlhf's extra yaml\)"):
        parse("--config", tmp_path / "s.yaml")


@pytest.mark.parametrize(("command", "config", "prefix"), [
    ("train", PPOConfig, ""), ("train", ChatJudgeConfig, "judge-"), ("sft", SFTConfig, ""),
    ("reward-model", RewardTrainingConfig, ""), ("dpo", DPOConfig, ""),
])  # fmt: skip
def test_every_field_is_a_flag_and_every_default_passes_through(command, config, prefix):
    parser, given = argparse.ArgumentParser(), []
    for names, options in COMMANDS[command].flags:
        parser.add_argument(*names, **options)
    needed = {"model": "m", "rubric": "r"} if config is ChatJudgeConfig else {}
    made = config(**needed)
    for field in dataclasses.fields(config):
        value, flag = getattr(made, field.name), f"--{prefix}{field.name.replace('_', '-')}"
        if isinstance(value, bool):
            given.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            several = value if isinstance(value, tuple) else [json.dumps(value) if isinstance(value, dict) else value]
            given += [flag, *map(str, several)]
    parsed = Settings(config, prefix.replace("-", "_")).of(vars(parser.parse_args(given)))
    assert parsed.keys() == {field.name for field in dataclasses.fields(config)}
    assert config(**{name: tuple(x) if isinstance(x, list) else x for name, x in parsed.items()}) == made
    assert len(descriptions(config)) > 0.6 * len(parsed)
