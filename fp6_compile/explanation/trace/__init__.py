"""What runs in the process that explains: it compiles the call with tensors that have no values, and notes what it sees.

worker     the process: receives the call, asks for what depends on weights' values, sends the result    <- start here
fakes      the model and its inputs, rebuilt with fake tensors
backend    a backend for torch.compile: graphs, linears, kernels
launches   the kernels that generated code launches
traffic    the bytes that a graph reads
summary    all of it as a Result
"""
