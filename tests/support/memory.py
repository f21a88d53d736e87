"""A 24 GiB card and rows for memory plans."""

from kto_core.config import resolving as config
from kto_core.hardware.gpus import Device

CARD = Device(0, "24 GiB card", 24.0, 23.6, 0.4, (8, 6))


LENGTHS = [470] * 1000 + [900] * 30


def resolve(preset="7b", **overrides):
    return config.resolve(preset, overrides).config
