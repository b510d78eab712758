"""Sparse training in transformers' Trainer.

    from sparse_kernels.trainer import SparsityCallback
    callback = SparsityCallback(model)      # first: layers become sparse, in place; an export keeps its zeros
    trainer = Trainer(model, args, train_dataset=rows, callbacks=[callback])
    trainer.train()                         # resume_from_checkpoint works as ever
    callback.save_pretrained(folder)        # dense weights with their zeros, PEFT's adapters

`Trainer.save_model`, checkpoints, and whatever `model.state_dict()` is used for have ordinary dense weights, too.
"""

from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_kernels import peft
from sparse_kernels.adapters import adapters_of, add_adapters
from sparse_kernels.convert import find_sparse_layers, sparsify
from sparse_kernels.layers import sparse_layers, update_backward_masks, update_masks
from sparse_kernels.sparse_linear import SparseLinear

_MASKS = "row_mask_bits"
_OWN = ("values", _MASKS, "backward_mask_bits", "backward_scale")
"""What a state_dict has of a sparse layer in place of its weight."""
_ADAPTER = ".adapter."


class SparsityCallback(TrainerCallback):  # type: ignore[misc]
    """Keeps a model N:M sparse in a Trainer, and adds low-rank adapters late in the training.

    The adapters join the optimizer beside the values of their layers, with the learning rate and the decay of these and
    a state of their own. A schedule that falls to 0 leaves adapters that join at its end nothing to learn with: let
    them join early enough, or choose a schedule with a minimum.

    One process for each GPU: there TrainingArguments need ddp_broadcast_buffers=False, and adapters that are to be
    there from the start (adapters_from=0), because DDP knows no parameters that come later. FSDP and DeepSpeed split
    weights in ways that sparse layers do not know, and are refused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        mask_update_interval: int = 1,
        adapter_rank: int | float = 0,
        adapters_from: int | float = 0.9,
        adapter_alpha: float | None = None,
        **how: Any,
    ) -> None:
        """Make a model's layers sparse, in place; call it before the Trainer is made.

        A model that has sparse layers, or weights with N:M zeros as an export does, keeps exactly those; its other
        layers stay dense. Any other model goes through `sparsify`.

        Args:
            mask_update_interval: optimizer steps between updates of the backward masks; 0: never.
            adapter_rank: a number, or a share of a layer's smaller side if below 1; 0: no adapters.
            adapters_from: the step that they join before, or its share of all steps if below 1.
            adapter_alpha: their scaling is alpha / rank; None for 1.
            how: arguments of `sparsify`, for a model that is not sparse yet.

        Raises:
            ValueError: as `sparsify` and `add_adapters`, or arguments for `sparsify` and a model that is sparse.
        """
        self.model, self.mask_update_interval = model, mask_update_interval
        self._rank, self._from, self._alpha = adapter_rank, adapters_from, adapter_alpha
        sparse = [name for name, _ in sparse_layers(model)] or find_sparse_layers(model)
        if sparse and how:
            raise ValueError(f"{sparse[0]} is sparse already, and sparse layers keep their zeros: leave out {min(how)}")
        if not sparse:
            sparsify(model, **how)
        if adapter_rank and not adapters_from:
            self._add()
        model.register_state_dict_post_hook(_write_dense)
        model.register_load_state_dict_pre_hook(self._read_dense)
        model.register_load_state_dict_post_hook(lambda *_: update_backward_masks(model))

    @property
    def _waits(self) -> bool:
        """Whether adapters are to join later."""
        return bool(self._rank) and not adapters_of(self.model)

    def _add(self) -> None:
        add_adapters(self.model, self._rank, alpha=self._alpha)

    def save_pretrained(self, folder: Path | str) -> None:
        """Write the model to a new folder: dense weights with their zeros, and adapters as PEFT's folder within it.

        `Trainer.save_model` writes adapters among the weights, where a training that resumes reads them, and
        `from_pretrained` lists and leaves out what it does not know.
        """
        weights = {name: tensor for name, tensor in self.model.state_dict().items() if _ADAPTER not in name}
        self.model.save_pretrained(folder, state_dict=weights)
        if adapters_of(self.model):
            peft.write(Path(folder) / peft.FOLDER, self.model)

    # ------------------------------------------------------------------------------------------------- the Trainer's

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Refuse what sparse layers cannot be trained with: ValueError."""
        if args.fsdp or args.deepspeed:
            raise ValueError("sparse layers are not split over processes here: leave out fsdp and deepspeed")
        if args.n_gpu > 1:
            raise ValueError("start one process for each GPU, with torchrun: several in one process are not supported")
        if args.world_size > 1 and args.ddp_broadcast_buffers is not False:
            raise ValueError("ddp_broadcast_buffers=False is missing: every process updates its masks alike")
        if args.world_size > 1 and self._waits:
            raise ValueError("with several processes adapters are there from the start: set adapters_from=0")

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: Any
    ) -> None:
        """As `on_init_end`, for a callback that was added later; ValueError also for another model."""
        self.on_init_end(args, state, control)
        if model is not self.model:
            raise ValueError("the Trainer's model is not the one that this SparsityCallback was made with")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, optimizer: Any, **_: Any
    ) -> None:
        """Let the adapters join, when it is time."""
        first = self._from if self._from >= 1 else round(self._from * state.max_steps)
        if self._waits and state.global_step >= first:
            self._add()
            _join(optimizer, self.model)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Choose the backward masks again, when it is time."""
        if self.mask_update_interval and state.global_step % self.mask_update_interval == 0:
            update_masks(self.model)

    # -------------------------------------------------------------------------------------------------- state_dicts

    def _read_dense(
        self, model: nn.Module, state: MutableMapping[str, Any], prefix: str, _local: Any, *lists: Any
    ) -> None:
        """Turn the dense weights of a state_dict into what sparse layers read, in place, adapters being there if it has
        some."""
        if self._waits and any(_ADAPTER in name for name in state):
            self._add()
        for name, layer in model.named_modules(remove_duplicate=False):
            if not isinstance(layer, SparseLinear):
                continue
            weight: Tensor | None = state.pop(f"{prefix}{name}.weight", None)
            if weight is None:
                continue
            weight_OI = weight.t() if layer.conv1d else weight
            if weight_OI[~layer.row_mask().to(weight.device)].any():
                lists[-1].append(f"{name}: the weight is not zero where the layer is; load it into a dense model")
            own = layer.kept(weight_OI), layer.row_mask_bits, layer.backward_mask_bits, layer.backward_scale
            named = zip(_OWN, own, strict=True)
            state.update({f"{prefix}{name}.{key}": tensor for key, tensor in named if tensor is not None})


def _write_dense(model: nn.Module, state: MutableMapping[str, Any], prefix: str, _local: Any) -> None:
    """Put dense weights in the place of what a state_dict has of sparse layers, in place."""
    for key in [key for key in state if key.startswith(prefix) and key.endswith(f".{_MASKS}")]:
        name = key.removesuffix(_MASKS)
        layer = model.get_submodule(name.removeprefix(prefix).removesuffix("."))
        assert isinstance(layer, SparseLinear)
        for own in _OWN:
            state.pop(f"{name}{own}", None)
        weight_OI = layer.scattered()
        state[f"{name}weight"] = weight_OI.t().contiguous() if layer.conv1d else weight_OI


def _join(optimizer: Any, model: nn.Module) -> None:
    """Put adapters into the optimizer's groups right after the values of their layers, where they are if the optimizer
    is made when they are there: so a checkpoint's state finds its parameters.

    Raises:
        ValueError: the optimizer does not train some layer's values.
    """
    places = {id(p): (group["params"], p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in sparse_layers(model):
        if layer.adapter is None:
            continue
        if id(layer.values) not in places:
            raise ValueError(f"{name} is not trained by the optimizer, and so its adapter cannot join: use PEFT's LoRA")
        params, values = places[id(layer.values)]
        at = next(index for index, p in enumerate(params) if p is values) + 1
        params[at:at] = layer.adapter.parameters()
