"""How much a training step computes, and how fast the device is at it."""

from __future__ import annotations

import statistics
import sys
import time


def layer_operations(folder: str) -> int:
    """Operations (a product and a sum are two) of one token's products with the decoder layers' weights, forward."""
    from kto_core.models import shape as model_shape

    shape = model_shape.find(folder)
    if shape is None or shape.experts:  # not every expert works on every token
        return 0
    return 2 * shape.linear_parameters


def recomputed(args, trainer, folder: str) -> float:
    """Share of a forward that the backward of the pass that begins repeats.

    Of the packed engine's recomputed layers all but the down projection where its own layers are in place; Unsloth and
    TRL recompute all layers or none.
    """
    from kto_core.models import shape as model_shape

    if args.worker != "packed":
        return 1.0 if args.worker == "unsloth" or args.checkpointing == "on" else 0.0
    shape, engine = model_shape.find(folder), trainer.engine
    if shape is None:
        return 0.0
    i, o = shape.linears["down_proj"]
    left_out = i * o * shape.layers / shape.linear_parameters if engine.lean else 0.0
    return engine.limits.checkpoint_layers / len(engine.layers) * (1 - left_out)


class Work:
    """Counts the tokens that go through a model's decoder, padding included, with a gradient to come and without.

    Recomputed layers do not pass here: ``share()``, asked as each pass begins, is the share of a forward that its
    backward repeats.
    """

    def __init__(self, model, a_token: int):
        self.a_token, self.share = a_token, lambda: 0.0
        self.reset()
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        decoder = getattr(causal, causal.base_model_prefix)
        self.hook = decoder.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs) -> None:
        import torch

        inputs = [kwargs.get("input_ids"), *args[:1]]
        tokens = next((x.numel() for x in inputs if x is not None), None)
        if tokens is None:
            embeds = kwargs["inputs_embeds"]
            tokens = embeds.shape[0] * embeds.shape[1]
        if torch.is_grad_enabled():
            self.with_gradient += tokens
            self.again += tokens * self.share()
        else:
            self.without += tokens

    def reset(self) -> None:
        self.with_gradient = self.without = 0
        self.again = 0.0

    @property
    def operations(self) -> float:
        """Forward 1, backward 1 (towards the activations: the weights are frozen), and what is computed again."""
        return self.a_token * (2 * self.with_gradient + self.again + self.without)

    def remove(self) -> None:
        """Let go of the model and of what ``share`` asks: the next run needs the memory."""
        self.hook.remove()
        self.share = None


def matrix_rate(device: str, size: int | None = None, repeat: int = 20) -> float:
    """Operations a second of one large product: bf16 with fp32 sums on a GPU, fp32 on a CPU. The median counts."""
    import torch

    gpu = device.startswith("cuda")
    size = size or (8192 if gpu else 1536)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32) for _ in range(2))
    out, times = torch.empty_like(a), []
    for _ in range(repeat + 3):
        start = now()
        torch.mm(a, b, out=out)
        times.append(now() - start)
    return 2 * size**3 / statistics.median(times[3:])


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


class profiled:
    """Prints the operators that take most of the time, and how much of it the GPU was busy, if ``wanted``."""

    def __init__(self, wanted: bool):
        self.wanted = wanted

    def __enter__(self):
        if self.wanted:
            import torch
            from torch.profiler import ProfilerActivity, profile

            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
            self.key = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
            self.profile = profile(activities=activities)
            self.profile.__enter__()
            self.began = now()

    def __exit__(self, *error):
        if self.wanted:
            wall = now() - self.began
            self.profile.__exit__(*error)
            averages = self.profile.key_averages()
            if busy := busy_seconds(averages):
                print(f"GPU busy {busy:.2f} of {wall:.2f} s", file=sys.stderr)
            print(averages.table(sort_by=self.key, row_limit=25), file=sys.stderr)


def busy_seconds(averages) -> float:
    """Of the kernels; the operators that started them are told apart from them, and named ranges span both."""
    from torch.autograd import DeviceType

    kernels = [e for e in averages if e.device_type != DeviceType.CPU and not getattr(e, "is_user_annotation", False)]
    return sum(e.self_device_time_total for e in kernels) / 1e6
