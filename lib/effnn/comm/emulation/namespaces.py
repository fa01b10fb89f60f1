"""Network namespaces that end with their owner. Each is held open by one small process and by nothing else.

The kernel removes a network namespace, and the interfaces in it, when its last process has ended and no name under
/run/netns refers to it. So none is named here. The holder process reads from a pipe whose write end is ours: when we
close it, or end in any way, SIGKILL included, the holder reads end-of-file and ends, and nothing is left to clean up.

Two ways lead in. Root opens a namespace directly; anybody else first opens a user namespace, in which the kernel
grants the rights over the network namespaces opened from there. See namespaces(7), user_namespaces(7).
"""

import os
import select
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from effnn.base import NotAvailable

# Debian keeps ip and tc outside an ordinary user's PATH, though anybody may run them.
ADMIN_FOLDERS = "/usr/local/sbin:/usr/sbin:/sbin"
PACKAGES = {
    "ip": "iproute2 (Fedora: iproute)",
    "tc": "iproute2 (Fedora: iproute-tc)",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
LIMIT_S = 20.0  # for one command that takes milliseconds: only a machine that is stuck reaches it

# Settings that forbid user namespaces to ordinary users: file, the value that forbids, what allows them again.
SWITCHES = (
    ("user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"),
    ("user/max_net_namespaces", "0", "sysctl user.max_net_namespaces=10000"),
    ("kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"),
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"),
)


class NotPermitted(NotAvailable):
    """The kernel does not let us open a namespace."""


@dataclass(frozen=True)
class Namespace:
    """A network namespace while it is open: pid of its holder, and the words before a command to run it inside."""

    pid: int
    prefix: tuple[str, ...]

    def run(self, *command: str, hint: str = "") -> str:
        """Run a command inside and return what it wrote. Raises NotAvailable, with its error text, when it fails."""
        words = [*self.prefix, program(command[0]), *command[1:]]
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            raise NotAvailable(f"`{' '.join(command)}` did not end within {LIMIT_S:g} s") from None
        if done.returncode:
            raise NotAvailable(f"`{' '.join(command)}` failed ({_short(done.stderr)}){hint}")
        return done.stdout


def program(name: str) -> str:
    """Return the path of one of the programs in PACKAGES. Raises NotAvailable naming the package that has it."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:{ADMIN_FOLDERS}")
    if found is None:
        raise NotAvailable(f"the program {name} is missing; install the package {PACKAGES[name]}")
    return found


def open_namespaces(count: int, rootless: bool, stack: ExitStack) -> list[Namespace]:
    """Return `count` new network namespaces, which live until the stack is closed or this process ends.

    rootless: True opens a user namespace around them, in which commands see themselves as root and have the caller's
    rights over files; False needs root. Raises NotPermitted when the kernel refuses; what was opened is then closed
    with the stack.
    """
    enter = (program("nsenter"), "--preserve-credentials", "-U") if rootless else (program("nsenter"),)
    unshare = program("unshare")
    opened: list[Namespace] = []
    for _ in range(count):
        if not rootless:
            words = (unshare, "-n")
        elif not opened:
            words = (unshare, "-U", "-r", "-n")
        else:  # all in the first one's user namespace: only there may one command reach two of them
            words = (*enter, "-t", str(opened[0].pid), unshare, "-n")
        pid = _hold(words, rootless, stack)
        opened.append(Namespace(pid, (*enter, "-n", "-t", str(pid))))
    return opened


def _hold(words: tuple[str, ...], rootless: bool, stack: ExitStack) -> int:
    """Start a holder and return its pid, which unshare and nsenter keep, once it is inside its namespace."""
    # In a session of its own, so that Ctrl-C in a terminal reaches us and not the holders.
    holder = subprocess.Popen(
        [*words, "/bin/sh", "-c", "echo inside; read _", f"effnn-node-of-{os.getpid()}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    stack.callback(_release, holder)
    ready, _, _ = select.select([holder.stdout], [], [], LIMIT_S)
    if not (ready and holder.stdout.readline()):
        holder.kill()
        remedy = f"; {how_to_allow()}" if rootless else ""
        reason = _short(holder.stderr.read().decode(errors="replace")) or f"no answer within {LIMIT_S:g} s"
        raise NotPermitted(f"network namespaces are not permitted here ({reason}){remedy}")
    return holder.pid


def _release(holder: subprocess.Popen) -> None:
    """End a holder and wait for it: its pid stays ours until then, so it can never mean another process."""
    holder.stdin.close()
    try:
        holder.wait(LIMIT_S)
    except subprocess.TimeoutExpired:
        holder.kill()
        holder.wait()
    holder.stdout.close()
    holder.stderr.close()


def how_to_allow() -> str:
    """Return what lets an ordinary user open namespaces: the setting that forbids it here, or else the usual reason."""
    for name, forbids, remedy in SWITCHES:
        setting = Path("/proc/sys", name)
        if setting.is_file() and setting.read_text().strip() == forbids:
            return f"an administrator allows them with `{remedy}`"
    return "run as root, or, in a container, start it with the capabilities SYS_ADMIN and NET_ADMIN"


def _short(text: str) -> str:
    return " ".join(text.split())
