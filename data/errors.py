"""This module defines the one exception for what can be wrong with the user's data, with a kind that a report can
list."""

from collections.abc import Mapping, Set

from moc.errors import UserError


class DataError(UserError):
    """This error says that a file, line or value of the data cannot be used.

    kind: short stable name of the fault ("zero-byte", "overlapping-shots", ...), the key of the report.
    where: the file, or file:line and field, at fault.
    """

    def __init__(self, kind: str, where: object, message: str) -> None:
        super().__init__(f"{where}: {message}")
        self.kind, self.where, self.message = kind, str(where), message

    def __reduce__(self) -> tuple:  # keeps the three fields when a loader worker passes the error on
        return type(self), (self.kind, self.where, self.message)


FETCH_AGAIN = "fetch it again, or leave it out"  # the remedy for a file that is not what its name says


class DataWarning(DataError):
    """This warning says what a person should look at, though the data are used as they are."""


def refuse_unknown(fields: Mapping, known: Set[str], where: str, kind: str) -> None:
    """Raises DataError of `kind` for the first field that is not a known one."""
    unknown = sorted(str(key) for key in fields if key not in known)
    if unknown:
        raise DataError(
            kind, f"{where} {unknown[0]}", f"unknown field {unknown[0]!r}; known are {', '.join(sorted(known))}"
        )
