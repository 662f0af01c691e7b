#include "cpu/status.h"

#include <cstdarg>
#include <cstdio>

namespace trimtab {
namespace {
thread_local char last_error[512] = "";
}

tt_status set_error(tt_status status, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace trimtab

int32_t tt_abi_version(void) { return TT_ABI_VERSION; }
const char* tt_last_error(void) { return trimtab::last_error; }
void tt_set_last_error(const char* message) {
  std::snprintf(trimtab::last_error, sizeof trimtab::last_error, "%s", message);
}
