"""A run that is told to stop ends with one line, and the next start goes on."""

import itertools
import signal
import threading

from torch import distributed


TERMINATED = 128 + signal.SIGTERM  # exit status of a run that was told to stop
_calls = itertools.count()  # all processes make the same calls in the same order


class Termination:
    """SIGTERM during the steps of a training: all processes of a launch stop after the same one, whoever of them got the signal.

    The process that got it writes the number of the step after the next synchronisation of gradients into the key-value
    store of the launch, which every process reads at the end of each of its steps. After the context the handler is again what
    it was before.
    """

    def __init__(self):
        self.asked = self.stopped = False
        self._key = f"trainers.stopping/{next(_calls)}"
        self._before = None

    def __enter__(self) -> "Termination":
        return self

    def listen(self):
        """Takes SIGTERM from now on; to be called before the first step.

        Until then the signal ends the process at once. There is nothing to save, and a handler in Python would not run while
        the process waits for another one, which may have ended.
        """
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)

    def __exit__(self, *_):
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
            if self.asked and not self.stopped:  # it came after the last step
                signal.raise_signal(signal.SIGTERM)

    def _note(self, *_):
        self.asked = True

    def stops_after(self, step: int) -> bool:
        """Whether the step that has just been taken is the last one. Called in every process, after every step."""
        if not (distributed.is_available() and distributed.is_initialized()):
            self.stopped = self.asked
            return self.stopped
        store = distributed.distributed_c10d._get_default_store()
        if self.asked and not store.check([self._key]):
            store.set(self._key, str(step + 1))
        self.stopped = store.check([self._key]) and step >= int(store.get(self._key))
        return self.stopped
