"""The faults that `mutants.py` plants, one file of them in a small repository, and what it says of the tests there."""

import ast

import mutants
import pytest

SOURCE = '''"""Text with 1 number."""
from math import floor

LIMIT = 3


def clip(x: int, low: int = 0) -> int:
    """Returns x, at most 3."""
    if x < low and not x == 7:
        raise ValueError(f"below {low + 1}")
    return max(min(x, LIMIT), -low)
'''


def test_faults_are_planted_one_at_a_time_in_code_and_never_in_words():
    found = list(mutants.mutants("minirlhf/rl/toy.py", SOURCE))
    said = [m.what for m in found]
    for expected in (
        "3: 3 to 4", "0: 0 to 1", "x < low: Lt to LtE", "x == 7: Eq to NotEq", "7: 7 to 8", "not x == 7: Not dropped",
        "x < low and (not x == 7): And to Or", "-low: USub dropped", "min(x, LIMIT): min to max",
        "min(x, LIMIT): arguments swapped",
    ):  # fmt: skip
        assert said.count(expected) == 1, expected
    assert any(text.startswith("raise ValueError") and text.endswith("statement dropped") for text in said)
    assert any(text.startswith("if x < low") and text.endswith("condition turned round") for text in said)
    assert len({m.key for m in found}) == len(found) == 14
    plain = ast.unparse(ast.parse(SOURCE))
    for mutant in found:
        changed = [(a, b) for a, b in zip(plain.split("\n"), mutant.source.split("\n"), strict=False) if a != b]
        assert len(changed) == 1 and compile(mutant.source, "toy", "exec")
        assert (
            mutant.source.count("Text with 1 number") == 1 and "below {low + 1}" in mutant.source
        ) or "pass" in mutant.source


def test_keys_stay_if_another_function_changes():
    other = SOURCE.replace("LIMIT = 3", "LIMIT = 3\n\n\ndef more(a):\n    return a + 2")
    keys = {m.key for m in mutants.mutants("minirlhf/rl/toy.py", SOURCE)}
    assert keys < {m.key for m in mutants.mutants("minirlhf/rl/toy.py", other)}


@pytest.fixture
def repo(tmp_path):
    """A package with two functions: the tests are good for one, and for the other they only run it."""
    for folder in ("minirlhf/rl", "tests/rl"):
        (tmp_path / "repo" / folder).mkdir(parents=True)
    (tmp_path / "repo/minirlhf/__init__.py").write_text("")
    (tmp_path / "repo/minirlhf/rl/__init__.py").write_text("")
    (tmp_path / "repo/minirlhf/rl/toy.py").write_text(
        "def less(a, b):\n    return a < b\n\n\ndef twice(a):\n    return a * 2\n"
    )
    (tmp_path / "repo/tests/rl/test_toy.py").write_text(
        "from minirlhf.rl.toy import less, twice\n\n\ndef test():\n"
        "    assert less(1, 2) and not less(2, 2)\n    twice(3)\n"
    )
    (tmp_path / "repo/tests/rl/test_other.py").write_text("def test():\n    pass\n")
    return tmp_path / "repo"


def test_a_sample_depends_on_its_seed_and_on_the_code_of_each_fault(repo):
    first, second = (mutants.chosen(repo, ["rl"], 2, seed) for seed in (0, 1))
    every = mutants.chosen(repo, ["rl"], 99, 0)
    assert len(every) == 3 and [m.key for m in first] == [m.key for m in every[:2]] != [m.key for m in second]
    (repo / "minirlhf/rl/a.py").write_text("x = 1\n")
    assert [m.key for m in mutants.chosen(repo, ["rl"], 99, 0) if "toy" in m.file] == [m.key for m in every]


def test_tests_of_a_module_carry_its_name_import_it_or_compare_with_the_oracle(repo):
    lines = dict(
        by_name="from minirlhf.rl.toy import x", from_wing="from minirlhf.rl import a, toy",
        loops="import numpy\nimport oracle", near="from minirlhf.rl.toys import x",
    )  # fmt: skip
    for name, text in lines.items():
        (repo / f"tests/rl/test_{name}.py").write_text(f"{text}\n")
    every = [f"tests/rl/test_{name}.py" for name in ("toy", "by_name", "from_wing", "loops", "near", "other")]
    assert mutants.tests_of(repo, "minirlhf/rl/toy.py") == (every[:1], every[1:4], every[4:])
    assert mutants.stages(repo, "minirlhf/rl/toy.py", own=True) == [every[:1], every[1:4]]
    assert mutants.stages(repo, "minirlhf/rl/near.py", own=False)[:2] == [[every[4]], [every[3]]]
    (repo / every[3]).unlink()
    (alone,) = mutants.stages(repo, "minirlhf/rl/none.py", own=True)  # there is no choice
    assert len(alone) == 5


def test_survivors_are_named_and_a_run_goes_on(repo, tmp_path, capsys):
    arguments = ["--wings", "rl", "--own", "--output", str(tmp_path / "out")]
    mutants.main([*arguments, "--list"], repo)
    listed = capsys.readouterr().out.splitlines()
    keys = {line.split("  ")[2]: line.split()[0] for line in listed}
    assert len(listed) == len(keys) == 3

    (tmp_path / "same.txt").write_text(f"# with the reason\n{keys['2: 2 to 3']} twice is used nowhere\n")
    mutants.main(arguments, repo, tmp_path / "same.txt")
    out = capsys.readouterr().out.splitlines()
    survivors = [line for line in out if line.startswith("survived")]
    assert len(survivors) == 1 and survivors[0].endswith("a * 2: Mult to Div") and "toy.py:6" in survivors[0]
    counted = len(listed) - 1
    assert f"noticed {counted - 1} of {counted} planted faults" in out[-1] and "1 more change nothing" in out[-1]
    before = (tmp_path / "out/results.jsonl").read_text()
    mutants.main(arguments, repo, tmp_path / "same.txt")  # all of them are known
    assert capsys.readouterr().out.splitlines() == [*survivors, out[-1]]
    assert (tmp_path / "out/results.jsonl").read_text() == before

    (repo / "tests/rl/test_other.py").write_text(
        "import importlib\n\n\ndef test():\n    assert importlib.import_module('minirlhf.rl.toy').twice(3) == 6\n"
    )
    arguments.remove("--own")  # the survivors are tried with the other tests of the wing
    mutants.main(arguments, repo, tmp_path / "same.txt")
    out = capsys.readouterr().out.splitlines()
    assert f"noticed {counted} of {counted} planted faults" in out[-1]
    added = (tmp_path / "out/results.jsonl").read_text().removeprefix(before)
    assert added.count("\n") == 2 and added.count("noticed") == 2
    assert "a < b" in (repo / "minirlhf/rl/toy.py").read_text()


def test_tests_that_fail_without_a_fault_are_told(repo, tmp_path):
    (repo / "tests/rl/test_toy.py").write_text("def test():\n    assert False\n")
    with pytest.raises(SystemExit, match="without a fault the tests of rl do not pass"):
        mutants.main(["--wings", "rl", "--output", str(tmp_path / "out")], repo)


def test_tests_that_hang_are_ended(repo):
    (repo / "tests/rl/test_toy.py").write_text("def test():\n    while True:\n        pass\n")
    assert mutants.run_tests(repo, ["tests/rl/test_toy.py"], 0.5)[0] == "timeout"
