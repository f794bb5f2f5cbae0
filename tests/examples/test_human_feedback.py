"""examples/human_feedback.py, used as a person uses it: by keys, in a terminal."""

import contextlib
import os
import pty
import runpy
import select
import socket
import sys
import termios
import time
from pathlib import Path

import pytest
from lives import on_terminal, process

from conftest import VOCAB, make_gpt2
from human_feedback import Keyboard
from minirlhf import ActorCritic, Tokenizer
from minirlhf.io.files import read_jsonl
from minirlhf.text.preferences import read_rankings

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "human_feedback.py"
ECHOED = "u undo, s skip, q quit > "  # ends every question


@pytest.fixture(scope="session")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_gpt2(1, scale=2.0, n_embd=16, n_layer=1, n_head=2, n_positions=32).save_pretrained(folder)
    Tokenizer(VOCAB).save_pretrained(folder)
    return folder


class Terminal:
    """A terminal, with a program running in it."""

    def __init__(self, *arguments):
        self.master, self.slave = pty.openpty()
        self.before = termios.tcgetattr(self.slave)
        self.program = process(on_terminal, os.ttyname(self.slave), SCRIPT, *map(str, arguments))

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())

    def see(self, text: str, seconds: float = 60.0) -> str:
        """Wait until this text is shown; return all up to there."""
        shown, end = b"", time.monotonic() + seconds
        while text.encode() not in shown:
            assert time.monotonic() < end, shown.decode(errors="replace")
            if select.select([self.master], [], [], 0.1)[0]:
                shown += os.read(self.master, 1)  # what comes after it is for the next time
        return shown.decode().replace("\r\n", "\n")

    def close(self) -> int:
        """The exit code of the program, which leaves the terminal as it found it."""
        self.program.join(60)
        assert termios.tcgetattr(self.slave) == self.before
        for fd in (self.master, self.slave):
            os.close(fd)
        return self.program.exitcode


def test_a_session_at_a_terminal(policy, tmp_path):
    output = tmp_path / "f.jsonl"
    arguments = ("--policy", policy, "--prompts", "酒店", "房间", "--rounds", "3", "--gen-len", "4", "--output", output)
    terminal = Terminal(*arguments)
    assert "[1/3] 酒店\n  1  " in terminal.see(ECHOED)
    terminal.press("2")
    terminal.see("2 ")
    assert termios.tcgetattr(terminal.slave)[3] & (termios.ICANON | termios.ECHO) == 0  # keys, without Enter or echo
    terminal.press("\x1b[A9")  # an arrow, and no answer of that number
    terminal.press("3")
    assert "[2/3] 房间" in terminal.see(ECHOED)
    assert read_jsonl(output)[0]["order"] == [2, 3, 1]  # on the disk before the next question
    terminal.press("u")
    assert "[1/3] 酒店" in terminal.see(ECHOED)
    assert read_jsonl(output) == []
    terminal.press("１３")  # an input method that is on
    terminal.see(ECHOED)
    terminal.press("\x03")  # Ctrl-C
    assert "saved" in terminal.see("goes on from there")
    assert terminal.close() == 1
    first = read_jsonl(output)
    assert [line["order"] for line in first] == [[1, 3, 2]]

    terminal = Terminal(*arguments)
    assert "[2/3] 房间" in terminal.see(ECHOED)
    terminal.press("s")
    assert "[3/3] 酒店" in terminal.see(ECHOED)
    terminal.press("21")
    shown = terminal.see("--rankings")
    assert "has 2 answers in all" in shown
    assert terminal.close() == 0
    assert read_jsonl(output)[:1] == first and [line["round"] for line in read_jsonl(output)] == [0, 2]
    assert [ranking.prompt for ranking in read_rankings(output)] == ["酒店", "酒店"]


def test_a_person_is_the_reward_of_ppo_and_comes_back_later(policy, tmp_path):
    run = tmp_path / "run"
    sizes = ("--rounds", "2", "--batch-size", "2", "--gen-len", "4")
    arguments = ("--policy", policy, "--prompts", "酒店", "房间", *sizes)
    terminal = Terminal(*arguments, "--train", run)
    terminal.see(ECHOED)
    terminal.press("5")
    terminal.see(ECHOED)
    terminal.press("1")
    assert "step 1 of 2: mean reward 0.00" in terminal.see(ECHOED)
    terminal.press("4")
    assert "[2/2]" in terminal.see(ECHOED)
    terminal.press("q")
    terminal.see("goes on from there")
    assert terminal.close() == 1
    assert [line["scores"] for line in read_jsonl(run / "scores.jsonl")] == [[5], [1], [4]]

    terminal = Terminal(*arguments, "--train", run)
    assert "[1/1]" in terminal.see(ECHOED)  # the one that is left of the batch
    terminal.press("2")
    assert "step 2 of 2: mean reward 0.00" in terminal.see("saved in")
    assert terminal.close() == 0
    metrics = read_jsonl(run / "metrics.jsonl")
    assert [(line["step"], line["reward/mean"]) for line in metrics] == [(1, 0.0), (2, 0.0)]
    assert ActorCritic.from_pretrained(run / "policy").decoder.config.n_positions == 32


@pytest.mark.parametrize(("arguments", "named"), [
    (["--samples", "5"], "--samples must be 2 to 4"), (["--rounds", "0"], "--rounds"),
    (["--prompts", ""], "empty"), (["--prompts", "酒" * 40], "leaves no room for --gen-len"),
    (["--policy", "nowhere"], "nowhere"), (["--gen-len", "40"], "--gen-len"), (["--top-p", "2"], "top_p"),
    (["--output", "thesis.txt"], "thesis.txt"), (["--train", "full"], "exists and is not empty"),
    (["--prompts", "gbk.txt"], "gbk.txt, line 1 is not utf-8"),
    (["--train", "run", "--batch-size", "0"], "PPOConfig.steps"), (["--web", "--port", "0"], "--port must be 1 to"),
    (["--web", "--port", "PORT"], "Address already in use"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(policy, tmp_path, monkeypatch, capsys, arguments, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    for name in ("thesis.txt", "full/thesis.txt"):
        (tmp_path / name).write_text("keep me")
    (tmp_path / "gbk.txt").write_bytes("酒店".encode("gbk"))
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    monkeypatch.setitem(sys.modules, "gradio", None)  # is not installed
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    with pytest.raises(SystemExit) as exit, socket.create_server(("127.0.0.1", 0)) as server:
        arguments = [argument.replace("PORT", str(server.getsockname()[1])) for argument in arguments]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--policy", str(policy), "--output", "f.jsonl", *arguments])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    error = exit.value.code
    assert isinstance(error, str) and error.startswith("error: ") and "\n" not in error and named in error
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_keys_of_a_pipe_are_its_characters():
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as file, Keyboard(file) as keyboard:
        os.write(writing, "1Ｑ\x1bÄ\xff2\n".encode("utf-8", "surrogateescape"))
        os.close(writing)
        assert [keyboard.read() for _ in range(9)] == ["1", "q", "\x1b", "ä", "ÿ", "2", "\n", "", ""]


def test_a_terminal_that_goes_away_ends_the_input():
    master, slave = pty.openpty()
    with os.fdopen(slave, "rb", buffering=0) as file, contextlib.suppress(termios.error), Keyboard(file) as keyboard:
        os.write(master, b"7")
        assert keyboard.read() == "7"
        os.close(master)
        assert keyboard.read() == ""
