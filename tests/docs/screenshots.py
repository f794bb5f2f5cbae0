"""Makes docs/demo.png of a run: python tests/docs/screenshots.py RUN [PROMPT LANGUAGE OUTPUT]

Needs what tests/commands/test_browser.py needs, and a font with Chinese characters.
"""

import shutil
import sys
import tempfile
import time
from pathlib import Path

from selenium import webdriver

from minirlhf.commands.demo import CSS, WORDS, Demo, page_of
from minirlhf.common.web_page import HOST, PORT, served

OUTPUT = Path(__file__).resolve().parents[2] / "docs" / "demo.png"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--window-size=1000,1400"]  # fmt: skip


def main(run: str, prompt: str = "酒店", language: str = "en", output: str = str(OUTPUT)) -> None:
    words = WORDS[language]
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in [*FLAGS, f"--user-data-dir={tempfile.mkdtemp()}"]:
        options.add_argument(flag)
    with served(page_of(Demo(Path(run)), Path(run).name, language), HOST, PORT, CSS):
        browser = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        browser.get(f"http://{HOST}:{PORT}")

        def wait(selector: str) -> list:
            while not (found := browser.find_elements("css selector", selector)):
                time.sleep(0.2)
            return found

        for label, selector in ((words["write"], ".sample"), (words["step"], ".tokens span")):
            wait("button.lg")
            next(x for x in wait("button") if x.text == label).click()
            wait(selector)
        time.sleep(1)
        browser.set_window_size(1000, browser.execute_script("return document.body.scrollHeight") + 200)
        time.sleep(1)
        browser.save_screenshot(output)
        browser.quit()


if __name__ == "__main__":
    main(*sys.argv[1:])
