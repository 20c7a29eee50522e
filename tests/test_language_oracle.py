"""The edits of a language model by hand: NumPy formulas, one block after the other, written into a copy's weights.

What a block reads is seen by hooks of the test's own on a copy whose earlier blocks are edited already.
"""

import copy

import numpy as np
import pytest
import torch
from cases import relative
from language import LENGTH, prompts, shared

from icl_lib import absorb


def seen(model, call, paths):
    """What the modules with these paths in each block read, or with a trailing ``>`` answer, at the last position."""
    found, hooks = [], []
    blocks = model.get_submodule("transformer.h" if hasattr(model, "transformer") else "model.layers")
    for block in blocks:
        here = {}
        found.append(here)
        for path in paths:

            def note(_, args, kwargs, answer, here=here, path=path):
                value = answer if path.endswith(">") else (*args, *kwargs.values())
                value = value if isinstance(value, torch.Tensor) else value[0]
                here[path] = value.reshape(-1, value.shape[-1])[-1].detach().numpy().copy()

            hooks.append(block.get_submodule(path.rstrip(">")).register_forward_hook(note, with_kwargs=True))
    with torch.no_grad():
        logits = model(**call).logits[:, -1]
    for hook in hooks:
        hook.remove()
    return found, logits


def rank_one(change, read):
    return np.outer(change, read) / (read @ read)


def array(parameter):
    return parameter.detach().numpy()


def silu(x):
    return x / (1 + np.exp(-x))


def llama(block, old, new):
    """W_gate and W_up read z; W_down takes Δh."""
    z_c, z_0 = old["mlp"], new["mlp"]
    gate, up = array(block.mlp.gate_proj.weight), array(block.mlp.up_proj.weight)
    y = silu(gate @ z_c) * (up @ z_c)
    change = old["post_attention_layernorm"] - new["post_attention_layernorm"]
    return {
        "mlp.gate_proj.weight": rank_one(gate @ (z_c - z_0), z_0),
        "mlp.up_proj.weight": rank_one(up @ (z_c - z_0), z_0),
        "mlp.down_proj.weight": rank_one(change, y),
    }


def gpt_2(block, old, new):
    """Conv1D keeps a weight transposed; the output bias takes Δh."""
    z_c, z_0, weight = old["mlp"], new["mlp"], array(block.mlp.c_fc.weight)
    return {
        "mlp.c_fc.weight": rank_one(weight.T @ (z_c - z_0), z_0).T,
        "mlp.c_proj.bias": old["ln_2"] - new["ln_2"],
    }


def gpt_j(_, old, new):
    """The MLP reads what no context has changed: Δh alone, into the last matrix."""
    return {"mlp.fc_out.weight": rank_one(old["attn>"] - new["attn>"], new["mlp.fc_out"])}


def gemma(block, old, new):
    """The scale 1 + m of the norm behind the MLP takes Δh: what it answers with the context, over what it has normed.

    Float32 inside the norm: it answers the same to the same reading, which is all that is needed here.
    """
    z_c, z_0 = old["mlp"], new["mlp"]
    gate, up = array(block.mlp.gate_proj.weight), array(block.mlp.up_proj.weight)
    normed = old["post_feedforward_layernorm"].astype(np.float32)
    normed = normed * (1 / np.sqrt((normed**2).mean() + np.float32(block.post_feedforward_layernorm.eps)))
    wanted = old["post_feedforward_layernorm>"] + old["pre_feedforward_layernorm"] - new["pre_feedforward_layernorm"]
    return {
        "mlp.gate_proj.weight": rank_one(gate @ (z_c - z_0), z_0),
        "mlp.up_proj.weight": rank_one(up @ (z_c - z_0), z_0),
        "post_feedforward_layernorm.weight": wanted / normed.astype(np.float64)
        - 1
        - array(block.post_feedforward_layernorm.weight),
    }


def mixtral(block, old, new):
    """The router, then each expert that it chooses; Δh is shared out by the sum of their gates."""
    z_c, z_0 = old["mlp.gate"], new["mlp.gate"]
    router = array(block.mlp.gate.weight)
    gates = np.exp(router @ z_c)
    gates /= gates.sum()
    chosen = np.argsort(gates)[-2:]
    change = old["post_attention_layernorm"] - new["post_attention_layernorm"]
    gates = gates[chosen].astype(np.float32)
    change = change / float((gates / gates.sum()).sum())
    edits = {"mlp.gate.weight": rank_one(router @ (z_c - z_0), z_0)}
    inner, outer = (np.zeros(getattr(block.mlp.experts, name).shape) for name in ("gate_up_proj", "down_proj"))
    for expert in chosen:
        weight = array(block.mlp.experts.gate_up_proj[expert])
        gate, up = np.split(weight @ z_c, 2)
        inner[expert] = rank_one(weight @ (z_c - z_0), z_0)
        outer[expert] = rank_one(change, silu(gate) * up)
    return edits | {"mlp.experts.gate_up_proj": inner, "mlp.experts.down_proj": outer}


KINDS = {
    "Llama": (llama, ["post_attention_layernorm", "mlp"], "down"),
    "GPT-2": (gpt_2, ["ln_2", "mlp"], "bias"),
    "GPT-J": (gpt_j, ["attn>", "mlp.fc_out"], "down"),
    "Gemma 3": (
        gemma,
        ["pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm", "post_feedforward_layernorm>"],
        "scale",
    ),
    "Mixtral": (mixtral, ["post_attention_layernorm", "mlp.gate"], "down"),
}


@pytest.mark.parametrize("name", KINDS)
def test_edits_by_hand(name):
    formula, paths, outer = KINDS[name]
    model, ids = shared(name), prompts(1)
    patch = absorb(model, ids, LENGTH - 1, outer=outer)
    bare = patch.bare(ids)
    old, wanted = seen(model, {"input_ids": ids}, paths)
    edited, merged = copy.deepcopy(model), patch.merged(model)
    blocks = edited.get_submodule(patch.anatomy.blocks)
    for index, block in enumerate(blocks):
        new, _ = seen(edited, bare, paths)
        for path, edit in formula(block, old[index], new[index]).items():
            with torch.no_grad():
                block.get_parameter(path).add_(torch.from_numpy(edit))
            by_library = merged.get_submodule(patch.anatomy.blocks)[index].get_parameter(path).detach().numpy()
            size = np.abs(edit).max()
            # A scale divides by features that are nearly zero; gates and norms are rounded to float32.
            bound = 1e-4 if outer == "scale" else 1e-6 if name == "Mixtral" else 1e-9
            np.testing.assert_allclose(by_library, array(block.get_parameter(path)), rtol=bound, atol=bound * size)
    # The test's own scale is an ordinary parameter, which Gemma's norm rounds to float32.
    bound = 1e-5 if outer == "scale" else 1e-6 if name == "Mixtral" else 1e-11
    assert relative(seen(edited, bare, paths)[1], wanted) < bound
    assert relative(seen(model, bare, paths)[1], wanted) > 1e-2
