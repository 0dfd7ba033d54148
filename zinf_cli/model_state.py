"""What the state of a model is made of, said once and without torch; plan, checkpoint, engine and tiers read it.

A parameter that is trained has a gradient, the fields of its optimizer and, where it is 16-bit, an fp32 master that the
optimizer works on. The master of a bf16 parameter is split: it is the parameter and a remainder of 16 bits, if the
optimizer has room for one bit more (engine/split_masters.py). Another optimizer is another `OptimizerState` here, and a
kernel in engine/traffic/kernel.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

PAGE = 4096
"""Bytes. Buffers, extents and regions of files begin at a multiple, as direct I/O asks."""
PIECE = 4 * 2**20
"""Bytes of a field that are moved at once, and that have one checksum. The cuts are at multiples from its start."""
MAPPED = 16 * 2**20
"""Bytes. malloc maps a block of as many by itself, and a freed one goes back to the kernel: it leaves no hole."""
ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "I16": 2}
"""Bytes of an element, by dtype as safetensors writes it."""
PRECISIONS = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""The dtype of most parameters, by the name of the compute's precision."""
SCALED = "Q8"
"""A byte for each element, and an fp32 scale for each SCALE_BLOCK of them (engine/eight_bits.py)."""
STATE_DTYPES = {"fp32": "F32", "bf16": "BF16", "int8": SCALED}
"""The dtype of an optimizer's fields, by `optimizer.state_dtype`."""
FP32_BYTES = ITEM_BYTES["F32"]
ROUNDING_BYTES = {"F32": 0, "BF16": 6, SCALED: 48}
"""What computing a field in fp32 and rounding it costs an element, in bytes that memory moves. Measured on a CPU, in
its cache, beside AdamW and its 28 bytes."""
SLICE_MULTIPLE = PAGE // min(ITEM_BYTES.values())
"""Elements. A rank's slice of a flat is a multiple: whole pages in any dtype but SCALED."""
SCALE_BLOCK = 256
"""Elements that share a scale. A parameter begins at a multiple in its flat."""
CHUNK_NUMEL = PIECE // FP32_BYTES
"""Elements of an update's chunk: a piece of each fp32 field."""
_PASSES = 14
"""Those of Adafactor over whole parameters."""
BLOCK_NUMEL = 128 * 1024
"""Elements that stay in a processor's cache between operations, which is twice as fast as whole tensors."""
DEVICE_CHUNK_NUMEL = 16 * CHUNK_NUMEL
"""The same where an accelerator computes: a launch takes as long there as the update of a million elements."""
DEVICE_BLOCK_NUMEL = 4 * CHUNK_NUMEL
"""Elements whose masters an accelerator joins at once: its launches have their price, and so has the memory for it."""
DEVICE_LOGITS = 1 << 28
"""Logits whose gradients an accelerator multiplies at once (engine/units/chunked_loss.py)."""


@dataclass(frozen=True)
class Packing:
    """How frozen parameters lie on tiers and travel, if not in the dtype that compute uses (engine/packed.py)."""

    bits: int
    """Of a value."""
    block: int | None = None
    """Values that share an fp32 scale; None: they have none."""


PACKINGS = {"bf16": Packing(16), "int8": Packing(8, 256), "nf4": Packing(4, 64)}
"""By `model.base_dtype`. A parameter begins with a block."""

STATES = ("params", "grads", "optimizer")
"""The classes of state; each has a tier."""


def round_up(amount: int, multiple: int = PAGE) -> int:
    """The smallest multiple of `multiple` that is at least `amount`."""
    return -(-amount // multiple) * multiple


def bytes_of(dtype: str, numel: int) -> int:
    """Bytes of `numel` elements, which begin at a multiple of CHUNK_NUMEL in a slice; of SCALED ones, whole pages."""
    if dtype != SCALED:
        return numel * ITEM_BYTES[dtype]
    return _in_chunks(numel, lambda each: each + -(-each // SCALE_BLOCK) * FP32_BYTES)


def packed_bytes(packing: str, numel: int) -> int:
    """The same of `numel` frozen parameters in a packing, a name of PACKINGS: whole pages."""
    bits, block = PACKINGS[packing].bits, PACKINGS[packing].block
    return _in_chunks(numel, lambda each: each * bits // 8 + (each // block * FP32_BYTES if block else 0))


def _in_chunks(numel: int, bytes_in: Callable[[int], int]) -> int:
    chunks, rest = divmod(numel, CHUNK_NUMEL)
    return chunks * round_up(bytes_in(CHUNK_NUMEL)) + round_up(bytes_in(rest))


def num_factors(shape: Sequence[int]) -> int:
    """Values of a parameter's factored field: one for each row and column of its matrices; of a vector, its elements.

    The last two dimensions are those of a matrix.
    """
    if len(shape) < 2:
        return math.prod(shape)
    return math.prod(shape[:-2]) * (shape[-2] + shape[-1])


def factors_of(shapes: Iterable[Sequence[int]]) -> tuple[tuple[tuple[int, int], ...], int]:
    """(first and last value of each parameter's factors, all values with padding), of a flat with these `shapes`."""
    ends = list(accumulate(map(num_factors, shapes)))
    return tuple(zip((0, *ends), ends, strict=False)), round_up(ends[-1] if ends else 0, SLICE_MULTIPLE)


@dataclass(frozen=True)
class Field:
    """A part of a parameter's state: one value for each of its elements, or factors of these, in a flat beside the
    parameter's own."""

    name: str
    stored: str = ""
    """What a checkpoint calls it, if it is state between two steps."""
    state: str = "optimizer"
    """Its class, one of STATES."""
    dtype: str | None = "F32"
    """None: the parameter's own."""
    carries: bool = False
    """Whether it is never negative, so that its sign can carry a bit of something else."""
    factored: bool = False
    """Whether it has no value for each element, but `num_factors` of a parameter."""

    @property
    def item_bytes(self) -> int:
        """Of a field with a dtype of its own."""
        assert self.dtype is not None
        return ITEM_BYTES[self.dtype]


PARAM = Field("params", "param", "params", dtype=None)
FROZEN = Field("params", "frozen", "params", dtype=None)
"""A parameter that is not trained."""
MASTER = Field("master", "param")
"""Of a 16-bit parameter that is trained. A checkpoint has it instead of the parameter, which is its rounding."""
REMAINDER = Field("remainder", "remainder", dtype="I16")
"""Of a bf16 parameter that is trained: what makes it its master, with the sign of a field that carries."""
GRAD = Field("grads", state="grads")
VALUES = (PARAM.stored, FROZEN.stored)
"""Names in a checkpoint under which the parameter itself is stored."""


@dataclass(frozen=True)
class OptimizerState:
    """What an optimizer keeps of a parameter; before the first update it is zero."""

    name: str
    fields: tuple[Field, ...]
    whole: tuple[Field, ...] = ()
    """What it keeps of a hidden matrix, if it updates those whole, in another way than the rest."""
    adapts: bool = False
    """Whether an adapter of a frozen model is trained. Its parameters then lie with what the optimizer keeps of them,
    and a checkpoint has no others."""

    @property
    def factored(self) -> bool:
        """Whether it keeps factors of whole parameters."""
        return any(field.factored for field in self.whole)

    @property
    def param_class(self) -> str:
        """The class of the trained parameters themselves."""
        return "optimizer" if self.adapts else PARAM.state

    @property
    def frozen(self) -> tuple[Field, ...]:
        """What a checkpoint has of a parameter that is not trained."""
        return () if self.adapts else (FROZEN,)

    def class_of(self, field: Field) -> str:
        """The class of a field of a trained parameter."""
        return self.param_class if field == PARAM else field.state

    def of(self, *, whole: bool) -> OptimizerState:
        """What it keeps of hidden matrices that it updates whole, or of the rest."""
        return replace(self, fields=self.whole if whole else self.fields, whole=())

    def stored_as(self, dtype: str) -> OptimizerState:
        """The same with fields of `dtype`: each update rounds them to it."""
        fields, whole = (tuple(replace(field, dtype=dtype) for field in kept) for kept in (self.fields, self.whole))
        return replace(self, fields=fields, whole=whole)

    @property
    def state_dtype(self) -> str:
        """How its fields are stored, a name of STATE_DTYPES; updates compute them in fp32."""
        stored = (*self.fields, *self.whole)[0].dtype
        return next(name for name, dtype in STATE_DTYPES.items() if dtype == stored)

    @property
    def carrier(self) -> Field | None:
        """The field whose sign makes 17 bits of a remainder's 16."""
        return next((field for field in self.fields if field.carries), None)

    def beside(self, dtype: str) -> tuple[Field, ...]:
        """The fields of the class "optimizer", of a parameter of `dtype`."""
        if dtype == "F32":
            return self.fields
        return (*self.fields, REMAINDER if dtype == "BF16" and self.carrier is not None else MASTER)

    def stored(self, dtype: str) -> tuple[Field, ...]:
        """The fields of a checkpoint, in its order."""
        beside = self.beside(dtype)
        if MASTER in beside:
            return (MASTER, *self.fields)
        return (PARAM, REMAINDER, *self.fields) if REMAINDER in beside else (PARAM, *self.fields)

    def num_bytes(self, dtype: str, numel: int) -> int:
        """Bytes of the class "optimizer" of a slice of `numel` parameters of `dtype`, without factors."""
        return sum(bytes_of(field.dtype or dtype, numel) for field in self.beside(dtype) if not field.factored)

    def bytes_per_param(self, dtype: str) -> float:
        """The same of a parameter in a wide slice."""
        return self.num_bytes(dtype, CHUNK_NUMEL) / CHUNK_NUMEL

    @property
    def moved_bytes_per_param(self) -> int:
        """What an update moves of memory: gradient, fp32 parameter and fields in, all but the gradient out.

        With factors it passes over a parameter, its gradient and its step several times, and all are too large to stay
        in a cache.
        """
        if self.factored:
            return _PASSES * FP32_BYTES
        rounding = sum(ROUNDING_BYTES[field.dtype or "F32"] for field in self.fields)
        return GRAD.item_bytes + 2 * FP32_BYTES * (1 + len(self.fields)) + rounding

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> OptimizerState:
        """From `dataclasses.asdict`, by way of JSON."""
        fields, whole = (tuple(Field(**field) for field in document.get(key, ())) for key in ("fields", "whole"))
        return cls(**{**document, "fields": fields, "whole": whole})


ADAMW = OptimizerState("adamw", (Field("exp_avg", "exp_avg"), Field("exp_avg_sq", "exp_avg_sq", carries=True)))
SGD = OptimizerState("sgd", (Field("momentum_buffer", "momentum_buffer"),))
LION = OptimizerState("lion", (Field("exp_avg", "exp_avg"),))
MUON = OptimizerState("muon", ADAMW.fields, whole=SGD.fields)
FACTORS = Field("factors", "factors", factored=True)
ADAFACTOR = OptimizerState("adafactor", (), whole=(FACTORS,))
