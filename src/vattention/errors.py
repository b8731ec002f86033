"""Every error this package raises on purpose.

Bad arguments of the wrong *type* raise `TypeError`, as in the standard library; everything else is a
`VAttentionError`. After any of them the object that raised is still usable and nothing was half done.
"""

from __future__ import annotations

import errno
import os


class VAttentionError(Exception):
    """The root of the hierarchy: catch this to catch everything."""


class ConfigError(VAttentionError, ValueError):
    """A configuration that cannot work, or a feature that is not built. The message says what to change."""


class InvalidRequest(VAttentionError, ValueError):
    """A call or a request that can never be served: a dead slot, a prompt that is too long, use after close."""


class PromptTooLong(InvalidRequest):
    """A prompt that can never fit, `max_model_len` or the KV budget: shorten it, or raise what the message names."""


class EngineError(VAttentionError):
    """The engine failed, or was closed, while it had a request, or it has stopped for good: the caller did no wrong.

    `__cause__` is what happened, where something did.
    """


class UnsupportedModel(VAttentionError):
    """A model whose attention this engine would not compute exactly. The message names the reason."""


class OutOfPages(VAttentionError):
    """The pool cannot back what was asked for, now. Free or shorten something, then ask again.

    Attributes:
        needed: pages (or mappings, where `what` says so) that the call had to add.
        free: pages (or mappings) that could be had, reclaimable ones included.
        what: "pages" or "mappings".
    """

    def __init__(self, needed: int, free: int, what: str = "pages", hint: str = "") -> None:
        self.needed = needed
        self.free = free
        self.what = what
        advice = hint or "free or shorten a slot, or raise the memory budget"
        super().__init__(f"{needed} {what} needed, {free} can be had: {advice}")


class DriverError(VAttentionError):
    """A call to the operating system or the device driver failed.

    Attributes:
        call: what failed: a verb of the driver seam ("map"), or a function of the device's interface ("cuMemMap").
        code: the number the system gave.
        out_of_memory: the failure means that physical memory ran out.
    """

    def __init__(
        self, call: str, code: int, advice: str, *, out_of_memory: bool = False, meaning: str | None = None
    ) -> None:
        self.call = call
        self.code = code
        self.out_of_memory = out_of_memory
        if meaning is None:  # else the code is not one of the operating system's
            meaning = f"{errno.errorcode.get(code, code)} ({os.strerror(code)})"
        super().__init__(f"{call} failed with {meaning}: {advice}")
