"""Speed as a ratio to float32 torch, measured in the same process; run one as `python -m benchmarks.gemm`."""
