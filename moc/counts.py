"""This module writes counts in words."""


def count_of(number: int, thing: str) -> str:
    """Returns a count of things, such as "1 shot" or "2 shots"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"
