"""Saved caches: they go on where they were, in another process too, and nothing damaged is read."""

import json
import pickle
import struct
import subprocess
import sys

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import kvfold
from kvfold import CacheError, CodecError, FoldedCache, FoldedWarning, PrefixStore
from kvfold.integrations import saved
from kvfold.kernels import cpu
from tests.integrations.conftest import tiny_llama
from tests.integrations.test_folded_cache import left_padded

SMALL = {"window": 32, "block": 32, "slab_blocks": 2}


def filled(model, prompt, preset="turboquant4", mask=None, **more):
    cache = FoldedCache(model, preset, **{**SMALL, **more})
    given = {}
    if mask is not None:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        given = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        model(prompt, past_key_values=cache, **given)
    return cache


def steps(model, prompt, cache, mask=None, count=33):
    """Logits of one-token steps: enough that blocks are folded."""
    out = []
    with torch.no_grad():
        for i in range(count):
            given = {}
            if mask is not None:
                mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
                given = {"attention_mask": mask, "position_ids": mask.sum(1, keepdim=True) - 1}
            out.append(model(prompt[:, i : i + 1], past_key_values=cache, **given).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("name", ["identity", "kivi2-g32", "polar-r3a3", "rotatekv4", "int8"])
def test_a_loaded_cache_goes_on_bit_for_bit(llama, prompt, tmp_path, name):
    mask = left_padded(prompt)
    cache = filled(llama, prompt, name, mask)
    cache.save(tmp_path / "a.kvfold")
    again = FoldedCache.load(llama, tmp_path / "a.kvfold")
    assert again.nbytes() == cache.nbytes()
    assert repr(again) == repr(cache)
    assert torch.equal(steps(llama, prompt, again, mask), steps(llama, prompt, cache, mask))
    assert again.timeline.lengths == cache.timeline.lengths


#: room for a few pages a row; where the C++ kernel attends, its tables take 222 kB of it
LIMIT = 500_000 if cpu.native() is None else 750_000


@pytest.mark.parametrize("more", [{"trim": 64}, {"prune": 64}, {"max_bytes": LIMIT}])
def test_holes_mass_and_budgets_are_saved(llama, prompt, tmp_path, more):
    cache = filled(llama, prompt, **more)
    steps(llama, prompt, cache)
    cache.save(tmp_path / "a")
    again = FoldedCache.load(llama, tmp_path / "a")
    assert again.timeline.held
    assert [again.timeline.blocks(r) for r in range(2)] == [
        cache.timeline.blocks(r) for r in range(2)
    ]
    assert torch.equal(steps(llama, prompt, again), steps(llama, prompt, cache))


def test_shared_pages_are_written_once_and_a_file_forks_to_many_rows(llama, prompt, tmp_path):
    cache = filled(llama, prompt[:1])
    cache.save(tmp_path / "one")
    cache.batch_repeat_interleave(4)
    cache.save(tmp_path / "four")
    pages = cache.nbytes()["pages"]
    grown = (tmp_path / "four").stat().st_size - (tmp_path / "one").stat().st_size
    window = cache.nbytes()["window"] + cache.nbytes()["sinks"]
    assert grown < window, (grown, window, pages)
    loaded = FoldedCache.load(llama, tmp_path / "one")
    loaded.batch_repeat_interleave(4)
    assert loaded.nbytes()["pages"] == pages
    rows = prompt[:1].expand(4, -1)
    assert torch.equal(steps(llama, rows, loaded), steps(llama, rows, cache))


def test_sliding_layers_are_saved_exactly(tmp_path):
    torch.manual_seed(5)
    config = Gemma3TextConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=0,
    )
    model = Gemma3ForCausalLM(config).eval()
    ids = torch.randint(3, 300, (1, 150))
    cache = filled(model, ids)
    cache.save(tmp_path / "a")
    again = FoldedCache.load(model, tmp_path / "a")
    assert torch.equal(steps(model, ids, again), steps(model, ids, cache))


def test_another_process_goes_on_the_same(llama, prompt, tmp_path):
    cache = filled(llama, prompt)
    cache.save(tmp_path / "a")
    llama.save_pretrained(tmp_path / "model")
    torch.save(prompt, tmp_path / "prompt.pt")
    code = f"""
import torch, kvfold
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(r"{tmp_path}/model", dtype=torch.float32).eval()
prompt = torch.load(r"{tmp_path}/prompt.pt")
cache = kvfold.FoldedCache.load(model, r"{tmp_path}/a")
with torch.no_grad():
    out = model(prompt[:, :1], past_key_values=cache).logits
print(out.double().sum().item(), cache.get_seq_length())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    total, length = done.stdout.split()
    with torch.no_grad():
        wanted = llama(prompt[:, :1], past_key_values=cache).logits
    assert abs(float(total) - wanted.double().sum().item()) < 1e-2
    assert int(length) == 231


# --- files that must not be read --------------------------------------------------------------


@pytest.fixture
def path(llama, prompt, tmp_path):
    filled(llama, prompt[:1]).save(tmp_path / "a.kvfold")
    return tmp_path / "a.kvfold"


def header_of(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def rewrite(path, change):
    """The file with its kvfold header changed and not sealed again."""
    meta, body = header_of(path)
    header = json.loads(meta["__metadata__"]["kvfold_cache"])
    change(header)
    meta["__metadata__"]["kvfold_cache"] = json.dumps(header, sort_keys=True)
    text = json.dumps(meta).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def test_there_is_no_pickle_in_it(path):
    meta, _ = header_of(path)
    assert set(json.loads(meta["__metadata__"]["kvfold_cache"])) == saved._HEADER | {
        "format",
        "sha256",
        "tokens",
    }
    with pytest.raises(pickle.UnpicklingError):
        pickle.loads(path.read_bytes())


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 3000, -1])
def test_truncated_files_are_refused(llama, path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CacheError, match="not a readable saved cache, perhaps truncated"):
        FoldedCache.load(llama, path)


@pytest.mark.parametrize("at", [0.3, 0.6, 0.99])
def test_one_flipped_bit_is_found(llama, path, at):
    data = bytearray(path.read_bytes())
    _, body = header_of(path)
    data[len(data) - len(body) + int(at * len(body))] ^= 4
    path.write_bytes(data)
    with pytest.raises(CacheError, match="damaged: its contents do not match its sha256"):
        FoldedCache.load(llama, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h.update(format=99), "has saved cache format 99; this kvfold reads format 1"),
        (lambda h: h["timeline"].update(lengths=[9]), "do not match its sha256"),
        (lambda h: h["timeline"]["table"][0].reverse(), "do not match its sha256"),
        (lambda h: h.update(model_hash="0" * 16), "do not match its sha256"),
        (lambda h: h.pop("sha256"), "header of .* is damaged"),
    ],
)
def test_changed_headers_are_refused(llama, path, change, message):
    rewrite(path, change)
    with pytest.raises(CacheError, match=message):
        FoldedCache.load(llama, path)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda h: h.update(page_format=1), CacheError, "pages of format 1; this kvfold reads"),
        (lambda h: h["codecs"]["all"]["keys"].update(version=99), CodecError, "version 99"),
        (lambda h: h["codecs"]["all"]["keys"].update(bits=3), CacheError, "is another one here"),
        (lambda h: h["timeline"].update(lengths=[9, 9]), CacheError, "do not fit each other"),
        (lambda h: h["timeline"]["table"][0].append(77), CacheError, "do not fit each other"),
        (lambda h: h["timeline"].update(table=[[0]]), CacheError, "layer 0 was saved as"),
        (lambda h: h.pop("timeline"), CacheError, "lacks .'timeline'"),
    ],
)
def test_sealed_files_that_do_not_fit_are_refused(llama, path, change, error, message):
    from kvfold import sealed

    header, tensors = sealed.read(path, saved.KIND)
    change(header)
    sealed.write(path, saved.KIND, header, tensors)
    with pytest.raises(error, match=message):
        FoldedCache.load(llama, path)


def test_another_model_dtype_or_kind_of_file_is_refused(llama, prompt, path, tmp_path):
    with pytest.raises(CacheError, match=r"saved with model .* this model has hash"):
        FoldedCache.load(tiny_llama(num_hidden_layers=2), path)
    with pytest.raises(CacheError, match="from a model in float32; this one is in bfloat16"):
        FoldedCache.load(tiny_llama().to(torch.bfloat16), path)
    with pytest.raises(CacheError, match="no such saved cache"):
        FoldedCache.load(llama, tmp_path / "nothing")
    llama.save_pretrained(tmp_path / "model")
    with pytest.raises(CacheError, match="no kvfold saved cache: it has no 'kvfold_cache' header"):
        FoldedCache.load(llama, tmp_path / "model" / "model.safetensors")
    with pytest.raises(CacheError, match="nothing to save"):
        FoldedCache(llama).save(tmp_path / "b")


def test_a_save_that_fails_leaves_the_old_file(llama, prompt, path, monkeypatch):
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        filled(llama, prompt).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# --- prefixes ---------------------------------------------------------------------------------


def test_the_longest_prefix_is_found_and_cropped(llama, prompt, tmp_path):
    store = PrefixStore(tmp_path, llama, "identity", **SMALL)
    a, b = prompt[0], torch.cat((prompt[0, :100], prompt[1, :100]))
    for ids in (a[:70], a, b):
        store.save(filled(llama, ids[None], "identity"), ids)
    for asked, wanted in (
        (torch.cat((a, a[:9])), 230),
        (a, 229),
        (torch.cat((a[:140], b[:50])), 140),
        (torch.cat((b[:150], a[:50])), 150),
        (torch.cat((a[:50], b[:50])), 50),
        (b[5:], 0),
        (a[:31], 0),
    ):
        cache = store.load(asked)
        assert cache.get_seq_length() == wanted
        with torch.no_grad():
            found = llama(asked[None, wanted:], past_key_values=cache).logits[:, -1]
            full = llama(asked[None]).logits[:, -1]
        assert (found - full).abs().max() < 1e-4, (wanted, (found - full).abs().max())
    again = PrefixStore(tmp_path, llama, "identity", **SMALL)
    out = llama.generate(a[None], past_key_values=again.load(a), max_new_tokens=8, do_sample=False)
    assert torch.equal(out, llama.generate(a[None], max_new_tokens=8, do_sample=False))
    other = PrefixStore(tmp_path, llama, "int8", **SMALL)
    assert other.load(a).get_seq_length() == 0, "another preset's pages are not ours"


def test_a_damaged_prefix_is_a_miss_that_is_said(llama, prompt, tmp_path):
    store = PrefixStore(tmp_path, llama, "int8", **SMALL)
    path = store.save(filled(llama, prompt[:1], "int8"), prompt[0])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(FoldedWarning, match=f"saved prefix not used: {path}"):
        assert store.load(prompt[0]).get_seq_length() == 0
    with pytest.raises(CacheError, match="9 token ids for a cache of rows"):
        store.save(filled(llama, prompt[:1], "int8"), prompt[0, :9])
    with pytest.raises(CacheError, match="this store keeps caches made like it"):
        store.save(filled(llama, prompt[:1], "int8", trim=32), prompt[0])


def test_every_preset_goes_through_json(llama):
    for name in kvfold.presets():
        config = kvfold.CacheConfig(name, overrides={1: "identity"}, top_k=256)
        data = json.loads(json.dumps(config.to_json()))
        again = kvfold.CacheConfig.from_json(data, None)
        assert again.to_json() == config.to_json()
        assert again.preset_of(0).keys == config.preset_of(0).keys
        assert again.preset_of(1).values == config.preset_of(1).values
