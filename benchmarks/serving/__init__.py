"""Tokens of packed models in vLLM beside those of the dequantized ones: `python -m benchmarks.serving`.

models   tiny Llama, Qwen3 and Mixtral models with a tokenizer, made without a network
worker   one vLLM engine, 32 requests at once: its tokens
latency  vLLM's own latency benchmark, as a module
"""
