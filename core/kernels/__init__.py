"""Compiled kernels for the CPU: built once with the machine's C compiler, never required."""
