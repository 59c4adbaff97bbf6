"""Sealed files: safetensors with a JSON header and a checksum, written whole or not at all.

The metadata entry named by `Kind.key` is the header; its `format` is checked before anything else,
its `sha256` is over every other entry and every tensor, so that a file in which any bit has changed
is refused. Nothing is ever unpickled.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """One kind of sealed file.

    Args:
        name: what messages call it.
        key: metadata entry of its header.
        format: version that this kvfold writes and reads.
        error: raised for files that cannot be read.
    """

    name: str
    key: str
    format: int
    error: type[ValueError]


def digest(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """sha256 over a header and tensors on the CPU."""
    sha = hashlib.sha256(json.dumps(dict(header), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def write(path: Path, kind: Kind, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write a sealed file; `header` without its `sha256`."""
    sealed = {**header, "sha256": digest(header, tensors)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_whole(path, save(contiguous, metadata={kind.key: json.dumps(sealed, sort_keys=True)}))


def write_whole(path: Path, data: bytes) -> None:
    """Write bytes beside their place and move them there, so that a file is whole or absent."""
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


def read(path: Path, kind: Kind) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file whose checksum is right.

    Raises:
        kind.error: it does not exist, is of another kind or format, is truncated or was changed.
    """
    header, stated, tensors = _open(path, kind, with_tensors=True)
    if digest(header, tensors) != stated:
        raise kind.error(
            f"{path} is damaged: its contents do not match its sha256 ({str(stated)[:16]}…); make "
            "or fetch it again"
        )
    return header, tensors


def read_header(path: Path, kind: Kind) -> dict[str, Any]:
    """The header alone, unchecked but for its format: to look things up."""
    return _open(path, kind, with_tensors=False)[0]


def _open(
    path: Path, kind: Kind, *, with_tensors: bool
) -> tuple[dict[str, Any], str, dict[str, Tensor]]:
    if not path.is_file():
        raise kind.error(f"no such {kind.name}: {path}")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if with_tensors:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise kind.error(
            f"{path} is not a readable {kind.name}, perhaps truncated: {error}"
        ) from error
    if kind.key not in metadata:
        raise kind.error(
            f"{path} is a safetensors file but no kvfold {kind.name}: it has no {kind.key!r} header"
        )
    try:
        header = json.loads(metadata[kind.key])
        version, stated = header["format"], header.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise kind.error(f"the header of {path} is damaged: {error!r}") from error
    if version != kind.format:
        raise kind.error(
            f"{path} has {kind.name} format {version}; this kvfold reads format {kind.format}"
        )
    return header, stated, tensors
