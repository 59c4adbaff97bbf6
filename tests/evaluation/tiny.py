"""A small random model and a byte-level tokenizer."""

import random

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_WORDS = (
    *("the", "cache", "of", "a", "model", "holds", "keys", "and", "values", "for"),
    *("every", "token", "that", "it", "has", "read", "so", "far"),
)
TEXT = " ".join(random.Random(9).choices(_WORDS, k=900))


def make_folder(path, **more):
    """Config, weights and tokenizer of a two-layer llama over bytes."""
    torch.manual_seed(17)
    knobs = {
        "vocab_size": 260,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "pad_token_id": 256,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "initializer_range": 0.2,
    }
    LlamaForCausalLM(LlamaConfig(**{**knobs, **more})).save_pretrained(path)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    vocabulary |= {"<pad>": 256, "<s>": 257, "</s>": 258}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(path)
    return path
