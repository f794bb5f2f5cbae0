"""Without the modules that only POSIX has, as on Windows: everything is imported, and an example does one step."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import VOCAB, make_bert, make_gpt2
from minirlhf import Tokenizer
from minirlhf.io.files import read_jsonl

ROOT = Path(__file__).resolve().parents[2]
# None in sys.modules makes an import fail with ImportError. msvcrt does not exist here in the first place.
WITHOUT = """
import sys
for name in ("fcntl", "termios", "tty", "resource", "pwd", "grp"):
    sys.modules[name] = None
import dataclasses, runpy, pkgutil, importlib, minirlhf
for module in pkgutil.walk_packages(minirlhf.__path__, "minirlhf."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
from minirlhf.evaluation import evaluate, results
few = [("samples", int, 16), ("best_of_prompts", int, 4), ("resamples", int, 50)]
few = dataclasses.make_dataclass("Few", few, bases=(evaluate.EvaluationConfig,), frozen=True)
evaluate.EvaluationConfig = results.EvaluationConfig = few
sys.argv = sys.argv[1:]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def models(tmp_path):
    for name, model in (("policy", make_gpt2(n_embd=16, n_layer=1, n_head=2)), ("reward", make_bert())):
        model.save_pretrained(tmp_path / name)
        Tokenizer(VOCAB).save_pretrained(tmp_path / name)
    return tmp_path


def test_an_example_runs_without_the_modules_of_posix(models):
    pytest.importorskip("tqdm"), pytest.importorskip("matplotlib")
    script, run = ROOT / "examples" / "positive_reviews.py", models / "run"
    folders = ["--policy", models / "policy", "--reward", models / "reward", "--output", run]
    sizes = ["--steps", "2", "--batch-size", "2", "--group-size", "2", "--gen-len", "3", "--device", "cpu"]
    command = [sys.executable, "-c", WITHOUT, script, *folders, *sizes]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "neither fcntl nor msvcrt" in done.stderr  # a lock that cannot be taken is said
    assert [line["step"] for line in read_jsonl(run / "metrics.jsonl")] == [1]
    assert not (run / "lock").exists() and (run / "checkpoints" / "step-000001").is_dir()
