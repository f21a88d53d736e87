"""TRL's training metrics from the results of one step."""

from __future__ import annotations

import torch


def reference_gap(results: list) -> tuple[float, float]:
    """How far policy and reference are apart: |difference of a row's log-probs|, the mean; and the mean of that by the
    root of a row's tokens, since what rounding does to a token goes either way."""
    rows = [(_gain(group, result).abs(), result.lengths.sqrt()) for group, result in results if group is not None]
    if not rows:
        return 0.0, 0.0
    off, root = (torch.cat(values) for values in zip(*rows, strict=True))
    return float(off.mean()), float((off / root).mean())


def _gain(group, result) -> torch.Tensor:
    """log pi(y|x) - log pi_ref(y|x) of each row."""
    return result.logps - group.ref.to(result.logps.dtype)


def record(metrics: dict, results: list, beta: float, device, reduce=None) -> int:
    """Append one value a metric for each (group, result) of a step; one pair a KL group.

    Args:
        metrics: name -> list of values, TRL's ``_metrics[mode]``.
        results: pairs of `group.Group` and `group.Result`, or (None, z0) for a process that had no rows.
        reduce: sums a tensor over all processes.

    Returns the rows' tokens.
    """
    tokens_seen = 0
    for group, result in results:
        total = torch.zeros(13, dtype=torch.float64, device=device)
        if group is not None:
            rewards = beta * _gain(group, result)
            sums = [result.entropy.sum(), result.lengths.sum(), result.lengths.new_tensor(result.tokens)]
            for side in (group.labels, ~group.labels):
                sums += [side.sum(), rewards[side].sum(), result.logps[side].sum()]
                sums += [result.mean_logits[side].sum(), result.lengths[side].sum()]
            total = torch.stack([s.double() for s in sums])
        if reduce is not None:
            total = reduce(total)
        entropy, scored, tokens, *sides = total.tolist()
        tokens_seen += int(tokens)
        metrics["kl"].append(float(result.z0 if group is not None else result))
        metrics["entropy"].append(entropy / max(1.0, scored))
        margin = 0.0
        for name, sign, (rows, reward, logp, logits, length) in (("chosen", 1, sides[:5]), ("rejected", -1, sides[5:])):
            if rows:
                metrics[f"rewards/{name}"].append(reward / rows)
                metrics[f"logps/{name}"].append(logp / rows)
                metrics[f"logits/{name}"].append(logits / length)
                margin += sign * reward / rows
        if sides[0] and sides[5]:
            metrics["rewards/margins"].append(margin)
    return tokens_seen
