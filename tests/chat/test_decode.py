"""The chat's own decoder against a plain forward and against transformers' generate; here without a graph."""

from types import SimpleNamespace

import pytest
import torch

from kto_core.chat import chat, decode
from kto_core.chat.decode import Decoder
from tests.support import oracle

PROMPT = [7, 20, 33, 5, 61, 12, 9, 44, 18, 30, 71]


def greedy(text, logits):
    return logits.argmax(-1)


def plain(model, ids, count, base=False):
    """Greedy ids from whole forwards, without any cache."""
    ids, found = list(ids), []
    with torch.no_grad(), model.disable_adapter() if base else torch.no_grad():
        for _ in range(count):
            found.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            ids.append(found[-1])
    return found


def tokens_read(decoder, monkeypatch) -> list[int]:
    """Fills with the tokens of each forward from now on."""
    read = []
    forward = decoder.decoder.forward
    monkeypatch.setattr(decoder.decoder, "forward", lambda **kw: read.append(kw["input_ids"].shape[1]) or forward(**kw))
    return read


OTHERS = {"gpt_oss", "qwen3.5 with images", *oracle.RECURRENT}


@pytest.mark.parametrize("architecture", sorted(OTHERS))
def test_mixtures_and_recurrent_layers_are_left_to_generate(architecture):
    assert not decode.serves(oracle.base_model(architecture))


@pytest.mark.parametrize("architecture", sorted(set(oracle.SERVED) - OTHERS))
def test_same_tokens_as_whole_forwards(architecture):
    model = oracle.tuned_model(architecture).eval()
    decoder = Decoder(model, graph=False)
    for base in (False, True, False):
        assert list(decoder.tokens(PROMPT, base, greedy, 12)) == plain(model, PROMPT, 12, base)
    assert decode.serves(model.get_base_model())


def test_what_is_known_of_a_conversation_is_not_read_again(monkeypatch):
    model = oracle.tuned_model().eval()
    decoder = Decoder(model, graph=False)
    read = tokens_read(decoder, monkeypatch)
    first = list(decoder.tokens(PROMPT, False, greedy, 5))
    assert read == [len(PROMPT), 1, 1, 1, 1]
    more = PROMPT + first + [3, 4, 5]
    read.clear()
    assert list(decoder.tokens(more, False, greedy, 3)) == plain(model, more, 3)
    assert read[0] == 4  # the last answered token was never run, and three are new
    read.clear()
    assert list(decoder.tokens(more, True, greedy, 1)) == plain(model, more, 1, base=True)
    assert read[0] == len(more)  # the base model's keys are others
    read.clear()
    changed = PROMPT[:4] + [50] + PROMPT[5:]
    assert list(decoder.tokens(changed, True, greedy, 2)) == plain(model, changed, 2, base=True)
    assert read[0] == len(changed) - 4
    abandoned = decoder.tokens(changed, True, greedy, 8)
    assert [next(abandoned), next(abandoned)] == plain(model, changed, 2, base=True)
    abandoned.close()
    assert list(decoder.tokens(changed, True, greedy, 6)) == plain(model, changed, 6, base=True)


def test_the_cache_grows(monkeypatch):
    monkeypatch.setattr(decode, "SMALLEST", 16)
    model = oracle.tuned_model().eval()
    decoder = Decoder(model, graph=False)
    for length in (11, 40, 15):
        ids = [5 + i % 60 for i in range(length)]
        assert list(decoder.tokens(ids, False, greedy, 5)) == plain(model, ids, 5)
    assert decoder._cache.length == 64
    decoder.close()
    assert list(decoder.tokens(PROMPT, False, greedy, 30)) == plain(model, PROMPT, 30)  # and in the middle of an answer
    assert decoder._cache.length == 64
    decoder.close()
    assert decoder._cache is None


def test_the_model_is_left_as_it_was():
    model = oracle.tuned_model().eval()
    names = {id(c): c._attn_implementation for c in [model.get_base_model().config]}
    code = type(model.get_base_model()).__module__
    answer = Decoder(model, graph=False).tokens(PROMPT, False, greedy, 4)
    next(answer)
    assert not any("forward" in vars(m) for m in model.modules())  # also between two tokens
    assert names == {id(c): c._attn_implementation for c in [model.get_base_model().config]}
    assert "partial" not in repr(vars(__import__("sys").modules[code])["apply_rotary_pos_emb"])
    list(answer)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 20},
        {"temperature": 0.8, "seed": 6, "repetition_penalty": 1.2, "tuned": False},
    ],
)
def test_a_chat_says_the_same_with_and_without(tiny_model, options):
    ask = [{"role": "user", "content": "What is 2 plus 2?"}]
    loaded = chat.Chat.load(str(tiny_model))
    try:
        before = "".join(loaded.stream(ask, max_new_tokens=24, **options))
        stats = loaded.stats
        loaded.decoder = Decoder(loaded.model, graph=False)
        assert "".join(loaded.stream(ask, max_new_tokens=24, **options)) == before
        assert {k: loaded.stats[k] for k in ("tokens", "ended")} == {k: stats[k] for k in ("tokens", "ended")}
        pieces = loaded.stream(ask, temperature=0, max_new_tokens=400)
        next(pieces)
        pieces.close()
        assert loaded.stats["ended"] == "stopped" and loaded.stats["tokens"] < 400
    finally:
        loaded.unload()
    assert loaded.decoder is None


def test_without_a_gpu_or_when_it_fails_generate_answers(tiny_model, monkeypatch, caplog):
    loaded = chat.Chat.load(str(tiny_model))
    assert decode.ready(loaded.model, PROMPT, False) is None  # no GPU
    monkeypatch.setattr(type(loaded.model), "device", SimpleNamespace(type="cuda", index=0))

    class Failing(Decoder):
        def __init__(self, model):
            super().__init__(model, graph=False)

        def tokens(self, *_):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decode, "Decoder", Failing)
    assert decode.ready(loaded.model, PROMPT, False) is None
    assert "generate, which is slower: operation not permitted" in caplog.text
    monkeypatch.undo()
    loaded.unload()


def test_a_failure_before_the_first_token_is_answered_by_generate(tiny_model, monkeypatch, caplog):
    ask = [{"role": "user", "content": "What is 2 plus 2?"}]
    loaded = chat.Chat.load(str(tiny_model))
    options = {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.2, "max_new_tokens": 16}
    expected = "".join(loaded.stream(ask, **options))

    def failing(after):
        def tokens(self, *_):
            yield from [40] * after
            raise RuntimeError("no memory for the graph")

        return tokens

    loaded.decoder = Decoder(loaded.model, graph=False)
    monkeypatch.setattr(Decoder, "tokens", failing(2))
    with pytest.raises(RuntimeError, match="no memory"):
        list(loaded.stream(ask, **options))
    assert loaded.decoder is not None  # half an answer is no reason to believe it never works
    monkeypatch.setattr(Decoder, "tokens", failing(0))
    assert "".join(loaded.stream(ask, **options)) == expected
    assert loaded.decoder is None and "slower: no memory for the graph" in caplog.text
    loaded.unload()


def test_the_same_seed_reads_the_whole_prompt(monkeypatch):
    model = oracle.tuned_model().eval()
    decoder = Decoder(model, graph=False)
    read = tokens_read(decoder, monkeypatch)
    for _ in range(2):
        list(decoder.tokens(PROMPT, False, greedy, 1, fresh=True))
    assert read == [len(PROMPT)] * 2


def test_positions_that_change_the_rotation_are_not_captured():
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config = LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, rope_parameters=rope)  # fmt: skip
    assert not decode.serves(LlamaForCausalLM(config))
