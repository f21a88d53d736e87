"""What a name can be: one test, asked by all who take a model, a data set or a repository."""

import pytest

from kto_core.data.reading import sources
from kto_core.errors import HubError, ModelError
from kto_core.export.hub import origin, upload
from kto_core.models import hub_files
from kto_core.paths import is_hub_dataset, is_hub_id
from kto_studio.shared import data_sources, model_choices

IDS = ["jane/my-model", "Qwen/Qwen2.5-0.5B", "a/b", "0x/_1.v"]
NO_IDS = ["", "model", "./model", "../model", "~/model", "/a/b", "a/b/c", "a/", "/b", "-a/b", "a/.b", "a--b/c",
          "a/b..c", "a b/c", "a/b\n", "a/b:c", "hf:a/b"]  # fmt: skip


@pytest.mark.parametrize("name", IDS)
def test_a_hub_id_is_one_for_all(name):
    assert is_hub_id(name) and is_hub_dataset(name) and sources.is_hub(name)
    assert model_choices.target(name) == name and data_sources.hub_id(name, "") == f"hub:{name}@train"
    assert upload.require(name, "hf_x") == (name, "hf_x") and origin.base_name(name) == name


@pytest.mark.parametrize("name", NO_IDS)
def test_what_is_no_hub_id_is_none_for_all(name, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *a, **k: pytest.fail("the Hub was asked"))
    assert not is_hub_id(name) and hub_files.cached_folder(name) is None
    with pytest.raises(ModelError):
        hub_files.hub_exists(name)
    if name == name.strip():  # who takes it from a form strips it
        with pytest.raises(ModelError):
            model_choices.target(name)
        with pytest.raises(HubError):
            upload.require(name, "hf_x")


@pytest.mark.parametrize("name, is_one", [
    ("squad", True), ("a/b:en", True), ("squad:v1.1", True), ("a/b:", False), ("a/b:c:d", False), ("a/b:c/d", False),
    (":en", False), ("a/b/c", False), ("./a", False), ("", False),
])  # fmt: skip
def test_a_data_set_may_have_no_owner_and_a_configuration(name, is_one):
    assert is_hub_dataset(name) is is_one and sources.is_hub(name) is is_one
