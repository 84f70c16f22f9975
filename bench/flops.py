"""
FLOPs of a training pass, counted from the shape of a Llama. Used by bench.steps (MFU) and
bench.results (what runs cost).
"""
from model import LlamaConfig, SubNet
from space import n_params


def train_flops(config: LlamaConfig, seq_len: int, share: float = 1.0) -> float:
    """FLOPs of a training pass per token when a share of the blocks runs.

    6 for each parameter (2 forward, 4 backward); none for the look-up in tok_embeddings. Causal
    attention adds 6 * layers * heads * head_dim * seq_len."""
    blocks = n_params(config, SubNet.full(config))
    n_heads = sum(config.per_layer("n_heads"))
    attention = n_heads * config.head_dim * seq_len
    output = config.vocab_size * config.dim
    return 6 * (share * (blocks + attention) + output)
