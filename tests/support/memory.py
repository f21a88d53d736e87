"""A 24 GiB card and rows for memory plans."""

from kto_core.config import resolving as config
from kto_core.hardware.gpus import Device

CARD = Device(0, "24 GiB card", 24.0, 23.6, 0.4, (8, 6))


LENGTHS = [470] * 1000 + [900] * 30


# the models with which these presets were measured
MEASURED = {
    "3b": "unsloth/Qwen2.5-3B-Instruct-bnb-4bit",
    "7b": "unsloth/mistral-7b-instruct-v0.3-bnb-4bit",
    "13b": "unsloth/Qwen2.5-14B-Instruct-bnb-4bit",
}


def resolve(preset="7b", **overrides):
    model = {"model": MEASURED[preset]} if preset in MEASURED else {}
    return config.resolve(preset, model | overrides).config
