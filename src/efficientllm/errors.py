"""The one exception that is meant for the user's eyes."""


class UsageError(Exception):
    """Something the user can mend; its text is one clear sentence that says what is wrong and what to do.

    The command line prints the sentence and exits with code 2. Everything else that is raised is a bug
    and keeps its traceback.
    """


class SharedError(UsageError):
    """A UsageError that all processes of a run have met; one of them tells the user of it.

    agreed: that every process leaves by this exception, so that they can part in order (distributed.launch).
    """

    agreed = True
