"""The rules between the rooms (ARCHITECTURE.md), read from the sources and tried in fresh processes."""

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "pandas", "bitsandbytes", "accelerate", "unsloth",
         "pyarrow", "gguf", "cyllama", "wandb"}  # fmt: skip
CORE_ORDER = [
    {"errors", "events", "paths", "jobs"},
    {"rows", "template", "config", "hardware"},
    {"dataset", "model"},
    {"engine"},
    {"train"},
    {"run"},
    {"chat", "evaluate", "export"},
    {"demo"},
]
RANK = {name: i for i, names in enumerate(CORE_ORDER) for name in names}
SOURCES = sorted(p for folder in ("kto_core", "ui") for p in (ROOT / folder).rglob("*.py")) + [ROOT / "app.py"]


def module(path: Path) -> str:
    """kto_core/engine/plan.py -> kto_core.engine.plan"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> list[tuple[str, bool, int]]:
    """(absolute module, at the top level, line) of every import; ``from x import y`` gives x and x.y.

    What runs at import time counts as top level: class bodies, ``if`` and ``try`` too, functions and TYPE_CHECKING not.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = module(path).split(".") if path.name == "__init__.py" else module(path).split(".")[:-1]
    found = []

    def visit(node, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend((a.name, top, node.lineno) for a in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found.append((name, top, node.lineno))
            found.extend((f"{name}.{a.name}", top, node.lineno) for a in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for child in node.orelse:
                visit(child, top)
        else:
            inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                visit(child, inner)

    visit(tree, True)
    return found


def test_the_sources_are_there():
    names = {module(p) for p in SOURCES}
    assert {"kto_core.errors", "kto_core.config", "kto_core.hardware", "ui.launch", "app"} <= names


@pytest.mark.parametrize("path", [p for p in SOURCES if "kto_core" in p.parts], ids=module)
def test_the_library_never_imports_the_interface(path):
    wrong = [(name, line) for name, _, line in imports(path) if name.split(".")[0] in ("gradio", "ui", "app")]
    assert not wrong


@pytest.mark.parametrize("path", [p for p in SOURCES if "kto_core" not in p.parts], ids=module)
def test_the_interface_never_imports_torch(path):
    wrong = [(name, line) for name, _, line in imports(path) if name.split(".")[0] in HEAVY - {"pandas"}]
    assert not wrong


def room(name: str) -> str | None:
    """The room of a kto_core module that has a place in the order; helpers beside the rooms have none."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "kto_core" and parts[1] in RANK else None


@pytest.mark.parametrize("path", [p for p in SOURCES if room(module(p))], ids=module)
def test_imports_run_one_way(path):
    """A room imports rooms of its own row or before, inside functions too; so do the helpers it imports at its top."""
    own = room(module(path))
    direct = [(room(name), line) for name, _, line in imports(path) if room(name)]
    wrong = [f"line {line}: {own} imports {name}" for name, line in direct if RANK[name] > RANK[own]]
    for name, reached in reach(path).items():
        if RANK[name] > RANK[own]:
            wrong.append(f"{own} imports {name} ({reached})")
    assert not wrong


def reach(path: Path) -> dict[str, str]:
    """room -> by which way, for all rooms a file imports at its top, directly or through files without a place."""
    files = {module(p): p for p in SOURCES}
    found: dict[str, str] = {}
    todo, seen = [(path, path.name)], set()
    while todo:
        here, way = todo.pop()
        for name, top, line in imports(here):
            if not top:
                continue
            if name_room := room(name):
                found.setdefault(name_room, f"{way}:{line}")
            elif name in files and name not in seen:
                seen.add(name)
                todo.append((files[name], f"{way}:{line} → {files[name].name}"))
    return found


def test_the_order_is_the_one_written_down():
    text = " ".join((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split())
    stated = text.partition("Imports run one way:")[2].partition(". `ui` never")[0]
    rows = [{n.strip(" `") for n in row.split(",")} for row in stated.split("◀")]
    n = len(CORE_ORDER)
    assert rows[:n] == CORE_ORDER and rows[n:] == [{"ui", "__main__"}, {"app.py"}]


# ---- tried ----------------------------------------------------------------------------------------------------------


def imported(*command: str) -> tuple[set[str], subprocess.CompletedProcess]:
    """Top-level packages a fresh interpreter imports while it runs the command."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], capture_output=True, text=True, cwd=ROOT,
                          check=False)  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}, done


LIGHT = [p for p in SOURCES if "kto_core" in p.parts and p.name != "__main__.py"]


def test_importing_any_room_imports_nothing_heavy():
    """All modules of the library that do not define classes of heavy bases, in one fresh process."""
    names = [module(p) for p in LIGHT if not derives_from_heavy(p)]
    assert len(names) > len(LIGHT) / 2
    packages, done = imported("-c", "import " + ", ".join(names))
    assert done.returncode == 0, done.stderr[-2000:]
    assert not packages & (HEAVY | {"gradio"})


def derives_from_heavy(path: Path) -> bool:
    """Files with a heavy import at their top, because their classes derive from heavy ones (engine, trainer)."""
    return any(top and name.split(".")[0] in HEAVY for name, top, _ in imports(path))


def test_heavy_files_are_imported_inside_functions_only():
    heavy = {module(p) for p in LIGHT if derives_from_heavy(p)}
    wrong = []
    for path in SOURCES:
        if module(path) in heavy:
            continue
        wrong += [f"{module(path)}:{line} imports {name}" for name, top, line in imports(path) if top and name in heavy]
    assert not wrong


def test_import_app_is_light():
    packages, done = imported("-c", "import app")
    assert done.returncode == 0, done.stderr[-2000:]
    assert not packages & (HEAVY | {"gradio"})


@pytest.mark.parametrize(
    "command", [("app.py", "--help"), ("-m", "kto_core", "--help"), ("-m", "kto_core", "train", "--help")]
)
def test_help_is_light(command):
    packages, done = imported(*command)
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr[-2000:]
    assert not packages & (HEAVY | {"gradio"})


def test_help_is_quick():
    """Under half a second; the best of three, as the machine may be busy."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "kto_core", "--help"], cwd=ROOT, capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    assert min(times) < 0.5, times
