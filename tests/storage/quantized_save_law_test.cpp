// SPDX-License-Identifier: Apache-2.0
// The laws of saves that quantize: what is written does not depend on ranks and placements, is what the scheme's specification says, and comes
// back as near as its comment promises.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/owned_state.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/gguf.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>

#include <doctest/doctest.h>

#include "support/campaign.hpp"
#include "support/generate.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

using dcp::DType, dcp::Extents, dcp::SchemeKind;
using dcp::test::Random;
using Plain = dcp::BasicSafeTensors<dcp::Memory>;
using GgufInMemory = dcp::BasicGguf<dcp::Memory>;
using Opened = std::unique_ptr<dcp::AnyStorage>;

// ---- what is written: every scheme that can be

struct Target {
  char const* label;
  SchemeKind kind;                              // any: GGUF
  std::array<std::int64_t, 2> block{1, 1};      // rows and columns of a group; 0: all
  Opened (*open)(dcp::QuantizedOptions<Plain> const&) = nullptr;
  std::uint32_t type = 0;                       // of GGUF
};
template <class Scheme>
Opened open_as(dcp::QuantizedOptions<Plain> const& options) { return dcp::Quantized<Scheme, Plain>::open(options); }

std::vector<Target> const& targets() {
  namespace types = dcp::gguf::types;
  static std::vector<Target> const all{
      {"Fp8Block<128, 128>", SchemeKind::fp8_block, {128, 128}, open_as<dcp::Fp8Block<>>},
      {"Fp8Block<4, 8>", SchemeKind::fp8_block, {4, 8}, open_as<dcp::Fp8Block<4, 8>>},
      {"Fp8Block<3, 5>", SchemeKind::fp8_block, {3, 5}, open_as<dcp::Fp8Block<3, 5>>},
      {"Fp8Block<1, 32>", SchemeKind::fp8_block, {1, 32}, open_as<dcp::Fp8Block<1, 32>>},
      {"Fp8Block<7, 7>", SchemeKind::fp8_block, {7, 7}, open_as<dcp::Fp8Block<7, 7>>},
      {"Fp8Tensor", SchemeKind::fp8_tensor, {0, 0}, open_as<dcp::Fp8Tensor>},
      {"Fp8Channel", SchemeKind::fp8_channel, {1, 0}, open_as<dcp::Fp8Channel>},
      {"Mxfp8", SchemeKind::mxfp8, {1, 32}, open_as<dcp::Mxfp8>},
      {"Mxfp4", SchemeKind::mxfp4, {1, 32}, open_as<dcp::Mxfp4>},
      {"Nvfp4", SchemeKind::nvfp4, {1, 16}, open_as<dcp::Nvfp4>},
      {"Int8Channel", SchemeKind::int8_channel, {1, 0}, open_as<dcp::Int8Channel>},
      {"Int8Group", SchemeKind::int8_group, {1, 1}, open_as<dcp::Int8Group>},
      {"Int4Packed", SchemeKind::int4_packed, {1, 1}, open_as<dcp::Int4Packed>},
      {"Gptq", SchemeKind::gptq, {1, 1}, open_as<dcp::Gptq>},
      {"Q8_0", SchemeKind::any, {1, 32}, nullptr, types::q8_0},
      {"Q4_0", SchemeKind::any, {1, 32}, nullptr, types::q4_0},
      {"Q4_1", SchemeKind::any, {1, 32}, nullptr, types::q4_1},
      {"Q5_0", SchemeKind::any, {1, 32}, nullptr, types::q5_0},
      {"Q5_1", SchemeKind::any, {1, 32}, nullptr, types::q5_1},
  };
  return all;
}

bool is_gguf(Target const& target) { return target.kind == SchemeKind::any; }
bool quantizes(std::string_view name) { return name.starts_with("layer."); }

Opened open(Target const& target, std::int64_t group) {
  dcp::QuantizePredicate const predicate = [](std::string_view name, DType, Extents const&) { return quantizes(name); };
  if (is_gguf(target)) return GgufInMemory::open({.quantize_to = target.label, .quantize = predicate});
  return target.open({.quantize = predicate, .group = group});
}

// ---- tensors

struct Subject {
  std::string name;
  DType dtype{};
  Extents shape;
  dcp::Bytes bytes{};
  std::vector<float> values{};   // of what is quantized
};

void put(dcp::Bytes& out, auto const& value) {
  auto const bytes = std::as_bytes(std::span{&value, 1});
  out.insert(out.end(), bytes.begin(), bytes.end());
}

// Weights, outliers, constants, powers of two, both ends of float, zeros.
float any_value(Random& random, std::int64_t kind, float level, float most) {
  auto const uniform = [&] { return static_cast<float>(random.between(-1'000'000, 1'000'000)) * 1e-6f; };
  auto const bell = [&] { return uniform() + uniform() + uniform(); };
  float value = 0;
  switch (kind) {
    case 0: value = bell(); break;
    case 1: value = bell() / (std::abs(uniform() * uniform()) + 1e-4f); break;
    case 2: value = level; break;
    case 3: value = bell() * 0x1p-126f; break;
    case 4: value = bell() * most; break;
    case 5: value = std::ldexp(static_cast<float>(random.between(-4, 4)), -149); break;
    case 6: value = random.one_in(3) ? -0.0f : 0.0f; break;
    case 7: value = std::ldexp(random.one_in(2) ? 1.0f : -1.0f, static_cast<int>(random.between(-149, 126))); break;
    default: value = bell() * level; break;
  }
  return std::clamp(value, -most, most);
}

void fill(Random& random, Subject& subject, float most, bool floats) {
  auto const elements = static_cast<std::size_t>(subject.shape.elements());
  if (!floats) {
    subject.bytes = random.bytes(static_cast<std::size_t>(dcp::bytes_of(subject.dtype, subject.shape.elements())));
    return;
  }
  if (subject.dtype == DType::f16) most = std::min(most, 65504.0f);
  float const level = std::ldexp(1.5f, static_cast<int>(random.between(-140, 120)));
  for (std::size_t i = 0; i < elements;) {
    // All of one kind, or runs of several.
    std::int64_t const kind = random.between(0, 8);
    for (std::int64_t left = random.one_in(2) ? random.between(1, 70) : static_cast<std::int64_t>(elements); left > 0 && i < elements; --left, ++i) {
      float const value = any_value(random, kind, level, most);
      switch (subject.dtype) {
        case DType::bf16: {
          dcp::bf16 const narrow{value};
          subject.values.push_back(static_cast<float>(narrow));
          put(subject.bytes, narrow.bits());
          break;
        }
        case DType::f16: {
          dcp::f16 const narrow{value};
          subject.values.push_back(static_cast<float>(narrow));
          put(subject.bytes, narrow.bits());
          break;
        }
        case DType::f64: {
          double const wide = double{value} * (1 - 1e-9);
          subject.values.push_back(static_cast<float>(wide));
          put(subject.bytes, wide);
          break;
        }
        default: subject.values.push_back(value), put(subject.bytes, value);
      }
    }
  }
}

std::vector<Subject> subjects_of(Random& random, Target const& target, std::int64_t group) {
  std::vector<Subject> subjects;
  constexpr std::array floats{DType::f32, DType::bf16, DType::f16, DType::f64};
  constexpr std::array others{DType::f32, DType::bf16, DType::f16, DType::f64, DType::i64, DType::i8};
  bool const large = random.one_in(25);   // runs that are worth a write of their own
  float const most = is_gguf(target) || target.kind == SchemeKind::gptq ? 60000.0f : 3.3e38f;
  for (std::int64_t i = 0, count = large ? 1 : random.between(1, 4); i < count; ++i) {
    bool const expert = target.kind == SchemeKind::mxfp4 && random.one_in(2);
    Subject subject{"layer." + std::to_string(i) + (expert ? ".gate_up_proj" : ".weight"), random.any_of(floats), {}};
    std::int64_t rows = large ? random.between(200, 300) : random.between(1, 40), columns = large ? random.between(700, 1100) : random.between(1, 150);
    switch (target.kind) {
      case SchemeKind::int8_group: columns = group * std::max<std::int64_t>(2, columns / group); break;
      case SchemeKind::int4_packed: columns = group * std::max<std::int64_t>(1, columns / group); break;
      case SchemeKind::gptq:
        columns = group * std::max<std::int64_t>(1, columns / group);
        rows = dcp::ceil_div(rows, std::int64_t{8}) * 8;
        break;
      case SchemeKind::mxfp8:
      case SchemeKind::mxfp4:
      case SchemeKind::any: columns = dcp::ceil_div(columns, std::int64_t{32}) * 32; break;
      case SchemeKind::nvfp4: columns = dcp::ceil_div(columns, std::int64_t{16}) * 16; break;
      default: break;
    }
    subject.shape = Extents{rows, columns};
    if (target.kind != SchemeKind::gptq && !large && random.one_in(3)) {
      subject.shape = Extents{random.between(1, 4), std::max<std::int64_t>(1, rows / 3), columns};
      if (random.one_in(3)) subject.shape = Extents{random.between(1, 3), random.between(1, 3), std::max<std::int64_t>(1, rows / 6), columns};
    } else if ((target.kind == SchemeKind::fp8_tensor || is_gguf(target)) && random.one_in(8)) {
      subject.shape = Extents{columns};
    }
    fill(random, subject, most, true);
    subjects.push_back(std::move(subject));
  }
  for (std::int64_t i = 0, count = random.between(0, 3); i < count; ++i) {
    Subject subject{"kept." + std::to_string(i) + ".weight", random.any_of(others), dcp::test::any_shape(random, 3, 300)};
    fill(random, subject, 0, false);
    subjects.push_back(std::move(subject));
  }
  return subjects;
}

// ---- ranks

dcp::Layout any_layout_on(Random& random, Extents const& shape, std::int64_t ranks) {
  if (random.one_in(6)) return dcp::plain_layout(shape);
  dcp::Layout layout;
  std::vector<std::int64_t> extents{ranks};
  if (ranks == 4 && random.one_in(2)) extents = {2, 2};
  if (random.one_in(4)) extents.insert(extents.begin() + random.between(0, static_cast<std::int64_t>(extents.size())), 1);
  layout.mesh = dcp::test::mesh_of(extents);
  if (random.one_in(5)) layout.mesh = dcp::test::any_sub_mesh(random, layout.mesh);
  layout.shape = layout.split_shape = shape;
  layout.rules = dcp::test::any_rules(random, layout.mesh.axes, shape.rank());
  if (random.one_in(5))
    for (int d = 0; d < shape.rank(); ++d) layout.split_shape[d] += random.between(0, 9);
  if (shape.rank() > 0 && layout.mesh.axes > 0 && random.one_in(3))
    dcp::test::make_flat(layout, static_cast<std::size_t>(random.between(0, layout.mesh.axes - 1)), [&](std::int64_t low, std::int64_t high) { return random.between(low, high); });
  return layout;
}

// A rank's part of tensors, each element of which may have a gap behind it.
class Held {
 public:
  dcp::StateDict state;

  void add(std::string const& name, DType dtype, dcp::Layout const& layout, std::int64_t rank, std::int64_t pitch) {
    dcp::HeldPart part{dcp::Box::whole(layout.shape), 0, layout.shape.elements(), false};
    if (!layout.everywhere) {
      auto const held = dcp::held_by(layout, rank);
      if (!held) return;
      part = *held;
    }
    Part& mine = parts_.emplace_back(Part{name, static_cast<std::size_t>(dcp::bits_of(dtype) / 8), part, dcp::row_major_strides(layout.shape), pitch, {}});
    mine.memory.assign(static_cast<std::size_t>(std::max<std::int64_t>(1, part.elements() * pitch)) * mine.width, std::byte{0xEE});
    Extents strides = part.flat ? Extents{1} : dcp::row_major_strides(part.box.shape);
    for (int d = 0; d < strides.rank(); ++d) strides[d] *= pitch;
    state.add_tensor(name, dtype, layout, {mine.memory.data(), strides});
  }
  /// visit(name, number of the element in the tensor, its bytes)
  template <class Visit>
  void each(Visit visit) {
    for (auto& part : parts_)
      for (std::int64_t i = 0; i < part.held.elements(); ++i) {
        std::int64_t rest = part.held.begin + i, at = 0;
        dcp::Box const& box = part.held.box;
        for (int d = box.rank(); d-- > 0; rest /= box.shape[d]) at += (box.origin[d] + rest % box.shape[d]) * part.global[d];
        visit(part.name, static_cast<std::size_t>(at), dcp::ByteSpan{part.memory}.subspan(static_cast<std::size_t>(i * part.pitch) * part.width, part.width));
      }
  }

 private:
  struct Part {
    std::string name;
    std::size_t width;
    dcp::HeldPart held;
    Extents global;
    std::int64_t pitch;
    dcp::Bytes memory;
  };
  std::deque<Part> parts_;
};

Subject const& find(std::vector<Subject> const& subjects, std::string const& name) {
  return *std::find_if(subjects.begin(), subjects.end(), [&](Subject const& subject) { return subject.name == name; });
}

dcp::PlaceRef place_of(dcp::Memory& store, char const* name) { return Plain::locate({store, name}); }

void save_on(int ranks, dcp::AnyStorage const& storage, dcp::PlaceRef const& place, std::vector<Subject> const& subjects, Random& random) {
  std::vector<dcp::Layout> layouts;
  for (auto const& subject : subjects) layouts.push_back(ranks == 1 ? dcp::plain_layout(subject.shape) : any_layout_on(random, subject.shape, ranks));
  std::int64_t const pitch = ranks > 1 && random.one_in(4) ? 2 : 1;
  dcp::SaveSettings settings;
  settings.threads = static_cast<int>(random.between(1, 2));
  settings.memory_bytes = random.one_in(2) ? dcp::least_memory_bytes : dcp::default_memory_bytes;
  settings.writers_per_file = random.one_in(4) ? random.between(1, 2) : 16;
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    Held held;
    for (std::size_t s = 0; s < subjects.size(); ++s) held.add(subjects[s].name, subjects[s].dtype, layouts[s], world.rank(), pitch);
    held.each([&](std::string const& name, std::size_t element, dcp::ByteSpan bytes) { std::memcpy(bytes.data(), find(subjects, name).bytes.data() + element * bytes.size(), bytes.size()); });
    dcp::detail::save_state(dcp::CommRef{world}, storage, place, held.state, settings);
  });
}

// Every file of a checkpoint but its record, which has its id, and the checksums, which loads compare.
std::map<std::string, dcp::Bytes> files_of(dcp::PlaceRef const& place) {
  std::map<std::string, dcp::Bytes> files;
  for (auto const& entry : place.medium->list(place.path))
    if (entry.name != dcp::record_name && entry.name != dcp::checksums_name) files[entry.name] = dcp::read_file(*place.medium, place.path + '/' + entry.name, 1u << 30);
  return files;
}

// Loads on `ranks` ranks in any layouts: what is quantized as float, the rest as it is. What came of each, whole; the first problem in words.
std::map<std::string, dcp::Bytes> load_on(int ranks, dcp::AnyStorage const& storage, dcp::PlaceRef const& place, std::vector<Subject> const& subjects, Random& random) {
  std::map<std::string, dcp::Bytes> whole;
  std::vector<dcp::Layout> layouts;
  auto const dtype_of = [](Subject const& subject) { return quantizes(subject.name) ? DType::f32 : subject.dtype; };
  for (auto const& subject : subjects) {
    layouts.push_back(any_layout_on(random, subject.shape, ranks));
    whole[subject.name].assign(static_cast<std::size_t>(dcp::bytes_of(dtype_of(subject), subject.shape.elements())), std::byte{0xFF});
  }
  std::int64_t const pitch = random.one_in(4) ? 2 : 1;
  std::mutex mutex;
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    Held held;
    for (std::size_t s = 0; s < subjects.size(); ++s) held.add(subjects[s].name, dtype_of(subjects[s]), layouts[s], world.rank(), pitch);
    dcp::detail::load_state(dcp::CommRef{world}, storage, place, held.state, {});
    std::lock_guard const lock{mutex};
    held.each([&](std::string const& name, std::size_t element, dcp::ByteSpan bytes) { std::memcpy(whole[name].data() + element * bytes.size(), bytes.data(), bytes.size()); });
  });
  return whole;
}

// ---- the oracle: each scheme as its specification says it, one element at a time. It shares nothing with the library but what a half is.

struct Format {
  int exponent, mantissa, bias;
  unsigned largest;   // the code of the largest finite magnitude
  unsigned sign() const { return 1u << (exponent + mantissa); }
  double value(unsigned code) const {
    unsigned const magnitude = code & (sign() - 1), e = magnitude >> mantissa, m = magnitude & ((1u << mantissa) - 1);
    double const absolute = e == 0 ? std::ldexp(m, 1 - bias - mantissa) : std::ldexp((1u << mantissa) + m, static_cast<int>(e) - bias - mantissa);
    return (code & sign()) != 0 ? -absolute : absolute;
  }
  // The nearest code, of two the even one.
  unsigned nearest(double x) const {
    double const wanted = std::abs(x);
    unsigned low = 0, high = largest;   // of the last that is not above
    while (low < high) {
      unsigned const middle = (low + high + 1) / 2;
      if (value(middle) <= wanted) low = middle;
      else high = middle - 1;
    }
    if (low < largest) {
      double const below = wanted - value(low), above = value(low + 1) - wanted;
      if (above < below || (above == below && low % 2 == 1)) ++low;
    }
    return low | (std::signbit(x) ? sign() : 0u);
  }
};
constexpr Format e4m3{4, 3, 7, 0x7E}, e2m1{2, 1, 1, 7};

// The exponent that counts: of amax with a quarter added to its significand.
int even_exponent(float amax) {
  int exponent = 0;
  double const fraction = 2 * std::frexp(double{amax}, &exponent);   // [1, 2)
  return exponent - 1 + (fraction >= 1.75 ? 1 : 0);
}
float half_not_below(float scale) {
  std::uint16_t bits = 0;
  for (std::uint16_t step = 0x4000; step > 0; step = static_cast<std::uint16_t>(step / 2))
    if (bits + step <= 0x7BFF && static_cast<float>(dcp::f16::from_bits(static_cast<std::uint16_t>(bits + step - 1))) < scale) bits = static_cast<std::uint16_t>(bits + step);
  return static_cast<float>(dcp::f16::from_bits(bits));
}

struct Group {
  float amax = 0, least = std::numeric_limits<float>::infinity(), largest = -std::numeric_limits<float>::infinity();
  float step = 1;
  std::uint8_t scale_code = 0;
  bool all_zero = true, at_limit = false;   // its codes: whether one is the largest
};
struct Encoded {
  std::map<std::string, dcp::Bytes> parts{};
  std::vector<Group> groups{};
  std::int64_t block_rows = 1, block_columns = 1, grid_rows = 1, grid_columns = 1, rows = 1, columns = 1;
  bool whole_tensor = false;

  std::size_t group_of(std::size_t element) const {
    if (whole_tensor) return 0;
    auto const at = static_cast<std::int64_t>(element);
    std::int64_t const c = at % columns, r = at / columns % rows, l = at / columns / rows;
    return static_cast<std::size_t>((l * grid_rows + r / block_rows) * grid_columns + c / block_columns);
  }
};

Encoded encoded(Target const& target, std::int64_t group_columns, Subject const& subject) {
  Encoded out;
  int const rank = subject.shape.rank();
  out.columns = subject.shape[rank - 1];
  out.rows = rank < 2 ? 1 : subject.shape[rank - 2];
  std::int64_t const slices = subject.shape.elements() / (out.rows * out.columns);
  out.whole_tensor = target.kind == SchemeKind::fp8_tensor;
  out.block_rows = target.block[0];
  out.block_columns = target.block[1];
  if (target.kind == SchemeKind::int8_group || target.kind == SchemeKind::int4_packed || target.kind == SchemeKind::gptq) out.block_columns = group_columns;
  if (out.block_columns == 0) out.block_columns = out.columns;
  if (out.block_rows == 0) out.block_rows = out.rows;
  out.grid_rows = (out.rows + out.block_rows - 1) / out.block_rows;
  out.grid_columns = (out.columns + out.block_columns - 1) / out.block_columns;
  out.groups.resize(out.whole_tensor ? 1 : static_cast<std::size_t>(slices * out.grid_rows * out.grid_columns));
  float tensor_amax = 0;
  for (std::size_t i = 0; i < subject.values.size(); ++i) {
    Group& group = out.groups[out.group_of(i)];
    group.amax = std::max(group.amax, std::abs(subject.values[i]));
    group.least = std::min(group.least, subject.values[i]);
    group.largest = std::max(group.largest, subject.values[i]);
    tensor_amax = std::max(tensor_amax, std::abs(subject.values[i]));
  }
  if (is_gguf(target)) {
    dcp::Bytes& blocks = out.parts[subject.name];
    blocks.resize(subject.values.size() / 32 * static_cast<std::size_t>(dcp::gguf::type_facts(target.type)->bytes));
    dcp::gguf::encode_blocks(target.type, subject.values.data(), static_cast<std::int64_t>(subject.values.size() / 32), blocks.data());
    return out;
  }
  auto const ratio = [](float amax, float divisor) { return amax == 0 ? 1.0f : std::max(amax / divisor, 0x1p-126f); };
  float const tensor_scale = ratio(tensor_amax, 2688.0f);
  std::string const name = subject.name, module = name.ends_with(".weight") ? name.substr(0, name.size() - 7) : name;
  bool const is_expert = !name.ends_with("weight");
  Format const* format = nullptr;
  int bits = 0;
  std::string codes_name = name, scales_name = name + "_scale";
  dcp::Bytes scales;
  for (auto& group : out.groups) switch (target.kind) {
      case SchemeKind::fp8_block: scales_name = name + "_scale_inv"; [[fallthrough]];
      case SchemeKind::fp8_tensor:
      case SchemeKind::fp8_channel:
        format = &e4m3;
        put(scales, group.step = ratio(group.amax, 448.0f));
        break;
      case SchemeKind::mxfp8:
      case SchemeKind::mxfp4: {
        bool const eight = target.kind == SchemeKind::mxfp8;
        format = eight ? &e4m3 : &e2m1;
        int const exponent = group.amax == 0 ? -127 : std::clamp(even_exponent(group.amax) - (eight ? 8 : 2), -127, eight ? 119 : 125);
        put(scales, static_cast<std::uint8_t>(exponent + 127));
        group.step = std::ldexp(1.0f, exponent);
        group.scale_code = static_cast<std::uint8_t>(exponent + 127);
        if (!eight) {
          codes_name = name + (is_expert ? "_blocks" : "_packed");
          if (is_expert) scales_name = name + "_scales";
        }
        break;
      }
      case SchemeKind::nvfp4: {
        format = &e2m1;
        unsigned code = group.amax == 0 ? 0x38u : e4m3.nearest(double{group.amax / (tensor_scale * 6.0f)});
        if (code == 0) code = 1;
        put(scales, static_cast<std::uint8_t>(code));
        group.scale_code = static_cast<std::uint8_t>(code);
        group.step = static_cast<float>(e4m3.value(code)) * tensor_scale;
        break;
      }
      case SchemeKind::int8_channel:
      case SchemeKind::int8_group:
        bits = 8;
        put(scales, group.step = std::min(ratio(group.amax, 127.5f), std::numeric_limits<float>::max() / 128));
        break;
      case SchemeKind::int4_packed:
        bits = 4;
        codes_name = name + "_packed";
        put(scales, group.step = std::min(ratio(group.amax, 7.5f), std::numeric_limits<float>::max() / 8));
        break;
      default:   // GPTQ
        bits = 4;
        group.step = half_not_below(ratio(group.amax, 7.5f));
        break;
    }
  std::vector<std::uint8_t> codes;
  for (std::size_t i = 0; i < subject.values.size(); ++i) {
    Group& group = out.groups[out.group_of(i)];
    float const quotient = subject.values[i] / group.step;
    if (format != nullptr) {
      codes.push_back(static_cast<std::uint8_t>(format->nearest(double{quotient})));
      group.all_zero = group.all_zero && format->value(codes.back()) == 0;
      group.at_limit = group.at_limit || (codes.back() & (format->sign() - 1)) == format->largest;
    } else {
      float const limit = static_cast<float>(1 << (bits - 1));
      codes.push_back(static_cast<std::uint8_t>(static_cast<int>(std::clamp(std::nearbyint(quotient), -limit, limit - 1)) + (bits == 4 ? 8 : 0)));
    }
  }
  if (target.kind == SchemeKind::gptq) {
    dcp::Bytes& words = out.parts[module + ".qweight"];
    std::int64_t const inputs = out.columns, outputs = out.rows;
    for (std::int64_t k = 0; k < inputs; k += 8)
      for (std::int64_t n = 0; n < outputs; ++n) {
        std::uint32_t word = 0;
        for (std::int64_t j = 0; j < 8; ++j) word |= std::uint32_t{codes[static_cast<std::size_t>(n * inputs + k + j)]} << (4 * j);
        put(words, word);
      }
    dcp::Bytes& halves = out.parts[module + ".scales"];
    for (std::int64_t g = 0; g < out.grid_columns; ++g)
      for (std::int64_t n = 0; n < outputs; ++n) put(halves, dcp::f16{out.groups[static_cast<std::size_t>(n * out.grid_columns + g)].step}.bits());
    for (std::int64_t i = 0; i < out.grid_columns * outputs / 8; ++i) put(out.parts[module + ".qzeros"], 0x77777777u);
    for (std::int64_t k = 0; k < inputs; ++k) put(out.parts[module + ".g_idx"], static_cast<std::int32_t>(k / group_columns));
    return out;
  }
  out.parts[scales_name] = std::move(scales);
  if (target.kind == SchemeKind::nvfp4) put(out.parts[name + "_scale_2"], tensor_scale);
  if (target.kind == SchemeKind::int4_packed)
    for (auto const size : subject.shape) put(out.parts[name + "_shape"], std::int64_t{size});
  dcp::Bytes& packed = out.parts[codes_name];
  bool const nibbles = format == &e2m1 || bits == 4;
  std::int64_t const padded = bits == 4 ? dcp::ceil_div(out.columns, std::int64_t{8}) * 8 : out.columns;
  for (std::int64_t row = 0; row < slices * out.rows; ++row)
    for (std::int64_t c = 0; c < padded; c += nibbles ? 2 : 1) {
      auto const code = [&](std::int64_t column) { return column < out.columns ? unsigned{codes[static_cast<std::size_t>(row * out.columns + column)]} : 0u; };
      packed.push_back(static_cast<std::byte>(nibbles ? code(c) | code(c + 1) << 4 : code(c)));
    }
  return out;
}

// What the comment of a scheme promises of an element of a group; near the ends of float, what those of its rules do (formats/block_quantizers.hpp).
double bound(Target const& target, Group const& group) {
  double const amax = group.amax, half_error = std::ldexp(1.0, -25);   // of a half below its normal numbers
  switch (target.kind) {
    case SchemeKind::fp8_block:
    case SchemeKind::fp8_tensor:
    case SchemeKind::fp8_channel: return group.amax >= 448 * 0x1p-126f ? amax / 28 : std::max(amax / 16, std::ldexp(1.0, -136));
    case SchemeKind::mxfp8: return group.amax >= 0x1.cp127f ? amax / 8 : std::max(amax / 14, std::ldexp(1.0, -137));
    case SchemeKind::mxfp4: return group.amax >= 0x1.cp127f ? amax / 4 : group.amax < 0x1p-125f ? std::max(amax / 5, std::ldexp(1.0, -129)) : amax / 5;
    case SchemeKind::nvfp4: return group.scale_code >= 8 ? amax / 5 : group.scale_code > 1 ? 0.34 * amax : std::max(0.34 * amax, double{group.step} / 4);
    case SchemeKind::int8_channel:
    case SchemeKind::int8_group: return group.amax > std::numeric_limits<float>::max() * (1 - 0x1p-8f) ? double{group.step} : 0.51 * group.step;
    case SchemeKind::int4_packed: return group.amax > std::numeric_limits<float>::max() * (1 - 0x1p-4f) ? double{group.step} : 0.51 * group.step;
    case SchemeKind::gptq: return 0.51 * group.step;
    default: break;
  }
  namespace types = dcp::gguf::types;
  double const range = double{group.largest} - double{group.least};
  if (target.type == types::q8_0) return amax / 127 >= std::ldexp(1.0, -14) ? 0.5625 * amax / 127 : 0.5 * amax / 127 + 127 * half_error;
  if (target.type == types::q4_0) return amax * (1.0 / 8 + std::ldexp(1.0, -8)) + 8 * half_error;
  if (target.type == types::q5_0) return amax * (1.0 / 16 + std::ldexp(1.0, -8)) + 16 * half_error;
  double const most = target.type == types::q4_1 ? 15 : 31;
  return range / most * 0.5 + (range + std::abs(double{group.least})) * std::ldexp(1.0, -10) + (most + 1) * half_error;
}

// Whether the numbers that are read of a group quantize to the codes and the scale that they are read from.
bool is_idempotent(Target const& target, Group const& group) {
  switch (target.kind) {
    case SchemeKind::fp8_block:
    case SchemeKind::fp8_tensor:
    case SchemeKind::fp8_channel:
    case SchemeKind::mxfp4: return group.amax == 0 || !group.all_zero;
    case SchemeKind::mxfp8: return !group.at_limit;   // 448 has the significand from which on the power of two is the next one
    case SchemeKind::nvfp4: return false;
    case SchemeKind::any: return target.type != dcp::gguf::types::q4_1 && target.type != dcp::gguf::types::q5_1 && group.amax / 127 >= 0x1p-14f;   // else the half that is divided by is rounded to few bits
    default: return false;   // the largest one is no multiple of its scale
  }
}

std::string first_difference(std::map<std::string, dcp::Bytes> const& a, std::map<std::string, dcp::Bytes> const& b) {
  for (auto const& [name, bytes] : a) {
    auto const other = b.find(name);
    if (other == b.end()) return name + " is not there";
    if (bytes.size() != other->second.size()) return name + " has " + std::to_string(bytes.size()) + " and " + std::to_string(other->second.size()) + " bytes";
    for (std::size_t i = 0; i < bytes.size(); ++i)
      if (bytes[i] != other->second[i]) return name + " at byte " + std::to_string(i) + ": " + std::to_string(std::to_integer<int>(bytes[i])) + " and " + std::to_string(std::to_integer<int>(other->second[i]));
  }
  return a.size() == b.size() ? "" : "more files than expected";
}

// The parts as they are stored, by the name of each.
std::map<std::string, dcp::Bytes> parts_of(Target const& target, dcp::AnyStorage const& storage, dcp::PlaceRef const& place, std::vector<Subject> const& subjects) {
  std::map<std::string, dcp::Bytes> parts;
  dcp::SelfComm self;
  if (is_gguf(target)) {
    // The bytes of blocks, under the tensor's own name.
    dcp::StateDict state;
    for (auto const& subject : subjects) {
      if (!quantizes(subject.name)) continue;
      Extents const stored = dcp::detail::GgufEncoding<>::stored_shape(*dcp::gguf::type_facts(target.type), subject.shape);
      auto& bytes = parts[subject.name];
      bytes.resize(static_cast<std::size_t>(stored.elements()));
      state.add_tensor(subject.name, DType::u8, dcp::plain_layout(stored), {bytes.data(), dcp::row_major_strides(stored)});
    }
    dcp::LoadSettings settings;
    settings.on_unexpected = dcp::OnUnexpected::ignore;
    dcp::detail::load_state(dcp::CommRef{self}, storage, place, state, settings);
    return parts;
  }
  auto const plain = Plain::open({});   // to it they are tensors like others
  auto const owned = dcp::detail::load_owned(dcp::CommRef{self}, *plain, place, {}, {});
  for (auto const& [name, tensor] : owned.tensors())
    if (!name.starts_with("kept.")) parts[name].assign(tensor.bytes().begin(), tensor.bytes().end());
  return parts;
}

void check_round(std::uint64_t seed, Target const& target) {
  Random random{seed};
  std::int64_t const group = target.kind == SchemeKind::gptq ? 8 * random.between(1, 6) : random.any_of(std::array<std::int64_t, 7>{2, 3, 4, 8, 20, 32, 128});
  CAPTURE(group);
  auto const subjects = subjects_of(random, target, group);
  auto const storage = open(target, group);
  dcp::Memory store;
  auto const alone = place_of(store, "alone"), shared = place_of(store, "shared"), again = place_of(store, "again");
  save_on(1, *storage, alone, subjects, random);
  auto const files = files_of(alone);

  int const writers = static_cast<int>(random.between(2, 4));
  CAPTURE(writers);
  save_on(writers, *storage, shared, subjects, random);
  REQUIRE(first_difference(files, files_of(shared)) == "");

  std::map<std::string, dcp::Bytes> wanted;
  std::map<std::string, Encoded> oracle;
  bool idempotent = true;
  for (auto const& subject : subjects) {
    if (!quantizes(subject.name)) continue;
    Encoded const& one = oracle.emplace(subject.name, encoded(target, group, subject)).first->second;
    for (auto const& [name, bytes] : one.parts) wanted[name] = bytes;
    for (auto const& each : one.groups) idempotent = idempotent && is_idempotent(target, each);
  }
  REQUIRE(first_difference(wanted, parts_of(target, *storage, shared, subjects)) == "");

  auto const read = load_on(static_cast<int>(random.between(1, 4)), *storage, shared, subjects, random);
  auto turned = subjects;
  for (auto& subject : turned) {
    CAPTURE(subject.name);
    auto const& bytes = read.at(subject.name);
    if (!quantizes(subject.name)) {
      REQUIRE(bytes == subject.bytes);
      continue;
    }
    Encoded const& codes = oracle.at(subject.name);
    for (std::size_t i = 0; i < subject.values.size(); ++i) {
      float value = 0;
      std::memcpy(&value, bytes.data() + 4 * i, 4);
      double const error = std::abs(double{value} - double{subject.values[i]}), allowed = bound(target, codes.groups[codes.group_of(i)]) * (1 + 0x1p-18) + 0x1p-149;   // of quotients and products that are rounded
      if (error <= allowed) continue;   // false for what is no number
      CAPTURE(i);
      CAPTURE(value);
      CAPTURE(subject.values[i]);
      CAPTURE(codes.groups[codes.group_of(i)].amax);
      REQUIRE(error <= allowed);
    }
    subject.dtype = DType::f32;
    subject.bytes = bytes;
  }

  if (!idempotent) return;
  save_on(static_cast<int>(random.between(1, 3)), *storage, again, turned, random);
  REQUIRE(first_difference(files, files_of(again)) == "");
}

}  // namespace

TEST_CASE("law: what is quantized while it is saved is the same bytes on any ranks in any placements, those of the specification, and loads within its bound") {
  std::uint64_t const base_seed = dcp::test::first_seed();
  int const rounds = dcp::test::rounds(456, 20'000);
  for (int round = 0; round < rounds; ++round) {
    std::uint64_t const seed = base_seed + static_cast<std::uint64_t>(round);
    Target const& target = targets()[seed % targets().size()];
    CAPTURE(seed);
    CAPTURE(std::string{target.label});
    check_round(seed, target);
  }
}
