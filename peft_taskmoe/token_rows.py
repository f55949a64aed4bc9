"""Which example each token that a layer is given belongs to; shapes are never guessed at."""

from __future__ import annotations

import torch

from .task_scope import TaskState


class RowsError(ValueError):
    """The tokens of a layer cannot be told apart by example."""


def tasks_of_tokens(
    shape: torch.Size, tasks: int, state: TaskState, layer: TokenLayout
) -> torch.Tensor | None:
    """Index of each token's task.

    The batch has R rows, of which each task owns R / n consecutive ones (beams repeat a prompt in
    place). A layer's input is understood as `(R, ..., d)`, as `(R * length, d)` with the lengths of
    the call, or as `(length, R, d)`.

    Args:
        shape: Shape of the layer's input, `(..., d)`.
        tasks: Number of tasks, n.
        state: The state of the forward that runs.
        layer: What is known of the layer.

    Returns:
        `(tokens,)`, or None where each task owns an equal number of consecutive tokens.

    Raises:
        RowsError: If the shape has no such meaning.
    """
    tokens = shape[:-1].numel()
    if state.token_tasks is not None:
        if state.token_tasks.shape[0] != tokens:
            raise layer.error(
                f"gets {tokens} tokens of a packed batch of {state.token_tasks.shape[0]}"
            )
        return state.token_tasks
    if tasks == 1:
        return None
    if layer.partial:
        raise layer.error("gets a part of the tokens, as an expert of a sparse block does")
    rows = state.rows
    if rows is None:  # outside of a model's forward: the first dimension is the batch
        if len(shape) > 1 and shape[0] % tasks == 0:
            return None
        raise layer.error(f"gets an input of shape {tuple(shape)} for {tasks} task embeddings")
    if rows % tasks:
        raise layer.error(f"gets a batch of {rows} rows for {tasks} task embeddings")
    if len(shape) == 2 and shape[0] in (rows, *(rows * length for length in state.lengths)):
        return None
    if len(shape) > 2 and layer.is_sequence_first(shape, state):
        return torch.arange(tasks).repeat_interleave(rows // tasks).repeat(tokens // rows)
    if len(shape) > 2 and shape[0] == rows:
        return None
    raise layer.error(f"gets an input of shape {tuple(shape)} in a batch of {rows} rows")


def rows_of_tokens(shape: torch.Size, state: TaskState, layer: TokenLayout) -> torch.Tensor | None:
    """Index `(tokens,)` of each token's row of the batch (or packed document); None if unknown."""
    if state.rows is None and state.token_tasks is None:
        return None
    rows = state.rows or 1
    try:
        found = tasks_of_tokens(shape, rows, state, layer)
    except RowsError:
        return None
    if found is None:
        found = torch.arange(rows).repeat_interleave(shape[:-1].numel() // rows)
    return found


class TokenLayout:
    """What is known of how a layer is given tokens.

    Args:
        name: The layer's name in the model.
        partial: Whether it is an expert of a sparse block, which is given a part of the tokens.
        may_be_sequence_first: Whether the architecture is known to transpose batch and tokens.
        given_positions: Whether it is given relative positions as well, in calls of their own.
    """

    def __init__(
        self,
        name: str = "",
        partial: bool = False,
        may_be_sequence_first: bool = False,
        given_positions: bool = False,
    ) -> None:
        self.name = name
        self.partial = partial
        self.may_be_sequence_first = may_be_sequence_first
        self.given_positions = given_positions
        self._sequence_first: bool | None = None
        self._assumed = False

    def is_sequence_first(self, shape: torch.Size, state: TaskState) -> bool:
        """Whether an input is `(length, rows, d)`; remembered from the calls where shapes tell.

        Raises:
            RowsError: If the shape does not tell and nothing is known, or the layer changes.
        """
        rows = state.rows
        if torch.compiler.is_compiling() and not self.may_be_sequence_first:
            return False  # without a guard on the length
        if shape[0] == rows and (len(shape) != 3 or shape[1] != rows):
            return self._learn(False)
        if shape[0] != rows:
            transposed = len(shape) == 3 and shape[1] == rows
            known = self.may_be_sequence_first or shape[0] in state.lengths
            return transposed and known and self._learn(True)
        if self._sequence_first is None:
            if self.may_be_sequence_first:
                raise self.error(
                    f"gets an input of shape {tuple(shape)}, in which batch and tokens look alike"
                )
            self._assumed = True
        return bool(self._sequence_first)

    def _learn(self, sequence_first: bool) -> bool:
        if torch.compiler.is_compiling():
            return sequence_first
        if sequence_first and self._assumed:
            raise self.error(
                "takes tokens before rows, and earlier square batches were read wrongly"
            )
        if self._sequence_first not in (None, sequence_first):
            raise self.error("takes rows first in one call and tokens first in another")
        self._sequence_first = sequence_first
        return sequence_first

    def error(self, found: str) -> RowsError:
        """The error for an input whose tokens cannot be told apart."""
        return RowsError(
            f"Layer `{self.name}` {found}, so which example each token belongs to is unknown. "
            "Leave it out with `exclude_modules`, or use a batch of one example."
        )
