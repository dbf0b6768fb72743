"""Fused attention in a Dynamo graph, written out: its projections are ordinary linears then.

nn.MultiheadAttention leaves one call in the graph, and so does a whole nn.TransformerEncoderLayer outside of training. Each
is traced through (or through the operations that it stands for) and replaced by what that gave, with symbolic sizes where
the graph has them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, GraphModule, Node, map_arg
from torch.fx.experimental.proxy_tensor import make_fx

from fp6_compile._compat.torch import FakeTensor, transformer_encoder_layer


def copied(gm: GraphModule) -> tuple[GraphModule, dict[Node, Node]]:
    """A graph module of its own over copies of `gm`'s nodes, with the attributes that AOTAutograd asks Dynamo's for."""
    copies: dict[Node, Node] = {}
    graph = Graph()
    graph.graph_copy(gm.graph, copies)
    graph.output(map_arg(gm.graph.output_node().args[0], copies.__getitem__))
    for node, twin in copies.items():
        if hasattr(node, "_dynamo_source"):
            twin._dynamo_source = node._dynamo_source
        # Dynamo takes it out of its own nodes later: it has a weak reference to the parameter, which then cannot be moved.
        twin.meta.pop("grapharg", None)
    new = GraphModule(gm, graph)
    new.meta = gm.meta
    if hasattr(gm, "_param_name_to_source"):
        new._param_name_to_source = gm._param_name_to_source
    return new, copies


def unfused(gm: GraphModule) -> GraphModule:
    """`gm`, or a copy without fused attention if it has some."""
    if not any(node.target in _PLAIN for node in gm.graph.nodes):
        return gm
    gm, _ = copied(gm)
    for node in list(gm.graph.nodes):
        values = [value.meta["example_value"] for value in node.all_input_nodes] if node.target in _PLAIN else []
        tensors = [value for value in values if isinstance(value, Tensor)]
        # Not for weights of other kinds, such as sharded ones.
        fakes = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
        if fakes and len(fakes) == len(tensors):
            with fakes[0].fake_mode:
                _write_out(gm.graph, node, values)
    gm.recompile()
    return gm


def _write_out(graph: Graph, node: Node, values: list[Any]) -> None:
    inputs = node.all_input_nodes

    def function(*given: Any) -> Any:
        args, kwargs = map_arg((node.args, node.kwargs), dict(zip(inputs, given, strict=True)).__getitem__)
        return _PLAIN[node.target](*args, **kwargs)

    traced = make_fx(function, pre_dispatch=True)(*values)
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op not in ("placeholder", "output"):
                copies[inner] = new = graph.node_copy(inner, copies.__getitem__)
                new.meta["example_value"] = inner.meta.get("val")
                new.meta["nn_module_stack"] = node.meta.get("nn_module_stack")
    outputs: Any = map_arg(traced.graph.output_node().args[0], copies.__getitem__)
    if isinstance(outputs, Node):
        node.replace_all_uses_with(outputs)
    for user in list(node.users):  # a tuple's: Dynamo takes it apart at once
        user.replace_all_uses_with(outputs[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _encoder_layer(
    src: Tensor,
    embed_dim: int,
    num_heads: int,
    in_weight: Tensor,
    in_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    use_gelu: bool,
    norm_first: bool,
    eps: float,
    norm1: Tensor,
    norm1_bias: Tensor,
    norm2: Tensor,
    norm2_bias: Tensor,
    linear1: Tensor,
    bias1: Tensor,
    linear2: Tensor,
    bias2: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """What torch._transformer_encoder_layer_fwd computes, in training's operations: src [batch, sequence, embed_dim].

    mask_type: 0 for a mask [sequence, sequence], 1 for one of padding [batch, sequence], 2 for both in one, [batch, heads,
    sequence, sequence]. It takes masks of numbers for Booleans, and so does this.
    """

    def attention(x: Tensor) -> Tensor:
        hidden = None if mask is None else mask.to(torch.bool)
        hidden = hidden.flatten(0, 1) if hidden is not None and mask_type == 2 else hidden
        x = x.transpose(0, 1)
        weights = in_weight, in_bias, None, None, False, 0.0, out_weight, out_bias
        masks: dict[str, Any] = {"key_padding_mask" if mask_type == 1 else "attn_mask": hidden}
        out, _ = F.multi_head_attention_forward(
            x, x, x, embed_dim, num_heads, *weights, training=False, need_weights=False, **masks
        )
        return out.transpose(0, 1)

    def feed_forward(x: Tensor) -> Tensor:
        activation = F.gelu if use_gelu else F.relu
        return F.linear(activation(F.linear(x, linear1, bias1)), linear2, bias2)

    def first_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm1, norm1_bias, eps)

    def second_norm(x: Tensor) -> Tensor:
        return F.layer_norm(x, (embed_dim,), norm2, norm2_bias, eps)

    if norm_first:
        x = src + attention(first_norm(src))
        return x + feed_forward(second_norm(x))
    x = first_norm(src + attention(src))
    return second_norm(x + feed_forward(x))


# By what Dynamo calls: a function of the same arguments that make_fx can trace through.
_PLAIN: dict[Any, Callable[..., Any]] = {
    F.multi_head_attention_forward: F.multi_head_attention_forward,
    transformer_encoder_layer: _encoder_layer,
}
