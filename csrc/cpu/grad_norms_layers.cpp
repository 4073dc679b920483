// Squared norms of the weight gradients of convolutions and linear layers, sample by sample.
//
// direct: the gradient of every kernel offset, G^T X shifted by the offset, tile by tile; only the squares are kept.
// winograd: the same of 3 x 3 kernels with a quarter of the products (grad_norms_winograd.inc).
// gram:   sum_{t, s} <g_t, g_s> sum_offsets <x_{t + offset}, x_{s + offset}>, the Gram matrices of the raw input and of
// the
//         gradients in stripes of rows; t <= s, off the diagonal twice. A stride splits the input into phases, each of
//         which serves the offsets that land on it.
#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

#include "grad_norms.h"

namespace adaselect {
namespace {

constexpr int64_t kStripe = 1 << 18;  // elements of a stripe of a Gram matrix
constexpr int64_t kChunk = 1 << 19;   // elements of packed samples
// Rounding makes an error of about eps times the diagonal part of a Gram sum. Where the total is smaller than this
// share of it, the gradients of the positions cancel, and the direct form is exact where the Gram sum no longer is.
constexpr double kCancelled = 1.0 / 16;

// Measured, in multiply-adds of a tile: what an entry of a tile costs once its sum is done, an entry of a Gram matrix,
// and one offset for a pair of positions and for a pair of lines of positions; a multiply-add with groups in the lanes.
constexpr double kTileCost = 24, kEntryCost = 40, kShiftCost = 4, kLineCost = 32, kLanesCost = 1.5;
// Where Gram matrices are not stored: a multiply-add (the vectors come from a further cache), and a pair of entries.
constexpr double kVectorCost = 1.15, kPairCost = 120;
// Winograd's form: a point of an entry of the gradient besides its products and then the entry, a tile of a feature and
// of a channel.
constexpr double kWinogradPointCost = 4, kWinogradEntryCost = 100, kWinogradTileCost = 300;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_div(int64_t a, int64_t b) { return a >= 0 ? a / b : -ceil_div(-a, b); }

// Columns of a matrix in panels of 2 lanes; the last has one where that is enough.
struct Panels {
  int64_t columns, lanes;
  int64_t count() const { return ceil_div(columns, 2 * lanes); }
  int64_t first(int64_t panel) const { return panel * 2 * lanes; }
  int64_t width(int64_t panel) const { return columns - first(panel) <= lanes ? lanes : 2 * lanes; }
  int64_t used(int64_t panel) const { return std::min(columns - first(panel), width(panel)); }
  int64_t padded() const { return round_up(columns, lanes); }
};

// Splits 0 .. length into runs of at most kSumBlock.
void append_runs(std::vector<Run>& runs, int64_t first, int64_t step, int64_t length) {
  for (int64_t done = 0; done < length; done += kSumBlock) {
    runs.push_back({first + done * step, std::min(kSumBlock, length - done)});
  }
}

template <class T>
int64_t tiles_bytes() {
  return kGroupBlock * matrix_kernels<T>().rows * 2 * matrix_kernels<T>().lanes * sizeof(double);
}

// ---- direct

struct DirectPlan {
  Extent extent;                // of the padded input that the outputs see
  std::vector<Run> runs;        // its points at offset 0, in the order of the outputs
  std::vector<int64_t> blocks;  // ranges of runs with at most kSumBlock points
  std::vector<int64_t> offsets;

  explicit DirectPlan(const Layer& l) {
    for (int i = 0; i < 3; ++i) extent[i] = (l.out[i] - 1) * l.stride[i] + (l.kernel[i] - 1) * l.dilation[i] + 1;
    for (int64_t z = 0; z < l.out[0]; ++z) {
      for (int64_t y = 0; y < l.out[1]; ++y) {
        append_runs(runs, (z * l.stride[0] * extent[1] + y * l.stride[1]) * extent[2], l.stride[2], l.out[2]);
      }
    }
    int64_t sum = kSumBlock;
    for (size_t i = 0; i < runs.size(); ++i) {
      if (sum + runs[i].length > kSumBlock) {
        blocks.push_back(static_cast<int64_t>(i));
        sum = 0;
      }
      sum += runs[i].length;
    }
    blocks.push_back(static_cast<int64_t>(runs.size()));
    for (int64_t z = 0; z < l.kernel[0]; ++z) {
      for (int64_t y = 0; y < l.kernel[1]; ++y) {
        for (int64_t x = 0; x < l.kernel[2]; ++x) {
          offsets.push_back((z * l.dilation[0] * extent[1] + y * l.dilation[1]) * extent[2] + x * l.dilation[2]);
        }
      }
    }
  }
};

// `count` channels of the padded input, `stride` elements apart, as [points of extent][width].
template <class T>
void pack_input(const Layer& l, const Extent& extent, const char* input, int64_t stride, int64_t count, int64_t width,
                T* panel) {
  const PackFn pack = kernels().pack[static_cast<int>(l.dtype)];
  const int64_t bytes = element_bytes(l.dtype);
  const int64_t left = std::min(l.padding[2], extent[2]);
  const int64_t inside = std::min(extent[2] - left, l.in[2]);
  for (int64_t line = 0; line < extent[0] * extent[1]; ++line, panel += extent[2] * width) {
    const int64_t z = line / extent[1] - l.padding[0], y = line % extent[1] - l.padding[1];
    if (z < 0 || z >= l.in[0] || y < 0 || y >= l.in[1]) {
      std::fill_n(panel, extent[2] * width, T(0));
      continue;
    }
    std::fill_n(panel, left * width, T(0));
    const char* source = input + (z * l.input_space[0] + y * l.input_space[1]) * bytes;
    pack(source, l.input_space[2], stride, inside, count, width, width, panel + left * width);
    std::fill_n(panel + (left + inside) * width, (extent[2] - left - inside) * width, T(0));
  }
}

// [row groups][positions][rows].
template <class T>
void pack_grads(const Layer& l, const char* grads, T* packed) {
  const PackFn pack = kernels().pack[static_cast<int>(l.dtype)];
  const int64_t rows = matrix_kernels<T>().rows, positions = points(l.out);
  for (int64_t first = 0; first < l.features; first += rows, packed += positions * rows) {
    pack(grads + first * l.grads_channel * element_bytes(l.dtype), l.grads_position, l.grads_channel, positions,
         std::min(rows, l.features - first), rows, rows, packed);
  }
}

template <class T>
struct DirectScratch {
  T *grads, *panels;
  double* tiles;

  static int64_t grads_bytes(const Layer& l) {
    return (round_up(l.features, matrix_kernels<T>().rows) * points(l.out) + kPackSlack) * sizeof(T);
  }
  static int64_t panels_bytes(const Layer& l, const DirectPlan& plan) {
    return (round_up(l.channels, matrix_kernels<T>().lanes) * points(plan.extent) + kPackSlack) * sizeof(T);
  }
  static int64_t bytes(const Layer& l, const DirectPlan& plan) {
    return Scratch::aligned(grads_bytes(l)) + Scratch::aligned(panels_bytes(l, plan)) +
           Scratch::aligned(tiles_bytes<T>());
  }
  DirectScratch(Scratch& scratch, const Layer& l, const DirectPlan& plan)
      : grads(scratch.take<T>(grads_bytes(l))),
        panels(scratch.take<T>(panels_bytes(l, plan))),
        tiles(scratch.take<double>(tiles_bytes<T>())) {}
};

template <class T>
double direct(const Layer& l, const DirectPlan& plan, const char* input, const char* grads, DirectScratch<T>& scratch) {
  const MatrixKernels<T>& matrix = matrix_kernels<T>();
  const int64_t positions = points(l.out), row_groups = ceil_div(l.features, matrix.rows);
  pack_grads(l, grads, scratch.grads);
  const Panels panels{l.channels, matrix.lanes};
  const int64_t extent = points(plan.extent);
  for (int64_t j = 0; j < panels.count(); ++j) {
    pack_input(l, plan.extent, input + panels.first(j) * l.input_channel * element_bytes(l.dtype), l.input_channel,
               panels.used(j), panels.width(j), scratch.panels + panels.first(j) * extent);
  }
  double total = 0;
  for (int64_t group = 0; group < row_groups; group += kGroupBlock) {  // its gradients stay in the cache
    const int64_t groups = std::min(kGroupBlock, row_groups - group);
    for (int64_t j = 0; j < panels.count(); ++j) {
      const int64_t width = panels.width(j), tiles = groups * matrix.rows * width;
      for (int64_t offset : plan.offsets) {
        std::fill_n(scratch.tiles, tiles, 0.0);
        const T* row = scratch.grads + group * positions * matrix.rows;
        const T* column = scratch.panels + panels.first(j) * extent + offset * width;
        for (size_t block = 0; block + 1 < plan.blocks.size(); ++block) {
          const Run *begin = &plan.runs[plan.blocks[block]], *end = plan.runs.data() + plan.blocks[block + 1];
          matrix.multiply(row, positions * matrix.rows, groups, column, width, l.stride[2], begin, end - begin,
                          scratch.tiles);
          for (const Run* run = begin; run != end; ++run) row += run->length * matrix.rows;
        }
        total += matrix.sum_squares(scratch.tiles, tiles, nullptr);
      }
    }
  }
  return total;
}

// Many small groups: lane i of a panel is a channel of group i.
template <class T>
struct LanesScratch {
  int64_t lanes = matrix_kernels<T>().lanes;
  int64_t grads_pitch, panel_size, sums_size;
  Scratch memory;
  T *grads, *panel;
  double* sums;

  LanesScratch(const Layer& l, const DirectPlan& plan)
      : grads_pitch(points(l.out) * lanes),
        panel_size(points(plan.extent) * lanes),
        sums_size(plan.offsets.size() * lanes),
        memory(Scratch::aligned(l.features * grads_pitch * sizeof(T)) + Scratch::aligned(panel_size * sizeof(T)) +
               Scratch::aligned(sums_size * 8)),
        grads(memory.take<T>(l.features * grads_pitch * sizeof(T))),
        panel(memory.take<T>(panel_size * sizeof(T))),
        sums(memory.take<double>(sums_size * 8)) {}
};

template <class T>
double direct_lanes(const Layer& l, const DirectPlan& plan, const char* input, const char* grads,
                    LanesScratch<T>& scratch) {
  const MatrixKernels<T>& matrix = matrix_kernels<T>();
  const PackFn pack = kernels().pack[static_cast<int>(l.dtype)];
  const int64_t lanes = scratch.lanes, bytes = element_bytes(l.dtype);
  double total = 0;
  for (int64_t group = 0; group < l.groups; group += lanes) {
    const int64_t used = std::min(lanes, l.groups - group);
    for (int64_t p = 0; p < l.features; ++p) {
      pack(grads + (group * l.features + p) * l.grads_channel * bytes, l.grads_position, l.features * l.grads_channel,
           points(l.out), used, lanes, lanes, scratch.grads + p * scratch.grads_pitch);
    }
    for (int64_t c = 0; c < l.channels; ++c) {
      pack_input(l, plan.extent, input + (group * l.channels + c) * l.input_channel * bytes,
                 l.channels * l.input_channel, used, lanes, scratch.panel);
      for (int64_t p = 0; p < l.features; ++p) {
        std::fill_n(scratch.sums, scratch.sums_size, 0.0);
        const T* row = scratch.grads + p * scratch.grads_pitch;
        for (size_t block = 0; block + 1 < plan.blocks.size(); ++block) {
          const Run *begin = &plan.runs[plan.blocks[block]], *end = plan.runs.data() + plan.blocks[block + 1];
          matrix.multiply_lanes(row, scratch.panel, l.stride[2], begin, end - begin, plan.offsets.data(),
                                static_cast<int64_t>(plan.offsets.size()), scratch.sums);
          for (const Run* run = begin; run != end; ++run) row += run->length * lanes;
        }
        total += matrix.sum_squares(scratch.sums, scratch.sums_size, nullptr);
      }
    }
  }
  return total;
}

// ---- winograd

bool fits_winograd(const Layer& l) {
  return l.kernel == Extent{1, 3, 3} && l.stride == Extent{1, 1, 1} && l.dilation == Extent{1, 1, 1} && l.in[0] == 1 &&
         l.padding[0] == 0;
}

struct WinogradPlan {
  int64_t rows, columns, tiles;
  Extent grads, input;  // the points that the tiles cover

  explicit WinogradPlan(const Layer& l)
      : rows(ceil_div(l.out[1], kWinogradTile)),
        columns(ceil_div(l.out[2], kWinogradTile)),
        tiles(rows * columns),
        grads{1, kWinogradTile * rows, kWinogradTile * columns},
        input{1, grads[1] + 2, grads[2] + 2} {}
};

template <class T>
struct WinogradScratch {
  int64_t row_groups, pitch_grads, pitch_input, pitch_products;
  Scratch memory;
  T *image, *grads, *input, *products;

  WinogradScratch(const Layer& l, const WinogradPlan& plan)
      : row_groups(ceil_div(l.features, matrix_kernels<T>().rows)),
        pitch_grads(row_groups * plan.tiles * matrix_kernels<T>().rows + kPackSlack),
        pitch_input(plan.tiles * 2 * matrix_kernels<T>().lanes + kPackSlack),
        pitch_products(tiles_bytes<T>() / sizeof(double) + kPackSlack),
        memory(Scratch::aligned(image_bytes(plan)) + Scratch::aligned(kWinogradPoints * pitch_grads * sizeof(T)) +
               Scratch::aligned(kWinogradPoints * pitch_input * sizeof(T)) +
               Scratch::aligned(kWinogradPoints * pitch_products * sizeof(T))),
        image(memory.take<T>(image_bytes(plan))),
        grads(memory.take<T>(kWinogradPoints * pitch_grads * sizeof(T))),
        input(memory.take<T>(kWinogradPoints * pitch_input * sizeof(T))),
        products(memory.take<T>(kWinogradPoints * pitch_products * sizeof(T))) {}
  static int64_t image_bytes(const WinogradPlan& plan) {
    const int64_t width = std::max(2 * matrix_kernels<T>().lanes, matrix_kernels<T>().rows);
    return (points(plan.input) * width + kPackSlack) * sizeof(T);
  }
};

// The gradients as an image of their own.
Layer image_of_grads(Layer l) {
  l.in = l.out;
  l.padding = {0, 0, 0};
  l.input_space = {0, l.out[2] * l.grads_position, l.grads_position};
  return l;
}

template <class T>
double winograd(const Layer& l, const WinogradPlan& plan, const char* input, const char* grads,
                const WinogradScratch<T>& scratch) {
  const MatrixKernels<T>& matrix = matrix_kernels<T>();
  const int64_t bytes = element_bytes(l.dtype), group_stride = plan.tiles * matrix.rows;
  const Layer image = image_of_grads(l);
  for (int64_t group = 0; group < scratch.row_groups; ++group) {  // in order: each writes past its end
    const int64_t row = group * matrix.rows;
    pack_input(image, plan.grads, grads + row * l.grads_channel * bytes, l.grads_channel,
               std::min(matrix.rows, l.features - row), matrix.rows, scratch.image);
    matrix.winograd_grads({scratch.image, plan.rows, plan.columns, matrix.rows, scratch.grads + group * group_stride,
                           scratch.pitch_grads});
  }
  const Panels panels{l.channels, matrix.lanes};
  double total = 0;
  for (int64_t j = 0; j < panels.count(); ++j) {
    const int64_t width = panels.width(j);
    pack_input(l, plan.input, input + panels.first(j) * l.input_channel * bytes, l.input_channel, panels.used(j), width,
               scratch.image);
    matrix.winograd_input({scratch.image, plan.rows, plan.columns, width, scratch.input, scratch.pitch_input});
    for (int64_t group = 0; group < scratch.row_groups; group += kGroupBlock) {
      const int64_t groups = std::min(kGroupBlock, scratch.row_groups - group);
      for (int64_t tile = 0; tile < plan.tiles; tile += kSumBlock) {
        matrix.winograd_products({scratch.grads + group * group_stride + tile * matrix.rows,
                                  scratch.input + tile * width, scratch.pitch_grads, scratch.pitch_input,
                                  scratch.pitch_products, group_stride, groups, width,
                                  std::min(kSumBlock, plan.tiles - tile), tile > 0, scratch.products});
      }
      total += matrix.winograd_squares(scratch.products, scratch.pitch_products, groups * matrix.rows * width);
    }
  }
  return total;
}

// ---- gram

struct Phase {
  Extent start, grid;
  std::vector<Extent> shifts;                        // grid point of output 0 under each offset
  std::vector<std::pair<int64_t, int64_t>> stripes;  // rows of the grid's Gram matrix that each stripe of outputs needs
};

struct GramPlan {
  std::vector<Phase> phases;
  int64_t stripe;                                               // outputs of a stripe
  int64_t input_rows = 0, input_elements = 0, grid_points = 0;  // the largest of any stripe and phase

  explicit GramPlan(const Layer& l) {
    const int64_t positions = points(l.out);
    stripe = std::min(positions, std::max<int64_t>(48, kStripe / positions));
    for (int64_t z = 0; z < l.kernel[0]; ++z) {
      for (int64_t y = 0; y < l.kernel[1]; ++y) {
        for (int64_t x = 0; x < l.kernel[2]; ++x) add_offset(l, {z, y, x});
      }
    }
    for (Phase& phase : phases) {
      grid_points = std::max(grid_points, points(phase.grid));
      for (int64_t begin = 0; begin < positions; begin += stripe) {
        phase.stripes.push_back(needed_rows(l, phase, begin, std::min(positions, begin + stripe)));
        const int64_t rows = phase.stripes.back().second - phase.stripes.back().first;
        input_rows = std::max(input_rows, rows);
        input_elements = std::max(input_elements, rows * points(phase.grid));
      }
    }
  }

 private:
  void add_offset(const Layer& l, const Extent& offset) {
    Extent start, grid, shift;
    for (int i = 0; i < 3; ++i) {
      const int64_t at = offset[i] * l.dilation[i] - l.padding[i];
      shift[i] = floor_div(at, l.stride[i]);
      start[i] = at - shift[i] * l.stride[i];
      grid[i] = std::max<int64_t>(0, ceil_div(l.in[i] - start[i], l.stride[i]));
    }
    if (points(grid) == 0) return;
    auto phase = std::find_if(phases.begin(), phases.end(), [&](const Phase& p) { return p.start == start; });
    if (phase == phases.end()) phase = phases.insert(phases.end(), {start, grid, {}, {}});
    phase->shifts.push_back(shift);
  }
  static std::pair<int64_t, int64_t> needed_rows(const Layer& l, const Phase& phase, int64_t begin, int64_t end) {
    if (end - begin == points(l.out)) return {0, points(phase.grid)};
    int64_t first = points(phase.grid), last = -1;
    for (const Extent& shift : phase.shifts) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t z = t / (l.out[1] * l.out[2]) + shift[0], y = t / l.out[2] % l.out[1] + shift[1],
                      x = t % l.out[2] + shift[2];
        if (z < 0 || z >= phase.grid[0] || y < 0 || y >= phase.grid[1] || x < 0 || x >= phase.grid[2]) continue;
        const int64_t row = (z * phase.grid[1] + y) * phase.grid[2] + x;
        first = std::min(first, row);
        last = std::max(last, row);
      }
    }
    return {std::min(first, last + 1), last + 1};
  }
};

template <class T>
struct GramScratch {
  T *dense, *rows, *columns, *gram_input, *gram_grads, *grad_columns;
  double* tiles;

  GramScratch(Scratch& scratch, const Layer& l, const GramPlan& plan)
      : dense(scratch.take<T>(sizes(l, plan)[0])),
        rows(scratch.take<T>(sizes(l, plan)[1])),
        columns(scratch.take<T>(sizes(l, plan)[2])),
        gram_input(scratch.take<T>(sizes(l, plan)[3])),
        gram_grads(scratch.take<T>(sizes(l, plan)[4])),
        grad_columns(scratch.take<T>(sizes(l, plan)[5])),
        tiles(scratch.take<double>(tiles_bytes<T>())) {}
  static std::array<int64_t, 6> sizes(const Layer& l, const GramPlan& plan) {
    const MatrixKernels<T>& matrix = matrix_kernels<T>();
    const int64_t positions = points(l.out);
    const int64_t rows =
        std::max(round_up(plan.stripe, matrix.rows) * l.features, round_up(plan.input_rows, matrix.rows) * l.channels);
    std::array<int64_t, 6> elements = {plan.grid_points * l.channels,
                                       rows,
                                       round_up(plan.grid_points, matrix.lanes) * l.channels,
                                       plan.input_elements,
                                       plan.stripe * positions,
                                       round_up(positions, matrix.lanes) * l.features};
    for (int64_t& n : elements) n = (n + kPackSlack) * static_cast<int64_t>(sizeof(T));
    return elements;
  }
  static int64_t bytes(const Layer& l, const GramPlan& plan) {
    int64_t total = Scratch::aligned(tiles_bytes<T>());
    for (int64_t size : sizes(l, plan)) total += Scratch::aligned(size);
    return total;
  }
};

// Vectors [k] at points, element (k, point) at k * stride_k + point * stride_point.
struct Points {
  const char* data;
  Dtype dtype;
  int64_t stride_k, stride_point, k, count;
};

template <class T>
void pack_columns(const Points& p, T* columns) {
  const Panels panels{p.count, matrix_kernels<T>().lanes};
  for (int64_t j = 0; j < panels.count(); ++j) {
    kernels().pack[static_cast<int>(p.dtype)](p.data + panels.first(j) * p.stride_point * element_bytes(p.dtype),
                                              p.stride_k, p.stride_point, p.k, panels.used(j), panels.width(j),
                                              panels.width(j), columns + panels.first(j) * p.k);
  }
}

// gram[r - begin][c] = <point r, point c> for begin <= r < end and c >= r (and some c < r).
template <class T>
void gram_stripe(const Points& p, int64_t begin, int64_t end, const T* columns, T* rows, double* tiles, T* gram) {
  const MatrixKernels<T>& matrix = matrix_kernels<T>();
  const Panels panels{p.count, matrix.lanes};
  for (int64_t first = begin; first < end; first += matrix.rows) {
    kernels().pack[static_cast<int>(p.dtype)](p.data + first * p.stride_point * element_bytes(p.dtype), p.stride_k,
                                              p.stride_point, p.k, std::min(matrix.rows, end - first), matrix.rows,
                                              matrix.rows, rows + (first - begin) * p.k);
  }
  for (int64_t group = begin; group < end; group += kGroupBlock * matrix.rows) {
    for (int64_t j = group / (2 * matrix.lanes); j < panels.count(); ++j) {
      const int64_t width = panels.width(j), left = panels.first(j), used = panels.used(j);
      const int64_t last = std::min({end, left + used, group + kGroupBlock * matrix.rows});  // rows below it see c < r
      const int64_t groups = ceil_div(last - group, matrix.rows);
      if (groups <= 0) continue;
      std::fill_n(tiles, groups * matrix.rows * width, 0.0);
      for (int64_t k = 0; k < p.k; k += kSumBlock) {
        const Run run{k, std::min(kSumBlock, p.k - k)};
        matrix.multiply(rows + (group - begin) * p.k + k * matrix.rows, p.k * matrix.rows, groups, columns + left * p.k,
                        width, 1, &run, 1, tiles);
      }
      for (int64_t r = group; r < last; ++r) {
        const double* tile = tiles + (r - group) * width;
        T* to = gram + (r - begin) * p.count + left;
        for (int64_t c = 0; c < used; ++c) to[c] = static_cast<T>(tile[c]);
      }
    }
  }
}

// The grid of a phase as [channels][points].
template <class T>
Points gather_phase(const Layer& l, const Phase& phase, const char* input, T* dense) {
  const int64_t bytes = element_bytes(l.dtype), count = points(phase.grid);
  Extent step;
  for (int i = 0; i < 3; ++i) {
    input += phase.start[i] * l.input_space[i] * bytes;
    step[i] = l.stride[i] * l.input_space[i];
  }
  const Extent& n = phase.grid;
  const bool lines = n[1] == 1 || step[1] == step[2] * n[2], planes = n[0] == 1 || step[0] == step[2] * n[2] * n[1];
  if (lines && planes) return {input, l.dtype, l.input_channel, step[2], l.channels, count};
  for (int64_t line = 0; line < n[0] * n[1]; ++line) {
    kernels().pack[static_cast<int>(l.dtype)](input + (line / n[1] * step[0] + line % n[1] * step[1]) * bytes,
                                              l.input_channel, step[2], l.channels, n[2], n[2], count,
                                              dense + line * n[2]);
  }
  return {reinterpret_cast<const char*>(dense), kComputeDtype<T>, count, 1, l.channels, count};
}

template <class T>
GramSums gram(const Layer& l, const GramPlan& plan, const char* input, const char* grads, GramScratch<T>& scratch) {
  const MatrixKernels<T>& matrix = matrix_kernels<T>();
  const int64_t positions = points(l.out);
  const Points g{grads, l.dtype, l.grads_channel, l.grads_position, l.features, positions};
  pack_columns(g, scratch.grad_columns);
  GramSums sums{};
  for (int64_t begin = 0, stripe = 0; begin < positions; begin += plan.stripe, ++stripe) {
    const int64_t end = std::min(positions, begin + plan.stripe);
    gram_stripe(g, begin, end, scratch.grad_columns, scratch.rows, scratch.tiles, scratch.gram_grads);
    for (const Phase& phase : plan.phases) {
      const auto [first_row, last_row] = phase.stripes[stripe];
      const Points x = gather_phase(l, phase, input, scratch.dense);
      pack_columns(x, scratch.columns);
      gram_stripe(x, first_row, last_row, scratch.columns, scratch.rows, scratch.tiles, scratch.gram_input);
      ShiftedProduct<T> product{scratch.gram_grads, scratch.gram_input, first_row, begin, end, {}, {}, {}};
      std::copy_n(l.out.begin(), 3, product.out);
      std::copy_n(phase.grid.begin(), 3, product.grid);
      for (const Extent& shift : phase.shifts) {
        std::copy_n(shift.begin(), 3, product.shift);
        const GramSums part = matrix.shifted_product(product);
        sums.total += part.total;
        sums.diagonal += part.diagonal;
      }
    }
  }
  return sums;
}

// A linear layer needs no shifts: the Gram matrices are multiplied as they are formed, and never stored.
bool is_linear(const Layer& l) {
  return points(l.kernel) == 1 && points(l.out) == l.out[2] && l.in == l.out && l.padding == Extent{0, 0, 0};
}

// Rows [T][k] of the compute type, copied only where they are not that already.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;

  Rows(const Points& p, T* packed) : data(reinterpret_cast<const T*>(p.data)), stride(p.stride_point) {
    if (p.dtype == kComputeDtype<T> && p.stride_k == 1) return;
    kernels().pack[static_cast<int>(p.dtype)](p.data, p.stride_point, p.stride_k, p.count, p.k, p.k, p.k, packed);
    data = packed;
    stride = p.k;
  }
  static int64_t bytes(int64_t points, int64_t k) {
    return (points * k + kPackSlack) * static_cast<int64_t>(sizeof(T));
  }
};

template <class T>
struct LinearGramScratch {
  T *input, *grads;

  static int64_t bytes(const Layer& l) {
    return Scratch::aligned(Rows<T>::bytes(l.out[2], l.channels)) +
           Scratch::aligned(Rows<T>::bytes(l.out[2], l.features));
  }
  LinearGramScratch(Scratch& scratch, const Layer& l)
      : input(scratch.take<T>(Rows<T>::bytes(l.out[2], l.channels))),
        grads(scratch.take<T>(Rows<T>::bytes(l.out[2], l.features))) {}
};

// A bias is the weight of one more input, which is always 1.
template <class T>
GramSums gram_linear(const Layer& l, bool bias, const char* input, const char* grads,
                     const LinearGramScratch<T>& scratch) {
  const Rows<T> a({input, l.dtype, l.input_channel, l.input_space[2], l.channels, l.out[2]}, scratch.input);
  const Rows<T> g({grads, l.dtype, l.grads_channel, l.grads_position, l.features, l.out[2]}, scratch.grads);
  return matrix_kernels<T>().gram_product({a.data, g.data, a.stride, g.stride, l.channels, l.features, l.out[2], bias});
}

// |sum_t g_t|^2 of one sample.
template <class T>
double bias_sq_norm(const Layer& l, const char* grads, const LinearGramScratch<T>& scratch) {
  const Rows<T> g({grads, l.dtype, l.grads_channel, l.grads_position, l.features, l.out[2]}, scratch.grads);
  std::vector<int64_t> positions(l.out[2]);
  std::iota(positions.begin(), positions.end(), 0);
  const SegmentFn sum = kernels().segment[static_cast<int>(kComputeDtype<T>)];
  return sum(g.data, g.stride, positions.data(), l.out[2], l.features);
}

// ---- choice by arithmetic

// Costs are in multiply-adds of the tiles, with what rounding up to tiles wastes.

// Entries of the tiles that cover the gradient of one kernel offset and group.
template <class T>
double tile_entries(const Layer& l) {
  const MatrixKernels<T>& matrix = matrix_kernels<T>();
  return double(round_up(l.features, matrix.rows)) * round_up(l.channels, matrix.lanes);
}

// Groups in the lanes of vectors, instead of channels.
template <class T>
double lanes_cost(const Layer& l) {
  const int64_t lanes = matrix_kernels<T>().lanes;
  return kLanesCost * points(l.out) * points(l.kernel) * l.features * l.channels * round_up(l.groups, lanes) / l.groups;
}

template <class T>
double tiles_cost(const Layer& l) {
  return (double(points(l.out)) + kTileCost) * points(l.kernel) * tile_entries<T>(l);
}

double linear_gram_cost(const Layer& l) {
  const double pairs = l.out[2] * (l.out[2] + 7.0) / 2;  // tiles reach below the diagonal
  return pairs * (kVectorCost * (l.channels + l.features) + kPairCost);
}

template <class T>
double gram_cost(const Layer& l, const GramPlan& plan) {
  const int64_t tile = 2 * matrix_kernels<T>().lanes, positions = points(l.out);
  const auto entries = [&](int64_t begin, int64_t end, int64_t count) {  // computed for rows begin .. end
    return double(end - begin) * (count - begin - (end - begin) / 2.0 + tile);
  };
  double cost = 0;
  for (int64_t begin = 0, stripe = 0; begin < positions; begin += plan.stripe, ++stripe) {
    const double of_grads = entries(begin, std::min(positions, begin + plan.stripe), positions);
    cost += of_grads * (l.features + kEntryCost);
    for (const Phase& phase : plan.phases) {
      const auto [first, last] = phase.stripes[stripe];
      cost += entries(first, last, points(phase.grid)) * (l.channels + kEntryCost);
      cost += of_grads * phase.shifts.size() * (kShiftCost + kLineCost / l.out[2]);
    }
  }
  return cost;
}

template <class T>
double winograd_cost(const Layer& l) {
  const MatrixKernels<T>& matrix = matrix_kernels<T>();
  const double tiles = WinogradPlan(l).tiles;
  const double an_entry = kWinogradPoints * (tiles + kWinogradPointCost) + kWinogradEntryCost;
  return an_entry * tile_entries<T>(l) +
         kWinogradTileCost * tiles * (round_up(l.features, matrix.rows) + round_up(l.channels, matrix.lanes));
}

bool single_position(const Layer& l) { return is_linear(l) && points(l.out) == 1; }

struct Choice {
  Form form;
  double cost;  // of one sample and group
};

template <class T>
Choice cheaper(const Layer& l) {
  if (single_position(l)) return {Form::kDirect, 0};
  const int64_t positions = points(l.out);
  Choice best{Form::kDirect, std::min(tiles_cost<T>(l), lanes_cost<T>(l))};
  if (fits_winograd(l) && winograd_cost<T>(l) < best.cost) best = {Form::kWinograd, winograd_cost<T>(l)};
  if (0.5 * positions * positions * l.features > best.cost) return best;  // needs no plan to be known
  const double gram = is_linear(l) ? linear_gram_cost(l) : gram_cost<T>(l, GramPlan(l));
  return gram < best.cost ? Choice{Form::kGram, gram} : best;
}

template <class T>
bool add_sq_norms(const Layer& l, Form form, bool bias, double* totals) {
  const int64_t bytes = element_bytes(l.dtype);
  const auto input_of = [&](int64_t i, int64_t group = 0) {
    return l.input + (i * l.input_sample + group * l.channels * l.input_channel) * bytes;
  };
  const auto grads_of = [&](int64_t i, int64_t group = 0) {
    return l.grads + (i * l.grads_sample + group * l.features * l.grads_channel) * bytes;
  };
  if (single_position(l) && l.groups == 1 && l.input_channel == 1 && l.grads_channel == 1) {
    // |g a^T|^2 = |g|^2 |a|^2, and a bias is the weight of one more input, which is always 1
    const SegmentFn square = kernels().segment[static_cast<int>(l.dtype)];
    const int64_t row = 0;
    at::parallel_for(0, l.samples, sample_grain(l.channels + l.features), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const double inputs = square(input_of(i), 0, &row, 1, l.channels) + (bias ? 1.0 : 0.0);
        totals[i] += inputs * square(grads_of(i), 0, &row, 1, l.features);
      }
    });
    return bias;
  }
  if (form == Form::kWinograd) {
    const WinogradPlan plan(l);
    at::parallel_for(0, l.samples, sample_grain(static_cast<int64_t>(l.groups * winograd_cost<T>(l))),
                     [&](int64_t begin, int64_t end) {
                       const WinogradScratch<T> scratch(l, plan);
                       for (int64_t i = begin; i < end; ++i) {
                         for (int64_t group = 0; group < l.groups; ++group) {
                           totals[i] += winograd<T>(l, plan, input_of(i, group), grads_of(i, group), scratch);
                         }
                       }
                     });
    return false;
  }
  const DirectPlan direct_plan(l);
  if (lanes_cost<T>(l) < tiles_cost<T>(l) && form == Form::kDirect) {
    at::parallel_for(0, l.samples, sample_grain(static_cast<int64_t>(l.groups * lanes_cost<T>(l))),
                     [&](int64_t begin, int64_t end) {
                       LanesScratch<T> scratch(l, direct_plan);
                       for (int64_t i = begin; i < end; ++i) {
                         totals[i] += direct_lanes<T>(l, direct_plan, input_of(i), grads_of(i), scratch);
                       }
                     });
    return false;
  }
  const bool linear = form == Form::kGram && is_linear(l), planned = form == Form::kGram && !linear;
  const std::optional<GramPlan> gram_plan = planned ? std::optional<GramPlan>(l) : std::nullopt;
  const int64_t scratch_bytes = DirectScratch<T>::bytes(l, direct_plan) +
                                (linear ? LinearGramScratch<T>::bytes(l) : 0) +
                                (gram_plan ? GramScratch<T>::bytes(l, *gram_plan) : 0);
  const double cost = linear ? linear_gram_cost(l) : gram_plan ? gram_cost<T>(l, *gram_plan) : tiles_cost<T>(l);
  at::parallel_for(0, l.samples, sample_grain(static_cast<int64_t>(l.groups * cost)), [&](int64_t begin, int64_t end) {
    Scratch memory(scratch_bytes);
    DirectScratch<T> direct_scratch(memory, l, direct_plan);
    std::optional<GramScratch<T>> gram_scratch;
    std::optional<LinearGramScratch<T>> linear_scratch;
    if (gram_plan) gram_scratch.emplace(memory, l, *gram_plan);
    if (linear) linear_scratch.emplace(memory, l);
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t group = 0; group < l.groups; ++group) {
        const char *input = input_of(i, group), *grads = grads_of(i, group);
        if (form == Form::kGram) {
          const GramSums sums = linear ? gram_linear<T>(l, bias, input, grads, *linear_scratch)
                                       : gram<T>(l, *gram_plan, input, grads, *gram_scratch);
          if (!(sums.total < kCancelled * sums.diagonal)) {
            totals[i] += sums.total;
            continue;
          }
        }
        totals[i] += direct<T>(l, direct_plan, input, grads, direct_scratch);
        if (linear && bias) totals[i] += bias_sq_norm<T>(l, grads, *linear_scratch);
      }
    }
  });
  return linear && bias;
}

// ---- with the gradient of the batch

// Samples packed one after the other: gradients as [row groups][samples * positions][rows], inputs as
// [panels][samples * positions][width].
template <class T>
struct Chunk {
  const Layer& layer;
  Panels panels;  // of the inputs; beyond the channels there may be one that is always 1
  int64_t row_groups, samples, grads_pitch, input_pitch;
  Scratch scratch;
  T *grads, *input;

  Chunk(const Layer& l, int64_t inputs)
      : layer(l),
        panels{inputs, matrix_kernels<T>().lanes},
        row_groups(ceil_div(l.features, matrix_kernels<T>().rows)),
        samples(std::clamp<int64_t>(kChunk / (l.out[2] * (l.features + inputs)), 1, l.samples)),
        grads_pitch(samples * l.out[2] * matrix_kernels<T>().rows + kPackSlack),
        input_pitch(samples * l.out[2] * 2 * panels.lanes + kPackSlack),
        scratch(Scratch::aligned(row_groups * grads_pitch * sizeof(T)) +
                Scratch::aligned(panels.count() * input_pitch * sizeof(T))),
        grads(scratch.take<T>(row_groups * grads_pitch * sizeof(T))),
        input(scratch.take<T>(panels.count() * input_pitch * sizeof(T))) {}

  void pack(int64_t first, int64_t count) {
    at::parallel_for(0, row_groups + panels.count(), sample_grain(count * layer.out[2] * matrix_kernels<T>().rows),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t item = begin; item < end; ++item) {
                         if (item < row_groups) {
                           pack_rows(item, first, count);
                         } else {
                           pack_panel(item - row_groups, first, count);
                         }
                       }
                     });
  }

 private:
  void pack_rows(int64_t group, int64_t first, int64_t count) {
    const int64_t rows = matrix_kernels<T>().rows, row = group * rows;
    pack_samples(layer.grads, layer.grads_sample, layer.grads_position, layer.grads_channel, row,
                 std::min(rows, layer.features - row), rows, first, count, grads + group * grads_pitch);
  }
  void pack_panel(int64_t j, int64_t first, int64_t count) {
    const int64_t width = panels.width(j), column = panels.first(j);
    const int64_t used = std::min(panels.used(j), layer.channels - column);
    T* panel = input + j * input_pitch;
    pack_samples(layer.input, layer.input_sample, layer.input_space[2], layer.input_channel, column, used, width, first,
                 count, panel);
    if (used == panels.used(j)) return;
    for (int64_t t = 0; t < count * layer.out[2]; ++t) panel[t * width + used] = T(1);
  }
  // Evenly spaced samples are one longer sample. Packing may write past its end, so samples are packed in order.
  void pack_samples(const char* from, int64_t stride_sample, int64_t stride_position, int64_t stride_column,
                    int64_t column, int64_t used, int64_t width, int64_t first, int64_t count, T* to) {
    const PackFn pack = kernels().pack[static_cast<int>(layer.dtype)];
    const bool even = stride_sample == layer.out[2] * stride_position;
    const int64_t pieces = even ? 1 : count, steps = layer.out[2] * (count / pieces);
    for (int64_t i = 0; i < pieces; ++i) {
      pack(from + ((first + i) * stride_sample + column * stride_column) * element_bytes(layer.dtype), stride_position,
           stride_column, steps, used, width, width, to + i * steps * width);
    }
  }
};

// A bias is the weight of one more input, which is always 1. A thread owns a block of the gradient and adds the samples
// to it in order, so that any number of threads gives the same bits. Without `totals` the samples are not told apart.
template <class T>
void add_grads(const Layer& l, T* weight_grad, T* bias_grad, double* totals) {
  const MatrixKernels<T>& matrix = matrix_kernels<T>();
  Chunk<T> chunk(l, l.channels + (bias_grad != nullptr ? 1 : 0));
  const Panels& panels = chunk.panels;
  const int64_t row_blocks = ceil_div(chunk.row_groups, kGroupBlock), units = panels.count() * row_blocks;
  std::vector<double> squares(totals != nullptr ? chunk.samples * units : 0);
  for (int64_t first = 0; first < l.samples; first += chunk.samples) {
    const int64_t count = std::min(chunk.samples, l.samples - first);
    chunk.pack(first, count);
    const int64_t pieces = totals != nullptr ? count : 1, length = count * l.out[2] / pieces;
    const int64_t operations = count * l.out[2] * std::min(l.features, kGroupBlock * matrix.rows) * 2 * panels.lanes;
    at::parallel_for(0, units, sample_grain(operations), [&](int64_t begin, int64_t end) {
      const int64_t bytes = tiles_bytes<T>();
      Scratch scratch(2 * bytes);
      double *tiles = scratch.take<double>(bytes), *sums = scratch.take<double>(bytes);
      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t j = unit % panels.count(), group = unit / panels.count() * kGroupBlock, width = panels.width(j);
        const int64_t groups = std::min(kGroupBlock, chunk.row_groups - group), size = groups * matrix.rows * width;
        std::fill_n(sums, size, 0.0);
        for (int64_t i = 0; i < pieces; ++i) {
          std::fill_n(tiles, size, 0.0);
          for (int64_t t = i * length; t < (i + 1) * length; t += kSumBlock) {
            const Run run{t, std::min(kSumBlock, (i + 1) * length - t)};
            matrix.multiply(chunk.grads + group * chunk.grads_pitch + t * matrix.rows, chunk.grads_pitch, groups,
                            chunk.input + j * chunk.input_pitch, width, 1, &run, 1, tiles);
          }
          const double square = matrix.sum_squares(tiles, size, sums);
          if (totals != nullptr) squares[unit * count + i] = square;
        }
        const int64_t end_row = std::min(l.features, (group + groups) * matrix.rows);
        const int64_t weights = std::min(panels.used(j), l.channels - panels.first(j));
        for (int64_t r = group * matrix.rows; r < end_row; ++r) {
          const double* tile = sums + (r - group * matrix.rows) * width;
          T* row = weight_grad + r * l.channels + panels.first(j);
          for (int64_t c = 0; c < weights; ++c) row[c] = static_cast<T>(row[c] + tile[c]);
          if (weights < panels.used(j)) bias_grad[r] = static_cast<T>(bias_grad[r] + tile[weights]);
        }
      }
    });
    for (int64_t unit = 0; totals != nullptr && unit < units; ++unit) {
      for (int64_t i = 0; i < count; ++i) totals[first + i] += squares[unit * count + i];
    }
  }
}

constexpr std::array<std::string_view, 4> kFormNames = {"direct", "gram", "winograd", "auto"};  // in the order of Form

}  // namespace

Form parse_form(std::string_view form) {
  const auto* found = std::find(kFormNames.begin(), kFormNames.end(), form);
  TORCH_CHECK_VALUE(found != kFormNames.end(), "form must be one of 'direct', 'gram', 'winograd', 'auto'; got '", form,
                    "'");
  return static_cast<Form>(found - kFormNames.begin());
}
std::string name_of(Form form) { return std::string(kFormNames[static_cast<int>(form)]); }

Form choose_form(const Layer& layer, Form form) {
  TORCH_CHECK_VALUE(form != Form::kWinograd || fits_winograd(layer),
                    "form 'winograd' is for 3 x 3 convolutions of stride 1 and dilation 1");
  if (form != Form::kAuto) return form;
  with_compute_type(layer.dtype, [&](auto zero) { form = cheaper<decltype(zero)>(layer).form; });
  return form;
}

bool add_weight_sq_norms(const Layer& layer, Form form, bool bias, double* totals) {
  if (layer.samples == 0 || points(layer.out) == 0 || layer.channels == 0 || layer.features == 0) return false;
  form = choose_form(layer, form);
  bool counted = false;
  with_compute_type(layer.dtype, [&](auto zero) { counted = add_sq_norms<decltype(zero)>(layer, form, bias, totals); });
  return counted;
}

bool add_weight_grad_and_sq_norms(const Layer& layer, void* weight_grad, void* bias_grad, double* totals) {
  if (layer.samples == 0 || points(layer.out) == 0 || layer.features == 0) return true;
  bool together = false;
  with_compute_type(layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    together = kTileCost * tile_entries<T>(layer) < cheaper<T>(layer).cost;
    add_grads<T>(layer, static_cast<T*>(weight_grad), static_cast<T*>(bias_grad), together ? totals : nullptr);
  });
  return together || add_weight_sq_norms(layer, Form::kAuto, bias_grad != nullptr, totals);
}

}  // namespace adaselect
