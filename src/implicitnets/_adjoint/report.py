from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import lineax as lx
import optimistix as optx
from jaxtyping import Array, Bool, Float, Scalar

from .._internal.checks import check_part, Part
from .._internal.results import promote


_Adjoint = TypeVar("_Adjoint", bound=optx.AbstractAdjoint)

_NAMES = (
    "successful",
    "max_steps_reached",
    "singular",
    "breakdown",
    "stagnation",
    "conlim",
    "nonfinite_input",
    "not_reversible",
)


class ADJOINT_RESULTS(lx.RESULTS):  # pyright: ignore[reportGeneralTypeIssues]
    """How a backward pass ended: an item of `lineax.RESULTS`, or `not_reversible`."""

    not_reversible = (
        "The states that a reversible solve went through could not be reconstructed "
        "from its final ones, since rounding errors grow in every step. The "
        "fallback was used. Try fewer steps, more damping or more precision."
    )


class AdjointReport(eqx.Module):
    """What happened in a backward pass: the gradient with respect to a probe.

    `jax.grad` returns gradients and nothing else, so the report is one. Zeros go into
    the layer, and what comes out as their gradient is the report:

    ```python
    def loss(params, probe):
        z = deq(x, probe=probe)
        ...

    grads, report = jax.grad(loss, argnums=(0, 1))(params, inn.AdjointReport.probe())
    ```

    That needs no callback and works under `jit` and `vmap`. Map over a probe of shape
    `(batch,)` to get a report for every example. A probe that all examples share gets
    the sum of their reports, which tells whether all were successful; so does a probe
    that two solves share. A report costs one product, for the residual. Without a probe
    there is no cost.

    In second derivatives, the derivative of the report is the report on the second
    linear solve.

    **Attributes:**

    - `num_steps`: the steps of the linear solver, as it counts them (Jacobian products
        for the linear solvers of this library); zero for a solver that counts none,
        such as a direct one.
    - `residual`: the two-norm of the linear system's residual relative to that of the
        right-hand side, for the solution that was used, which may be the fallback's.
    - `result`: the number of the linear solver's result, 0 for success; see `status`.
        Any other number means that the adjoint's fallback, if it has one, was used.
    """

    num_steps: Float[Array, "*batch"]
    residual: Float[Array, "*batch"]
    result: Float[Array, "*batch"]

    @classmethod
    def probe(cls, shape: tuple[int, ...] = ()) -> "AdjointReport":
        """Zeros, to differentiate with respect to.

        **Arguments:**

        - `shape`: the batch axes, if any.

        **Returns:**

        A report of zeros.
        """
        return cls(jnp.zeros(shape), jnp.zeros(shape), jnp.zeros(shape))

    @property
    def successful(self) -> Bool[Array, "..."]:
        """Whether the adjoint did what was asked of it."""
        return self.result == 0

    @property
    def status(self) -> Any:
        """The result as an enumeration item, whose `repr` is a message.

        An item of `lineax.RESULTS`, or `not_reversible`. Meaningless for a sum of
        reports.
        """

        def as_item(result):
            item: Any = ADJOINT_RESULTS.successful
            for number, name in enumerate(_NAMES):
                other = getattr(ADJOINT_RESULTS, name)
                item = ADJOINT_RESULTS.where(result == number, other, item)
            return item

        for _ in range(self.result.ndim):
            as_item = jax.vmap(as_item)
        return as_item(self.result)


PROBE = Part(
    "an `implicitnets.AdjointReport`, such as `implicitnets.AdjointReport.probe()`",
    AdjointReport,
)


def result_number(result: lx.RESULTS | ADJOINT_RESULTS) -> Scalar:
    """What `AdjointReport.result` has for a result."""
    if isinstance(result, lx.RESULTS):
        result = promote(result, ADJOINT_RESULTS)
    return jnp.stack(
        [
            jnp.where(result == getattr(ADJOINT_RESULTS, name), float(number), 0.0)
            for number, name in enumerate(_NAMES)
        ]
    ).sum()


class AbstractReportingAdjoint(optx.AbstractAdjoint):
    """An adjoint that reports on its backward pass.

    **Attributes:**

    - `probe`: what to report to; `None` for no report.
    """

    probe: eqx.AbstractVar[AdjointReport | None]

    def __check_init__(self):
        check_part(self, "probe", self.probe, PROBE, optional=True)


def with_probe(adjoint: _Adjoint, probe: AdjointReport) -> _Adjoint:
    """The adjoint, reporting to a probe; a `TypeError` if it has nothing to report."""
    if not isinstance(adjoint, AbstractReportingAdjoint):
        raise TypeError(
            "`probe` is for adjoints that report on their backward pass, such as "
            f"`implicitnets.ImplicitAdjoint`; got `{type(adjoint).__name__}`."
        )
    return eqx.tree_at(
        lambda a: a.probe, adjoint, probe, is_leaf=lambda leaf: leaf is None
    )
