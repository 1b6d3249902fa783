// Which instruction set, what follows from a part's sizes, and a whole layer over the threads of a caller.
#include "product.h"

#include "product_kernels.h"
#include "segments.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <tuple>
#include <vector>

namespace qlr {
namespace {

const std::vector<const Routines*>& choices() {  // what this machine can run, the widest last
  static const std::vector<const Routines*> all = [] {
    std::vector<const Routines*> found = {&portable_routines};
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
      found.push_back(&avx2_routines);
      if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni"))
        found.push_back(&avx512_routines);
    }
#elif defined(__aarch64__)
    found.push_back(&neon_routines);
#endif
    return found;
  }();
  return all;
}

// ------------------------------------------------------------------ layouts

int end_of(int t, int64_t count) { return (int)((t + 1) * count / 32); }  // the bit at which weight t of a sequence ends

// Where the lanes' bytes are looked for, from `from`; in a sequence of `count` bytes, or in a stream (0) that goes on.
void place(Words& w, int64_t count) {
  const bool sequence = count > 0;
  auto fits = [&](int first, int last, int base, int size) {
    for (int i = first; i < last; i++)
      if (w.from[i] < base || w.from[i] + 3 >= base + size) return false;
    return true;
  };
  auto bound = [&](int base, int size) { return sequence ? (int)std::min<int64_t>(base, count - size) : base; };
  auto order = [&](int i, int byte, int base) { return (uint8_t)(w.from[i] + (sequence ? 3 - byte : byte) - base); };
  w.wraps = w.from[0] < 0;
  w.shared = !w.wraps && fits(0, 16, bound(w.from[0], 16), 16);
  w.near = true;
  for (int q = 0; q < 4; q++) {
    w.base[q] = w.shared ? bound(w.from[0], 16) : w.from[4 * q] < 0 ? -4 : bound(w.from[4 * q], 16);
    w.near &= fits(4 * q, 4 * q + 4, w.base[q], 16);
    for (int i = 0; i < 4; i++)
      for (int byte = 0; byte < 4; byte++) w.order[q][4 * i + byte] = order(4 * q + i, byte, w.base[q]);
  }
  w.far_base = count > 64 ? bound(w.from[0], 64) : 0;
  if (count > 64 && (w.wraps || !fits(0, 16, w.far_base, 64))) w.far_base = -1;
  for (int i = 0; i < 16; i++)
    for (int byte = 0; byte < 4; byte++) {
      const int at = order(i, byte, 0);
      w.far_order[4 * i + byte] =
          sequence && count <= 64 ? (uint8_t)((w.from[i] + 3 - byte + count) % count) : (uint8_t)(at - w.far_base);
    }
}

std::unique_ptr<Layout> make_layout(const Part& part) {
  auto layout = std::make_unique<Layout>();
  layout->chunk = 1, layout->near = true;
  layout->mask = (1u << part.bits) - 1;
  if (part.kind == kInteger || part.kind == kLevels) {
    for (int i = 0; i < 16; i++) layout->words[0].from[i] = i * part.bits / 8, layout->words[0].shift[0][i] = i * part.bits % 8;
    place(layout->words[0], 0);
    return layout;
  }
  if (part.kind != kTrellis) return layout;
  const int width = kSequence / part.height, groups = part.height >= 16 ? part.height / 16 : 0;
  if (groups) {
    bool four = width >= 4;
    for (int t = 0; t < kSequence && four; t += 4) four = part.bits + end_of(t + 3, part.count) - end_of(t, part.count) + 7 <= 32;
    layout->chunk = four ? 4 : 2;
  }
  const int lane = groups ? width : 1;  // weights from a lane to the next
  for (int m = 0; m < (groups ? width / layout->chunk * groups : 16); m++) {
    Words& w = layout->words[m];
    const int first = groups ? m % groups * 16 * width + m / groups * layout->chunk : 16 * m;
    for (int i = 0; i < 16; i++) {
      const int t = first + i * lane;
      w.from[i] = (end_of(t + layout->chunk - 1, part.count) + 7) / 8 - 4;  // the last of them ends with the last weight
      for (int k = 0; k < layout->chunk; k++) w.shift[k][i] = 32 - (end_of(t + k, part.count) - 8 * w.from[i]);
    }
    place(w, part.count);
    layout->near &= w.near;
  }
  return layout;
}

// Kept for ever: there are as many as kinds of parts.
const Layout& layout_of(const Part& part) {
  static std::mutex mutex;
  static std::map<std::tuple<int, int, int, int64_t>, std::unique_ptr<Layout>> known;
  const int64_t count = part.kind == kTrellis ? part.count : 0;
  std::lock_guard<std::mutex> lock(mutex);
  auto& found = known[{part.kind, part.bits, part.height, count}];
  if (!found) found = make_layout(part);
  return *found;
}

const float* hartley_of(int odd) {
  static std::mutex mutex;
  static std::map<int, std::vector<float>> known;
  std::lock_guard<std::mutex> lock(mutex);
  auto& found = known[odd];
  if (found.empty())
    for (int i = 0; i < odd; i++)
      for (int j = 0; j < odd; j++) {
        const double angle = (double)((int64_t)i * j % odd) * (2 * 3.14159265358979323846 / odd);
        found.push_back((float)((std::cos(angle) + std::sin(angle)) / std::sqrt((double)odd)));
      }
  return found.data();
}

constexpr char kSegmentsOf[] = "a backbone's segments of 1 to 6 bits, in sixteenths";

const char* refused(const Part& part) {
  switch (part.kind) {
    case kNone:
    case kBfloat16:
      return nullptr;
    case kTrellis:
      if (part.bits < 6 || part.bits > 16 || part.count < 32 || part.count > 192) return "a trellis of 6 to 16 state bits, 1 to 6 bits";
      if (part.height != 64 && part.height != 32 && part.height != 16 && part.height != 4 && part.height != 2 && part.height != 1)
        return "a trellis sequence of 64, 32, 16, 4, 2 or 1 rows";
      if (has_segments(part) && part.height < 16) return kSegmentsOf;
      return nullptr;
    case kInteger:
    case kLevels:
      if (part.bits < 1 || part.bits > (part.kind == kLevels ? 4 : 8)) return "codes of 1 to 8 bits, of levels 4";
      return part.group % 16 ? "groups of a multiple of 16" : nullptr;
    case kLattice:
      return part.bits < 2 || part.bits > 4 ? "a lattice of 2 to 4 bits" : nullptr;
    default:
      return "a kind of codes that is known";
  }
}

// ------------------------------------------------------------------ threads

// Threads of our own, which sleep while nothing is to be done; for callers that bring none.
class Crew {
 public:
  void run(const std::function<void()>& task, int threads) {
    std::unique_lock<std::mutex> turn(turns_);  // one caller at a time
    std::unique_lock<std::mutex> lock(mutex_);
    for (; members_ < threads - 1; members_++) std::thread([this, own = members_] { work(own); }).detach();
    task_ = &task, wanted_ = left_ = threads - 1, round_++;
    begin_.notify_all();
    lock.unlock();
    task();
    lock.lock();
    done_.wait(lock, [this] { return left_ == 0; });
  }

 private:
  void work(int own) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (uint64_t seen = 0;;) {
      begin_.wait(lock, [&] { return round_ != seen && own < wanted_; });
      seen = round_;
      const std::function<void()>& task = *task_;
      lock.unlock();
      task();
      lock.lock();
      if (--left_ == 0) done_.notify_all();
    }
  }
  std::mutex turns_, mutex_;
  std::condition_variable begin_, done_;
  const std::function<void()>* task_ = nullptr;
  int members_ = 0, wanted_ = 0, left_ = 0;
  uint64_t round_ = 0;
};

void by_our_own(const std::function<void()>& task, int threads) {
  static Crew* crew = [] {
    pthread_atfork(nullptr, nullptr, [] { crew = new Crew; });  // a child has none of its parent's threads
    return new Crew;
  }();  // never destroyed: its threads may outlive the end of the program's own objects
  crew->run(task, threads);
}

// Pieces that are handed out one by one. The caller's thread takes part, so that it waits only for pieces that another thread has
// begun, never for a thread to come free.
struct Pieces {
  const std::function<void(int64_t)>& each;  // of the caller, who waits as long as there is a piece to call it for
  const int64_t count;
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::condition_variable all_done;
  int64_t done = 0;

  void run() {
    int64_t finished = 0;
    for (int64_t i; (i = next.fetch_add(1)) < count; finished++) each(i);
    if (finished == 0) return;
    std::lock_guard<std::mutex> lock(mutex);
    done += finished;
    if (done == count) all_done.notify_all();
  }
};

// each(i) for i < count, over so many threads.
void spread(int64_t count, int threads, const Team& team, const std::function<void(int64_t)>& each) {
  threads = (int)std::min<int64_t>(threads, count);
  if (threads < 2) {
    for (int64_t i = 0; i < count; i++) each(i);
    return;
  }
  const auto pieces = std::shared_ptr<Pieces>(new Pieces{each, count});
  team([pieces] { pieces->run(); }, threads);
  std::unique_lock<std::mutex> lock(pieces->mutex);
  pieces->all_done.wait(lock, [&] { return pieces->done == pieces->count; });
}

// ------------------------------------------------------------------ a layer

constexpr int64_t kPiece = 1 << 16;    // weights that one thread takes at a time
constexpr int64_t kFew = 8;            // tokens, for which rows are not decoded into memory
constexpr int64_t kBetween = 1 << 22;  // numbers that are kept between two parts, about

int64_t up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// A part whose last rows can be read beyond.
Part with_tail(Part part, std::vector<uint8_t>& room) {
  part.tail_row = part.rows;
  if (part.kind == kTrellis || part.kind == kNone) return part;
  constexpr int64_t beyond = 64;
  part.tail_row = std::max<int64_t>(0, part.rows - 1 - beyond / std::max<int64_t>(part.count, 1));
  const int64_t size = (part.rows - part.tail_row) * part.count;
  room.assign(size + beyond, 0);
  std::memcpy(room.data(), part.codes + part.tail_row * part.count, size);
  part.tail = room.data();
  return part;
}

// Columns whose activations share a step where they are rounded; 0: a product that takes them as they are.
int block_of(const Part& part) {
  if (part.kind == kTrellis) return part.height >= 16 ? kBlock : 0;
  if (part.kind != kInteger || 8 % part.bits) return 0;
  const int block = 128 / part.bits;
  return part.group % block ? 0 : block;
}

int64_t columns_read(const Part& part) {
  if (part.kind == kNone) return 0;
  if (const int block = block_of(part)) return up(part.cols, part.kind == kTrellis ? block : 4 * block);
  return up(part.cols, part.kind == kTrellis ? std::max(16, kSequence / std::max(part.height, 1)) : 16);
}

uint16_t half_from(float x) {  // to the nearest, ties to even
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const uint32_t sign = word >> 16 & 0x8000;
  const float size = std::fabs(x);
  if (!(size == size)) return (uint16_t)(sign | 0x7e00);
  if (size >= 65520.f) return (uint16_t)(sign | 0x7c00);
  if (size < 6.103515625e-05f) return (uint16_t)(sign | (uint32_t)std::nearbyint(size * 16777216.f));
  word &= 0x7fffffff;
  const uint32_t rest = word & 0x1fff, found = (word >> 13) - (112 << 10);
  return (uint16_t)(sign | (found + (rest > 0x1000 || (rest == 0x1000 && found & 1))));
}

uint16_t bfloat16_from(float x) {
  uint32_t word;
  std::memcpy(&word, &x, 4);
  if (x != x) return (uint16_t)(word >> 16 | 64);
  return (uint16_t)((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

void load(const void* x, int type, int64_t from, int64_t count, float* out) {
  if (type == kFloat32) {
    std::memcpy(out, (const float*)x + from, sizeof(float) * count);
  } else if (type == kFloat16) {
    for (int64_t i = 0; i < count; i++) out[i] = Plain::half(((const uint16_t*)x)[from + i]);
  } else {
    for (int64_t i = 0; i < count; i++) {
      const uint32_t word = (uint32_t)((const uint16_t*)x)[from + i] << 16;
      std::memcpy(out + i, &word, 4);
    }
  }
}

void store(const float* y, int type, int64_t to, int64_t count, void* out) {
  if (type == kFloat32) std::memcpy((float*)out + to, y, sizeof(float) * count);
  else
    for (int64_t i = 0; i < count; i++) ((uint16_t*)out)[to + i] = type == kFloat16 ? half_from(y[i]) : bfloat16_from(y[i]);
}

// x *= the signs of a rotation: trained ones, or those that a hash of the seed gives (core/hadamard.py).
void by_signs(float* x, int64_t size, const uint16_t* trained, int32_t seed, uint32_t salt) {
  if (trained) {
    for (int64_t i = 0; i < size; i++) x[i] *= Plain::half(trained[i]);
    return;
  }
  const uint32_t offset = ((uint32_t)seed * 2 + salt) * 0x85EBCA6Bu + 0x27D4EB2Fu;
  for (int64_t i = 0; i < size; i++) {
    uint32_t word = (uint32_t)i * 0x9E3779B1u + offset;
    word = (word ^ word >> 16) * 0x7FEB352Du;
    word = (word ^ word >> 15) * 0x846CA68Bu;
    word = (word ^ word >> 16) & 0x80000000u;
    uint32_t own;
    std::memcpy(&own, x + i, 4);
    own ^= word;
    std::memcpy(x + i, &own, 4);
  }
}

void turn(const Routines& by, float* x, int64_t size, int block) {
  thread_local std::vector<float> room;
  if ((int64_t)room.size() < block) room.resize(block);
  by.rotate(x, size, block, hartley_of(block / (block & -block)), room.data());
}

// Activations of a token as `multiply_rounded` takes them.
class Rounding {
 public:
  // false where x has numbers that are not finite
  bool of(const Part& part, const float* given) {
    const int block = block_of(part);
    const int64_t count = columns_read(part);
    const float* x = given;
    if (count > part.cols) {  // beyond the columns there may be those of another part
      own_.assign(count, 0.f);
      std::memcpy(own_.data(), given, sizeof(float) * part.cols);
      x = own_.data();
    }
    whole_.resize(count), steps_.resize(up(count / block, kAhead));
    for (int64_t b = 0; b < count / block; b++)
      if (!rounded(x + b * block, block, whole_.data() + b * block, steps_[b])) return false;
    if (part.kind == kTrellis) for_trellis(count, block);
    else for_integers(count, 16 / part.bits);
    return true;
  }
  Rounded found() const { return {steps_.data(), pairs_.data(), starts_.data(), values_.data(), sums_.data()}; }

 private:
  static bool rounded(const float* x, int count, int16_t* out, float& step) {
    uint32_t top = 0;
    for (int i = 0; i < count; i++) {
      uint32_t word;
      std::memcpy(&word, x + i, 4);
      top = std::max(top, word & 0x7fffffff);
    }
    if (top >= 0x7f800000) return false;
    float most;
    std::memcpy(&most, &top, 4);
    const bool some = most > 1e-30f;
    const float by = some ? 32767.f / most : 0.f;
    step = some ? most / 32767.f : 0.f;
    constexpr float middle = 12582912.f;  // 1.5 · 2²³: the number that is added to it ends up rounded in its last bits
    for (int i = 0; i < count; i++) {
      const float moved = x[i] * by + middle;
      uint32_t word;
      std::memcpy(&word, &moved, 4);
      out[i] = (int16_t)word;
    }
    return true;
  }

  void for_trellis(int64_t count, int block) {
    pairs_.resize(count), starts_.resize(count / block);
    for (int64_t i = 0; i < count; i++) pairs_[i] = (uint32_t)(uint16_t)whole_[i] * 0x10001u;
    for (int64_t b = 0; b < count / block; b++) {
      int32_t sum = 0;
      for (int i = 0; i < block; i++) sum += whole_[b * block + i];
      starts_[b] = (uint32_t)(sum * -(int32_t)kMiddle);
    }
  }

  void for_integers(int64_t count, int codes) {  // so many in 16 bits
    values_.resize(count), sums_.resize(count / (2 * codes));
    for (int64_t start = 0; start < count; start += 32 * codes)
      for (int k = 0; k < codes; k++)
        for (int i = 0; i < 32; i++) values_[start + 32 * k + i] = whole_[start + i * codes + k];
    for (int64_t m = 0; m < count / (2 * codes); m++) {
      int32_t sum = 0;
      for (int i = 0; i < 2 * codes; i++) sum += whole_[m * 2 * codes + i];
      sums_[m] = (float)sum;
    }
  }

  std::vector<int16_t> whole_, values_;
  std::vector<float> own_, steps_, sums_;
  std::vector<uint32_t> pairs_, starts_;
};

// The rows of a part times some tokens, in pieces: few tokens from the codes, more from rows that are decoded once for all of them.
struct Rows {
  const Routines& by;
  std::vector<Segment> segments;  // none: there is no such part
  const float* x;
  int64_t wide;
  float* y;
  int64_t high, tokens;
  const std::vector<Rounding>* rounded = nullptr;  // of every token, one a segment; or null

  static int64_t step(const Part& part, int64_t cols) {
    return std::max<int64_t>(1, kPiece / std::max<int64_t>(cols, 1) / part.height) * part.height;
  }
  int64_t columns() const { return segments.back().col + segments.back().part.cols; }
  int64_t step() const { return step(segments[0].part, columns()); }
  int64_t pieces() const { return segments.empty() ? 0 : (segments[0].part.rows + step() - 1) / step(); }
  void multiply(int64_t piece) const {
    const int64_t first = piece * step(), last = std::min(first + step(), segments[0].part.rows);
    if (tokens <= kFew) {
      for (int64_t t = 0; t < tokens; t++) from_codes(t, first, last);
      return;
    }
    thread_local std::vector<float> decoded;
    const int64_t stride = up(columns(), 16);
    decoded.assign((last - first) * stride, 0.f);
    for (const Segment& own : segments) by.decode(own.part, layout_of(own.part), first, last, decoded.data() + own.col, stride);
    by.dense(decoded.data(), last - first, stride, x, tokens, wide, y + first, high);
  }

 private:
  void from_codes(int64_t t, int64_t first, int64_t last) const {
    thread_local std::vector<float> part_of_sum;
    float* sum = y + t * high + first;
    for (size_t s = 0; s < segments.size(); s++) {
      const Part& part = segments[s].part;
      float* to = sum;
      if (s) part_of_sum.resize(up(last - first, 64) + 64), to = part_of_sum.data();
      if (rounded) by.multiply_rounded(part, layout_of(part), rounded[t][s].found(), first, last, to);
      else by.multiply(part, layout_of(part), x + t * wide + segments[s].col, first, last, to);
      for (int64_t i = 0; s && i < last - first; i++) sum[i] += to[i];
    }
  }
};

std::vector<Segment> segments_if(const Part& part, bool there) { return there ? segments_of(part) : std::vector<Segment>{}; }

}  // namespace

const Routines* routines_of(const char* name) {
  for (const Routines* found : choices())
    if (std::strcmp(found->name, name) == 0) return found;
  return nullptr;
}

const Routines* widest_routines() { return choices().back(); }

const char* multiply_layer(const Routines& by, const Layer& layer, const void* x, int64_t tokens, int type, bool exact, void* y,
                           int threads, const Team& team) {
  for (const Part* part : {&layer.backbone, &layer.left, &layer.right})
    if (const char* wrong = refused(*part)) return wrong;
  thread_local std::vector<uint8_t> tails[3];
  thread_local std::vector<float> in, out, inner;
  thread_local std::vector<Rounding> rounding[kFew];
  const Part backbone = with_tail(layer.backbone, tails[0]), left = with_tail(layer.left, tails[1]);
  const Part right = with_tail(layer.right, tails[2]);
  const std::vector<Segment> segments = segments_if(backbone, backbone.kind != kNone);
  if (backbone.kind != kNone && segments.empty()) return kSegmentsOf;
  const int64_t wide = up(std::max({layer.inputs, columns_read(backbone), columns_read(right)}), 16);
  const int64_t high = up(layer.outputs, 64) + 256, deep = up(std::max(layer.rank, 1), 16);
  // some tokens at a time: all that is between two parts lies in memory once for each
  const int64_t most = tokens > kFew ? std::max<int64_t>(kFew, kBetween / (wide + high)) : kFew;
  for (int64_t start = 0; start < tokens; start += most) {
    const int64_t count = std::min(most, tokens - start);
    in.assign(count * wide, 0.f), out.assign(count * high, 0.f), inner.assign(count * deep, 0.f);
    float *v = in.data(), *w = out.data(), *z = inner.data();  // the threads' own vectors are others
    spread(count, threads, team, [&](int64_t t) {
      float* own = v + t * wide;
      load(x, type, (start + t) * layer.inputs, layer.inputs, own);
      if (!layer.turned_inputs) return;
      by_signs(own, layer.inputs, layer.input_signs, layer.seed, 0);
      turn(by, own, layer.inputs, layer.input_block);
    });
    bool rounded = !exact && count <= kFew && block_of(backbone);
    for (int64_t t = 0; rounded && t < count; t++) {
      if (rounding[t].size() < segments.size()) rounding[t].resize(segments.size());
      for (size_t s = 0; rounded && s < segments.size(); s++)
        rounded = rounding[t][s].of(segments[s].part, v + t * wide + segments[s].col);
    }
    const Rows rows[] = {{by, segments_if(right, layer.rank), v, wide, z, deep, count},
                         {by, segments, v, wide, w, high, count, rounded ? rounding : nullptr}};
    const int64_t first = rows[0].pieces();
    spread(first + rows[1].pieces(), threads, team, [&](int64_t i) { i < first ? rows[0].multiply(i) : rows[1].multiply(i - first); });
    spread(count, threads, team, [&](int64_t t) {
      float *own = w + t * high, *of = z + t * deep;
      if (layer.rank) {
        for (int r = 0; layer.component_scale && r < layer.rank; r++) of[r] *= Plain::half(layer.component_scale[r]);
        by.add(left, layout_of(left), of, own);
      }
      if (layer.scale)
        for (int64_t i = 0; i < layer.outputs; i++) own[i] *= *layer.scale;
      if (layer.row_scales)
        for (int64_t i = 0; i < layer.outputs; i++) own[i] *= Plain::half(layer.row_scales[i]);
      if (layer.turned_outputs) {
        turn(by, own, layer.outputs, layer.output_block);
        by_signs(own, layer.outputs, layer.output_signs, layer.seed, 1);
      }
      store(own, type, (start + t) * layer.outputs, layer.outputs, y);
    });
  }
  return nullptr;
}

const char* decode_part(const Routines& by, const Part& given, int64_t first, int64_t last, float* out, int threads,
                        const Team& team) {
  if (const char* wrong = refused(given)) return wrong;
  if (given.kind == kNone || first < 0 || last > given.rows || first % given.height) return "rows that the part has, by tiles";
  thread_local std::vector<uint8_t> tail;
  const Part part = with_tail(given, tail);
  const std::vector<Segment> segments = segments_of(part);
  if (segments.empty()) return kSegmentsOf;
  const int64_t step = Rows::step(part, part.cols);
  spread((last - first + step - 1) / step, threads, team, [&](int64_t i) {
    const int64_t start = first + i * step, stop = std::min(start + step, last);
    for (const Segment& own : segments)
      by.decode(own.part, layout_of(own.part), start, stop, out + (start - first) * part.cols + own.col, part.cols);
  });
  return nullptr;
}

}  // namespace qlr

#define QLR_EXPORT extern "C" __attribute__((visibility("default")))

namespace {
const qlr::Routines* named(const char* set) { return set ? qlr::routines_of(set) : qlr::widest_routines(); }
constexpr char kNoSet[] = "an instruction set that this machine has";

// OpenMP's GOMP_parallel(task, data, threads, flags), of the library that the caller has loaded; null: threads of our own.
using Gomp = void (*)(void (*)(void*), void*, unsigned, unsigned);

qlr::Team team_of(Gomp gomp) {
  if (!gomp) return qlr::by_our_own;
  return [gomp](const std::function<void()>& task, int threads) {
    gomp([](void* own) { (*(const std::function<void()>*)own)(); }, (void*)&task, (unsigned)threads, 0);
  };
}
}  // namespace

// `set`: an instruction set by name, null for the widest. Null, or what is needed in place of what was given.
QLR_EXPORT const char* qlr_multiply(const char* set, const qlr::Layer* layer, const void* x, int64_t tokens, int type,
                                    int exact, void* y, int threads, Gomp gomp) {
  const qlr::Routines* by = named(set);
  return by ? qlr::multiply_layer(*by, *layer, x, tokens, type, exact, y, threads, team_of(gomp)) : kNoSet;
}

QLR_EXPORT const char* qlr_decode(const char* set, const qlr::Part* part, int64_t first, int64_t last, float* out, int threads,
                                  Gomp gomp) {
  const qlr::Routines* by = named(set);
  return by ? qlr::decode_part(*by, *part, first, last, out, threads, team_of(gomp)) : kNoSet;
}

// What a caller's structures have to measure.
QLR_EXPORT int64_t qlr_sizes(int which) { return which ? sizeof(qlr::Layer) : sizeof(qlr::Part); }

QLR_EXPORT const char* qlr_product_set() { return qlr::widest_routines()->name; }
