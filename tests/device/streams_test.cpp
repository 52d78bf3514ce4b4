// SPDX-License-Identifier: Apache-2.0
#include <dcp/device/streams.hpp>

#include "support/generate.hpp"
#include "support/outcome.hpp"
#include "support/simulated_device.hpp"

#include <doctest/doctest.h>

#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

namespace {

using dcp::Bytes;
using dcp::MemoryKind;
using dcp::test::error_of;
using dcp::test::SimulatedApi;
using Driver = dcp::detail::StreamDriver<SimulatedApi>;

struct Device {
  explicit Device(int devices = 4, std::chrono::milliseconds deadline = std::chrono::minutes{10}, std::uint64_t seed = 1)
      : api{std::make_shared<SimulatedApi>(devices, seed)}, driver{std::make_shared<Driver>(api, deadline)} {}
  std::shared_ptr<SimulatedApi> api;
  std::shared_ptr<Driver> driver;
};

Bytes numbered(std::size_t count, unsigned first = 1) {
  Bytes bytes(count);
  for (std::size_t i = 0; i < count; ++i) bytes[i] = static_cast<std::byte>(first + i);
  return bytes;
}
Bytes all(std::size_t count, unsigned value) { return Bytes(count, static_cast<std::byte>(value)); }
Bytes bytes_at(std::byte const* at, std::size_t count) { return Bytes(at, at + count); }

bool host_can_read(std::byte const* address) {
  std::array<int, 2> ends{};
  REQUIRE(::pipe(ends.data()) == 0);
  bool const can = ::write(ends[1], address, 1) == 1;
  REQUIRE((can || errno == EFAULT));
  ::close(ends[0]);
  ::close(ends[1]);
  return can;
}

// One tensor to the host by way of the lane, as a save does it.
void save_once(Driver& driver, int ordinal, void* stream, std::byte const* tensor, std::size_t bytes, Bytes& out) {
  auto const event = driver.record(ordinal, stream);
  auto const lane = driver.lane(ordinal);
  lane->after(*event);
  auto const buffer = lane->buffer(0, bytes);
  lane->copy(buffer.data(), bytes, tensor, bytes, bytes, 1);
  lane->finish();
  out.assign(buffer.begin(), buffer.end());
}
// And one to the device, as a load does it; the stream may read it when it comes to that.
void load_once(Driver& driver, int ordinal, void* stream, std::byte* tensor, Bytes const& bytes) {
  auto const event = driver.record(ordinal, stream);
  auto const lane = driver.lane(ordinal);
  lane->after(*event);
  auto const buffer = lane->buffer(1, bytes.size());
  std::copy(bytes.begin(), bytes.end(), buffer.begin());
  lane->copy(tensor, bytes.size(), buffer.data(), bytes.size(), bytes.size(), 1);
  driver.order(ordinal, stream, *lane->mark());
  lane->finish();
}

}  // namespace

// --- the simulator itself

TEST_CASE("SimulatedApi: the host reads and writes shared and pinned memory, and nothing on a device or freed") {
  SimulatedApi api;
  std::byte* const device = api.allocate(1, 10);
  std::byte* const shared = api.allocate_shared(1, 10);
  void* pinned = nullptr;
  REQUIRE(api.allocate_pinned(pinned, 10) == 0);
  CHECK_FALSE(host_can_read(device));
  CHECK(host_can_read(shared));
  CHECK(host_can_read(static_cast<std::byte*>(pinned)));
  api.write(device, numbered(10));
  CHECK(api.read(device + 2, 8) == numbered(8, 3));
  CHECK(api.pinned_bytes() == 10);
  REQUIRE(api.free_pinned(pinned) == 0);
  CHECK(api.free_pinned(pinned) != 0);
  CHECK_FALSE(host_can_read(static_cast<std::byte*>(pinned)));
  CHECK(api.pinned_bytes() == 0);
  CHECK_THROWS_AS(api.read(device, 11), std::logic_error);
}

TEST_CASE("SimulatedApi: work is done when it is waited for, with what it depends on and without anything else") {
  SimulatedApi api;
  auto const a = api.create_user_stream(0), b = api.create_user_stream(0), c = api.create_user_stream(0);
  std::string done;
  SimulatedApi::Event event, unrecorded;
  REQUIRE(api.create_event(event) == 0);
  REQUIRE(api.create_event(unrecorded) == 0);
  api.launch(a, [&] { done += "a1 "; });
  api.launch(c, [&] { done += "c1 "; });
  REQUIRE(api.record(event, a) == 0);
  api.launch(a, [&] { done += "a2 "; });
  api.launch(b, [&] { done += "b1 "; });
  REQUIRE(api.wait(b, event) == 0);
  REQUIRE(api.wait(b, unrecorded) == 0);
  api.launch(b, [&] { done += "b2 "; });
  CHECK(api.query(unrecorded) == 0);
  CHECK(done.empty());
  SUBCASE("by an event") {
    int asked = 0;
    while (api.query(event) == SimulatedApi::not_ready) ++asked;
    CHECK(asked < 4);
    CHECK(done == "a1 ");
    // What b waits for was what the event stood for at that time.
    REQUIRE(api.record(event, c) == 0);
    api.synchronize(b);
    CHECK(done == "a1 b1 b2 ");
  }
  SUBCASE("of a stream") {
    REQUIRE(api.record(event, c) == 0);
    api.synchronize(b);
    CHECK(done == "a1 b1 b2 ");
    api.drain();
    CHECK(done == "a1 b1 b2 c1 a2 ");
    CHECK(api.pending() == 0);
  }
  SUBCASE("of a stream that has been destroyed") {
    REQUIRE(api.destroy_stream(a) == 0);
    CHECK(api.record(event, a) == SimulatedApi::invalid_handle);
    CHECK(done.empty());
    api.drain();
    CHECK(done == "a1 c1 a2 b1 b2 ");
  }
}

TEST_CASE("SimulatedApi: the legacy stream and blocking streams come after each other, and not so others") {
  SimulatedApi api;
  auto const blocking = api.create_user_stream(0), other = api.create_user_stream(0, false);
  std::string done;
  api.launch(blocking, [&] { done += "blocking1 "; });
  api.launch(other, [&] { done += "other "; });
  api.launch(api.legacy_stream(0), [&] { done += "legacy "; });
  api.launch(blocking, [&] { done += "blocking2 "; });
  api.synchronize(blocking);
  CHECK(done == "blocking1 legacy blocking2 ");
  CHECK(api.handle(api.legacy_stream(0)) == nullptr);
}

TEST_CASE("SimulatedApi: copies of pageable memory take the source at the call, and have arrived when it returns") {
  SimulatedApi api;
  auto const stream = api.create_user_stream(0);
  std::byte* const device = api.allocate(0, 4);
  Bytes host = all(4, 1);
  REQUIRE(api.copy(device, host.data(), 4, stream) == 0);
  host = all(4, 2);
  CHECK(api.read(device, 4) == all(4, 0));
  Bytes back(4);
  REQUIRE(api.copy(back.data(), device, 4, stream) == 0);
  CHECK(back == all(4, 1));
  CHECK(api.read(device, 4) == all(4, 1));

  void* pinned = nullptr;
  REQUIRE(api.allocate_pinned(pinned, 4) == 0);
  auto* const bytes = static_cast<std::byte*>(pinned);
  bytes[0] = std::byte{3};
  REQUIRE(api.copy(device, bytes, 1, stream) == 0);
  bytes[0] = std::byte{4};   // too early
  api.synchronize(stream);
  CHECK(api.read(device, 1) == all(1, 4));
}

TEST_CASE("SimulatedApi: a stream of a device that is not current, a pitch below the row and bytes past the end are refused") {
  SimulatedApi api;
  auto const stream = api.create_user_stream(1);
  std::byte* const device = api.allocate(1, 16);
  Bytes host(16);
  SimulatedApi::Event event;
  REQUIRE(api.create_event(event) == 0);   // of device 0
  CHECK(api.copy(device, host.data(), 4, stream) == SimulatedApi::invalid_handle);
  api.make_current(1);
  CHECK(api.record(event, stream) == SimulatedApi::invalid_handle);
  CHECK(api.wait(stream, event) == 0);
  CHECK(api.copy(device, host.data(), 4, stream) == 0);
  CHECK(api.copy(device + 13, host.data(), 4, stream) == SimulatedApi::invalid_value);
  CHECK(api.copy_rows(device, 4, host.data(), 3, 4, 2, stream) == SimulatedApi::invalid_value);
  CHECK(api.copy_rows(device, 3, host.data(), 4, 4, 2, stream) == SimulatedApi::invalid_value);
  CHECK(api.copy_rows(device, 8, host.data(), 4, 4, 2, stream) == 0);
  CHECK(api.copy_rows(device, 8, host.data(), 4, 4, 3, stream) == SimulatedApi::invalid_value);
  CHECK(api.enter(2) == SimulatedApi::no_device);
  CHECK(api.last_error() == SimulatedApi::no_device);
  api.forget_error();
  CHECK(api.last_error() == 0);
}

TEST_CASE("SimulatedApi: a copy of memory that was freed before it was done fails, and the stream keeps that") {
  SimulatedApi api;
  auto const stream = api.create_user_stream(0);
  std::byte* const from = api.allocate(0, 4);
  std::byte* const to = api.allocate(0, 4);
  REQUIRE(api.copy(to, from, 4, stream) == 0);
  api.free(from);
  CHECK(api.synchronize(stream) == SimulatedApi::illegal_address);
  CHECK(api.copy(to, to, 4, stream) == SimulatedApi::illegal_address);
}

TEST_CASE("SimulatedApi: an eager device also does what nobody has waited for") {
  SimulatedApi api;
  api.eager(2);
  auto const stream = api.create_user_stream(0);
  bool done = false;
  api.launch(stream, [&] { done = true; });
  for (int i = 0; i < 100; ++i) api.enter(0), api.leave();
  CHECK(done);
}

// --- the driver

TEST_CASE("StreamDriver: says where memory is, whichever device is current") {
  Device const one;
  std::byte* const device = one.api->allocate(2, 8);
  std::byte* const shared = one.api->allocate_shared(1, 8);
  auto const lane = one.driver->lane(3);
  auto const pinned = lane->buffer(0, 8);
  int local = 0;
  for (int current : {0, 2, 3}) {
    CAPTURE(current);
    one.api->make_current(current);
    CHECK(one.driver->where(device + 7).kind == MemoryKind::device);
    CHECK(one.driver->where(device + 7).ordinal == 2);
    CHECK(one.driver->where(shared).kind == MemoryKind::shared);
    CHECK(one.driver->where(shared).ordinal == 1);
    CHECK(one.driver->where(pinned.data()).kind == MemoryKind::pinned);
    CHECK(one.driver->where(&local).kind == MemoryKind::host);
  }
}

TEST_CASE("StreamDriver: rows of any pitches arrive by finish(), both ways, and not before it") {
  struct Case {
    std::size_t device_pitch, host_pitch, bytes, rows;
  };
  auto const run = [](Case const& some, std::string const& way) {
    CAPTURE(way);
    CAPTURE(some.device_pitch);
    CAPTURE(some.host_pitch);
    Device const one;
    auto const lane = one.driver->lane(1);
    std::size_t const device_size = some.device_pitch * some.rows, host_size = some.host_pitch * some.rows;
    std::byte* const device = one.api->allocate(1, device_size);
    auto const buffer = lane->buffer(0, host_size);
    auto const expect_rows = [&](Bytes const& to, std::size_t to_pitch, Bytes const& from, std::size_t from_pitch, std::byte between) {
      for (std::size_t i = 0; i < to.size(); ++i) {
        std::size_t const row = i / to_pitch, column = i % to_pitch;
        CHECK(to[i] == (column < some.bytes ? from[row * from_pitch + column] : between));
      }
    };
    if (way == "to the host") {
      one.api->write(device, numbered(device_size));
      std::fill(buffer.begin(), buffer.end(), std::byte{255});
      lane->copy(buffer.data(), some.host_pitch, device, some.device_pitch, some.bytes, some.rows);
      CHECK(bytes_at(buffer.data(), host_size) == all(host_size, 255));
      lane->finish();
      expect_rows(bytes_at(buffer.data(), host_size), some.host_pitch, numbered(device_size), some.device_pitch, std::byte{255});
    }
    if (way == "to the device") {
      one.api->write(device, all(device_size, 255));
      auto const source = numbered(host_size);
      std::copy(source.begin(), source.end(), buffer.begin());
      lane->copy(device, some.device_pitch, buffer.data(), some.host_pitch, some.bytes, some.rows);
      CHECK(one.api->read(device, device_size) == all(device_size, 255));
      lane->finish();
      expect_rows(one.api->read(device, device_size), some.device_pitch, source, some.host_pitch, std::byte{255});
    }
    if (way == "to pageable memory on the host") {   // which may be there early
      one.api->write(device, numbered(device_size));
      Bytes host = all(host_size, 255);
      lane->copy(host.data(), some.host_pitch, device, some.device_pitch, some.bytes, some.rows);
      lane->finish();
      expect_rows(host, some.host_pitch, numbered(device_size), some.device_pitch, std::byte{255});
    }
  };
  for (Case const& some : {Case{8, 8, 8, 1}, Case{4, 4, 4, 3}, Case{7, 4, 4, 3}, Case{4, 9, 4, 3}, Case{9, 5, 4, 5}})
    for (char const* const way : {"to the host", "to the device", "to pageable memory on the host"}) run(some, way);
}

TEST_CASE("StreamDriver: a lane reads what a stream has written if it comes after the event, and old bytes if it does not") {
  enum class Told { yes, no, by_an_event_that_is_gone };
  auto const run = [](bool legacy, Told told, unsigned expected) {
    CAPTURE(legacy);
    CAPTURE(expected);
    Device const one;
    auto const stream = legacy ? one.api->legacy_stream(2) : one.api->create_user_stream(2);
    std::byte* const tensor = one.api->allocate(2, 16);
    one.api->write(tensor, all(16, 1));
    one.api->fill(stream, tensor, 16, std::byte{2});
    auto event = one.driver->record(2, one.api->handle(stream));
    one.api->fill(stream, tensor, 16, std::byte{3});   // after the moment of record()
    auto const lane = one.driver->lane(2);
    auto const buffer = lane->buffer(0, 16);
    if (told != Told::no) lane->after(*event);
    if (told == Told::by_an_event_that_is_gone) event.reset();
    lane->copy(buffer.data(), 16, tensor, 16, 16, 1);
    lane->finish();
    CHECK(bytes_at(buffer.data(), 16) == all(16, expected));
  };
  for (bool const legacy : {false, true}) {
    run(legacy, Told::yes, 2);
    run(legacy, Told::no, 1);
    run(legacy, Told::by_an_event_that_is_gone, 2);
  }
}

TEST_CASE("StreamDriver: an event is done when the work before it is, and does none itself that comes later") {
  Device const one;
  auto const stream = one.api->create_user_stream(1);
  int done = 0;
  one.api->launch(stream, [&] { done = 1; });
  one.api->delay(stream, 5);
  auto const event = one.driver->record(1, one.api->handle(stream));
  one.api->launch(stream, [&] { done = 2; });
  CHECK(done == 0);
  int asked = 0;
  while (!event->done()) ++asked;
  CHECK(asked >= 5);
  CHECK(done == 1);
  CHECK(event->done());
  CHECK(one.api->last_error() == 0);
}

TEST_CASE("StreamDriver: a kernel that overwrites the source waits for the lane if the stream is ordered after its mark, and not otherwise") {
  for (bool const ordered : {true, false}) {
    CAPTURE(ordered);
    Device const one;
    auto const stream = one.api->create_user_stream(1);
    std::byte* const tensor = one.api->allocate(1, 16);
    one.api->fill(stream, tensor, 16, std::byte{1});
    auto const event = one.driver->record(1, one.api->handle(stream));
    auto const lane = one.driver->lane(1);
    lane->after(*event);
    auto const buffer = lane->buffer(0, 16);
    lane->copy(buffer.data(), 16, tensor, 16, 16, 1);
    auto const mark = lane->mark();
    if (ordered) one.driver->order(1, one.api->handle(stream), *mark);
    one.api->fill(stream, tensor, 16, std::byte{2});
    one.api->synchronize(stream);   // the device is quick
    lane->finish();
    CHECK(bytes_at(buffer.data(), 16) == all(16, ordered ? 1 : 2));
    CHECK(one.api->read(tensor, 16) == all(16, 2));
    while (!mark->done()) {}
  }
}

TEST_CASE("StreamDriver: a stream of another device can be ordered after a lane") {
  Device const one;
  auto const stream = one.api->create_user_stream(2);
  std::byte* const tensor = one.api->allocate(1, 16);
  auto const lane = one.driver->lane(1);
  auto const buffer = lane->buffer(0, 16);
  std::fill(buffer.begin(), buffer.end(), std::byte{5});
  lane->copy(tensor, 16, buffer.data(), 16, 16, 1);
  one.driver->order(2, one.api->handle(stream), *lane->mark());
  Bytes seen;
  one.api->launch(stream, [&] { seen = one.api->read(tensor, 16); });
  one.api->synchronize(stream);
  CHECK(seen == all(16, 5));
}

TEST_CASE("StreamDriver: the caller's device is current after every call, and only those of tensors ever are") {
  Device const one;
  one.api->make_current(2);
  auto const stream = one.api->create_user_stream(1);
  std::byte* const tensor = one.api->allocate(1, 64);
  auto const same = [&] { CHECK(one.api->current_ordinal() == 2); };
  {
    one.driver->where(tensor), same();
    auto const event = one.driver->record(1, one.api->handle(stream));
    same();
    auto const lane = one.driver->lane(1);
    same();
    lane->after(*event), same();
    auto const buffer = lane->buffer(0, 64);
    same();
    lane->copy(buffer.data(), 8, tensor, 16, 4, 4), same();
    auto const mark = lane->mark();
    same();
    one.driver->order(1, one.api->handle(stream), *mark), same();
    mark->done(), same();
    lane->finish(), same();
    CHECK_THROWS_AS(lane->copy(buffer.data(), 2, tensor, 16, 4, 4), dcp::Error);
    same();
    CHECK_THROWS_AS(one.driver->lane(17), dcp::Error);
    same();
  }
  same();
  CHECK(one.api->contexts() == std::set<int>{1});
  one.api->make_current(1);
  Device const other;
  other.api->make_current(1);
  {
    auto const lane = other.driver->lane(1);
    lane->buffer(0, 64);
  }
  CHECK(other.api->contexts() == std::set<int>{1});
}

TEST_CASE("StreamDriver: lanes are used again, and after the first time memory is neither pinned nor unpinned") {
  Device one;
  auto const stream = one.api->create_user_stream(1);
  std::byte* const tensor = one.api->allocate(1, 5000);
  Bytes out;
  save_once(*one.driver, 1, one.api->handle(stream), tensor, 5000, out);
  load_once(*one.driver, 1, one.api->handle(stream), tensor, numbered(5000));
  CHECK(one.api->pinned_bytes() == 10000);
  CHECK(one.api->calls("allocate_pinned") == 2);
  for (int round = 0; round < 20; ++round) {
    save_once(*one.driver, 1, one.api->handle(stream), tensor, 5000, out);
    CHECK(out == numbered(5000));
    load_once(*one.driver, 1, one.api->handle(stream), tensor, numbered(5000));
  }
  CHECK(one.api->pinned_bytes() == 10000);
  CHECK(one.api->calls("allocate_pinned") == 2);
  CHECK(one.api->calls("free_pinned") == 0);
  CHECK(one.api->streams() == 1);
  CHECK(one.api->events() == 1);   // the lane's own
  {
    auto const first = one.driver->lane(1), second = one.driver->lane(1), elsewhere = one.driver->lane(0);
    CHECK(first.get() != second.get());
    CHECK(one.api->streams() == 3);
  }
  one.driver.reset();
  CHECK(one.api->pinned_bytes() == 0);
  CHECK(one.api->streams() == 0);
  CHECK(one.api->events() == 0);
}

TEST_CASE("StreamDriver: a buffer grows after the copies from it, and stays where it is otherwise") {
  Device const one;
  auto const lane = one.driver->lane(1);
  std::byte* const tensor = one.api->allocate(1, 10000);
  auto const buffer = lane->buffer(0, 100);
  std::fill(buffer.begin(), buffer.end(), std::byte{6});
  lane->copy(tensor, 100, buffer.data(), 100, 100, 1);
  CHECK(lane->buffer(0, 50).data() == buffer.data());
  lane->buffer(0, 10000);
  CHECK(one.api->read(tensor, 100) == all(100, 6));
  CHECK(one.api->pinned_bytes() == 10000);
}

TEST_CASE("StreamDriver: memory that cannot be pinned is pageable, and counted") {
  Device const one;
  one.api->limit_pinned(1000);
  {
    auto const lane = one.driver->lane(0);
    CHECK(lane->buffer(0, 2000).size() == 2000);
    CHECK(one.api->last_error() == 0);   // the program is not told by its next call
  }
  CHECK(one.driver->unpinned_bytes() == 2000);
  auto const stream = one.api->create_user_stream(1);
  std::byte* const tensor = one.api->allocate(1, 5000);
  one.api->write_later(stream, tensor, numbered(5000));
  Bytes out;
  save_once(*one.driver, 1, one.api->handle(stream), tensor, 5000, out);
  CHECK(out == numbered(5000));
  CHECK(one.driver->unpinned_bytes() == 7000);
  CHECK(one.api->pinned_bytes() == 0);
  load_once(*one.driver, 1, one.api->handle(stream), tensor, numbered(900, 9));
  CHECK(one.api->read(tensor, 900) == numbered(900, 9));
  CHECK(one.driver->unpinned_bytes() == 7000);
  CHECK(one.api->pinned_bytes() == 900);
}

TEST_CASE("StreamDriver: law: whichever call fails, that is an error that names the driver, and the next lane works") {
  // Of these a failure is made up for, or nobody can do anything about it.
  std::set<std::string> const tolerated{"leave", "allocate_pinned", "free_pinned", "destroy_event", "destroy_stream"};
  int refused = 0;
  for (std::string const name : {"where", "enter", "leave", "create_stream", "destroy_stream", "create_event", "destroy_event", "record", "wait", "query", "copy", "copy_rows", "allocate_pinned", "free_pinned", "transfer"}) {
    CAPTURE(name);
    for (int nth = 1;; ++nth) {
      CAPTURE(nth);
      Device one;
      std::byte* const tensor = one.api->allocate(1, 64);
      auto const work = [&] {
        auto const stream = one.api->create_user_stream(1);   // the one before may have waited for a copy that failed
        auto const place = one.driver->where(tensor);
        CHECK(place.kind == MemoryKind::device);
        one.api->write_later(stream, tensor, numbered(64));
        auto const event = one.driver->record(1, one.api->handle(stream));
        auto const lane = one.driver->lane(1);
        lane->after(*event);
        auto buffer = lane->buffer(0, 32);
        buffer = lane->buffer(0, 64);
        lane->copy(buffer.data(), 64, tensor, 64, 64, 1);
        lane->copy(buffer.data() + 4, 16, tensor, 16, 4, 4);
        auto const mark = lane->mark();
        one.driver->order(1, one.api->handle(stream), *mark);
        while (!mark->done()) {}
        lane->finish();
        Bytes expected = numbered(64);
        for (std::size_t row = 0; row < 4; ++row)
          for (std::size_t i = 0; i < 4; ++i) expected[4 + row * 16 + i] = numbered(64)[row * 16 + i];
        CHECK(bytes_at(buffer.data(), 64) == expected);
      };
      one.api->fail(name, nth, 999);
      auto const error = error_of(work);
      one.api->fail_nothing();
      bool const reached = (name == "transfer" ? nth <= 2 : one.api->calls(name) >= nth);
      CHECK(one.api->last_error() == 0);
      if (error) {
        ++refused;
        CHECK(reached);
        CHECK(error->code() == dcp::ErrorCode::device);
        CHECK(error->message().find("simulated device") != std::string::npos);
        CHECK(error->message().find("999") != std::string::npos);
        CHECK_FALSE(tolerated.contains(name));
      }
      one.api->make_current(0);   // if going back to it was what failed
      CHECK_FALSE(error_of(work));
      if (name != "destroy_event" && name != "destroy_stream") CHECK(one.api->streams() <= 2);
      one.driver.reset();
      if (!reached) {
        CHECK_FALSE(error);
        break;
      }
      REQUIRE(nth < 1000);
    }
  }
  CHECK(refused > 30);
}

TEST_CASE("StreamDriver: a copy that fails in the middle is an error of finish(), and its lane and buffers are not used again") {
  Device const one;
  std::byte* const tensor = one.api->allocate(1, 64);
  one.api->write(tensor, all(64, 7));
  std::byte const* abandoned = nullptr;
  {
    auto const lane = one.driver->lane(1);
    auto const buffer = lane->buffer(0, 64);
    abandoned = buffer.data();
    one.api->fail("transfer", 1, 719);
    lane->copy(buffer.data(), 64, tensor, 64, 64, 1);
    auto const mark = lane->mark();
    auto const error = error_of([&] { lane->finish(); });
    REQUIRE(error);
    CHECK(error->code() == dcp::ErrorCode::device);
    CHECK(error->message().find("719") != std::string::npos);
    CHECK(bytes_at(buffer.data(), 32) == all(32, 7));
    CHECK(bytes_at(buffer.data() + 32, 32) == all(32, 0));
    CHECK(error_of([&] {
      while (!mark->done()) {}
    }));
  }
  CHECK(one.api->calls("free_pinned") == 0);
  auto const lane = one.driver->lane(1);
  auto const buffer = lane->buffer(0, 64);
  CHECK(buffer.data() != abandoned);
  lane->copy(buffer.data(), 64, tensor, 64, 64, 1);
  lane->finish();
  CHECK(bytes_at(buffer.data(), 64) == all(64, 7));
}

TEST_CASE("StreamDriver: a lane that was refused a copy is given up when those before have ended, and leaves nothing") {
  Device const one;
  std::byte* const tensor = one.api->allocate(1, 64);
  one.api->write(tensor, all(64, 7));
  void* outer = nullptr;
  REQUIRE(one.api->allocate_pinned(outer, 64) == 0);
  {
    auto const lane = one.driver->lane(1);
    lane->buffer(1, 64);
    lane->copy(static_cast<std::byte*>(outer), 64, tensor, 64, 64, 1);
    one.api->fail("copy", 1, 999);
    CHECK_THROWS_AS(lane->copy(static_cast<std::byte*>(outer), 64, tensor, 64, 64, 1), dcp::Error);
  }
  CHECK(bytes_at(static_cast<std::byte*>(outer), 64) == all(64, 7));
  CHECK(one.api->streams() == 0);
  CHECK(one.api->events() == 0);
  CHECK(one.api->pinned_bytes() == 64);
}

TEST_CASE("StreamDriver: of a lost device every call is an error, and others go on") {
  Device one;
  auto const lost = one.api->create_user_stream(1), other = one.api->create_user_stream(2);
  std::byte* const tensor = one.api->allocate(1, 64);
  std::byte* const fine = one.api->allocate(2, 64);
  auto const event = one.driver->record(1, one.api->handle(lost));
  auto const is_device_error = [](auto body) {
    auto const error = error_of(body);
    REQUIRE(error);
    CHECK(error->code() == dcp::ErrorCode::device);
    CHECK(error->message().find("the device is gone") != std::string::npos);
  };
  {
    auto const lane = one.driver->lane(1), idle = one.driver->lane(1);
    auto const buffer = lane->buffer(0, 64);
    lane->copy(buffer.data(), 64, tensor, 64, 64, 1);
    one.api->lose(1);
    is_device_error([&] { lane->finish(); });
    is_device_error([&] { lane->copy(buffer.data(), 64, tensor, 64, 64, 1); });
    is_device_error([&] { lane->after(*event); });
    is_device_error([&] { lane->mark(); });
    is_device_error([&] { lane->buffer(1, 64); });
  }
  is_device_error([&] { event->done(); });
  is_device_error([&] { one.driver->record(1, one.api->handle(lost)); });
  is_device_error([&] { one.driver->order(1, one.api->handle(lost), *event); });
  is_device_error([&] { one.driver->where(tensor); });
  one.api->write_later(other, fine, numbered(64));
  Bytes out;
  save_once(*one.driver, 2, one.api->handle(other), fine, 64, out);
  CHECK(out == numbered(64));
  CHECK(one.api->last_error() == 0);
  one.driver.reset();   // with an idle lane of the lost device
}

TEST_CASE("StreamDriver: work that does not end is a timeout, and what it may touch is never used again or freed") {
  Device one{2, std::chrono::milliseconds{30}};
  auto const stream = one.api->create_user_stream(1);
  std::byte* const tensor = one.api->allocate(1, 64);
  one.api->write(tensor, all(64, 8));
  one.api->hold(stream);
  std::byte const* abandoned = nullptr;
  auto const begin = std::chrono::steady_clock::now();
  {
    auto const event = one.driver->record(1, one.api->handle(stream));
    auto const lane = one.driver->lane(1);
    auto const buffer = lane->buffer(0, 64);
    abandoned = buffer.data();
    lane->after(*event);
    lane->copy(buffer.data(), 64, tensor, 64, 64, 1);
    auto const error = error_of([&] { lane->finish(); });
    REQUIRE(error);
    CHECK(error->code() == dcp::ErrorCode::timeout);
    CHECK(error->message().find("simulated device") != std::string::npos);
    CHECK(std::chrono::steady_clock::now() - begin >= std::chrono::milliseconds{30});
  }
  SUBCASE("while the driver is there") {}
  SUBCASE("after it is gone") { one.driver = std::make_shared<Driver>(one.api); }
  // The device goes on; what it writes to is still there.
  auto const lane = one.driver->lane(1);
  CHECK(lane->buffer(0, 64).data() != abandoned);
  one.api->release(stream);
  one.api->drain();
  CHECK(bytes_at(abandoned, 64) == all(64, 8));
  CHECK(one.api->calls("free_pinned") == 0);
  CHECK(one.api->last_error() == 0);
}

TEST_CASE("StreamDriver: a lane that has timed out is not waited for again when it is given back") {
  Device const one{2, std::chrono::milliseconds{200}};
  auto const stream = one.api->create_user_stream(1);
  std::byte* const tensor = one.api->allocate(1, 64);
  one.api->hold(stream);
  auto const event = one.driver->record(1, one.api->handle(stream));
  auto lane = one.driver->lane(1);
  lane->after(*event);
  lane->copy(lane->buffer(0, 64).data(), 64, tensor, 64, 64, 1);
  CHECK_THROWS_AS(lane->finish(), dcp::Error);
  int const asked = one.api->calls("query");
  lane.reset();
  CHECK(one.api->calls("query") == asked);
}

TEST_CASE("StreamDriver: who has a lane next does not wait for what its last user was to come after") {
  Device const one{2, std::chrono::milliseconds{30}};
  auto const stuck = one.api->create_user_stream(1);
  std::byte* const tensor = one.api->allocate(1, 64);
  one.api->write(tensor, all(64, 8));
  one.api->hold(stuck);
  one.driver->lane(1)->after(*one.driver->record(1, one.api->handle(stuck)));   // and gives up
  auto const lane = one.driver->lane(1);
  auto const buffer = lane->buffer(0, 64);
  lane->copy(buffer.data(), 64, tensor, 64, 64, 1);
  CHECK_FALSE(error_of([&] { lane->finish(); }));
  CHECK(bytes_at(buffer.data(), 64) == all(64, 8));
}

TEST_CASE("StreamDriver: a lane that is given back in between is waited for first") {
  Device const one;
  std::byte* const tensor = one.api->allocate(1, 64);
  one.api->write(tensor, all(64, 8));
  std::byte const* at = nullptr;
  {
    auto const lane = one.driver->lane(1);
    auto const buffer = lane->buffer(0, 64);
    at = buffer.data();
    lane->copy(buffer.data(), 64, tensor, 64, 64, 1);
  }
  CHECK(bytes_at(at, 64) == all(64, 8));
  CHECK(one.api->streams() == 1);
}

TEST_CASE("StreamDriver: law: several threads save and load at once, on devices that work late and devices that work early") {
  auto const seed = dcp::test::first_seed();
  CAPTURE(seed);
  for (std::uint64_t round = 0; round < 6; ++round) {
    CAPTURE(round);
    Device one{3, std::chrono::minutes{10}, seed + round};
    one.api->eager(round % 2 == 0 ? 0 : 3);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (int number = 0; number < 4; ++number) threads.emplace_back([&, number] {
      int const ordinal = number % 3;
      auto const stream = one.api->create_user_stream(ordinal);
      std::size_t const bytes = 200 + static_cast<std::size_t>(number);
      std::byte* const tensor = one.api->allocate(ordinal, bytes);
      Bytes out;
      for (unsigned step = 1; step <= 20; ++step) {
        one.api->write_later(stream, tensor, numbered(bytes, step));
        save_once(*one.driver, ordinal, one.api->handle(stream), tensor, bytes, out);
        if (out != numbered(bytes, step)) ++wrong;
        load_once(*one.driver, ordinal, one.api->handle(stream), tensor, numbered(bytes, step + 100));
        Bytes seen;
        one.api->launch(stream, [&] { seen = one.api->read(tensor, bytes); });
        if (one.api->synchronize(stream) != 0 || seen != numbered(bytes, step + 100)) ++wrong;
        if (one.api->current_ordinal() != 0 || one.api->last_error() != 0) ++wrong;
      }
    });
    for (auto& thread : threads) thread.join();
    CHECK(wrong == 0);
    CHECK(one.api->streams() <= 4);
    one.driver.reset();
    CHECK(one.api->pinned_bytes() == 0);
    CHECK(one.api->events() == 0);
  }
}

TEST_CASE("StreamDriver: a lane decodes in its order, from its own pinned buffers alone, and says so where there is no kernel") {
  Device device;
  auto& api = *device.api;
  std::byte* const tensor = api.allocate(1, 64);
  auto const stream = api.create_user_stream(1);
  api.fill(stream, tensor, 64, std::byte{7});   // done late; the lane comes after it
  auto const event = device.driver->record(1, api.handle(stream));
  auto const lane = device.driver->lane(1);
  lane->after(*event);
  auto const buffer = lane->buffer(1, 64);
  float const scale = 2;
  std::memcpy(buffer.data() + 32, &scale, 4);
  for (std::size_t i = 0; i < 16; ++i) buffer[i] = static_cast<std::byte>(i);
  dcp::DeviceDecode work;
  work.code = dcp::DeviceDecode::Codes::i8;
  work.codes = buffer.data(), work.code_bytes = 16;
  work.scales = buffer.data() + 32, work.scale_bytes = 4;
  work.values = tensor;
  work.columns = {.count = 16, .codes = 1, .values = 1, .group = 16};
  CHECK_FALSE(lane->decode(work));
  api.decodes(true);
  Bytes const elsewhere(64);
  for (int which = 0; which < 2; ++which) {
    dcp::DeviceDecode other = work;
    (which == 0 ? other.codes : other.scales) = elsewhere.data();
    CHECK_FALSE(lane->decode(other));
    (which == 0 ? other.codes : other.scales) = buffer.data() + 60;
    (which == 0 ? other.code_bytes : other.scale_bytes) = 8192;
    CHECK_FALSE(lane->decode(other));
  }
  CHECK(api.pending() > 0);
  REQUIRE(lane->decode(work));
  lane->finish();
  std::vector<float> values(16);
  auto const bytes = api.read(tensor, 64);
  std::memcpy(values.data(), bytes.data(), 64);
  for (std::size_t i = 0; i < values.size(); ++i) CHECK(values[i] == 2 * static_cast<float>(i));

  // Pageable memory is out of the device's reach.
  Device without;
  without.api->decodes(true);
  without.api->limit_pinned(0);
  auto const other = without.driver->lane(0);
  work.codes = other->buffer(0, 64).data();
  work.scales = work.codes + 32;
  CHECK_FALSE(other->decode(work));
  CHECK(without.api->calls("decode") == 0);
}
