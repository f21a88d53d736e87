"""Helpers of the tests that push to a Hub: a run changed, a GGUF without weights, a push that is refused."""

from dataclasses import replace

import pytest

from kto_core.errors import HubError
from kto_core.export import publish

TOKEN = "hf_good"
REPO = "jane/tuned"


def write_gguf(path, model: str = "x") -> None:
    """A GGUF without weights: enough to be read, uploaded and described."""
    import gguf

    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(model)
    writer.add_file_type(7)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(["<s>", "</s>", "a"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>{% endfor %}"
                             "{% if add_generation_prompt %}<|assistant|>{% endif %}")  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def continued(run, adapter, **values):
    """The run, as if it had gone on from an adapter."""
    from kto_core.config.resolving import save_config

    resolved = run.config()
    config = resolved.config.model_copy(update={"adapter": str(adapter), **values})
    save_config(replace(resolved, config=config), run.path / "config.yaml")
    return run


def refused(run, match: str, repo: str = REPO, token: str | None = TOKEN, **more) -> str:
    with pytest.raises(HubError, match=match) as caught:
        publish.push(run, repo, token=token, **more)
    return str(caught.value)
