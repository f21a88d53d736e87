"""The rules between the rooms (ARCHITECTURE.md), read from the sources and tried in fresh processes."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import processor_seconds

ROOT = Path(__file__).resolve().parent.parent
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "pandas", "bitsandbytes", "accelerate", "unsloth",
         "pyarrow", "gguf", "cyllama", "wandb"}  # fmt: skip
PACKAGES = ("kto_core", "kto_studio")
SOURCES = sorted(p for folder in PACKAGES for p in (ROOT / folder).rglob("*.py")) + [ROOT / "app.py"]
MOST_FILES, MOST_LINES = 12, 350


def module(path: Path) -> str:
    """kto_core/engine/packing/groups.py -> kto_core.engine.packing.groups"""
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
    assert {
        "kto_core.errors",
        "kto_core.config.resolving",
        "kto_core.hardware.gpus",
        "kto_studio.launch",
        "app",
    } <= names


@pytest.mark.parametrize("path", [p for p in SOURCES if "kto_core" in p.parts], ids=module)
def test_the_library_never_imports_the_interface(path):
    wrong = [(name, line) for name, _, line in imports(path) if name.split(".")[0] in ("gradio", "kto_studio", "app")]
    assert not wrong


@pytest.mark.parametrize("path", [p for p in SOURCES if "kto_core" not in p.parts], ids=module)
def test_the_interface_never_imports_torch(path):
    wrong = [(name, line) for name, _, line in imports(path) if name.split(".")[0] in HEAVY - {"pandas"}]
    assert not wrong


def order() -> dict[str, int]:
    """Package, or file that is beside the packages -> its place in the order that ARCHITECTURE.md states."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    stated = re.search(r"```\s*\n\s*(errors ◀.*?)```", text, re.DOTALL)[1]
    return {name: i for i, name in enumerate(re.split(r"\s*◀\s*", stated.strip()))}


def room(name: str, path: Path) -> str:
    """Where a module stands in the order: its folder, or itself where it lies beside the packages' folders."""
    folder = ".".join(path.relative_to(ROOT).parent.parts)
    if name in ("kto_core", "kto_studio"):
        return name  # the doors: they import what needs no others
    if name == "kto_core.worker":
        return "training"  # the door of a process of its own
    here = name if folder in ("", *PACKAGES) else folder
    return here.removeprefix("kto_core.")


def test_the_order_names_every_package_once():
    rooms = {room(module(p), p) for p in SOURCES} - set(PACKAGES)
    assert rooms == order().keys()


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_imports_run_one_way(path):
    """A file imports files of its own package and of those before it, inside functions and for type checkers too."""
    place, files = order(), {module(p): p for p in SOURCES}
    own = room(module(path), path)
    if own in PACKAGES:
        return
    wrong = [
        f"line {line}: {own} imports {name}"
        for name, line in needs(module(path), files).items()
        if name not in PACKAGES and place[room(name, files[name])] > place[own]
    ]
    assert not wrong


def test_a_package_is_small_and_so_is_a_file():
    folders = {p.parent for p in SOURCES}
    many = {
        str(f): n for f in folders if (n := len([p for p in f.glob("*.py") if p.name != "__init__.py"])) > MOST_FILES
    }
    long = {module(p): n for p in SOURCES if (n := len(p.read_text(encoding="utf-8").splitlines())) > MOST_LINES}
    assert not many and not long


# ---- circles --------------------------------------------------------------------------------------------------------


def modules(root: Path, *packages: str) -> dict[str, Path]:
    """Name -> file of every module in these packages of ``root``."""
    found = sorted(p for package in packages for p in (root / package).rglob("*.py"))
    return {".".join(p.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): p for p in found}


def needs(name: str, files: dict[str, Path]) -> dict[str, int]:
    """Other module -> line, of every one that a file names: imported anywhere, inside functions and for type checkers
    only too, or as a text that is a module's whole name, to be run or imported by it.

    ``from package import x`` needs x where that is a module of the package, else the package itself.
    """
    path = files[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: dict[str, int] = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        named = []
        if isinstance(node, ast.Import):
            named = [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            named = [f"{source}.{a.name}" if f"{source}.{a.name}" in files else source for a in node.names]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            named = [node.value]
        for other in named:
            if other in files and other != name:
                found.setdefault(other, node.lineno)
    return found


def circles(files: dict[str, Path]) -> list[str]:
    """Every group of modules that need each other, with what ties them; [] if there is none."""
    graph = {name: needs(name, files) for name in files}

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            new = graph[todo.pop()].keys() - seen
            seen |= new
            todo += new
        return seen

    reach = {name: reached(name) for name in graph}
    groups = {frozenset(b for b in reach[a] if a in reach[b]) for a in graph if a in reach[a]}
    return [
        "; ".join(f"{a}:{line} needs {b}" for a in sorted(group) for b, line in sorted(graph[a].items()) if b in group)
        for group in sorted(groups, key=sorted)
    ]


def test_no_files_need_each_other():
    files = modules(ROOT, *PACKAGES)
    assert files.keys() >= {
        "kto_core",
        "kto_core.__main__",
        "kto_core.cli.train",
        "kto_core.engine.step",
        "kto_studio.launch",
    }
    assert len(files) == sum(len(list((ROOT / p).rglob("*.py"))) for p in PACKAGES)
    assert not circles(files)


@pytest.mark.parametrize(
    "back",
    [
        "from . import a",
        "from .a import x",
        "import p.a",
        "def f():\n    from p import a",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .a import x",
        "class C:\n    def f(self):\n        import p.a as other",
        "command = ['python', '-m', 'p.a']",
        "from .sub.c import y",
    ],
)
def test_a_circle_is_found_however_a_file_is_named(tmp_path, back):
    (tmp_path / "p" / "sub").mkdir(parents=True)
    files = {"__init__": "", "a": "from .b import y\nx = 1", "b": "", "sub/__init__": "", "sub/c": "from ..a import x"}
    for name, text in files.items():
        (tmp_path / "p" / f"{name}.py").write_text(text)
    assert not circles(modules(tmp_path, "p"))
    (tmp_path / "p" / "b.py").write_text(back)
    (found,) = circles(modules(tmp_path, "p"))
    assert "p.a:1 needs p.b" in found and "p.b:" in found


# ---- private names ---------------------------------------------------------------------------------------------------


def private_names(path: Path, files: dict[str, Path]) -> list[str]:
    """Every name with a leading underscore that a file takes from another one of ours."""
    package = module(path).split(".") if path.name == "__init__.py" else module(path).split(".")[:-1]
    ours, taken = set(), []
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            if source in files:
                ours |= {a.asname or a.name for a in node.names if f"{source}.{a.name}" in files}
                taken += [f"line {node.lineno}: {a.name} of {source}" for a in node.names if a.name.startswith("_")]
    for node in ast.walk(tree):
        of_ours = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours
        if of_ours and node.attr.startswith("_") and not node.attr.startswith("__"):
            taken.append(f"line {node.lineno}: {node.value.id}.{node.attr}")
    return taken


@pytest.mark.parametrize("path", SOURCES, ids=module)
def test_a_private_name_stays_in_its_file(path):
    assert not private_names(path, {module(p): p for p in SOURCES})


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
    """Under half a second of the processor; the best of three, as the machine may be busy."""
    times = [processor_seconds(sys.executable, "-m", "kto_core", "--help")[1] for _ in range(3)]
    assert min(times) < 0.5, times
