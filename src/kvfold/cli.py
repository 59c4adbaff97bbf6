"""`kvfold`: argument parsing, then one call each."""

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from kvfold.codec import CodecError, get, presets

app = typer.Typer(
    help="Compress the key/value cache of language models, and measure what it costs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class CommandError(ValueError):
    """A command that cannot be run as typed."""


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can act on become one line on stderr and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except Exception as error:
            if not isinstance(error, _user_errors()):
                raise
            message = " ".join(str(error).split())
            typer.echo(f"kvfold: {message}", err=True)
            raise typer.Exit(2) from None

    return run


Model = Annotated[
    str, typer.Option(help="smollm2-135m (demo weights), a local folder, a .gguf file or a hub id.")
]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], typer.Option(help="What weights are loaded as.")
]
Device = Annotated[
    str, typer.Option(help="cpu, cuda, cuda:1, mps; auto takes a GPU if there is one.")
]
Sinks = Annotated[int, typer.Option(min=0, help="First tokens of a sequence, kept exact.")]
Window = Annotated[int, typer.Option(min=1, help="Most recent tokens, kept exact.")]


@app.command("list")
@reported
def list_presets(
    head_dim: Annotated[int, typer.Option(min=1, help="Channels of a head.")] = 128,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads of a layer.")] = 8,
    block: Annotated[int, typer.Option(min=1, help="Tokens of a page.")] = 128,
    as_json: Annotated[bool, typer.Option("--json", help="JSON in place of a table.")] = False,
) -> None:
    """List the presets: bits per element, paper, what each one needs."""
    from kvfold.evaluation.report import catalogue, catalogue_table

    entries = catalogue(head_dim=head_dim, num_kv_heads=kv_heads, block_len=block)
    if as_json:
        typer.echo(json.dumps(entries, indent=2, ensure_ascii=False))
        return
    title = f"bits per element at head_dim {head_dim}, {kv_heads} KV heads, pages of {block} tokens"
    _console().print(catalogue_table(entries, title))


@app.command()
@reported
def generate(
    model: Model,
    preset: Annotated[str, typer.Option(help="See `kvfold list`.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the text.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    artefact: Annotated[
        Path | None, typer.Option(help="Calibration, from `kvfold calibrate`.")
    ] = None,
    sinks: Sinks = 4,
    window: Window = 64,
    block: Annotated[int, typer.Option(min=1, help="Tokens coded together.")] = 128,
    compare: Annotated[bool, typer.Option(help="Run the stock cache too.")] = False,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Continue a prompt greedily with a packed cache; print text, speed and bytes."""
    if (prompt is None) == (prompt_file is None):
        raise CommandError("give the prompt by exactly one of --prompt and --prompt-file")
    text = prompt if prompt_file is None else _read(prompt_file)
    chosen = get(preset)
    from kvfold.calibration.artefact import Artefact
    from kvfold.evaluation import generation
    from kvfold.evaluation.report import write_json

    calibration = None if artefact is None else Artefact.load(artefact)
    loaded, tokenizer = _load(model, dtype, device)
    if calibration is None:
        calibration = next((a for a in _found(loaded) if a.serves(chosen)), None)
    result = generation.generate(
        loaded,
        tokenizer,
        text or "",
        chosen,
        max_new_tokens=max_new_tokens,
        sinks=sinks,
        window=window,
        block=block,
        artefact=calibration,
        compare=compare,
    )
    typer.echo(result.text)
    _console().print(result.table())
    if json_out is not None:
        write_json(json_out, {"preset": chosen.name, "model": model, **result.to_json()})


@app.command("eval")
@reported
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="A text file.")],
    preset_names: Annotated[
        str,
        typer.Option("--presets", help="Names with commas between; all: every one that can run."),
    ],
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Disjoint windows; by default the whole text.")
    ] = None,
    sinks: Sinks = 4,
    window: Window = 64,
    block: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that leave the window together: 1, decoding a page."),
    ] = None,
    path: Annotated[
        str,
        typer.Option(help="oracle: all queries at once; decode: token by token with a cache."),
    ] = "oracle",
    page_len: Annotated[int, typer.Option(min=1, help="Tokens of a stored page.")] = 128,
    rows: Annotated[
        int | None, typer.Option(min=1, help="Windows of one forward; by default 1, on CUDA 4.")
    ] = None,
    artefact: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration; may be repeated. By default found by the model's hash."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Measure presets on a text: KL, top-1 agreement and perplexity in streaming semantics."""
    given = [name.strip() for name in preset_names.split(",") if name.strip()]
    chosen = [get(name) for name in (presets() if given == ["all"] else given)]
    content = _read(text)
    from kvfold.calibration.artefact import Artefact
    from kvfold.evaluation import perplexity

    artefacts = [Artefact.load(path) for path in artefact or ()]
    loaded, tokenizer = _load(model, dtype, device)
    artefacts = artefacts or list(_found(loaded))
    if given == ["all"]:
        chosen, reasons = perplexity.runnable(
            loaded,
            chosen,
            sinks=sinks,
            window=window,
            artefacts=artefacts,
            page_len=page_len,
        )
        for name, why in reasons.items():
            typer.echo(f"left out {name}: {why}", err=True)
    with _progress("evaluating") as advance:
        report = perplexity.evaluate(
            loaded,
            tokenizer,
            content,
            chosen,
            context=context,
            windows=windows,
            sinks=sinks,
            window=window,
            block=block,
            path=cast(perplexity.Attending, path),
            artefacts=artefacts,
            page_len=page_len,
            rows=rows,
            progress=lambda p: advance(p.done, p.total, p.label),
            model_name=model,
            text_name=text.name,
        )
    _console().print(report.table())
    if json_out is not None:
        report.save(json_out)


@app.command()
@reported
def calibrate(
    model: Model,
    preset: Annotated[str, typer.Option(help="See `kvfold list`.")],
    text: Annotated[Path, typer.Option(help="A text file to learn from, not the one to test on.")],
    out: Annotated[
        Path | None,
        typer.Option(help="Artefact to write; by default where the other commands find it."),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="How much of the text to read.")] = 32_768,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    sinks: Sinks = 4,
    bits: Annotated[
        float | None,
        typer.Option(min=0.2, max=7, help="fisher: total bits per element, gains included."),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(help="fisher: keep what was collected here; continue from it if it is there."),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = "auto",
) -> None:
    """Learn a preset's tables (bases, channel orders, codebooks) from a model reading a text."""
    chosen = get(preset)
    content = _read(text)
    from kvfold.codecs import fisher
    from kvfold.integrations import collect
    from kvfold.integrations.describe import describe

    loaded, tokenizer = _load(model, dtype, device)
    if bits is not None:
        if not isinstance(chosen.keys, fisher.Fisher):
            raise CommandError(f"--bits is for fisher presets; {preset} has a width of its own")
        dims = [i.key_dim for i in describe(loaded) if i.kind == "full_attention"]
        chosen = fisher.preset_of(round(bits - 8 * len(dims) / sum(dims), 4), chosen.keys.form)
    from kvfold.integrations import artefacts

    with _progress("calibrating") as advance:
        artefact = collect.calibrate(
            loaded,
            tokenizer,
            content,
            chosen,
            tokens=tokens,
            context=context,
            sinks=sinks,
            statistics=statistics,
            model_name=model,
            data_name=text.name,
            progress=lambda done, total: advance(done, total, ""),
        )
    target = out or artefacts.folder(artefact.header["model_hash"]) / f"{chosen.name}.safetensors"
    artefact.save(target)
    typer.echo(
        f"{target}: {len(artefact.tensors)} tables of {chosen.name} from "
        f"{artefact.header['tokens']:,} tokens"
    )


def main() -> None:
    """The console script."""
    app()


# --- helpers ---------------------------------------------------------------------------------


def _user_errors() -> tuple[type[Exception], ...]:
    # imported here: they bring torch and transformers, which `--help` can do without
    from kvfold.cache.timeline import CacheError
    from kvfold.calibration.artefact import CalibrationError
    from kvfold.evaluation.generation import GenerationError
    from kvfold.evaluation.perplexity import EvaluationError
    from kvfold.integrations.describe import UnsupportedError
    from kvfold.integrations.models import ModelError

    return (
        *(CommandError, CodecError, CacheError, CalibrationError, EvaluationError),
        *(GenerationError, ModelError, UnsupportedError),
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise CommandError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{path} is not UTF-8 text: {error.reason}") from error


def _load(model: str, dtype: str, device: str) -> tuple[Any, Any]:
    import torch

    from kvfold.integrations.models import load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        first = str(error).splitlines()[0]
        raise CommandError(f"device {device!r} cannot be used: {first}") from error
    return load(model, dtype=getattr(torch, dtype), device=device)


def _found(model: Any) -> Iterator[Any]:
    from kvfold.integrations import artefacts

    return artefacts.found(model)


def _console(**more: Any) -> Console:
    console = Console(**more)
    if not console.is_terminal:  # a pipe or a log: 80 columns would cut names off
        console.width = max(console.width, 120)
    return console


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr; gives `advance(done, total, label)`."""
    columns = (
        TextColumn(title),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=None)

        def advance(done: int, total: int, label: str) -> None:
            bar.update(task, completed=done, total=total, description=label)

        yield advance


if __name__ == "__main__":
    main()
