// 16 lanes, for x86-64 with AVX2.
#include "product.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "product_avx2.h"

namespace qlr {
const Routines avx2_routines = routines<Avx2Lanes>("avx2");
}  // namespace qlr
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
