"""Timing against plain PyTorch, in one process, as ratios: `python -m benchmarks --help`."""
