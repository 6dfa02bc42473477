"""
What a training step will need, estimated from configurations alone: no weight is loaded.

The estimate counts tensors that the step holds at its peak. docs/hardware.md says how it compares with measurements.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.modeling_layers import GradientCheckpointingLayer

from hf_unlearn.errors import UnlearningError
from hf_unlearn.extrapolation.linearity import check_target_modules
from hf_unlearn.lm_head import TILE


# Tiles in fp32 at the worst moment: logits and log-probabilities, for the divergence those of the reference too.
HEAD_TILES = {"retain": 4, "forget": 2}
FOUR_BIT_BLOCK, NESTED_BLOCK = 64, 256  # weights that share a scale; scales that share one
# Of DeepSpeed where its configuration does not say.
REDUCE_BUCKET, LIVE_PARAMETERS, PERSISTENCE_THRESHOLD = 500_000_000, 1_000_000_000, 100_000


@dataclass(frozen=True)
class Launch:
    """
    How a run is spread over processes.

    Args:
        strategy (`str`, *optional*, defaults to `"none"`): `"none"`, `"ddp"`, `"zero1"`, `"zero2"`, `"zero3"` or
            `"fsdp2"`.
        processes (`int`, *optional*, defaults to `1`): Processes on all machines.
        on_cpu (`bool`, *optional*, defaults to `False`): Whether there is no accelerator.
        offload_parameters (`bool`, *optional*, defaults to `False`): Whether sharded weights wait in host memory.
        offload_optimizer (`bool`, *optional*, defaults to `False`): Whether the optimizer state is in host memory.
        reduce_bucket (`int`, *optional*): Gradient bucket of DeepSpeed in elements; the square of the hidden size if
            not given, as transformers fills in for `"auto"`.
        live_parameters (`int`, *optional*): Most parameters that ZeRO-3 holds gathered.
        persistence_threshold (`int`, *optional*): Elements up to which ZeRO-3 leaves a parameter whole; ten times the
            hidden size if not given, as for `"auto"`.
    """

    strategy: str = "none"
    processes: int = 1
    on_cpu: bool = False
    offload_parameters: bool = False
    offload_optimizer: bool = False
    reduce_bucket: int | None = None
    live_parameters: int = LIVE_PARAMETERS
    persistence_threshold: int | None = None

    @property
    def zero_stage(self) -> int:
        """Stage of DeepSpeed's ZeRO, 0 without."""
        return int(self.strategy[-1]) if self.strategy.startswith("zero") else 0

    @property
    def shards_weights(self) -> bool:
        """Whether a process holds a part of the base weights only."""
        return self.strategy in ("zero3", "fsdp2")

    def describe(self) -> str:
        """One line on it."""
        names = {"offload_parameters": "weights", "offload_optimizer": "optimizer"}
        moved = " and ".join(name for option, name in names.items() if getattr(self, option))
        strategy = "no sharding" if self.strategy == "none" else self.strategy
        count = "1 process" if self.processes == 1 else f"{self.processes} processes"
        return f"{strategy}, {count}" + (f", {moved} in host memory" if moved else "")

    @classmethod
    def from_accelerate_config(cls, path: str | Path) -> Launch:
        """
        Read a configuration of `accelerate launch`.

        Args:
            path (`str` or `Path`): The YAML file. A DeepSpeed file that it names is looked for from the working
                directory, as DeepSpeed does.
        """
        try:
            config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            kind = str(config.get("distributed_type", "NO"))
            options = {"processes": int(config.get("num_processes", 1)), "on_cpu": bool(config.get("use_cpu", False))}
        except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
            raise UnlearningError(
                f"--accelerate_config {path} is not a configuration of `accelerate launch`: {error}. Write one with "
                "`accelerate config`, or take one of recipes/accelerate."
            ) from error
        if kind == "DEEPSPEED":
            return cls(**options, **_deepspeed_options(config.get("deepspeed_config") or {}, path))
        if kind == "FSDP":
            fsdp = config.get("fsdp_config") or {}
            offload = bool(fsdp.get("fsdp_offload_params", False))
            return cls("fsdp2", **options, offload_parameters=offload, offload_optimizer=offload)
        return cls("none" if options["processes"] == 1 else "ddp", **options)


def _deepspeed_options(config: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Options of a [`Launch`] from the DeepSpeed section of a configuration or from the JSON file it names."""
    inline = {f"offload_{part}": {"device": config.get(f"offload_{part}_device", "none")} for part in _OFFLOADED}
    zero = {"stage": config.get("zero_stage", 2), **inline}
    if file := config.get("deepspeed_config_file"):
        try:
            zero = json.loads(Path(file).read_text(encoding="utf-8"))["zero_optimization"]
        except (OSError, ValueError, KeyError) as error:
            raise UnlearningError(
                f"deepspeed_config_file {file} of {path} cannot be read: {error!r}. Its path counts from the working "
                "directory, and it needs a `zero_optimization` section."
            ) from error
    stage = int(zero.get("stage", 0))
    sizes = {
        "reduce_bucket": zero.get("reduce_bucket_size", REDUCE_BUCKET),
        "persistence_threshold": zero.get("stage3_param_persistence_threshold", PERSISTENCE_THRESHOLD),
        "live_parameters": zero.get("stage3_max_live_parameters", LIVE_PARAMETERS),
    }
    return {
        "strategy": f"zero{stage}" if stage else "ddp",
        **{name: None if size == "auto" else int(size) for name, size in sizes.items()},
        **{
            option: (zero.get(f"offload_{part}") or {}).get("device", "none") != "none"
            for part, option in _OFFLOADED.items()
        },
    }


_OFFLOADED = {"param": "offload_parameters", "optimizer": "offload_optimizer"}  # DeepSpeed's name: ours


@dataclass(frozen=True)
class MemoryEstimate:
    """
    Peak memory of one process in bytes, without the interpreter, its libraries and the context of an accelerator.

    Args:
        base_parameters (`int`): Parameters of the base model.
        adapter_parameters (`int`): Parameters that are trained.
        weights (`int`): Base weights that the process holds all the time.
        gathered (`int`): Base weights that are whole for a moment: gathered from other processes, or expanded from 4 or
            8 bits.
        adapter (`int`): Adapter weights, gradients, optimizer state and gradient buckets.
        activations (`int`): What the forward of the layers keeps for the backward.
        workspace (`int`): What is needed besides at the worst moment: logits, or the backward of one layer (with
            gradient checkpointing, its activations too).
        host (`int`): Moved to host memory.
    """

    base_parameters: int
    adapter_parameters: int
    weights: int
    gathered: int
    adapter: int
    activations: int
    workspace: int
    host: int = 0

    @property
    def total(self) -> int:
        """All of it but `host`."""
        return self.weights + self.gathered + self.adapter + self.activations + self.workspace

    def describe(self) -> str:
        """The total and its parts, in one line."""
        parts = {
            "weights": self.weights,
            "gathered weights": self.gathered,
            "adapter and optimizer": self.adapter,
            "activations": self.activations,
            "workspace": self.workspace,
        }
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)
        host = f" and {self.host / 1e9:.2f} GB of host memory" if self.host else ""
        return f"{self.total / 1e9:.2f} GB ({listed}){host}"


def estimate_memory(
    config: PretrainedConfig,
    peft_config: LoraConfig,
    *,
    forget_rows: int,
    retain_rows: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    mixed_precision: bool = False,
    gradient_checkpointing: bool = True,
    bits: int | None = None,
    nested_quantization: bool = False,
    launch: Launch | None = None,
) -> MemoryEstimate:
    """
    Estimate the peak memory of a training step.

    The activations are those of a dense decoder with a gated MLP, such as Llama, Mistral and Qwen. They are counted
    with every position of every row scored and with an attention mask.

    Args:
        config ([`~transformers.PretrainedConfig`]): Configuration of the base model.
        peft_config ([`~peft.LoraConfig`]): Adapter to train.
        forget_rows, retain_rows (`int`): Rows of a micro-batch of one process.
        length (`int`): Their length in tokens.
        dtype (`torch.dtype`, *optional*, defaults to `torch.float32`): Dtype in which the base is loaded.
        mixed_precision (`bool`, *optional*, defaults to `False`): Whether products are in bf16 (or fp16).
        gradient_checkpointing (`bool`, *optional*, defaults to `True`): Whether activations are recomputed.
        bits (`int`, *optional*): 4 or 8 for a base quantised by bitsandbytes.
        nested_quantization (`bool`, *optional*, defaults to `False`): Whether the scales of 4-bit weights are quantised
            too.
        launch ([`Launch`], *optional*): How the run is spread over processes. Defaults to one process.
    """
    launch = launch or Launch()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        base_parameters = model.num_parameters()
        check_target_modules(model, peft_config)
        model = get_peft_model(model, peft_config)
    if mixed_precision and launch.zero_stage:
        dtype = torch.bfloat16  # DeepSpeed converts the whole model
    compute = torch.bfloat16 if mixed_precision else dtype
    whole, sharded, gathered = _base_bytes(model, dtype, compute, bits, nested_quantization, launch)
    adapter, adapter_on_host = _adapter_bytes(model, compute, mixed_precision, launch)
    counts = _StepCounts(model, forget_rows, retain_rows, length, dtype, compute, launch, bool(bits))
    kept = counts.checkpoints() if gradient_checkpointing else counts.num_layers * counts.layer()
    recomputed = counts.layer() if gradient_checkpointing else 0
    return MemoryEstimate(
        base_parameters=base_parameters,
        adapter_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights=whole if launch.offload_parameters else whole + sharded,
        gathered=gathered,
        adapter=adapter,
        activations=kept,
        workspace=max(counts.head(), recomputed + counts.layer_backward()),
        host=adapter_on_host + (sharded if launch.offload_parameters else 0),
    )


def _base_bytes(
    model: PeftModel, dtype: torch.dtype, compute: torch.dtype, bits: int | None, nested: bool, launch: Launch
) -> tuple[int, int, int]:
    """Base weights of a process that are not shared out, its part of those that are, and what is whole for a moment."""
    head = model.get_output_embeddings()
    linear = [module for module in _base_linears(model) if module is not head] if bits else []
    quantised = {id(module.weight) for module in linear}
    base = [p for p in model.parameters() if not p.requires_grad]
    plain = sum(p.numel() for p in base if id(p) not in quantised) * dtype.itemsize
    packed = sum(-(-module.weight.numel() * bits // 8) for module in linear)
    scales = sum(_scale_bytes(module, bits, nested) for module in linear)
    expanded = max((module.weight.numel() for module in linear), default=0) * compute.itemsize
    if not launch.shards_weights:
        return plain + packed + scales, 0, expanded
    layer = sum(p.numel() for p in _decoder_layer(model).parameters() if not p.requires_grad)
    if launch.strategy == "fsdp2":  # the next layer is gathered while one computes; packed weights are left out
        whole, shared, live = packed + scales, plain, 2 * layer * compute.itemsize
    else:  # what will be used again soon stays gathered; an element of packed weights is a byte; scales are no parameters
        width = 1 if bits else compute.itemsize
        whole, shared, live = scales, plain + packed, max(launch.live_parameters, layer) * width
    gathered = min(live, shared) + head.weight.numel() * compute.itemsize
    return whole, -(-shared // launch.processes), gathered + expanded


def _base_linears(model: nn.Module) -> list[nn.Linear]:
    """The linear layers of the base, those inside of LoRA layers included."""
    return [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]


def _scale_bytes(linear: nn.Linear, bits: int, nested: bool) -> int:
    """Bytes of the scales that bitsandbytes keeps beside a packed weight."""
    if bits == 8:
        return 4 * linear.out_features
    scales = -(-linear.weight.numel() // FOUR_BIT_BLOCK)
    return scales + 4 * -(-scales // NESTED_BLOCK) if nested else 4 * scales


def _adapter_bytes(model: PeftModel, compute: torch.dtype, mixed_precision: bool, launch: Launch) -> tuple[int, int]:
    """Adapter, gradients, AdamW state and buckets of a process, and what of them is in host memory."""
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    total = sum(sizes)
    shard = -(-total // launch.processes)
    if launch.strategy == "fsdp2":
        return (0, 16 * shard) if launch.offload_optimizer else (16 * shard, 0)
    if not launch.zero_stage:
        # fp32 weights, gradients and two moments; 16-bit copies kept by autocast; DDP's buckets
        return total * (16 + 2 * mixed_precision + 4 * (launch.strategy == "ddp")), 0
    hidden = model.config.get_text_config().hidden_size
    width = compute.itemsize
    whole = total
    if launch.zero_stage == 3:
        threshold = 10 * hidden if launch.persistence_threshold is None else launch.persistence_threshold
        whole = sum(n if n <= threshold else -(-n // launch.processes) for n in sizes)
    gradients = width * (total if launch.zero_stage == 1 else shard)
    optimizer = 12 * shard  # fp32 copy of the weights and two moments
    elements = hidden**2 if launch.reduce_bucket is None else launch.reduce_bucket
    bucket = elements * (4 if launch.zero_stage == 1 else width)  # ZeRO-1 reduces in fp32
    on_device = whole * width + gradients + bucket
    return (on_device, optimizer + 4 * shard) if launch.offload_optimizer else (on_device + optimizer, 0)


def _decoder_layer(model: nn.Module) -> nn.Module:
    return next(module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))


class _StepCounts:
    """
    Bytes of the activations of one step, one method a place. docs/hardware.md has the same in words.

    Args:
        model ([`~peft.PeftModel`]): The model with its adapter, on the meta device.
        forget_rows, retain_rows, length (`int`): The micro-batch.
        dtype, compute (`torch.dtype`): Dtype of the base weights and of the products.
        launch ([`Launch`]): How the run is spread over processes.
        quantised (`bool`): Whether the linear layers hold packed weights.
    """

    def __init__(
        self,
        model: PeftModel,
        forget_rows: int,
        retain_rows: int,
        length: int,
        dtype: torch.dtype,
        compute: torch.dtype,
        launch: Launch,
        quantised: bool,
    ) -> None:
        self.text = model.config.get_text_config()
        self.hidden = self.text.hidden_size
        self.intermediate = getattr(self.text, "intermediate_size", None) or 4 * self.hidden
        self.num_layers = self.text.num_hidden_layers
        self.length = length
        self.forget_tokens, self.retain_tokens = forget_rows * length, retain_rows * length
        self.tokens = self.forget_tokens + self.retain_tokens
        self.width = compute.itemsize
        self.residual_width = dtype.itemsize
        self.on_cpu = launch.on_cpu
        self.decoder_layer = _decoder_layer(model)
        self.adapted = [module for module in self.decoder_layer.modules() if isinstance(module, LoraLayer)]
        # Under DeepSpeed and FSDP the adapter is in the dtype of its input, so the input is neither cast nor copied.
        self.casts_inputs = compute != torch.float32 and launch.strategy in ("none", "ddp")
        self.casts_weights = self.casts_inputs and dtype == torch.float32 and not quantised

    def layer(self) -> int:
        """What one decoder layer keeps for its backward."""
        heads = self.text.num_attention_heads
        attention = heads * (getattr(self.text, "head_dim", None) or self.hidden // heads)
        norms = sum(p.numel() == self.hidden for name, p in self.decoder_layer.named_parameters() if "norm" in name)
        if self.casts_inputs:  # PEFT casts the input of each adapted layer to fp32, and autocast back
            inputs = sum(module.in_features for module in self.adapted)
        else:  # of query, key and value one, of gate and up one, of down; that of the output is kept by attention
            inputs = 2 * self.hidden + self.intermediate
        ranks = sum(rank for module in self.adapted for rank in module.r.values())
        vectors = 4 * attention + 3 * self.intermediate + inputs + ranks  # query, key, value, result; gate, SiLU, up
        vectors += self.length  # this token's row of the attention mask
        fp32 = norms * (self.hidden + 1) + heads  # inputs and scales of norms, log-sum-exp of attention
        cast_weights = 0
        if self.casts_weights:
            cast_weights = sum(linear.weight.numel() for linear in _base_linears(self.decoder_layer)) * self.width
        return self.tokens * (vectors * self.width + fp32 * 4) + cast_weights

    def layer_backward(self) -> int:
        """What the backward of one layer needs besides: two gradients of its widest input, and one of its result."""
        widest = max((module.in_features for module in self.adapted), default=self.hidden)
        if self.casts_inputs:  # the gradient from the adapter is in fp32 before it is rounded and added
            return self.tokens * (widest * (2 * self.width + 4) + self.hidden * 4)
        return self.tokens * (2 * widest + self.hidden) * self.width

    def checkpoints(self) -> int:
        """The inputs of the layers, from which gradient checkpointing computes the rest again."""
        return self.num_layers * self.tokens * self.hidden * self.residual_width

    def head(self) -> int:
        """
        What is there after the last layer: the input of the last norm, its result, the scored positions of it and those
        of the reference, the derivatives by them, and a few tiles of logits. All of it is freed before the backward of
        the layers.
        """
        vocabulary = self.text.vocab_size
        tile_rows = max(1, TILE // vocabulary)
        tokens = {"forget": self.forget_tokens, "retain": self.retain_tokens}
        tiles = max(HEAD_TILES[name] * 4 * min(count, tile_rows) * vocabulary for name, count in tokens.items())
        operand_width = 4 if self.on_cpu else self.width
        cast_weight = vocabulary * self.hidden * operand_width if operand_width != self.residual_width else 0
        vectors = self.tokens * (4 + 2 * self.width + 4) + self.retain_tokens * self.width
        return tiles + cast_weight + vectors * self.hidden
