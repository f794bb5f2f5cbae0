"""The command line: what it prints, its exit codes, and that it streams."""

import argparse
import inspect
import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import minirlhf
from conftest import VOCAB, make_bert, make_gpt2
from minirlhf import GPT2, SamplingConfig, SentimentReward, Tokenizer
from minirlhf.commands import models as program
from minirlhf.commands import runs
from minirlhf.commands.main import main
from minirlhf.commands.runs import SAMPLING
from minirlhf.commands.table import COMMANDS
from minirlhf.runs.run import RunFailed, Stopped

REPO = Path(__file__).resolve().parents[2]
WRITER = str(REPO / "weights/gpt2-chinese-reviews-small")
SCORER = str(REPO / "weights/bert-chinese-reviews-sentiment-small")
LABELS = ("negative (stars 1, 2 and 3)", "positive (stars 4 and 5)")
GOOD, BAD = "房间干净，服务很好，非常满意", "房间很脏，服务太差，非常失望"


@pytest.fixture
def run(cli):
    """Exit code, lines of stdout, stderr."""

    def call(*arguments):
        code, out, err = cli(*arguments)
        return code, out.splitlines(), err

    return call


def typed(monkeypatch, raw):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw if isinstance(raw, bytes) else raw.encode())))


# ---- the table ------------------------------------------------------------------------------------------------------


def test_without_a_command_it_lists_them_all(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    shown = "\n".join(out)
    assert shown.startswith("usage: minirlhf [-h] [--version] COMMAND ...")
    assert {"download", "convert", "generate", "score"} <= set(COMMANDS)
    for name, entry in COMMANDS.items():
        assert re.search(rf"^ +{name}\s+{entry.run.__doc__.split()[0]}", shown, re.MULTILINE)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_reads_every_argument_that_it_takes(run, name):
    code, out, _ = run(name, "--help")
    assert code == 0 and out[0].startswith(f"usage: minirlhf {name} ")
    entry, parser = COMMANDS[name], argparse.ArgumentParser()
    # What trains, reads its arguments by name, also from a file.
    read = inspect.getsource(inspect.getmodule(entry.run) if entry.flags else entry.run)
    for names, options in entry.arguments:
        dest = parser.add_argument(*names, **options).dest
        assert f"args.{dest}" in read or f'"{dest}"' in read or dest in SAMPLING or (dest == "config" and entry.flags)


@pytest.mark.parametrize("arguments", [
    ["nonsense"], ["--nonsense"], ["download"], ["convert"], ["convert", "a", "b"], ["generate"], ["score"],
    ["generate", "--model", WRITER, "--prompt"], ["generate", "--model", WRITER, "--prompt", "酒店", " "],
    ["generate", "--model", WRITER, "--n", "0"], ["generate", "--model", WRITER, "--gen-len", "x"],
    ["generate", "--model", WRITER, "--seed", "-1"], ["generate", "--model", WRITER, "--seed", str(2**63)],
    ["generate", "--mod", WRITER], ["score", "--model", SCORER, "--top-p", "1"],
])  # fmt: skip
def test_a_command_line_that_cannot_be_understood(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, []) and err.startswith("usage: minirlhf")


@pytest.mark.parametrize(("arguments", "message"), [
    (["generate", "--model", "nowhere", "--prompt", "酒店"], "nowhere.* does not exist"),
    (["generate", "--model", "nowhere", "--top-p", "0"], "SamplingConfig.top_p must be .*, got 0.0"),
    (["generate", "--model", "nowhere", "--temperature", "nan"], "SamplingConfig.temperature must be .*, got nan"),
    (["generate", "--model", "nowhere", "--device", "tpu"], "device must be 'auto', 'cpu' or .*, got 'tpu'"),
    (["generate", "--model", WRITER, "--prompt", "酒店", "--gen-len", "126"], "a prompt of 3 tokens leaves no room"),
    (["generate", "--model", SCORER, "--prompt", "酒店"], "model_type='bert', expected one of gpt2"),
    (["score", "--model", "nowhere", "酒店"], "nowhere.* does not exist"),
    (["score", "--model", WRITER, "酒店"], "holds a 'gpt2' model, expected 'bert'; a classifier of another library"),
    (["download", "../gpt2"], "'../gpt2' is not the name of a model on the hub"),
    (["score", "--model", "no\x1b[2Jwhere\nat all", "酒店"], r"no\\x1b\[2Jwhere at all.* does not exist"),
])  # fmt: skip
def test_a_failure_is_one_line_and_exit_code_1(run, arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (1, []), err
    assert re.fullmatch(rf"error: .*{message}.*\n", err)


def test_a_bug_is_no_failure_of_the_user(monkeypatch):
    def broken(args):
        raise TypeError("a bug")

    monkeypatch.setitem(COMMANDS, "convert", COMMANDS["convert"]._replace(run=broken))
    with pytest.raises(TypeError):
        main(["convert", "x"])


def test_the_version_and_the_name_of_the_program(run, monkeypatch):
    assert run("--version") == (0, [f"minirlhf {minirlhf.__version__}"], "")
    monkeypatch.setattr(sys, "argv", ["/somewhere/minirlhf/__main__.py"])  # as under python -m
    assert run("--help")[1][0].startswith("usage: minirlhf [-h]")


def test_generate_without_a_prompt_says_what_it_waits_for_on_a_terminal(run, monkeypatch):
    arguments = ["generate", "--model", WRITER, "--n", 1, "--gen-len", 2]
    typed(monkeypatch, "酒店\n")
    assert run(*arguments)[2] == ""
    typed(monkeypatch, "酒店\n")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    code, out, err = run(*arguments)
    assert (code, len(out), err) == (0, 1, "waiting for texts, one a line; Ctrl-D ends them\n")


@pytest.mark.filterwarnings("default")
def test_the_starter_weights_say_that_they_are_chinese(run):
    for arguments in (["generate", "--n", 1, "--gen-len", 2, "--prompt", "The room"], ["score", "The room was clean"]):
        model = WRITER if arguments[0] == "generate" else SCORER
        code, out, err = run(*arguments, "--model", model)
        assert code == 0 and out and re.fullmatch("warning: the starter weights are Chinese: .*\n", err)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("command", "more"), [("doctor", []), ("evaluate", ["--reference", WRITER])])
def test_commands_on_a_run_say_that_the_starter_weights_are_chinese(run, monkeypatch, command, more):
    def enough(*args, **options):
        raise ValueError("enough")

    monkeypatch.setattr(runs, "load_scorer", enough)
    monkeypatch.setattr(runs.examination, "doctor", enough)
    models = ["--policy", WRITER, "--reward", SCORER, "--prompts", "The room", *more]
    warning = "warning: the starter weights are Chinese: .*\n"
    assert re.fullmatch(f"{warning}error: enough\n", run(command, *models)[2])


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(monkeypatch, run):
    def warned(args):
        warnings.warn("look\nhere \x1b", stacklevel=1)

    monkeypatch.setitem(COMMANDS, "convert", COMMANDS["convert"]._replace(run=warned))
    assert run("convert", "x") == (0, [], "warning: look here \\x1b\n")


def test_a_run_that_stops_or_fails_says_how_to_go_on(monkeypatch, run, tmp_path):
    def ends(end):
        def command(args):
            raise end

        monkeypatch.setitem(COMMANDS, "convert", COMMANDS["convert"]._replace(run=command))
        return run("convert", "x")

    told = f"to go on: minirlhf resume '{tmp_path}/a b'\n"
    stopped = Stopped(tmp_path / "a b", "step 2 of 4")
    assert ends(stopped) == (130, [], f"stopped after step 2 of 4, which is saved; {told}")
    assert ends(RunFailed(tmp_path / "a b", "step 3\nfailed")) == (1, [], f"error: step 3 failed; {told}")


def test_ctrl_c_ends_quietly(monkeypatch, run):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setitem(COMMANDS, "convert", COMMANDS["convert"]._replace(run=interrupted))
    assert run("convert", "x") == (130, [], "")


# ---- generate -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A GPT-2 and a classifier whose vocabulary has names that could steer a terminal."""
    folder, vocab = tmp_path_factory.mktemp("tiny"), [token.replace("酒", "\x1b") for token in VOCAB]
    for name, model in (
        ("writer", make_gpt2(n_layer=1)),
        ("scorer", make_bert(id2label={0: "neg", 1: "positive\x1b"})),
    ):
        model.save_pretrained(folder / name)
        Tokenizer(vocab).save_pretrained(folder / name)
    return folder


def test_generate_prints_continuations_of_each_prompt(run):
    arguments = ["generate", "--model", WRITER, "--n", 3, "--gen-len", 8, "--prompt", "酒店", "前台"]
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    assert [text[:2] for text in out] == ["酒店"] * 3 + ["前台"] * 3
    assert len(set(out)) == 6 and all(len(text) > 5 for text in out)
    assert run(*arguments) == (code, out, err)
    assert run(*arguments, "--seed", 1)[1] != out
    assert run(*arguments, "--top-k", 1)[1] == [greedy("酒店", 8)] * 3 + [greedy("前台", 8)] * 3
    records = [json.loads(line) for line in run(*arguments, "--json")[1]]
    assert [r["prompt"] + r["response"] for r in records] == out and all(len(r) == 2 for r in records)


def greedy(prompt, length):
    """The most probable continuation, by whole forward passes."""
    model, tokenizer = GPT2.from_pretrained(WRITER), Tokenizer.from_pretrained(WRITER)
    ids = tokenizer.encode_prompt(prompt)
    response = []
    for _ in range(length):
        response.append(model(torch.tensor([ids + response]))[0, -1].argmax().item())
    return prompt + tokenizer.decode(response)


def test_generate_takes_all_options_and_defaults(run, monkeypatch, tiny):
    calls = []

    def recorded(model, prompts, *args, **options):
        calls.append((len(prompts), args, options["eos_token_id"]))
        return generate(model, prompts, *args, **options)

    generate = program.generation.generate
    monkeypatch.setattr(program.generation, "generate", recorded)
    arguments = ["generate", "--model", tiny / "writer", "--prompt", "店"]
    assert len(run(*arguments)[1]) == 5
    options = ["--n", 33, "--gen-len", 4, "--top-p", 0.5, "--top-k", 7, "--temperature", 0.7, "--eos"]
    assert len(run(*arguments, *options)[1]) == 33
    sep = VOCAB.index("[SEP]")
    assert calls == [(5, (32, SamplingConfig(1.0, 0, 0.95)), None)] + [
        (count, (4, SamplingConfig(0.7, 7, 0.5)), sep) for count in (16, 16, 1)
    ]


def test_generate_reads_prompts_from_standard_input(run, monkeypatch):
    arguments = ["generate", "--model", WRITER, "--n", 2, "--gen-len", 4]
    given = run(*arguments, "--prompt", "酒店", "前台")
    typed(monkeypatch, "酒店\r\n\n前台")
    assert run(*arguments) == given


def test_a_vocabulary_of_another_model_is_named(run, tmp_path):
    make_gpt2(n_layer=1, vocab_size=9).save_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    code, out, err = run("generate", "--model", tmp_path, "--prompt", "酒店")
    assert (code, out) == (1, [])
    assert err == f"error: {tmp_path}: the vocabulary has {len(VOCAB)} tokens, but the model was made for 9\n"


def test_what_is_printed_cannot_steer_a_terminal(run, tiny):
    for arguments in (["generate", "--prompt", "店\x9b2J", "--n", 40], ["score", "店\x9b2J\u202e"]):
        name = "writer" if arguments[0] == "generate" else "scorer"
        for form in ([], ["--json"]):
            code, out, _ = run(*arguments, *form, "--model", tiny / name)
            assert code == 0 and out
            text = "\n".join(out)
            assert "\\x9b2J" in text or "\\u009b2J" in text
            assert "\\x1b" in text or "\\u001b" in text
            assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", text)


# ---- score ----------------------------------------------------------------------------------------------------------


def test_score_prints_every_label_with_its_probability_as_a_bar(run):
    code, out, err = run("score", "--model", SCORER, GOOD, BAD)
    assert (code, err) == (0, "") and out[0] == GOOD and out[3] == BAD and len(out) == 6
    expected = SentimentReward.from_pretrained(SCORER)([GOOD, BAD]).tolist()
    assert expected[0] > 0.9 and expected[1] < 0.1
    for first, positive in zip((1, 4), expected, strict=True):
        for line, label, p in zip(out[first : first + 2], LABELS, (1 - positive, positive), strict=True):
            name, number, bar = re.fullmatch(r"  (.{27})  (\d\.\d{3})(?:  (#+))?", line).groups("")
            assert name.rstrip() == label and float(number) == pytest.approx(p, abs=6e-4)
            assert abs(len(bar) - 30 * p) <= 0.51


def test_score_gives_json(run):
    code, out, _ = run("score", "--model", SCORER, "--json", GOOD, "")
    assert code == 0
    records = [json.loads(line) for line in out]
    assert [record["text"] for record in records] == [GOOD, ""]
    expected = SentimentReward.from_pretrained(SCORER)([GOOD, ""]).tolist()
    for record, positive in zip(records, expected, strict=True):
        assert list(record) == ["text", "scores"] and tuple(record["scores"]) == LABELS
        assert record["scores"][LABELS[1]] == pytest.approx(positive, abs=1e-5)
        assert math.fsum(record["scores"].values()) == pytest.approx(1, abs=1e-5)


def test_score_reads_texts_from_standard_input_in_batches(run, monkeypatch):
    sizes, texts = [], [GOOD[:i] for i in range(1, len(GOOD))] + [BAD] * 9
    probabilities = SentimentReward.probabilities
    monkeypatch.setattr(SentimentReward, "probabilities",
                        lambda self, texts: sizes.append(len(texts)) or probabilities(self, texts))  # fmt: skip
    expected = run("score", "--model", SCORER, "--json", *texts)[1]
    sizes.clear()
    typed(monkeypatch, "\n".join(texts))
    code, out, _ = run("score", "--model", SCORER, "--json")
    assert code == 0 and [json.loads(line)["text"] for line in out] == texts
    for mine, other in zip(map(json.loads, out), map(json.loads, expected), strict=True):
        assert mine["scores"] == pytest.approx(other["scores"], abs=1e-5)
    assert max(sizes) == program.BATCH < len(texts)


def test_score_shows_any_number_of_labels_whatever_they_are_called(run, tmp_path):
    """Of many published classifiers the names say nothing; `score` need not know which label is the good one."""
    model = make_bert(id2label={0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"})
    model.save_pretrained(tmp_path)
    Tokenizer(VOCAB).save_pretrained(tmp_path)
    expected = SentimentReward(model, Tokenizer(VOCAB), "LABEL_1").probabilities(["很好"])[0].tolist()
    code, out, err = run("score", "--model", tmp_path, "--json", "很好")
    assert (code, err) == (0, "")
    assert json.loads(out[0])["scores"] == pytest.approx({f"LABEL_{i}": p for i, p in enumerate(expected)}, abs=1e-6)
    Tokenizer([*VOCAB, "more"]).save_pretrained(tmp_path)
    code, out, err = run("score", "--model", tmp_path, "很好")
    assert (code, out) == (1, []) and err.startswith(f"error: {tmp_path}: the vocabulary has {len(VOCAB) + 1} tokens")


def test_a_line_that_is_not_utf8_comes_after_the_scores_of_those_before(run, monkeypatch):
    typed(monkeypatch, "\n".join([GOOD] * program.BATCH).encode() + "\n差".encode("gb18030"))
    code, out, err = run("score", "--model", SCORER, "--json")
    assert code == 1 and len(out) == program.BATCH
    assert err.startswith(f"error: line {program.BATCH + 1} of standard input is not valid UTF-8")


# ---- convert --------------------------------------------------------------------------------------------------------


def test_convert_writes_safetensors_once_and_prints_their_path(run, tmp_path):
    torch.save(make_gpt2(n_layer=1).state_dict(), tmp_path / "pytorch_model.bin")
    path = tmp_path / "model.safetensors"
    assert run("convert", tmp_path) == (0, [str(path)], "")
    before = path.stat()
    assert run("convert", tmp_path) == (0, [str(path)], "") and path.stat() == before


class Command:
    """A pickle of this runs a shell command when it is loaded without care."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.system, (f"touch {self.proof}",)


def test_convert_refuses_a_malicious_pickle_in_one_line(run, tmp_path):
    proof, path = tmp_path / "proof", tmp_path / "model" / "pytorch_model.bin"
    path.parent.mkdir()
    torch.save({"wte.weight": Command(proof)}, path)
    code, out, err = run("convert", path.parent)
    assert (code, out) == (1, []) and not proof.exists() and list(path.parent.iterdir()) == [path]
    assert err == f"error: {path} is refused: it asks to load posix.system, and weights need nothing but tensors\n"


# ---- as a process ---------------------------------------------------------------------------------------------------


def test_it_streams_and_a_closed_pipe_ends_it_quietly():
    """An answer comes while standard input is still open; in an encoding without Chinese it is escaped."""
    environment = {**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "minirlhf", "score", "--model", SCORER, "--json"]
    with subprocess.Popen(command, cwd=REPO, env=environment, stdin=-1, stdout=-1, stderr=-1) as process:
        for text in (GOOD, BAD):
            process.stdin.write(f"{text}\n".encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["text"] == text
        process.stdout.close()  # what `head` does
        process.stdin.write(f"{GOOD}\n".encode())
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 0
