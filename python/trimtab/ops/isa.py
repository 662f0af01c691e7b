"""Which CPU instruction set the kernels use."""

import ctypes
from functools import cache
from pathlib import Path

NAMES = ("scalar", "avx2", "avxvnni", "avx512", "amx")


@cache
def _lib() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(Path(__file__).parent.parent / "lib" / "libtrimtab.so"))
    lib.tt_last_error.restype = ctypes.c_char_p
    lib.tt_set_isa.argtypes = [ctypes.c_char_p]
    return lib


def _check(status: int) -> None:
    if status:
        raise ValueError(_lib().tt_last_error().decode())


def get_isa() -> str:
    """The instruction set in use: the best this CPU has, or what ``TRIMTAB_ISA`` or set_isa chose.

    Raises ValueError if ``TRIMTAB_ISA`` names a set that does not exist or this CPU lacks.
    """
    isa = ctypes.c_int()
    _check(_lib().tt_get_isa(ctypes.byref(isa)))
    return NAMES[isa.value]


def set_isa(name: str | None) -> None:
    """Caps this process at one of "scalar", "avx2", "avxvnni", "avx512", "amx"; None undoes that.

    Results do not change, only speed. Raises ValueError for an unknown name or one this CPU lacks.
    """
    _check(_lib().tt_set_isa((name or "").encode()))


def available_isas() -> list[str]:
    """The instruction sets this CPU and operating system can run, slowest first."""
    return [name for i, name in enumerate(NAMES) if _lib().tt_isa_available(i)]
