"""The one class of errors that are meant for the user."""


class UserError(ValueError):
    """What the user can mend, in a setting, a file or a machine: a command ends with its message alone.

    The message names the value, the rule and the remedy. A bug raises anything else and keeps its traceback.
    """
