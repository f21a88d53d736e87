"""Chat: streaming, base and tuned, stopping, limits of the context, errors, rated answers."""

import json
import threading
import time

import pytest

from kto_core.chat import chat
from kto_core.chat.context_window import fit
from kto_core.data import feedback
from kto_core.errors import BusyError, Cancelled, DiskError, ModelError, Unloaded
from kto_core.runs import folders
from kto_core.training import start as starting
from tests.support.training import make_data, resolved

ASK = [{"role": "user", "content": "What is 2 plus 2?"}]


@pytest.fixture(scope="module")
def trained(tiny_model, tmp_path_factory):
    """A finished run of the tiny model, and its folder."""
    folder = tmp_path_factory.mktemp("chat") / "run"
    data = make_data(folder.parent / "data.jsonl")
    made = folders.create(resolved(tiny_model, data, max_steps=4, save_steps=2, output_dir=str(folder)))
    starting.start(made, block=True)
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

    from kto_core.data.rendering.template import render_chat

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

    from kto_core.chat.sampling import sampler

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
    from kto_core.data.rendering import template

    seen = []
    real = template.render_chat
    monkeypatch.setattr(template, "render_chat", lambda m, *a: seen.append(m) or real(m, *a))
    turns = [{"role": r, "content": f"{r} {i} " + "x" * 60} for i in range(6) for r in ("user", "assistant")]
    say(loaded, [{"role": "system", "content": "S"}, *turns, *ASK])
    assert loaded.stats["forgotten"] > 0 and seen[-1][0]["content"] == "S" and seen[-1][-1] == ASK[0]
    assert seen[-1][1]["role"] == "user"
    with pytest.raises(ModelError, match="tokens, but the model accepts at most"):
        say(loaded, [{"role": "user", "content": "x" * 2000}])


def conversation(turns: int) -> list[dict]:
    said = [{"role": ("user", "assistant")[i % 2], "content": f"Short turn {i}."} for i in range(turns)]
    return [{"role": "system", "content": "Be brief."}, *said, *ASK]


def test_a_long_conversation_is_fitted_by_halving(demo_model):
    """What is kept is what leaving out one turn after the other keeps."""
    from kto_core.data.rendering.template import render_chat
    from kto_core.models.load import load_tokenizer

    tokenizer, rendered = load_tokenizer(str(demo_model)), []

    def render(messages):
        rendered.append(messages)
        return render_chat(messages, tokenizer)

    messages = conversation(2000)
    started = time.perf_counter()
    ids, forgotten = fit(messages, render, 7680, lambda: None)
    assert time.perf_counter() - started < 5  # a tenth of that on an idle core
    assert len(rendered) <= 12
    kept = [messages[0], *messages[1 + forgotten :]]
    assert kept[1]["role"] == "user" and kept[-1] == ASK[0] and ids == render_chat(kept, tokenizer)
    more = render_chat([messages[0], *messages[forgotten - 1 :]], tokenizer)
    assert len(ids) <= 7680 < len(more), "one question more would not have fitted"
    for turns in range(12):
        short = conversation(turns * 2)
        for room in range(5, 60, 6):
            everything = [(2 * i, len(short[1 + 2 * i :]) * 3 + 3) for i in range(turns + 1)]
            wanted = next((start for start, size in everything if size <= room), None)
            if wanted is None:
                with pytest.raises(ModelError, match="6 tokens, but the model accepts at most 5"):
                    fit(short, lambda m: [0] * (3 * len(m)), room, lambda: None)
            else:
                assert fit(short, lambda m: [0] * (3 * len(m)), room, lambda: None)[1] == wanted


def test_fitting_ends_when_nobody_wants_the_answer(trained, monkeypatch):
    from kto_core.data.rendering import template

    one, stop, rendered = chat.Chat.load(trained), threading.Event(), []
    real = template.render_chat

    def render(messages, *args):
        rendered.append(len(messages))
        if len(rendered) == 2:
            ends()
        return real(messages, *args)

    monkeypatch.setattr(template, "render_chat", render)
    ends = stop.set
    with pytest.raises(Cancelled):
        list(one.stream(conversation(2000), cancel=stop))
    assert len(rendered) == 2
    rendered.clear()
    ends = one._closed.set
    with pytest.raises(Unloaded):
        list(one.stream(conversation(2000)))
    assert len(rendered) == 2
    one.unload()


def test_checkpoints_and_what_is_not_there(trained):
    config, adapter, name = chat.resolve(trained, checkpoint="2")
    assert adapter.name == "checkpoint-2" and name == trained.id and config.model
    assert chat.resolve(trained)[1] == trained.adapter
    with pytest.raises(ModelError, match="checkpoints: 2, 4"):
        chat.resolve(trained, checkpoint="3")
    with pytest.raises(ModelError, match="is not a run"):
        chat.resolve("demo", checkpoint="3")
    with pytest.raises(ModelError):
        chat.Chat.load("/no/such/model")


def test_a_broken_adapter_is_said(trained, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(trained.path, copy)
    (copy / "adapter" / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ModelError, match="cannot be loaded"):
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
    from kto_core.hardware.gpu_owner import claim

    monkeypatch.setenv("KTO_STUDIO_CLAIM", "1")
    with claim("train", "20260101-x"), pytest.raises(BusyError, match="20260101-x is training"):
        chat.load(trained)
    one = chat.load(trained)
    with pytest.raises(BusyError, match="loaded for chat"), claim("train", "other"):
        pass
    one.unload()
    with claim("train", "other"):
        pass


def test_unload_ends_a_running_answer(trained):
    one = chat.Chat.load(trained)
    stream = one.stream(ASK, temperature=0, max_new_tokens=100000)
    next(stream)
    told = []

    def read():
        with pytest.raises(Unloaded, match="before the answer was complete"):
            list(stream)
        told.append(True)

    reader = threading.Thread(target=read)
    reader.start()
    one.unload()
    reader.join(20)
    assert not reader.is_alive() and one.model is None and told


def test_unload_does_not_wait_for_who_reads_the_answer(trained):
    """A page that was closed, or whose line is slow, does not take the next piece."""
    one = chat.Chat.load(trained)
    stream = one.stream(ASK, temperature=0, max_new_tokens=100000)
    next(stream)
    owner = threading.Thread(target=one.unload, daemon=True)
    owner.start()
    owner.join(20)
    assert not owner.is_alive() and one.model is None
    with pytest.raises(Unloaded):
        list(stream)


def test_unload_ends_the_reading_of_a_long_prompt_between_two_layers(trained):
    from transformers.modeling_layers import GradientCheckpointingLayer

    one = chat.Chat.load(trained)
    layers = [m for m in one.model.modules() if isinstance(m, GradientCheckpointingLayer)]
    ran, owner = [], threading.Thread(target=one.unload)

    def unload(*_):
        ran.append(0)
        owner.start()
        assert one._closed.wait(20)

    layers[0].register_forward_pre_hook(unload)
    layers[1].register_forward_hook(lambda *_: ran.append(1))
    with pytest.raises(Unloaded, match="before the answer was complete"):
        list(one.stream(ASK))
    owner.join(20)
    assert ran == [0] and not owner.is_alive() and one.model is None


def test_who_gives_way_is_served_last(loaded):
    order, stop = [], threading.Event()
    loaded._answering.acquire()  # somebody is being answered

    def ask(name, **options):
        list(loaded.stream(ASK, max_new_tokens=1, cancel=stop, **options))
        order.append(name)

    guests = [threading.Thread(target=ask, args=("guest",), kwargs={"gives_way": True}) for _ in range(3)]
    owner = threading.Thread(target=ask, args=("owner",))
    for thread in guests:
        thread.start()
    assert loaded.answering, "the one who holds it does not give way"
    loaded._gives_way = True
    assert not loaded.answering, "a guest's answer may be cut off"
    owner.start()
    while not loaded._first:
        assert owner.is_alive()
    assert loaded.answering
    loaded._answering.release()
    for thread in (*guests, owner):
        thread.join(60)
    assert order == ["owner", "guest", "guest", "guest"] and not loaded.answering


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
    from kto_core.data import dataset

    assert dataset.load(str(file)).report.kept == 1
    with pytest.raises(ModelError, match="rated"):
        feedback.add(file, ASK, True)
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(DiskError, match="is not writable"):
        feedback.add(tmp_path / "blocked" / "x.jsonl", talk, True)
