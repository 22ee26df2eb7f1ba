"""What a backend is: a value that can say why it will not run, and otherwise runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from vicinal._tensors import check_packed
from vicinal.errors import InvalidProblem, Unsupported
from vicinal.hardware import Hardware
from vicinal.plan import Plan
from vicinal.problem import Problem
from vicinal.tiling import Tiling


class Inputs(NamedTuple):
    """The tensors of a problem, heads last; `None` where there are no additional keys, or no bias.

    Args:
        query: `[B, *S, H, D]`.
        key, value: `[B, *S, Hkv, D]` and `[B, *S, Hkv, Dv]`.
        additional_keys, additional_values: `[B, M, Hkv, D]` and `[B, M, Hkv, Dv]`.
        additional_lengths: integers `[B]`, how many of the `M` count.
        position_bias: `[H, 2 * k - 1, ...]`, added to scaled scores, maybe of 32 bits beside 16.

    Example:
        >>> import torch
        >>> print(Inputs(*torch.zeros(3, 1, 8, 12, 2, 16)).problem({"kernel_size": 3}))
        8x12 grid, window 3x3
    """

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    additional_lengths: Tensor | None = None
    position_bias: Tensor | None = None

    def problem(self, settings: dict[str, Any]) -> Problem:
        """What is asked of these tensors, or of whatever else was passed for them.

        Args:
            settings: arguments of `Problem.of`, by name.

        Raises:
            InvalidProblem: as `Problem.of`, which takes other libraries' arrays, too; here they are refused.
        """
        for name, given in self._asdict().items():
            if hasattr(given, "dtype") and not isinstance(given, Tensor):
                raise InvalidProblem(f"{name} must be a tensor, got {type(given).__name__}")
        return Problem.of(**self._asdict(), **settings)


def unpacked(query: Any, key: Tensor | None, value: Tensor | None, *extra: Tensor | None) -> Inputs:
    """The tensors of a call. Where it has no key and no value, its query is all three, `[B, *S, 3, H, D]`.

    Raises:
        InvalidProblem: if that has another shape.
    """
    if key is None or value is None:
        if not isinstance(query, Tensor):  # other libraries' arrays have shapes and dtypes, too
            raise InvalidProblem(f"qkv must be a tensor, got {type(query).__name__}")
        check_packed(query)
        query, key, value = query.detach().unbind(-3)  # those who call derive the whole
    return Inputs(query, key, value, *extra)


class Output(NamedTuple):
    """What attention gives.

    Args:
        out: `[B, *S, H, Dv]` in the dtype of the inputs.
        lse: `[B, *S, H]`, the natural log-sum-exp of the scaled scores, in float32 (float64 for float64).
    """

    out: Tensor
    lse: Tensor


class Gradients(NamedTuple):
    """One per tensor of `Inputs` that has a gradient, in its dtype; contiguous where nobody wanted it elsewhere.

    Args:
        query, key, value, additional_keys, additional_values, position_bias: each like the tensor of that name.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    additional_keys: Tensor | None = None
    additional_values: Tensor | None = None
    position_bias: Tensor | None = None

    def moved(self, into: Sequence[Tensor]) -> Gradients:
        """The same with those of query, key and value copied to where they are wanted, if that is anywhere."""
        if not into:
            return self
        query, key, value = into
        return self._replace(query=query.copy_(self.query), key=key.copy_(self.key), value=value.copy_(self.value))


def no_second_derivative(*_: Any) -> Any:
    """What stands where the derivative of `Backend.backward` would.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(
        "the second derivative of neighborhood attention is not offered; take the gradient without create_graph=True, "
        "or use neighborhood_scores and neighborhood_aggregate, which have derivatives of any order"
    )


class Backend(Protocol):
    """An implementation. Backends never import each other and never fall back on each other.

    `why_not` and `why_not_gradients` are pure and gather *all* reasons; an empty tuple means that
    `forward`, or `backward`, will run. Outputs are contiguous. Both must compute strided inputs right.

    Example:
        >>> import torch
        >>> from vicinal import Hardware, make_plan
        >>> from vicinal.backends import reference
        >>> inputs, here = Inputs(*torch.zeros(3, 1, 8, 12, 2, 16)), Hardware.named("cpu")
        >>> backend, problem = reference.backend, inputs.problem({"kernel_size": 3})
        >>> backend.why_not(problem, here)
        ()
        >>> output = backend.forward(make_plan(problem, next(iter(backend.tilings(problem, here)))), inputs)
        >>> output.lse[0, 0, 0, 0].exp().item()  # nine scores of 0
        9.0
        >>> gradients = backend.backward(make_plan(problem, Tiling((8, 12), (8, 12))), inputs, output, output.out, None)
        >>> gradients.query.shape
        torch.Size([1, 8, 12, 2, 16])
    """

    @property
    def name(self) -> str:
        """What a call may insist on."""
        ...

    def why_not(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Every reason, as a sentence part, why this backend will not run the problem there."""
        ...

    def why_not_gradients(self, problem: Problem, hardware: Hardware) -> tuple[str, ...]:
        """Every reason why `backward` will not run, where `why_not` has none."""
        ...

    def tilings(self, problem: Problem, hardware: Hardware) -> Iterable[Tiling]:
        """Tilings worth trying, the default first."""
        ...

    def forward(self, plan: Plan, inputs: Inputs) -> Output:
        """Attention under `plan`."""
        ...

    def backward(
        self,
        plan: Plan,
        inputs: Inputs,
        output: Output,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        into: Sequence[Tensor] = (),
    ) -> Gradients:
        """Gradients of a scalar whose gradients by `out` and `lse` are given.

        Those of query, key and value are written `into` three tensors like them, if given, whatever their strides;
        the bits are the same.
        """
        ...


@runtime_checkable
class Predicts(Protocol):
    """A backend with a cost model of its own, whose rates were measured on an H100."""

    def predicted_ms(self, plan: Plan) -> float:
        """Milliseconds that `forward` takes under `plan`."""
        ...
