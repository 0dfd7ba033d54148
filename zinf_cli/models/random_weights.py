"""Weights drawn from the model's own initialisation, a block at a time.

Note "same bits for every grouping". transformers initialises a model in one walk over one generator, so its
values depend on all that was drawn before. Here every *subtree* has a generator of its own, seeded by
(seed, the subtree's name): a transformer block (an element of an outermost ModuleList), or, outside of the
blocks, one module with the parameters it holds itself. Values then do not depend on which parameters are
asked for together, by which rank, or in what order. Distributions are transformers': within a subtree the
walk is its own (children first, each module by the `_init_weights` of the innermost model around it),
followed by the modules above, since a model's `_init_weights` may reach into its children (t5 draws
`shared`, gpt2 rescales `c_proj`). What the walk meets outside the subtree lies on the meta device, where
drawing costs nothing and moves no generator.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import nn
from transformers import PreTrainedModel

from zinf_cli.models.model import parameters_as_built, skeleton
from zinf_cli.models.recorded import Recording
from zinf_cli.models.seeds import derived_seed


class RandomWeights:
    """A WeightSource of values drawn from `seed`: float32 on the CPU; the global generator is left as it was.

    Reading anything of a block moves the generator over the whole block: ask for a block's parameters together, or
    for one after another, from one thread. Memory is that of what is asked for, a few MiB, and of parameters that
    can't be made by ranges (see models/recorded.py).
    """

    def __init__(self, model: PreTrainedModel, seed: int) -> None:
        self._skeleton = skeleton(model)
        self._seed = seed
        self._drawn_as: dict[str, str] = {}  # parameter -> the name its value is drawn under
        self._members: dict[str, list[str]] = {}  # subtree -> the parameters drawn in it
        self._latest: dict[str, dict[str, Recording]] = {}  # the subtree that parts were last read of
        blocks = set(_outermost_list_elements(self._skeleton))
        for name, _ in self._skeleton.named_parameters():
            # Of tied parameters transformers draws all and keeps the source's.
            source = model.all_tied_weights_keys.get(name, name)
            owners = ["", *accumulate(source.split(".")[:-1], "{}.{}".format)]
            subtree = next((module for module in owners if module in blocks), owners[-1])
            self._drawn_as[name] = source
            self._members.setdefault(subtree, []).append(source)
        self._subtree_of = {name: subtree for subtree, names in self._members.items() for name in names}

    def read(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """float32 values of the parameters `names` (as in `model.named_parameters()`), in their shapes.

        Those of some of a block are drawn as ranges: it may be asked for the others next.
        """
        sources = {name: self._drawn_as[name] for name in names}
        values: dict[str, torch.Tensor] = {}
        for subtree in dict.fromkeys(self._subtree_of[source] for source in sources.values()):
            asked = [source for source in sources.values() if self._subtree_of[source] == subtree]
            if set(asked) == set(self._members[subtree]):
                drawn = self._latest.get(subtree) or self._draw(subtree, whole=asked)
            else:
                drawn = self._ranges_of(subtree)
            for source in asked:
                shape = self._skeleton.get_parameter(source).shape
                values[source] = drawn[source].read(0, shape.numel()).view(shape)
        return {name: values[source] for name, source in sources.items()}

    def read_part(self, name: str, first: int, last: int) -> torch.Tensor:
        """See RangedWeights: the elements that `read` gives.

        The first part of a subtree draws it all, a piece at a time; later ones are drawn from where they begin.
        """
        source = self._drawn_as[name]
        return self._ranges_of(self._subtree_of[source])[source].read(first, last)

    def _ranges_of(self, subtree: str) -> dict[str, Recording]:
        """The parameters of a subtree, none of them real. The latest are kept."""
        if subtree not in self._latest:
            self._latest.clear()
            self._latest[subtree] = self._draw(subtree)
        return self._latest[subtree]

    def _draw(self, subtree: str, whole: Collection[str] = ()) -> dict[str, Recording]:
        """The parameters of a subtree; real from the start are those of `whole`."""
        seed = derived_seed(self._seed, subtree)
        above = list(_path(self._skeleton, subtree))
        module, model = above.pop()
        with (
            torch.no_grad(),
            torch.random.fork_rng(devices=[]),
            _recorded(self._skeleton, self._members[subtree], whole) as drawn,
        ):
            torch.default_generator.manual_seed(seed)
            _initialise(module, model)
            for ancestor, ancestor_model in reversed(above):
                ancestor_model._init_weights(ancestor)
        # A few models leave parameters as `__init__` made them (a head's bias, an activation's slope).
        untouched = [name for name, recording in drawn.items() if recording.is_incomplete()]
        if untouched:
            for name, value in parameters_as_built(self._skeleton, untouched, seed).items():
                drawn[name] = Recording(value.shape, value)
        return drawn


def _outermost_list_elements(root: nn.Module) -> Iterator[str]:
    """Names of the elements of every ModuleList that lies in no other ModuleList."""
    outermost = ""
    for name, module in root.named_modules():
        if isinstance(module, nn.ModuleList) and not (outermost and name.startswith(outermost)):
            outermost = f"{name}."
            yield from (f"{name}.{index}" for index in range(len(module)))


def _path(root: nn.Module, name: str) -> Iterator[tuple[nn.Module, PreTrainedModel]]:
    """The modules from the root down to `name`, each with the innermost model around it."""
    module, model = root, root
    yield module, model
    for part in name.split(".") if name else ():
        module = getattr(module, part)
        model = module if isinstance(module, PreTrainedModel) else model
        yield module, model


def _initialise(module: nn.Module, model: PreTrainedModel) -> None:
    """PreTrainedModel.initialize_weights, for a part of a model."""
    for child in module.children():
        _initialise(child, child if isinstance(child, PreTrainedModel) else model)
    model._init_weights(module)


@contextmanager
def _recorded(root: nn.Module, names: Sequence[str], whole: Collection[str]) -> Iterator[dict[str, Recording]]:
    """The parameters `names` of `root` on the CPU, float32 and filled with NaN, while the context lasts.

    Those of `whole` are real, and what is not floating-point; of the others it is noted what is done to them.
    """
    on_meta = {name: root.get_parameter(name) for name in names}
    recordings: dict[str, Recording] = {}
    for name, parameter in on_meta.items():
        real = None
        if not parameter.is_floating_point():
            real = torch.zeros(parameter.shape, dtype=parameter.dtype)
        elif name in whole:
            real = torch.full(parameter.shape, float("nan"))
        recordings[name] = Recording(parameter.shape, real)
        _put(root, name, nn.Parameter(recordings[name].tensor(), requires_grad=False))
    try:
        yield recordings
    finally:
        for name, parameter in on_meta.items():
            _put(root, name, parameter)


def _put(root: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, attribute = name.rpartition(".")
    root.get_submodule(owner)._parameters[attribute] = parameter
