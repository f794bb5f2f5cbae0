"""Both pages in headless Chromium, as people use them. CONTRIBUTING.md says what must be installed."""

import contextlib
import json
import runpy
import shutil
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from conftest import VOCAB, make_gpt2
from minirlhf import PPOTrainer, Run, Tokenizer, load_decoder
from minirlhf.commands.demo import CSS, Demo, page_of
from minirlhf.common.web_page import HOST, served
from minirlhf.io.files import read_jsonl
from minirlhf.rewards.scorers import load_scorer

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium: pip install -e '.[web]' selenium")
pytest.importorskip("gradio", reason="needs gradio: pip install -e '.[web]' selenium")
PROGRAMS = [next(filter(None, map(shutil.which, names)), None) for names in
            (("chromium", "chromium-browser", "google-chrome"), ("chromedriver",))]  # fmt: skip
if None in PROGRAMS:
    pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "human_feedback.py"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--lang=en"]  # fmt: skip
PATIENCE = 60.0  # seconds for what takes one


class Browser:
    """Chromium, with what a person does."""

    def __init__(self, profile: Path):
        options = webdriver.ChromeOptions()
        options.binary_location = PROGRAMS[0]
        for flag in [*FLAGS, f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(PROGRAMS[1]))

    @property
    def body(self) -> str:
        return self.all("body")[0].text

    def all(self, selector: str) -> list:
        return self.driver.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return self.driver.execute_script(
            "return [...document.querySelectorAll(arguments[0])].map(x => x.textContent)", selector
        )

    def until(self, holds) -> None:
        """Wait until a condition holds."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, self.body
            time.sleep(0.05)

    def asked(self, prompt: str) -> None:
        """Wait for a question."""
        self.until(lambda: self.texts(".prompt") == [prompt])

    def press(self, keys: str) -> None:
        webdriver.ActionChains(self.driver).send_keys(keys).perform()

    def strangers(self) -> list[str]:
        """The addresses outside of this machine that pages asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
        assert any(url.startswith(f"http://{HOST}") for url in urls)
        return [url for url in urls if not url.startswith((f"http://{HOST}", "chrome", "data:", "blob:"))]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.quit()


@pytest.fixture
def port():
    with socket.create_server((HOST, 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    make_gpt2(1, scale=2.0, n_embd=16, n_layer=1, n_head=2, n_positions=32).save_pretrained(folder)
    Tokenizer(VOCAB).save_pretrained(folder)
    return folder


@pytest.fixture
def feedback(browser, policy, port, monkeypatch):
    """examples/human_feedback.py --web in another thread, with its page open."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))

    @contextlib.contextmanager
    def run(*arguments):
        common = ["--policy", policy, "--prompts", "酒店", "房间", "--gen-len", "4", "--web", "--port", port]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, [*common, *arguments])])
        program = threading.Thread(target=runpy.run_path, args=(str(SCRIPT),), kwargs={"run_name": "__main__"})
        program.start()
        browser.until(lambda: listens(port))
        browser.driver.get(f"http://{HOST}:{port}")
        yield
        program.join(PATIENCE)
        assert not program.is_alive()

    return run


def listens(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex((HOST, port)) == 0


def test_two_people_rank_by_key_and_click(browser, feedback, port, tmp_path):
    path = tmp_path / "f.jsonl"
    with feedback("--rounds", 4, "--output", path):
        browser.asked("酒店")
        anna = browser.driver.current_window_handle
        answers = browser.texts(".answer p")
        browser.press("2")
        browser.until(lambda: browser.texts(".rank") == ["", "1", ""])
        browser.press("\ue003")  # Backspace
        browser.press("9x\uff133")  # no numbers, and the 3 of an input method; then again, which takes nothing
        browser.until(lambda: browser.texts(".rank") == ["", "", "1"])
        browser.press("1")
        browser.asked("房间")
        assert read_jsonl(path)[0]["order"] == [3, 1, 2]  # on the disk before the next question
        assert read_jsonl(path)[0]["answers"] == [answers[2], answers[0], answers[1]]

        browser.driver.switch_to.new_window("tab")
        browser.driver.get(f"http://{HOST}:{port}")
        browser.asked("酒店")  # round 2: another question than anna's
        assert browser.texts(".count") == ["2 / 4"]
        for i in (1, 0):
            browser.all(".answer")[i].click()
        browser.asked("房间")  # round 3
        browser.press("s")
        browser.until(lambda: browser.texts(".prompt") == [""])
        browser.driver.close()
        browser.driver.switch_to.window(anna)

        browser.driver.refresh()  # and still the same person, with the same question
        browser.asked("房间")
        browser.press("u")
        browser.asked("酒店")
        assert browser.texts(".answer p") == answers and [line["round"] for line in read_jsonl(path)] == [2]
        browser.press("12")
        browser.asked("房间")
        browser.all(".answer")[2].click()
        browser.all(".answer")[2].click()  # taken back
        browser.press("21")
        browser.until(lambda: "All done" in browser.texts(".note")[0])
    assert [(line["round"], line["order"]) for line in read_jsonl(path)] == [
        (2, [2, 1, 3]),
        (0, [1, 2, 3]),
        (1, [2, 1, 3]),
    ]
    with feedback("--rounds", 4, "--output", path):  # it goes on with what has no answer
        browser.asked("房间")
        assert browser.texts(".count") == ["4 / 4"]
        browser.press("31")
    assert read_jsonl(path)[3]["round"] == 3
    assert browser.strangers() == []


def test_ppo_waits_for_scores(browser, feedback, tmp_path):
    run = tmp_path / "run"
    with feedback("--train", run, "--rounds", 2, "--batch-size", 2):
        for score in (5, 1, 4):
            browser.until(lambda: browser.texts(".answer button") == list("12345"))
            count = browser.texts(".count")
            browser.press(str(score)) if score < 5 else browser.all(".answer button")[score - 1].click()
            browser.until(lambda count=count: browser.texts(".count") != count)
        browser.until(lambda: browser.texts(".answer button") == list("12345"))
        browser.press("2")
    assert [line["scores"] for line in read_jsonl(run / "scores.jsonl")] == [[5], [1], [4], [2]]
    assert [line["reward/mean"] for line in read_jsonl(run / "metrics.jsonl")] == [0.0, 0.0]


def test_the_demo_shows_both_models_and_a_step(browser, policy, tiny, port, tmp_path):
    settings = dict(steps=8, batch_size=8, minibatch_size=8, forward_batch_size=8, gen_len=4, lr=3e-2, device="cpu")
    trainer = PPOTrainer(load_decoder(policy), policy, Tokenizer(VOCAB), **settings)
    with Run.start(tmp_path / "run", trainer, {"arguments": {"prompts": ["酒店", "房间"]}}) as run:
        trainer.train(["酒店"], load_scorer(tiny / "second"), run.record, progress=False)
    demo = Demo(tmp_path / "run", str(tiny / "second"))
    with served(page_of(demo, "run <b>", "en"), HOST, port, CSS):
        browser.driver.get(f"http://{HOST}:{port}")
        browser.until(lambda: any(x.text == "Write" for x in browser.all("button")))
        press = lambda text: next(x for x in browser.all("button") if x.text == text).click()  # noqa: E731
        press("Write")
        browser.until(lambda: len(browser.all(".sample")) == 8)
        found = demo.continuations("酒店", 4, 0)
        for name in ("reference", "policy"):
            scores = [f"{score:.3f}" for score in found[name].scores.tolist()]
            assert browser.texts(f".{name} .sample p") == [f"酒店{text}" for text in found[name].responses]
            assert browser.texts(f".{name} .sample b") == scores
        press("Take a step of PPO on this prompt")
        browser.until(lambda: len(browser.all(".tokens span")) == 4)
        best = demo.step("酒店", 0)[0].tokens
        for label in ("advantage", "reward", "value", "clipping"):
            name = "ratio" if label == "clipping" else label
            next(x for x in browser.all("label:has(input[type=radio])") if x.text.startswith(label)).click()
            shown = [f"{token[name] - (name == 'ratio'):.3f}" for token in best]
            browser.until(lambda shown=shown: browser.texts(".tokens small") == shown)
        assert len(browser.all(".tokens .held")) == sum(token["clipped"] for token in best)
        box = browser.all("textarea, input[type=text]")[0]
        box.clear()
        box.send_keys("店" * 60)
        press("Write")
        browser.until(lambda: "shorten the prompt to 28" in browser.body)
    assert browser.strangers() == []
