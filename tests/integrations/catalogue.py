"""Presets that the suites of this folder run over, on any small model.

CI takes five, `make nightly` (KVFOLD_NIGHTLY=1) every one in the catalogue. Presets that need a
calibration get made-up tables: what is tested here is the cache, not quality.
"""

import os

import torch
import torch.nn.functional as F

import kvfold
from kvfold.cache.config import CacheConfig
from kvfold.calibration.artefact import Artefact
from kvfold.codec import Site
from kvfold.integrations import handles
from kvfold.integrations.describe import describe, model_hash
from kvfold.integrations.transformers import FoldedCache

NIGHTLY = bool(os.environ.get("KVFOLD_NIGHTLY"))
FIVE = ("identity", "kivi2-g64", "turboquant4", "rotatekv3", "fisher2")
ALL = tuple(kvfold.presets())
PRESETS = ALL if NIGHTLY else FIVE
LOSSY = tuple(name for name in PRESETS if name != "identity")


def made_up(model, preset, block):
    """An artefact for a model and a preset, as if it had been calibrated."""
    tensors = {}
    for info in describe(model):
        for side, codec, dim in (
            ("key", preset.keys, info.key_dim),
            ("value", preset.values, info.value_dim),
        ):
            if info.num_kv_heads and codec.artefact == "required":
                site = Site(side, info.num_kv_heads, dim, block, info.index, rope=info.rope)
                tables = codec.example(site).at(info.index, side)
                tensors |= {f"layers.{info.index}.{side}.{n}": t for n, t in tables.items()}
    codecs = [preset.keys.to_json(), preset.values.to_json()]
    header = {"model_hash": model_hash(model), "model": "tiny", "preset": preset.name}
    return Artefact(header | {"codecs": codecs}, tensors)


def folded(model, name, **options):
    """A strict FoldedCache for a preset, calibrated or not."""
    preset, options = kvfold.get(name), {"window": 64, "strict": True, **options}
    needs = "required" in (preset.keys.artefact, preset.values.artefact)
    tables = made_up(model, preset, options.get("block", 128)) if needs else None
    return FoldedCache(model, CacheConfig(preset, artefact=tables, **options))


def decode_then_sdpa(q, view, scaling, softcap=None, sink_logits=None):
    """Attention of a view's queries by torch, over states that were decoded, slot by slot."""
    keys, values = view.store.decoded(view, torch.float32)
    rows, heads, queries, _ = q.shape
    slots = keys.shape[2]
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
    token = torch.full((rows, slots), slots)
    for r in range(rows):
        place = view.store.slots_of(view.step, r)
        token[r, place] = torch.arange(len(place))
        token[r, place[~view.store.reads(view, r)]] = slots
    seen = token[:, None, None, :] <= view.query_tokens[:, None, :, None]
    window = view.store.sliding_window
    if window is not None:
        seen &= token[:, None, None, :] > view.query_tokens[:, None, :, None] - window
    if softcap is None and sink_logits is None:
        out = F.scaled_dot_product_attention(q.float(), keys, values, seen, scale=scaling)
    else:
        s = q.float() @ keys.mT * scaling
        s = s if softcap is None else softcap * torch.tanh(s / softcap)
        s = s.masked_fill(~seen, -torch.inf)
        if sink_logits is not None:
            s = torch.cat((s, sink_logits.float()[:, None, None].expand(rows, -1, queries, 1)), -1)
        out = s.softmax(-1)[..., :slots] @ values
    return torch.where((view.query_tokens >= 0)[:, None, :, None], out, 0.0)


class Checked:
    """Compares every read from codes with `decode_then_sdpa`; a fixture's worth of it."""

    def __init__(self, monkeypatch):
        self.errors, attend = [], handles.attend

        def both(q, view, *, say=None, **more):
            out = attend(q, view, say=say, **more)
            wanted = decode_then_sdpa(q, view, **more)
            self.errors.append(((out - wanted).norm() / wanted.norm().clamp_min(1e-9)).item())
            return out

        monkeypatch.setattr(handles, "attend", both)

    def worst(self):
        """The largest relative error since the last call, of at least one read."""
        assert self.errors, "nothing was read from codes"
        found, self.errors = max(self.errors), []
        return found
