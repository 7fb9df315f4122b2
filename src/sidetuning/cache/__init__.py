"""Base features computed once per sample, ever, and kept on disk: of images and vectors, and of texts."""

from sidetuning.cache.features import CachedFeatures, cache_bytes, cache_features, data_identity, loader_over
from sidetuning.cache.tokens import CachedTokens, cache_tokens, token_loader

__all__ = [
    "CachedFeatures",
    "CachedTokens",
    "cache_bytes",
    "cache_features",
    "cache_tokens",
    "data_identity",
    "loader_over",
    "token_loader",
]
