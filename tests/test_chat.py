"""Chat: streaming, base and tuned, stopping, limits of the context, errors, rated answers."""

import json
import threading

import pytest
from training import make_data, resolved

from kto_core import chat, feedback, run
from kto_core.errors import BusyError, DiskError, ModelError

ASK = [{"role": "user", "content": "What is 2 plus 2?"}]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A finished run of the tiny model, and its folder."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    data = make_data(folder.parent / "data.jsonl")
    made = run.create(resolved(tiny_model, data, max_steps=4, save_steps=2, output_dir=str(folder)))
    run.start(made, block=True)
    assert made.state().state == "finished", made.state().message
    return made


@pytest.fixture(scope="module")
def loaded(trained):
    one = chat.Chat.load(str(trained.path))
    yield one
    one.unload()


def say(loaded, messages=ASK, **options):
    return "".join(loaded.stream(messages, **{"temperature": 0, "max_new_tokens": 12} | options))


def test_greedy_answers_repeat_and_equal_generate(loaded):
    import torch

    from kto_core.template import render_chat

    first = say(loaded)
    assert first == say(loaded) and loaded.stats["tokens"] > 0 and loaded.stats["tokens_per_second"] > 0
    ids = torch.tensor([render_chat(ASK, loaded.tokenizer)])
    out = loaded.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert first == loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def test_base_and_tuned_differ_on_one_set_of_weights(loaded, tiny_model):
    draw = {"temperature": 1.0, "seed": 1, "max_new_tokens": 60, "top_p": 1.0, "top_k": 0}
    before = say(loaded, tuned=False, **draw)
    assert loaded.has_adapter and before != say(loaded, tuned=True, **draw)
    plain = chat.Chat.load(str(tiny_model))
    assert not plain.has_adapter and say(plain, **draw) == before
    plain.unload()


def test_seed_and_temperature(loaded):
    import torch

    state = torch.get_rng_state()
    one, two = (say(loaded, temperature=1.0, seed=7) for _ in range(2))
    assert one == two != say(loaded, temperature=1.0, seed=8)
    assert torch.equal(state, torch.get_rng_state()), "a training in this process draws from the global generator"


def test_sampler_draws_from_the_tempered_cut_distribution():
    import torch

    from kto_core.sampling import sampler

    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    steps = sampler(0.5, 1.0, 3, 0, "cpu")
    counts = torch.zeros(4)
    for _ in range(4000):
        scores = logits
        for step in steps:
            scores = step(None, scores)
        counts[scores.argmax()] += 1
    expected = torch.softmax(logits[0, :3] / 0.5, 0)
    assert counts[3] == 0 and torch.allclose(counts[:3] / 4000, expected, atol=0.03)


def test_cancel_stops_soon_and_says_so(loaded):
    stop = threading.Event()
    stream = loaded.stream(ASK, temperature=0, max_new_tokens=400, cancel=stop)
    next(stream)
    stop.set()
    list(stream)
    assert loaded.stats["ended"] == "stopped" and loaded.stats["tokens"] < 100
    stream = loaded.stream(ASK, temperature=0, max_new_tokens=400)
    next(stream)
    stream.close()  # what a page does that is closed
    assert loaded.stats["ended"] == "stopped" and say(loaded)


def test_a_full_context_forgets_the_oldest_turns_but_not_the_system_prompt(loaded, monkeypatch):
    from kto_core import template

    seen = []
    real = template.render_chat
    monkeypatch.setattr(template, "render_chat", lambda m, *a: seen.append(m) or real(m, *a))
    turns = [{"role": r, "content": f"{r} {i} " + "x" * 60} for i in range(6) for r in ("user", "assistant")]
    say(loaded, [{"role": "system", "content": "S"}, *turns, *ASK])
    assert loaded.stats["forgotten"] > 0 and seen[-1][0]["content"] == "S" and seen[-1][-1] == ASK[0]
    assert seen[-1][1]["role"] == "user"
    with pytest.raises(ModelError, match="tokens; the model takes"):
        say(loaded, [{"role": "user", "content": "x" * 2000}])


def test_checkpoints_and_what_is_not_there(trained):
    config, adapter, name = chat.resolve(trained, checkpoint="2")
    assert adapter.name == "checkpoint-2" and name == trained.id and config.model
    assert chat.resolve(trained)[1] == trained.adapter
    with pytest.raises(ModelError, match="checkpoints: 2, 4"):
        chat.resolve(trained, checkpoint="3")
    with pytest.raises(ModelError, match="no run"):
        chat.resolve("demo", checkpoint="3")
    with pytest.raises(ModelError):
        chat.Chat.load("/no/such/model")


def test_a_broken_adapter_is_said(trained, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained.path, copy)
    (copy / "adapter" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="does not load"):
        chat.Chat.load(str(copy))


def test_one_model_an_app(trained):
    first = chat.load(trained)
    assert chat.current() is first
    second = chat.load(trained)
    assert chat.current() is second
    with pytest.raises(ModelError, match="unloaded"):
        say(first)
    second.unload()
    second.unload()
    assert chat.current() is None


def test_refused_while_training_owns_the_gpu(trained, monkeypatch, tmp_path):
    from kto_core.hardware import claim

    monkeypatch.setenv("KTO_STUDIO_CLAIM", "1")
    with claim("train", "20260101-x"), pytest.raises(BusyError, match="20260101-x is training"):
        chat.load(trained)
    one = chat.load(trained)
    with pytest.raises(BusyError, match="chat has"), claim("train", "other"):
        pass
    one.unload()
    with claim("train", "other"):
        pass


def test_unload_ends_a_running_answer(trained):
    one = chat.Chat.load(trained)
    stream = one.stream(ASK, temperature=0, max_new_tokens=100000)
    next(stream)
    reader = threading.Thread(target=lambda: list(stream))
    reader.start()
    one.unload()
    reader.join(20)
    assert not reader.is_alive() and one.model is None


def test_rated_answers_become_rows(tmp_path):
    file = tmp_path / "data" / "feedback.jsonl"
    talk = [*ASK, {"role": "assistant", "content": "4 👍"}]
    other = [*ASK, {"role": "assistant", "content": "five"}]
    feedback.add(file, talk, True)
    feedback.add(file, other, False)
    assert feedback.counts(file) == (1, 1)
    feedback.add(file, talk, False)  # thought better of it
    assert feedback.counts(file) == (0, 2)
    feedback.remove(file, talk)
    assert [json.loads(x) for x in file.read_text().splitlines()] == [
        {"prompt": ASK, "completion": other[-1:], "label": False}
    ]
    from kto_core import dataset

    assert dataset.load(str(file)).report.kept == 1
    with pytest.raises(ModelError, match="rated"):
        feedback.add(file, ASK, True)
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(DiskError, match="cannot be written"):
        feedback.add(tmp_path / "blocked" / "x.jsonl", talk, True)
