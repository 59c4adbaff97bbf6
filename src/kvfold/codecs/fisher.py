"""Fisher: learned transforms under the model's own loss metric, one bit budget for the model."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from kvfold.codec import (
    BoundCodec,
    Codec,
    CodecError,
    ExampleTables,
    Fields,
    Preset,
    Query,
    Reading,
    Site,
    Stored,
    Total,
    register,
    register_family,
)
from kvfold.layout import Field, Layout
from kvfold.packing import DigitPlan
from kvfold.quantizers.gain import gain_byte, gain_table
from kvfold.quantizers.uniform import gaussian_affine
from kvfold.transforms.orthogonal import apply_tiles, random_rotation
from kvfold.transforms.rope import Rope

if TYPE_CHECKING:
    from kvfold.calibration.artefact import Artefact

Form = Literal["tile", "post", "pre"]
FORMS: tuple[Form, ...] = ("tile", "post", "pre")
MAX_BITS = 6


@dataclass(frozen=True)
class Fisher(Codec):
    """Whitened residuals in mixed widths, chosen by what their errors cost the model.

        r_n = F_n k_n - F_n R_n mu,   y = A r,   q = round((y / g - offset) / step),   g = 2^(j/16)

    with A = E^-1/2 U^T M^1/2 from M^1/2 S M^1/2 = U E U^T: S is the covariance of r, M the Fisher
    metric of the loss with respect to it, so that coordinate i at b bits costs e_i D(b). mu is the
    mean key before RoPE (R_n), and F_n the frame:

    - `tile`: F_n = R_n0^-1 with n0 the first position of a run of `tile` tokens; queries are
      turned and transformed once a run;
    - `post`: F_n = 1; queries are transformed once;
    - `pre`:  F_n = R_n^-1; keys are decoded before they are read.

    Values have r = v - mu_v in every form; mu_v is 0 unless the fit was asked to centre them.
    Widths of 0 to 6 bits come from one budget over all layers, heads, keys and values. g, one byte
    a token and head, is the RMS of the coordinates that have bits; it is rounded first, then y / g
    is coded. Byte 0 is the gain 0.

    Args:
        bits: code bits per element, averaged over the model; gains add 8 / head_dim.
        form: the frame of the keys.
        tile: tokens of a run in the tile form; a page of more has several.
        search: gain bytes tried on either side of the RMS; the one with the least cost is taken.

    Raises:
        CodecError: knobs out of range; no artefact, or one without this form and these bits.
    """

    bits: float = 2.0
    form: Form = "tile"
    tile: int = 128
    search: int = 4

    paper = "kvfold, design notes section 6"

    def __post_init__(self) -> None:
        if not 0 < self.bits <= MAX_BITS:
            raise CodecError(f"fisher has more than 0 and at most {MAX_BITS} bits, not {self.bits}")
        if self.form not in FORMS:
            raise CodecError(f"form is one of {', '.join(FORMS)}, not {self.form!r}")
        if self.tile < 16 or self.tile % 16:
            raise CodecError(f"tile ({self.tile}) must be a multiple of 16")
        if not 0 <= self.search <= 16:
            raise CodecError(f"search ({self.search}) is 0 to 16 gain bytes")

    @property
    def pre_rope(self) -> bool:
        """The mean, and the frame of two forms, are those of keys before RoPE."""
        return True

    @property
    def artefact(self) -> Literal["none", "optional", "required"]:
        """Everything is learned."""
        return "required"

    def calibrated_knobs(self) -> dict[str, Any]:
        """Widths belong to a budget and a frame."""
        knobs: dict[str, Any] = {"form": self.form, "bits": self.bits}
        return knobs | ({"tile": self.tile} if self.form == "tile" else {})

    def table(self, what: str) -> str:
        """The artefact's name of a table of this form, and of these bits for `"codes"`."""
        return f"{self.form}_{what}" if what != "codes" else f"{self.form}_{tag(self.bits)}_codes"

    def bind(self, site: Site, artefact: "Artefact | ExampleTables | None" = None) -> "BoundFisher":
        """The code of one layer's keys or values."""
        if artefact is None:
            raise CodecError(
                f"{self} needs a calibration artefact and none was given; make one with: "
                f"kvfold calibrate --model M --preset {name_of(self)} --text FILE"
            )
        tables = artefact.at(site.layer, site.side)
        basis = self.table("basis") if site.side == "key" else "basis"
        scales = self.table("scales") if site.side == "key" else "scales"
        wanted = ("mean", basis, scales, self.table("codes"))
        missing = [name for name in wanted if name not in tables]
        if missing:
            have = sorted(name for name in tables if name.endswith("_codes"))
            raise CodecError(
                f"the artefact has no {', '.join(missing)} for the {site.side}s of layer "
                f"{site.layer}; it has {', '.join(have) or 'nothing of fisher there'}"
            )
        mean, basis_, scales_, codes = (tables[name] for name in wanted)
        shape = (site.num_kv_heads, site.head_dim)
        if tuple(mean.shape) != shape:
            raise CodecError(
                f"the artefact's tables of layer {site.layer} are for [heads, dim] "
                f"{tuple(mean.shape)}; the layer has {shape}"
            )
        kind = BoundFisherKeys if site.side == "key" else BoundFisher
        return kind(self, site, mean, basis_, scales_, codes)

    def example(self, site: Site) -> ExampleTables:
        """White states: a random rotation, no mean, every head the same widths."""
        heads, dim = site.num_kv_heads, site.head_dim
        group = group_len(dim)
        units = round(self.bits * dim / group)
        low, more = divmod(units, dim // group)
        widths = torch.full((dim,), low)
        widths[: more * group] += 1
        step, offset = gaussian_affine(widths)
        side = "key" if site.side == "key" else "value"
        names = ("basis", "scales") if side == "value" else map(self.table, ("basis", "scales"))
        basis, scales = names
        rotation = random_rotation(dim, 20_260 + site.layer)
        return ExampleTables(
            {
                "mean": torch.zeros(heads, dim),
                basis: rotation.expand(heads, -1, -1),
                scales: torch.ones(2, heads, dim),
                self.table("codes"): torch.stack((widths, step, offset))[:, None].expand(
                    -1, heads, -1
                ),
            }
        )


class BoundFisher(BoundCodec):
    """Fields: `digitsN`, and `gain` `[heads, block_len]` uint8."""

    def __init__(
        self,
        codec: Fisher,
        site: Site,
        mean: Tensor,
        basis: Tensor,
        scales: Tensor,
        codes: Tensor,
    ) -> None:
        self.codec, self.site = codec, site
        widths = codes[0].round().to(torch.int64)
        self.plan = DigitPlan(
            tuple(tuple(row) for row in widths.tolist()), site.block_len, site.axis
        )
        gain = Field("gain", (site.num_kv_heads, site.block_len), torch.uint8)
        self.layout = Layout((*self.plan.fields(), gain))
        self.stored = Stored(self.plan, gain="gain")
        # coordinates without bits decode to 0 wherever a step and an offset of 0 say so
        has_bits = widths > 0
        self.step, self.offset = (
            torch.where(has_bits, part.float(), 0.0)[:, None].to(site.device) for part in codes[1:3]
        )
        self.top = (2.0**widths - 1)[:, None].float().to(site.device)
        active = has_bits.float()
        self.share = (active / active.sum(-1, keepdim=True).clamp_min(1))[:, None].to(site.device)
        matrix = basis.double() * scales[0].double()[..., None]
        self.forward = (matrix * has_bits[..., None]).mT.float().contiguous().to(site.device)
        inverse = torch.linalg.inv(matrix) * has_bits[:, None]
        self.inverse = inverse.mT.float().contiguous().to(site.device)  # rows are coordinates
        self.mean = mean.float().to(site.device)
        self.cost = (scales[1].double() / scales[1].double().amax().clamp_min(1e-300)).float()
        self.cost = (self.cost * active)[:, None].to(site.device)
        self.gains = gain_table().to(site.device)

    def encode(self, x: Tensor, positions: Tensor) -> Fields:
        """Whiten the residual; round its gain; code it in units of the rounded gain."""
        y = self.whitened(x, positions)
        byte = self.gain_bytes(y)
        if self.codec.search:
            byte = self._cheapest(y, byte)
        codes = self._codes(y, byte)
        return {**self.plan.pack(codes.to(torch.uint8)), "gain": byte.to(torch.uint8)}

    def decode(self, fields: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """The residual from its coordinates, mean and frame undone, in float32."""
        return self._states(self._points(fields) @ self.inverse, positions)

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the digits."""
        gain = self.gains[fields["gain"].int()][..., None]
        return Reading(self.plan.columns(fields).float(), gain)

    def output(self, total: Total) -> Tensor:
        """Steps, offsets and the inverse transform applied once, and the mean added."""
        sums = self.plan.gathered(total.columns) * self.step + total.gain * self.offset
        return sums @ self.inverse + total.one * self.mean[:, None]

    def whitened(self, x: Tensor, positions: Tensor) -> Tensor:
        """States in the code's basis: coordinates of unit variance in float32, 0 without bits."""
        return apply_tiles(self._residual(x.float().contiguous(), positions), self.forward)

    def gain_bytes(self, y: Tensor) -> Tensor:
        """The byte of each token's RMS over the coordinates that have bits."""
        return gain_byte((y.square() * self.share).sum(-1).sqrt())

    def _residual(self, x: Tensor, positions: Tensor) -> Tensor:
        return x - self.mean[:, None]

    def _states(self, residual: Tensor, positions: Tensor) -> Tensor:
        return residual + self.mean[:, None]

    def _codes(self, y: Tensor, byte: Tensor) -> Tensor:
        gain = self.gains[byte.int()][..., None]
        z = y / torch.where(gain > 0, gain, 1.0)
        codes = ((z - self.offset) / torch.where(self.step > 0, self.step, 1.0)).round()
        return torch.minimum(codes.clamp_min(0.0), self.top)

    def _points(self, fields: Mapping[str, Tensor]) -> Tensor:
        codes = self.plan.unpack(fields).float()
        gain = self.gains[fields["gain"].int()][..., None]
        return (codes * self.step + self.offset) * gain

    def _cheapest(self, y: Tensor, byte: Tensor) -> Tensor:
        """Of the bytes around `byte`, the one whose codes cost least; 0 stays 0.

        Products in place: a code that rounds the other way at a half has the same error.
        """
        inverse = 1.0 / torch.where(self.step > 0, self.step, 1.0)
        moved, error = self.offset * inverse, torch.empty_like(y)
        best, least = byte, None
        for move in sorted(range(-self.codec.search, self.codec.search + 1), key=abs):
            tried = torch.where(byte > 0, (byte + move).clamp(1, 255), 0)
            gain = self.gains[tried.int()][..., None]
            torch.mul(y, 1.0 / torch.where(gain > 0, gain, 1.0), out=error)
            error.mul_(inverse).sub_(moved).round_().clamp_min_(0.0)
            torch.minimum(error, self.top, out=error)
            error.mul_(self.step).add_(self.offset).mul_(gain).sub_(y)
            # a sum, not a product: its order may not depend on what else is coded
            total = error.square_().mul_(self.cost).sum(-1)
            if least is None:
                best, least = tried, total
            else:
                best = torch.where(total < least, tried, best)
                least = torch.minimum(total, least)
        return best


class BoundFisherKeys(BoundFisher):
    """Keys: the mean turns with RoPE, and the frame is the codec's form."""

    def __init__(self, codec: Fisher, site: Site, *tables: Tensor) -> None:
        super().__init__(codec, site, *tables)
        rope = site.rope or Rope(())
        # attention scaling (yarn) belongs into R: keys are divided by it, queries multiplied
        self.scaling, self.rope = rope.scaling, replace(rope, scaling=1.0)
        turns = bool(rope.inv_freq)
        self.form = codec.form if turns else "post"
        self.tile = site.block_len
        if self.form == "tile":
            self.tile = min(codec.tile, site.block_len)
            if site.block_len % self.tile:
                raise CodecError(
                    f"block_len ({site.block_len}) must be a multiple of tile ({codec.tile})"
                )
        if self.form == "pre":
            self.stored = Stored(self.plan, gain="gain", turns="token")
        elif self.tile != site.block_len:
            self.stored = None
        elif turns:
            turned = "all" if self.form == "tile" else "mean"
            self.stored = Stored(self.plan, gain="gain", turns=turned)
        # the mean's share of a score depends on the page wherever the mean turns
        self.page_query = turns and self.form != "pre"
        run = torch.arange(self.tile, device=site.device)
        self.run_mean = self.rope.rotate(self.mean[:, None].expand(-1, self.tile, -1), run)

    def query(self, q: Tensor, fields: Mapping[str, Tensor], positions: Tensor) -> Query:
        """Transformed queries; for the mean, queries turned to the run's start meet its table."""
        if self.form == "pre":
            return Query(q[:, :, None])
        turned = q[:, :, None] * self.scaling  # [rows, H, 1, M, D]
        if self.page_query:
            turned = self._turned(turned, positions)  # [pages, H, runs, M, D]
        if self.form == "tile":
            prepared = turned @ self.inverse.mT[:, None]
        else:
            prepared = (q[:, :, None] * self.scaling) @ self.inverse.mT[:, None]
            if not positions.numel() or not self.page_query:
                prepared = prepared[: len(q)]
            else:
                prepared = prepared.expand(len(turned), -1, -1, -1, -1)
        gain = prepared @ self.offset[:, None].mT
        mean = turned @ self.run_mean[:, None].mT  # [pages, H, runs, M, tile]
        return Query(
            self.plan.spread(prepared * self.step[:, None]),
            gain,
            mean=mean.transpose(2, 3).flatten(-2),
        )

    def token_query(self, q: Tensor) -> Query:
        """The pre form on its codes: transformed, steps folded in, and the mean's share."""
        q = q[:, :, None] * self.scaling
        prepared = q @ self.inverse.mT[:, None]
        gain = prepared @ self.offset[:, None].mT
        mean = q[:, :, 0] @ self.mean[..., None]
        return Query(self.plan.spread(prepared * self.step[:, None]), gain, mean=mean)

    def read(self, fields: Mapping[str, Tensor], positions: Tensor) -> Reading:
        """Columns are the digits; in the pre form, decoded keys."""
        if self.form == "pre":
            return Reading(self.decode(fields, positions))
        return super().read(fields, positions)

    def _turned(self, q: Tensor, positions: Tensor) -> Tensor:
        """R_n0^-1 q at each run's start: `[rows, H, 1, M, D]` to `[pages, H, runs, M, D]`."""
        starts = positions[:, :: self.tile, None]  # [pages, runs, 1]
        q = q.transpose(1, 2).expand(len(starts), starts.shape[1], -1, -1, -1)
        return self.rope.unrotate(q, starts).transpose(1, 2)

    def _runs(self, x: Tensor) -> Tensor:
        """`[blocks, H, block_len, D]` to `[blocks, runs, H, tile, D]`."""
        return x.unflatten(2, (-1, self.tile)).transpose(1, 2)

    def _residual(self, x: Tensor, positions: Tensor) -> Tensor:
        x = x / self.scaling
        if self.form == "pre":
            return self.rope.unrotate(x, positions) - self.mean[:, None]
        starts = positions[:, :: self.tile, None]
        if self.form == "tile":
            turned = self.rope.unrotate(self._runs(x), starts) - self.run_mean
            return turned.transpose(1, 2).flatten(2, 3)
        return x - self._turning_mean(positions)

    def _states(self, residual: Tensor, positions: Tensor) -> Tensor:
        if self.form == "pre":
            x = self.rope.rotate(residual + self.mean[:, None], positions)
        elif self.form == "tile":
            starts = positions[:, :: self.tile, None]
            turned = self.rope.rotate(self._runs(residual) + self.run_mean, starts)
            x = turned.transpose(1, 2).flatten(2, 3)
        else:
            x = residual + self._turning_mean(positions)
        return x * self.scaling

    def _turning_mean(self, positions: Tensor) -> Tensor:
        """R_n mu of each token: the table of a run, turned by the run's first position."""
        if not self.rope.inv_freq:
            return self.mean[:, None]
        starts = positions[:, :: self.tile, None]
        mean = self.rope.rotate(
            self.run_mean.expand(len(starts), starts.shape[1], -1, -1, -1), starts
        )
        return mean.transpose(1, 2).flatten(2, 3)


# --- widths, names ----------------------------------------------------------------------------


def group_len(dim: int) -> int:
    """Coordinates that share a width: `dim / 8`, so that sections have no padding."""
    return dim // next(parts for parts in range(min(8, dim), 0, -1) if dim % parts == 0)


def tag(bits: float) -> str:
    """Bits as they stand in a table's name: 2.5 is `2_5`."""
    return f"{bits:g}".replace(".", "_")


def name_of(codec: Fisher) -> str:
    """The preset's name of a codec with the other knobs as they are by default."""
    return f"fisher{codec.bits:g}" + ("" if codec.form == "tile" else f"-{codec.form}")


def preset_of(bits: float, form: Form = "tile", **knobs: Any) -> Preset:
    """The preset of any number of bits."""
    codec = Fisher(float(bits), form, **knobs)
    return Preset(name_of(codec), codec, codec, _nmse(bits), _SUMMARY[form])


def _nmse(bits: float) -> tuple[float, float]:
    """What uniform levels leave of N(0, 1) at the example's widths, with a tenth to spare."""
    left = (1.0, 0.3634, 0.1189, 0.0375, 0.01155, 0.00350, 0.00104)
    low = int(bits)
    budget = left[low] + (bits - low) * (left[min(low + 1, MAX_BITS)] - left[low])
    return (1.1 * budget, 1.1 * budget)


def _family(match: re.Match[str]) -> Preset:
    return preset_of(float(match["bits"]), match["form"] or "tile")  # type: ignore[arg-type]


_SUMMARY = {
    "tile": "Fisher-weighted eigenbasis, one bit budget; keys as seen from their page's start",
    "post": "Fisher-weighted eigenbasis, one bit budget; keys after RoPE",
    "pre": "Fisher-weighted eigenbasis, one bit budget; keys before RoPE, decoded when read",
}
for _form in FORMS:
    for _bits in (4.0, 3.0, 2.5, 2.0, 1.5, 1.0):
        _preset = preset_of(_bits, _form)
        register(
            _preset.name,
            keys=_preset.keys,
            values=_preset.values,
            gaussian_nmse=_preset.gaussian_nmse,
            summary=_preset.summary,
        )
register_family(r"fisher(?P<bits>\d(\.\d+)?)(-(?P<form>tile|post|pre))?", _family)
