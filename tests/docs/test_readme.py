"""The README keeps its word: its code runs, its files and names exist, its glossary is complete."""

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, ActorCritic, PPOConfig, PPOTrainer, Tokenizer
from minirlhf.rl import ppo

REPO = Path(__file__).resolve().parents[2]
PAGES = ["README.md", "README.zh-CN.md", "examples/README.md"]
KEY = r"(?:ppo|objective|reward|tokens|time)/[\w/]+"


def read(name):
    if name == "README.zh-CN.md" and not (REPO / name).exists():
        pytest.skip("there is no README.zh-CN.md")
    return (REPO / name).read_text(encoding="utf-8")


def section(text, title):
    """From a heading to the next one of the same level."""
    (found,) = re.findall(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    return found


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def marked(text, mark):
    """The command block behind <!-- ci: MARK -->, as .ci/run reads it."""
    found = re.findall(rf"^<!-- ci: {mark} -->\n```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"{len(found)} blocks marked {mark}"
    return found[0]


# ---- code -----------------------------------------------------------------------------------------------------------


def substitute(code, old, new):
    assert code.count(old) == 1, f"{old} occurs {code.count(old)} times"
    return code.replace(old, new)


def test_the_python_block_runs_as_it_stands(tmp_path, monkeypatch, capsys):
    policy = make_gpt2(0, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    with torch.no_grad():  # it likes breakfast, or there would be no reward to learn from
        policy.ln_f.weight[0], policy.ln_f.bias[0] = 0.0, 4.0
        policy.wte.weight[:, 0] = torch.tensor([float(token in ("早", "餐")) for token in VOCAB])
    policy.save_pretrained(tmp_path / "tiny")
    Tokenizer(VOCAB).save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(read("README.md"), "python")
    code = substitute(code, '"weights/gpt2-chinese-reviews-small"', '"tiny"')
    code = substitute(code, "steps=1280, batch_size=64", "steps=12, batch_size=4")
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})

    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 3  # a line a step
    means, texts = zip(*(line.split("  ", 1) for line in shown), strict=True)
    assert any(float(mean) > 0 for mean in means)
    assert all(text.startswith(("酒店", "这家酒店", "房间")) for text in texts)
    saved = ActorCritic.from_pretrained("runs/breakfast")
    assert Tokenizer.from_pretrained("runs/breakfast").vocab == VOCAB
    assert not torch.equal(saved.gpt2.wte.weight, GPT2.from_pretrained("tiny").wte.weight)


def test_the_options_in_its_commands_are_the_script_s(monkeypatch):
    pytest.importorskip("tqdm")
    import positive_reviews

    commands = [line for block in blocks(read("README.md"), "sh") for line in block.splitlines()]
    commands = [line.split("positive_reviews.py")[1].split() for line in commands if "positive_reviews.py" in line]
    assert len(commands) == 4
    seen = []
    for arguments in commands:
        if "--resume" in arguments:
            assert "resume=" in inspect.getsource(positive_reviews.read_settings)
            continue
        monkeypatch.setattr(sys, "argv", ["positive_reviews.py", *arguments])
        args, config = positive_reviews.read_settings()
        seen.append((args, config))
    (plain, own), (mine, config), (original, recipe) = seen
    assert own.steps == positive_reviews.DEFAULT["steps"] and Path(plain.policy).parent == REPO / "weights"
    assert mine.prompts == ["房间", "早餐", "服务员"] and (config.steps, config.seed) == (6400, 3)
    assert original.policy == "GPT2_FOLDER" and recipe.precision == "bf16" and recipe.minibatch_size == 1


# ---- files and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_every_linked_file_exists(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", read(page)) if not link.startswith(("http", "#"))]
    named = re.findall(r"`((?:tests|examples|minirlhf|weights)/[\w./-]+)`", read(page))
    assert links or named
    folder = (REPO / page).parent
    missing = [link for link in links if not (folder / link.split("#")[0]).exists()]
    assert not missing + [name for name in named if not (REPO / name).exists()]


def test_the_map_names_each_link_as_the_file_is_called():
    rows = re.findall(r"\[([\w/]+\.\w+)\]\(([^)]+)\)", section(read("README.md"), "Read it"))
    assert len(rows) >= 15
    assert all(link.endswith(name) for name, link in rows)


def test_the_examples_readme_lists_the_scripts_and_no_others():
    rows = re.findall(r"^\| `(\w+\.py)` \|", read("examples/README.md"), re.MULTILINE)
    there = {path.name for path in (REPO / "examples").glob("*.py")}
    assert rows and set(rows) <= there
    assert {name for name in there if f"`{name}`" not in read("examples/README.md")} == set()


@pytest.mark.parametrize(("page", "title"), [("README.md", "What it promises"), ("README.zh-CN.md", "它保证什么")])
def test_the_test_of_every_promise_exists(page, title):
    tests = {path.name: path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("*.py")}
    defined = {name for text in tests.values() for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    rows = section(read(page), title).split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    named = [set(re.findall(r"`((?:test_)?\w+(?:\.py)?)`", row.split(" | ")[1])) for row in rows]
    assert len(rows) >= 12 and all(named)
    assert set().union(*named) <= defined | tests.keys()


def test_the_functions_of_the_mathematics_exist():
    names = re.findall(r"`ppo\.(\w+)`", section(read("README.md"), "Read it"))
    assert {"token_rewards", "gae", "whiten", "policy_loss", "value_loss", "AdaptiveKL"} <= set(names)
    assert [name for name in names if not hasattr(ppo, name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_no_placeholder_is_left(page):
    assert re.findall(r"\w*PLACEHOLDER\w*|TODO|XXX", read(page)) == []


@pytest.mark.parametrize("mark", ["main", "tests"])
def test_the_command_blocks(mark):
    command = marked(read("README.md"), mark)
    assert command.strip() and "\n" not in command.strip()  # one command each
    assert marked(read("README.zh-CN.md"), mark) == command


def test_the_chinese_page_has_the_same_code_links_and_metrics():
    english, chinese = read("README.md"), read("README.zh-CN.md")
    for found in (
        lambda text: [re.sub(r"\s*#.*", "", line) for b in blocks(text, "(?:python|sh)") for line in b.splitlines()],
        lambda text: sorted(link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("README")),
        lambda text: sorted(re.findall(rf"`({KEY})`", "\n".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE)))),
    ):
        assert found(english) and found(chinese) == found(english)


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_the_glossary_has_every_key_of_a_step_and_no_other():
    sizes = dict(n_embd=16, n_layer=1, n_head=2)
    trainer = PPOTrainer(
        make_gpt2(0, **sizes), make_gpt2(1, **sizes), Tokenizer(VOCAB), batch_size=4, steps=8, gen_len=4, device="cpu"
    )
    stats = trainer.step(trainer.collect(["酒店"] * 4, lambda texts: [len(set(text)) for text in texts]))
    rows = re.findall(r"^\| (`.*?) \|", section(read("README.md"), "Glossary of the logged metrics"), re.MULTILINE)
    explained = [name for row in rows for name in re.findall(rf"`({KEY})`", row)]
    assert len(explained) == len(set(explained))
    assert {"not in the glossary": stats.keys() - set(explained), "not logged": set(explained) - stats.keys()} == {
        "not in the glossary": set(),
        "not logged": set(),
    }


def test_the_defaults_that_it_lists_are_those_of_the_config():
    text = section(read("README.md"), "What differs from the original recipe, and why")
    (inside,) = re.findall(r"recipe \((steps.*?)\)", text, re.DOTALL)
    pairs = [pair.split() for pair in inside.split(",")]
    assert len(pairs) == 15
    assert {name: float(value) for name, value in pairs} == {name: getattr(PPOConfig(), name) for name, _ in pairs}
    assert f"a minibatch of {PPOConfig().minibatch_size} " in text


def test_the_presets_of_examples_readme_are_those_of_the_config():
    """Rows of one field whose cells are numbers, yes or no, never, or the field's own values."""
    text = section(read("examples/README.md"), "Presets: where implementations of PPO on language models differ")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    table = [row for row in table if len(row) == len(table[0])]  # the table of the defects is another one
    names = table[0][2:]
    assert names == ["default", "original", "oai2019", "trl2020", "trl0.11"]
    configs = [PPOConfig(), *map(PPOConfig.preset, names[1:])]
    words = {"yes": True, "no": False, "never": None, "last token": "last_token", "last column": "last_column"}
    words |= {"as sampled": False, "not truncated": False, "in full": True}
    checked = []
    for _, fields, *cells in table[2:]:
        fields = re.findall(r"`(\w+)`", fields)
        before = None
        for cell, config in zip(cells, configs, strict=True):
            cell = before if cell == "same" else cell
            before = cell
            for field, value in zip(fields, cell.split(", "), strict=True):
                actual = getattr(config, field)
                if value in words:
                    expected = words[value]
                elif re.fullmatch(r"±?[\d.]+(e-?\d+)?", value):
                    expected = float(value.lstrip("±"))
                else:
                    expected = value.replace(" of the minibatch", "").replace("-", "_")
                if field == "value_head":
                    actual = actual or "linear"
                assert actual == expected, (field, config, value)
                checked.append(field)
    assert len(checked) == 5 * (len(table) - 2 + 3)  # three rows have two fields


def test_the_size_of_the_sampling_sets():
    text = read("examples/README.md")
    a_token = -(-21128 // 8)
    assert f"{a_token / 1000:.1f} kB at V = 21128, {a_token * 128 * 16 / 1e6:.1f} MB for a batch of 128 x 16" in text
