// The search as a custom call of XLA's: inside compiled code, on the threads of its pool.
#include <cstdlib>

#include "search.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

ffi::Error search(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> shifts, ffi::Buffer<ffi::F32> gain,
                  ffi::Buffer<ffi::S32> ends, ffi::ResultBuffer<ffi::S32> states, int64_t state_bits, bool exact) {
  static const qlr::Search widest = qlr::search_of(qlr::widest());
  const int64_t count = (int64_t)x.element_count() / qlr::kLength;
  if (shifts.element_count() != qlr::kLength || (int64_t)ends.element_count() != count)
    return ffi::Error::InvalidArgument("a search takes 256 shifts, and an end for each sequence");
  const int helpers = (int)pool.num_threads() - 1;
  const char* wrong = qlr::search_all(widest, x.typed_data(), shifts.typed_data(), gain.typed_data()[0], ends.typed_data(), count,
                                      (int)state_bits, exact, states->typed_data(), helpers,
                                      [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  return wrong == nullptr ? ffi::Error::Success() : ffi::Error::InvalidArgument(wrong);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* qlr_search_call(XLA_FFI_CallFrame*);
XLA_FFI_DEFINE_HANDLER_SYMBOL(qlr_search_call, search,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("state_bits")
                                  .Attr<bool>("exact"));
