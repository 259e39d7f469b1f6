// Augments image by image, each on one thread. What is done to pixels one by one is gathered in a chain and done in one
// pass from bytes to the result. Two things interrupt a chain: contrast needs the mean luma, for which the chain so far
// is run once for nothing else (to keep its result would take as long), and a blur needs the neighbours.
#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <vector>

#include "../augment.h"
#include "band.h"
#include "pixels.h"
#include "tensors/element_type.h"
#include "tensors/host_buffers.h"
#include "work.h"

namespace fastssl::ops {
namespace {

using cpu::Affine;
using cpu::Band;
using cpu::Chain;
using cpu::Change;

// Numbers of fastssl/ops/photometric.py: PHOTOMETRIC, COLUMNS and the parts of JITTER_ORDERS.
enum Step : std::uint8_t { kColorJitter, kGrayscaling, kGaussianBlur, kSolarizing, kRandomErasing, kSteps };
enum Column : std::uint8_t {
  kBrightness,
  kContrast,
  kSaturation,
  kHue,
  kOrder,
  kGrayscale,
  kSigma,
  kThreshold,
  kTop,
  kLeft,
  kHeight,
  kWidth,
  kColumns
};
constexpr int kParts = 4, kOrders = 24;

constexpr int64_t kStrip = 4096;  // values of blurred rows that are computed at once
constexpr Affine kAsTheyAre{{1, 1, 1}, {0, 0, 0}};

// floor(x) within 0…top; 0 for NaN.
int64_t whole(double x, int64_t top) { return x > 0 ? static_cast<int64_t>(std::min(x, static_cast<double>(top))) : 0; }

// The first pixel that is not before x.
int64_t next_whole(double x, int64_t top) { return whole(std::ceil(x), top); }

// Permutation number `order` of 0…3 in lexical order.
void permutation(int64_t order, int (&parts)[kParts]) {
  int left[kParts] = {0, 1, 2, 3}, sizes[kParts] = {6, 2, 1, 1};
  for (int i = 0; i < kParts; ++i) {
    int* const chosen = left + order / sizes[i];
    order %= sizes[i];
    parts[i] = *chosen;
    std::copy(chosen + 1, left + kParts - i, chosen);
  }
}

int64_t padded(int64_t floats) { return cpu::divide_up(floats, cpu::kPadding) * cpu::kPadding + cpu::kPadding; }
int64_t spread_stride(int64_t edge) { return cpu::divide_up(3 * edge, cpu::kSpread) * cpu::kSpread; }

// What all images share.
struct Batch {
  int64_t height, width;
  const uint8_t* images;
  char* out;
  Type out_type;
  int64_t out_size;  // bytes of an element
  const float* parameters;
  const float *blur_rows, *blur_columns;  // null without a blur
  int64_t table_rows, table_columns;
  at::IntArrayRef steps;
  Affine normalise;

  int64_t pixels() const { return height * width; }
  int64_t strip() const { return std::clamp<int64_t>(kStrip / (3 * width), 1, height); }  // rows
  int64_t ring() const { return table_rows + strip(); }                                   // rows
  int64_t line() const { return padded(3 * width); }
  int64_t edges() const { return table_columns * spread_stride(table_columns); }  // of one side; more than enough
};

// Memory of one thread.
struct Scratch {
  static int64_t size(const Batch& x) {
    if (!x.blur_rows) return 0;
    return x.line() + x.ring() * x.line() + 2 * x.edges() + x.pixels();
  }

  Scratch(const Batch& x, float* memory) : source(x.table_rows) {
    if (!x.blur_rows) return;
    row = memory;
    ring = row + x.line();
    left = ring + x.ring() * x.line();
    right = left + x.edges();
    bytes = reinterpret_cast<uint8_t*>(right + x.edges());
  }

  float* row = nullptr;                     // of an image
  float* ring = nullptr;                    // rows that are blurred along the row, row y at y modulo their number
  float *left = nullptr, *right = nullptr;  // weights of a row's pixels at the borders
  uint8_t* bytes = nullptr;                 // an image before and after its blur
  std::vector<const float*> source;         // rows that a blurred row is the sum of
};

class Image {
 public:
  Image(const Batch& batch, Scratch& scratch, int64_t index)
      : x_(batch),
        scratch_(scratch),
        index_(index),
        parameters_(batch.parameters + index * kColumns),
        bytes_(batch.images + index * batch.pixels() * 3) {}

  void augment() {
    for (const int64_t step : x_.steps) {
      if (step == kColorJitter) jitter();
      if (step == kGrayscaling && parameter(kGrayscale) > 0) then(Change::kGray);
      if (step == kGaussianBlur && parameter(kSigma) > 0) blur();
      if (step == kSolarizing && parameter(kThreshold) <= 1) then(Change::kSolarize, 255 * parameter(kThreshold));
      if (step == kRandomErasing && parameter(kHeight) > 0) erase();
    }
    write(x_.out + index_ * x_.pixels() * 3 * x_.out_size, x_.out_type, x_.out_size, x_.normalise);
  }

 private:
  float parameter(Column column) const { return parameters_[column]; }

  void then(Change change, float a = 0, float b = 0) {
    outside_.changes[outside_.length++] = {change, a, b};
    inside_.changes[inside_.length++] = {change, a, b};
  }

  void jitter() {
    int parts[kParts];
    permutation(whole(parameter(kOrder), kOrders - 1), parts);
    for (const int part : parts) {
      const float factor = parameters_[part];
      if (factor == (part == kHue ? 0.F : 1.F)) continue;
      if (part == kBrightness) then(Change::kBlend, factor);
      if (part == kContrast) then(Change::kBlend, factor, (1 - factor) * mean_luma());
      if (part == kSaturation) then(Change::kSaturate, factor, 1 - factor);
      if (part == kHue && std::isfinite(factor)) then(Change::kTurn, 6 * (factor - std::floor(factor + .5F)));
    }
  }

  void erase() {
    const double top = parameter(kTop), left = parameter(kLeft);
    top_ = next_whole(top, x_.height), bottom_ = next_whole(top + parameter(kHeight), x_.height);
    left_ = next_whole(left, x_.width), right_ = next_whole(left + parameter(kWidth), x_.width);
    if (top_ >= bottom_ || left_ >= right_) return;
    erases_ = true;
    inside_.changes[0] = {Change::kErase};
    inside_.length = 1;
  }

  // --- running the chain

  void write(void* to, Type type, int64_t size, const Affine& affine) const {
    over_runs([&](const Chain& chain, int64_t begin, int64_t end) {
      loops_.convert(chain, affine, bytes_ + 3 * begin, static_cast<char*>(to) + 3 * begin * size, type, end - begin);
    });
  }

  float mean_luma() const {
    double total = 0;
    over_runs([&](const Chain& chain, int64_t begin, int64_t end) {
      total += loops_.luma(chain, bytes_ + 3 * begin, end - begin);
    });
    return static_cast<float>(total / static_cast<double>(x_.pixels()));
  }

  // Calls work(chain, begin, end) for all pixels, in pieces that are wholly to be erased or not at all.
  template <typename Work>
  void over_runs(const Work& work) const {
    int64_t done = 0;
    const auto run = [&](const Chain& chain, int64_t end) {
      if (done < end) work(chain, done, end);
      done = end;
    };
    for (int64_t y = erases_ ? top_ : bottom_; y < bottom_; ++y) {
      run(outside_, y * x_.width + left_);
      run(inside_, y * x_.width + right_);
    }
    run(outside_, x_.pixels());
  }

  // --- blurring

  void blur() {
    if (outside_.length || erases_) {
      write(scratch_.bytes, Type::kBytes, 1, kAsTheyAre);
      bytes_ = scratch_.bytes;
      outside_.length = inside_.length = 0;
      erases_ = false;
    }
    const int64_t t = x_.table_rows, u = x_.table_columns;
    along_column_ = Band(x_.blur_rows + index_ * t * t, t, x_.height);
    along_row_ = Band(x_.blur_columns + index_ * u * u, u, x_.width);
    weights_of_edge(0, along_row_.edge_begin(), scratch_.left);
    weights_of_edge(x_.width - along_row_.edge_end(), x_.width, scratch_.right);
    int64_t ready = 0;
    for (int64_t y = 0; y < x_.height; y += x_.strip()) {
      const int64_t end = std::min(y + x_.strip(), x_.height);
      const Band::Line last = along_column_[end - 1];
      for (; ready < last.first + last.count; ++ready) blur_row(ready);
      blur_columns(y, end);  // over rows that have been read
    }
    bytes_ = scratch_.bytes;
  }

  // The table's rows for pixels begin…end, one behind the other for every pixel that is summed up, each weight thrice.
  void weights_of_edge(int64_t begin, int64_t end, float* weights) const {
    const int64_t stride = spread_stride(end - begin);
    for (int64_t i = begin; i < end; ++i) {
      const Band::Line line = along_row_[i];
      for (int64_t t = 0; t < line.count; ++t) std::fill_n(weights + t * stride + 3 * (i - begin), 3, line.weights[t]);
    }
  }

  float* in_ring(int64_t y) const { return scratch_.ring + y % x_.ring() * x_.line(); }

  void blur_row(int64_t y) const {
    const int64_t w = x_.width, begin = along_row_.edge_begin(), end = along_row_.edge_end();
    float *const from = scratch_.row, *const to = in_ring(y);
    loops_.convert({}, kAsTheyAre, bytes_ + y * w * 3, from, Type::kFloat, w);
    // From left to right, because each piece writes a bit more than its own.
    if (begin > 0) {
      loops_.spread(from, scratch_.left, spread_stride(begin), along_row_[0].count, 3 * begin, to);
    }
    if (begin < w) {
      const Band::Line line = along_row_[begin];
      loops_.slide(from + 3 * line.first, line.weights, line.count, 3 * (w - begin - end), to + 3 * begin);
    }
    if (end > 0) {
      const Band::Line line = along_row_[w - 1];
      loops_.spread(from + 3 * line.first, scratch_.right, spread_stride(end), line.count, 3 * end, to + 3 * (w - end));
    }
  }

  void blur_columns(int64_t begin, int64_t end) const {
    constexpr int64_t kTile = 512;  // values: of all rows together they stay in the first-level cache
    const int64_t length = 3 * x_.width;
    for (int64_t i = 0; i < length; i += kTile) {
      for (int64_t y = begin; y < end; ++y) {
        const Band::Line line = along_column_[y];
        for (int64_t t = 0; t < line.count; ++t) scratch_.source[t] = in_ring(line.first + t);
        loops_.sum_lines(scratch_.source.data(), line.weights, line.count, i, std::min(i + kTile, length),
                         scratch_.bytes + y * length + i);
      }
    }
  }

  const Batch& x_;
  Scratch& scratch_;
  const cpu::Pixels& loops_ = cpu::pixels();
  const int64_t index_;
  const float* const parameters_;
  const uint8_t* bytes_;    // what the chain begins with
  Chain outside_, inside_;  // what is to be done, outside and inside of the rectangle that is erased
  bool erases_ = false;
  int64_t top_ = 0, bottom_ = 0, left_ = 0, right_ = 0;
  Band along_row_, along_column_;
};

// --- checks ---------------------------------------------------------------------------------------------------------

void check_table(const at::Tensor& table, const char* name, int64_t count, int64_t side) {
  TORCH_CHECK_VALUE(table.dim() == 3 && table.size(0) == count && table.size(1) == table.size(2) && table.size(1) > 0 &&
                        table.size(1) <= side && (table.size(1) == side || table.size(1) % 2 == 1),
                    name, " must be ", count, "×T×T, T odd and at most ", side, " or ", side, ", got ", table.sizes());
  TORCH_CHECK_VALUE(table.scalar_type() == at::kFloat && table.is_contiguous() && table.is_cpu(), name,
                    " must be contiguous float32 on the CPU");
}

void check(const at::Tensor& images, const at::Tensor& out, const at::Tensor& parameters, at::IntArrayRef steps,
           at::ArrayRef<double> mean, at::ArrayRef<double> std) {
  TORCH_CHECK_VALUE(
      images.dim() == 4 && images.size(3) == 3 && images.scalar_type() == at::kByte && images.is_contiguous(),
      "images must be contiguous N×H×W×3 of uint8, got ", images.sizes(), " of ", images.scalar_type());
  const int64_t count = images.size(0), height = images.size(1), width = images.size(2);
  TORCH_CHECK_VALUE(out.sizes() == at::IntArrayRef({count, 3, height, width}) &&
                        out.is_contiguous(at::MemoryFormat::ChannelsLast) && out.is_cpu(),
                    "out must be ", count, "×3×", height, "×", width, " in channels_last order on the CPU, got ",
                    out.sizes(), " with strides ", out.strides());
  const Type type = tensors::type_of(out);
  TORCH_CHECK_VALUE(type != Type::kBytes && type != Type::kDouble, "out cannot be ", out.scalar_type());
  TORCH_CHECK_VALUE(parameters.sizes() == at::IntArrayRef({count, kColumns}) && parameters.is_contiguous() &&
                        parameters.scalar_type() == at::kFloat && parameters.is_cpu(),
                    "parameters must be contiguous ", count, "×12 of float32 on the CPU, got ", parameters.sizes(),
                    " of ", parameters.scalar_type());
  TORCH_CHECK_VALUE(mean.size() == 3 && std.size() == 3, "mean and std must be three numbers");
  std::vector<bool> seen(kSteps);
  for (const int64_t step : steps) {
    TORCH_CHECK_VALUE(step >= 0 && step < kSteps && !seen[step], "steps must be different numbers of 0…4, got ", steps);
    seen[step] = true;
  }
}

}  // namespace

void augment_cpu(const at::Tensor& images, const at::Tensor& out, const at::Tensor& parameters,
                 const at::Tensor& blur_rows, const at::Tensor& blur_columns, at::IntArrayRef steps,
                 at::ArrayRef<double> mean, at::ArrayRef<double> std) {
  check(images, out, parameters, steps, mean, std);
  if (images.numel() == 0) return;
  const int64_t count = images.size(0);
  const bool blurs = std::find(steps.begin(), steps.end(), kGaussianBlur) != steps.end();
  Batch batch{.height = images.size(1),
              .width = images.size(2),
              .images = images.const_data_ptr<uint8_t>(),
              .out = static_cast<char*>(out.mutable_data_ptr()),
              .out_type = tensors::type_of(out),
              .out_size = out.element_size(),
              .parameters = parameters.const_data_ptr<float>(),
              .blur_rows = nullptr,
              .blur_columns = nullptr,
              .table_rows = 0,
              .table_columns = 0,
              .steps = steps,
              .normalise = {}};
  if (blurs) {
    check_table(blur_rows, "blur_rows", count, batch.height);
    check_table(blur_columns, "blur_columns", count, batch.width);
    batch.blur_rows = blur_rows.const_data_ptr<float>(), batch.table_rows = blur_rows.size(1);
    batch.blur_columns = blur_columns.const_data_ptr<float>(), batch.table_columns = blur_columns.size(1);
  }
  for (int c = 0; c < 3; ++c) {
    batch.normalise.scale[c] = static_cast<float>(1 / (255 * std[c]));
    batch.normalise.offset[c] = static_cast<float>(-mean[c] / std[c]);
  }
  const int64_t workers = std::min(count, cpu::threads()), size = Scratch::size(batch);
  const at::Tensor memory = tensors::empty_reused({workers, size}, at::kFloat);
  std::atomic<int64_t> next{0};
  cpu::over_items(workers, [&](int64_t worker) {
    Scratch scratch(batch, cpu::data(memory) + worker * size);
    for (int64_t image = next++; image < count; image = next++) Image(batch, scratch, image).augment();
  });
}

}  // namespace fastssl::ops
