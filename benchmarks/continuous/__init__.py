"""Continuous batching against ordinary batching: models of mixed difficulty, and what is measured of them."""
