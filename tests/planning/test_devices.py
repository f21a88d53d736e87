"""The GPUs of a machine, the sizes of models, and who owns a GPU."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from kto_core.config import resolving as config
from kto_core.errors import BusyError, HardwareError
from kto_core.hardware import gpu_owner, gpus
from kto_core.hardware.gpus import GIB
from kto_core.models import shape as model_shape
from kto_core.planning import memory
from tests.support.memory import CARD, LENGTHS, resolve

ROOT = Path(__file__).resolve().parents[2]


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


# ---- devices --------------------------------------------------------------------------------------------------------


def test_devices_tell_ours_from_others(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = gpus.devices()
    assert (first.name, first.total_gib, first.free_gib, first.used_by_others_gib) == ("Card 0", 24, 20, 3)
    assert first.available_gib == 21 and second.available_gib == 24 and first.capability == (8, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (only,) = gpus.devices()
    assert (only.index, only.name) == (0, "Card 1")
    monkeypatch.setenv(gpus.LIMIT, "12")
    assert gpus.devices()[0].total_gib == 12
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (limited,) = gpus.devices()  # the 12 GiB beside the limit hold the 3 of the others
    assert (limited.total_gib, limited.used_by_others_gib, limited.available_gib, limited.free_gib) == (12, 0, 12, 12)
    monkeypatch.setenv(gpus.LIMIT, "23")
    assert gpus.devices()[0].used_by_others_gib == 2 and gpus.devices()[0].available_gib == 21
    monkeypatch.setenv(gpus.LIMIT, "12GB")
    with pytest.raises(HardwareError, match="must be a number of GiB"):
        gpus.devices()


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [(None, [0, 1, 2]), ("", []), ("2,0", [2, 0]), ("-1", []), ("1,7,0", [1]), ("GPU-c", [2]), ("GPU-x", []),
     ("1,1", [1])],
)  # fmt: skip
def test_cuda_visible_devices(setting, chosen):
    assert gpus.visible(["GPU-a1", "GPU-b2", "GPU-c3"], setting) == chosen


def test_the_process_keeps_to_the_limit(monkeypatch):
    import torch

    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=24 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, i: asked.append((i, share)))
    monkeypatch.delenv(gpus.LIMIT, raising=False)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    gpus.keep_to_limit()
    assert asked == []
    monkeypatch.setenv(gpus.LIMIT, str(6 + gpus.CONTEXT_GIB))  # the context counts
    gpus.keep_to_limit()
    monkeypatch.setenv("LOCAL_RANK", "1")
    gpus.keep_to_limit()
    assert asked == [(0, pytest.approx(0.25)), (1, pytest.approx(0.25))]
    monkeypatch.setenv(gpus.LIMIT, "0.5")
    with pytest.raises(HardwareError, match="CUDA itself uses"):
        gpus.keep_to_limit()


@pytest.mark.parametrize("load", ["load_base", "load_unsloth"])
def test_no_model_attends_through_cudnn(load, tiny_model, monkeypatch):
    """It plans for every shape, and training and chat have many (`benchmarks/RESULTS.md`)."""
    import sys

    import torch

    from kto_core.models import load as model
    from kto_core.models import unsloth_load

    torch.backends.cuda.enable_cudnn_sdp(True)
    c = config.resolve("demo", {"model": str(tiny_model), "data": "none"}).config
    if load == "load_base":
        model.load_base(c, for_training=False)
    else:
        fake = SimpleNamespace(from_pretrained=lambda **_: (None, None), get_peft_model=lambda *_, **__: None)
        monkeypatch.setitem(sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=fake))
        unsloth_load.load_unsloth(c)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_what_is_available_is_within_the_limit(monkeypatch):
    """A card of 80 GiB held to 24: what the allocator may still take, never what the card has free."""
    import torch

    from kto_core.engine import limits

    shares = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=80 * GIB))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, i: shares.append(share))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: shares[-1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * GIB)
    monkeypatch.setenv(gpus.LIMIT, "24")
    gpus.keep_to_limit()
    left = limits.available(torch.device("cuda", 0)) / GIB
    assert left + 5 + gpus.CONTEXT_GIB == pytest.approx(24)


def test_a_cpu_gives_half_of_what_its_container_has_left(monkeypatch):
    import torch

    from kto_core.engine import limits

    monkeypatch.setattr(limits, "memory_gib", lambda: (8.0, 6.0))
    assert limits.available(torch.device("cpu")) == 3 * GIB


def test_no_driver_is_no_gpu(monkeypatch):
    broken = FakeNvml()
    broken.nvmlInit = lambda: (_ for _ in ()).throw(FakeNvml.NVMLError("Driver Not Loaded"))
    monkeypatch.setitem(sys.modules, "pynvml", broken)
    assert gpus.devices() == []
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert gpus.devices() == []


def test_main_memory_is_real():
    total, available = gpus.memory_gib()
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
        model = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear"))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == shape.lora_parameters("all-linear", 16)
    assert shape.lora_parameters("all-linear", 16) == trained
    assert shape.lora_parameters(["q_proj"], 16) == 30 * 16 * (576 + 576)


def test_a_model_known_by_its_size_only_is_an_estimate():
    shape = model_shape.find("somebody/great-9b-chat")
    assert not shape.exact and shape.max_position_embeddings is None
    assert shape.parameters / 1e9 == pytest.approx(9, rel=0.1)
    assert model_shape.find("somebody/great-chat") is None
    plan = memory.plan(resolve(model="somebody/great-9b-chat"), LENGTHS, device=CARD)
    assert "estimated for 9 billion" in plan.model


@pytest.fixture
def forced(tmp_path, monkeypatch):
    monkeypatch.setenv("KTO_STUDIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(gpu_owner.FORCE, "1")


# ---- one owner ------------------------------------------------------------------------------------------------------


def test_claim_and_owner(forced):
    assert gpu_owner.owner() is None
    with gpu_owner.claim("train", "run-1"):
        found = gpu_owner.owner()
        assert (found.kind, found.name, found.pid) == ("train", "run-1", os.getpid())
        with pytest.raises(BusyError, match=r"run run-1 is training.*Stop it"), gpu_owner.claim("chat", "demo"):
            pass
        assert gpu_owner.owner().name == "run-1"
    assert gpu_owner.owner() is None
    with pytest.raises(ValueError), gpu_owner.claim("export", "x"):
        raise ValueError
    with gpu_owner.claim("chat", "demo"), pytest.raises(BusyError, match="Unload it in the Chat tab"):
        gpu_owner.claim("train", "run-2").__enter__()


def test_another_process_owns_it_until_it_dies(forced):
    code = (
        "import time\nfrom kto_core.hardware.gpu_owner import claim\n"
        "with claim('train', 'run-7'):\n    print('in', flush=True)\n    time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT, text=True)
    try:
        assert child.stdout.readline() == "in\n"
        found = gpu_owner.owner()
        assert (found.pid, found.name) == (child.pid, "run-7")
        words = f"run run-7 is training \\(process {child.pid}\\)"
        with pytest.raises(BusyError, match=words), gpu_owner.claim("chat", "m"):
            pass
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert gpu_owner.owner() is None  # its file is still there, its lock is not
    with gpu_owner.claim("chat", "m"):
        assert gpu_owner.owner().name == "m"


def test_looking_never_disturbs_a_claim(forced):
    stop, refused = threading.Event(), []

    def look():
        while not stop.is_set():
            gpu_owner.owner()

    threads = [threading.Thread(target=look) for _ in range(2)]
    for t in threads:
        t.start()
    end = time.monotonic() + 1
    while time.monotonic() < end:
        try:
            with gpu_owner.claim("train", "r"):
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
    assert not gpu_owner.needs_claim()
    with gpu_owner.claim("train", "a"), gpu_owner.claim("chat", "b"):
        assert gpu_owner.owner() is None
    monkeypatch.setattr(gpu_owner, "devices", lambda: [CARD])
    assert gpu_owner.needs_claim()
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process of the run owns it for all
    assert not gpu_owner.needs_claim()
