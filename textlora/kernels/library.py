"""The compiled kernels as a library: loaded, its version and what this processor has for it checked. Imports
no torch."""

import ctypes
from functools import cache
from pathlib import Path

LIBRARY = Path(__file__).with_name("_kernels.so")
VERSION = 9  # of what `bindings` calls, as in attention.c

_pointer, _long, _int, _float = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float


@cache
def _opened() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    if not LIBRARY.is_file():
        return None, "textlora was installed without a C compiler, or not on x86-64 Linux"
    try:
        found = ctypes.CDLL(str(LIBRARY))
        if found.textlora_version() == VERSION:
            return found, None
    except (OSError, AttributeError):
        return None, f"{LIBRARY.name} cannot be loaded; install textlora again"
    return None, f"{LIBRARY.name} is of another version of textlora; install textlora again"


@cache
def library() -> ctypes.CDLL | None:
    """The compiled functions; None where there are none."""
    found = _opened()[0]
    if found is None:
        return None
    found.textlora_attention.restype = None
    found.textlora_attention.argtypes = [_pointer] * 5 + [_long] * 5 + [_float, _int]
    found.textlora_attention_scratch.restype, found.textlora_attention_scratch.argtypes = _long, []
    found.textlora_lora.restype, found.textlora_lora.argtypes = None, [_pointer] * 3 + [_long] * 4
    found.textlora_gelu.restype = None
    found.textlora_gelu.argtypes = [_pointer] * 3 + [_long] * 2 + [_int] * 2
    found.textlora_norm.restype, found.textlora_norm.argtypes = None, [_pointer] * 7 + [_long] * 2 + [_float]
    found.textlora_norm_back.restype, found.textlora_norm_back.argtypes = None, [_pointer] * 4 + [_long] * 2
    found.textlora_embed.restype = None
    found.textlora_embed.argtypes = [_pointer] * 9 + [_long] * 2 + [_float]
    found.textlora_mean.restype, found.textlora_mean.argtypes = None, [_pointer] * 3 + [_long] * 2
    found.textlora_mean_back.restype, found.textlora_mean_back.argtypes = None, [_pointer] * 3 + [_long] * 2
    found.textlora_product_size.restype, found.textlora_product_size.argtypes = _long, [_long] * 2 + [_int]
    found.textlora_product_lay_out.restype = None
    found.textlora_product_lay_out.argtypes = [_pointer] * 2 + [_long] * 4 + [_float, _int]
    found.textlora_product.restype = None
    found.textlora_product.argtypes = (
        [_pointer, _long, _pointer, _pointer, _pointer, _long, _pointer] + [_long] * 3 + [_int] * 2
    )
    found.textlora_train_kept.restype, found.textlora_train_kept.argtypes = _long, [_pointer] * 2
    found.textlora_train_scratch.restype, found.textlora_train_scratch.argtypes = _long, [_pointer] * 2
    found.textlora_train.restype, found.textlora_train.argtypes = None, [_pointer] * 2
    found.textlora_train_back.restype, found.textlora_train_back.argtypes = None, [_pointer] * 2
    found.textlora_join.restype, found.textlora_join.argtypes = None, [_pointer, _int, _int]
    found.textlora_cores.restype, found.textlora_cores.argtypes = None, [_int]
    found.textlora_hands.restype, found.textlora_hands.argtypes = _int, []
    found.textlora_help.restype, found.textlora_help.argtypes = None, []
    found.textlora_encode_scratch.restype, found.textlora_encode_scratch.argtypes = _long, [_pointer] * 2
    found.textlora_encode.restype, found.textlora_encode.argtypes = None, [_pointer] * 2
    found.textlora_amx_bytes.restype, found.textlora_amx_bytes.argtypes = _long, [_long, _long]
    found.textlora_amx_lay_out.restype = None
    found.textlora_amx_lay_out.argtypes = [_pointer, _long, _long, _pointer]
    found.textlora_amx_scratch.restype, found.textlora_amx_scratch.argtypes = _long, []
    found.textlora_amx_product.restype = None
    found.textlora_amx_product.argtypes = [_pointer] * 6 + [_long] * 3 + [_int]
    return found


@cache
def lanes() -> int:
    """Numbers in a vector of those that `attention` and `Product` compute with: 16 with AVX-512, 8 with AVX2;
    0 where they do not run."""
    return 0 if library() is None else library().textlora_attention_lanes()


@cache
def has_amx() -> bool:
    """Whether `Panels` run here: AMX, AVX-512 with bfloat16, and a system that lets this process use them."""
    return library() is not None and bool(library().textlora_amx_usable())


def instruction_sets() -> str:
    """What the kernels use here: `AVX-512 + AMX`, `AVX-512`, `AVX2`, or an empty string where they are not in
    use."""
    return {16: "AVX-512", 8: "AVX2", 0: ""}[lanes()] + (" + AMX" if has_amx() else "")


def why_not() -> str | None:
    """Why the kernels are not in use on this machine; None where they are."""
    if library() is None:
        return _opened()[1]
    return None if lanes() else "this processor has no AVX2"
