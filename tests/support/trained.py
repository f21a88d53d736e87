"""A training in this process, and the weights that it leaves."""

from kto_core.training.train import train
from tests.support.training import resolved, state


def run(model, data, folder, **overrides):
    train(resolved(model, data, **overrides).config, folder)
    return state(folder)


def weights(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")
