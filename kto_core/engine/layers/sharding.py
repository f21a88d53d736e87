"""The frozen weights of the decoder layers, divided over the processes: a model that one card does not hold (FSDP2).

Each process keeps its share of every layer; a layer is gathered when its forward or its backward begins and given up
after it. Gathering takes all processes, so all of them must run the same layers in the same order: `step.Engine` runs
passes that change nothing where a process has fewer than another. Whole everywhere are the embeddings, the output head,
norms and biases, the scales of 4-bit weights, and the adapters, whose gradients the trainer sums.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist

from kto_core.engine.packing.passes import GATHERED

FOUR_BITS = ("quant_state", "quant_type", "quant_storage", "compress_statistics", "blocksize", "bnb_quantized")


def load_divided(load: Callable, device: torch.device):
    """The model of ``load()``, which has it in main memory, on ``device`` and divided over all processes.

    The processes of a machine take turns, so that its main memory holds one whole model.

    Args:
        load: returns a causal LM without adapters; its errors are raised.
    """
    from torch.distributed.device_mesh import init_device_mesh

    from kto_core.models.load import free_memory

    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    turns = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # NCCL's patience is shorter than a load
    number = torch.tensor(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    dist.all_reduce(number, dist.ReduceOp.MAX, group=turns)
    model = None
    for turn in range(int(number)):
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            model = load()
            divide(model, device, mesh)
            free_memory()
        dist.barrier(group=turns)
    return model


def divide(model, device: torch.device, mesh) -> None:
    """Move ``model`` (a causal LM without adapters) to ``device``, of its decoder layers this process's share only."""
    from torch.distributed.fsdp import fully_shard
    from transformers.modeling_layers import GradientCheckpointingLayer

    from kto_core.models.language.part import decoder_of
    from kto_core.models.load import keep_weights_trainable

    keep_weights_trainable(model)
    model.requires_grad_(False)
    decoder = decoder_of(model)
    layers = [m for m in decoder.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(m) for layer in layers for m in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            module._apply(lambda tensor: tensor.to(device), recurse=False)
    for layer in layers:
        layer.to(device)
        _divide_layer(layer, mesh)
    # the layers' common root: it gathers the next layer while one runs
    fully_shard(decoder, mesh=mesh, reshard_after_forward=True, ignored_params=set(decoder.parameters()))
    if hasattr(model, "hf_device_map"):  # PEFT and transformers go by it
        model.hf_device_map = {"": device}


def _divide_layer(layer, mesh) -> None:
    from torch.distributed.fsdp import fully_shard

    whole = {p for p in layer.parameters() if p.ndim < 2}
    four_bits = {}
    for module in layer.modules():
        weight = module._parameters.get("weight")
        if (state := getattr(weight, "quant_state", None)) is not None:
            module.quant_state = state  # where bitsandbytes looks for it when the gathered weight has none
            four_bits[module] = {name: getattr(weight, name) for name in FOUR_BITS if hasattr(weight, name)}
            data = weight.data.as_subclass(torch.Tensor)
            module.weight = torch.nn.Parameter(as_float32(data), requires_grad=False)
    fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
    for module, values in four_bits.items():
        vars(module.weight).update(values)


def as_float32(data: torch.Tensor) -> torch.Tensor:
    """The same bytes, ``[n, 1]``, in the one format in which FSDP gathers them unchanged.

    It fails on parameters that are whole numbers (torch 2.11), and on a GPU it copies 16-bit floats by way of float32
    (`_foreach_copy_`), which makes every NaN the same NaN: one in 250 pairs of random bytes is one in bfloat16.
    Bytes that are no multiple of four stay as they are.
    """
    data = data.reshape(-1)
    return (data.view(torch.float32) if data.nbytes % 4 == 0 else data)[:, None]


def is_divided(module) -> bool:
    return hasattr(module, "unshard")  # FSDPModule's, which nobody needs to import who divides nothing


def _is_share(tensor) -> bool:
    return hasattr(tensor, "full_tensor")  # a DTensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor; of a divided one by asking all processes, which must ask for the same one."""
    if not _is_share(tensor):
        return tensor
    found = tensor.detach().full_tensor()
    if getattr(tensor, "quant_storage", found.dtype) != found.dtype:  # see `as_float32`
        found = found.view(-1).view(tensor.quant_storage)[:, None]
    return found


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What of a tensor this process holds."""
    return tensor.to_local() if _is_share(tensor) else tensor


@contextlib.contextmanager
def gathered(layer) -> Iterator[None]:
    """Inside, the weights of a divided layer are whole; of another one they are so anyway. All processes take part."""
    if not is_divided(layer):
        yield
        return
    layer.unshard()
    try:
        yield
    finally:
        layer.reshard()


def gathered_bytes(layers) -> int:
    """Bytes that gathered layers take beside this process's share of all."""
    sizes = [sum(p.numel() * p.element_size() for p in layer.parameters() if _is_share(p)) for layer in layers]
    return GATHERED * max(sizes, default=0)


def largest(numbers: list[int], device: torch.device) -> list[int]:
    """Of each of these numbers the largest that a process has."""
    maxima = torch.tensor(numbers, device=device)
    dist.all_reduce(maxima, dist.ReduceOp.MAX)
    return maxima.tolist()
