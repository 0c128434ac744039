"""The one exception that is meant for the person at the keyboard."""


class WysError(Exception):
    """Something the user can mend. The message is one sentence or two: what is wrong, where, what to type instead."""
