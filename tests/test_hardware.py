"""GPU facts, the memory plan, and the one owner of the GPU."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kto_core import config, gpu_owner, hardware, memory_plan, model_shape
from kto_core.errors import BusyError, HardwareError
from kto_core.hardware import GIB, Device

ROOT = Path(__file__).resolve().parent.parent
CARD = Device(0, "24 GiB card", 24.0, 23.6, 0.4, (8, 6))
LENGTHS = [470] * 1000 + [900] * 30


def resolve(preset="7b", **overrides):
    return config.resolve(preset, overrides).config


# ---- devices --------------------------------------------------------------------------------------------------------


class FakeNvml:
    """NVML of a machine with two cards; our process holds 1 GiB of the first, others 3."""

    class NVMLError(Exception):
        pass

    def nvmlInit(self):
        pass

    nvmlShutdown = nvmlInit

    def nvmlDeviceGetCount(self):
        return 2

    def nvmlDeviceGetHandleByIndex(self, i):
        return i

    def nvmlDeviceGetUUID(self, i):
        return f"GPU-{'ab'[i]}000"

    def nvmlDeviceGetName(self, i):
        return b"Card " + str(i).encode()

    def nvmlDeviceGetMemoryInfo(self, i):
        return SimpleNamespace(total=24 * GIB, used=(4 - 4 * i) * GIB)

    def nvmlDeviceGetCudaComputeCapability(self, i):
        return (8, 6)

    def nvmlDeviceGetComputeRunningProcesses(self, i):
        ours, other = SimpleNamespace(pid=os.getpid(), usedGpuMemory=GIB), SimpleNamespace(pid=1, usedGpuMemory=3 * GIB)
        return [] if i else [ours, other]


def test_devices_tell_ours_from_others(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = hardware.devices()
    assert (first.name, first.total_gib, first.free_gib, first.used_by_others_gib) == ("Card 0", 24, 20, 3)
    assert first.available_gib == 21 and second.available_gib == 24 and first.capability == (8, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (only,) = hardware.devices()
    assert (only.index, only.name) == (0, "Card 1")
    monkeypatch.setenv(hardware.LIMIT, "12")
    assert hardware.devices()[0].total_gib == 12
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (limited,) = hardware.devices()  # the 12 GiB beside the limit hold the 3 of the others
    assert (limited.total_gib, limited.used_by_others_gib, limited.available_gib, limited.free_gib) == (12, 0, 12, 12)
    monkeypatch.setenv(hardware.LIMIT, "23")
    assert hardware.devices()[0].used_by_others_gib == 2 and hardware.devices()[0].available_gib == 21
    monkeypatch.setenv(hardware.LIMIT, "12GB")
    with pytest.raises(HardwareError, match="must be a number of GiB"):
        hardware.devices()


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("-1", []), ("1,7,0", [1]), ("GPU-c", [2]), ("GPU-x", []),
     ("1,1", [1])],
)  # fmt: skip
def test_cuda_visible_devices(setting, chosen):
    assert hardware.visible(["GPU-a1", "GPU-b2", "GPU-c3"], setting) == chosen


def test_the_process_keeps_to_the_limit(monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=24 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, i: asked.append((i, share)))
    monkeypatch.delenv(hardware.LIMIT, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    hardware.keep_to_limit()
    assert asked == []
    monkeypatch.setenv(hardware.LIMIT, str(6 + hardware.CONTEXT_GIB))  # the context counts
    hardware.keep_to_limit()
    monkeypatch.setenv("LOCAL_RANK", "1")
    hardware.keep_to_limit()
    assert asked == [(0, pytest.approx(0.25)), (1, pytest.approx(0.25))]
    monkeypatch.setenv(hardware.LIMIT, "0.5")
    with pytest.raises(HardwareError, match="CUDA takes for itself"):
        hardware.keep_to_limit()


@pytest.mark.parametrize("load", ["load_base", "load_unsloth"])
def test_no_model_attends_through_cudnn(load, tiny_model, monkeypatch):
    """It plans for every shape, and training and chat have many (`benchmarks/RESULTS.md`)."""
    import sys

    import torch

    from kto_core import model, unsloth_model

    torch.backends.cuda.enable_cudnn_sdp(True)
    c = config.resolve("demo", {"model": str(tiny_model), "data": "none"}).config
    if load == "load_base":
        model.load_base(c, for_training=False)
    else:
        fake = SimpleNamespace(from_pretrained=lambda **_: (None, None), get_peft_model=lambda *_, **__: None)
        monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=fake))
        unsloth_model.load_unsloth(c)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_what_is_available_is_within_the_limit(monkeypatch):
    """A card of 80 GiB held to 24: what the allocator may still take, never what the card has free."""
    import torch

    from kto_core.engine import memory

    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, i: shares.append(share))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: shares[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * GIB)
    monkeypatch.setenv(hardware.LIMIT, "24")
    hardware.keep_to_limit()
    left = memory.available(torch.device("cuda", 0)) / GIB
    assert left + 5 + hardware.CONTEXT_GIB == pytest.approx(24)


def test_a_cpu_gives_half_of_what_its_container_has_left(monkeypatch):
    import torch

    from kto_core.engine import memory

    monkeypatch.setattr(memory, "memory_gib", lambda: (8.0, 6.0))
    assert memory.available(torch.device("cpu")) == 3 * GIB


def test_no_driver_is_no_gpu(monkeypatch):
    broken = FakeNvml()
    broken.nvmlInit = lambda: (_ for _ in ()).throw(FakeNvml.NVMLError("Driver Not Loaded"))
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert hardware.devices() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert hardware.devices() == []


def test_main_memory_is_real():
    total, available = hardware.memory_gib()
    assert 0 < available <= total < 100_000


# ---- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions"),
    [("unsloth/Qwen2.5-3B-Instruct-bnb-4bit", 3.09), ("unsloth/mistral-7b-instruct-v0.3-bnb-4bit", 7.25),
     ("unsloth/Meta-Llama-3.1-8B-Instruct-bnb-4bit", 8.03), ("unsloth/Qwen2.5-14B-Instruct-bnb-4bit", 14.77),
     ("meta-llama/Llama-2-13b-chat-hf", 13.02), ("unsloth/gpt-oss-20b-unsloth-bnb-4bit", 20.91), ("demo", 0.1345)],
)  # fmt: skip
def test_known_models_have_their_published_size(name, billions):
    assert model_shape.find(name).parameters / 1e9 == pytest.approx(billions, rel=0.002)


def test_sizes_of_the_demo_model_are_those_of_its_weights(demo_model):
    """Counted from the sizes against counted from the weights, and LoRA against PEFT's own count."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = model_shape.find(str(demo_model))
    assert shape.exact and shape.source == "config.json"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo_model))
        assert sum(p.numel() for p in model.parameters()) == shape.parameters == model_shape.find("demo").parameters
        model = get_peft_model(model, LoraConfig(r=16, target_modules=config.TARGETS))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == shape.lora_parameters(config.TARGETS, 16)
    assert shape.lora_parameters("all-linear", 16) == trained
    assert shape.lora_parameters(["q_proj"], 16) == 30 * 16 * (576 + 576)


def test_a_model_known_by_its_size_only_is_an_estimate():
    shape = model_shape.find("somebody/great-9b-chat")
    assert not shape.exact and shape.max_position_embeddings is None
    assert shape.parameters / 1e9 == pytest.approx(9, rel=0.1)
    assert model_shape.find("somebody/great-chat") is None
    plan = hardware.plan(resolve(model="somebody/great-9b-chat"), LENGTHS, device=CARD)
    assert "estimated for 9 billion" in plan.model


# ---- the plan -------------------------------------------------------------------------------------------------------


def test_nf4_weights_of_7b():
    """4.127 bits for 6.98 billion weights of linear layers, 16 for the two embeddings and norms."""
    parts = hardware.plan(resolve(), LENGTHS, device=CARD).parts
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
        model = get_peft_model(model, LoraConfig(r=rank, target_modules=config.TARGETS)).train()
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

    k = memory_plan.Coefficients()
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

    from kto_core.engine import memory
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
        measured = memory.measure(Engine(model), autocast)[0].layer
        k = memory_plan.Coefficients().packed
        saved = k.get(kind, k[""])
        counted = saved.hidden[wide] * hidden + saved.kv[wide] * 2 * 64 * kv + saved.ffn[wide] * ffn + saved.other[wide]
        assert counted == pytest.approx(measured, rel=0.02)


@pytest.mark.parametrize("preset", ["3b", "7b", "13b", "20b"])
@pytest.mark.parametrize("engine", ["auto", "trl", "unsloth"])
def test_presets_fit_24_gib_on_usual_rows(preset, engine):
    plan = hardware.plan(resolve(preset, engine=engine), LENGTHS, device=CARD)
    assert plan.verdict == "fits" and plan.advice == ""
    assert plan.predicted_gib == pytest.approx(sum(plan.parts.values()))
    assert 0 <= plan.checkpoint_layers <= plan.layers and plan.token_budget >= 900
    json.dumps(plan.to_dict())


def test_measured_trl_step_is_foretold():
    """7B, NF4, r 64, 4 × 8, mean 470 tokens, checkpointing: 7.8 GiB were measured; without it not even 2 rows fit."""
    plan = hardware.plan(resolve(engine="trl", gradient_checkpointing=True), LENGTHS, device=CARD)
    assert plan.predicted_gib - plan.parts["CUDA context"] == pytest.approx(7.8, rel=0.1)
    plan = hardware.plan(
        resolve(engine="trl", gradient_checkpointing=False, per_device_train_batch_size=2), LENGTHS, device=CARD
    )
    assert plan.verdict == "does not fit"
    assert plan.advice.startswith("Set gradient_checkpointing to auto: ")


def test_checkpointing_only_as_far_as_memory_needs():
    small, large = (
        hardware.plan(resolve(), LENGTHS, device=Device(0, "x", size, size, 0, (8, 6))) for size in (24.0, 141.0)
    )
    assert 0 < small.checkpoint_layers <= small.layers and large.checkpoint_layers == 0
    assert hardware.plan(resolve(gradient_checkpointing=True), LENGTHS, device=CARD).checkpoint_layers == 32
    tiny = hardware.plan(resolve(), LENGTHS, device=Device(0, "x", 9.5, 9.5, 0, (8, 6)))
    assert tiny.checkpoint_layers >= 31 and 900 <= tiny.token_budget < small.token_budget


def test_inputs_of_layers_wait_in_main_memory_where_a_row_has_no_room(monkeypatch):
    lengths = [40_960, 40_960, 500]
    config = resolve().model_copy(update={"max_length": 40_960})
    monkeypatch.setattr(hardware, "memory_gib", lambda: (64.0, 10.0))
    refused = hardware.plan(config, lengths, device=CARD)
    assert refused.verdict == "does not fit" and not refused.offload
    monkeypatch.setattr(hardware, "memory_gib", lambda: (64.0, 50.0))
    found = hardware.plan(config, lengths, device=CARD)
    assert found.verdict == "fits" and found.offload and 0 < found.checkpoint_layers <= 32
    assert found.token_budget >= 40_960 and found.predicted_gib < refused.predicted_gib
    assert not hardware.plan(resolve(), LENGTHS, device=CARD).offload


def test_the_longest_row_may_have_more_of_the_memory(monkeypatch):
    """What the packed engine does where a row has no room otherwise; the plan calls it tight."""
    from kto_core.engine import passes

    monkeypatch.setattr(hardware, "memory_gib", lambda: (128.0, 120.0))
    longest = 37_500
    c = resolve("13b").model_copy(update={"max_length": longest})
    found = hardware.plan(c, [longest, 500], device=CARD)
    assert found.verdict == "tight" and found.offload and found.token_budget >= longest
    assert found.predicted_gib <= CARD.available_gib
    monkeypatch.setattr(passes, "LAST_SHARE", passes.SHARE)
    assert hardware.plan(c, [longest, 500], device=CARD).verdict == "does not fit"


def test_shared_prefixes_count_once():
    from kto_core.engine.sample import Sample

    c = resolve(gradient_checkpointing=True)  # else what is saved goes into fewer recomputed layers
    apart, shared = (
        hardware.plan(c, LENGTHS, packed=packed, device=CARD) for packed in (None, Sample([6000, 5000], 0.5))
    )
    assert shared.token_budget == 6000 < apart.token_budget
    assert shared.predicted_gib < apart.predicted_gib - 2
    # rows cut to another length have no sample of their own: the share stands in for it
    assert memory_plan._batches([100] * 64, Sample([], 0.5), 32) == [1600, 1600]


def test_more_of_anything_needs_more():
    def need(**overrides) -> float:
        changed = {"engine": "trl", "gradient_checkpointing": True, **overrides}
        return hardware.plan(resolve(**changed), [2000] * 10, device=CARD).predicted_gib

    base = need()
    assert need(r=128) > base and need(max_length=1024) < base and need(optim="adamw_torch") > base
    assert need(per_device_train_batch_size=8) > base and need(bnb_4bit_use_double_quant=False) > base
    assert need(model="mistralai/Mistral-7B-Instruct-v0.3", load_in_4bit=False) > base + 9
    assert need(dtype="float32") > base and need(num_gpus=1, target_modules="q_proj,v_proj") < base


def test_only_ddp_keeps_buckets_of_the_gradients():
    def adapters(**overrides) -> float:
        return hardware.plan(resolve(**overrides), LENGTHS, device=CARD).parts["adapters"]

    assert adapters(engine="packed", num_gpus=2) == adapters(engine="packed") == adapters(engine="trl")
    assert adapters(engine="trl", num_gpus=2) == pytest.approx(1.5 * adapters(engine="trl"))


def test_a_checkpoint_that_is_quantized_stays_so():
    plain = resolve(load_in_4bit=False)  # the preset's model is quantized on the Hub already
    assert hardware.plan(plain, LENGTHS, device=CARD).parts["weights"] < 5


@pytest.mark.parametrize(
    ("preset", "card", "overrides", "verdict", "words"),
    [
        ("13b", Device(0, "x", 12.0, 12.0, 0.0, (8, 6)), {}, "does not fit", "Take preset 7b"),
        ("7b", Device(0, "x", 24.0, 3.0, 20.0, (8, 6)), {}, "does not fit", "Close what else uses the card (20.0 GiB)"),
        ("7b", CARD, {"model": "m/llama-2-13b", "load_in_4bit": False}, "does not fit", "Set load_in_4bit to true"),
        ("20b", CARD, {"engine": "trl", "per_device_train_batch_size": 8}, "does not fit", "Set batch size to 4"),
    ],
)
def test_advice_names_the_change_and_its_numbers(preset, card, overrides, verdict, words):
    lengths = [] if preset == "20b" else LENGTHS
    plan = hardware.plan(resolve(preset, **overrides), lengths, device=card)
    assert (plan.verdict, words in plan.advice) == (verdict, True), plan
    assert "Take" in words or "GiB" in plan.advice


def test_on_a_cpu(monkeypatch):
    monkeypatch.setattr(hardware, "devices", list)
    plan = hardware.plan(resolve("demo"), [200] * 100)
    assert plan.verdict == "cpu" and plan.advice == "" and 1 < plan.predicted_gib < 8
    assert plan.parts["weights"] == pytest.approx(134_515_008 * 4 / GIB, rel=1e-3)  # float32
    plan = hardware.plan(resolve("demo", engine="trl"), [205] * 99 + [294])
    assert plan.predicted_gib == pytest.approx(4.36, rel=0.1)  # peak resident memory that was measured
    big = hardware.plan(resolve("7b"), LENGTHS)
    assert big.verdict == "cpu" and "preset demo" in big.advice


def test_more_gpus_than_there_are(monkeypatch):
    monkeypatch.setattr(hardware, "devices", lambda: [CARD])
    plan = hardware.plan(resolve(num_gpus=2), LENGTHS)
    assert plan.verdict == "does not fit" and "num_gpus is 2, but this machine has 1" in plan.advice


def test_a_process_of_several_gpus_plans_for_its_own(monkeypatch):
    """The neighbour has loaded its model already, which is nobody else's use of our card."""
    full = Device(0, "full", 24.0, 4.0, 20.0, (8, 6))
    monkeypatch.setattr(hardware, "devices", lambda: [full, CARD])
    c = resolve(num_gpus=2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert hardware.plan(c, LENGTHS).device == "full"
    monkeypatch.setenv("LOCAL_RANK", "1")
    plan = hardware.plan(c, LENGTHS)
    assert (plan.device, plan.available_gib, plan.verdict) == (CARD.name, CARD.available_gib, "fits")


def test_auto_plans_with_the_engine_that_trains(tmp_path):
    """The packed engine serves gpt-oss, and no other mixture of experts."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 16}
    mixtral = {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 32000, **sizes}
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    for model, engine in (("gpt-oss-20b", "packed"), (str(tmp_path), "trl")):
        plans = {
            e: hardware.plan(resolve("20b", model=model, engine=e), LENGTHS, device=CARD)
            for e in ("auto", "packed", "trl")
        }
        assert plans["auto"].parts == plans[engine].parts and plans["packed"].parts != plans["trl"].parts


def test_an_expert_is_taken_out_of_its_4_bits_alone():
    shape, parts = model_shape.find("gpt-oss-20b"), hardware.plan(resolve("20b"), LENGTHS, device=CARD).parts
    gate_and_up = 2 * shape.hidden * shape.intermediate
    assert parts["dequantized layer"] == pytest.approx(2 * 2 * gate_and_up / GIB) and parts["dequantized layer"] < 0.1


def test_logits_are_those_of_the_engines_chunk():
    from kto_core.engine import passes

    c, k = resolve(), memory_plan.Coefficients()
    shape = model_shape.find(c.model)
    tokens = passes.chunk_tokens(shape.vocabulary, "cuda")
    assert tokens * shape.vocabulary * 4 == passes.CHUNK_BYTES["cuda"]
    counted = memory_plan._peak(memory_plan._token(c, shape, k, True), shape, 9000, 0, k, True, store=1)["logits"]
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
    c, k = resolve(preset), memory_plan.Coefficients()
    shape = model_shape.find(c.model)
    moving = memory_plan._peak(memory_plan._token(c, shape, k, True), shape, tokens, layers, k, True, store=0.06)
    parts = memory_plan._parts(c, shape, moving, k, True)
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
    c, k = resolve(preset), memory_plan.Coefficients()
    shape = model_shape.find(c.model)
    token = memory_plan._token(c, shape, k, True)
    token = token.offloaded() if offload else token
    parts = memory_plan._parts(c, shape, memory_plan._peak(token, shape, tokens, layers, k, True, store=0), k, True)
    assert measured <= sum(v for name, v in parts.items() if name != "CUDA context") <= (1 + over) * measured


# ---- one owner ------------------------------------------------------------------------------------------------------


@pytest.fixture
def forced(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(gpu_owner.FORCE, "1")


def test_claim_and_owner(forced):
    assert hardware.owner() is None
    with hardware.claim("train", "run-1"):
        found = hardware.owner()
        assert (found.kind, found.name, found.pid) == ("train", "run-1", os.getpid())
        with pytest.raises(BusyError, match=r"run run-1 is training.*Stop it"), hardware.claim("chat", "demo"):
            pass
        assert hardware.owner().name == "run-1"
    assert hardware.owner() is None
    with pytest.raises(ValueError), hardware.claim("export", "x"):
        raise ValueError
    with hardware.claim("chat", "demo"), pytest.raises(BusyError, match="Unload it in the Chat tab"):
        hardware.claim("train", "run-2").__enter__()


def test_another_process_owns_it_until_it_dies(forced):
    code = (
        "import time\nfrom kto_core.hardware import claim\n"
        "with claim('train', 'run-7'):\n    print('in', flush=True)\n    time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert child.stdout.readline() == "in\n"
        found = hardware.owner()
        assert (found.pid, found.name) == (child.pid, "run-7")
        words = f"run run-7 is training \\(process {child.pid}\\)"
        with pytest.raises(BusyError, match=words), hardware.claim("chat", "m"):
            pass
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert hardware.owner() is None  # its file is still there, its lock is not
    with hardware.claim("chat", "m"):
        assert hardware.owner().name == "m"


def test_looking_never_disturbs_a_claim(forced):
    stop, refused = threading.Event(), []

    def look():
        while not stop.is_set():
            hardware.owner()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for t in threads:
        t.start()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            with hardware.claim("train", "r"):
                pass
        except BusyError as e:
            refused.append(str(e))
    stop.set()
    for t in threads:
        t.join()
    assert not refused


def test_claims_count_only_where_there_is_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path))
    monkeypatch.delenv(gpu_owner.FORCE, raising=False)
    monkeypatch.setattr(gpu_owner, "devices", list)
    assert not hardware.needs_claim()
    with hardware.claim("train", "a"), hardware.claim("chat", "b"):
        assert hardware.owner() is None
    monkeypatch.setattr(gpu_owner, "devices", lambda: [CARD])
    assert hardware.needs_claim()
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process of the run owns it for all
    assert not hardware.needs_claim()
