"""A step as a program: compiled when it is first called, and known by its text."""

from mtnlg_jax.train.processes import fingerprint
from mtnlg_jax.train.watchdog import Watchdog


class Program:
    """The jitted ``function``, compiled at its first call under the long limit of ``watchdog``; all calls have the
    same shapes, types and shardings. ``fingerprint`` is of what was given to the compiler, "" before that."""

    def __init__(self, function, watchdog: Watchdog):
        self._function, self._watchdog, self._compiled, self.fingerprint = function, watchdog, None, ""

    def __call__(self, *args):
        if self._compiled is None:
            self._watchdog.enter("compilation")
            lowered = self._function.lower(*args)
            self.fingerprint = fingerprint(lowered.as_text())
            self._compiled = lowered.compile()
        return self._compiled(*args)
