r"""Replace a context by weight edits, in every block and at every position of a model.

Let $c_i$ be the stream of token $i$ as it enters a block of a pre-norm transformer ($x$ for the last token, the query),
and let $A_i$ be the attention output at position $i$. The block computes

$$T(C, x)_i = h_i + W' \sigma\bigl(W\, \mathrm{LN}'(h_i) + b\bigr) + b', \qquad h_i = c_i + A_i .$$

Let $g_i = \mathrm{LN}'(h_i)$. From the query alone the attention output is $A_0$; let $h_0 = x + A_0$ and
$f = \mathrm{LN}'(h_0)$. If $f \neq 0$, then

$$\Delta W_i = \frac{W (g_i - f) f^\top}{\lVert f \rVert^2}, \qquad \Delta b'_i = h_i - h_0, \qquad
  T(C, x)_i = T_{W + \Delta W_i,\, b' + \Delta b'_i}(x) .$$

In the blocks after the first, $x$ is the query's stream as the edited blocks before it output it. Source: Innocenti and
Achour, *A Simple Generalisation of the Implicit Dynamics of In-Context Learning* (arXiv 2512.11255, version 1),
Theorem 1. Other architectures: :mod:`icl_lib.models.passes`.
"""

from __future__ import annotations

import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from icl_lib.models.activations import CachedPrompt, with_context
from icl_lib.models.anatomy import HOW_TO_REGISTER, Anatomy, Site, known_anatomy, outer_choices, require_plain, sites
from icl_lib.models.block_edits import NotReproducedError
from icl_lib.models.passes import bar_over, edits_of
from icl_lib.models.patch import NO_JOINT_EDIT, Patch
from icl_lib.models.probing import probe
from icl_lib.models.prompt import Prompt, experts_one_by_one
from icl_lib.models.streams import Stream
from icl_lib.models.tokens import Tokens


def prompt_of(model: Any, inputs: Any, *arguments: Any) -> Prompt:
    """Return the prompt as the kind of inputs that it is: token ids, if they are integers, or a float stream."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a torch.nn.Module.")
    require_plain(model)
    integers = isinstance(inputs, Tensor) and not (inputs.is_floating_point() or inputs.is_complex())
    return (Tokens if integers else Stream)(model, inputs, *arguments)


EXAMPLE = Anatomy(blocks="blocks", stream="norm", inner=("mlp.up",), outer="mlp.down")
_PROBED: weakref.WeakKeyDictionary[nn.Module, Anatomy] = weakref.WeakKeyDictionary()


def anatomy_of(model: nn.Module, inputs: Tensor | None = None) -> Anatomy:
    """Return the anatomy of this model: the registered one, or one that probing finds.

    An anatomy that was found is printed to the standard error, once for a model, as the code that registers it.
    Raises `ValueError` for a model of unknown anatomy, with what was in the way of finding it.
    """
    known = known_anatomy(model) or _PROBED.get(model)
    if known is None:
        name = type(model).__name__
        try:
            known = probe(model, inputs)
        except ValueError as reason:
            example = HOW_TO_REGISTER.format(name=name, anatomy=EXAMPLE)
            raise ValueError(
                f"model is a {name}, whose anatomy is unknown. Probing did not find it: {reason} If you know the "
                f"places of its parts, register them, for example:\n{example}"
            ) from None
        except Exception as error:  # whatever the model's own forward pass raises
            raise ValueError(
                f"model is a {name}, whose anatomy is unknown, and it does not run on the inputs: {error}"
            ) from error
        _PROBED[model] = known
        code = HOW_TO_REGISTER.format(name=name, anatomy=known)
        print(f"The anatomy of {name} was found by probing. To register it:\n{code}", file=sys.stderr)
    return known


def outer_of(placed: tuple[Site, ...], outer: Any, prompt: Prompt, joint: bool, model: nn.Module) -> str:
    """Return the weights that take the change of the stream, after checking that the blocks have them."""
    choices = outer_choices(placed)
    if not choices:  # the inner edits restore the whole output
        choices = ("down", "bias")
    if outer is None:
        # A joint edit has one bias for all positions, so the last matrix takes the change.
        return prompt.outer if prompt.outer in choices and not joint else choices[0]
    if outer not in choices:
        raise ValueError(
            f"outer is {outer!r}: for the blocks of {type(model).__name__} choose {' or '.join(map(repr, choices))}."
        )
    return outer


def absorb(
    model: nn.Module,
    inputs: Tensor,
    context_length: int,
    reference: str = "query",
    positions: str | None = None,
    outer: str | None = None,
    joint: bool = False,
    progress: bool = False,
    attention_mask: Tensor | None = None,
    keep: int = 0,
) -> Patch:
    r"""Compute the weight edits that replace the context of a prompt, for every block and position.

    $$\Delta W_i = \frac{W (g_i - f) f^\top}{\lVert f \rVert^2}, \qquad \Delta b'_i = h_i - h_0$$

    (Innocenti and Achour, version 1, Theorem 1; see :mod:`icl_lib.models.absorb` for the symbols). With
    ``reference="self"``, $f$ and $h_0$ come from token $i$ alone. The model runs over the prompt once, and once on the
    bare query (:mod:`icl_lib.models.passes`).

    Args:
        model: any model with an :class:`~icl_lib.models.anatomy.Anatomy`; it is not changed. The anatomy of an unknown
            class is found by probing (:mod:`icl_lib.models.probing`).
        inputs: the whole prompt, the query last: the float stream ``[*batch, n, dim]``, or the token ids
            ``[*batch, n]`` of a language model.
        context_length: how many tokens, from the first on, are the context: $1 \dots n - 1$. The patch replaces them,
            except those that it keeps.
        reference: the input of a patched block in place of the whole stream. ``query``: the stream of the tokens after
            the context; in a float stream, a single query token then reproduces the outputs at *every* position, those
            of the context included. ``self``: each token's own stream, alone.
        positions: ``all``, or only those after the context (``query``). None means ``all`` where that is possible. With
            reference ``query`` and several query tokens, or with token ids, each query token can replace only itself.
        outer: the parameter that takes the change of the stream: the MLP's last matrix (``down``, the default for token
            ids), its bias (``bias``, the default for a float stream), or the scale of the norm behind it (``scale``).
            If there is such a norm, ``down`` turns the norm's input, and the scale stretches its output
            (:func:`icl_lib.output_updates.turning_update`).
        joint: one edit of each map that serves all positions, instead of one edit for each.
        progress: show a progress bar over the blocks.
        attention_mask: for token ids, 0 at the padding before each prompt and 1 elsewhere, ``[*batch, n]``.
        keep: how many of the first tokens stay in front of the query: the patch replaces the tokens ``keep`` to
            ``context_length - 1``. Kept tokens read no others in the prompt than alone, so their edits are zero up to
            rounding. The formulas hold with $f$ and $h_0$ of the query behind the kept tokens. Trained language models
            need their first token: most heads rest on it.

    Raises `ValueError` for a model whose anatomy is not found or a compiled one, for inputs that are not finite or not
    tokens of the model, for a batch with padding but no mask, for an empty context, for a context that leaves no query,
    and, with the block, for an $f$ that is zero. It raises at the first block whose output with its edits is not that
    with the prompt: a patch that does not reproduce its prompt is never returned.

    >>> import torch
    >>> from icl_lib import Transformer, TransformerConfig
    >>> model = Transformer(TransformerConfig(dim=3, blocks=5, heads=3, hidden_layers=2)).double()
    >>> inputs = torch.randn(128, 51, 3).double()
    >>> patch = absorb(model, inputs, context_length=50)
    >>> patch.blocks[0].weight.shape
    torch.Size([128, 51, 12, 3])
    """
    prompt = prompt_of(model, inputs, context_length, reference, positions, joint, attention_mask, keep)
    anatomy = anatomy_of(model, inputs)
    placed = sites(model, anatomy)
    outer = outer_of(placed, outer, prompt, joint, model)
    try:
        with bar_over(len(placed), 2, progress) as bar, experts_one_by_one(model):
            cached, _ = cache(model, placed, prompt, inputs, keep=1, visit=bar.update)
            blocks = edits_of(model, placed, cached, outer, joint=joint, visit=bar.update)
    except NotReproducedError as error:
        cause = NO_JOINT_EDIT if joint else cause_of(model, inputs, anatomy)
        raise ValueError(f"{error} {cause}") from None
    return Patch(blocks, anatomy, prompt, outer, cached, joint, weakref.ref(model))


def cause_of(model: nn.Module, inputs: Tensor, anatomy: Anatomy) -> str:
    """Return why edits do not reproduce a prompt, as far as probing the model tells."""
    try:
        found = probe(model, inputs)
    except Exception as reason:  # whatever the model's own forward pass raises
        return f"Probing the model says: {reason}"
    if found != anatomy:
        return f"Its entry says {anatomy}, but probing finds {found}: correct the entry with register_anatomy."
    return "Probing finds the same anatomy, so the numbers are too ill-conditioned for this dtype: use a wider one."


# What torch's errors for inputs of a wrong width or dtype say.
ABOUT_INPUTS = ("shape", "size", "dtype", "expect", "range")


def cache(
    model: nn.Module, placed: tuple[Site, ...], prompt: Prompt, inputs: Tensor, **options: Any
) -> tuple[CachedPrompt, Tensor]:
    """Run the whole prompt; return what the blocks read, and the model's outputs.

    The options are those of :func:`~icl_lib.models.activations.with_context`.
    """
    try:
        blocks, outputs = with_context(
            model, placed, type(prompt), prompt.whole(inputs), prompt.lead, places=prompt.places, **options
        )
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError, IndexError) as error:
        if not any(word in str(error) for word in ABOUT_INPUTS):
            raise  # the model's own error, which says something else
        raise ValueError(
            f"{type(model).__name__} does not run on inputs {list(inputs.shape)} of {inputs.dtype}: {error}. Give "
            "inputs of the width and the length that it reads."
        ) from error
    last = outputs.reshape(*prompt.lead[:-1], -1, outputs.shape[-1])[..., -1, :]
    return CachedPrompt(type(prompt), prompt.bare(inputs), prompt.lead, prompt.bare_lead, blocks, last), outputs
