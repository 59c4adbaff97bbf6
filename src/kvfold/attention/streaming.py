"""Streaming semantics, exact and in parallel: every query reads codes, also in a prefill.

With S sinks, window W and block B, token j is cold for query i exactly if it lies in a block that
was complete and had left the window when i came:

    S <= j < S + B * max(0, (i + 1 - W - S) // B)

One softmax runs over scores taken from exact keys that are sinks or hot and from decoded keys
elsewhere, and the weighted sum takes values by the same split. This is what a packed cache gives
when it is fed token by token. Stored bits are those of full pages of `page_len` tokens whatever B
is: B changes the mask only.
"""

import torch
from torch import Tensor

from kvfold.codec import BoundCodec

#: score elements of one chunk of queries: 256 MB in float32.
CHUNK_ELEMENTS = 1 << 26


def compressed_share(length: int, sinks: int, window: int, block: int = 1) -> float:
    """Share of the causal (query, key) pairs of `length` tokens that are read from codes.

    >>> round(compressed_share(2048, 4, 64, 1), 3)
    0.935
    """
    cold = sum(cold_count(i, sinks, window, block) for i in range(length))
    return cold / (length * (length + 1) / 2) if length else 0.0


def cold_count(query: int, sinks: int, window: int, block: int = 1) -> int:
    """Cold tokens that a query (by its index in its row) reads."""
    return block * max(0, (query + 1 - window - sinks) // block)


def cold_mask(queries: Tensor, keys: Tensor, *, sinks: int, window: int, block: int = 1) -> Tensor:
    """`[queries, keys]` bool, True where a key is read from codes; both are token indices."""
    count = block * ((queries + 1 - window - sinks) // block).clamp_min(0)
    return (keys >= sinks) & (keys < (sinks + count)[:, None])


def paged(x: Tensor, lengths: Tensor | None, sinks: int, page_len: int, pages: int) -> Tensor:
    """Rows `[batch, heads, tokens, dim]` to pages `[batch * pages, heads, page_len, dim]`.

    Page m of a row holds tokens `sinks + page_len * m` and on; past the row's end its last token
    is repeated.
    """
    index = sinks + torch.arange(pages * page_len, device=x.device)
    if lengths is None:
        picked = x[:, :, index.clamp(max=x.shape[2] - 1)]
    else:
        index = torch.minimum(index, (lengths.to(x.device)[:, None] - 1).clamp_min(0))
        picked = x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
    return picked.unflatten(2, (pages, page_len)).transpose(1, 2).flatten(0, 1)


def decoded(
    x: Tensor,
    codec: BoundCodec,
    first: Tensor,
    lengths: Tensor | None,
    sinks: int,
    pages: int,
) -> Tensor:
    """What the stored bytes of the first `pages` pages of each row decode to (float32).

    Args:
        x: states `[batch, heads, tokens, dim]`.
        codec: the codec at its layer; its site gives the tokens of a page.
        first: `[batch]` position of each row's token 0.
        lengths: `[batch]` tokens of each row, None for all.
        sinks: tokens before the first page.
        pages: pages of each row.

    Returns:
        `[batch, heads, pages * page_len, dim]`, from token `sinks` on.
    """
    page_len = codec.site.block_len
    blocks = paged(x, lengths, sinks, page_len, pages)
    index = sinks + torch.arange(pages * page_len, device=x.device)
    positions = (first.to(x.device)[:, None] + index).reshape(-1, page_len)
    stored = codec.layout.join(codec.encode(blocks, positions))
    states = codec.decode(codec.layout.split(stored), positions).float()
    return states.unflatten(0, (-1, pages)).transpose(1, 2).flatten(2, 3)


def streaming_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_codec: BoundCodec | None,
    value_codec: BoundCodec | None,
    positions: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    sinks: int = 4,
    window: int = 64,
    block: int = 1,
    scaling: float | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    sliding_window: int | None = None,
    chunk: int = 512,
) -> Tensor:
    """Causal attention in which every query reads codes for its cold keys; computed in float32.

    Rows are padded on the right (`align` moves left padding there); what a padding query gives is
    finite and means nothing.

    Args:
        q: queries after RoPE `[batch, heads, tokens, key_dim]`.
        k: keys after RoPE `[batch, kv_heads, tokens, key_dim]`.
        v: values `[batch, kv_heads, tokens, value_dim]`.
        key_codec: codec of the keys, bound to this layer; None keeps them exact.
        value_codec: codec of the values, likewise.
        positions: `[batch or 1, tokens]` RoPE positions, rising by one within a row; None: from 0.
        lengths: `[batch]` tokens of each row, None for all.
        sinks: first tokens of each row, always exact.
        window: most recent tokens of each query, itself included, exact.
        block: tokens that leave the window together.
        scaling: factor of the scores, by default key_dim**-0.5.
        softcap: scores become `softcap * tanh(score / softcap)`.
        sink_logits: `[heads]` logits that take part in the softmax and carry no value (gpt-oss).
        sliding_window: keys further back than this are not attended to at all.
        chunk: queries worked on at once, at most.

    Returns:
        `[batch, heads, tokens, value_dim]` in q's dtype.
    """
    batch, heads, tokens, _ = q.shape
    dtype = q.dtype
    kv_heads, groups = k.shape[1], heads // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    most = cold_count(tokens - 1, sinks, window, block)
    first = (
        torch.zeros(batch, dtype=torch.int64, device=q.device)
        if positions is None
        else positions[:, 0].expand(batch)
    )
    cold_k = cold_v = None
    if most:
        if key_codec is not None:
            pages = -(-most // key_codec.site.block_len)
            cold_k = decoded(k, key_codec, first, lengths, sinks, pages)[:, :, :most]
        if value_codec is not None:
            pages = -(-most // value_codec.site.block_len)
            cold_v = decoded(v, value_codec, first, lengths, sinks, pages)[:, :, :most]
    q = q.float().unflatten(1, (kv_heads, groups)) * scale
    k, v = k.float(), v.float()
    index = torch.arange(tokens, device=q.device)
    chunk = max(16, min(chunk, CHUNK_ELEMENTS // (batch * heads * tokens)))
    out = []
    for a in range(0, tokens, chunk):
        b = min(a + chunk, tokens)
        part = q[:, :, :, a:b].flatten(2, 3)  # [B, kv_heads, groups * queries, D]
        scores = (part @ k[:, :, :b].transpose(-1, -2)).unflatten(2, (groups, b - a))
        rows, cols = index[a:b], index[:b]
        cut = slice(sinks, sinks + cold_count(b - 1, sinks, window, block))
        width = cut.stop - cut.start
        cold = cold_mask(rows, cols[cut], sinks=sinks, window=window, block=block)
        if cold_k is not None and width:
            read = (part @ cold_k[:, :, :width].transpose(-1, -2)).unflatten(2, (groups, b - a))
            scores[..., cut] = torch.where(cold, read, scores[..., cut])
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        hidden = cols > rows[:, None]
        if sliding_window is not None:
            hidden |= cols <= rows[:, None] - sliding_window
        scores.masked_fill_(hidden, float("-inf"))
        weights = _softmax(scores, sink_logits, groups)
        if cold_v is not None and width:
            at_cold = (weights[..., cut] * cold).flatten(2, 3)
            weights[..., cut].masked_fill_(cold, 0.0)
            total = weights.flatten(2, 3) @ v[:, :, :b] + at_cold @ cold_v[:, :, :width]
        else:
            total = weights.flatten(2, 3) @ v[:, :, :b]
        out.append(total.unflatten(2, (groups, b - a)))
    return torch.cat(out, 3).flatten(1, 2).to(dtype)


def align(x: Tensor, order: Tensor) -> Tensor:
    """Rows `[batch, heads, slots, dim]` with their tokens first; `order` `[batch, slots]`."""
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def align_order(valid: Tensor) -> Tensor:
    """`[batch, slots]` the slots of a row's tokens, then those of its padding (bool `valid`)."""
    return (~valid).to(torch.uint8).argsort(dim=1, stable=True)


def _softmax(scores: Tensor, sink_logits: Tensor | None, groups: int) -> Tensor:
    if sink_logits is None:
        return scores.softmax(-1)
    column = sink_logits.float().view(1, -1, groups, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat((scores, column), -1).softmax(-1)[..., :-1]
