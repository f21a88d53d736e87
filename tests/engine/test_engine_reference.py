"""The reference log-probs on disk: what changes a key and what does not; damage, clearing, stopping."""

import sqlite3
import threading

import numpy as np
import pytest
import torch
from peft import get_peft_model

from kto_core.engine import cache_size, clear_cache
from kto_core.engine.adapters import Reference
from kto_core.engine.packing.groups import Ragged, TokenRows
from kto_core.engine.reference import ReferenceCache, ReferenceScores, checksum, row_key, scorer_key
from kto_core.errors import Cancelled
from tests.support import oracle


def adapted(**extra):
    return get_peft_model(oracle.base_model(), oracle.lora(**extra))


def key_of(model, dtype="float32"):
    return scorer_key(model, Reference(model).key, dtype)


def test_the_key_survives_whatever_does_not_change_the_number():
    key = key_of(adapted())
    torch.manual_seed(99)  # another start of A, another dropout: a fresh adapter still changes nothing
    other = get_peft_model(oracle.base_model(), oracle.lora(lora_dropout=0.1))
    assert key_of(other) == key
    from peft import LoraConfig

    small = LoraConfig(r=2, lora_alpha=64, target_modules=["q_proj"], task_type="CAUSAL_LM")
    assert key_of(get_peft_model(oracle.base_model(), small)) == key


def test_the_key_changes_with_weights_adapter_and_dtype():
    keys = {key_of(adapted()), key_of(adapted(), "bfloat16")}
    model = adapted()
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[3, 5] += 1e-6
    keys.add(key_of(model))
    model = adapted()
    oracle.fill_adapter(model, 1)
    keys.add(key_of(model))
    oracle.fill_adapter(model, 2)
    keys.add(key_of(model))
    keys.add(key_of(adapted().to(torch.bfloat16)))
    assert len(keys) == 6


def test_the_key_changes_with_what_the_adapter_is_multiplied_with():
    keys = set()
    for extra in ({"lora_alpha": 8}, {"lora_alpha": 64}, {"lora_alpha": 8, "use_rslora": True}):
        model = adapted(**extra)
        oracle.fill_adapter(model, 1)
        keys.add(key_of(model))
    assert len(keys) == 3


def test_the_key_changes_with_the_numbers_of_the_configuration():
    same, other = adapted(), adapted()
    same.config.use_cache, same.config.eos_token_id = False, 3  # nothing that a log-prob depends on
    other.config.rms_norm_eps = 1e-3
    assert key_of(same) == key_of(adapted()) != key_of(other)


def test_the_key_changes_with_quantization(tmp_path):
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    oracle.base_model(hidden_size=128).save_pretrained(tmp_path)
    keys = set()
    for kind in ("nf4", "fp4"):
        for double in (False, True):
            quantization = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double,
                bnb_4bit_compute_dtype=torch.float32,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantization)
            keys.add(key_of(get_peft_model(model, oracle.lora())))
    assert len(keys) == 4


def test_a_rows_key_is_its_tokens():
    ids = np.arange(10, dtype=np.int32)
    keys = {row_key(b"s", ids[:4], ids[4:]), row_key(b"s", ids[:5], ids[5:]), row_key(b"t", ids[:4], ids[4:])}
    assert len(keys) == 3
    assert row_key(b"s", ids[:4].copy(), ids[4:].copy()) in keys


def test_checksum_sees_any_bit_and_any_order():
    base = torch.arange(1000, dtype=torch.float32)
    found = {checksum(base)}
    for i in (0, 500, 999):
        other = base.clone()
        other[i] = torch.nextafter(other[i], torch.tensor(1e9))
        found.add(checksum(other))
    swapped = base.clone()
    swapped[[3, 4]] = swapped[[4, 3]]
    found.add(checksum(swapped))
    found.add(checksum(torch.arange(7, dtype=torch.uint8)))
    found.add(checksum(torch.arange(7, dtype=torch.uint8).flip(0)))
    assert len(found) == 7
    assert checksum(base.view(10, 100).t().contiguous().t()) == checksum(base)


def scores(tmp_path, calls, cache=True):
    rows = TokenRows(Ragged.of([[1, 2], [1, 3], [4]]), Ragged.of([[5], [6, 7], [8]]), np.array([True, False, True]))

    def score(prompts, completions, done):
        values = [-float(p.sum() + 100 * c.sum()) for p, c in zip(prompts, completions, strict=True)]
        calls.append(len(prompts))
        for i, v in enumerate(values):
            done([i], [v])

    return ReferenceScores(rows, b"scorer", score, ReferenceCache(tmp_path) if cache else None)


PAIRS = [(0, 0), (1, 1), (2, 2), (0, 1), (1, 2)]
VALUES = [-503.0, -1304.0, -804.0, -1303.0, -804.0]


def test_computed_once_then_read(tmp_path):
    calls = []
    first = scores(tmp_path, calls)
    assert first.prepare(PAIRS) == {"pairs": 5, "cached": 0, "computed": 5}
    assert first.values(PAIRS).tolist() == VALUES
    again = scores(tmp_path, calls)
    assert again.prepare([*PAIRS, (2, 0)]) == {"pairs": 6, "cached": 5, "computed": 1}
    assert again.values(PAIRS).tolist() == VALUES
    assert calls == [5, 1]
    assert scores(tmp_path, calls, cache=False).prepare(PAIRS)["computed"] == 5


def test_a_damaged_file_is_computed_again(tmp_path):
    calls = []
    scores(tmp_path, calls).prepare(PAIRS)
    file = tmp_path / "reference" / "logps.sqlite"
    data = bytearray(file.read_bytes())
    for damage in (b"not a database at all" * 50, bytes(data[:100]) + b"\xff" * (len(data) - 100), b""):
        file.write_bytes(damage)
        other = scores(tmp_path, calls)
        assert other.prepare(PAIRS)["computed"] == 5
        assert other.values(PAIRS).tolist() == VALUES
        assert scores(tmp_path, calls).prepare(PAIRS)["computed"] == 0
    with sqlite3.connect(file) as db:  # a value that is no number is not used
        db.execute("UPDATE logps SET value = 'x'")
    assert scores(tmp_path, calls).prepare(PAIRS)["computed"] == 5


def test_size_and_clearing(tmp_path):
    assert cache_size(tmp_path) == 0
    scores(tmp_path, []).prepare(PAIRS)
    size = cache_size(tmp_path)
    assert size > 0
    assert clear_cache(tmp_path) == size
    assert cache_size(tmp_path) == 0
    assert scores(tmp_path, []).prepare(PAIRS)["computed"] == 5


def test_a_stopped_scoring_keeps_what_it_has(tmp_path):
    cancel, seen = threading.Event(), []

    def progress(fraction, text):
        seen.append((fraction, text))
        if fraction and fraction >= 0.4:
            cancel.set()

    with pytest.raises(Cancelled):
        scores(tmp_path, []).prepare(PAIRS, progress, cancel)
    assert seen[0][0] == 0.0 and "5 answers" in seen[0][1]
    assert scores(tmp_path, []).prepare(PAIRS) == {"pairs": 5, "cached": 2, "computed": 3}


def test_when_one_process_is_cancelled_all_are(tmp_path):
    """Each takes part in the join, where it hears of the others: nobody waits for one that is gone."""
    cancel, seats, ends = threading.Event(), threading.Barrier(2, timeout=20), {}
    cancel.set()
    heard: list[tuple[dict, bool]] = [({}, False), ({}, False)]

    def share(rank):
        def shared(todo):
            def join(values, stopped):
                heard[rank] = values, stopped
                seats.wait()
                (one, one_stopped), (other, other_stopped) = heard
                seats.wait()
                return one | other, one_stopped or other_stopped

            return slice(rank * todo // 2, (rank + 1) * todo // 2), join

        return shared

    def process(rank):
        mine = scores(tmp_path / str(rank), [])
        mine.share = share(rank)
        try:
            mine.prepare(PAIRS, cancel=cancel if rank else None)
        except Exception as e:
            ends[rank] = type(e)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert ends == {0: Cancelled, 1: Cancelled}
    assert scores(tmp_path / "0", []).prepare(PAIRS)["cached"] == 2  # what was computed is kept


def test_a_trained_adapter_is_its_own_frozen_reference():
    model = oracle.tuned_model("llama", torch.float32)
    reference = Reference(model)
    prompts, completions, _ = oracle.random_rows(2)
    with torch.no_grad():
        start = float(oracle.logp(model, prompts[0], completions[1]))
        oracle.fill_adapter(model, 7)
        trained = float(oracle.logp(model, prompts[0], completions[1]))
        with reference.active():
            assert float(oracle.logp(model, prompts[0], completions[1])) == start != trained
        assert float(oracle.logp(model, prompts[0], completions[1])) == trained
    assert list(model.peft_config) == ["default"]
