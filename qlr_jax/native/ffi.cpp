// The search and the products as custom calls of XLA's: inside compiled code, on the threads of its pool.
#include <algorithm>
#include <cstdlib>

#include "product.h"
#include "search.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

ffi::Error search(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> shifts, ffi::Buffer<ffi::F32> gain,
                  ffi::Buffer<ffi::S32> ends, ffi::Buffer<ffi::S32> of, ffi::ResultBuffer<ffi::S32> states, int64_t state_bits,
                  bool exact) {
  static const qlr::Search widest = qlr::search_of(qlr::widest());
  const int64_t count = (int64_t)x.element_count() / qlr::kLength;
  const int64_t kinds = (int64_t)gain.element_count(), chosen = (int64_t)of.element_count();
  if ((int64_t)shifts.element_count() != kinds * qlr::kLength || (int64_t)ends.element_count() != count || (chosen && chosen != count))
    return ffi::Error::InvalidArgument("a search takes 256 shifts and a gain for each code, and an end and a code for each sequence");
  const qlr::Codes codes = {kinds, shifts.typed_data(), gain.typed_data(), chosen ? of.typed_data() : nullptr};
  const int helpers = (int)pool.num_threads() - 1;
  const char* wrong = qlr::search_all(widest, x.typed_data(), codes, ends.typed_data(), count, (int)state_bits, exact,
                                      states->typed_data(), helpers, [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  return wrong == nullptr ? ffi::Error::Success() : ffi::Error::InvalidArgument(wrong);
}

// ------------------------------------------------------------------ products (core/products.py)

constexpr size_t kNumbers = 8, kPartNumbers = 7, kPartFloats = 19, kPartArrays = 3, kArrays = 3 * kPartArrays + 5;

template <class T> const T* data(const ffi::AnyBuffer& array) {
  return array.element_count() ? (const T*)array.untyped_data() : nullptr;
}

// numbers: kind, bits, group, height, rows, cols, count; floats: two gains, zero, levels; arrays: codes, scales, zeros.
qlr::Part part_of(const int64_t* numbers, const float* floats, const ffi::AnyBuffer* arrays) {
  qlr::Part part = {};
  part.kind = (int32_t)numbers[0], part.bits = (int32_t)numbers[1], part.group = (int32_t)numbers[2], part.height = (int32_t)numbers[3];
  part.rows = numbers[4], part.cols = numbers[5], part.count = numbers[6];
  part.codes = data<uint8_t>(arrays[0]), part.zeros = data<uint8_t>(arrays[2]);
  if (arrays[1].element_type() == ffi::DataType::F16) part.scales = data<uint16_t>(arrays[1]);
  else part.small_scales = data<uint8_t>(arrays[1]);
  part.gains[0] = floats[0], part.gains[1] = floats[1], part.zero = floats[2], part.levels = floats + 3;
  return part;
}

qlr::Team team_of(ffi::ThreadPool& pool) {
  return [&pool](const std::function<void()>& task, int threads) {
    for (int i = 1; i < threads; i++) pool.Schedule(std::function<void()>(task));
    task();
  };
}

ffi::Error product(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::RemainingArgs rest, ffi::ResultBuffer<ffi::F32> y,
                   ffi::Span<const int64_t> numbers, ffi::Span<const int64_t> parts, ffi::Span<const float> floats, bool exact) {
  if (numbers.size() != kNumbers || parts.size() != 3 * kPartNumbers || floats.size() != 3 * kPartFloats || rest.size() != kArrays)
    return ffi::Error::InvalidArgument("a product takes the numbers of a layer and of three parts");
  std::vector<ffi::AnyBuffer> arrays;
  for (size_t i = 0; i < rest.size(); i++) {
    auto found = rest.get<ffi::AnyBuffer>(i);
    if (found.has_error()) return found.error();
    arrays.push_back(*found);
  }
  qlr::Layer layer = {};
  layer.outputs = numbers[0], layer.inputs = numbers[1], layer.rank = (int32_t)numbers[2], layer.seed = (int32_t)numbers[3];
  layer.turned_inputs = (int32_t)numbers[4], layer.turned_outputs = (int32_t)numbers[5];
  layer.input_block = (int32_t)numbers[6], layer.output_block = (int32_t)numbers[7];
  qlr::Part* own[] = {&layer.backbone, &layer.left, &layer.right};
  for (size_t i = 0; i < 3; i++)
    *own[i] = part_of(parts.begin() + i * kPartNumbers, floats.begin() + i * kPartFloats, arrays.data() + i * kPartArrays);
  const ffi::AnyBuffer* others = arrays.data() + 3 * kPartArrays;
  layer.component_scale = data<uint16_t>(others[0]), layer.scale = data<float>(others[1]), layer.row_scales = data<uint16_t>(others[2]);
  layer.output_signs = data<uint16_t>(others[3]), layer.input_signs = data<uint16_t>(others[4]);
  const int64_t tokens = (int64_t)x.element_count() / std::max<int64_t>(layer.inputs, 1);
  const char* wrong = qlr::multiply_layer(*qlr::widest_routines(), layer, x.typed_data(), tokens, qlr::kFloat32, exact, y->typed_data(),
                                          (int)pool.num_threads(), team_of(pool));
  return wrong == nullptr ? ffi::Error::Success() : ffi::Error::InvalidArgument(std::string("a product takes ") + wrong);
}

ffi::Error decoded(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer zeros,
                   ffi::ResultBuffer<ffi::F32> rows, ffi::Span<const int64_t> numbers, ffi::Span<const float> floats) {
  if (numbers.size() != kPartNumbers || floats.size() != kPartFloats)
    return ffi::Error::InvalidArgument("decoding takes the numbers of a part");
  const ffi::AnyBuffer arrays[] = {codes, scales, zeros};
  const qlr::Part part = part_of(numbers.begin(), floats.begin(), arrays);
  const char* wrong =
      qlr::decode_part(*qlr::widest_routines(), part, 0, part.rows, rows->typed_data(), (int)pool.num_threads(), team_of(pool));
  return wrong == nullptr ? ffi::Error::Success() : ffi::Error::InvalidArgument(std::string("decoding takes ") + wrong);
}

}  // namespace

#define QLR_CALL(name) extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* name(XLA_FFI_CallFrame*)

QLR_CALL(qlr_search_call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(qlr_search_call, search,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>()
                                  .Attr<int64_t>("state_bits")
                                  .Attr<bool>("exact"));

QLR_CALL(qlr_product_call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(qlr_product_call, product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .RemainingArgs()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("numbers")
                                  .Attr<ffi::Span<const int64_t>>("parts")
                                  .Attr<ffi::Span<const float>>("floats")
                                  .Attr<bool>("exact"));

QLR_CALL(qlr_decode_call);
XLA_FFI_DEFINE_HANDLER_SYMBOL(qlr_decode_call, decoded,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<ffi::Span<const int64_t>>("numbers")
                                  .Attr<ffi::Span<const float>>("floats"));
