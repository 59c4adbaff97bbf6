"""Where the artefacts of a model are found: shipped with kvfold, or left by `kvfold calibrate`."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from kvfold.calibration.artefact import Artefact
from kvfold.codec import Preset
from kvfold.integrations.describe import model_hash
from kvfold.integrations.models import cache_dir

#: artefacts of the demo model.
SHIPPED = Path(__file__).parent.parent / "artefacts"


def folder(of: str) -> Path:
    """Where `kvfold calibrate` puts artefacts of the model with this hash."""
    return cache_dir() / "artefacts" / of


def found(model: nn.Module) -> Iterator[Artefact]:
    """The artefacts of a model: the user's own first, then the shipped ones."""
    of = model_hash(model)
    for place in (folder(of), SHIPPED):
        if place.is_dir():
            yield from Artefact.find(place, of)


def for_preset(model: nn.Module, preset: Preset) -> Artefact | None:
    """The first artefact that was made for a preset's codecs and this model."""
    return next((a for a in found(model) if a.serves(preset)), None)
