"""Two runs of the tiny model and votes without a model."""

import pytest

from kto_core.runs import folders
from kto_core.training import start as starting
from kto_core.vote import folder
from kto_core.vote.sides import Side
from tests.support.training import make_data, resolved

ANSWERS = {"a": "The short one.", "b": "The long one, which says the same in more words."}


@pytest.fixture(scope="session")
def two_runs(tiny_model, tmp_path_factory):
    """Two finished runs of the tiny model; the first one held rows out."""
    home, made = tmp_path_factory.mktemp("runs"), []
    data = make_data(home / "data.jsonl", rows=60)
    for name, seed in (("one", 1), ("two", 2)):
        settings = {
            "max_steps": 4,
            "save_steps": 2,
            "learning_rate": 0.05,
            "test_size": 0.3,
            "verdict": False,
        }
        run = folders.create(resolved(tiny_model, data, output_dir=str(home / name), seed=seed, **settings))
        starting.start(run, block=True)
        assert run.state().state == "finished", run.state().message
        made.append(run)
    return made


@pytest.fixture
def sides():
    return Side("tiny", "one", "", "/runs/one"), Side("tiny")


@pytest.fixture
def session(sides):
    """A vote with ten prompts, all of them answered."""
    return answered(folder.create(*sides, seed=5), 10)


def answered(session, count: int, answers=None):
    """Prompts, and for each a pair of answers; ``answers(number)`` gives them by side."""
    from kto_core.vote.entries import Answer

    session.add_prompts([{"role": "user", "content": f"Question {i}?"}] for i in range(count))
    for number, _ in session.unanswered():
        said = answers(number) if answers else ANSWERS
        session.add_pair(number, {key: Answer(text) for key, text in said.items()})
    return session


def choose(session, side: str) -> str:
    """Vote for a side, wherever its answer is shown, on the pair that waits; gives where that was."""
    number = session.shown().number
    place = next(p for p in ("left", "right") if session._pairs[number].side(p) == side)
    session.vote(number, place)
    return place
