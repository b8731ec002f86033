"""What stands between a client and the routes: who it is, how much it may ask, and what is written down.

Plain ASGI applications around another one, each of one idea. `guards` puts them in their order.
"""

from vattention.server.middleware.guards import guards
from vattention.server.middleware.record import Record, current_record

__all__ = ["Record", "current_record", "guards"]
