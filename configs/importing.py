"""This module sets up what a command needs before anything else is imported, which takes seconds.

Ctrl-C ends the process at once and with one line from here on, where Python's own handler would raise in the middle of
an import. There is nothing to save yet. `configs.command` takes over when the imports are done.

Threads on the CPU sleep while they wait for each other. By default they keep their cores busy, so that three commands
on one machine, each with a thread for every core, took five times as long to encode films as with sleeping threads.
"""

import os
import signal


def _end(number: int, frame: object) -> None:
    os.write(2, b"interrupted\n")
    os._exit(128 + number)  # the status that a shell gives an interrupted command


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # is read when torch is imported
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a process in the background may ignore it
    signal.signal(signal.SIGINT, _end)
