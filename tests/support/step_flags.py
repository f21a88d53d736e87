"""Flags of `benchmarks/kto_step.py`."""


def step(*flags: str):
    import kto_step

    return kto_step.arguments(["--data", "rows.jsonl", *flags])
