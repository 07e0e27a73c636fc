"""What ARCHITECTURE.md promises, read from the folders themselves: the order of rooms, no circles, light
imports, nothing of one machine in the tree."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import textlora

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(textlora.__file__).parent
LIMIT = 520  # lines of a module
ENTRIES = 20  # of the package's folder
# a room imports from rooms to its left; what stands at the package's root, from all but `cli`
ROOMS = (
    "core",
    "metrics",
    "adapters",
    "data",
    "report",
    "kernels",
    "model",
    "inference",
    "training",
    "transform",
    "compare",
    "tune",
    "server",
    "cli",
)


@cache
def modules() -> dict[str, Path]:
    """Dotted name of every module -> its file."""
    return {
        ".".join(("textlora", *p.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): p
        for p in PACKAGE.rglob("*.py")
    }


@cache
def imports() -> dict[str, frozenset[str]]:
    """Module -> modules of textlora that it imports anywhere, lazily too."""
    known, found = modules(), {}
    for name, path in known.items():
        mine = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                places = [f"{node.module}.{alias.name}" for alias in node.names]
                mine |= {place if place in known else node.module or "" for place in places}
            elif isinstance(node, ast.Import):
                mine |= {alias.name for alias in node.names}
        found[name] = frozenset(place for place in mine if place in known and place != name)
    return found


def room(module: str) -> str:
    """`data` for textlora.data.read; "" for what stands at the root."""
    name = module.split(".")[1] if "." in module else ""
    return name if name in ROOMS else ""


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """Some names that import each other in a circle; empty where there is none."""
    left = {name: set(others) for name, others in arrows.items()}
    while ends := [name for name, others in left.items() if not others & set(left)]:
        for name in ends:
            del left[name]
    return sorted(left)


def test_every_folder_is_a_room():
    folders = {p.name for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert folders == set(ROOMS)
    assert len([p for p in PACKAGE.iterdir() if p.name != "__pycache__"]) <= ENTRIES


def test_architecture_draws_the_rooms_in_their_order():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `(\w+)/` \|", text, flags=re.MULTILINE)) == ROOMS


def test_paths_in_contributing_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where do I change")[2]
    paths = re.findall(r"`([\w/]+/[\w.]*)`", text)
    assert len(paths) > 20
    assert [path for path in paths if not (PACKAGE / path).exists() and path != "textlora/"] == []


def test_no_import_runs_up():
    order = {name: k for k, name in enumerate(ROOMS)}
    arrows = [
        (name, other) for name, others in imports().items() for other in others if room(name) and room(other)
    ]
    assert [f"{name} -> {other}" for name, other in arrows if order[room(other)] > order[room(name)]] == []
    assert [
        f"{name} -> {other}"
        for name, others in imports().items()
        for other in others
        if room(name) and not room(other)
    ] == []


def test_no_circle_of_modules():
    assert circle({name: set(others) for name, others in imports().items()}) == []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_modules_are_short():
    long = {
        name: n
        for name, path in modules().items()
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > LIMIT
    }
    assert long == {}


def test_packages_hold_no_code():
    """Names of an `__init__.py` are imported or lazy; what does something has a module that says what."""
    heavy = [
        name
        for name, path in modules().items()
        if path.name == "__init__.py"
        and any(
            isinstance(node, ast.FunctionDef | ast.ClassDef | ast.For | ast.While)
            for node in ast.parse(path.read_text(encoding="utf-8")).body
        )
    ]
    assert heavy == []


def test_capabilities_of_a_model_are_not_guessed():
    """`getattr` with a default turns a misspelt name into the slow way without a word; the protocols state
    what a model has."""
    guess = re.compile(r"getattr\((?:self\.)?(?:model|encoder|prepared\.model|self\._?model), *[^,]+,")
    found = [
        name
        for name, path in modules().items()
        if guess.search(path.read_text(encoding="utf-8")) and not name.endswith(".sentence_transformers")
    ]
    assert found == []


@pytest.mark.parametrize("old", ["textlora.config.TrainConfig", "textlora.export.adapter_inputs", "textlora.compare.compare", "textlora.compare.read_comparison",
                                 "textlora.compare.Comparison", "textlora.tune.tune", "textlora.report.comparison.render_many"])  # fmt: skip
def test_documented_names_stay_where_they_were(old):
    module, _, name = old.rpartition(".")
    assert callable(getattr(__import__(module, fromlist=[name]), name))


def test_public_modules_have_docstrings():
    bare = [
        name
        for name, path in modules().items()
        if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None
    ]
    assert bare == []


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, textlora, textlora.cli; print([m for m in ('torch', 'transformers', 'pandas', 'numpy', 'pyarrow') if m in sys.modules])"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_predicting_needs_no_slow_import():
    code = (
        "import sys, textlora.inference.classifier, textlora.inference.predict, textlora.data\n"
        "print([m for m in ('transformers', 'peft', 'pandas', 'sklearn', 'pyarrow', 'datasets', 'scipy', 'torch._dynamo') if m in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


def test_no_path_of_a_machine_in_the_tree():
    pattern = re.compile(r"(?<![\w.$}])/(?:work|root|home|opt)/[\w.]")
    kinds = {".py", ".md", ".toml", ".json", ".txt", ".csv", ".html", ".css", ""}
    skipped = {".git", ".venv", "build", "demo", ".hypothesis", ".pytest_cache", ".ruff_cache", "__pycache__"}
    files = [
        p
        for p in ROOT.rglob("*")
        if p.is_file() and p.suffix in kinds and not skipped & set(p.relative_to(ROOT).parts)
    ]
    found = [
        str(p.relative_to(ROOT))
        for p in files
        if p.name != "test_architecture.py" and pattern.search(p.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert found == []
