"""The sections of the page "Report"."""

import functools as ft

from ..kit import figures
from ..kit.tables import pivot, select, without
from .exhibits import by_problem, every, Exhibit, Section


SOLVE = "solve (ms)"
GRADIENT = "solve + gradient (ms)"
BACKWARD = "backward (ms)"
COMPILE = "first result (s)"
MEMORY = "temporary memory (MB)"
RATIO = "time / implicitnets"

SECTIONS = (
    Section(
        "discrete_vs_continuous",
        "Discrete against continuous solvers",
        "What does every solver need, do ODE solvers reach the equilibrium of the same "
        "cell at a fair price, and does a solver ever claim a success that it had not?",
        (
            by_problem(
                "solve", "Time of a solve (ms)", ("kind", "method"), SOLVE, "ms"
            ),
            by_problem(
                "discrete_vs_continuous",
                "Time of a solve and its gradient (ms)",
                ("kind", "method"),
                GRADIENT,
                "ms",
            ),
            Exhibit(
                "traces",
                "Relative residual, the mean of 16 examples, against evaluations of "
                "the cell and Jacobian products",
                figure=ft.partial(
                    figures.curves,
                    x="evaluations and products",
                    values=("residual",),
                    series=("method",),
                    panel="problem",
                    log="y",
                ),
                figure_of="traces",
            ),
            Exhibit(
                "solvers",
                "Every row: evaluations of the cell and Jacobian products (the most of "
                "an example), the solver's own verdict (converged) next to the "
                "measured residual (the largest), the examples said to be solved whose "
                "residual says otherwise (false claims), and the errors of equilibrium "
                "and gradient",
                ft.partial(
                    without, columns=("temp (MB)", COMPILE, "backward products")
                ),
                folded=True,
            ),
        ),
        minutes=13,
        options=(
            *("--repeats", "3"),
            *("--problems", "dense-0.9", "trained", "dense-1.2", "lin"),
        ),
        quick=("--repeats", "1", "--batch", "2", "--problems", "dense-1.2"),
    ),
    Section(
        "neural_ode",
        "Discrete DEQ, continuous DEQ, neural ODE",
        "What does a neural ODE cost next to a discrete and a continuous DEQ of the "
        "same cell, at the same weights and tolerance? (Pal et al., arXiv 2201.12240, "
        "report a backward pass 4.7 to 6.2 times and a training 2 to 4 times as long "
        "as a continuous DEQ's.)",
        (
            Exhibit(
                "neural_ode",
                "Forward and backward pass of a batch at the same weights",
                ft.partial(without, columns=("data", COMPILE)),
                ft.partial(
                    figures.dots,
                    label=("kind", "model"),
                    values=("forward (ms)", BACKWARD),
                    unit="ms",
                ),
            ),
        ),
        minutes=3.5,
        options=("--repeats", "3", "--seeds", "1", "--steps", "500"),
        quick=("--repeats", "1", "--steps", "10", "--seeds", "1"),
        takes="data_dir",
    ),
    Section(
        "skip",
        "Skip and Skip-regularised against plain",
        "How many evaluations does a start that predicts the equilibrium save, and at "
        "what accuracy? (Pal et al. report 18.3 evaluations against 4.0 at equal "
        "accuracy, on MNIST with this network.) The penalty that draws equilibrium "
        "and start together has the weight 1 here, in 1,000 steps. The paper's "
        "weight, 5, in 47,000 steps, is too much for so few: zero is the state that "
        "is predicted first, and half of the elements stay zero for every image "
        "(*silent*). On images of 28 x 28 that costs 2 to 8 points of accuracy. A "
        "start that learns alone, while the penalty leaves cell and stem as they are, "
        "saves about a sixth of the evaluations: more is saved by an equilibrium that "
        "comes near its start.",
        (
            Exhibit(
                "skip",
                "Cell evaluations of a mean example of the test set, and accuracy: "
                "means and standard deviations over the seeds",
                every,
                ft.partial(
                    figures.dots,
                    label=("model",),
                    values=("evaluations",),
                    series=("data", "solver"),
                    unit="cell evaluations",
                ),
            ),
        ),
        minutes=15,
        options=("--repeats", "3"),
        quick=("--repeats", "1", "--steps", "10", "--seeds", "2"),
        takes="data_dir",
    ),
    Section(
        "budgets",
        "Few evaluations",
        "How close to the root is a solve of few evaluations, next to a loop of as "
        "many applications of the cell?",
        (
            Exhibit(
                "budgets",
                "The mean error over that of the plain iteration; above one is worse "
                "than a loop. With `warmup=0` a solver accelerates from the first step "
                "on",
                every,
            ),
        ),
        minutes=6,
        quick=("--problems", "lin"),
    ),
    Section(
        "expansive",
        "Maps that expand",
        "How many equilibria of maps that expand does each solver find, and at what "
        "cost?",
        (
            by_problem(
                "expansive_solved",
                "Equilibria found, of those that there are (%)",
                ("solver",),
                "solved (%)",
                "%",
            ),
            Exhibit(
                "expansive",
                "Costs are those of all solves over the number of solutions",
                every,
            ),
        ),
        minutes=25,
        quick=("--seeds", "1", "--size", "16", "--max-steps", "20"),
    ),
    Section(
        "warm_start",
        "A start at the last equilibrium",
        "How many evaluations does the equilibrium of a similar input save?",
        (
            Exhibit(
                "warm_start",
                "The most evaluations of an example, after the input has moved by a "
                "share of its norm",
                every,
            ),
        ),
        minutes=0.5,
        quick=(),
    ),
    Section(
        "gradients",
        "Every adjoint",
        "How good is every adjoint's gradient, and what does it cost in time and "
        "memory?",
        (
            by_problem(
                "gradient_error",
                "Relative error of the gradient",
                ("adjoint",),
                "gradient error",
                "relative error",
            ),
            by_problem(
                "backward",
                "Time of the backward pass (ms)",
                ("adjoint",),
                BACKWARD,
                "ms",
            ),
            Exhibit(
                "adjoints",
                "Every row; those of as many products cost about the same. The "
                "reversible adjoint's solve is stopped after the 12 steps that can be "
                "undone in float32",
                every,
                folded=True,
            ),
            Exhibit(
                "memory",
                "Temporary memory of a gradient of the ResNet cell (MB), against the "
                "solver's steps",
                ft.partial(pivot, index=("adjoint",), column="steps", value=MEMORY),
                ft.partial(
                    figures.curves,
                    x="steps",
                    values=(MEMORY,),
                    series=("adjoint",),
                    log="xy",
                ),
                table_of="memory",
                figure_of="memory",
            ),
        ),
        minutes=4.5,
        options=("--repeats", "3", "--radii", "0.99"),
        quick=("--repeats", "1", "--batch", "1", "--radii", "0.5"),
    ),
    Section(
        "linear_solvers",
        "Linear solvers of the implicit adjoint",
        "Which linear solver should the implicit adjoint have?",
        (
            by_problem(
                "linear_solvers",
                "Time of the backward pass (ms), where the gradient is accurate to 1 "
                "%, or 5 % for the ResNet cell",
                ("linear solver",),
                BACKWARD,
                "ms",
            ),
            Exhibit(
                "linear_solver_rows",
                "Every row: Jacobian products (the most of an example), the error of "
                "the gradient, at a loss of 1 and of 1e-8, and memory",
                every,
                folded=True,
            ),
        ),
        minutes=3.0,
        options=(
            *("--repeats", "3"),
            *("--problems", "dense-0.99", "resnet", "lin-1.2"),
        ),
        quick=("--repeats", "1", "--batch", "1", "--problems", "dense-0.5"),
    ),
    Section(
        "convolutions",
        "Convolutions in loops",
        "Do convolutions run in the solver and in the adjoint as fast as outside of "
        "them?",
        (
            Exhibit(
                "convolutions",
                "The ResNet cell: solve and backward pass, relative to as many "
                "evaluations and products on their own (targets: 1.3 and 1.5)",
                every,
            ),
        ),
        minutes=2.0,
        options=("--repeats", "3"),
    ),
    Section(
        "peers",
        "Other libraries",
        "How fast is the library next to others, at the same weights and tolerance?",
        (
            Exhibit(
                "peer_ratios",
                "Time of a solve and its gradient with each library's fastest method, "
                "relative to that of implicitnets; of one algorithm, and of any",
                ft.partial(
                    pivot,
                    index=("problem", "algorithm"),
                    column="library",
                    value=RATIO,
                ),
                ft.partial(
                    figures.dots,
                    label=("problem", "algorithm"),
                    values=(RATIO,),
                    series=("library",),
                    unit="relative time",
                ),
                table_of="fastest",
                figure_of="fastest",
            ),
            by_problem(
                "peers",
                "Time of a solve and its gradient (ms), where residual and gradient "
                "pass their check",
                ("library", "method"),
                GRADIENT,
                "ms",
            ),
            Exhibit(
                "peer_rows",
                "Every row; the bare loop makes as many evaluations and products as "
                "implicitnets, and nothing else",
                ft.partial(without, columns=("versions",)),
                folded=True,
            ),
        ),
        minutes=20,
        options=("--repeats", "2", "--limit", "30"),
        quick=("--repeats", "1", "--problems", "lin"),
        takes="python",
    ),
    Section(
        "scaling",
        "Scaling",
        "How does the time of a solve and its gradient grow with state, batch, history "
        "and devices, and how long does it take to compile? The devices are simulated: "
        "they show what sharding costs, not what it gains.",
        (
            Exhibit(
                "scaling",
                "Time of a solve and its gradient (ms)",
                ft.partial(
                    select,
                    columns=(
                        "varied",
                        "size",
                        "method",
                        "evaluations",
                        SOLVE,
                        GRADIENT,
                    ),
                ),
                ft.partial(
                    figures.curves,
                    x="size",
                    values=(GRADIENT,),
                    series=("method",),
                    panel="varied",
                    log="xy",
                ),
            ),
            Exhibit(
                "compile",
                "Seconds until the first result of solve and gradient, compilation "
                "included, and temporary memory",
                ft.partial(
                    select,
                    columns=("varied", "size", "method", COMPILE, "temp (MB)"),
                ),
                folded=True,
            ),
        ),
        minutes=3.0,
        options=(
            *("--repeats", "3"),
            *("--batches", "1", "32", "512"),
            *("--histories", "5", "20"),
        ),
        quick=(
            *("--repeats", "1", "--states", "32", "64", "--batches", "2", "4"),
            *("--histories", "5", "--devices", "1", "2"),
        ),
    ),
)
