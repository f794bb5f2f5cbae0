"""A chat in the terminal: streaming, history, Ctrl-C, and a model without a template."""

import builtins
import io
import os
import signal
import sys

import pytest

from conftest import VOCAB, make_gpt2
from minirlhf import GPT2, Tokenizer
from minirlhf.commands import chat as module
from minirlhf.commands.main import main

TEMPLATE = (
    "{% for m in messages %}{{ ('[PAD]' if m.role == 'user' else '[MASK]' if m.role == 'system' else '') + m.content + "
    "'[SEP]' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    make_gpt2(n_layer=1).save_pretrained(folder)
    tokenizer = Tokenizer(VOCAB)
    tokenizer.model.kept = {"chat_template": TEMPLATE}
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def talk(monkeypatch, capsys):
    """What the program says to these lines, and the prompts that it gave to the model."""
    asked = []
    stream = GPT2.stream

    def recorded(self, text, *args, **options):
        asked.append(text)
        return stream(self, text, *args, **options)

    monkeypatch.setattr(GPT2, "stream", recorded)

    def call(lines, *arguments):
        asked.clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code = main(["chat", *map(str, arguments)])
        shown = capsys.readouterr()
        return code, shown.out, shown.err, list(asked)

    return call


def test_it_answers_and_remembers(talk, model):
    code, out, err, asked = talk(["酒店", "", "位置"], "--model", model, "--gen-len", 5, "--system", "很")
    assert (code, err) == (0, "") and len(asked) == 2
    first, _ = out.splitlines()
    assert asked[0] == "[MASK]很[SEP][PAD]酒店[SEP]"
    assert asked[1] == f"{asked[0]}{first}[SEP][PAD]位置[SEP]" and asked[1].messages[-1]["content"] == "位置"
    expected = "".join(GPT2.from_pretrained(model).stream(
        asked[0], 5, temperature=0.7, top_p=0.95, seed=0, tokenizer=Tokenizer.from_pretrained(model)))  # fmt: skip
    assert first == expected
    assert talk(["酒店", "", "位置"], "--model", model, "--gen-len", 5, "--system", "很")[1] == out
    assert talk(["酒店"], "--model", model, "--gen-len", 30, "--seed", 3)[1] != out


def test_at_a_terminal_it_prompts_until_ctrl_d(talk, model, monkeypatch):
    lines = iter(["酒店"])

    def typed(prompt):
        assert prompt == "> "
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(module, "sys", type("Terminal", (), {"stdin": type("S", (), {"isatty": lambda self: True})()}))
    code, _, _, asked = talk([], "--model", model, "--gen-len", 2)
    assert code == 0 and len(asked) == 1


def test_ctrl_c_ends_the_answer_and_not_the_program(talk, model, monkeypatch):
    before, drawn = signal.getsignal(signal.SIGINT), []

    def endless(self, text, *args, **options):
        for i in range(1000):
            drawn.append(i)
            if len(drawn) == 3:
                os.kill(os.getpid(), signal.SIGINT)
            yield "好"

    monkeypatch.setattr(GPT2, "stream", endless)
    lines = iter(["酒店", "位置"])
    told = []
    monkeypatch.setattr(module, "_lines", lambda: (told.append(signal.getsignal(signal.SIGINT)) or x for x in lines))
    fitting = module._fitting
    seen = []
    monkeypatch.setattr(module, "_fitting", lambda *args: seen.append(args[2][:]) or fitting(*args))
    monkeypatch.setattr(module, "Tokenizer", Tokenizer)
    with pytest.raises(StopIteration):  # the second answer is cut short by the test
        monkeypatch.setattr(module, "_answer", _second_stops(module._answer))
        talk([], "--model", model, "--gen-len", 5)
    assert len(drawn) == 3 and [m["content"] for m in seen[1]] == ["酒店", "好好好", "位置"]
    assert signal.getsignal(signal.SIGINT) is before and told == [before] * 2  # between answers it is as usual


def _second_stops(answer):
    count = []

    def call(*args):
        count.append(1)
        if len(count) == 2:
            raise StopIteration
        return answer(*args)

    return call


def test_turns_that_no_longer_fit_are_forgotten_with_a_word(talk, model):
    code, _, err, asked = talk(["酒店很好房间"] * 5, "--model", model, "--gen-len", 16, "--system", "很")
    assert code == 0 and "(forgot the first 1 turns, which no longer fit)" in err
    assert all(text.startswith("[MASK]很[SEP][PAD]酒店很好房间[SEP]") for text in asked)  # the system message stays
    code, _, err, _ = talk(["好" * 60], "--model", model, "--gen-len", 16)
    assert code == 1 and err == "error: the message has 62 tokens with its template, and there is room for 48\n"


def test_what_is_said_cannot_steer_the_terminal(talk, model, monkeypatch):
    monkeypatch.setattr(GPT2, "stream", lambda *args, **options: iter(["a\x1b[2J\n", "\u202eb"]))
    code, out, err, _ = talk(["酒店"], "--model", model, "--gen-len", 5)
    assert (code, out, err) == (0, "a\\x1b[2J\n\\u202eb\n", "")


def test_a_model_without_a_template_is_one_error_before_the_first_word(talk, tiny, monkeypatch):
    monkeypatch.setattr(module, "_lines", lambda: 1 / 0)
    code, out, err, _ = talk([], "--model", tiny / "policy")
    assert (code, out) == (1, "") and err.startswith(
        f"error: {tiny / 'policy'}: the model's folder has no chat_template"
    )
