"""Running out of GPU memory, by injection: recognised, answered where that is possible, else said with the numbers."""

import re
import sys

import pytest
import torch

from kto_core.config import resolving
from kto_core.errors import HardwareError
from kto_core.hardware import out_of_memory
from kto_core.hardware.gpus import GIB
from kto_core.planning import advice
from kto_core.training.train import train
from tests.engine import test_engine_processes
from tests.support import packed as packing
from tests.support.training import events, metrics, resolved, state

FULL = torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (for the test)")


def failing(monkeypatch, owner, name, times, error=FULL):
    """``owner.name`` fails at its calls of these numbers, after it has done its work. Returns the calls' arguments."""
    original, calls = getattr(owner, name), []

    def fails(*args, **kwargs):
        calls.append(args)
        number = len(calls)
        result = original(*args, **kwargs)
        if number in times:
            raise error
        return result

    monkeypatch.setattr(owner, name, fails)
    return calls


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (FULL, True),
        (torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be reported later"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("CUDA error: out of memory"), False),
        (MemoryError(), False),
    ],
)
def test_what_counts_as_out_of_memory(error, full):
    assert out_of_memory.is_out_of_memory(error) is full


def test_the_error_has_the_numbers(monkeypatch):
    """23.1 of 23.3 GiB: the limit's, less CUDA's context; other processes leave more than that of the 80."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: int(23.1 * GIB))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (50 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: (24 - 0.7) / 80)
    said = str(out_of_memory.error(2048, "Set max_length to 1024"))
    assert said == (
        "The GPU ran out of memory: 23.1 of the allowed 23.3 GiB were reserved, and the longest row has 2,048 tokens. "
        "Set max_length to 1024, then resume."
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * GIB))  # others have the rest
    assert "23.1 of the allowed 23.1 GiB" in str(out_of_memory.error(2048))


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        (
            "20b",
            {"engine": "trl"},
            "Set batch size to 2 and gradient accumulation to 16, which gives the same effective batch",
        ),
        ("20b", {"engine": "trl", "per_device_train_batch_size": 2, "r": 8}, "Set max_length to 1024"),
        ("20b", {}, "Set r to 64 and lora_alpha to 128"),
        ("7b", {"load_in_4bit": False, "model": "m/llama-2-7b"}, "Set load_in_4bit to true"),
        ("7b", {"engine": "trl", "gradient_checkpointing": False}, "Set gradient_checkpointing to auto"),
    ],
)
def test_the_change_that_helps_most(preset, overrides, words):
    assert advice.helps_most(resolving.resolve(preset, overrides).config, [500, 2000]) == words


# ---- TRL's step ------------------------------------------------------------------------------------------------------


SETTINGS = {"max_steps": 4, "gradient_accumulation_steps": 3, "learning_rate": 1e-3, "logging_steps": 1}


def test_trls_step_goes_on_with_every_layer_recomputed(tiny_model, data, tmp_path, monkeypatch):
    """The fifth micro-batch, the second step's second, fails after its backward: the same losses, metrics, weights."""
    from safetensors.torch import load_file
    from trl import KTOTrainer

    settings = resolved(tiny_model, data, **SETTINGS).config
    train(settings, tmp_path / "quiet")
    calls = failing(monkeypatch, KTOTrainer, "training_step", [5])
    train(settings, tmp_path / "full")
    assert state(tmp_path / "full").state == "finished", state(tmp_path / "full").error
    assert len(calls) == 4 * 3 + 2  # the second step's two micro-batches once more
    assert any("all layers recomputed" in e.get("text", "") for e in events(tmp_path / "full"))
    pairs = zip(metrics(tmp_path / "quiet"), metrics(tmp_path / "full"), strict=True)
    for quiet, full in pairs:
        assert full == {k: pytest.approx(v, rel=1e-4, abs=1e-6) for k, v in quiet.items()}
    quiet, full = (load_file(tmp_path / n / "adapter" / "adapter_model.safetensors") for n in ("quiet", "full"))
    assert all(torch.allclose(full[name], quiet[name], atol=1e-6) for name in quiet)


@pytest.mark.parametrize("place", ["micro-batch", "evaluation", "optimizer"])
def test_where_nothing_helps_the_error_has_numbers(tiny_model, data, tmp_path, monkeypatch, place):
    from transformers import Trainer
    from trl import KTOTrainer

    settings = {**SETTINGS, "max_steps": 2}
    if place == "micro-batch":
        failing(monkeypatch, KTOTrainer, "training_step", range(1, 100))
    elif place == "evaluation":
        settings |= {"test_size": 0.25, "eval_steps": 1}
        failing(monkeypatch, KTOTrainer, "prediction_step", [1])
    else:
        original = Trainer.create_optimizer

        def create(self, *args, **kwargs):
            made = original(self, *args, **kwargs)
            failing(monkeypatch, made, "step", [1], torch.AcceleratorError("CUDA error: out of memory"))
            return made

        monkeypatch.setattr(Trainer, "create_optimizer", create)
    train(resolved(tiny_model, data, **settings).config, tmp_path / "run")
    ended = state(tmp_path / "run")
    assert ended.state == "failed"
    assert re.search(r"ran out of memory: the longest row has \d+ tokens\. (Set|Take) .*, then resume\.$", ended.error)


# ---- the packed step -------------------------------------------------------------------------------------------------


def test_an_evaluation_goes_on_with_smaller_passes(tmp_path, tokenizer, monkeypatch):
    """They stay the evaluation's, and the training's limits are not touched."""
    held_out = packing.dataset(12, seed=1)
    quiet = packing.packed(tmp_path, tokenizer, packing.dataset(16)).evaluate(held_out)
    trainer = packing.packed(tmp_path, tokenizer, packing.dataset(16))
    before = trainer.engine.limits
    calls = failing(monkeypatch, trainer.engine, "run", [1])
    assert trainer.evaluate(held_out)["eval_loss"] == pytest.approx(quiet["eval_loss"], rel=1e-5)
    assert trainer.engine.limits == before
    smaller = trainer._tokens_in_eval[0]
    assert len(calls) == 2 + 1 and smaller < 12 * 40
    trainer.evaluate(held_out)
    assert len(calls) == 3 + 2 and trainer._tokens_in_eval[0] == smaller


def test_a_packed_step_that_never_fits_says_so(tmp_path, tokenizer, monkeypatch):
    trainer = packing.packed(tmp_path, tokenizer, packing.dataset(16))
    calls = failing(monkeypatch, trainer.engine, "run", range(1, 1000))
    with pytest.raises(HardwareError, match=r"the longest row has \d+ tokens"):
        trainer.train()
    assert trainer.engine.limits.checkpoint_layers == 3 and 4 < len(calls) < 12


FAILS = """
rank, count = int(os.environ.get("RANK", 0)), 0
def failing(z0):
    def wrapped(values, ref, reduce):
        global count
        count += 1
        if rank == 1 and count == 2:
            raise torch.cuda.OutOfMemoryError("before the others were asked")
        result = z0(values, ref, reduce)
        if rank == 1 and count in (4, 6, 9, 12, 15):
            raise torch.AcceleratorError("CUDA error: out of memory")
        return result
    return wrapped
"""


def test_one_of_two_processes_computes_its_step_again(tmp_path, demo_model, monkeypatch):
    """The other is asked for each z0 once: the same losses, z0 and gradients as one process that never fails."""
    patched = "trainer.engine._z0 = failing(trainer.engine._z0)\n    trainer.train()"
    script = test_engine_processes.SCRIPT.replace("trainer.train()", patched)
    script = script.replace("for kl_group", FAILS + "for kl_group", 1)
    script += """
    import dataclasses
    trainer.engine.limits = dataclasses.replace(trainer.engine.limits, token_budget=None)
    result = trainer.evaluate(t.dataset(9, seed=1))
    if rank == 0:
        print("STEP", result["eval_loss"], result["eval_kl"])
"""
    monkeypatch.setattr(test_engine_processes, "SCRIPT", script)
    one = test_engine_processes.lines(tmp_path, demo_model, [sys.executable])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    two = test_engine_processes.lines(tmp_path, demo_model, launcher)
    assert len(one) == len(two) == 14
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)


def test_a_full_gpu_in_chat_says_what_helps():
    from kto_core.chat import answering

    for full in (FULL, RuntimeError("CUDA driver error: out of memory")):
        assert "Clear the conversation" in str(answering.understood(full))
    other = RuntimeError("shapes do not match")
    assert answering.understood(other) is other


@pytest.mark.parametrize(
    ("error", "said"), [(FULL, "free GPU memory"), (RuntimeError("unknown layer"), "Unsloth cannot")]
)
def test_weights_that_do_not_fit_through_unsloth(monkeypatch, tiny_model, error, said):
    from types import SimpleNamespace

    from kto_core.errors import KTOError
    from kto_core.models import unsloth_load

    def load(**_):
        raise error

    monkeypatch.setitem(
        sys.modules, "unsloth", SimpleNamespace(FastLanguageModel=SimpleNamespace(from_pretrained=load))
    )
    with pytest.raises(KTOError, match=said):
        unsloth_load.load_unsloth(resolving.resolve("demo", {"model": str(tiny_model)}).config)
