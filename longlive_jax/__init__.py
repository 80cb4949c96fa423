"""LongLive-2.0 in JAX: long multi-shot video, block by block, from a KV cache."""
