"""The shape of the package, read from its source: one-way imports, few dependencies, no global seeds, docstrings."""

import ast
import inspect
import sys
import types
from pathlib import Path

import minirlhf
from conftest import VOCAB, make_gpt2
from minirlhf import PPOTrainer, Tokenizer
from minirlhf.generation import token_statistics
from minirlhf.generation.sampling import restrict

ROOT = Path(minirlhf.__file__).parent
DEPENDENCIES = {"torch", "numpy", "tokenizers", "safetensors"}

# A wing imports only wings that stand before it. Inside a wing imports run one way as well: there are no circles.
WINGS = ("common", "device", "io", "text", "generation", "models", "rewards", "supervised", "rl", "runs", "evaluation",
         "commands")  # fmt: skip
TOP = {"__init__", "__main__", "version"}  # and py.typed: all that stands beside the wings


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


SOURCES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}


def runtime_nodes(tree: ast.AST, inside_functions: bool = True):
    """All nodes but those of `if TYPE_CHECKING:` bodies, and of function bodies unless asked for."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        if not inside_functions and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        yield node
        yield from runtime_nodes(node, inside_functions)


def imported(tree: ast.AST, inside_functions: bool = True) -> set[str]:
    """Full names of all modules that a source imports when it runs; `from a import b` gives a.b if that is a module."""
    names = set()
    for node in runtime_nodes(tree, inside_functions):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where a name comes from"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                names.add(full if full.removeprefix("minirlhf.") in SOURCES else node.module)
    return names


def our_imports(name: str) -> set[str]:
    found = {i.removeprefix("minirlhf.") for i in imported(TREES[name]) if i.split(".")[0] == "minirlhf"}
    return {"__init__" if i == "minirlhf" else i for i in found}


def wing(name: str) -> str:
    return name.split(".")[0]


def test_the_package_is_wings_and_nothing_else():
    assert {wing(name) for name in SOURCES} == {*WINGS, *TOP}
    assert {path.name for path in ROOT.iterdir() if path.is_file()} == {*(f"{name}.py" for name in TOP), "py.typed"}


def test_wings_import_only_wings_below_them():
    for name in SOURCES.keys() - TOP:
        for target in our_imports(name) - {"version"}:
            allowed = target not in TOP and WINGS.index(wing(target)) <= WINGS.index(wing(name))
            assert allowed, f"{name} must not import {target}"


def test_the_reference_implementation_is_short():
    """rl is read in an evening; presets are a table."""
    lines = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "rl").glob("*.py")}
    assert max(lines.values()) <= 330
    assert sum(n for name, n in lines.items() if name != "presets.py") <= 1500
    order = ast.get_docstring(TREES["rl"])
    assert all(name.removesuffix(".py") in order for name in lines if name != "__init__.py")


def test_only_models_know_how_a_decoder_is_built():
    for name in [name for name in SOURCES if wing(name) != "models"]:
        attributes = {node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)}
        assert not attributes & {"wte", "wpe", "h", "ln_f"}, name


def test_from_a_step_to_a_log_probability_there_are_at_most_seven_frames(monkeypatch):
    """Counted in a step of the trainer, `step` included, up to the line that takes the logarithm."""
    depths = []

    def seen(*args):
        frame, names = sys._getframe(1), []
        while frame is not None and "step" not in names:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        depths.append(len(names))
        return restrict(*args)

    monkeypatch.setattr(token_statistics, "restrict", seen)
    trainer = PPOTrainer(make_gpt2(), make_gpt2(), Tokenizer(VOCAB), gen_len=3, batch_size=2, ppo_epochs=1)
    rollout = trainer.collect(["酒店", "位置"], lambda texts: [0.0, 1.0])
    depths.clear()
    trainer.step(rollout)
    assert depths and max(depths) <= 7


def test_no_module_imports_itself_over_others():
    edges, done = {name: our_imports(name) for name in SOURCES}, set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"cycle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            for target in sorted(edges[name]):
                visit(target, (*path, name))
            done.add(name)

    for name in SOURCES:
        visit(name, ())


def test_modules_need_only_the_declared_dependencies():
    """Whatever else a function uses (plots, progress bars) it imports itself, when it is called; never transformers."""
    for name, tree in TREES.items():
        packages = {i.split(".")[0] for i in imported(tree, inside_functions=False)}
        foreign = packages - set(sys.stdlib_module_names) - {"minirlhf"}
        assert foreign <= DEPENDENCIES, f"{name} imports {foreign - DEPENDENCIES} at module level"
        assert not {"transformers", "trl", "accelerate"} & {i.split(".")[0] for i in imported(tree)}, name


def dotted(node: ast.AST) -> str:
    """`a.b.c` of nested attributes on a plain name, "" for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    base = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{base}.{node.attr}" if base else ""


GLOBAL_SEEDS = {"torch.manual_seed", "torch.seed", "torch.random.manual_seed", "torch.random.seed", "random.seed",
                "torch.cuda.manual_seed", "torch.cuda.manual_seed_all", "np.random.seed",
                "numpy.random.seed"}  # fmt: skip


def global_seeds(tree: ast.AST) -> set[str]:
    found = {dotted(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} & GLOBAL_SEEDS
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & GLOBAL_SEEDS
    return found


def test_no_module_seeds_a_global_generator():
    assert not {name: found for name, tree in TREES.items() if (found := global_seeds(tree))}


def test_the_checks_see_what_they_look_for():
    bad = "import torch\nfrom random import seed\ndef f():\n    import matplotlib\n    torch.manual_seed(0)\n"
    assert global_seeds(ast.parse(bad)) == {"torch.manual_seed", "random.seed"}
    assert not global_seeds(ast.parse("torch.Generator().manual_seed(0); generator.manual_seed(0)"))
    assert imported(ast.parse(bad)) == {"torch", "random", "matplotlib"}
    assert imported(ast.parse(bad), inside_functions=False) == {"torch", "random"}
    assert imported(ast.parse("if TYPE_CHECKING:\n    import a\nif x:\n    import b")) == {"b"}
    assert imported(ast.parse("from minirlhf import rl, GPT2\nfrom minirlhf.models import gpt2")) == {
        "minirlhf.rl", "minirlhf", "minirlhf.models.gpt2",
    }  # fmt: skip
    assert len(SOURCES) >= 15 and our_imports("generation.generate") >= {"generation.sampling", "text.batching"}


def test_public_names_exist_and_have_a_docstring():
    for name in minirlhf.__all__:
        public = getattr(minirlhf, name)
        doc = inspect.getdoc(public)
        assert doc and not doc.startswith(f"{name}("), f"{name}: a dataclass without a docstring gets its signature"
        if isinstance(public, type):
            assert "__doc__" in vars(public) and doc != inspect.getdoc(public.__mro__[1]), name
            for attribute, value in vars(public).items():
                function = getattr(value, "__func__", value)  # of class methods
                hidden = attribute.startswith("_") or attribute == "forward"
                assert hidden or not isinstance(function, types.FunctionType) or function.__doc__, (name, attribute)


def test_public_names_are_listed_once_and_complete():
    assert sorted(set(minirlhf.__all__)) == sorted(minirlhf.__all__)
    gathered = {name for name, value in vars(minirlhf).items() if not name.startswith("_")
                and not isinstance(value, types.ModuleType)}  # fmt: skip
    assert gathered <= set(minirlhf.__all__)


def test_every_module_says_what_it_is_for():
    assert all(map(ast.get_docstring, TREES.values()))
