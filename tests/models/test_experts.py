"""Mixtures of experts whose experts are held in 4 bits: loaded piece by piece, exact, trained, refused when unknown."""

import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from kto_core.engine import available, probe
from kto_core.engine.group import Group, Objective
from kto_core.engine.layers.dropout import switch_off
from kto_core.engine.step import Engine
from kto_core.errors import ConfigError, ModelError
from kto_core.models.experts import bank, filling, held
from kto_core.models.load import load_base, lora_config, without_weights
from kto_core.models.model_gate import tensors_of
from tests.support import mixtures, oracle
from tests.support.mixtures import make_mixture
from tests.support.training import make_data, resolved

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
FIRST = ["qwen3_moe", "mixtral", "glm4_moe_lite"]
KINDS = [k if k in FIRST else pytest.param(k, marks=pytest.mark.slow) for k in mixtures.KINDS]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory, tiny_model):
    made = {}

    def folder(kind, nf4=False):
        if (kind, nf4) not in made:
            made[kind, nf4] = make_mixture(tmp_path_factory.mktemp("moe") / "model", tiny_model, kind, nf4=nf4)
        return made[kind, nf4]

    return folder


def load(folder, **settings):
    return load_base(resolved(folder, "none", load_in_4bit=True, **settings).config, for_training=True)


def opened(model):
    """The same model in transformers' own classes, out of its 4 bits."""
    model = model.dequantize()
    held.fuse(model, torch.float32)
    model.set_experts_implementation("eager")
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_in_4_bits_and_everything_is_exact(kind, folder_of):
    folder = folder_of(kind)
    model = load(folder)
    experts = held.held(model)
    assert experts and all(set(m.banks) == {"gate_up_proj", "down_proj"} for m in experts.values())
    assert not [n for n, p in model.named_parameters() if p.ndim == 3]
    ids = torch.arange(3, 43).view(2, 20)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    ours = model(inputs_embeds=embedded).logits
    (gradient,) = torch.autograd.grad(ours.square().mean(), embedded)
    with torch.no_grad():
        few = model(input_ids=ids[:1, :3], use_cache=False).logits
    theirs_model = opened(model)
    assert not held.held(theirs_model)
    theirs = theirs_model(inputs_embeds=embedded).logits
    (wanted,) = torch.autograd.grad(theirs.square().mean(), embedded)
    assert torch.allclose(ours, theirs, atol=1e-5) and float(theirs.detach().std()) > 0.05
    assert torch.allclose(gradient, wanted, rtol=1e-3, atol=1e-8)
    assert torch.allclose(few, theirs[:1, :3], atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_packed_step_is_that_of_the_dequantized_weights_row_by_row(kind, folder_of):
    folder = folder_of(kind)
    config = resolved(folder, "none", load_in_4bit=True, r=4, target_modules="all-linear").config
    ok, why = available(mixtures.config_of(kind))
    assert ok, why

    def adapted(model):
        torch.manual_seed(1)
        model = get_peft_model(model, lora_config(config, model))
        oracle.fill_adapter(model)
        switch_off(model)
        return model

    prompts, completions, labels = oracle.random_rows(4)
    borrowed = [*completions[1:], completions[0]]
    expected = oracle.step(adapted(opened(load(folder))).train(), prompts, completions, borrowed, labels)
    model = adapted(load(folder)).train()
    engine = Engine(model)
    probe.check_head_and_attention(engine, prompts[0])
    group = Group(prompts, completions, borrowed, torch.tensor(labels), expected["reference"], expected["kl_reference"])
    with engine.using_tree():
        result = engine.run(group, Objective(0.1), backward=lambda loss: loss.backward())
    assert float(result.loss) == pytest.approx(expected["loss"], abs=1e-5)
    assert oracle.worst(oracle.gradients(model), expected["gradients"]) < 2e-3


def test_a_4_bit_checkpoint_is_read_as_it_is(folder_of):
    """An expert three linear layers, as in checkpoints on the Hub: bit for bit what bitsandbytes makes of them."""
    from bitsandbytes.functional import QuantState, dequantize_4bit
    from safetensors import safe_open

    folder = folder_of("qwen3_moe", nf4=True)
    model = load(folder, dtype="bfloat16")
    file = folder / "model-00001.safetensors"
    found = held.held(model)["model.layers.1.mlp.experts"].banks
    with safe_open(file, "pt") as f:
        for part, name in (("gate_up_proj", "gate_proj"), ("gate_up_proj", "up_proj"), ("down_proj", "down_proj")):
            at = f"model.layers.1.mlp.experts.4.{name}.weight"
            state = {k.removeprefix(f"{at}."): f.get_tensor(k) for k in f.keys() if k.startswith(f"{at}.")}  # noqa: SIM118
            wanted = dequantize_4bit(f.get_tensor(at), QuantState.from_dict(state, torch.device("cpu")))
            ours = found[part].dense(slice(4, 5))[0]
            half = slice(64, 128) if name == "up_proj" else slice(0, 64)
            assert torch.equal(ours[half], wanted)


def test_fused_checkpoints_are_read_too(folder_of, tmp_path):
    """All experts of a layer in one tensor, as some publish them: the same banks."""
    import shutil

    from safetensors.torch import load_file, save_file

    folder = folder_of("qwen3_moe")
    apart, fused = load(folder), tmp_path / "fused"
    shutil.copytree(folder, fused)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(3):
        at = f"model.layers.{layer}.mlp.experts"
        each = [[tensors.pop(f"{at}.{e}.{n}.weight") for n in ("gate_proj", "up_proj", "down_proj")] for e in range(6)]
        tensors[f"{at}.gate_up_proj"] = torch.stack([torch.cat(e[:2]) for e in each])
        tensors[f"{at}.down_proj"] = torch.stack([e[2] for e in each])
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    ours = dict(load(fused).named_buffers())
    for name, value in apart.named_buffers():
        if ".banks." in name:
            assert torch.equal(value, ours[name]), name


def test_experts_are_never_whole_in_16_bits(folder_of, monkeypatch):
    """What is quantized at a time is one projection of one expert."""
    sizes, put = [], bank.Bank.put
    monkeypatch.setattr(bank.Bank, "put", lambda self, e, p, w: sizes.append(w.numel()) or put(self, e, p, w))
    load(folder_of("qwen3_moe"))
    assert set(sizes) == {64 * 64} and len(sizes) == 3 * 6 * 3


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("dtype", "together"), [(torch.float32, 1), (torch.bfloat16, 1), (torch.bfloat16, 3)])
def test_a_bank_multiplies_as_its_dense_weights(nested, dtype, together, monkeypatch):
    """One expert at a time; or several in one grouped product, as on a GPU."""
    if together > 1:
        chunks = [slice(0, 3), slice(3, 5)]
        monkeypatch.setattr(bank, "_grouped", lambda *_: True)
        monkeypatch.setattr(bank, "_chunks", lambda _, counts, rows: ((s, counts[s]) for s in chunks))
    torch.manual_seed(0)
    b = bank.Bank(5, 96, 64, 2, dtype=dtype, device="cpu", nested=nested)
    weights = torch.randn(5, 96, 64) * torch.arange(1, 6)[:, None, None]
    for e in range(5):
        for part in range(2):
            b.put(e, part, weights[e, part * 48 : (part + 1) * 48].to(dtype))
    dense = b.dense(slice(0, 5), torch.float32)
    assert float((dense - weights).abs().mean() / weights.abs().mean()) < 0.1
    counts = [3, 0, 4, 0, 2]
    rows = torch.randn(11, 64, dtype=dtype, requires_grad=True)  # two rows of no expert
    out = bank.multiply(b, rows, counts)
    each = [0] * 3 + [2] * 4 + [4] * 2
    wanted = torch.stack([rows[i].float() @ dense[e].t() for i, e in enumerate(each)])
    scale = 1e-5 if dtype is torch.float32 else 2e-2
    assert torch.allclose(out[:9].float(), wanted, rtol=scale, atol=scale * float(wanted.detach().abs().max()))
    assert not out[9:].any()
    (gradient,) = torch.autograd.grad(out.float().square().sum(), rows)
    (expected,) = torch.autograd.grad(wanted.square().sum(), rows)
    assert torch.allclose(gradient.float(), expected.float(), rtol=scale, atol=scale * float(expected.abs().max()))
    few = bank.multiply_few(b, rows[:9].detach(), torch.tensor(each)).float()
    assert torch.allclose(few, wanted, rtol=scale, atol=scale * float(wanted.detach().abs().max()))


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_the_chats_own_decoder_gives_the_same_tokens(kind, folder_of):
    """A token's experts one by one, without a question to the GPU, which a CUDA graph could not hold."""
    from kto_core.chat import decode

    model = load(folder_of(kind)).eval()
    ids = list(range(7, 40))
    with torch.no_grad():
        wanted = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, eos_token_id=299)
    assert decode.serves(model)
    decoder = decode.Decoder(model, graph=False)
    assert list(decoder.tokens(ids, False, lambda text, logits: logits.argmax(-1), 8)) == wanted[0, len(ids) :].tolist()


def test_a_dry_run_says_what_will_be_trained(folder_of, tmp_path):
    from kto_core.planning.dry_run import dry_run

    plan = dry_run(
        resolved(
            folder_of("glm4_moe_lite"), make_data(tmp_path / "rows.jsonl"), engine="auto", load_in_4bit=True
        ).config
    )
    assert not plan["problem"] and plan["engine"]["name"] == "packed"
    assert 0 < plan["adapter"]["share"] < 0.5 and "Experts are not trained." in plan["adapter"]["says"]


@pytest.mark.parametrize("nf4", [False, True])
def test_train_chat_and_merge(nf4, folder_of, tmp_path, monkeypatch):
    from kto_core.chat.chat import Chat
    from kto_core.export import merging
    from kto_core.runs import folders
    from kto_core.training import start as starting

    folder, data = folder_of("qwen3_moe", nf4), make_data(tmp_path / "rows.jsonl")
    made = folders.create(resolved(folder, data, engine="auto", max_steps=3, load_in_4bit=True, max_length=512))
    starting.start(made, block=True)
    state = made.state()
    assert state.state == "finished", state.error
    texts = [entry["text"] for entry in state.logs]
    assert "Training engine: packed." in texts and any("Experts are not trained." in t for t in texts)
    losses = [m["loss"] for m in state.metrics if "loss" in m]
    assert losses[0] == pytest.approx(0.5, abs=1e-4) and losses[-1] != losses[0]
    chat = Chat.load(made)
    try:
        assert held.held(chat.model)
        assert list(chat.stream([{"role": "user", "content": "What is 2?"}], max_new_tokens=4)) is not None
    finally:
        chat.unload()
    monkeypatch.setattr(merging, "tell", lambda *_: None)
    part = tmp_path / "merged"
    part.mkdir()
    merging.merge(str(folder), str(made.path / "adapter"), str(part), "owner/base", {})
    names = tensors_of(part)
    assert "model.layers.2.mlp.experts.5.up_proj.weight" in names and len(names) == len(
        tensors_of(folder_of("qwen3_moe"))
    )
    assert {kind for _, kind, _ in names.values()} == {"BF16"}


def test_the_packed_engine_trains_it_as_trl_does(folder_of, tmp_path):
    """With TRL's pairs and z0 the losses of TRL's own step; recomputed layers too."""
    from kto_core.runs import folders
    from kto_core.training import start as starting

    data, losses = make_data(tmp_path / "rows.jsonl"), {}
    for engine, checkpointing in (("trl", False), ("packed", False), ("packed", True)):
        settings = {"engine": engine, "kl_group": "microbatch", "learning_rate": 1e-3, "max_steps": 3,
                    "gradient_checkpointing": checkpointing, "load_in_4bit": True, "max_length": 512}  # fmt: skip
        made = folders.create(resolved(folder_of("qwen3_moe"), data, **settings))
        starting.start(made, block=True)
        state = made.state()
        assert state.state == "finished", state.error
        losses[engine, checkpointing] = [m["loss"] for m in state.metrics if "loss" in m]
    trl = losses["trl", False]
    assert trl[0] == pytest.approx(0.5, abs=1e-5) and trl[-1] != pytest.approx(trl[0], rel=1e-3)
    for engine in (("packed", False), ("packed", True)):
        assert losses[engine] == pytest.approx(trl, rel=2e-3)


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_missing_and_misfit_experts_are_named(folder_of, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    folder = folder_of("qwen3_moe")
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.experts.3.up_proj.weight"
    cases = [
        ({name: None}, "1 of 12 weights of experts are missing"),
        ({name: torch.zeros(32, 64)}, "do not fit its config"),
        ({name.replace(".3.", ".6."): torch.zeros(64, 64)}, "do not fit its config|leaves out"),
    ]
    for i, (changed, words) in enumerate(cases):
        broken = tmp_path / f"broken{i}"
        shutil.copytree(folder, broken)
        kept = {k: v for k, v in (tensors | changed).items() if v is not None}
        save_file(kept, broken / "model.safetensors", {"format": "pt"})
        with pytest.raises(ModelError, match=words):
            load(broken)


def test_experts_of_another_form_are_refused_before_anything_is_loaded(tiny_model, tmp_path, monkeypatch):
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

    config = AutoConfig.for_model(
        "gpt_oss", **mixtures.SIZES, num_local_experts=4, num_experts_per_tok=2, vocab_size=300,
        layer_types=["full_attention"] * 3,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "oss")
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("was loaded"))
    with pytest.raises(ModelError, match=r"cannot be quantized to 4-bit while loading"):
        load(tmp_path / "oss")


def test_4_bit_experts_that_nobody_can_read_are_refused(folder_of, monkeypatch):
    folder = folder_of("qwen3_moe", nf4=True)
    monkeypatch.setattr(held, "why_not", lambda module: "its experts sing")
    monkeypatch.setattr(filling, "why_not", held.why_not)
    with pytest.raises(ModelError, match=r"are in 4 bits, and its experts sing, so they cannot be read \(model.layers"):
        load(folder)
    with pytest.raises(ModelError, match="cannot be quantized to 4-bit while loading: its experts sing"):
        load(folder_of("qwen3_moe"))


def test_experts_as_targets_are_refused(folder_of):
    config = resolved(folder_of("qwen3_moe"), "none", target_modules=["q_proj", "gate_proj"]).config
    with pytest.raises(ConfigError, match=r"experts cannot be trained \(gate_proj\)"):
        without_weights(config, folder_of("qwen3_moe"))
