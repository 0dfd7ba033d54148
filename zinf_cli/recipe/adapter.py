"""What of a recipe says that an adapter is trained, and its model stays as it is."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from zinf_cli.recipe.values import Number, Section


class Adapter(Section):
    """A LoRA adapter, made and computed by peft, beside a model whose own parameters stay as they are."""

    type: Literal["lora"] | None = None
    """lora: train an adapter; null: train the model itself."""
    r: Annotated[int, Field(ge=1)] = 8
    """The rank of its matrices."""
    alpha: Annotated[int, Field(ge=1)] = 16
    """What it adds is multiplied by alpha / r."""
    dropout: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Of the inputs of its matrices."""
    target_modules: Literal["auto", "all-linear"] | tuple[str, ...] = "auto"
    """The modules it adapts, by the ends of their names: [q_proj, v_proj]; auto: peft's choice for the model's type, or
    all-linear where it has none; all-linear: all but the head."""
    target_parameters: tuple[str, ...] = ()
    """Parameters it adapts that no Linear holds, by the ends of their names: [mlp.experts.gate_up_proj]."""
    modules_to_save: tuple[str, ...] = ()
    """Modules of which it has a copy that is trained whole, by the ends of their names: [lm_head]."""

    @field_validator("target_modules", "target_parameters", "modules_to_save", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("target_modules")
    @classmethod
    def _names_some(cls, value: Any) -> Any:
        if value == ():
            raise ValueError("an empty list adapts nothing: name modules, or give auto or all-linear")
        return value

    @model_validator(mode="after")
    def _has_a_type(self) -> Adapter:
        if self.type is None and self != type(self).model_construct():
            raise ValueError("type is missing: type: lora trains an adapter, and without it the keys here do nothing")
        return self
