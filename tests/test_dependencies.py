"""What is installed is known: locks agree with the requirements, have hashes, and hold no version with a known hole."""

import json
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {"requirements.lock": "requirements.txt", "requirements-dev.lock": "requirements-dev.txt"}
ADVISORIES = json.loads((ROOT / "security" / "advisories.json").read_text())


def entries(name: str) -> list[tuple[Requirement, list[str]]]:
    """Each package of a lock with its hashes."""
    text = re.sub(r"^#.*\n", "", (ROOT / name).read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        requirement, *hashes = re.split(r"\s+--hash=", line)
        found.append((Requirement(requirement), hashes))
    return found


def asked(name: str) -> list[Requirement]:
    """The lines of a requirements file, those that it includes too."""
    out = []
    for line in (ROOT / name).read_text().splitlines():
        if line.startswith("-r "):
            out += asked(line[3:].strip())
        elif line.partition("#")[0].strip():
            out.append(Requirement(line.partition("#")[0]))
    return out


def holes(packages: list[tuple[str, str]]) -> list[str]:
    """Known advisories for (name, version)."""
    return [
        f"{name} {version}: {entry['id']}"
        for name, version in packages
        for entry in ADVISORIES
        if canonicalize_name(name) == entry["package"]
        and Requirement(f"x{entry['affected']}").specifier.contains(Version(version).base_version, prereleases=True)
    ]


@pytest.mark.parametrize("lock", LOCKS)
def test_every_package_of_a_lock_is_one_version_with_hashes(lock):
    found = entries(lock)
    assert len(found) > 80
    for requirement, hashes in found:
        assert re.fullmatch(r"==[^,*]+", str(requirement.specifier)), requirement
        assert hashes and all(re.fullmatch(r"sha256:[0-9a-f]{64}", h) for h in hashes), requirement
    assert "://" not in (ROOT / lock).read_text()


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_what_the_requirements_ask_for(lock):
    versions: dict[str, list[str]] = {}
    for requirement, _ in entries(lock):
        versions.setdefault(canonicalize_name(requirement.name), []).append(str(requirement.specifier)[2:])
    for requirement in asked(LOCKS[lock]):
        locked = versions.get(canonicalize_name(requirement.name), [])
        assert locked and all(requirement.specifier.contains(v) for v in locked), requirement
    assert {"nvidia-cublas", "triton"} <= versions.keys()  # what torch needs on a GPU


def test_the_locks_agree():
    small, large = ({str(r): set(h) for r, h in entries(name)} for name in LOCKS)
    assert small.items() <= large.items()


@pytest.mark.parametrize("lock", LOCKS)
def test_no_locked_version_has_a_known_hole(lock):
    assert not holes([(r.name, str(r.specifier)[2:]) for r, _ in entries(lock)])


@pytest.mark.parametrize("name", ["requirements.txt", "requirements-unsloth.txt"])
def test_no_lower_bound_admits_a_known_hole(name):
    lowest = [(r.name, s.version) for r in asked(name) for s in r.specifier if s.operator in ("==", ">=")]
    assert len(lowest) >= 15
    assert not holes(lowest)


def test_holes_are_found():
    assert holes([("sentencepiece", "0.2.0"), ("torch", "2.9.1+cpu")]) == [
        "sentencepiece 0.2.0: CVE-2026-1260",
        "torch 2.9.1+cpu: CVE-2026-24747",
    ]
    assert not holes([("sentencepiece", "0.2.1")])


def test_every_advisory_says_where_it_comes_from():
    for entry in ADVISORIES:
        assert set(entry) == {"package", "affected", "id", "date", "what", "source"}
        assert re.fullmatch(r"CVE-\d{4}-\d{4,}|GHSA(-\w{4}){3}", entry["id"]) and entry["source"].startswith("https://")
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", entry["date"])
        Requirement(f"x{entry['affected']}")
    assert len({e["id"] for e in ADVISORIES}) == len(ADVISORIES)
