"""The library behind KTO Studio: data, presets, training, chat and export. Never imports gradio."""

import os
import sys

from kto_core.guards.no_statistics import switch_off

__version__ = "0.1.0"

switch_off()  # before any other library is imported

os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # as NVML, which the memory plan asks, numbers the cards
if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
    # torch reads it when it first takes GPU memory: blocks that grow leave no holes between batches of unequal size
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
