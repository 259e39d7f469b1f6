// Runs momentum updates that test_cuda_on_cpu.py wrote to a file, and writes what became of them to another one.
// Buffers are exactly as large as the update may touch. With `far` instead of files: tensors of more than 2^32
// elements.
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>

#include "ops/cuda/ema_update_kernel.h"

using fastssl::ops::ema_update_launch;
using fastssl::ops::Segment;
using fastssl::ops::Type;

namespace {

#ifdef __SANITIZE_ADDRESS__
constexpr std::size_t kGuard = 0;  // the sanitizer sees every byte too many
#else
constexpr std::size_t kGuard = 64;
#endif
constexpr int kGuardByte = 0xa5;

void check(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

std::size_t bytes_of(Type type) {
  switch (type) {
    case Type::kNone:
      return 0;
    case Type::kBytes:
      return 1;
    case Type::kFloat:
      return 4;
    case Type::kDouble:
      return 8;
    default:
      return 2;
  }
}

// Memory that begins `offset` bytes behind a multiple of 64, between guards.
class Buffer {
 public:
  Buffer(std::size_t offset, std::size_t bytes) : front_(offset + kGuard), bytes_(bytes) {
    check(posix_memalign(&memory_, 64, front_ + bytes + kGuard) == 0, "allocation");
    std::memset(memory_, kGuardByte, front_ + bytes + kGuard);
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(memory_); }

  void* data() const { return static_cast<char*>(memory_) + front_; }
  std::size_t bytes() const { return bytes_; }
  bool guards_are_untouched() const {
    const auto* const bytes = static_cast<const unsigned char*>(memory_);
    for (std::size_t i = 0; i < front_; ++i) {
      if (bytes[i] != kGuardByte) return false;
    }
    for (std::size_t i = front_ + bytes_; i < front_ + bytes_ + kGuard; ++i) {
      if (bytes[i] != kGuardByte) return false;
    }
    return true;
  }

 private:
  void* memory_ = nullptr;
  std::size_t front_, bytes_;
};

class File {
 public:
  File(const char* name, const char* mode) : file_(std::fopen(name, mode)) { check(file_ != nullptr, name); }
  ~File() { std::fclose(file_); }
  void read(const Buffer& buffer) { read(buffer.data(), buffer.bytes()); }
  void write(const Buffer& buffer) { write(buffer.data(), buffer.bytes()); }
  std::int64_t integer() { return number<std::int64_t>(); }
  double real() { return number<double>(); }
  void integer(std::int64_t value) { write(&value, sizeof value); }

 private:
  template <typename T>
  T number() {
    T value;
    read(&value, sizeof value);
    return value;
  }
  void read(void* data, std::size_t bytes) { check(std::fread(data, 1, bytes, file_) == bytes, "read"); }
  void write(const void* data, std::size_t bytes) { check(std::fwrite(data, 1, bytes, file_) == bytes, "write"); }

  std::FILE* file_;
};

void run(File& in, File& out) {
  cuda_on_cpu::driver_version = static_cast<int>(in.integer());
  double momentum = in.real();
  const Buffer on_device(0, sizeof momentum);
  std::memcpy(on_device.data(), &momentum, sizeof momentum);
  const bool is_on_device = in.integer() != 0;
  if (is_on_device) momentum = -1e30;  // must not be used
  std::deque<Buffer> buffers;          // target, source, shadow of each segment
  std::deque<Buffer> sources;          // copies
  std::vector<Segment> segments(static_cast<std::size_t>(in.integer()));
  for (Segment& segment : segments) {
    const auto count = static_cast<std::size_t>(segment.count = in.integer());
    void* pointers[3];
    Type types[3];
    for (int i = 0; i < 3; ++i) {
      types[i] = static_cast<Type>(in.integer());
      const auto offset = static_cast<std::size_t>(in.integer());
      in.read(buffers.emplace_back(offset, count * bytes_of(types[i])));
      pointers[i] = types[i] == Type::kNone ? nullptr : buffers.back().data();
    }
    segment = {pointers[0], pointers[1], pointers[2], segment.count, types[0], types[1], types[2]};
    const Buffer& source = buffers[buffers.size() - 2];
    std::memcpy(sources.emplace_back(0, source.bytes()).data(), source.data(), source.bytes());
  }
  cuda_on_cpu::launches.clear();
  const cudaError_t error =
      ema_update_launch(segments.data(), segments.size(), momentum,
                        is_on_device ? static_cast<const double*>(on_device.data()) : nullptr, nullptr);
  for (const Buffer& buffer : buffers) check(buffer.guards_are_untouched(), "a guard was overwritten");
  for (std::size_t i = 0; i < sources.size(); ++i) {
    check(std::memcmp(sources[i].data(), buffers[3 * i + 1].data(), sources[i].bytes()) == 0, "a source was changed");
  }
  out.integer(error);
  out.integer(static_cast<std::int64_t>(cuda_on_cpu::launches.size()));
  for (const auto& launch : cuda_on_cpu::launches) {
    out.integer(launch.blocks);
    out.integer(static_cast<std::int64_t>(launch.parameter_bytes));
  }
  for (std::size_t i = 0; i < buffers.size(); ++i) {
    if (i % 3 != 1) out.write(buffers[i]);
  }
}

// Untouched memory costs nothing.
template <typename T>
T* reserve(std::int64_t count) {
  void* const memory = mmap(nullptr, static_cast<std::size_t>(count) * sizeof(T), PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  check(memory != MAP_FAILED, "mmap");
  return static_cast<T*>(memory);
}

// The last elements of tensors that 32-bit offsets do not reach, and grids too large for one launch.
void run_far() {
  constexpr std::int64_t kCount = (1LL << 32) + 5;
  auto* const target = reserve<float>(kCount);
  const auto* const source = reserve<float>(kCount);
  auto* const bytes = reserve<char>(kCount);
  auto* const source_bytes = reserve<char>(kCount);
  auto* const shadow = reserve<std::uint16_t>(kCount);
  target[kCount - 1] = 8;
  std::memset(source_bytes + kCount - 5, 7, 5);
  const Segment segments[] = {
      {target, source, shadow, kCount, Type::kFloat, Type::kFloat, Type::kBFloat16},
      {bytes, source_bytes, nullptr, kCount, Type::kBytes, Type::kBytes, Type::kNone},
  };
  for (const Segment& segment : segments) {
    cuda_on_cpu::first_block = static_cast<std::uint64_t>(segment.target_type == Type::kFloat ? 1 << 20 : 1 << 18);
    check(ema_update_launch(&segment, 1, 0.75, nullptr, nullptr) == cudaSuccess, "launch");
    check(cuda_on_cpu::launches.back().blocks == cuda_on_cpu::first_block + 1, "blocks of a long tensor");
  }
  check(target[kCount - 1] == 6 && target[kCount - 2] == 0, "float target");
  check(shadow[kCount - 1] == 0x40c0, "bfloat16 shadow");
  for (int i = 1; i <= 5; ++i) check(bytes[kCount - i] == 7, "copied bytes");
  check(bytes[kCount - 6] == 0, "byte before");

  cuda_on_cpu::first_block = ~0ULL;
  cuda_on_cpu::launches.clear();
  Segment giants[3];
  for (Segment& giant : giants) giant = segments[1], giant.count = 1LL << 44;
  check(ema_update_launch(giants, 3, 0.75, nullptr, nullptr) == cudaSuccess, "launch of giants");
  check(cuda_on_cpu::launches.size() == 3, "2^30 blocks each, of which a grid cannot have two");
  giants[1].count = 1LL << 46;
  check(ema_update_launch(giants, 3, 0.75, nullptr, nullptr) == cudaErrorInvalidValue, "2^32 blocks");
}

// What AddressSanitizer or ThreadSanitizer must not let pass: a buffer that is too small, a target that is given twice.
void run_fault() {
  const Buffer target(0, 4 * 4096), source(0, 4 * 4096 - 4 + kGuard);
  const Segment segment{target.data(), source.data(), nullptr, 4096, Type::kFloat, Type::kFloat, Type::kNone};
  const Segment segments[] = {segment, segment};
  ema_update_launch(segments, kGuard == 0 ? 1 : 2, 0.75, nullptr, nullptr);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "far") == 0) {
    run_far();
    return 0;
  }
  if (argc == 2 && std::strcmp(argv[1], "fault") == 0) {
    run_fault();
    return 0;
  }
  check(argc == 3, "usage: ema_update_test in out|far|fault");
  File in(argv[1], "rb"), out(argv[2], "wb");
  for (std::int64_t updates = in.integer(); updates > 0; --updates) run(in, out);
}
