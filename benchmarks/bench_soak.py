"""A long stream with trimming: bytes stay flat, positions stay absolute, the output repeats.

    python benchmarks/bench_soak.py --steps 50000

A two-layer random llama decodes tokens that it draws itself, one by one, with `trim=`; all of it
is run in two processes. One row a run:
- bytes of the cache: at 1,000 tokens, and the least and most after that (flat: the same figure);
- position_error: layer 0's keys of the pages that are left, decoded, against the model's own
  projection of those tokens rotated to their absolute positions; beside it the same against
  positions off by one, which tells how much a wrong position would show;
- sha256 of all tokens drawn: the two runs must agree.
"""

import hashlib
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from common import parser, write
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvfold


def tiny() -> LlamaForCausalLM:
    """Two layers, random weights, positions for the whole stream."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=1 << 17,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def stream(args) -> dict:
    """Decode, and look at what is left."""
    torch.set_num_threads(1)
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    cache = kvfold.FoldedCache(model, args.presets, trim=args.trim, strict=True)
    token, drawn, held = torch.tensor([[1]]), [1], []
    start = time.perf_counter()
    with torch.no_grad():
        for step in range(args.steps):
            logits = model(token, past_key_values=cache).logits[:, -1]
            token = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            drawn.append(int(token))
            if step >= 1000 and step % 500 == 0:
                held.append(sum(cache.nbytes().values()))
    seconds = time.perf_counter() - start
    assert cache.timeline.lengths == [args.steps] == [cache.get_seq_length()]
    right, wrong = (position_error(model, cache, drawn, off) for off in (0, 1))
    return {
        "steps": args.steps,
        "trim": args.trim,
        "positions": "absolute",
        "bytes_at_1000": held[0],
        "bytes_least": min(held),
        "bytes_most": max(held),
        "pages_held": len(cache.timeline.held),
        "first_token_held": 4 + 128 * cache.timeline.blocks(0)[0],
        "position_error": f"{right:.2e}",
        "position_error_off_by_one": f"{wrong:.2e}",
        "ms_per_step": round(1000 * seconds / args.steps, 3),
        "sha256": hashlib.sha256(bytes(drawn)).hexdigest()[:16],
    }


def position_error(model, cache, drawn: list[int], off: int) -> float:
    """Of the keys held in layer 0's pages, against the model's at positions moved by `off`."""
    store, timeline = cache.layers[0].store, cache.timeline
    layer = model.model.layers[0]
    errors = []
    with torch.no_grad():
        for block in timeline.blocks(0):
            at = 4 + 128 * block + torch.arange(128)[None]
            hidden = layer.input_layernorm(model.model.embed_tokens(torch.tensor(drawn)[at]))
            keys = layer.self_attn.k_proj(hidden).view(1, 128, 1, 64).transpose(1, 2)
            cos, sin = model.model.rotary_emb(hidden, at + off)
            wanted = apply_rotary_pos_emb(keys, keys, cos, sin)[1]
            page = store.pool.gather([timeline.table[0][block]])
            found = store.key.decode(store.layout.split(page)[0], at)
            errors.append(((found - wanted).norm() / wanted.norm()).item())
    return max(errors)


def main() -> None:
    """Run the stream twice and compare."""
    make = parser(__doc__, "soak.csv")
    make.set_defaults(presets="int8", device="cpu")
    make.add_argument("--steps", type=int, default=50_000)
    make.add_argument("--trim", type=int, default=512)
    args = make.parse_args()
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        runs = list(pool.map(stream, (args, args)))
    same = runs[0]["sha256"] == runs[1]["sha256"]
    base = {"what": "soak", "preset": args.presets}
    write(
        args.out,
        [base | {"run": i} | run | {"same_output": same} for i, run in enumerate(runs)],
        args,
    )


if __name__ == "__main__":
    main()
