"""Models that also take images or sound, used for text: their class in transformers and their language model.

A wrapper keeps its own class and names, so that its adapter and its merged weights are what other programs expect.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def is_wrapper(config) -> bool:
    """Whether a transformers config has its language model's nested inside."""
    return config.get_text_config() is not config


def auto_class(config):
    """transformers' auto class that builds the model of this config with all of its parts."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    whole = is_wrapper(config) and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if whole else AutoModelForCausalLM


def class_of(config) -> type | None:
    """The class that `auto_class` takes for this config; None where transformers has none."""
    mapping = auto_class(config)._model_mapping
    return mapping.get(type(config), None)


def functions_of(config) -> set[str]:
    """Names in the modeling file of this config's language model."""
    from transformers import AutoModel

    decoder = AutoModel._model_mapping.get(type(config.get_text_config()), None)
    return set(vars(sys.modules[decoder.__module__])) if isinstance(decoder, type) else set()


def decoder_of(causal) -> torch.nn.Module:
    """The decoder of a causal LM or wrapper: token ids in, hidden states after the final norm out."""
    own = getattr(causal, causal.base_model_prefix, None)
    return causal.get_decoder() if own is None or is_wrapper(causal.config) else own


def decoder_name(causal) -> str:
    """The decoder's name in the model, "" where it is no part of it."""
    decoder = decoder_of(causal)
    return next(name for name, module in causal.named_modules() if module is decoder)
