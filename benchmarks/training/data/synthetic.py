"""Tasks that are drawn at random."""

import numpy as np

from .samples import Data, Examples


def copy_memory(train_size: int, test_size: int, delay: int, seed: int) -> Data:
    """Ten symbols to write down again after a delay.

    As in Bai et al., *Deep Equilibrium Models*, 2019, section 4.1: the symbols 1 to 8,
    blanks for the delay, and eleven markers, of which the first says that it is over.
    """
    num_symbols, marker = 10, 9
    rng = np.random.default_rng((seed, 2))

    def sample(size: int) -> Examples:
        symbols = rng.integers(1, marker, (size, num_symbols), np.int32)
        blanks = np.zeros((size, delay + num_symbols), np.int32)
        markers = np.full((size, num_symbols + 1), marker, np.int32)
        inputs = np.concatenate([symbols, blanks[:, : delay - 1], markers], axis=1)
        return Examples(inputs, np.concatenate([blanks, symbols], axis=1))

    return Data(sample(train_size), sample(test_size), marker + 1)
