"""Uploads against a local server that speaks the Hub's HTTP API: bytes, privacy, refusals, cancel, and the token."""

import json
import os
import shutil
import threading
from types import SimpleNamespace

import pytest

from kto_core import files
from kto_core.errors import Cancelled, ExportError, HubError
from kto_core.export import model_card, publish, sources
from kto_core.export.hub import upload
from kto_core.export.merging import FACTS
from kto_core.runs.events import EventLog
from kto_core.verdict import keeping
from tests.support.pushing import REPO, TOKEN, continued, refused, write_gguf
from tests.support.verdicts import RESULT

# ---- what arrives ---------------------------------------------------------------------------------------------------


def test_the_adapter_arrives_byte_for_byte_in_one_commit(server, run):
    said = []
    url = publish.push(run, REPO, token=TOKEN, progress=lambda f, text: said.append((f, text)))
    repo = server.repos[REPO]
    assert url == f"{server.url}/{REPO}" and repo.private and len(repo.commits) == 1
    sent = set(repo.files) - {"README.md"}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= sent
    assert files.MANIFEST not in sent
    for name in sent - {"adapter_config.json"}:  # which names the base, not its folder: test_other_readers.py
        assert repo.files[name] == (run.adapter / name).read_bytes(), name
    fractions = [f for f, _ in said if f is not None]
    assert fractions == sorted(fractions) and said[-1] == (1.0, f"Uploaded to {REPO}, private.")


def test_the_card_says_where_it_comes_from_and_no_path(server, run, tmp_path):
    from huggingface_hub import ModelCard

    publish.push(run, REPO, token=TOKEN)
    text = server.repos[REPO].files["README.md"].decode()
    card = ModelCard(text)
    assert card.data.library_name == "peft" and {"kto", "trl", "lora"} <= set(card.data.tags)
    assert card.data.license is None and card.data.base_model is None  # a folder is nobody else's base
    assert "8 (5 good, 3 bad)" in text and "ab" * 32 in text and "`rows.jsonl`" in text
    assert "rewards/margins | 0.25" in text and "| beta | " in text and "| r | " in text
    assert sources.sha256(run.adapter / "adapter_model.safetensors") in text and run.id in text
    assert str(tmp_path) not in text and "private place" not in text and "/" + os.sep not in text


def test_the_card_of_a_hub_model_names_its_base(run):
    class Fake(SimpleNamespace):
        def state(self):
            return run.state()

    values = run.config().config.model_copy(update={"model": "demo"})
    data = run.dataset() | {"source": "jane/thumbs"}
    fake = Fake(id=run.id, path=run.path, config=lambda: SimpleNamespace(config=values), dataset=lambda: data)
    text = model_card.write(
        fake, REPO, ["merged", "gguf"], adapter_sha256="f" * 64, files=["a-q8_0.gguf"], dtype="float16"
    )
    from huggingface_hub import ModelCard

    data = ModelCard(text).data
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.library_name == "transformers"
    assert data.datasets == ["jane/thumbs"] and "gguf" in data.tags
    assert "stored as float16" in text and "`a-q8_0.gguf`" in text


def card_of(run) -> str:
    return model_card.write(run, REPO, ["adapter"], adapter_sha256="f" * 64, files=["adapter_config.json"])


def test_the_card_has_the_verdict_on_its_adapter(run):
    assert "## Verdict" not in card_of(run)
    keeping.write(run.path, RESULT | {"data": "/home/me/rows.jsonl"}, keeping.fingerprint(run.adapter))
    text = card_of(run)
    assert "| verdict | Better: the reward margin is +1.93 and not chance. |" in text and "95 % interval" in text
    assert "/home/me" not in text and "secret" not in text and "questions were not trained on" in text
    keeping.write(run.path, RESULT | {"trained_on": None}, keeping.fingerprint(run.adapter))
    assert "may have been trained on" in card_of(run)
    keeping.write(run.path, RESULT, "another adapter")
    assert "## Verdict" not in card_of(run)


def test_the_card_names_the_run_that_it_went_on_from(run, tmp_path):
    first = tmp_path / "private place" / "first-run"
    shutil.copytree(run.path, first)
    text = card_of(continued(run, first / "adapter"))
    assert "2. LoRA adapter of run `first-run`, from which this run continued\n" in text
    assert f"3. LoRA adapter of run `{run.id}`, sha256" in text
    assert str(tmp_path) not in text and "private place" not in text
    text = card_of(continued(run, first / "checkpoints" / "checkpoint-20"))
    assert "2. LoRA adapter of run `first-run`, checkpoint-20, from which" in text
    EventLog(first / "events.jsonl").append("used", began_from={"run": "zeroth", "began_from": {"folder": "lora"}})
    text = card_of(continued(run, first / "adapter"))
    assert (
        "2. LoRA adapter `lora`, from which the next run continued\n3. LoRA adapter of run `zeroth`, from which the "
        in text
    )
    assert "4. LoRA adapter of run `first-run`, from which this run continued\n" in text
    (first / "config.yaml").unlink()  # a folder that is no run
    text = card_of(continued(run, first / "my lora"))
    assert "2. LoRA adapter `my lora`, from which this run continued\n" in text
    assert str(tmp_path) not in text and "private place" not in text and "first-run" not in text
    EventLog(run.path / "events.jsonl").append("used", began_from={"run": "gone", "checkpoint": "checkpoint-3"})
    assert "2. LoRA adapter of run `gone`, checkpoint-3, from which" in card_of(run)  # it was there when it trained


def test_the_card_of_a_continued_run_has_the_adapters_own_shape(run):
    own = json.loads((run.adapter / "adapter_config.json").read_text())
    assert own["r"] == 8
    assert "| r | 64 |" in card_of(continued(run, "", r=64))
    text = card_of(continued(run, run.adapter, r=64, target_modules=["o_proj"]))
    assert "| r | 8 |" in text and "o_proj" not in text and "down_proj, q_proj, v_proj" in text


def test_the_card_has_engine_and_optimizer_that_were_used(run):
    run = continued(run, "", optim="adamw_8bit", engine="auto")
    text = card_of(run)  # of a run that did not write them down
    assert "| optim | adamw_8bit (as configured) |" in text and "| engine | auto (as configured) |" in text
    log = EventLog(run.path / "events.jsonl")
    log.append("used", engine="packed", optim="adamw_torch", kl_group="batch")
    text = card_of(run)
    assert "| optim | adamw_torch |" in text and "| engine | packed |" in text and "| kl_group | batch |" in text
    log.append("used", engine="trl", optim="adamw_torch", kl_group="microbatch")  # resumed: the last one
    text = card_of(run)
    assert "| engine | trl |" in text and "| kl_group | microbatch |" in text and "configured" not in text


def test_the_card_has_the_rate_that_was_found(run):
    run = continued(run, "", learning_rate="auto")
    assert "| learning_rate | auto (as configured) |" in card_of(run)
    EventLog(run.path / "events.jsonl").append("used", engine="packed", learning_rate=2e-5)
    assert "| learning_rate | 2e-05 |" in card_of(run)


def test_merged_model_adapter_and_gguf_in_one_repository(server, run):
    gguf_path = run.path / "exports" / "gguf" / "m-q8_0.gguf"
    write_gguf(gguf_path)
    sources.Sources.of(run).record(gguf_path, "test")
    sources.note(gguf_path, check={"ok": True, "problems": [], "agreement": {"same": 69, "of": 74, "undecided": 23}})
    stale = gguf_path.with_name("old-q8_0.gguf")
    write_gguf(stale)
    publish.push(run, REPO, what=["gguf", "adapter", "merged"], token=TOKEN, private=False)
    repo = server.repos[REPO]
    assert not repo.private and len(repo.commits) == 1
    merged = run.path / "exports" / "merged"
    assert repo.files["model.safetensors"] == (merged / "model.safetensors").read_bytes()
    assert repo.files["config.json"] == (merged / "config.json").read_bytes()
    assert repo.files["m-q8_0.gguf"] == gguf_path.read_bytes()
    assert b"| `m-q8_0.gguf` | 0.00 GB | at 69 of 74 places (93%) |" in repo.files["README.md"]
    assert b"FROM ./m-q8_0.gguf" in repo.files["Modelfile-q8_0"]
    # beside the merged weights transformers would apply it a second time
    assert "adapter/adapter_config.json" in repo.files and "adapter_config.json" not in repo.files
    assert not {FACTS, "manifest.json", stale.name} & {n.rpartition("/")[2] for n in repo.files}


def test_a_second_upload_sends_nothing_and_keeps_what_the_user_wrote(server, run):
    publish.push(run, REPO, token=TOKEN)
    repo = server.repos[REPO]
    text = repo.files["README.md"].decode().replace("---\n", "---\nlicense: mit\n", 1)
    repo.files["README.md"] = text.encode()
    sent = len(server.objects)
    publish.push(run, REPO, token=TOKEN)
    assert len(server.objects) == sent and b"license: mit" in repo.files["README.md"]
    lines = b"".join(server.bodies[1:])
    assert b"adapter_model.safetensors" not in lines


def test_a_card_of_somebody_else_is_left_alone(server, run):
    publish.push(run, REPO, token=TOKEN)
    own = b"---\ntags:\n- mine\n---\n# My own words\n"
    server.repos[REPO].files["README.md"] = own
    publish.push(run, REPO, token=TOKEN)
    assert server.repos[REPO].files["README.md"] == own


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_without_a_token(server, run):
    assert not publish.token_present()
    refused(run, "^No access token found.*HF_TOKEN", token=None)
    assert not server.requests


def test_the_environment_has_a_token(server, run, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert publish.token_present()
    assert publish.push(run, REPO).endswith(REPO)


@pytest.mark.parametrize("name", ["", "tuned", "jane/a/b", "jane/..", "../x", "https://x/y", "jane/a b", "jane/a--b"])
def test_names_that_are_none(run, name):
    with pytest.raises(HubError, match="owner/name"):
        publish.push(run, name, token=TOKEN)


def test_what_is_none(run):
    for what in ([], "weights", ["adapter", "x"]):
        with pytest.raises(ExportError, match="adapter, merged, gguf"):
            publish.push(run, REPO, what=what, token=TOKEN)


def test_tokens_and_owners_that_are_refused(server, run):
    refused(run, r"rejected this token \(401\)", token="hf_wrong")
    refused(run, r"has no write access to jane/tuned \(403\)", token="hf_readonly")
    refused(run, r"access to joe/tuned \(403\).*write access to joe", repo="joe/tuned")
    assert not server.repos


def test_other_answers(server, run):
    server.fail["/preupload/"] = 404
    refused(run, r"^jane/tuned does not exist, or this token cannot access it \(404\)")
    server.fail = {"/commit/": 400}
    refused(run, r"^The Hub returned an error for jane/tuned \(400\)")
    assert REPO not in server.repos


def test_no_network(server, run, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    refused(run, "cannot be reached")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused(run, "HF_HUB_OFFLINE")


def test_a_public_repository_is_not_used_for_a_private_upload(server, run):
    publish.push(run, REPO, token=TOKEN, private=False)
    refused(run, "already exists and is public")
    assert len(server.repos[REPO].commits) == 1


def test_cancel_publishes_nothing(server, run):
    server.stall.set()
    cancel = threading.Event()
    threading.Thread(target=lambda: (server.uploading.wait(60), cancel.set()), daemon=True).start()
    with pytest.raises(Cancelled):
        publish.push(run, REPO, token=TOKEN, cancel=cancel)
    server.stall.clear()
    assert server.uploading.is_set() and REPO not in server.repos


# ---- the token ------------------------------------------------------------------------------------------------------


def test_the_token_is_nowhere(server, run, tmp_path, monkeypatch, capfd):
    """Planted, used in an upload that works and in ones that fail, then looked for in everything there is."""
    from tests.support import fake_hub

    secret = "hf_PLANTEDsecret1234567890"
    monkeypatch.setitem(fake_hub.USERS, secret, "write")
    said: list[str] = []
    commands: set[str] = set()

    def progress(_, text):
        import psutil

        said.append(text)
        for p in psutil.Process().children(recursive=True):
            try:
                commands.update([*p.cmdline(), *p.environ().values()])
            except psutil.Error:
                continue

    publish.push(run, REPO, token=secret, progress=progress)
    server.fail["/commit/"] = 400  # the server's message has the token in it
    (run.adapter / "adapter_config.json").write_text(json.dumps({"changed": 1}))
    said.append(refused(run, "400", token=secret, progress=progress))
    server.fail["/whoami-v2"] = 500
    said.append(refused(run, "server error", token=secret))
    assert sum(t == secret for _, _, t in server.requests) > 5 and commands

    assert not [text for text in [*said, *commands, *capfd.readouterr()] if secret in text]
    published = b"".join(server.repos[REPO].files.values()) + b"".join(server.bodies)
    assert secret.encode() not in published
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 5 and not [p for p in files if secret.encode() in p.read_bytes()]


def test_tokens_with_blanks_are_refused_without_a_request(server):
    for token in ("hf_a b", "hf_ä", "hf_a\nb"):
        with pytest.raises(HubError, match="characters"):
            upload.require(REPO, token)
    assert upload.require(f" {REPO} ", f" {TOKEN}\n") == (REPO, TOKEN)
