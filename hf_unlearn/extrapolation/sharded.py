"""
Saving from weights that are sharded over the processes (ZeRO-3, FSDP2): no process ever holds more of the base than one
whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import split_torch_state_dict_into_shards
from huggingface_hub.utils import tqdm
from peft import PeftModel
from peft.utils.integrations import gather_params_ctx
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.adapter import LoraAdapter
from hf_unlearn.extrapolation.arithmetic import RealisedError, check_alpha, extrapolate_weight, parse_dtype
from hf_unlearn.extrapolation.checkpoint import DTYPE_CODES, INDEX_FILE, WEIGHTS_FILE, atomic_folder, write_shard
from hf_unlearn.extrapolation.live import MAX_SHARD_SIZE, check_live_adapter
from hf_unlearn.extrapolation.model_config import set_config_dtype, write_json
from hf_unlearn.extrapolation.provenance import write_provenance


@torch.no_grad()
def save_sharded_forget_model(
    model: PeftModel,
    alpha: float,
    output_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase,
    adapter: LoraAdapter | None,
    dtype: str | None = None,
    overwrite: bool = False,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    progress: bool = True,
) -> Path:
    """
    Write theta_for of a sharded live model as a transformers checkpoint. Every process has to call it.

    The first process names one tensor after the other; all gather it, the first computes and writes it, the others drop
    it. The arithmetic runs on the CPU, as that of [`extrapolate`] does. When the first process fails, all raise.

    Args:
        model (`peft.PeftModel`): The model with its memorising adapter, without the wrapper of the engine.
        alpha (`float`): The extrapolation factor, above 0.
        output_dir (`str` or `Path`): The folder to write; it appears only once it is complete.
        tokenizer (`PreTrainedTokenizerBase`): Saved beside the weights.
        adapter (`LoraAdapter`, *optional*): The same adapter as saved; only the first process needs it.
        dtype (`str`, *optional*): Output dtype of the floating-point weights; that of the live ones if not given.
        overwrite (`bool`, *optional*, defaults to `False`): Replace `output_dir` if it is not empty.
        max_shard_size (`int` or `str`, *optional*, defaults to `"50GB"`): Largest size of a file, as in
            `save_pretrained`.
        progress (`bool`, *optional*, defaults to `True`): Show a progress bar over the bytes.

    Returns:
        `Path`: The folder written.
    """
    alpha = check_alpha(alpha)
    target = None if dtype is None else parse_dtype(dtype)
    check_live_adapter(model)
    tensors = _base_tensors(model)
    with failing_together():
        if dist.get_rank() > 0:
            while (name := _from_first(None)) is not None:
                with gathered(tensors[name]):
                    pass
            return Path(output_dir)
        try:
            writer = _Writer(model.get_base_model(), tensors, adapter, alpha, target, progress)
            with atomic_folder(output_dir, overwrite) as folder:
                writer.write(folder, tokenizer, max_shard_size)
        finally:
            _from_first(None)
    return Path(output_dir)


@contextmanager
def gathered(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The whole of a sharded tensor, for the time of the context. Every process has to enter it."""
    if isinstance(tensor, DTensor):
        yield tensor.to(tensor.device_mesh.device_type).full_tensor()  # with CPU offload the shards are elsewhere
        return
    with gather_params_ctx(tensor, modifier_rank=None):
        yield tensor.data


@torch.no_grad()
def whole_adapter(model: PeftModel) -> dict[str, torch.Tensor]:
    """The trained parameters of a sharded model, whole and on the CPU. Every process has to call it."""
    adapter = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter) as whole:
                adapter[name] = whole.detach().to("cpu", copy=True)
    return adapter


@contextmanager
def failing_together() -> Iterator[None]:
    """
    Raise on every process what the first one raises within this context, so that none waits for another in vain. Every
    process has to enter and leave it; a single process raises what it raises.
    """
    if not dist.is_initialized():
        yield
        return
    failure = reason = None
    try:
        yield
    except Exception as error:
        failure = error
        reason = str(error) if isinstance(error, UnlearningError) else f"The main process failed: {error!r}"
    reason = _from_first(reason)
    if reason is not None:
        raise UnlearningError(reason) from failure
    if failure is not None:
        raise failure


class _Writer:
    """What the first process does: names the tensors, computes and writes them."""

    def __init__(
        self,
        base: PreTrainedModel,
        tensors: dict[str, torch.Tensor],
        adapter: LoraAdapter,
        alpha: float,
        dtype: torch.dtype | None,
        progress: bool,
    ) -> None:
        self.base = base
        self.tensors = tensors
        self.adapter = adapter
        self.alpha = alpha
        self.errors = RealisedError()
        self.layout = _file_layout(base, tensors, dtype)
        self.adapted = {f"{module}.weight": module for module in adapter.modules}
        missing = [module for name, module in self.adapted.items() if name not in self.layout]
        if missing:
            raise UnlearningError(
                f"The adapter's module {missing[0]!r} has no weight of its own in the sharded model. Save the adapter "
                "and merge it from files: `hf-unlearn extrapolate`."
            )
        self.bytes_done = tqdm(
            total=sum(map(_nbytes, self.layout.values())),
            unit="B",
            unit_scale=True,
            desc="Extrapolating",
            disable=not progress,
        )

    def write(self, folder: Path, tokenizer: PreTrainedTokenizerBase, max_shard_size: int | str) -> None:
        """Write the whole model folder."""
        self.base.save_pretrained(folder, state_dict={})  # everything but weights, of which it would remove the shards
        pattern = WEIGHTS_FILE.replace(".safetensors", "{suffix}.safetensors")
        split = split_torch_state_dict_into_shards(
            self.layout, filename_pattern=pattern, max_shard_size=max_shard_size
        )
        with self.bytes_done:
            for file, names in split.filename_to_tensors.items():
                layout = {name: self.layout[name] for name in names}
                entries = [
                    (name, DTYPE_CODES[tensor.dtype], tuple(tensor.shape), _nbytes(tensor))
                    for name, tensor in layout.items()
                ]
                write_shard(folder / file, entries, self._result)
        self.errors.refuse_no_op("Train the adapter for longer, choose a larger alpha, or pass `dtype='float32'`.")
        if split.is_sharded:
            write_json(folder / INDEX_FILE, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
        written = next(tensor.dtype for tensor in self.layout.values() if tensor.is_floating_point())
        set_config_dtype(folder, written)
        tokenizer.save_pretrained(folder)
        base = self.adapter.provenance.get("base")
        write_provenance(
            folder, self.adapter.forget_provenance("forget-model", self.alpha, written, self.errors, base)
        )

    def _result(self, name: str) -> torch.Tensor:
        """Tensor `name` of the forget model, whole."""
        _from_first(name)
        with gathered(self.tensors[name]) as whole:
            weight = whole.detach().to("cpu", copy=True)
        dtype = self.layout[name].dtype
        self.bytes_done.update(_nbytes(self.layout[name]))
        if name not in self.adapted:
            return weight.to(dtype)
        delta = self.adapter.delta(self.adapted[name])
        return extrapolate_weight(name, weight, delta, self.alpha, dtype, self.errors)


def _base_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What the state dict of the base model holds under its own names, as the sharded parameters themselves."""
    state = model.get_base_model().state_dict(keep_vars=True)
    return {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if "lora_" not in name}


def _file_layout(
    base: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype | None
) -> dict[str, torch.Tensor]:
    """Names, shapes and dtypes of the tensors that `save_pretrained` would write, as tensors on the meta device."""
    ignored = base._keys_to_ignore_on_save or ()
    layout = {
        name: torch.empty(
            getattr(tensor, "ds_shape", tensor.shape),
            dtype=dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype,
            device="meta",
        )
        for name, tensor in tensors.items()
        if name not in ignored
    }
    layout = remove_tied_weights_from_state_dict(layout, base)
    converted = revert_weight_conversion(base, dict(layout))
    changed = [name for name, tensor in converted.items() if tensor is not layout.get(name)]
    if changed:
        raise UnlearningError(
            f"The files of a {type(base).__name__} hold {changed[0]!r}, which the live model has under another name or "
            "fused with others: it cannot be written one sharded tensor at a time. Save the adapter and merge it from "
            "files: `hf-unlearn extrapolate`."
        )
    return layout


def _from_first(content: str | None) -> str | None:
    """What the first process passes."""
    contents = [content]
    dist.broadcast_object_list(contents, src=0)
    return contents[0]


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize
