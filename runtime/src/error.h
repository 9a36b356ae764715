// `fail` is declared in pockc/kernel.h, for kernels too.
#ifndef POCKC_SRC_ERROR_H_
#define POCKC_SRC_ERROR_H_

#include "pockc/kernel.h"

namespace pockc {

const char* last_error();
void clear_error();

// Returns from the calling function when `expression` is not PK_OK.
#define POCKC_TRY(expression)                        \
  do {                                               \
    const ::pockc::Status try_status = (expression); \
    if (try_status != PK_OK) return try_status;      \
  } while (false)

}  // namespace pockc

#endif  // POCKC_SRC_ERROR_H_
