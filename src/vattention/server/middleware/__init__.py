"""What stands between a client and the routes: who it is, how much it may send, and what is written down.

Plain ASGI applications around another one, each of one idea. `guarded` puts them in their order.
"""

from vattention.server.middleware.guarded import guarded
from vattention.server.middleware.record import Record, record_of

__all__ = ["Record", "guarded", "record_of"]
