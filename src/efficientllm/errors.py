"""The one exception that is meant for the user's eyes."""


class UsageError(Exception):
    """Something the user can mend; its text is one clear sentence that says what is wrong and what to do.

    The command line prints the sentence and exits with code 2. Everything else that is raised is a bug
    and keeps its traceback.
    """


class ElsewhereError(UsageError):
    """A UsageError of all the processes of a run, or of another one, which tells the user of it."""
