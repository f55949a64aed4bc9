"""A method of one model instance, wrapped; nothing of the model's class is touched."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn


class ConditionedMethod:
    """A method of one model instance that runs under the task of its call.

    A bound method to those who look at it (`__func__`, `__self__`), but one that copies and pickles
    with its model.

    Args:
        model: The model.
        name: `"forward"` or `"generate"`.
        own: What the instance had under this name; None for its class's method.
        conditioned: Called with the model, the inner method, and the call's args and kwargs.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        own: Callable[..., Any] | None,
        conditioned: Callable[
            [nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any
        ],
    ) -> None:
        self.__self__ = model
        self.__name__ = name
        self.own = own
        self.conditioned = conditioned
        self.__signature__ = _with_task_embeds(inspect.signature(getattr(model, name)))

    @property
    def __func__(self) -> Callable[..., Any]:
        return _Unbound(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the method under its task."""
        model, name = self.__self__, self.__name__
        inner = self.own or partial(getattr(type(model), name), model)
        return self.conditioned(model, inner, args, kwargs)


class _Unbound:
    """A conditioned method as a function of the model."""

    def __init__(self, method: ConditionedMethod) -> None:
        self.method = method
        self.__name__ = method.__name__
        own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        parameters = list(method.__signature__.parameters.values())
        if parameters and parameters[0].kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            own = own.replace(kind=inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.__signature__ = inspect.Signature([own, *parameters])

    def __call__(self, model: nn.Module, /, *args: Any, **kwargs: Any) -> Any:
        return self.method(*args, **kwargs)


def _with_task_embeds(signature: inspect.Signature) -> inspect.Signature:
    """A signature with `task_embeds` in it, so that a Trainer keeps a column of that name."""
    if "task_embeds" in signature.parameters:
        return signature
    empty = inspect.Parameter.empty
    parameters = [p.replace(annotation=empty) for p in signature.parameters.values()]
    rest = [p for p in parameters if p.kind is inspect.Parameter.VAR_KEYWORD]
    parameters = [p for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    extra = inspect.Parameter("task_embeds", inspect.Parameter.KEYWORD_ONLY, default=None)
    return inspect.Signature([*parameters, extra, *rest])
