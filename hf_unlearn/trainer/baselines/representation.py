"""RMU: the activations of one layer are steered away on the forget rows and held on the retain rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_unlearn.errors import UnlearningError, explaining
from hf_unlearn.lm_head import LMHead
from hf_unlearn.losses import squared_distance
from hf_unlearn.trainer.baselines.base import BaselineConfig
from hf_unlearn.trainer.baselines.distillation import VocabularyLossTrainer
from hf_unlearn.trainer.batch import Reference


ADAPTED_LAYERS = 3  # the steered layer and those right before it


@dataclass
class RMUConfig(BaselineConfig):
    """
    Configuration of [`RMUTrainer`].

    Args:
        rmu_layer (`int`, *optional*):
            Layer ℓ whose output is steered, from 0. If not set, at a quarter of the depth: the paper's 7 of the 32
            layers of a 7B model.
        rmu_steering (`float`, *optional*, defaults to `6.5`):
            Length c of the control vector, the paper's for Zephyr-7B. It depends on the size of the activations: the
            forget rows have to get there.
        rmu_retain_weight (`float`, *optional*, defaults to `1200.0`):
            Weight α of the squared distance to the reference's activations on the retain rows.
        retain_nll_weight (`float`, *optional*, defaults to `0.0`):
            Not used by this method.

        > Options shared by the baselines, see [`BaselineConfig`]
    """

    rmu_layer: int | None = field(
        default=None,
        metadata={
            "help": "Layer ℓ whose output is steered, from 0. If not set, at a quarter of the depth: the paper's 7 of "
            "the 32 layers of a 7B model."
        },
    )
    rmu_steering: float = field(
        default=6.5,
        metadata={
            "help": "Length c of the control vector, the paper's for Zephyr-7B. It depends on the size of the "
            "activations: the forget rows have to get there."
        },
    )
    rmu_retain_weight: float = field(
        default=1200.0,
        metadata={"help": "Weight α of the squared distance to the reference's activations on the retain rows."},
    )
    retain_nll_weight: float = field(default=0.0, metadata={"help": "Not used by this method."})

    positive = ("forget_weight", "rmu_steering")
    not_negative = ("rmu_retain_weight",)

    def _check_values(self) -> None:
        super()._check_values()
        for name in ("retain_kl_weight", "retain_nll_weight"):
            if getattr(self, name):
                raise UnlearningError(
                    f"{name}={getattr(self, name)} has no effect: RMU sees activations, not distributions. Use "
                    "rmu_retain_weight."
                )

    @property
    def uses_retain(self) -> bool:
        return self.rmu_retain_weight > 0

    @property
    def needs_retain_reference(self) -> bool:
        return self.uses_retain

    def layer_of(self, config: PretrainedConfig) -> int:
        """The layer ℓ of a model."""
        depth = config.get_text_config().num_hidden_layers
        layer = max(depth // 4 - 1, 0) if self.rmu_layer is None else self.rmu_layer
        if not 0 <= layer < depth:
            raise UnlearningError(f"rmu_layer={layer} is not possible: the model has the layers 0 to {depth - 1}.")
        return layer


class RMUTrainer(VocabularyLossTrainer):
    """
    Representation misdirection (arXiv 2403.03218): at layer ℓ, on the positions that predict the forget answers, the
    activations go to c·u, a fixed random direction u; on those that predict the retain answers they stay what the
    reference's are.

    Only layers ℓ − 2 to ℓ are trained, by an adapter on their linear layers or, with `train_all_weights`, themselves. A
    `peft_config` that names modules is used as it is; one with `target_modules="all-linear"` is narrowed to these.
    """

    _name = "RMU"
    method = "rmu"
    config_class = RMUConfig

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        config = self.base_model.config
        layer = self.args.layer_of(config)
        generator = torch.Generator().manual_seed(self.args.seed)
        direction = torch.rand(config.get_text_config().hidden_size, generator=generator)
        self.control_vector = self.args.rmu_steering * direction / direction.norm()
        self._layer_output: torch.Tensor | None = None
        for model in (self.base_model, self._frozen_copy):
            if model is not None:
                _layers(model)[layer].register_forward_hook(self._keep_output)
        if self.args.train_all_weights:
            trained = {id(p) for module in _trained_layers(self.base_model, layer) for p in module.parameters()}
            for parameter in self.base_model.parameters():
                parameter.requires_grad_(id(parameter) in trained)

    def _checked_peft_config(self, model, peft_config, args, quantization_config) -> LoraConfig | None:
        config = super()._checked_peft_config(model, peft_config, args, quantization_config)
        if config is not None and config.target_modules == "all-linear":
            config = copy.deepcopy(config)
            config.target_modules = _linear_modules(model, args)
        return config

    def _keep_output(self, module: nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> None:
        self._layer_output = output[0] if isinstance(output, tuple) else output

    def activations(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._layer_output

    def score_forget(
        self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor, reference: Reference | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return squared_distance(hidden, self.control_vector.to(hidden.device)), None

    @property
    def retain_weights(self) -> dict[str, float]:
        return {"retain_distance": self.args.rmu_retain_weight}

    def score_retain(
        self, head: LMHead, hidden: torch.Tensor, targets: torch.Tensor, reference: Reference | None
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor | None]:
        return {"retain_distance": squared_distance(hidden, reference.retain_hidden)}, None


def _layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers."""
    depth = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UnlearningError(f"RMU finds no list of {depth} layers in a {type(model).__name__}. Use another method.")


def _trained_layers(model: PreTrainedModel, layer: int) -> list[nn.Module]:
    return list(_layers(model))[max(layer - ADAPTED_LAYERS + 1, 0) : layer + 1]


def _linear_modules(model: str | PreTrainedModel, args: RMUConfig) -> list[str]:
    """Full names of the linear layers in those layers that RMU trains."""
    if isinstance(model, str):
        options = {"revision": (args.model_init_kwargs or {}).get("revision")}
        with explaining(f"The model {model} has no configuration that can be read", "Check its folder or name."):
            config = AutoConfig.from_pretrained(model, trust_remote_code=args.trust_remote_code, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=args.trust_remote_code)
    trained = {id(m) for part in _trained_layers(model, args.layer_of(model.config)) for m in part.modules()}
    linear = (nn.Linear, Conv1D)
    return [name for name, m in model.named_modules() if id(m) in trained and isinstance(m, linear)]
