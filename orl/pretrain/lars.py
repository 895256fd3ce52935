"""LARS (You et al., 2017), as in the ORL release: SimCLR's optimizer."""

from collections.abc import Iterable

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """SGD with momentum whose rate, for each parameter of more than one dimension, goes with the size of its weights.

    v = momentum·v + lr·local·(g + weight_decay·w), w = w - v, where local = trust·‖w‖ / (‖g‖ + weight_decay·‖w‖),
    or 1 if ‖w‖ or ‖g‖ is 0. Biases and BatchNorm: v = momentum·v + lr·g. Nothing waits for the device.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step along the gradients; parameters without one stay."""
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not trained:
                continue
            changes = [self._change(w, w.grad, group["weight_decay"], group["trust"]) for w in trained]
            velocities = [self._velocity(parameter) for parameter in trained]
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, changes, alpha=group["lr"])
            torch._foreach_sub_(trained, velocities)

    @staticmethod
    def _change(w: Tensor, g: Tensor, weight_decay: float, trust: float) -> Tensor:
        """What a parameter moves by at rate 1, without momentum."""
        if w.ndim <= 1:
            return g
        w_norm, g_norm = w.norm(), g.norm()
        local = trust * w_norm / (g_norm + weight_decay * w_norm)
        return torch.where((w_norm > 0) & (g_norm > 0), local, 1.0) * (g + weight_decay * w)

    def _velocity(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        return state["momentum_buffer"]
