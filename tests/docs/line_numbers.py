"""Renews the line numbers of the links to functions in docs/details.md: `make lines`."""

import ast
import re
from pathlib import Path
from typing import Any

DETAILS = Path(__file__).resolve().parents[2] / "docs" / "details.md"
LINK = r"\[`([\w.]+)`\]\((\.\./minirlhf/[\w/]+\.py)(?:#L(\d+))?\)"


def line_of(source: str, name: str) -> int | None:
    """The line on which a function, class or constant is defined. name: of a method, `Class.method`."""
    found: Any = ast.parse(source)
    for part in name.split("."):
        found = next((node for node in ast.walk(found) if _defines(node, part)), None)
        if found is None:
            return None
    return found.lineno


def _defines(node: ast.AST, name: str) -> bool:
    targets = getattr(node, "targets", [getattr(node, "target", None)])
    return getattr(node, "name", None) == name or any(isinstance(x, ast.Name) and x.id == name for x in targets)


def renewed(text: str) -> str:
    """The page with the present line in each link."""

    def link(match: re.Match) -> str:
        name, path, _ = match.groups()
        return f"[`{name}`]({path}#L{line_of((DETAILS.parent / path).read_text(encoding='utf-8'), name)})"

    return re.sub(LINK, link, text)


if __name__ == "__main__":
    DETAILS.write_text(renewed(DETAILS.read_text(encoding="utf-8")), encoding="utf-8")
