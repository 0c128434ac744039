"""The exception whose message is shown to the user without a traceback."""


class WysError(Exception):
    """An error that the user can correct. The message says what is wrong, where, and what to type instead."""
