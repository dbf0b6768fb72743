"""Which inputs of a Dynamo graph are weights of linears.

linears    weights that F.linear, `@`, einsum and others read, and why some are skipped    <- start here
hidden     weights that matmuls read inside of functions, or computed
fused      fused attention, written out as ordinary linears
names      what modules and parameters are called
merging    which weights multiply the same input
"""
