// What a custom call and XLA's runtime hand each other: the C ABI of XLA's foreign function interface, version 0.1.
//
// These are declarations of our own of the structs that the interface documents (xla/ffi/api/c_api.h), as far as the
// handlers read them, so that the library builds without anybody's headers and one binary serves every runtime. A
// runtime promises to serve handlers of an older version; it refuses them by name when it no longer does. Every
// struct says how many bytes of it its writer knows: `whole` is what a reader has to check first.
#ifndef ADAFACTOR_XLA_ABI_H
#define ADAFACTOR_XLA_ABI_H

#include <cstddef>
#include <cstdint>

namespace adafactor {
namespace xla {

constexpr int kMajor = 0, kMinor = 1;

struct Extension {
  size_t size;
  int32_t kind;
  Extension* next;
};
constexpr int32_t kMetadata = 1;  // of `Extension`: the runtime asks for the handler's metadata, and nothing else

struct Version {
  size_t size;
  Extension* extensions;
  int32_t major, minor;
};

struct Metadata {
  size_t size;
  Version version;
  uint32_t traits;
};

struct MetadataExtension {
  Extension base;
  Metadata* metadata;
};

// xla::PrimitiveType
enum : int32_t { kPred = 1, kS64 = 5, kF16 = 10, kF32 = 11, kF64 = 12, kBF16 = 16 };

struct Buffer {
  size_t size;
  Extension* extensions;
  int32_t dtype;
  void* data;
  int64_t rank;
  int64_t* dims;
};

struct Scalar {
  int32_t dtype;
  void* value;
};

struct Array {
  int32_t dtype;
  size_t count;
  void* data;
};

struct Text {
  const char* data;
  size_t length;
};

// Arguments, or results.
struct Operands {
  size_t size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  void** values;
};
constexpr int32_t kBuffer = 1;

struct Attributes {
  size_t size;
  Extension* extensions;
  int64_t count;
  int32_t* kinds;
  Text** names;
  void** values;
};
constexpr int32_t kArray = 1, kScalar = 3;

struct Error;    // the runtime's own
struct Context;  // of one execution, the runtime's own
struct Frame;
using Handler = Error*(Frame*);

struct ErrorCreate {
  size_t size;
  Extension* extensions;
  const char* message;
  int32_t code;  // absl::StatusCode
};
constexpr int32_t kInvalidArgument = 3, kResourceExhausted = 8, kUnimplemented = 12, kInternal = 13;

struct ErrorDestroy {
  size_t size;
  Extension* extensions;
  Error* error;
};

struct Register {
  size_t size;
  Extension* extensions;
  Text name, platform;
  struct {
    Handler *instantiate, *prepare, *initialize, *execute;
  } bundle;
  uint32_t traits;
};

// Runs a task on a thread of the runtime's pool, some time or other.
struct Schedule {
  size_t size;
  Extension* extensions;
  Context* context;
  void (*task)(void*);
  void* data;
};

struct CountThreads {
  size_t size;
  Extension* extensions;
  Context* context;
  int64_t* threads;
};

struct Api {
  size_t size;
  Extension* extensions;
  Version version;  // the runtime's
  const void* internal;
  Error* (*error_create)(ErrorCreate*);
  void* error_get_message;
  void (*error_destroy)(ErrorDestroy*);
  Error* (*handler_register)(Register*);
  void *stream_get, *type_register, *context_get, *state_set, *state_get, *memory_allocate, *memory_free;
  Error* (*schedule)(Schedule*);
  Error* (*count_threads)(CountThreads*);
};

struct Frame {
  size_t size;
  Extension* extensions;
  const Api* api;
  Context* context;
  int32_t stage;
  Operands arguments, results;
  Attributes attributes;
};
constexpr int32_t kExecute = 3;

static_assert(sizeof(void*) == 8, "the offsets of the interface are those of a 64-bit machine");
static_assert(sizeof(Extension) == 24 && sizeof(Version) == 24 && sizeof(Buffer) == 48, "XLA FFI 0.1");
static_assert(sizeof(Operands) == 40 && sizeof(Attributes) == 48 && sizeof(Frame) == 168, "XLA FFI 0.1");
static_assert(offsetof(Metadata, traits) == 32 && offsetof(Register, traits) == 80, "XLA FFI 0.1");
static_assert(offsetof(Api, error_create) == 48 && offsetof(Api, schedule) == 136, "XLA FFI 0.1");

// Whether the writer of a struct knew of all that the type here declares. Behind its last field a struct may be padded.
template <class T>
bool whole(const T& value, size_t size = sizeof(T)) {
  return value.size >= size;
}

}  // namespace xla
}  // namespace adafactor
#endif
