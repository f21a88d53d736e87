"""No library tells anybody that it is used, nor fetches native code: set before the first of them is imported.

Children inherit it. Standard library only.
"""

from __future__ import annotations

import os

OFF = {
    "DO_NOT_TRACK": "1",  # what several libraries agree on
    "DISABLE_TELEMETRY": "1",  # Hugging Face's, all of them
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "UNSLOTH_DISABLE_STATISTICS": "1",
    "WANDB_ERROR_REPORTING": "false",  # a run that asks for W&B sends its metrics; crashes go nowhere
    "USE_HUB_KERNELS": "0",  # transformers would fetch compiled kernels from the Hub where `kernels` is installed
}


def switch_off() -> None:
    os.environ.update(OFF)
