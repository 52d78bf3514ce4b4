// SPDX-License-Identifier: Apache-2.0
#pragma once
// Finds the quantized tensors of a checkpoint among its stored ones: which belong together, by every spelling that is in use, and how they
// are decoded. Looks at names, dtypes and shapes of the whole checkpoint, whatever file each part lies in, and at what the configuration says.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/formats/block_codecs.hpp>
#include <dcp/formats/json_tree.hpp>
#include <dcp/formats/quantization_config.hpp>
#include <dcp/plan/catalog.hpp>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

/// The families of quantized layouts. `any`: whatever is found.
enum class SchemeKind : std::uint8_t { any, fp8_block, fp8_tensor, fp8_channel, mxfp8, mxfp4, nvfp4, int8_channel, int8_group, int4_packed, gptq, awq, nf4 };

inline constexpr std::array scheme_kind_names{"any", "fp8_block", "fp8_tensor", "fp8_channel", "mxfp8", "mxfp4", "nvfp4", "int8_channel", "int8_group", "int4_packed", "gptq", "awq", "nf4"};
inline std::string_view to_string(SchemeKind kind) { return scheme_kind_names[static_cast<std::size_t>(kind)]; }

/// What a load expects to find.
struct ExpectedScheme {
  SchemeKind kind = SchemeKind::any;
  std::array<std::int64_t, 2> block{0, 0};   // of fp8_block
};

namespace detail {

/// Small tensors whose contents say how others are to be understood: they are read together with the headers.
template <class = Deferred>
bool describes_others(FoundTensor const& tensor) {
  constexpr std::uint64_t most_bytes = 64 << 10;
  if (bytes_of(tensor.dtype, tensor.shape.elements()) > most_bytes) return false;
  return tensor.name.ends_with("weight_shape") || tensor.name.ends_with("weight_format") || tensor.name.find(".quant_state.bitsandbytes__") != std::string::npos;
}

/// `shape` with another last dimension.
template <class = Deferred>
Extents with_last(Extents shape, std::int64_t size) {
  shape[shape.rank() - 1] = size;
  return shape;
}

template <class = Deferred>
class QuantizedFinder {
 public:
  /// `contents`: of tensors that describe others.
  QuantizedFinder(Catalog& catalog, std::map<std::string, Bytes> contents, std::optional<quantization::Config> config, ExpectedScheme expected)
      : catalog_{catalog}, contents_{std::move(contents)}, config_{std::move(config)}, expected_{expected} {}

  /// Moves what quantized tensors are made of to Catalog::raw, and puts them into Catalog::tensors.
  /// Throws    Error(quant_mismatch) mostly, listing everything that does not fit together
  void run() {
    for (auto const& tensor : catalog_.tensors) {
      try {
        look_at(tensor);
      } catch (Error const& error) {
        problems_.add(error.code(), error.message());
        if (!error.hint().empty()) problems_.hint(error.hint());
      }
    }
    for (auto const& tensor : catalog_.tensors)
      if (!parts_.contains(tensor.name)) look_for_strays(tensor);
    problems_.raise();
    if (made_.empty()) {
      if (expected_.kind != SchemeKind::any) catalog_.warnings.push_back("the checkpoint holds no quantized tensor; it is loaded as it is");
      return;
    }
    std::vector<CatalogTensor> plain;
    for (auto& tensor : catalog_.tensors) (parts_.contains(tensor.name) ? catalog_.raw : plain).push_back(std::move(tensor));
    for (auto& made : made_) plain.push_back(std::move(made));
    auto const by_name = [](CatalogTensor const& a, CatalogTensor const& b) { return a.name < b.name; };
    std::sort(plain.begin(), plain.end(), by_name);
    catalog_.tensors = std::move(plain);
    auto const twice = std::adjacent_find(catalog_.tensors.begin(), catalog_.tensors.end(), [](CatalogTensor const& a, CatalogTensor const& b) { return a.name == b.name; });
    if (twice != catalog_.tensors.end()) throw Error{ErrorCode::quant_mismatch, twice->name + ": the checkpoint holds it twice, quantized and not, or in two schemes"};
  }

 private:
  using Method = quantization::Method;

  static std::string_view without(std::string_view name, std::string_view suffix) { return name.substr(0, name.size() - suffix.size()); }
  CatalogTensor const* find(std::string const& name) const { return catalog_.find_tensor(name); }
  CatalogTensor const* find(std::string_view stem, std::string_view suffix) const { return find(std::string{stem} + std::string{suffix}); }
  CatalogTensor const& need(CatalogTensor const& data, std::string_view stem, std::string_view suffix) const {
    CatalogTensor const* const tensor = find(stem, suffix);
    if (tensor == nullptr) wrong(data, "there is no " + std::string{stem} + std::string{suffix} + ", without which it means nothing");
    return *tensor;
  }
  [[noreturn]] static void wrong(CatalogTensor const& tensor, std::string const& sentence) { throw Error{ErrorCode::quant_mismatch, tensor.name + ' ' + describe(tensor.dtype, tensor.shape) + ": " + sentence}; }
  Bytes const& content_of(CatalogTensor const& tensor) const {
    auto const at = contents_.find(tensor.name);
    if (at == contents_.end()) wrong(tensor, "it is too large for what it should hold");
    return at->second;
  }
  bool says(Method method) const { return config_ && config_->method == method; }
  static bool is_f8(DType dtype) { return dtype == DType::f8_e4m3 || dtype == DType::f8_e5m2 || dtype == DType::f8_e4m3fnuz || dtype == DType::f8_e5m2fnuz; }
  static bool is_float(DType dtype) { return dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::f16; }
  static bool is_byte(DType dtype) { return dtype == DType::u8 || dtype == DType::i8; }

  // ---- what a name is

  void look_at(CatalogTensor const& tensor) {
    std::string_view const name = tensor.name;
    if (name.ends_with(".qweight")) return transposed(tensor, without(name, ".qweight"));
    if (name.ends_with("weight_packed")) {
      std::string_view const module = without(name, "_packed");   // of the weight
      if (tensor.dtype == DType::i32) return packed(tensor, module);
      if (find(module, "_global_scale") != nullptr) return nvfp4(tensor, std::string{module}, need(tensor, module, "_scale"), *find(module, "_global_scale"), SecondScale::Kind::divide);
      return mxfp4(tensor, std::string{module}, need(tensor, module, "_scale"));
    }
    constexpr std::array<std::string_view, 2> separators{"_", "."};
    for (std::string_view const separator : separators) {
      std::string const blocks = std::string{separator} + "blocks", scales = std::string{separator} + "scales";
      if (name.ends_with(blocks) && tensor.dtype == DType::u8 && (find(without(name, blocks), scales) != nullptr || says(Method::mxfp4))) return mxfp4_blocks(tensor, std::string{without(name, blocks)}, need(tensor, without(name, blocks), scales));
    }
    if (auto const state = find_state(name); !state.empty()) return bitsandbytes(tensor, state);
    bool const is_weight = name == "weight" || name.ends_with(".weight");
    if (is_weight && tensor.dtype == DType::i8)
      if (auto const* scale = find(without(name, "weight"), "SCB")) return bitsandbytes_int8(tensor, *scale);
    CatalogTensor const* scale = nullptr;
    constexpr std::array<std::string_view, 3> suffixes{"_scale_inv", "_scales_inv", "_scale"};
    for (std::string_view const suffix : suffixes)
      if (scale == nullptr) scale = find(name, suffix);
    if (scale == nullptr && is_weight && (is_f8(tensor.dtype) || tensor.dtype == DType::i8)) scale = find(without(name, "weight"), "scale");
    if (scale == nullptr) return;   // an 8-bit float is missed there, unless it is a scale itself
    if (is_f8(tensor.dtype)) return fp8(tensor, *scale);
    if (is_byte(tensor.dtype) || tensor.dtype == DType::f4) {
      if (auto const* second = find(name, "_scale_2")) return nvfp4(tensor, tensor.name, *scale, *second, SecondScale::Kind::multiply);
      if (tensor.dtype == DType::u8 || tensor.dtype == DType::f4 || scale->dtype == DType::f8_e8m0) return mxfp4(tensor, tensor.name, *scale);
      return int8(tensor, *scale);
    }
    if (is_float(tensor.dtype) && (scale->name.ends_with("_inv"))) return fp8(tensor, *scale);   // scaled, if not narrowed
  }
  void look_for_strays(CatalogTensor const& tensor) {
    std::string_view const name = tensor.name;
    if (is_f8(tensor.dtype)) {
      problems_.add(ErrorCode::quant_mismatch, tensor.name + ' ' + describe(tensor.dtype, tensor.shape) + ": nothing holds its scale: there is no " + tensor.name + "_scale_inv or " + tensor.name + "_scale");
      return;
    }
    constexpr std::array<std::string_view, 6> suffixes{".weight_scale_inv", ".weight_scale", ".weight_global_scale", ".weight_packed", ".qzeros", ".weight_zero_point"};
    for (std::string_view const suffix : suffixes)
      if (name.ends_with(suffix)) {
        std::string const weight = std::string{without(name, suffix)} + ".weight";
        if (suffix != ".weight_packed" && find(weight) != nullptr && is_float(find(weight)->dtype)) return;   // a scale that was kept beside a weight in full precision
        problems_.add(ErrorCode::quant_mismatch, tensor.name + ": a part of a quantized tensor, whose data are not in the checkpoint");
        return;
      }
  }
  std::string find_state(std::string_view name) const {
    constexpr std::array<std::string_view, 2> suffixes{".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"};
    for (std::string_view const suffix : suffixes)
      if (find(name, suffix) != nullptr) return std::string{name} + std::string{suffix};
    return {};
  }

  // ---- parts

  static EncodedPart part_of(CatalogTensor const& tensor, PartGrid grid) { return {tensor.name, tensor.dtype, tensor.shape, std::move(grid)}; }
  // A part without axes: one number, or a table, for all of the tensor.
  static EncodedPart whole_part(CatalogTensor const& tensor) { return part_of(tensor, PartGrid::along(std::vector<PartAxis>(static_cast<std::size_t>(tensor.shape.rank())))); }
  // Elements smaller than a byte as the bytes that hold them.
  static EncodedPart as_bytes(CatalogTensor const& tensor, PartGrid grid) {
    EncodedPart part = part_of(tensor, std::move(grid));
    if (tensor.dtype != DType::f4) return part;
    int const last = tensor.shape.rank() - 1;
    if (last < 0 || tensor.shape[last] % 2 != 0) wrong(tensor, "a row does not end on a byte");
    part.dtype = DType::u8;
    part.shape[last] /= 2;
    return part;
  }
  static void expect_shape(CatalogTensor const& tensor, Extents const& shape, std::string_view why) {
    if (!(tensor.shape == shape)) wrong(tensor, "its shape should be " + to_string(shape) + ": " + std::string{why});
  }
  template <class... DTypes>
  static void expect_dtype(CatalogTensor const& tensor, DTypes... dtypes) {
    if (!((tensor.dtype == dtypes) || ...)) {
      std::string list;
      ((list += (list.empty() ? "" : " or ") + std::string{to_string(dtypes)}), ...);
      wrong(tensor, "its dtype should be " + list);
    }
  }
  static void expect_one(CatalogTensor const& tensor) {
    expect_dtype(tensor, DType::f32, DType::bf16, DType::f16);
    if (tensor.shape.elements() != 1) wrong(tensor, "one number is expected");
  }
  static void expect_matrix(CatalogTensor const& tensor, int least = 2) {
    if (tensor.shape.rank() < least) wrong(tensor, "a tensor of " + std::to_string(least) + " or more dimensions is expected");
  }

  // ---- schemes

  void fp8(CatalogTensor const& data, CatalogTensor const& scale) {
    int const rank = data.shape.rank();
    bool const per_tensor = scale.shape.rank() == 0 || (scale.shape.elements() == 1 && scale.shape.rank() == 1);
    bool const e8m0 = scale.dtype == DType::f8_e8m0 || scale.dtype == DType::u8;
    GroupSpec spec;
    spec.shape = data.shape;
    spec.codes = part_of(data, PartGrid::rows(rank));
    if (per_tensor) {
      expect_dtype(scale, DType::f32, DType::bf16, DType::f16, DType::f8_e8m0);
      spec.scales = whole_part(scale);
      return add(SchemeKind::fp8_tensor, "fp8_tensor", data.name, std::move(spec));
    }
    expect_matrix(data);
    std::int64_t const rows = data.shape[rank - 2], columns = data.shape[rank - 1];
    if (e8m0 && !(config_ && config_->block[0] > 0) && columns % 32 == 0 && scale.shape == with_last(data.shape, columns / 32)) {
      spec.scales = part_of(scale, PartGrid::rows(rank, 32));
      spec.scales.dtype = DType::f8_e8m0;
      return add(SchemeKind::mxfp8, "mxfp8", data.name, std::move(spec));
    }
    expect_dtype(scale, DType::f32, DType::bf16, DType::f16, DType::f8_e8m0);
    quantization::Group const* const group = group_of(data.name);
    bool const channel = scale.shape == with_last(data.shape, 1) || (scale.shape.rank() == rank - 1 && std::equal(scale.shape.begin(), scale.shape.end(), data.shape.begin()));
    auto const block = block_of(data, scale, group);
    if (channel && !(block && (*block)[0] == 1) && (expected_.kind == SchemeKind::fp8_channel || !(block && scale.shape == block_grid(data.shape, *block)) || (group != nullptr && group->strategy == quantization::Strategy::channel))) {
      std::vector<PartAxis> axes;
      for (int d = 0; d < rank - 1; ++d) axes.push_back({d, 1});
      if (scale.shape.rank() == rank) axes.push_back({});
      spec.scales = part_of(scale, PartGrid::along(std::move(axes)));
      return add(SchemeKind::fp8_channel, "fp8_channel", data.name, std::move(spec));
    }
    if (!block) wrong(scale, "blocks of what size it is for is said nowhere (" + std::to_string(rows) + " x " + std::to_string(columns) + " elements)");
    Extents const grid = block_grid(data.shape, *block);
    expect_shape(scale, grid, "one scale for each block of " + std::to_string((*block)[0]) + " x " + std::to_string((*block)[1]) + " of " + to_string(data.shape));
    std::vector<PartAxis> axes;
    for (int d = 0; d < rank; ++d) axes.push_back({d, d < rank - 2 ? 1 : (*block)[static_cast<std::size_t>(d - (rank - 2))]});
    spec.scales = part_of(scale, PartGrid::along(std::move(axes)));
    if (expected_.kind == SchemeKind::fp8_block && expected_.block != *block) {
      Error error{ErrorCode::quant_mismatch, data.name + ": its blocks are " + std::to_string((*block)[0]) + " x " + std::to_string((*block)[1]) + ", and " + std::to_string(expected_.block[0]) + " x " + std::to_string(expected_.block[1]) + " was asked for"};
      throw error.with_hint("AnyScheme takes what is there");
    }
    add(SchemeKind::fp8_block, "fp8_block " + std::to_string((*block)[0]) + 'x' + std::to_string((*block)[1]), data.name, std::move(spec));
  }
  static Extents block_grid(Extents shape, std::array<std::int64_t, 2> const& block) {
    int const rank = shape.rank();
    shape[rank - 2] = ceil_div(shape[rank - 2], block[0]);
    shape[rank - 1] = ceil_div(shape[rank - 1], block[1]);
    return shape;
  }
  // What the configuration says; else what was asked for; else the size that everybody uses, if it fits.
  std::optional<std::array<std::int64_t, 2>> block_of(CatalogTensor const& data, CatalogTensor const& scale, quantization::Group const* group) const {
    if (group != nullptr && group->strategy == quantization::Strategy::block && group->block[0] > 0) return group->block;
    if (group != nullptr && group->strategy == quantization::Strategy::group && group->group_size > 0) return std::array<std::int64_t, 2>{1, group->group_size};
    if (config_ && config_->block[0] > 0) return config_->block;
    if (expected_.kind == SchemeKind::fp8_block) return expected_.block;
    constexpr std::array<std::int64_t, 2> usual{128, 128};
    if (scale.shape == block_grid(data.shape, usual)) return usual;
    return std::nullopt;
  }
  quantization::Group const* group_of(std::string const& weight) const {
    if (!config_ || config_->groups.empty()) return nullptr;
    std::string_view const name = weight;
    return quantization::group_for(*config_, name.ends_with(".weight") ? without(name, ".weight") : name);
  }

  void mxfp4_blocks(CatalogTensor const& blocks, std::string const& name, CatalogTensor const& scales) {
    int const rank = blocks.shape.rank() - 1;
    if (rank < 1 || blocks.shape[rank] != 16) wrong(blocks, "its last dimension should be 16, the bytes of 32 codes");
    Extents shape = Extents::filled(rank, 0);
    for (int d = 0; d < rank; ++d) shape[d] = blocks.shape[d];
    expect_dtype(scales, DType::u8, DType::f8_e8m0);
    expect_shape(scales, shape, "one scale for every 16 bytes of " + blocks.name);
    std::uint64_t last = 0;
    if (!checked_multiply(static_cast<std::uint64_t>(shape[rank - 1]), std::uint64_t{32}, last) || last > INT64_MAX) wrong(blocks, "too many columns");
    shape[rank - 1] = static_cast<std::int64_t>(last);
    GroupSpec spec;
    spec.shape = shape;
    spec.kind = Codes::e2m1;
    std::vector<PartAxis> axes = PartGrid::rows(rank, 32).axes;
    axes.push_back({});
    spec.codes = part_of(blocks, PartGrid::along(std::move(axes)));
    spec.scales = part_of(scales, PartGrid::rows(rank, 32));
    spec.scales.dtype = DType::f8_e8m0;
    add(SchemeKind::mxfp4, "mxfp4", name, std::move(spec));
  }
  // The shape of a tensor whose rows hold two codes in a byte.
  static Extents unpacked(CatalogTensor const& data) {
    expect_matrix(data);
    if (data.dtype == DType::f4) return data.shape;
    std::uint64_t columns = 0;
    if (!checked_multiply(static_cast<std::uint64_t>(data.shape[data.shape.rank() - 1]), std::uint64_t{2}, columns) || columns > INT64_MAX) wrong(data, "too many columns");
    return with_last(data.shape, static_cast<std::int64_t>(columns));
  }
  void mxfp4(CatalogTensor const& data, std::string const& name, CatalogTensor const& scales) {
    expect_dtype(data, DType::u8, DType::i8, DType::f4);
    Extents const shape = unpacked(data);
    int const rank = shape.rank();
    if (shape[rank - 1] % 32 != 0) wrong(data, "its " + std::to_string(shape[rank - 1]) + " columns are no whole blocks of 32");
    expect_dtype(scales, DType::u8, DType::f8_e8m0);
    expect_shape(scales, with_last(shape, shape[rank - 1] / 32), "one scale for every 32 columns");
    GroupSpec spec;
    spec.shape = shape;
    spec.kind = Codes::e2m1;
    spec.codes = as_bytes(data, PartGrid::rows(rank, 2));
    spec.scales = part_of(scales, PartGrid::rows(rank, 32));
    spec.scales.dtype = DType::f8_e8m0;
    add(SchemeKind::mxfp4, "mxfp4", name, std::move(spec));
  }
  void nvfp4(CatalogTensor const& data, std::string const& name, CatalogTensor const& scales, CatalogTensor const& second, SecondScale::Kind kind) {
    expect_dtype(data, DType::u8, DType::f4);
    if (kind == SecondScale::Kind::divide && find(name, "_scale_2") != nullptr) wrong(data, "it has both " + second.name + " and " + name + "_scale_2");
    Extents const shape = unpacked(data);
    int const rank = shape.rank();
    if (shape[rank - 1] % 16 != 0) wrong(data, "its " + std::to_string(shape[rank - 1]) + " columns are no whole blocks of 16");
    expect_dtype(scales, DType::f8_e4m3);
    expect_shape(scales, with_last(shape, shape[rank - 1] / 16), "one scale for every 16 columns");
    expect_one(second);
    GroupSpec spec;
    spec.shape = shape;
    spec.kind = Codes::e2m1;
    spec.codes = as_bytes(data, PartGrid::rows(rank, 2));
    spec.scales = part_of(scales, PartGrid::rows(rank, 16));
    spec.rule.zero = true;   // of a block that is small beside the tensor
    spec.second = whole_part(second);
    spec.second_kind = kind;
    add(SchemeKind::nvfp4, "nvfp4", name, std::move(spec));
  }
  void int8(CatalogTensor const& data, CatalogTensor const& scale) {
    expect_matrix(data);
    int const rank = data.shape.rank();
    std::int64_t const columns = data.shape[rank - 1];
    expect_dtype(scale, DType::f32, DType::bf16, DType::f16);
    GroupSpec spec;
    spec.shape = data.shape;
    spec.kind = Codes::i8;
    spec.codes = part_of(data, PartGrid::rows(rank));
    std::int64_t each = 0;   // columns of a group; 0: all
    std::vector<PartAxis> axes;
    for (int d = 0; d < rank - 1; ++d) axes.push_back({d, 1});
    quantization::Group const* const group = group_of(data.name);
    if (scale.shape.elements() == 1 && scale.shape.rank() <= 1) {
      axes.assign(static_cast<std::size_t>(scale.shape.rank()), {});
    } else if (scale.shape.rank() == rank && scale.shape[rank - 1] > 1) {
      std::int64_t const groups = scale.shape[rank - 1];
      each = group != nullptr && group->group_size > 0 ? group->group_size : ceil_div(columns, groups);
      if (each <= 0) wrong(scale, "groups of no column");
      expect_shape(scale, with_last(data.shape, ceil_div(columns, each)), "one scale for every " + std::to_string(each) + " columns");
      axes.push_back({rank - 1, each});
    } else if (scale.shape.rank() == rank) {
      expect_shape(scale, with_last(data.shape, 1), "one scale for every row");
      axes.push_back({});
    } else {
      Extents rows = Extents::filled(rank - 1, 0);
      for (int d = 0; d < rank - 1; ++d) rows[d] = data.shape[d];
      expect_shape(scale, rows, "one scale for every row");
    }
    spec.scales = part_of(scale, PartGrid::along(axes));
    if (auto const* zero = find(data.name, "_zero_point")) {
      expect_dtype(*zero, DType::i8);
      expect_shape(*zero, scale.shape, "a zero point for every scale");
      spec.zeros = part_of(*zero, PartGrid::along(std::move(axes)));
    }
    if (each > 0) add(SchemeKind::int8_group, "int8_group " + std::to_string(each), data.name, std::move(spec));
    else add(SchemeKind::int8_channel, "int8_channel", data.name, std::move(spec));
  }
  void bitsandbytes_int8(CatalogTensor const& data, CatalogTensor const& scale) {
    expect_matrix(data);
    if (data.shape.rank() != 2) wrong(data, "a matrix is expected");
    expect_dtype(scale, DType::f32);
    expect_shape(scale, Extents{data.shape[0]}, "one number for every row");
    GroupSpec spec;
    spec.shape = data.shape;
    spec.kind = Codes::i8;
    spec.codes = part_of(data, PartGrid::rows(2));
    spec.scales = part_of(scale, PartGrid::along({PartAxis{0, 1}}));
    spec.rule.zero = true;
    spec.divisor = 127;
    if (auto const* format = find(without(data.name, "weight"), "weight_format")) {
      // 0: in rows. The others are for kernels of old graphics cards.
      expect_dtype(*format, DType::u8);
      for (std::byte const kind : content_of(*format))
        if (kind != std::byte{0}) throw Error{ErrorCode::unsupported, format->name + ": the layout " + std::to_string(std::to_integer<int>(kind)) + " of " + data.name + " is not supported"};
      parts_.insert(format->name);
    }
    add(SchemeKind::int8_channel, "int8_channel (bitsandbytes)", data.name, std::move(spec));
  }

  void packed(CatalogTensor const& data, std::string_view weight) {
    expect_matrix(data);
    int const rank = data.shape.rank();
    CatalogTensor const& scale = need(data, weight, "_scale");
    CatalogTensor const& shape_tensor = need(data, weight, "_shape");
    expect_dtype(scale, DType::f32, DType::bf16, DType::f16);
    expect_dtype(shape_tensor, DType::i64, DType::i32);
    Bytes const& content = content_of(shape_tensor);
    std::vector<std::int64_t> sizes;
    auto const width = static_cast<std::size_t>(bits_of(shape_tensor.dtype) / 8);
    for (std::size_t at = 0; at + width <= content.size(); at += width) sizes.push_back(width == 8 ? load_little_endian<std::int64_t>(content.data() + at) : load_little_endian<std::int32_t>(content.data() + at));
    if (sizes.size() != static_cast<std::size_t>(rank)) wrong(shape_tensor, "it should hold the " + std::to_string(rank) + " sizes of the tensor");
    for (auto const size : sizes)
      if (size < 0) wrong(shape_tensor, "it holds a negative size");
    Extents const shape{sizes};
    if (!countable(shape)) wrong(shape_tensor, "it says " + to_string(shape) + ", more elements than fit into 63 bits");
    for (int d = 0; d < rank - 1; ++d)
      if (shape[d] != data.shape[d]) wrong(shape_tensor, "it says " + to_string(shape) + ", and the codes are for " + to_string(data.shape));
    quantization::Group const* const group = group_of(std::string{weight});
    int const bits = group != nullptr ? group->bits : 4;
    std::int64_t const columns = shape[rank - 1], dense = columns / 32 * bits + ceil_div(columns % 32 * bits, std::int64_t{32}), low = ceil_div(columns, std::int64_t{32 / bits});
    if (data.shape[rank - 1] != dense && data.shape[rank - 1] != low) wrong(data, std::to_string(columns) + " codes of " + std::to_string(bits) + " bits take " + std::to_string(dense) + " words");
    if (32 % bits != 0 && dense == low) wrong(data, "codes of " + std::to_string(bits) + " bits can lie in so many words in two ways");
    GroupSpec spec;
    spec.shape = shape;
    spec.bits = bits;
    spec.kind = data.shape[rank - 1] == dense && (32 % bits == 0 || dense != low) ? Codes::packed : Codes::packed_low;
    // Codes that cross the ends of words: whole rows, which have no better begin.
    std::vector<PartAxis> axes = PartGrid::rows(rank, 32 / bits).axes;
    bool const crossing = spec.kind == Codes::packed && 32 % bits != 0;
    if (crossing) axes[static_cast<std::size_t>(rank - 1)] = {};
    spec.codes = part_of(data, PartGrid::along(std::move(axes)));
    std::int64_t const groups = scale.shape.rank() == rank ? scale.shape[rank - 1] : 0;
    if (groups <= 0 && columns > 0) wrong(scale, "one number for every group of columns is expected");
    std::int64_t const each = group != nullptr && group->group_size > 0 ? group->group_size : std::max<std::int64_t>(1, ceil_div(columns, std::max<std::int64_t>(1, groups)));
    bool const channel = groups == 1;
    if (!channel) expect_shape(scale, with_last(shape, ceil_div(columns, each)), "one scale for every " + std::to_string(each) + " columns");
    else expect_shape(scale, with_last(shape, 1), "one scale for every row");
    auto const* const index = find(weight, "_g_idx");
    bool const indexed = index != nullptr && group != nullptr && group->act_order;
    std::vector<PartAxis> scale_axes;
    for (int d = 0; d < rank - 1; ++d) scale_axes.push_back({d, 1});
    if (indexed || channel) scale_axes.push_back({});
    else scale_axes.push_back({rank - 1, each});
    spec.scales = part_of(scale, PartGrid::along(scale_axes));
    if (index != nullptr) {
      expect_dtype(*index, DType::i32);
      expect_shape(*index, Extents{columns}, "the group of every column");
      if (indexed) spec.group_index = part_of(*index, PartGrid::along({PartAxis{rank - 1, 1}}));
      else parts_.insert(index->name);
    }
    if (auto const* zero = find(weight, "_zero_point")) {
      expect_dtype(*zero, DType::i32);
      if (32 % bits != 0) wrong(*zero, "zero points of " + std::to_string(bits) + " bits are not supported");
      Extents expected = scale.shape;
      expected[rank - 2] = ceil_div(expected[rank - 2], std::int64_t{32 / bits});
      expect_shape(*zero, expected, "zero points of " + std::to_string(bits) + " bits for every scale, packed along the rows");
      std::vector<PartAxis> zero_axes = scale_axes;
      zero_axes[static_cast<std::size_t>(rank - 2)].each = 32 / bits;
      spec.zeros = part_of(*zero, PartGrid::along(std::move(zero_axes)));
    }
    parts_.insert(shape_tensor.name);
    add(SchemeKind::int4_packed, "int" + std::to_string(bits) + "_packed" + (channel ? std::string{" channel"} : " group " + std::to_string(each)), std::string{weight}, std::move(spec));
  }

  void transposed(CatalogTensor const& codes, std::string_view module) {
    bool const awq = says(Method::awq) || (!config_ && expected_.kind == SchemeKind::awq), gptq = says(Method::gptq) || (!config_ && expected_.kind == SchemeKind::gptq);
    if (!awq && !gptq) {
      Error error{ErrorCode::quant_mismatch, codes.name + ": GPTQ and AWQ store tensors of this name, and no configuration says which of them it is"};
      throw error.with_hint("put the model's config.json or quantize_config.json beside its files");
    }
    CatalogTensor const &zeros = need(codes, module, ".qzeros"), &scales = need(codes, module, ".scales");
    expect_dtype(codes, DType::i32);
    expect_dtype(zeros, DType::i32);
    expect_dtype(scales, DType::f16, DType::bf16, DType::f32);
    if (codes.shape.rank() != 2) wrong(codes, "a matrix is expected");
    if (scales.shape.rank() != 2) wrong(scales, "a matrix is expected");
    TransposedSpec spec;
    spec.bits = config_ && config_->bits != 0 ? config_->bits : 4;
    if (spec.bits != 4 && (awq || (spec.bits != 8 && spec.bits != 2))) throw Error{ErrorCode::unsupported, codes.name + ": " + (awq ? "AWQ" : "GPTQ") + " with " + std::to_string(spec.bits) + " bits is not supported"};
    if (codes.shape[0] > INT64_MAX / 64 || codes.shape[1] > INT64_MAX / 64) wrong(codes, "too many elements");
    std::int64_t const per = 32 / spec.bits, inputs = awq ? codes.shape[0] : codes.shape[0] * per, outputs = awq ? codes.shape[1] * per : codes.shape[1];
    std::uint64_t product = 0;
    if (!checked_multiply(static_cast<std::uint64_t>(inputs), static_cast<std::uint64_t>(outputs), product) || product > INT64_MAX) wrong(codes, "too many elements");
    spec.shape = Extents{outputs, inputs};
    spec.interleaved = awq;
    spec.stored_zero_plus = !awq && (!config_ || config_->stored_zero_is_one_less) ? 1 : 0;
    std::int64_t const size = config_ && config_->group_size != 0 ? config_->group_size : inputs / std::max<std::int64_t>(1, scales.shape[0]);
    spec.group = size <= 0 ? std::max<std::int64_t>(1, inputs) : size;
    if (awq && inputs % spec.group != 0) wrong(codes, "its " + std::to_string(inputs) + " inputs are no whole groups of " + std::to_string(spec.group));
    std::int64_t const groups = ceil_div(inputs, spec.group);
    expect_shape(scales, Extents{groups, outputs}, std::to_string(inputs) + " inputs in groups of " + std::to_string(spec.group));
    expect_shape(zeros, Extents{groups, ceil_div(outputs, per)}, "a zero point of " + std::to_string(spec.bits) + " bits for every scale");
    if (outputs % per != 0) wrong(codes, "its " + std::to_string(outputs) + " outputs do not fill whole words of zero points");
    auto const* const index = awq ? nullptr : find(module, ".g_idx");
    bool const act_order = index != nullptr && (!config_ || config_->act_order);
    spec.codes = part_of(codes, awq ? PartGrid::along({PartAxis{1, 1}, PartAxis{0, per}}) : PartGrid::along({PartAxis{1, per}, PartAxis{0, 1}}));
    // In the order of the inputs' importance, any input may be in any group.
    PartAxis const group_axis = act_order ? PartAxis{} : PartAxis{1, spec.group};
    spec.zeros = part_of(zeros, PartGrid::along({group_axis, PartAxis{0, per}}));
    spec.scales = part_of(scales, PartGrid::along({group_axis, PartAxis{0, 1}}));
    if (index != nullptr) {
      expect_dtype(*index, DType::i32);
      expect_shape(*index, Extents{inputs}, "the group of every input");
      spec.group_index = part_of(*index, PartGrid::along({PartAxis{1, 1}}));
    }
    spec.scheme = (awq ? "awq " : "gptq ") + std::to_string(spec.bits) + " bits group " + std::to_string(spec.group) + (act_order ? " act-order" : "");
    Extents const shape = spec.shape;
    add(awq ? SchemeKind::awq : SchemeKind::gptq, std::string{module} + ".weight", shape, std::make_shared<TransposedEncoding<>>(spec));
  }

  void bitsandbytes(CatalogTensor const& data, std::string const& state_name) {
    std::string const name = data.name;
    JsonTree const tree = JsonTree::parse(content_of(*find(state_name)), state_name);
    JsonValue const state = tree.root();
    auto const said = [&](auto const& read) {
      try {
        return read();
      } catch (Error const& error) {
        throw Error{error.code(), state_name + ": " + error.message()};
      }
    };
    auto const number = [&](std::string_view key) { return said([&] { return state.at(key).template number<std::int64_t>(); }); };
    CatalogTensor const &absmax = need(data, name, ".absmax"), &table = need(data, name, ".quant_map");
    std::vector<std::int64_t> sizes;
    said([&] {
      for (auto const& size : state.at("shape").items()) sizes.push_back(size.template number<std::int64_t>());
    });
    for (auto const size : sizes)
      if (size < 0) wrong(data, state_name + " has a negative size");
    FlatSpec spec;
    spec.shape = Extents{sizes};
    if (!countable(spec.shape)) wrong(data, state_name + " says " + to_string(spec.shape) + ", more elements than fit into 63 bits");
    spec.block = number("blocksize");
    std::string const type = said([&] { return std::string{state.at("quant_type").text()}; });
    if (type != "nf4" && type != "fp4") throw Error{ErrorCode::unsupported, state_name + ": the type " + json_quoted(type) + " is not supported"};
    if (spec.block < 32 || spec.block > 4096 || (spec.block & (spec.block - 1)) != 0) wrong(data, state_name + " says blocks of " + std::to_string(spec.block) + ", which is no power of two from 32 to 4096");
    std::int64_t const elements = spec.shape.elements(), bytes = elements / 2 + elements % 2, blocks = ceil_div(elements, spec.block);
    if (bits_of(data.dtype) < 8 || bytes_of(data.dtype, data.shape.elements()) != static_cast<std::uint64_t>(bytes)) wrong(data, "the codes of " + to_string(spec.shape) + " take " + std::to_string(bytes) + " bytes");
    expect_dtype(table, DType::f32);
    expect_shape(table, Extents{16}, "a value for every code");
    int const rank = spec.shape.rank();
    std::int64_t const columns = rank == 0 ? 1 : spec.shape[rank - 1];
    // Where a row has whole blocks, codes and scales can be seen in rows as well, and parts of rows be read.
    bool const in_rows = rank > 0 && columns % spec.block == 0 && data.pieces.size() == 1 && absmax.pieces.size() == 1;
    auto const part = [&](CatalogTensor const& tensor, DType dtype, std::int64_t count, std::int64_t each) {
      EncodedPart p{tensor.name, dtype, Extents{count}, PartGrid::flat(each)};
      if (in_rows) p.shape = with_last(spec.shape, columns / each), p.grid = PartGrid::rows(rank, each);
      return p;
    };
    spec.codes = part(data, DType::u8, bytes, 2);
    bool const nested = absmax.dtype == DType::u8;
    if (!nested) expect_dtype(absmax, DType::f32);
    if (absmax.shape.elements() != blocks) wrong(absmax, std::to_string(blocks) + " numbers are expected, one for every block");
    spec.scales = part(absmax, absmax.dtype, blocks, spec.block);
    spec.table = whole_part(table);
    if (nested) {
      CatalogTensor const &outer = need(data, name, ".nested_absmax"), &map = need(data, name, ".nested_quant_map");
      spec.nested_block = number("nested_blocksize");
      double const offset = said([&] { return state.at("nested_offset").template number<double>(); });
      spec.nested_offset = static_cast<float>(offset);
      if (!std::isfinite(spec.nested_offset)) wrong(data, state_name + " has an infinite offset");
      if (spec.nested_block < 1 || spec.nested_block > (1 << 20)) wrong(data, state_name + " says blocks of " + std::to_string(spec.nested_block) + " scales");
      expect_dtype(outer, DType::f32);
      expect_dtype(map, DType::f32);
      expect_shape(outer, Extents{ceil_div(blocks, spec.nested_block)}, "one number for every " + std::to_string(spec.nested_block) + " scales");
      expect_shape(map, Extents{256}, "a value for every code of a scale");
      spec.nested_scales = part_of(outer, PartGrid::flat(spec.block * spec.nested_block));
      spec.nested_table = whole_part(map);
    }
    parts_.insert(state_name);
    spec.scheme = type + " block " + std::to_string(spec.block) + (nested ? " nested" : "");
    Extents const shape = spec.shape;
    add(SchemeKind::nf4, name, shape, std::make_shared<FlatEncoding<>>(spec));
  }

  // ---- what was found

  void add(SchemeKind kind, std::string scheme, std::string const& name, GroupSpec spec) {
    spec.scheme = std::move(scheme);
    Extents const shape = spec.shape;
    add(kind, name, shape, std::make_shared<GroupEncoding<>>(spec));
  }
  void add(SchemeKind kind, std::string const& name, Extents const& shape, std::shared_ptr<Encoding const> encoding) {
    if (expected_.kind != SchemeKind::any && expected_.kind != kind) {
      Error error{ErrorCode::quant_mismatch, name + ": it is stored as " + encoding->scheme() + ", and " + std::string{to_string(expected_.kind)} + " was asked for"};
      throw error.with_hint("AnyScheme takes what is there");
    }
    CatalogTensor made{name, DType::f32, shape, {}, {}};
    for (auto const& part : encoding->parts()) {
      CatalogTensor const& stored = *find(part.name);
      parts_.insert(part.name);
      std::vector<StoredPiece> pieces = stored.pieces;
      if (!(part.shape == stored.shape)) {
        // Seen in another shape: whole, or not at all.
        if (bits_of(stored.dtype) < 8) {
          int const last = stored.shape.rank() - 1;
          for (auto& piece : pieces) {
            if (piece.box.shape[last] % 2 != 0 || piece.box.origin[last] % 2 != 0) wrong(stored, "a piece of it begins or ends inside a byte");
            piece.box.shape[last] /= 2, piece.box.origin[last] /= 2;
          }
        } else {
          if (pieces.size() != 1) wrong(stored, "it is stored in pieces, and can be decoded only if it is whole");
          pieces[0].box = Box::whole(part.shape);
        }
      }
      made.parts.push_back(std::move(pieces));
    }
    made.encoding = std::move(encoding);
    made_.push_back(std::move(made));
  }

  Catalog& catalog_;
  std::map<std::string, Bytes> contents_;
  std::optional<quantization::Config> config_;
  ExpectedScheme expected_;
  Problems problems_;
  std::set<std::string> parts_;
  std::vector<CatalogTensor> made_;
};

}  // namespace detail
}  // namespace dcp
