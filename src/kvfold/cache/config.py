"""`CacheConfig`: everything that a user chooses about a cache."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from kvfold.cache.timeline import Budget
from kvfold.codec import CodecError, Preset, codec_from_json, get, presets

if TYPE_CHECKING:
    from kvfold.calibration.artefact import Artefact


@dataclass(frozen=True)
class CacheConfig:
    """What a cache keeps exact and how it codes the rest.

    `trim`, `prune` and `top_k` count tokens and are rounded down to whole pages of `block`.
    Positions stay absolute in all of them: what is left keeps the positions it was coded at, new
    tokens go on counting, and `max_tokens` still ends a row.

    Args:
        preset: the code of keys and values (`kvfold.presets()`).
        keys: preset whose key codec is taken instead, for separate K and V.
        values: preset whose value codec is taken instead.
        overrides: layer index to preset; `"identity"` keeps a layer exact.
        sinks: first tokens of each sequence, kept exact (StreamingLLM, arXiv:2309.17453).
        window: most recent tokens, kept exact; between `window` and `window + block - 1` are.
        block: tokens that are coded together when they leave the window; one page.
        max_tokens: longest sequence a row may reach, None for the model's own limit.
        slab_blocks: blocks of each row by which the page pool grows.
        graphs: replay decode steps as CUDA graphs; None where that is possible, True to be told
            where it is not, False never.
        trim: cold tokens of a row that are kept, the newest (StreamingLLM); None for all.
        prune: cold tokens of a row that decoding keeps, in the pages that got most attention; a
            prompt is kept whole until decoding has folded a page. None for all.
        top_k: cold tokens of a row that a decoded token reads, in the pages whose coarse scores are
            highest; None for all.
        max_bytes: bytes of the compressed layers, tables, sinks and window included. What does not
            fit loses its cold pages, those with the least attention first where it is known
            (`prune`), else the oldest; a budget below what has to be held is refused at once.
        offload: keep cold pages in pinned CPU memory and stream them to the GPU while attention
            reads them, the next group of pages on its way meanwhile. Kernels read device memory, so
            the page walk in torch attends. On a model that runs on the CPU it changes nothing.
        strict: raise where a slow or decoding path would be taken; else one warning names it.
        artefact: calibration for codecs that use one.
        sliding: sliding-window layers are kept `"exact"` by transformers' own class, or `"folded"`:
            packed like the others, pages behind the window dropped.
        unsupported: what to do with a model that has no layer to compress (latent attention,
            state spaces, cross-attention): `"refuse"` it by name, or keep it `"exact"`.
    """

    preset: str | Preset = "turboquant4"
    keys: str | Preset | None = None
    values: str | Preset | None = None
    overrides: Mapping[int, str | Preset] = field(default_factory=dict)
    sinks: int = 4
    window: int = 64
    block: int = 128
    max_tokens: int | None = None
    slab_blocks: int = 4
    graphs: bool | None = None
    trim: int | None = None
    prune: int | None = None
    top_k: int | None = None
    max_bytes: int | None = None
    offload: bool = False
    strict: bool = False
    artefact: "Artefact | None" = field(default=None, repr=False)
    unsupported: str = "refuse"
    sliding: str = "exact"

    def __post_init__(self) -> None:
        for name, possible in (
            ("unsupported", ("refuse", "exact")),
            ("sliding", ("exact", "folded")),
        ):
            if getattr(self, name) not in possible:
                choices = ", ".join(map(repr, possible))
                raise CodecError(f"{name} is {getattr(self, name)!r}; possible: {choices}")
        for name, least in (("sinks", 0), ("window", 1), ("block", 16), ("slab_blocks", 1)):
            if getattr(self, name) < least:
                raise CodecError(f"{name} ({getattr(self, name)}) must be at least {least}")
        if self.block % 16:
            raise CodecError(f"block ({self.block}) must be a multiple of 16; 128 is the default")
        for name, least in (("trim", 0), ("prune", 0), ("top_k", self.block), ("max_bytes", 1)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise CodecError(f"{name} ({given}) must be at least {least}, or None for no limit")
        if self.sliding == "folded" and (self.evicts or self.offload):
            raise CodecError(
                "sliding='folded' and a budget or offload (trim, prune, top_k, max_bytes) exclude "
                "each other: "
                "sliding layers let go of pages by themselves"
            )
        for layer in (None, *self.overrides):
            preset = self.preset_of(layer)
            for side, codec in (("keys", preset.keys), ("values", preset.values)):
                if codec.group_len > self.window:
                    raise CodecError(
                        f"window ({self.window}) is shorter than the groups of "
                        f"{codec.group_len} tokens that {preset.name!r} shares parameters over for "
                        f"its {side}; the window must be at least {codec.group_len}"
                    )

    def to_json(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_json`; the artefact, a file by itself, is left out."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "artefact"}
        for name in ("preset", "keys", "values"):
            named[name] = _preset_json(named[name])
        # keys of JSON are texts
        named["overrides"] = {str(i): _preset_json(p) for i, p in self.overrides.items()}
        return named

    @staticmethod
    def from_json(data: Mapping[str, Any], artefact: "Artefact | None" = None) -> "CacheConfig":
        """The config that `to_json` described, with an artefact if its presets need one."""
        given: dict[str, Any] = {**data, "artefact": artefact}
        for name in ("preset", "keys", "values"):
            given[name] = _preset_of_json(given[name])
        given["overrides"] = {int(i): _preset_of_json(p) for i, p in given["overrides"].items()}
        return CacheConfig(**given)

    @property
    def evicts(self) -> bool:
        """Whether tokens may be left out of attention."""
        return any(x is not None for x in (self.trim, self.prune, self.top_k, self.max_bytes))

    def budget(self, total: int | None = None) -> Budget:
        """The limits in pages; `total` is what `max_bytes` has room for."""
        trim, prune, top_k = (
            None if tokens is None else tokens // self.block
            for tokens in (self.trim, self.prune, self.top_k)
        )
        return Budget(trim, prune, top_k, total, self.offload)

    def check_artefact(self, model_hash: Callable[[], str]) -> None:
        """Raise unless calibrated presets have an artefact, and it is the model's.

        Raises:
            CodecError: a preset needs an artefact and none is given.
            CalibrationError: the artefact was made for another model or codec.
        """
        for preset in (self.preset_of(layer) for layer in (None, *self.overrides)):
            wants = (preset.keys.artefact, preset.values.artefact)
            if self.artefact is None:
                if "required" in wants:
                    raise CodecError(
                        f"preset {preset.name!r} needs a calibration artefact and none was given; "
                        f"make one with: kvfold calibrate --model M --preset {preset.name} "
                        "--text FILE --out F"
                    )
            elif wants != ("none", "none"):
                self.artefact.check(model_hash(), preset.keys, preset.values)

    def preset_of(self, layer: int | None) -> Preset:
        """The preset of a layer, K and V choices and overrides applied (None: the default)."""
        if layer is not None and layer in self.overrides:
            return get(self.overrides[layer])
        base = get(self.preset)
        if self.keys is None and self.values is None:
            return base
        keys = base if self.keys is None else get(self.keys)
        values = base if self.values is None else get(self.values)
        return Preset(f"{keys.name}+{values.name}", keys.keys, values.values)


def _preset_json(preset: str | Preset | None) -> Any:
    if not isinstance(preset, Preset):
        return preset
    if presets().get(preset.name) == preset:
        return preset.name
    sides = {"keys": preset.keys.to_json(), "values": preset.values.to_json()}
    return {"name": preset.name, **sides}


def _preset_of_json(data: Any) -> Any:
    if not isinstance(data, Mapping):
        return data
    return Preset(data["name"], codec_from_json(data["keys"]), codec_from_json(data["values"]))
