// The last error of each thread: a fixed buffer, so that failing never allocates.
#include "error.h"

#include <cstdarg>
#include <cstdio>

namespace pockc {
namespace {
thread_local char last_error_text[1024] = "";
}

const char* last_error() { return last_error_text; }
void clear_error() { last_error_text[0] = '\0'; }

Status fail(Status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error_text, sizeof(last_error_text), format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace pockc
