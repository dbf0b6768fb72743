"""The models of the study, each compared with itself in sixteen bits.

base       what a subject is: a model, its linears, inputs to calibrate on, a measure     <- start here
language   the code model, and any causal model of transformers
encoder    a pretrained sentence encoder
corpus     texts that every Python has
metrics    divergence, ranks, bootstrap, whether a text parses
"""
