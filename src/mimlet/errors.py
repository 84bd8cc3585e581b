"""Errors that a user can cause and repair.

Every message says what was expected, what came, and what to do. The command line prints the message
without a traceback and exits with code 2 (`TryAgain`: 75); anything that is not a `UserError` is a bug of ours.
"""


class UserError(Exception):
    """Base of everything a user can cause: wrong input, wrong setting, wrong file."""


class ConfigError(UserError):
    """A setting is unknown, malformed, or contradicts another one."""


class DataError(UserError):
    """Images or labels are missing, unreadable or unfit for what was asked."""


class WeightsError(UserError):
    """A checkpoint does not fit the model, is damaged, or would need unsafe loading."""


class RunError(UserError):
    """A run folder cannot be written, read or continued as asked."""


class TryAgain(RunError):
    """The machine failed, not the settings: a process died, the data went away, the folder is in use, the disk is full.

    The newest checkpoint is whole, and the same command with --resume goes on from it. The command line exits with code
    75 (EX_TEMPFAIL), at which a scheduler can start it again.
    """


class TrainingStopped(Exception):
    """Training ended early on request (SIGTERM, SIGINT) after saving a checkpoint.

    Not a `UserError`: nothing is wrong. `code` is the process exit code (143 or 130).
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code
