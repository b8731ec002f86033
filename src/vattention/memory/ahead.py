"""Physical pages created before they are asked for: on a device creating is the slow half of growing."""

from __future__ import annotations

import threading
import time
import weakref
from typing import TYPE_CHECKING

from vattention.errors import VAttentionError

if TYPE_CHECKING:
    from vattention.memory.pool import PagePool

_PAUSE = 0.0002  # seconds between two creations, in which others get the pool's lock


class CreateAhead:
    """A thread that keeps pages of a pool created and free. It ends when the pool is gone.

    Attributes:
        awake: somebody took pages since the pool last gave memory back. Until then nothing is created. Changed under
            the pool's lock.
        failure: what creating last failed with. The next one who takes pages meets the same and is told.
    """

    def __init__(self, pool: PagePool, pages: int) -> None:
        self.awake = False
        self.failure: VAttentionError | None = None
        self._pages = pages
        self._wanted = threading.Event()
        self._pool = weakref.ref(pool, lambda _: self._wanted.set())
        self._thread: threading.Thread | None = None  # none before the first page is taken

    def wake(self) -> None:
        """Pages are being taken. Call under the pool's lock."""
        self.awake = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="vattention-creator", daemon=True)
            self._thread.start()
        self._wanted.set()

    def _work(self) -> None:
        while (pool := self._pool()) is not None:
            try:
                while pool.create_ahead(self._pages):
                    time.sleep(_PAUSE)
            except VAttentionError as error:
                self.failure = error
            del pool
            self._wanted.wait()
            self._wanted.clear()
