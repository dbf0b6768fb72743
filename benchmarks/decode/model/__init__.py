"""What is decoded.

llama     a Llama with merged projections, by size
weights   its random weights, made in six bits
local     a model of transformers from a folder
lora      adapters beside the linears, swapped or fused between tokens
"""
