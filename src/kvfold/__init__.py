"""kvfold: the key/value cache of language models, 4 to 10 times smaller while they run.

    cache = kvfold.FoldedCache(model, "turboquant4")
    model.generate(**inputs, past_key_values=cache)

Codecs work on plain tensors and numpy arrays too:

    code = kvfold.encode(keys, "turboquant4", side="key")
    keys_again = code.decode()
"""

from typing import TYPE_CHECKING, Any

from kvfold.codec import CodecError, Preset, get, presets
from kvfold.encoding import Encoded, encode

if TYPE_CHECKING:
    from kvfold.cache.config import CacheConfig
    from kvfold.cache.timeline import CacheError
    from kvfold.calibration.artefact import Artefact, CalibrationError
    from kvfold.integrations.describe import UnsupportedError
    from kvfold.integrations.prefixes import PrefixStore
    from kvfold.integrations.routes import (
        RouteError,
        apply,
        disable,
        enable,
        fused,
        generate,
        remove,
    )
    from kvfold.integrations.states import LayerStates, collect_kv
    from kvfold.integrations.transformers import FoldedCache, FoldedWarning

__version__ = "0.1.0"

# imported when first used: transformers takes seconds to import, codecs do not need it
_LAZY = {
    "Artefact": "kvfold.calibration.artefact",
    "CacheConfig": "kvfold.cache.config",
    "CacheError": "kvfold.cache.timeline",
    "CalibrationError": "kvfold.calibration.artefact",
    "FoldedCache": "kvfold.integrations.transformers",
    "FoldedWarning": "kvfold.integrations.transformers",
    "LayerStates": "kvfold.integrations.states",
    "RouteError": "kvfold.integrations.routes",
    "PrefixStore": "kvfold.integrations.prefixes",
    "UnsupportedError": "kvfold.integrations.describe",
    "apply": "kvfold.integrations.routes",
    "collect_kv": "kvfold.integrations.states",
    "disable": "kvfold.integrations.routes",
    "enable": "kvfold.integrations.routes",
    "fused": "kvfold.integrations.routes",
    "generate": "kvfold.integrations.routes",
    "remove": "kvfold.integrations.routes",
}

__all__ = [
    "Artefact",
    "CacheConfig",
    "CacheError",
    "CalibrationError",
    "CodecError",
    "Encoded",
    "FoldedCache",
    "FoldedWarning",
    "LayerStates",
    "PrefixStore",
    "Preset",
    "RouteError",
    "UnsupportedError",
    "__version__",
    "apply",
    "collect_kv",
    "disable",
    "enable",
    "encode",
    "fused",
    "generate",
    "get",
    "presets",
    "remove",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'kvfold' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
