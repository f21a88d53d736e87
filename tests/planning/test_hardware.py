"""GPU facts, the memory plan, and the one owner of the GPU."""

import json

import pytest

from kto_core.hardware import gpus
from kto_core.hardware.gpus import GIB, Device
from kto_core.models import shape as model_shape
from kto_core.planning import counting, memory
from tests.support.memory import CARD, LENGTHS, resolve

# ---- the plan -------------------------------------------------------------------------------------------------------


def test_nf4_weights_of_7b():
    """4.127 bits for 6.98 billion weights of linear layers, 16 for the two embeddings and norms."""
    parts = memory.plan(resolve(), LENGTHS, device=CARD).parts
    assert parts["weights"] == pytest.approx((6_979_321_856 * 4.127 / 8 + 268_701_696 * 2) / GIB, rel=1e-3)
    assert parts["adapters"] == pytest.approx(167_772_160 * 8 / GIB, rel=1e-6)
    assert parts["optimizer"] == pytest.approx(167_772_160 * 2.03 / GIB, rel=1e-2)


def test_saved_bytes_of_a_layer_are_what_autograd_saves():
    """The coefficients against saved-tensor hooks on Llama layers of a size that was not fitted."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    hidden, ffn, heads, kv, rank, tokens = 768, 1792, 12, 4, 16, 64

    def saved(layers: int, dtype) -> int:
        c = AutoConfig.for_model(
            "llama", hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=kv, vocab_size=100,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_config(c, dtype=dtype)
        model = get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear")).train()
        own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
        sizes, kept = {}, []

        def pack(t):
            kept.append(t)  # a freed tensor's address may come again
            if t.untyped_storage().data_ptr() not in own:
                sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model.base_model.model.model(input_ids=torch.arange(tokens)[None], use_cache=False)
        return sum(sizes.values())

    k = memory.Coefficients()
    for wide, dtype in enumerate((torch.bfloat16, torch.float32)):
        measured = (saved(2, dtype) - saved(1, dtype)) / tokens
        counted = (
            k.saved_hidden[wide] * hidden + k.saved_kv[wide] * 64 * kv + k.saved_ffn[wide] * ffn
            + k.saved_lora * rank * 7 + k.saved_other
        )  # fmt: skip
        assert counted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "phi3", "gemma", "gemma2", "gemma3_text"])
def test_saved_bytes_of_the_packed_engine(kind):
    """The coefficients against what the engine measures on layers of a size that was not fitted."""
    from contextlib import nullcontext
    from functools import partial

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    from kto_core.engine import limits
    from kto_core.engine.step import Engine

    hidden, ffn, heads, kv = 384, 896, 6, 2
    for wide, dtype in enumerate((torch.bfloat16, torch.float32)):
        c = AutoConfig.for_model(
            kind, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=2, num_attention_heads=heads,
            num_key_value_heads=kv, head_dim=64, vocab_size=200, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip
        model = get_peft_model(
            AutoModelForCausalLM.from_config(c, dtype=dtype), LoraConfig(r=8, target_modules="all-linear")
        )
        for p in model.parameters():
            p.data = p.data.float() if p.requires_grad else p.data
        autocast = nullcontext if wide else partial(torch.autocast, "cpu", torch.bfloat16)
        measured = limits.measure(Engine(model), autocast)[0].layer
        k = memory.Coefficients().packed
        saved = k.get(kind, k[""])
        counted = saved.hidden[wide] * hidden + saved.kv[wide] * 2 * 64 * kv + saved.ffn[wide] * ffn + saved.other[wide]
        assert counted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize(
    ("preset", "engine"),
    [(p, e) for p in ("3b", "4b", "7b", "8b", "13b", "14b", "20b") for e in ("auto", "trl", "unsloth")]
    + [("27b", "auto"), ("30b-a3b", "auto")],  # whose room is too small for two padded rows
)
def test_presets_fit_24_gib_on_usual_rows(preset, engine):
    plan = memory.plan(resolve(preset, engine=engine), LENGTHS, device=CARD)
    assert plan.verdict == "fits" and plan.advice == ""
    assert plan.predicted_gib == pytest.approx(sum(plan.parts.values()))
    assert 0 <= plan.checkpoint_layers <= plan.layers and plan.token_budget >= 900
    json.dumps(plan.to_dict())


def test_measured_trl_step_is_foretold():
    """7B, NF4, r 64, 4 × 8, mean 470 tokens, checkpointing: 7.8 GiB were measured; without it not even 2 rows fit."""
    plan = memory.plan(resolve(engine="trl", gradient_checkpointing=True), LENGTHS, device=CARD)
    assert plan.predicted_gib - plan.parts["CUDA context"] == pytest.approx(7.8, rel=0.1)
    plan = memory.plan(
        resolve(engine="trl", gradient_checkpointing=False, per_device_train_batch_size=2), LENGTHS, device=CARD
    )
    assert plan.verdict == "does not fit"
    assert plan.advice.startswith("Set gradient_checkpointing to auto. This needs ")


def test_checkpointing_only_as_far_as_memory_needs():
    small, large = (
        memory.plan(resolve(), LENGTHS, device=Device(0, "x", size, size, 0, (8, 6))) for size in (24.0, 141.0)
    )
    assert 0 < small.checkpoint_layers <= small.layers and large.checkpoint_layers == 0
    assert memory.plan(resolve(gradient_checkpointing=True), LENGTHS, device=CARD).checkpoint_layers == 32
    tiny = memory.plan(resolve(), LENGTHS, device=Device(0, "x", 9.5, 9.5, 0, (8, 6)))
    assert tiny.checkpoint_layers >= 31 and 900 <= tiny.token_budget < small.token_budget


def test_inputs_of_layers_wait_in_main_memory_where_a_row_has_no_room(monkeypatch):
    lengths = [40_960, 40_960, 500]
    config = resolve().model_copy(update={"max_length": 40_960})
    monkeypatch.setattr(gpus, "memory_gib", lambda: (64.0, 10.0))
    refused = memory.plan(config, lengths, device=CARD)
    assert refused.verdict == "does not fit" and not refused.offload
    monkeypatch.setattr(gpus, "memory_gib", lambda: (64.0, 50.0))
    found = memory.plan(config, lengths, device=CARD)
    assert found.verdict == "fits" and found.offload and 0 < found.checkpoint_layers <= 32
    assert found.token_budget >= 40_960 and found.predicted_gib < refused.predicted_gib
    assert not memory.plan(resolve(), LENGTHS, device=CARD).offload


def test_the_longest_row_may_have_more_of_the_memory(monkeypatch):
    """What the packed engine does where a row has no room otherwise; the plan calls it tight."""
    from kto_core.engine.packing import passes

    monkeypatch.setattr(gpus, "memory_gib", lambda: (128.0, 120.0))
    longest = 37_500
    c = resolve("13b").model_copy(update={"max_length": longest})
    found = memory.plan(c, [longest, 500], device=CARD)
    assert found.verdict == "tight" and found.offload and found.token_budget >= longest
    assert found.predicted_gib <= CARD.available_gib
    monkeypatch.setattr(passes, "LAST_SHARE", passes.SHARE)
    assert memory.plan(c, [longest, 500], device=CARD).verdict == "does not fit"


def test_shared_prefixes_count_once():
    from kto_core.engine.packing.sample import Sample

    c = resolve(gradient_checkpointing=True)  # else what is saved goes into fewer recomputed layers
    apart, shared = (
        memory.plan(c, LENGTHS, packed=packed, device=CARD) for packed in (None, Sample([6000, 5000], 0.5))
    )
    assert shared.token_budget == 6000 < apart.token_budget
    assert shared.predicted_gib < apart.predicted_gib - 2
    # rows cut to another length have no sample of their own: the share stands in for it
    assert counting._batches([100] * 64, Sample([], 0.5), 32) == [1600, 1600]


def test_more_of_anything_needs_more():
    def need(**overrides) -> float:
        changed = {"engine": "trl", "gradient_checkpointing": True, **overrides}
        return memory.plan(resolve(**changed), [2000] * 10, device=CARD).predicted_gib

    base = need()
    assert need(r=128) > base and need(max_length=1024) < base and need(optim="adamw_torch") > base
    assert need(per_device_train_batch_size=8) > base and need(bnb_4bit_use_double_quant=False) > base
    assert need(model="mistralai/Mistral-7B-Instruct-v0.3", load_in_4bit=False) > base + 9
    assert need(dtype="float32") > base and need(num_gpus=1, target_modules="q_proj,v_proj") < base


def test_only_ddp_keeps_buckets_of_the_gradients():
    def adapters(**overrides) -> float:
        return memory.plan(resolve(**overrides), LENGTHS, device=CARD).parts["adapters"]

    assert adapters(engine="packed", num_gpus=2) == adapters(engine="packed") == adapters(engine="trl")
    assert adapters(engine="trl", num_gpus=2) == pytest.approx(1.5 * adapters(engine="trl"))


def test_a_checkpoint_that_is_quantized_stays_so():
    plain = resolve(load_in_4bit=False)  # the preset's model is quantized on the Hub already
    assert memory.plan(plain, LENGTHS, device=CARD).parts["weights"] < 5


@pytest.mark.parametrize(
    ("preset", "card", "overrides", "verdict", "words"),
    [
        ("13b", Device(0, "x", 12.0, 12.0, 0.0, (8, 6)), {}, "does not fit", "Use preset 7b"),
        (
            "7b",
            Device(0, "x", 24.0, 3.0, 20.0, (8, 6)),
            {},
            "does not fit",
            "Close other programs that use the GPU (20.0 GiB)",
        ),
        ("7b", CARD, {"model": "m/llama-2-13b", "load_in_4bit": False}, "does not fit", "Set load_in_4bit to true"),
        ("20b", CARD, {"engine": "trl", "per_device_train_batch_size": 8}, "does not fit", "Set batch size to 4"),
    ],
)
def test_advice_names_the_change_and_its_numbers(preset, card, overrides, verdict, words):
    lengths = [] if preset == "20b" else LENGTHS
    plan = memory.plan(resolve(preset, **overrides), lengths, device=card)
    assert (plan.verdict, words in plan.advice) == (verdict, True), plan
    assert "Use preset" in words or "GiB" in plan.advice


def test_on_a_cpu(monkeypatch):
    monkeypatch.setattr(gpus, "devices", list)
    plan = memory.plan(resolve("demo"), [200] * 100)
    assert plan.verdict == "cpu" and plan.advice == "" and 1 < plan.predicted_gib < 8
    assert plan.parts["weights"] == pytest.approx(134_515_008 * 4 / GIB, rel=1e-3)  # float32
    plan = memory.plan(resolve("demo", engine="trl"), [205] * 99 + [294])
    assert plan.predicted_gib == pytest.approx(4.36, rel=0.1)  # peak resident memory that was measured
    big = memory.plan(resolve("7b"), LENGTHS)
    assert big.verdict == "cpu" and "preset demo" in big.advice


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(gpus, "devices", lambda: [CARD])
    plan = memory.plan(resolve(num_gpus=2), LENGTHS)
    assert plan.verdict == "does not fit" and "num_gpus is 2, but this machine has 1" in plan.advice


def test_a_process_of_several_gpus_plans_for_its_own(monkeypatch):
    """The neighbour has loaded its model already, which is nobody else's use of our card."""
    full = Device(0, "full", 24.0, 4.0, 20.0, (8, 6))
    monkeypatch.setattr(gpus, "devices", lambda: [full, CARD])
    c = resolve(num_gpus=2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert memory.plan(c, LENGTHS).device == "full"
    monkeypatch.setenv("LOCAL_RANK", "1")
    plan = memory.plan(c, LENGTHS)
    assert (plan.device, plan.available_gib, plan.verdict) == (CARD.name, CARD.available_gib, "fits")


def test_auto_plans_with_the_engine_that_trains(tmp_path):
    """The packed engine serves gpt-oss and the mixtures of experts that it was checked with."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16}
    mixtral = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    unknown = tmp_path / "unknown"
    unknown.mkdir()
    (unknown / "config.json").write_text(json.dumps(mixtral | {"model_type": "nobody_knows"}))
    for model, engine in (("gpt-oss-20b", "packed"), (str(tmp_path), "packed"), (str(unknown), "trl")):
        plans = {
            e: memory.plan(resolve("20b", model=model, engine=e), LENGTHS, device=CARD)
            for e in ("auto", "packed", "trl")
        }
        assert plans["auto"].parts == plans[engine].parts and plans["packed"].parts != plans["trl"].parts


def test_some_experts_are_out_of_their_4_bits_at_a_time():
    from kto_core.models.experts import CHUNK_BYTES

    for preset in ("20b", "30b-a3b"):
        parts = memory.plan(resolve(preset), LENGTHS, device=CARD).parts
        assert parts["dequantized layer"] == pytest.approx(CHUNK_BYTES / GIB) and parts["dequantized layer"] < 0.2


def test_logits_are_those_of_the_engines_chunk():
    from kto_core.engine.packing import passes

    c, k = resolve(), memory.Coefficients()
    shape = model_shape.find(c.model)
    tokens = passes.chunk_tokens(shape.vocabulary, "cuda")
    assert tokens * shape.vocabulary * 4 == passes.CHUNK_BYTES["cuda"]
    counted = counting._peak(counting._token(c, shape, k, True), shape, 9000, 0, k, True, store=1)["logits"]
    assert counted == tokens * shape.vocabulary * k.packed_logits


@pytest.mark.parametrize(
    ("preset", "tokens", "layers", "measured"),
    [
        ("7b", 5429, 32, 7.25), ("7b", 5429, 24, 12.07), ("7b", 5429, 16, 16.87),
        ("3b", 5422, 36, 4.00), ("3b", 5422, 18, 10.81), ("3b", 5422, 0, 17.57),
        ("13b", 5422, 48, 14.02), ("13b", 5422, 36, 22.01),
    ],
)  # fmt: skip
def test_measured_packed_passes_are_foretold(preset, tokens, layers, measured):
    """Allocated at the peak of a pass, NF4, no optimizer and hardly a gradient; most of each prompt is shared
    (`benchmarks/RESULTS.md`)."""
    c, k = resolve(preset), memory.Coefficients()
    shape = model_shape.find(c.model)
    moving = counting._peak(counting._token(c, shape, k, True), shape, tokens, layers, k, True, store=0.06)
    parts = counting._parts(c, shape, moving, k, True)
    left_out = ("CUDA context", "optimizer", "fragmentation")
    found = sum(v for name, v in parts.items() if name not in left_out) - parts["adapters"] / 2
    assert found == pytest.approx(measured, rel=0.04)


@pytest.mark.parametrize(
    ("preset", "tokens", "layers", "offload", "measured", "over"),
    [("7b", 81920, 32, True, 23.16, 0.11), ("7b", 65536, 32, True, 19.94, 0.09), ("7b", 57344, 32, True, 18.16, 0.08),
     ("13b", 32768, 48, True, 20.31, 0.08), ("13b", 28672, 48, True, 19.25, 0.08), ("7b", 29696, 32, False, 19.4, 0.08),
     ("7b", 25600, 32, False, 17.7, 0.08)],
)  # fmt: skip
def test_measured_long_rows_are_foretold(preset, tokens, layers, offload, measured, over):
    """Reserved at the peak of a step of two such rows, one a pass, without CUDA's context (`benchmarks/RESULTS.md`):
    never less than was taken, and not much more."""
    c, k = resolve(preset), memory.Coefficients()
    shape = model_shape.find(c.model)
    token = counting._token(c, shape, k, True)
    token = token.offloaded() if offload else token
    parts = counting._parts(c, shape, counting._peak(token, shape, tokens, layers, k, True, store=0), k, True)
    assert measured <= sum(v for name, v in parts.items() if name != "CUDA context") <= (1 + over) * measured
