"""Errors a user can act on. The command line prints them without a traceback; library callers can catch `LLDError`."""


class LLDError(Exception):
    """Base of every error that lldfast raises on purpose. Its message names the file, domain, text or parameter at fault."""


class InputError(LLDError, ValueError):
    """An argument, a configuration value or an input text is wrong."""


class CorruptError(LLDError, ValueError):
    """A file that lldfast wrote, or a compressed input, is truncated, swapped or altered."""


class BusyError(LLDError, RuntimeError):
    """Another process is writing the same folder."""


class WriteError(LLDError, OSError):
    """Writing failed (disk full, no permission). What had been published before is untouched."""


class MissingDependencyError(LLDError, ImportError):
    """An optional package is not installed; the message says which and how to install it."""


class TrainingError(LLDError, RuntimeError):
    """Training cannot go on: a loss or gradient is not finite."""
