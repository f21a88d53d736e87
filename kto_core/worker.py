"""``python -m kto_core.worker RUN``: what `accelerate launch`, and a run in a process of its own, start."""

from kto_core.training.worker import run

if __name__ == "__main__":
    run()
