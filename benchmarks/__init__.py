"""Timings as ratios to plain PyTorch in the same process: `python -m benchmarks --help`."""
