"""Do the tests notice a fault? Plants small ones in a copy of the package, one at a time, and runs the tests.

    python tests/robustness/mutants.py [--wings rl --sample 40]     # default 300 faults, hours; `make mutants`
    python tests/robustness/mutants.py --sample 120 --seed 1        # others, at random
    python tests/robustness/mutants.py --list                       # what would be planted

A fault is one change of the syntax tree: another comparison, a number off by one, a sign, min for max, swapped
arguments, a dropped statement and the like. Whether it is in a sample depends on its own code and the seed. First the
tests of its module run (see `tests_of`), then those of its wing, until one fails; a timeout counts as noticed. With
`--own` only the first: minutes in the place of hours, and what survives may be noticed by others.

Results go to OUTPUT/results.jsonl, and a run that was stopped continues there. `equivalent_mutants.txt` beside this
file names faults that change nothing that matters, with the reason; they do not count.
"""

import argparse
import ast
import contextlib
import copy
import functools
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
WINGS = ("rl", "generation", "models", "runs", "io", "rewards")
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
OPPOSITES = ((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.Is, ast.IsNot), (ast.In, ast.NotIn))
COMPARISONS = {a: b for pair in OPPOSITES for a, b in (pair, pair[::-1])}
OPERATIONS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult}
PAIRS = (("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"), ("any", "all"),
         ("clamp_min", "clamp_max"), ("zeros", "ones"), ("zeros_like", "ones_like"), ("sum", "mean"))  # fmt: skip
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}


@dataclass(frozen=True)
class Mutant:
    """A planted fault. key: stable while its function's other code changes. make: gives the source of the file."""

    key: str
    file: str
    line: int
    what: str
    make: Callable[[], str]

    @property
    def source(self) -> str:
        """The whole file with the fault in it."""
        return self.make()


def mutants(file: str, text: str) -> Iterator[Mutant]:
    """All faults that can be planted in a file."""
    tree = ast.parse(text)
    seen: dict[str, int] = {}
    for node, scope in _code(tree, ""):
        for what, change in _changes(node):
            code = ast.unparse(node)
            where = f"{file}::{scope}: {code[:200]}: {what}"
            seen[where] = seen.get(where, 0) + 1
            key, shown = _hash(f"{where} {seen[where]}"), code.split("\n")[0][:70]
            make = functools.partial(_planted, tree, node, change)
            yield Mutant(key, file, node.lineno, f"{shown}: {what}", make)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _code(node: ast.AST, scope: str) -> Iterator[tuple[ast.AST, str]]:
    """Nodes in which a fault can matter, with their function's name; annotations and messages are left out."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "exc", "cause", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, (ast.Import, ast.ImportFrom, ast.JoinedStr)):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Call) and ast.unparse(child.func) in ("warnings.warn", "print"):
                continue
            named = isinstance(child, (ast.FunctionDef, ast.ClassDef))
            inside = f"{scope}.{child.name}".lstrip(".") if named else scope
            if hasattr(child, "lineno"):
                yield child, inside
            yield from _code(child, inside)


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """What can be made of a node: a name for each change, and the change, which may return another node."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            if other := COMPARISONS.get(type(operator)):
                what = f"{type(operator).__name__} to {other.__name__}"
                yield what, lambda n, i=i, o=other: n.ops.__setitem__(i, o())
    if isinstance(node, (ast.BinOp, ast.AugAssign)) and (other := OPERATIONS.get(type(node.op))):
        yield f"{type(node.op).__name__} to {other.__name__}", lambda n, o=other: setattr(n, "op", o())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.USub, ast.Not, ast.Invert)):
        yield f"{type(node.op).__name__} dropped", lambda n: n.operand
    if isinstance(node, ast.BoolOp):
        other = ast.Or if isinstance(node.op, ast.And) else ast.And
        yield f"{type(node.op).__name__} to {other.__name__}", lambda n, o=other: setattr(n, "op", o())
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = node.value
        other = not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else value * 2 or 1.0
        yield f"{value!r} to {other!r}", lambda n, o=other: setattr(n, "value", o)
    if isinstance(node, ast.Call):
        function = node.func
        field = "id" if isinstance(function, ast.Name) else "attr" if isinstance(function, ast.Attribute) else ""
        if other := NAMES.get(getattr(function, field, "")):
            yield f"{getattr(function, field)} to {other}", lambda n, f=field, o=other: setattr(n.func, f, o)
        if len(node.args) >= 2 and not any(isinstance(x, ast.Starred) for x in node.args[:2]):
            yield "arguments swapped", lambda n: n.args.__setitem__(slice(0, 2), n.args[1::-1])
    if isinstance(node, (ast.If, ast.IfExp, ast.While)):
        yield "condition turned round", lambda n: setattr(n, "test", ast.UnaryOp(ast.Not(), n.test))
    dropped = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    if dropped or isinstance(node, (ast.AugAssign, ast.Raise, ast.Continue, ast.Break)):
        yield "statement dropped", lambda n: ast.copy_location(ast.Pass(), n)
    if isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript)):
        yield "statement dropped", lambda n: ast.copy_location(ast.Pass(), n)


def _planted(tree: ast.Module, node: ast.AST, change) -> str:
    """The source of a copy of the tree in which a copy of the node is changed."""
    position = next(i for i, found in enumerate(ast.walk(tree)) if found is node)
    tree = copy.deepcopy(tree)
    node = next(found for i, found in enumerate(ast.walk(tree)) if i == position)
    other = change(node)
    if other is not None:
        for parent in ast.walk(tree):
            for field, value in ast.iter_fields(parent):
                if value is node:
                    setattr(parent, field, other)
                elif isinstance(value, list):
                    value[:] = [other if child is node else child for child in value]
    return ast.unparse(ast.fix_missing_locations(tree)) + "\n"


# ---- running --------------------------------------------------------------------------------------------------------


def chosen(repo: Path, wings: list[str], count: int, seed: int = 0) -> list[Mutant]:
    """A sample of `count` faults of these wings, in the order of the hashes of seed and key."""
    found = [mutant for wing in wings for path in sorted((repo / "minirlhf" / wing).rglob("*.py"))
             for mutant in mutants(str(path.relative_to(repo)), path.read_text(encoding="utf-8"))]  # fmt: skip
    return sorted(found, key=lambda mutant: _hash(f"{seed} {mutant.key}"))[:count]


def workspace(repo: Path, folder: Path) -> Path:
    """A copy of the package, with links to everything else that tests read."""
    shutil.copytree(repo / "minirlhf", folder / "minirlhf", ignore=shutil.ignore_patterns("__pycache__"))
    for path in repo.iterdir():
        if path.name not in ("minirlhf", "runs", ".git", ".venv"):
            (folder / path.name).symlink_to(path)
    return folder


def tests_of(repo: Path, file: str) -> tuple[list[str], list[str], list[str]]:
    """Test files of a module's wing: those that carry its name, then those that import it or the oracle; the others."""
    wing, module = Path(file).parts[1], Path(file).stem
    imported = re.compile(rf"minirlhf\.{wing}\.{module} |minirlhf\.{wing} import .*\b{module}\b|^import oracle$", re.M)
    found: tuple[list[str], list[str], list[str]] = ([], [], [])
    for path in sorted((repo / "tests" / wing).rglob("test_*.py")):
        place = 0 if module in path.stem else 1 if imported.search(path.read_text(encoding="utf-8")) else 2
        found[place].append(str(path.relative_to(repo)))
    return found


def stages(repo: Path, file: str, own: bool) -> list[list[str]]:
    """The files of `tests_of` one after the other; own: without the others, if there is a choice."""
    first, second, others = tests_of(repo, file)
    return list(filter(None, (first, second, [] if own and first + second else others)))


def run_tests(folder: Path, tests: list[str], timeout: float) -> tuple[str, float]:
    """ "survived", "noticed" or "timeout", and the seconds that it took.

    The process of the tests is forked from one that has imported the large packages, and nothing of ours.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "torch", "transformers"])
    process = context.Process(target=_tests_in_a_fork, args=(str(folder), tests))
    start = time.perf_counter()
    process.start()
    process.join(timeout)
    if process.exitcode is None:
        outcome = "timeout"
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that its tests started
        process.kill()
        process.join()
    else:
        outcome = "survived" if process.exitcode == 0 else "noticed"
    return outcome, time.perf_counter() - start


def _tests_in_a_fork(folder: str, tests: list[str]) -> None:
    import pytest

    os.setsid()
    os.chdir(folder)
    for name in [name for name in sys.modules if name.split(".")[0] == "minirlhf"]:
        del sys.modules[name]  # of a server that other tests have started
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    os.environ |= dict(PYTHONPATH=folder, PYTHONDONTWRITEBYTECODE="1")
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "-o", "addopts=", "--assert=plain"]
    sys.exit(pytest.main([*options, *tests]))


def plant(mutant: Mutant, folder: Path, repo: Path, timeout: float, own: bool) -> dict[str, object]:
    """Run the tests with the fault in its place, and put the file back. own: only those of its module."""
    path, spent = folder / mutant.file, 0.0
    before = path.read_bytes()
    try:
        path.write_text(mutant.source, encoding="utf-8")
        for tests in stages(repo, mutant.file, own):
            outcome, seconds = run_tests(folder, tests, timeout)
            spent += seconds
            if outcome != "survived":
                break
    finally:
        path.write_bytes(before)
    return dict(key=mutant.key, file=mutant.file, line=mutant.line, what=mutant.what, outcome=outcome,
                seconds=round(spent, 1), own=own)  # fmt: skip


def report(results: list[dict[str, object]], equivalent: set[str]) -> str:
    """Survivors, and the share of the faults that matter which the tests noticed."""
    counted = [r for r in results if r["key"] not in equivalent]
    survivors = [r for r in counted if r["outcome"] == "survived"]
    lines = [f"survived {r['key']}  {r['file']}:{r['line']}  {r['what']}" for r in survivors]
    noticed, slow = len(counted) - len(survivors), sum(r["outcome"] == "timeout" for r in counted)
    lines += [f"noticed {noticed} of {len(counted)} planted faults, {noticed / max(1, len(counted)):.1%} ({slow} by a "
              f"timeout; {len(results) - len(counted)} more change nothing that matters)"]  # fmt: skip
    return "\n".join(lines)


def main(arguments: list[str] | None = None, repo: Path = REPO, equivalent: Path = EQUIVALENT) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wings", nargs="+", choices=WINGS, default=list(WINGS))
    parser.add_argument("--sample", type=int, default=300, help="faults to plant (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--own", action="store_true", help="run no other tests than those of the fault's module")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds for the tests of a wing (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("runs/mutants"), help="folder of the results (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the faults, and plant none")
    args = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # of all tests
    wanted = chosen(repo, args.wings, args.sample, args.seed)
    if args.list:
        print("\n".join(f"{m.key}  {m.file}:{m.line}  {m.what}" for m in wanted))
        return
    args.output.mkdir(parents=True, exist_ok=True)
    log = args.output / "results.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    results = {result["key"]: result for result in map(json.loads, lines)}
    known = {key for key, r in results.items() if args.own or not r.get("own") or r["outcome"] != "survived"}
    todo = [mutant for mutant in wanted if mutant.key not in known]
    with tempfile.TemporaryDirectory() as temporary, log.open("a", encoding="utf-8") as file:
        folder = workspace(repo, Path(temporary))
        for wing in args.wings if todo else ():
            files = {m.file for m in todo if m.file.startswith(f"minirlhf/{wing}/")}
            tests = sorted({test for file in files for part in stages(repo, file, args.own) for test in part})
            outcome, seconds = run_tests(folder, tests, args.timeout) if tests else ("survived", 0.0)
            if outcome != "survived":
                sys.exit(f"error: without a fault the tests of {wing} do not pass within {args.timeout:.0f} s")
            print(f"{wing}: the tests take {seconds:.0f} s", flush=True)
        for mutant in todo:
            result = results[mutant.key] = plant(mutant, folder, repo, args.timeout, args.own)
            file.write(json.dumps(result) + "\n")
            file.flush()
            told = f"{result['outcome']} in {result['seconds']} s: {mutant.file}:{mutant.line} {mutant.what}"
            print(f"{sum(m.key in results for m in wanted)} of {len(wanted)} {told}", flush=True)
    names = equivalent.read_text(encoding="utf-8").splitlines() if equivalent.exists() else []
    found = [results[mutant.key] for mutant in wanted]
    print(report(found, {line.split()[0] for line in names if line.strip() and not line.startswith("#")}))


if __name__ == "__main__":
    main()
