"""What the sweep of `learning.py` needs, in one folder that travels: token ids and packed weights.

``data --out INPUTS --model NAME=FOLDER … --set NAME=FILE … [--heldout NAME=FILE]`` encodes every data set for every
model with the product's own code. ``weights --gguf FILE --like FOLDER --out FOLDER`` packs a GGUF's tensors as they
are, 4 to 8 bits a weight, beside a model's configuration and tokenizer; ``unpack FOLDER`` makes ``model.safetensors``
of them on the other machine, in seconds. ``gemma-tokenizer`` makes the one of a Gemma GGUF, whose merges transformers
loses.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from kto_core.data.splitting import question  # noqa: E402

HELD_OUT = 0.1
MAX_LENGTH = 2048
KEPT = ("optim", "lr_scheduler_type", "warmup_ratio", "max_grad_norm", "weight_decay", "target_modules")
BLOCKS = "blocks.safetensors"
# a base model has not learnt what a chat template's marks mean: Gemma's own end of a turn comes 35 nats too dear to it
PLAIN = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] + '\n\n' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ 'Assistant: ' + (message['content'] or '') + eos_token + '\n\n' }}"
    "{% else %}{{ 'User: ' + message['content'] + '\n\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


# ---- rows ------------------------------------------------------------------------------------------------------------


def split(rows: list, share: float, seed: int = 0) -> tuple[list[int], list[int]]:
    """Numbers of (training, held-out) rows: all rows of a question on one side, at most ``share`` held out.

    The recorded sweeps were made with it. Runs hold rows out by `kto_core.data.splitting.split_rows`, which also keeps
    the share of each label.
    """
    groups: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(question(row), []).append(i)
    order, held = list(groups.values()), []
    for k in np.random.default_rng(seed).permutation(len(order)):
        if len(held) + len(order[k]) <= share * len(rows):
            held += order[k]
    return sorted(set(range(len(rows))) - set(held)), sorted(held)


def encoded(rows: list, tokenizer, max_length: int) -> list:
    """(row, `template.Encoded`) of the rows that fit."""
    from kto_core.data.rendering import template

    found = template.encode_rows(rows, tokenizer, max_length)
    return [(r, e) for r, e in zip(rows, found, strict=True) if e.trained]


def ends(tokenizer, folder: Path) -> list[int]:
    """Token ids that end an answer: the template's and the model's own."""
    file = Path(folder) / "generation_config.json"
    own = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    return sorted({tokenizer.eos_token_id, *(own if isinstance(own, list) else [] if own is None else [own])})


def pack(file: Path, train: list, held: list, tokenizer, folder: Path) -> dict:
    """Write one setting's ``.npz``; returns its facts."""
    from kto_core.engine.packing.groups import Ragged

    arrays = {"ends": np.array(ends(tokenizer, folder)), "pad": np.array(tokenizer.pad_token_id)}
    for side, pairs in (("train", train), ("held", held)):
        for name in ("prompt", "completion"):
            ids = Ragged.of([getattr(e, f"{name}_ids") for _, e in pairs])
            arrays |= {f"{side}_{name}": ids.flat, f"{side}_{name}_offsets": ids.offsets}
        arrays[f"{side}_labels"] = np.array([r.label for r, _ in pairs], bool)
    questions = [question(r) for r, _ in held]
    arrays["clusters"] = np.unique(questions, return_inverse=True)[1]
    np.savez_compressed(file, **arrays)
    lengths = [len(e.prompt_ids) + len(e.completion_ids) for _, e in train]
    return {
        "rows": len(train),
        "desirable": sum(r.label for r, _ in train),
        "held": len(held),
        "held_questions": len(set(questions)),
        "median_tokens": float(np.median(lengths)),
        "median_answer": float(np.median([len(e.completion_ids) for _, e in train])),
        "longest": max(lengths),
    }


def prepare(
    out: Path, models: dict, sets: dict, heldout: dict, skip: list[str], dtypes: dict, max_length: int = MAX_LENGTH
) -> dict:
    """Encode every set for every model into ``out`` and write ``settings.json``, which is returned. The models' folders
    are to be put below ``out/models``.

    Args:
        models: name -> folder. sets: name -> file. heldout: name -> file with a set's held-out rows; else a tenth of
            the set's questions is held out. skip: settings (``MODEL-SET``) that are not made. dtypes: name -> number
            format of the weights on a GPU; else float32.
    """
    from kto_core.config import resolving
    from kto_core.data import dataset
    from kto_core.models.load import load_tokenizer

    out.mkdir(parents=True, exist_ok=True)
    defaults = resolving.RunConfig().model_dump()
    listed = {"defaults": {k: defaults[k] for k in KEPT}, "models": {}, "settings": {}}
    for model, folder in models.items():
        listed["models"][model] = {"folder": f"models/{model}", "dtype": dtypes.get(model, "float32")}
        tokenizer = load_tokenizer(str(folder))
        for name, file in sets.items():
            setting = f"{model}-{name}"
            if setting in skip:
                continue
            rows = list(dataset.load(str(file)).rows)
            if name in heldout:
                held = list(dataset.load(str(heldout[name])).rows)
                asked = {question(r) for r in held}
                train = [r for r in rows if question(r) not in asked]
            else:
                train, held = ([rows[i] for i in part] for part in split(rows, HELD_OUT))
            train, held = (encoded(part, tokenizer, max_length) for part in (train, held))
            facts = pack(out / f"{setting}.npz", train, held, tokenizer, folder)
            listed["settings"][setting] = {"model": model, "data": name, **facts}
            print(setting, facts, flush=True)
    (out / "settings.json").write_text(json.dumps(listed, indent=1))
    return listed


# ---- weights ---------------------------------------------------------------------------------------------------------

LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm",
}  # fmt: skip
NORMS = {
    "llama": {"ffn_norm": "post_attention_layernorm"},
    "gemma3_text": {
        "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
    },
}  # fmt: skip


def hf_name(name: str, model_type: str) -> str:
    """transformers' name of a GGUF's tensor."""
    if name.startswith("blk."):
        _, number, rest = name.split(".", 2)
        return f"model.layers.{number}.{(LAYER | NORMS[model_type])[rest.removesuffix('.weight')]}.weight"
    return {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}[name]


def pack_weights(gguf_file: Path, like: Path, out: Path) -> None:
    """``out``: the tensors of a GGUF as they are, and configuration and tokenizer of ``like``."""
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    out.mkdir(parents=True, exist_ok=True)
    for file in like.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "manifest.json":
            shutil.copy(file, out / file.name)
    kind = json.loads((like / "config.json").read_text())["model_type"]
    tensors = GGUFReader(gguf_file).tensors
    kinds = {hf_name(t.name, kind): str(int(t.tensor_type)) for t in tensors}
    save_file({hf_name(t.name, kind): np.ascontiguousarray(t.data) for t in tensors}, out / BLOCKS, metadata=kinds)


def unpacked(folder: Path) -> dict:
    """Tensors (fp32) of `pack_weights`, as transformers reads them off the GGUF."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize
    from safetensors import safe_open

    shape, tensors = json.loads((folder / "config.json").read_text()), {}
    heads = {"q_proj": shape["num_attention_heads"], "k_proj": shape["num_key_value_heads"]}
    with safe_open(folder / BLOCKS, "numpy") as f:
        for name, kind in f.metadata().items():
            w = dequantize(f.get_tensor(name), GGMLQuantizationType(int(kind)))
            if shape["model_type"] == "llama" and (n := heads.get(name.split(".")[-2])):
                w = w.reshape(n, w.shape[0] // n // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)  # rotary halves
            if shape["model_type"] == "gemma3_text" and "norm" in name:
                w = w - 1
            tensors[name] = w
    return tensors


def unpack(folder: Path, dtype: str) -> None:
    """Make ``folder/model.safetensors``, whole or not at all."""
    import torch
    from safetensors.torch import save_file

    if (folder / "model.safetensors").exists():
        return
    found = {name: torch.from_numpy(np.ascontiguousarray(w)) for name, w in unpacked(folder).items()}
    tensors = {name: w.to(getattr(torch, dtype)) for name, w in found.items()}
    part = folder / "model.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.rename(folder / "model.safetensors")


def gemma_tokenizer(gguf_file: Path, out: Path) -> None:
    """Gemma's tokenizer from a GGUF's tokens and scores: each way to make one of two is a merge, best score first."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(gguf_file).fields
    tokens, scores, types = (fields[f"tokenizer.ggml.{k}"].contents() for k in ("tokens", "scores", "token_type"))
    vocabulary, merges = {t: i for i, t in enumerate(tokens)}, []
    for token, i in vocabulary.items():
        if types[i] == 1 or set(token) == {"▁"}:
            halves = ((token[:k], token[k:]) for k in range(1, len(token)))
            merges += [(-scores[i], len(a), len(b), a, b) for a, b in halves if a in vocabulary and b in vocabulary]
    merges = [m[3:] for m in sorted(merges)]
    backend = Tokenizer(models.BPE(vocabulary, merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    of_kind = {k: [t for t, kind in zip(tokens, types, strict=True) if kind == k] for k in (3, 4)}
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in of_kind[3]])
    backend.add_tokens([AddedToken(t, normalized=False) for t in of_kind[4]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        model_max_length=32768, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.chat_template = PLAIN
    tokenizer.save_pretrained(out)


def named(values: list[str]) -> dict[str, str]:
    return dict(v.split("=", 1) for v in values)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    data = verbs.add_parser("data")
    for flag in ("--model", "--dtype", "--set", "--heldout"):
        data.add_argument(flag, action="append", default=[], metavar="NAME=PLACE")
    data.add_argument("--skip", action="append", default=[], metavar="MODEL-SET")
    data.add_argument("--max-length", type=int, default=MAX_LENGTH)
    weights, tokenizer, back = (verbs.add_parser(v) for v in ("weights", "gemma-tokenizer", "unpack"))
    for p in (weights, tokenizer):
        p.add_argument("--gguf", type=Path, required=True)
    weights.add_argument("--like", type=Path, required=True)
    for p in (data, weights, tokenizer):
        p.add_argument("--out", type=Path, required=True)
    back.add_argument("folder", type=Path)
    back.add_argument("--dtype", default="float32")
    args = parser.parse_args(argv)
    if args.verb == "data":
        sets, held = named(args.set), named(args.heldout)
        prepare(args.out, named(args.model), sets, held, args.skip, named(args.dtype), args.max_length)
    elif args.verb == "weights":
        pack_weights(args.gguf, args.like, args.out)
    elif args.verb == "unpack":
        unpack(args.folder, args.dtype)
    else:
        gemma_tokenizer(args.gguf, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
