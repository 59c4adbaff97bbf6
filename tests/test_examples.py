"""The examples run, on the demo model where they need one."""

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

from kvfold.integrations import models

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    try:
        models.demo_weights()
    except models.ModelError as error:
        pytest.skip(str(error))
    return models.load("smollm2-135m")


def test_chat_goes_on_from_what_was_said(demo, capsys, monkeypatch):
    """A packed cache over three turns gives the answers of the stock cache, and one template."""
    model, tokenizer = demo
    chat = example("chat")
    monkeypatch.setattr(chat, "load", lambda name: demo)
    said = ["Name three colours.", "Write them in capital letters.", "Thanks."]
    chat.main(
        ["--preset", "identity", "--max-new-tokens", "24", *(x for t in said for x in ("--say", t))]
    )
    ours = capsys.readouterr()
    stock = chat.chat(model, tokenizer, DynamicCache(config=model.config), said, 24)
    assert capsys.readouterr().out == ours.out
    assert "identity: layers 0-29" in ours.err
    text = tokenizer.decode(stock[0])
    assert text.count("<|im_start|>system") == 1
    parts = text.split("<|im_start|>")
    assert [part.split("\n")[0] for part in parts[1:]] == ["system", *["user", "assistant"] * 3]
    assert all(part.count("<|im_end|>") == 1 for part in parts[1:-1])
    whole = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    assert torch.equal(whole, stock)  # the turns were tokenised as one conversation would be
