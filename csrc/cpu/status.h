// How a kernel's entry point reports failure: set_error formats the message for tt_last_error and
// returns the status, so a check reads `if (K < 0) return set_error(TT_INVALID_ARGUMENT, ...)`.
#pragma once
#include <trimtab/trimtab.h>

namespace trimtab {

tt_status set_error(tt_status status, const char* format, ...)
    __attribute__((format(printf, 2, 3), cold));

}  // namespace trimtab
