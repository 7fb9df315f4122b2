"""The side-tuning paper's experiments, and the methods it is compared with, on the public API of `sidetuning`."""
