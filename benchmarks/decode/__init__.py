"""The latency of decoding: `python -m benchmarks.decode`, milliseconds per token by how the weights are stored.

arguments   the command line
model       a Llama with random weights of each kind, or a local model of transformers; LoRA
loop        prefill and step with a static cache: what is compiled          <- start here
measure     one provider: its model, its compiled step, its figures
worker      a provider in a process of its own
breakdown   where the time of a token goes, by the profiler
report      table, JSON and picture
"""
