"""What can go wrong through something a user gave or can mend; everything else is a bug and keeps its traceback.

    SlipstreamError             base class: the message is for the user, one line, no traceback
    ├── ConfigError             a flag, an environment variable or a line of a preset is unknown or not allowed
    ├── InputError              a file that a command reads or writes is missing, malformed or in the way
    ├── InstallationError       a package is absent, of the wrong version, or does not import
    ├── ModelError              the target model is missing, damaged or could not be fetched
    ├── DrafterError            the drafter is missing, damaged or made for another target
    └── ServerStartError        the engine or the HTTP server could not start: port taken, no memory, ...

``server.cli.main`` prints the message and exits with ``exit_code``.
"""


class SlipstreamError(Exception):
    """A mistake or a circumstance that the user can mend; ``str(error)`` says how."""

    exit_code = 2


class ConfigError(SlipstreamError):
    """A setting is unknown or has a value that is not allowed."""


class InputError(SlipstreamError):
    """A file given to a command cannot be used."""


class InstallationError(SlipstreamError):
    """The installed packages cannot do what was asked."""


class ModelError(SlipstreamError):
    """The target model cannot be used."""


class DrafterError(SlipstreamError):
    """The drafter cannot be used with this target."""


class ServerStartError(SlipstreamError):
    """The server could not start."""
