"""The one exception for a user's mistake, and how a command turns exceptions into exit codes.

Exit codes: 0 done, 2 the user's mistake (one message, no traceback), 1 anything else. Asserts are for ours.
"""


class UserError(ValueError):
    """A mistake only the user can mend. The message names the key or file, the value, and the way out."""
