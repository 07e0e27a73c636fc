"""Every error textlora raises on purpose: one tree, one sentence each.

An error says what is wrong and where; `fix` says what to do about it. The command line prints
`str(error)` on one line and ends with `exit_code`; the server answers with `http_status`.

    TextloraError
    ├── UsageError        a flag, argument or setting is wrong
    │   └── UnknownAdapterError  there is no adapter of that name
    ├── DataError         a data file, row or column is wrong
    ├── ModelError        the base model cannot be read or does not fit
    ├── AdapterError      the adapter folder cannot be trusted or does not fit
    ├── StorageError      the disk is full, not writable, or the folder is in use
    ├── TrainingError     the loss diverged
    ├── VerificationError what was saved does not give what was trained
    ├── OverloadError     more work is waiting than may wait
    ├── DeadlineError     not done in time
    ├── UnavailableError  the process that computes has ended; another is being started
    ├── InternalError     a bug, told without its insides
    └── Interrupted       stopped by the user; the run can be resumed
"""


class TextloraError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong and where, without a trailing full stop.
        fix: what the reader can do about it.
    """

    code = "error"
    exit_code = 2
    http_status = 400

    def __init__(self, message: str, fix: str = ""):
        super().__init__(message)
        self.message = " ".join(message.split())
        self.fix = " ".join(fix.split())

    def __str__(self) -> str:
        return f"{self.message}; {self.fix}" if self.fix else self.message


class UsageError(TextloraError):
    code = "usage"


class UnknownAdapterError(UsageError):
    code = "unknown_adapter"
    http_status = 404


class DataError(TextloraError):
    code = "data"


class ModelError(TextloraError):
    code = "model"


class AdapterError(TextloraError):
    code = "adapter"


class StorageError(TextloraError):
    code = "storage"
    http_status = 503


class TrainingError(TextloraError):
    code = "training"
    exit_code = 1
    http_status = 500


class VerificationError(TextloraError):
    code = "verification"
    exit_code = 1
    http_status = 500


class OverloadError(TextloraError):
    """`retry_after` says when to come again, in seconds."""

    code = "overloaded"
    exit_code = 1
    http_status = 429

    def __init__(self, message: str, fix: str = "", retry_after: int = 1):
        super().__init__(message, fix)
        self.retry_after = retry_after


class DeadlineError(TextloraError):
    code = "deadline"
    exit_code = 1
    http_status = 504


class UnavailableError(TextloraError):
    code = "unavailable"
    exit_code = 1
    http_status = 503


class InternalError(TextloraError):
    code = "internal"
    exit_code = 1
    http_status = 500


class Interrupted(TextloraError):
    code = "interrupted"
    exit_code = 130
    http_status = 503


def told(error: TextloraError) -> tuple[str, str, str]:
    """An error as plain values, for another process."""
    return error.code, error.message, error.fix


def error_of(code: str, message: str, fix: str) -> TextloraError:
    """What `told` was given."""
    return kinds(TextloraError)[code](message, fix)


def kinds(parent: type[TextloraError]) -> dict[str, type[TextloraError]]:
    found = {parent.code: parent}
    for kind in parent.__subclasses__():
        found |= kinds(kind)
    return found
