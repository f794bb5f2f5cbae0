"""Rankings and scores by keys: what is asked, what is written, what is taken back, and what stage 2 reads of it."""

import errno
import json
import os
import sys
import types

import pytest
import torch

from conftest import make_gpt2
from human_feedback import Keyboard
from minirlhf import PPOTrainer, SamplingConfig
from minirlhf.rewards.human import FeedbackFile, HumanReward, Question, ask_rounds, draw_answers
from minirlhf.text.preferences import Ranking, read_rankings

SIZES = dict(n_embd=16, n_layer=1, n_head=2, n_positions=32)


def question_of(number: int) -> Question:
    return Question(f"问{number}", tuple(f"{letter}{number}" for letter in "abc"))


class Person:
    """Presses keys, then hangs up; keeps what was shown."""

    def __init__(self, keys: str):
        self.keys, self.shown = iter(keys), ""

    def read(self) -> str:
        return next(self.keys, "")

    def write(self, text: str) -> None:
        self.shown += text


def session(path, keys: str, rounds: int = 3, scores: bool = False, questions=question_of):
    person = Person(keys)
    with FeedbackFile(path) as file:
        return ask_rounds(file, questions, rounds, person.read, person.write, scores), person


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- rankings and scores --------------------------------------------------------------------------------------------


def test_a_ranking_is_the_order_of_the_keys(tmp_path):
    path = tmp_path / "new" / "f.jsonl"
    done, person = session(path, "213112")
    assert done and len(lines(path)) == 3
    assert [line["answers"] for line in lines(path)] == [["b0", "a0", "c0"], ["c1", "a1", "b1"], ["a2", "b2", "c2"]]
    assert lines(path)[0] == {"round": 0, "prompt": "问0", "answers": ["b0", "a0", "c0"], "order": [2, 1, 3]}
    assert read_rankings(path) == [Ranking("问0", ("b0", "a0", "c0")), Ranking("问1", ("c1", "a1", "b1")),
                                   Ranking("问2", ("a2", "b2", "c2"))]  # fmt: skip
    for text in ("[1/3] 问0", "  2  b0", "[3/3] 问2"):
        assert text in person.shown


def test_scores_are_in_the_order_shown_and_equal_ones_say_nothing(tmp_path):
    path = tmp_path / "f.jsonl"
    assert session(path, "315242444", scores=True)[0]
    assert lines(path)[0] == {"round": 0, "prompt": "问0", "answers": ["a0", "b0", "c0"], "scores": [3, 1, 5]}
    assert read_rankings(path) == [
        Ranking("问0", ("c0", "a0", "b0")), Ranking("问1", ("b1", "a1")), Ranking("问1", ("b1", "c1")),
    ]  # fmt: skip


def test_other_keys_and_answers_named_twice_change_nothing(tmp_path):
    path = tmp_path / "f.jsonl"
    session(path, "x\n2 2\x1b90411\x7f3\b23", rounds=2)  # Backspace takes back one
    assert [line["order"] for line in lines(path)] == [[2, 1, 3], [2, 3, 1]]
    session(path, "06x51u3x21", rounds=3, scores=True)  # u takes back what is typed, first
    assert lines(path)[2]["scores"] == [5, 3, 2]


def test_a_round_that_is_skipped_is_not_written(tmp_path):
    assert session(tmp_path / "f.jsonl", "s12s")[0]
    assert [line["round"] for line in lines(tmp_path / "f.jsonl")] == [1]


@pytest.mark.parametrize("key", ["q", "", "\x04"])
def test_quit_and_resume(tmp_path, key):
    path = tmp_path / "f.jsonl"
    assert not session(path, "123" + key)[0] and [line["round"] for line in lines(path)] == [0]
    done, person = session(path, "3112")
    assert done and "问0" not in person.shown
    assert [line["round"] for line in lines(path)] == [0, 1, 2]
    before = path.read_bytes()
    assert session(path, "")[0] and path.read_bytes() == before  # nothing is left to ask


def test_undo_takes_back_an_answer_and_asks_again(tmp_path):
    path = tmp_path / "f.jsonl"
    _, person = session(path, "12u32uu21su1312s")  # 12 is taken back, then 32; after s, u goes back to 21
    assert [line["order"] for line in lines(path)] == [[1, 3, 2], [1, 2, 3]]
    assert person.shown.count("nothing to undo") == 1


def test_undo_reaches_into_an_earlier_session_and_shows_what_was_shown(tmp_path):
    path = tmp_path / "f.jsonl"
    session(path, "3123", rounds=2)

    def others(number: int) -> Question:  # of another policy
        return Question("另", (f"x{number}", f"y{number}"))

    _, person = session(path, "uu2311", questions=others)
    assert [line["answers"] for line in lines(path)] == [["b0", "c0", "a0"], ["x1", "y1"], ["x2", "y2"]]
    assert "  1  a1\n  2  b1\n  3  c1" in person.shown and "  1  a0\n  2  b0\n  3  c0" in person.shown


def test_a_round_without_two_answers_is_passed_over(tmp_path):
    def few(number: int) -> Question:
        return Question("问", ("a",)) if number == 1 else question_of(number)

    done, person = session(tmp_path / "f.jsonl", "12u1212", questions=few)
    assert done and "too few different answers" in person.shown
    assert [line["round"] for line in lines(tmp_path / "f.jsonl")] == [0, 2]


def test_a_hostile_text_neither_steers_the_terminal_nor_breaks_a_line(tmp_path):
    evil = "好\x1b[2J\r\n\u202e\u2028差"
    _, person = session(tmp_path / "f.jsonl", "2", rounds=1, questions=lambda _: Question(evil, (evil, "一般")))
    assert not set(person.shown) & set("\x1b\r\u202e\u2028")
    assert lines(tmp_path / "f.jsonl")[0]["answers"] == ["一般", evil]
    assert read_rankings(tmp_path / "f.jsonl") == [Ranking(evil, ("一般", evil))]


# ---- the file -------------------------------------------------------------------------------------------------------


def test_an_answer_is_on_the_disk_before_the_next_question(tmp_path):
    path, seen = tmp_path / "f.jsonl", []

    def looking(number: int) -> Question:
        seen.append(len(path.read_bytes().splitlines()))
        return question_of(number)

    session(path, "121212", questions=looking)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("cut", [1, 5, 12, 40])
def test_what_a_crash_left_of_a_line_is_cut_off(tmp_path, cut):
    path = tmp_path / "f.jsonl"
    session(path, "1221q")
    whole = path.read_bytes()
    end = whole.index(b"\n") + 1
    path.write_bytes(whole[: end + cut])
    with FeedbackFile(path) as file:
        assert len(file.records) == 1
    assert path.read_bytes() == whole[:end]
    path.write_bytes(whole.removesuffix(b"\n"))  # all but the end of the line
    with FeedbackFile(path) as file:
        assert len(file.records) == 2
    assert path.read_bytes() == whole


@pytest.mark.parametrize("content", [
    "my thesis", "my\nthesis\n", '{"prompt": "a", "chosen": "b", "rejected": "c"}\n', "[1]\n", "5",
    '{"round": 0, "prompt": "a", "answers": ["b", "c"], "order": [1, 1]}\n',
    '{"round": 0, "prompt": "a", "answers": ["b", "c"], "scores": [1]}\n',
    '{"round": 0, "prompt": "a", "answers": "bc", "scores": [1, 2]}\n',
    '{"round": "0", "prompt": "a", "answers": ["b"], "scores": [1]}\n',
])  # fmt: skip
def test_a_file_of_something_else_is_refused_and_stays(tmp_path, content):
    path = tmp_path / "f.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"f\.jsonl"):
        FeedbackFile(path)
    assert path.read_text() == content


def test_a_file_is_not_written_through_a_symbolic_link(tmp_path):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "f.jsonl").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic link"):
        FeedbackFile(tmp_path / "f.jsonl")
    assert (tmp_path / "victim").read_text() == "precious"


def test_where_files_cannot_be_locked_a_warning_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("minirlhf.rewards.human.lock_descriptor", lambda fd: (_ for _ in ()).throw(OSError("no locks")))
    with pytest.warns(UserWarning, match="cannot be locked, so a second process goes unnoticed: no locks"):
        session(tmp_path / "f.jsonl", "12", rounds=1)
    assert len(lines(tmp_path / "f.jsonl")) == 1


def test_without_posix_modules_keys_come_with_enter_and_files_are_locked_by_the_system_s_own(tmp_path, monkeypatch):
    for name in ("fcntl", "termios", "tty"):
        monkeypatch.setitem(sys.modules, name, None)
    calls = []

    def locking(descriptor, mode, count):
        calls.append((os.lseek(descriptor, 0, os.SEEK_CUR), mode, count))
        if len(calls) > 1:
            raise OSError(errno.EACCES, "locked")

    monkeypatch.setitem(sys.modules, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2))
    done, _ = session(tmp_path / "f.jsonl", "12", rounds=1)
    assert done and len(lines(tmp_path / "f.jsonl")) == 1 and calls == [(2**30, 2, 1)]
    with pytest.raises(BlockingIOError, match="in use by another process"):
        FeedbackFile(tmp_path / "f.jsonl")
    reading, writing = os.pipe()
    os.write(writing, b"2\n")
    os.close(writing)
    with os.fdopen(reading, "rb") as file, Keyboard(file) as keyboard:
        assert [keyboard.read() for _ in range(3)] == ["2", "\n", ""]


@pytest.mark.parametrize("index", [0, 1, 2, -1])
def test_any_line_can_be_taken_back_and_the_others_stay(tmp_path, index, monkeypatch):
    path = tmp_path / "f.jsonl"
    session(path, "132312")
    kept = lines(path)
    with FeedbackFile(path) as file:
        if index not in (2, -1):  # a disk that is full keeps them all
            with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
                patched.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left")))
                file.undo(index)
            assert lines(path) == file.records == kept
        assert file.undo(index) == kept.pop(index)
        assert lines(path) == file.records == kept and file.unanswered() == index % 3
        with pytest.raises(BlockingIOError, match="in use by another process"):
            FeedbackFile(path)
        file.append({"round": 7, "prompt": "", "answers": ["a", "b"], "scores": [1, 2]})
    assert lines(path)[:2] == kept and lines(path)[2]["round"] == 7
    with FeedbackFile(path) as file, pytest.raises(IndexError):
        file.undo(3)


def test_a_round_that_was_skipped_comes_again_in_the_next_session(tmp_path):
    path = tmp_path / "f.jsonl"
    session(path, "s12s")
    done, person = session(path, "1221")
    assert done and [line["round"] for line in lines(path)] == [1, 0, 2] and "问1" not in person.shown


def test_two_sessions_never_share_a_file(tmp_path):
    with FeedbackFile(tmp_path / "f.jsonl"), pytest.raises(BlockingIOError, match="in use by another process"):
        FeedbackFile(tmp_path / "f.jsonl")
    FeedbackFile(tmp_path / "f.jsonl").__exit__()


def test_a_full_disk_ends_the_session_with_all_that_was_answered(tmp_path, monkeypatch):
    path = tmp_path / "f.jsonl"
    with FeedbackFile(path) as file:
        file.append({"round": 0, "prompt": "", "answers": ["a", "b"], "scores": [1, 2]})
        before = path.read_bytes()
        real = os.write
        with monkeypatch.context() as patched:

            def write(fd, content):  # a disk with room for ten more bytes
                if len(content) < 20:
                    raise OSError(28, "No space left on device")
                return real(fd, content[:10])

            patched.setattr(os, "write", write)
            with pytest.raises(OSError, match="No space"):
                file.append({"round": 1, "prompt": "", "answers": ["a", "b"], "scores": [1, 2]})
        assert path.read_bytes() == before and len(file.records) == 1
        file.append({"round": 1, "prompt": "", "answers": ["c", "d"], "scores": [2, 1]})
    assert [line["answers"] for line in lines(path)] == [["a", "b"], ["c", "d"]]


# ---- samples to ask about -------------------------------------------------------------------------------------------


def test_answers_are_different_and_not_blank(tokenizer):
    model = make_gpt2(1, scale=2.0, **SIZES)
    draw = lambda seed: draw_answers(model, tokenizer, "酒店", 4, 3, generator=torch.Generator().manual_seed(seed))  # noqa: E731
    question = draw(0)
    assert question.prompt == "酒店" and len(question.answers) == 4
    assert len({answer.strip() for answer in question.answers}) == 4 and all(a.strip() for a in question.answers)
    assert draw(0) == question != draw(1)
    greedy = draw_answers(model, tokenizer, "酒店", 3, 3, SamplingConfig(top_k=1))
    assert len(greedy.answers) == 1  # it has no more of them
    for count in (0, 5):
        with pytest.raises(ValueError, match="1 to 4 answers"):
            draw_answers(model, tokenizer, "酒店", count, 3)


# ---- the reward of PPO ----------------------------------------------------------------------------------------------


def test_scores_become_rewards(tmp_path):
    person = Person("12345s")
    with FeedbackFile(tmp_path / "f.jsonl") as file:
        reward = HumanReward(file, person.read, person.write)
        assert reward(["问"] * 7, ["a", "b", "c", "d", "e", "", "a"]) == [-1, -0.5, 0, 0.5, 1, 0, -1]
        assert "(empty)" in person.shown and person.shown.count("  1  a\n") == 1
        assert [line["scores"] for line in lines(file.path)] == [[1], [2], [3], [4], [5]]
        assert reward(["问", "问"], ["e", "b"]) == [1, -0.5]  # known: nobody is asked


def test_undo_within_a_batch(tmp_path):
    person = Person("u5suu124")
    with FeedbackFile(tmp_path / "f.jsonl") as file:
        assert HumanReward(file, person.read, person.write)(["p"] * 3, ["a", "b", "c"]) == [-1, -0.5, 0.5]
        answers = [(line["answers"], line["scores"]) for line in lines(file.path)]
    assert answers == [(["a"], [1]), (["b"], [2]), (["c"], [4])]
    assert person.shown.count("nothing to undo") == 1


def test_ppo_goes_on_where_the_person_quit(tmp_path, tokenizer):
    """The scores before are kept, the trainer is as it was, and the weights end as if nobody had quit."""
    settings = dict(steps=4, batch_size=4, minibatch_size=4, forward_batch_size=4, gen_len=3, lr=1e-2, device="cpu")

    def run(path, *parts: str):
        trainer = PPOTrainer(make_gpt2(1, scale=2.0, **SIZES), make_gpt2(1, scale=2.0, **SIZES), tokenizer, **settings)
        asked = 0
        for keys in parts:
            person = Person(keys)
            with FeedbackFile(path) as file:
                try:
                    trainer.train(["酒店", "房间"], HumanReward(file, person.read, person.write))
                except KeyboardInterrupt:
                    assert keys[-1] == "q" and trainer.iteration == 0
            asked += person.shown.count("u undo")
        return asked, trainer.policy.state_dict(), [(r["answers"], r["scores"]) for r in lines(path)]

    asked, weights, records = run(tmp_path / "whole.jsonl", "1234")
    again, others, other_records = run(tmp_path / "parts.jsonl", "12q", "34")
    assert asked == len(records) == 4 and again == 5  # the one that was quit at comes again
    assert records == other_records
    assert all(torch.equal(weights[name], others[name]) for name in weights)
