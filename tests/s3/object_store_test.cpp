// SPDX-License-Identifier: Apache-2.0
// ObjectStore against servers that with_server.py starts: another project's (moto), and one of ours that checks signatures and checksums and misbehaves when told to
// (mock_s3.py). Cases of suite "mock" need the latter.
#include <dcp/checkpoint/async_save.hpp>
#include <dcp/checkpoint/load.hpp>
#include <dcp/checkpoint/manager.hpp>
#include <dcp/checkpoint/remove.hpp>
#include <dcp/checkpoint/save.hpp>
#include <dcp/checkpoint/tiered.hpp>
#include <dcp/comm/self.hpp>
#include <dcp/comm/threads.hpp>
#include <dcp/media/local_fs.hpp>
#include <dcp/media/object_store.hpp>
#include <dcp/storage/safetensors.hpp>

#include "support/campaign.hpp"
#include "support/generate.hpp"
#include "support/generations.hpp"
#include "support/medium_conformance.hpp"
#include "support/temporary_directory.hpp"

#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <optional>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include <csignal>
#include <sys/wait.h>
#include <unistd.h>

namespace {

using namespace std::chrono_literals;
using dcp::ObjectStore;
using dcp::test::GenerationState;
using OnStore = dcp::BasicSafeTensors<ObjectStore>;
using Steps = std::vector<std::int64_t>;
constexpr std::int64_t rows = 20;

bool const is_mock = [] {
  char const* const server = std::getenv("DCP_S3_SERVER");
  return server != nullptr && std::string{server} == "mock";
}();

ObjectStore::Options quick() {
  ObjectStore::Options options;
  options.first_pause = 1ms, options.longest_pause = 20ms, options.lease_life = 2s;
  return options;
}

/// A prefix that nobody has used.
std::string fresh() {
  static std::atomic<int> number{0};
  return "/bucket/test-" + std::to_string(::getpid()) + '-' + std::to_string(++number);
}

/// No text may hold what nobody but the store is to know.
void check_secrets(std::string const& text) {
  for (auto const* name : {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"})
    if (char const* const value = std::getenv(name); value != nullptr && *value != '\0') CHECK_MESSAGE(text.find(value) == std::string::npos, name);
}

std::optional<dcp::Error> failure_of(std::function<void()> const& action) {
  try {
    action();
    return std::nullopt;
  } catch (dcp::Error const& error) {
    check_secrets(error.what());
    return error;
  }
}

void save_generation(int ranks, ObjectStore const& store, std::string const& place, std::uint64_t generation, dcp::IfExists if_exists = dcp::IfExists::fail, bool behind = false, std::int64_t count = rows,
                     dcp::SafeTensorsOptions storage = {}) {
  dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
    GenerationState state{world, count};
    state.fill(generation);
    dcp::SaveOptions<OnStore> const how{.if_exists = if_exists, .threads = 2, .staging_bytes = 32 << 20, .storage = storage};
    if (behind) dcp::async_save<OnStore>(world, {store, place}, state, how).wait();
    else dcp::save<OnStore>(world, {store, place}, state, how);
  });
}
std::uint64_t found(ObjectStore const& store, std::string const& place, int ranks = 1, std::int64_t count = rows) {
  std::atomic<std::uint64_t> generation{0};
  try {
    dcp::run_threads(ranks, [&](dcp::ThreadComm& world) {
      GenerationState state{world, count};
      state.scribble();
      auto const report = dcp::load<OnStore>(world, {store, place}, state);
      CHECK(report.unverified_bytes == 0);
      generation = state.generation();
    });
  } catch (dcp::Error const& error) {
    if (error.code() == dcp::ErrorCode::not_found) return 0;
    throw;
  }
  return generation;
}

/// A request to the mock itself.
std::string control(std::string const& rule) {
  std::string const url = std::string{std::getenv("AWS_ENDPOINT_URL_S3")} + "/_control";
  std::string answer;
  CURL* const handle = ::curl_easy_init();
  ::curl_easy_setopt(handle, CURLOPT_URL, url.c_str());
  if (!rule.empty()) ::curl_easy_setopt(handle, CURLOPT_POSTFIELDS, rule.c_str());
  ::curl_easy_setopt(handle, CURLOPT_WRITEDATA, &answer);
  ::curl_easy_setopt(handle, CURLOPT_WRITEFUNCTION, +[](char* text, std::size_t size, std::size_t count, void* to) {
    static_cast<std::string*>(to)->append(text, size * count);
    return size * count;
  });
  REQUIRE(::curl_easy_perform(handle) == CURLE_OK);
  ::curl_easy_cleanup(handle);
  return answer;
}
std::uint64_t counted(std::string const& name) {
  std::string const answer = control("");
  auto const at = answer.find('"' + name + "\": ");
  REQUIRE(at != std::string::npos);
  return std::strtoull(answer.c_str() + at + name.size() + 4, nullptr, 10);
}

/// The mock as it was, before and after a case.
struct Rules {
  Rules() { control("{\"reset\": true}"); }
  Rules(Rules const&) = delete;
  ~Rules() { control("{\"reset\": true}"); }
};

/// A variable of the environment that is another one for a while.
class Environment {
 public:
  Environment(std::string name, std::string const& value) : name_{std::move(name)} {
    if (char const* const old = std::getenv(name_.c_str())) old_ = old;
    ::setenv(name_.c_str(), value.c_str(), 1);
  }
  Environment(Environment const&) = delete;
  ~Environment() {
    if (old_) ::setenv(name_.c_str(), old_->c_str(), 1);
    else ::unsetenv(name_.c_str());
  }

 private:
  std::string name_;
  std::optional<std::string> old_;
};

}  // namespace

TEST_CASE("ObjectStore keeps the contract of a medium that renames nothing") {
  dcp::test::check_object_medium([](std::string& directory) {
    directory = fresh();
    return ObjectStore{quick()};
  });
}

TEST_CASE("ObjectStore: what any number of ranks saves, in front or behind, any other loads, and replaces, and removes") {
  ObjectStore store{quick()};
  for (int writers = 1; writers <= 4; ++writers)
    for (bool const behind : {false, true}) {
      CAPTURE(writers);
      CAPTURE(behind);
      std::string const place = fresh() + "/ckpt";
      dcp::SafeTensorsOptions storage;
      if (writers % 2 == 0) storage.layout = dcp::FileLayout::sharded;
      else storage.max_file_bytes = 16'000;
      save_generation(writers, store, place, 1, dcp::IfExists::fail, behind, rows, storage);
      for (int const readers : {1, 3}) CHECK(found(store, place, readers) == 1);
      auto const again = failure_of([&] { save_generation(1, store, place, 2); });
      REQUIRE(again.has_value());
      CHECK(again->code() == dcp::ErrorCode::already_exists);
      save_generation(2, store, place, 3, dcp::IfExists::replace, behind);
      CHECK(found(store, place, 2) == 3);
      CHECK(store.list(place).size() == 2);
      dcp::SelfComm self;
      dcp::remove<OnStore>(self, {store, place});
      CHECK(found(store, place) == 0);
      CHECK(store.kind(place) == dcp::EntryKind::missing);
    }
}

TEST_CASE("law: ObjectStore: a state in any layouts loads in any other layouts, bit for bit") {
  ObjectStore const store{quick()};
  auto const seed = dcp::test::first_seed();
  for (int round = 0; round < dcp::test::rounds(12, 300); ++round) {
    CAPTURE(seed);
    CAPTURE(round);
    dcp::test::Random random{seed + static_cast<std::uint64_t>(round)};
    std::string const place = fresh();
    struct Tensor {
      dcp::Extents shape;
      dcp::Layout layout;
    };
    int const ranks[]{static_cast<int>(random.between(1, 4)), static_cast<int>(random.between(1, 4))};
    std::vector<Tensor> tensors[2];
    for (std::int64_t i = 0, count = random.between(1, 5); i < count; ++i) {
      auto const shape = dcp::test::any_shape(random, 4, 5'000);
      for (int const side : {0, 1}) {
        dcp::Layout layout;
        layout.shape = layout.split_shape = shape;
        layout.mesh = dcp::test::any_mesh(random, 3, ranks[side]);
        layout.mesh.world = ranks[side];
        layout.rules = dcp::test::any_rules(random, layout.mesh.axes, shape.rank());
        tensors[side].push_back({shape, layout});
      }
    }
    dcp::SafeTensorsOptions storage;
    if (random.one_in(3)) storage.layout = dcp::FileLayout::sharded;
    if (random.one_in(3)) storage.max_file_bytes = 2'000;
    std::atomic<int> wrong{0};
    for (int const side : {0, 1})
      dcp::run_threads(ranks[side], [&](dcp::ThreadComm& world) {
        dcp::StateDict state;
        std::vector<std::vector<std::uint32_t>> memory(tensors[side].size());
        auto const each = [&](auto visit) {
          for (std::size_t t = 0; t < memory.size(); ++t) {
            auto const part = dcp::held_by(tensors[side][t].layout, world.rank());
            if (!part) continue;
            std::size_t at = 0;
            dcp::test::for_each_element(part->box, [&](dcp::Extents const& index) {
              visit(memory[t][at++], static_cast<std::uint32_t>(t * 1'000'003) + static_cast<std::uint32_t>(dcp::test::linear(index, dcp::row_major_strides(tensors[side][t].shape))));
            });
          }
        };
        for (std::size_t t = 0; t < memory.size(); ++t) {
          auto const part = dcp::held_by(tensors[side][t].layout, world.rank());
          if (!part) continue;
          memory[t].resize(static_cast<std::size_t>(part->elements()) + 1);
          state.add_tensor("t" + std::to_string(t), dcp::DType::u32, tensors[side][t].layout, {reinterpret_cast<std::byte*>(memory[t].data()), dcp::row_major_strides(part->box.shape)});
        }
        if (side == 0) {
          each([](std::uint32_t& element, std::uint32_t value) { element = value; });
          dcp::save<OnStore>(world, {store, place}, state, {.threads = 2, .storage = storage});
        } else {
          dcp::load<OnStore>(world, {store, place}, state);
          each([&](std::uint32_t const& element, std::uint32_t value) { wrong += element == value ? 0 : 1; });
        }
      });
    CHECK(wrong == 0);
  }
}

TEST_CASE("ObjectStore: a file of several parts is one object, whichever rank holds what, and an upload that is given up leaves nothing") {
  auto options = quick();
  options.part_bytes = 5 << 20;
  ObjectStore store{options};
  std::string const place = fresh();
  constexpr std::int64_t many = 11'500;   // rows of 1 KiB: three parts
  for (bool const behind : {false, true}) {
    save_generation(3, store, place, 1, dcp::IfExists::replace, behind, many);
    CHECK(found(store, place, 2, many) == 1);
  }
  std::string const path = place + "/upload";
  std::string const text(12 << 20, 'x');
  {
    auto const file = store.open_write(path);
    file->resize(text.size());
    for (std::size_t at = 0; at < text.size() - (1 << 20); at += 1 << 20) file->write_at(at, dcp::as_byte_span(std::string_view{text}.substr(at, 1 << 20)));
    // All but the end: it is in the store in part, and seen by nobody.
    CHECK(store.kind(path) == dcp::EntryKind::missing);
  }
  CHECK(store.kind(path) == dcp::EntryKind::missing);
  auto const file = store.open_write(path);
  file->resize(text.size());
  file->write_at(0, dcp::as_byte_span(std::string_view{text}.substr(0, 5 << 20)));
  CHECK(dcp::test::error_of([&] { file->write_at(0, dcp::as_byte_span("again")); }).code() == dcp::ErrorCode::unsupported);
  CHECK(dcp::test::error_of([&] { file->resize(3); }).code() == dcp::ErrorCode::unsupported);
  file->sync();   // what nobody wrote is zeros
  auto const whole = dcp::test::get(store, path);
  CHECK(whole.size() == text.size());
  CHECK(std::count(whole.begin(), whole.end(), 'x') == 5 << 20);
  CHECK(std::count(whole.begin(), whole.end(), '\0') == 7 << 20);
  CHECK(dcp::test::error_of([&] { store.open_write(path)->resize(options.part_bytes * 10'001); }).system_error() == EFBIG);
}

TEST_CASE("ObjectStore: a checkpoint that is copied to a directory is one") {
  ObjectStore store{quick()};
  std::string const place = fresh();
  save_generation(2, store, place, 5, dcp::IfExists::fail, false, rows, {.max_file_bytes = 16'000, .groups = {{"layer", "layer"}}});
  dcp::test::TemporaryDirectory directory;
  dcp::MediumModel<ObjectStore> medium{store};
  dcp::LocalFs local;
  std::vector<std::string> files;
  dcp::detail::list_files(medium, place, "", files);
  CHECK(files.size() > 5);
  for (auto const& file : files) {
    std::string const to = directory / file;
    local.create_directories(dcp::parent_path(to));
    auto const out = local.open_write(to);
    out->write_at(0, dcp::read_file(medium, place + '/' + file, 1 << 30));
    out->close();
  }
  dcp::SelfComm self;
  GenerationState state{self, rows};
  dcp::load<dcp::SafeTensors>(self, directory.path(), state);
  CHECK(state.generation() == 5);
}

TEST_CASE("CheckpointManager: keeps, finds, pins and retires checkpoints in an object store, and a second one is told so") {
  ObjectStore const store{quick()};
  std::string const root = fresh();
  dcp::run_threads(2, [&](dcp::ThreadComm& world) {
    GenerationState state{world, rows};
    {
      dcp::CheckpointManager<OnStore> checkpoints{world, {store, root}, {.keep_last = 2}};
      checkpoints.pin(2);
      for (std::int64_t step = 1; step <= 5; ++step) {
        state.fill(static_cast<std::uint64_t>(step));
        auto pending = checkpoints.async_save(step, state.state());
        if (step % 2 == 0) pending.wait();
      }
      checkpoints.wait();
      CHECK(checkpoints.latest() == 5);
      CHECK(checkpoints.steps() == Steps{2, 4, 5});
      for (auto const step : checkpoints.steps()) {
        state.scribble();
        checkpoints.load(step, state.state());
        CHECK(state.generation() == static_cast<std::uint64_t>(step));
      }
      std::optional<dcp::Error> busy;
      try {
        dcp::CheckpointManager<OnStore> second{world, {store, root}};
      } catch (dcp::Error const& error) {
        busy = error;
      }
      REQUIRE(busy.has_value());
      CHECK(busy->code() == dcp::ErrorCode::busy);
    }
    world.barrier();
    dcp::CheckpointManager<OnStore> next{world, {store, root}, {.keep_last = 2}};
    CHECK(next.latest() == 5);
  });
}

TEST_CASE("Tiered: a local disk and an object store both have what was saved, and the store alone brings it back") {
  ObjectStore const store{quick()};
  std::string const root = fresh();
  using Tiers = dcp::Tiered<dcp::SafeTensors, OnStore>;
  for (int machine = 0; machine < 2; ++machine) {
    dcp::test::TemporaryDirectory directory;
    dcp::run_threads(2, [&](dcp::ThreadComm& world) {
      GenerationState state{world, rows};
      Tiers checkpoints{world, directory.path(), {store, root}, {.near = {.keep_last = 1}, .keep_last = 2}};
      if (machine == 1) {
        state.scribble();
        checkpoints.load(checkpoints.latest().value_or(-1), state.state());
        CHECK(state.generation() == 3);
      }
      for (std::int64_t step = 1 + 3 * machine; step <= 3 + 3 * machine; ++step) {
        state.fill(static_cast<std::uint64_t>(step));
        static_cast<void>(checkpoints.async_save(step, state.state()));
      }
      checkpoints.wait();
      CHECK(checkpoints.steps() == Steps{2 + 3 * machine, 3 + 3 * machine});
      CHECK(checkpoints.near_steps() == Steps{3 + 3 * machine});
    });
  }
}

TEST_CASE("ObjectStore: a lease is kept alive while it is held, however long, and is free a while after its holder was killed") {
  auto options = quick();
  options.lease_life = 2s;
  ObjectStore store{options};
  std::string const path = fresh() + "/lease";
  auto held = store.acquire_lease(path);
  REQUIRE(held != nullptr);
  std::this_thread::sleep_for(4s);
  CHECK(store.acquire_lease(path) == nullptr);
  held.reset();
  CHECK(store.acquire_lease(path) != nullptr);
  pid_t const child = ::fork();
  if (child == 0) {
    ObjectStore mine{options};
    auto const lease = mine.acquire_lease(path);
    ::raise(SIGKILL);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  REQUIRE(WIFSIGNALED(status));
  CHECK(store.kind(path) == dcp::EntryKind::file);
  std::unique_ptr<dcp::Lease> taken;
  for (int i = 0; i < 200 && !taken; ++i) {
    taken = store.acquire_lease(path);
    if (!taken) std::this_thread::sleep_for(50ms);
  }
  CHECK(taken != nullptr);
}

TEST_CASE("ObjectStore: a saver that is killed at any time leaves the checkpoint before or the one after, and the next saves clean up") {
  auto options = quick();
  options.lease_life = 1s, options.part_bytes = 5 << 20;
  ObjectStore store{options};
  std::string const place = fresh();
  auto const seed = dcp::test::first_seed() + 77;
  CAPTURE(seed);
  dcp::test::Random random{seed};
  std::uint64_t newest = 1;
  save_generation(1, store, place, newest);
  int killed = 0, rounds = 0;
  for (int round = 0; round < dcp::test::rounds(12, 200); ++round) {
    pid_t const child = ::fork();
    if (child == 0) {
      try {
        ObjectStore const mine{options};
        dcp::SelfComm self;
        GenerationState state{self, rows};
        for (std::uint64_t generation = newest + 1;; ++generation) {
          state.fill(generation);
          dcp::save<OnStore>(self, {mine, place}, state, {.if_exists = dcp::IfExists::replace, .threads = 2, .storage = {.max_file_bytes = 16'000}});
        }
      } catch (...) {
        std::fprintf(stderr, "a saver ended by itself: %s\n", dcp::current_error().what());
        ::_exit(1);
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds{random.between(5, 250)});
    ::kill(child, SIGKILL);
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    killed += WIFSIGNALED(status) ? 1 : 0, ++rounds;
    auto const now = found(store, place, 2);
    CHECK(now >= newest);
    newest = now;
  }
  CHECK(killed * 3 > rounds * 2);   // of the others something came late from the one before
  std::this_thread::sleep_for(2500ms);   // leases of the killed
  save_generation(2, store, place, newest + 1, dcp::IfExists::replace);
  CHECK(found(store, place) == newest + 1);
  CHECK(store.list(place).size() == 2);
}

TEST_CASE("ObjectStore: what is wrong is said in words, on all ranks, and never with what is secret") {
  ObjectStore const store{quick()};
  auto const missing = failure_of([&] { save_generation(2, store, "/no-such-bucket/ckpt", 1); });
  REQUIRE(missing.has_value());
  CHECK(missing->message().find("no bucket no-such-bucket") != std::string::npos);
  CHECK(missing->system_error() == ENOENT);
  CHECK(failure_of([&] { found(store, "/no-such-bucket/ckpt"); }).has_value());
  CHECK(failure_of([&] { save_generation(1, store, "bucket", 1); })->code() == dcp::ErrorCode::invalid_argument);
  CHECK(failure_of([&] { ObjectStore{}.remove_tree("/bucket"); }).has_value());
  {
    auto nobody = quick();
    nobody.endpoint = "http://127.0.0.1:9", nobody.attempts = 3;
    auto const refused = failure_of([&] { save_generation(2, ObjectStore{nobody}, "/bucket/ckpt", 1); });
    REQUIRE(refused.has_value());
    CHECK(refused->message().find("no answer from the object store in 3 attempts") != std::string::npos);
    CHECK(refused->system_error() == ECONNREFUSED);
  }
  for (auto const* const endpoint : {"127.0.0.1", "ftp://host", "http://", "http://user:password@host", "https://host/path"}) {
    auto bad = quick();
    bad.endpoint = endpoint;
    auto const error = failure_of([&] { ObjectStore{bad}; });
    REQUIRE(error.has_value());
    CHECK(std::string{error->what()}.find("password") == std::string::npos);
  }
  auto parts = quick();
  parts.part_bytes = 1 << 20;
  CHECK(failure_of([&] { ObjectStore{parts}; })->message().find("5 MiB") != std::string::npos);
  Environment const none{"AWS_SECRET_ACCESS_KEY", ""};
  CHECK(failure_of([&] { ObjectStore{}; })->message().find("AWS_SECRET_ACCESS_KEY") != std::string::npos);
}

TEST_SUITE("mock" * doctest::skip(!is_mock)) {
  TEST_CASE("ObjectStore: whatever request is refused for a while, cut off, lost or late, a save and a load succeed by trying again") {
    Rules const rules;
    ObjectStore store{quick()};
    std::size_t faults = 0;
    for (std::string const what : {"503", "429", "500", "\"drop\"", "\"lose\"", "\"truncate\""})
      for (int nth = 1;; ++nth) {
        CAPTURE(what);
        CAPTURE(nth);
        control("{\"reset\": true}");
        control("{\"do\": " + what + ", \"nth\": " + std::to_string(nth) + ", \"times\": 2}");
        std::string const place = fresh();
        save_generation(2, store, place, 1);
        CHECK(found(store, place) == 1);
        save_generation(1, store, place, 2, dcp::IfExists::replace);
        CHECK(found(store, place) == 2);
        CHECK(store.list(place).size() == 2);
        if (counted("hits") == 0) break;
        faults += counted("hits");
        if (nth > 12) nth += 6;
      }
    CHECK(faults > 100);
  }

  TEST_CASE("ObjectStore: an upload in parts survives the same, and one that is told 200 and failed all the same") {
    Rules const rules;
    auto options = quick();
    options.part_bytes = 5 << 20;
    ObjectStore store{options};
    std::string const text(11 << 20, 'y');
    for (std::string const rule : {"{\"do\": \"200-error\", \"method\": \"POST\", \"path\": \"uploadId\"}", "{\"do\": \"lose\", \"method\": \"POST\", \"path\": \"uploadId\"}",
                                   "{\"do\": \"lose\", \"method\": \"PUT\", \"path\": \"partNumber=2\"}", "{\"do\": 503, \"method\": \"PUT\", \"path\": \"partNumber\", \"times\": 3}"}) {
      CAPTURE(rule);
      control("{\"reset\": true}");
      control(rule);
      std::string const path = fresh() + "/f";
      auto const file = store.open_write(path);
      file->resize(text.size());
      for (std::size_t at = 0; at < text.size(); at += 1 << 20) file->write_at(at, dcp::as_byte_span(std::string_view{text}.substr(at, 1 << 20)));
      file->sync();
      file->close();
      CHECK(counted("hits") > 0);
      CHECK(dcp::test::get(store, path) == text);
      CHECK(counted("uploads") == 0);
    }
    // Killed in the middle: what is left of the upload goes with the directory.
    std::string const directory = fresh();
    pid_t const child = ::fork();
    if (child == 0) {
      auto const file = ObjectStore{options}.open_write(directory + "/f");
      file->resize(text.size());
      file->write_at(0, dcp::as_byte_span(std::string_view{text}.substr(0, 5 << 20)));
      ::raise(SIGKILL);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(counted("uploads") == 1);
    store.remove_tree(directory);
    CHECK(counted("uploads") == 0);
  }

  TEST_CASE("ObjectStore: a store that refuses everything is one Error on all ranks after the attempts, and the old checkpoint stays") {
    Rules const rules;
    auto options = quick();
    options.attempts = 4;
    ObjectStore const store{options};
    std::string const place = fresh();
    save_generation(1, store, place, 1);
    for (std::string const path : {"safetensors", "dcp.crc", "/dcp.json"}) {
      control("{\"reset\": true}");
      control("{\"do\": 503, \"method\": \"PUT\", \"path\": \"" + path + "\", \"times\": 1000000}");
      for (bool const behind : {false, true}) {
        CAPTURE(path);
        auto const error = failure_of([&] { save_generation(2, store, place, 2, dcp::IfExists::replace, behind); });
        REQUIRE(error.has_value());
        CHECK(error->message().find("in 4 attempts: 503 SlowDown") != std::string::npos);
        CHECK(error->system_error() == EBUSY);
        CHECK(found(store, place) == 1);
      }
    }
    control("{\"reset\": true}");
    save_generation(2, store, place, 3, dcp::IfExists::replace);
    CHECK(found(store, place) == 3);
  }

  TEST_CASE("ObjectStore: a pause that the store asks for is kept") {
    Rules const rules;
    auto options = quick();
    options.longest_pause = 5s, options.attempts = 2;
    ObjectStore store{options};
    control("{\"do\": 503, \"method\": \"HEAD\", \"value\": 1}");
    auto const before = std::chrono::steady_clock::now();
    CHECK(store.kind(fresh()) == dcp::EntryKind::missing);
    CHECK(std::chrono::steady_clock::now() - before >= 1s);
  }

  TEST_CASE("ObjectStore: no more requests are under way at once than its budget allows") {
    Rules const rules;
    auto options = quick();
    options.connections = 3;
    ObjectStore store{options};
    std::string const directory = fresh();
    dcp::test::put(store, directory + "/f", std::string(1000, 'z'));
    auto const file = store.open_read(directory + "/f");
    control("{\"reset\": true}");
    control("{\"do\": \"delay\", \"value\": 0.02, \"times\": 1000}");
    std::vector<std::thread> threads;
    std::atomic<int> wrong{0};
    for (int t = 0; t < 12; ++t)
      threads.emplace_back([&] {
        std::string part(10, ' ');
        for (int i = 0; i < 3; ++i) file->read_at(500, std::as_writable_bytes(std::span{part})), wrong += part == "zzzzzzzzzz" ? 0 : 1;
      });
    for (auto& thread : threads) thread.join();
    CHECK(wrong == 0);
    CHECK(counted("most_at_once") == 3);
  }

  TEST_CASE("ObjectStore: a bucket of ten thousand objects is listed by pages, and none is missing or twice") {
    Rules const rules;
    ObjectStore store{quick()};
    std::string const directory = fresh(), key = directory.substr(8);
    control("{\"fill\": [\"bucket\", \"" + key + "/many/\", 10000]}");
    control("{\"fill\": [\"bucket\", \"" + key + "/other/\", 3]}");
    for (int const page : {1000, 777}) {
      control("{\"page\": " + std::to_string(page) + "}");
      auto const entries = store.list(directory + "/many");
      CHECK(entries.size() == 10'000);
      CHECK(std::is_sorted(entries.begin(), entries.end(), [](auto const& a, auto const& b) { return a.name < b.name; }));
      CHECK(std::adjacent_find(entries.begin(), entries.end(), [](auto const& a, auto const& b) { return a.name == b.name; }) == entries.end());
    }
    control("{\"page\": 1}");
    CHECK(store.list(directory).size() == 2);
    store.remove_tree(directory + "/other");
    CHECK(store.list(directory).size() == 1);
  }

  TEST_CASE("ObjectStore: lists that are out of date harm no checkpoint") {
    Rules const rules;
    ObjectStore const store{quick()};
    std::string const place = fresh();
    save_generation(2, store, place, 1);
    control("{\"stale_lists\": true}");
    save_generation(2, store, place, 2, dcp::IfExists::replace);
    CHECK(found(store, place, 2) == 2);
    save_generation(1, store, place, 3, dcp::IfExists::replace);   // cleans what the list shows, and is gone
    CHECK(found(store, place) == 3);
    control("{\"reset\": true}");
    save_generation(1, store, place, 4, dcp::IfExists::replace);
    CHECK(found(store, place) == 4);
    CHECK(ObjectStore{store}.list(place).size() == 2);
  }

  TEST_CASE("ObjectStore: wrong keys, an expired token, and a wrong clock are said in words that hold no secret, though the store repeats them") {
    Rules const rules;
    std::string const place = fresh();
    struct Wrong {
      std::string name, value, text;
    };
    for (auto const& wrong : {Wrong{"AWS_SECRET_ACCESS_KEY", "another", "does not accept the signature"}, Wrong{"AWS_ACCESS_KEY_ID", "AKIDOFNOBODY", "does not know the access key"},
                              Wrong{"AWS_SESSION_TOKEN", "old", "does not accept AWS_SESSION_TOKEN"}}) {
      std::optional<ObjectStore> store;
      {
        Environment const changed{wrong.name, wrong.value};
        store.emplace(quick());
      }
      auto const error = failure_of([&] { save_generation(2, *store, place, 1); });
      REQUIRE(error.has_value());
      CHECK(error->message().find(wrong.text) != std::string::npos);
      CHECK(error->system_error() == EACCES);
    }
    ObjectStore store{quick()};
    control("{\"clock\": 3600}");
    auto const late = failure_of([&] { store.list(place); });
    REQUIRE(late.has_value());
    CHECK(late->message().find("the clock of this machine is wrong") != std::string::npos);
    CHECK(late->message().find("its clock is 3") != std::string::npos);   // 3600 s, or a little less
  }

  TEST_CASE("ObjectStore: a lease is judged by the store's clock alone") {
    Rules const rules;
    ObjectStore store{quick()};
    std::string const path = fresh() + "/lease";
    dcp::test::put(store, path, "somebody 0\n");
    control("{\"clock\": 600}");   // which is not a sign of age: objects are as old by that clock as by any
    dcp::test::put(store, path, "somebody 1\n");
    CHECK(store.acquire_lease(path) == nullptr);
    control("{\"age\": [\"" + path + "\", 10]}");
    CHECK(store.acquire_lease(path) != nullptr);
  }

  TEST_CASE("ObjectStore: a store that does not heed conditions is refused before any data is sent") {
    Rules const rules;
    ObjectStore const store{quick()};
    std::string const place = fresh();
    control("{\"ignore_conditions\": true}");
    auto const error = failure_of([&] { save_generation(2, store, place, 1); });
    REQUIRE(error.has_value());
    CHECK(error->code() == dcp::ErrorCode::unsupported);
    CHECK(error->message().find("If-None-Match") != std::string::npos);
    CHECK(ObjectStore{store}.kind(place) == dcp::EntryKind::missing);
  }

  TEST_CASE("ObjectStore: names of buckets stand in the host where that is wanted, and what is saved holds no secret") {
    Rules const rules;
    auto options = quick();
    std::string const port = std::string{std::getenv("AWS_ENDPOINT_URL_S3")}.substr(std::string{"http://127.0.0.1"}.size());
    options.endpoint = "http://127.0.0.1" + port + "/";
    ObjectStore const store{options};
    std::string const place = fresh();
    dcp::SelfComm self;
    GenerationState state{self, rows};
    state.fill(1);
    auto const report = dcp::save<OnStore>(self, {store, place}, state);
    std::ostringstream text;
    text << report;
    check_secrets(text.str());
    dcp::MediumModel<ObjectStore> medium{store};
    std::vector<std::string> files;
    dcp::detail::list_files(medium, place, "", files);
    for (auto const& file : files) check_secrets(std::string{dcp::as_text(dcp::read_file(medium, place + '/' + file, 1 << 30))});
    // A host for each bucket is not found here: the error says which one was looked for.
    options.addressing = dcp::S3Addressing::virtual_host, options.endpoint = "http://no-such-host.invalid", options.attempts = 1;
    auto const error = failure_of([&] { ObjectStore{options}.list(place); });
    REQUIRE(error.has_value());
    CHECK(std::string{error->what()}.find("no-such-host.invalid") != std::string::npos);
  }
}
