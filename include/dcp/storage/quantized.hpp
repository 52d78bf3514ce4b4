// SPDX-License-Identifier: Apache-2.0
#pragma once
// Checkpoints whose tensors are stored in eight or four bits, as the ecosystem writes them: a storage over a storage. A quantized tensor is one
// tensor of the name, shape and values that it has in a model; what it is made of (codes, scales, zero points) is found over the whole
// checkpoint, read for a rank's own box, and decoded on the way.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/formats/quantization_config.hpp>
#include <dcp/storage/quantized_names.hpp>
#include <dcp/storage/quantizer.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/storage.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace dcp {

namespace detail {
template <std::int64_t Size>
struct block_size_is_positive {
  static_assert(Size > 0, "dcp: a quantization block of no element; its sizes count rows and columns, from 1 up");
};
}  // namespace detail

// ---- schemes: how values become codes. What is written and how exact it is stands with each; `amax` is the largest magnitude of a group.

/// E4M3 with a scale for every block of Rows x Columns (DeepSeek-V3: weight, weight_scale_inv). Reads E5M2 and scales of any float or power of two, too.
/// Writes    scale amax / 448; |error| <= amax / 28
template <std::int64_t Rows = 128, std::int64_t Columns = 128>
struct Fp8Block : detail::block_size_is_positive<Rows>, detail::block_size_is_positive<Columns> {
  static constexpr ExpectedScheme expected{SchemeKind::fp8_block, {Rows, Columns}};
};
template <std::int64_t Size>
struct Fp8Block<Size, Size> : detail::block_size_is_positive<Size> {
  static constexpr ExpectedScheme expected{SchemeKind::fp8_block, {Size, Size}};
};
/// E4M3 with one scale for the tensor (compressed-tensors, vLLM: weight, weight_scale).
/// Writes    scale amax / 448; |error| <= amax / 28
struct Fp8Tensor {
  static constexpr ExpectedScheme expected{SchemeKind::fp8_tensor};
};
/// E4M3 with a scale for every row.
/// Writes    scale amax / 448; |error| <= amax / 28
struct Fp8Channel {
  static constexpr ExpectedScheme expected{SchemeKind::fp8_channel};
};
/// E4M3 with a power of two for every 32 columns (OCP Microscaling).
/// Writes    the rule of compressed-tensors; |error| <= amax / 14
struct Mxfp8 {
  static constexpr ExpectedScheme expected{SchemeKind::mxfp8};
};
/// E2M1 with a power of two for every 32 columns (OCP Microscaling; gpt-oss: _blocks, _scales; compressed-tensors: weight_packed, weight_scale).
/// Writes    compressed-tensors' spelling, and that of gpt-oss for names that do not end in "weight"; its EVEN rule: |error| <= amax / 5
struct Mxfp4 {
  static constexpr ExpectedScheme expected{SchemeKind::mxfp4};
};
/// E2M1 with a scale in E4M3 for every 16 columns and one for the tensor (ModelOpt, compressed-tensors).
/// Writes    ModelOpt's spelling; |error| <= amax / 5 where the block's scale is no subnormal E4M3, else 0.34 amax
struct Nvfp4 {
  static constexpr ExpectedScheme expected{SchemeKind::nvfp4};
};
/// Integers of eight bits with a scale for every row, or for the tensor (compressed-tensors: int-quantized; bitsandbytes: SCB).
/// Writes    symmetric, scale amax / 127.5; |error| <= 0.51 scale
struct Int8Channel {
  static constexpr ExpectedScheme expected{SchemeKind::int8_channel};
};
/// Integers of eight bits with a scale for every QuantizedOptions::group columns.
/// Writes    as Int8Channel
struct Int8Group {
  static constexpr ExpectedScheme expected{SchemeKind::int8_group};
};
/// Integers of four bits (reads one to eight) in words of 32 (compressed-tensors: weight_packed, weight_scale, weight_shape).
/// Writes    symmetric, groups of QuantizedOptions::group columns, scale amax / 7.5; |error| <= 0.51 scale
struct Int4Packed {
  static constexpr ExpectedScheme expected{SchemeKind::int4_packed};
};
/// GPTQ's layout (qweight, qzeros, scales, g_idx), of 2, 4 and 8 bits, in any order of inputs.
/// Writes    rounded to nearest: four bits, symmetric, groups of QuantizedOptions::group inputs, scales in half precision; |error| <= 0.51 scale
struct Gptq {
  static constexpr ExpectedScheme expected{SchemeKind::gptq};
};
/// AWQ's layout (gemm). Read only: what its authors round depends on activations.
struct Awq {
  static constexpr ExpectedScheme expected{SchemeKind::awq};
};
/// bitsandbytes' four bits (nf4 and fp4), with scales quantized or not. Read only.
struct Nf4 {
  static constexpr ExpectedScheme expected{SchemeKind::nf4};
};
/// Whatever is found, for each tensor. Read only.
struct AnyScheme {
  static constexpr ExpectedScheme expected{SchemeKind::any};
};

/// Whether save can write a scheme.
constexpr bool is_writable(SchemeKind kind) { return kind != SchemeKind::any && kind != SchemeKind::awq && kind != SchemeKind::nf4; }

/// Whether a tensor is to be quantized: by its name, dtype and global shape. Must say the same on every rank.
using QuantizePredicate = std::function<bool(std::string_view name, DType dtype, Extents const& shape)>;

/// What is quantized if nothing else is said: matrices (and stacks of them) of floats whose name ends in "weight", but no embeddings, norms, routers
/// and output heads.
template <class = Deferred>
bool quantize_by_default(std::string_view name, DType dtype, Extents const& shape) {
  if (!is_wide_float(dtype) || shape.rank() < 2 || (name != "weight" && !name.ends_with(".weight"))) return false;
  constexpr std::array<std::string_view, 5> kept{"embed", "norm", "lm_head", "router", "wte"};
  for (std::string_view const part : kept)
    if (name.find(part) != std::string_view::npos) return false;
  return !name.ends_with(".gate.weight");   // a router's
}

namespace detail {

/// What a driver is told, whatever the base.
struct QuantizedSettings {
  ExpectedScheme expected{};
  QuantizePredicate quantize{};
  std::int64_t group = 128;
};

template <class D = Deferred>
class QuantizedDriver final : public AnyStorage {
 public:
  QuantizedDriver(std::unique_ptr<AnyStorage> base, QuantizedSettings settings) : base_{std::move(base)}, settings_{std::move(settings)} {
    if (settings_.group < 1 || settings_.group > (1 << 20)) throw Error{ErrorCode::invalid_argument, "groups of " + std::to_string(settings_.group) + " columns"};
  }

  // Files are those of the base, and so is what a record says of them.
  std::string_view name() const override { return base_->name(); }
  std::string file_layout() const override { return base_->file_layout(); }
  std::vector<RecordGroup> groups() const override { return base_->groups(); }
  std::vector<std::pair<std::string, Bytes>> extra_files() const override { return base_->extra_files(); }
  std::string options_text() const override {
    auto const [rows, columns] = settings_.expected.block;
    return base_->options_text() + " scheme=" + std::string{to_string(settings_.expected.kind)} + (rows > 0 ? ' ' + std::to_string(rows) + 'x' + std::to_string(columns) : "") + " group=" + std::to_string(settings_.group);
  }
  FilePlan plan_files(SaveRequest const& request) const override { return base_->plan_files(request); }

  Scan scan(AnyMedium& medium, std::string const& path, CommitRecord const* record) const override {
    Scan scan = base_->scan(medium, path, record);
    constexpr std::array<std::string_view, 3> names{config_name, quantize_config_name, hf_quant_config_name};
    for (std::string_view const name : names) {
      std::string const file = scan.directory + '/' + std::string{name};
      if (medium.kind(file) != EntryKind::file) continue;
      Bytes const text = read_file(medium, file, quantization::max_config_bytes);
      scan.texts.emplace_back(std::string{name}, std::string{as_text(text)});
    }
    return scan;
  }
  FoundFile read_header(AnyMedium& medium, Scan const& scan, std::string const& file) const override {
    FoundFile found = base_->read_header(medium, scan, file);
    std::unique_ptr<ReadableFile> in;
    for (auto& tensor : found.tensors) {
      if (!describes_others(tensor)) continue;
      std::string const path = scan.directory + '/' + file;
      try {
        if (!in) in = medium.open_read(path);
        tensor.content.resize(static_cast<std::size_t>(bytes_of(tensor.dtype, tensor.shape.elements())));
        in->read_at(tensor.offset, tensor.content);
      } catch (Error& error) {
        throw error.with_path(path);
      }
    }
    return found;
  }
  Catalog assemble(Scan const& scan, std::vector<FoundFile> found, CommitRecord const* record) const override {
    std::map<std::string, Bytes> contents;
    for (auto& file : found) {
      std::string const prefix = record == nullptr ? std::string{} : prefix_of(file.path, record->groups);
      for (auto& tensor : file.tensors)
        if (describes_others(tensor)) contents[prefix + tensor.name] = std::move(tensor.content);
    }
    Catalog catalog = base_->assemble(scan, std::move(found), record);
    QuantizedFinder<>{catalog, std::move(contents), config_of(scan), settings_.expected}.run();
    return catalog;
  }

  std::shared_ptr<Recoding> recoding(std::vector<TensorSpec> const& tensors) const override {
    if (base_->file_layout() != "final") throw Error{ErrorCode::unsupported, "quantized tensors are written whole: the layout of files must be final"};
    auto recoding = std::make_shared<Recoding>();
    Problems problems;
    auto const groups = base_->groups();
    std::vector<std::string> kept;
    for (std::uint32_t t = 0; t < tensors.size(); ++t) {
      TensorSpec const& tensor = tensors[t];
      bool const wanted = settings_.quantize ? settings_.quantize(tensor.name, tensor.dtype, tensor.layout.shape) : quantize_by_default(tensor.name, tensor.dtype, tensor.layout.shape);
      if (!wanted || tensor.layout.shape.empty()) {
        recoding->keep(t, tensor);
        if (tensor.layout.shape.rank() == 2 && tensor.name.ends_with(".weight")) kept.push_back(module_of(name_in_file(tensor.name, groups)));
        continue;
      }
      try {
        recoding->encode(t, quantizer_of(tensor));
      } catch (Error const& error) {
        problems.add(error.code(), error.message());
        problems.hint("QuantizedOptions::quantize says which tensors are quantized");
      }
    }
    problems.raise();
    recoding->finish();
    recoding->model_config = quantization::write_config(config_to_write(std::move(kept)));
    return recoding;
  }
  void describe(Recoding const& recoding, std::vector<std::pair<std::string, Bytes>>& files) const override {
    if (recoding.encoded().empty()) return;
    auto const at = std::find_if(files.begin(), files.end(), [](auto const& file) { return file.first == config_name; });
    std::string const text = quantization::with_quantization_config(at == files.end() ? ConstByteSpan{} : ConstByteSpan{at->second}, recoding.model_config);
    auto const bytes = as_byte_span(text);
    if (at == files.end()) files.emplace_back(std::string{config_name}, Bytes(bytes.begin(), bytes.end()));
    else at->second.assign(bytes.begin(), bytes.end());
  }

 private:
  static constexpr std::string_view config_name = "config.json", quantize_config_name = "quantize_config.json", hf_quant_config_name = "hf_quant_config.json";

  static std::string module_of(std::string_view weight) { return std::string{weight.ends_with(".weight") ? weight.substr(0, weight.size() - 7) : weight}; }
  static std::string_view name_in_file(std::string_view name, std::vector<RecordGroup> const& groups) {
    for (auto const& group : groups)
      if (under_prefix(name, group.prefix)) return group.strip && !group.prefix.empty() && name.size() > group.prefix.size() ? name.substr(group.prefix.size() + 1) : name;
    return name;
  }
  static std::string prefix_of(std::string const& path, std::vector<RecordGroup> const& groups) {
    auto const slash = path.rfind('/');
    std::string const directory = slash == std::string::npos ? "" : path.substr(0, slash);
    for (auto const& group : groups)
      if (group.strip && !group.prefix.empty() && group.directory == directory) return group.prefix + '.';
    return {};
  }

  static std::optional<quantization::Config> config_of(Scan const& scan) {
    std::optional<quantization::Config> config;
    for (auto const& [name, text] : scan.texts) {
      try {
        auto const bytes = as_byte_span(text);
        if (name == config_name) config = quantization::parse_config(bytes);
        else if (!config) config = name == quantize_config_name ? quantization::parse_quantize_config(bytes) : quantization::parse_hf_quant_config(bytes);
      } catch (Error& error) {
        throw error.with_path(scan.directory + '/' + name);
      }
    }
    return config;
  }

  // ---- what is written

  [[noreturn]] static void wrong(TensorSpec const& tensor, std::string const& sentence) { throw Error{ErrorCode::invalid_argument, tensor.name + ' ' + detail::describe(tensor.dtype, tensor.layout.shape) + ": " + sentence}; }

  std::unique_ptr<Quantizer> quantizer_of(TensorSpec const& tensor) const {
    Extents const& shape = tensor.layout.shape;
    int const rank = shape.rank();
    SchemeKind const kind = settings_.expected.kind;
    if (!is_wide_float(tensor.dtype)) wrong(tensor, "is to be quantized, and holds no floats");
    if (rank < 1 || (rank < 2 && kind != SchemeKind::fp8_tensor)) wrong(tensor, "is to be quantized as " + std::string{to_string(kind)} + ", which is for matrices");
    std::int64_t const columns = shape[rank - 1];
    auto const whole_groups = [&](std::int64_t each) {
      if (columns % each != 0) wrong(tensor, "its " + std::to_string(columns) + " columns are no whole groups of " + std::to_string(each));
    };
    GroupQuantizerSpec spec;
    spec.name = tensor.name;
    spec.dtype = tensor.dtype;
    spec.shape = shape;
    spec.group.assign(static_cast<std::size_t>(rank), 1);
    std::int64_t& along = spec.group[static_cast<std::size_t>(rank - 1)];
    spec.codes = {tensor.name, DType::f8_e4m3, shape, PartGrid::rows(rank, 1)};
    bool const is_weight = tensor.name.ends_with("weight");
    switch (kind) {
      case SchemeKind::fp8_block: {
        spec.group[static_cast<std::size_t>(rank - 2)] = settings_.expected.block[0];
        along = settings_.expected.block[1];
        Extents grid = shape;
        PartGrid axes = PartGrid::rows(rank, along);
        axes.axes[static_cast<std::size_t>(rank - 2)].each = settings_.expected.block[0];
        for (int d = 0; d < rank; ++d) grid[d] = ceil_div(shape[d], spec.group[static_cast<std::size_t>(d)]);
        spec.scales = {tensor.name + "_scale_inv", DType::f32, grid, std::move(axes)};
        break;
      }
      case SchemeKind::fp8_tensor:
        for (int d = 0; d < rank; ++d) spec.group[static_cast<std::size_t>(d)] = shape[d];
        spec.scales = {tensor.name + "_scale", DType::f32, Extents{1}, PartGrid::along({PartAxis{}})};
        break;
      case SchemeKind::fp8_channel:
      case SchemeKind::int8_channel: {
        along = columns;
        PartGrid axes = PartGrid::rows(rank, 1);
        axes.axes[static_cast<std::size_t>(rank - 1)] = {};
        spec.scales = {tensor.name + "_scale", DType::f32, with_last(shape, 1), std::move(axes)};
        if (kind == SchemeKind::int8_channel) spec.code = CodeForm::i8, spec.codes.dtype = DType::i8;
        break;
      }
      case SchemeKind::int8_group:
        along = settings_.group;
        whole_groups(along);
        if (columns == along) wrong(tensor, "its " + std::to_string(columns) + " columns are one group; Int8Channel says that");
        spec.code = CodeForm::i8;
        spec.codes.dtype = DType::i8;
        spec.scales = {tensor.name + "_scale", DType::f32, with_last(shape, columns / along), PartGrid::rows(rank, along)};
        break;
      case SchemeKind::mxfp8:
        along = 32;
        whole_groups(32);
        spec.scale = ScaleForm::e8m0;
        spec.scales = {tensor.name + "_scale", DType::u8, with_last(shape, columns / 32), PartGrid::rows(rank, 32)};
        break;
      case SchemeKind::mxfp4:
        along = 32;
        whole_groups(32);
        spec.code = CodeForm::e2m1;
        spec.packing = CodePacking::nibbles;
        spec.scale = ScaleForm::e8m0;
        if (is_weight) {
          spec.codes = {tensor.name + "_packed", DType::u8, with_last(shape, columns / 2), PartGrid::rows(rank, 2)};
          spec.scales = {tensor.name + "_scale", DType::u8, with_last(shape, columns / 32), PartGrid::rows(rank, 32)};
        } else {
          std::vector<std::int64_t> sizes{shape.begin(), shape.end()};
          sizes.back() = columns / 32;
          sizes.push_back(16);
          PartGrid axes = PartGrid::rows(rank, 32);
          axes.axes.push_back({});
          spec.codes = {tensor.name + "_blocks", DType::u8, Extents{sizes}, std::move(axes)};
          spec.scales = {tensor.name + "_scales", DType::u8, with_last(shape, columns / 32), PartGrid::rows(rank, 32)};
        }
        break;
      case SchemeKind::nvfp4:
        along = 16;
        whole_groups(16);
        spec.code = CodeForm::e2m1;
        spec.packing = CodePacking::nibbles;
        spec.scale = ScaleForm::e4m3_of_tensor;
        spec.codes = {tensor.name, DType::u8, with_last(shape, columns / 2), PartGrid::rows(rank, 2)};
        spec.scales = {tensor.name + "_scale", DType::f8_e4m3, with_last(shape, columns / 16), PartGrid::rows(rank, 16)};
        spec.constants.push_back({{tensor.name + "_scale_2", DType::f32, Extents{}, PartGrid::along({})}, ConstantForm::none});
        spec.tensor_scale = true;
        break;
      case SchemeKind::int4_packed:
        along = settings_.group;
        whole_groups(along);
        if (!is_weight) wrong(tensor, "is to be quantized as int4_packed, whose names end in \"weight\"");
        spec.code = CodeForm::int4;
        spec.packing = CodePacking::nibbles;
        spec.codes = {tensor.name + "_packed", DType::i32, with_last(shape, ceil_div(columns, std::int64_t{8})), PartGrid::rows(rank, 8)};
        spec.scales = {tensor.name + "_scale", DType::f32, with_last(shape, columns / along), PartGrid::rows(rank, along)};
        spec.constants.push_back({{tensor.name + "_shape", DType::i64, Extents{rank}, PartGrid::along({PartAxis{}})}, ConstantForm::shape_i64});
        break;
      case SchemeKind::gptq: {
        if (rank != 2 || !tensor.name.ends_with(".weight")) wrong(tensor, "is to be quantized as gptq, which is for matrices whose names end in \".weight\"");
        along = settings_.group;
        whole_groups(along);
        std::int64_t const outputs = shape[0], groups = columns / along;
        if (columns % 8 != 0 || outputs % 8 != 0) wrong(tensor, "GPTQ packs eight inputs and eight outputs into words");
        if (along % 8 != 0) wrong(tensor, "groups of " + std::to_string(along) + " inputs do not fill words");
        std::string const module = module_of(tensor.name);
        spec.code = CodeForm::int4;
        spec.packing = CodePacking::transposed_words;
        spec.scale = ScaleForm::f16;
        spec.codes = {module + ".qweight", DType::i32, Extents{columns / 8, outputs}, PartGrid::along({PartAxis{1, 8}, PartAxis{0, 1}})};
        spec.scales = {module + ".scales", DType::f16, Extents{groups, outputs}, PartGrid::along({PartAxis{1, along}, PartAxis{0, 1}})};
        spec.constants.push_back({{module + ".qzeros", DType::i32, Extents{groups, outputs / 8}, PartGrid::along({PartAxis{1, along}, PartAxis{0, 8}})}, ConstantForm::zero_points});
        spec.constants.push_back({{module + ".g_idx", DType::i32, Extents{columns}, PartGrid::along({PartAxis{1, 1}})}, ConstantForm::group_index});
        break;
      }
      default: throw Error{ErrorCode::unsupported, std::string{to_string(kind)} + " cannot be written"};
    }
    return std::make_unique<GroupQuantizer<>>(spec);
  }

  quantization::Config config_to_write(std::vector<std::string> kept) const {
    using quantization::Method, quantization::Strategy;
    quantization::Config config;
    config.ignore = std::move(kept);
    quantization::Group group;
    group.targets = {"Linear"};
    auto const compressed = [&](char const* format, int bits, bool is_float, Strategy strategy, std::int64_t size) {
      config.method = Method::compressed_tensors;
      config.format = group.format = format;
      group.bits = bits;
      group.is_float = is_float;
      group.strategy = strategy;
      group.group_size = size;
      config.groups = {group};
    };
    switch (settings_.expected.kind) {
      case SchemeKind::fp8_block: config.method = Method::fp8, config.block = settings_.expected.block; break;
      case SchemeKind::fp8_tensor: compressed("float-quantized", 8, true, Strategy::tensor, 0); break;
      case SchemeKind::fp8_channel: compressed("float-quantized", 8, true, Strategy::channel, 0); break;
      case SchemeKind::mxfp8: compressed("mxfp8-quantized", 8, true, Strategy::group, 32); break;
      case SchemeKind::mxfp4: compressed("mxfp4-pack-quantized", 4, true, Strategy::group, 32); break;
      case SchemeKind::nvfp4: config.method = Method::modelopt, config.algorithm = "NVFP4", config.group_size = 16; break;
      case SchemeKind::int8_channel: compressed("int-quantized", 8, false, Strategy::channel, 0); break;
      case SchemeKind::int8_group: compressed("int-quantized", 8, false, Strategy::group, settings_.group); break;
      case SchemeKind::int4_packed: compressed("pack-quantized", 4, false, Strategy::group, settings_.group); break;
      case SchemeKind::gptq: config.method = Method::gptq, config.bits = 4, config.group_size = settings_.group; break;
      default: break;
    }
    return config;
  }

  std::unique_ptr<AnyStorage> base_;
  QuantizedSettings settings_;
};

template <class Scheme>
inline constexpr bool is_scheme = requires { { Scheme::expected } -> std::convertible_to<ExpectedScheme>; };
template <class Scheme>
constexpr bool is_written() {
  if constexpr (is_scheme<Scheme>) return is_writable(Scheme::expected.kind);
  else return true;   // what is wrong with it is said elsewhere
}
template <bool IsScheme>
struct a_scheme {
  static_assert(IsScheme, "dcp: Quantized<Scheme, Base> needs a scheme first - dcp::Fp8Block<128, 128>, dcp::Mxfp4, dcp::AnyScheme, ...");
};
template <bool IsStorage>
struct base_is_a_storage {
  static_assert(IsStorage, "dcp: Quantized<Scheme, Base> needs a storage as its Base, over which the quantized tensors lie - dcp::SafeTensors, for one");
};
}  // namespace detail

template <class Base>
struct QuantizedOptions {
  typename detail::options_of<Base>::type base = {};
  QuantizePredicate quantize = {};   // of a save; empty: quantize_by_default
  std::int64_t group = 128;          // columns of a group where the scheme leaves it open
};

/// Quantized tensors over `Base`. Place: that of Base.
///
/// Load      into float, bf16, f16 or double tensors of any placement; a rank reads only what its own box needs, and a box has, bit for bit, the values
///           of the whole. A tensor of the stored dtype, shape and name gets the stored bytes instead, unless these are floats
/// Save      the tensors that options.quantize names are quantized while they are written, the others stored as they are; config.json says how
/// Throws    Error(quant_mismatch) for tensors that do not fit together or are in another scheme, all of them listed
/// Example   dcp::load<dcp::Quantized<dcp::Mxfp4, dcp::SafeTensors>>(world, "base-model", state);
template <class Scheme, class Base>
struct Quantized {
  using Place = typename detail::place_of<Base>::type;
  using Options = QuantizedOptions<Base>;
  static constexpr bool writable = detail::is_written<Scheme>();
  template <class D = Deferred>
  static std::unique_ptr<AnyStorage> open(Options const& options) {
    [[maybe_unused]] detail::a_scheme<detail::is_scheme<Scheme>> scheme;
    [[maybe_unused]] detail::base_is_a_storage<Storage<Base>> base;
    if constexpr (detail::is_scheme<Scheme> && Storage<Base>) return std::make_unique<detail::QuantizedDriver<D>>(Base::open(options.base), detail::QuantizedSettings{Scheme::expected, options.quantize, options.group});
    else return nullptr;
  }
  static PlaceRef locate(Place const& place) {
    if constexpr (Storage<Base>) return Base::locate(place);
    else return {};
  }
};

}  // namespace dcp
