"""What compression costs, token by token: KL, top-1 agreement, cross-entropy."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

#: logits worked on at once, by device type: 128 MB and 1 GB in float32.
CHUNK_ELEMENTS = {"cpu": 1 << 25, "cuda": 1 << 28}


@dataclass(frozen=True)
class TokenScores:
    """Scores of the same tokens under a reference and a compressed model, one axis each.

    Args:
        kl: KL(reference || compressed) of the next-token distributions, nats.
        agree: whether both find the same token the likeliest.
        nll: cross-entropy of the text's token under the compressed model, nats.
        nll_reference: the same under the reference.
    """

    kl: Tensor
    agree: Tensor
    nll: Tensor
    nll_reference: Tensor


def token_scores(reference: Tensor, logits: Tensor, targets: Tensor) -> TokenScores:
    """Score tokens from two sets of logits `[tokens, vocabulary]`, in float32, chunk by chunk.

    KL = sum_v p_v (z_v - z'_v) - lse(z) + lse(z'),   p = softmax(z)
    """
    budget = CHUNK_ELEMENTS.get(logits.device.type, 1 << 26)
    rows = max(1, budget // logits.shape[-1])
    parts = []
    for a in range(0, len(logits), rows):
        z, other = reference[a : a + rows].float(), logits[a : a + rows].float()
        target = targets[a : a + rows, None]
        lse, lse_other = z.logsumexp(-1), other.logsumexp(-1)
        p = (z - lse[:, None]).exp_()
        kl = (p * (z - other)).sum(-1) - lse + lse_other
        nll = lse_other - other.gather(-1, target)[:, 0]
        nll_reference = lse - z.gather(-1, target)[:, 0]
        parts.append((kl, z.argmax(-1) == other.argmax(-1), nll, nll_reference))
    return TokenScores(*(torch.cat(column) for column in zip(*parts, strict=True)))


def quantile(x: Tensor, q: float) -> float:
    """The smallest value with at least a share `q` of `x` at or below it."""
    flat = x.flatten()
    return float(flat.kthvalue(max(1, math.ceil(q * flat.numel()))).values)


def perplexity_delta(nll: Tensor, nll_reference: Tensor) -> tuple[float, float, float, str]:
    """Perplexity, its relative change and the standard error of the change.

        delta = exp(mean d) - 1,   se = exp(mean d) * std(d) / sqrt(n),   d = nll - nll_reference

    Paired: d is the difference on the same tokens. Errors are taken over windows, whose tokens
    depend on one another, or over tokens where there is a single window.

    Args:
        nll: `[windows, tokens]` cross-entropies of the compressed model.
        nll_reference: those of the reference.

    Returns:
        perplexity, delta, standard error, and `"windows"` or `"tokens"`.
    """
    d = nll.double() - nll_reference.double()
    over = "windows" if len(d) > 1 else "tokens"
    samples = d.mean(1) if over == "windows" else d.flatten()
    mean = float(d.mean())
    error = float(samples.std()) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    ratio = math.exp(min(mean, 700.0))
    return math.exp(min(float(nll.double().mean()), 700.0)), ratio - 1, ratio * error, over
