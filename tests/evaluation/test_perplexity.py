"""The harness on a small random model."""

import hashlib
import json

import pytest
import torch

from kvfold.codec import CodecError
from kvfold.evaluation.perplexity import EvaluationError, evaluate
from kvfold.evaluation.report import QUOTABLE_SHARE
from kvfold.integrations.describe import model_hash
from kvfold.integrations.streaming import streaming

SETTING = {"context": 300, "windows": 3, "sinks": 4, "window": 32}


@pytest.fixture(scope="module")
def report(tiny, text):
    steps = []
    report = evaluate(
        *tiny,
        text,
        ["identity", "int8", "turboquant2"],
        **SETTING,
        progress=steps.append,
        model_name="tiny",
        text_name="words",
    )
    assert [s.done for s in steps] == list(range(1, 13))
    assert steps[-1].total == 12
    assert {s.label for s in steps} == {"uncompressed", "identity", "int8", "turboquant2"}
    return report


def test_rows_order_codes_by_their_bits(report):
    exact, fine, coarse = report.rows
    assert abs(exact.kl_mean) < 1e-6
    assert exact.top1 == 1.0
    assert exact.bits_per_element == 32
    assert exact.ppl == pytest.approx(report.conditions["ppl"], rel=1e-6)
    assert 1e-7 < fine.kl_mean < 1e-3 < coarse.kl_mean < coarse.kl_p99
    assert fine.bits_per_element < 9
    assert coarse.bits_per_element < 3
    assert coarse.top1 < 1
    assert coarse.ppl_delta_se > 0
    assert coarse.ppl == pytest.approx(report.conditions["ppl"] * (1 + coarse.ppl_delta))


def test_conditions_and_json(report, tiny, text, tmp_path):
    report.save(tmp_path / "deep" / "report.json")
    data = json.loads((tmp_path / "deep" / "report.json").read_text())
    assert data == json.loads(json.dumps(report.to_json()))
    assert set(data["rows"][0]) == {
        *("preset", "bits_per_element", "kl_mean", "kl_p99", "top1", "ppl", "ppl_delta"),
        *("ppl_delta_se", "compressed_share"),
    }
    wanted = {
        "model": "tiny",
        "model_hash": model_hash(tiny[0]),
        "text": "words",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        **SETTING,
        "block": 1,
        "dtype": "float32",
        "tokens_scored": 3 * (300 - 37),
        "se_over": "windows",
    }
    assert {key: data[key] for key in wanted} == wanted
    assert {"device", "torch", "transformers", "kvfold", "commit", "date"} <= set(data)


def test_figures_are_those_of_a_plain_loop(tiny, text):
    """KL, agreement and perplexity recomputed window by window without the harness."""
    model, tokenizer = tiny
    row = evaluate(model, tokenizer, text, ["turboquant2"], **SETTING, rows=2).rows[0]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])[:900].view(3, 300)
    kl, agree, loss = [], [], []
    for window in ids:
        with torch.no_grad():
            p = model(window[None], use_cache=False).logits[0, 36:-1].log_softmax(-1)
            with streaming(model, "turboquant2", window=32):
                q = model(window[None]).logits[0, 36:-1].log_softmax(-1)
        kl.append((p.exp() * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
        loss.append(-q.gather(1, window[37:, None]))
    assert row.kl_mean == pytest.approx(float(torch.cat(kl).mean()), rel=1e-3)
    assert row.top1 == pytest.approx(float(torch.cat(agree).float().mean()), abs=0.005)
    assert row.ppl == pytest.approx(float(torch.cat(loss).mean().exp()), rel=1e-4)


@pytest.mark.parametrize("preset", ["kivi2-g32", "turboquant2"])
def test_the_decode_path_gives_the_oracles_figures(tiny, text, preset):
    """Token by token through a cache, against all at once; float noise flips a few codes."""
    setting = {**SETTING, "windows": 2, "page_len": 32, "rows": 2}
    oracle = evaluate(*tiny, text, [preset], **setting, block=32)
    decode = evaluate(*tiny, text, [preset], **setting, path="decode")
    assert decode.conditions["path"] == "decode"
    assert decode.conditions["block"] == oracle.conditions["block"] == 32
    a, b = oracle.rows[0], decode.rows[0]
    assert b.kl_mean > 1e-4
    assert b.kl_mean == pytest.approx(a.kl_mean, rel=0.01)
    assert b.compressed_share == a.compressed_share


def test_a_low_share_is_flagged(report):
    share = report.rows[0].compressed_share
    assert share < QUOTABLE_SHARE
    assert "before quoting" in report.table().caption


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"windows": 99}, "99 windows of 300 need 29700"),
        ({"context": 2000}, "past the model's limit of 1024"),
        ({"context": 37}, "leaves nothing to compress"),
        ({"windows": 0}, "at least 1"),
        ({"path": "kernel"}, "possible: oracle, decode"),
        ({"path": "decode", "block": 1}, r"page_len \(128\) is possible"),
    ],
)
def test_impossible_evaluations(tiny, text, change, message):
    with pytest.raises(EvaluationError, match=message):
        evaluate(*tiny, text, ["int8"], **{**SETTING, **change})


def test_presets_are_checked_first(tiny, text):
    with pytest.raises(CodecError, match="unknown preset 'kivi3'"):
        evaluate(*tiny, text, ["int8", "kivi3"], **SETTING)
    with pytest.raises(EvaluationError, match="no preset"):
        evaluate(*tiny, text, [], **SETTING)
    with pytest.raises(CodecError, match="window"):
        evaluate(*tiny, text, ["kivi2-g64"], **SETTING)
