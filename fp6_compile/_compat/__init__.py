"""Every private name of torch, Dynamo, Inductor and Triton that the package uses, and nothing else.

A new version of torch or Triton is a change to these files. Each says in which versions its names were seen.

torch            names that `import torch` has loaded already
dynamo           torch._dynamo and torch.compile; importing it imports Inductor and Triton, too
inductor         torch._inductor: patterns, lowerings, templates, and the steps of a compilation
inductor_build   the C++ compiler and the cache folder of Inductor, without the rest of it
triton           the launcher, the driver and the cache of Triton

tests/test_compat.py imports these modules, in other versions of torch, too (FP6_OTHER_TORCHES), and checks that no other
module of the package names anything private. It allows what PyTorch documents or is stable in practice:

- torch._check, torch._check_value and Tensor._make_wrapper_subclass: documented, in spite of their underscore.
- torch.utils._pytree: the tree functions that PyTorch's own documentation tells authors of subclasses to use.
- forward_ad._current_level: a variable, so importing its value is of no use; and a function that returns it would be one
  more Python call in each call of a compiled model.

It cannot see attributes of objects. Those in use are Tensor._version, UntypedStorage._cdata, OptimizedModule._orig_mod, and
what Dynamo attaches to tensors, graph modules and nodes: `_dynamo_source`, `_param_name_to_source`, meta["grapharg"],
meta["tensor_dict"] with its "_dynamo_static_input_type".
"""
