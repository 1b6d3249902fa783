#include "viterbi.h"

namespace qlr {
void search_portable(const Code& code, const float* x, int32_t end, int32_t* states, const Room& room) {
  search<Portable>(code, x, end, states, room);
}
}  // namespace qlr
