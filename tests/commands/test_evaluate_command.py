"""`python -m minirlhf evaluate`: what it finds on the disk, what it prints and leaves, and bad input."""

import io
import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from test_hostile_text import HISTORY

from conftest import VOCAB, make_bert, make_gpt2
from folders import snapshot
from minirlhf import GPT2, BertClassifier, NGramScorer, RewardModel, SentimentReward, Tokenizer
from minirlhf.io.files import read_json, write_json
from minirlhf.rewards.reward_model import DecoderScorer
from minirlhf.rewards.scorers import load_scorer
from minirlhf.rewards.sentiment import CANARIES


class Terminal(io.StringIO):
    def isatty(self):
        return True


SMALL = ["--samples", 6, "--best-of", 2, 3]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """run/ with policy/ and reference/, and rewards of all kinds."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), Tokenizer(VOCAB)
    sizes = dict(n_embd=16, n_layer=1, n_head=2, n_positions=32)
    for name, seed in (("policy", 1), ("reference", 0)):
        make_gpt2(seed, scale=3.0, **sizes).save_pretrained(folder / "run" / name)
        tokenizer.save_pretrained(folder / "run" / name)
    bert = make_bert(0, id2label={0: "negative", 1: "positive"})
    good, bad = SentimentReward(bert, tokenizer, device="cpu")(list(CANARIES)).tolist()
    if good <= bad:
        with torch.no_grad():
            bert.classifier.weight.neg_()
    bert.save_pretrained(folder / "sentiment")
    tokenizer.save_pretrained(folder / "sentiment")
    RewardModel(DecoderScorer(make_gpt2(0, **sizes)), tokenizer, device="cpu").save_pretrained(folder / "gpt2 reward")
    one_label = make_bert(0, id2label={0: "score"})
    RewardModel(one_label, tokenizer, device="cpu").save_pretrained(folder / "bert reward")
    NGramScorer({"好": 2.0, "差": -2.0}, 0.0).save_pretrained(folder / "ngrams")
    write_json(folder / "run" / "config.json", {
        "arguments": {"prompts": ["服务", "很好"]},
        "ppo": {"adaptive_kl": True, "target": 6.0, "gen_len": 4, "temperature": 0.9, "top_k": 0, "top_p": 0.95,
                "eos_token_id": None},
    })  # fmt: skip
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in HISTORY))
    return folder


@pytest.fixture
def run(cli, folders):
    """Exit code, lines of stdout, stderr of `evaluate`, with a reward and little work."""

    def call(*arguments, reward="sentiment"):
        code, out, err = cli("evaluate", "--reward", folders / reward, "--device", "cpu", *SMALL, *arguments)
        return code, out.splitlines(), err

    return call


def models(folders):
    return ["--policy", folders / "run" / "policy", "--reference", folders / "run" / "reference"]


def test_a_run_is_evaluated_and_leaves_its_report(run, folders, tmp_path):
    pytest.importorskip("matplotlib")
    before = snapshot(folders / "run")
    arguments = ["--run", folders / "run", "--held-out-prompts", "房间", "--second-scorer", folders / "ngrams",
                 "--output", tmp_path / "new" / "evaluation"]  # fmt: skip
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    shown = "\n".join(out)
    parts = "given prompts", "held-out prompts", "second scorer", "KL exact", "distinct-3", "best of 3", "self-BLEU"
    assert all(part in shown for part in parts)
    written = tmp_path / "new" / "evaluation"
    assert {path.name for path in written.iterdir()} == {"evaluation.json", "report.html"}
    found = read_json(written / "evaluation.json")
    assert found["given"]["prompts"] == ["服务", "很好"] and found["held_out"]["prompts"] == ["房间"]
    assert found["settings"]["samples"] == 6 and [p["n"] for p in found["given"]["best_of_n"]] == [2, 3]
    assert f"{found['given']['policy']['reward']['mean']:.3f}" in shown
    page = (written / "report.html").read_text(encoding="utf-8")
    assert "<h2>The run</h2>" in page and page.count("<img") == 5 and "Evaluation of run" in page
    assert snapshot(folders / "run") == before

    code, _, err = run(*arguments)  # once more: what is there stays
    assert code == 1 and re.fullmatch(r"error: .*evaluation.json exists; choose another --output\n", err)


def test_on_a_terminal_it_says_how_much_it_will_do(run, folders, monkeypatch):
    monkeypatch.setattr("minirlhf.commands.runs.sys", SimpleNamespace(stderr=Terminal()))
    code, out, _ = run("--run", folders / "run", "--held-out-prompts", "房间")
    assert code == 0 and out
    assert sys.modules["minirlhf.commands.runs"].sys.stderr.getvalue() == (
        "sampling and scoring at least 408 texts ...\n"  # 2 lists x (2 models x 6 samples + 64 prompts x 3)
    )


@pytest.mark.filterwarnings("default:.*is another reference")
def test_another_reference_than_the_run_s_is_told(run, folders, tmp_path):
    code, _, err = run("--run", folders / "run", "--reference", folders / "run" / "policy")
    assert code == 0
    assert re.fullmatch(r"warning: .*policy is another reference than .*reference, from which the run began\n", err)
    shutil.copytree(folders / "run" / "reference", tmp_path / "copy")
    code, _, err = run("--run", folders / "run", "--reference", tmp_path / "copy")
    assert (code, err) == (0, "")


def test_as_json_it_prints_one_object(run, folders):
    code, out, _ = run(*models(folders), "--prompts", "酒店", "--json")
    (line,) = out
    found = json.loads(line)
    assert code == 0 and found["reward"].endswith("sentiment") and found["held_out"] is None
    assert found["given"]["policy"]["second"] is None and len(found["given"]["pairs"]) == 6
    assert run(*models(folders), "--prompts", "酒店", "--json")[1] == out
    assert run(*models(folders), "--prompts", "酒店", "--json", "--seed", 1)[1] != out


@pytest.mark.parametrize(("options", "setting", "value"), [
    (["--top-p", "0.5"], ("sampling", "top_p"), 0.5), (["--top-k", "3"], ("sampling", "top_k"), 3),
    (["--gen-len", "5"], ("gen_len",), 5),
    (["--temperature", "0.5"], ("sampling", "temperature"), 0.5), (["--eos"], ("eos_token_id",), 102),
])  # fmt: skip
def test_every_option_reaches_its_setting(run, folders, options, setting, value):
    found = json.loads(run(*models(folders), "--prompts", "酒店", "--json", *options)[1][0])["settings"]
    for name in setting:
        found = found[name]
    assert found == value


def settings_of(out):
    found = json.loads(out[0])["settings"]
    return {**found.pop("sampling"), **found}


def test_a_run_is_sampled_as_it_was_trained_and_says_so(run, folders, tmp_path):
    code, out, _ = run("--run", folders / "run", "--json")
    assert code == 0 and settings_of(out).items() >= dict(gen_len=4, temperature=0.9, top_p=0.95).items()
    line = "sampled with gen_len 4, temperature 0.9, top_k 0, top_p 0.95, eos_token_id None"
    assert run("--run", folders / "run")[1][0] == f"{line}; as the run was"
    assert run("--run", folders / "run", "--top-p", 1)[1][0] == (
        f"{line.replace('0.95', '1.0')}; unlike the run, which had top_p 0.95"
    )
    shutil.copytree(folders / "run", tmp_path / "other")
    write_json(tmp_path / "other" / "config.json", {"arguments": {"prompts": ["服务"]}, "ppo": {"gen_len": 3}})
    code, out, _ = run("--run", tmp_path / "other")
    assert out[0].startswith("sampled with gen_len 3, temperature 1.0,") and out[0].endswith(
        "; unlike the run, which had temperature unknown, top_k unknown, top_p unknown, eos_token_id unknown"
    )
    assert run(*models(folders), "--prompts", "酒店")[1][0] == (
        "sampled with gen_len 16, temperature 1.0, top_k 0, top_p 1.0, eos_token_id None"
    )


def test_prompts_are_given_or_those_of_the_run(run, folders, tmp_path):
    def pools(*arguments):
        found = json.loads(run(*arguments, "--json")[1][0])
        return [found[name] and found[name]["prompts"] for name in ("given", "held_out")]

    assert pools("--run", folders / "run") == [["服务", "很好"], None]
    assert pools("--run", folders / "run", "--prompts", "酒", "--held-out-prompts", "店") == [["酒"], ["店"]]
    shutil.copytree(folders / "run", tmp_path / "other")
    of_a_file = ["写 a.txt", "服务"]  # of a run whose file of prompts held them
    write_json(tmp_path / "other" / "config.json", {"arguments": {"prompts": of_a_file}})
    assert pools("--run", tmp_path / "other") == [of_a_file, None]
    for config in ({}, {"arguments": {"prompts": [1]}}, {"arguments": 3, "ppo": []}):  # of some other script
        write_json(tmp_path / "other" / "config.json", config)
        code, out, err = run("--run", tmp_path / "other")
        assert (code, out) == (1, []) and "give --prompts, or a --run whose config.json has them" in err


@pytest.mark.parametrize(("raw", "encoding"), [
    ("酒店\n\n服务很好\n".encode(), "utf-8"), ("\ufeff酒店\r\n服务很好".encode(), "utf-8"),
    ("酒店\n服务很好\n".encode("gbk"), "gbk"),
])  # fmt: skip
def test_a_file_of_prompts(run, folders, tmp_path, raw, encoding):
    (tmp_path / "p.txt").write_bytes(raw)
    given = "--prompts", tmp_path / "p.txt", "--encoding", encoding, "--json"
    assert json.loads(run(*models(folders), *given)[1][0])["given"]["prompts"] == ["酒店", "服务很好"]


@pytest.mark.parametrize(("name", "kind", "network"), [
    ("sentiment", SentimentReward, None), ("gpt2 reward", RewardModel, DecoderScorer),
    ("bert reward", RewardModel, BertClassifier), ("ngrams", NGramScorer, None),
])  # fmt: skip
def test_every_kind_of_reward_is_told_from_its_folder(folders, name, kind, network):
    scorer = load_scorer(folders / name, "cpu")
    assert type(scorer) is kind and (network is None or isinstance(scorer.network, network))


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path):
    (tmp_path / "gbk.txt").write_bytes("酒店\n服务\n".encode("gbk"))
    (tmp_path / "empty.txt").write_bytes(b"\n \n")
    (tmp_path / "a file").write_bytes(b"x")
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    (tmp_path / "unfinished" / "config.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), [
    (["--policy", "RUN/policy"], "give --run, or --policy and --reference"), ([], "give --run, or"),
    (["--policy", "RUN/policy", "--reference", "RUN/reference"], "give --prompts, or a --run whose config.json"),
    (["--run", "nowhere"], "nowhere/config.json does not exist"),
    (["--run", "FILES/unfinished"], "unfinished has not come to its end.*or name a checkpoint"),
    (["--policy", "nowhere", "--reference", "RUN/reference", "--prompts", "酒"], "nowhere.* does not exist"),
    (["--run", "RUN", "--prompts", "FILES/gbk.txt"], "gbk.txt, line 1 is not utf-8 .*--encoding, for instance gbk"),
    (["--run", "RUN", "--prompts", "FILES/gbk.txt", "--encoding", "klingon"], "encoding must be .*, got 'klingon'"),
    (["--run", "RUN", "--prompts", "FILES/empty.txt"], "empty.txt holds no prompts|prompt ' ' is empty"),
    (["--run", "RUN", "--prompts", "FILES/none.txt"], "none.txt does not exist"),
    (["--run", "RUN", "--prompts", "酒店", ""], "prompt '' is empty"),
    (["--run", "RUN", "--held-out-prompts", "服务"], "must not be among the given ones, as is '服务'"),
    (["--run", "RUN", "--gen-len", "40"], "leave room for 0"),
    (["--run", "RUN", "--top-p", "0"], "SamplingConfig.top_p must be .*, got 0.0"),
    (["--run", "RUN", "--device", "tpu"], "device must be .*, got 'tpu'"),
    (["--run", "RUN", "--output", "FILES/a file"], "a file is a file, not a folder"),
    (["--run", "RUN", "--second-scorer", "RUN/policy"], "without a reward head"),
    (["--run", "RUN", "--second-scorer", "nowhere"], "nowhere.* does not exist"),
])  # fmt: skip
def test_bad_input_is_one_line_and_writes_nothing(run, folders, files, arguments, message):
    names = {"RUN": str(folders / "run"), "FILES": str(files)}
    arguments = [re.sub("^(RUN|FILES)", lambda found: names[found[0]], argument) for argument in arguments]
    before = snapshot(files), snapshot(folders)
    code, out, err = run(*arguments)
    assert (code, out) == (1, []), err
    assert re.fullmatch(rf"error: .*({message}).*\n", err), err
    assert (snapshot(files), snapshot(folders)) == before


@pytest.mark.parametrize("arguments", [
    ["--samples", "1"], ["--best-of", "0"], ["--best-of", "65"], ["--best-of"], ["--seed", "-1"], ["--gen-len", "x"],
])  # fmt: skip
def test_a_command_line_that_cannot_be_understood(run, folders, arguments):
    code, out, err = run("--run", folders / "run", *arguments)
    assert (code, out) == (2, []) and err.startswith("usage: minirlhf evaluate")


@pytest.mark.filterwarnings("default:.*is another reference")
def test_models_that_do_not_fit_are_named(run, folders, tmp_path):
    make_gpt2(0, vocab_size=7, n_embd=16, n_layer=1, n_head=2).save_pretrained(tmp_path / "small")
    code, _, err = run("--run", folders / "run", "--reference", tmp_path / "small")
    assert code == 1 and "the reference was made for 7" in err
    assert isinstance(GPT2.from_pretrained(tmp_path / "small"), GPT2)
