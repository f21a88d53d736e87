"""Repositories at the Hub: never half public, never left empty, as visible as asked; no path of this machine in one."""

import json

import pytest

from kto_core.errors import ExportError
from kto_core.export import publish, sources
from kto_core.export.hub import origin, private
from kto_core.verdict import keeping
from tests.support.fake_hub import Repo
from tests.support.pushing import REPO, TOKEN, continued, refused, write_gguf
from tests.support.verdicts import RESULT

BASE = "joe/base"
CARD = b"---\nlicense: other\nlicense_name: joes\nlicense_link: https://joe.example/l\nlanguage: [en, de]\n---\n# Joe\n"


# ---- made, made public, left alone ----------------------------------------------------------------------------------


def test_a_public_repository_is_private_until_all_of_it_is_there(server, run, monkeypatch):
    publish.push(run, REPO, token=TOKEN, private=False)
    assert server.made == [(REPO, True)] and not server.repos[REPO].private
    order = [path for method, path, _ in server.requests if "/commit/" in path or path.endswith("/settings")]
    assert order[-1].endswith("/settings") and "/commit/" in order[0]


def test_a_failed_upload_leaves_no_repository(server, run):
    server.fail["/commit/"] = 400
    for is_private in (True, False):
        refused(run, "400", private=is_private)
        assert REPO not in server.repos


def test_a_repository_that_was_there_is_never_deleted(server, run):
    server.repos[REPO] = Repo(True)  # empty, but not ours
    server.fail["/commit/"] = 400
    refused(run, "400")
    assert REPO in server.repos and not [path for method, path, _ in server.requests if method == "DELETE"]


def test_nothing_is_made_before_there_is_something_to_send(server, run):
    (run.adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ExportError):
        publish.push(run, REPO, token=TOKEN)
    assert not server.made


def test_a_private_repository_does_not_become_public(server, run):
    publish.push(run, REPO, token=TOKEN)
    refused(run, "already exists and is private", private=False)
    assert server.repos[REPO].private and len(server.repos[REPO].commits) == 1


def test_what_could_not_be_made_public_is_said(server, run):
    server.fail["/settings"] = 403
    refused(run, "^Everything was uploaded to jane/tuned, but it is still private", private=False)
    assert server.repos[REPO].private and server.repos[REPO].commits


def test_a_fine_grained_token_needs_the_right_to_write(server, run):
    server.scoped = [{"entity": {"type": "user", "name": "jane"}, "permissions": ["repo.content.read"]}]
    refused(run, "no write access")
    assert not server.made
    server.scoped[0]["permissions"].append("repo.write")
    publish.push(run, REPO, token=TOKEN)


# ---- what the Hub refuses -------------------------------------------------------------------------------------------


def test_full_storage_is_no_matter_of_the_token(server, run):
    said = "Private repository storage limit reached, please upgrade your plan."
    server.fail["/lfs/objects/batch"] = (403, said)
    text = refused(run, "The storage for private repositories of jane on the Hub is used up")
    assert said.rstrip(".") in text and "token" not in text and REPO not in server.repos
    server.fail = {"/commit/": (413, "The file is larger than 50 GB")}
    assert "too large" in refused(run, "413")


def test_a_limit_says_how_long_to_wait(server, run):
    server.fail["/commit/"] = (429, "slow down")
    server.headers = {"Retry-After": "90"}
    assert "Try again in 1 min 30 s." in refused(run, "429")


def test_a_retry_is_shown(server, run):
    server.fail["/lfs/"] = (503, "busy", 2)
    said = []
    publish.push(run, REPO, token=TOKEN, progress=lambda f, text: said.append(text))
    tries = [text for text in said if text.startswith("The Hub does not answer. Trying again in ")]
    assert len(tries) >= 1 and "(1 of 5)" in tries[0] and server.repos[REPO].commits


# ---- what stays here ------------------------------------------------------------------------------------------------


def test_no_folder_of_this_machine_is_published(server, run, tiny_model, tmp_path):
    settings = run.adapter / "tokenizer_config.json"
    planted = {"name_or_path": str(tiny_model), "cache": f"{tmp_path}/a-run/x"}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | planted))
    publish.push(run, REPO, token=TOKEN)
    for name, data in server.repos[REPO].files.items():
        assert str(tiny_model).encode() not in data and str(tmp_path).encode() not in data, name
    published = json.loads(server.repos[REPO].files["tokenizer_config.json"])
    assert published["name_or_path"] == tiny_model.name and published["cache"] == "a-run/x"
    assert json.loads(settings.read_text())["name_or_path"] == str(tiny_model)  # ours is as it was


def test_weights_that_name_a_folder_are_refused(tmp_path):
    weights = tmp_path / "w.gguf"
    weights.write_bytes(b"GGUF" + str(tmp_path).encode())
    with pytest.raises(ExportError, match="w.gguf names a folder of this machine"):
        private.without_paths([(weights, "w.gguf")], [tmp_path], tmp_path / "public")
    weights.write_bytes(b"GGUF /root /home words")
    assert private.without_paths([(weights, "w")], [tmp_path], tmp_path / "public") == [(weights, "w")]


def test_the_base_of_a_folder_is_asked_for_once(server, run, tiny_model):
    from huggingface_hub import ModelCard

    publish.push(run, REPO, token=TOKEN)
    config = json.loads(server.repos[REPO].files["adapter_config.json"])
    assert config["base_model_name_or_path"] == tiny_model.name == publish.public_base(run)
    with pytest.raises(ExportError, match="owner/name"):
        publish.push(run, REPO, token=TOKEN, base="base")
    server.repos[BASE] = Repo(False)
    server.repos[BASE].files["README.md"] = CARD
    for given in (BASE, None):  # the second time it is known
        publish.push(run, REPO, token=TOKEN, base=given)
        files = server.repos[REPO].files
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == BASE
        data = ModelCard(files["README.md"].decode()).data
        assert data.base_model == BASE and data.base_model_relation == "adapter"
    with pytest.raises(ExportError, match="is joe/base"):
        publish.push(continued(run, "", model=BASE), REPO, token=TOKEN, base="joe/other")


# ---- the model card -------------------------------------------------------------------------------------------------


def test_the_card_has_the_licence_and_languages_of_the_base(server, run):
    from huggingface_hub import ModelCard

    server.repos[BASE] = Repo(False)
    server.repos[BASE].files["README.md"] = CARD
    publish.push(run, REPO, token=TOKEN, base=BASE)
    text = server.repos[REPO].files["README.md"].decode()
    data = ModelCard(text).data
    assert (data.license, data.license_name, data.license_link) == ("other", "joes", "https://joe.example/l")
    assert data.language == ["en", "de"]
    assert "That of the base model: joes (https://joe.example/l)." in text
    assert "vllm serve joe/base --enable-lora --max-lora-rank 8 --lora-modules tuned=jane/tuned" in text


def test_the_card_has_numbers_with_intervals_for_the_hubs_own_table(server, run):
    from huggingface_hub import ModelCard

    keeping.write(run.path, RESULT, keeping.fingerprint(run.adapter))
    publish.push(run, REPO, token=TOKEN)
    results = ModelCard(server.repos[REPO].files["README.md"].decode()).data.eval_results
    margin = next(r for r in results if r.metric_type == "rewards/margins")
    assert margin.metric_value == 1.93 and margin.metric_args == {"interval_95": [1.7, 2.1]}
    assert margin.dataset_type == "private" and margin.dataset_name == "rows.jsonl"
    assert {r.metric_type for r in results} == {"rewards/margins", "rewards/chosen", "accuracy", "auc"}


def test_gguf_files_come_with_what_ollama_reads_at_the_hub(server, run):
    from huggingface_hub import ModelCard

    file = run.path / "exports" / "gguf" / "m-q8_0.gguf"
    write_gguf(file)
    sources.Sources.of(run).record(file, "test")
    publish.push(run, REPO, what="gguf", token=TOKEN, base=BASE)
    files = server.repos[REPO].files
    assert b"{{ range .Messages }}" in files["template"] and json.loads(files["params"])["stop"] == ["</s>", "<|user|>"]
    assert b'TEMPLATE """' + files["template"] + b'"""' in files["Modelfile-q8_0"]
    text = files["README.md"].decode()
    assert "ollama run hf.co/jane/tuned:Q8_0\nllama-server -hf jane/tuned:Q8_0" in text
    assert ModelCard(text).data.base_model_relation == "quantized"


@pytest.mark.parametrize(
    "text", ["", "no header", "---\n[]\n---\n", "---\n{ : }: x\n---\n", "---\nlicense: [1]\n---\n"]
)
def test_a_card_that_states_nothing(text):
    assert origin.stated(text) == {} and origin.name_of({}) == ""


def test_the_licence_of_a_base_in_a_folder(tmp_path):
    (tmp_path / "README.md").write_bytes(CARD)
    assert origin.of_base(str(tmp_path))["license_name"] == "joes"
    (tmp_path / "README.md").unlink()
    assert origin.of_base(str(tmp_path)) == {}
    assert origin.name_of({"license": "mit", "license_link": "javascript:x"}) == "mit"
