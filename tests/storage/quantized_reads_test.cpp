// SPDX-License-Identifier: Apache-2.0
// What a load of quantized tensors reads, and what of a checkpoint that this library quantized is verified.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/quantized.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/plain_safetensors.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using dcp::Bytes;
using dcp::ceil_div;
using dcp::DType;
using dcp::Extents;
namespace plain = dcp::test::plain;

/// A memory that notes what is read of data files.
class Watched : public dcp::Memory {
 public:
  struct Log {
    std::mutex mutex;
    std::uint64_t bytes = 0, reads = 0;
  };
  std::shared_ptr<Log> log = std::make_shared<Log>();

  template <class = dcp::Deferred>
  std::unique_ptr<dcp::ReadableFile> open_read(std::string const& path) {
    struct File final : dcp::ReadableFile {
      std::unique_ptr<dcp::ReadableFile> file;
      std::shared_ptr<Log> log;
      std::uint64_t size() const override { return file->size(); }
      void note(std::uint64_t bytes) {
        std::lock_guard const lock{log->mutex};
        log->bytes += bytes, ++log->reads;
      }
      void read_at(std::uint64_t offset, dcp::ByteSpan out) override {
        note(out.size());
        file->read_at(offset, out);
      }
      void read_pieces(std::uint64_t offset, std::span<dcp::ByteSpan const> pieces) override {
        std::uint64_t bytes = 0;
        for (auto const& piece : pieces) bytes += piece.size();
        note(bytes);
        file->read_pieces(offset, pieces);
      }
    };
    auto watched = std::make_unique<File>();
    watched->file = dcp::Memory::open_read(path);
    watched->log = path.ends_with(".safetensors") ? log : std::make_shared<Log>();
    return watched;
  }
};

template <class M>
using Any = dcp::Quantized<dcp::AnyScheme, dcp::BasicSafeTensors<M>>;

void put(dcp::Memory& store, std::string const& name, std::string const& text) { store.open_write("ckpt/" + name)->write_at(0, dcp::as_byte_span(text)); }

std::string zeros(std::int64_t bytes, char byte = '\0') { return std::string(static_cast<std::size_t>(bytes), byte); }

/// Codes and what belongs to them, the codes in a file of their own.
struct Stored {
  Watched store;
  std::uint64_t headers = 0;   // bytes

  Stored(std::map<std::string, plain::Tensor> const& codes, std::map<std::string, plain::Tensor> const& others, std::string const& config = {}) {
    store.create_directories("ckpt");
    nlohmann::json map = nlohmann::json::object();
    int number = 0;
    for (auto const* tensors : {&codes, &others}) {
      std::string const name = "model-0000" + std::to_string(++number) + "-of-00002.safetensors", file = plain::bytes_of({*tensors, {}});
      put(store, name, file);
      headers += file.size();
      for (auto const& [tensor, stored] : *tensors) map[tensor] = name, headers -= stored.bytes.size();
    }
    put(store, "model.safetensors.index.json", nlohmann::json{{"metadata", nlohmann::json::object()}, {"weight_map", map}}.dump());
    if (!config.empty()) put(store, "config.json", R"({"quantization_config":)" + config + '}');
  }
};

dcp::Layout layout_of(Extents const& shape, std::int64_t ranks, int dim) {
  dcp::Layout layout;
  layout.shape = layout.split_shape = shape;
  layout.mesh = dcp::test::mesh_of({ranks});
  if (dim >= 0) layout.rules[0] = {dcp::RuleKind::shard, dim, -1};
  return layout;
}

struct Read {
  std::uint64_t bytes, reads;   // of data files; without headers
  dcp::Report report;
};

/// Loads "w.weight" as bfloat16, split along a dimension.
Read read_by(Stored const& stored, Extents const& shape, int ranks, int dim) {
  stored.store.log->bytes = stored.store.log->reads = 0;
  Read read{};
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    dcp::Layout const layout = layout_of(shape, ranks, dim);
    dcp::Box const box = dcp::box_of_rank(layout, world.rank()).value();
    Bytes memory(box.size() * 2);
    dcp::StateDict state;
    state.add_tensor("w.weight", DType::bf16, layout, {memory.data(), dcp::row_major_strides(box.shape)});
    auto const report = dcp::load<Any<Watched>>(world, {stored.store, "ckpt"}, state);
    if (world.rank() == 0) read.report = report;
  });
  read.bytes = stored.store.log->bytes - stored.headers;
  read.reads = stored.store.log->reads;
  return read;
}

/// Calls visit(box) for the part of each rank.
template <class Visit>
void for_each_rank(Extents const& shape, int ranks, int dim, Visit visit) {
  for (int rank = 0; rank < ranks; ++rank) visit(dcp::box_of_rank(layout_of(shape, ranks, dim), rank).value());
}
/// How many groups of `each` elements [origin, origin + size) touches.
std::uint64_t groups(std::int64_t origin, std::int64_t size, std::int64_t each) { return static_cast<std::uint64_t>(ceil_div(origin + size, each) - origin / each); }

Stored fp8_blocks(std::int64_t rows, std::int64_t columns) {
  std::int64_t const r = ceil_div(rows, std::int64_t{128}), c = ceil_div(columns, std::int64_t{128});
  return Stored{{{"w.weight", {"F8_E4M3", {rows, columns}, zeros(rows * columns, '8')}}}, {{"w.weight_scale_inv", plain::tensor_of("F32", {r, c}, std::vector<float>(static_cast<std::size_t>(r * c), 1.0f))}}};
}
std::uint64_t needed_of_fp8_blocks(Extents const& shape, int ranks, int dim) {
  std::uint64_t needed = 0;
  for_each_rank(shape, ranks, dim, [&](dcp::Box const& box) { needed += box.size() + 4 * groups(box.origin[0], box.shape[0], 128) * groups(box.origin[1], box.shape[1], 128); });
  return needed;
}

}  // namespace

TEST_CASE("load: of FP8 blocks in rows, ranks read their rows, the scales of the blocks that they touch, the headers, and nothing else") {
  // Rows of models in use: 7,168 (DeepSeek-V3), 16,384 and 53,248 (Llama 405B); cut at blocks, and inside them.
  for (auto const& shape : {Extents{1024, 7168}, Extents{1000, 7168}, Extents{512, 16384}, Extents{300, 53248}, Extents{2000, 640}})
    for (int const ranks : {1, 2, 3}) {
      Stored const stored = fp8_blocks(shape[0], shape[1]);
      auto const read = read_by(stored, shape, ranks, 0);
      std::uint64_t const needed = needed_of_fp8_blocks(shape, ranks, 0);
      CAPTURE(to_string(shape));
      CAPTURE(ranks);
      // What is decoded at once may be fewer rows than a block has, where those are very long: its scales are read once more for each.
      if (shape[1] <= 12'000) CHECK(read.bytes == needed);
      else CHECK((read.bytes >= needed && read.bytes <= needed + needed / 200));
      CHECK(read.report.over_read_bytes == 0);
      CHECK(read.report.decoded == std::vector<std::string>{"w.weight: fp8_block 128x128 to BF16"});
      CHECK(read.report.foreign);
      CHECK(read.report.verified_bytes == 0);
    }
}

TEST_CASE("load: of FP8 blocks in columns of 64 KiB and more, ranks read what they need, no byte of the codes twice") {
  Extents const shape{128, 4 * 65536};
  Stored const stored = fp8_blocks(shape[0], shape[1]);
  for (int const ranks : {2, 4}) {
    auto const read = read_by(stored, shape, ranks, 1);
    std::uint64_t const needed = needed_of_fp8_blocks(shape, ranks, 1);
    CAPTURE(ranks);
    CHECK((read.bytes >= needed + read.report.over_read_bytes && read.bytes <= needed + needed / 50));   // scales, for few rows at once
    CHECK(read.report.over_read_bytes <= 8 * 4096);
  }
}

TEST_CASE("load: of codes in shorter runs, ranks read about their part, and the report has the bytes between") {
  for (std::int64_t const columns : {512, 2048, 8192, 16384})
    for (int const ranks : {2, 4}) {
      Extents const shape{4'000'000 / columns, columns};
      Stored const stored = fp8_blocks(shape[0], shape[1]);
      auto const read = read_by(stored, shape, ranks, 1);
      std::uint64_t const needed = needed_of_fp8_blocks(shape, ranks, 1);
      CAPTURE(columns);
      CAPTURE(ranks);
      double const times = static_cast<double>(read.bytes) / static_cast<double>(needed);
      // Holes within a page are read with it: the device reads pages.
      if (columns - columns / ranks >= 4096) CHECK(times <= 1.48);
      CHECK(times <= ranks + 0.01);
      CHECK(read.bytes >= needed + read.report.over_read_bytes);
      CHECK(static_cast<double>(read.bytes) <= 1.01 * static_cast<double>(needed) + static_cast<double>(read.report.over_read_bytes));
      CHECK(read.reads < 3000);
    }
}

TEST_CASE("load: of packed codes cut anywhere, ranks read the bytes, words and groups at the edges too, and nothing else in rows") {
  // MXFP4: two codes in a byte, a scale for 32. 3-way cuts of columns fall inside bytes and groups.
  Extents const shape{3001, 2080};
  Stored const mxfp4{{{"w.weight_packed", {"U8", {shape[0], shape[1] / 2}, zeros(shape[0] * shape[1] / 2, '\x21')}}}, {{"w.weight_scale", {"U8", {shape[0], shape[1] / 32}, zeros(shape[0] * shape[1] / 32, '\x7F')}}}};
  // Packed along rows, with zero points that are packed across them: 8 rows in a word.
  std::int64_t const words = shape[1] / 8, count = shape[1] / 32, zero_rows = ceil_div(shape[0], std::int64_t{8});
  Stored const packed{{{"w.weight_packed", {"I32", {shape[0], words}, zeros(shape[0] * words * 4)}}},
                      {{"w.weight_scale", plain::tensor_of("F32", {shape[0], count}, std::vector<float>(static_cast<std::size_t>(shape[0] * count), 1.0f))},
                       {"w.weight_shape", plain::tensor_of("I64", {2}, std::vector<std::int64_t>{shape[0], shape[1]})},
                       {"w.weight_zero_point", {"I32", {zero_rows, count}, zeros(zero_rows * count * 4)}}}};
  for (int const ranks : {1, 2, 3})
    for (int const dim : {0, 1}) {
      std::uint64_t bytes = 0, word_bytes = 0;
      for_each_rank(shape, ranks, dim, [&](dcp::Box const& box) {
        std::uint64_t const rows = static_cast<std::uint64_t>(box.shape[0]), each = groups(box.origin[1], box.shape[1], 32);
        bytes += rows * (groups(box.origin[1], box.shape[1], 2) + each);
        word_bytes += 4 * rows * (groups(box.origin[1], box.shape[1], 8) + each) + 4 * groups(box.origin[0], box.shape[0], 8) * each;
      });
      CAPTURE(ranks);
      CAPTURE(dim);
      auto const read = read_by(mxfp4, shape, ranks, dim), read_words = read_by(packed, shape, ranks, dim);
      CHECK(read.bytes == bytes + read.report.over_read_bytes);
      // The shape is read with the headers, once.
      CHECK(read_words.bytes == word_bytes + 16 + read_words.report.over_read_bytes);
      if (dim == 0) CHECK((read.report.over_read_bytes == 0 && read_words.report.over_read_bytes <= 16 * 4096));
    }
}

// ---- what this library saved

namespace {

template <class Scheme, class M>
using Saved = dcp::Quantized<Scheme, dcp::BasicSafeTensors<M>>;

std::vector<float> some_values(std::size_t count) {
  std::vector<float> values(count);
  std::uint32_t state = 7;
  for (auto& value : values) value = static_cast<float>(static_cast<std::int32_t>(state = state * 1664525u + 1013904223u)) * 0x1p-31f;
  return values;
}

template <class Scheme>
dcp::Memory saved(Extents const& shape) {
  dcp::Memory store;
  std::vector<float> weight = some_values(static_cast<std::size_t>(shape.elements())), bias = some_values(300);
  dcp::SelfComm self;
  dcp::StateDict state;
  state.add("w.weight", dcp::TensorView<float>{weight, shape}).add("bias", dcp::TensorView<float>{bias, {300}});
  dcp::save<Saved<Scheme, dcp::Memory>>(self, {store, "ckpt"}, state);
  return store;
}

/// Loads it on ranks that together read all of it. `dim`: along which it is split; -1: every rank has all.
dcp::Report load_all(dcp::Memory const& store, Extents const& shape, int ranks, int dim, dcp::Verify verify) {
  dcp::Report report;
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    dcp::Layout const layout = layout_of(shape, ranks, dim), all = layout_of({300}, ranks, -1);
    dcp::Box const box = dcp::box_of_rank(layout, world.rank()).value();
    std::vector<float> memory(std::max<std::size_t>(1, box.size())), bias(300);
    dcp::StateDict state;
    state.add_tensor("w.weight", DType::f32, layout, {reinterpret_cast<std::byte*>(memory.data()), dcp::row_major_strides(box.shape)});
    state.add_tensor("bias", DType::f32, all, {reinterpret_cast<std::byte*>(bias.data()), Extents{1}});
    auto const here = dcp::load<Any<dcp::Memory>>(world, {store, "ckpt"}, state, {.verify = verify, .threads = 1});
    if (world.rank() == 0) report = here;
  });
  return report;
}

struct DataFile {
  std::string path;
  std::uint64_t size, stored;   // stored: bytes of tensors
};
DataFile data_file(dcp::Memory store) {
  for (auto const& entry : store.list("ckpt"))
    if (entry.name.ends_with(".safetensors")) {
      std::string const path = "ckpt/" + entry.name;
      auto const file = store.open_read(path);
      std::uint64_t header = 0;
      file->read_at(0, std::as_writable_bytes(std::span{&header, 1}));
      return {path, file->size(), file->size() - 8 - header};
    }
  throw std::runtime_error{"no data file"};
}

/// What a load says of a checkpoint: the code of its error, or that there was none.
std::string outcome(dcp::Memory const& store, Extents const& shape, int ranks, int dim, dcp::Verify verify) {
  try {
    load_all(store, shape, ranks, dim, verify);
    return "loaded";
  } catch (dcp::Error const& error) {
    return std::string{to_string(error.code())};
  }
}

template <class Scheme>
void check_changes(Extents const& shape, dcp::test::Random& random) {
  dcp::Memory const store = saved<Scheme>(shape);
  auto const file = data_file(store);
  CAPTURE(to_string(shape));
  auto const writable = dcp::Memory{store}.open_write(file.path);
  auto const readable = dcp::Memory{store}.open_read(file.path);
  int changes = 0;
  auto const any_ranks = [&](std::string const& wanted) {
    for (auto const verify : {dcp::Verify::standard, dcp::Verify::full}) {
      int const ranks = static_cast<int>(random.between(1, 3)), dim = static_cast<int>(random.between(-1, 1));
      CAPTURE(ranks);
      CAPTURE(dim);
      CHECK(outcome(store, shape, ranks, dim, verify) == wanted);
    }
  };
  any_ranks("loaded");
  std::vector<std::uint64_t> places{0, 3, 8, 9, 60, file.size - file.stored - 1, file.size - file.stored, file.size - 1};
  for (int i = 0; i < dcp::test::rounds(24, 300); ++i) places.push_back(static_cast<std::uint64_t>(random.between(0, static_cast<std::int64_t>(file.size) - 1)));
  for (auto const at : places) {
    CAPTURE(at);
    std::byte was{};
    readable->read_at(at, {&was, 1});
    std::byte const now = was ^ static_cast<std::byte>(1 << random.between(0, 7));
    writable->write_at(at, {&now, 1});
    any_ranks("corrupt");
    writable->write_at(at, {&was, 1});
    ++changes;
  }
  for (std::uint64_t const size : {file.size - 1, file.size / 2, file.size - file.stored, std::uint64_t{9}, std::uint64_t{0}, file.size + 1}) {
    CAPTURE(size);
    dcp::Memory const cut = store.copy();
    dcp::Memory{cut}.open_write(file.path)->resize(size);
    for (int const ranks : {1, 2}) CHECK(outcome(cut, shape, ranks, 0, dcp::Verify::standard) == "corrupt");
  }
  any_ranks("loaded");
  CHECK(changes >= 16);
}

}  // namespace

TEST_CASE("load: a bit that changed in codes, scales or a header of a quantized checkpoint, and a file that was cut, are noticed by ranks that read it all") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  dcp::test::Random random{seed};
  // Several chunks of the file; scales of several blocks; cuts inside blocks, words and bytes.
  check_changes<dcp::Fp8Block<>>({1300, 1100}, random);
  check_changes<dcp::Fp8Block<4, 5>>({33, 47}, random);
  check_changes<dcp::Fp8Tensor>({70, 90}, random);
  check_changes<dcp::Fp8Channel>({70, 90}, random);
  check_changes<dcp::Mxfp8>({70, 96}, random);
  check_changes<dcp::Mxfp4>({71, 96}, random);
  check_changes<dcp::Nvfp4>({71, 96}, random);
  check_changes<dcp::Int8Channel>({71, 90}, random);
  check_changes<dcp::Int8Group>({71, 256}, random);
  check_changes<dcp::Int4Packed>({71, 256}, random);
  check_changes<dcp::Gptq>({72, 256}, random);
}

TEST_CASE("load: of a quantized checkpoint that is read once, all stored bytes are verified and none is not") {
  // On one rank; and in rows of whole blocks on two.
  for (auto const& shape : {Extents{1280, 1100}, Extents{256, 7168}, Extents{512, 300}})
    for (int const ranks : {1, 2})
      for (auto const verify : {dcp::Verify::none, dcp::Verify::standard, dcp::Verify::full}) {
        dcp::Memory const store = saved<dcp::Fp8Block<>>(shape);
        auto const file = data_file(store);
        auto const report = load_all(store, shape, ranks, 0, verify);
        CAPTURE(to_string(shape));
        CAPTURE(ranks);
        CAPTURE(static_cast<int>(verify));
        std::uint64_t const copies = static_cast<std::uint64_t>(ranks - 1) * 300 * 4;   // of the bias, which all ranks read
        CHECK(report.verified_bytes + report.unverified_bytes >= file.stored);
        CHECK(report.verified_bytes + report.unverified_bytes <= file.stored + copies);
        if (verify == dcp::Verify::none) CHECK(report.verified_bytes == 0);
        else CHECK(report.unverified_bytes == 0);
        CHECK(!report.foreign);
      }
}

TEST_CASE("load: of blocks that two ranks share, the scales are verified once and the second reading of them is not") {
  Extents const shape{1000, 1100};   // 500 rows each, which is inside a block
  dcp::Memory const store = saved<dcp::Fp8Block<>>(shape);
  auto const report = load_all(store, shape, 2, 0, dcp::Verify::standard);
  CHECK(report.verified_bytes >= data_file(store).stored);
  CHECK(report.unverified_bytes <= 9 * 4);   // a row of scales
}
