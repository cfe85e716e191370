"""What a user can get wrong with a drafter."""


class DrafterCheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the target; the message names both sides."""
