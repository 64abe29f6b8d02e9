"""The errors that end a run with one sentence, besides the `DataError`."""


class CheckpointError(Exception):
    """Why a run cannot go on from a checkpoint."""


class OptionError(Exception):
    """Which options do not go together."""
