"""The errors of the house: what the user can mend, told in one line."""


class FastsslError(ValueError):
    """A wrong input or environment; the message names the value and what would be right.

    Command lines print it as one line and exit with a code other than 0; libraries see an ordinary ``ValueError``.
    """


class DataError(FastsslError):
    """An image that cannot be read: a training saves a checkpoint before it ends with this."""
