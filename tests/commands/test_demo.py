"""What stands behind the demo's page, without gradio: continuations, one step token by token, their HTML, bad input."""

import contextlib
import copy
import dataclasses
import html
import io
import re
import shutil
import socket
import sys
import threading
import types

import pytest
import torch

from minirlhf import PPOTrainer, Run, Tokenizer, explain, load_decoder
from minirlhf.commands import demo as demo_module
from minirlhf.commands.demo import Demo, figures, page_of, pair_html, tokens_html
from minirlhf.commands.main import main
from minirlhf.common.web_page import HOST
from minirlhf.evaluation.explanation import Explanation
from minirlhf.io.files import read_json, write_json
from minirlhf.models.sharded import exported
from minirlhf.rewards.scorers import load_scorer
from minirlhf.runs.checkpoint import load_checkpoint
from minirlhf.runs.locks import FolderLock
from minirlhf.runs.run import newest_checkpoint

PROMPTS = ["酒店", "位置"]
SETTINGS = dict(steps=16, batch_size=8, minibatch_size=8, forward_batch_size=8, gen_len=4, lr=3e-2, device="cpu",
                lr_schedule="linear", top_p=0.9, save_freq=1)  # fmt: skip
WORDS = {"reference": "before", "policy": "after", "mean": "mean"}


@pytest.fixture(scope="module")
def run(tiny, tmp_path_factory):
    """A finished run of two steps, whose learning rate has come to 0."""
    tokenizer, reward = Tokenizer.from_pretrained(tiny / "policy"), load_scorer(tiny / "second")
    trainer = PPOTrainer(load_decoder(tiny / "policy"), load_decoder(tiny / "policy"), tokenizer, **SETTINGS)
    folder = tmp_path_factory.mktemp("demo") / "run"
    arguments = {"reward": str(tiny / "second"), "positive_label": None, "judge": {}, "prompts": PROMPTS}
    with Run.start(folder, trainer, {"command": "train", "arguments": arguments}) as started:
        trainer.train(PROMPTS, reward, started.record, progress=False)
    trainer.reference.save_pretrained(folder / "reference")  # where else it came from is not known
    return folder


@pytest.fixture(scope="module")
def demo(run):
    return Demo(run)


def everything(trainer):
    state = trainer.state_dict()
    return copy.deepcopy(({**trainer.policy.state_dict(), **state["tensors"]}, state["counters"]))


def test_continuations_are_those_of_the_saved_models(demo, run, tiny):
    found = demo.continuations("位置", 3, seed=5)
    assert list(demo.prompts) == PROMPTS and list(found) == ["reference", "policy"]
    folders = {"reference": tiny / "policy", "policy": newest_checkpoint(run)}
    for name, rollout in found.items():
        model, tokenizer = load_decoder(folders[name]), Tokenizer.from_pretrained(tiny / "policy")
        texts = model.generate("位置", n=3, max_new_tokens=4, top_p=0.9, seed=5, tokenizer=tokenizer)
        assert list(rollout.responses) == texts
        assert rollout.scores.tolist() == pytest.approx(load_scorer(tiny / "second")([f"位置{text}" for text in texts]))
    assert found["reference"].responses != found["policy"].responses
    assert demo.continuations("位置", 3, seed=6)["policy"].responses != found["policy"].responses


def test_a_step_is_the_one_that_the_trainer_takes_and_changes_nothing(demo, run, tiny):
    before = everything(demo.trainer)
    found = demo.step("位置", seed=3)
    after = everything(demo.trainer)
    assert before[1] == after[1]
    assert before[0].keys() == after[0].keys() and all(torch.equal(x, after[0][name]) for name, x in before[0].items())

    trainer = load_checkpoint(newest_checkpoint(run), tiny / "policy")
    trainer.generators["sampling"].manual_seed(3)
    trainer.optimizer_steps = 0
    rollout = trainer.collect(["位置"] * 8, load_scorer(tiny / "second"))
    coef = trainer.kl_controller.coef
    trainer.step(rollout)
    assert trainer.kl_controller.coef != coef
    trainer.kl_controller.coef = coef  # what the step's own rewards were made with
    expected = [explain(trainer, rollout, i, io.StringIO()) for i in range(8)]
    assert sorted(map(str, found)) == sorted(map(str, expected))
    assert found[0].tokens[0]["reward"] == pytest.approx(-coef * found[0].tokens[0]["kl"])
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True)
    ratios = [token["ratio"] for each in found for token in each.tokens]
    assert max(abs(ratio - 1) for ratio in ratios) > 0.01  # the schedule has ended, the step moves all the same
    assert any(token["clipped"] for each in found for token in each.tokens)
    assert figures(found[0]) == ["advantage", "reward", "value", "clipping"]


def test_adapters_over_a_rounded_base_find_the_base_and_a_step_leaves_no_moments(tiny, tmp_path):
    """The reference of the run's end is rounded to bf16, unlike the base; and no step has been made."""
    lora = dict(rank=2, base_dtype="bf16")
    policy, tokenizer = load_decoder(tiny / "policy"), Tokenizer.from_pretrained(tiny / "policy")
    trainer = PPOTrainer(policy, None, tokenizer, **{**SETTINGS, "lora": lora})
    Run.start(tmp_path / "run", trainer, {}).__exit__(None, None, None)
    exported(trainer.reference).save_pretrained(tmp_path / "run" / "reference")
    demo = Demo(tmp_path / "run", str(tiny / "second"))
    before = everything(demo.trainer)
    assert not any(name.startswith("optimizer.") for name in before[0])
    demo.step("位置", seed=3)
    after = everything(demo.trainer)
    assert before[1] == after[1] and before[0].keys() == after[0].keys()
    assert all(torch.equal(x, after[0][name]) for name, x in before[0].items())


def test_a_reward_that_hangs_is_given_up_as_in_the_run(demo, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(demo.trainer, "config", dataclasses.replace(demo.trainer.config, reward_timeout=0.05))
    monkeypatch.setattr(demo, "reward", lambda texts: [0.0] * len(texts) if released.wait(20) else None)
    try:
        with pytest.raises(TimeoutError):
            demo.continuations("位置", 1, 0)
    finally:
        released.set()


def test_an_error_in_a_step_leaves_the_trainer_as_it_was(demo, monkeypatch):
    before = everything(demo.trainer)
    with monkeypatch.context() as patched:
        patched.setattr(demo.trainer, "_update_statistics", lambda updates: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            demo.step("位置", seed=3)
    after = everything(demo.trainer)
    assert before[1] == after[1] and all(torch.equal(x, after[0][name]) for name, x in before[0].items())


def test_a_prompt_that_does_not_fit_is_refused(demo):
    for text in ("", "店" * 40):
        with pytest.raises(ValueError, match="prompt"):
            demo.continuations(text, 1, 0)
        with pytest.raises(ValueError, match="prompt"):
            demo.step(text, 0)


def test_chats_of_the_run_are_prompts_as_they_were_and_new_ones_begin_like_the_first(run, tiny, tmp_path):
    def of(*turns):
        return [{"role": role, "content": content} for role, content in turns]

    folder = shutil.copytree(run, tmp_path / "run", symlinks=True)
    config = read_json(folder / "config.json")
    pool = [of(("system", "店"), ("user", "酒店"), ("assistant", "好"), ("user", "房间")), of(("user", "位置"))]
    write_json(folder / "config.json", {**config, "arguments": {**config["arguments"], "prompts": pool}})
    demo = Demo(folder)
    template = "{% for m in messages %}{{ m.role[0] }}{{ m.content }}{% endfor %}"
    demo.trainer.tokenizer.model.kept = {"chat_template": template}
    assert list(demo.prompts) == ["房间", "位置"]
    for text, prompt in {"房间": "s店u酒店a好u房间", "位置": "u位置", "早餐": "s店u早餐"}.items():
        assert demo.continuations(text, 2, 0)["policy"].prompts == (prompt,) * 2


# ---- HTML -----------------------------------------------------------------------------------------------------------


def token(text: str, **figures) -> dict:
    return {"token": text, "reward": 0.0, "advantage": 0.0, "ratio": 1.0, "clipped": False, **figures}


def test_tokens_are_coloured_by_sign_and_size_and_clipped_ones_framed():
    explanation = Explanation("问", 1.0, (token("好", advantage=2.0, ratio=1.5, clipped=True),
                                          token("<b>", advantage=-0.5, ratio=0.875)))  # fmt: skip
    shown = tokens_html(explanation, "advantage")
    assert re.findall(r"rgba\((.*?)\)\">(.*?)<small>(.*?)<", shown) == [
        ("230, 97, 1, 0.750", "好", "2.000"), ("94, 60, 153, 0.188", "&lt;b&gt;", "-0.500"),
    ]  # fmt: skip
    assert "held" not in shown and "-2.000" in shown
    clipping = tokens_html(explanation, "clipping")
    assert re.findall(r'class="(held|)" style="background: rgba\(.*?([\d.]+)\)', clipping) == [
        ("held", "0.750"), ("", "0.188"),
    ]  # fmt: skip
    assert "rgba(94, 60, 153, 0.000)" in tokens_html(explanation, "reward")  # all of them 0
    assert figures(explanation) == ["advantage", "reward", "clipping"]  # no value head


def test_both_sides_have_their_texts_rewards_and_mean():
    before, after = (
        types.SimpleNamespace(prompts=("<p>",) * 2, responses=texts, scores=torch.tensor(scores))
        for texts, scores in ((("差\n\x1b", "好"), (0.0, 0.5)), (("很好", "好"), (1.0, 0.75)))
    )
    shown = pair_html({"reference": before, "policy": after}, WORDS)
    assert re.findall(r"<h3>(.*?)<small>(.*?)</small>", shown) == [("before", "mean 0.250"), ("after", "mean 0.875")]
    cards = re.findall(r"<p><i>(.*?)</i>(.*?)</p><b>(.*?)</b>", shown, re.DOTALL)
    assert [(html.unescape(p), t, s) for p, t, s in cards] == [
        ("<p>", "差\n\\x1b", "0.000"), ("<p>", "好", "0.500"), ("<p>", "很好", "1.000"), ("<p>", "好", "0.750"),
    ]  # fmt: skip


def test_the_page_takes_an_empty_seed_and_tells_every_error(demo, monkeypatch):
    gradio = pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[web]'")
    write, *_ = [each.fn for each in page_of(demo, "run", "en").fns.values() if each.fn.__module__ == Demo.__module__]
    assert write("位置", 2, None) == write("位置", 2, 0)

    def fails(texts):
        raise KeyError

    monkeypatch.setattr(demo, "reward", fails)
    with pytest.raises(gradio.Error, match="KeyError"):
        write("位置", 2, 0)


def test_ctrl_c_ends_the_page(run, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_module, "require_web", lambda *address: None)
    monkeypatch.setattr(demo_module, "page_of", lambda *given: None)
    monkeypatch.setattr(demo_module, "served", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(demo_module.time, "sleep", interrupted)
    assert main(["demo", str(run)]) == 0


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.fixture
def error_of(monkeypatch, capsys):
    """The error line of a command line that must fail; gradio is a stand-in."""
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    with socket.create_server((HOST, 0)) as server:
        port = server.getsockname()[1]

    def call(*arguments) -> str:
        assert main(["demo", *map(str, arguments), "--port", str(port)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return call


def test_a_run_that_is_being_written_is_left_alone(run, error_of):
    lock = FolderLock(run)
    try:
        assert re.match(rf"error: {re.escape(str(run))} is in use by process \d+ on ", error_of(run))
    finally:
        lock.release()


def test_other_folders_and_rewards_are_refused(run, tiny, tmp_path, error_of):
    assert "is no run: it has no checkpoints/step-" in error_of(tmp_path / "nowhere")
    assert "is no run" in error_of(tiny / "policy")
    assert "no function-of-mine" in error_of(run, "--reward", "no function-of-mine")
    other = tmp_path / "other"
    trainer = PPOTrainer(load_decoder(tiny / "policy"), tiny / "policy", Tokenizer.from_pretrained(tiny / "policy"),
                         **SETTINGS)  # fmt: skip
    arguments = {"prompts": PROMPTS, "reward": str(tiny / "second")}  # a script's, which may reward something else
    Run.start(other, trainer, {"arguments": arguments}).__exit__(None, None, None)
    assert error_of(other).endswith("does not say what its reward was: give --reward")
    (counters,) = other.glob("checkpoints/*/training.json")
    counters.write_text(counters.read_text().replace('"kind": "ppo"', '"kind": "sft"'))
    assert error_of(other, "--reward", tiny / "second").endswith("of kind 'sft', and a demo shows runs of PPO")


def test_without_gradio_nothing_is_loaded(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", str(tmp_path / "nowhere"), "--port", "7999"]) == 1
    needs = "a page in the browser needs gradio: pip install gradio (minirlhf's extra web)"
    assert capsys.readouterr().err == f"error: {needs}\n"
