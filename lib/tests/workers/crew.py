"""What the ranks of helpers/crew.py run: one function after another, as they are asked."""

import faulthandler
import os
import pickle
import queue
import threading
from multiprocessing.connection import Client, Connection


def serve(address: str) -> None:
    """Answer calls until the line is cut. An error is not answered: it ends the launch, which reports it."""
    line = Client(address, "AF_UNIX")
    line.send(int(os.environ["RANK"]))
    calls: queue.Queue = queue.Queue()
    working = threading.Event()
    threading.Thread(target=_listen, args=(line, calls, working), daemon=True).start()
    while (call := calls.get()) is not None:
        function, args = call
        result = function(*args)
        working.clear()
        line.send_bytes(pickle.dumps(result))  # send would share a tensor's memory and not its values


def _listen(line: Connection, calls: queue.Queue, working: threading.Event) -> None:
    """Pass calls on; where the line is cut during one, say where this rank is and end."""
    try:
        while True:
            call = pickle.loads(line.recv_bytes())
            working.set()
            calls.put(call)
    except (EOFError, OSError):
        if working.is_set():
            faulthandler.dump_traceback(all_threads=True)
            os._exit(1)
        calls.put(None)
