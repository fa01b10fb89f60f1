"""Kills the process groups that its parent has named on standard input, once the parent is gone.

Run as a script, in a session of its own. The end of the input is the signal: the operating system closes the pipe
however the parent ended, `kill -9` included, so nothing has to be polled or cleaned up.
"""

import os
import signal
import sys


def main() -> None:
    """Read lines `watch <group>` and `forget <group>` until the input ends, then kill the groups still watched."""
    groups: set[int] = set()
    for line in sys.stdin:
        word, group = line.split()
        (groups.add if word == "watch" else groups.discard)(int(group))
    for group in groups:
        try:
            os.killpg(group, signal.SIGKILL)
        except ProcessLookupError:
            pass


if __name__ == "__main__":
    main()
