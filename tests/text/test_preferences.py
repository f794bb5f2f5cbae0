"""Reading ranked answers: both formats, every kind of bad line by file and number, and the split."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minirlhf.text.preferences import Ranking, rankings_of_scores, read_rankings, split_rankings

GOOD, MIDDLING, BAD = "服务很好", "一般", "太差"
PAIR = {"prompt": "酒店", "chosen": GOOD, "rejected": BAD}


def write(tmp_path, content: str | bytes, name: str):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(tmp_path, *pairs, name="pairs.jsonl"):
    return write(tmp_path, "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs), name)


# ---- what is read ---------------------------------------------------------------------------------------------------


def test_pairs_by_hand(tmp_path):
    path = jsonl(tmp_path, PAIR, {**PAIR, "prompt": "", "margin": 2}, {**PAIR, "margin": 0.5, "annotator": 7})
    assert read_rankings(path) == [
        Ranking("酒店", (GOOD, BAD)), Ranking("", (GOOD, BAD), 2), Ranking("酒店", (GOOD, BAD), 0.5),
    ]  # fmt: skip


def test_lists_by_hand(tmp_path):
    path = write(tmp_path, f"{GOOD}\t{MIDDLING}\t{BAD}\n" + "\t".join("abcdefghi") + "\n", "lists.tsv")
    assert read_rankings(path) == [Ranking("", (GOOD, MIDDLING, BAD)), Ranking("", tuple("abcdefghi"))]


HEADED = "prompt\tbest\t\t\n酒店\ta\tb\n\tc\td\te\n"  # what the header calls the other columns does not matter


@pytest.mark.parametrize(("content", "expected"), [
    (HEADED, [Ranking("酒店", ("a", "b")), Ranking("", ("c", "d", "e"))]),
    (HEADED.replace("prompt", " Prompt "), [Ranking("酒店", ("a", "b")), Ranking("", ("c", "d", "e"))]),
    ("酒店\ta\tb\n", [Ranking("", ("酒店", "a", "b"))]),
])  # fmt: skip
def test_the_first_column_is_a_prompt_if_a_header_says_so(tmp_path, content, expected):
    assert read_rankings(write(tmp_path, content, "lists.tsv")) == expected


def test_a_text_is_the_prompt_with_the_answer_behind_it():
    assert Ranking("酒店", (GOOD, BAD)).texts == ["酒店" + GOOD, "酒店" + BAD]


@pytest.mark.parametrize("name", ["pairs.jsonl", "lists.tsv", "PAIRS.JSONL", "LISTS.TSV"])
@pytest.mark.parametrize("change", [
    lambda text: text, lambda text: "\ufeff" + text, lambda text: text.replace("\n", "\r\n"),
    lambda text: text.replace("\n", "\r"), lambda text: text.removesuffix("\n"),
    lambda text: "\n\n" + text.replace("\n", "\n \n\n"),
    lambda text: "\ufeff" + text.replace("\n", "\r\n\r\n").removesuffix("\r\n"),
], ids=["plain", "byte-order mark", "CRLF", "CR", "no end", "empty lines", "all of these"])  # fmt: skip
def test_marks_line_ends_and_empty_lines_change_nothing(tmp_path, name, change):
    pairs = [("酒店", GOOD, BAD), ("早餐", "a\u2028b\x0bc\x85d", "\x1c e")]  # characters that str.splitlines splits at
    if name.lower().endswith(".jsonl"):
        rows = [json.dumps({"prompt": p, "chosen": c, "rejected": r}, ensure_ascii=False) for p, c, r in pairs]
    else:
        rows = ["prompt\tbest", *("\t".join(pair) for pair in pairs)]
    path = write(tmp_path, change("\n".join(rows) + "\n"), name)
    assert read_rankings(path) == [Ranking(p, (c, r)) for p, c, r in pairs]


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-8-sig", "utf-16", "big5"])
def test_a_named_encoding_is_read(tmp_path, encoding):
    text = "酒店\t好\n早餐\t一般\n"
    assert read_rankings(write(tmp_path, text.encode(encoding), "lists.tsv"), encoding) == [
        Ranking("", ("酒店", "好")), Ranking("", ("早餐", "一般")),
    ]  # fmt: skip


# ---- what is refused, by file and line ------------------------------------------------------------------------------


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


@pytest.mark.parametrize(("line", "message"), [
    ("{", "not valid JSON"), ("酒店", "not valid JSON"), (nested(100_000), "not valid JSON"),
    (f'{{"margin": {"9" * 5000}}}', "not valid JSON"),
    ("[1]", "expected a JSON object, got a list"), ("null", "expected a JSON object, got a NoneType"),
    ("{}", "prompt, chosen, rejected missing"), ('{"prompt": "a", "chosen": "b"}', "line 3: rejected missing"),
    ('{"prompt": "a", "Chosen": "b", "rejected": "c"}', "line 3: chosen missing"),
    ({**PAIR, "prompt": None}, "prompt must be a text, got a NoneType"),
    ({**PAIR, "chosen": 5}, "chosen must be a text, got a int"),
    ({**PAIR, "rejected": ["a"]}, "rejected must be a text, got a list"),
    ({**PAIR, "chosen": ""}, "answer 1 is empty"), ({**PAIR, "rejected": " \u3000\n"}, "answer 2 is empty"),
    ({**PAIR, "chosen": BAD}, "answers 1 and 2 are equal: '太差'"),
    ({**PAIR, "chosen": f" {BAD}\n"}, "answers 1 and 2 are equal"),
    ({**PAIR, "chosen": "好" * 10**5, "rejected": "好" * 10**5}, r"equal: '好{20}'$"),
    *(({**PAIR, "margin": margin}, "margin must be a finite number of at least 0")
      for margin in (-0.1, math.nan, math.inf, 10**400, "1", True, None, [1])),
])  # fmt: skip
def test_a_bad_pair_is_named_by_file_and_line(tmp_path, line, message):
    line = line if isinstance(line, str) else json.dumps(line)
    path = write(tmp_path, f"{json.dumps(PAIR)}\n\n{line}\n{json.dumps(PAIR)}\n", "pairs.jsonl")
    with pytest.raises(ValueError, match=message) as caught:
        read_rankings(path)
    assert str(caught.value).startswith(f"{path}, line 3: ") and len(str(caught.value)) < len(str(path)) + 200


@pytest.mark.parametrize(("line", "message"), [
    ("a", "2 to 9 answers, got 1"), ("\t".join("abcdefghij"), "2 to 9 answers, got 10"),
    ("a\t", "answer 2 is empty"), ("a\t\tb", "answer 2 is empty"), ("\t", "answer 1 is empty"),
    ("a\t \tb", "answer 2 is empty"), ("a\tb\tc\tb", "answers 2 and 4 are equal: 'b'"),
    ("a\tb\t b ", "answers 2 and 3 are equal"),
])  # fmt: skip
@pytest.mark.parametrize("prompt", ["", "酒店\t"])
def test_a_bad_list_is_named_by_file_and_line(tmp_path, line, message, prompt):
    header = "prompt\tbest\n" if prompt else "x\ty\n"
    path = write(tmp_path, f"{header}\n{prompt}{line}\n{prompt}a\tb\n", "lists.tsv")
    with pytest.raises(ValueError, match=message) as caught:
        read_rankings(path)
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize("name", ["pairs.jsonl", "lists.tsv"])
@pytest.mark.parametrize("others", ["utf-8", "gbk"])
def test_another_encoding_is_named_with_its_line_and_the_way_out(tmp_path, name, others):
    """A whole file in GBK, and one line of it among lines of UTF-8."""
    first = "a\tb" if name.endswith("tsv") else json.dumps(PAIR)
    lines = [first.encode(), "\u9152\u5e97\t好".encode(others), "服务\t房间".encode("gbk"), first.encode()]
    path = write(tmp_path, b"\r\n".join(lines), name)
    number = 3 if others == "utf-8" else 2
    with pytest.raises(ValueError, match=rf"line {number} is not utf-8 .*encoding=.*--encoding.*gbk") as caught:
        read_rankings(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("content", "encoding", "offered"), [
    ("好\t差\n".encode("utf-16"), "utf-8", "utf-16"), ("好\t差\n".encode("utf-16-be"), "utf-8", "gbk"),
    ("\ufeff好\t差\n".encode("utf-16-be"), "UTF_8", "utf-16"), ("很好啊\t差\n".encode(), "gbk", "utf-8"),
    ("好\t差\n".encode("gbk"), "utf-8-sig", "gbk"), ("好\t差".encode(), "ascii", "utf-8"),
])  # fmt: skip
def test_the_encoding_that_is_offered_is_another_one(tmp_path, content, encoding, offered):
    with pytest.raises(ValueError, match=rf"lists.tsv, line 1 is not {encoding} .*--encoding, for instance {offered}$"):
        read_rankings(write(tmp_path, content, "lists.tsv"), encoding)


@pytest.mark.parametrize("encoding", ["martian", "hex", "utf-8\0", "rot13"])
def test_an_unknown_encoding_is_refused(tmp_path, encoding):
    with pytest.raises(ValueError, match="encoding must be the name of a text encoding"):
        read_rankings(jsonl(tmp_path, PAIR), encoding)


@pytest.mark.parametrize("content", ["", "\n\r\n \n", "\ufeff", "prompt\tbest\tworst\n"])
def test_a_file_without_rankings_is_refused(tmp_path, content):
    with pytest.raises(ValueError, match=r"lists.tsv holds no rankings"):
        read_rankings(write(tmp_path, content, "lists.tsv"))


@pytest.mark.parametrize("name", ["pairs.json", "pairs.csv", "pairs"])
def test_another_kind_of_file_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name} must be named .jsonl \(pairs\) or .tsv \(lists\)"):
        read_rankings(jsonl(tmp_path, PAIR, name=name))


@pytest.mark.parametrize(("fields", "message"), [
    (("", "ab"), "answers must be a tuple"), (("", None), "answers must be a tuple"),
    (("", ("a", None)), "answer 2 must be a text, got a NoneType"), ((None, ("a", "b")), "prompt must be a text"),
    (("", ()), "2 to 9 answers, got 0"),
])  # fmt: skip
def test_a_ranking_is_checked_wherever_it_comes_from(fields, message):
    with pytest.raises(ValueError, match=message):
        Ranking(*fields)


# ---- the split ------------------------------------------------------------------------------------------------------

MANY = [Ranking(f"p{i}", (f"a{j}", f"b{j}", f"c{j}")) for i in range(300) for j in range(2)]
WITHOUT_PROMPTS = [Ranking("", r.answers) for r in (Ranking("", (f"a{i}", f"b{i}")) for i in range(300))]


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_share_is_held_out_and_nothing_is_lost(share):
    train, held_out = split_rankings(MANY, share)
    assert sorted([*train, *held_out], key=MANY.index) == MANY
    assert [r for r in MANY if r in set(train)] == train  # in the order given
    assert abs(len(held_out) / len(MANY) - share) < 0.06


def test_a_prompt_falls_on_one_side():
    train, held_out = split_rankings(MANY)
    assert not {r.prompt for r in train} & {r.prompt for r in held_out}


@pytest.mark.parametrize("by", ["prompt", "answers"])
def test_answers_fall_on_one_side_whatever_their_order(by):
    """Rankings without a prompt always; with few prompts if asked for."""
    prompt = "" if by == "prompt" else "酒店"
    both = [Ranking(prompt, a) for r in WITHOUT_PROMPTS for a in (r.answers, r.answers[::-1])]
    train, held_out = split_rankings(both, by=by)
    assert not {frozenset(r.answers) for r in train} & {frozenset(r.answers) for r in held_out}
    assert abs(len(held_out) / len(both) - 0.1) < 0.06


def test_the_split_depends_on_the_texts_alone():
    train, held_out = split_rankings(MANY)
    backwards = split_rankings(MANY[::-1])
    assert (backwards[0][::-1], backwards[1][::-1]) == (train, held_out)
    more = split_rankings([*MANY, *WITHOUT_PROMPTS])
    assert set(train) <= set(more[0]) and set(held_out) <= set(more[1])


@pytest.mark.parametrize("rankings", [[], [Ranking("酒店", (f"a{i}", f"b{i}")) for i in range(100)]])
def test_an_empty_side_is_refused(rankings):
    with pytest.raises(ValueError, match=rf"{len(rankings)} to train on and 0 held out|0 to train"):
        split_rankings(rankings)


@pytest.mark.parametrize(("options", "message"), [
    ({"share": 0}, "share must be"), ({"share": 1.0}, "share must be"), ({"share": math.nan}, "share must be"),
    ({"by": "chance"}, "by must be one of prompt, answers"),
])  # fmt: skip
def test_bad_options_of_the_split_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        split_rankings(MANY, **options)


# ---- lists and scores, as feedback writes them ----------------------------------------------------------------------


def test_lists_in_json_by_hand(tmp_path):
    path = jsonl(
        tmp_path, {"round": 0, "prompt": "酒店", "answers": ["a", "b", "c"], "order": [3, 1, 2]}, PAIR,
        {"answers": ["a", "b"], "margin": 1}, {"prompt": "问", "answers": ["a", "b", "c"], "scores": [2, 5, 1.5]},
    )  # fmt: skip
    assert read_rankings(path) == [
        Ranking("酒店", ("a", "b", "c")), Ranking("酒店", (GOOD, BAD)), Ranking("", ("a", "b"), 1),
        Ranking("问", ("b", "a", "c")),
    ]  # fmt: skip


SCORE = st.integers(1, 5)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(SCORE, min_size=1, max_size=12))
def test_scores_say_what_every_unequal_pair_of_them_says(scores):
    answers = [f"answer {i}" for i in range(len(scores))]
    said = [(a, b) for ranking in rankings_of_scores("p", answers, scores)
            for i, a in enumerate(ranking.answers) for b in ranking.answers[i + 1 :]]  # fmt: skip
    pairs = {(a, b) for i, a in enumerate(answers) for j, b in enumerate(answers) if scores[i] > scores[j]}
    assert len(said) == len(set(said)) and set(said) == pairs


@pytest.mark.parametrize(("line", "message"), [
    ({"prompt": 1, "answers": ["a", "b"]}, "prompt must be a text"), ({"answers": "ab"}, "answers must be a tuple"),
    ({"answers": ["a"]}, "2 to 9 answers, got 1"), ({"answers": ["a", " "]}, "answer 2 is empty"),
    ({"answers": ["a", "b"], "scores": [1]}, "2 answers, but 1 scores"), ({"answers": [], "scores": []}, "0 answers"),
    ({"answers": ["a", "b"], "scores": "12"}, "scores must be a list"),
    ({"answers": {"a": 1}, "scores": [1]}, "answers must be a list"),
    *(({"answers": ["a", "b"], "scores": [1, bad]}, "a score must be a finite number")
      for bad in ("2", None, True, math.nan, 10**400)),
    ({"answers": ["a", "a "], "scores": [1, 2]}, "answers 1 and 2 are equal"),
    ({"answers": [str(i) for i in range(65)], "scores": list(range(65))}, "at most 64 scored answers, got 65"),
])  # fmt: skip
def test_a_bad_list_in_json_is_named_by_file_and_line(tmp_path, line, message):
    path = jsonl(tmp_path, PAIR, line)
    with pytest.raises(ValueError, match=message) as caught:
        read_rankings(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_as_many_scored_answers_as_are_allowed_give_a_ranking_for_each_pair(tmp_path):
    path = jsonl(tmp_path, {"answers": [str(i) for i in range(64)], "scores": list(range(64))})
    assert len(read_rankings(path)) == 64 * 63 // 2


def test_equal_scores_alone_are_no_rankings(tmp_path):
    with pytest.raises(ValueError, match="holds no rankings"):
        read_rankings(jsonl(tmp_path, {"answers": ["a", "b"], "scores": [3, 3]}, {"answers": ["a"], "scores": [5]}))
