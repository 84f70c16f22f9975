"""
A layer whose tokens chose different widths: its work is done for the tokens that chose it.

Widths are nested, so the output of a layer is a sum over segments of its neurons, or of its heads.
A token takes the first few of them:

    neurons    0 ...... 48 ...... 96 .......... 192          sizes 48, 96, 192
    token 0    [  seg 0  ][  seg 1 ][   segment 2  ]
    token 1    [  seg 0  ]
    token 2    [  seg 0  ][  seg 1 ]

Sort the tokens by their choice, widest first: token 0, token 2, token 1. Then the tokens that reach
segment k are the first n_k rows, and the segment is one matmul over these rows.

A segment of heads holds the next heads of every KV group. Sizes 2, 4 and 8 heads in two groups:

    wq's rows    | KV 0: q0 q1 q2 q3 | KV 1: q0 q1 q2 q3 |
    segment 0    |       q0          |       q0          |
    segment 1    |          q1       |          q1       |
    segment 2    |             q2 q3 |             q2 q3 |

Keys and values are computed for all tokens, whatever they chose: the tokens to come look at all of
them.

Flextron (ICML 2024) has nested widths and routers that read the token. The paper does not say how a
token's width is run; this way is ours. It needs no experts: the weights are those of a plain Llama.
"""
import torch
import torch.nn.functional as F

from model import apply_rope


def feed(mlp, x: torch.Tensor, choice: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    """The MLP (model.py's FeedForward) with sizes[choice] neurons for each token.

    x: (B, T, dim). choice: (B, T), an index into sizes, which ascend. Returns (B, T, dim)."""
    order = choice.flatten().argsort(descending=True, stable=True)   # B*T, wide tokens first
    rows = x.flatten(0, 1)[order]                                    # B*T, dim
    out = torch.zeros_like(rows)
    start = 0
    for k, end in enumerate(sizes):
        n = int((choice >= k).sum())  # tokens that reach segment k
        if n == 0:
            break  # none goes further
        w1 = mlp.w1.weight[start:end]
        w2 = mlp.w2.weight[:, start:end]
        w3 = mlp.w3.weight[start:end]
        h = F.silu(F.linear(rows[:n], w1)) * F.linear(rows[:n], w3)  # n, end - start
        out[:n] += F.linear(h, w2)                                   # n, dim
        start = end
    back = torch.zeros_like(out).index_add_(0, order, out)           # B*T, dim, as in the text
    return back.view_as(x)


def keys_and_values(attention, x, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of all tokens of x (B, T, dim), each (B, n_kv, T, head_dim)."""
    keys = F.linear(x, attention.wk.weight)
    keys = keys.unflatten(-1, (-1, attention.head_dim))                    # B, T, n_kv, hd
    keys = apply_rope(keys, cos, sin)
    values = F.linear(x, attention.wv.weight)
    values = values.unflatten(-1, (-1, attention.head_dim))
    return keys.transpose(1, 2), values.transpose(1, 2)


def attend(attention, x, choice, sizes, cos, sin, cache=None, layer=0) -> torch.Tensor:
    """Attention (model.py's) with sizes[choice] query heads for each token.

    x: (B, T, dim). choice: (B, T), an index into sizes. cos, sin: (T, 1, head_dim/2).
    Returns (B, T, dim).

    Queries are sorted inside their sequence. A segment runs on the same number of rows of every
    sequence, as many as the sequence with most of its tokens needs. The surplus rows of the others
    are computed and dropped."""
    B, T, C = x.shape
    groups = attention.groups
    head_dim = attention.head_dim

    keys, values = keys_and_values(attention, x, cos, sin)                 # B, n_kv, T, hd
    if cache is not None:
        keys, values = cache.append(layer, keys, values)                   # B, n_kv, S, hd
    S = keys.size(2)

    # queries, in every sequence sorted by choice
    order = choice.argsort(dim=1, descending=True, stable=True)            # B, T
    chosen = choice.gather(1, order)                                       # B, T, descending
    order_of_rows = order[..., None].expand(B, T, C)                       # B, T, dim
    rows = x.gather(1, order_of_rows)
    position = S - T + order                                               # B, T
    past = torch.arange(S, device=x.device) <= position[..., None]         # B, T, S: a query's own

    # segments of heads
    wq = attention.wq.weight.unflatten(0, (groups, -1, head_dim))          # groups, heads, hd, dim
    wo = attention.wo.weight.unflatten(1, (groups, -1, head_dim))          # dim, groups, heads, hd
    own_kv = attention.n_heads == attention.n_kv_heads  # MHA: a KV head for every query head
    out = torch.zeros_like(x)
    start = 0
    for k, end in enumerate(sizes):
        reached = chosen >= k                                              # B, T
        n = int(reached.sum(1).max())
        if n == 0:
            break
        # queries of the n first rows, rotated by their places in the text
        heads = slice(start // groups, end // groups)  # the same ones in every group
        q = F.linear(rows[:, :n], wq[:, heads].flatten(0, 2))
        q = q.unflatten(-1, (-1, head_dim))                                # B, n, heads here, hd
        places = order[:, :n]
        q = apply_rope(q, cos[places], sin[places])
        # attention with the KV heads of these query heads
        kv = slice(start, end) if own_kv else slice(None)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys[:, kv],
            values[:, kv],
            attn_mask=past[:, None, :n],
            enable_gqa=True,
        )
        y = y.transpose(1, 2).flatten(2)                                   # B, n, heads here * hd
        # this segment's part of wo; rows that do not reach it get nothing
        y = F.linear(y, wo[:, :, heads].flatten(1))                        # B, n, dim
        out[:, :n] += y * reached[:, :n, None]
        start = end
    return torch.zeros_like(out).scatter_(1, order_of_rows, out)           # as in the text
