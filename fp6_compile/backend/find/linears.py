"""Which inputs of a Dynamo graph are weights of linears, which way round, and through which uses.

A weight is followed from its placeholder through transposes to every operation that reads it. Each *direct* user is judged
as a whole: if everything below it is a matmul with the weight in the weight's place, that user is a linear, and it is either
of the `y = x @ W.T` kind (F.linear; W is [N, K]) or of the `y = x @ W` kind (Conv1D; W is [K, N]). Any other user, such as
the embedding that shares its weight with the head, keeps the weight it had.

This looks only at names, and only to find the weights worth packing. That the packed weight then gives the same result in
whatever those names become follows from `fp6::dequantize`, which stands in its place (graph.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from fp6_compile._compat.torch import OpOverload, OpOverloadPacket, is_traceable_wrapper_subclass
from fp6_compile.config import QuantConfig, SkipReason, skipped_by_kind, skipped_by_name
from fp6_compile.kernels.triton.config import supports

# Names of functions, methods and attributes alike: torch.matmul, x.matmul and `@` are all "matmul" or "__matmul__".
_LINEAR = {"linear"}
_MATMUL = {"matmul", "mm", "__matmul__"}
_ADDMM = {"addmm"}
# Matmuls whose weight is not quantized, or not in this operand (`W @ x`, addmm with alpha): it is reported as skipped.
_OTHER_MATMULS = {*_MATMUL, *_ADDMM, "bmm", "baddbmm", "_grouped_mm", "grouped_mm"}
# numpy_T, matrix_H and _get_data_attr are what torch 2.15 makes of `w.T`, `w.H` and `w.data`.
_TRANSPOSES = {"T", "mT", "H", "mH", "t", "adjoint", "numpy_T", "matrix_H"}
_SWAPS = {"transpose", "swapaxes", "swapdims"}
# Views that may return the whole weight unchanged ...
_CASTS = {"to", "type_as", "float", "half", "bfloat16", "contiguous", "clone", "detach", "data", "_get_data_attr"}
# ... and those that cut or bend it: followed only to tell a weight that is skipped from an input that is no weight.
_VIEWS = {
    *("getitem", "__getitem__", "view", "reshape", "flatten", "chunk", "split", "split_with_sizes", "unbind", "narrow"),
    *("select", "slice", "expand", "squeeze", "unsqueeze", "index_select"),
}
_WRITES = {
    *("setitem", "__setitem__", "iadd", "isub", "imul", "imatmul", "itruediv", "ifloordiv", "imod", "ipow"),
    *("iand", "ior", "ixor", "ilshift", "irshift"),
}


@dataclass
class Weight:
    """A graph input that some matmul reads as its weight."""

    placeholder: Node
    # Direct users that are linears, by orientation: False for W [N, K], True for W [K, N].
    users: dict[bool, list[Node]] = field(default_factory=lambda: {False: [], True: []})
    # What else reads it, or what stands between it and a matmul.
    others: list[str] = field(default_factory=list)
    # The matmuls themselves, whose modules give the weight its name.
    matmuls: list[Node] = field(default_factory=list)
    mutated_by: str | None = None

    @property
    def has_linears(self) -> bool:
        """Whether any direct user is a linear."""
        return any(self.users.values())


def find_weight(placeholder: Node) -> Weight | None:
    """What reads `placeholder` as a weight; None if no matmul does."""
    weight = Weight(placeholder)
    for user in placeholder.users:
        kinds = _follow(user, placeholder, False, weight)
        if len(kinds) == 1 and (kind := next(iter(kinds))) is not None:
            weight.users[kind].append(user)
        elif None in kinds:
            weight.others.append(function_name(user))
    return weight if weight.matmuls else None


def is_linear(weight: Weight) -> bool:
    """Whether what reads it says by its name that it is a weight, wherever it comes from: F.linear's, addmm's."""
    return weight.has_linears and any(function_name(matmul) in _LINEAR | _ADDMM for matmul in weight.matmuls)


def input_of(weight: Weight) -> Node | None:
    """The x that the weight's first matmul multiplies; None in einsum, which may bend it first."""
    matmul = weight.matmuls[0]
    position = 1 if function_name(matmul) in _ADDMM else 0
    return None if function_name(matmul) == "einsum" else _arguments(matmul)[position]


def skip_reason(
    weight: Weight, value: Tensor, names: list[str], modules: list[tuple[nn.Module, str]], config: QuantConfig
) -> SkipReason | None:
    """Why the weight, called `names` and found in `modules`, is not quantized; None if it is."""
    if reason := skipped_by_name(config, names, modules):
        return reason
    if not isinstance(value, nn.Parameter):
        return SkipReason("not an nn.Parameter", True)
    first = [
        (value.dim() != 2, f"a {value.dim()}-D weight"),
        (is_traceable_wrapper_subclass(value), f"a tensor subclass, {type(value).__name__}"),
    ]
    then = [
        (weight.mutated_by is not None, f"changed in the graph by {weight.mutated_by}"),
        (
            value.requires_grad and torch.is_grad_enabled(),
            "requires grad while grad mode is on; use torch.no_grad() or requires_grad_(False)",
        ),
        (value.is_inference(), "made in inference mode, so that later changes could not be noticed"),
        (value.device.type not in ("cpu", "cuda"), f"on device {value.device.type!r}"),
        (not weight.has_linears, f"multiplied only through {', '.join(weight.others)}"),
    ]
    return skipped_by_kind(config, value, supports(config.group_size) if value.is_cuda else None, first, then)


def _follow(user: Node, weight: Node, transposed: bool, found: Weight) -> set[bool | None]:
    """The orientations of the matmuls at the end of `weight -> user -> ...`; None for any other end."""
    writes = _writes(user, weight)
    if writes:
        found.mutated_by = function_name(user)
    flipped, kept = _is_transpose(user), _is_whole(user, weight)
    if flipped or kept:
        below = [_follow(next_user, user, transposed != flipped, found) for next_user in user.users]
        return set().union(*below) or {None}
    right_operand = _orientation(user, weight)
    if right_operand is not None:
        found.matmuls.append(user)
        return {right_operand != transposed}
    if _multiplies(user, weight):
        found.matmuls.append(user)
    if writes or function_name(user) in _VIEWS | _CASTS:
        for next_user in user.users:
            _follow(next_user, user, transposed, found)
    return {None}


def _orientation(user: Node, weight: Node) -> bool | None:
    """False if `user` multiplies by `weight` as [N, K], True if as [K, N], None if it is not its weight."""
    name, args = function_name(user), _arguments(user)
    if args.count(weight) != 1:
        return None
    if name == "einsum":
        return _einsum_orientation(str(args[0]), args.index(weight) - 1, len(args) - 1)
    if name in _LINEAR and args.index(weight) == 1:
        return False
    if name in _MATMUL and args.index(weight) == 1:
        return True
    if name in _ADDMM and args.index(weight) == 2 and not {"beta", "alpha"} & set(user.kwargs):
        return True
    return None


def _multiplies(user: Node, weight: Node) -> bool:
    """Whether `weight` is an operand of a matmul that is not a linear of it; addmm's first argument is a bias."""
    operands = _arguments(user)[1 if function_name(user) in ("addmm", "baddbmm") else 0 :]
    return function_name(user) in _OTHER_MATMULS and weight in operands


def _einsum_orientation(equation: str, position: int, operands: int) -> bool | None:
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow or operands != 2 or len(terms[position]) != 2:
        return None
    x, w = terms[1 - position], terms[position]
    roles = ["n" if i in output and i not in x else "k" if i in x and i not in output else "?" for i in w]
    return {"nk": False, "kn": True}.get("".join(roles))


def _arguments(user: Node) -> list:
    """Operands in the order of the schema, whether they were given by position, by name or, to einsum, in a list."""
    args = [*user.args, *(v for k, v in user.kwargs.items() if k in ("input", "mat1", "other", "mat2", "weight"))]
    if len(args) == 2 and isinstance(args[1], (list, tuple)):
        return [args[0], *args[1]]
    return args


def _is_transpose(user: Node) -> bool:
    name, dims = function_name(user), user.args[1:]
    if dims and isinstance(dims[0], (list, tuple)):
        dims = tuple(dims[0])
    parity = [d % 2 for d in dims if isinstance(d, int)]
    return (
        name in _TRANSPOSES or (name in _SWAPS and sorted(parity) == [0, 1]) or (name == "permute" and parity == [1, 0])
    )


def _is_whole(user: Node, weight: Node) -> bool:
    """A cast or copy that leaves shape and dtype as they were, such as `weight.to(x.dtype)`."""
    before, after = weight.meta.get("example_value"), user.meta.get("example_value")
    if function_name(user) not in _CASTS or not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return (before.dtype, before.device, before.shape) == (after.dtype, after.device, after.shape)


def _writes(user: Node, weight: Node) -> bool:
    """Whether `user` changes `weight` in place: `add_`, `_foreach_mul_`, `weight[0] = ...`, `+=`, `out=weight`."""
    name = function_name(user)
    in_place = name in _WRITES or (name.endswith("_") and not name.endswith("__"))
    written = user.args[:1] if name in _WRITES or user.op == "call_method" else user.args
    return (in_place and weight in tree_leaves(written)) or user.kwargs.get("out") is weight


def function_name(user: Node) -> str:
    """Of the function, method or attribute; one that is not torch's or Python's own keeps its module's name before it."""
    target = user.target
    if isinstance(target, str):
        return target
    if target is getattr:
        return str(user.args[1])
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        # fp6.mm multiplies, but not by a weight that is still to be packed
        space, name = str(target).split(".")[:2]
        return name if space in ("aten", "prims") else str(target)
    name = getattr(target, "__name__", str(target))
    module = getattr(target, "__module__", None) or "torch"
    return name if module.split(".")[0] in ("torch", "_operator", "builtins") else f"{module}.{name}"
