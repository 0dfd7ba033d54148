"""Shows the engine the router logits and hidden states that transformers collects with hooks.

transformers' `capture_outputs` sets a collector (a dict of lists, in a context variable) around a model's forward.
Forward hooks deep inside the layers append to it. The engine runs units on another thread, and twice. So each run gets
a collector of its own, and its tensors become outputs of the unit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import _active_collector, maybe_install_capturing_hooks

_ASKED_FOR = ("output_router_logits", "output_hidden_states", "output_attentions")


def install_hooks(model: nn.Module) -> None:
    """Install the hooks that collect what the model's configuration asks for, and all of a part that sees pictures.

    transformers installs them in the first forward, which would then count as one that changes the model: each sweep
    would have one micro-batch (engine/compute/moving_state.py). The part that sees is asked for hidden states by the
    model's code, whatever the configuration says.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and (
            module.main_input_name == "pixel_values" or any(getattr(module.config, name, False) for name in _ASKED_FOR)
        ):
            maybe_install_capturing_hooks(module)


class CapturedOutputs:
    """The engine's SideOutputs for transformers models."""

    def collector(self) -> dict[str, Any] | None:
        collector: dict[str, Any] | None = _active_collector.get()
        return collector

    def capture(self, collector: dict[str, Any], forward: Callable[..., Any]) -> Callable[..., Any]:
        before = {key: len(value) for key, value in collector.items() if isinstance(value, list)}
        settings = {key: value for key, value in collector.items() if key not in before}

        def captured(*args: Any, **kwargs: Any) -> tuple[Any, dict[str, list[Any]]]:
            # what came before stands as None here: hooks look only at how many there are
            own: dict[str, Any] = {**settings, **{key: [None] * count for key, count in before.items()}}
            token = _active_collector.set(own)
            try:
                outputs = forward(*args, **kwargs)
            finally:
                _active_collector.reset(token)
            return outputs, {key: own[key][count:] for key, count in before.items()}

        return captured

    def deliver(self, collector: dict[str, Any], captured: dict[str, list[Any]]) -> None:
        for key, values in captured.items():
            collector[key].extend(values)
