"""The documentation keeps its word: its code runs, its files and names exist, its glossary is complete."""

import importlib
import importlib.util
import re
import shlex
import sys
from pathlib import Path

import line_numbers
import pytest
import torch

import minirlhf
from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, DPOTrainer, PPOConfig, PPOTrainer, Tokenizer
from minirlhf.commands.main import build_parser
from minirlhf.commands.table import COMMANDS
from minirlhf.common.field_names import FIELD_NAMES
from minirlhf.rl import advantages
from test_architecture import WINGS

REPO = Path(__file__).resolve().parents[2]
DOCS = sorted(f"docs/{path.name}" for path in (REPO / "docs").glob("*.md"))
PAGES = [
    "README.md",
    "README.zh-CN.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "examples/README.md",
    "weights/README.md",
    *DOCS,
]
KEY = r"(?:ppo|objective|reward|tokens|time|dpo|rewards|logps)/[\w/]+"


def read(name):
    return (REPO / name).read_text(encoding="utf-8")


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def links(text):
    """Targets of the links and pictures of a page that lead to files or headings of this repository."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not link.startswith("http")]


def anchors(text):
    """The anchors of a page's headings, as they are made on the web."""
    titles = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def marked(text, mark):
    """The command block behind <!-- ci: MARK -->, as .ci/run reads it."""
    found = re.findall(rf"^<!-- ci: {mark} -->\n```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"{len(found)} blocks marked {mark}"
    return found[0]


# ---- code -----------------------------------------------------------------------------------------------------------


def substitute(code, old, new):
    assert code.count(old) == 1, f"{old} occurs {code.count(old)} times"
    return code.replace(old, new)


def test_the_python_block_runs_as_it_stands_and_its_run_resumes(tmp_path, monkeypatch, capsys):
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
    names = {"__name__": "__main__"}
    exec(compile(code, "README.md", "exec"), names)

    history = [line["reward/mean"] for line in names["run"].history()]
    assert len(history) == 3 and max(history) > 0
    assert capsys.readouterr().out.count("'") == 6  # three texts
    assert not torch.equal(GPT2.from_pretrained("runs/breakfast/policy").wte.weight, policy.wte.weight)
    (resume,) = re.findall(r"Run\.resume\(.*?\)", code)
    with eval(resume, names) as run:
        assert run.trainer.iteration == 3


def test_the_estimator_of_the_contributor_s_guide_trains_without_a_value_head(monkeypatch):
    (code,) = blocks(read("CONTRIBUTING.md"), "python")
    names = vars(advantages).copy()
    exec(compile("from __future__ import annotations\n" + code, "CONTRIBUTING.md", "exec"), names)
    assert names["ADVANTAGES"].keys() - advantages.ADVANTAGES.keys() == {"opo"}
    monkeypatch.setitem(advantages.ADVANTAGES, "opo", names["opo"])
    sizes = dict(n_embd=16, n_layer=1, n_head=2)
    trainer = PPOTrainer(
        make_gpt2(0, **sizes), make_gpt2(0, **sizes), Tokenizer(VOCAB), advantages="opo", group_size=2,
        batch_size=4, minibatch_size=4, steps=4, gen_len=4, device="cpu",
    )  # fmt: skip
    before = trainer.policy.decoder.wte.weight.clone()
    trainer.train(["酒店"], lambda texts: [float(len(set(text))) for text in texts])
    assert trainer.policy.value_head is None
    assert not torch.equal(trainer.policy.decoder.wte.weight, before)


def test_the_options_in_its_commands_are_the_script_s(monkeypatch):
    pytest.importorskip("tqdm")
    monkeypatch.syspath_prepend(str(REPO / "examples"))
    import positive_reviews

    commands = [line for block in blocks(read("README.md"), "sh") for line in block.splitlines()]
    commands = [line.split("positive_reviews.py")[1].split() for line in commands if "positive_reviews.py" in line]
    seen = []
    for arguments in commands:
        monkeypatch.setattr(sys, "argv", ["positive_reviews.py", *arguments])
        seen.append(positive_reviews.read_settings())
    (plain, own), (mine, config), (original, recipe) = seen
    assert own.iterations == 80 and Path(plain.policy).parent == REPO / "weights"
    assert mine.prompts == ["房间", "早餐", "服务员"] and (config.steps, config.seed) == (6400, 3)
    assert original.policy == "GPT2_FOLDER" and recipe.precision == "bf16" and recipe.minibatch_size == 1


def test_the_commands_of_the_command_line_are_understood():
    lines = [line for page in PAGES for block in blocks(read(page), "sh") for line in block.splitlines()]
    lines += [line[4:] for page in PAGES for line in read(page).splitlines() if line.startswith("    ")]
    found = [re.match(r"(?:[A-Z_]+=\S+ )?minirlhf ([a-z].*)", line) for line in lines]
    commands = [match[1] for match in found if match]
    parsed = {build_parser().parse_args(shlex.split(command)).command for command in commands}
    assert parsed == COMMANDS.keys()


# ---- files and names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_links_to_or_names_exists(page):
    """Files and headings; [trainer.py](.../trainer.py), and [`gae`](file that defines it)."""
    text, folder = read(page), (REPO / page).parent
    for link in links(text):
        path, _, anchor = link.partition("#")
        target = (folder / path).resolve() if path else REPO / page
        assert target.exists(), link
        if anchor and not re.fullmatch(r"L\d+", anchor):
            assert anchor in anchors(target.read_text(encoding="utf-8")), link
    named = re.findall(r"`((?:tests|examples|minirlhf|weights|docs)/[\w./-]+)`", text)
    named += re.findall(r"\b((?:examples|tests|weights)/[\w/-]+\.\w+)", "\n".join(blocks(text, "sh")))
    assert [name for name in named if not (REPO / name).exists()] == []
    for name, link in re.findall(r"\[([\w./-]+\.\w+)\]\(([^)#]+)\)", text):
        assert link.endswith(name)
    for name, link in re.findall(r"\[`(\w+)`\]\(([^)]+\.py)(?:#L\d+)?\)", text):
        source = (folder / link).read_text(encoding="utf-8")
        assert re.search(rf"^ *(?:def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), (name, link)


def test_links_to_functions_lead_to_their_lines():
    """`make lines` renews them."""
    text = read("docs/details.md")
    assert line_numbers.renewed(text) == text and len(re.findall(line_numbers.LINK, text)) > 20


def test_every_page_of_docs_is_reached_from_the_readme_and_has_its_place_in_the_site():
    reached, waiting = set(), ["README.md"]
    while waiting:
        page = waiting.pop()
        found = {(REPO / page).parent.joinpath(link.split("#")[0]).resolve() for link in links(read(page))}
        names = {path.relative_to(REPO).as_posix() for path in found if path.suffix == ".md"}
        waiting += names - reached
        reached |= names
    assert set(DOCS) <= reached
    nav = re.findall(r"^ +- (?:.*: )?(\S+\.md)$", read("mkdocs.yml").split("\nnav:\n")[1], re.MULTILINE)
    assert len(nav) == len(set(nav))
    assert {f"docs/{page}" for page in nav if (REPO / "docs" / page).exists()} == set(DOCS)


@pytest.mark.parametrize("page", DOCS)
def test_a_page_of_docs_begins_with_a_title_and_a_paragraph(page):
    title, blank, first, *_ = read(page).splitlines()
    assert title.startswith("# ") and blank == "" and re.match(r"[\w!]", first)


def test_the_examples_readme_lists_the_scripts_and_no_others():
    text = read("examples/README.md")
    rows = re.findall(r"^\| `(\w+\.py)` \|", text, re.MULTILINE)
    there = {path.name for path in (REPO / "examples").glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert len(rows) == len(set(rows)) <= 12 and set(rows) == there


def test_the_commands_of_make_are_all_of_the_makefile():
    (targets,) = re.findall(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)
    (commands,) = (block for block in blocks(read("CONTRIBUTING.md"), "sh") if "make setup" in block)
    assert set(re.findall(r"^make (\w+)", commands, re.MULTILINE)) == set(targets.split())


def test_the_wings_are_listed_in_their_order():
    for page in ("README.md", "README.zh-CN.md"):
        assert tuple(re.findall(r"^(\w+)/ +\S", "\n".join(blocks(read(page), "text")), re.MULTILINE)) == WINGS
    assert "    " + "  ".join(WINGS) + "\n" in read("CONTRIBUTING.md")


def test_the_reference_has_every_public_name_once():
    names = re.findall(r"^::: minirlhf\.(\w+)$", read("docs/reference.md"), re.MULTILINE)
    assert sorted(names) == sorted(minirlhf.__all__)
    for name in re.findall(r"^::: minirlhf\.([\w.]+\.\w+)$", read("docs/reference.md"), re.MULTILINE):
        module, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(f"minirlhf.{module}"), last), name


def test_the_test_of_every_promise_exists():
    tests = {path.name: path.read_text(encoding="utf-8") for path in (REPO / "tests").rglob("*.py")}
    defined = {name for text in tests.values() for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    rows = read("docs/promises.md").split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    named = [set(re.findall(r"`((?:test_)?\w+(?:\.py)?)`", row.split(" | ")[1])) for row in rows]
    assert len(rows) >= 12 and all(named)
    assert set().union(*named) <= defined | tests.keys()


def test_the_changes_say_where_each_module_is():
    rows = re.findall(r"^\| `minirlhf\.(\w+)` \| (.*) \|$", read("CHANGELOG.md"), re.MULTILINE)
    assert tuple(wing for wing, _ in rows if wing in WINGS) == WINGS
    for wing, modules in rows:
        for name in re.findall(r"`([\w.]+)`", re.sub(r"\(.*?\)", "", modules)) if wing in WINGS else ():
            assert importlib.util.find_spec(f"minirlhf.{wing}.{name}"), (wing, name)


def test_the_changes_begin_with_the_version():
    assert re.findall(r"^## (\S+)$", read("CHANGELOG.md"), re.MULTILINE)[0] == minirlhf.__version__


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_whole_and_no_placeholder_is_left(page):
    """All rows of a table have as many cells as its head; `\\Vert` stands for a bar inside a formula."""
    assert re.findall(r"\w*PLACEHOLDER\w*|TODO|XXX", read(page)) == []
    for table in re.findall(r"(?:^\|.*\n)+", read(page), re.MULTILINE):
        rows = [re.sub(r"\$[^$]*\$|`[^`]*`", "", row).rstrip() for row in table.splitlines()]
        assert all(row.endswith("|") for row in rows) and len({row.count("|") for row in rows}) == 1, table


@pytest.mark.parametrize("mark", ["main", "tests"])
def test_the_command_blocks(mark):
    command = marked(read("README.md"), mark)
    assert command.strip() and "\n" not in command.strip()  # one command each
    assert marked(read("README.zh-CN.md"), mark) == command


def test_the_readme_is_short_and_the_chinese_one_has_the_same_content():
    english, chinese = read("README.md"), read("README.zh-CN.md")
    assert len(english.splitlines()) <= 160 and len(chinese.splitlines()) <= 160
    for found in (
        lambda text: [re.sub(r"\s*#.*", "", line) for b in blocks(text, "(?:python|sh)") for line in b.splitlines()],
        lambda text: [link.replace(".zh-CN", "") for link in links(text) if not link.startswith("README")],
        lambda text: [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)],
        lambda text: [line.count("|") for line in text.splitlines() if line.startswith("|")],
        lambda text: [len(block.splitlines()) for block in blocks(text, "text")],
        lambda text: sorted(re.findall(r"\d+\.\d+", text)),
        lambda text: len(re.findall(r"^(?:- |\d\. )", text, re.MULTILINE)),
    ):
        assert found(english) and found(chinese) == found(english)


def test_the_six_rows_of_a_step_are_those_of_the_docs():
    (rows,) = (block for block in blocks(read("README.md"), "text") if block.startswith("token "))
    (whole,) = (block for block in blocks(read("docs/details.md"), "text") if "token  logprob" in block)
    assert len(rows.splitlines()) == 7 and set(rows.splitlines()) <= set(whole.splitlines())
    assert "score 0.99" in read("README.md") and "score 0.99" in whole
    assert rows in read("README.zh-CN.md")


def test_the_chinese_readme_is_in_chinese():
    """Every heading, table head, link of docs and list item has Chinese characters."""
    text = read("README.zh-CN.md")
    lines = re.findall(r"^(?:## |- |\d\. ).*", text, re.MULTILINE) + re.findall(r"^\|.*(?=\n\|---)", text, re.MULTILINE)
    lines += re.findall(r"\[([^\]]*)\]\(docs/", text)
    assert lines and [line for line in lines if not re.search(r"[\u4e00-\u9fff]", line)] == []


# ---- numbers --------------------------------------------------------------------------------------------------------


def test_the_glossary_has_every_key_of_a_step_and_no_other():
    sizes = dict(n_embd=16, n_layer=1, n_head=2)
    trainer = PPOTrainer(
        make_gpt2(0, **sizes), make_gpt2(1, **sizes), Tokenizer(VOCAB), batch_size=4, steps=8, gen_len=4, device="cpu",
        group_size=2,
    )  # fmt: skip
    stats = trainer.step(trainer.collect(["酒店"] * 2, lambda texts: [len(set(text)) for text in texts]))
    rows = re.findall(r"^\| (`.*?) \|", read("docs/metrics.md").split("\n## DPO\n")[0], re.MULTILINE)
    explained = [name for row in rows for name in re.findall(rf"`({KEY})`", row)]
    assert len(explained) == len(set(explained))
    assert {"not in the glossary": stats.keys() - set(explained), "not logged": set(explained) - stats.keys()} == {
        "not in the glossary": set(),
        "not logged": set(),
    }


def test_the_glossary_has_every_key_of_a_step_of_dpo():
    sizes, seen = dict(n_embd=16, n_layer=1, n_head=2), []
    trainer = DPOTrainer(make_gpt2(0, **sizes), make_gpt2(1, **sizes), Tokenizer(VOCAB), device="cpu")
    trainer.train([{"prompt": "酒店", "chosen": "好", "rejected": "差"}], lambda _, stats: seen.extend(stats))
    rows = re.findall(r"^\| (`.*?) \|", read("docs/metrics.md").split("\n## DPO\n")[1], re.MULTILINE)
    assert sorted(seen) == sorted(name for row in rows for name in re.findall(rf"`({KEY})`", row))


def test_the_dpo_of_the_guide_runs_as_it_stands(tmp_path, monkeypatch):
    make_gpt2(0, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path / "tiny")
    Tokenizer(VOCAB).save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    (code,) = (block for block in blocks(read("docs/guide.md"), "python") if "DPOTrainer" in block)
    names = {}
    exec(compile(substitute(code, '"weights/gpt2-chinese-reviews-small"', '"tiny"'), "guide.md", "exec"), names)
    (resume,) = re.findall(r"Run\.resume\(.*?\)", code)
    with eval(resume, names) as run:
        run.trainer.train(names["pairs"], run.record)
        assert run.trainer.steps_done == run.trainer.steps_total == 1
    assert GPT2.from_pretrained("runs/dpo/policy").config.n_embd == 16


def test_the_defaults_that_it_lists_are_those_of_the_config():
    text = read("docs/recipe.md")
    (inside,) = re.findall(r"recipe \((steps.*?)\)", text, re.DOTALL)
    pairs = [pair.split() for pair in inside.split(",")]
    assert len(pairs) == 15
    assert {name: float(value) for name, value in pairs} == {name: getattr(PPOConfig(), name) for name, _ in pairs}
    assert f"a minibatch of {PPOConfig().minibatch_size} " in text


def test_the_presets_of_the_table_are_those_of_the_config():
    """Rows of one field whose cells are numbers, yes or no, never, or the field's own values."""
    text = read("docs/presets.md")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
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


def test_the_table_of_names_elsewhere_is_that_of_the_errors():
    for page in ("docs/from_trl.md", "docs/from_trl.zh-CN.md"):
        rows = [row.strip("| ").split(" | ") for row in read(page).split("|---|---|---|\n")[2].splitlines()]
        table = {name: field.strip("`") for field, names, *_ in rows for name in re.findall(r"`(\w+)`", names)}
        assert table == {name: field or "-" for name, (field, _) in FIELD_NAMES.items()}
        if "zh-CN" not in page:
            remarks = {names: remark for _, names, remark in (row if len(row) == 3 else [*row, ""] for row in rows)}
            assert set(remarks.values()) == {remark for _, remark in FIELD_NAMES.values()}


def test_the_size_of_the_sampling_sets():
    text = read("docs/sampling.md")
    a_token = -(-21128 // 8)
    assert f"{a_token / 1000:.1f} kB at V = 21128, {a_token * 128 * 16 / 1e6:.1f} MB for a batch of 128 x 16" in text
