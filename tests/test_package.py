"""One package: it builds, installs and answers outside the checkout, with presets and examples inside."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent


def asked(name: str) -> dict[str, Requirement]:
    """Package -> line of a requirements file."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    found = [Requirement(line) for line in lines if line]
    return {canonicalize_name(r.name): r for r in found}


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the built wheel in it, and nothing else of ours."""
    work = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(work), str(ROOT)]
    subprocess.run([*pip, *build], check=True, cwd=work)
    (wheel,) = work.glob("kto_studio-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", str(work / "site"), str(wheel)], check=True, cwd=work)
    return work / "site"


def run(site: Path, where: Path, *command: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "PYTHONPATH": str(site), "KTO_STUDIO_RUNS": str(where / "runs")}
    return subprocess.run([str(site / "bin" / command[0]), *command[1:]], cwd=where, env=env, text=True,
                          capture_output=True, check=False)  # fmt: skip


def test_the_commands_answer_outside_the_checkout(installed, tmp_path):
    for command in ("kto", "kto-studio"):
        done = run(installed, tmp_path, command, "--help")
        assert done.returncode == 0 and f"usage: {command} " in done.stdout, done.stderr
    example = installed / "kto_core" / "examples" / "short_answers.jsonl"
    done = run(installed, tmp_path, "kto", "data", "check", str(example), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["kept"] == len(example.read_text().splitlines())
    done = run(installed, tmp_path, "kto", "train", "--preset", "7b", "--data", str(example), "--dry-run", "--json")
    assert "7b" in done.stdout.lower(), "the presets travel inside"


def test_the_app_is_served_outside_the_checkout(installed, tmp_path):
    code = "from kto_studio import launch; b = launch.build(); print(len(b.blocks), launch.__file__)"
    env = {**os.environ, "PYTHONPATH": str(installed), "KTO_STUDIO_RUNS": str(tmp_path / "runs")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0 and str(installed) in done.stdout, done.stderr
    assert all((installed / p).is_file() for p in ("kto_core/py.typed", "kto_studio/assets/style.css"))
    assert not (installed / "tests").exists()


def test_pyproject_and_requirements_agree():
    """Each tested version is one that the package takes, and neither names what the other does not."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    takes = {canonicalize_name(r.name): r for r in map(Requirement, project["dependencies"])}
    unsloth = {canonicalize_name(r.name): r for r in map(Requirement, project["optional-dependencies"]["unsloth"])}
    assert asked("requirements.txt").keys() == takes.keys()
    assert asked("requirements-unsloth.txt").keys() == takes.keys() | unsloth.keys()
    for name, wanted in {"requirements.txt": takes, "requirements-unsloth.txt": takes | unsloth}.items():
        for package, line in asked(name).items():
            versions = [s.version for s in line.specifier if s.operator in ("==", ">=")]
            assert versions and all(wanted[package].specifier.contains(v) for v in versions), (name, package)


def test_the_doctor_reads_the_same_files():
    from kto_core import paths

    assert [paths.requirements(u).name for u in (False, True)] == ["requirements.txt", "requirements-unsloth.txt"]
    assert all(paths.requirements(u).is_file() for u in (False, True))
