"""Everything that classes and functions refuse, and how they say so.

Nothing is compiled: what is wrong is refused when an object is made, or when tracing.
"""

import dataclasses

import diffrax as dfx
import equinox as eqx
import jax
import jax.numpy as jnp
import jax.random as jr
import jaxtyping
import lineax as lx
import numpy as np
import optimistix as optx
import pytest

import implicitnets as inn
from implicitnets import models, nn

from .helpers import dense_cell, make_vector


pytestmark = pytest.mark.one_precision


@pytest.fixture(autouse=True)
def no_type_checks():
    """Users have none, and they would speak first."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


KEY, X = jr.key(0), make_vector(4)
TOLERANCES = {"rtol": 1e-3, "atol": 1e-3}
MONOTONE_CELL = nn.MonotoneCell(6, 4, key=KEY)
CELL, LINEAR = dense_cell(), eqx.nn.Linear(4, 4, key=KEY)
ANDERSON, TSIT5 = inn.AndersonAcceleration(1e-3, 1e-3), dfx.Tsit5()
LAYERS = (inn.DeepEquilibriumNetwork, inn.SkipDeepEquilibriumNetwork, inn.NeuralODE)
SOLVERS = (
    inn.AndersonAcceleration,
    inn.AutoSolver,
    inn.Broyden,
    inn.ForwardBackward,
    inn.NewtonKrylov,
    inn.PeacemanRachford,
    inn.ReversibleFixedPoint,
    lambda **tolerances: inn.SteadyState(TSIT5, **tolerances),
)
MDEQ = models.MDEQConfig(channels=(4, 8), head_channels=(1, 2), groups=2)
TRANSFORMER = models.TransformerConfig(
    vocab_size=20, cutoffs=(6, 12), width=16, num_heads=2, head_width=4, inner_width=8
)
NOT_NUMBERS = (
    np.float32(-1),
    np.float32("nan"),
    float("nan"),
    float("inf"),
    np.float32("inf"),
    jnp.array(-1.0),
    jnp.array(jnp.nan),
    "1e-3",
    None,
    1j,
    np.ones(2),
    jnp.ones(1),
    True,
    np.True_,
    jnp.array(True),
)
INFINITY = float("inf")
NOT_INTEGERS = (0, np.int64(0), jnp.array(0), 2.5, "3", True, np.ones(2, int))


def anderson(**fields):
    return inn.AndersonAcceleration(**{**TOLERANCES, **fields})


def deq(**fields):
    return inn.DeepEquilibriumNetwork(CELL, **fields)


def node(**fields):
    return inn.NeuralODE(CELL, **fields)


def solve(cell, x, layer=inn.DeepEquilibriumNetwork, z0=None, **fields):
    return eqx.filter_eval_shape(lambda x: layer(cell, **fields)(x, z0=z0), x)


def trace(z0=X, solver=ANDERSON, max_steps=3):
    return inn.residual_trace(CELL, solver, z0, X, max_steps=max_steps)


def multiscale(
    function=inn.MultiScaleDeepEquilibriumNetwork,
    main=(LINEAR, LINEAR),
    mapping=((LINEAR, LINEAR), (LINEAR, LINEAR)),
    post_fuse=None,
    shapes=((4,), (4,)),
):
    return function(main, mapping, post_fuse, state_shapes=shapes)


def must_be(owner, field, allowed, value=""):
    return rf"^`{owner}\({field}=...\)` must be {allowed}.*; got .*{value}"


LEAST_1 = "an integer of at least 1"
POSITIVE = "a finite positive number"
NON_NEGATIVE = "a finite non-negative number"

# What to call, the type of the error, and what its message says.
CASES = (
    # Solvers.
    (lambda: inn.SolverChain(()), ValueError, "solvers=.*at least one solver"),
    (
        lambda: inn.SolverChain((ANDERSON, TSIT5)),
        TypeError,
        r"solvers=.*`implicitnets.SteadyState\(Tsit5\(...\)\)` makes one of it",
    ),
    (
        lambda: inn.SolverChain(ANDERSON),
        ValueError,
        "solvers=.*at least one solver",
    ),
    (
        lambda: inn.SolverChain((ANDERSON, optx.Bisection(1e-3, 1e-3))),
        TypeError,
        "needs bounds",
    ),
    (
        lambda: inn.SolverChain((ANDERSON, ANDERSON), limits=(3,)),
        ValueError,
        "limits=.*one for every solver",
    ),
    (
        lambda: inn.SolverChain((ANDERSON, ANDERSON), limits=(0, None)),
        ValueError,
        f"limits=.*{LEAST_1}.*; got 0",
    ),
    (
        lambda: inn.SolverChain((ANDERSON,), max_steps=0),
        ValueError,
        must_be("SolverChain", "max_steps", LEAST_1),
    ),
    (
        lambda: trace(solver=inn.AutoSolver(**TOLERANCES)),
        TypeError,
        "a chain has none of its own",
    ),
    *(
        (
            lambda s=s, n=n: s(**{**TOLERANCES, n: -1.0}),
            ValueError,
            f"{n}=.*{m}; got -1",
        )
        for s in SOLVERS
        for n, m in (("rtol", NON_NEGATIVE), ("atol", NON_NEGATIVE))
    ),
    *(
        (
            lambda s=s: s(**TOLERANCES, norm=None),
            TypeError,
            "norm=.*a function; got None",
        )
        for s in SOLVERS
    ),
    *(
        (
            lambda v=v: anderson(rtol=v),
            ValueError,
            must_be("AndersonAcceleration", "rtol", NON_NEGATIVE),
        )
        for v in NOT_NUMBERS
    ),
    *(
        (
            lambda v=v: anderson(history_size=v),
            ValueError,
            must_be("AndersonAcceleration", "history_size", LEAST_1),
        )
        for v in (*NOT_INTEGERS, None)
    ),
    (lambda: anderson(period=0), ValueError, f"period=.*{LEAST_1}; got 0"),
    (lambda: anderson(ridge=0.0), ValueError, f"ridge=.*{POSITIVE}; got 0.0"),
    (lambda: anderson(ridge=INFINITY), ValueError, f"ridge=.*{POSITIVE}; got inf"),
    (lambda: anderson(damping=1.0), ValueError, r"damping=.*\[-1, 1\); got 1.0"),
    *(
        (lambda n=n, v=v: inn.Broyden(**TOLERANCES, **{n: v}), ValueError, m)
        for n, v, m in (
            ("history_size", 0, f"history_size=.*{LEAST_1}; got 0"),
            ("patience", 0, f"patience=.*{LEAST_1}; got 0"),
            ("good_update", 1, "good_update=.*`True`, `False` or `None`; got 1"),
            ("line_search", None, "line_search=.*`True` or `False`; got None"),
        )
    ),
    *(
        (lambda s=s: s(1e-3, 1e-3, step_size=0.0), ValueError, "step_size=.*got 0.0")
        for s in (inn.ForwardBackward, inn.PeacemanRachford)
    ),
    *(
        (
            lambda v=v: inn.NewtonKrylov(1e-3, 0.0, forcing=v),
            ValueError,
            must_be("NewtonKrylov", "forcing", r"a number in the interval \(0, 1\)", v),
        )
        for v in (0.0, 1.0)
    ),
    (
        lambda: inn.NewtonKrylov(1e-3, 0.0, linear_solver=ANDERSON),
        TypeError,
        "linear_solver=.*`implicitnets.FixedPointLinearSolver",
    ),
    *(
        (
            lambda v=v: inn.ReversibleFixedPoint(1e-3, 1e-3, damping=v),
            ValueError,
            rf"damping=.*\(0, 1\); got {v}",
        )
        for v in (0.0, 1.0)
    ),
    (lambda: inn.PseudoTransient(safety=0.0), ValueError, f"{POSITIVE}; got 0.0"),
    (lambda: inn.PseudoTransient(factormin=1.0), ValueError, r"\(0, 1\); got 1.0"),
    (lambda: inn.PseudoTransient(factormax=1.0), ValueError, "larger than 1; got 1.0"),
    (lambda: inn.PseudoTransient(norm="two"), TypeError, "a function; got 'two'"),
    (lambda: inn.SteadyState(TSIT5, dt0=0.0), ValueError, f"dt0=.*{POSITIVE}; got 0.0"),
    (
        lambda: inn.SteadyState(dfx.Tsit5),
        TypeError,
        r"give an instance, `Tsit5\(...\)`",
    ),
    (lambda: inn.SteadyState("tsit5"), TypeError, "ode_solver=.*Diffrax.*got 'tsit5'"),
    (
        lambda: inn.SteadyState(dfx.KenCarp3()),
        TypeError,
        "single `ODETerm`.*KenCarp3",
    ),
    (
        lambda: inn.SteadyState(TSIT5, stepsize_controller=0.1),
        TypeError,
        "stepsize_controller=.*PIDController.*got 0.1",
    ),
    (
        lambda: inn.SteadyState.with_pid_controller(dfx.Euler()),
        TypeError,
        "with_pid_controller.*estimates its error.*`Euler",
    ),
    (
        lambda: inn.SteadyState.with_pid_controller(TSIT5, rtol="1e-3"),
        ValueError,
        f"rtol=.*{NON_NEGATIVE}; got '1e-3'",
    ),
    # Linear solvers.
    (lambda: inn.GivensGMRES(-1.0, 0.0), ValueError, r"GMRES\(rtol=.*got -1"),
    (lambda: inn.GivensGMRES(0.1, 0.0, restart=0), ValueError, "restart=.*got 0"),
    (
        lambda: inn.GivensGMRES(0.1, 0.0, max_steps=0),
        ValueError,
        must_be("GivensGMRES", "max_steps", f"{LEAST_1} or `None`", 0),
    ),
    (lambda: inn.NeumannSeries(0), ValueError, f"num_terms=.*{LEAST_1}; got 0"),
    (lambda: inn.NeumannSeries(2, 1.0), ValueError, r"damping=.*\[0, 1\); got 1.0"),
    (
        lambda: inn.FixedPointLinearSolver(ANDERSON, max_steps=0),
        ValueError,
        r"FixedPointLinearSolver\(max_steps=.*got 0",
    ),
    (
        lambda: inn.FixedPointLinearSolver(lx.LU()),
        TypeError,
        "`LU` is a linear solver by itself",
    ),
    (
        lambda: inn.FixedPointLinearSolver(optx.Bisection(**TOLERANCES)),
        TypeError,
        "Bisection` needs bounds",
    ),
    (
        lambda: inn.FixedPointLinearSolver(TSIT5),
        TypeError,
        r"`implicitnets.SteadyState\(Tsit5\(...\)\)` makes one",
    ),
    # Adjoints.
    (lambda: inn.PhantomAdjoint(0), ValueError, f"num_steps=.*{LEAST_1}; got 0"),
    (lambda: inn.PhantomAdjoint(2, 1.0), ValueError, r"damping=.*\[0, 1\); got 1.0"),
    (lambda: inn.NeumannAdjoint(0), ValueError, r"NeumannAdjoint\(num_terms=.*got 0"),
    (lambda: inn.NeumannAdjoint(2, -0.5), ValueError, r"Adjoint\(damping=.*got -0.5"),
    (lambda: inn.ShineAdjoint(-1), ValueError, "refinement_steps=.*at least 0; got -1"),
    (lambda: inn.ReversibleAdjoint(bound=-1.0), ValueError, "bound=.*or infinity; got"),
    *(
        (
            lambda make=make, probe=probe: make(probe),
            TypeError,
            r"probe=...\)` must be an `implicitnets.AdjointReport`.*; got",
        )
        for make in (
            lambda probe: inn.ImplicitAdjoint(probe=probe),
            lambda probe: inn.ReversibleAdjoint(probe=probe),
            lambda probe: inn.ShineAdjoint(probe=probe),
            lambda probe: inn.NeumannAdjoint(probe=probe),
            lambda probe: deq()(X, probe=probe),
            lambda probe: deq(fixed_depth=1).solve(X, probe=probe),
        )
        for probe in (True, 0.0, X, inn.AdjointReport, inn.AdjointReport.probe)
    ),
    (lambda: inn.ReversibleAdjoint("x"), TypeError, "fallback=.*Optimistix adjoint"),
    (lambda: inn.ImplicitAdjoint("gmres"), TypeError, "a Lineax solver.*got 'gmres'"),
    (
        lambda: inn.ImplicitAdjoint(ANDERSON),
        TypeError,
        r"`implicitnets.FixedPointLinearSolver\(AndersonAcceleration\(...\)\)`",
    ),
    (lambda: inn.ImplicitAdjoint(lx.LU), TypeError, r"an instance, `LU\(...\)`"),
    (
        lambda: inn.ImplicitAdjoint(fallback="x"),
        TypeError,
        must_be("ImplicitAdjoint", "fallback", "a Lineax solver.* or `None`", "'x'"),
    ),
    # Layers.
    *(
        (
            lambda v=v: deq(solver=v),
            TypeError,
            "solver=.*an Optimistix solver.*a Diffrax solver.*; got",
        )
        for v in (None, "newton", jnp.tanh)
    ),
    *(
        (
            lambda s=s: deq(solver=s(**TOLERANCES)),
            TypeError,
            f"{s.__name__}` needs bounds",
        )
        for s in (optx.Bisection, optx.GoldenSearch)
    ),
    (lambda: deq(solver=optx.Newton), TypeError, r"an instance, `Newton\(...\)`"),
    (lambda: deq(solver=dfx.Tsit5), TypeError, r"an instance, `Tsit5\(...\)`"),
    (lambda: deq(solver=lx.LU()), TypeError, r"ImplicitAdjoint\(LU\(...\)\)`"),
    (
        lambda: deq(solver=inn.PhantomAdjoint()),
        TypeError,
        r"It is an adjoint: `adjoint=PhantomAdjoint\(...\)`",
    ),
    (
        lambda: deq(adjoint="implicit"),
        TypeError,
        "adjoint=.*Optimistix.*'implicit'",
    ),
    (
        lambda: deq(adjoint=dfx.BacksolveAdjoint()),
        TypeError,
        "for `implicitnets.Neu",
    ),
    (lambda: deq(adjoint=lx.LU()), TypeError, r"`implicitnets.ImplicitAdjoint\(LU\("),
    (
        lambda: deq(adjoint=inn.ImplicitAdjoint),
        TypeError,
        "class `ImplicitAdjoint`",
    ),
    *(
        (lambda v=v: deq(max_steps=v), ValueError, f"max_steps=.*{LEAST_1}; got")
        for v in (*NOT_INTEGERS, -1, None)
    ),
    *(
        (lambda v=v: deq(fixed_depth=v), ValueError, "fixed_depth=.*at least 0; got")
        for v in (-1, 1.0, None)
    ),
    (lambda: jax.eval_shape(lambda d: deq(fixed_depth=d), 1), ValueError, "be traced"),
    (lambda: deq(throw="yes"), ValueError, "throw=.*`True` or `False`; got 'yes'"),
    *(
        (lambda layer=layer: layer(None), TypeError, r"cell=.*a function; got None")
        for layer in LAYERS
    ),
    *(
        (lambda layer=layer: layer(type(CELL)), TypeError, "cell=.*give an instance")
        for layer in LAYERS
    ),
    *(
        (lambda layer=layer: layer(CELL, init=X), TypeError, r"init=.*layer\(x, z0=")
        for layer in LAYERS
    ),
    (
        lambda: deq(zero_state=3),
        TypeError,
        "zero_state=.*a function.*; got 3",
    ),
    (lambda: node(solver=ANDERSON), TypeError, "DeepEquilibriumNetwork` takes it"),
    (
        lambda: node(adjoint=inn.ImplicitAdjoint()),
        TypeError,
        "adjoint=.*a Diffrax adjoint.*DeepEquilibriumNetwork` takes it",
    ),
    (lambda: node(stepsize_controller=0.1), TypeError, "stepsize_controller=.*got 0.1"),
    (lambda: node(t1=-1.0), ValueError, must_be("NeuralODE", "t1", POSITIVE, "-1.0")),
    (lambda: node(t1=INFINITY), ValueError, f"t1=.*{POSITIVE}; got inf"),
    (lambda: node(dt0=0.0), ValueError, must_be("NeuralODE", "dt0", POSITIVE, "0.0")),
    (lambda: node(max_steps=0), ValueError, must_be("NeuralODE", "max_steps", LEAST_1)),
    (lambda: node(throw=None), ValueError, "throw=.*`True` or `False`; got None"),
    *(
        (
            lambda f=f, n=n, v=v: multiscale(f, **{n: v}),
            ValueError,
            f"{name}.*`main_layers`",
        )
        for f in (
            inn.MultiScaleDeepEquilibriumNetwork,
            inn.SkipMultiScaleDeepEquilibriumNetwork,
            inn.MultiScaleNeuralODE,
        )
        for name, n, v in (
            ("mapping_layers", "mapping", ((LINEAR, LINEAR),)),
            ("mapping_layers", "mapping", ((LINEAR,), (LINEAR,))),
            ("mapping_layers", "main", (LINEAR,)),
            ("post_fuse_layers", "post_fuse", (LINEAR,)),
            ("state_shapes", "shapes", ((4,),)),
            ("state_shapes", "shapes", ((4,), (0,))),
        )
    ),
    (
        lambda: inn.MultiScaleCell([], []),
        ValueError,
        "main_layers=.*one layer",
    ),
    (lambda: inn.MultiScaleCell([3], [[LINEAR]]), TypeError, "main_layers=.*got 3"),
    # States.
    *(
        (
            lambda layer=layer, x=x: solve(CELL, x, layer),
            ValueError,
            r"`DenseCell\(z, x\)` needs .* real floating-point arrays; got `z` of "
            "structure .* `x` of structure .*`zero_state`",
        )
        for layer in LAYERS
        for x in ({}, None, "text", {"a": "text"}, X.astype(int), X.astype(complex))
    ),
    *(
        (lambda z0=z0: solve(CELL, X, z0=z0), ValueError, "needs a state .*; got `z`")
        for z0 in ("text", [], object(), 1j, True, np.array(["a"]))
    ),
    *(
        (
            lambda layer=layer, cell=cell: solve(cell, X, layer),
            ValueError,
            r"<lambda>.*`z` of structure f32\[4\] .*of structure .*`zero_state`",
        )
        for layer in LAYERS
        for cell in (
            lambda z, x: jnp.concatenate([z, z]),
            lambda z, x: z[:1],
            lambda z, x: (z, z),
            lambda z, x: z.astype(jnp.float16),
            lambda z, x: None,
            lambda z, x: "text",
            lambda z: z,
            lambda z, x, y: z,
            # Die of the product, of the attribute and of the key.
            lambda z, x: jnp.eye(3) @ z,
            lambda z, x: z.first,
            lambda z, x: z["first"],
        )
    ),
    *(
        (
            lambda fields=fields: solve(CELL, X, **fields),
            ValueError,
            r"`DenseCell\(z, x\)` fails for `z` .* f32\[3\] and `x` .* f32\[4\]",
        )
        for fields in ({"z0": jnp.ones(3)}, {"init": lambda x: x[:3]})
    ),
    (
        lambda: solve(LINEAR, X),
        ValueError,
        r"`Linear\(z, x\)` fails .*takes 2 pos",
    ),
    *(
        (
            lambda layer=layer: solve(
                nn.MonotoneCell(6, 4, key=KEY), jnp.ones(6), layer
            ),
            ValueError,
            r"MonotoneCell.*\[6\].*`zero_state`",
        )
        for layer in LAYERS
    ),
    # Building blocks.
    *(
        (lambda p=p: nn.VariationalDropout(p), ValueError, rf"p=.*\[0, 1\); got {p}")
        for p in (-0.1, 1.0)
    ),
    (lambda: nn.VariationalDropout(0.1, 1.5), ValueError, "shared_axes=.*integer"),
    (lambda: nn.VariationalDropout(0.1, inference=1), ValueError, "inference=.*got 1"),
    (lambda: nn.spectral_norm(LINEAR, bound=-1.0), ValueError, "bound=.*got -1.0"),
    (lambda: nn.infinity_norm(LINEAR, bound=0.0), ValueError, "bound=.*got 0.0"),
    (lambda: nn.spectral_norm(LINEAR, bound=INFINITY), ValueError, "bound=.*got inf"),
    (lambda: nn.spectral_norm(LINEAR, num_steps=0), ValueError, "num_steps=.*got 0"),
    (
        lambda: nn.weight_norm(LINEAR, filter=eqx.nn.Conv),
        ValueError,
        "`filter` chooses no layer",
    ),
    (
        lambda: nn.spectral_norm(eqx.nn.Conv2d(1, 1, 1, key=KEY)),
        ValueError,
        "spatial_shape.*2; got None",
    ),
    (
        lambda: nn.spectral_norm(eqx.nn.LayerNorm((2, 2)), filter=eqx.nn.LayerNorm),
        TypeError,
        "linear and convolutional layers.*LayerNorm",
    ),
    (lambda: nn.MonotoneCell(2, 0, key=KEY), ValueError, r"Cell\(size=.*got 0"),
    (
        lambda: nn.MonotoneCell(2, 6, margin=-0.5, key=KEY),
        ValueError,
        must_be("MonotoneCell", "margin", POSITIVE, "-0.5"),
    ),
    *(
        (
            lambda v=v: nn.MonotoneConvCell(2, 2, 3, v, key=KEY),
            ValueError,
            must_be("MonotoneConvCell", "kernel_size", "odd and positive"),
        )
        for v in ((3, 4), 2, -1, "33", (3, 3, 3))
    ),
    (
        lambda: nn.WellPosedCell(3, 8, bound=1.0, key=KEY),
        ValueError,
        r"WellPosedCell\(bound=.*\(0, 1\); got 1.0",
    ),
    (
        lambda: nn.WellPosedCell(3, 8, activation="relu", key=KEY),
        TypeError,
        "activation=.*a function; got 'relu'",
    ),
    (
        lambda: nn.weight_norm(LINEAR)(X),
        TypeError,
        r"`implicitnets.nn.resolve\(layer\)",
    ),
    (
        lambda: nn.weight_norm(eqx.nn.Conv1d(1, 1, 1, key=KEY))(jnp.ones((1, 4))),
        TypeError,
        r"`WeightNorm` stands for an array.*resolve\(layer\)",
    ),
    # Configurations.
    *(
        (
            lambda config=config, n=n, v=v: dataclasses.replace(config, **{n: v}),
            ValueError,
            rf"Config\({n}=...\)` must be .*; got",
        )
        for config, n, v in (
            (MDEQ, "channels", ()),
            (MDEQ, "channels", "48"),
            (MDEQ, "head_channels", (1,)),
            (MDEQ, "head_channels", (1, 0)),
            (MDEQ, "groups", 1),
            (MDEQ, "groups", 3),
            (MDEQ, "expansion", 0),
            (MDEQ, "expansion", 2.5),
            (MDEQ, "kernel_size", 2),
            (MDEQ, "num_downsamples", -1),
            (MDEQ, "dropout", 1.0),
            (MDEQ, "post_fuse_affine", None),
            (TRANSFORMER, "width", 7),
            (TRANSFORMER, "width", 14),  # of which a sixteenth is nothing
            (TRANSFORMER, "cutoffs", (12, 6)),
            (TRANSFORMER, "cutoffs", (6, 20)),
            (TRANSFORMER, "cutoffs", (6, 7.5)),
            (TRANSFORMER, "local_size", 0),
            (TRANSFORMER, "memory_length", -1),
            (TRANSFORMER, "vocab_size", "20"),
            (TRANSFORMER, "attention_dropout", float("nan")),
            (TRANSFORMER, "pre_norm", 1),
            (models.TanhConfig(), "width", 0),
            (models.TanhConfig(), "image_shape", (28, 0)),
            (models.TanhConfig(), "num_classes", True),
            (models.ResNetConfig(), "image_shape", (28, 28)),
            (models.ResNetConfig(), "pool_stride", 0),
            (models.ResNetConfig(), "stride", 0),
            (models.ResNetConfig(), "pool_size", 0),
            (models.ResNetConfig(), "gain", 0.0),
            (models.CausalTransformerConfig(), "length", 0),
            (models.CausalTransformerConfig(), "dropout", -0.1),
        )
    ),
    *(
        (
            lambda model=model, config=config: model(config, key=KEY),
            TypeError,
            rf"^`{model.__name__}\(config=...\)` must be an "
            rf"`implicitnets.models.{name}\(...\)`; got",
        )
        for model, name in (
            (models.TanhDEQ, "TanhConfig"),
            (models.ResNetDEQ, "ResNetConfig"),
            (models.MDEQ, "MDEQConfig"),
            (models.MDEQSegmenter, "MDEQConfig"),
            (models.CausalTransformerDEQ, "CausalTransformerConfig"),
            (models.DEQTransformer, "TransformerConfig"),
        )
        for config in (None, {"width": 4}, getattr(models, name), object())
    ),
    (lambda: models.ResNetConfig(channels=7), ValueError, "divisor of .* 7 and 64"),
    (
        lambda: models.CausalTransformerConfig(width=32, num_heads=5),
        ValueError,
        "num_heads=.*a divisor of the width 32; got 5",
    ),
    # Functions.
    *(
        (
            lambda at=at: inn.sample_states(deq(), X, at),
            ValueError,
            must_be("sample_states", "at", "an integer of at least 1, or increasing"),
        )
        for at in (0, (), (3, 2), (0, 1), [1.5], 1.5, "12", None, True, jnp.array(1.5))
    ),
    (lambda: inn.sample_states(CELL, X, 2), TypeError, "deq=.*an equilibrium layer"),
    (lambda: inn.exponential_weights(-1), ValueError, f"{NON_NEGATIVE}; got -1"),
    (lambda: inn.constant_weights(None), ValueError, f"{NON_NEGATIVE}; got None"),
    (
        lambda: inn.fixed_point_correction(jnp.add, [], X),
        ValueError,
        r"states=.*some states; got \[\]",
    ),
    *(
        (
            lambda p=p: inn.sometimes(p, lambda key: 0.0, key=KEY),
            ValueError,
            must_be("sometimes", "probability", r"a number in the interval \[0, 1\]"),
        )
        for p in (2.0, -0.1, float("nan"), None)
    ),
    (
        lambda: inn.jacobian_penalty(CELL, X, X, key=KEY, num_samples=0),
        ValueError,
        must_be("jacobian_penalty", "num_samples", LEAST_1, 0),
    ),
    (lambda: inn.growing_weight(1.0, 1.0, 0), ValueError, f"every=.*{LEAST_1}; got 0"),
    (lambda: inn.growing_weight("1", 1.0, 1), ValueError, "initial=.*number; got '1'"),
    (lambda: inn.growing_weight(INFINITY, 1.0, 1), ValueError, "finite.*; got inf"),
    (lambda: inn.exponential_weights(INFINITY), ValueError, f"{NON_NEGATIVE}; got inf"),
    *(
        (
            lambda f=f: f(CELL, X, X, key=KEY, num_steps=0),
            ValueError,
            "num_steps=.*got 0",
        )
        for f in (inn.spectral_radius, inn.operator_norm)
    ),
    (lambda: trace(max_steps=-1), ValueError, "max_steps=.*at least 0; got -1"),
    (
        lambda: trace(X.astype(int)),
        ValueError,
        r"z0=.*floating-point.*; got i32\[",
    ),
    (
        lambda: trace(solver=optx.Bisection(**TOLERANCES)),
        TypeError,
        "Bisection` needs bounds.*`optimistix.Newton`",
    ),
    (
        lambda: trace(solver=TSIT5),
        TypeError,
        r"`implicitnets.SteadyState\(Tsit5\(...\)",
    ),
    (lambda: inn.set_fixed_depth(deq(), -1), ValueError, "depth=.*at least 0; got -1"),
    (
        lambda: inn.set_fixed_depth(deq(), 2.5),
        ValueError,
        "depth=.*at least 0; .* 2.5",
    ),
    (
        lambda: inn.set_fixed_depth(deq(), 2, checkpoint=1),
        ValueError,
        "checkpoint=.*`True` or `False`; got 1",
    ),
    (
        lambda: inn.set_fixed_depth({"layer": LINEAR}, 3),
        ValueError,
        "set_fixed_depth.*an equilibrium layer",
    ),
)


@pytest.mark.parametrize("call, error, message", CASES)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call()


WITH_NUMBERS = (
    ANDERSON,
    inn.AutoSolver(**TOLERANCES),
    inn.SolverChain((ANDERSON,)),
    inn.Broyden(**TOLERANCES),
    inn.ForwardBackward(**TOLERANCES, step_size=0.1),
    inn.NewtonKrylov(**TOLERANCES),
    inn.PeacemanRachford(**TOLERANCES, step_size=0.1),
    inn.ReversibleFixedPoint(**TOLERANCES),
    inn.SteadyState(TSIT5),
    inn.PseudoTransient(),
    inn.GivensGMRES(**TOLERANCES, restart=3, max_steps=4),
    inn.NeumannSeries(2),
    inn.FixedPointLinearSolver(ANDERSON),
    inn.PhantomAdjoint(),
    inn.NeumannAdjoint(2),
    inn.ShineAdjoint(),
    inn.ReversibleAdjoint(),
    inn.DeepEquilibriumNetwork(CELL),
    inn.SkipDeepEquilibriumNetwork(CELL),
    inn.NeuralODE(CELL),
    nn.VariationalDropout(0.1),
    nn.SpectralNorm(jnp.eye(2)),
    nn.InfinityNorm(jnp.eye(2)),
    models.TanhConfig(),
    models.ResNetConfig(),
    models.CausalTransformerConfig(),
    MDEQ,
    TRANSFORMER,
)


def numbers_of(instance):
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield field.name


# Equinox warns of a NumPy number in a static field before it is refused.
@pytest.mark.filterwarnings("ignore:A JAX array is being set as static")
@pytest.mark.parametrize("instance", WITH_NUMBERS, ids=lambda x: type(x).__name__)
def test_one_rule_for_every_number_of_every_class(instance):
    names = list(numbers_of(instance))
    assert names
    for name in names:
        for value in (float("nan"), np.float32("nan"), "1", 1j, True, object()):
            with pytest.raises(ValueError, match=rf"\({name}=...\)` must be .*; got "):
                dataclasses.replace(instance, **{name: value})


def test_no_class_with_numbers_is_left_out():
    public = {**vars(inn), **vars(nn), **vars(models)}.values()
    with_numbers = {
        value
        for value in filter(dataclasses.is_dataclass, public)
        if {int, float} & {type(field.default) for field in dataclasses.fields(value)}
    }
    assert with_numbers <= {type(instance) for instance in WITH_NUMBERS}


@pytest.mark.parametrize("make", (np.float32, np.float64, jnp.asarray, lambda x: x))
def test_numbers_of_all_kinds(make):
    solver = anderson(rtol=make(1e-3), ridge=make(1e-5))
    assert np.float32(solver.rtol) == np.float32(1e-3)
    assert inn.NeuralODE(CELL, t1=make(2.0)).t1 == 2
    assert float(inn.exponential_weights(make(0.5))(2)[0]) == 0.5


@pytest.mark.parametrize("make", (np.int64, np.uint8, np.array, jnp.asarray))
def test_integers_of_all_kinds(make):
    """Those that decide what is compiled are Python's, and so not traced."""
    solver = anderson(history_size=make(3))
    adjoint = inn.PhantomAdjoint(make(2))
    layer = inn.set_fixed_depth(deq(solver=solver, max_steps=make(4)), make(1))
    config = models.ResNetConfig(groups=make(4), image_shape=[1, make(8), 8])
    for value in (solver.history_size, adjoint.num_steps, layer.fixed_depth):
        assert type(value) is int
    assert hash(config) == hash(models.ResNetConfig(groups=4, image_shape=(1, 8, 8)))
    eqx.filter_eval_shape(layer, X)
    at, z0 = [make(1), make(2)], jnp.zeros(4)
    states, _ = eqx.filter_eval_shape(lambda: inn.sample_states(layer, X, at, z0=z0))
    assert len(states) == 3


def test_infinity_is_no_limit():
    assert inn.ReversibleAdjoint(bound=INFINITY).bound == INFINITY
    assert inn.PseudoTransient(factormax=np.inf).factormax == INFINITY


def test_traced_numbers():
    @jax.vmap
    def make(rtol, max_steps):
        return deq(solver=anderson(rtol=rtol, damping=rtol), max_steps=max_steps).throw

    structure = jax.eval_shape(lambda: make(jnp.array([0.1, 0.2]), jnp.array([2, 3])))
    assert structure.shape == (2,)
