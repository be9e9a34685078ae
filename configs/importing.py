"""This module makes Ctrl-C end the process at once and with one line, from the moment that it is imported.

A command imports it before all else, since the other imports take seconds, and Python's own handler would raise in the
middle of one. There is nothing to save yet. `configs.command` takes over when they are done.
"""

import os
import signal


def _end(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)  # the status that a shell gives an interrupted command


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a process in the background may ignore it
    signal.signal(signal.SIGINT, _end)
