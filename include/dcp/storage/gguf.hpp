// SPDX-License-Identifier: Apache-2.0
#pragma once
// GGUF, the files of llama.cpp and its relatives: tensors in blocks of a few bits, and metadata. Read in all block types that
// formats/gguf_blocks.hpp decodes, split or not; written as one file.

#include <dcp/base/algorithms.hpp>
#include <dcp/base/config.hpp>
#include <dcp/formats/block_codecs.hpp>
#include <dcp/formats/gguf.hpp>
#include <dcp/formats/gguf_blocks.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/quantizer.hpp>
#include <dcp/storage/safetensors.hpp>
#include <dcp/storage/storage.hpp>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dcp {

struct GgufOptions {
  // Of a save.
  std::string quantize_to = {};                // "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"; empty: tensors are stored as they are
  QuantizePredicate quantize = {};             // which tensors; empty: quantize_by_default
  std::string architecture = "unknown";        // general.architecture, where the state has no value of this name
  std::uint64_t alignment = 32;                // of tensors in the file: a power of two
  // Reading what others wrote: each gives up one refusal.
  bool allow_trailing_bytes = false;           // behind the last tensor of a file
  bool allow_missing_final_padding = false;    // of the last tensor
};

namespace detail {

/// A tensor in blocks of one of GGUF's types.
template <class D = Deferred>
class GgufEncoding final : public Encoding {
 public:
  GgufEncoding(std::string name, std::uint32_t type, Extents const& shape)
      : Encoding{"gguf " + std::string{gguf::type_facts(type)->name}, shape, std::vector<EncodedPart>(1, part_of(std::move(name), *gguf::type_facts(type), shape))}, type_{type}, facts_{*gguf::type_facts(type)} {}

  /// As it is stored: the last dimension in blocks, and the bytes of one.
  static Extents stored_shape(gguf::TypeFacts const& facts, Extents const& shape) {
    std::vector<std::int64_t> sizes{shape.begin(), shape.end()};
    sizes.back() /= facts.elements;
    sizes.push_back(facts.bytes);
    return Extents{sizes};
  }
  static EncodedPart part_of(std::string name, gguf::TypeFacts const& facts, Extents const& shape) {
    PartGrid grid = PartGrid::rows(shape.rank(), facts.elements);
    grid.axes.push_back({});
    return {std::move(name), DType::u8, stored_shape(facts, shape), std::move(grid)};
  }

  void decode(Box const& box, std::span<PartBytes const> given, DType dtype, MemoryView const& memory) const override {
    StandardArithmetic const standard;
    int const last = box.rank() - 1;
    Extents const strides = row_major_strides(given[0].box.shape);
    std::int64_t const each = facts_.elements;
    std::array<float, 256> block;
    try {
      fill_rows(box, dtype, memory, [&](Extents const& index, std::int64_t begin, std::int64_t end, float* out) {
        std::int64_t at = 0;
        for (int d = 0; d < last; ++d) at += (index[d] - given[0].box.origin[d]) * strides[d];
        std::byte const* const row = given[0].data + at - given[0].box.origin[last] * facts_.bytes;
        for (std::int64_t c = begin; c < end;) {
          std::int64_t const b = c / each;
          if (c % each == 0 && end - c >= each) {
            std::int64_t const count = (end - c) / each;
            gguf::decode_blocks(type_, row + b * facts_.bytes, count, out + (c - begin));
            c += count * each;
          } else {
            std::int64_t const stop = std::min(end, (b + 1) * each);
            gguf::decode_blocks(type_, row + b * facts_.bytes, 1, block.data());
            std::memcpy(out + (c - begin), block.data() + c % each, static_cast<std::size_t>(stop - c) * sizeof(float));
            c = stop;
          }
        }
      });
    } catch (Error const& error) {
      throw Error{error.code(), parts()[0].name + ": " + error.message()};
    }
  }

 private:
  std::uint32_t type_;
  gguf::TypeFacts facts_;
};

/// Rows into blocks, which know their own scales.
template <class D = Deferred>
class GgufQuantizer final : public Quantizer {
 public:
  GgufQuantizer(TensorSpec const& tensor, std::uint32_t type) : Quantizer{tensor.name, tensor.dtype, tensor.layout.shape, std::vector<EncodedPart>(1, GgufEncoding<>::part_of(tensor.name, *gguf::type_facts(type), tensor.layout.shape))}, type_{type}, facts_{*gguf::type_facts(type)} {}

  void tell(std::function<std::int64_t(Extents const&)> const& owner_of, std::int64_t rank, std::function<ByteWriter&(std::int64_t)> const& send) override { tell_edges(parts()[0].grid, owner_of, rank, send); }
  void take(ByteReader& in, std::int64_t) override {
    static_cast<void>(in.number<std::uint8_t>());
    take_edge(in);
  }
  void answer(std::function<ByteWriter&(std::int64_t)> const&) override {}
  void learn(ByteReader&) override {}

  void produce(std::size_t, Box const& box, std::int64_t first, std::int64_t count, std::byte* out) const override {
    StandardArithmetic const standard;
    int const last = elements_.shape().rank() - 1;
    constexpr std::int64_t most = 64;   // blocks at once
    std::vector<float> values(static_cast<std::size_t>(most * facts_.elements));
    Bytes encoded(static_cast<std::size_t>(most * facts_.bytes));
    std::int64_t const row_blocks = box.shape[last];
    for (std::int64_t at = first, end = first + count; at < end;) {
      std::int64_t const number = at / facts_.bytes, row = number / row_blocks, b = number % row_blocks;
      std::int64_t const blocks = std::min({most, row_blocks - b, ceil_div(end, static_cast<std::int64_t>(facts_.bytes)) - number});
      Extents index = Extents::filled(last + 1, 0);
      std::int64_t rest = row;
      for (int d = last; d-- > 0; rest /= box.shape[d]) index[d] = box.origin[d] + rest % box.shape[d];
      index[last] = (box.origin[last] + b) * facts_.elements;
      elements_.read(index, blocks * facts_.elements, values.data());
      try {
        gguf::encode_blocks(type_, values.data(), blocks, encoded.data());
      } catch (Error const& error) {
        for (std::int64_t i = 0; i < blocks * facts_.elements; ++i)
          if (!std::isfinite(values[static_cast<std::size_t>(i)])) elements_.refuse(index, values.data(), blocks * facts_.elements);
        throw Error{error.code(), elements_.name() + ", from element " + to_string(index) + ": " + error.message()};
      }
      std::int64_t const from = at - number * facts_.bytes, to = std::min(end - number * facts_.bytes, blocks * facts_.bytes);
      std::memcpy(out, encoded.data() + from, static_cast<std::size_t>(to - from));
      out += to - from;
      at += to - from;
    }
  }

 private:
  std::uint32_t type_;
  gguf::TypeFacts facts_;
};

template <class D = Deferred>
class GgufDriver final : public AnyStorage {
 public:
  explicit GgufDriver(GgufOptions options) : options_{std::move(options)} {
    if (!options_.quantize_to.empty() && (!gguf::parse_type(options_.quantize_to, type_) || !gguf::can_encode(type_)))
      throw Error{ErrorCode::unsupported, "the GGUF type " + json_quoted(options_.quantize_to) + " cannot be written; Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1 can"};
  }

  std::string_view name() const override { return "gguf"; }
  std::string file_layout() const override { return "final"; }
  std::string options_text() const override { return "quantize_to=" + options_.quantize_to + " architecture=" + json_quoted(options_.architecture) + " alignment=" + std::to_string(options_.alignment); }
  std::vector<RecordGroup> groups() const override { return {}; }
  std::vector<std::pair<std::string, Bytes>> extra_files() const override { return {}; }
  bool holds_values() const override { return true; }

  std::shared_ptr<Recoding> recoding(std::vector<TensorSpec> const& tensors) const override {
    auto recoding = std::make_shared<Recoding>();
    Problems problems;
    for (std::uint32_t t = 0; t < tensors.size(); ++t) {
      TensorSpec const& tensor = tensors[t];
      Extents const& shape = tensor.layout.shape;
      auto const wrong = [&](ErrorCode code, std::string const& sentence) { problems.add(code, tensor.name + ' ' + detail::describe(tensor.dtype, shape) + ": " + sentence); };
      bool const wanted = !options_.quantize_to.empty() && !shape.empty() && (options_.quantize ? options_.quantize(tensor.name, tensor.dtype, shape) : quantize_by_default(tensor.name, tensor.dtype, shape));
      std::uint32_t type = 0;
      if (shape.rank() > gguf::max_dimensions) wrong(ErrorCode::unsupported, "GGUF has tensors of at most " + std::to_string(gguf::max_dimensions) + " dimensions");
      if (!wanted) {
        if (!gguf::plain_type(tensor.dtype, type)) wrong(ErrorCode::unsupported_dtype, "GGUF has no tensors of this dtype");
        recoding->keep(t, tensor);
      } else if (!is_wide_float(tensor.dtype)) {
        wrong(ErrorCode::invalid_argument, "is to be quantized, and holds no floats");
      } else if (int const each = gguf::type_facts(type_)->elements; shape.rank() == 0 || shape[shape.rank() - 1] % each != 0) {
        wrong(ErrorCode::invalid_argument, "its columns are no whole blocks of " + std::to_string(each));
        problems.hint("GgufOptions::quantize says which tensors are quantized");
      } else {
        recoding->encode(t, std::make_unique<GgufQuantizer<>>(tensor, type_));
      }
    }
    problems.raise();
    recoding->finish();
    return recoding;
  }

  FilePlan plan_files(SaveRequest const& request) const override {
    gguf::Metadata metadata;
    bool encodes = false;
    std::vector<gguf::TensorInfo> infos;
    for (auto const& tensor : request.tensors) {
      gguf::TensorInfo& info = infos.emplace_back();
      info.name = tensor.name;
      if (!gguf::plain_type(tensor.dtype, info.type)) {
        // Blocks, which stand in two dimensions more than their rows.
        Extents const& stored = tensor.layout.shape;
        std::vector<std::int64_t> sizes{stored.begin(), stored.end() - 1};
        sizes.back() *= gguf::type_facts(type_)->elements;
        info.type = type_;
        info.shape = Extents{sizes};
        encodes = true;
      } else {
        info.shape = tensor.layout.shape;
      }
    }
    auto const given = [&](std::string_view key) { return std::any_of(metadata.begin(), metadata.end(), [&](auto const& entry) { return entry.first == key; }); };
    if (request.values != nullptr)
      for (auto const& [key, value] : *request.values)
        if (key != gguf::alignment_key && gguf::can_hold(key, value)) metadata.emplace_back(key, value);   // the others stand in the commit record alone
    std::sort(metadata.begin(), metadata.end(), [](auto const& a, auto const& b) { return a.first < b.first; });
    if (!given("general.architecture")) metadata.insert(metadata.begin(), {"general.architecture", make_value(ValueKind::text, DType::u8, as_byte_span(options_.architecture))});
    constexpr std::uint32_t quantization_version = 2;
    if (encodes && !given("general.quantization_version")) metadata.emplace_back("general.quantization_version", make_value(ValueKind::number, DType::u32, std::as_bytes(std::span{&quantization_version, 1})));
    FilePlan plan;
    PlannedFile& file = plan.files.emplace_back();
    file.path = "model.gguf";
    bool const mine = header_writer(0, request.ranks) == request.rank;
    gguf::Layout layout = gguf::lay_out(infos, metadata, options_.alignment, mine ? gguf::LayoutParts::all : gguf::LayoutParts::sizes_only);
    file.size = layout.file_size;
    for (std::uint32_t t = 0; t < infos.size(); ++t) plan.stored.push_back({t, 0, layout.offsets[t], Box::whole(request.tensors[t].layout.shape)});
    if (mine) {
      file.literals.push_back({0, std::move(layout.header)});
      for (auto const& padding : layout.paddings) file.literals.push_back({padding.offset, Bytes(static_cast<std::size_t>(padding.bytes))});
    }
    return plan;
  }

  Scan scan(AnyMedium& medium, std::string const& path, CommitRecord const* record) const override {
    Scan scan;
    scan.directory = path;
    if (record != nullptr) {
      scan.files = data_files(*record);
      return scan;
    }
    std::vector<std::string> names;
    if (medium.kind(path) == EntryKind::file) {
      names.push_back(in_directory(path, scan.directory));
    } else {
      for (auto const& entry : medium.list(path))
        if (entry.name.ends_with(".gguf")) names.push_back(entry.name);
      if (names.empty()) throw Error{ErrorCode::not_found, "the directory holds no .gguf file"}.with_path(path);
      detail::sort(names);
    }
    // One file, or all parts of one: any of them names the others.
    auto const split = gguf::parse_split_file_name(names[0]);
    if (!split) {
      if (names.size() > 1) throw Error{ErrorCode::index_mismatch, "the directory has several .gguf files (" + names[0] + ", " + names[1] + ")"}.with_path(path).with_hint("name one file to load");
      scan.files = std::move(names);
      return scan;
    }
    for (int number = 1; number <= split->count; ++number) {
      scan.files.push_back(gguf::split_file_name(split->prefix, number, split->count));
      if (medium.kind(scan.directory + '/' + scan.files.back()) == EntryKind::missing) throw Error{ErrorCode::missing_file, "a part of the model is not there"}.with_path(scan.directory + '/' + scan.files.back());
    }
    for (auto const& other : names)
      if (std::find(scan.files.begin(), scan.files.end(), other) == scan.files.end())
        throw Error{ErrorCode::index_mismatch, "the directory has .gguf files of several models (" + names[0] + ", " + other + ")"}.with_path(path).with_hint("name the first file of one");
    return scan;
  }

  FoundFile read_header(AnyMedium& medium, Scan const& scan, std::string const& file) const override {
    std::string const path = scan.directory + '/' + file;
    try {
      auto const in = medium.open_read(path);
      FoundFile found;
      found.path = file;
      found.size = in->size();
      found.version = in->version();
      gguf::ParseOptions options;
      options.allow_trailing_bytes = options_.allow_trailing_bytes;
      options.allow_missing_final_padding = options_.allow_missing_final_padding;
      gguf::Header header = gguf::parse_header([&](std::uint64_t position, ByteSpan bytes) { in->read_at(position, bytes); }, found.size, options);
      found.tensors.reserve(header.tensors.size());
      for (auto& tensor : header.tensors) {
        FoundTensor one{std::move(tensor.name), {}, tensor.shape, tensor.offset, {}, {}};
        if (!gguf::plain_dtype(tensor.type, one.dtype)) {
          one.dtype = DType::u8;
          one.shape = GgufEncoding<>::stored_shape(*gguf::type_facts(tensor.type), tensor.shape);
          one.content = ByteWriter{}.number(tensor.type).take();
        }
        one.origin = Extents::filled(one.shape.rank(), 0);
        found.tensors.push_back(std::move(one));
      }
      found.values = std::move(header.metadata);
      return found;
    } catch (Error& error) {
      throw error.with_path(path);
    }
  }

  Catalog assemble(Scan const& scan, std::vector<FoundFile> found, CommitRecord const* record) const override {
    std::sort(found.begin(), found.end(), [](FoundFile const& a, FoundFile const& b) { return a.path < b.path; });
    if (record == nullptr) check_split(scan, found);
    std::map<std::string, std::uint32_t> types;
    std::vector<std::pair<std::string, Value>> values;
    for (auto& file : found) {
      for (auto const& tensor : file.tensors)
        if (!tensor.content.empty()) types[tensor.name] = load_little_endian<std::uint32_t>(tensor.content.data());
      for (auto& value : file.values) values.push_back(std::move(value));
    }
    // Of the first file that has a key.
    std::stable_sort(values.begin(), values.end(), [](auto const& a, auto const& b) { return a.first < b.first; });
    values.erase(std::unique(values.begin(), values.end(), [](auto const& a, auto const& b) { return a.first == b.first; }), values.end());
    Catalog catalog = dcp::assemble(std::move(found));
    append(catalog.warnings, scan.warnings);
    catalog.values = std::move(values);
    catalog.values_describe = record == nullptr;
    for (auto& tensor : catalog.tensors) {
      auto const type = types.find(tensor.name);
      if (type == types.end()) continue;
      if (!gguf::can_decode(type->second)) {
        catalog.warnings.push_back(tensor.name + ": the type " + std::string{gguf::type_facts(type->second)->name} + " cannot be decoded; it loads as the bytes of its blocks, " + detail::describe(DType::u8, tensor.shape));
        continue;
      }
      std::vector<std::int64_t> sizes{tensor.shape.begin(), tensor.shape.end() - 1};
      sizes.back() *= gguf::type_facts(type->second)->elements;
      CatalogTensor decoded{tensor.name, DType::f32, Extents{sizes}, {}, {}};
      decoded.encoding = std::make_shared<GgufEncoding<>>(tensor.name, type->second, decoded.shape);
      decoded.parts.push_back(tensor.pieces);
      catalog.raw.push_back(std::exchange(tensor, std::move(decoded)));
    }
    return catalog;
  }

 private:
  // A file of any name whose metadata say that it is a part is one.
  static void check_split(Scan const& scan, std::vector<FoundFile> const& found) {
    bool const alone = found.size() == 1 && !gguf::parse_split_file_name(found[0].path);
    std::size_t tensors = 0;
    std::optional<std::int64_t> total;
    for (std::size_t f = 0; f < found.size(); ++f) {
      gguf::Header header;
      header.metadata = found[f].values;
      auto const wrong = [&](std::string const& sentence) { throw Error{ErrorCode::index_mismatch, sentence}.with_path(scan.directory + '/' + found[f].path); };
      std::optional<gguf::Split> split;
      try {
        split = gguf::split_of(header);
      } catch (Error& error) {
        throw error.with_path(scan.directory + '/' + found[f].path);
      }
      if (!split && alone) return;
      if (!split) wrong("its name says that it is a part of a model, and its metadata do not (split.no, split.count)");
      if (split->count != static_cast<int>(found.size())) wrong("split.count is " + std::to_string(split->count) + ", and there are " + std::to_string(found.size()) + " files");
      if (split->number != static_cast<int>(f)) wrong("split.no is " + std::to_string(split->number) + ", and by its name it is number " + std::to_string(f));
      tensors += found[f].tensors.size();
      if (total && *total != split->tensors) wrong("split.tensors.count is " + std::to_string(split->tensors) + ", and " + std::to_string(*total) + " in an earlier file");
      total = split->tensors;
    }
    if (total && static_cast<std::int64_t>(tensors) != *total)
      throw Error{ErrorCode::index_mismatch, "the files hold " + std::to_string(tensors) + " tensors, and split.tensors.count says " + std::to_string(*total)}.with_path(scan.directory + '/' + found[0].path);
  }

  GgufOptions options_;
  std::uint32_t type_ = 0;   // that tensors are quantized to
};
}  // namespace detail

/// GGUF over any medium. Place: a .gguf file, the first of a split model, or the directory of either; saves make a directory with model.gguf.
///
/// Load      tensors in the row-major order of frameworks (the reverse of GGUF's); those in blocks decode into float, bf16, f16 or double; values are the
///           file's metadata
/// Save      values of kinds that GGUF has become metadata; the commit record has all
/// Example   auto state = dcp::load_from_keys<dcp::Gguf>(self, "model-Q4_K.gguf", {"blk.0"});
template <class M>
struct BasicGguf {
  using Medium = M;
  using Place = typename MediumPlace<M>::type;
  using Options = GgufOptions;
  template <class D = Deferred>
  static std::unique_ptr<AnyStorage> open(Options const& options) { return std::make_unique<detail::GgufDriver<D>>(options); }
  static PlaceRef locate(Place const& place) { return MediumPlace<M>::locate(place); }
};
using Gguf = BasicGguf<LocalFs>;
static_assert(Storage<Gguf>);

}  // namespace dcp
