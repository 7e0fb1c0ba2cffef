"""One library for every jaxlib: what the handlers answer, and what is said where a jaxlib does not take them."""

import ctypes

import jaxlib.version
import pytest
from native_support import need

from adafactor.core import native
from adafactor.engine.xla import custom_call

POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32


def struct(**fields):
    return type("Struct", (ctypes.Structure,), {"_fields_": list(fields.items())})


METADATA = struct(size=SIZE, version_size=SIZE, extensions=POINTER, major=INT, minor=INT, traits=INT)
EXTENSION = struct(size=SIZE, kind=INT, next=POINTER, metadata=ctypes.POINTER(METADATA))
OPERANDS = struct(size=SIZE, extensions=POINTER, count=ctypes.c_int64, kinds=POINTER, values=POINTER)
ATTRIBUTES = struct(size=SIZE, extensions=POINTER, count=ctypes.c_int64, kinds=POINTER, names=POINTER, values=POINTER)
FRAME = struct(
    size=SIZE,
    extension=ctypes.POINTER(EXTENSION),
    api=POINTER,
    context=POINTER,
    stage=INT,
    arguments=OPERANDS,
    results=OPERANDS,
    attributes=ATTRIBUTES,
)
ERROR = struct(size=SIZE, extensions=POINTER, message=ctypes.c_char_p, code=INT)
CREATE = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.POINTER(ERROR))
API = struct(head=ctypes.c_char * 48, error_create=CREATE)


@pytest.fixture
def handlers():
    need(custom_call.why_not())
    library = custom_call._library()
    calls = [getattr(library, name) for name in custom_call._CALLS]
    for call in calls:
        call.restype = POINTER
    return calls


def complaint(handler, **sizes):
    """What the handler says of a call without operands whose structs have the given sizes."""
    said = []

    @CREATE
    def create(error):
        said.append(error.contents.message.decode())
        return 1

    api = API(b"", create)
    frame = FRAME(
        ctypes.sizeof(FRAME),
        None,
        ctypes.cast(ctypes.pointer(api), POINTER),
        None,
        3,
        *(OPERANDS(sizes.get(name, ctypes.sizeof(OPERANDS))) for name in ("arguments", "results")),
        ATTRIBUTES(ctypes.sizeof(ATTRIBUTES)),
    )
    frame.size = sizes.get("frame", frame.size)
    assert handler(ctypes.byref(frame)) == 1
    return said[0]


def test_handlers_speak_version_0_1(handlers):
    for handler in handlers:
        metadata = METADATA(ctypes.sizeof(METADATA), major=9, minor=9)
        frame = FRAME(ctypes.sizeof(FRAME), ctypes.pointer(EXTENSION(32, 1, None, ctypes.pointer(metadata))))
        assert handler(ctypes.byref(frame)) is None
        assert (metadata.version_size, metadata.major, metadata.minor) == (24, 0, 1)


def test_a_call_that_is_laid_out_otherwise_is_refused(handlers):
    for handler in handlers:
        for sizes in ({"frame": 160}, {"arguments": 32}, {"results": 48}):
            assert "lays out its calls in another way" in complaint(handler, **sizes)
        assert "fewer buffers" in complaint(handler)  # laid out as it should be, and empty


def test_a_missing_symbol_is_named(monkeypatch):
    need(native.why_not())
    monkeypatch.setattr(custom_call, "_CALLS", ("adafactor_xla_measure", "adafactor_xla_dance"))
    assert "lack adafactor_xla_dance. Install adafactor again." in custom_call._register.__wrapped__()


def test_a_jaxlib_that_refuses_the_version_is_quoted(handlers, monkeypatch):
    @ctypes.CFUNCTYPE(POINTER, ctypes.POINTER(FRAME))
    def of_tomorrow(frame):
        metadata = frame.contents.extension.contents.metadata.contents
        metadata.version_size, metadata.major, metadata.minor = 24, 0, 99
        return None

    class Library:
        adafactor_xla_tomorrow = of_tomorrow
        adafactor_xla_configure = None

    monkeypatch.setattr(custom_call, "_CALLS", ("adafactor_xla_tomorrow",))
    monkeypatch.setattr(custom_call, "_library", Library)
    sentence = custom_call._register.__wrapped__()
    assert f"jaxlib {jaxlib.version.__version__} does not take the native kernels: " in sentence
    assert "(0.99)" in sentence
    assert len(sentence.splitlines()) == 1
