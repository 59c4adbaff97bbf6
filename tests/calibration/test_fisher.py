"""The fit of `fisher`: transforms, the budget, levels, statistics; then tiny models end to end."""

import itertools

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

import kvfold
from kvfold.calibration.artefact import Artefact, CalibrationError
from kvfold.calibration.fisher import (
    DISTORTION,
    Fit,
    Recipe,
    SideStatistics,
    Statistics,
    Transform,
    allocate,
    codecs_for,
    hull,
    transform,
)
from kvfold.codec import Side, Site
from kvfold.codecs.fisher import Fisher, group_len, preset_of
from kvfold.integrations import collect_fisher
from kvfold.integrations.describe import UnsupportedError
from kvfold.integrations.streaming import streaming
from kvfold.packing import DIGITS
from kvfold.quantizers.uniform import fit_affine, gaussian_affine
from kvfold.transforms.rope import Rope

SIDES: tuple[Side, ...] = ("key", "value")


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_gram(*shape: int, seed: int, decades: float = 3.0) -> Tensor:
    x = torch.randn(shape[0], 4 * shape[-1], shape[-1], generator=generator(seed))
    x = x * torch.logspace(0, -decades / 2, shape[-1])
    turn = torch.linalg.qr(
        torch.randn(shape[0], shape[-1], shape[-1], generator=generator(seed + 1))
    )[0]
    x = x @ turn
    return x.mT @ x / x.shape[-2]


# --- transforms -------------------------------------------------------------------------------


def test_transform_whitens_and_diagonalises_the_loss() -> None:
    """A S A^T = I, and A^-T M A^-1 = diag(e) with M the ridged metric."""
    s, g = random_gram(3, 16, seed=90_001).double(), random_gram(3, 16, seed=90_003).double()
    made = transform(s, g, ridge=1e-3)
    eye = torch.eye(16, dtype=torch.float64)
    white = (made.matrix @ s @ made.matrix.mT - eye).abs().max().item()
    assert white < 1e-6, f"{white:.3g}"
    m = g + 1e-3 * g.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * eye
    back = torch.linalg.inv(made.matrix)
    loss = back.mT @ m @ back
    error = ((loss - torch.diag_embed(made.cost)).norm() / made.cost.norm()).item()
    assert error < 1e-6, f"{error:.3g}"
    assert (made.cost.diff(dim=-1) <= 0).all()


def test_transform_of_constant_and_of_unseen_heads_is_finite() -> None:
    s = torch.zeros(2, 8, 8)
    s[1] = torch.eye(8)
    made = transform(s, torch.zeros(2, 8, 8))
    assert torch.isfinite(made.matrix).all()
    assert torch.isfinite(torch.linalg.inv(made.matrix)).all()
    assert (made.cost == 0).all()


# --- the budget -------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.5, 1, 1.5, 2, 2.3, 3, 4, 6])
def test_allocation_meets_its_budget_in_whole_groups(bits: float) -> None:
    shapes = {
        (0, "key"): (3, 64),
        (0, "value"): (3, 64),
        (1, "key"): (2, 128),
        (1, "value"): (2, 80),
    }
    costs = {
        key: torch.rand(shape, generator=generator(90_010 + i)).pow(4).sort(-1, descending=True)[0]
        for i, (key, shape) in enumerate(shapes.items())
    }
    widths = allocate(costs, bits)
    total = sum(e.numel() for e in costs.values())
    spent = sum(int(w.sum()) for w in widths.values())
    assert bits * total - 16 <= spent <= bits * total, f"{spent} of {bits * total}"
    for key, w in widths.items():
        group = group_len(w.shape[-1])
        for p in range(6):
            counts = (w > p).sum(-1)
            assert (counts % group == 0).all(), f"{key}: {counts.tolist()} with more than {p} bits"
        assert (w.diff(dim=-1) <= 0).all(), f"{key}: widths rise along falling costs"


def test_allocation_is_the_optimum() -> None:
    """No other widths of the same budget cost less: every exchange of a bit is checked."""
    e = torch.rand(2, 32, generator=generator(90_020)).pow(6).sort(-1, descending=True)[0]
    w = allocate({0: e}, 2.0)[0]
    left = torch.tensor(DISTORTION)
    loss = e.unflatten(-1, (-1, 4)).sum(-1)
    w = w[:, ::4]
    gain_if_more = torch.where(w < 6, loss * (left[w] - left[(w + 1).clamp(max=6)]), 0.0)
    loss_if_less = torch.where(w > 0, loss * (left[(w - 1).clamp(min=0)] - left[w]), torch.inf)
    assert gain_if_more.max() <= loss_if_less.min() + 1e-9


@pytest.mark.parametrize("price", [0.0, 0.3, 0.8, 1.0, 2.5, 4.0])
def test_hull_holds_the_widths_that_some_exchange_rate_takes(price: float) -> None:
    rates = torch.tensor([w + price * len(DIGITS[w]) for w in range(7)], dtype=torch.float64)
    exchange = torch.logspace(-6, 2, 4001, dtype=torch.float64)[:, None]
    best = (torch.tensor(DISTORTION, dtype=torch.float64) + exchange * rates).argmin(-1)
    assert hull(price) == sorted(set(best.tolist()))


@pytest.mark.parametrize("price", [0.0, 0.4, 1.0, 3.0])
def test_no_widths_of_as_many_bits_and_columns_cost_less(price: float) -> None:
    e = torch.rand(1, 5, generator=generator(90_021)).pow(6).sort(-1, descending=True)[0].double()
    w = allocate({0: e}, 2.4, price=price)[0][0]
    left = torch.tensor(DISTORTION, dtype=torch.float64)
    columns = torch.tensor([len(DIGITS[b]) for b in range(7)])
    others = torch.cartesian_prod(*[torch.arange(7)] * 5)
    fits = (others.sum(-1) <= w.sum()) & (columns[others].sum(-1) <= columns[w].sum())
    least = (e[0] * left[others[fits]]).sum(-1).min()
    assert (e[0] * left[w]).sum() <= least + 1e-12


@pytest.mark.parametrize("scope", ["model", "layer"])
def test_slack_buys_fewer_columns_at_the_same_bits(scope: str) -> None:
    g = generator(90_022)
    solved: dict[tuple[int, Side], Transform] = {
        (layer, side): Transform(
            torch.empty(0), torch.rand(4, 64, generator=g).pow(8).sort(-1, descending=True)[0]
        )
        for layer in range(4)
        for side in SIDES
    }
    found = {}
    for slack in (0.0, 0.04):
        fit = Fit(synthetic()[0], Recipe(slack=slack, scope=scope))  # type: ignore[arg-type]
        widths = torch.stack(list(fit.widths(solved, Fisher(3.0)).values()))  # type: ignore[arg-type]
        cost = torch.stack([made.cost for made in solved.values()])
        columns = torch.tensor([len(DIGITS[b]) for b in range(7)])[widths].sum()
        found[slack] = (
            float((cost * torch.tensor(DISTORTION)[widths]).sum()),
            int(columns),
            float(widths.float().mean()),
        )
    (error, columns, bits), (more, fewer, same) = found[0.0], found[0.04]
    assert error < more <= 1.04 * error * (1 + 1e-6), f"{more / error:.4f} times the error"
    assert fewer < 0.92 * columns, f"{fewer} of {columns} columns"
    assert bits - 0.05 < same <= bits


# --- levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_fitted_levels_of_a_gaussian_are_its_own(bits: int) -> None:
    x = 0.7 * torch.randn(20_000, 3, generator=generator(90_030)) + 2.0
    widths = torch.full((3,), bits)
    step, offset = fit_affine(x, widths)
    codes = ((x - offset) / step).round().clamp(0, 2**bits - 1)
    found = ((codes * step + offset - x) / 0.7).square().mean().item()
    unit, zero = gaussian_affine(widths)
    z = (x - 2.0) / 0.7
    codes = ((z - zero) / unit).round().clamp(0, 2**bits - 1)
    known = (codes * unit + zero - z).square().mean().item()
    assert found < 1.01 * known, f"{found:.5f} fitted, {known:.5f} of the Gaussian's step"


def test_zero_bits_have_neither_step_nor_offset() -> None:
    step, offset = fit_affine(torch.randn(64, 2, generator=generator(90_031)), torch.tensor([0, 2]))
    assert step[0] == offset[0] == 0
    assert step[1] > 0


# --- synthetic states -------------------------------------------------------------------------


def synthetic(bias: float = 0.0, tokens: int = 2048) -> tuple[Statistics, Tensor, Tensor]:
    """One layer of two heads whose keys have a mean, an oblique spread and a RoPE."""
    rope = Rope(tuple(1e4 ** (-2 * i / 32) for i in range(16)))
    g = generator(90_040)
    root = torch.randn(2, 32, 32, generator=g) * torch.logspace(0, -1, 32)
    x = torch.randn(2, tokens, 32, generator=g) @ root
    x = x + bias * x.std() * torch.randn(2, 1, 32, generator=g).sign()
    v = torch.randn(2, tokens, 32, generator=g) @ root.flip(0)
    slope = torch.randn(2, tokens, 32, generator=g) @ root.mT
    positions = torch.arange(tokens) + 4
    index = torch.arange(tokens) % 128
    keys = rope.rotate(x, positions)
    sides = {}
    for side, states, turn in (("key", keys, rope), ("value", v, Rope(()))):
        found = SideStatistics(turn, torch.zeros(2, 32))
        found.mean = found.states(states, positions).mean(1)
        grad = rope.rotate(slope, positions) if side == "key" else slope
        found.add(states, grad, positions, index, torch.arange(tokens))
        sides[0, side] = found
    made = Statistics({"tile": 128}, sides, [positions], [index])
    return made, keys, positions


def key_error(statistics: Statistics, keys: Tensor, codec: Fisher) -> float:
    """Squared error of decoded keys."""
    site = Site("key", 2, 32, 128, rope=statistics.sides[0, "key"].rope)
    artefact = Artefact({"codecs": []}, Fit(statistics).tensors([codec]))
    code = codec.bind(site, artefact)
    blocks = keys.unflatten(1, (-1, 128)).transpose(0, 1)
    positions = (torch.arange(keys.shape[1]) + 4).view(-1, 128)
    rest = code.decode(code.encode(blocks, positions), positions) - blocks
    return rest.square().mean().item()


@pytest.mark.parametrize("form", ["tile", "post", "pre"])
def test_a_key_bias_of_50_spreads_hardly_matters(form: str) -> None:
    codec = Fisher(3.0, form)  # type: ignore[arg-type]
    plain, biased = (key_error(*synthetic(bias)[:2], codec) for bias in (0.0, 50.0))
    assert biased <= 1.1 * plain, f"{biased:.5f} with a bias, {plain:.5f} without"


def test_more_bits_less_error_and_the_ablations_cost() -> None:
    statistics, keys, _ = synthetic(bias=3.0)
    errors = [key_error(statistics, keys, Fisher(b, "pre")) for b in (1.0, 2.0, 3.0, 4.0)]
    assert all(b < 0.5 * a for a, b in itertools.pairwise(errors)), f"{errors}"


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(centred_keys=False),
        Recipe(centred_values=True),
        Recipe(metric="plain"),
        Recipe(scope="layer"),
        Recipe(scope="head"),
        Recipe(max_bits=4),
        Recipe(fitted=False),
        Recipe(gain=False),
        Recipe(reweigh=2, least=0),
        Recipe(measured=True, weighted=True),
        Recipe(slack=0.04),
        Recipe(measured=True, slack=0.04),
    ],
    ids=repr,
)
def test_every_recipe_gives_tables_that_bind(recipe: Recipe) -> None:
    statistics, _keys, _ = synthetic()
    for form in ("tile", "post", "pre"):
        codec = Fisher(2.0, form)
        tensors = Fit(statistics, recipe).tensors([codec])
        assert all(torch.isfinite(t).all() for t in tensors.values())
        widths = tensors[f"layers.0.key.{codec.table('codes')}"][0]
        assert widths.max() <= recipe.max_bits
        site = Site("key", 2, 32, 128, rope=statistics.sides[0, "key"].rope)
        codec.bind(site, Artefact({"codecs": []}, tensors))


def test_one_fit_gives_a_codec_the_tables_it_gets_alone() -> None:
    """Codes of all bits and forms share a basis, so no codec may leave another's there."""
    statistics, _keys, _ = synthetic(bias=3.0)
    codecs = codecs_for([4.0, 2.0, 1.0])
    recipe = Recipe(least=0)
    together = Fit(statistics, recipe).tensors(codecs)
    for codec in codecs:
        for name, alone in Fit(statistics, recipe).tensors([codec]).items():
            assert torch.equal(together[name], alone), f"{codec}: {name}"


def test_moments_of_few_tokens_are_not_reweighed() -> None:
    statistics, _keys, _ = synthetic(bias=3.0)
    name, codec = "layers.0.key.pre_basis", Fisher(2.0, "pre")
    count = len(statistics.places()[0])
    found = {
        what: Fit(statistics, recipe).tensors([codec])[name]
        for what, recipe in (
            ("plain", Recipe(reweigh=0)),
            ("few", Recipe(least=count + 1)),
            ("enough", Recipe(least=count)),
        )
    }
    assert torch.equal(found["plain"], found["few"])
    assert not torch.equal(found["plain"], found["enough"])


def test_as_many_tokens_are_sampled_as_memory_holds(monkeypatch) -> None:
    model = model_of("llama")
    assert collect_fisher.samples_for(model, 5000) == 5000
    # two layers, two heads, keys and values of 32 channels, residuals and gradients
    monkeypatch.setattr(collect_fisher, "SAMPLE_BYTES", 100 * 2 * 2 * 2 * 32 * 2 * 2)
    assert collect_fisher.samples_for(model, 5000) == 100


def test_statistics_survive_a_file(tmp_path) -> None:
    statistics, _, _ = synthetic()
    statistics.save(tmp_path / "found.safetensors")
    back = Statistics.load(tmp_path / "found.safetensors")
    codecs = codecs_for([2.0])
    before, after = (Fit(s).tensors(codecs) for s in (statistics, back))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(CalibrationError, match="holds no fisher statistics"):
        Statistics.load(tmp_path / "missing.safetensors")


# --- models -----------------------------------------------------------------------------------

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 200,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 10_000.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
    "rope_theta": 10_000.0,
}
MODELS = {
    "llama": ("Llama", {}),
    "mqa": ("Llama", {"num_key_value_heads": 1}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}},
    ),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "dynamic": (
        "Llama",
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}},
    ),
    "key biases": ("Qwen2", {}),
    "qk-norm": ("Qwen3", {}),
    "softcap and sliding": ("Gemma2", {"sliding_window": 64, "query_pre_attn_scalar": 32}),
    "partial rotary": (
        "StableLm",
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "partial_rotary_factor": 0.5,
            }
        },
    ),
    "no rope": (
        "GPT2",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 512,
            "vocab_size": 200,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
        },
    ),
}


def model_of(name: str):
    family, more = MODELS[name]
    knobs = more if family == "GPT2" else {**SHAPE, **more}
    if family == "StableLm":
        knobs = {k: v for k, v in knobs.items() if k != "head_dim"} | {"hidden_size": 128}
    torch.manual_seed(90_060)
    config = getattr(transformers, f"{family}Config")(**knobs)
    heads = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
    model = getattr(transformers, family + heads)(config).eval()
    for module_name, p in model.named_parameters():
        if "k_proj.bias" in module_name:  # Qwen's are large
            torch.nn.init.normal_(p, std=3.0)
    return model


def ids_of(rows: int, tokens: int) -> Tensor:
    return torch.randint(3, 200, (rows, tokens), generator=generator(90_070))


class Words:
    """A tokenizer of numbers."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


@pytest.mark.parametrize("name", MODELS)
def test_calibrate_save_load_generate(name: str, tmp_path) -> None:
    model = model_of(name)
    text = " ".join(map(str, ids_of(1, 800)[0].tolist()))
    before = (
        model.config._attn_implementation,
        {n: p.requires_grad for n, p in model.named_parameters()},
    )
    artefact = kvfold.FoldedCache.calibrate(
        model, Words(), text, "fisher3", tokens=800, context=400
    )
    after = (
        model.config._attn_implementation,
        {n: p.requires_grad for n, p in model.named_parameters()},
    )
    assert before == after
    assert all(p.grad is None for p in model.parameters())
    artefact.save(tmp_path / "a.safetensors")
    artefact = Artefact.load(tmp_path / "a.safetensors")
    for preset in ("fisher3", "fisher3-post", "fisher3-pre", "fisher1.5"):
        assert artefact.serves(kvfold.get(preset))
        ids = ids_of(1, 300)
        with torch.no_grad():
            reference = model(input_ids=ids, use_cache=False).logits
            with streaming(model, preset, artefact=artefact):
                found = model(input_ids=ids, use_cache=False).logits
        error = ((found - reference).norm() / reference.norm()).item()
        assert 0 < error < (0.1 if "3" in preset else 0.2), f"{preset}: {error:.4f}"
    cache = kvfold.FoldedCache(model, "fisher3", artefact=artefact)
    out = model.generate(ids_of(1, 300), past_key_values=cache, max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 320)
    assert cache.get_seq_length() == 319


def test_gradients_are_those_of_cold_pairs() -> None:
    """Against a graph in which a zero is added to keys and values where a pair is cold."""
    model, tokens, sinks, window = model_of("llama"), 140, 4, 64
    ids, zeros = ids_of(1, tokens), {}

    def attention(module, q, k, v, mask, scaling=None, **_):
        dk, dv = (torch.zeros_like(x, requires_grad=True) for x in (k, v))
        zeros[module.layer_idx] = dk, dv
        index = torch.arange(tokens)
        cold = (index >= sinks) & (index <= index[:, None] - window)
        k, v, wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (k, v, dk, dv))
        scores = (q @ k.mT + (q @ wide_k.mT) * cold) * scaling
        p = scores.masked_fill(index > index[:, None], -torch.inf).softmax(-1)
        return (p @ v + (p * cold) @ wide_v).transpose(1, 2).contiguous(), None

    found = collect_fisher.collect(model, ids, samples=50, draws=1)
    AttentionInterface.register("naive_cold", attention)
    AttentionMaskInterface.register("naive_cold", sdpa_mask)
    model.set_attn_implementation("naive_cold")
    logits = model(input_ids=ids, use_cache=False).logits[0]
    draws = generator(0)
    torch.randperm(tokens - window - sinks, generator=draws)
    uniform = torch.rand(tokens, generator=draws)
    logits.backward(collect_fisher._slope(logits.detach(), uniform))
    for layer, (dk, dv) in zeros.items():
        for side, grad, frame in (("key", dk.grad, "post"), ("value", dv.grad, "value")):
            g = grad[0, :, sinks : tokens - window]
            metric = found.sides[layer, side].metric[frame]
            error = ((metric - g.mT @ g).norm() / (g.mT @ g).norm()).item()
            assert error < 1e-5, f"layer {layer} {side}: {error:.3g}"


def test_labels_follow_the_models_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -50.0]]).expand(40_000, -1)
    p = logits[0].softmax(-1)
    drawn = p - collect_fisher._slope(logits, torch.rand(40_000, generator=generator(90_080)))
    error = (drawn.mean(0) - p).abs().max().item()
    assert error < 0.01, f"{error:.4f}"
    assert torch.allclose(drawn.sum(-1), torch.ones(40_000), atol=1e-5)


def test_a_seed_gives_the_same_statistics_and_a_stop_changes_nothing(tmp_path) -> None:
    model, ids = model_of("llama"), ids_of(3, 160)
    whole = collect_fisher.collect(model, ids, samples=100)
    again = collect_fisher.collect(model, ids, samples=100)
    path = tmp_path / "found.safetensors"

    def stop(done: int, total: int) -> None:
        if done == 5:  # three windows of means, then one and a half of gradients
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_fisher.collect(model, ids, samples=100, resume=path, progress=stop)
    assert Statistics.load(path).header["windows_done"] == 1
    resumed = collect_fisher.collect(model, ids, samples=100, resume=path)
    for other in (again, resumed):
        for key, side in whole.sides.items():
            for frame, metric in side.metric.items():
                assert torch.equal(metric, other.sides[key].metric[frame])
            assert torch.equal(side.sample()[0], other.sides[key].sample()[0])
    with pytest.raises(CalibrationError, match="run with another seed"):
        collect_fisher.collect(model, ids, samples=100, resume=path, seed=1)


def test_layers_are_recomputed_where_memory_is_short(monkeypatch) -> None:
    model, ids = model_of("llama"), ids_of(1, 160)
    whole = collect_fisher.collect(model, ids, samples=20)
    monkeypatch.setattr(collect_fisher, "ACTIVATION_BYTES", 0)
    less = collect_fisher.collect(model, ids, samples=20)
    for key, side in whole.sides.items():
        for frame, metric in side.metric.items():
            assert torch.equal(metric, less.sides[key].metric[frame])
    assert "forward" not in vars(model.model.layers[0])


def test_refuses_frequencies_that_change_and_short_windows() -> None:
    with pytest.raises(UnsupportedError, match="change beyond 1024 tokens"):
        collect_fisher.collect(model_of("dynamic"), ids_of(1, 1100))
    with pytest.raises(CalibrationError, match="more than 69 tokens"):
        collect_fisher.collect(model_of("llama"), ids_of(1, 60))
    with pytest.raises(CalibrationError, match="no fisher codec"):
        collect_fisher.calibrate(model_of("llama"), Words(), "1 2", "int8")


def test_dynamic_frequencies_are_refused_where_they_change() -> None:
    """A page keeps the frequencies it was coded with, so that none is coded with others."""
    model = model_of("dynamic")
    text = " ".join(map(str, ids_of(1, 400)[0].tolist()))
    artefact = kvfold.FoldedCache.calibrate(model, Words(), text, "fisher3", tokens=400)
    ids = ids_of(1, 1020)
    cache = kvfold.FoldedCache(model, "fisher3", artefact=artefact)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert out.shape == (1, 1024)
    cache = kvfold.FoldedCache(model, "fisher3", artefact=artefact)
    with pytest.raises(UnsupportedError, match=r"beyond 1024 tokens .* 1025 were given"):
        model.generate(ids, past_key_values=cache, max_new_tokens=8, do_sample=False)
    long = ids_of(1, 1025)
    with torch.no_grad(), streaming(model, "turboquant4"):
        model(input_ids=long, use_cache=False)
    with (
        pytest.raises(UnsupportedError, match="1025 were given"),
        torch.no_grad(),
        streaming(model, "fisher3", artefact=artefact),
    ):
        model(input_ids=long, use_cache=False)


def test_few_tokens_get_more_labels() -> None:
    assert [collect_fisher.draws_for(n) for n in (512, 2048, 8192, 32_768)] == [8, 8, 2, 1]
    found = collect_fisher.collect(model_of("llama"), ids_of(1, 160))
    assert found.header["draws"] == 8


def test_expected_memory_follows_the_shape() -> None:
    with torch.device("meta"):
        config = transformers.LlamaConfig(**SHAPE)
        model = transformers.LlamaForCausalLM(config)
    short, long = (collect_fisher.expected_bytes(model, n) for n in (512, 1024))
    assert short["weights"] == sum(4 * p.numel() for p in model.parameters())
    assert long["logits"] == 2 * short["logits"] == 2 * 1024 * 200 * 4
    # three frames of keys and one of values, two layers of two heads, two sums
    assert short["moments"] == 4 * 2 * 2 * 2 * 4 * 32**2
    assert long["graph"] == 2 * short["graph"]


def test_one_artefact_serves_many_bits() -> None:
    model = model_of("llama")
    found = collect_fisher.collect(model, ids_of(2, 200), samples=200)
    codecs = codecs_for([4.0, 2.3, 1.0])
    made = collect_fisher.artefact(found, codecs)
    for codec in codecs:
        preset = preset_of(codec.bits, codec.form)
        assert made.serves(preset)
        with streaming(model, preset, artefact=made) as session:
            bits = session.bits_per_element()
        assert codec.bits + 8 / 32 - 0.02 <= bits <= codec.bits + 8 / 32, f"{bits}"
    assert not made.serves(preset_of(3.0))
