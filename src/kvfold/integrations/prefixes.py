"""A folder of saved prefixes: the longest one that a prompt begins with is loaded, not prefilled.

Each file is a saved cache with its token ids. Beside them, `index/<hash>` names the file for every
whole block of its tokens, where the hash chains over the blocks before (`h = sha256(h + tokens)`,
from a hash of model, preset and settings): a lookup costs one file test a block of the prompt.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kvfold import sealed
from kvfold.cache.config import CacheConfig
from kvfold.cache.timeline import CacheError
from kvfold.codec import Preset
from kvfold.integrations import saved
from kvfold.integrations.describe import model_hash
from kvfold.integrations.handles import FoldedWarning
from kvfold.integrations.transformers import FoldedCache
from kvfold.layout import PAGE_FORMAT


class PrefixStore:
    """Prompts folded once and used again, in this process and in others.

    ```python
    store = kvfold.PrefixStore("prefixes", model, "fisher2")
    cache = store.load(ids[0])                       # as much of the prompt as is there
    model.generate(ids, past_key_values=cache)       # prefills the rest
    cache.crop(ids.shape[1])
    store.save(cache, ids[0])
    ```

    Args:
        folder: of the files; made when the first one is saved.
        model: the model that runs with the caches.
        preset: as for `FoldedCache`.
        options: likewise.
    """

    def __init__(
        self,
        folder: str | Path,
        model: nn.Module,
        preset: str | Preset | CacheConfig = "turboquant4",
        **options: Any,
    ) -> None:
        self.folder, self.model = Path(folder), model
        self.config = FoldedCache(model, preset, **options).config
        artefact = self.config.artefact
        of = {
            "model": model_hash(model),
            "dtype": str(next(model.parameters()).dtype),
            "config": self.config.to_json(),
            "artefact": None if artefact is None else artefact.digest,
            "formats": [saved.FORMAT, PAGE_FORMAT],
        }
        self.root = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).digest()

    def save(self, cache: FoldedCache, token_ids: Sequence[int] | torch.Tensor) -> Path:
        """Save a cache of one row that holds exactly these tokens; gives the file.

        Raises:
            CacheError: the cache holds another number of tokens or rows, or has other settings.
        """
        ids = _ints(token_ids)
        if cache.timeline.lengths != [len(ids)] or not cache.timeline.unpadded:
            raise CacheError(
                f"{len(ids)} token ids for a cache of rows {cache.timeline.lengths}; one row "
                "without padding that holds exactly these tokens can be saved"
            )
        if cache.config.to_json() != self.config.to_json():
            raise CacheError(f"the cache is {cache!r}; this store keeps caches made like it")
        hashes = list(self._chain(ids))
        name = hashlib.sha256(hashes[-1] if hashes else self.root)
        name.update(json.dumps(ids).encode())
        path = self.folder / f"{name.hexdigest()}.safetensors"
        cache.save(path, token_ids=ids)
        for link in hashes:
            sealed.write_whole(self._link(link), path.name.encode())
        return path

    def load(self, token_ids: Sequence[int] | torch.Tensor) -> FoldedCache:
        """The cache of the longest saved prefix of a prompt; an empty one where there is none.

        It holds at most all tokens but the last, which the model has to see for its logits;
        `cache.get_seq_length()` says how many. A file that cannot be used is a miss, with a
        `FoldedWarning` that names it.
        """
        ids = _ints(token_ids)
        for link in reversed(list(self._chain(ids))):
            if not self._link(link).is_file():
                continue
            path = self.folder / self._link(link).read_text()
            try:
                cache = FoldedCache.load(self.model, path, artefact=self.config.artefact)
                cache.crop(self._shared(path, ids))
            except ValueError as error:  # every error of a file is one
                warnings.warn(f"saved prefix not used: {error}", FoldedWarning, stacklevel=2)
                continue
            return cache
        return FoldedCache(self.model, self.config)

    def _chain(self, ids: list[int]) -> Iterator[bytes]:
        """The hash of every whole block of tokens, each over all before it."""
        h, block = self.root, self.config.block
        for low in range(0, len(ids) - block + 1, block):
            h = hashlib.sha256(h + json.dumps(ids[low : low + block]).encode()).digest()
            yield h

    def _link(self, link: bytes) -> Path:
        return self.folder / "index" / link.hex()

    def _shared(self, path: Path, ids: list[int]) -> int:
        """Tokens that a file and a prompt have in common, the prompt's last one left out."""
        tokens = sealed.read_header(path, saved.KIND)["tokens"]
        pairs = enumerate(zip(tokens, ids[:-1], strict=False))
        return next((i for i, (a, b) in pairs if a != b), min(len(tokens), len(ids) - 1))


def _ints(token_ids: Sequence[int] | torch.Tensor) -> list[int]:
    return [int(t) for t in token_ids]
