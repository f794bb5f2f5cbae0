"""Reading demonstrations: texts and pairs, every kind of bad line by file and number, and the split."""

import json

import pytest

from minirlhf.text.demonstrations import Demonstration, read_demonstrations, split_demonstrations

ONE, TWO = Demonstration("", "服务很好"), Demonstration("酒店", "a\u2028b\x85c")


def write(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows() -> list[str]:
    pair = {"prompt": TWO.prompt, "response": TWO.response, "annotator": 7}
    return [json.dumps({"text": ONE.response}, ensure_ascii=False), json.dumps(pair, ensure_ascii=False)]


def test_texts_and_pairs_by_hand(tmp_path):
    for text in ("\n".join(rows()) + "\n", "\ufeff\n" + "\r\n \r\n".join(rows())):
        assert read_demonstrations(write(tmp_path, text, "d.jsonl")) == [ONE, TWO]
    path = write(tmp_path, "服务很好\r\n\r\na".encode("gbk"), "d.txt")
    assert read_demonstrations(path, "gbk") == [ONE, Demonstration("", "a")]
    with pytest.raises(ValueError, match=r"d.txt, line 1 is not utf-8 .*gbk$"):
        read_demonstrations(path)


@pytest.mark.parametrize(("line", "message"), [
    ("{", "not valid JSON"), ('{"text": "a"} b', "not valid JSON"), ("[" * 100_000, "not valid JSON"),
    ("[1]", "expected a JSON object, got a list"), ("{}", "prompt and response missing"),
    ('{"prompt": "a"}', "line 3: response missing"), ('{"response": "a"}', "line 3: prompt missing"),
    ('{"text": "a", "response": "b"}', "not both"), ('{"prompt": "q", "text": "abc"}', "line 3: .* not both"),
    ('{"text": 5}', "text must be a text, got a int"),
    ('{"prompt": null, "response": "a"}', "prompt must be a text, got a NoneType"),
    ('{"prompt": "a", "response": ["b"]}', "response must be a text, got a list"),
    ('{"prompt": "a", "response": " \\u3000"}', "the response is empty"), ('{"text": ""}', "the text is empty"),
])  # fmt: skip
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    path = write(tmp_path, f"{rows()[0]}\n\n{line}\n", "d.jsonl")
    with pytest.raises(ValueError, match=message) as caught:
        read_demonstrations(path)
    assert str(caught.value).startswith(f"{path}, line 3: ") and len(str(caught.value)) < len(str(path)) + 200


def test_a_text_beside_a_prompt_that_is_empty_is_a_text(tmp_path):
    lines = [json.dumps({"prompt": prompt, "text": ONE.response}) for prompt in (None, "")]
    assert read_demonstrations(write(tmp_path, "\n".join(lines), "d.jsonl")) == [ONE, ONE]


def test_a_text_file_of_rows_is_refused(tmp_path):
    chat = json.dumps({"messages": []})
    for lines in (rows(), rows()[:1], [chat]):
        with pytest.raises(ValueError, match=r"d.txt must hold a text a line, but each is a JSON object .* it .jsonl"):
            read_demonstrations(write(tmp_path, "\n".join(lines), "d.txt"))
    for line in ("服务很好", '{"city": "Rome"}'):
        assert len(read_demonstrations(write(tmp_path, "\n".join([*rows(), line]), "d.txt"))) == 3


def test_files_that_are_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_demonstrations(tmp_path / "d.txt")
    with pytest.raises(ValueError, match=r"must be named \.txt .* or \.jsonl"):
        read_demonstrations(write(tmp_path, "a", "d.csv"))
    for content in ("", "\n \r\n", "\u3000\n"):
        with pytest.raises(ValueError, match="holds no texts"):
            read_demonstrations(write(tmp_path, content, "d.txt"))


def test_a_prompt_or_a_text_falls_on_one_side_and_the_split_never_changes():
    pairs = [Demonstration(f"问{i % 100}", f"答{i}") for i in range(500)] + [Demonstration("", f"文{i % 200}")
                                                                       for i in range(600)]  # fmt: skip
    train, held_out = split_demonstrations(pairs, 0.2)
    assert sorted(train + held_out, key=pairs.index) == sorted(pairs, key=pairs.index)
    sides = [{one.prompt or one.response for one in side} for side in (train, held_out)]
    assert not sides[0] & sides[1] and 0.1 < len(sides[1]) / 300 < 0.3
    assert split_demonstrations(pairs[::-1], 0.2)[1] == held_out[::-1]
    for share in (0.0, 1.0, -1, 2):
        with pytest.raises(ValueError, match="share must be between 0 and 1"):
            split_demonstrations(pairs, share)
    with pytest.raises(ValueError, match=r"leaves . to train on and . held out"):
        split_demonstrations(pairs[:1])
