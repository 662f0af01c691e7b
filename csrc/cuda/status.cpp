// set_error of libtrimtab_cuda.so: its messages are tt_last_error's of libtrimtab.so.
#include <trimtab/trimtab.h>

#include <cstdarg>
#include <cstdio>

#include "cpu/status.h"

namespace trimtab {

tt_status set_error(tt_status status, const char* format, ...) {
  char message[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  tt_set_last_error(message);
  return status;
}

}  // namespace trimtab
