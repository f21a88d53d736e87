"""The tokens of a chat answer on a GPU: keys and values written in place, the step captured as a CUDA graph.

A step of one token is hundreds of small kernels; started one by one from Python they cost several times what they
compute. The graph starts them all at once. Graphs and caches belong to a `Decoder` and go with it. On a CPU the same
steps run without a graph.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F

from kto_core.engine.layers import attention, lean
from kto_core.engine.layers.loss import Head
from kto_core.engine.support import available, is_mixture, recurrent_kinds
from kto_core.models.experts import held
from kto_core.models.language.part import decoder_of

logger = logging.getLogger(__name__)

NAME = "kto_decode"
SMALLEST = 2048  # tokens of the first cache; it doubles when a conversation outgrows it
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")  # others look at the positions' values


def serves(model) -> bool:
    """Whether a loaded model's steps can run here: a decoder of attention layers on one device, dense or with its
    experts in 4 bits."""
    config = model.config
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = {r.get("rope_type", "default") for r in (rope, *rope.values()) if isinstance(r, dict)}
    one_device = len({p.device for p in model.parameters()}) == 1
    # a step whose kernels depend on the token cannot be captured
    fixed = not is_mixture(text) or bool(held.held(model))
    attends = not recurrent_kinds(config)  # of others the graph would have to keep states, too
    return fixed and attends and one_device and kinds <= set(FIXED_ROPE) and available(config)[0]


def ready(model, ids: list[int], adapter: bool) -> Decoder | None:
    """A decoder that has answered ``ids`` once, tuned and base; None without a GPU, or where it does not work."""
    if model.device.type != "cuda" or not serves(model):
        return None
    decoder = Decoder(model)
    try:
        for base in (True, False) if adapter else (False,):
            for _ in decoder.tokens(ids, base, lambda text, logits: logits.argmax(-1), 3):
                pass
        return decoder
    except Exception as e:  # whatever an unusual model or driver does, generate is still there
        decoder.close()
        logger.warning("Falling back to transformers' generate, which is slower: %s", e)
        return None


class Decoder:
    """Runs one model, batch 1, keeping the keys and values of the last conversation.

    Args:
        model: a causal LM or a PeftModel over one.
        graph: capture the one-token step; default on a GPU.
    """

    def __init__(self, model, graph: bool | None = None):
        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.decoder = decoder_of(self.causal)
        self.head = Head.of(self.causal)
        self.device = model.device
        self.graph = self.device.type == "cuda" if graph is None else graph
        self._configs = attention.configs(model)
        self._forwards = _step_forwards(self.decoder)
        self._cache: _Cache | None = None
        self._graphs: dict[tuple, tuple] = {}  # of each set of weights: base, or an adapter

    @torch.inference_mode()
    def tokens(self, ids: list[int], base: bool, choose: Callable, limit: int, fresh: bool = False) -> Iterator[int]:
        """Yield the ids of an answer to ``ids``, at most ``limit``, without end.

        Args:
            base: without the adapter. choose: (all ids so far ``[1, n]``, fp32 logits ``[1, vocabulary]``) -> id tensor
                ``[1]``; see `sampling`. fresh: read the whole prompt: the same question is the same computation.
        """
        attention.register(NAME, _attend)
        self._room(len(ids) + 1)
        if fresh:
            self._cache.ids = []
        text = torch.zeros(1, len(ids) + limit, dtype=torch.long, device=self.device)
        text[0, : len(ids)] = torch.tensor(ids)
        weights = (base, getattr(self.model, "active_adapter", None))
        with self._running(base):
            logits = self._read(ids, weights)
        for n in range(len(ids), len(ids) + limit):
            token = choose(text[:, :n], logits)
            text[:, n] = token
            chosen = int(token)
            yield chosen
            if n + 1 < len(ids) + limit:
                self._room(n + 1)
                self._cache.token.fill_(chosen)
                self._cache.position.fill_(n)
                logits = self._step(weights)
                self._cache.ids.append(chosen)

    def close(self) -> None:
        """Drop the graphs and what they hold on the GPU."""
        self._graphs.clear()
        self._cache = None

    # ---- steps

    @contextlib.contextmanager
    def _running(self, base: bool):
        off = self.model.disable_adapter() if base else contextlib.nullcontext()
        with off, attention.use(self._configs, NAME), lean.use(self._forwards):
            yield

    def _room(self, tokens: int) -> None:
        """A cache of that many tokens at least. A larger one keeps what the smaller had; graphs are captured anew."""
        old = self._cache
        length = SMALLEST if old is None else old.length
        if old is not None and length >= tokens:
            return
        while length < tokens:
            length *= 2
        self._graphs.clear()
        new = self._cache = _Cache(length, self.device)
        if old is None:
            return
        new.ids, new.weights = old.ids, old.weights
        for number, tensors in old.layers.items():
            for kept, grown in zip(tensors, new.layer(number, tensors[0]), strict=True):
                grown[:, :, : old.length] = kept

    def _read(self, ids: list[int], weights: tuple) -> torch.Tensor:
        """Logits after the prompt. What the cache has of it already is not computed again."""
        cache = self._cache
        known = 0
        if cache.weights == weights:
            known = next((i for i, (a, b) in enumerate(zip(ids, cache.ids, strict=False)) if a != b), len(cache.ids))
        known = min(known, len(ids) - 1)
        cache.weights, cache.ids = weights, ids[:known]
        new = torch.tensor([ids[known:]], device=self.device)
        positions = torch.arange(known, len(ids), device=self.device)[None]
        run = _Run(cache, start=known)
        hidden = self.decoder(input_ids=new, position_ids=positions, use_cache=False, kto_decode=run).last_hidden_state
        cache.ids = list(ids)
        return self.head.logits(hidden[0, -1:])

    def _step(self, weights: tuple) -> torch.Tensor:
        """Logits after the cache's one token at its position."""
        if weights not in self._graphs:
            with self._running(weights[0]):  # takes longer than a captured step
                if not self.graph:
                    return self._one()
                self._graphs[weights] = self._captured()
        graph, logits = self._graphs[weights]
        graph.replay()
        return logits

    def _one(self) -> torch.Tensor:
        cache = self._cache
        out = self.decoder(
            input_ids=cache.token, position_ids=cache.position[None], use_cache=False, kto_decode=_Run(cache)
        )
        return self.head.logits(out.last_hidden_state[0])

    def _captured(self):
        """The step as a graph. The runs before it fill the workspaces; they write what the step itself will write."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._one()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._one()
        return graph, logits


class _Cache:
    """Keys and values of every layer, and the tensors a captured step reads. ``ids``: tokens that are in it."""

    def __init__(self, length: int, device):
        self.length, self.ids, self.weights = length, [], None
        self.layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.position = torch.zeros(1, dtype=torch.long, device=device)
        self.columns = torch.arange(length, device=device)

    def layer(self, number: int, key: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if number not in self.layers:
            shape = (1, key.shape[1], self.length, key.shape[3])
            self.layers[number] = tuple(torch.zeros(shape, dtype=key.dtype, device=key.device) for _ in range(2))
        return self.layers[number]


class _Run:
    """What attention needs of one forward: a prompt's part from ``start`` on, or one token at the cache's position."""

    def __init__(self, cache: _Cache, start: int | None = None):
        self.cache, self.start = cache, start


# ---- layers ----------------------------------------------------------------------------------------------------------


def _attend(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None, kto_decode=None, **_
):
    """transformers' attention signature: q ``[1, H, T, D]``, k and v ``[1, Hkv, T, D]`` -> (``[1, T, H, D]``, None)."""
    cache, start = kto_decode.cache, kto_decode.start
    keys, values = cache.layer(module.layer_idx, key)
    query = query.to(key.dtype)
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    if start is None:
        keys.index_copy_(2, cache.position, key)
        values.index_copy_(2, cache.position, value)
        return _attend_one(query, keys, values, cache, scaling, sliding_window, softcap), None
    end = start + query.shape[2]
    keys[:, :, start:end], values[:, :, start:end] = key, value
    allowed = None
    if start or (sliding_window and sliding_window < end):
        distance = cache.columns[start:end, None] - cache.columns[None, :end]
        allowed = (distance >= 0) & (distance < (sliding_window or end))
    out = attention.attend(query, keys[:, :, :end], values[:, :, :end], allowed, scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


def _attend_one(query, keys, values, cache, scaling, window, softcap):
    """All heads of one token over the whole cache; heads that share keys read them once."""
    q = query.view(1, keys.shape[1], -1, query.shape[-1])
    scores = (q @ keys.transpose(2, 3)).float() * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    distance = cache.position - cache.columns
    allowed = distance >= 0 if not window else (distance >= 0) & (distance < window)
    weights = scores.masked_fill_(~allowed, float("-inf")).softmax(-1).to(values.dtype)
    return (weights @ values).view(1, 1, -1, values.shape[-1])


def _step_forwards(decoder) -> lean.Forwards:
    """Fewer kernels: lean norms and rotation, and LoRA projections that leave the weight in its 4 bits."""
    found = [f for f in lean.lean_forwards(decoder) if f[2].func in lean.SMALL]
    return [*found, *((m, "forward", partial(_projection, m)) for m in decoder.modules() if lean.is_lora(m))]


def _projection(layer, x, *_, **__):
    base = layer.base_layer
    out = base(x)
    if layer.disable_adapters:
        return out
    adapter = next((name for name in layer.active_adapters if name in layer.lora_A), None)
    if adapter is None:  # the active one does not change this layer
        return out
    a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    low = F.linear(x.to(a.dtype), a).flatten(0, -2)
    added = torch.addmm(out.flatten(0, -2).to(b.dtype), low, b.t(), alpha=layer.scaling[adapter])
    return added.to(out.dtype).view(out.shape)
