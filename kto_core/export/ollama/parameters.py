"""What a Modelfile says beside the template: sampling, context, and where an answer stops."""

from __future__ import annotations

LEAST_CONTEXT = 4096  # Ollama's own default, in tokens
SAMPLING = {  # name in generation_config.json -> (Ollama's name, name of the field in a GGUF file)
    "temperature": ("temperature", "temp"),
    "top_p": ("top_p", "top_p"),
    "top_k": ("top_k", "top_k"),
    "min_p": ("min_p", "min_p"),
    "repetition_penalty": ("repeat_penalty", "penalty_repeat"),
}
Value = float | int


def sampling(generation: dict, in_file: dict) -> dict[str, Value]:
    """The model's own sampling, by Ollama's names.

    Args:
        generation: the model's generation_config.json, or {}. in_file: fields ``general.sampling.*`` of a GGUF file,
            by their last part; used where ``generation`` says nothing at all.
    """
    if generation:
        found = {ours: generation.get(theirs) for theirs, (ours, _) in SAMPLING.items()}
        found = {} if generation.get("do_sample") is False else found
    else:
        found = {ours: in_file.get(field) for ours, field in SAMPLING.values()}
    return {name: _short(v) for name, v in found.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def _short(value: Value) -> Value:
    """A number of a GGUF file is a float32: 0.6 comes back as 0.6000000238."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def context(trained: int, at_most: int | None) -> int:
    """Tokens of context: what the run was trained with, at least Ollama's default, at most what the model has."""
    return min(max(LEAST_CONTEXT, trained), at_most or trained or LEAST_CONTEXT)
