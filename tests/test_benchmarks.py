"""The parts of benchmarks/ that need no GPU: what they count, search, draw and write."""

import ast
import functools
import gc
import importlib.util
import json
import weakref
from pathlib import Path

import pytest
import torch

from tests.support.step_flags import step
from tests.support.training import resolved

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2,
        "pad_token_id": 2}  # fmt: skip


@pytest.mark.parametrize(("model_type", "tied"), [("mistral", False), ("qwen2", True)])
def test_a_4_bit_shape_loads_through_the_products_path(tiny_model, tmp_path, monkeypatch, model_type, tied):
    """Every linear layer in 4 bits, the head not; no weight missing; a forward that is not all zeros."""
    import shapes

    from kto_core.models.facts import model_facts
    from kto_core.models.load import load_base

    sizes = [TINY[f] for f in shapes.FIELDS[:5]]
    monkeypatch.setitem(shapes.SHAPES, "tiny", (model_type, *sizes, 100, tied))
    folder = shapes.make("tiny", tmp_path / "tiny", tiny_model, "cpu", nf4=True)
    assert sorted(p.name for p in folder.glob("*.safetensors")) == [
        "model-00000.safetensors", "model-00001.safetensors", "model-ends.safetensors",
    ]  # fmt: skip
    assert model_facts(str(folder)).quantized == "bitsandbytes"
    model = load_base(resolved(folder, "none").config, for_training=True)
    kinds = {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    assert kinds.pop("lm_head") == "Linear" and set(kinds.values()) == {"Linear4bit"} and len(kinds) == 14
    state = model.model.layers[1].mlp.down_proj.weight.quant_state
    assert state.quant_type == "nf4" and state.nested and tuple(state.shape) == (64, 128)
    assert bool(model.model.layers[0].input_layernorm.weight.eq(1).all())
    logits = model(input_ids=torch.arange(20)[None]).logits
    assert logits.isfinite().all() and float(logits.detach().std()) > 0.01
    assert (folder / "tokenizer_config.json").exists()


def test_a_4_bit_shape_trains(tiny_model, tmp_path, monkeypatch):
    import shapes

    from kto_core.runs import folders
    from kto_core.training import start as starting
    from tests.support.training import make_data

    monkeypatch.setitem(shapes.SHAPES, "tiny", ("llama", *[TINY[f] for f in shapes.FIELDS[:5]], 100, False))
    folder = shapes.make("tiny", tmp_path / "tiny", tiny_model, "cpu", nf4=True)
    data = make_data(tmp_path / "rows.jsonl")
    made = folders.create(resolved(folder, data, engine="packed", max_steps=2, dtype="bfloat16"))  # as on a GPU
    starting.start(made, block=True)
    assert made.state().state == "finished", made.state().error


def test_a_shape_in_bf16_has_no_4_bit_weights(tiny_model, tmp_path, monkeypatch):
    import shapes

    monkeypatch.setitem(shapes.SHAPES, "tiny", ("llama", *[TINY[f] for f in shapes.FIELDS[:5]], 100, True))
    folder = shapes.make("tiny", tmp_path / "tiny", tiny_model, "cpu")
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())


# ---- kto_step.py ----------------------------------------------------------------------------------------------------


def test_settings_keep_the_rows_of_a_step():
    import kto_step

    args = step("--batch-size", "8", "--accumulation", "4", "--micro-batches", "16,8,2", "--checkpointing", "both")
    tried = [kto_step.arguments(["--data", "x", *flags]) for flags in kto_step.settings(args, "trl")]
    assert [(a.batch_size, a.accumulation, a.checkpointing) for a in tried] == [
        (8, 4, "on"), (16, 2, "on"), (2, 16, "on"), (8, 4, "off"), (16, 2, "off"), (2, 16, "off"),
    ]  # fmt: skip
    assert len(kto_step.settings(args, "unsloth")) == 3 and kto_step.settings(args, "packed") == [[]]
    with pytest.raises(SystemExit):
        step("--batch-size", "8", "--accumulation", "4", "--micro-batches", "5")
    assert step("--no-gradient-checkpointing").checkpointing == "off"


def test_a_result_is_told_whole_in_a_line():
    import kto_step

    one = {"rows_per_s": 2.0, "tokens_per_s": 700.4, "peak_gib": 7.5}
    assert kto_step.brief(one) == "2.00 rows/s and 700 tokens/s with 7.50 GiB"
    assert "3.00 rows/s and 900 tokens/s warm with 8.00 GiB" in kto_step.brief(
        {"cold": one, "warm": {"rows_per_s": 3.0, "tokens_per_s": 900.0, "peak_gib": 8.0}}
    )


def test_kernels_count_once_as_busy():
    import step_work
    from torch.autograd import DeviceType

    class Event:
        def __init__(self, kind, micros, named=False):
            self.device_type, self.self_device_time_total, self.is_user_annotation = kind, micros, named

    found = [Event(DeviceType.CPU, 2e6), Event(DeviceType.CUDA, 2e6), Event(DeviceType.CUDA, 5e6, named=True)]
    assert step_work.busy_seconds(found) == 2.0


def test_kernels_are_timed_and_a_missing_one_is_said(capsys, monkeypatch):
    import layer_kernels as kernels

    def missing():
        raise ImportError("No module named 'liger_kernel'")

    monkeypatch.setitem(kernels.VARIANTS, "liger", missing)
    flags = ["--shape", "smollm2-135m", "--tokens", "8", "--repeat", "1", "--variants", "plain,ours,liger", "--json"]
    assert kernels.main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ms"].keys() == {"plain", "ours"} and min(found["ms"]["ours"].values()) > 0 and found["products"] > 0
    assert found["errors"] == {"liger": "ImportError: No module named 'liger_kernel'"}


def test_ours_and_plain_are_the_same_functions():
    import layer_kernels as kernels

    args = kernels.arguments(["--shape", "smollm2-135m", "--tokens", "8"])
    args.device, args.dtype = "cpu", torch.float32
    for name, given in kernels.inputs(args).items():
        ours, plain = (kind()[name](*given) for kind in (kernels.ours, kernels.plain))
        for a, b in zip(kernels.outputs(ours), kernels.outputs(plain), strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), name


def test_ratios_compare_like_with_like():
    import kto_step

    def both(cold: float, warm: float) -> dict:
        return {"cold": {"rows_per_s": cold}, "warm": {"rows_per_s": warm}}

    names = ["trl", "packed", "unsloth"]
    engines = {"trl": {"rows_per_s": 2.0}, "packed": both(6.0, 10.0), "unsloth": {"rows_per_s": 3.0}}
    assert kto_step.ratios(engines, names) == {"cold": 3.0, "warm": 5.0, "unsloth": 1.5}
    engines = {"trl": both(2.0, 4.0), "packed": both(6.0, 10.0), "unsloth": both(3.0, 8.0)}
    assert kto_step.ratios(engines, names) == {"cold": 3.0, "warm": 2.5, "unsloth cold": 1.5, "unsloth warm": 2.0}
    engines = {"trl": {"error": "none"}, "packed": both(6.0, 10.0), "unsloth": {"error": "none"}}
    assert kto_step.ratios(engines, names) == {}


def test_an_engine_counts_at_its_fastest_setting(monkeypatch, capsys):
    import kto_step

    def child(argv, show=False):
        args = kto_step.arguments(argv)
        if args.worker == "trl" and args.checkpointing == "off":
            return {"error": "out of memory"}
        found = {"rows_per_s": float(args.batch_size), "tokens_per_s": 1.0, "peak_gib": 1.0, "tflops": 1.0,
                 "matrix_tflops": 4.0, "of_peak": 0.25, "micro_batch": args.batch_size,
                 "checkpointing": args.checkpointing}  # fmt: skip
        return found if args.worker == "trl" else {"error": "no unsloth"}

    monkeypatch.setattr(kto_step, "child", child)
    argv = ["--data", "x", "--engines", "trl,unsloth", "--micro-batches", "2,8", "--checkpointing", "both"]
    assert kto_step.main(argv) == 1
    out, err = capsys.readouterr()
    assert [line for line in out.splitlines() if line.startswith("trl")][0].endswith("micro-batch 8, checkpointing on")
    assert err.count("failed: out of memory") == 3 and "unsloth --batch-size 2 --accumulation 4" in err
    trl = kto_step.measure(kto_step.arguments(argv), argv)["engines"]["trl"]
    assert [t["micro_batch"] for t in trl["tried"]] == [4, 2]


def test_the_work_of_a_step_is_counted(tiny_model):
    """Two layers of 4 projections 64 wide (K and V half) and an FFN of 128, by hand."""
    import kto_step
    from transformers import AutoModelForCausalLM

    a_token = kto_step.layer_operations(str(tiny_model))
    assert a_token == 2 * 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    work = kto_step.Work(model, a_token)
    ids = torch.arange(24).reshape(2, 12)
    model(input_ids=ids)
    with torch.no_grad():
        model(ids)
        model(ids[:1])
    assert (work.with_gradient, work.without) == (24, 36)
    assert work.operations == a_token * (24 * 2 + 36)
    work.share = lambda: 0.5
    model(input_ids=ids[:1])
    assert work.operations == a_token * (24 * 2 + 12 * 2.5 + 36)
    work.reset()
    asked = weakref.ref(work.share)
    work.remove()
    gc.collect()
    assert asked() is None
    model(input_ids=ids)
    assert work.operations == 0


def test_the_matrix_rate_is_that_of_one_product():
    import kto_step

    rate = kto_step.matrix_rate("cpu", size=512, repeat=5)
    assert 1e8 < rate < 1e15


@pytest.mark.parametrize("engine", ["trl", "packed"])
def test_an_engine_is_measured_with_and_without_the_reference(tiny_model, tmp_path, monkeypatch, engine):
    import kto_step

    from tests.support.training import make_data

    flags = ["--model", str(tiny_model), "--rows", "16", "--batch-size", "2", "--accumulation", "2", "--lora-r", "4",
             "--max-length", "256", "--precompute", "--worker", engine, "--cache", str(tmp_path / "cache")]  # fmt: skip
    monkeypatch.setattr(kto_step, "matrix_rate", functools.partial(kto_step.matrix_rate, size=512, repeat=3))
    found = kto_step.worker(kto_step.arguments(["--data", str(make_data(tmp_path / "rows.jsonl")), *flags]))
    assert found["cold"]["rows_per_s"] > 0 and found["warm"]["rows_per_s"] > 0
    if engine == "trl":  # one training, timed with and without what came before it
        assert found["cold"]["rows_per_s"] < found["warm"]["rows_per_s"]
    for kind in ("cold", "warm"):
        assert 0 < found[kind]["of_peak"] < 1 and found[kind]["matrix_tflops"] > 0
    shown = kto_step.table({engine: found}).splitlines()
    assert len(shown) == 3 and shown[1].startswith(f"{engine} cold") and "%" in shown[2]
    without = kto_step.arguments(["--data", "x", "--engines", "trl"])
    assert without.optim is None and kto_step.OPTIMIZERS == {True: "adamw_8bit", False: "adamw_torch"}


# ---- on_card.py -----------------------------------------------------------------------------------------------------


def test_every_measurement_on_a_card_is_a_call_that_its_script_takes(capsys):
    import importlib

    import on_card
    import shapes

    files = {"{tools}": "rows.jsonl", "{chat}": "chat.json"}
    for m in on_card.measurements():
        script, *flags = [files.get(w, w) for w in m.words("{tools}", "{chat}")]
        module = importlib.import_module(script.removesuffix(".py"))
        module.arguments(flags)
        assert m.shape in shapes.SHAPES and m.seconds > 0
    assert on_card.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "step-7b-chat: python benchmarks/kto_step.py --data CHAT" in said and "{" not in said


def test_measurements_of_memory_share_the_card_and_others_do_not():
    import on_card

    def m(name, shared):
        return on_card.Measurement(name, "x.py", 1, "mistral-7b", shared=shared)

    chosen = [m("a", False), m("b", True), m("c", True), m("d", True), m("e", False), m("f", True)]
    found = [[m.name for m in group] for group in on_card.groups(chosen, 2)]
    assert found == [["a"], ["b", "c"], ["d"], ["e"], ["f"]]


SLOW = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print("child", child.pid, flush=True)
time.sleep(600)
"""


def test_a_measurement_that_takes_too_long_ends_with_all_that_it_started(tmp_path, monkeypatch):
    import time
    from types import SimpleNamespace

    import on_card
    import psutil

    monkeypatch.setattr(on_card, "HERE", tmp_path)
    (tmp_path / "slow.py").write_text(SLOW)
    (tmp_path / "wrong.py").write_text("import sys; print('no card'); sys.exit(3)")
    args = SimpleNamespace(tools="rows.jsonl", chat=None, out=tmp_path)
    later = time.monotonic() + 600
    slow = on_card.Measurement("slow", "slow.py --data {tools}", 5, "mistral-7b")
    assert on_card.run(slow, args, later).startswith("slow: not done in 5 s")
    head, child = (tmp_path / "slow.txt").read_text().splitlines()[:2]
    assert head == "$ python benchmarks/slow.py --data rows.jsonl"
    left = int(child.split()[1])
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
    wrong = on_card.Measurement("wrong", "wrong.py", 60, "mistral-7b")
    assert on_card.run(wrong, args, later).startswith("wrong: failed with exit status 3")
    assert "no card" in (tmp_path / "wrong.txt").read_text()
    assert on_card.run(wrong, args, time.monotonic()) == "wrong: no time was left for it"


def test_a_machine_without_a_card_says_what_is_missing(tmp_path, monkeypatch, capsys):
    import on_card

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    data = tmp_path / "rows.jsonl"
    data.write_text("")
    with pytest.raises(SystemExit):
        on_card.main(["--only", "chat-8b"])
    assert "chat-7b" in capsys.readouterr().err  # what there is
    with pytest.raises(SystemExit):
        on_card.main(["--only", "step-7b-chat", "--chat", str(tmp_path / "nothing")])
    assert "--chat needs a file" in capsys.readouterr().err
    assert on_card.main(["--only", "divided-7b", "--tools", str(data), "--out", str(tmp_path / "out")]) == 1
    assert "divided-7b: needs 2 GPUs; this machine has 0" in capsys.readouterr().out


def test_what_benchmarks_import_of_each_other_and_of_the_program_is_there():
    """Most import inside functions that only a card runs."""
    folder, missing = Path(__file__).parent.parent / "benchmarks", []
    own = {p.stem for p in folder.glob("*.py")} | {"kto_core", "kto_studio", "tests"}
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in own:
                there = importlib.import_module(node.module)
                for name in (alias.name for alias in node.names):
                    if not hasattr(there, name) and importlib.util.find_spec(f"{node.module}.{name}") is None:
                        missing.append(f"{path.name}: {node.module}.{name}")
    assert not missing
