"""Where a supervised run stands between two optimizer steps, as tensors and JSON: what `optimization.fit` goes on from.

Weights and batches are the caller's; here are the moments of the optimizer, the loss scale, the random stream of
dropout, and the position.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class FitState:
    """The state of a supervised run; a new one is its beginning.

    epoch, batch: how many epochs are done, and how many batches of the present one.
    """

    def __init__(self) -> None:
        self.epoch = 0
        self.batch = 0
        self._loaded: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._scaler: torch.amp.GradScaler | None = None
        self._device = torch.device("cpu")
        self._streams: dict[str, Tensor] = {}  # of dropout, as they were after the last step

    def begin(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, device: torch.device) -> None:
        """Take charge of what a run steps with, and bring it to where `load` said. Called by the loop, in its stream.

        Raises ValueError for a state that is of another model or device, RuntimeError if a loop has it already: one
        that an error ended goes on from what was saved.
        """
        if self._optimizer is not None:
            raise RuntimeError("this run was begun before; go on from its last checkpoint")
        self._optimizer, self._scaler, self._device = optimizer, scaler, device
        if self._loaded is None:
            self.advance(self.batch)
            return
        tensors, counters = self._loaded
        moments: dict[int, dict[str, Tensor]] = {}
        parameters: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    number, key = name.split(".")[1:]
                    if key != "step" and tensor.shape != parameters[int(number)].shape:
                        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, which is another parameter's")
                    moments.setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
            scaler.load_state_dict(dict(counters["scaler"]))
            torch.set_rng_state(tensors["generator.dropout"])
            if device.type == "cuda":
                torch.cuda.set_rng_state(tensors["generator.dropout_cuda"], device)
        except (KeyError, IndexError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"the saved state is of another model, precision or kind of device: {error}") from error
        self._loaded = None
        self.advance(self.batch)

    def advance(self, batch: int) -> None:
        """Note that a step is done, and so this many batches of the epoch. Called by the loop, in its stream."""
        self.batch = batch
        self._streams = {"generator.dropout": torch.get_rng_state()}
        if self._device.type == "cuda":
            self._streams["generator.dropout_cuda"] = torch.cuda.get_rng_state(self._device)

    def tensors(self) -> dict[str, Tensor]:
        """Moments of the optimizer and states of the random streams, by name; to be asked for in between two steps."""
        if self._loaded is not None:
            return dict(self._loaded[0])
        if self._optimizer is None:
            return {}
        moments = {
            f"optimizer.{number}.{key}": value
            for number, values in self._optimizer.state_dict()["state"].items()
            for key, value in values.items()
        }
        return {**moments, **self._streams}

    def counters(self) -> dict[str, Any]:
        """The position and the loss scale, as JSON has them; to be asked for in between two steps."""
        scaler = {} if self._scaler is None else self._scaler.state_dict()
        if self._loaded is not None:
            scaler = self._loaded[1]["scaler"]
        return {"epoch": self.epoch, "batch": self.batch, "scaler": scaler}

    def load(self, tensors: Mapping[str, Tensor], counters: Mapping[str, Any]) -> None:
        """Begin where `tensors` and `counters` were asked for. Raises ValueError or KeyError for a bad position."""
        for name in ("epoch", "batch"):
            if type(counters[name]) is not int or not 0 <= counters[name] < 2**63:
                raise ValueError(f"{name} must be an integer of at least 0, got {counters[name]!r:.20}")
        self.epoch, self.batch = counters["epoch"], counters["batch"]
        self._loaded = (tensors, counters) if "generator.dropout" in tensors else None  # else it had not begun
