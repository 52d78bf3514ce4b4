// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// The law of quantized checkpoints: whatever scheme and spelling, and however ranks hold a tensor, each gets exactly its part of the whole that
// the format's formula gives. The formulas stand here once more, for one element at a time.
#include <dcp/checkpoint/load.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/gguf.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/exact_floats.hpp"
#include "support/generate.hpp"
#include "support/gguf_oracle.hpp"
#include "support/plain_safetensors.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace {

using dcp::Bytes;
using dcp::ceil_div;
using dcp::DType;
using dcp::Extents;
using dcp::SchemeKind;
using dcp::test::Random;
namespace exact = dcp::test::exact;
namespace plain = dcp::test::plain;

float product(double a, double b) { return static_cast<float>(a * b); }
float quotient(double a, double b) { return static_cast<float>(a / b); }
float sum(double a, double b) { return static_cast<float>(a + b); }

/// All of a tensor, as its format's formula says.
struct Whole {
  std::string name;
  Extents shape;
  std::vector<float> values;

  /// As memory of a dtype holds it.
  Bytes bytes_as(DType dtype) const {
    std::size_t const size = static_cast<std::size_t>(dcp::bits_of(dtype)) / 8;
    Bytes bytes(values.size() * size);
    for (std::size_t i = 0; i < values.size(); ++i) {
      double const wide = static_cast<double>(values[i]);
      auto const code = static_cast<std::uint16_t>(exact::code_of(dtype == DType::bf16 ? exact::bfloat : exact::half, wide));
      std::memcpy(bytes.data() + i * size, size == 8 ? static_cast<void const*>(&wide) : size == 4 ? static_cast<void const*>(&values[i]) : &code, size);
    }
    return bytes;
  }
};

bool is_nan(std::byte const* element, DType dtype) {
  if (dtype == DType::f64) {
    double value;
    std::memcpy(&value, element, 8);
    return value != value;
  }
  if (dtype == DType::f32) {
    float value;
    std::memcpy(&value, element, 4);
    return value != value;
  }
  std::uint16_t code;
  std::memcpy(&code, element, 2);
  return std::isnan(exact::value_of(dtype == DType::bf16 ? exact::bfloat : exact::half, code));
}

// ---- ranks

dcp::Layout any_layout_of(Random& random, Extents const& shape, std::int64_t ranks) {
  dcp::Layout layout;
  layout.shape = layout.split_shape = shape;
  std::vector<std::int64_t> extents = ranks == 4 && random.one_in(2) ? std::vector<std::int64_t>{2, 2} : std::vector<std::int64_t>{ranks};
  if (random.one_in(6)) extents.push_back(1);
  random.shuffle(extents);
  layout.mesh = dcp::test::mesh_of(extents);
  if (random.one_in(6)) layout.mesh = dcp::test::any_sub_mesh(random, layout.mesh);
  layout.rules = dcp::test::any_rules(random, layout.mesh.axes, shape.rank());
  if (random.one_in(6))
    for (int d = 0; d < shape.rank(); ++d) layout.split_shape[d] += random.between(0, 9);
  if (layout.mesh.axes > 0 && random.one_in(4)) dcp::test::make_flat(layout, static_cast<std::size_t>(random.between(0, layout.mesh.axes - 1)), [&](std::int64_t low, std::int64_t high) { return random.between(low, high); });
  return layout;
}

/// A rank's memory of a tensor: perhaps with holes between elements and behind rows.
class Held {
 public:
  Held(Extents const& shape, Bytes const& wanted, DType dtype, dcp::HeldPart const& part, std::int64_t step, std::int64_t pitch) : shape_{shape}, wanted_{wanted}, dtype_{dtype}, part_{part} {
    std::int64_t elements = step;
    if (part.flat) {
      strides_ = Extents{step};
      elements *= part.elements();
    } else {
      strides_ = Extents::filled(part.box.rank(), 0);
      for (int d = part.box.rank(); d-- > 0; elements *= part.box.shape[d]) {
        if (d == part.box.rank() - 2) elements += pitch;
        strides_[d] = elements;
      }
    }
    memory_.assign(static_cast<std::size_t>(std::max<std::int64_t>(1, elements)) * size(), untouched);
  }
  dcp::MemoryView memory() { return {memory_.data(), strides_}; }

  /// How many bytes are not what they should be. Spoils the memory.
  std::int64_t wrong() {
    Extents const global = dcp::row_major_strides(shape_);
    std::int64_t wrong = 0;
    auto const compare = [&](std::int64_t here, std::int64_t there, std::int64_t count) {
      std::byte* const mine = memory_.data() + static_cast<std::size_t>(here) * size();
      std::byte const* const theirs = wanted_.data() + static_cast<std::size_t>(there) * size();
      if (std::memcmp(mine, theirs, static_cast<std::size_t>(count) * size()) != 0)
        for (std::int64_t i = 0; i < count; ++i) {
          std::size_t const at = static_cast<std::size_t>(i) * size();
          wrong += std::memcmp(mine + at, theirs + at, size()) != 0 && !(is_nan(mine + at, dtype_) && is_nan(theirs + at, dtype_));
        }
      std::memset(mine, static_cast<int>(untouched), static_cast<std::size_t>(count) * size());
    };
    dcp::Box const& box = part_.box;
    if (part_.flat) {
      for (std::int64_t element = part_.begin; element < part_.end; ++element) {
        std::int64_t rest = element, at = 0;
        for (int d = box.rank(); d-- > 0; rest /= box.shape[d]) at += (box.origin[d] + rest % box.shape[d]) * global[d];
        compare((element - part_.begin) * strides_[0], at, 1);
      }
    } else if (!box.empty()) {
      int const last = box.rank() - 1;
      Extents rows = box.shape;
      std::int64_t const columns = last < 0 ? 1 : std::exchange(rows[last], 1);
      Extents index = Extents::filled(box.rank(), 0);
      do {
        std::int64_t const here = dcp::test::linear(index, strides_);
        std::int64_t there = 0;
        for (int d = 0; d < box.rank(); ++d) there += (index[d] + box.origin[d]) * global[d];
        if (last < 0 || strides_[last] == 1) compare(here, there, columns);
        else
          for (std::int64_t c = 0; c < columns; ++c) compare(here + c * strides_[last], there + c, 1);
      } while (dcp::test::next_index(index, rows));
    }
    return wrong + std::count_if(memory_.begin(), memory_.end(), [](std::byte byte) { return byte != untouched; });
  }

 private:
  static constexpr std::byte untouched{0xEE};
  std::size_t size() const { return static_cast<std::size_t>(dcp::bits_of(dtype_)) / 8; }

  Extents const& shape_;
  Bytes const& wanted_;
  DType dtype_;
  dcp::HeldPart part_;
  Extents strides_;
  Bytes memory_;
};

using Store = dcp::BasicSafeTensors<dcp::Memory>;

/// While it lives, this thread takes subnormal numbers for zero, if `on`.
class FlushToZero {
 public:
#if DCP_X86_KERNELS
  explicit FlushToZero(bool on) : before_{__builtin_ia32_stmxcsr()} { __builtin_ia32_ldmxcsr(before_ | (on ? 0x8040u : 0u)); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#else
  explicit FlushToZero(bool) {}
#endif
};

/// Loads all of `wholes` twice on 1 to 4 ranks in any layouts, into two of the four floats in turn. What was wrong; empty if nothing was.
std::string loaded_wrongly(Random& random, dcp::Memory const& store, dcp::AnyStorage const& storage, std::vector<Whole> const& wholes) {
  constexpr std::array dtypes{DType::f32, DType::bf16, DType::f16, DType::f64};
  auto const ranks = static_cast<int>(random.between(1, 4));
  struct Wanted {
    DType dtype;
    dcp::Layout layout;
    std::int64_t step, pitch;
  };
  constexpr std::size_t turns_each = 2;
  std::vector<std::array<Bytes, turns_each>> bytes;   // of each tensor, in each turn
  std::array<std::vector<Wanted>, turns_each> turns;
  auto const shift = static_cast<std::size_t>(random.between(0, 3));
  for (std::size_t w = 0; w < wholes.size(); ++w) {
    bytes.emplace_back();
    for (std::size_t turn = 0; turn < turns_each; ++turn) {
      DType const dtype = dtypes[(w + shift + turn) % dtypes.size()];
      bytes[w][turn] = wholes[w].bytes_as(dtype);
      turns[turn].push_back({dtype, any_layout_of(random, wholes[w].shape, ranks), random.one_in(5) ? random.between(2, 3) : 1, random.one_in(3) ? random.between(1, 5) : 0});
    }
  }
  bool const read_once = random.one_in(4), flushes = random.one_in(6);
  std::mutex mutex;
  std::string wrong;
  try {
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      FlushToZero const flush{flushes};   // and the threads that it starts
      for (std::size_t turn = 0; turn < turns_each; ++turn) {
        dcp::StateDict state;
        std::vector<std::pair<std::size_t, Held>> held;
        held.reserve(wholes.size());
        for (std::size_t w = 0; w < wholes.size(); ++w) {
          Wanted const& wanted = turns[turn][w];
          auto const part = dcp::held_by(wanted.layout, world.rank());
          if (!part) continue;
          auto& mine = held.emplace_back(w, Held{wholes[w].shape, bytes[w][turn], wanted.dtype, *part, wanted.step, wanted.pitch}).second;
          state.add_tensor(wholes[w].name, wanted.dtype, wanted.layout, mine.memory());
        }
        dcp::LoadSettings settings;
        settings.threads = 1;
        settings.read_once = read_once;
        settings.on_unexpected = dcp::OnUnexpected::ignore;   // a sub-mesh of no rank at all
        dcp::detail::load_state(dcp::CommRef{world}, storage, Store::locate({store, "ckpt"}), state, settings);
        for (auto& [w, mine] : held)
          if (auto const bad = mine.wrong(); bad != 0) {
            std::lock_guard const lock{mutex};
            wrong += wholes[w].name + " as " + std::string{to_string(turns[turn][w].dtype)} + " on rank " + std::to_string(world.rank()) + " of " + std::to_string(ranks) + ": " + std::to_string(bad) + " elements are wrong; ";
          }
      }
    });
  } catch (std::exception const& error) {
    wrong += error.what();
  }
  return wrong;
}

void put(dcp::Memory& store, std::string const& name, std::string const& text) { store.open_write("ckpt/" + name)->write_at(0, dcp::as_byte_span(text)); }

// ---- checkpoints

struct Checkpoint {
  std::map<std::string, plain::Tensor> tensors;
  std::vector<Whole> wholes;
  std::string config, config_file = "config.json";
  std::string how;                     // for people
  dcp::ExpectedScheme expected{};
  bool in_pieces = true;               // whether its tensors may be stored in pieces
};

struct Numbers {
  plain::Tensor tensor;
  std::vector<double> values;
};

/// Makes checkpoints of any scheme in any spelling.
class Maker {
 public:
  explicit Maker(Random& random) : random_{random} {}

  Checkpoint make(SchemeKind kind) {
    out_ = {};
    switch (kind) {
      case SchemeKind::fp8_block: fp8_block(); break;
      case SchemeKind::fp8_tensor: fp8_tensor(); break;
      case SchemeKind::fp8_channel: fp8_channel(); break;
      case SchemeKind::mxfp8: mxfp8(); break;
      case SchemeKind::mxfp4: mxfp4(); break;
      case SchemeKind::nvfp4: nvfp4(); break;
      case SchemeKind::int8_channel: int8_channel(); break;
      case SchemeKind::int8_group: int8_group(); break;
      case SchemeKind::int4_packed: int4_packed(); break;
      case SchemeKind::gptq: transposed(false); break;
      case SchemeKind::awq: transposed(true); break;
      default: nf4(); break;
    }
    return std::move(out_);
  }

 private:
  using Ints = std::vector<std::int64_t>;

  bool one_in(std::int64_t n) { return random_.one_in(n); }
  std::int64_t between(std::int64_t low, std::int64_t high) { return random_.between(low, high); }
  template <class T>
  T pick(std::initializer_list<T> list) { return random_.any_of(list); }
  std::int64_t count_of_tensors() { return one_in(3) ? between(2, 3) : 1; }
  std::string module(std::int64_t i) { return "model.layers." + std::to_string(i); }

  /// `least` to 3 dimensions, the last a multiple of `unit`; one in three with fewer rows than ranks.
  Ints any_shape(std::int64_t unit, int least = 2) {
    Ints shape;
    std::int64_t elements = one_in(20) ? 40'000 : 3000;
    for (auto rank = std::max<std::int64_t>(least, one_in(4) ? 3 : 2); rank > 1; --rank) shape.push_back(std::max<std::int64_t>(1, std::min(elements, pick<std::int64_t>({1, 1, 2, 3, 5, 7, 8, 13, 16, 33, 64, 130})))), elements /= shape.back();
    shape.push_back(unit * std::max<std::int64_t>(1, std::min(elements / unit, unit == 1 ? between(1, 200) : between(1, 9))));
    return shape;
  }
  static std::int64_t elements_of(Ints const& shape) {
    std::int64_t elements = 1;
    for (auto const size : shape) elements *= size;
    return elements;
  }
  static Ints with_last(Ints shape, std::int64_t size) {
    shape.back() = size;
    return shape;
  }
  static Ints without_last(Ints shape) {
    shape.pop_back();
    return shape;
  }

  std::string bytes(std::int64_t count) { return std::string{dcp::as_text(random_.bytes(static_cast<std::size_t>(count)))}; }
  plain::Tensor codes(std::string dtype, Ints const& shape, std::int64_t bytes_each) { return {std::move(dtype), shape, bytes(elements_of(shape) * bytes_each)}; }
  static std::uint32_t byte(plain::Tensor const& tensor, std::int64_t at) { return static_cast<unsigned char>(tensor.bytes[static_cast<std::size_t>(at)]); }
  static std::uint32_t word(plain::Tensor const& tensor, std::int64_t at) {
    std::uint32_t word;
    std::memcpy(&word, tensor.bytes.data() + 4 * at, 4);
    return word;
  }
  /// Bits [at, at + bits) of a tensor of words of 32 bits.
  static std::uint32_t bits(plain::Tensor const& tensor, std::int64_t at, int bits) {
    std::uint32_t value = 0;
    for (int b = 0; b < bits; ++b) value |= (word(tensor, (at + b) / 32) >> ((at + b) % 32) & 1u) << b;
    return value;
  }
  static std::int64_t signed_byte(std::uint32_t byte) { return byte < 128 ? byte : static_cast<std::int64_t>(byte) - 256; }
  static double e2m1(std::uint32_t byte, std::int64_t column) { return exact::value_of(exact::e2m1, column % 2 == 0 ? byte & 15u : byte >> 4); }

  /// Positive numbers, of many sizes.
  Numbers numbers(std::string const& dtype, Ints const& shape, bool zeros = false) {
    Numbers made{{dtype, shape, {}}, {}};
    for (std::int64_t n = elements_of(shape); n > 0; --n) {
      std::uint32_t code = 0;
      double value = 0;
      std::size_t size = 1;
      bool const zero = zeros && one_in(9);
      if (dtype == "F32") {
        float const x = zero ? 0.0f : static_cast<float>(std::ldexp(static_cast<double>(between(1 << 23, (1 << 24) - 1)), static_cast<int>(one_in(40) ? between(-165, -150) : between(-50, -12))));
        std::memcpy(&code, &x, 4), value = static_cast<double>(x), size = 4;
      } else if (dtype == "BF16") {
        code = zero ? 0 : static_cast<std::uint32_t>(between(0x3000, 0x4480)), value = exact::value_of(exact::bfloat, code), size = 2;
      } else if (dtype == "F16") {
        code = zero ? 0 : static_cast<std::uint32_t>(between(1, 0x5800)), value = exact::value_of(exact::half, code), size = 2;
      } else if (dtype == "F8_E4M3") {
        code = zero ? 0 : static_cast<std::uint32_t>(between(1, 0x7E)), value = exact::value_of(exact::e4m3, code);
      } else {   // powers of two
        code = static_cast<std::uint32_t>(one_in(8) ? between(0, 254) : between(100, 140)), value = exact::e8m0(code);
      }
      made.tensor.bytes.append(reinterpret_cast<char const*>(&code), size);
      made.values.push_back(value);
    }
    return made;
  }
  std::string any_float() { return pick<std::string>({"F32", "F32", "BF16", "F16"}); }

  /// value(row, column), where the row counts all dimensions but the last.
  void whole(std::string name, Ints const& shape, std::function<float(std::int64_t, std::int64_t)> const& value) {
    Whole made{std::move(name), Extents{shape}, {}};
    std::int64_t const columns = shape.empty() ? 1 : shape.back(), elements = elements_of(shape);
    for (std::int64_t i = 0; i < elements; ++i) made.values.push_back(value(i / columns, i % columns));
    out_.wholes.push_back(std::move(made));
  }
  static double at(Numbers const& numbers, std::int64_t i) { return numbers.values[static_cast<std::size_t>(i)]; }

  void add(std::string const& name, plain::Tensor tensor) { out_.tensors[name] = std::move(tensor); }
  void how(std::string const& what) { out_.how += (out_.how.empty() ? "" : "; ") + what; }
  static std::string text(Ints const& list) {
    std::string text;
    for (auto const number : list) text += (text.empty() ? "" : ",") + std::to_string(number);
    return '[' + text + ']';
  }
  void compressed(std::string const& format, int bits, std::string const& type, std::string const& strategy, std::int64_t group, Ints const& block = {}, bool act_order = false, bool symmetric = true) {
    out_.config = R"({"quant_method":"compressed-tensors","format":")" + format + R"(","config_groups":{"group_0":{"targets":["Linear"],"weights":{"num_bits":)" + std::to_string(bits) + R"(,"type":")" + type + R"(","symmetric":)" +
                  (symmetric ? "true" : "false") + R"(,"strategy":")" + strategy + R"(","group_size":)" + (group == 0 ? "null" : std::to_string(group)) + R"(,"block_structure":)" + (block.empty() ? "null" : text(block)) + R"(,"dynamic":false,"actorder":)" +
                  (act_order ? R"("group")" : "null") + R"(}}},"ignore":["lm_head"]})";
  }

  /// Codes of one float each.
  struct FloatCodes {
    std::string dtype;
    exact::Format format;
    std::int64_t size;
  };
  FloatCodes any_float_codes(bool wide) {
    if (wide && one_in(6)) return one_in(2) ? FloatCodes{"BF16", exact::bfloat, 2} : FloatCodes{"F16", exact::half, 2};
    return pick<FloatCodes>({{"F8_E4M3", exact::e4m3, 1}, {"F8_E4M3", exact::e4m3, 1}, {"F8_E5M2", exact::e5m2, 1}, {"F8_E4M3FNUZ", exact::e4m3fnuz, 1}, {"F8_E5M2FNUZ", exact::e5m2fnuz, 1}});
  }
  static double float_at(FloatCodes const& form, plain::Tensor const& codes, std::int64_t i) {
    std::uint32_t const code = form.size == 1 ? byte(codes, i) : byte(codes, 2 * i) | byte(codes, 2 * i + 1) << 8;
    return exact::value_of(form.format, code);
  }

  void fp8_block() {
    auto const spelling = pick<int>({0, 0, 1, 2, 3, 4, 5});
    Ints block = spelling == 0 ? Ints{128, 128} : Ints{pick<std::int64_t>({1, 2, 3, 4, 8, 16, 128}), pick<std::int64_t>({1, 2, 3, 5, 8, 16, 64, 128})};
    if (spelling == 5) block[0] = 1;
    bool const e8m0 = spelling == 3;
    if (spelling == 4) compressed("float-quantized", 8, "float", "block", 0, block);
    else if (spelling == 5) compressed("float-quantized", 8, "float", "group", block[1]);
    else if (spelling != 0) out_.config = R"({"quant_method":"fp8","fmt":"e4m3","activation_scheme":"dynamic","weight_block_size":)" + text(block) + (e8m0 ? R"(,"scale_fmt":"ue8m0"})" : "}");
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints const shape = any_shape(1);
      std::size_t const r = shape.size() - 2;
      Ints grid = shape;
      grid[r] = ceil_div(shape[r], block[0]), grid[r + 1] = ceil_div(shape[r + 1], block[1]);
      bool const inverse = spelling < 3;
      FloatCodes const form = any_float_codes(inverse);
      std::string const name = module(i) + (spelling == 2 ? ".gate_up_proj" : ".weight"), scale_name = spelling == 2 ? name + "_scales_inv" : spelling == 3 ? module(i) + ".scale" : spelling > 3 ? name + "_scale" : name + "_scale_inv";
      auto const data = codes(form.dtype, shape, form.size);
      auto const scales = numbers(e8m0 ? "F8_E8M0" : any_float(), grid);
      add(name, data), add(scale_name, scales.tensor);
      whole(name, shape, [&](std::int64_t row, std::int64_t column) {
        std::int64_t const plane = row / shape[r], inside = row % shape[r];
        return product(float_at(form, data, row * shape[r + 1] + column), at(scales, (plane * grid[r] + inside / block[0]) * grid[r + 1] + column / block[1]));
      });
      how("fp8_block " + text(block) + " spelling " + std::to_string(spelling) + ' ' + form.dtype + ' ' + text(shape));
    }
  }
  void fp8_tensor() {
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints const shape = one_in(6) ? Ints{} : one_in(6) ? Ints{between(1, 300)} : any_shape(1);
      auto const suffix = pick<std::string>({"_scale", "_scale_inv", "_scales_inv"});
      FloatCodes const form = any_float_codes(suffix != "_scale");
      std::string const name = module(i) + ".weight";
      auto const data = codes(form.dtype, shape, form.size);
      auto const scale = numbers(one_in(6) ? "F8_E8M0" : any_float(), one_in(2) ? Ints{} : Ints{1});
      add(name, data), add(name + suffix, scale.tensor);
      whole(name, shape, [&](std::int64_t row, std::int64_t column) { return product(float_at(form, data, row * (shape.empty() ? 1 : shape.back()) + column), at(scale, 0)); });
      how("fp8_tensor " + suffix + ' ' + form.dtype + ' ' + text(shape));
    }
  }
  void fp8_channel() {
    if (one_in(2)) compressed("float-quantized", 8, "float", "channel", 0);
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints const shape = any_shape(1);
      FloatCodes const form = any_float_codes(false);
      std::string const name = module(i) + ".weight";
      auto const data = codes(form.dtype, shape, 1);
      auto const scales = numbers(any_float(), one_in(2) ? with_last(shape, 1) : without_last(shape));
      add(name, data), add(name + "_scale", scales.tensor);
      whole(name, shape, [&](std::int64_t row, std::int64_t column) { return product(float_at(form, data, row * shape.back() + column), at(scales, row)); });
      how("fp8_channel " + form.dtype + ' ' + text(shape) + " scales " + text(scales.tensor.shape));
    }
  }
  void mxfp8() {
    if (one_in(2)) compressed("mxfp8-quantized", 8, "float", "group", 32);
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints const shape = any_shape(32);
      FloatCodes const form = one_in(2) ? FloatCodes{"F8_E4M3", exact::e4m3, 1} : FloatCodes{"F8_E5M2", exact::e5m2, 1};
      std::string const name = module(i) + ".weight";
      auto const data = codes(form.dtype, shape, 1);
      auto const scales = numbers(one_in(2) ? "U8" : "F8_E8M0", with_last(shape, shape.back() / 32));
      add(name, data), add(name + "_scale", scales.tensor);
      whole(name, shape, [&](std::int64_t row, std::int64_t column) { return product(float_at(form, data, row * shape.back() + column), at(scales, row * (shape.back() / 32) + column / 32)); });
      how("mxfp8 " + form.dtype + ' ' + text(shape));
    }
  }
  void mxfp4() {
    int const spelling = pick<int>({0, 1, 2, 3, 4, 5});
    if (spelling < 2 && one_in(2)) out_.config = R"({"quant_method":"mxfp4","modules_to_not_convert":["lm_head"]})";
    if (spelling == 2 && one_in(2)) compressed("mxfp4-pack-quantized", 4, "float", "group", 32);
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints const shape = any_shape(32, spelling < 2 && one_in(5) ? 1 : 2);
      std::string const scale_type = spelling > 3 || one_in(2) ? "F8_E8M0" : "U8";
      auto const scales = numbers(scale_type, with_last(shape, shape.back() / 32));
      std::string name = module(i) + ".weight";
      plain::Tensor data;
      if (spelling < 2) {   // gpt-oss
        name = module(i) + ".down_proj";
        Ints stored = with_last(shape, shape.back() / 32);
        stored.push_back(16);
        data = codes("U8", stored, 1);
        add(name + (spelling == 0 ? "_blocks" : ".blocks"), data), add(name + (spelling == 0 ? "_scales" : ".scales"), scales.tensor);
      } else {
        data = codes(spelling == 4 ? "I8" : "U8", with_last(shape, shape.back() / 2), 1);
        if (spelling == 5) data.dtype = "F4", data.shape = shape;
        add(spelling == 2 ? name + "_packed" : name, data), add(spelling == 4 ? module(i) + ".scale" : name + "_scale", scales.tensor);
      }
      whole(name, shape, [&](std::int64_t row, std::int64_t column) { return product(e2m1(byte(data, (row * shape.back() + column) / 2), column), at(scales, row * (shape.back() / 32) + column / 32)); });
      how("mxfp4 spelling " + std::to_string(spelling) + ' ' + scale_type + ' ' + text(shape));
    }
  }
  void nvfp4() {
    int const spelling = pick<int>({0, 1, 2});
    if (one_in(2)) {
      if (spelling == 0) compressed("nvfp4-pack-quantized", 4, "float", "tensor_group", 16);
      else out_.config = R"({"quant_method":"modelopt","quant_algo":"NVFP4","group_size":16,"ignore":["lm_head"]})";
    }
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints const shape = any_shape(16);
      std::string const name = module(i) + ".weight";
      auto data = codes("U8", with_last(shape, shape.back() / 2), 1);
      if (spelling == 2 || (spelling == 0 && one_in(3))) data.dtype = "F4", data.shape = shape;
      auto const scales = numbers("F8_E4M3", with_last(shape, shape.back() / 16), true);
      auto const second = numbers(any_float(), one_in(2) ? Ints{} : Ints{1});
      add(spelling == 0 ? name + "_packed" : name, data), add(name + "_scale", scales.tensor), add(name + (spelling == 0 ? "_global_scale" : "_scale_2"), second.tensor);
      whole(name, shape, [&](std::int64_t row, std::int64_t column) {
        float const scaled = product(e2m1(byte(data, (row * shape.back() + column) / 2), column), at(scales, row * (shape.back() / 16) + column / 16));
        return spelling == 0 ? quotient(static_cast<double>(scaled), at(second, 0)) : product(static_cast<double>(scaled), at(second, 0));
      });
      how("nvfp4 spelling " + std::to_string(spelling) + ' ' + data.dtype + ' ' + text(shape));
    }
  }
  void int8_channel() {
    int const spelling = pick<int>({0, 1, 2});
    if (spelling == 0 && one_in(2)) compressed("int-quantized", 8, "int", "channel", 0);
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints shape = any_shape(1);
      if (spelling == 2 && shape.size() > 2) shape.erase(shape.begin());
      std::string const name = module(i) + ".weight";
      auto const data = codes("I8", shape, 1);
      if (spelling == 2) {   // bitsandbytes
        auto const scales = numbers("F32", without_last(shape), true);
        add(name, data), add(module(i) + ".SCB", scales.tensor);
        if (one_in(2)) add(module(i) + ".weight_format", {"U8", {}, std::string(1, '\0')});
        whole(name, shape, [&](std::int64_t row, std::int64_t column) { return quotient(static_cast<double>(product(static_cast<double>(signed_byte(byte(data, row * shape.back() + column))), at(scales, row))), 127); });
        how("int8 of bitsandbytes " + text(shape));
        continue;
      }
      bool const single = one_in(5);
      auto const scales = numbers(any_float(), single ? (one_in(2) ? Ints{} : Ints{1}) : one_in(2) ? with_last(shape, 1) : without_last(shape));
      bool const zeros = one_in(3);
      auto const zero = codes("I8", scales.tensor.shape, 1);
      add(name, data), add(spelling == 1 ? module(i) + ".scale" : name + "_scale", scales.tensor);
      if (zeros) add(name + "_zero_point", zero);
      whole(name, shape, [&](std::int64_t row, std::int64_t column) {
        std::int64_t const z = zeros ? signed_byte(byte(zero, single ? 0 : row)) : 0;
        return product(static_cast<double>(signed_byte(byte(data, row * shape.back() + column)) - z), at(scales, single ? 0 : row));
      });
      how("int8_channel " + text(shape) + " scales " + text(scales.tensor.shape) + (zeros ? " and zeros" : ""));
    }
  }
  /// Columns of a group, and groups; as a reader without configuration finds them if `guessed`.
  std::pair<std::int64_t, std::int64_t> groups(std::int64_t columns, bool guessed) {
    for (;;) {
      std::int64_t const each = pick<std::int64_t>({1, 2, 3, 7, 8, 16, 32, 50, 128}), count = ceil_div(columns, each);
      if (!guessed || ceil_div(columns, count) == each || count == 1) return {each, count};
    }
  }
  void int8_group() {
    bool const said = one_in(2);
    std::int64_t const group = pick<std::int64_t>({1, 2, 3, 8, 16, 50});
    if (said) compressed("int-quantized", 8, "int", "group", group);
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints shape = any_shape(1);
      auto const [each, count] = said ? std::pair{group, ceil_div(shape.back(), group)} : groups(shape.back(), true);
      std::string const name = module(i) + ".weight";
      auto const data = codes("I8", shape, 1);
      auto const scales = numbers(any_float(), with_last(shape, count));
      bool const zeros = one_in(3);
      auto const zero = codes("I8", scales.tensor.shape, 1);
      add(name, data), add(name + "_scale", scales.tensor);
      if (zeros) add(name + "_zero_point", zero);
      whole(name, shape, [&, each = each, count = count](std::int64_t row, std::int64_t column) {
        std::int64_t const g = row * count + column / each;
        return product(static_cast<double>(signed_byte(byte(data, row * shape.back() + column)) - (zeros ? signed_byte(byte(zero, g)) : 0)), at(scales, g));
      });
      how("int8_group " + std::to_string(each) + ' ' + text(shape) + (zeros ? " and zeros" : ""));
    }
  }
  void int4_packed() {
    bool const said = !one_in(4);
    int const bits_each = said ? static_cast<int>(between(1, 8)) : 4;
    bool const channel = one_in(4), act_order = said && !channel && one_in(3);
    std::int64_t const group = pick<std::int64_t>({1, 2, 3, 8, 16, 32, 50, 128}), per = 32 / bits_each;
    if (said) compressed("pack-quantized", bits_each, "int", channel ? "channel" : "group", channel ? 0 : group, {}, act_order, one_in(2));
    for (auto i = count_of_tensors(); i > 0; --i) {
      Ints shape = any_shape(1);
      // Where words can hold the codes in two ways, nobody could tell which.
      std::int64_t dense = 0, low = 0;
      for (;; ++shape.back()) {
        dense = ceil_div(shape.back() * bits_each, std::int64_t{32}), low = ceil_div(shape.back(), per);
        if (32 % bits_each == 0 || dense != low) break;
      }
      bool const is_low = one_in(2);
      auto const [each, count] = channel ? std::pair{shape.back(), std::int64_t{1}} : said ? std::pair{group, ceil_div(shape.back(), group)} : groups(shape.back(), true);
      std::string const name = module(i) + ".weight";
      auto const data = codes("I32", with_last(shape, is_low ? low : dense), 4);
      auto const scales = numbers(any_float(), with_last(shape, count));
      add(name + "_packed", data), add(name + "_scale", scales.tensor);
      if (one_in(2)) add(name + "_shape", plain::tensor_of("I64", {static_cast<std::int64_t>(shape.size())}, shape));
      else add(name + "_shape", plain::tensor_of("I32", {static_cast<std::int64_t>(shape.size())}, std::vector<std::int32_t>(shape.begin(), shape.end())));
      std::vector<std::int32_t> index;
      for (std::int64_t c = 0; c < shape.back(); ++c) index.push_back(static_cast<std::int32_t>(act_order ? between(0, count - 1) : c / each));
      if (act_order || (!channel && one_in(4))) add(name + "_g_idx", plain::tensor_of("I32", {shape.back()}, index));
      std::size_t const r = shape.size() - 2;
      bool const zeros = 32 % bits_each == 0 && one_in(3);
      Ints zero_shape = with_last(shape, count);
      zero_shape[r] = ceil_div(shape[r], per);
      auto const zero = codes("I32", zero_shape, 4);
      if (zeros) add(name + "_zero_point", zero);
      whole(name, shape, [&, count = count](std::int64_t row, std::int64_t column) {
        std::int64_t const g = index[static_cast<std::size_t>(column)], plane = row / shape[r], inside = row % shape[r], words = is_low ? low : dense;
        std::int64_t const bit = is_low ? column / per * 32 + column % per * bits_each : column * bits_each;
        double const u = bits(data, row * words * 32 + bit, bits_each);
        double const z = zeros ? static_cast<double>(word(zero, (plane * zero_shape[r] + inside / per) * count + g) >> (inside % per * bits_each) & ((1u << bits_each) - 1)) : static_cast<double>(1 << (bits_each - 1));
        return product(u - z, at(scales, row * count + g));
      });
      how("int" + std::to_string(bits_each) + "_packed group " + std::to_string(each) + ' ' + text(shape) + (is_low ? " whole codes in words" : "") + (zeros ? " zeros" : "") + (act_order ? " act-order" : ""));
    }
  }
  void transposed(bool awq) {
    bool const said = !one_in(4);
    int const bits_each = awq || !said ? 4 : pick<int>({2, 4, 4, 8});
    std::int64_t const per = 32 / bits_each, group = pick<std::int64_t>({per, 2 * per, 3 * per, 32, 128, -1});
    bool const act_order = said && !awq && one_in(3), v2 = said && !awq && one_in(3), indexed = !awq && (act_order || one_in(2));
    if (said) {
      std::string const method = awq ? R"("quant_method":"awq","version":"gemm","zero_point":true)" : std::string{R"("quant_method":"gptq","sym":false,"desc_act":)"} + (act_order ? "true" : "false") + (v2 ? R"(,"checkpoint_format":"gptq_v2")" : "");
      out_.config = '{' + method + R"(,"bits":)" + std::to_string(bits_each) + R"(,"group_size":)" + std::to_string(group) + '}';
      if (one_in(3)) out_.config_file = "quantize_config.json";
    } else {
      out_.expected = {awq ? SchemeKind::awq : SchemeKind::gptq, {0, 0}};
    }
    for (auto i = count_of_tensors(); i > 0; --i) {
      std::int64_t const outputs = per * between(1, 9);
      std::int64_t inputs = per * between(1, 12);
      if (awq && group > 0) inputs = group * between(1, 3);
      if (!said && group > 0) inputs = group * between(1, 4);   // where nothing says the group, it divides
      std::int64_t const each = group < 0 ? inputs : group, count = ceil_div(inputs, each);
      auto const data = awq ? codes("I32", {inputs, outputs / 8}, 4) : codes("I32", {inputs / per, outputs}, 4);
      auto const zero = codes("I32", {count, outputs / per}, 4);
      auto const scales = numbers(any_float(), {count, outputs}, true);
      std::vector<std::int32_t> index;
      for (std::int64_t k = 0; k < inputs; ++k) index.push_back(static_cast<std::int32_t>(act_order ? between(0, count - 1) : k / each));
      if (!said && indexed && each != inputs / count) continue;
      add(module(i) + ".qweight", data), add(module(i) + ".qzeros", zero), add(module(i) + ".scales", scales.tensor);
      if (indexed) add(module(i) + ".g_idx", plain::tensor_of("I32", {inputs}, index));
      std::uint32_t const mask = (1u << bits_each) - 1;
      whole(module(i) + ".weight", {outputs, inputs}, [&](std::int64_t n, std::int64_t k) {
        constexpr std::array<int, 8> places{0, 4, 1, 5, 2, 6, 3, 7};   // of the outputs of a word, in nibbles
        std::int64_t const g = index[static_cast<std::size_t>(k)];
        int const nibble = awq ? 4 * places[static_cast<std::size_t>(n % 8)] : static_cast<int>(n % per) * bits_each;
        std::uint32_t const q = awq ? word(data, k * (outputs / 8) + n / 8) >> nibble & 15u : word(data, k / per * outputs + n) >> (k % per * bits_each) & mask;
        std::uint32_t const stored = word(zero, g * (outputs / per) + n / per) >> nibble & mask, z = awq || v2 ? stored : (stored + 1) & mask;
        return product(static_cast<double>(q) - static_cast<double>(z), at(scales, g * outputs + n));
      });
      how((awq ? "awq" : "gptq ") + std::to_string(bits_each) + " group " + std::to_string(group) + " [" + std::to_string(outputs) + ',' + std::to_string(inputs) + ']' + (indexed ? " g_idx" : "") + (act_order ? " act-order" : "") + (v2 ? " v2" : ""));
    }
  }
  void nf4() {
    out_.in_pieces = false;
    if (one_in(2)) out_.config = R"({"quant_method":"bitsandbytes","load_in_4bit":true,"load_in_8bit":false,"bnb_4bit_quant_type":"nf4"})";
    for (auto i = count_of_tensors(); i > 0; --i) {
      std::int64_t const block = pick<std::int64_t>({32, 32, 64, 64, 128, 4096});
      Ints const shape = one_in(8) ? Ints{} : one_in(5) ? Ints{between(1, 300)} : any_shape(one_in(2) ? block : 1);
      std::int64_t const elements = elements_of(shape), size = ceil_div(elements, std::int64_t{2}), blocks = ceil_div(elements, block), outer = pick<std::int64_t>({1, 2, 3, 16, 256});
      bool const nested = one_in(2);
      std::string const name = module(i) + ".weight", type = pick<std::string>({"nf4", "fp4"});
      std::string const data = bytes(size);
      bool const wide = size % 2 == 0 && one_in(3);
      add(name, {wide ? "BF16" : "U8", {wide ? size / 2 : size, 1}, data});
      Numbers table = numbers("F32", {16});
      for (std::size_t c = 0; c < 8; ++c) table.values[c] = -table.values[c], table.tensor.bytes[4 * c + 3] = static_cast<char>(table.tensor.bytes[4 * c + 3] | '\x80');
      add(name + ".quant_map", table.tensor);
      auto const scales = numbers("F32", {blocks}, true), outer_scales = numbers("F32", {ceil_div(blocks, outer)}), outer_table = numbers("F32", {256});
      auto const outer_codes = codes("U8", {blocks}, 1);
      double const offset = static_cast<double>(between(-1000, 1000)) / 37'000;
      std::string state = R"({"quant_type":")" + type + R"(","blocksize":)" + std::to_string(block) + R"(,"dtype":"bfloat16","shape":)" + text(shape);
      if (nested) {
        add(name + ".absmax", outer_codes), add(name + ".nested_absmax", outer_scales.tensor), add(name + ".nested_quant_map", outer_table.tensor);
        state += R"(,"nested_blocksize":)" + std::to_string(outer) + R"(,"nested_dtype":"float32","nested_offset":)" + nlohmann::json(offset).dump();
      } else {
        add(name + ".absmax", scales.tensor);
      }
      state += '}';
      add(name + ".quant_state.bitsandbytes__" + type, {"U8", {static_cast<std::int64_t>(state.size())}, state});
      whole(name, shape, [&](std::int64_t row, std::int64_t column) {
        std::int64_t const e = row * (shape.empty() ? 1 : shape.back()) + column, b = e / block;
        std::uint32_t const pair = static_cast<unsigned char>(data[static_cast<std::size_t>(e / 2)]), code = e % 2 == 0 ? pair >> 4 : pair & 15u;
        float const scale = nested ? sum(static_cast<double>(product(at(outer_table, byte(outer_codes, b)), at(outer_scales, b / outer))), static_cast<double>(static_cast<float>(offset))) : static_cast<float>(at(scales, b));
        return product(at(table, code), static_cast<double>(scale));
      });
      how(type + " block " + std::to_string(block) + ' ' + text(shape) + (nested ? " nested " + std::to_string(outer) : "") + (wide ? " as BF16" : ""));
    }
  }

  Random& random_;
  Checkpoint out_;
};

// ---- files

/// The elements [begin, end) of dimension `dim`. Elements smaller than a byte: cut on bytes.
plain::Tensor piece_of(plain::Tensor const& tensor, std::size_t dim, std::int64_t begin, std::int64_t end) {
  plain::Tensor piece{tensor.dtype, tensor.shape, {}};
  piece.shape[dim] = end - begin;
  std::int64_t outer = 1, inner = 1;
  for (std::size_t d = 0; d < tensor.shape.size(); ++d) (d < dim ? outer : inner) *= tensor.shape[d];
  std::int64_t const bytes = static_cast<std::int64_t>(tensor.bytes.size()) / outer, each = inner / tensor.shape[dim];   // of a slab; elements of one of its parts
  for (std::int64_t o = 0; o < outer; ++o) {
    std::int64_t const from = begin * each * bytes / inner, to = end * each * bytes / inner;
    piece.bytes += tensor.bytes.substr(static_cast<std::size_t>(o * bytes + from), static_cast<std::size_t>(to - from));
  }
  return piece;
}

dcp::Memory stored(Random& random, Checkpoint const& checkpoint) {
  dcp::Memory store;
  store.create_directories("ckpt");
  if (!checkpoint.config.empty()) put(store, checkpoint.config_file, checkpoint.config_file == "config.json" ? R"({"model_type":"test","quantization_config":)" + checkpoint.config + '}' : checkpoint.config);
  auto const files = random.between(0, 3);
  if (files <= 1) {
    put(store, "model.safetensors", plain::bytes_of({checkpoint.tensors, {}}));
  } else if (files == 2 || !checkpoint.in_pieces) {   // parts of a tensor in different files
    std::array<plain::File, 2> parts;
    nlohmann::json map = nlohmann::json::object();
    std::array<std::string, 2> const names{"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"};
    for (auto const& [name, tensor] : checkpoint.tensors) {
      std::size_t const f = map.empty() ? 0 : map.size() == 1 ? 1 : static_cast<std::size_t>(random.between(0, 1));
      parts[f].tensors[name] = tensor;
      map[name] = names[f];
    }
    for (std::size_t f = 0; f < 2; ++f) put(store, names[f], plain::bytes_of(parts[f]));
    put(store, "model.safetensors.index.json", nlohmann::json{{"metadata", nlohmann::json::object()}, {"weight_map", map}}.dump());
  } else {   // cut along any dimension, as PyTorch's sharded writer does it
    std::array<plain::File, 3> parts;
    std::array<nlohmann::json, 3> info{nlohmann::json::object(), nlohmann::json::object(), nlohmann::json::object()};
    for (auto const& [name, tensor] : checkpoint.tensors) {
      std::vector<std::int64_t> offsets(tensor.shape.size(), 0);
      bool const cut = !tensor.shape.empty() && !name.ends_with("_shape") && !random.one_in(4);
      auto const dim = tensor.shape.empty() ? std::size_t{0} : static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(tensor.shape.size()) - 1));
      std::int64_t begin = 0;
      for (std::size_t f = 0; f < 3; ++f) {
        std::int64_t const size = cut ? tensor.shape[dim] : 0;
        std::int64_t end = f == 2 ? size : random.between(begin, size);
        if (tensor.dtype == "F4" && dim + 1 == tensor.shape.size()) end += end % 2;
        if (!cut && f > 0) break;
        if (cut && end == begin && (f < 2 || begin > 0)) continue;
        parts[f].tensors[name] = cut ? piece_of(tensor, dim, begin, end) : tensor;
        if (cut) offsets[dim] = begin;
        info[f][name] = {{"saved_offsets", offsets}};
        begin = end;
      }
    }
    for (std::size_t f = 0; f < 3; ++f) {
      parts[f].metadata = {{"DCP_SHARDING_INFO", info[f].dump()}, {"DCP_VERSION", "1.0"}};
      put(store, "shard-0000" + std::to_string(f + 1) + "-model-00001-of-00001.safetensors", plain::bytes_of(parts[f]));
    }
  }
  return store;
}

}  // namespace

TEST_CASE("Quantized, law: of checkpoints in all schemes and spellings, every rank of any layout gets its part of the whole, bit for bit, in all four floats") {
  std::uint64_t const first = dcp::test::first_seed();
  constexpr int schemes = 12;
  std::set<std::string> kinds;
  int checkpoints = 0;
  for (int round = 0; round < dcp::test::rounds(2040, 60'000); ++round) {
    std::uint64_t const seed = first + static_cast<std::uint64_t>(round);
    Random random{seed};
    auto const kind = static_cast<SchemeKind>(1 + seed % schemes);
    kinds.insert(std::string{to_string(kind)});
    Checkpoint const checkpoint = Maker{random}.make(kind);
    if (checkpoint.wholes.empty()) continue;
    dcp::Memory const store = stored(random, checkpoint);
    dcp::detail::QuantizedDriver<> const storage{Store::open({}), {checkpoint.expected, {}, 128}};
    std::string const wrong = loaded_wrongly(random, store, storage, checkpoint.wholes);
    ++checkpoints;
    CAPTURE(seed);
    CAPTURE(checkpoint.how);
    CAPTURE(checkpoint.config);
    CHECK(wrong == "");
    if (!wrong.empty()) break;
  }
  CHECK(kinds.size() == schemes);
  if (!dcp::test::under_a_sanitizer) CHECK(checkpoints >= 2000);
}

namespace {

template <class T>
void append_number(std::string& out, T number) { out.append(reinterpret_cast<char const*>(&number), sizeof number); }
void append_text(std::string& out, std::string const& text) {
  append_number(out, std::uint64_t{text.size()});
  out += text;
}

struct GgufTensor {
  std::string name;
  std::uint32_t type;
  std::vector<std::int64_t> shape;   // rows first
  std::string bytes;
};

/// A file of version 3.
std::string gguf_file(std::vector<GgufTensor> const& tensors) {
  std::string header = "GGUF", data;
  append_number(header, std::uint32_t{3});
  append_number(header, std::uint64_t{tensors.size()});
  append_number(header, std::uint64_t{1});
  append_text(header, "general.architecture");
  append_number(header, std::uint32_t{8});
  append_text(header, "test");
  for (auto const& tensor : tensors) {
    append_text(header, tensor.name);
    append_number(header, static_cast<std::uint32_t>(tensor.shape.size()));
    for (std::size_t d = tensor.shape.size(); d-- > 0;) append_number(header, static_cast<std::uint64_t>(tensor.shape[d]));
    append_number(header, tensor.type);
    append_number(header, std::uint64_t{data.size()});
    data += tensor.bytes;
    data.resize((data.size() + 31) / 32 * 32);
  }
  header.resize((header.size() + 31) / 32 * 32);
  return header + data;
}

}  // namespace

TEST_CASE("Gguf, law: of tensors in all block types that can be decoded, every rank of any layout gets its part of the whole, bit for bit, in all four floats") {
  std::uint64_t const first = dcp::test::first_seed();
  std::vector<std::uint32_t> types;
  for (std::uint32_t type = 0; type < 50; ++type)
    if (dcp::gguf::can_decode(type)) types.push_back(type);
  CHECK(types.size() == 18);
  for (int round = 0; round < dcp::test::rounds(400, 10'000); ++round) {
    std::uint64_t const seed = first + static_cast<std::uint64_t>(round);
    Random random{seed};
    std::vector<GgufTensor> tensors;
    std::vector<Whole> wholes;
    std::string how;
    for (auto count = random.between(1, 3); count > 0; --count) {
      std::uint32_t const type = types[(seed + static_cast<std::uint64_t>(count) * 5) % types.size()];
      dcp::gguf::TypeFacts const facts = *dcp::gguf::type_facts(type);
      GgufTensor tensor{"blk." + std::to_string(count) + ".weight", type, {}, {}};
      for (auto rank = random.between(0, 3); rank > 0; --rank) tensor.shape.push_back(random.any_of(std::array<std::int64_t, 7>{1, 1, 2, 3, 4, 5, 7}));
      tensor.shape.push_back(facts.elements * random.between(1, facts.elements == 256 ? 2 : 5));
      Whole whole{tensor.name, Extents{tensor.shape}, {}};
      std::int64_t const blocks = whole.shape.elements() / facts.elements;
      Bytes bytes = random.bytes(static_cast<std::size_t>(blocks * facts.bytes));
      for (std::int64_t b = 0; b < blocks; ++b) {
        std::byte* const block = bytes.data() + b * facts.bytes;
        if (type == dcp::gguf::types::mxfp4 && *block == std::byte{255}) *block = std::byte{127};
        dcp::test::GgufOracle const oracle{type, block};
        for (int i = 0; i < facts.elements; ++i) whole.values.push_back(oracle(i));
      }
      tensor.bytes = dcp::as_text(bytes);
      how += std::string{facts.name} + ' ' + to_string(whole.shape) + "; ";
      tensors.push_back(std::move(tensor));
      wholes.push_back(std::move(whole));
    }
    dcp::Memory store;
    store.create_directories("ckpt");
    put(store, "model.gguf", gguf_file(tensors));
    std::string const wrong = loaded_wrongly(random, store, dcp::detail::GgufDriver<>{{}}, wholes);
    CAPTURE(seed);
    CAPTURE(how);
    CHECK(wrong == "");
    if (!wrong.empty()) break;
  }
}
