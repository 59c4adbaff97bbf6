"""Small random models that run in milliseconds."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(**more):
    torch.manual_seed(11)
    knobs = {
        "hidden_size": 128,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 300,
        "max_position_embeddings": 2048,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**{**knobs, **more})).eval()


@pytest.fixture(scope="session")
def llama():
    return tiny_llama()


@pytest.fixture
def prompt():
    generator = torch.Generator().manual_seed(12)
    return torch.randint(3, 300, (2, 230), generator=generator)
