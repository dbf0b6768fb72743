"""The GPU kernel: config (tiles and constants, no Triton), and in Triton unpack, mm and launch. The CPU's is in cpu/.

unpack, mm and launch import triton; nothing above this package may import them eagerly.
"""
