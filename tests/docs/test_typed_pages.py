"""The scripts of the pages pass mypy --strict, and pyright where it is installed, as a user's editor runs them.

`make lint` and `.ci/run` set MINIRLHF_TYPES=1; the suite leaves these minutes out.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_readme import DOCS, REPO, blocks, read

PAGES = [page for page in ("README.md", "README.zh-CN.md", *DOCS) if blocks(read(page), "python")]
SETTINGS = REPO / "tests/typed_settings.py"

pytestmark = pytest.mark.skipif(not os.environ.get("MINIRLHF_TYPES"), reason="MINIRLHF_TYPES is not set")


def check(*command: object) -> str:
    """What a type checker prints. It must find nothing."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> list[Path]:
    """The blocks of each page, one after the other, as a script."""
    folder = tmp_path_factory.mktemp("pages")
    for page in PAGES:
        path = folder / f"{re.sub(r'[^a-z_]', '_', page.lower())}.py"
        path.write_text("\n".join(blocks(read(page), "python")), encoding="utf-8")
    return sorted(folder.iterdir())


def test_pages_are_found(scripts):
    assert {"README.md", "docs/algorithms.md", "docs/optimum.md"} <= set(PAGES) and len(scripts) == len(PAGES)


@pytest.mark.timeout(600)
def test_mypy_finds_nothing(scripts):
    pytest.importorskip("mypy")
    # A cache of its own: that of `make lint` is made under other options.
    cache = ["--cache-dir", REPO / ".mypy_cache" / "strict"]
    options = ["--strict", "--follow-imports=silent", "--config-file", "", *cache]  # the package has options of its own
    found = check(sys.executable, "-m", "mypy", *options, *scripts, SETTINGS)
    assert re.fullmatch(rf"Success: no issues found in {len(scripts) + 1} source files\n", found)


@pytest.mark.timeout(600)
def test_pyright_finds_nothing(scripts):
    if not (pyright := shutil.which("pyright", path=str(Path(sys.executable).parent)) or shutil.which("pyright")):
        pytest.skip("needs pyright")
    found = check(pyright, "--pythonpath", sys.executable, *scripts, SETTINGS)
    assert found.splitlines()[-1].startswith("0 errors, 0 warnings")
