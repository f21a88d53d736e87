"""An adapter into its base: 16-bit weights in a plain model folder. Runs in a child process (`kto_core.guards.child`).

Which base. A plain checkpoint is loaded as it lies on the disk, never quantized, even if training quantized it on the
fly. A checkpoint that is itself 4-bit (bitsandbytes, MXFP4) is dequantized: the adapter is the difference to exactly
those weights, so base + adapter is the model that was trained, evaluated and talked to; the full-precision
sibling would be another one, and may not be on this machine.

Which rounding. KTO's steps are small: with 8 bits of mantissa most of an update is less than half a unit in the last
place, and rounding to nearest would put every such weight back where it was. The sum is formed in fp32 and, where the
base already lies on the 16-bit grid, rounded stochastically (seeded by the layer's name): right on average, so the
update survives.

Which way. `merge.shards` reads, merges and writes one tensor after another and needs the memory of a few. `merge.whole`
loads the model, for what has to be put together anew; both give the same weights, bit by bit.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from kto_core.guards.child import tell

from .checks import require_memory_whole
from .config_keys import carry_processor, write_both
from .merge import plan, shards, whole

FACTS = "export.json"  # in the merged folder: what it was made of


def merge(base: str, adapter: str, part: str, public_base: str, facts: dict) -> dict:
    """Write the merged model into the folder ``part``; what an earlier merge of the same finished there is used.

    Args:
        base: folder of the base model. adapter: folder of the PEFT adapter (safetensors).
        public_base: the base's name for others, kept in the config.
        facts: what the caller wants to find in ``export.json``; ``source`` in it stands for base and adapter.

    Returns:
        ``facts`` plus ``dtype``, ``largest`` (greatest magnitude of a weight), ``layers`` (merged ones) and ``kept``:
        the share of the adapter's change that survived rounding, its projection (1 is all).

    Raises:
        ModelError: base or adapter cannot be loaded, or they do not fit together.
        HardwareError: not enough memory for a model that has to be loaded whole.
        ExportError: a quantization that cannot be undone; a merged weight is not finite.
    """
    from kto_core.models import load as models
    from kto_core.models.tokenizer import save_tokenizer

    folder = Path(part)

    def told(fraction: float, text: str) -> None:
        tell(fraction, text)

    made = plan.plan(Path(base), adapter, told)
    if made is not None:
        found = shards.run(made, folder, str(facts.get("source", "")), public_base, told)
    else:
        require_memory_whole(Path(base))
        found = whole.merge_whole(base, adapter, folder, public_base, told)
    facts = facts | found
    write_both(folder, Path(base))
    carry_processor(folder, Path(base))
    save_tokenizer(models.load_tokenizer(base), folder)
    (folder / FACTS).write_text(json.dumps(facts, indent=1))
    (folder / shards.STATE).unlink(missing_ok=True)
    for file in folder.iterdir():
        os.chmod(file, 0o644)  # safetensors writes 0600: others could not read what is shared
    return facts
