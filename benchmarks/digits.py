"""How accurately do the three model types classify digits, at the tutorial's settings?

Prints the test accuracy of each and the cell evaluations that it needs, as means over
three seeds.
"""

import typing

import numpy as np

from .tutorial import mnist


NUM_SEEDS = 3


def main() -> None:
    train_set, test_set = mnist.load(mnist.Config())
    print("model type   test accuracy  of each seed         evaluations  seconds a run")
    for model_type in typing.get_args(mnist.ModelType):
        accuracies, evaluations, seconds = [], [], []
        for seed in range(NUM_SEEDS):
            config = mnist.Config(model_type=model_type, seed=seed)
            run = mnist.train(config, train_set, test_set)
            accuracies.append(run.phases[-1].accuracy)
            evaluations.append(run.phases[-1].evaluations)
            seconds.append(sum(p.compile_seconds + p.run_seconds for p in run.phases))
        each = "  ".join(f"{accuracy:.1%}" for accuracy in accuracies)
        print(
            f"{model_type:11}  {np.mean(accuracies):13.1%}  {each}  "
            f"{np.mean(evaluations):11.1f}  {np.mean(seconds):13.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
