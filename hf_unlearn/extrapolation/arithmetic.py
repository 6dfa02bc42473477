"""The one place where weights change: `W - alpha * s * B @ A` in fp32, cast once, and what the cast costs."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_unlearn.errors import UnlearningError


FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# A piece of a matrix in fp32 fits into the cache of a core; see `row_pieces` for the number of rows.
PIECE_ELEMENTS = 1 << 18
PIECE_ROWS = 64
# What is only copied needs no cache.
COPY_BYTES = 16 << 20
# More threads would wait for the one that writes.
MOST_THREADS = 4
# Below it squares of single elements may be lost in fp32.
SMALLEST_SQUARE = 1e-30


def check_alpha(alpha: float) -> float:
    """Return `alpha` as a float; refuse what is not a finite number above zero."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
        raise UnlearningError(f"`alpha` must be a finite number above 0, got {alpha!r}. The usual range is 0.5 to 8.")
    if alpha <= 0:
        reason = "would leave the model untouched" if alpha == 0 else "would make the model memorise more"
        raise UnlearningError(f"`alpha={alpha}` {reason}. Choose a number above 0; the usual range is 0.5 to 8.")
    return float(alpha)


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The output dtype named by `dtype`; refuse what is not a 16- to 64-bit float."""
    parsed = getattr(torch, str(dtype).removeprefix("torch."), None)
    if parsed not in FLOAT_DTYPES:
        raise UnlearningError(
            f"`dtype={dtype!r}` is no output dtype. Use 'float32', 'bfloat16' or 'float16', or leave it out to keep "
            "the base's; quantise the result afterwards if you need fewer bits."
        )
    return parsed


@dataclass
class TensorError:
    """
    The error of one tensor, as sums of squares over its elements.

    Args:
        squared_error (`float`, *optional*, defaults to `0.0`): Sum of squares of `realised - wanted`.
        squared_norm (`float`, *optional*, defaults to `0.0`): Sum of squares of `wanted`.
        changed (`bool`, *optional*, defaults to `False`): Whether any element changed.
    """

    squared_error: float = 0.0
    squared_norm: float = 0.0
    changed: bool = False

    @property
    def relative(self) -> float:
        """Relative error of the update of this tensor."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass
class RealisedError:
    """
    How far the stored weights are from the wanted ones, over all adapted tensors.

    A cast to 16 bits rounds small updates away: the error is `||realised - wanted||_F / ||wanted||_F` of the update,
    where `realised` is the stored weight minus the base weight.

    Args:
        tensors (`dict`, *optional*): Name of each tensor -> its `TensorError`.
    """

    tensors: dict[str, TensorError] = field(default_factory=dict)

    def count(self, name: str, part: TensorError) -> None:
        """Count the error of a piece of tensor `name`, or of all of it."""
        total = self.tensors.setdefault(name, TensorError())
        total.squared_error += part.squared_error
        total.squared_norm += part.squared_norm
        total.changed = total.changed or part.changed

    def add(self, name: str, realised: torch.Tensor, wanted: torch.Tensor, changed: bool) -> None:
        """
        Measure the error of a piece of tensor `name`, or of all of it, and count it.

        Args:
            name (`str`): Name of the tensor.
            realised (`torch.Tensor`): The update as it came out.
            wanted (`torch.Tensor`): The update that was asked for.
            changed (`bool`): Whether the stored weight is another than without the update.
        """
        self.count(name, TensorError(squared_norm(realised - wanted), squared_norm(wanted), changed))

    @property
    def relative(self) -> float:
        """Relative error of the whole update."""
        return TensorError(
            sum(total.squared_error for total in self.tensors.values()),
            sum(total.squared_norm for total in self.tensors.values()),
        ).relative

    @property
    def worst_tensor(self) -> str | None:
        """Name of the tensor with the largest relative error."""
        return max(self.tensors, key=lambda name: self.tensors[name].relative, default=None)

    @property
    def worst_relative(self) -> float:
        """Relative error of that tensor."""
        return max((total.relative for total in self.tensors.values()), default=0.0)

    @property
    def changed_tensors(self) -> int:
        """Number of tensors in which any element changed."""
        return sum(total.changed for total in self.tensors.values())

    def refuse_no_op(self, remedy: str) -> None:
        """Raise when not one weight changed."""
        if not self.changed_tensors:
            raise UnlearningError(
                "Not one weight changed: the adapter is untrained (every B is zero), or alpha * update is below the "
                f"resolution of the output dtype. {remedy}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The form in which the error is recorded in `unlearning.json`."""
        return {
            "relative": self.relative,
            "worst": {"tensor": self.worst_tensor, "relative": self.worst_relative},
        }


def squared_norm(tensor: torch.Tensor) -> float:
    """Sum of squares: rows in the dtype of `tensor`, their sum in fp64; all in fp64 where squares leave the range."""
    square = torch.linalg.vector_norm(tensor, dim=-1).double().square().sum().item()
    if SMALLEST_SQUARE < square < math.inf:
        return square
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item() ** 2


def lora_delta(lora_a: torch.Tensor, lora_b: torch.Tensor, scaling: float, fan_in_fan_out: bool) -> torch.Tensor:
    """
    `s * B @ A` in fp32, in the orientation of the base weight.

    Args:
        lora_a (`torch.Tensor` of shape `(rank, in_features)`): Factor A.
        lora_b (`torch.Tensor` of shape `(out_features, rank)`): Factor B.
        scaling (`float`): The trained scale s.
        fan_in_fan_out (`bool`): Whether the base weight is stored as `(in_features, out_features)`.
    """
    delta = (lora_b.float() * scaling) @ lora_a.float()
    return delta.t() if fan_in_fan_out else delta


def row_pieces(rows: int, columns: int) -> list[tuple[int, int]]:
    """
    First and last row (exclusive) of the pieces in which a matrix is worked on, each of about `PIECE_ELEMENTS`.

    Pieces have a multiple of `PIECE_ROWS` rows, and the last one no fewer than that: matrix products take other ways
    for few rows, and would round differently there than in the product of the whole.
    """
    step = max(PIECE_ROWS, PIECE_ELEMENTS // max(1, columns) // PIECE_ROWS * PIECE_ROWS)
    starts = list(range(0, max(1, rows - PIECE_ROWS + 1), step))
    return list(zip(starts, [*starts[1:], rows], strict=True))


def compute_threads() -> int:
    """Number of pieces to work on at a time: the cores of this process that torch's own threads leave free."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MOST_THREADS, cores // torch.get_num_threads()))


def extrapolate_weight(
    name: str,
    weight: torch.Tensor,
    delta: torch.Tensor,
    alpha: float,
    dtype: torch.dtype,
    errors: RealisedError,
) -> torch.Tensor:
    """
    `weight - alpha * delta`, computed in fp32 (fp64 for an fp64 weight) and cast once. `weight` stays as it is,
    `delta` is overwritten.

    Args:
        name (`str`): Name of the tensor, for messages and the error record.
        weight (`torch.Tensor`): The base weight, or some rows of it.
        delta (`torch.Tensor` of the shape of `weight`): The memorising update `s * B @ A`.
        alpha (`float`): The extrapolation factor.
        dtype (`torch.dtype`): The dtype of the result.
        errors (`RealisedError`): Where the rounding error of this tensor is counted.
    """
    if weight.shape != delta.shape:
        raise UnlearningError(
            f"The adapter's update of {name!r} has shape {tuple(delta.shape)}, the base weight {tuple(weight.shape)}. "
            "The adapter was trained on another base model: pass that one."
        )
    if weight.dtype not in FLOAT_DTYPES:
        raise UnlearningError(
            f"The base weight {name!r} is stored as {str(weight.dtype).removeprefix('torch.')}: a quantised weight "
            "cannot be changed in place. Merge into the 16- or 32-bit base with `extrapolate`, or save the forget "
            "adapter with `save_forget_adapter`."
        )
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    wanted = delta.to(exact.dtype).mul_(-alpha)
    total = exact + wanted
    result = total.to(dtype)
    # the memory of the sum is used again unless it is the result; operands of two dtypes would take the slow way
    realised = torch.sub(result, exact) if result is total else total.copy_(result).sub_(exact)
    part = TensorError(squared_norm(realised.sub_(wanted)), squared_norm(wanted))
    if not math.isfinite(part.squared_error):  # NaN and infinite values go on into the sum
        raise UnlearningError(
            f"{name!r} would hold NaN or infinite values as {str(dtype).removeprefix('torch.')} at alpha={alpha}. "
            "Use a smaller alpha or `dtype='float32'`; if it persists, the base checkpoint is damaged."
        )
    part.changed = any(not result[rows].equal(weight[rows].to(dtype)) for rows in (slice(1), slice(1, None)))
    errors.count(name, part)
    return result
