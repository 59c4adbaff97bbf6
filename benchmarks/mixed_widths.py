"""Layers of head_dim 128 with the widths that a real model was given, to time kernels on."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

import kvfold
from kvfold.codec import ExampleTables, Site
from kvfold.codecs.fisher import Fisher
from kvfold.transforms.orthogonal import random_rotation

SHIPPED = Path(kvfold.__file__).parent / "artefacts/smollm2-135m-fisher.safetensors"
#: three neighbouring layers of SmolLM2-135M, three KV heads each.
LAYERS, PER_LAYER, DIM = 30, 3, 64


def tables(codec: Fisher, site: Site) -> ExampleTables:
    """Tables of eight heads whose widths are those of the shipped artefact.

    The eight heads are those of three neighbouring layers of SmolLM2-135M, at the place in the
    model whose keys and values together come nearest to `codec.bits`; each group of 8 coordinates
    stands for one of 16. Steps and offsets are the artefact's, bases are random rotations, means
    random: what a kernel's time and its error depend on is there, the model's states are not.
    """
    if site.head_dim != 2 * DIM or site.num_kv_heads > 3 * PER_LAYER:
        raise ValueError(f"tables are for head_dim {2 * DIM} and up to 9 heads, not for {site}")
    heads, dim = site.num_kv_heads, site.head_dim
    with safe_open(SHIPPED, "pt") as file:
        both = [
            [file.get_tensor(f"layers.{i}.{side}.{codec.table('codes')}") for i in range(LAYERS)]
            for side in ("key", "value")
        ]
    first = _nearest(both, codec.bits, heads)
    codes = torch.cat(both[site.side == "value"][first : first + 3], 1)[:, :heads]
    generator = torch.Generator().manual_seed(first)
    prefix = f"{codec.form}_" if site.side == "key" else ""
    return ExampleTables(
        {
            "mean": torch.randn(heads, dim, generator=generator) * (site.side == "key"),
            f"{prefix}basis": random_rotation(dim, 20_261).expand(heads, -1, -1),
            f"{prefix}scales": torch.ones(2, heads, dim),
            codec.table("codes"): codes.repeat_interleave(2, -1),
        }
    )


def _nearest(both: Sequence[Sequence[Tensor]], bits: float, heads: int) -> int:
    """The first of three layers whose mean width is nearest to `bits`."""
    means = [
        torch.cat([torch.cat(list(side[i : i + 3]), 1)[0, :heads] for side in both]).mean()
        for i in range(LAYERS - 2)
    ]
    return min(range(LAYERS - 2), key=lambda i: abs(float(means[i]) - bits))
