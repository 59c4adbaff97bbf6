"""Calibration artefacts: a safetensors file whose header says what it was made for, and from what.

Tensors are named `layers.{i}.{key|value}.{name}`. The metadata entry `kvfold` is JSON:

    format, preset, codecs, model, model_hash, tokens, context, sinks, data, data_sha256,
    kvfold, commit, date, sha256

`codecs` are the `Codec.to_json` of keys and values; `sha256` is over every other entry and every
tensor, so that a file in which any bit has changed is refused.
"""

import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from kvfold import sealed
from kvfold.codec import Codec, Preset, Side

_NAME = re.compile(r"layers\.(\d+)\.(key|value)\.(\w+)")


class CalibrationError(ValueError):
    """An artefact that cannot be read, or that was made for something else."""


#: version of the file; a reader refuses others.
FORMAT = 1
KIND = sealed.Kind("artefact", "kvfold", FORMAT, CalibrationError)


@dataclass(frozen=True)
class Artefact:
    """Learned tables of a model's layers, and where they come from.

    Args:
        header: as in the module's docstring, `sha256` left out.
        tensors: by full name, on the CPU.
    """

    header: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(repr=False)

    def __post_init__(self) -> None:
        for name in self.tensors:
            if not _NAME.fullmatch(name):
                raise CalibrationError(
                    f"tensor name {name!r} is not of the form layers.<i>.<key|value>.<name>"
                )

    @property
    def digest(self) -> str:
        """sha256 over header and tensors, the artefact's identity."""
        return sealed.digest(self.header, self.tensors)

    def at(self, layer: int, side: Side) -> dict[str, Tensor]:
        """The tables of one layer's keys or values by their short names, empty if it has none."""
        prefix = f"layers.{layer}.{side}."
        return {
            name.removeprefix(prefix): tensor
            for name, tensor in self.tensors.items()
            if name.startswith(prefix)
        }

    def serves(self, preset: Preset) -> bool:
        """Whether it was made for the calibrated codecs of a preset, and there are any."""
        wanted = [c for c in (preset.keys, preset.values) if c.artefact != "none"]
        return bool(wanted) and not any(self._mismatch(codec) for codec in wanted)

    def check(self, model_hash: str, *codecs: Codec) -> None:
        """Raise `CalibrationError` unless it was made for this model and these codecs.

        Args:
            model_hash: of the model that is to be used.
            codecs: the codecs that are to be bound; those that take no artefact do not matter.
        """
        if self.header["model_hash"] != model_hash:
            raise CalibrationError(
                f"the artefact was made for model {self.header['model']!r} (hash "
                f"{self.header['model_hash']}); this model has hash {model_hash}: calibrate it "
                f"with: kvfold calibrate --model M --preset {self.header['preset']} --text FILE "
                "--out F"
            )
        for codec in codecs:
            if codec.artefact != "none" and (why := self._mismatch(codec)):
                raise CalibrationError(why)

    def _mismatch(self, codec: Codec) -> str:
        """Why a codec cannot use it, empty if it can."""
        wanted = codec.to_json()
        found = [c for c in self.header["codecs"] if c["codec"] == wanted["codec"]]
        if not found:
            names = " and ".join(sorted({c["codec"] for c in self.header["codecs"]}))
            return (
                f"the artefact was made for codec {names} (preset {self.header['preset']!r}), not "
                f"for {wanted['codec']}"
            )
        if all(c["version"] != wanted["version"] for c in found):
            return (
                f"the artefact was made for version {found[0]['version']} of codec "
                f"{wanted['codec']}; this kvfold has version {wanted['version']}: calibrate again"
            )
        knobs = codec.calibrated_knobs()
        if all(any(c.get(k) != v for k, v in knobs.items()) for c in found):
            had = ", ".join(f"{k}={found[0].get(k)!r}" for k in knobs)
            wants = ", ".join(f"{k}={v!r}" for k, v in knobs.items())
            return f"the artefact was fitted with {had}; {wanted['codec']} here has {wants}"
        return ""

    # --- files -----------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write the file, whole or not at all."""
        sealed.write(Path(path), KIND, self.header, self.tensors)

    @classmethod
    def load(cls, path: str | Path) -> "Artefact":
        """Read and check a file.

        Raises:
            CalibrationError: it does not exist, is no artefact, is truncated or was changed.
        """
        return cls(*sealed.read(Path(path), KIND))

    @classmethod
    def find(cls, folder: str | Path, model_hash: str) -> Iterator["Artefact"]:
        """The readable artefacts of a model under `folder`, by name."""
        for path in sorted(Path(folder).glob("**/*.safetensors")):
            try:
                state = path.stat()
                artefact = _unchanged(path, state.st_mtime_ns, state.st_size)
            except CalibrationError:
                continue  # another kind of file, or another kvfold's
            if artefact.header["model_hash"] == model_hash:
                yield artefact


@lru_cache(maxsize=4)
def _unchanged(path: Path, mtime_ns: int, size: int) -> Artefact:
    """A file's artefact, read once while the file stays the same: each new cache asks for it."""
    return Artefact.load(path)


@lru_cache
def commit() -> str | None:
    """The commit of this kvfold where it runs from a checkout, with `-dirty` if it was changed.

    `KVFOLD_COMMIT` names it where the tree was copied without its history.
    """
    if os.environ.get("KVFOLD_COMMIT"):
        return os.environ["KVFOLD_COMMIT"]
    here = Path(__file__).resolve()

    def git(*args: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", str(here.parent), *args],
                capture_output=True,
                text=True,
                timeout=10,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", here.name) is None:
        return None  # installed, perhaps inside somebody else's checkout
    found = git("rev-parse", "HEAD")
    if found and git("status", "--porcelain", "--untracked-files=no", "--", ":/src"):
        found += "-dirty"
    return found
