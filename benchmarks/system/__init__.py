"""The machine that a benchmark runs on.

environment  versions, GPU, CPU, commit, date
bandwidth    how fast memory is read
memory       bytes in use
"""
