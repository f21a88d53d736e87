"""Two models on one set of weights answer for a vote: whose answer is whose, what stops them, what is refused."""

import threading

import pytest

from kto_core.chat import chat
from kto_core.errors import Cancelled, ModelError
from kto_core.runs import folders
from kto_core.vote import ahead, folder, sides
from kto_core.vote.ahead import WAITING, Ahead
from tests.support.training import make_data, resolved

ASK = [{"role": "user", "content": "What is 2 plus 2?"}]
DRAW = {"temperature": 1.0, "max_new_tokens": 60, "top_p": 1.0, "top_k": 0}


def say(loaded, **options):
    return "".join(loaded.stream(ASK, **DRAW | {"seed": 3} | options))


@pytest.fixture(scope="module")
def loaded(two_runs):
    one = chat.Chat.load(str(two_runs[0].path))
    yield one
    one.unload()


@pytest.fixture(scope="module")
def alone(two_runs):
    """What each run says when it is loaded by itself, and what the base model says."""
    said = []
    for run in two_runs:
        one = chat.Chat.load(str(run.path))
        said += [say(one), say(one, tuned=False)]
        one.unload()
    assert said[1] == said[3] and len(set(said)) == 3
    return {"one": said[0], "two": said[2], "base": said[1]}


def test_a_second_run_beside_says_what_it_says_alone(loaded, alone, two_runs):
    with pytest.raises(ValueError, match="other"):  # nothing is beside yet
        say(loaded, other=True)
    loaded.join(str(two_runs[1].path))
    for _ in range(2):
        assert say(loaded) == alone["one"] and say(loaded, tuned=False) == alone["base"]
        assert say(loaded, other=True) == alone["two"]
        assert say(loaded, other=True, tuned=False) == alone["two"]
        loaded.join(str(two_runs[1].path))  # again: nothing to do
    stream = loaded.stream(ASK, **DRAW, other=True)
    next(stream)
    stream.close()  # cut off in the middle: the run's own adapter is back
    assert say(loaded) == alone["one"]
    loaded.join(str(two_runs[0].path), checkpoint="2")
    assert say(loaded, other=True) not in alone.values() and say(loaded) == alone["one"]


def test_the_decoder_keeps_the_adapters_apart(loaded, alone, two_runs):
    """Here without a graph: a step and a cache of keys belong to one set of weights."""
    from kto_core.chat.decode import Decoder

    loaded.join(str(two_runs[1].path))
    loaded.decoder = Decoder(loaded.model, graph=False)
    try:
        for _ in range(2):
            greedy = [say(loaded, temperature=0, seed=None, **who) for who in ({}, {"tuned": False}, {"other": True})]
            loaded.decoder, decoder = None, loaded.decoder
            plain = [say(loaded, temperature=0, **who) for who in ({}, {"tuned": False}, {"other": True})]
            loaded.decoder = decoder
            assert greedy == plain
    finally:
        loaded.decoder = None


def test_pairs_have_each_sides_own_answer(loaded, two_runs):
    for against in ("base", two_runs[1]):
        a, b = sides.both(two_runs[0], against)
        session = folder.create(a, b, DRAW, seed=11)
        session.add_prompts([[{"role": "user", "content": f"What is {i} plus {i}?"}] for i in range(6)])
        ahead.beside(loaded, session)
        ahead.fill(session, loaded)
        assert session.waiting() == WAITING, "it pauses when enough wait"
        while pair := session.shown():
            session.vote(pair.number, "left")
            ahead.fill(session, loaded)
        assert len(session.pairs()) == 6 and {p.left for p in session.pairs()} == {"a", "b"}
        for pair in session.pairs():
            for key, who in (("a", {}), ("b", {"tuned": False} if b.run == "" else {"other": True})):
                own = "".join(loaded.stream(pair.prompt, **DRAW, seed=pair.seed, **who))
                assert pair.answers[key].text == own.strip()


def test_a_stop_keeps_nothing_half_made(loaded, two_runs, monkeypatch):
    session = folder.create(*sides.both(two_runs[0]), DRAW)
    session.add_prompts([ASK])
    cancel, real = threading.Event(), loaded.stream

    def cut(messages, **options):
        for piece in real(messages, **options):
            yield piece
            cancel.set()

    monkeypatch.setattr(loaded, "stream", cut)
    with pytest.raises(Cancelled):
        ahead.fill(session, loaded, cancel=cancel)
    assert session.pairs() == [] and len(session.unanswered()) == 1


def test_ahead_works_in_the_background_and_says_what_failed(loaded, two_runs):
    session = folder.create(*sides.both(two_runs[0]), DRAW)
    session.add_prompts([[{"role": "user", "content": f"{i}?"}] for i in range(2)])

    def no_model(*_):
        raise ModelError("There is no model.")

    supply = Ahead(session, no_model)
    supply.kick()
    supply.job.wait(20)
    assert supply.job.state == "failed" and supply.job.error == "There is no model."
    supply = Ahead(session, lambda *_: loaded)
    supply.kick()
    supply.job.wait(60)
    assert supply.job.state == "done" and len(session.pairs()) == 2
    job = supply.job
    supply.kick()
    assert supply.job is job, "nothing is left to answer"


def test_what_cannot_be_compared_is_refused_before_anything_is_loaded(two_runs, tiny_model, tmp_path, demo_model):
    from tests.support.training import make_tiny

    data = make_data(tmp_path / "data.jsonl")
    one, two = two_runs
    for run, against, said in (
        ("demo", "base", "demo is not a run"),
        (one, "nothing", "nothing is not a run"),
        (one, one, "compared with itself"),
        (folders.create(resolved(tiny_model, data)), "base", "has not saved anything yet"),
    ):
        with pytest.raises(ModelError, match=said):
            sides.both(run, against)
    a, b = sides.both(one, one, checkpoint="2")
    assert a.name == "run one, step 2" and a.adapter == "one/checkpoint-2" and b.adapter == "one"
    assert a.model == b.model == tiny_model.name, "no path of this machine"

    other = make_tiny(tmp_path / "another", demo_model)
    made = folders.create(resolved(other, data, output_dir=str(tmp_path / "three")))
    (made.path / "checkpoints").symlink_to(two.path / "checkpoints")
    with pytest.raises(ModelError, match=r"was trained on .*, .* on another\. Choose two runs of one base model"):
        sides.both(one, made)
    four = folders.create(resolved(tiny_model, data, output_dir=str(tmp_path / "four"), load_in_4bit=True))
    (four.path / "checkpoints").symlink_to(two.path / "checkpoints")
    with pytest.raises(ModelError, match="four was trained on the base model in 4 bit, one was not"):
        sides.both(one, four)
