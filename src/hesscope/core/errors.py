"""Errors whose message is written for the user: what was given, what is accepted, what to do."""


class HesscopeError(ValueError):
    """Base of everything hesscope raises on purpose; its message is one clear line."""


class InputError(HesscopeError):
    """An argument, a configuration key or a file does not fit."""


class DataError(HesscopeError):
    """The data or the loss on it cannot be used (the message names the batch)."""


class ModelError(HesscopeError):
    """The model cannot be measured: no trainable parameter, random forward, failing forward."""


class PartitionError(HesscopeError):
    """Blocks overlap, miss parameters, or do not fit the operator."""


class NoSecondDerivativeError(HesscopeError):
    """An operation in the model cannot be differentiated twice (the message names it)."""


class TooLargeError(HesscopeError, MemoryError):
    """A dense result would not fit in memory (the message says how much it needs)."""
