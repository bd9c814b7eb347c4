"""Threads that take turns: a pass through a model that can be halted in its middle and resumed."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable

__all__ = ["Cancelled", "Lane"]


class Cancelled(BaseException):
    """Unwinds a halted pass whose result nobody waits for any more."""


class Lane:
    """A thread that works only while its owner waits for it; of both, one runs at a time.

    Args:
        name: of the thread.
    """

    def __init__(self, name: str):
        # Locks that are released by the other side: half the price of semaphores.
        self._go, self._back = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._job: Callable[[], None] | None = None
        self._context = contextvars.Context()
        self._owed = False  # whether the owner has yet to hear from the thread
        self.halted = False
        self._cancelled = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    # The owner's side.

    def start(self, job: Callable[[], None]) -> None:
        """Run a job in a copy of the caller's context until it halts or ends; it must not raise."""
        self._job, self._context = job, contextvars.copy_context()
        self._turn()

    def resume(self) -> None:
        """Go on with the halted job until it halts again or ends."""
        self._turn()

    def close(self) -> None:
        """Unwind a halted job and end the thread."""
        if self._owed:  # the owner was interrupted while it waited
            self._hear()
        self._cancelled = True
        while self.halted:
            self._turn()
        self._job = None
        self._go.release()
        self._thread.join()

    def _turn(self) -> None:
        self._owed = True
        self._go.release()
        self._hear()

    def _hear(self) -> None:
        self._back.acquire()
        self._owed = False

    # The thread's side.

    def halt(self) -> None:
        """From within the job: let the owner go on, and wait until it resumes this.

        Raises:
            Cancelled: the owner wants the job to end.
        """
        self.halted = True
        self._back.release()
        self._go.acquire()
        self.halted = False
        if self._cancelled:
            raise Cancelled

    def _work(self) -> None:
        while True:
            self._go.acquire()
            job, self._job = self._job, None
            if job is None:
                return
            self._context.run(job)
            del job
            self._back.release()
