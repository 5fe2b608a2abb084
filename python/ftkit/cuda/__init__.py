"""Kernels for NVIDIA's GPUs: sources, their compilation on the user's machine, launches; and a CPU to run them on.

A kernel's source stands in `NAME.cu` and has two homes. On a GPU, NVRTC compiles it (`compile`) and torch's current
stream runs it (`driver`). Without one, the host's C++ compiler compiles the same text (`on_cpu`), and it runs thread by
thread with every access checked. `launches` says for each operation which kernel runs, on how many blocks.
"""
