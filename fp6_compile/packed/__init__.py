"""Packed weights as tensors, and models of them.

tensor           PackedTensor: a packed weight that stays the parameter of its nn.Linear    <- start here
dispatch         what operators do with it
sharding         parts of it, and what torch.distributed asks of it
held             its data: bit planes and scale, shared with its aliases, and how to read them
slots            a model's tensors and all their names
quantize_model   quantize_: a model's linears in place, one by one
budget           which format each weight gets at a given size
low_rank         what quantization may add to a linear: low-rank factors, a bias
"""
