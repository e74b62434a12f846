"""Own kernels for NVIDIA GPUs, each an operator with a plain PyTorch reference that runs on a CPU."""
