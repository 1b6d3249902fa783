// 16 lanes, for x86-64 with AVX2.
#include "search.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <cstring>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#include "avx2.h"

namespace qlr {
void search_avx2(const Code& code, const float* x, int32_t end, int32_t* states, const Room& room) {
  search<Avx2>(code, x, end, states, room);
}
}  // namespace qlr
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
