"""The board behind the feedback page, without gradio: what several people are asked, and what is written.

The terminal is the oracle: the same answers give the same file, the same rewards and the same weights.
"""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_feedback import SIZES, Person, lines, question_of, session

from conftest import make_gpt2
from minirlhf import PPOTrainer
from minirlhf.rewards.human import FeedbackFile, HumanReward, Question, ask_rounds
from minirlhf.rewards.human_page import AWAY, Board, PageReward, ask_rounds_on_page


class Page:
    """A page of one person, who sees a question before they answer it."""

    def __init__(self, board: Board, person: str = "a"):
        self.board, self.person, self.state = board, person, {}

    def act(self, what: str, values=None, name=None) -> dict:
        name = self.state.get("name") if name is None else name
        self.state = self.board.act({"person": self.person, "do": what, "name": name, "values": values})
        return self.state

    def see(self) -> None:
        """Wait for a question."""
        end = time.monotonic() + 30
        while not self.act("look")["name"]:
            assert time.monotonic() < end, self.state
            time.sleep(0.001)

    def answer(self, *values: int) -> dict:
        self.see()
        return self.act("answer", list(values))


@contextlib.contextmanager
def asking(path, rounds: int = 3, scores: bool = False, questions=question_of, clock=time.monotonic):
    """A board whose program asks in another thread, and what that thread returns in the end."""
    with FeedbackFile(path) as file, ThreadPoolExecutor(1) as pool:
        board = Board(file, clock)
        waiting = pool.submit(ask_rounds_on_page, board, questions, rounds, scores)
        try:
            yield board
            waiting.result(30)
        finally:
            give_up(board)


def give_up(board: Board) -> None:
    """End the waiting of a board whose test has failed."""
    with board._change:
        board._error = board._error or OSError("the test has ended")
        board._change.notify_all()


def test_a_page_writes_what_the_terminal_writes(tmp_path):
    for scores, keys in ((False, "213132321"), (True, "315242444")):
        web, terminal = tmp_path / f"web{scores}.jsonl", tmp_path / f"terminal{scores}.jsonl"
        with asking(web, scores=scores) as board:
            page = Page(board)
            for i in range(3):
                page.see()
                told = page.state["prompt"], page.state["answers"], page.state["done"], page.state["total"]
                assert told == (f"问{i}", [f"a{i}", f"b{i}", f"c{i}"], i, 3) and page.state["ranked"] is not scores
                page.answer(*map(int, keys[3 * i : 3 * i + 3]))
        # The last number of a ranking follows at the terminal, so it is no key.
        pressed = keys if scores else "".join(keys[i : i + 2] for i in range(0, 9, 3))
        assert session(terminal, pressed, scores=scores)[0]
        assert web.read_bytes() == terminal.read_bytes()


def test_page_and_terminal_go_on_with_each_other_s_file(tmp_path):
    path = tmp_path / "f.jsonl"
    assert not session(path, "12q", rounds=4)[0]
    with asking(path, rounds=2) as board:
        Page(board).answer(2, 1, 3)
    done, person = session(path, "3213", rounds=4)
    assert done and "问1" not in person.shown and [line["round"] for line in lines(path)] == [0, 1, 2, 3]
    before = path.read_bytes()
    with asking(path, rounds=4):
        pass  # nothing is left to ask
    assert path.read_bytes() == before


def test_several_people_have_different_questions_and_undo_their_own(tmp_path):
    path = tmp_path / "f.jsonl"
    with asking(path) as board:
        anna, bo = Page(board, "anna"), Page(board, "bo")
        anna.see(), bo.see()
        assert (anna.state["prompt"], bo.state["prompt"]) == ("问0", "问1")
        assert Page(board, "anna").act("look")["name"] == anna.state["name"]  # the page loaded anew
        anna.answer(1, 2, 3)
        bo.answer(2, 1, 3)
        assert anna.state["prompt"] == "问2" and bo.state["name"] is None and bo.state["done"] == 2
        anna.act("undo")  # a line that is not the last one
        assert anna.state["prompt"] == "问0" and [line["round"] for line in lines(path)] == [1]
        with pytest.raises(BlockingIOError, match="in use"):  # the file that took its place is locked as well
            FeedbackFile(path)
        bo.see()
        assert bo.state["prompt"] == "问2"  # what anna had left
        bo.answer(3, 1, 2)
        anna.answer(3, 2, 1)
    assert [(line["round"], line["order"]) for line in lines(path)] == [(1, [2, 1, 3]), (2, [3, 1, 2]), (0, [3, 2, 1])]


def test_skip_and_undo_of_a_skip(tmp_path):
    path = tmp_path / "f.jsonl"
    with asking(path) as board:
        page = Page(board)
        page.see()
        assert not page.state["undo"]
        page.act("skip")
        page.see()
        page.act("skip")
        page.act("undo")
        assert page.state["prompt"] == "问1" and page.state["done"] == 1
        page.answer(1, 2, 3)
        page.answer(1, 2, 3)
    assert [line["round"] for line in lines(path)] == [1, 2]
    with asking(path) as board:  # what has no answer comes again
        Page(board).answer(2, 3, 1)
    assert [line["round"] for line in lines(path)] == [1, 2, 0]


def test_undo_reaches_into_an_earlier_session(tmp_path):
    path = tmp_path / "f.jsonl"
    session(path, "3123", rounds=2)
    with asking(path, questions=lambda i: Question("另", ("x", "y"))) as board:
        page = Page(board)
        page.see()
        for i in (1, 0):
            assert page.act("undo")["prompt"] == f"问{i}" and page.state["answers"] == [f"a{i}", f"b{i}", f"c{i}"]
        assert page.act("undo")["prompt"] == "问0" and not page.state["undo"]  # there is nothing before it
        page.answer(2, 3, 1)
        page.answer(1, 2, 3)
        assert page.state["prompt"] == "另"
        page.answer(2, 1)
    assert [line["answers"] for line in lines(path)] == [["b0", "c0", "a0"], ["a1", "b1", "c1"], ["y", "x"]]


def test_an_answer_to_a_question_that_is_gone_is_not_taken_for_another(tmp_path):
    path = tmp_path / "f.jsonl"
    with asking(path, rounds=2) as board:
        page, old = Page(board), Page(board)
        page.see(), old.see()
        first = page.state["name"]
        page.answer(1, 2, 3)
        assert old.act("answer", [3, 2, 1], first)["prompt"] == "问1"  # twice from two tabs: the first one counts
        page.act("undo")
        page.act("answer", [3, 2, 1], first)
        assert page.state["prompt"] == "问0" and lines(path) == []
        page.answer(2, 1, 3)
        page.answer(2, 1, 3)
    assert [line["order"] for line in lines(path)] == [[2, 1, 3]] * 2


@pytest.mark.parametrize(("scores", "values"), [
    (False, [1, 2]), (False, [1, 1, 2]), (False, [0, 1, 2]), (True, [1, 2]), (True, [0, 1, 2]), (True, [1, 2, 6]),
    (False, [True, 2, 3]), (True, [1.0, 2, 3]),
])  # fmt: skip
def test_values_that_are_no_answer_are_refused_and_not_written(tmp_path, scores, values):
    path = tmp_path / "f.jsonl"
    with asking(path, rounds=1, scores=scores) as board:
        page = Page(board)
        with pytest.raises(ValueError, match="says nothing about 3 answers"):
            page.answer(*values)
        assert lines(path) == []
        page.answer(1, 2, 3)


def test_the_question_of_a_page_that_is_silent_goes_to_another(tmp_path):
    now = [0.0]
    path = tmp_path / "f.jsonl"
    with asking(path, rounds=1, clock=lambda: now[0]) as board:
        gone, here = Page(board, "gone"), Page(board, "here")
        gone.see()
        now[0] = AWAY
        assert here.act("look")["name"] is None
        now[0] = AWAY + 1
        assert here.act("look")["prompt"] == "问0"
        gone.act("answer", [2, 1, 3])  # who comes back first may still answer
    assert [line["order"] for line in lines(path)] == [[2, 1, 3]]


def test_rounds_without_two_answers_are_passed_over_and_texts_cannot_steer(tmp_path):
    def few(number: int) -> Question:
        return Question("问", ("a",)) if number == 0 else Question("一\n二\x1b[2J", ("\u202ex", "y\r"))

    with asking(tmp_path / "f.jsonl", rounds=2, questions=few) as board:
        page = Page(board)
        page.see()
        assert page.state["prompt"] == "一\n二\\x1b[2J" and page.state["answers"] == ["\\u202ex", "y\\r"]
        assert page.state["done"] == 1
        page.answer(1, 2)
    assert lines(tmp_path / "f.jsonl")[0]["answers"] == ["\u202ex", "y\r"]


def test_a_disk_that_is_full_ends_the_program_and_tells_the_pages(tmp_path, monkeypatch):
    path, sampled = tmp_path / "f.jsonl", []

    def question(number):
        sampled.append(number)
        return question_of(number)

    with pytest.raises(OSError, match="No space left"), asking(path, rounds=99, questions=question) as board:
        page = Page(board)
        page.answer(1, 2, 3)
        page.see()
        with monkeypatch.context() as patched:
            patched.setattr("os.write", lambda fd, content: (_ for _ in ()).throw(OSError(28, "No space left")))
            assert "No space left" in page.answer(2, 1, 3)["error"]
    assert [line["order"] for line in lines(path)] == [[1, 2, 3]]
    assert len(sampled) < 20  # the others are never sampled


def test_pages_that_are_there_learn_of_the_end(tmp_path):
    with FeedbackFile(tmp_path / "f.jsonl") as file, ThreadPoolExecutor(1) as pool:
        board = Board(file)
        pages = [Page(board, "anna"), Page(board, "bo")]
        assert not any(page.act("look")["ended"] for page in pages)
        end = pool.submit(board.end)
        while not board.ended:
            time.sleep(0.001)
        assert pages[0].act("look")["ended"] and not end.done()
        assert pages[1].act("look")["ended"]
        end.result(30)


# ---- the reward of PPO ----------------------------------------------------------------------------------------------


def test_ppo_waits_for_the_scores_and_learns_what_it_learns_at_the_terminal(tmp_path, tokenizer):
    settings = dict(steps=4, batch_size=4, minibatch_size=4, forward_batch_size=4, gen_len=3, lr=1e-2, device="cpu")

    def trained(reward) -> dict:
        policy, reference = (make_gpt2(1, scale=2.0, **SIZES) for _ in range(2))
        trainer = PPOTrainer(policy, reference, tokenizer, **settings)
        trainer.train(["酒店", "房间"], reward, progress=False)
        return trainer.policy.state_dict()

    person = Person("142s")
    with FeedbackFile(tmp_path / "terminal.jsonl") as file:
        at_terminal = trained(HumanReward(file, person.read, person.write))
    web = FeedbackFile(tmp_path / "web.jsonl")
    with web as file, ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        stack.callback(give_up, board := Board(file))
        training = pool.submit(trained, PageReward(board))
        anna, bo = Page(board, "anna"), Page(board, "bo")
        for page, score in ((anna, 1), (bo, 5)):
            page.see()
            assert not training.done() and not page.state["ranked"]
            page.answer(score)
        bo.act("undo")
        bo.answer(2)
        bo.act("skip")
        anna.answer(4)
        on_page = training.result(60)
    assert all(torch.equal(at_terminal[name], on_page[name]) for name in at_terminal)
    both = [
        [(line["answers"], line["scores"]) for line in lines(tmp_path / f"{name}.jsonl")]
        for name in ("web", "terminal")
    ]
    assert sorted(both[0]) == sorted(both[1])


def test_a_batch_that_is_rewarded_cannot_be_taken_back(tmp_path):
    given = FeedbackFile(tmp_path / "f.jsonl")
    with given as file, ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as stack:
        reward, page = PageReward(board := Board(file)), Page(board)
        stack.callback(give_up, board)
        first = pool.submit(reward, ["问"] * 3, ["x", "y", "x"])
        page.answer(5)
        page.answer(1)
        assert first.result(30) == [1, -1, 1]
        assert not page.act("undo")["undo"] and len(lines(file.path)) == 2
        second = pool.submit(reward, ["问"] * 2, ["x", "z"])  # x is known
        page.see()
        assert page.state["answers"] == ["z"] and page.state["total"] == 1
        page.answer(3)
        assert second.result(30) == [1, 0]


def test_the_terminal_can_go_on_after_people_in_any_order(tmp_path):
    path = tmp_path / "f.jsonl"
    with asking(path, rounds=2) as board:
        anna, bo = Page(board, "anna"), Page(board, "bo")
        anna.see(), bo.see()
        bo.answer(1, 2, 3)
        anna.answer(1, 2, 3)
    assert [line["round"] for line in lines(path)] == [1, 0]
    person = Person("u2131")
    with FeedbackFile(path) as file:  # the last answer, of round 0, once more, and then round 2
        assert ask_rounds(file, question_of, 3, person.read, person.write)
    assert [(line["round"], line["order"]) for line in lines(path)] == [(1, [1, 2, 3]), (0, [2, 1, 3]), (2, [3, 1, 2])]
