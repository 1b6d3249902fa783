#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("O2")  // a third of the time that -O3 compiles for, and no slower
#endif
#include "product_rounded.h"

namespace qlr {
const Routines portable_routines = routines<Plain>("portable");
}  // namespace qlr
