"""Stochastic gradient descent as the training loop uses it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.sgd import sgd


class NesterovSGD:
    """SGD with Nesterov momentum and a decay of weights: `torch.optim.SGD` bit by bit.

    That class imports `torch._dynamo` when the first one is made, more than a second of every
    trial's process; the function that it calls does not.

    Args:
        groups: Pairs of parameters and their weight decay.
        momentum: Share of the last step in the next one; 0 for none.
    """

    def __init__(
        self, groups: Sequence[tuple[Sequence[Parameter], float]], *, momentum: float
    ) -> None:
        self._groups: list[tuple[list[Tensor], float]] = [
            (list(parameters), weight_decay) for parameters, weight_decay in groups
        ]
        self._momentum = momentum
        self._buffers: list[list[Tensor | None]] = [[None] * len(p) for p, _ in self._groups]

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Change the parameters by their gradients, and forget those."""
        for (parameters, weight_decay), buffers in zip(self._groups, self._buffers, strict=True):
            sgd(
                parameters,
                # All have one after a step back through the whole net.
                [cast(Tensor, parameter.grad) for parameter in parameters],
                buffers,
                fused=True,
                weight_decay=weight_decay,
                momentum=self._momentum,
                lr=learning_rate,
                dampening=0.0,
                nesterov=self._momentum > 0,
                maximize=False,
            )
            for parameter in parameters:
                parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Return the momentum, to go on from."""
        return {"momentum": [list(buffers) for buffers in self._buffers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of an optimizer of the same net."""
        self._buffers = [
            [None if kept is None else kept.detach().clone() for kept in buffers]
            for buffers in state["momentum"]
        ]
