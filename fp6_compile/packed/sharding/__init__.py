"""Packed weights in pieces: what torch.distributed asks of a tensor.

parts         slices of a weight, and pieces joined or padded into one    <- start here
collectives   scatter, broadcast and all-gather: of bit planes and scales
fsdp          fully_shard: shards that are gathered for each forward
"""
