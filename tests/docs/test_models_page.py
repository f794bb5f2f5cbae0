"""docs/models.md: its table is what its command prints, and its families are those that load."""

from pathlib import Path

from minirlhf.models.loading import DECODERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


def test_the_table_is_what_its_command_prints(call):
    assert "python examples/benchmark/memory_of_models.py" in PAGE
    error, printed = call(ROOT / "examples" / "benchmark" / "memory_of_models.py")
    assert error is None and len(printed.splitlines()) > 10 and printed in PAGE


def test_every_family_is_named():
    listed = [line.split("`")[1::2][:2] for line in PAGE.splitlines() if line.startswith("| `") and "`tests/" in line]
    assert {kind: name for kind, name in listed} == {kind: found.__name__ for kind, found in DECODERS.items()}
