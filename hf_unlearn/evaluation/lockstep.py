"""Forward passes on weights that are sharded over the processes (ZeRO-3, FSDP2), where each pass takes all of them."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers import PreTrainedModel

from hf_unlearn.errors import UnlearningError
from hf_unlearn.evaluation.batching import process_state
from hf_unlearn.extrapolation.live import is_sharded
from hf_unlearn.lm_head import LMHead


DONE, WORKING, FAILED = range(3)


class Lockstep:
    """
    A context in which each process runs as many forward passes as its rows need, and all run the same number.

    Before each pass a process announces that it has work. One that leaves the context takes part in the others' passes,
    with a single token, until all are done. An error between two passes is announced too, so that no process waits for
    one that is gone; after an error within a pass, only the launcher can stop the others.

    The LM head is copied whole when the context is entered, so that nothing but a pass takes all processes.

    Args:
        model (`PreTrainedModel` or [`~peft.PeftModel`]): The model whose forward gathers the weights: the root of FSDP2,
            or what the DeepSpeed engine wraps.
        lm (`PreTrainedModel`): The causal LM in it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, lm: PreTrainedModel) -> None:
        self.model = model
        self.lm = lm
        self.device = process_state().device
        self._nothing = {"input_ids": self._number(0).view(1, 1), "attention_mask": self._number(1).view(1, 1)}

    @classmethod
    def of(cls, model: PreTrainedModel | PeftModel, lm: PreTrainedModel) -> Lockstep | None:
        """The lockstep that a model needs; `None` if its weights are not sharded."""
        modules = list(model.modules())
        if any(isinstance(module, FSDPModule) for module in modules) or any(
            hasattr(parameter, "ds_id") for parameter in model.parameters()
        ):
            return cls(model, lm)
        if is_sharded(model) or any(isinstance(module, FullyShardedDataParallel) for module in modules):
            raise UnlearningError(
                "Evaluation is not possible with weights sharded by FSDP of version 1 or by tensor parallelism. Shard "
                "them by ZeRO-3 or FSDP2 (`fsdp_version: 2` in the configuration of accelerate)."
            )
        return None

    def run(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Last hidden states, shape `(B, T, H)`, of the backbone's `inputs`."""
        self._announce(WORKING)
        return self._pass(inputs)

    def __enter__(self) -> Lockstep:
        self._is_in_step = True
        self.head = self._read_head()
        self._own_forward = self.lm.__dict__.get("forward")
        self.lm.forward = self._backbone  # the model's forward, hooks and all, then leaves the vocabulary out
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                while self._announce(DONE) != DONE:
                    self._pass(self._nothing)
            elif self._is_in_step and isinstance(error, Exception):
                self._announce(FAILED)
        finally:
            del self.head, self.lm.forward
            if self._own_forward is not None:
                self.lm.forward = self._own_forward

    def _pass(self, inputs: dict[str, Any]) -> torch.Tensor:
        self._is_in_step = False
        hidden = self.model(**inputs)
        self._is_in_step = True
        return hidden

    def _announce(self, status: int) -> int:
        """Tell the others, and learn the largest status of all."""
        largest = self._number(status)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        if largest == FAILED and status != FAILED:
            self._is_in_step = False
            raise UnlearningError("The evaluation has failed in another process: see its error.")
        return int(largest)

    def _backbone(self, **inputs: Any) -> torch.Tensor:
        return self.lm.base_model(**inputs).last_hidden_state

    def _read_head(self) -> LMHead:
        """A copy of the head, made at the moment in a forward pass when it is whole."""
        copies = []
        handle = self.lm.get_output_embeddings().register_forward_pre_hook(
            lambda module, args: copies.append(LMHead.of(self.lm).copy())
        )
        try:
            self._pass(self._nothing)
        finally:
            handle.remove()
        return copies[0]

    def _number(self, value: int) -> torch.Tensor:
        return torch.tensor(value, device=self.device)
