// SPDX-License-Identifier: Apache-2.0
#pragma once
// Quantized checkpoints in every spelling that is in use, and what they hold, one element at a time by the formats' formulas: a plain writer and a plain
// reader of one page each, which share no code with the library.

#include "support/generate.hpp"
#include "support/plain_safetensors.hpp"
#include "support/whole_tensor.hpp"

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

namespace dcp::test::quantized {

// ---- small floats

inline float sign_of(unsigned code, unsigned bit) { return (code >> bit & 1u) != 0 ? -1.0f : 1.0f; }
inline float e4m3(unsigned code) {
  int const exponent = static_cast<int>(code >> 3 & 15u), mantissa = static_cast<int>(code & 7u);
  if (exponent == 15 && mantissa == 7) return NAN;
  return sign_of(code, 7) * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9) : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10));
}
inline float e5m2(unsigned code) {
  int const exponent = static_cast<int>(code >> 2 & 31u), mantissa = static_cast<int>(code & 3u);
  if (exponent == 31) return mantissa == 0 ? sign_of(code, 7) * INFINITY : NAN;
  return sign_of(code, 7) * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -16) : std::ldexp(static_cast<float>(4 + mantissa), exponent - 17));
}
inline float e8m0(unsigned code) { return std::ldexp(1.0f, static_cast<int>(code) - 127); }
inline float e2m1(unsigned code) {
  constexpr float values[]{0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  return sign_of(code, 3) * values[code & 7u];
}
inline float half(unsigned code) {
  int const exponent = static_cast<int>(code >> 10 & 31u), mantissa = static_cast<int>(code & 1023u);
  return sign_of(code, 15) * (exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24) : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25));
}
inline float bfloat(unsigned code) { return std::bit_cast<float>(static_cast<std::uint32_t>(code << 16)); }

/// The nearest bfloat16 and half of a number, ties to even.
inline std::uint16_t nearest_bfloat(float x) {
  auto const bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}
inline std::uint16_t nearest_half(float x) {
  auto const sign = static_cast<std::uint16_t>(std::signbit(x) ? 0x8000u : 0u);
  double const a = std::fabs(static_cast<double>(x));
  if (a >= 65520.0) return sign | 0x7c00u;
  int const exponent = a == 0 ? -14 : std::max(std::ilogb(a), -14);
  return static_cast<std::uint16_t>(sign | (static_cast<unsigned>(exponent + 14) * 1024u + static_cast<unsigned>(std::nearbyint(std::ldexp(a, 10 - exponent)))));
}

/// A tensor of floats as one of another float type, each element rounded once.
inline WholeTensor rounded_to(WholeTensor const& tensor, DType dtype) {
  auto const count = tensor.bytes.size() / 4;
  WholeTensor result{tensor.name, dtype, tensor.shape, Bytes(packed_bytes(dtype, count))};
  for (std::size_t i = 0; i < count; ++i) {
    float x;
    std::memcpy(&x, tensor.bytes.data() + i * 4, 4);
    auto const put = [&](auto y) { std::memcpy(result.bytes.data() + i * sizeof y, &y, sizeof y); };
    if (dtype == DType::f32) put(x);
    else if (dtype == DType::f64) put(static_cast<double>(x));
    else if (dtype == DType::bf16) put(nearest_bfloat(x));
    else put(nearest_half(x));
  }
  return result;
}

// ---- a checkpoint

using Shape = std::vector<std::int64_t>;
inline std::size_t count_of(Shape const& shape) {
  std::size_t count = 1;
  for (auto const size : shape) count *= static_cast<std::size_t>(size);
  return count;
}
inline Shape with_last(Shape shape, std::int64_t size) {
  shape.back() = size;
  return shape;
}
inline std::int64_t divided_up(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

/// What is put into the files, and what must come out of them.
struct Model {
  std::map<std::string, plain::Tensor> tensors;
  std::string config;                           // empty: there is none
  std::string config_name = "config.json";
  std::map<std::string, WholeTensor> values;    // in float
  std::map<std::string, std::string> schemes;   // as contents() names them

  void add(std::string const& name, Shape const& shape, std::vector<float> const& numbers, std::string scheme) {
    WholeTensor whole{name, DType::f32, Extents{shape}, Bytes(numbers.size() * 4)};
    if (!numbers.empty()) std::memcpy(whole.bytes.data(), numbers.data(), whole.bytes.size());
    values[name] = std::move(whole);
    schemes[name] = std::move(scheme);
  }
  template <class T>
  void put(std::string const& name, std::string dtype, Shape shape, std::vector<T> const& elements) {
    tensors[name] = plain::tensor_of(std::move(dtype), std::move(shape), elements);
  }
  /// One file; or several with an index, so that the parts of a tensor lie in different ones.
  void write(std::string const& directory, std::size_t files = 1) const {
    if (!config.empty()) std::ofstream{directory + "/" + config_name, std::ios::binary} << config;
    if (files == 1) return plain::write(directory + "/model.safetensors", {tensors, {}});
    std::vector<plain::File> parts(files);
    nlohmann::json index{{"metadata", nlohmann::json::object()}, {"weight_map", nlohmann::json::object()}};
    auto const name_of = [&](std::size_t f) { return "model-0000" + std::to_string(f + 1) + "-of-0000" + std::to_string(files) + ".safetensors"; };
    std::size_t next = 0;
    for (auto const& [name, tensor] : tensors) {
      index["weight_map"][name] = name_of(next);
      parts[next].tensors[name] = tensor;
      next = (next + 1) % files;
    }
    for (std::size_t f = 0; f < files; ++f) plain::write(directory + "/" + name_of(f), parts[f]);
    std::ofstream{directory + "/model.safetensors.index.json"} << index.dump();
  }
};

// ---- random parts

struct Numbers {
  plain::Tensor tensor;
  std::vector<float> values;
};
/// Scales: positive, neither very large nor very small.
inline Numbers scales(Random& random, std::string const& dtype, Shape const& shape) {
  Numbers result{{dtype, shape, {}}, {}};
  for (std::size_t i = 0; i < count_of(shape); ++i) {
    auto const put = [&](auto code) { result.tensor.bytes.append(reinterpret_cast<char const*>(&code), sizeof code); };
    if (dtype == "F32") {
      auto const x = std::bit_cast<float>(static_cast<std::uint32_t>(random.between(115, 130) << 23 | random.between(0, 0x7fffff)));
      put(x);
      result.values.push_back(x);
    } else if (dtype == "BF16") {
      auto const code = static_cast<std::uint16_t>(random.between(115, 130) << 7 | random.between(0, 127));
      put(code);
      result.values.push_back(bfloat(code));
    } else if (dtype == "F16") {
      auto const code = static_cast<std::uint16_t>(random.between(0, 18) << 10 | random.between(1, 1023));   // subnormals too
      put(code);
      result.values.push_back(half(code));
    } else if (dtype == "F8_E4M3") {
      auto const code = static_cast<std::uint8_t>(random.between(1, 0x7e));
      put(code);
      result.values.push_back(e4m3(code));
    } else {   // E8M0, whatever the file calls it
      auto const code = static_cast<std::uint8_t>(random.between(110, 135));
      put(code);
      result.values.push_back(e8m0(code));
    }
  }
  return result;
}
inline std::vector<std::uint8_t> codes(Random& random, std::size_t count, std::function<bool(unsigned)> const& allowed = {}) {
  std::vector<std::uint8_t> result(count);
  for (auto& code : result)
    do code = static_cast<std::uint8_t>(random.between(0, 255));
    while (allowed && !allowed(code));
  return result;
}
inline unsigned nibble(std::vector<std::uint8_t> const& bytes, std::size_t element) { return (bytes[element / 2] >> (element % 2 * 4)) & 15u; }

/// For every element of `shape`, in rows: visit(element, leading index, row, column).
template <class Visit>
void for_elements(Shape const& shape, Visit visit) {
  auto const rows = shape.size() > 1 ? shape[shape.size() - 2] : 1, columns = shape.back();
  auto const count = static_cast<std::int64_t>(count_of(shape));
  for (std::int64_t i = 0; i < count; ++i) visit(static_cast<std::size_t>(i), i / columns / rows, i / columns % rows, i % columns);
}

// ---- configurations

inline std::string fp8_config(std::string const& more) { return R"({"quantization_config":{"quant_method":"fp8","fmt":"e4m3","activation_scheme":"dynamic")" + more + "}}"; }
inline std::string compressed(std::string const& format, std::string const& weights) {
  return R"({"quantization_config":{"quant_method":"compressed-tensors","format":")" + format + R"(","ignore":["lm_head"],"config_groups":{"group_0":{"targets":["Linear"],"weights":{)" + weights + "}}}}}";
}

// ---- schemes

/// Eight-bit floats, or floats, with a scale for every block of `rows` x `columns`; 0: for all of them.
struct Fp8 {
  Shape shape;
  std::int64_t rows = 0, columns = 0;
  std::string suffix = "_scale_inv", scale_dtype = "F32", dtype = "F8_E4M3", scheme = {};
  Shape scale_shape = {};   // where it is not the grid
  std::string scale_name = {};   // where it is not the suffix
};
inline void add_fp8(Model& model, Random& random, std::string const& name, Fp8 const& spec) {
  bool const wide = spec.dtype == "F8_E5M2", narrow = spec.dtype.starts_with("F8");
  auto const data = codes(random, count_of(spec.shape), [&](unsigned c) { return wide ? (c & 0x7cu) != 0x7cu : (c & 0x7fu) != 0x7fu; });
  Numbers const floats = narrow ? Numbers{} : scales(random, spec.dtype, spec.shape);   // scaled, if not narrowed
  Shape grid = spec.shape;
  if (grid.size() > 1) grid[grid.size() - 2] = spec.rows == 0 ? 1 : divided_up(grid[grid.size() - 2], spec.rows);
  grid.back() = spec.columns == 0 ? 1 : divided_up(grid.back(), spec.columns);
  bool const one = spec.rows == 0 && spec.columns == 0;
  Numbers scale = scales(random, spec.scale_dtype, one ? Shape{1} : grid);
  if (one || !spec.scale_shape.empty()) scale.tensor.shape = spec.scale_shape;
  std::vector<float> numbers(data.size());
  for_elements(spec.shape, [&](std::size_t i, std::int64_t lead, std::int64_t row, std::int64_t column) {
    std::size_t const at = one ? 0 : static_cast<std::size_t>((lead * grid[grid.size() - 2] + (spec.rows == 0 ? 0 : row / spec.rows)) * grid.back() + (spec.columns == 0 ? 0 : column / spec.columns));
    numbers[i] = (!narrow ? floats.values[i] : wide ? e5m2(data[i]) : e4m3(data[i])) * scale.values[at];
  });
  if (narrow) model.put(name, spec.dtype, spec.shape, data);
  else model.tensors[name] = floats.tensor;
  model.tensors[spec.scale_name.empty() ? name + spec.suffix : spec.scale_name] = scale.tensor;
  model.add(name, spec.shape, numbers, spec.scheme);
}

/// E2M1 with a scale for every 32 columns, or (tensor_scale) every 16 and one more.
struct Fp4 {
  Shape shape;
  std::string data_name, data_dtype = "U8", scale_name, scale_dtype = "U8";
  bool blocks = false;              // data have 16 bytes in a dimension of their own
  std::string second_name = {};     // NVFP4
  bool divide = false;
  Shape second_shape = {};
};
inline void add_fp4(Model& model, Random& random, std::string const& name, Fp4 const& spec) {
  bool const two = !spec.second_name.empty();
  std::int64_t const each = two ? 16 : 32, columns = spec.shape.back();
  auto const data = codes(random, count_of(spec.shape) / 2);
  Numbers const scale = scales(random, two ? "F8_E4M3" : spec.scale_dtype, with_last(spec.shape, columns / each));
  float const second = two ? 0.0123f * static_cast<float>(random.between(1, 1000)) : 1.0f;
  std::vector<float> numbers(count_of(spec.shape));
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    float const scaled = e2m1(nibble(data, i)) * scale.values[i / static_cast<std::size_t>(each)];
    numbers[i] = !two ? scaled : spec.divide ? scaled / second : scaled * second;
  }
  Shape stored = with_last(spec.shape, spec.data_dtype == "F4" ? columns : columns / 2);
  if (spec.blocks) {
    stored.back() = columns / 32;
    stored.push_back(16);
  }
  model.put(spec.data_name, spec.data_dtype, stored, data);
  model.tensors[spec.scale_name] = scale.tensor;
  if (two) model.put(spec.second_name, "F32", spec.second_shape, std::vector<float>{second});
  model.add(name, spec.shape, numbers, two ? "nvfp4" : "mxfp4");
}

/// Integers of eight bits; `group` columns to a scale, 0: a row, -1: the tensor.
struct Int8 {
  Shape shape;
  std::int64_t group = 0;
  bool zeros = false;
  std::string scale_dtype = "BF16", scheme = "int8_channel";
  bool flat_scale = false;   // [rows] instead of [rows, 1]
};
inline void add_int8(Model& model, Random& random, std::string const& name, Int8 const& spec) {
  auto const data = codes(random, count_of(spec.shape));
  std::int64_t const groups = spec.group > 0 ? divided_up(spec.shape.back(), spec.group) : 1;
  Shape grid = spec.group < 0 ? Shape{1} : with_last(spec.shape, groups);
  Numbers scale = scales(random, spec.scale_dtype, grid);
  auto const zero = codes(random, scale.values.size());
  if (spec.flat_scale) grid.pop_back();
  scale.tensor.shape = grid;
  std::vector<float> numbers(data.size());
  std::int64_t const rows = spec.shape[spec.shape.size() - 2];
  for_elements(spec.shape, [&](std::size_t i, std::int64_t lead, std::int64_t row, std::int64_t column) {
    auto const at = spec.group < 0 ? std::size_t{0} : static_cast<std::size_t>((lead * rows + row) * groups + (spec.group > 0 ? column / spec.group : 0));
    numbers[i] = static_cast<float>(static_cast<std::int8_t>(data[i]) - (spec.zeros ? static_cast<std::int8_t>(zero[at]) : 0)) * scale.values[at];
  });
  model.put(name, "I8", spec.shape, data);
  model.tensors[name + "_scale"] = scale.tensor;
  if (spec.zeros) model.put(name + "_zero_point", "I8", grid, zero);
  model.add(name, spec.shape, numbers, spec.scheme);
}
/// bitsandbytes' eight bits: SCB.
inline void add_scb(Model& model, Random& random, std::string const& module, Shape const& shape, bool format) {
  auto const data = codes(random, count_of(shape));
  Numbers const scale = scales(random, "F32", {shape[0]});
  std::vector<float> numbers(data.size());
  for_elements(shape, [&](std::size_t i, std::int64_t, std::int64_t row, std::int64_t) {
    float const product = static_cast<float>(static_cast<std::int8_t>(data[i])) * scale.values[static_cast<std::size_t>(row)];
    numbers[i] = product / 127.0f;
  });
  model.put(module + "weight", "I8", shape, data);
  model.tensors[module + "SCB"] = scale.tensor;
  if (format) model.put(module + "weight_format", "U8", {}, std::vector<std::uint8_t>{0});
  model.add(module + "weight", shape, numbers, "int8_channel (bitsandbytes)");
}

/// A string of codes of some bits in words of 32.
class Words {
 public:
  explicit Words(std::size_t words) : words_(words) {}
  void set(std::size_t word, int bit, int bits, unsigned code) {
    for (int b = 0; b < bits; ++b)
      if ((code >> b & 1u) != 0) words_[word + static_cast<std::size_t>((bit + b) / 32)] |= 1u << ((bit + b) % 32);
  }
  std::vector<std::uint32_t> const& words() const { return words_; }

 private:
  std::vector<std::uint32_t> words_;
};

/// Integers of a few bits in rows of words (compressed-tensors).
struct Packed {
  Shape shape;
  int bits = 4;
  std::int64_t group = 0;        // columns of a scale; 0: a row
  bool zeros = false, low = false;   // low: as compressed-tensors packed before it packed densely
  int index = 0;                 // 1: the groups of the columns in any order; 2: an index that says it is unused
  std::string scale_dtype = "BF16", scheme = {};
};
inline void add_packed(Model& model, Random& random, std::string const& name, Packed const& spec) {
  std::int64_t const rows = spec.shape[spec.shape.size() - 2], columns = spec.shape.back(), lines = static_cast<std::int64_t>(count_of(spec.shape)) / columns;
  std::int64_t const groups = spec.group == 0 ? 1 : divided_up(columns, spec.group), per = 32 / spec.bits;
  std::int64_t const words = spec.low ? divided_up(columns, per) : divided_up(columns * spec.bits, 32), zero_rows = divided_up(rows, per);
  Numbers const scale = scales(random, spec.scale_dtype, with_last(spec.shape, groups));
  std::vector<std::int32_t> index(static_cast<std::size_t>(columns));
  for (std::size_t c = 0; c < index.size(); ++c) index[c] = spec.group == 0 ? 0 : static_cast<std::int32_t>(static_cast<std::int64_t>(c) / spec.group);
  if (spec.index == 1) random.shuffle(index);
  unsigned const middle = 1u << (spec.bits - 1), most = (1u << spec.bits) - 1;
  Words packed{static_cast<std::size_t>(lines * words)}, zeros{static_cast<std::size_t>(rows == 0 ? 0 : lines / rows * zero_rows * groups)};
  std::vector<unsigned> zero(static_cast<std::size_t>(lines * groups), middle);
  if (spec.zeros)
    for (std::int64_t line = 0; line < lines; ++line)
      for (std::int64_t g = 0; g < groups; ++g) {
        auto const code = static_cast<unsigned>(random.between(0, most));
        zero[static_cast<std::size_t>(line * groups + g)] = code;
        std::int64_t const lead = line / rows, row = line % rows;
        zeros.set(static_cast<std::size_t>((lead * zero_rows + row / per) * groups + g), static_cast<int>(row % per) * spec.bits, spec.bits, code);
      }
  std::vector<float> numbers(count_of(spec.shape));
  for_elements(spec.shape, [&](std::size_t i, std::int64_t lead, std::int64_t row, std::int64_t column) {
    std::int64_t const line = lead * rows + row;
    auto const code = static_cast<unsigned>(random.between(0, most));
    auto const at = static_cast<std::size_t>(line * groups + index[static_cast<std::size_t>(column)]);
    if (spec.low) packed.set(static_cast<std::size_t>(line * words + column / per), static_cast<int>(column % per) * spec.bits, spec.bits, code);
    else packed.set(static_cast<std::size_t>(line * words), static_cast<int>(column) * spec.bits, spec.bits, code);
    numbers[i] = static_cast<float>(static_cast<int>(code) - static_cast<int>(zero[at])) * scale.values[at];
  });
  model.put(name + "_packed", "I32", with_last(spec.shape, words), packed.words());
  model.tensors[name + "_scale"] = scale.tensor;
  model.put(name + "_shape", "I64", {static_cast<std::int64_t>(spec.shape.size())}, spec.shape);
  if (spec.zeros) {
    Shape shape = with_last(spec.shape, groups);
    shape[shape.size() - 2] = zero_rows;
    model.put(name + "_zero_point", "I32", shape, zeros.words());
  }
  if (spec.index == 2) index.assign(index.size(), -1);
  if (spec.index != 0) model.put(name + "_g_idx", "I32", {columns}, index);
  model.add(name, spec.shape, numbers, spec.scheme);
}

/// GPTQ and AWQ: [outputs, inputs], stored as [inputs, outputs].
struct Transposed {
  std::int64_t outputs = 16, inputs = 64, group = 32;
  int bits = 4;
  bool awq = false, act_order = false, index = true;
  int stored_zero = 1;   // what a stored zero point is less than the zero point
  std::string scale_dtype = "F16", scheme = {};
};
inline void add_transposed(Model& model, Random& random, std::string const& module, Transposed const& spec) {
  std::int64_t const per = 32 / spec.bits, groups = divided_up(spec.inputs, spec.group), wide = spec.outputs / per;
  constexpr int order[]{0, 16, 4, 20, 8, 24, 12, 28};
  Numbers const scale = scales(random, spec.scale_dtype, {groups, spec.outputs});
  std::vector<std::int32_t> index(static_cast<std::size_t>(spec.inputs));
  for (std::size_t k = 0; k < index.size(); ++k) index[k] = static_cast<std::int32_t>(static_cast<std::int64_t>(k) / spec.group);
  if (spec.act_order) random.shuffle(index);
  unsigned const most = (1u << spec.bits) - 1;
  Words packed{static_cast<std::size_t>(spec.awq ? spec.inputs * wide : divided_up(spec.inputs, per) * spec.outputs)}, zeros{static_cast<std::size_t>(groups * wide)};
  std::vector<unsigned> zero(static_cast<std::size_t>(groups * spec.outputs));
  for (std::int64_t g = 0; g < groups; ++g)
    for (std::int64_t n = 0; n < spec.outputs; ++n) {
      auto const stored = static_cast<unsigned>(random.between(0, most));
      zero[static_cast<std::size_t>(g * spec.outputs + n)] = spec.awq ? stored : (stored + static_cast<unsigned>(spec.stored_zero)) & most;
      zeros.set(static_cast<std::size_t>(g * wide + n / per), spec.awq ? order[n % 8] : static_cast<int>(n % per) * spec.bits, spec.bits, stored);
    }
  std::vector<float> numbers(static_cast<std::size_t>(spec.outputs * spec.inputs));
  for_elements({spec.outputs, spec.inputs}, [&](std::size_t i, std::int64_t, std::int64_t n, std::int64_t k) {
    auto const code = static_cast<unsigned>(random.between(0, most));
    auto const at = static_cast<std::size_t>(index[static_cast<std::size_t>(k)] * spec.outputs + n);
    if (spec.awq) packed.set(static_cast<std::size_t>(k * wide + n / 8), order[n % 8], 4, code);
    else packed.set(static_cast<std::size_t>(k / per * spec.outputs + n), static_cast<int>(k % per) * spec.bits, spec.bits, code);
    numbers[i] = static_cast<float>(static_cast<int>(code) - static_cast<int>(zero[at])) * scale.values[at];
  });
  model.put(module + ".qweight", "I32", spec.awq ? Shape{spec.inputs, wide} : Shape{spec.inputs / per, spec.outputs}, packed.words());
  model.put(module + ".qzeros", "I32", {groups, wide}, zeros.words());
  model.tensors[module + ".scales"] = scale.tensor;
  if (spec.index && !spec.awq) model.put(module + ".g_idx", "I32", {spec.inputs}, index);
  model.add(module + ".weight", {spec.outputs, spec.inputs}, numbers, spec.scheme);
}

/// bitsandbytes' four bits.
struct Flat {
  Shape shape;
  std::int64_t block = 64;
  bool nested = false;
  std::int64_t nested_block = 256;
  std::string type = "nf4", storage = "U8";
};
inline void add_flat(Model& model, Random& random, std::string const& name, Flat const& spec) {
  constexpr std::uint32_t nf4[]{0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x00000000, 0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3, 0x3f800000};
  constexpr float fp4[]{0, 0.0625f, 8, 12, 4, 6, 2, 3};
  std::vector<float> table(16);
  for (unsigned c = 0; c < 16; ++c) table[c] = spec.type == "nf4" ? std::bit_cast<float>(nf4[c]) : sign_of(c, 3) * fp4[c & 7u] / 12.0f;
  auto const count = static_cast<std::int64_t>(count_of(spec.shape)), blocks = divided_up(count, spec.block);
  auto const data = codes(random, static_cast<std::size_t>(divided_up(count, 2)));
  std::vector<float> absmax;
  nlohmann::json state{{"quant_type", spec.type}, {"blocksize", spec.block}, {"dtype", "bfloat16"}, {"shape", spec.shape}};
  if (spec.nested) {
    auto const inner = codes(random, static_cast<std::size_t>(blocks));
    Numbers const outer = scales(random, "F32", {divided_up(blocks, spec.nested_block)});
    std::vector<float> map(256);
    for (auto& x : map) x = static_cast<float>(random.between(-10000, 10000)) / 10000.0f;
    float const offset = 0.04321f;
    state["nested_blocksize"] = spec.nested_block;
    state["nested_dtype"] = "float32";
    state["nested_offset"] = offset;
    for (std::size_t b = 0; b < inner.size(); ++b) {
      float const volatile product = map[inner[b]] * outer.values[b / static_cast<std::size_t>(spec.nested_block)];   // no fused addition
      absmax.push_back(product + offset);
    }
    model.put(name + ".absmax", "U8", {blocks}, inner);
    model.tensors[name + ".nested_absmax"] = outer.tensor;
    model.put(name + ".nested_quant_map", "F32", {256}, map);
  } else {
    Numbers const plain = scales(random, "F32", {blocks});
    absmax = plain.values;
    model.tensors[name + ".absmax"] = plain.tensor;
  }
  std::vector<float> numbers(static_cast<std::size_t>(count));
  for (std::size_t i = 0; i < numbers.size(); ++i) numbers[i] = table[i % 2 == 0 ? data[i / 2] >> 4 : data[i / 2] & 15u] * absmax[i / static_cast<std::size_t>(spec.block)];
  auto const bytes = static_cast<std::int64_t>(data.size());
  model.put(name, spec.storage, {spec.storage == "U8" ? bytes : bytes / 2, 1}, data);
  model.put(name + ".quant_map", "F32", {16}, table);
  std::string const text = state.dump();
  model.put(name + ".quant_state.bitsandbytes__" + spec.type, "U8", {static_cast<std::int64_t>(text.size())}, std::vector<char>{text.begin(), text.end()});
  model.add(name, spec.shape, numbers, spec.type + " block " + std::to_string(spec.block) + (spec.nested ? " nested" : ""));
}

}  // namespace dcp::test::quantized
