"""Measurements. `python -m benchmarks` runs the CPU set, `gpu.sh` the GPU's, `python -m benchmarks.table` renders rows."""
