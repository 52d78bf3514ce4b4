// SPDX-License-Identifier: Apache-2.0
// ctest: alone
// A committed checkpoint of which anything is changed, cut or gone does not load, and the error names the file.
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/memory.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/generations.hpp"

#include <doctest/doctest.h>

#include <fstream>
#include <functional>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace {

using Storage = dcp::BasicSafeTensors<dcp::Memory>;
using dcp::test::GenerationState;

constexpr auto place = "ckpt";
using dcp::test::long_run;

std::string long_text() {
  std::string text;
  for (int i = 0; i < 4000; ++i) text += std::to_string(i) + ' ';
  return text;
}

/// A checkpoint as its files.
struct Files {
  std::vector<std::pair<std::string, dcp::Bytes>> files;
  dcp::Memory store() const {
    dcp::Memory result;
    for (auto const& [name, bytes] : files) {
      std::string const path = std::string{place} + '/' + name;
      result.create_directories(dcp::detail::split_path(path).first);
      result.open_write(path)->write_at(0, bytes);
    }
    return result;
  }
  dcp::Bytes& operator[](std::string const& name) {
    for (auto& file : files)
      if (file.first == name) return file.second;
    throw std::out_of_range{name};
  }
};

Files checkpoint(int ranks, std::int64_t rows, dcp::SafeTensorsOptions const& options) {
  dcp::Memory store;
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    GenerationState state{world, rows};
    state.fill(1);
    std::string document = long_text();
    auto entries = state.state();
    entries.add("document", document);
    dcp::save<Storage>(world, {store, place}, entries, {.threads = 1, .storage = options});
  });
  Files result;
  dcp::MediumModel<dcp::Memory> medium{store};
  std::vector<std::string> names;
  dcp::detail::list_files(medium, place, "", names);
  for (auto const& name : names) result.files.emplace_back(name, dcp::read_file(medium, std::string{place} + '/' + name, 1u << 30));
  return result;
}

/// What a load of it said: nothing if it went well, with the right content. Throws std::runtime_error if it went well with another.
std::optional<dcp::Error> load_error(dcp::Memory const& store, int ranks, std::int64_t rows, dcp::LoadOptions<Storage> const& options = {.threads = 1}) {
  try {
    auto const body = [&](auto& world) {
      GenerationState state{world, rows};
      state.scribble();
      std::string document;
      auto entries = state.state();
      entries.add("document", document);
      dcp::load<Storage>(world, {store, place}, entries, options);
      if (state.generation() != 1 || document != long_text()) throw std::runtime_error{"loaded, with another content"};
    };
    dcp::SelfComm self;
    if (ranks == 1) body(self);
    else dcp::run_threads(ranks, body, std::chrono::seconds{30});
    return std::nullopt;
  } catch (dcp::Error const& error) {
    return error;
  }
}

std::vector<std::pair<std::string, dcp::SafeTensorsOptions>> layouts() {
  return {{"final, several files", {.max_file_bytes = 16'000}}, {"final, one file", {}}, {"sharded", {.layout = dcp::FileLayout::sharded}}};
}

/// Where a change tells most: all of a small file and of a header, both ends, and both sides of every chunk; some anywhere.
std::set<std::size_t> places_in(std::string const& name, dcp::Bytes const& bytes, dcp::test::Random& random) {
  std::set<std::size_t> places;
  std::size_t const size = bytes.size();
  std::size_t const dense = name.ends_with(".safetensors") ? 900 : 6000;
  for (std::size_t i = 0; i < std::min(dense, size); ++i) places.insert(i);
  for (std::size_t at = dcp::chunk_bytes; at < size + dcp::chunk_bytes; at += dcp::chunk_bytes)
    for (std::size_t i : {at - 1, at})
      if (i < size) places.insert(i);
  for (std::size_t i : {std::size_t{4095}, std::size_t{4096}, size - 1})
    if (i < size) places.insert(i);
  for (int i = 0; i < 60; ++i) places.insert(static_cast<std::size_t>(random.between(0, static_cast<std::int64_t>(size) - 1)));
  return places;
}

bool is_space(std::byte byte) { return byte == std::byte{' '} || byte == std::byte{'\n'} || byte == std::byte{'\t'} || byte == std::byte{'\r'}; }

}  // namespace

TEST_CASE("load: a byte that is changed anywhere in any file of a checkpoint is an error that names the file") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  dcp::test::Random random{seed};
  std::size_t changes = 0, harmless = 0, named_tensors = 0;
  for (auto const& layout : layouts()) {
    auto const& title = layout.first;
    auto const& options = layout.second;
    CAPTURE(title);
    std::int64_t const rows = title == "final, one file" ? 1100 : 20;
    Files const whole = checkpoint(3, rows, options);
    CHECK(whole.files.size() >= 4);   // record, checksums, values, data
    REQUIRE(!load_error(whole.store(), 2, rows).has_value());
    for (auto const& file_of_it : whole.files) {
      auto const& name = file_of_it.first;
      auto const& bytes = file_of_it.second;
      dcp::Memory const store = whole.store();
      auto const file = dcp::Memory{store}.open_write(std::string{place} + '/' + name);
      for (std::size_t const at : places_in(name, bytes, random)) {
        // Large checkpoints cost more to read: one place in eight of their headers.
        if (rows > 100 && at < 900 && !long_run() && !random.one_in(8)) continue;
        std::byte const was = bytes[at], now = random.one_in(2) ? was ^ static_cast<std::byte>(1 << random.between(0, 7)) : static_cast<std::byte>(random.between(0, 255));
        if (now == was) continue;
        file->write_at(at, {&now, 1});
        int const ranks = random.one_in(8) ? static_cast<int>(random.between(2, 3)) : 1;
        CAPTURE(name);
        CAPTURE(at);
        CAPTURE(ranks);
        std::string wrong;
        try {
          auto const error = load_error(store, ranks, rows);
          ++changes;
          if (!error) {
            // The first line of dcp.json, '{"dcp_crc64": "...",', holds the checksum of all the others and is under none itself.
            ++harmless;
            bool const in_first_line = name == dcp::record_name && at < 40;
            if (!in_first_line || !is_space(was) || !is_space(now)) wrong = "it was loaded all the same";
          } else {
            if (!error->path().ends_with("/" + name)) wrong = std::string{"another file is named: "} + error->what();
            if (error->message().find("it holds ") != std::string::npos) ++named_tensors;
          }
        } catch (std::exception const& problem) {
          wrong = problem.what();
        }
        CHECK(wrong == "");
        file->write_at(at, {&was, 1});
      }
    }
    CHECK(!load_error(whole.store(), 3, rows).has_value());
  }
  CHECK(changes > 8000);
  CHECK(harmless < 20);
  CHECK(named_tensors > 100);
}

TEST_CASE("load: a file that is cut, longer, empty, of another's content, or gone is an error that names a file") {
  for (auto const& layout : layouts()) {
    auto const& title = layout.first;
    auto const& options = layout.second;
    CAPTURE(title);
    Files const whole = checkpoint(3, 20, options);
    for (std::size_t f = 0; f < whole.files.size(); ++f) {
      std::string const& name = whole.files[f].first;
      std::size_t const size = whole.files[f].second.size();
      CAPTURE(name);
      for (std::size_t const length : {std::size_t{0}, std::size_t{1}, std::size_t{7}, std::size_t{8}, size / 2, size - 1, size + 1, size + 4096}) {
        if (length == size) continue;
        Files changed = whole;
        changed.files[f].second.resize(length);
        CAPTURE(length);
        for (int const ranks : {1, 2}) {
          auto const error = load_error(changed.store(), ranks, 20);
          REQUIRE(error.has_value());
          CHECK_MESSAGE(error->path().ends_with("/" + name), error->what());
        }
      }
      Files changed = whole;
      changed.files[f].second = whole.files[(f + 1) % whole.files.size()].second;
      CHECK(load_error(changed.store(), 1, 20).has_value());
      changed.files.erase(changed.files.begin() + static_cast<std::ptrdiff_t>(f));
      for (int const ranks : {1, 3}) {
        auto const error = load_error(changed.store(), ranks, 20);
        REQUIRE(error.has_value());
        CHECK_MESSAGE(error->path().ends_with("/" + name), error->what());
      }
    }
  }
}

TEST_CASE("load: with verify = none sizes still count, and with full all chunks that anything is read of") {
  Files const whole = checkpoint(2, 1100, {});
  Files changed = whole;
  changed["model-00001-of-00001.safetensors"].back() ^= std::byte{1};
  CHECK(load_error(changed.store(), 1, 1100, {.verify = dcp::Verify::full}).has_value());
  CHECK(load_error(changed.store(), 2, 1100, {.verify = dcp::Verify::full}).has_value());
  CHECK_THROWS_AS(load_error(changed.store(), 1, 1100, {.verify = dcp::Verify::none}), std::runtime_error);   // as asked for
  changed["model-00001-of-00001.safetensors"].pop_back();
  CHECK(load_error(changed.store(), 1, 1100, {.verify = dcp::Verify::none}).has_value());
}

namespace {

/// The record with `from` replaced by `to` and a checksum that is right again; throws if `from` is not there.
dcp::Bytes edited(dcp::Bytes const& record, std::string const& from, std::string const& to) {
  std::string text{dcp::as_text(record)};
  auto const at = text.find(from);
  if (at == std::string::npos) throw std::out_of_range{from};
  text.replace(at, from.size(), to);
  auto const line = text.find('\n');
  std::string const rest = text.substr(line + 1);
  text = "{\"dcp_crc64\": \"" + dcp::hex16(dcp::crc64(dcp::as_byte_span(rest))) + "\",\n" + rest;
  auto const bytes = dcp::as_byte_span(text);
  return {bytes.begin(), bytes.end()};
}

/// The text from `begin` up to `end`, which follows it.
std::string between(dcp::Bytes const& record, std::string const& begin, std::string const& end) {
  std::string const text{dcp::as_text(record)};
  auto const from = text.find(begin);
  auto const to = text.find(end, from + begin.size());
  if (from == std::string::npos || to == std::string::npos) throw std::out_of_range{begin};
  return text.substr(from, to - from);
}

}  // namespace

// PyTorch's own reused directory: rows 4 to 7 stand in file 3 and again in file 2, a leftover. The lowest name counts.
TEST_CASE("load: a piece that is stored twice is compared with verify = full, and not read again without") {
  Files files;
  std::string const golden = std::string{DCP_TESTS_DIR} + "/golden/hf/reused_dir_2x2/ckpt/";
  for (char const n : {'1', '2', '3'}) {
    std::string const name = std::string{"shard-0000"} + n + "-model-00001-of-00001.safetensors";
    std::ifstream in{golden + name, std::ios::binary};
    std::string const text{std::istreambuf_iterator<char>{in}, {}};
    REQUIRE(!text.empty());
    auto const bytes = dcp::as_byte_span(text);
    files.files.emplace_back(name, dcp::Bytes(bytes.begin(), bytes.end()));
  }
  auto const load = [&](dcp::Verify verify) {
    auto const store = files.store();
    std::vector<float> w(32);
    dcp::LoadOptions<Storage> options;
    options.verify = verify;
    dcp::SelfComm self;
    dcp::load<Storage>(self, {store, place}, {{"w", dcp::TensorView<float>{w, {8, 4}}}}, options);
    return w;
  };
  auto const whole = load(dcp::Verify::full);
  CHECK(whole == load(dcp::Verify::standard));
  files.files[2].second.back() ^= std::byte{1};   // of the copy in file 3
  CHECK(load(dcp::Verify::standard) == whole);
  CHECK_THROWS_WITH_AS(load(dcp::Verify::full), doctest::Contains("two files hold the same elements of w with different values"), dcp::Error);
}

TEST_CASE("load: a commit record with a right checksum and wrong fields is an error that names a file, not a crash") {
  Files const whole = checkpoint(2, 20, {.max_file_bytes = 16'000});
  dcp::Bytes record;
  for (auto const& [name, bytes] : whole.files)
    if (name == dcp::record_name) record = bytes;
  struct Edit {
    std::string from, to;
  };
  std::string const path = between(record, "\"path\":\"model-00001", "\""), size = between(record, "\"size\":", ","), crc = between(record, "\"crc64\":\"", "\","),
                    chunks = between(record, "\"chunks_crc64\":\"", "\""), shape = between(record, "\"shape\":[", "]");
  std::string const first_path = "\"path\":\"" + std::string{dcp::values_name};
  std::vector<Edit> const edits{
      {"\"format\": 1", "\"format\": 3"},
      {"\"format\": 1", "\"format\": 2,\n \"directory\": \"elsewhere\""},
      {"\"format\": 1", "\"format\": 2,\n \"directory\": \"..\""},
      {"\"format\": 1", "\"format\": -1"},
      {"\"format\": 1", "\"format\": \"1\""},
      {"\"state\": \"committed\"", "\"state\": \"open\""},
      {"\"state\": \"committed\"", "\"state\": true"},
      {"\"storage\": \"safetensors\"", "\"storage\": \"gguf\""},
      {"\"chunk_bytes\": 1048576", "\"chunk_bytes\": 4096"},
      {"\"chunk_bytes\": 1048576", "\"chunk_bytes\": 0"},
      {"\"sequence\": 1", "\"sequence\": \"one\""},
      {"\"sequence\": 1", "\"sequence\": -1"},
      {path, "\"path\":\"model-00009"},
      {path, "\"path\":\"../model-00001"},
      {path, "\"path\":\"/model-00001"},
      {path, "\"path\":\"a//model-00001"},
      {path, "\"path\":\""},
      {path, "\"path\":7,\"p\":\""},
      {first_path, "\"path\":\"dcp.vaules"},
      {size, size + "0"},
      {size, "\"size\":0"},
      {size, "\"size\":-1"},
      {size, "\"size\":9223372036854775807"},
      {size, "\"size\":18446744073709551615"},
      {size, "\"size\":1e300"},
      {crc, "\"crc64\":\"0000000000000000"},
      {crc, "\"crc64\":\"xyz"},
      {chunks, "\"chunks_crc64\":\"0123456789abcdef"},
      {"\"data\":true", "\"data\":false"},
      {"\"data\":true", "\"data\":1"},
      {"\"name\":\"layer.columns\"", "\"name\":\"layer.rows\""},
      {"\"dtype\":\"U32\"", "\"dtype\":\"F32\""},
      {"\"dtype\":\"U32\"", "\"dtype\":\"U33\""},
      {shape, shape + ",1"},
      {shape, "\"shape\":[-3"},
      {shape, "\"shape\":[9223372036854775807,9223372036854775807"},
      {shape, "\"shape\":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1"},
      {"\"kind\":\"number\"", "\"kind\":\"text\""},
      {"\"kind\":\"number\"", "\"kind\":\"nothing\""},
      {"\"at\":[0,", "\"at\":[1,"},
      {"\"at\":[0,", "\"at\":[18446744073709551615,"},
      {"\"at\":[0,", "\"at\":[-1,"},
      {"\"name\":\"step\"", "\"name\":\"stop\""},
      {"\"name\":\"step\"", "\"nome\":\"step\""},
      {"\"ties\": []", "\"ties\": [[\"a\"]]"},
      {"\"ties\": []", "\"ties\": 0"},
      {"\"files\": [", "\"files\": [{\"path\":\"zzz\",\"size\":1,\"crc64\":\"0123456789abcdef\",\"chunks_crc64\":\"0123456789abcdef\"},"},
      {"\"files\": [", "\"files\": [], \"moved\": ["},
      {"\"tensors\": [", "\"tensors\": [], \"moved\": ["},
      {"\"values\": [", "\"values\": [], \"moved\": ["},
      {"\"values\": [", "\"valves\": ["},
  };
  for (auto const& edit : edits) {
    CAPTURE(edit.from);
    CAPTURE(edit.to);
    Files changed = whole;
    changed[std::string{dcp::record_name}] = edited(record, edit.from, edit.to);
    std::string wrong;
    for (int const ranks : {1, 2}) try {
        auto const error = load_error(changed.store(), ranks, 20);
        if (!error) wrong = "loaded";
        else if (error->path() == "" && error->code() != dcp::ErrorCode::missing_entry && error->code() != dcp::ErrorCode::kind_mismatch) wrong = std::string{"no file: "} + error->what();
      } catch (std::exception const& problem) {
        wrong = problem.what();
      }
    CHECK(wrong == "");
  }
}
