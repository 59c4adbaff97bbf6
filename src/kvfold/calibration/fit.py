"""Fit the tables of a preset's codecs. How is the codec's business: `Codec.calibrator`."""

import datetime
from collections.abc import Mapping
from typing import Any

from torch import Tensor

import kvfold
from kvfold.calibration.artefact import FORMAT, Artefact, CalibrationError, commit
from kvfold.codec import Calibrator, Preset, Side, Site


class Fit:
    """One calibration of a preset: fed states layer by layer, it accumulates what codecs ask for.

    Args:
        preset: the preset whose codecs are fitted.
        sites: the layers' keys and values.
        sinks: first tokens of each row that are left out, because the cache keeps them exact.

    Raises:
        CalibrationError: nothing in the preset is calibrated.
    """

    def __init__(self, preset: Preset, sites: list[Site], sinks: int = 4) -> None:
        self.preset, self.sinks, self.tokens = preset, sinks, 0
        self.calibrators: dict[tuple[int, Side], Calibrator] = {}
        for site in sites:
            codec = preset.keys if site.side == "key" else preset.values
            calibrator = codec.calibrator(site)
            if calibrator is not None:
                self.calibrators[site.layer, site.side] = calibrator
        if not self.calibrators:
            raise CalibrationError(f"preset {preset.name!r} has nothing to calibrate")

    def add(self, layer: int, side: Side, states: Tensor, positions: Tensor) -> None:
        """States of one window: keys after RoPE, or values, `[rows, kv_heads, tokens, head_dim]`.

        Args:
            layer: the layer's index.
            side: keys or values.
            states: in any float dtype.
            positions: `[rows, tokens]`; rows start at token 0.
        """
        if calibrator := self.calibrators.get((layer, side)):
            calibrator.add(states[:, :, self.sinks :].float(), positions[:, self.sinks :])

    def tensors(self) -> dict[str, Tensor]:
        """The fitted tables by full name, on the CPU."""
        return {
            f"layers.{layer}.{side}.{name}": tensor.detach().cpu().contiguous()
            for (layer, side), calibrator in self.calibrators.items()
            for name, tensor in calibrator.tables().items()
        }

    def artefact(self, conditions: Mapping[str, Any]) -> Artefact:
        """The artefact, its header completed by `conditions` (model, model_hash, tokens, data)."""
        header = {
            "format": FORMAT,
            "preset": self.preset.name,
            "codecs": [self.preset.keys.to_json(), self.preset.values.to_json()],
            "kvfold": kvfold.__version__,
            "commit": commit(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **conditions,
        }
        return Artefact(header, self.tensors())
