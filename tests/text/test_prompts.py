"""Prompts: every collection of texts becomes the same list, and anything else is refused by name."""

import collections.abc
import io
import itertools
import json
import string

import numpy as np
import pytest
import torch

from minirlhf.text import text_files
from minirlhf.text.prompts import as_prompts, read_pool, read_prompts

TEXTS = ["酒店", "The room", "房间"]


class Column(collections.abc.Sequence):
    """As a column of `datasets` 4: an index must be a plain int."""

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, key):
        if type(key) is not int and not isinstance(key, slice):
            raise TypeError(f"wrong key type {type(key).__name__}")
        return TEXTS[key]


class Series:
    """As pandas has it: an index is a label, and these begin elsewhere."""

    def __iter__(self):
        return iter(TEXTS)

    def __len__(self):
        return len(TEXTS)

    def __getitem__(self, key):
        return dict(enumerate(TEXTS, 10))[key]


class DataFrame:
    def __iter__(self):
        return iter(["prompt", "label"])


@pytest.mark.parametrize("pool", [
    TEXTS, tuple(TEXTS), Column(), Series(), (text for text in TEXTS), iter(TEXTS), dict.fromkeys(TEXTS).keys(),
    np.array(TEXTS), np.array(TEXTS, dtype=object), map(str, TEXTS),
], ids=lambda pool: type(pool).__name__)  # fmt: skip
def test_every_collection_becomes_the_same_list(pool):
    found = as_prompts(pool)
    assert found == TEXTS and type(found) is list and all(type(text) is str for text in found)


def test_a_set_has_one_order_in_every_process():
    """Or a resumed run would draw other prompts. Python's own order of so many texts is never this one."""
    assert as_prompts(set(string.ascii_letters)) == as_prompts(frozenset(string.ascii_letters)) == LETTERS


LETTERS = sorted(string.ascii_letters)


@pytest.mark.parametrize(("pool", "message"), [
    ("酒店", "got '酒店' of type str: give a list of texts"), (b"x", "got b'x' of type bytes"), (None, "a NoneType"),
    (3, "got a int"), ({"prompt": TEXTS}, "got a dict"), (DataFrame(), r'got a DataFrame: give df\["prompt"\]'),
    ([3], "prompt 0 must be a text, got 3 of type int"), (["a", None], "prompt 1 must be a text, got None"),
    (["a", float("nan")], "prompt 1 must be a text, got nan of type float"), ([["a"]], r"got \['a'\] of type list"),
    ([{"role": "user", "content": "x"}], "of type dict"), (torch.ones(2), "prompt 0 must be a text, got tensor"),
    ([b"a"], "of type bytes"), (np.array("酒店"), "a ndarray"), ([], "got no prompts"), (iter([]), "got no prompts"),
])  # fmt: skip
def test_anything_else_is_refused_by_type_and_example(pool, message):
    with pytest.raises(ValueError, match=message) as caught:
        as_prompts(pool)
    assert "prompt" in str(caught.value) and len(str(caught.value)) < 300


def test_a_generator_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr(text_files, "MOST_ITEMS", 1000)
    with pytest.raises(ValueError, match="more than 1000 prompts: does the cycle ever end"):
        as_prompts(itertools.cycle(TEXTS))
    assert len(as_prompts(itertools.islice(itertools.cycle(TEXTS), 1000))) == 1000


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["prompts.txt", "prompts", "prompts.TXT"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_a_text_file_holds_a_prompt_a_line(tmp_path, name, mark):
    (tmp_path / name).write_bytes((mark + "酒店\r\n\r\nThe room\n房间").encode())
    assert as_prompts(tmp_path / name) == read_prompts(str(tmp_path / name)) == TEXTS


def test_json_lines_hold_a_field_prompt(tmp_path):
    lines = [json.dumps({"prompt": text, "id": 3}) for text in TEXTS]
    (tmp_path / "prompts.jsonl").write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    assert as_prompts(tmp_path / "prompts.jsonl") == TEXTS


@pytest.mark.parametrize(("line", "message"), [
    ('{"text": "x", "id": 1}', "line 2: prompt missing; the line has 'text', 'id'"), ("{", "line 2: this is not valid"),
    ('{"prompt": ["x"]}', "line 2: message 1 must be an object with"), ('"x"', "line 2: expected a JSON object"),
    ("{}", "line 2: prompt missing; the line has no fields"),
])  # fmt: skip
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line, encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        as_prompts(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["a.csv", "a.json", "a.tsv", "a.parquet", "a.xlsx"])
def test_other_files_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_text("prompt\nx\n")
    with pytest.raises(ValueError, match=r"must be \.txt .* or \.jsonl .*, not \."):
        as_prompts(tmp_path / name)


def test_a_file_without_prompts_and_a_missing_one_are_named(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n")
    with pytest.raises(ValueError, match=r"a.txt holds no prompts"):
        as_prompts(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"b.txt does not exist"):
        as_prompts(tmp_path / "b.txt")
    (tmp_path / "a.txt").write_bytes("酒店".encode("gbk"))
    with pytest.raises(ValueError, match=r"a.txt, line 1 is not utf-8"):
        as_prompts(tmp_path / "a.txt")
    assert read_prompts(tmp_path / "a.txt", "gbk") == ["酒店"]


def test_an_open_text_file_gives_its_lines(tmp_path):
    path = tmp_path / "prompts.txt"
    for content in ("酒店\nThe room\n房间\n", "\ufeff酒店\r\n\r\nThe room\n房间"):
        path.write_bytes(content.encode())
        with open(path, encoding="utf-8") as file:
            assert as_prompts(file) == as_prompts(io.StringIO(content)) == as_prompts(path) == TEXTS
    with pytest.raises(ValueError, match="got no prompts"):
        as_prompts(io.StringIO(""))
    with pytest.raises(ValueError, match="of type bytes"):
        as_prompts(io.BytesIO(b"a\nb\n"))


@pytest.mark.parametrize("name", ["prompts.txt", "prompts"])
def test_a_text_file_of_rows_is_refused(tmp_path, name):
    path, row = tmp_path / name, json.dumps({"prompt": "酒店"})
    path.write_text(f"{row}\n\n{row}\n", encoding="utf-8")
    for given in (path, io.StringIO(f"{row}\n"), open(path, encoding="utf-8")):  # noqa: SIM115
        with pytest.raises(ValueError, match=r"each is a JSON object with 'prompt' or 'messages': name it .jsonl"):
            as_prompts(given)
    for line in ("{", '{"city": "Rome"}', "3", "[]"):  # texts that a model may be asked to continue
        path.write_text(f"{row}\n{line}\n", encoding="utf-8")
        assert as_prompts(path) == [row, line]


def test_a_row_with_a_prompt_may_have_more_of_its_chat(tmp_path):
    """As UltraChat has it: `messages` holds the prompt and the answers to it."""
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [
        ({"prompt": "a", "messages": [user, answer]}, "a"), ({"prompt": "a", "messages": [user]}, "a"),
        ({"prompt": [user], "messages": [user, answer]}, [user]), ({"prompt": None, "messages": [user]}, [user]),
        ({"prompt": "", "messages": [user]}, [user]), ({"messages": [user]}, [user]),
    ]  # fmt: skip
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(row) for row, _ in rows))
    assert read_prompts(tmp_path / "p.jsonl") == [prompt for _, prompt in rows]


@pytest.mark.parametrize("pool", [
    ["酒店"], ["酒店", "readme.txt is"], ["a/b"], ["data/missing", "a/b"], ["酒店", ""], ["x" * 9999, "a\0b", "\ud800"],
    ["酒店", [{"role": "user", "content": "a.txt"}]], ["open missing.txt", "酒店"], [],
    ["I wrote it as .txt,", "Use csv"],
])  # fmt: skip
def test_texts_of_a_command_line_are_prompts(tmp_path, monkeypatch, pool):
    monkeypatch.chdir(tmp_path)
    assert read_pool(pool) == pool


def test_a_file_on_a_command_line_is_read_or_refused_and_never_a_prompt(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("酒店\nThe room\n房间\n", encoding="utf-8")
    (tmp_path / "b").write_text("酒店", encoding="utf-8")
    (tmp_path / "folder").mkdir()
    assert read_pool(["a.txt"]) == TEXTS and read_pool(["b"]) == ["酒店"]
    pools = [["酒店", "a.txt"], ["a.txt", "missing.txt"], ["b", "酒店"], ["folder", "folder"]]
    for pool in [*pools, ["missing.jsonl", "x.csv"], ["missing.TXT", "x.Json"], ["x.tsv", "x.parquet"]]:
        with pytest.raises(ValueError, match=r"must be texts, or one file: '\S+', one of 2, names a file or folder"):
            read_pool(pool)
    for name in ("missing.txt", "missing.TXT", "data/missing.jsonl", "folder"):
        with pytest.raises(FileNotFoundError, match=f"{name} does not exist, or is not a file"):
            read_pool([name])
    for name in ("missing.json", "prompts.csv", "x.parquet"):
        with pytest.raises(ValueError, match=rf"{name} must be \.txt .* or \.jsonl"):
            read_pool([name])


@pytest.mark.parametrize("name", ["prompts.txt", "prompts.jsonl"])
def test_a_git_lfs_pointer_is_no_prompt(tmp_path, name):
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(ValueError, match="is a git-lfs pointer"):
        as_prompts(tmp_path / name)
