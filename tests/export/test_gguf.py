"""The GGUF converter's way into the cache, what a GGUF file says of itself, and the names of its kinds."""

import io
import shutil
import tarfile
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from kto_core.errors import Cancelled, DiskError, ExportError
from kto_core.export.gguf import converter, header, writing
from tests.support.exporting import left_behind

ARCHIVE = f"llama_cpp_python-{converter.VERSION}"
INSIDE = {
    f"{ARCHIVE}/pyproject.toml": '[build-system]\nrequires = ["scikit-build-core"]\n'
    'build-backend = "scikit_build_core.build"\n[project]\nname = "llama_cpp_python"\ndynamic = ["version"]\n',
    f"{ARCHIVE}/PKG-INFO": f"Metadata-Version: 2.1\nName: llama-cpp-python\nVersion: {converter.VERSION}\n",
    f"{ARCHIVE}/vendor/llama.cpp/convert_hf_to_gguf.py": "print('converter')\n",
    f"{ARCHIVE}/vendor/llama.cpp/LICENSE": "MIT\n",
    f"{ARCHIVE}/vendor/llama.cpp/conversion/__init__.py": 'TEXT_MODEL_MAP: dict[str, str] = {"Llama": "llama"}\n',
    f"{ARCHIVE}/vendor/llama.cpp/gguf-py/gguf/__init__.py": "",
    f"{ARCHIVE}/vendor/llama.cpp/src/llama.cpp": "int main() {}\n",
    f"{ARCHIVE}/vendor/llama.cpp/conversion/../../../../outside.py": "evil\n",
}  # fmt: skip


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """pip without a network: it only finds what lies in this folder, and our cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    return folder


def put_archive(folder: Path) -> str:
    """A small source distribution in the index; returns its sha256."""
    import hashlib

    file = folder / f"{ARCHIVE}.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name, text in INSIDE.items():
            if ".." in name:
                continue  # pip refuses such an archive whole; `test_only_what_is_wanted…` has it
            add(tar, name, text)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def add(tar: tarfile.TarFile, name: str, text: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(text.encode())
    tar.addfile(entry, io.BytesIO(text.encode()))


# ---- the converter --------------------------------------------------------------------------------------------------


def test_the_converter_is_fetched_once_and_mended_if_damaged(index, monkeypatch, tmp_path):
    monkeypatch.setattr(converter, "SHA256", put_archive(index))
    said = []
    script = converter.converter(lambda f, text: said.append((f, text)))
    home = tmp_path / "cache" / "gguf-converter"
    assert script.read_text() == "print('converter')\n" and script.is_relative_to(home)
    kept = {p.relative_to(script.parent).as_posix() for p in script.parent.rglob("*") if p.is_file()}
    assert kept == {"convert_hf_to_gguf.py", "LICENSE", "conversion/__init__.py", "gguf-py/gguf/__init__.py",
                    "manifest.json"}  # fmt: skip
    assert said[-1] == (1.0, "The GGUF converter is ready.") and not left_behind(home)

    (index / f"{ARCHIVE}.tar.gz").rename(index / "away")
    assert converter.converter() == script  # no pip now
    script.write_text("damaged")
    with pytest.raises(ExportError, match="could not be downloaded"):
        converter.converter()
    (index / "away").rename(index / f"{ARCHIVE}.tar.gz")
    assert converter.converter().read_text() == "print('converter')\n"


def test_an_archive_with_another_hash_is_not_opened(index, tmp_path):
    put_archive(index)
    with pytest.raises(ExportError, match="unexpected hash, so it is not used"):
        converter.converter()
    assert [p.name for p in (tmp_path / "cache" / "gguf-converter").iterdir()] == ["lock"]


def test_no_network_is_said(index, tmp_path):
    with pytest.raises(ExportError, match="could not be downloaded.*Check the network"):
        converter.converter()
    assert not left_behind(tmp_path / "cache")


def test_cancel_of_the_fetch_leaves_nothing(index, monkeypatch, tmp_path):
    monkeypatch.setattr(converter, "SHA256", put_archive(index))
    cancel = threading.Event()
    cancel.set()
    with pytest.raises(Cancelled):
        converter.converter(cancel=cancel)
    assert not left_behind(tmp_path / "cache")


def test_no_room_for_the_converter(index, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000_000))
    with pytest.raises(DiskError, match="400 MB .* 10 MB are free"):
        converter.converter()


def test_only_what_is_wanted_comes_out_of_the_archive(tmp_path):
    file = tmp_path / "a.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        for name, text in INSIDE.items():
            add(tar, name, text)
        link = tarfile.TarInfo(f"{ARCHIVE}/vendor/llama.cpp/conversion/link.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    converter._extract(file, tmp_path / "out", None)
    assert not (tmp_path / "outside.py").exists() and not list((tmp_path / "out").rglob("link.py"))
    assert not list((tmp_path / "out").rglob("llama.cpp"))
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(ExportError, match="is damaged"):
        converter._extract(file, tmp_path / "cut", None)


def test_the_real_converter_knows_the_models_of_the_presets():
    script = converter.converter()
    for name in ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "MistralForCausalLM", "GptOssForCausalLM"):
        converter.require_convertible(name, script)
    with pytest.raises(ExportError, match="does not support the architecture NewForCausalLM"):
        converter.require_convertible("NewForCausalLM", script)
    with pytest.raises(ExportError, match="GPT-NeoX"):
        converter.require_convertible("GPTNeoXForCausalLM")


# ---- kinds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "found"),
    [("Q4_K_M", ["q4_k_m"]), ("q8_0, F16", ["f16", "q8_0"]), (["q5_k_m", "Q5_K_M"], ["q5_k_m"]), (("f16",), ["f16"])],
)
def test_kinds_in_any_case_and_order(given, found):
    assert writing.known(given) == found


@pytest.mark.parametrize("given", ["q3", ["q8_0", "int4"], "", []])
def test_kinds_that_are_none(given):
    with pytest.raises(ExportError, match="f16, q8_0, q6_k, q5_k_m, q4_k_m, iq4_xs, q3_k_m, q2_k"):
        writing.known(given)


# ---- a file's own facts ---------------------------------------------------------------------------------------------


def test_what_is_no_gguf(tmp_path):
    for name, data in {"empty": b"", "text": b"hello" * 100, "cut": b"GGUF\x03\x00\x00\x00\x05\x00"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ExportError, match="not a complete GGUF file"):
            header.read_facts(tmp_path / name)


def facts(template: str, **more) -> header.Facts:
    values = {"name": "x", "architecture": "llama", "file_type": "f16", "bos": 0, "eos": 1, "pad": None,
              "bos_text": "<s>", "eos_text": "</s>", "add_bos": True, "pre": ""}  # fmt: skip
    return header.Facts(template=template, **(values | more))


def test_the_template_is_rendered_in_a_sandbox():
    chat = [{"role": "user", "content": "Hi"}]
    text = header.render(
        facts("{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"), chat
    )
    assert text == "<s>Hi</s>"
    for evil in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{% for x in", "{{ raise_exception('no') }}"):
        with pytest.raises(ExportError, match="cannot be rendered"):
            header.render(facts(evil), chat)
    with pytest.raises(ExportError, match="no chat template"):
        header.render(facts(""), chat)


def test_reasons_of_failures_are_told(tmp_path, monkeypatch):
    unknown = "NotImplementedError: BPE pre-tokenizer was not recognized - update get_vocab_base_pre()"
    assert "tokenizer" in writing._why_not_converted(SimpleNamespace(tail=unknown))
    writing._require_room(tmp_path)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(DiskError, match=r"is full \(1 MB free\)"):
        writing._require_room(tmp_path)
