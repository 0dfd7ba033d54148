"""The figures of a recipe: what the plan knows of its model, its text and the machine, as plain numbers.

`zinf_cli.train.figures` finds them. The launcher gets them as JSON from another process, so that it imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from zinf_cli.model_state import ADAMW, GRAD, MAPPED, PRECISIONS, OptimizerState


@dataclass(frozen=True)
class LeastPart:
    """The smallest part that a unit can be cut into, as far as its parameters let it."""

    param: str
    """The largest parameter in it."""
    numel: int
    """Elements of a row, of an expert, or of all that can't be cut."""
    whole: bool
    """Whether it can't be cut."""


@dataclass(frozen=True)
class UnitFigures:
    """One unit. Element counts include the padding of slices for `world_size` ranks. Bytes are for one micro-batch."""

    name: str
    trainable_numel: int
    frozen_numel: int
    trainable_bytes: int
    """Of the trainable parameters, in the dtype that the model computes in."""
    frozen_bytes: int
    """Of the frozen ones, as they lie on their tier."""
    master_numel: int
    """Elements of trainable 16-bit parameters: these have an fp32 master."""
    largest_param_numel: int
    largest_trained_numel: int
    """Of the trained parameters alone."""
    resident: bool
    calls: int
    learned: int
    """Of its calls, those that have a backward."""
    input_bytes: int
    """Differentiable inputs of all its calls, which the tape keeps."""
    call_bytes: int
    """Differentiable inputs of one call."""
    saved_bytes: int
    """What autograd saves inside it, without weights. It is kept for backward, or made again by the recompute."""
    output_bytes: int
    before_bytes: int
    """The most that the code between the unit called before and this one needs in backward."""
    least: LeastPart
    reached: float
    """The chance that some token of a micro-batch reaches it: 1, but for experts, of which tokens take some. Every
    expert is taken to be as likely as any other."""
    product: bool = False
    """Whether backward does not compute it again, since it is one product (engine/compute/products.py)."""
    taken_bytes: int = 0
    """Differentiable inputs of all its calls: each call's backward brings its own back."""
    sent_bytes: int = 0
    """What autograd saves before its calls, outside of units, without what it has saved there before."""
    again_bytes: int = 0
    """What it saves there, and had saved outside of units before."""
    mapped_bytes: int = 0
    """The part of `saved_bytes` in blocks that malloc maps by themselves: logits of a loss in chunks."""
    chunkable_bytes: int = 0
    """The part of `saved_bytes` that is not there if its MLP is computed in chunks of tokens."""
    chunkable_numel: int = 0
    """Elements of that MLP, which backward then computes once more."""
    packed_bytes: int = 0
    """The part of `frozen_bytes` that lies there packed (engine/packed.py)."""
    unpacked_bytes: int = 0
    """What that takes in a slot."""
    whole_numel: int = 0
    """Elements of trainable matrices that the optimizer updates whole (`OptimizerState.whole`)."""
    whole_master_numel: int = 0
    """Those of them that are in 16 bits."""
    whole_flops: float = 0.0
    """What it computes for their update, beside what it does with each element."""
    spared_numel: int = 0
    """Elements of matrices whose products its recompute leaves out (engine/compute/spared.py)."""
    factor_bytes: int = 0
    """Of factors that the optimizer keeps of them."""

    @property
    def numel(self) -> int:
        """Elements of all parameters, trainable or not."""
        return self.trainable_numel + self.frozen_numel

    def inside_bytes(self, per_sweep: int) -> int:
        """Of compute in one call, or in those of several of `per_sweep` micro-batches (engine/compute/joined.py)."""
        each = 2 * self.call_bytes + self.output_bytes
        joined = min(self.gradient_bytes, per_sweep * each) if self.product and per_sweep > 1 else 0
        return self.saved_bytes // max(1, self.calls) + 2 * self.output_bytes + self.gradient_bytes + joined

    @property
    def turn_bytes(self) -> int:
        """Of compute where a sweep turns in this unit, without the loss."""
        return self.saved_bytes + 3 * self.output_bytes + self.gradient_bytes

    @property
    def gradient_bytes(self) -> int:
        """Of the largest gradient as compute makes it. One is there at a time, and is then added to the unit's."""
        return GRAD.item_bytes * self.largest_trained_numel

    def apart_bytes(self, calls: int) -> int:
        """The part of `inside_bytes`, or of `turn_bytes`, that malloc maps by itself.

        That is the gradient, and `mapped_bytes` of one of `calls` calls.
        """
        return (self.gradient_bytes if self.gradient_bytes >= MAPPED else 0) + self.mapped_bytes // max(1, calls)

    @property
    def passes(self) -> float:
        """Forward and backward take so many times what forward takes: 3, or 2 where nothing is trained."""
        return 2 + self.trainable_numel / max(1, self.numel)


@dataclass(frozen=True)
class ModelFigures:
    """The whole model. `flops_per_token` counts forward and backward, without recomputation."""

    architecture: str
    num_params: int
    num_trained: int
    """Of these, those that are not frozen."""
    units: tuple[UnitFigures, ...]
    order: tuple[int, ...]
    learned: tuple[int, ...]
    """Of `order`, the calls that have a backward."""
    glue_bytes: int
    loss_bytes: int
    live_bytes: int
    """What lies between units while one of them is called."""
    surveyed: bool
    """Whether the survey ran a forward to its end. If not, activations are guessed and the order is module order."""
    demoted: tuple[str, ...]
    """Modules that look like units but are resident, since their parameters are used outside of their own call."""
    written: tuple[str, ...]
    """Parameters that the forward writes to."""
    bounds: tuple[tuple[str, float | None, float | None], ...]
    """Parameters that the forward clamps: (name, least, most), None where open."""
    flops_per_token: float
    most: int | None = None
    """Elements that a part has at most, where blocks and matrices are cut into parts."""
    whole: tuple[str, ...] = ()
    """Weights that have more, and can't be cut: the model uses them as only a whole weight can be used."""
    loss_in_chunks: bool = False
    """Whether logits are computed for a few tokens at a time (engine/units/loss_chunks.py)."""
    chunkable: tuple[tuple[str, tuple[int, ...]], ...] = ()
    """Modules inside of units that may be computed in chunks of tokens, and the shapes of their inputs
    (engine/units/token_chunks.py)."""
    tokens_in_chunks: bool = False
    """Whether they are computed so."""
    notes: tuple[str, ...] = ()
    """What the user should know of how model and checkpoint go together."""
    spared: tuple[str, ...] = ()
    """Linears whose products a recompute leaves out."""

    @property
    def turn(self) -> int | None:
        """The index of the last unit that a sweep calls, where it turns from forward to backward."""
        return self.order[-1] if self.order else None


@dataclass(frozen=True)
class DataFigures:
    """The packed text."""

    max_steps: int
    texts: tuple[str, ...] = ()
    """What each path contributed, and what was left out of it."""
    notes: tuple[str, ...] = ()
    """What the user should know of how the text was found this time."""
    sources: tuple[str, ...] = ()
    """Paths of texts that have weights."""
    share: float = 1.0
    """Of the text, what was looked at."""
    about: bool = False
    """Whether `max_steps` was counted by less than all of it."""
    of_tokens: bool = True
    """Whether a loss is that of telling tokens, so that it has a perplexity."""


@dataclass(frozen=True)
class MachineFigures:
    """One host."""

    accelerators: int
    device_bytes: int
    """Free memory of the smallest accelerator; 0 without one."""
    cores: int
    flops: float
    """FLOP/s of one rank in the run's precision, measured for a moment in passes over a block of the model's width."""
    process_bytes: int
    """Resident memory of a process that has imported what a rank imports, and has built the model without weights."""
    shared_bytes: int
    """The part of `process_bytes` that ranks of a host share: pages of libraries, and what they were forked with."""
    name: str = "this machine"
    cpu_bytes: int = 0
    """CPU memory of a machine that is not this one; 0 stands for what this one has when the plan is made."""
    nvme_bytes: int = 0
    """Space on drives, likewise."""
    one_pool: bool = False
    """Whether the accelerators use the memory of the CPU: what lies on the device takes from both."""


@dataclass(frozen=True)
class Figures:
    """Everything that a plan is made from, beside the recipe."""

    model: ModelFigures
    data: DataFigures
    machine: MachineFigures
    world_size: int
    ranks_per_host: int
    """On the host with the most ranks."""
    precision: str
    optimizer: OptimizerState = ADAMW

    @property
    def dtype(self) -> str:
        """Of the parameters, but for those that the model keeps in fp32."""
        return PRECISIONS[self.precision]

    def ranks_at(self, tier: str) -> int:
        """How many ranks share the limit of a tier: those of a host; of an accelerator, one."""
        return 1 if tier == "device" else self.ranks_per_host

    def trained(self, unit: UnitFigures) -> tuple[tuple[OptimizerState, str, int], ...]:
        """The unit's trainable parameters: how many of each dtype, by what is kept of them."""
        masters = unit.master_numel - unit.whole_master_numel
        counts = (
            (False, "F32", unit.trainable_numel - unit.whole_numel - masters),
            (False, self.dtype, masters),
            (True, "F32", unit.whole_numel - unit.whole_master_numel),
            (True, self.dtype, unit.whole_master_numel),
        )
        return tuple((self.optimizer.of(whole=whole), dtype, numel) for whole, dtype, numel in counts if numel)

    def moments_bytes(self, unit: UnitFigures) -> int:
        """Bytes of what an update reads and writes beside the unit's parameters, the slices of all ranks together."""
        ranks = self.world_size
        each = (kept.num_bytes(dtype, numel // ranks) * ranks for kept, dtype, numel in self.trained(unit))
        return sum(each) + unit.factor_bytes

    @cached_property
    def moments(self) -> tuple[int, ...]:
        """The same of every unit. A search for a plan asks for it thousands of times."""
        return tuple(map(self.moments_bytes, self.model.units))

    def param_bytes(self, unit: UnitFigures) -> dict[str, int]:
        """Bytes of the unit's parameters on their tiers, by the class that they belong to."""
        trained = self.optimizer.param_class
        return {"params": unit.frozen_bytes, trained: unit.trainable_bytes + unit.frozen_bytes * (trained == "params")}

    @cached_property
    def states(self) -> tuple[dict[str, int], ...]:
        """Of every unit, the bytes of its model states by class, the slices of all ranks together."""
        return tuple(
            {
                **(params := self.param_bytes(unit)),
                "grads": unit.trainable_numel * GRAD.item_bytes,
                "optimizer": params.get("optimizer", 0) + moments,
            }
            for unit, moments in zip(self.model.units, self.moments, strict=True)
        )

    @classmethod
    def from_json(cls, document: dict) -> Figures:  # type: ignore[type-arg]
        """The figures of a plan.json."""
        model = dict(document["model"])
        model["units"] = tuple(UnitFigures(**{**unit, "least": LeastPart(**unit["least"])}) for unit in model["units"])
        model["bounds"] = tuple(tuple(bound) for bound in model["bounds"])
        model["chunkable"] = tuple((path, tuple(shape)) for path, shape in model["chunkable"])
        return cls(
            ModelFigures(**{key: _frozen(value) for key, value in model.items()}),
            DataFigures(**{key: _frozen(value) for key, value in document["data"].items()}),
            MachineFigures(**document["machine"]),
            document["world_size"],
            document["ranks_per_host"],
            document["precision"],
            OptimizerState.from_json(document["optimizer"]),
        )


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
