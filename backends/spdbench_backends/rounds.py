"""What a verify round of an engine that is watched from outside was: its drafts against the ids that came of it."""

from __future__ import annotations

from collections.abc import Sequence

from spdbench.types import Step


def verdict(token_ids: Sequence[int], drafts: Sequence[int], forwards: int) -> Step:
    """The step that committed `token_ids` after `drafts`, with the target at work on `forwards` tokens.

    Ids equal to the drafts are accepted ones; the first that is not shows that its draft was refused. Where a round was
    cut at an end of sequence or at the limit, what lay behind is not known, and not counted.
    """
    pairs = zip(token_ids, drafts, strict=False)
    accepted = next((index for index, (token, draft) in enumerate(pairs) if token != draft), None)
    refused = accepted is not None
    if accepted is None:
        accepted = min(len(token_ids), len(drafts))
    return Step(tuple(token_ids), len(drafts), accepted + refused, accepted, float(forwards))
