"""The torch.compile backend: from Dynamo's graph to one with `fp6::mm` in it.

compile     the backend: all of it in one function           <- start here
find        which inputs of a graph are weights of linears
planes      bit planes of weights side by side, and the states of the weights that they were made from
weights     those bit planes, once for each weight, never stale
graph       Dynamo's graph with packed weights
views       what views show of a dequantized weight
passes      matmul of a dequantized weight => fp6::mm
"""
