"""What `make gpu-check` measures beyond CUDA's memory calls. Every part also runs on a CPU, tiny, for its tests."""
