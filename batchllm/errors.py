"""What batchllm raises. Everything a user can cause derives from BatchLLMError."""


class BatchLLMError(Exception):
    """A failure with a message meant for the user; the CLI prints it as one line, exit code 1."""


class UsageError(BatchLLMError, ValueError):
    """The user asked for something impossible (a wrong column, option or model); exit code 2."""


class InputError(BatchLLMError):
    """The input cannot be read: missing, empty, truncated, or not Parquet."""


class OutputError(BatchLLMError):
    """The output cannot be written, or belongs to a different job."""


class ModelError(BatchLLMError):
    """A model cannot be found or loaded."""


class MissingExtraError(BatchLLMError, ImportError):
    """An optional part is not installed; the message says which extra brings it."""
