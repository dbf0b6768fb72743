"""Every private name of torch, Dynamo, Inductor and Triton that the package uses, and nothing else.

A new version of torch or Triton is a change to these files. Each name says in which versions it was seen.
"""
