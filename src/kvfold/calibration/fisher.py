"""The fit of `fisher`: statistics of residuals and loss gradients to transforms, widths and levels.

Pure torch; `kvfold.integrations.collect_fisher` feeds it from a model. Statistics are kept apart
from what is fitted to them: one set serves every form and every number of bits, in seconds.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvfold.calibration.artefact import CalibrationError
from kvfold.codec import Side
from kvfold.codecs.fisher import FORMS, MAX_BITS, Fisher, Form, group_len, tag
from kvfold.packing import DIGITS
from kvfold.quantizers.gain import gain_byte, gain_table
from kvfold.quantizers.uniform import fit_affine, gaussian_affine
from kvfold.transforms.rope import Rope

#: error of the best b-bit quantiser of N(0, 1) (Max 1960), what a width is expected to leave.
DISTORTION = (1.0, 0.3634, 0.1175, 0.03454, 0.009497, 0.002499, 0.000644)
#: bits a column costs at most.
DEAREST = 4.0
#: version of the file of statistics.
FORMAT = 1
#: code bits whose gains reweigh the moments.
REFERENCE_BITS = 2.0
#: sampled tokens that levels are fitted to, at most.
LEVEL_TOKENS = 8192
_NO_FRAME = ("value",)


# --- statistics --------------------------------------------------------------------------------


@dataclass
class SideStatistics:
    """Moments of one layer's keys or values, in every frame, and a sample of tokens.

    Keys are in units of the attention scaling, before RoPE where no frame is named: x = R_n^-1 k_n.

    Args:
        rope: of the layer; one without frequencies for values.
        mean: `[heads, dim]` of x.
        covariance: by frame `[heads, dim, dim]`, sums of r r^T.
        metric: by frame, sums of g g^T.
        residuals: r = x - mean of the sampled tokens `[heads, samples, dim]` (float16).
        gradients: g of the sampled tokens, with respect to x (bfloat16).
        tokens: how many are in the sums.
    """

    rope: Rope
    mean: Tensor
    covariance: dict[str, Tensor] = field(default_factory=dict)
    metric: dict[str, Tensor] = field(default_factory=dict)
    residuals: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    tokens: int = 0

    @property
    def frames(self) -> tuple[str, ...]:
        """The frames in which moments are kept."""
        return FORMS if self.rope.inv_freq else _NO_FRAME

    def frame_of(self, form: str) -> str:
        """The frame of a form: without rotation all are one."""
        return form if self.rope.inv_freq else _NO_FRAME[0]

    def states(self, x: Tensor, positions: Tensor) -> Tensor:
        """Keys after RoPE, or values, `[heads, tokens, dim]` to x (float32)."""
        return self._unit.unrotate(x.float() / self.rope.scaling, positions)

    def slopes(self, g: Tensor, positions: Tensor) -> Tensor:
        """Gradients with respect to keys after RoPE to those with respect to x."""
        return self._unit.unrotate(g.float() * self.rope.scaling, positions)

    def framed(self, x: Tensor, frame: str, positions: Tensor, index: Tensor) -> Tensor:
        """Residuals or gradients of x as a frame has them; `index` counts from a run's start."""
        if frame in ("pre", "value"):
            return x
        return self._unit.rotate(x, index if frame == "tile" else positions)

    def add(self, x: Tensor, g: Tensor, positions: Tensor, index: Tensor, kept: Tensor) -> None:
        """Take in keys after RoPE, or values, and their gradients, `[heads, tokens, dim]`.

        Args:
            x: the states.
            g: gradients of the loss with respect to them.
            positions: `[tokens]`.
            index: `[tokens]` place in the run of a tile.
            kept: indices of the tokens that are sampled.
        """
        r = self.states(x, positions) - self.mean.to(x.device)[:, None]
        g = self.slopes(g, positions)
        for frame in self.frames:
            for sums, part in ((self.covariance, r), (self.metric, g)):
                turned = self.framed(part, frame, positions, index)
                gram = turned.mT @ turned
                sums[frame] = sums[frame] + gram if frame in sums else gram
        self.tokens += len(positions)
        if len(kept):
            top = torch.finfo(torch.float16).max
            self.residuals.append(r[:, kept].clamp(-top, top).to(torch.float16).cpu())
            self.gradients.append(g[:, kept].to(torch.bfloat16).cpu())

    def sample(self) -> tuple[Tensor, Tensor]:
        """Residuals and gradients of the sampled tokens."""
        for name in ("residuals", "gradients"):
            parts = getattr(self, name)
            if len(parts) > 1:
                setattr(self, name, [torch.cat(parts, 1)])
        return self.residuals[0], self.gradients[0]

    @property
    def _unit(self) -> Rope:
        return replace(self.rope, scaling=1.0)


@dataclass
class Statistics:
    """What one calibration run found, for every layer's keys and values.

    Args:
        header: the run's conditions, and how far it got (`windows_done`).
        sides: by layer and side.
        positions: of the sampled tokens, the same in all layers.
        index: their places in the run of a tile.
    """

    header: dict[str, Any]
    sides: dict[tuple[int, Side], SideStatistics]
    positions: list[Tensor] = field(default_factory=list)
    index: list[Tensor] = field(default_factory=list)

    def places(self) -> tuple[Tensor, Tensor]:
        """Positions and places in a run of the sampled tokens."""
        return torch.cat(self.positions), torch.cat(self.index)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        path = Path(path)
        tensors, ropes = {}, {}
        for (layer, side), found in self.sides.items():
            name = f"{layer}.{side}"
            ropes[name] = [list(found.rope.inv_freq), found.rope.scaling, found.rope.pairs]
            tensors[f"{name}.mean"] = found.mean
            for frame in found.covariance:
                tensors[f"{name}.covariance.{frame}"] = found.covariance[frame]
                tensors[f"{name}.metric.{frame}"] = found.metric[frame]
            if found.residuals:
                residuals, gradients = found.sample()
                tensors |= {f"{name}.residuals": residuals, f"{name}.gradients": gradients}
        if self.positions:
            tensors["positions"], tensors["index"] = self.places()
        tokens = {f"{layer}.{side}": found.tokens for (layer, side), found in self.sides.items()}
        header = {"format": FORMAT, **self.header, "ropes": ropes, "seen": tokens}
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        save_file(
            {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
            partial,
            metadata={"kvfold_fisher": json.dumps(header)},
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read a file that `save` wrote.

        Raises:
            CalibrationError: it is missing, unreadable, or of another version.
        """
        try:
            with safe_open(str(path), "pt") as file:
                header = json.loads((file.metadata() or {})["kvfold_fisher"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise CalibrationError(f"{path} holds no fisher statistics: {error!r}") from error
        if header.pop("format") != FORMAT:
            raise CalibrationError(f"{path} is of another version of kvfold; calibrate again")
        ropes, seen = header.pop("ropes"), header.pop("seen")
        sides: dict[tuple[int, Side], SideStatistics] = {}
        for name, (inv_freq, scaling, pairs) in ropes.items():
            layer, side = name.split(".")
            found = SideStatistics(Rope(tuple(inv_freq), scaling, pairs), tensors[f"{name}.mean"])
            found.tokens = seen[name]
            for frame in found.frames:
                if f"{name}.covariance.{frame}" in tensors:
                    found.covariance[frame] = tensors[f"{name}.covariance.{frame}"]
                    found.metric[frame] = tensors[f"{name}.metric.{frame}"]
            if f"{name}.residuals" in tensors:
                found.residuals = [tensors[f"{name}.residuals"]]
                found.gradients = [tensors[f"{name}.gradients"]]
            sides[int(layer), side] = found  # type: ignore[index]
        found = cls(header, sides)
        if "positions" in tensors:
            found.positions, found.index = [tensors["positions"]], [tensors["index"]]
        return found


# --- transforms --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transform:
    """A whitening transform of each head, coordinates by falling cost.

    Args:
        matrix: A `[heads, dim, dim]` (float64): y = A r has unit variances.
        cost: e `[heads, dim]`, what losing a coordinate costs.
    """

    matrix: Tensor
    cost: Tensor


def transform(covariance: Tensor, metric: Tensor, ridge: float = 3e-2) -> Transform:
    """A = E^-1/2 U^T M^1/2 with M^1/2 S M^1/2 = U E U^T and M = G + ridge tr(G)/d I.

    Args:
        covariance: S `[heads, dim, dim]`.
        metric: G.
        ridge: share of the identity in M.
    """
    s, g = covariance.double(), metric.double()
    dim = s.shape[-1]
    eye = torch.eye(dim, dtype=s.dtype, device=s.device)
    scale = g.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
    # a head that the loss does not see keeps the order of its variances, at no cost
    seen = scale > 0
    m = torch.where(seen, g / torch.where(seen, scale, 1.0), eye) + ridge * eye
    values, vectors = torch.linalg.eigh(m)
    root = (vectors * values.clamp_min(0).sqrt()[:, None]) @ vectors.mT
    product = root @ s @ root
    e, u = torch.linalg.eigh((product + product.mT) / 2)
    e, u = e.flip(-1), u.flip(-1)
    # directions without variance stay finite; they never get bits
    floor = torch.where(e[:, :1] > 0, 1e-10 * e[:, :1], 1.0)
    matrix = (u.mT @ root) / e.clamp_min(floor).sqrt()[..., None]
    return Transform(matrix, e.clamp_min(0) * scale[..., 0])


# --- the budget --------------------------------------------------------------------------------


def hull(price: float, max_bits: int = MAX_BITS) -> list[int]:
    """Widths that are worth having where a column costs `price` bits, from 0 on.

    A coordinate of 3 or 5 bits is two columns, as one of 6 is; those that others between them beat
    are left out.
    """
    kept = [0]
    for width in range(1, max_bits + 1):
        while _rate(width, price) <= _rate(kept[-1], price) or (
            len(kept) > 1 and _slope(kept[-1], width, price) >= _slope(kept[-2], kept[-1], price)
        ):
            kept.pop()
        kept.append(width)
    return kept


def _rate(width: int, price: float) -> float:
    return width + price * len(DIGITS[width])


def _slope(low: int, high: int, price: float) -> float:
    """What a Gaussian's error falls by from one width to another, by what that costs."""
    return (DISTORTION[low] - DISTORTION[high]) / (_rate(high, price) - _rate(low, price))


def allocate(
    costs: Mapping[Any, Tensor],
    bits: float,
    *,
    max_bits: int = MAX_BITS,
    price: float = 0.0,
    distortion: Mapping[Any, Tensor] | None = None,
) -> dict[Any, Tensor]:
    """Widths `[heads, dim]` of every entry by equal marginal gain, from one budget for all.

    `group_len` coordinates in a row share a width, so that the number of coordinates with more
    than p bits is a multiple of it for every p. Bits are handed out where a bit per element, and
    `price` of one for each column of digits, saves most; D is convex over the widths of `hull`, so
    that this is the optimum.

    Args:
        costs: e `[heads, dim]` of each entry, falling along dim.
        bits: per element, over all entries.
        max_bits: widest code.
        price: bits that a column costs besides its own; the budget is of code bits alone.
        distortion: D `[heads, dim, max_bits + 1]` of each entry in place of the Gaussian's.

    Returns:
        integer widths; their sum is the budget, or less by under one step of a group.
    """
    gains, sizes, places = [], [], []
    gaussian = torch.tensor(DISTORTION, dtype=torch.float64)
    kept = torch.tensor(hull(price, max_bits))
    bits_of = kept.diff()
    costs_of = torch.tensor([_rate(w, price) for w in kept.tolist()], dtype=torch.float64).diff()
    for key, e in costs.items():
        group = group_len(e.shape[-1])
        left = gaussian.to(e.device) if distortion is None else distortion[key].double()
        loss = e.double()[..., None] * left[..., kept.to(e.device)]
        # [H, groups, steps]
        saved = loss.unflatten(1, (-1, group)).sum(2).diff(dim=-1).neg().cpu() / costs_of
        # a running mean of later savings makes measured curves convex: never more for a later step
        saved = torch.cummin(saved, -1).values
        saved = torch.cummin(saved, 1).values  # and never more for a lesser coordinate
        saved = saved.movedim(-1, 0)
        gains.append(saved.flatten() / group)
        sizes.append((bits_of * group).view(-1, 1, 1).expand(saved.shape).flatten())
        places.append((key, saved.shape))
    # stable, and a group's steps in order: among equals the first one goes first
    order = torch.cat(gains).argsort(descending=True, stable=True)
    size = torch.cat(sizes)
    budget = bits * sum(e.numel() for e in costs.values())
    taken = torch.zeros(len(order), dtype=torch.bool)
    taken[order] = size[order].cumsum(0) <= budget + 1e-6
    widths, start = {}, 0
    for key, shape in places:
        part = taken[start : start + shape.numel()].view(shape)
        start += shape.numel()
        group = group_len(costs[key].shape[-1])
        widths[key] = (part * bits_of.view(-1, 1, 1)).sum(0).repeat_interleave(group, -1)
    return widths


# --- the fit -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """How tables are fitted. The defaults are the method; other values change one ingredient.

    Args:
        ridge: share of the identity in the metric.
        max_bits: widest code.
        slack: share by which the expected error may rise for fewer columns of digits at the same
            bits. Kernels multiply each column, whatever its width, and codes of 3, 5 and 6 bits are
            two of them. 0.04 leaves 80 % of them, for which KL rises by 6 to 15 %, not by 4, and
            attention is up to 7 % faster, 2 on average.
        scope: what shares a bit budget.
        metric: `"fisher"`, or `"plain"` for the identity of each head's mean sensitivity.
        centred_keys: remove the mean key.
        centred_values: remove the mean value. Tokens that many queries look at in want of better
            ones have values close to zero; an error of theirs in units of the mean costs more.
        reweigh: rounds in which moments are taken again in units of each token's gain, from the
            sampled tokens: S' = E[r r^T / g^2], G' = E[g^2 grad grad^T]. Gains are those of a code
            of `REFERENCE_BITS`, so that codes of all bits share their transforms.
        least: sampled tokens from which on moments are reweighed: those of fewer are noisier than
            what reweighing mends (2,048 tokens: KL 0.021 with it, 0.015 without).
        measured: allocate by measured errors of each coordinate rather than the Gaussian's.
        fitted: fit steps and offsets; else those of N(0, 1).
        gain: fit to coordinates in units of each token's gain; else to the coordinates.
        weighted: weigh samples by g^2 in that fit.
        side_scale: factors on the costs of keys and of values.
        scale: factors on the costs by (layer, side), from an outer search.
    """

    ridge: float = 3e-2
    max_bits: int = MAX_BITS
    slack: float = 0.0
    scope: Literal["model", "layer", "head"] = "model"
    metric: Literal["fisher", "plain"] = "fisher"
    centred_keys: bool = True
    centred_values: bool = False
    reweigh: int = 1
    least: int = 16_384
    measured: bool = False
    fitted: bool = True
    gain: bool = True
    weighted: bool = False
    side_scale: tuple[float, float] = (1.0, 1.0)
    scale: Mapping[tuple[int, str], float] = field(default_factory=dict, hash=False)


class Fit:
    """Tables of `fisher` codecs from one set of statistics.

    Args:
        statistics: of a finished run.
        recipe: how.
        device: where to compute.
    """

    def __init__(
        self,
        statistics: Statistics,
        recipe: Recipe = Recipe(),
        device: torch.device | str = "cpu",
    ) -> None:
        if not statistics.sides or any(not s.residuals for s in statistics.sides.values()):
            raise CalibrationError("the statistics hold no tokens; run the collection to its end")
        self.statistics, self.recipe, self.device = statistics, recipe, torch.device(device)
        places = statistics.places()
        self.positions, self.index = (p.to(self.device) for p in places)
        self._transforms: dict[str, dict[tuple[int, Side], Transform]] = {}

    def tensors(self, codecs: Sequence[Fisher]) -> dict[str, Tensor]:
        """An artefact's tables for these codecs, by full name."""
        found: dict[str, Tensor] = {}
        for codec in codecs:
            found |= self.tables(codec)
        return found

    def tables(self, codec: Fisher) -> dict[str, Tensor]:
        """The tables of one codec."""
        if codec.form == "tile" and codec.tile != self.statistics.header["tile"]:
            raise CalibrationError(
                f"the statistics are of tiles of {self.statistics.header['tile']} tokens; {codec} "
                "needs a calibration of its own"
            )
        found = {}
        solved = self.transforms(codec.form)
        widths = self.widths(solved, codec)
        for (layer, side), made in solved.items():
            wide = widths[layer, side].to(self.device)
            step, offset = self.levels((layer, side), made, wide, codec)
            prefix = f"layers.{layer}.{side}."
            basis, scales = ("basis", "scales")
            if side == "key":
                basis, scales = codec.table(basis), codec.table(scales)
            size = made.matrix.norm(dim=-1)
            found[prefix + "mean"] = self.mean((layer, side)).float()
            # rows of unit length lose nothing in float16 that their scale does not keep
            found[prefix + basis] = (made.matrix / size[..., None]).to(torch.float16)
            found[prefix + scales] = torch.stack((size, made.cost)).float()
            found[prefix + codec.table("codes")] = torch.stack((wide, step, offset)).to(
                torch.float16
            )
        return {name: t.cpu().contiguous() for name, t in found.items()}

    # --- pieces ----------------------------------------------------------------------------

    def mean(self, key: tuple[int, Side]) -> Tensor:
        """The mean that is removed."""
        mean = self.statistics.sides[key].mean.to(self.device)
        return mean if self._centred(key[1]) else torch.zeros_like(mean)

    def moments(self, key: tuple[int, Side], form: str) -> tuple[Tensor, Tensor]:
        """Covariance and metric of a side in the frame of a form, means over tokens."""
        side = self.statistics.sides[key]
        frame, n = side.frame_of(form), max(side.tokens, 1)
        s, g = side.covariance[frame].to(self.device) / n, side.metric[frame].to(self.device) / n
        if not self._centred(key[1]):
            if frame in ("pre", "value"):
                mean = side.mean.to(self.device)
                s = s + mean[:, :, None] * mean[:, None]
            else:
                r = self.residuals(key, form)
                s = r.mT @ r / r.shape[1]
        if self.recipe.metric == "plain":
            scale = g.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            g = scale * torch.eye(g.shape[-1], device=g.device)
        return s, g

    def transforms(self, form: Form) -> dict[tuple[int, Side], Transform]:
        """The transform of every layer and side, keys in the frame of a form.

        Values have no frame: theirs are the same for every form, as an artefact keeps them once.
        """
        if form not in self._transforms:
            made = {
                key: transform(*self.moments(key, form), self.recipe.ridge)
                for key in self.statistics.sides
            }
            for _ in range(self.recipe.reweigh if len(self.index) >= self.recipe.least else 0):
                codec = Fisher(REFERENCE_BITS, form)
                widths = self.widths(made, codec)
                made = {key: self._reweighed(key, codec, made[key], widths[key]) for key in made}
            if form != FORMS[0]:
                shared = self.transforms(FORMS[0])
                made = {key: shared[key] if key[1] == "value" else made[key] for key in made}
            self._transforms[form] = made
        return self._transforms[form]

    def widths(
        self, solved: Mapping[tuple[int, Side], Transform], codec: Fisher
    ) -> dict[tuple[int, Side], Tensor]:
        """Code widths of every layer, head, and side."""
        scale = self.recipe.scale
        sides = dict(zip(("key", "value"), self.recipe.side_scale, strict=True))
        costs = {
            key: made.cost * (sides[key[1]] * scale.get(key, 1.0)) for key, made in solved.items()
        }
        left: dict[tuple[int, Side], Tensor] | None = None
        widths = self._scoped(costs, codec.bits, 0.0, left)
        if self.recipe.measured:
            left = {key: self._measured(key, solved[key], widths[key], codec) for key in costs}
            widths = self._scoped(costs, codec.bits, 0.0, left)
        allowed = (1 + self.recipe.slack) * _expected(costs, widths, left)
        low, high = 0.0, DEAREST
        for _ in range(12 if self.recipe.slack else 0):
            price = (low + high) / 2
            tried = self._scoped(costs, codec.bits, price, left)
            if _expected(costs, tried, left) <= allowed:
                low, widths = price, tried
            else:
                high = price
        return widths

    def _scoped(
        self,
        costs: dict[tuple[int, Side], Tensor],
        bits: float,
        price: float,
        left: dict[tuple[int, Side], Tensor] | None,
    ) -> dict[tuple[int, Side], Tensor]:
        more: dict[str, Any] = {"max_bits": self.recipe.max_bits, "price": price}
        if self.recipe.scope == "model":
            return allocate(costs, bits, distortion=left, **more)
        found: dict[tuple[int, Side], Tensor] = {}
        for layer in sorted({key[0] for key in costs}):
            part = {key: e for key, e in costs.items() if key[0] == layer}
            if self.recipe.scope == "layer":
                found |= allocate(part, bits, distortion=left, **more)
                continue
            for key, e in part.items():
                rows = [allocate({0: e[h : h + 1]}, bits, **more)[0] for h in range(len(e))]
                found[key] = torch.cat(rows)
        return found

    def residuals(self, key: tuple[int, Side], form: str) -> Tensor:
        """Residuals of the sampled tokens in a form's frame `[heads, samples, dim]`."""
        side = self.statistics.sides[key]
        r = side.sample()[0].to(self.device).float()
        if not self._centred(key[1]):
            r = r + side.mean.to(self.device)[:, None]
        return side.framed(r, side.frame_of(form), self.positions, self.index)

    def coordinates(
        self, key: tuple[int, Side], made: Transform, widths: Tensor, codec: Fisher
    ) -> tuple[Tensor, Tensor]:
        """Whitened coordinates of the sample, and the rounded gain of each token."""
        y = self.residuals(key, codec.form) @ made.matrix.float().mT
        active = (widths > 0).float().to(y.device)
        share = active / active.sum(-1, keepdim=True).clamp_min(1)
        gain = gain_table().to(y.device)[
            gain_byte((y.square() * share[:, None]).sum(-1).sqrt()).int()
        ]
        return y, gain[..., None] if self.recipe.gain else torch.ones_like(gain[..., None])

    def levels(
        self, key: tuple[int, Side], made: Transform, widths: Tensor, codec: Fisher
    ) -> tuple[Tensor, Tensor]:
        """Steps and offsets `[heads, dim]`."""
        if not self.recipe.fitted:
            return gaussian_affine(widths)
        y, gain = self.coordinates(key, made, widths, codec)
        step = -(-y.shape[1] // LEVEL_TOKENS)
        y, gain = y[:, ::step], gain[:, ::step]
        z = y / torch.where(gain > 0, gain, 1.0)
        return fit_affine(z, widths, gain.square() if self.recipe.weighted else None)

    def _measured(
        self, key: tuple[int, Side], made: Transform, widths: Tensor, codec: Fisher
    ) -> Tensor:
        """Errors `[heads, dim, max_bits + 1]` of each width on the sample, in units of variance."""
        y, gain = self.coordinates(key, made, widths, codec)
        z = y / torch.where(gain > 0, gain, 1.0)
        weight = gain.square() / gain.square().mean(1, keepdim=True).clamp_min(1e-30)
        left = [(weight * z.square()).mean(1)]
        for b in range(1, self.recipe.max_bits + 1):
            bits = torch.full(z.shape[::2], b, device=z.device)
            step, offset = fit_affine(z, bits, weight if self.recipe.weighted else None)
            step, offset = step[:, None], offset[:, None]
            codes = ((z - offset) / step.clamp_min(1e-30)).round().clamp(0, 2**b - 1)
            left.append((weight * (codes * step + offset - z).square()).mean(1))
        return torch.stack(left, -1)

    def _reweighed(
        self, key: tuple[int, Side], codec: Fisher, made: Transform, widths: Tensor
    ) -> Transform:
        """The transform for tokens in units of their gains."""
        side = self.statistics.sides[key]
        _, gain = self.coordinates(key, made, widths, codec)
        # a few tokens of tiny gain would outweigh all others
        middle = gain.median(1, keepdim=True).values
        gain = gain.clamp(middle / 4, middle * 4).clamp_min(2.0**-6)
        r = self.residuals(key, codec.form) / gain
        g = side.sample()[1].to(self.device).float()
        g = side.framed(g, side.frame_of(codec.form), self.positions, self.index) * gain
        metric = g.mT @ g / g.shape[1]
        if self.recipe.metric == "plain":
            scale = metric.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
            metric = scale * torch.eye(g.shape[-1], device=g.device)
        return transform(r.mT @ r / r.shape[1], metric, self.recipe.ridge)

    def _centred(self, side: Side) -> bool:
        return self.recipe.centred_keys if side == "key" else self.recipe.centred_values


def _expected(
    costs: Mapping[Any, Tensor],
    widths: Mapping[Any, Tensor],
    distortion: Mapping[Any, Tensor] | None,
) -> float:
    """The error that these widths are expected to leave."""
    total, gaussian = 0.0, torch.tensor(DISTORTION, dtype=torch.float64)
    for key, e in costs.items():
        at = widths[key].to(e.device)
        if distortion is None:
            left = gaussian.to(e.device)[at]
        else:
            left = distortion[key].double().gather(-1, at[..., None])[..., 0]
        total += float((e.double() * left).sum())
    return total


def codecs_for(
    targets: Sequence[float], forms: Sequence[str] = FORMS, tile: int = 128
) -> list[Fisher]:
    """One codec for each form and number of bits."""
    return [Fisher(float(b), form, tile) for form in forms for b in targets]  # type: ignore[arg-type]


__all__ = [
    "Fit",
    "Recipe",
    "SideStatistics",
    "Statistics",
    "Transform",
    "allocate",
    "codecs_for",
    "tag",
    "transform",
]
