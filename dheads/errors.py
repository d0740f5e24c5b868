"""The one exception that users see."""


class DheadsError(Exception):
    """Something the user can mend, said in one sentence: what is wrong, with which file, what to do."""
