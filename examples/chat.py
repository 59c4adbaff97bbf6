"""Chat with a model whose cache stays packed from turn to turn.

    python examples/chat.py                                  # the demo model, from the keyboard
    python examples/chat.py --preset kivi4-g64 --say "Hello" --say "Tell me more"

Each turn feeds only its own tokens: what was said before is read from the packed cache.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
from transformers import TextStreamer

import kvfold
from kvfold.integrations.models import load


def turns(said: list[str] | None) -> Iterator[str]:
    """What the user says: the `--say` texts, or lines from the keyboard until an empty one."""
    if said:
        for text in said:
            print(f"> {text}")
            yield text
        return
    while text := input("> ").strip():
        yield text


def turn_ids(tokenizer: Any, text: str, first: bool) -> torch.Tensor:
    """`[1, tokens]` from the end of the last answer to where the next one begins."""
    answer = "\N{LATIN SMALL LETTER SQUAT REVERSED ESH}"  # stands for it, whatever it was
    before = [{"role": "user", "content": "-"}, {"role": "assistant", "content": answer}]
    messages = [*([] if first else before), {"role": "user", "content": text}]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    added = whole if first else whole.split(answer, 1)[1]
    return tokenizer(added, return_tensors="pt", add_special_tokens=False)["input_ids"]


def chat(model: Any, tokenizer: Any, cache: kvfold.FoldedCache, said: list[str] | None, new: int):
    """Answer turn after turn; the cache holds all that was said."""
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = torch.zeros(1, 0, dtype=torch.long)
    for text in turns(said):
        ids = torch.cat((ids, turn_ids(tokenizer, text, first=not ids.numel())), 1)
        # generate() feeds what the cache does not hold yet
        ids = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            streamer=streamer,
        )
        if ids[0, -1] == tokenizer.eos_token_id:  # the template of the next turn writes it
            ids = ids[:, :-1]
    return ids


def main(args: list[str] | None = None) -> None:
    """Parse, chat, and say what the cache took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--preset", default="fisher3")
    parser.add_argument("--say", action="append", help="a turn; may be repeated")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    options = parser.parse_args(args)
    model, tokenizer = load(options.model)
    cache = kvfold.FoldedCache(model, options.preset)
    chat(model, tokenizer, cache, options.say, options.max_new_tokens)
    print(cache.summary(), file=sys.stderr)


if __name__ == "__main__":
    main()
