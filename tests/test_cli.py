"""The commands, as a user types them."""

import json

import pytest
from typer.testing import CliRunner

from kvfold import presets
from kvfold.cli import app
from tests.evaluation.tiny import TEXT, make_folder

runner = CliRunner()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("cli"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KVFOLD_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text(TEXT)
    return path


def run(*args, code=0):
    result = runner.invoke(app, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def fails(message, *args):
    """Exit code 2, one line on stderr, no traceback."""
    result = run(*args, code=2)
    assert message in result.stderr, result.stderr
    assert result.stderr.startswith("kvfold: ")
    assert result.stderr.count("\n") == 1
    return result


def test_list_is_the_catalogue():
    result = run("list")
    for name in presets():
        assert name in result.stdout
    entries = json.loads(run("list", "--json", "--head-dim", 64, "--kv-heads", 3).stdout)
    assert [e["preset"] for e in entries] == list(presets())
    bits = {e["preset"]: e["bits_per_element"] for e in entries}
    assert bits["int8"] == 8.25
    assert bits["kivi2-g32"] == 3.0
    by_name = {e["preset"]: e for e in entries}
    assert "2402.02750" in by_name["kivi2-g64"]["paper"]
    assert by_name["kivi2-g64"]["needs"] == ["window >= 64"]
    assert by_name["rotatekv4"]["needs"] == ["calibration (optional)", "known RoPE"]
    assert by_name["int8"]["needs"] == []


def test_generate(folder, tmp_path):
    out = tmp_path / "g.json"
    arguments = ["--model", folder, "--preset", "int8", "--prompt", TEXT[:300]]
    arguments += ["--max-new-tokens", 40, "--window", 32, "--block", 32]
    result = run("generate", *arguments, "--compare", "--json", out)
    data = json.loads(out.read_text())
    assert data["text"]
    assert data["text"] in result.stdout
    assert {"tokens_per_second", "cache_bytes", "uncompressed_bytes", "compressed_share"} <= set(
        data
    )
    assert data["cache_bytes"] == sum(data["parts"].values()) > 0
    # layers x tokens x heads x (key + value) x 2 bytes; the last token is never read again
    tokens = data["prompt_tokens"] + data["new_tokens"] - 1
    assert data["uncompressed_bytes"] == 2 * tokens * 2 * (32 + 32) * 2
    assert 0.7 < data["compressed_share"] < 1
    assert 0 <= data["compared"]["agreement"] <= 1
    assert f"{data['cache_bytes']:,}" in result.stdout
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(TEXT[:300])
    arguments[4:6] = ["--prompt-file", prompt]
    assert data["text"] in run("generate", *arguments).stdout


def test_exact_generation_agrees_with_the_stock_cache(folder, tmp_path):
    out = tmp_path / "g.json"
    arguments = ["--model", folder, "--preset", "identity", "--prompt", TEXT[:200]]
    run("generate", *arguments, "--max-new-tokens", 30, "--compare", "--json", out)
    compared = json.loads(out.read_text())["compared"]
    assert compared["agreement"] == 1.0
    assert compared["first_difference"] is None


def test_eval(folder, text, tmp_path):
    out = tmp_path / "e.json"
    arguments = ["--model", folder, "--text", text, "--presets", "int8,turboquant2"]
    arguments += ["--context", 300, "--windows", 2, "--window", 32]
    result = run("eval", *arguments, "--json", out)
    data = json.loads(out.read_text())
    assert [row["preset"] for row in data["rows"]] == ["int8", "turboquant2"]
    assert data["rows"][0]["kl_mean"] < data["rows"][1]["kl_mean"]
    assert data["text"] == "words.txt"
    assert data["windows"] == 2
    assert "turboquant2" in result.stdout


def test_eval_of_all_names_what_it_leaves_out(folder, text):
    arguments = ["--model", folder, "--text", text, "--presets", "all"]
    result = run("eval", *arguments, "--context", 300, "--windows", 1)
    left_out = {line.split()[2].rstrip(":"): line for line in result.stderr.splitlines()}
    required = {n for n, p in presets().items() if p.keys.artefact == "required"}
    # the model's heads have 32 channels
    assert set(left_out) == required | {"kivi2-g64", "kivi4-g64"}
    assert "possible group sizes: 16, 32" in left_out["kivi2-g64"]
    rows = {line.split("│")[1].strip() for line in result.stdout.splitlines() if "│" in line}
    assert rows == set(presets()) - set(left_out)


def test_calibrate_then_eval_finds_it(folder, text, tmp_path):
    arguments = ["--model", folder, "--text", text, "--tokens", 900, "--context", 300]
    result = run("calibrate", *arguments, "--preset", "rotatekv3")
    assert "tables of rotatekv3 from 900 tokens" in result.stdout
    given = tmp_path / "mine.safetensors"
    run("calibrate", *arguments, "--preset", "polar-r2a4", "--out", given)
    evaluate = ["--model", folder, "--text", text, "--context", 300, "--windows", 1]
    evaluate += ["--window", 32, "--presets", "rotatekv3,polar-r2a4,int8"]
    out = tmp_path / "e.json"
    run("eval", *evaluate, "--json", out)
    assert set(json.loads(out.read_text())["artefacts"]) == {"rotatekv3"}
    run("eval", *evaluate, "--artefact", given, "--json", out)
    assert set(json.loads(out.read_text())["artefacts"]) == {"polar-r2a4"}
    generate = ["--model", folder, "--preset", "polar-r2a4", "--prompt", TEXT[:200]]
    run("generate", *generate, "--max-new-tokens", 4, "--artefact", given)
    generate[3] = "rotatekv4"
    fails("made for codec polar", "generate", *generate, "--artefact", given)


def test_errors_of_generate(folder, tmp_path):
    base = ["generate", "--model", folder, "--preset", "int8"]
    fails("exactly one of --prompt and --prompt-file", *base)
    fails("the prompt is empty", *base, "--prompt", "")
    fails("limit of 1024 positions", *base, "--prompt", "x", "--max-new-tokens", 2000)
    fails("cannot read", *base, "--prompt-file", tmp_path / "absent")
    fails("unknown preset 'int9'", *base[:3], "--preset", "int9", "--prompt", "x")
    fails("known presets: ", *base[:3], "--preset", "nope", "--prompt", "x")
    fails("no such artefact", *base, "--prompt", "x", "--artefact", tmp_path / "absent")
    fails("device 'warp' cannot be used", *base, "--prompt", "x", "--device", "warp")
    fails("no model", *base[:1], "--model", tmp_path / "no model", *base[3:], "--prompt", "x")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"\x00" * 40)
    fails("not a readable artefact", *base, "--prompt", "x", "--artefact", damaged)


def test_errors_of_eval_and_calibrate(folder, text, tmp_path):
    base = ["eval", "--model", folder, "--text", text]
    fails("unknown preset 'x'", *base, "--presets", "int8,x")
    fails("no preset was given", *base, "--presets", ",")
    fails("windows of 300 need", *base, "--presets", "int8", "--context", 300, "--windows", 99)
    fails("past the model's limit", *base, "--presets", "int8", "--context", 4096)
    binary = tmp_path / "binary"
    binary.write_bytes(b"\xff\xfe\x00")
    fails("not UTF-8", *base[:3], "--text", binary, "--presets", "int8")
    fails("nothing to calibrate", "calibrate", *base[1:], "--preset", "int8")
    assert "does not fit" in run("list", "--head-dim", 3).stdout


def test_unsupported_models_are_said(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    make_folder(tmp_path)
    knobs = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 32}
    MistralForCausalLM(MistralConfig(**knobs, **heads)).save_pretrained(tmp_path)
    message = "only full_attention layers"
    fails(message, "generate", "--model", tmp_path, "--preset", "int8", "--prompt", "x y")


def test_unexpected_errors_keep_their_traceback(monkeypatch):
    def broken(**_):
        raise KeyError("surprise")

    monkeypatch.setattr("kvfold.evaluation.report.catalogue", broken)
    result = runner.invoke(app, ["list"])
    assert isinstance(result.exception, KeyError)
    assert result.exit_code == 1
