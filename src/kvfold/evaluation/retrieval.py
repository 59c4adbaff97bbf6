"""Retrieval beyond the window: random key-value pairs are read, then one after another is asked.

A prompt is lines of two random words and five random digits, `harbor violet = 48213`; a question is
the words of a line far behind, and the digits are what induction finds there. Chance is a tenth of
the digits. A model that cannot do it uncompressed says nothing about a cache: look at the
uncompressed row first. Where a prompt of nothing but pairs is too hard, `filler` puts text that
says nothing between them (RULER's noise, Hsieh et al. 2024): fewer pairs, as far apart.
"""

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvfold.evaluation.metrics import token_scores
from kvfold.integrations.transformers import FoldedCache

DIGITS = 5
#: share of the prompt, from its start, that questions are taken from.
ASKED = 0.85
FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
)


@dataclass(frozen=True)
class Pairs:
    """A prompt of key-value lines, and questions with their answers.

    Args:
        prompt: `[1, tokens]`.
        questions: `[questions, tokens]` the beginning of a line, up to its digits.
        answers: `[questions, 5]` its digits.
    """

    prompt: Tensor
    questions: Tensor
    answers: Tensor


@dataclass(frozen=True)
class Score:
    """What a cache gave back.

    Args:
        digits: share of the digits whose likeliest token is right, with the right ones before it.
        pairs: share of questions with all digits right.
        kl: mean KL(uncompressed || this) of those next-token distributions, nats.
        logits: `[questions, 5, vocabulary]` float32, on the CPU.
    """

    digits: float
    pairs: float
    kl: float
    logits: Tensor


def pairs(tokenizer: Any, tokens: int, questions: int, seed: int = 0, *, filler: int = 0) -> Pairs:
    """A prompt of at most `tokens` tokens and questions about its first 85 %.

    Args:
        tokenizer: of the model.
        tokens: most of the prompt.
        questions: about so many pairs.
        seed: of words, digits and choice.
        filler: sentences that say nothing, five a time, after each pair: so many times.
    """
    rng = random.Random(seed)
    pieces = (tokenizer.convert_ids_to_tokens(i) for i in range(1000, len(tokenizer)))
    words = sorted({p[1:] for p in pieces if p[0] in "Ġ▁" and p[1:].isalpha() and len(p) > 4})
    rng.shuffle(words)
    prompt: list[int] = []
    lines: list[tuple[list[int], list[int]]] = []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    end = encode("\n") + encode(FILLER) * filler
    while len(words) > 1:
        key = encode(f"{words.pop()} {words.pop()} = ")
        value = encode(f"{rng.randrange(10 ** (DIGITS - 1), 10**DIGITS)}")
        if len(prompt) + len(key) + len(value) + len(end) > tokens:
            break
        lines.append((key, value))
        prompt += key + value + end
    lines = [line for line in lines[: int(len(lines) * ASKED)] if len(line[1]) == DIGITS]
    # of one length, so that they are one batch without padding
    length = Counter(len(key) for key, _ in lines).most_common(1)[0][0]
    asked = rng.sample([line for line in lines if len(line[0]) == length], questions)
    return Pairs(
        torch.tensor([prompt]),
        torch.tensor([key for key, _ in asked]),
        torch.tensor([value for _, value in asked]),
    )


@torch.no_grad()
def ask(
    model: nn.Module,
    cache: Any,
    asked: Pairs,
    reference: Score | None = None,
    prune: int | None = None,
) -> Score:
    """Ask all questions of a cache that holds the prompt; its one row becomes one a question.

    A question goes in as one pass but for its last token; then come steps of one token, on which
    the score is counted, with the right digits fed in.

    Args:
        model: that filled the cache.
        cache: stock or folded, of one row; it is used up.
        asked: the questions.
        reference: the uncompressed model's score, None where this is it.
        prune: tokens to prune a `FoldedCache` to once it has read the questions.
    """
    device = next(model.parameters()).device
    text = torch.cat((asked.questions, asked.answers[:, :-1]), 1).to(device)
    cache.batch_repeat_interleave(len(text))
    first = asked.questions.shape[1] - 1
    model(text[:, :first], past_key_values=cache)
    if prune is not None:
        assert isinstance(cache, FoldedCache)
        cache.prune(prune)
    steps = text[:, first:].split(1, 1)
    found = [model(step, past_key_values=cache).logits[:, -1].float().cpu() for step in steps]
    logits = torch.stack(found, 1)
    right = logits.argmax(-1) == asked.answers
    kl = 0.0
    if reference is not None:
        flat = (reference.logits.flatten(0, 1), logits.flatten(0, 1), asked.answers.flatten())
        kl = token_scores(*flat).kl.mean().item()
    return Score(right.float().mean().item(), right.all(1).float().mean().item(), kl, logits)
