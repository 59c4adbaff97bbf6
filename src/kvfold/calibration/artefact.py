"""Calibration artefacts: a safetensors file whose header says what it was made for, and from what.

Tensors are named `layers.{i}.{key|value}.{name}`. The metadata entry `kvfold` is JSON:

    format, preset, codecs, model, model_hash, tokens, context, sinks, data, data_sha256,
    kvfold, commit, date, sha256

`codecs` are the `Codec.to_json` of keys and values; `sha256` is over every other entry and every
tensor, so that a file in which any bit has changed is refused.
"""

import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvfold.codec import Codec, Preset, Side

#: version of the file; a reader refuses others.
FORMAT = 1
_NAME = re.compile(r"layers\.(\d+)\.(key|value)\.(\w+)")


class CalibrationError(ValueError):
    """An artefact that cannot be read, or that was made for something else."""


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
        sha = hashlib.sha256(json.dumps(dict(self.header), sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name].contiguous()
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return sha.hexdigest()

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
        path = Path(path)
        header = {**self.header, "sha256": self.digest}
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        data = save(tensors, metadata={"kvfold": json.dumps(header, sort_keys=True)})
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    @classmethod
    def load(cls, path: str | Path) -> "Artefact":
        """Read and check a file.

        Raises:
            CalibrationError: it does not exist, is no artefact, is truncated or was changed.
        """
        path = Path(path)
        if not path.is_file():
            raise CalibrationError(f"no such artefact: {path}")
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
            raise CalibrationError(
                f"{path} is not a readable artefact, perhaps truncated: {error}"
            ) from error
        if "kvfold" not in metadata:
            raise CalibrationError(
                f"{path} is a safetensors file but no kvfold artefact: it has no 'kvfold' header"
            )
        try:
            header = json.loads(metadata["kvfold"])
            version, stated = header["format"], header.pop("sha256")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CalibrationError(f"the header of {path} is damaged: {error!r}") from error
        if version != FORMAT:
            raise CalibrationError(
                f"{path} has artefact format {version}; this kvfold reads format {FORMAT}"
            )
        artefact = cls(header, tensors)
        if artefact.digest != stated:
            raise CalibrationError(
                f"{path} is damaged: its contents do not match its sha256 ({stated[:16]}…); make "
                "or fetch it again"
            )
        return artefact

    @classmethod
    def find(cls, folder: str | Path, model_hash: str) -> Iterator["Artefact"]:
        """The readable artefacts of a model under `folder`, by name."""
        for path in sorted(Path(folder).glob("**/*.safetensors")):
            try:
                artefact = cls.load(path)
            except CalibrationError:
                continue  # another kind of file, or another kvfold's
            if artefact.header["model_hash"] == model_hash:
                yield artefact


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
