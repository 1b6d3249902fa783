#include "product_kernels.h"

namespace qlr {
const Routines portable_routines = {"portable", multiply<Plain>, add<Plain>, decode<Plain>, dense<Plain>, rotate};
}  // namespace qlr
