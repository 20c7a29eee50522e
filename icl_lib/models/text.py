"""The token ids of a prompt and a query, tokenised together as one text."""

from __future__ import annotations

from typing import Any


def tokens_of(tokenizer: Any, prompt: str, query: str) -> tuple[list[int], int]:
    """Return the token ids of ``prompt + query``, and how many of them belong to the prompt.

    The two are tokenised together, as a model reads them, and split where the query begins. What a tokenizer adds at
    the beginning belongs to the prompt; what it adds at the end is left out, since the query goes on.

    Args:
        tokenizer: a fast tokenizer of transformers, which knows the place of each token in the text.
        prompt, query: the text that the edits replace, and the text that remains.

    Raises `ValueError` for a text without tokens, for a token that covers the end of the prompt and the beginning of
    the query, and for a tokenizer that does not know where its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, which does not say where its tokens stand in the text: give a "
            "fast tokenizer, or give the token ids of prompt and query."
        )
    encoded = tokenizer(prompt + query, return_offsets_mapping=True, return_special_tokens_mask=True)
    places = [
        (token, start, end, bool(special))
        for token, (start, end), special in zip(
            encoded["input_ids"], encoded["offset_mapping"], encoded["special_tokens_mask"], strict=True
        )
    ]
    while places and places[-1][3]:
        places.pop()
    across = [token for token, start, end, special in places if not special and start < len(prompt) < end]
    if across:
        raise ValueError(
            f"the token {tokenizer.decode(across)!r} covers the end of the prompt and the beginning of the query: move "
            "the boundary, for example a space from the end of the prompt to the beginning of the query."
        )
    split = sum(special or start < len(prompt) for _, start, _, special in places)
    for name, count in (("prompt", split), ("query", len(places) - split)):
        if not count:
            raise ValueError(f"{name} holds no token: give a text or token ids.")
    return [token for token, *_ in places], split
