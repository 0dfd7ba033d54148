"""The recipe: a strict schema of what a run is. Every key has a default that is written out in the run's folder.

recipe_file.py reads YAML and key=value overrides into it and words the errors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from zinf_cli.checkpoint.folder import checkpoints_of
from zinf_cli.recipe.adapter import Adapter
from zinf_cli.recipe.batch import sequences_per_step
from zinf_cli.recipe.dataset import Dataset
from zinf_cli.recipe.values import (
    AbsolutePath,
    Number,
    Paths,
    Section,
    Size,
    Switch,
    reachable,
)

Tier = Literal["auto", "device", "cpu", "nvme"]


ADAPTER = "adapter_config.json"
MERGE_FIRST = "merge it into its model first (peft: model.merge_and_unload().save_pretrained(DIRECTORY))"


class Model(Section):
    """What is trained."""

    name_or_path: AbsolutePath | None = None
    """A Hugging Face checkpoint directory: config.json, safetensors, tokenizer; or a run's folder or checkpoint."""
    config: dict[str, Any] | None = None
    """Instead of name_or_path: a transformers config with its model_type; weights are drawn from the seed."""
    init: Literal["pretrained", "random"] | None = None
    """Where weights come from; pretrained for a directory, random for a config."""
    base_dtype: Literal["auto", "bf16", "int8", "nf4"] = "auto"
    """Under an adapter, how the model lies on its tier and travels; a visit unpacks it. auto: in the compute's dtype.
    int8 and nf4 (arXiv 2305.14314) are of weights of linear layers and experts, without the head. All round."""

    @field_validator("name_or_path")
    @classmethod
    def _is_checkpoint(cls, path: Path | None) -> Path | None:
        if path is None:
            return None
        with reachable(path):
            if newest := checkpoints_of(path):
                return newest[0]
            there, adapter = ((path / name).is_file() for name in ("config.json", ADAPTER))
        if adapter:
            raise ValueError(
                f"{path} has an adapter ({ADAPTER}), which would not be read: {MERGE_FIRST}, or move the file away"
            )
        if not there:
            what = "no config.json in" if path.is_dir() else "no such directory:"
            raise ValueError(f"{what} {path}; download a model first: hf download ORG/NAME --local-dir DIRECTORY")
        return path

    @model_validator(mode="before")
    @classmethod
    def _fill_init(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("init") is None:
            return {**values, "init": "pretrained" if values.get("name_or_path") else "random"}
        return values

    @property
    def folder(self) -> Path:
        """`name_or_path`, where weights are not random."""
        assert self.name_or_path is not None
        return self.name_or_path

    @model_validator(mode="after")
    def _one_source(self) -> Model:
        if (self.name_or_path is None) == (self.config is None):
            raise ValueError("give either name_or_path (a checkpoint directory) or config (a transformers config)")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("config needs a model_type, e.g. model_type: llama")
        if self.config is not None and self.init == "pretrained":
            raise ValueError("init: pretrained needs name_or_path; a config has no weights")
        return self


class Train(Section):
    """How long, in what pieces, in what precision."""

    seq_len: Annotated[int, Field(ge=2)] = 1024
    """Tokens of a sequence."""
    objective: Literal["auto", "dpo", "classification", "embedding"] = "auto"
    """auto: the model's own loss; dpo: to prefer chosen answers to rejected ones (arXiv 2305.18290); classification:
    to tell the label of a text, by a new head if the model is no classifier yet; embedding: to bring a query's
    embedding near that of the text it belongs with, by the model without its head (InfoNCE, arXiv 1807.03748)."""
    dpo_beta: Annotated[Number, Field(gt=0)] = 0.1
    """Of dpo: how much a model that departs from what it was is held back."""
    pooling: Literal["auto", "mean", "cls", "lasttoken"] = "auto"
    """Of embedding: which of a text's tokens are its embedding, in sentence-transformers' words. auto: as the model's
    1_Pooling/config.json says, or else the last token of a causal model and the mean of any other."""
    temperature: Annotated[Number, Field(gt=0)] = 0.05
    """Of embedding: cosines are divided by it; 0.05 is sentence-transformers' scale of 20."""
    num_negatives: Annotated[int, Field(ge=0)] = 0
    """Of embedding: how many of its row's negatives a query is compared with, the first ones. Beside them it is
    compared with all texts of the other rows of its micro-batch, and with those of no other micro-batch."""
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Sequences a rank computes at once; of dpo, pairs of them; of embedding, rows of a query and its texts."""
    global_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Sequences of a step, over all ranks; or give gradient_accumulation_steps."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] | None = None
    """Micro-batches of a step on each rank, where global_batch_size is not given; 1 by default."""
    micro_batches_per_sweep: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """How many micro-batches pass the model together; more need more memory for activations, less traffic."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Updates; or give epochs."""
    epochs: Annotated[Number, Field(gt=0)] | None = None
    """Passes over the text, where max_steps is not given; 1 by default."""
    eval_interval: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations; always before the first step and after the last where there is held-out text."""
    early_stopping_patience: Annotated[int, Field(ge=1)] | None = None
    """After so many evaluations in a row without a lower held-out loss, the run ends."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Of the compute; master weights and gradients are fp32. auto: bf16 on CUDA, fp32 on a CPU."""
    max_grad_norm: Annotated[Number, Field(gt=0)] | None = 1.0
    """Clip the global gradient norm; null: do not clip."""
    non_finite: Literal["stop", "skip"] = "stop"
    """What a loss or gradient that is NaN or infinite does: end the run, or skip the update (ten in a row end it)."""
    deterministic: bool = False
    """For accelerators: only kernels that give the same bits each time, which may be slower."""

    @model_validator(mode="after")
    def _one_length(self) -> Train:
        if self.max_steps is not None and self.epochs is not None:
            raise ValueError("give either max_steps or epochs, and null for the other")
        return self

    @model_validator(mode="after")
    def _compares(self) -> Train:
        """Of embedding: a query has something to be compared with, in micro-batches that are alike."""
        micro, sequences = self.micro_batch_size, self.global_batch_size
        if self.objective != "embedding":
            return self
        if micro == 1 and not self.num_negatives:
            raise ValueError(
                "embedding compares a query with the texts of its micro-batch, and has none but its own: raise "
                "micro_batch_size, or num_negatives"
            )
        if sequences is not None and sequences % micro:
            raise ValueError(
                f"global_batch_size {sequences} is no multiple of micro_batch_size {micro}, and embedding compares the "
                "rows of whole micro-batches"
            )
        return self

    @property
    def sequences_at_once(self) -> int:
        """The sequences of a micro-batch."""
        of_each = {"dpo": 2, "embedding": 2 + self.num_negatives}
        return self.micro_batch_size * of_each.get(self.objective, 1)

    def sequences_per_step(self, world_size: int) -> int:
        """The global batch of `world_size` ranks. Errors are those of batch.py."""
        return sequences_per_step(
            self.micro_batch_size, self.gradient_accumulation_steps, self.global_batch_size, world_size
        )


_OWN: dict[str, dict[str, Any]] = {
    "adamw": {"betas": (0.9, 0.999)},
    "sgd": {"momentum": 0.9},
    "lion": {"betas": (0.9, 0.99)},
    "muon": {"momentum": 0.95, "betas": (0.9, 0.999)},
    "adafactor": {},
}
"""The keys that only some optimizers have, with their defaults."""


class Optimizer(Section):
    """adamw, sgd, muon and adafactor are torch.optim's, bit for bit; lion is that of arXiv 2302.06675."""

    name: Literal["adamw", "sgd", "lion", "muon", "adafactor"] = "adamw"
    """sgd has momentum. lion wants a lr three to ten times smaller than adamw, and as much more weight_decay. muon is
    for the matrices of layers, with adamw beside it for all else; its steps have the size of adamw's
    (match_rms_adamw), so both have one lr. adafactor keeps a value for each row and column of a matrix, and no moments;
    its lr is relative to a parameter's size, such as 0.01. These two need whole matrices: one rank."""
    lr: Annotated[Number, Field(ge=0)] = 5e-5
    """Peak learning rate."""
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] | None = None
    """Decay of the moments: 0.9 and 0.999 for adamw (beside muon, too), 0.9 and 0.99 for lion; sgd has none."""
    momentum: Annotated[Number, Field(ge=0, lt=1)] | None = None
    """Of sgd, 0.9 by default, and of muon, 0.95; the others have betas."""
    eps: Annotated[Number, Field(gt=0)] = 1e-8
    """Added to adamw's denominator."""
    weight_decay: Annotated[Number, Field(ge=0)] = 0.01
    """Decoupled from the gradient, but for sgd's."""
    state_dtype: Literal["fp32", "bf16", "int8"] = "fp32"
    """Of stored moments. bf16 halves them, int8 leaves a quarter, and both change results: updates round them. In bf16
    the second moment of adamw never falls with a beta of 0.999; with 0.99 it does. In int8 it falls with its scale."""
    no_decay: tuple[str, ...] = ()
    """Patterns of names of parameters without weight decay, such as '*norm*' and '*.bias'."""

    @model_validator(mode="before")
    @classmethod
    def _its_own(cls, values: Any) -> Any:
        """With the default of what its name has, and without what another one has."""
        if not isinstance(values, dict):
            return values
        name = values.get("name", "adamw")
        own = _OWN.get(name)
        if own is None:
            return values
        for key in ("betas", "momentum"):
            if key not in own and values.get(key) is not None:
                instead = f"; its key is {next(iter(own))}" if own else ""
                raise ValueError(f"{name} has no {key}{instead}")
        if name == "adafactor" and values.get("state_dtype", "fp32") != "fp32":
            raise ValueError("adafactor keeps too little to round: leave optimizer.state_dtype out")
        return {**values, **{key: default for key, default in own.items() if values.get(key) is None}}

    @field_validator("betas", "no_decay", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class LrScheduler(Section):
    """The learning rate over the steps, as transformers' get_*_schedule_with_warmup."""

    name: Literal["constant", "linear", "cosine", "wsd", "inverse_sqrt"] = "constant"
    """The shape after the warmup; wsd (warmup, stable, decay) stays at lr, and falls by a cosine at the end."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps from 0 to lr; wsd begins at its share min_lr_ratio."""
    decay_steps: Annotated[int, Field(ge=1)] | None = None
    """The last steps, in which wsd falls; by default a tenth of the run."""
    min_lr_ratio: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Where linear, cosine and wsd end, as a share of lr."""


class Offload(Section):
    """Where each class of state lies; the losses are the same wherever that is."""

    params: Tier = "auto"
    """The parameters, in the compute precision."""
    grads: Tier = "auto"
    """The gradients, fp32."""
    optimizer: Tier = "auto"
    """Moments, and what makes the master weights where the compute is 16-bit."""
    activations: Tier = "auto"
    """The inputs of units between forward and backward."""
    nvme_path: Paths | None = None
    """Folders on drives, striped; by default one in the run's folder."""
    cpu_memory: Size | None = None
    """Most CPU memory of a host the run may take, e.g. 48GiB."""
    device_memory: Size | None = None
    """Most memory of an accelerator."""
    nvme_space: Size | None = None
    """Most space on the drives of a host."""
    pin_memory: Switch = "auto"
    """Page-locked CPU buffers for an accelerator; auto: where the system allows."""
    verify: Switch = "auto"
    """on, off: compare what drives give with a checksum of what was written; auto: on with accelerators.
    Where the CPU computes, it would take a tenth of a step and more from it."""


class Checkpoint(Section):
    """Checkpoints of a run."""

    interval: Annotated[int, Field(ge=1)] | None = None
    """Steps between checkpoints, with one after the last step as well; null: none."""
    keep_latest_k: Annotated[int, Field(ge=1)] | None = None
    """Older ones are removed."""
    keep_best: bool = False
    """Keep the one with the lowest held-out loss as well; the link checkpoints/best leads to it."""
    resume: Literal["auto", "never"] | AbsolutePath = "auto"
    """auto: from the newest in the run's folder, if there is one; or from a path, of a checkpoint or another run."""


class Samples(Section):
    """What the model writes while it learns: before the first step, and with each evaluation."""

    prompts: tuple[str, ...] = ()
    """Texts to go on with; of chats, what the user says. The likeliest token is taken each time."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens that are written at most; each is a forward pass, for all prompts together."""

    @field_validator("prompts", mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value


class Logging(Section):
    """What is shown."""

    interval: Annotated[int, Field(ge=1)] = 1
    """Steps between lines (metrics.jsonl has every step)."""
    tensorboard: bool = True
    """Event files in the run's folder."""
    wandb: Annotated[str, Field(min_length=1)] | None = None
    """A project of Weights & Biases to send the run to (the extra `wandb`); its own variables hold, as WANDB_MODE."""
    mlflow: Annotated[str, Field(min_length=1)] | None = None
    """An experiment of MLflow to send the run to (the extra `mlflow`), where MLFLOW_TRACKING_URI says."""
    report: bool = True
    """report.html when the run ends, if the extra `report` is installed (`zinf report` writes it at any time)."""


class Profiler(Section):
    """The timeline of a run, trace.json."""

    enabled: bool = False
    """Record it."""
    steps: Annotated[int, Field(ge=1)] | None = None
    """Only the first steps; null: all."""


class Launch(Section):
    """What a failure of a rank or a host does."""

    max_restarts: Annotated[int, Field(ge=0)] = 0
    """How often the run is started again, from its newest checkpoint or, without one, from the start."""
    min_hosts: Annotated[int, Field(ge=1)] | None = None
    """Fewest hosts to start again on, where some no longer answer; null: all of them."""


class Recipe(Section):
    """A run."""

    model: Model
    """What is trained."""
    adapter: Adapter = Adapter()
    """An adapter that is trained in the model's place."""
    dataset: Dataset
    """What it is trained on."""
    train: Train = Train()
    """How long, in what pieces, in what precision."""
    optimizer: Optimizer = Optimizer()
    """AdamW."""
    lr_scheduler: LrScheduler = LrScheduler()
    """The learning rate over the steps."""
    offload: Offload = Offload()
    """Where each class of state lies."""
    activation_checkpointing: Literal["unit", "none", "auto"] = "auto"
    """unit: recompute each unit in the backward pass; none: keep what it saves, or offload it with the other
    activations; auto: keep as many as the memory holds."""
    checkpoint: Checkpoint = Checkpoint()
    """Checkpoints of a run."""
    samples: Samples = Samples()
    """What the model writes while it learns."""
    logging: Logging = Logging()
    """What is shown."""
    profiler: Profiler = Profiler()
    """The timeline of a run."""
    launch: Launch = Launch()
    """What a failure does."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the weights (init: random), the order of the data, and dropout."""
    output_dir: AbsolutePath = Path("runs/run")
    """The run's folder; runs/NAME of the recipe's file by default."""

    @model_validator(mode="after")
    def _evaluates(self) -> Recipe:
        """With held-out text for what follows from its loss, and a loss of each checkpoint of which one is the best."""
        best, interval, saved = self.checkpoint.keep_best, self.train.eval_interval, self.checkpoint.interval
        wanted = {"checkpoint.keep_best": best, "train.early_stopping_patience": self.train.early_stopping_patience}
        for key in (key for key, value in wanted.items() if value):
            if self.dataset.eval_path is None and self.dataset.eval_fraction is None:
                raise ValueError(f"{key} needs held-out text: dataset.eval_path or dataset.eval_fraction")
            if interval is None:
                raise ValueError(f"{key} needs train.eval_interval")
        if best and (saved is None or interval is None or saved % interval):
            raise ValueError(
                "checkpoint.keep_best needs a checkpoint.interval that is a multiple of "
                f"train.eval_interval={interval}, got {'null' if saved is None else saved}"
            )
        return self

    @model_validator(mode="after")
    def _adapts_what_has_learned(self) -> Recipe:
        if self.adapter.type is not None and self.model.init == "random":
            raise ValueError("an adapter is for a model that has learned: model.name_or_path, with init: pretrained")
        if self.adapter.type is not None and self.optimizer.name in ("muon", "adafactor"):
            raise ValueError(
                f"optimizer.name: {self.optimizer.name} is for the matrices of a model; an adapter has adamw, sgd or "
                "lion"
            )
        if self.adapter.type is None and self.model.base_dtype != "auto":
            raise ValueError(
                f"model.base_dtype={self.model.base_dtype} is for a model that stays as it is: train an adapter "
                "(adapter.type=lora), or leave it out"
            )
        return self
