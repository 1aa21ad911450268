"""Speed and memory of emulation, as ratios to float32 torch in the same process: what `fmaq bench` measures."""
