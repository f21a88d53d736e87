"""doctor: every pin is compared, every problem has its remedy, nothing secret is shown, nothing heavy is imported."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kto_core.hardware import doctor, gpus
from kto_core.hardware.gpus import Device

ROOT = Path(__file__).resolve().parents[2]
CARD = Device(0, "A card", 24.0, 23.6, 0.4, (8, 6))
MODERN = ("Python", "System", "torch build", "Memory", "Disk for runs", "Hub token")


def by_name(checks) -> dict:
    return {c.name: c for c in checks}


def test_this_installation():
    """The tests run on the pinned set: every package is as pinned, and all is well or a remark."""
    checks = by_name(doctor.doctor())
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert len(pins) >= 15
    for pin in pins:
        name = pin.split("=")[0].split(">")[0]
        assert checks[name].ok is True, checks[name]
    assert all(name in checks for name in MODERN)
    assert all(c.remedy for c in checks.values() if c.ok is not True)
    assert not any(c.remedy for c in checks.values() if c.ok)


def test_command_is_quick_light_and_shows_no_token(tmp_path):
    """`python -m kto_core doctor --json` as a user runs it, with a secret in the environment."""
    secret = "hf_" + "x7Q" * 10
    env = {**os.environ, "HF_TOKEN": secret, "KTO_STUDIO_RUNS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "kto_core", "doctor", "--json"],
        capture_output=True, text=True, cwd=ROOT, env=env, check=False,
    )  # fmt: skip
    took = time.monotonic() - started
    found = json.loads(done.stdout)
    assert done.returncode == 0 and found["ok"], done.stdout
    checks = {c["name"]: c for c in found["checks"]}
    assert checks["Hub token"] == {"name": "Hub token", "ok": True, "value": "present", "remedy": ""}
    assert secret not in done.stdout + done.stderr
    assert "CUDA_VISIBLE_DEVICES" in checks["GPU"]["remedy"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "transformers", "gradio", "pandas"}
    assert took < 10  # about a second; a loaded machine may take longer


def test_packages_against_pins(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text(
        "# comment\n-r other.txt\npytest>=1  # fine\npydantic==0.1\nno-such-package-at-all>=2\nyaml??\n"
        "winonly==9; sys_platform == 'win32'\n"
    )
    found = by_name(doctor._packages(file))
    assert found["pytest"].ok is True
    assert found["pydantic"].ok is False and "required ==0.1" in found["pydantic"].value
    assert "pip install -r requirements.txt" in found["pydantic"].remedy
    assert found["no-such-package-at-all"].value.startswith("not installed")
    assert "not understood" in found["requirements.txt"].value
    assert "winonly" not in found
    (missing,) = doctor._packages(tmp_path / "nowhere.txt")
    assert missing.ok is False and missing.remedy


def test_build_of_torch_is_read_without_importing_it(tmp_path, monkeypatch):
    import torch

    assert doctor.torch_cuda() == torch.version.cuda
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise SystemExit('imported')")
    (tmp_path / "torch" / "version.py").write_text("from typing import Optional\ncuda: Optional[str] = '13.0'\n")
    code = "from kto_core.hardware import doctor; print(doctor.torch_cuda())"
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout == "13.0\n"


@pytest.mark.parametrize(
    ("cuda", "driver", "name", "ok", "words"),
    [
        (None, ("610.1", (13, 3)), "torch build", False, "cannot use the GPU"),
        ("13.0", ("520.1", (11, 8)), "NVIDIA driver", False, "Update the NVIDIA driver"),
        ("13.0", ("610.1", (13, 3)), "NVIDIA driver", True, ""),
    ],
)
def test_torch_beside_a_gpu(monkeypatch, cuda, driver, name, ok, words):
    monkeypatch.setattr(doctor, "torch_cuda", lambda: cuda)
    monkeypatch.setattr(doctor, "_driver", lambda: driver)
    found = by_name(doctor._torch([CARD], Path("requirements.txt")))
    assert found[name].ok is ok and words in found[name].remedy
    if cuda:  # really tried, in a child process; the tests' torch has no CUDA, so it must say so
        import torch

        assert found["CUDA"].ok is torch.cuda.is_available() and (found["CUDA"].ok or found["CUDA"].remedy)


@pytest.mark.parametrize(
    ("card", "ok", "words"),
    [
        (CARD, True, ""),
        (Device(0, "Old", 12, 12, 0, (6, 1)), False, "too old"),
        (Device(0, "Turing", 24, 24, 0, (7, 5)), None, "does not support bfloat16"),
        (Device(0, "Full", 24, 1, 22.5, (8, 6)), None, "Close other programs"),
    ],
)
def test_gpu(card, ok, words):
    found = doctor._gpu(card)
    assert found.ok is ok and words in found.remedy and card.name in found.value


def test_a_full_or_locked_disk_has_a_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_STUDIO_RUNS", str(tmp_path / "not" / "yet" / "there"))
    usage = doctor.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage._replace(free=gpus.GIB))
    runs = by_name(doctor._disk())["Disk for runs"]
    assert runs.ok is False and "KTO_STUDIO_RUNS" in runs.remedy and "1.0 GiB free" in runs.value
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert "is not writable" in by_name(doctor._disk())["Disk for runs"].value


def test_a_python_that_is_too_old(monkeypatch):
    monkeypatch.setattr(doctor.sys, "version_info", (3, 9, 0))
    assert doctor._python().ok is False and "3.11" in doctor._python().remedy
