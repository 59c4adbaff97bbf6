"""Passes of one token a row as CUDA graphs: captured once, replayed while no shape changes.

The host plans each step as ever (lengths, pages and positions are its own integers), folds what is
due, and sends the step's numbers to the device with one copy; then the whole pass of the model,
appending and attention included, is one replay. Nothing on the way waits for the device.
"""

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kvfold.attention.dispatch import KERNELS
from kvfold.cache.numbers import Numbers
from kvfold.cache.store import LayerStore
from kvfold.cache.timeline import Step
from kvfold.integrations.describe import UnsupportedError, decoder
from kvfold.integrations.handles import SWITCH
from kvfold.integrations.hooks import attention_configs, reads_codes

if TYPE_CHECKING:
    from kvfold.integrations.transformers import FoldedCache

#: room for pages that a capture leaves each row beyond what it holds: at least, and in proportion.
ROOM, ROOM_SHARE = 16, 0.25
#: arguments of a pass that a graph serves, and those that change nothing for one token.
SERVED = {"input_ids", "attention_mask", "position_ids", "past_key_values"}
INDIFFERENT = {"use_cache", "return_dict", "cache_position", "logits_to_keep"}


class Capture:
    """One pass of a model with a cache as a graph, and the buffers that it reads.

    Args:
        cache: filled, on a CUDA device.
        forward: the model's own.
        tokens: `[rows, 1]` example of the input.
        room: pages of a row that there is room for.
    """

    def __init__(
        self, cache: "FoldedCache", forward: Callable[..., Any], tokens: Tensor, room: int
    ) -> None:
        self.cache, self.forward = weakref.ref(cache), forward
        self.numbers = Numbers(cache.timeline, room, tokens.device)
        self.input_ids = tokens.clone()
        self.output: Any = None
        self.graph: torch.cuda.CUDAGraph | None = None

    def record(self) -> None:
        """Run the pass once, which loads every kernel, and once more to record it.

        Both write the step's token where it belongs, as the replay does again.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.run()

    def run(self) -> None:
        """The pass on the buffers."""
        cache, numbers = self.cache(), self.numbers
        assert cache is not None
        self.output = self.forward(
            input_ids=self.input_ids,
            position_ids=(numbers.located.first[:, None] + numbers.query_tokens).long(),
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
        )

    def replay(self, tokens: Tensor) -> Tensor:
        """Logits `[rows, 1, vocabulary]` after these tokens; the next replay overwrites them."""
        self.input_ids.copy_(tokens)
        if self.graph is not None:
            self.graph.replay()
        return self.output.logits


class Gate:
    """Stands before a model's `forward` while caches live that replay; one for a model."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.own = weakref.ref(model), vars(model).get("forward")
        self.graphs: dict[int, weakref.ref[Graphs]] = {}
        gate = self

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return gate.eager(*args, **kwargs)
            found = gate.graphs.get(id(kwargs.get("past_key_values")))
            graphs = found() if found else None
            return gate.eager(*args, **kwargs) if graphs is None else graphs.run(*args, **kwargs)

        self.placed = model.forward = forward

    @property
    def owner(self) -> nn.Module:
        """The model."""
        model = self.model()
        assert model is not None
        return model

    def eager(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own pass."""
        if self.own is not None:
            return self.own(*args, **kwargs)
        return type(self.owner).forward(self.owner, *args, **kwargs)

    def leave(self, cache: int) -> None:
        """Forget a cache; the last one takes the gate along."""
        self.graphs.pop(cache, None)
        model = self.model()
        if self.graphs or model is None or vars(model).get("forward") is not self.placed:
            return
        if self.own is None:
            del model.forward
        else:
            model.forward = self.own
        _GATES.pop(model, None)


_GATES: "weakref.WeakKeyDictionary[nn.Module, Gate]" = weakref.WeakKeyDictionary()


class Graphs:
    """The replayed passes of one cache; any other pass goes on as if it were not there.

    Args:
        cache: whose passes of one token a row are replayed.
        model: its model.
    """

    def __init__(self, cache: "FoldedCache", model: nn.Module) -> None:
        self.cache, self.configs = weakref.ref(cache), attention_configs(model)
        self.capture: Capture | None = None
        self.shape: tuple[Any, ...] = ()
        self.captures = self.replays = 0
        self.refused: str | None = None
        #: why the last pass of one token a row was not replayed, None where it was
        self.reason: str | None = "no pass of one token a row has run"
        if model not in _GATES:
            _GATES[model] = Gate(model)
        self.gate = _GATES[model]
        self.gate.graphs[id(cache)] = weakref.ref(self)
        weakref.finalize(cache, self.gate.leave, id(cache))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The model's pass, replayed where that is possible."""
        cache, tokens = self.cache(), kwargs.get("input_ids")
        if (
            cache is None
            or cache.static is not None
            or args
            or tokens is None
            or tokens.shape[1] != 1
            or not cache.timeline.rows
        ):
            return self.gate.eager(*args, **kwargs)
        self.reason = self.refused or why_not(cache, self.gate.owner, kwargs)
        if self.reason is None:
            try:
                return self._step(cache, kwargs)
            except UnsupportedError as error:  # no kernel for a layer's codes
                self.refused = self.reason = str(error).removesuffix(" (strict=True)")
                self.capture = None
        if cache.config.graphs and any(cache.timeline.folded):
            cache.notices.say("graphs", f"decoding runs without CUDA graphs: {self.reason}")
        return self.gate.eager(**kwargs)

    def _step(self, cache: "FoldedCache", kwargs: dict[str, Any]) -> Any:
        step = cache.begin_token()
        try:
            output = self._replayed(cache, step, kwargs)
        except UnsupportedError:
            cache.end_token(step, "dropped")  # what it folded stays, the pass runs eagerly
            raise
        except BaseException:
            cache.end_token(step, "failed")
            raise
        cache.end_token(step)
        return output

    def _replayed(self, cache: "FoldedCache", step: Step, kwargs: dict[str, Any]) -> Any:
        tokens, timeline = kwargs["input_ids"], cache.timeline
        stores = [layer.store for layer in cache.folded_layers if layer.store is not None]
        for store in stores:
            store.fold_due(step)
        shape = (tokens.shape, *(_addresses(store) for store in stores))
        most, capture = max(step.folded), self.capture
        if capture is None or shape != self.shape or most > capture.numbers.capacity:
            room = most + max(ROOM, int(ROOM_SHARE * most))
            capture = Capture(cache, self.gate.eager, tokens, room)
            capture.numbers.write(step, timeline)
            with _static(cache, capture.numbers, self.configs):
                try:
                    capture.record()
                except RuntimeError as error:  # the model reads a value back, or memory is short
                    first = str(error).strip().partition("\n")[0]
                    raise UnsupportedError(f"a pass cannot be recorded: {first}") from error
            self.capture, self.shape = capture, shape
            self.captures += 1
        else:
            capture.numbers.write(step, timeline)
        located = capture.numbers.located
        cache.late.note(
            kwargs.get("attention_mask"),
            kwargs.get("position_ids"),
            located.length,
            located.first + capture.numbers.query_tokens[:, 0],
        )
        logits = capture.replay(tokens).clone()
        self.replays += 1
        return type(capture.output)(logits=logits, past_key_values=cache)


def why_not(cache: "FoldedCache", model: nn.Module, kwargs: dict[str, Any]) -> str | None:
    """Why a pass of one token a row cannot be a graph; None where it can."""
    tokens, mask = kwargs["input_ids"], kwargs.get("attention_mask")
    if not capturable(tokens.device):
        return f"the model is on {tokens.device.type}, and graphs are CUDA's and need its kernel"
    if hasattr(_GATES[model].own, "_torchdynamo_orig_callable"):
        return "the model's forward is compiled, and plans its passes when they run"
    if not any(cache.timeline.folded):
        return "nothing is packed yet"
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        return "gradients are enabled; decode under torch.no_grad()"
    unknown = set(kwargs) - SERVED - INDIFFERENT
    given = sorted(n for n in unknown if kwargs[n] is not None and kwargs[n] is not False)
    if given:
        return f"the pass has the arguments {', '.join(given)}"
    if cache.bypass or len(cache.folded_layers) != len(cache.layers):
        return "layers that keep transformers' own cache have their lengths on the host"
    if cache.config.evicts:
        return "pages are chosen or dropped while decoding (trim, prune, top_k, max_bytes)"
    if cache.config.offload:
        return "pages lie in CPU memory (offload)"
    if cache.config.sliding == "folded":
        return "sliding-window layers let go of pages while decoding"
    if any(layer.info.rope_limit is not None for layer in cache.folded_layers):
        return "rotary frequencies change with the length"
    if getattr(model, "lm_head", None) is None or not reads_codes(decoder(model)):
        return "the model is no decoder with a language head on transformers' attention interface"
    rows, slots = cache.timeline.rows, cache.timeline.slots
    if mask is None and not cache.timeline.unpadded:
        return "padded rows and no attention_mask"
    if mask is not None and mask.shape != (rows, slots + 1):
        return f"attention_mask has shape {tuple(mask.shape)}, not {(rows, slots + 1)}"
    return None


def capturable(device: torch.device) -> bool:
    """Whether passes on a device can be recorded: the page walk reads its page numbers back."""
    return device.type == "cuda" and device.type in KERNELS


@contextmanager
def _static(cache: "FoldedCache", numbers: Numbers, configs: list[Any]) -> Iterator[None]:
    """Layers append and read by these numbers, which lie on the device."""
    SWITCH.take(configs)
    cache.static = numbers
    try:
        yield
    finally:
        cache.static = None
        SWITCH.give(configs)


def _addresses(store: LayerStore) -> tuple[int, ...]:
    """What a recorded pass has taken in of a layer: it is recorded anew where this changes."""
    slabs = store.pool.slabs
    return (store.exact_keys.data_ptr(), store.exact_values.data_ptr(), len(slabs))
