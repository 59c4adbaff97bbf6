"""Fidelity on a text: perplexity, KL and top-1 agreement of presets in streaming semantics."""

import datetime
import hashlib
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

import kvfold
from kvfold.attention.streaming import compressed_share
from kvfold.cache.config import CacheConfig
from kvfold.calibration.artefact import Artefact, commit
from kvfold.codec import CodecError, Preset, get
from kvfold.evaluation.metrics import TokenScores, perplexity_delta, quantile, token_scores
from kvfold.evaluation.report import Report, Row
from kvfold.integrations.describe import model_hash, text_config
from kvfold.integrations.streaming import Session
from kvfold.integrations.transformers import FoldedCache

Attending = Literal["oracle", "decode"]
#: rows of one forward; a GPU works on several windows at once.
ROWS = {"cuda": 4}


class EvaluationError(ValueError):
    """An evaluation that cannot be run as asked: says what was found and what is possible."""


@dataclass(frozen=True)
class Progress:
    """Where an evaluation stands: forwards done of all, and what has just been run."""

    done: int
    total: int
    label: str


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    presets: Iterable[str | Preset],
    *,
    context: int = 2048,
    windows: int | None = None,
    sinks: int = 4,
    window: int = 64,
    block: int | None = None,
    path: Attending = "oracle",
    artefacts: Sequence[Artefact] = (),
    page_len: int = 128,
    rows: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    model_name: str | None = None,
    text_name: str = "text",
) -> Report:
    """Compare presets with the uncompressed model on disjoint windows of a text.

    The text is tokenised once, without special tokens. Each window is run once uncompressed and
    once with every preset, in streaming semantics; tokens after position `sinks + window` count.

    Both paths compute the same: `"oracle"` in one parallel pass over decoded states, `"decode"`
    with a `FoldedCache` fed token by token, through the kernels and graphs that generation uses.
    Pages leave the window whole there, so compare it with the oracle at `block=page_len`.

    Args:
        model: a decoder model, on the device and in the dtype to evaluate in.
        tokenizer: its tokenizer.
        text: what to read.
        presets: names or presets.
        context: tokens of a window.
        windows: how many, None for as many as the text has.
        sinks: first tokens of each window, exact.
        window: most recent tokens of each query, exact.
        block: tokens that leave the window together, by default 1, on the decode path `page_len`;
            changes the mask only.
        path: what computes attention on the packed cache.
        artefacts: calibrations; each preset takes the first that was made for it.
        page_len: tokens of a stored page.
        rows: windows of one forward; by default 1, on CUDA 4.
        progress: called after every forward.
        model_name: for the report, by default the config's.
        text_name: for the report.

    Raises:
        EvaluationError: text too short, context past the model's limit or within the window.
        CodecError: an unknown preset, or one that lacks its artefact.
        UnsupportedError: a model that has nothing to compress.
    """
    chosen = [get(preset) for preset in presets]
    if not chosen:
        raise EvaluationError("no preset was given; `kvfold list` names them")
    if path not in get_args(Attending):
        raise EvaluationError(
            f"path {path!r} is unknown; possible: {', '.join(get_args(Attending))}"
        )
    if path == "decode" and block not in (None, page_len):
        raise EvaluationError(
            f"block ({block}) on the decode path: a cache folds whole pages, so page_len "
            f"({page_len}) is possible"
        )
    if block is None:
        block = page_len if path == "decode" else 1
    ids = windows_of(model, tokenizer, text, context, windows, sinks + window)
    sessions = [
        _session(model, preset, artefacts, sinks, window, block, page_len) for preset in chosen
    ]
    device = next(model.parameters()).device
    rows = rows or ROWS.get(device.type, 1)
    steps = -(-len(ids) // rows) * (1 + len(chosen))
    scores: list[list[TokenScores]] = [[] for _ in chosen]
    was_training, done = model.training, 0

    def report_step(label: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(Progress(done, steps, label))

    model.eval()
    try:
        with torch.no_grad():
            for batch in ids.split(rows):
                batch = batch.to(device)
                targets = batch[:, sinks + window + 1 :].flatten()
                reference = _logits(model, batch, sinks + window)
                report_step("uncompressed")
                for preset, session, into in zip(chosen, sessions, scores, strict=True):
                    if path == "decode":
                        logits = _decoded_logits(model, session.config, batch, sinks + window)
                    else:
                        with session:
                            logits = _logits(model, batch, sinks + window)
                    into.append(token_scores(reference, logits, targets.to(logits.device)))
                    del logits
                    report_step(preset.name)
    finally:
        model.train(was_training)
    share = compressed_share(context, sinks, window, block)
    results = [
        _row(preset, session, parts, len(ids), share)
        for preset, session, parts in zip(chosen, sessions, scores, strict=True)
    ]
    first = results[0]
    conditions = {
        "model": model_name or getattr(model.config, "_name_or_path", "") or "model",
        "model_type": text_config(model).model_type,
        "model_hash": model_hash(model),
        "text": text_name,
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "context": context,
        "windows": len(ids),
        "tokens_scored": len(ids) * (context - sinks - window - 1),
        "sinks": sinks,
        "window": window,
        "block": block,
        "path": path,
        "page_len": page_len,
        "layers": len(sessions[0].layers),
        "layers_compressed": len(sessions[0].folded),
        "ppl": first[1],
        "se_over": first[2],
        "artefacts": {
            preset.name: session.config.artefact.digest
            for preset, session in zip(chosen, sessions, strict=True)
            if session.config.artefact is not None
        },
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **environment(device),
    }
    return Report(conditions, [row for row, _, _ in results])


def runnable(
    model: nn.Module,
    presets: Iterable[Preset],
    *,
    sinks: int = 4,
    window: int = 64,
    artefacts: Sequence[Artefact] = (),
    page_len: int = 128,
) -> tuple[list[Preset], dict[str, str]]:
    """Those presets that `evaluate` can run on a model, and why each of the others cannot."""
    able, reasons = [], {}
    for preset in presets:
        try:
            _session(model, preset, artefacts, sinks, window, 1, page_len)
        except CodecError as error:
            reasons[preset.name] = str(error)
        else:
            able.append(preset)
    return able, reasons


def windows_of(
    model: nn.Module,
    tokenizer: Any,
    text: str,
    context: int,
    windows: int | None,
    exact: int,
) -> Tensor:
    """Disjoint windows `[windows, context]` of a text's tokens.

    Raises:
        EvaluationError: they do not exist, or nothing in them would be compressed.
    """
    limit = getattr(text_config(model), "max_position_embeddings", None)
    if limit is not None and context > limit:
        raise EvaluationError(f"context ({context}) is past the model's limit of {limit} positions")
    if context <= exact + 1:
        raise EvaluationError(
            f"context ({context}) leaves nothing to compress: sinks and window keep {exact} tokens "
            f"exact; at least {exact + 2} is possible"
        )
    if windows is not None and windows < 1:
        raise EvaluationError(f"windows ({windows}) must be at least 1")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    found = len(ids) // context
    if found < (windows or 1):
        raise EvaluationError(
            f"the text has {len(ids)} tokens; {windows or 1} windows of {context} need "
            f"{(windows or 1) * context} (it has {found})"
        )
    count = windows or found
    return ids[: count * context].view(count, context)


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what something was measured."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "kvfold": kvfold.__version__,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The name of the CPU, and the threads in use."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        name = models[0] if models else name
    return f"{name}, {torch.get_num_threads()} threads"


def _session(
    model: nn.Module,
    preset: Preset,
    artefacts: Sequence[Artefact],
    sinks: int,
    window: int,
    block: int,
    page_len: int,
) -> Session:
    """A preset bound to a model, with the first artefact that was made for it."""
    config = CacheConfig(
        preset,
        sinks=sinks,
        window=window,
        block=page_len,
        artefact=next((a for a in artefacts if a.serves(preset)), None),
    )
    return Session(model, config, block)


def _logits(model: nn.Module, ids: Tensor, first: int) -> Tensor:
    """Logits `[rows * tokens, vocabulary]` of the queries from `first` to the last but one."""
    return model(input_ids=ids, use_cache=False).logits[:, first:-1].flatten(0, 1)


def _decoded_logits(model: nn.Module, config: CacheConfig, ids: Tensor, first: int) -> Tensor:
    """The same logits from a packed cache: `first` tokens at once, then one after the other."""
    cache = FoldedCache(model, replace(config, strict=True))
    model(input_ids=ids[:, :first], past_key_values=cache, logits_to_keep=1)
    steps = [
        model(input_ids=ids[:, n : n + 1], past_key_values=cache).logits
        for n in range(first, ids.shape[1] - 1)
    ]
    return torch.cat(steps, 1).flatten(0, 1)


def _row(
    preset: Preset, session: Session, parts: list[TokenScores], windows: int, share: float
) -> tuple[Row, float, str]:
    """A preset's row, the uncompressed perplexity, and what its standard error is over."""
    kl, agree, nll, nll_reference = (
        torch.cat([getattr(part, name) for part in parts]).cpu()
        for name in ("kl", "agree", "nll", "nll_reference")
    )
    ppl, delta, error, over = perplexity_delta(
        nll.view(windows, -1), nll_reference.view(windows, -1)
    )
    row = Row(
        preset.name,
        session.bits_per_element(),
        float(kl.double().mean()),
        quantile(kl, 0.99),
        float(agree.double().mean()),
        ppl,
        delta,
        error,
        share,
    )
    return row, float(nll_reference.double().mean().exp()), over
