"""The layout that ARCHITECTURE.md promises: floors, names, module sizes, light imports, nothing of one machine in the tree."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import textlora

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(textlora.__file__).parent
LIMIT = 400


def floors() -> dict[str, int]:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    return {name: int(floor) for floor, name in re.findall(r"^\| (\d) \| `(\w+)` \|", text, flags=re.MULTILINE)}


def modules() -> dict[Path, str]:
    """Every module file -> the room it belongs to (`data` for data/read.py)."""
    return {p: p.relative_to(PACKAGE).parts[0].removesuffix(".py") for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py"}


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"textlora.{alias.name}" for alias in node.names] if node.module == "textlora" else [node.module or ""]
        found |= {name.split(".")[1] for name in names if name.startswith("textlora.")}
    return found


def test_every_module_is_in_the_architecture_and_nothing_else():
    assert set(modules().values()) == set(floors())


def test_no_import_runs_up():
    known = floors()
    wrong = [f"{path.relative_to(PACKAGE)} -> {room}" for path, own in modules().items() for room in imported_rooms(path) if known[room] > known[own]]
    assert wrong == []


def test_modules_are_short():
    long = {str(path.relative_to(PACKAGE)): n for path in modules() if (n := len(path.read_text(encoding="utf-8").splitlines())) > LIMIT}
    assert long == {}


def test_public_modules_have_docstrings():
    bare = [str(path.relative_to(PACKAGE)) for path in modules() if ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) is None]
    assert bare == []


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, textlora, textlora.cli; print([m for m in ('torch', 'transformers', 'pandas', 'numpy', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_predicting_needs_no_slow_import():
    code = (
        "import sys, textlora.classifier, textlora.predict, textlora.data\n"
        "print([m for m in ('transformers', 'peft', 'pandas', 'sklearn', 'pyarrow', 'datasets', 'scipy', 'torch._dynamo') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_no_path_of_a_machine_in_the_tree():
    pattern = re.compile(r"(?<![\w.$}])/(?:work|root|home|opt)/[\w.]")
    kinds = {".py", ".md", ".toml", ".json", ".txt", ".csv", ".html", ".css", ""}
    skipped = {".git", ".venv", "build", "demo", ".hypothesis", ".pytest_cache", ".ruff_cache", "__pycache__"}
    files = [p for p in ROOT.rglob("*") if p.is_file() and p.suffix in kinds and not skipped & set(p.relative_to(ROOT).parts)]
    found = [str(p.relative_to(ROOT)) for p in files if p.name != "test_house.py" and pattern.search(p.read_text(encoding="utf-8", errors="ignore"))]
    assert found == []
